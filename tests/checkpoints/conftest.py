"""Tiny models of every family, of random numbers."""

import functools

import jax
import numpy as np
import pytest

from sdjax.data import tokenizer
from sdjax.diffusion import schedules
from sdjax.models.clip import CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.stable_diffusion import StableDiffusion

UNET = dict(block_out_channels=(8, 16), attention=(False, True), layers_per_block=1, num_heads=2,
            norm_groups=4, sample_size=8)
XL = dict(linear_projection=True, transformer_layers=(1, 2), added_time_dim=4)
FIRST = dict(width=8, layers=3, heads=2, mlp_width=16)
SECOND = FIRST | dict(width=12, activation="gelu")

# family -> (UNet, text encoders, prediction type, zero terminal SNR)
FAMILIES = {
    "sd1": (dict(cross_attention_dim=8), [FIRST], "epsilon", False),
    "sd2": (dict(cross_attention_dim=12, linear_projection=True), [SECOND], "v_prediction", False),
    "inpaint": (dict(cross_attention_dim=8, in_channels=9), [FIRST], "epsilon", False),
    "sdxl": (dict(cross_attention_dim=20, added_dim=10 + 24, **XL),
             [FIRST, SECOND | dict(projection=10)], "v_prediction", True),
    "refiner": (dict(cross_attention_dim=12, added_dim=10 + 20, **XL),
                [SECOND | dict(projection=10)], "epsilon", False),
}


@functools.cache
def make(family):
  """(sd, params) of a family, every parameter a standard normal number."""
  unet, texts, prediction, zero_snr = FAMILIES[family]
  words = tokenizer.train(["a red circle"], length=16, vocab_size=520)
  fitted = dict(vocab_size=words.vocab_size, max_length=words.length, eos_id=words.eos_id)
  schedule = schedules.Schedule(zero_terminal_snr=zero_snr)
  sd = StableDiffusion(
      unet=UNet(**UNET | unet),
      vae=AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_groups=4),
      text_encoders=tuple(CLIPText(**text | fitted) for text in texts),
      tokenizers=(words,) * len(texts), schedule=schedule, prediction_type=prediction,
      zeros_for_empty_prompt=family == "sdxl",
      scheduler_config=schedules.to_config(schedule, prediction))
  rng = np.random.default_rng(0)
  return sd, jax.tree.map(
      lambda leaf: rng.standard_normal(leaf.shape, np.float32), sd.param_shapes())


@pytest.fixture(params=FAMILIES)
def family(request):
  """(family, sd, params)."""
  return request.param, *make(request.param)
