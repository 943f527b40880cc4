"""T2I-Adapter: a picture of edges, poses, depths, … as features for the UNet's way down.

Mou et al. 2023, https://arxiv.org/abs/2302.08453, section 3.2; `T2IAdapter` in diffusers. Unlike a
ControlNet it sees neither latents nor time: one pass serves all steps of a sampler.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.models.layers import conv1x1, conv3x3

# Kind -> which levels begin by halving height and width. The light one has narrower blocks too.
KINDS = {
    "full_adapter": lambda level: level > 0,
    "full_adapter_xl": lambda level: level == 2,
    "light_adapter": lambda level: level > 0,
}


def pixel_unshuffle(
    x: jax.Array,    # [b H W c]
    factor: int,
) -> jax.Array:      # [b H/factor W/factor c·factor²]
  """Moves squares of pixels into channels: a square row by row, then that of the next channel.

  The inverse of Shi et al. 2016, https://arxiv.org/abs/1609.05158, eq. 4, in PyTorch's order.
  """
  b, height, width, c = x.shape
  h, w = height // factor, width // factor
  x = x.reshape(b, h, factor, w, factor, c).transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(b, h, w, c * factor**2)


class ResnetBlock(nn.Module):
  """Conv -> ReLU -> Conv around a residual, without norms; the second is 3 × 3 if `light`."""
  light: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b h w c]
    c = x.shape[-1]
    h = nn.relu(conv3x3(c, self.dtype, "block1")(x))
    second = conv3x3(c, self.dtype, "block2") if self.light else conv1x1(c, self.dtype, "block2")
    return x + second(h)


class Level(nn.Module):
  """Residual blocks at one resolution; if `light`, with a quarter of the channels.

  Attributes:
    features: output channels.
    blocks: residual blocks.
    halve: whether the mean of 2 × 2 pixels comes first. Odd sizes round up: the last row and column
      are then means of what there is.
    light: see above.
    dtype: of the convolutions.
  """
  features: int
  blocks: int
  halve: bool
  light: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b h w c] -> [b h w features]
    if self.halve:
      x = nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
    width = self.features // 4 if self.light else self.features
    if self.light or x.shape[-1] != width:
      x = conv1x1(width, self.dtype, "in_conv")(x)
    for i in range(self.blocks):
      x = ResnetBlock(self.light, self.dtype, name=f"resnets_{i}")(x)
    return conv1x1(self.features, self.dtype, "out_conv")(x) if self.light else x


class Levels(nn.Module):
  """All levels, one after the other. Fields as in `T2IAdapter`."""
  channels: tuple[int, ...]
  num_res_blocks: int
  kind: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:  # [b h w c]
    light = self.kind == "light_adapter"
    # The UNet's last two levels are equally wide; the light adapter names that width once.
    channels = (*self.channels, self.channels[-1]) if light else self.channels
    if not light:
      x = conv3x3(channels[0], self.dtype, "conv_in")(x)
    features = []
    for i, width in enumerate(channels):
      x = Level(width, self.num_res_blocks, KINDS[self.kind](i), light, self.dtype,
                name=f"body_{i}")(x)
      features.append(x)
    return tuple(features)


class T2IAdapter(nn.Module):
  """Makes features for `UNet.__call__` from a picture. The defaults are those for SD1.

  Attributes, with diffusers' names where they differ:
    in_channels: of the picture; 1 for sketches.
    channels: of the features, level by level, as wide as the UNet's.
    num_res_blocks: per level.
    downscale_factor: px per pixel of the first features, along one side: 16 for SDXL.
    kind: a key of `KINDS` (adapter_type).
    dtype: of the convolutions.
  """
  in_channels: int = 3
  channels: tuple[int, ...] = (320, 640, 1280, 1280)
  num_res_blocks: int = 2
  downscale_factor: int = 8
  kind: str = "full_adapter"
  dtype: str = "float32"

  def example(self) -> tuple:
    """Returns the shape of a hint."""
    side = 8 * self.downscale_factor
    return (jax.ShapeDtypeStruct((1, side, side, self.in_channels), jnp.float32),)

  @nn.compact
  def __call__(self, hint: jax.Array) -> tuple[jax.Array, ...]:  # [b H W in_channels] in [0, 1]
    """Returns float32 features [b h w c], one per level of the UNet, the finest first.

    Raises:
      UserError: when a side is no multiple of `downscale_factor`.
    """
    height, width = hint.shape[1:3]
    if height % self.downscale_factor or width % self.downscale_factor:
      raise UserError(f"the picture is {height} × {width} px; this adapter reads multiples of "
                      f"{self.downscale_factor}; resize it")
    levels = Levels(self.channels, self.num_res_blocks, self.kind, self.dtype, name="adapter")
    features = levels(pixel_unshuffle(hint, self.downscale_factor))
    return tuple(x.astype(jnp.float32) for x in features)

