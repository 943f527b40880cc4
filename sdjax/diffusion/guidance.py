"""Guidance: networks made from networks.

Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6, in the
convention of Stable Diffusion, where scale 1 is no guidance), with p conditions that are dropped
one after another (Brooks et al. 2023, https://arxiv.org/abs/2211.09800, eq. 3: p = 2, a text and
a picture). F_0 has all of them, F_p none:
  F = F_p + sum_i scale_i · (F_i - F_{i+1})                                                 (1)
Rescaled such that its deviation is that of F_0 (Lin et al. 2023, https://arxiv.org/abs/2305.08891,
eq. 15 and 16):
  F' = F · (rescale · std(F_0) / std(F) + 1 - rescale)                                      (2)
Perturbed-attention guidance (Ahn et al. 2024, https://arxiv.org/abs/2403.17377, eq. 15) adds to (1)
the way from F_P, what the network makes of the same condition with its attention perturbed, to F_0:
  F = F_p + scale · (F_0 - F_p) + perturbed_scale · (F_0 - F_P)                             (3)
which is (1) again, with F_P between F_0 and F_p.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array, jax.Array], jax.Array]


def interleave(*passes: jax.Array) -> jax.Array:
  """Returns [first_0, second_0, …, first_1, second_1, …], [g·b …], of g arrays [b …].

  Not a concatenation: an image and its unconditional twin stay on one device, so that a batch
  sharded over devices is guided without communication.
  """
  return jnp.stack(passes, axis=1).reshape(-1, *passes[0].shape[1:])


def separate(interleaved: jax.Array, passes: int) -> list[jax.Array]:
  """The inverse of `interleave`."""
  groups = interleaved.reshape(-1, passes, *interleaved.shape[1:])
  return [groups[:, i] for i in range(passes)]


def classifier_free(
    network: Network,                  # of g interleaved passes: ([g·b h w c], [g·b]) -> alike
    *scales: jax.Array,                # g - 1 of them, each [] or [b]
    rescale: jax.Array | None = None,  # [] or [b] in [0, 1]; None: (1) as it is
) -> Network:                          # ([b h w c], [b]) -> [b h w c]
  """Returns the guided network of equations (1) and (2). Without scales it is `network` itself."""
  passes = len(scales) + 1

  def guided(x, t):
    outputs = separate(
        network(jnp.repeat(x, passes, axis=0), jnp.repeat(t, passes, axis=0)), passes)
    f = outputs[-1]
    for scale, with_it, without in zip(scales, outputs, outputs[1:]):
      f = f + _column(scale, x.ndim) * (with_it - without)
    if rescale is not None:
      ratio = _deviation(outputs[0]) / _deviation(f)
      factor = _column(rescale, x.ndim)
      f = f * (factor * ratio + 1 - factor)
    return f
  return guided if scales else network


def with_perturbed(
    scales: np.ndarray,                # [g n] of equation (1)
    perturbed_scale: float,
) -> np.ndarray:                       # [g+1 n]
  """Returns the scales of equation (1) that make it (3), F_P being the second of g + 2 passes."""
  first = scales[:1] if len(scales) else np.ones((1, scales.shape[1]))
  return np.concatenate([first + perturbed_scale, scales])


def in_interval(
    scale: np.ndarray,                 # [n …]
    sigma: np.ndarray,                 # [n], of the rows of a sampler's table
    interval: tuple[float, float],
) -> np.ndarray:                       # [n …]
  """Returns `scale` where low < sigma <= high, and 1, no guidance, elsewhere.

  Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724, eq. 6; sigma is the
  variance-exploding noise level.
  """
  low, high = interval
  inside = (low < sigma) & (sigma <= high)
  return np.where(inside.reshape(-1, *(1,) * (scale.ndim - 1)), scale, np.ones_like(scale))


def _column(value: jax.Array, ndim: int) -> jax.Array:
  return jnp.reshape(value, (-1,) + (1,) * (ndim - 1))


def _deviation(x: jax.Array) -> jax.Array:
  return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
