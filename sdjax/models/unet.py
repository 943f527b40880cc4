"""The UNet of Stable Diffusion 1, 2 and XL, and that of DDPM.

  x ─► conv_in ─► down_blocks ─► mid_block ─► up_blocks ─► conv_out
                      └──────── skips ────────────┘
  t, size, label ─► every ResnetBlock;   context ─► every Transformer

`UNet2DConditionModel` in diffusers (Rombach et al. 2022, https://arxiv.org/abs/2112.10752; Podell
et al. 2023, https://arxiv.org/abs/2307.01952), and, where there is no context, `UNet2DModel` (Ho et
al. 2020, https://arxiv.org/abs/2006.11239).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models.layers import (
  AttentionBlock,
  Downsample,
  ResnetBlock,
  Upsample,
  conv1x1,
  conv3x3,
  dense,
  gelu,
  group_norm,
  layer_norm,
  multi_head_attention,
)
from sdjax.models.perturbed_attention import perturbed_attention
from sdjax.models.remat import POLICIES, named_outputs


def sinusoids(
    t: jax.Array,              # [b]
    width: int,
    sines_first: bool = False,
    shift: int = 0,
) -> jax.Array:                # [b width] float32
  """Embeds numbers as cosines and sines of `width`/2 frequencies from 1 down to about 1e-4.

  Transformer position encoding (Vaswani et al. 2017, section 3.5), computed in float32 step by
  step as the released models were trained: at t = 999 one rounding more is seen in the sines.

  Args:
    t: timesteps, sizes in px, …
    width: of the embedding; even.
    sines_first: the order of DDPM; Stable Diffusion has cosines first.
    shift: 1 makes the last frequency exactly 1e-4 (DDPM); 0 stops one short of it.
  """
  half = width // 2
  exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
  angles = t.astype(jnp.float32)[:, None] * np.exp(exponents / np.float32(half - shift))
  waves = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(waves if sines_first else waves[::-1], axis=-1)


class TimeEmbedding(nn.Module):
  """Two Dense layers on sinusoids, in float32: they are small, and t needs the digits."""
  width: int

  @nn.compact
  def __call__(
      self,
      x: jax.Array,                        # [b c]
      guidance: jax.Array | None = None,   # [b d]: sinusoids of a guidance scale
  ) -> jax.Array:                          # [b width]
    if guidance is not None:
      x = x + dense(x.shape[-1], "float32", "cond_proj", bias=False)(guidance)
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
  """Two attentions and a feed-forward, each around a residual, norms first. See `Transformer`."""
  heads: int
  self_attention: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:  # [b n d], [b l c] -> [b n d]
    first = None if self.self_attention else context
    x = x + Attention(self.heads, self.dtype, name="attn1")(layer_norm("norm1")(x), first)
    x = x + Attention(self.heads, self.dtype, name="attn2")(layer_norm("norm2")(x), context)
    return x + FeedForward(self.dtype, name="ff")(layer_norm("norm3")(x))


class Transformer(nn.Module):
  """A transformer over the pixels of a feature map (`Transformer2DModel` in diffusers).

  Attributes:
    heads: of all attentions.
    groups: of the norm at its door, whose epsilon is 1e-6, unlike all others of the UNet.
    layers: blocks one after another; up to 10 in SDXL.
    self_attention: the first attention of each block is to x itself, else to the context as well.
    linear_projection: doors are Dense layers (SD2), else 1×1 convolutions (SD1): the same
      numbers, but kernels of other shapes.
    dtype: of the matrix products.
  """
  heads: int
  groups: int
  layers: int
  self_attention: bool
  linear_projection: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:  # [b h w c], [b l d]
    b, h, w, c = x.shape
    project = functools.partial(dense if self.linear_projection else conv1x1, c, self.dtype)

    y = project(name="proj_in")(group_norm(self.groups, 1e-6, "norm")(x)).reshape(b, h * w, c)
    for i in range(self.layers):
      y = TransformerBlock(
          self.heads, self.self_attention, self.dtype, name=f"transformer_blocks_{i}")(y, context)
    return x + project(name="proj_out")(y.reshape(x.shape))


class DownBlock(nn.Module):
  """One level on the way down. Fields as in `UpBlock`.

  Attributes:
    padding: of the resampling convolution, see `Downsample`.
  """
  features: int
  layers: int
  resnet: Callable[..., nn.Module]
  transformer: Callable[..., nn.Module] | None
  last: bool
  padding: tuple[int, int]
  dtype: str

  @nn.compact
  def __call__(self, x, time, context, feature=None):  # -> x, skips
    """`feature`, of a T2I-Adapter, is added after the transformers, or else to the result."""
    skips = []
    for i in range(self.layers):
      x = self.resnet(self.features, name=f"resnets_{i}")(x, time)
      if self.transformer:
        x = self.transformer(name=f"attentions_{i}")(x, context)
      skips.append(x)
    if self.transformer and feature is not None:
      x = skips[-1] = x + feature
    if not self.last:
      x = Downsample(self.padding, self.dtype, name="downsamplers_0")(x)
      skips.append(x)
    if not self.transformer and feature is not None:
      x = skips[-1] = x + feature
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
    transformer: makes what attends after each of them; None where nothing does.
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


class Condition(NamedTuple):
  """What a network reads beside x and t; None where it has no use for it.

  Attributes:
    context: [b l d], what transformers attend to.
    pooled: [b d], a whole text as one vector (SDXL).
    size: [b n], numbers embedded one by one (SDXL: sizes and crop in px, or a score).
    label: int32 [b], a class, or the upscaler's noise level.
    guidance: [b], the guidance scale that a distilled network imitates (LCM).
    perturbed: bool [b], the images whose pixels look at themselves alone (PAG), see
      `UNet.perturbed_layers`.
  """
  context: jax.Array | None = None
  pooled: jax.Array | None = None
  size: jax.Array | None = None
  label: jax.Array | None = None
  guidance: jax.Array | None = None
  perturbed: jax.Array | None = None


NO_CONDITION = Condition()


class Encoder(nn.Module):
  """The way down, which the UNet and its ControlNets share.

  Attributes, with diffusers' names where they differ:
    in_channels: of x.
    block_out_channels: of each level, from full resolution down.
    attention: which levels attend (down_block_types, up_block_types).
    layers_per_block: residual blocks per level on the way down; one more on the way up.
    num_heads: of all levels or each (attention_head_dim, which misnames the number of heads).
    transformer_layers: of all levels or each (transformer_layers_per_block).
    self_attention: of all levels or each; False lets both attentions look at the context, as in
      the x4 upscaler (not only_cross_attention). The middle attends to itself always.
    cross_attention_dim: width of the context; None: blocks attend to themselves only.
    linear_projection: see `Transformer` (use_linear_projection).
    num_classes: labels known (num_class_embeds); None: takes none.
    added_dim: width of `pooled` and the sinusoids of `size` together
      (projection_class_embeddings_input_dim); None: takes neither.
    added_time_dim: width of the sinusoids of one number (addition_time_embed_dim).
    guidance_dim: width of the sinusoids of the guidance (time_cond_proj_dim); None: takes none.
    sines_first, frequency_shift: see `sinusoids` (not flip_sin_to_cos, freq_shift).
    norm_groups: of every GroupNorm (norm_num_groups).
    norm_epsilon: of all but those of transformers (norm_eps).
    downsample_padding: 1, or 0 for one after and none before.
    mid_block: whether the lowest level has blocks of its own (mid_block_type).
    dropout: rate in the residual blocks while training.
    dtype: of convolutions and matrix products.
    remat: what the backward pass computes again, a key of `remat.POLICIES`.
  """
  in_channels: int = 4
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  attention: tuple[bool, ...] = (True, True, True, False)
  layers_per_block: int = 2
  num_heads: int | tuple[int, ...] = 8
  transformer_layers: int | tuple[int, ...] = 1
  self_attention: bool | tuple[bool, ...] = True
  cross_attention_dim: int | None = 768
  linear_projection: bool = False
  num_classes: int | None = None
  added_dim: int | None = None
  added_time_dim: int = 256
  guidance_dim: int | None = None
  sines_first: bool = False
  frequency_shift: int = 0
  norm_groups: int = 32
  norm_epsilon: float = 1e-5
  downsample_padding: int = 1
  mid_block: bool = True
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"

  @property
  def downsampling(self) -> int:
    """Sides of x that are multiples of this are halved without rounding."""
    return 2 ** (len(self.block_out_channels) - 1)

  def example(self, batch: int = 1, side: tuple[int, int] | None = None, length: int = 77) -> tuple:
    """Returns (x, t, condition) of the right shapes, as `jax.ShapeDtypeStruct`s."""
    side = side or (self.downsampling,) * 2
    def numbers(dim, *shape):
      return None if dim is None else jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    sizes = 6
    pooled = (self.added_dim or 0) - sizes * self.added_time_dim
    label = None if self.num_classes is None else jax.ShapeDtypeStruct((batch,), jnp.int32)
    return numbers(1, *side, self.in_channels), numbers(1), Condition(
        context=numbers(self.cross_attention_dim, length, self.cross_attention_dim),
        pooled=numbers(self.added_dim, pooled), size=numbers(self.added_dim, sizes),
        label=label, guidance=numbers(self.guidance_dim))

  def embed(self, t: jax.Array, condition: Condition) -> jax.Array:  # [b] -> [b d]
    """Embeds all that is one vector per image, for the residual blocks."""
    width = 4 * self.block_out_channels[0]
    waves = functools.partial(
        sinusoids, sines_first=self.sines_first, shift=self.frequency_shift)
    guidance = None
    if self.guidance_dim is not None:
      # Luo et al. 2023, https://arxiv.org/abs/2310.04378, app. F, in the released model's units.
      guidance = sinusoids(
          1000.0 * (condition.guidance - 1), self.guidance_dim, sines_first=True, shift=1)
    time = TimeEmbedding(width, name="time_embedding")(
        waves(t, self.block_out_channels[0]), guidance)
    if self.num_classes is not None:
      time = time + nn.Embed(self.num_classes, width, name="class_embedding")(condition.label)
    if self.added_dim is not None:
      sizes = waves(condition.size.reshape(-1), self.added_time_dim).reshape(t.shape[0], -1)
      added = jnp.concatenate([condition.pooled.astype(jnp.float32), sizes], axis=-1)
      time = time + TimeEmbedding(width, name="add_embedding")(added)
    return time

  def level(self, i: int, train: bool, middle: bool = False) -> dict:
    """Returns the fields that the blocks of level i (-1: the last) have on both ways."""
    rematerialize = POLICIES[self.remat]
    heads, layers, self_attention = (
        value[i] if isinstance(value, tuple) else value
        for value in (self.num_heads, self.transformer_layers, self.self_attention))
    resnet = functools.partial(
        rematerialize(ResnetBlock), groups=self.norm_groups, epsilon=self.norm_epsilon,
        dropout=self.dropout if train else 0.0, dtype=self.dtype)
    if self.cross_attention_dim is None:
      transformer = functools.partial(
          rematerialize(AttentionBlock), heads=heads, groups=self.norm_groups,
          epsilon=self.norm_epsilon, dtype=self.dtype)
    else:
      transformer = functools.partial(
          rematerialize(Transformer), heads=heads, groups=self.norm_groups, layers=layers,
          self_attention=self_attention or middle, linear_projection=self.linear_projection,
          dtype=self.dtype)
    return dict(features=self.block_out_channels[i], resnet=resnet,
                transformer=transformer if self.attention[i] or middle else None)

  def descend(self, x, time, context, train, features=()):  # -> x, skips
    """Runs the way down and the middle. x comes from conv_in; `features` see `UNet.__call__`."""
    skips, features = [x], list(features)
    for i in range(len(self.block_out_channels)):
      x, more = DownBlock(
          **self.level(i, train), layers=self.layers_per_block,
          last=i == len(self.block_out_channels) - 1, padding=(self.downsample_padding, 1),
          dtype=self.dtype, name=f"down_blocks_{i}")(
              x, time, context, features.pop(0) if features else None)
      skips += more
    if self.mid_block:
      x = MidBlock(**self.level(-1, train, middle=True), name="mid_block")(x, time, context)
      x = x + features.pop(0) if features else x
    return x, skips


class UNet(Encoder):
  """Predicts from a noisy picture, a timestep and a condition what the objective asks for.

  Attributes, beside those of `Encoder`:
    out_channels: of the result.
    sample_size: side of the latents trained on, and what is drawn where no size is asked for;
      nothing in here depends on it.
    perturbed_layers: where `Condition.perturbed` acts, see `perturbed_attention`.
  """
  out_channels: int = 4
  sample_size: int = 64
  perturbed_layers: str = "mid_block"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,                             # [b h w in_channels], any height and width
      t: jax.Array,                             # [b] float32, 0…999
      condition: Condition = NO_CONDITION,
      *,
      residuals: Sequence[jax.Array] = (),
      features: Sequence[jax.Array] = (),
      train: bool = False,
  ) -> jax.Array:                               # [b h w out_channels] float32
    """Returns the network's raw output. While training with dropout, needs the rng "dropout".

    Args:
      x, t, condition: see above and `Condition`.
      residuals: of ControlNets, summed: one per skip, first skip first, then the middle's.
      features: of T2I-Adapters, summed: one per level, and SDXL's one for the middle.
      train: whether to drop out.
    """
    time = self.embed(t, condition)
    x = conv3x3(self.block_out_channels[0], self.dtype, "conv_in")(x)
    with (named_outputs(self.remat),
          perturbed_attention(self.perturbed_layers, condition.perturbed)):
      x, skips = self.descend(x, time, condition.context, train, features)
      if residuals:
        skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        x = x + residuals[-1]
      x = self.ascend(x, skips, time, condition.context, train)
    x = nn.silu(group_norm(self.norm_groups, self.norm_epsilon, "conv_norm_out")(x))
    return conv3x3(self.out_channels, self.dtype, "conv_out")(x).astype(jnp.float32)

  def ascend(self, x, skips, time, context, train):  # -> x
    """Runs the way up."""
    layers, levels = self.layers_per_block + 1, len(self.block_out_channels)
    for i in range(levels):
      x = UpBlock(**self.level(levels - 1 - i, train), layers=layers, last=i == levels - 1,
                  dtype=self.dtype, name=f"up_blocks_{i}")(x, skips, time, context)
      skips = skips[:-layers]
    return x
