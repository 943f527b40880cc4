"""Building blocks against closed forms, and against plain versions of themselves."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import layers


def test_gelu_is_the_exact_one():
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  exact = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x]
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), exact, atol=1e-6)


def test_dense_equals_linen_with_its_gradients():
  x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
  ours, plain = layers.dense(6, "float32", "a"), nn.Dense(6)
  params = plain.init(jax.random.key(0), x)

  def outputs(module):
    def loss(params, x):
      y = module.apply(params, x)
      return jnp.sum(jnp.sin(y)), y
    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads

  for a, b in zip(jax.tree.leaves(outputs(ours)), jax.tree.leaves(outputs(plain)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("padding, halved", [((1, 1), (5, 4)), ((0, 1), (4, 4))])
def test_downsampling_rounds_up_in_the_unet_and_down_in_the_autoencoder(padding, halved):
  x = jnp.zeros((1, 9, 8, 3))
  y = jax.eval_shape(layers.Downsample(padding).init_with_output, jax.random.key(0), x)[0]
  assert y.shape[1:3] == halved


def test_upsampling_repeats_pixels_and_returns_to_odd_sizes():
  x = np.random.default_rng(0).standard_normal((1, 2, 3, 1), np.float32)
  kernel = np.zeros((3, 3, 1, 1), np.float32)
  kernel[1, 1] = 1
  params = {"params": {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}}
  y = layers.Upsample().apply(params, x, (3, 5))
  np.testing.assert_array_equal(y[0, :, :, 0], np.kron(x[0, :, :, 0], np.ones((2, 2)))[:3, :5])


def test_group_norm_keeps_digits_of_a_large_mean():
  x = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32) + np.float32(3000)
  norm = layers.group_norm(2, 1e-5, "norm")
  scale, bias = np.array([1, 2, 3, 4], np.float32), np.array([0, 1, 0, -1], np.float32)
  y = (norm.apply({"params": {"scale": scale, "bias": bias}}, x) - bias) / scale
  groups = x.astype(np.float64).reshape(64, 2, 2)
  exact = (groups - groups.mean((0, 2), keepdims=True)) / groups.std((0, 2), keepdims=True)
  np.testing.assert_allclose(y.reshape(64, 2, 2), exact, atol=2e-3)
