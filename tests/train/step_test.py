import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.diffusion.parts import WHOLE
from sdjax.errors import UserError
from sdjax.train import state, step

TX = optax.adam(1e-2)


def loss_fn(params, frozen, batch, key, part=WHOLE):
  """Squared error of a linear map of noisy rows; the weights' roots have no gradient at 0."""
  noise = part.draw(lambda shape: jax.random.normal(key, shape), batch["x"].shape)
  y = (batch["x"] + noise) @ params["unet"]["kernel"] * frozen["vae"]["scale"]
  loss = jnp.mean(batch["weight"] * jnp.square(y).sum(axis=-1))
  return loss + jnp.sqrt(params["unet"]["bias"]).sum(), {"mean": y.mean()}


def setting(bias=1.0, rows=8):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"unet": {"kernel": draw(3, 2), "bias": jnp.full(2, bias)}}
  frozen = {"vae": {"scale": draw(2)}}
  now = state.TrainState(
      step=jnp.int32(7), params=params, ema=jax.tree.map(lambda leaf: leaf + 1, params),
      opt_state=TX.init(params), frozen=frozen, key=jax.random.key(5))
  batch = {"x": draw(rows, 3), "weight": jnp.abs(draw(rows))}
  return now, batch


@functools.partial(jax.jit, static_argnames="accumulate")
def advance(now, batch, accumulate=1):
  return step.train_step(
      now, batch, loss_fn=loss_fn, tx=TX, ema_decay=0.5, accumulate=accumulate)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_moves_parameters_as_the_whole_does(parts):
  now, batch = setting()
  whole, expected = advance(now, batch)
  parted, found = advance(now, batch, accumulate=parts)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
  for a, b in zip(jax.tree.leaves(parted.params), jax.tree.leaves(whole.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_step_is_adam_and_the_average_follows():
  now, batch = setting()
  after, metrics = advance(now, batch)
  # Adam's first update is the learning rate, against the gradient; the bias's is 1 / (2 √1).
  np.testing.assert_allclose(after.params["unet"]["bias"], 0.99, rtol=1e-5)
  # (1 + n) / (10 + n) of the old average at step n = 7: no more than that, as runs begin.
  np.testing.assert_allclose(
      after.ema["unet"]["bias"], 8 / 17 * 2 + 9 / 17 * 0.99, rtol=1e-5)
  assert int(after.step) == 8 and float(metrics["skipped_steps"]) == 0
  squares = sum(np.square(leaf).sum() for leaf in jax.tree.leaves(after.params))
  np.testing.assert_allclose(metrics["param_norm"], np.sqrt(squares), rtol=1e-6)
  np.testing.assert_allclose(metrics["update_norm"], 0.01 * np.sqrt(8), rtol=1e-4)


def same(a, b):
  data = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(
      leaf.dtype, jax.dtypes.prng_key) else leaf
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(data(x), data(y)), a, b))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("wrong", ["batch", "gradient"])
def test_what_is_not_finite_changes_nothing_but_the_step(wrong, accumulate):
  now, batch = setting(bias=0.0 if wrong == "gradient" else 1.0)
  if wrong == "batch":
    batch["x"] = batch["x"].at[5, 1].set(jnp.nan)
  after, metrics = advance(now, batch, accumulate=accumulate)
  assert np.isfinite(metrics["loss"]) == (wrong == "gradient")
  assert not np.isfinite(metrics["grad_norm"])
  assert metrics["skipped_steps"] == 1 and metrics["update_norm"] == 0
  assert same(after, now.replace(step=now.step + 1))


def test_a_run_goes_on_after_a_step_that_was_skipped():
  now, batch = setting()
  bad = batch | {"x": batch["x"] * jnp.inf}
  skipped, _ = advance(now, bad)
  after, metrics = advance(skipped, batch)
  expected, _ = advance(now.replace(step=now.step + 1), batch)
  assert metrics["skipped_steps"] == 0 and same(after, expected)


@pytest.mark.parametrize("parts", [0, 3, 16])
def test_batches_that_cannot_be_cut_are_refused(parts):
  with pytest.raises(UserError, match=f"accumulate {parts} "):
    advance(*setting(), accumulate=parts)


def test_rows_of_a_part_are_every_so_many_of_the_batch():
  parts = step.cut({"x": jnp.arange(12).reshape(6, 2)}, 3)["x"]
  np.testing.assert_array_equal(parts[1], [[2, 3], [8, 9]])


def test_a_step_is_compiled_with_the_configs_words():
  now, batch = setting()
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  config = SimpleNamespace(
      partition=((".*", "fsdp"),), dtype="float32", ema_decay=0.5, accumulate=2)
  shardings = jax.tree.map(
      lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), now)
  expected, _ = advance(now, batch)
  with jax.set_mesh(mesh):
    after, _ = step.jitted(config, mesh, loss_fn, TX, shardings)(
        jax.device_put(now, shardings), batch)
  for a, b in zip(jax.tree.leaves(after.ema), jax.tree.leaves(expected.ema), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
