"""Properties of the autoencoder; its numbers are checked against diffusers in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.models import initializers
from sdjax.models.presets import preset
from sdjax.models.vae import AutoencoderKL

# Released networks -> (module, parameters as diffusers counts them, shape of 64 px).
RELEASED = {
    "SD1, SD2, SDXL": (AutoencoderKL(), 83_653_863, (8, 8, 4)),
    "SD3, Flux": (AutoencoderKL(latent_channels=16, quant_conv=False, post_quant_conv=False),
                  83_819_683, (8, 8, 16)),
    "x4 upscaler": (AutoencoderKL(block_out_channels=(128, 256, 512)), 55_325_927, (16, 16, 4)),
}


@pytest.fixture(scope="module")
def tiny():
  vae = preset("tiny")["vae"]
  image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
  shapes = jax.eval_shape(vae.init, jax.random.key(0), image)["params"]
  return vae, {"params": initializers.draw({"vae": shapes}, 0)["vae"]}, image


@pytest.mark.parametrize("name", RELEASED)
def test_released_ones_have_the_released_parameters_and_latents(name):
  vae, parameters, shape = RELEASED[name]
  image = jnp.zeros((1, 64, 64, 3))
  (_, moments), params = jax.eval_shape(vae.init_with_output, jax.random.key(0), image)
  assert pytrees.count(params) == parameters
  assert moments.shape == (1, *shape[:2], 2 * shape[2])


def test_convolutions_left_out_are_the_identity(tiny):
  vae, params, image = tiny
  without = vae.clone(quant_conv=False, post_quant_conv=False)

  def identity(path, leaf):
    if "quant_conv" not in path:
      return leaf
    return np.eye(leaf.shape[-1], dtype=np.float32)[None, None] if leaf.ndim == 4 else 0 * leaf

  kept = {name: params["params"][name] for name in ("encoder", "decoder")}
  expected = jax.jit(vae.apply)(pytrees.map_paths(identity, params), image)
  for ours, theirs in zip(jax.jit(without.apply)({"params": kept}, image), expected):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


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
