"""Released models have the released numbers of parameters (counts published with them)."""

import jax
import jax.numpy as jnp
import pytest

from sdjax import pytrees
from sdjax.errors import UserError
from sdjax.models.presets import PRESETS, preset


def count(module, *shapes):
  inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  return pytrees.count(jax.eval_shape(module.init, jax.random.key(0), *inputs))


@pytest.mark.parametrize("name, parameters", [("sd15", 859_520_964), ("sd21", 865_910_724)])
def test_unet_has_the_released_number_of_parameters(name, parameters):
  unet = preset(name)["unet"]
  f = jnp.float32
  context = (1, 77, unet.cross_attention_dim)
  assert count(unet, ((1, 64, 64, 4), f), ((1,), f), (context, f)) == parameters


def test_autoencoder_has_the_released_number_of_parameters():
  assert count(preset("sd15")["vae"], ((1, 64, 64, 3), jnp.float32)) == 83_653_863


@pytest.mark.parametrize("name, parameters", [("sd15", 123_060_480), ("sd21", 340_387_840)])
def test_text_encoder_has_the_released_number_of_parameters(name, parameters):
  assert count(preset(name)["text_encoder"], ((1, 77), jnp.int32)) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_text_and_latents_fit_the_unet(name):
  modules = preset(name)
  assert modules["text_encoder"].width == modules["unet"].cross_attention_dim
  assert modules["vae"].latent_channels == modules["unet"].in_channels
  assert modules["unet"].sample_size % modules["unet"].downsampling == 0


def test_unknown_name_is_told_with_the_known_ones():
  with pytest.raises(UserError, match="sd15"):
    preset("sd9")
