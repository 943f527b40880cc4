"""The autoencoder between pixels and latents (`AutoencoderKL` in diffusers).

  image [b H W 3] ─► encoder ─► quant_conv ─► mean, log variance [b h w 2c]
  latents [b h w c] ─► post_quant_conv ─► decoder ─► image

Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.1. Norms have epsilon 1e-6. The
autoencoders of 16 channels (Esser et al. 2024, https://arxiv.org/abs/2403.03206) have neither
quant_conv nor post_quant_conv.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.layers import (
  AttentionBlock,
  Downsample,
  ResnetBlock,
  Upsample,
  conv1x1,
  conv3x3,
  group_norm,
)


class MidBlock(nn.Module):
  """The lowest level of encoder and decoder."""
  resnet: Callable[..., nn.Module]
  attend: bool
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b h w c]
    x = self.resnet(x.shape[-1], name="resnets_0")(x)
    if self.attend:
      x = AttentionBlock(1, self.groups, 1e-6, self.dtype, name="attentions_0")(x)
    return self.resnet(x.shape[-1], name="resnets_1")(x)


class Level(nn.Module):
  """Residual blocks at one resolution, then a change of resolution.

  Attributes:
    features: output channels.
    layers: residual blocks.
    resnet: makes a ResnetBlock of given features and name.
    resample: makes what follows them; None at the last level.
  """
  features: int
  layers: int
  resnet: Callable[..., nn.Module]
  resample: Callable[[], nn.Module] | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b h w c]
    for i in range(self.layers):
      x = self.resnet(self.features, name=f"resnets_{i}")(x)
    return self.resample()(x) if self.resample else x


class Encoder(nn.Module):
  """Images to features of 2 × latent_channels. Fields as in `AutoencoderKL`."""
  out_channels: int
  block_out_channels: tuple[int, ...]
  layers_per_block: int
  norm_groups: int
  mid_block_attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b H W c] -> [b h w out_channels]
    resnet = functools.partial(
        ResnetBlock, groups=self.norm_groups, epsilon=1e-6, dtype=self.dtype)
    downsample = functools.partial(
        Downsample, padding=(0, 1), dtype=self.dtype, name="downsamplers_0")
    end = len(self.block_out_channels) - 1

    x = conv3x3(self.block_out_channels[0], self.dtype, "conv_in")(x)
    for i, features in enumerate(self.block_out_channels):
      x = Level(features, self.layers_per_block, resnet, downsample if i < end else None,
                name=f"down_blocks_{i}")(x)
    x = MidBlock(resnet, self.mid_block_attention, self.norm_groups, self.dtype,
                 name="mid_block")(x)
    x = nn.silu(group_norm(self.norm_groups, 1e-6, "conv_norm_out")(x))
    return conv3x3(self.out_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
  """Features of latent_channels to images. Fields as in `AutoencoderKL`."""
  out_channels: int
  block_out_channels: tuple[int, ...]
  layers_per_block: int
  norm_groups: int
  mid_block_attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b h w c] -> [b H W out_channels]
    resnet = functools.partial(
        ResnetBlock, groups=self.norm_groups, epsilon=1e-6, dtype=self.dtype)
    upsample = functools.partial(Upsample, dtype=self.dtype, name="upsamplers_0")
    end = len(self.block_out_channels) - 1

    x = conv3x3(self.block_out_channels[-1], self.dtype, "conv_in")(x)
    x = MidBlock(resnet, self.mid_block_attention, self.norm_groups, self.dtype,
                 name="mid_block")(x)
    for i, features in enumerate(reversed(self.block_out_channels)):
      x = Level(features, self.layers_per_block + 1, resnet, upsample if i < end else None,
                name=f"up_blocks_{i}")(x)
    x = nn.silu(group_norm(self.norm_groups, 1e-6, "conv_norm_out")(x))
    return conv3x3(self.out_channels, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
  """Encodes images to a Gaussian over latents, and decodes latents.

  Attributes, with diffusers' names where they differ:
    in_channels, out_channels: of images.
    latent_channels: of latents.
    block_out_channels: of each level, from full resolution down; each but the last halves it.
    layers_per_block: residual blocks per level of the encoder; the decoder has one more.
    norm_groups: of every GroupNorm (norm_num_groups).
    mid_block_attention: whether the lowest level attends (mid_block_add_attention).
    scaling_factor, shift_factor: the diffusion model sees (latents - shift) · scaling. Not applied
      in here.
    quant_conv, post_quant_conv: whether there is a 1 × 1 convolution after the encoder, before the
      decoder (use_quant_conv, use_post_quant_conv).
    dtype: of convolutions and matrix products.
  """
  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_groups: int = 32
  mid_block_attention: bool = True
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0
  quant_conv: bool = True
  post_quant_conv: bool = True
  dtype: str = "float32"

  def example(self) -> tuple:
    """Returns the shape of an image."""
    side = self.downsampling
    return (jax.ShapeDtypeStruct((1, side, side, self.in_channels), jnp.float32),)

  @property
  def downsampling(self) -> int:
    """Pixels per latent, along one side."""
    return 2 ** (len(self.block_out_channels) - 1)

  def setup(self):
    # Not compact: encode and decode are doors of their own.
    shared = dict(
        block_out_channels=self.block_out_channels, layers_per_block=self.layers_per_block,
        norm_groups=self.norm_groups, mid_block_attention=self.mid_block_attention,
        dtype=self.dtype)
    moments = 2 * self.latent_channels
    self.encoder = Encoder(moments, **shared)
    self.decoder = Decoder(self.out_channels, **shared)
    # Not under the names of their parameters, which are those of fields.
    self.to_moments = self.from_latents = lambda x: x
    if self.quant_conv:
      self.to_moments = conv1x1(moments, self.dtype, "quant_conv")
    if self.post_quant_conv:
      self.from_latents = conv1x1(self.latent_channels, self.dtype, "post_quant_conv")

  def encode(self, image: jax.Array) -> jax.Array:
    """Returns mean and log variance [b h w 2c] float32 of images [b H W 3] in [-1, 1]."""
    return self.to_moments(self.encoder(image)).astype(jnp.float32)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Returns images [b H W 3] float32, about [-1, 1], of unscaled latents [b h w c]."""
    return self.decoder(self.from_latents(latents)).astype(jnp.float32)

  def __call__(
      self,
      image: jax.Array,                  # [b H W 3] in [-1, 1]
      noise: jax.Array | None = None,    # [b h w c] standard normal; None takes the mean
  ) -> tuple[jax.Array, jax.Array]:      # image [b H W 3], moments [b h w 2c]
    """Encodes, draws latents and decodes them: one pass of training."""
    moments = self.encode(image)
    latents, log_variance = jnp.split(moments, 2, axis=-1)
    if noise is not None:
      latents = latents + jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)) * noise
    return self.decode(latents), moments
