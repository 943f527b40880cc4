"""What pictures tell in A1111's words."""

from sdjax.cli import infotext
from sdjax.data.prompt_files import Picture, Wanted

PLAIN = dict.fromkeys(("sampler", "image_scale", "hires", "hires_strength", "hires_enlarge",
                       "refiner", "handoff")) | {
    "scheduler": "PNDMScheduler", "model": "models/sd15.safetensors", "clip_skip": 0,
    "control": [], "guess": False}
ONE = Wanted("a fox: red", "blurry", 2**64 - 1, 20, 7.5, 512, 768, 1, 0)


def told(one=ONE, first=(512, 768), **settings):
  return infotext.parameters(one, PLAIN | settings, first)


def test_text_to_image():
  assert told() == (
      "a fox: red\nNegative prompt: blurry\nSteps: 20, Sampler: PLMS, CFG scale: 7.5, "
      f"Seed: {2**64 - 1}, Size: 768x512, Model: sd15")
  assert "Sampler: Euler a, " in told(sampler="euler_ancestral")
  assert "Sampler: res_2s, " in told(sampler="res_2s")  # unknown there: as it is called here
  assert told(clip_skip=1).endswith("Model: sd15, Clip skip: 2")


def test_size_is_that_of_the_first_pass():
  assert told(first=(256, 384), hires=2.0, hires_strength=0.5, hires_enlarge="latents").endswith(
      "Size: 384x256, Model: sd15, Denoising strength: 0.5, Hires upscale: 2, "
      "Hires upscaler: Latent")


def test_everything_at_once_stays_in_its_order():
  one = Wanted("a", "", 1, 20, 1.0, 64, 64, 1, 0, Picture("a.png", "0"), Picture("m.png", "1"), 0.3)
  control = {"folder": "nets/canny", "scale": 0.8, "start": 0.0, "end": 0.5}
  assert told(one, (64, 64), clip_skip=1, image_scale=1.5, control=[control]) == (
      "a\nSteps: 20, Sampler: PLMS, CFG scale: 1, Image CFG scale: 1.5, Seed: 1, Size: 64x64, "
      'Model: sd15, Denoising strength: 0.3, Clip skip: 2, Mask blur: 0, ControlNet 0: "Module: '
      "none, Model: canny, Weight: 0.8, Resize Mode: Crop and Resize, Guidance Start: 0, Guidance "
      'End: 0.5, Control Mode: Balanced"')
