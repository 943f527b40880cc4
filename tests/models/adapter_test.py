"""Properties of T2I-Adapters; their numbers are checked against diffusers in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import adapter_configs
from sdjax.errors import UserError
from sdjax.models.adapter import Level, T2IAdapter, pixel_unshuffle

# Released networks: (module, parameters as diffusers counts them, sizes of the features of 512 px).
RELEASED = {
    "full": (T2IAdapter(), 77_369_280, (64, 32, 16, 8)),
    "xl": (T2IAdapter(kind="full_adapter_xl", downscale_factor=16), 79_028_160, (32, 32, 16, 16)),
    "light": (T2IAdapter(kind="light_adapter", channels=(320, 640, 1280), num_res_blocks=4),
              18_689_200, (64, 32, 16, 8)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_adapters_fit_the_unet(name):
  adapter, parameters, sides = RELEASED[name]
  hint = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  features, params = jax.eval_shape(adapter.init_with_output, jax.random.key(0), hint)
  assert pytrees.count(params) == parameters
  widths = (320, 640, 1280, 1280)
  assert [x.shape for x in features] == [(1, s, s, c) for s, c in zip(sides, widths)]


def test_pixels_become_channels_square_by_square():
  x = np.random.default_rng(0).standard_normal((2, 6, 9, 2), np.float32)
  y = np.asarray(pixel_unshuffle(x, 3))
  assert y.shape == (2, 2, 3, 18)
  for c in range(2):
    for i in range(3):
      for j in range(3):
        np.testing.assert_array_equal(y[..., c * 9 + i * 3 + j], x[:, i::3, j::3, c])


def test_halving_takes_the_mean_of_the_pixels_that_there_are():
  level = Level(2, blocks=0, halve=True, light=False, dtype="float32")
  x = np.random.default_rng(0).standard_normal((1, 5, 4, 2), np.float32)
  y = level.apply({}, x)
  assert y.shape == (1, 3, 2, 2)
  np.testing.assert_allclose(y[0, 1, 1], x[0, 2:4, 2:4].mean(axis=(0, 1)), atol=1e-6)
  np.testing.assert_allclose(y[0, 2, 1], x[0, 4:, 2:4].mean(axis=(0, 1)), atol=1e-6)


def test_a_picture_between_sizes_is_refused():
  with pytest.raises(UserError, match="64 × 60 px"):
    jax.eval_shape(T2IAdapter().init, jax.random.key(0), jnp.zeros((1, 64, 60, 3)))


@pytest.mark.parametrize("name", RELEASED)
def test_config_of_an_adapter_reads_back(name):
  adapter = RELEASED[name][0]
  assert adapter_configs.read_adapter(adapter_configs.write_adapter(adapter)) == adapter


@pytest.mark.parametrize("changed", [{"adapter_type": "heavy"}, {"channels": 320}, {"norm": True}])
def test_what_is_no_adapter_is_refused(changed):
  with pytest.raises(UserError, match=next(iter(changed))):
    adapter_configs.read_adapter(changed)
