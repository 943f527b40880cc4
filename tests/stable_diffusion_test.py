import jax
import numpy as np
import pytest

from sdjax import pytrees, stable_diffusion
from sdjax.errors import UserError


def test_normalizing_latents_is_exact_and_changes_no_picture(tiny_model):
  sd, params = tiny_model
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
  mean, deviation = rng.normal(size=4), rng.uniform(0.5, 2, size=4)
  other, folded = stable_diffusion.normalize_latents(sd, params, mean, deviation)
  plain = sd.encode_image(params, image, None) / sd.vae.scaling_factor
  normal = other.encode_image(folded, image, None)
  np.testing.assert_allclose(normal, (plain - mean) / deviation, atol=2e-5)

  key = jax.random.key(0)
  drawn = sd.encode_image(params, image, key) / sd.vae.scaling_factor
  np.testing.assert_allclose(
      other.encode_image(folded, image, key), (drawn - mean) / deviation, atol=5e-5)
  np.testing.assert_allclose(
      other.decode_latents(folded, normal),
      sd.decode_latents(params, plain * sd.vae.scaling_factor), atol=2e-5)


def test_posterior_draws_have_the_mean_and_variance_of_the_moments(tiny_model):
  sd, _ = tiny_model
  moments = np.zeros((1, 64, 64, 8), np.float32)
  moments[..., :4], moments[..., 4:] = 3.0, np.log(0.25)
  drawn = sd.latents(moments, jax.random.key(0)) / sd.vae.scaling_factor
  assert abs(drawn.mean() - 3) < 0.02 and abs(drawn.std() - 0.5) < 0.02
  np.testing.assert_allclose(sd.latents(moments, None), 3 * sd.vae.scaling_factor, rtol=1e-6)


def test_initial_parameters_depend_on_seed_and_path_alone(tiny_model):
  sd, _ = tiny_model
  first, second = pytrees.flatten(sd.init(0)), pytrees.flatten(sd.init(1))
  again = pytrees.flatten(sd.init(0))
  assert all(np.array_equal(first[path], again[path]) for path in first)
  kernels = [path for path in first if path.endswith("kernel") and first[path].any()]
  assert all(not np.array_equal(first[path], second[path]) for path in kernels)
  kernel = first["vae/decoder/mid_block/resnets_0/conv1/kernel"]
  assert abs(kernel.std() * np.sqrt(np.prod(kernel.shape[:-1])) - 1) < 0.1
  # The UNet begins as the zero function, so that the first loss is the target's variance.
  assert not first["unet/conv_out/kernel"].any()


def test_sizes_that_cannot_be_halved_name_the_nearest(tiny_model):
  sd, _ = tiny_model
  assert sd.latent_shape(32, 48) == (8, 12, 4)
  with pytest.raises(UserError, match="width is 35 px.*multiples of 8.*nearest is 32"):
    sd.latent_shape(32, 35)


def test_a_model_is_hashable_and_equal_to_its_copy(tiny_model):
  sd, _ = tiny_model
  assert hash(sd.astype("float32")) == hash(sd) and sd.astype("float32") == sd
  assert sd.astype("bfloat16") != sd
