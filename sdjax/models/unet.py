"""The UNet of Stable Diffusion 1 and 2 (`UNet2DConditionModel` in diffusers).

  x ─► conv_in ─► down_blocks ─► mid_block ─► up_blocks ─► conv_out
                      └──────── skips ────────────┘
  t ─► time_embedding ─► every ResnetBlock;   context ─► every Transformer

Rombach et al. 2022, https://arxiv.org/abs/2112.10752.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models.layers import (
  Downsample,
  ResnetBlock,
  Upsample,
  conv3x3,
  dense,
  gelu,
  group_norm,
  layer_norm,
  multi_head_attention,
)


def sinusoids(t: jax.Array, width: int) -> jax.Array:  # [b] -> [b width] float32
  """Embeds timesteps as cosines, then sines, of `width`/2 frequencies from 1 down to 1e-4.

  Transformer position encoding (Vaswani et al. 2017, section 3.5), computed in float32 step by
  step as the released models were trained: at t = 999 one rounding more is seen in the sines.
  """
  half = width // 2
  exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
  angles = t.astype(jnp.float32)[:, None] * np.exp(exponents)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
  """Two Dense layers on the sinusoids of t, in float32: they are small, and t needs the digits."""
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b c] -> [b width]
    x = nn.silu(dense(self.width, "float32", "linear_1")(x))
    return dense(self.width, "float32", "linear_2")(x)


class Attention(nn.Module):
  """Attention without biases on queries, keys and values; to x itself where context is None."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:  # [b n d]
    return multi_head_attention(
        x, x if context is None else context, heads=self.heads, bias=False, dtype=self.dtype)


class GatedLinear(nn.Module):
  """GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202), with the exact GELU."""
  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b n d] -> [b n features]
    value, gate = jnp.split(dense(2 * self.features, self.dtype, "proj")(x), 2, -1)
    return value * gelu(gate)


class FeedForward(nn.Module):
  """GEGLU to four times the width and back."""
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b n d]
    width = x.shape[-1]
    h = GatedLinear(4 * width, self.dtype, name="net_0")(x)
    return dense(width, self.dtype, "net_2")(h)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention and feed-forward, each around a residual, norms first."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:  # [b n d], [b l c] -> [b n d]
    x = x + Attention(self.heads, self.dtype, name="attn1")(layer_norm("norm1")(x))
    x = x + Attention(self.heads, self.dtype, name="attn2")(layer_norm("norm2")(x), context)
    return x + FeedForward(self.dtype, name="ff")(layer_norm("norm3")(x))


class Transformer(nn.Module):
  """A transformer over the pixels of a feature map (`Transformer2DModel` in diffusers).

  Attributes:
    heads: of both attentions.
    groups: of the norm at its door, whose epsilon is 1e-6, unlike all others of the UNet.
    linear_projection: doors are Dense layers (SD2), else 1×1 convolutions (SD1): the same
      numbers, but kernels of other shapes.
    dtype: of the matrix products.
  """
  heads: int
  groups: int
  linear_projection: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:  # [b h w c], [b l d]
    b, h, w, c = x.shape
    if self.linear_projection:
      project = functools.partial(dense, c, self.dtype)
    else:
      project = functools.partial(nn.Conv, c, (1, 1), dtype=self.dtype)

    y = project(name="proj_in")(group_norm(self.groups, 1e-6, "norm")(x)).reshape(b, h * w, c)
    y = TransformerBlock(self.heads, self.dtype, name="transformer_blocks_0")(y, context)
    return x + project(name="proj_out")(y.reshape(x.shape))


class DownBlock(nn.Module):
  """One level on the way down. Fields as in `UpBlock`."""
  features: int
  layers: int
  resnet: Callable[..., nn.Module]
  transformer: Callable[..., nn.Module] | None
  last: bool
  dtype: str

  @nn.compact
  def __call__(self, x, time, context):  # -> x, skips
    skips = []
    for i in range(self.layers):
      x = self.resnet(self.features, name=f"resnets_{i}")(x, time)
      if self.transformer:
        x = self.transformer(name=f"attentions_{i}")(x, context)
      skips.append(x)
    if not self.last:
      x = Downsample(dtype=self.dtype, name="downsamplers_0")(x)
      skips.append(x)
    return x, skips


class MidBlock(nn.Module):
  """The lowest level. Fields as in `UpBlock`."""
  features: int
  resnet: Callable[..., nn.Module]
  transformer: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x, time, context):  # -> x
    x = self.resnet(self.features, name="resnets_0")(x, time)
    x = self.transformer(name="attentions_0")(x, context)
    return self.resnet(self.features, name="resnets_1")(x, time)


