"""The device side of every sampler: one loop whose body is one linear map.

Carry S, five latents; S_0 is where the network is asked. With row n of the table
  F  = network(S_0, t)                                                                      (1)
  D  = c_skip·S_0 + c_out·F             the denoised estimate                               (2)
  C  = D within ±clip, or thresholded                                                       (3)
  S' = mix @ [S_0 … S_4, F, C, z]       z fresh standard noise                              (4)
What the numbers mean is the tables' business; here no sampler is known. The number of active rows
is an argument of the loop, not of the program: padded tables of one length, whatever the sampler
and the number of steps, are one program, and padding asks no network. So previews and cancelling
cost nothing: `advance` over chunks of rows is bit-equal to one pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.diffusion.tables import STATE, Table

Network = Callable[[jax.Array, jax.Array], jax.Array]  # (x [b h w c], t [b]) -> F [b h w c]
Noise = Callable[[jax.Array], jax.Array]               # (index int32 []) -> z like x


def start(
    x: jax.Array,     # [b h w c] at the scale of the first row's node
) -> jax.Array:       # [5 b h w c]
  """Returns the state before the first row: x, and nothing remembered."""
  return jnp.zeros((STATE, *x.shape), x.dtype).at[0].set(x)


def step(
    row: dict[str, jax.Array],  # of `Table.rows`, at one n; float32
    network: Network,
    state: jax.Array,           # [5 b h w c]
    noise: Noise,
) -> jax.Array:                 # [5 b h w c]
  """Equations (1) to (4) for one row."""
  x = state[0]
  f = network(x, jnp.broadcast_to(row["t"], x.shape[:1]))
  limited = limit(row["c_skip"] * x + row["c_out"] * f, row["clip"], row["quantile"])
  basis = jnp.concatenate([state, jnp.stack([f, limited, noise(row["noise_index"])])])
  # Matrix units would round the coefficients to bfloat16 unless told not to.
  mixed = jnp.tensordot(row["mix"], basis, 1, precision=jax.lax.Precision.HIGHEST)
  return mixed.astype(x.dtype)


def advance(
    rows: dict[str, jax.Array],
    network: Network,
    state: jax.Array,     # [5 b h w c]
    noise: Noise,
) -> jax.Array:           # [5 b h w c]
  """Runs the active rows of a table, or of a chunk of one.

  Args:
    rows: of `Table.rows` or `Table.chunks`; numpy or traced arrays. Their values never compile
      anew, their number does.
    network: raw output after guidance, see (1).
    state: of `start` or of the chunk before; state[0] are the latents.
    noise: must be a pure function of the index.

  Returns:
    The state after the last active row.
  """
  rows = {name: jnp.asarray(rows[name], _device_dtype(rows[name])) for name in rows}
  return jax.lax.fori_loop(
      0, jnp.sum(rows["active"]),
      lambda n, state: step({name: rows[name][n] for name in rows}, network, state, noise), state)


def sample(
    table: Table,
    network: Network,
    x: jax.Array,         # [b h w c] at the table's first node
    noise: Noise,
) -> jax.Array:           # [b h w c]
  """Runs all active rows of `table` from `x` to the latents at its last landing; see `advance`."""
  return advance(table.rows(), network, start(x), noise)[0]


def limit(
    denoised: jax.Array,  # [b h w c] float32
    clip: jax.Array,      # []
    quantile: jax.Array,  # []
) -> jax.Array:           # [b h w c]
  """Equation (3): clipped; if `quantile` > 0, dynamically thresholded (Imagen, section 2.3)."""
  def thresholded():
    size = jnp.abs(denoised).reshape(len(denoised), -1)
    largest = jnp.minimum(jnp.maximum(jnp.quantile(size, quantile, axis=1), 1), clip)
    largest = largest.reshape(-1, *[1] * (denoised.ndim - 1))
    return jnp.clip(denoised, -largest, largest) / largest
  # A branch of the program, not a choice between two results: latents sort nothing.
  return jax.lax.cond(quantile > 0, thresholded, lambda: jnp.clip(denoised, -clip, clip))


def _device_dtype(leaf) -> jnp.dtype:
  return leaf.dtype if leaf.dtype == bool else (
      jnp.int32 if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.float32)
