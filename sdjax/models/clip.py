"""The two towers of CLIP: texts and images as vectors of one space.

Radford et al. 2021, https://arxiv.org/abs/2103.00020, sections 2.4 and 2.5: transformers with norms
before each branch. The text tower is causal. What follows the end of the text is padding, and no
position sees it but those that are padding themselves: there is no mask but the causal one. The
image tower is a ViT (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929). Modules bear the
names of `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection` in transformers.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.models.layers import dense, gelu, layer_norm, multi_head_attention

# OpenAI trained CLIP with the sigmoid approximation, OpenCLIP with the exact function.
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": gelu,
}

# Until 2023 transformers wrote this into every config (huggingface/transformers#24773), SD1's and
# SDXL's among them. It is no token's end: the text ends at its highest id.
LEGACY_EOS_ID = 2


class TextStates(NamedTuple):
  """What a text tower makes of b texts, all float32.

  Attributes:
    hidden: layers + 1 arrays [b l d]: the embeddings, then what each layer returns, without norm.
    last: [b l d], `hidden[-1]` after the final norm.
    pooled: [b d], `last` at the end of the text.
    projected: [b projection], `pooled` in the space of images; None without projection.
  """
  hidden: tuple[jax.Array, ...]
  last: jax.Array
  pooled: jax.Array
  projected: jax.Array | None


class VisionStates(NamedTuple):
  """What an image tower makes of b images, all float32; n patches and, before them, the class.

  Attributes:
    hidden: layers + 1 arrays [b n+1 d]: the normed embeddings, then what each layer returns.
    pooled: [b d], the class token of `hidden[-1]` after the last norm.
    projected: [b projection], `pooled` in the space of texts.
  """
  hidden: tuple[jax.Array, ...]
  pooled: jax.Array
  projected: jax.Array


class TextEmbeddings(nn.Module):
  """Tokens and their positions."""
  vocab_size: int
  max_length: int
  width: int
  dtype: str

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:  # int32 [b l] -> [b l d]
    token = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")
    position = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="position_embedding")
    return token(tokens) + position(jnp.arange(tokens.shape[1]))


class VisionEmbeddings(nn.Module):
  """Patches row by row, after a learned token that is to become the class; and positions."""
  patch_size: int
  width: int
  dtype: str

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:  # [b H W 3] -> [b n+1 d]
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(self.width, patch, patch, padding="VALID", use_bias=False, dtype=self.dtype,
                name="patch_embedding")(image)
    x = x.reshape(x.shape[0], -1, self.width)
    first = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))
    first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, self.width))
    x = jnp.concatenate([first, x], axis=1)
    n = x.shape[1]
    position = nn.Embed(n, self.width, dtype=self.dtype, name="position_embedding")
    return x + position(jnp.arange(n))


class SelfAttention(nn.Module):
  """Attention to all positions, or to those before."""
  heads: int
  causal: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b l d]
    return multi_head_attention(
        x, x, heads=self.heads, names=("q_proj", "k_proj", "v_proj", "out_proj"),
        bias=True, causal=self.causal, dtype=self.dtype)


class MLP(nn.Module):
  """Two Dense layers."""
  width: int
  activation: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b l d]
    h = ACTIVATIONS[self.activation](dense(self.width, self.dtype, "fc1")(x))
    return dense(x.shape[-1], self.dtype, "fc2")(h)


class Layer(nn.Module):
  """Attention and MLP, each around a residual."""
  heads: int
  mlp_width: int
  activation: str
  causal: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b l d]
    attention = SelfAttention(self.heads, self.causal, self.dtype, name="self_attn")
    x = x + attention(layer_norm("layer_norm1")(x))
    mlp = MLP(self.mlp_width, self.activation, self.dtype, name="mlp")
    return x + mlp(layer_norm("layer_norm2")(x))


class Encoder(nn.Module):
  """`count` layers, all alike."""
  count: int
  heads: int
  mlp_width: int
  activation: str
  causal: bool
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:  # [b l d] -> count + 1 of [b l d]
    states = [x]
    for i in range(self.count):
      layer = Layer(self.heads, self.mlp_width, self.activation, self.causal, self.dtype,
                    name=f"layers_{i}")
      states.append(layer(states[-1]))
    return tuple(states)


class CLIPText(nn.Module):
  """Reads tokens.

  Stable Diffusion 1 and 2 attend to `TextStates.last`; XL to `hidden[-2]` of two towers, and takes
  the second's `projected` beside the time (Podell et al. 2023, https://arxiv.org/abs/2307.01952,
  section 2.1).

  Attributes, with transformers' names where they differ:
    vocab_size: number of tokens.
    max_length: positions (max_position_embeddings).
    width: of the hidden state (hidden_size).
    layers: SD2 reads OpenCLIP H/14 one layer before its end: 23 of 24 (num_hidden_layers).
    heads: (num_attention_heads).
    mlp_width: (intermediate_size).
    activation: a key of `ACTIVATIONS` (hidden_act).
    projection: width of the space shared with images; None leaves it out (projection_dim).
    eos_id: of the token whose first occurrence is the end of the text, or `LEGACY_EOS_ID`
      (eos_token_id).
    dtype: of the matrix products.
  """
  vocab_size: int = 49408
  max_length: int = 77
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_width: int = 3072
  activation: str = "quick_gelu"
  projection: int | None = None
  eos_id: int = 49407
  dtype: str = "float32"

  def setup(self):
    # Not compact: the final norm is a door of its own.
    self.embed = TextEmbeddings(
        self.vocab_size, self.max_length, self.width, self.dtype, name="embeddings")
    self.encoder = Encoder(self.layers, self.heads, self.mlp_width, self.activation, causal=True,
                           dtype=self.dtype)
    self.final_norm = layer_norm("final_layer_norm")
    if self.projection is not None:
      self.project = dense(self.projection, self.dtype, "text_projection", bias=False)

  def example(self) -> tuple:
    """Returns the shape of tokens."""
    return (jax.ShapeDtypeStruct((1, self.max_length), jnp.int32),)

  def __call__(self, tokens: jax.Array) -> TextStates:  # int32 [b l]
    """Returns all that is read of a text; what is not used costs nothing under `jax.jit`.

    Raises:
      UserError: when tokens are longer than `max_length`.
    """
    if tokens.shape[1] > self.max_length:
      raise UserError(f"the text has {tokens.shape[1]} tokens; this text encoder has positions "
                      f"for {self.max_length}; shorten it")
    hidden = _as_float32(self.encoder(self.embed(tokens)))
    last = self.final_norm(hidden[-1])
    end = tokens if self.eos_id == LEGACY_EOS_ID else tokens == self.eos_id
    end = jnp.argmax(end, axis=1)  # the first of equals
    pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
    projected = None
    if self.projection is not None:
      projected = self.project(pooled).astype(jnp.float32)
    return TextStates(hidden, last, pooled, projected)

  def normalize(self, hidden: jax.Array) -> jax.Array:  # [b l d] -> [b l d] float32
    """Applies the final norm to one of `TextStates.hidden`: SD1 and SD2 that skip last layers."""
    return self.final_norm(hidden)


class CLIPVision(nn.Module):
  """Reads images. The defaults are those of OpenAI's ViT-L/14.

  Attributes, with transformers' names where they differ:
    image_size: side in px of the square images.
    patch_size: side in px of a patch; pixels of `image_size` beyond whole patches are not seen.
    width, layers, heads, mlp_width, activation, dtype: as in `CLIPText`.
    projection: width of the space shared with texts (projection_dim).
  """
  image_size: int = 224
  patch_size: int = 14
  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_width: int = 4096
  activation: str = "quick_gelu"
  projection: int = 768
  dtype: str = "float32"

  def example(self) -> tuple:
    """Returns the shape of an image."""
    return (jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32),)

  @nn.compact
  def __call__(self, image: jax.Array) -> VisionStates:  # [b H W 3], CLIP's mean 0, deviation 1
    """Returns all that is read of an image.

    Raises:
      UserError: when images are not of `image_size`.
    """
    if image.shape[1:3] != (self.image_size,) * 2:
      raise UserError(f"images are {image.shape[1]} × {image.shape[2]} px; this image encoder "
                      f"reads {self.image_size} × {self.image_size}; resize them")
    x = VisionEmbeddings(self.patch_size, self.width, self.dtype, name="embeddings")(image)
    x = layer_norm("pre_layrnorm")(x)  # transformers' spelling, in every file
    encoder = Encoder(self.layers, self.heads, self.mlp_width, self.activation, causal=False,
                      dtype=self.dtype, name="encoder")
    hidden = _as_float32(encoder(x.astype(self.dtype)))
    pooled = layer_norm("post_layernorm")(hidden[-1][:, 0])
    projected = dense(self.projection, self.dtype, "visual_projection", bias=False)(pooled)
    return VisionStates(hidden, pooled, projected.astype(jnp.float32))


def _as_float32(states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  return tuple(x.astype(jnp.float32) for x in states)
