"""Building blocks shared by the UNet, the autoencoder and the text towers. Images are [b h w c].

Submodules bear diffusers' names, so that checkpoint conversion is a renaming and nothing more.
Parameters stay float32; `dtype` is that of convolutions and matrix products, norms are float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.attention import attention

# Of all kernels: Linen traces what would draw them at every `apply`, only to compare shapes.
# `initializers.draw` draws parameters.
ZEROS = nn.initializers.zeros_init()


def group_norm(groups: int, epsilon: float, name: str) -> nn.GroupNorm:
  """Returns a GroupNorm in float32. E[(x - mean)²] keeps the digits that E[x²] - mean² loses."""
  return nn.GroupNorm(
      groups, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


def layer_norm(name: str) -> nn.LayerNorm:
  """Returns a LayerNorm in float32, of the epsilon that all transformers here share."""
  return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)


def multiply_rows(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
  """Does the `dot_general` of `nn.Dense` with all leading axes of x as one.

  The gradient of the kernel is then a plain matrix product; summed over two axes or three it takes
  XLA three times as long on CPU.
  """
  del dimension_numbers  # Dense contracts the last axis of x with the first of its kernel
  y = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel, precision=precision,
                  preferred_element_type=preferred_element_type)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(features: int, dtype: str, name: str, bias: bool = True) -> nn.Dense:
  """Returns a Dense layer along the last axis."""
  return nn.Dense(features, use_bias=bias, dtype=dtype, dot_general=multiply_rows,
                  kernel_init=ZEROS, name=name)


def gelu(x: jax.Array) -> jax.Array:
  """x Φ(x), exactly (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).

  By erf, as in PyTorch: the erfc of `jax.nn.gelu` takes half as long again to differentiate.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def conv3x3(features: int, dtype: str, name: str, stride: int = 1, padding=1) -> nn.Conv:
  """Returns a 3×3 convolution padded as PyTorch pads: "SAME" would differ at stride 2."""
  return nn.Conv(features, (3, 3), stride, padding=padding, dtype=dtype, kernel_init=ZEROS,
                 name=name)


def conv1x1(features: int, dtype: str, name: str) -> nn.Conv:
  """Returns a 1×1 convolution."""
  return nn.Conv(features, (1, 1), dtype=dtype, kernel_init=ZEROS, name=name)


def multi_head_attention(
    x: jax.Array,                   # [b n d]
    context: jax.Array,             # [b m d_context]; x itself for self-attention
    *,
    heads: int,
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out_0"),
    bias: bool,
    causal: bool = False,
    dtype: str,
) -> jax.Array:                     # [b n d]
  """Attends from x to context in `heads` heads, between four Dense layers.

  Called inside a compact method: the layers become submodules of the caller, named by `names` as
  the projections of queries, keys, values and of the output (which always has a bias).
  """
  width = x.shape[-1]

  def project(name, inputs):
    y = dense(width, dtype, name, bias)(inputs)
    return y.reshape(*y.shape[:-1], heads, width // heads)

  to_q, to_k, to_v, to_out = names
  y = attention(
      project(to_q, x), project(to_k, context), project(to_v, context), causal=causal)
  return dense(width, dtype, to_out)(y.reshape(x.shape))


class ResnetBlock(nn.Module):
  """GroupNorm -> SiLU -> Conv, twice, around a residual; time enters in between.

  The block of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239, app. B) as Stable Diffusion
  uses it; `ResnetBlock2D` in diffusers.

  Attributes:
    features: output channels.
    groups: of both norms.
    dropout: rate before the second convolution; draws from "dropout" unless it is 0.
    epsilon: of both norms. 1e-5 in the UNet, 1e-6 in the autoencoder. Not interchangeable.
    dtype: of the convolutions.
  """
  features: int
  groups: int
  epsilon: float
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,                      # [b h w c_in]
      time: jax.Array | None = None,     # [b d]; None inside the autoencoder
  ) -> jax.Array:                        # [b h w features]
    h = nn.silu(group_norm(self.groups, self.epsilon, "norm1")(x))
    h = conv3x3(self.features, self.dtype, "conv1")(h)
    if time is not None:
      shift = dense(self.features, self.dtype, "time_emb_proj")(nn.silu(time))
      h = h + shift[:, None, None, :]
    h = nn.silu(group_norm(self.groups, self.epsilon, "norm2")(h))
    h = nn.Dropout(self.dropout, deterministic=False)(h)
    h = conv3x3(self.features, self.dtype, "conv2")(h)

    if x.shape[-1] != self.features:
      x = conv1x1(self.features, self.dtype, "conv_shortcut")(x)
    return x + h


class Downsample(nn.Module):
  """Halves height and width by a convolution of stride 2, rounding up.

  Attributes:
    padding: rows and columns of zeros (before, after): 1 and 1 in the UNet, 0 and 1 in the
      autoencoder (which so rounds down).
    dtype: of the convolution.
  """
  padding: tuple[int, int] = (1, 1)
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b h w c] -> [b h/2 w/2 c]
    return conv3x3(x.shape[-1], self.dtype, "conv", stride=2, padding=(self.padding,) * 2)(x)


class Upsample(nn.Module):
  """Doubles height and width by repetition and smooths by a convolution.

  Attributes:
    dtype: of the convolution.
  """
  dtype: str = "float32"

  @nn.compact
  def __call__(
      self,
      x: jax.Array,                              # [b h w c]
      size: tuple[int, int] | None = None,       # of the result; 2h × 2w, or one less each
  ) -> jax.Array:                                # [b *size c]
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    if size is not None:
      x = x[:, :size[0], :size[1]]
    return conv3x3(x.shape[-1], self.dtype, "conv")(x)


class AttentionBlock(nn.Module):
  """Self-attention over all pixels, around a residual, norm first.

  Attributes:
    heads: 1 in the autoencoder.
    groups, epsilon: of the norm.
    dtype: of the matrix products.
  """
  heads: int
  groups: int
  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, context: None = None) -> jax.Array:  # [b h w c]
    """`context` is there to be called as a Transformer is; there is nothing to attend to in it."""
    b, h, w, c = x.shape
    y = group_norm(self.groups, self.epsilon, "group_norm")(x).reshape(b, h * w, c)
    y = multi_head_attention(y, y, heads=self.heads, bias=True, dtype=self.dtype)
    return x + y.reshape(x.shape)
