"""ControlNet: a copy of the UNet's way down that reads a picture (Zhang et al. 2023).

https://arxiv.org/abs/2302.05543; `ControlNetModel` in diffusers. What it makes of the picture is
added to the skips and the middle of the UNet. Its last convolutions start as zeros, so that it
changes nothing before it has learned something.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.layers import conv1x1, conv3x3
from sdjax.models.unet import Condition, Encoder


class HintEmbedding(nn.Module):
  """Convolutions from pixels to the features of the first level, at the latents' resolution.

  Attributes:
    features: output channels.
    widths: channels after each halving, from full resolution down.
    dtype: of the convolutions.
  """
  features: int
  widths: tuple[int, ...]
  dtype: str

  @nn.compact
  def __call__(self, hint: jax.Array) -> jax.Array:  # [b H W c] -> [b h w features]
    x = nn.silu(conv3x3(self.widths[0], self.dtype, "conv_in")(hint))
    for i, (before, after) in enumerate(zip(self.widths, self.widths[1:])):
      x = nn.silu(conv3x3(before, self.dtype, f"blocks_{2 * i}")(x))
      x = nn.silu(conv3x3(after, self.dtype, f"blocks_{2 * i + 1}", stride=2)(x))
    return conv3x3(self.features, self.dtype, "conv_out")(x)


class ControlNet(Encoder):
  """Makes residuals for `UNet.__call__` from a picture of edges, poses, depths, …

  Attributes, beside those of `Encoder`, whose values are those of the UNet it is for:
    hint_channels: of the picture (conditioning_channels).
    hint_widths: see `HintEmbedding` (conditioning_embedding_out_channels).
    hint_order: "rgb", or "bgr" for a network trained on reversed channels; what makes the picture
      has to care (controlnet_conditioning_channel_order).
    pool: each residual is its mean over the picture (global_pool_conditions), as in Shuffle.
  """
  hint_channels: int = 3
  hint_widths: tuple[int, ...] = (16, 32, 96, 256)
  hint_order: str = "rgb"
  pool: bool = False

  def example(self, batch: int = 1, side: tuple[int, int] | None = None, length: int = 77) -> tuple:
    """Returns (x, t, condition, hint) of the right shapes."""
    x, t, condition = super().example(batch, side, length)
    factor = 2 ** (len(self.hint_widths) - 1)
    shape = (batch, factor * x.shape[1], factor * x.shape[2], self.hint_channels)
    return x, t, condition, jax.ShapeDtypeStruct(shape, jnp.float32)

  @nn.compact
  def __call__(
      self,
      x: jax.Array,           # [b h w in_channels]
      t: jax.Array,           # [b] float32, 0…999
      condition: Condition,
      hint: jax.Array,        # [b 8h 8w hint_channels] in [0, 1]
  ) -> tuple[jax.Array, ...]:
    """Returns float32 residuals: one per skip of the UNet, first skip first, then the middle's."""
    time = self.embed(t, condition)
    width = self.block_out_channels[0]
    x = conv3x3(width, self.dtype, "conv_in")(x)
    x = x + HintEmbedding(
        width, self.hint_widths, self.dtype, name="controlnet_cond_embedding")(hint)
    x, skips = self.descend(x, time, condition.context, train=False)

    names = [f"controlnet_down_blocks_{i}" for i in range(len(skips))] + ["controlnet_mid_block"]
    residuals = [conv1x1(y.shape[-1], self.dtype, name)(y)
                 for name, y in zip(names, [*skips, x], strict=True)]
    if self.pool:
      residuals = [y.mean(axis=(1, 2), keepdims=True) for y in residuals]
    return tuple(y.astype(jnp.float32) for y in residuals)
