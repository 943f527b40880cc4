"""Properties of the autoencoder; its numbers are checked against diffusers in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import initializers
from sdjax.models.presets import preset


@pytest.fixture(scope="module")
def tiny():
  vae = preset("tiny")["vae"]
  image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
  shapes = jax.eval_shape(vae.init, jax.random.key(0), image)["params"]
  return vae, {"params": initializers.draw({"vae": shapes}, 0)["vae"]}, image


def test_latents_are_smaller_by_the_factor_told(tiny):
  vae, params, image = tiny
  moments = jax.eval_shape(lambda x: vae.apply(params, x, method="encode"), image)
  assert moments.shape == (2, 8 // vae.downsampling, 12 // vae.downsampling, 2 * 4)


def test_a_pass_encodes_draws_and_decodes(tiny):
  vae, params, image = tiny
  moments = vae.apply(params, image, method="encode")
  mean, log_variance = np.split(np.asarray(moments), 2, axis=-1)
  noise = np.random.default_rng(1).standard_normal(mean.shape, np.float32)
  drawn, same = vae.apply(params, image, noise)
  np.testing.assert_array_equal(moments, same)
  decoded = vae.apply(params, mean + np.exp(log_variance / 2) * noise, method="decode")
  np.testing.assert_allclose(drawn, decoded, atol=1e-5)
  middle = vae.apply(params, mean, method="decode")
  np.testing.assert_allclose(vae.apply(params, image)[0], middle, atol=1e-5)
  assert jnp.abs(drawn - middle).max() > 1e-2
