"""The text tower of CLIP (`CLIPTextModel` in transformers).

Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4: a causal transformer, norms
before each branch. What follows the end of the text is padding, and no position sees it but those
that are padding themselves: there is no mask but the causal one.
"""

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


class Embeddings(nn.Module):
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


class SelfAttention(nn.Module):
  """Causal attention."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b l d]
    return multi_head_attention(
        x, x, heads=self.heads, names=("q_proj", "k_proj", "v_proj", "out_proj"),
        bias=True, causal=True, dtype=self.dtype)


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
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b l d]
    x = x + SelfAttention(self.heads, self.dtype, name="self_attn")(layer_norm("layer_norm1")(x))
    mlp = MLP(self.mlp_width, self.activation, self.dtype, name="mlp")
    return x + mlp(layer_norm("layer_norm2")(x))


class Encoder(nn.Module):
  """`count` layers, all alike."""
  count: int
  heads: int
  mlp_width: int
  activation: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b l d]
    for i in range(self.count):
      x = Layer(self.heads, self.mlp_width, self.activation, self.dtype, name=f"layers_{i}")(x)
    return x


class CLIPText(nn.Module):
  """Reads tokens; Stable Diffusion attends to every position of its last hidden state.

  Attributes, with transformers' names where they differ:
    vocab_size: number of tokens.
    max_length: positions (max_position_embeddings).
    width: of the hidden state (hidden_size).
    layers: SD2 reads OpenCLIP H/14 one layer before its end: 23 of 24 (num_hidden_layers).
    heads: (num_attention_heads).
    mlp_width: (intermediate_size).
    activation: a key of `ACTIVATIONS` (hidden_act).
    dtype: of the matrix products.
  """
  vocab_size: int = 49408
  max_length: int = 77
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_width: int = 3072
  activation: str = "quick_gelu"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:  # int32 [b l] -> [b l width] float32
    """Returns the last hidden state after the final norm.

    Raises:
      UserError: when tokens are longer than `max_length`.
    """
    if tokens.shape[1] > self.max_length:
      raise UserError(f"the text has {tokens.shape[1]} tokens; this text encoder has positions "
                      f"for {self.max_length}; shorten it")
    x = Embeddings(self.vocab_size, self.max_length, self.width, self.dtype,
                   name="embeddings")(tokens)
    x = Encoder(self.layers, self.heads, self.mlp_width, self.activation, self.dtype,
                name="encoder")(x)
    return layer_norm("final_layer_norm")(x)
