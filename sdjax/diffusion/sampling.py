"""The device side of every sampler: one scan whose body is one linear map.

Carry S, five latents; S_0 is where the network is asked. With row n of the table
  F  = network(c_in·S_0, t)                                                                 (1)
  D  = c_skip·S_0 + c_out·F             the denoised estimate                               (2)
  C  = clip(D)                                                                              (3)
  S' = mix @ [S_0 … S_4, F, C, z]       z fresh standard noise                              (4)
What the numbers mean is `solvers.py`'s business; here no sampler is known.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.diffusion.solvers import STATE, Table


def sample(
    table: Table,
    network: Callable[[jax.Array, jax.Array], jax.Array],  # (c_in·x [b h w c], t [b]) -> F
    x: jax.Array,                                          # [b h w c] at the table's first node
    noise: Callable[[jax.Array], jax.Array],               # (index int32 []) -> z like x
) -> jax.Array:                                            # [b h w c]
  """Runs all rows of `table` from `x`.

  Args:
    table: of `solvers`; numpy or traced arrays. Its values never compile anew, its length does.
    network: raw output after guidance, see (1).
    x: the noisy start, already at the scale of the first node.
    noise: must be a pure function of the index.

  Returns:
    The latents at the table's last node.
  """
  rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, _device_dtype(leaf)), table.rows())
  state = jnp.zeros((STATE, *x.shape), x.dtype).at[0].set(x)

  def step(state, row):
    x = state[0]
    f = network(row["c_in"] * x, jnp.broadcast_to(row["t"], x.shape[:1]))
    denoised = row["c_skip"] * x + row["c_out"] * f
    clipped = jnp.clip(denoised, -row["clip"], row["clip"])
    basis = jnp.concatenate([state, jnp.stack([f, clipped, noise(row["noise_index"])])])
    # Matrix units would round the coefficients to bfloat16 unless told not to.
    mixed = jnp.tensordot(row["mix"], basis, 1, precision=jax.lax.Precision.HIGHEST)
    return mixed.astype(x.dtype), None

  state, _ = jax.lax.scan(step, state, rows)
  return state[0]


def _device_dtype(leaf) -> jnp.dtype:
  return jnp.int32 if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.float32
