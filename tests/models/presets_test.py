"""Released models have the released numbers of parameters (counts published with them)."""

import jax
import pytest

from sdjax import pytrees
from sdjax.errors import UserError
from sdjax.models.controlnet import ControlNet
from sdjax.models.presets import PRESETS, preset


def count(module):
  return pytrees.count(jax.eval_shape(module.init, jax.random.key(0), *module.example()))


@pytest.mark.parametrize("name, parameters", [
    ("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684),
    ("sdxl_refiner", 2_259_526_660)])
def test_unet_has_the_released_number_of_parameters(name, parameters):
  assert count(preset(name)["unet"]) == parameters


def test_autoencoder_has_the_released_number_of_parameters():
  assert count(preset("sd15")["vae"]) == 83_653_863


def test_controlnet_has_the_released_number_of_parameters():
  assert count(ControlNet()) == 361_279_120


def test_the_network_of_cifar10_has_the_published_number_of_parameters():
  assert count(preset("cifar10")["unet"]) == 35_746_307  # "35.7M", Ho et al. 2020, appendix B


@pytest.mark.parametrize("name, parameters", [
    ("sd15", [123_060_480]), ("sd21", [340_387_840]), ("sdxl", [123_060_480, 694_659_840]),
    ("sdxl_refiner", [694_659_840])])
def test_text_encoders_have_the_released_number_of_parameters(name, parameters):
  assert [count(text) for text in preset(name)["text_encoders"]] == parameters


@pytest.mark.parametrize("name", [name for name in PRESETS if "vae" in PRESETS[name]])
def test_text_and_latents_fit_the_unet(name):
  modules = preset(name)
  assert sum(text.width for text in modules["text_encoders"]) == (
      modules["unet"].cross_attention_dim)
  assert modules["vae"].latent_channels == modules["unet"].in_channels
  assert modules["unet"].sample_size % modules["unet"].downsampling == 0


def test_unknown_name_is_told_with_the_known_ones():
  with pytest.raises(UserError, match="sd15"):
    preset("sd9")
