"""Perturbed-attention guidance against diffusers' pipelines."""

import pytest

from sdjax import edit, generate

diffusers = pytest.importorskip("diffusers")
compare = pytest.importorskip("compare")
pipelines = pytest.importorskip("generate_test")

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("family, ours, theirs, scale", [
    ("sd1", "mid_block", "mid", 4.0),
    ("sd1", "down_blocks_0|up_blocks_0/attentions_1", None, 4.0),
    ("sd1", "mid_block", "mid", 1.0),
    ("sd2", "", ".", 4.0),
    ("sdxl", "up_blocks_0", "up_blocks.0", 4.0),
])
def test_text_to_image(family, ours, theirs, scale):
  _, sd, params = pipelines.model(family)
  layers = ["down_blocks.0", "up_blocks.0.attentions.1"] if theirs is None else theirs
  name = "StableDiffusionXLPAGPipeline" if sd.is_xl else "StableDiffusionPAGPipeline"
  pipeline = as_pipeline(name, family, layers)
  made = pipeline(pipelines.families.WORDS, latents=compare.nchw(pipelines.NOISE),
                  guidance_scale=scale, pag_scale=3.0, **pipelines.THEIRS, **pipelines.SIZE)
  pipelines.assert_same(f"{family} {ours} {scale}", generate.text_to_image(
      sd, params, pipelines.families.WORDS, guidance_scale=scale, pag_scale=3.0, pag_layers=ours,
      **pipelines.OURS, **pipelines.SIZE), made)


def test_inpaint(monkeypatch):
  _, sd, params = pipelines.model("sd1")
  pipeline = as_pipeline("StableDiffusionPAGInpaintPipeline", "sd1", "mid")
  pipelines.without_chance(monkeypatch, pipeline)
  made = pipeline(
      pipelines.families.WORDS, image=pipelines.pixels(pipelines.IMAGES),
      mask_image=pipelines.torch.tensor(pipelines.MASKS)[:, None], strength=0.7,
      guidance_scale=4.0, pag_scale=3.0, **pipelines.THEIRS, **pipelines.SIZE)
  pipelines.assert_same("inpaint", edit.inpaint(
      sd, params, pipelines.families.WORDS, pipelines.IMAGES, pipelines.MASKS, strength=0.7,
      guidance_scale=4.0, pag_scale=3.0, **pipelines.OURS), made)


def as_pipeline(name, family, layers):
  """Returns a pipeline whose own copy of the UNet is perturbed."""
  pipeline, *_ = pipelines.model(family)
  unet = type(pipeline.unet).from_config(pipeline.unet.config)
  unet.load_state_dict(pipeline.unet.state_dict())
  components = dict(pipeline.components) | {"unet": unet.eval()}
  components = {key: part for key, part in components.items()
                if not (family == "sdxl" and key == "safety_checker")}
  return getattr(diffusers, name)(
      **components, pag_applied_layers=layers,
      **({} if family == "sdxl" else {"requires_safety_checker": False}))
