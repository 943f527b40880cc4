"""Properties of the UNet; its numbers are checked against diffusers in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import initializers
from sdjax.models.presets import preset
from sdjax.models.unet import Condition, UNet, sinusoids


def inputs(unet, side=(5, 7)):
  rng = np.random.default_rng(0)
  return (rng.standard_normal((2, *side, 4), np.float32), np.array([3, 981], np.float32),
          Condition(rng.standard_normal((2, 6, unet.cross_attention_dim), np.float32)))


def perturbed(unet, *args):
  """Draws parameters of which none is zero."""
  shapes = jax.eval_shape(unet.init, jax.random.key(0), *args)["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32),
      initializers.draw({"unet": shapes}, 0)["unet"])


@pytest.fixture(scope="module")
def tiny():
  unet = preset("tiny")["unet"]
  args = inputs(unet)
  return unet, perturbed(unet, *args), args


@pytest.fixture(scope="module")
def flat():
  """One level and no middle: the fewest operations to compile."""
  unet = UNet(block_out_channels=(8,), attention=(True,), layers_per_block=1, num_heads=(2,),
              cross_attention_dim=8, norm_groups=4, mid_block=False, dropout=0.5)
  args = inputs(unet, (3, 4))
  return unet, perturbed(unet, *args), args


def test_sinusoids_are_cosines_then_sines_of_falling_frequencies():
  y = sinusoids(jnp.array([0.0, 7.5]), 4)
  np.testing.assert_allclose(y[0], [1, 1, 0, 0], atol=1e-7)
  np.testing.assert_allclose(
      y[1], [np.cos(7.5), np.cos(0.075), np.sin(7.5), np.sin(0.075)], atol=1e-6)


def test_any_size_comes_back_in_its_own(tiny):
  unet, params, (x, t, context) = tiny
  y = jax.eval_shape(unet.apply, {"params": params}, x, t, context)
  assert y.shape == x.shape and y.dtype == jnp.float32


def test_recomputing_blocks_changes_no_gradient_and_keeps_less(flat):
  unet, params, args = flat

  def step(remat):
    module = unet.clone(remat=remat)
    loss = lambda params: jnp.sum(jnp.square(module.apply({"params": params}, *args)))
    return jax.grad(loss)

  plain, again = jax.jit(step("none"))(params), jax.jit(step("blocks"))(params)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * np.abs(a).max())
  assert "remat" in str(jax.make_jaxpr(step("blocks"))(params))
  assert "remat" not in str(jax.make_jaxpr(step("none"))(params))


def test_dropout_acts_in_training_only(flat):
  unet, params, args = flat

  @jax.jit
  def run(key):
    return unet.apply({"params": params}, *args, train=True, rngs={"dropout": key})

  one, other = run(jax.random.key(1)), run(jax.random.key(2))
  assert jnp.abs(one - other).max() > 1e-3
  np.testing.assert_array_equal(one, run(jax.random.key(1)))
  unet.apply({"params": params}, *args)  # asks for no key


def test_rows_of_a_batch_do_not_see_each_other(tiny):
  unet, params, (x, t, context) = tiny
  apply = jax.jit(unet.apply)
  whole = apply({"params": params}, x, t, context)
  changed = apply({"params": params}, np.stack([x[0], np.full_like(x[1], 9)]), t, context)
  np.testing.assert_array_equal(whole[0], changed[0])
  assert jnp.abs(whole[1] - changed[1]).max() > 1e-3


def test_bfloat16_computes_nearly_the_same(flat):
  unet, params, args = flat
  exact = unet.apply({"params": params}, *args)
  rough = unet.clone(dtype="bfloat16").apply({"params": params}, *args)
  assert rough.dtype == jnp.float32
  error = jnp.abs(exact - rough).max() / jnp.abs(exact).max()
  assert 1e-5 < error < 3e-2  # not float32 after all, and not broken


def test_perturbed_attention_returns_the_values_of_marked_images_only(flat):
  unet, params, (x, t, condition) = flat
  marked = condition._replace(perturbed=jnp.array([True, False]))
  outputs = {layers: jax.jit(unet.clone(perturbed_layers=layers).apply)(
      {"params": params}, x, t, marked) for layers in ("down_blocks", "nowhere", "")}
  plain = jax.jit(unet.apply)({"params": params}, x, t, condition)
  np.testing.assert_array_equal(outputs["nowhere"], plain)
  for layers in ("down_blocks", ""):
    np.testing.assert_allclose(outputs[layers][1], plain[1], atol=1e-6)
    assert np.abs(outputs[layers][0] - plain[0]).max() > 1e-3
  assert np.abs(outputs[""][0] - outputs["down_blocks"][0]).max() > 1e-3