class UpBlock(nn.Module):
  """One level on the way up: reads the last `layers` skips, last first.

  Attributes:
    features: output channels.
    layers: residual blocks.
    resnet: makes a ResnetBlock of given features and name.
    transformer: makes the Transformer that follows each of them; None where there is none.
    last: no resampling comes after.
    dtype: of the resampling convolution.
  """
  features: int
  layers: int
  resnet: Callable[..., nn.Module]
  transformer: Callable[..., nn.Module] | None
  last: bool
  dtype: str

  @nn.compact
  def __call__(self, x, skips, time, context):  # -> x
    for i, skip in enumerate(reversed(skips[-self.layers:])):
      x = jnp.concatenate([x, skip], axis=-1)
      x = self.resnet(self.features, name=f"resnets_{i}")(x, time)
      if self.transformer:
        x = self.transformer(name=f"attentions_{i}")(x, context)
    if not self.last:
      # Odd sizes were rounded up on the way down: the skip knows the size to return to.
      x = Upsample(self.dtype, name="upsamplers_0")(x, skips[-self.layers - 1].shape[1:3])
    return x


class UNet(nn.Module):
  """Predicts from a noisy latent, a timestep and a text what the objective asks for.

  Attributes, with diffusers' names where they differ:
    in_channels, out_channels: of the latents.
    block_out_channels: of each level, from full resolution down.
    attention: which levels attend (down_block_types, up_block_types).
    layers_per_block: residual blocks per level on the way down; one more on the way up.
    num_heads: of each level (attention_head_dim, which misnames the number of heads).
    cross_attention_dim: width of the context.
    linear_projection: see `Transformer` (use_linear_projection).
    norm_groups: of every GroupNorm (norm_num_groups).
    mid_block: whether the lowest level has blocks of its own (mid_block_type).
    sample_size: side of the latents trained on, and what is drawn where no size is asked for;
      nothing in here depends on it.
    dropout: rate in the residual blocks while training.
    dtype: of convolutions and matrix products.
    remat: "none", or "blocks": the backward pass computes the inside of each ResnetBlock and
      Transformer again instead of keeping it in memory.
  """
  in_channels: int = 4
  out_channels: int = 4
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  attention: tuple[bool, ...] = (True, True, True, False)
  layers_per_block: int = 2
  num_heads: tuple[int, ...] = (8, 8, 8, 8)
  cross_attention_dim: int = 768
  linear_projection: bool = False
  norm_groups: int = 32
  mid_block: bool = True
  sample_size: int = 64
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"

  @property
  def downsampling(self) -> int:
    """Sides of x that are multiples of this are halved without rounding."""
    return 2 ** (len(self.block_out_channels) - 1)

  @nn.compact
  def __call__(
      self,
      x: jax.Array,        # [b h w in_channels], any height and width
      t: jax.Array,        # [b] float32, 0…999
      context: jax.Array,  # [b l cross_attention_dim]
      *,
      train: bool = False,
  ) -> jax.Array:          # [b h w out_channels] float32
    """Returns the network's raw output. While training with dropout, needs the rng "dropout"."""
    rematerialize = {"none": lambda module: module, "blocks": nn.remat}[self.remat]
    resnet = functools.partial(
        rematerialize(ResnetBlock), groups=self.norm_groups, epsilon=1e-5,
        dropout=self.dropout if train else 0.0, dtype=self.dtype)

    def transformer(level):
      return functools.partial(
          rematerialize(Transformer), heads=self.num_heads[level], groups=self.norm_groups,
          linear_projection=self.linear_projection, dtype=self.dtype)

    levels = [
        dict(features=features, resnet=resnet,
             transformer=transformer(i) if self.attention[i] else None)
        for i, features in enumerate(self.block_out_channels)]
    end = len(levels) - 1

    time = TimeEmbedding(4 * self.block_out_channels[0], name="time_embedding")(
        sinusoids(t, self.block_out_channels[0]))
    x = conv3x3(self.block_out_channels[0], self.dtype, "conv_in")(x)
    skips = [x]

    for i, level in enumerate(levels):
      x, more = DownBlock(**level, layers=self.layers_per_block, last=i == end,
                          dtype=self.dtype, name=f"down_blocks_{i}")(x, time, context)
      skips += more

    if self.mid_block:
      x = MidBlock(self.block_out_channels[-1], resnet, transformer(end),
                   name="mid_block")(x, time, context)

    layers = self.layers_per_block + 1
    for i, level in enumerate(reversed(levels)):
      x = UpBlock(**level, layers=layers, last=i == end,
                  dtype=self.dtype, name=f"up_blocks_{i}")(x, skips, time, context)
      skips = skips[:-layers]

    x = nn.silu(group_norm(self.norm_groups, 1e-5, "conv_norm_out")(x))
    return conv3x3(self.out_channels, self.dtype, "conv_out")(x).astype(jnp.float32)
