import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import sampling, schedules, solvers

SCHEDULE = schedules.Schedule()
SHAPE = (2, 3, 3, 2)
Z = np.random.default_rng(0).standard_normal((40, *SHAPE)).astype(np.float32)
START = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
evaluations, traces = [], []


def network(x, t):
  jax.debug.callback(lambda: evaluations.append(1))
  return jnp.sin(x) * 0.3 + t[:, None, None, None] / 5000


def noise(index):
  return jnp.asarray(Z)[index]


@jax.jit
def sample(table, x):
  traces.append(1)
  return sampling.sample(table, network, x, noise)


@jax.jit
def advance(rows, state):
  return sampling.advance(rows, network, state, noise)


def plain(table):
  """Equations (1)-(4) of sampling.py as a loop in float64 numpy."""
  state = np.zeros((5, *SHAPE))
  state[0] = START
  for n in range(len(table.t)):
    f = np.sin(state[0]) * 0.3 + table.t[n] / 5000
    d = table.c_skip[n] * state[0] + table.c_out[n] * f
    limit, scale = np.full((2, 1, 1, 1), table.clip[n]), 1.0
    if table.quantile[n]:
      largest = [np.quantile(np.abs(image), table.quantile[n]) for image in d]
      limit = scale = np.clip(largest, 1, table.clip[n]).reshape(2, 1, 1, 1)
    state = np.tensordot(table.mix[n], np.stack(
        [*state, f, np.clip(d, -limit, limit) / scale, Z[table.noise_index[n]]]), 1)
  return state[0]


TABLES = {
    "dpmpp_2m": dict(steps=17),
    "ddim": dict(steps=30, eta=1.0, clip=1.0),
    "unipc": dict(steps=9, order=3),
    "dpmpp_sde": dict(steps=8),
    "ddpm": dict(steps=12, clip=2.5, quantile=0.8),
    "pndm": dict(steps=10),
}


@functools.cache
def table_of(name):
  return solvers.named(name, SCHEDULE, "v_prediction", **TABLES[name])


@pytest.mark.parametrize("name", TABLES)
def test_the_loop_computes_what_plain_numpy_computes(name):
  table = table_of(name)
  np.testing.assert_allclose(sample(table.padded(32), START), plain(table), atol=2e-5)


def test_one_program_serves_all_samplers_and_numbers_of_steps_and_padding_asks_nothing():
  traces.clear()
  jax.clear_caches()
  for name in TABLES:
    table = table_of(name)
    evaluations.clear()
    sample(table.padded(32), START).block_until_ready()
    jax.effects_barrier()
    assert len(evaluations) == len(table.t)
  assert len(traces) == 1


def test_a_run_in_chunks_is_bit_equal_to_one_run():
  for name in ("unipc", "ddpm"):
    state = sampling.start(jnp.asarray(START))
    for chunk in table_of(name).chunks(4):
      state = advance(chunk, state)
    np.testing.assert_array_equal(state[0], sample(table_of(name).padded(32), START))


def test_thresholding_scales_down_images_one_by_one():
  x = np.zeros((2, 2, 2, 1), np.float32)
  x[0].flat, x[1].flat = [0.1, -4.0, 2.0, 1.0], [0.5, 0.2, -0.1, 0.3]
  limited = sampling.limit(x, jnp.float32(10.0), jnp.float32(1.0))
  np.testing.assert_allclose(limited[0], x[0] / 4)  # the whole range: the largest becomes one
  np.testing.assert_allclose(limited[1], x[1])      # within [-1, 1] nothing is to be done
  capped = sampling.limit(x, jnp.float32(2.0), jnp.float32(1.0))
  np.testing.assert_allclose(capped[0].ravel(), [0.05, -1.0, 1.0, 0.5])


def test_values_of_a_table_are_arguments_of_the_program():
  table = table_of("ddim").padded(32)
  halved = dataclasses.replace(table, mix=table.mix / 2)
  assert not np.allclose(sample(table, START), sample(halved, START))
