"""Guidance: networks made from networks.

Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6, in the
convention of Stable Diffusion, where scale 1 is no guidance):
  F = F_uncond + scale · (F_cond - F_uncond)                                                (1)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Network = Callable[[jax.Array, jax.Array], jax.Array]


def interleave(conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
  """Returns [cond_0, uncond_0, cond_1, uncond_1, …], [2b …], of two [b …].

  Not a concatenation: an image and its unconditional twin stay on one device, so that a batch
  sharded over devices is guided without communication.
  """
  pairs = jnp.stack([conditional, unconditional], axis=1)
  return pairs.reshape(-1, *conditional.shape[1:])


def classifier_free(
    network: Network,   # of a doubled, interleaved batch: ([2b h w c], [2b]) -> [2b h w c]
    scale: jax.Array,   # [] or [b]
) -> Network:           # ([b h w c], [b]) -> [b h w c]
  """Returns the guided network of equation (1)."""
  def guided(x, t):
    both = network(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0))
    pairs = both.reshape(-1, 2, *both.shape[1:])
    conditional, unconditional = pairs[:, 0], pairs[:, 1]
    factor = jnp.reshape(scale, (-1,) + (1,) * (x.ndim - 1))
    return unconditional + factor * (conditional - unconditional)
  return guided
