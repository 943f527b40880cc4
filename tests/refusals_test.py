"""Whatever is out of range is told in one line, before anything is compiled or run."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax import monitoring

from sdjax import control, denoise, edit, generate
from sdjax.errors import UserError
from sdjax.models.adapter import T2IAdapter
from sdjax.models.controlnet import ControlNet

PROMPTS = ["a red circle", "a blue square"]
SIZE = dict(height=16, width=24)
PARAMS: dict[str, Any] = {}  # whoever reads them is too late
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
HINTS = np.abs(IMAGES)
NAN = IMAGES * np.nan


def base_to_refiner(sd, params, prompts, base_layers=1, **options):
  base = dataclasses.replace(sd, text_encoders=(sd.text_encoders[0].clone(layers=base_layers),))
  return edit.base_to_refiner(base, params, sd, params, prompts, **options)


# Name -> (function, fields of the UNet, arguments beside those of all).
WAYS: dict[str, Any] = {
    "text": (generate.text_to_image, {}, SIZE),
    "image": (edit.image_to_image, {}, dict(images=IMAGES, strength=0.5)),
    "inpaint": (edit.inpaint, {}, dict(images=IMAGES, masks=HINTS[..., 0])),
    "inpaint 9": (edit.inpaint, dict(in_channels=9), dict(images=IMAGES, masks=HINTS[..., 0])),
    "pix2pix": (edit.instruct_pix2pix, dict(in_channels=8), dict(images=IMAGES, image_scale=1.5)),
    "upscale": (edit.upscale, dict(in_channels=7, num_classes=350), dict(images=IMAGES)),
    "refine": (base_to_refiner, {}, SIZE | dict(handoff=0.5)),
    "hires": (edit.hires_fix, {}, dict(height=32, width=48, first_height=16, first_width=24,
                                       strength=0.5)),
}
NET = ControlNet(block_out_channels=(32, 64), cross_attention_dim=32)
ADAPTER = T2IAdapter(channels=(32, 64), downscale_factor=4)


def steer(module=NET, hint=HINTS, **options):
  return dict(controls=[control.Control(module, PARAMS, hint, **options)])


@pytest.fixture
def compiled(monkeypatch):
  """The names of what is compiled; the programs of these modules refuse to run at all."""
  def refuse(*_, **__):
    raise AssertionError("a program was run")

  for module in (denoise, generate):
    for name, value in list(vars(module).items()):
      if isinstance(value, jax.stages.Wrapped):
        monkeypatch.setattr(module, name, refuse)
  compiled = []

  def tell(event, seconds, **facts):
    if event.endswith("/backend_compile_duration"):
      compiled.append(facts["fun_name"])

  monitoring.register_event_duration_secs_listener(tell)
  yield compiled
  monitoring.unregister_event_duration_listener(tell)


def ask(tiny_model, way, **changes):
  function, unet, arguments = WAYS[way]
  sd = dataclasses.replace(tiny_model[0], unet=tiny_model[0].unet.clone(
      **unet | changes.pop("unet", {})))
  asked = dict(prompts=PROMPTS, steps=5, seeds=[3, 4], guidance_scale=2.0)
  return function(sd, PARAMS, **asked | arguments | changes)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_in_range_begins(tiny_model, compiled, way):
  """Else the tests below would pass whatever is asked."""
  with pytest.raises(AssertionError, match="a program was run"):
    ask(tiny_model, way)


@pytest.mark.parametrize("way, changes, told", [
    ("text", dict(height=36), "height is 36 px.*multiples of 8.*nearest"),
    ("text", dict(width=0), "width is 0 px.*multiples of 8"),
    ("text", dict(prompts=[]), "no prompts.*at least one"),
    ("text", dict(sampler="euler_zeta"), "'euler_zeta'.*choose one of.*ddim"),
    ("text", dict(steps=0, sampler="ddim"), "steps is 0.*1 to 1000"),
    ("text", dict(steps=1001), "steps is 1001.*1 to 1000"),
    ("text", dict(guidance_scale=-1.0), "guidance_scale is -1.*must not be negative"),
    ("text", dict(guidance_scale=math.nan), "guidance_scale is nan"),
    ("text", dict(guidance_scale=[1.0, math.inf]), "guidance_scale is .*inf"),
    ("text", dict(guidance_scale=[1.0, 2.0, 3.0]), "3 guidance scales for 2 prompts; give one"),
    ("text", dict(guidance_rescale=1.5), "guidance_rescale is 1.5.*0 and 1"),
    ("text", dict(guidance_interval=(2.0, 1.0)), "guidance_interval is .*falling.*lower"),
    ("text", dict(pag_scale=-1), "pag_scale is -1.*must not be negative"),
    ("text", dict(pag_scale=3, pag_layers="nowhere"), "'nowhere', which matches none of.*blocks"),
    ("text", dict(seeds=[1]), "1 seeds for 2 prompts; give one each"),
    ("text", dict(seeds=[1, 2**64]), r"seed is 18446744073709551616.*0 and 2\*\*64 - 1"),
    ("text", dict(negative_prompts=[""]), "1 negative_prompts for 2 prompts; give one each"),
    ("text", dict(clip_skip=1), "clip_skip is 1; this model can skip 0 to 0"),
    ("text", dict(clip_skip=-1), "clip_skip is -1; this model can skip 0 to 0"),
    ("text", dict(init_latents=np.zeros((2, 4, 6, 3))), r"\[2, 4, 6, 3\].*need \[2, 4, 6, 4\]"),
    ("text", dict(init_latents=np.full((2, 4, 6, 4), np.nan)), "NaN.*must be standard normal"),
    ("text", dict(every_rows=0), "every_rows is 0.*at least 1"),
    ("text", dict(batch_size=0), "batch_size is 0.*at least 1"),
    ("text", dict(tile=4), "tile is 4.*at least 8"),
    ("text", dict(sizes=np.zeros((2, 6))), r"\[2, 6\]; this model is told none: leave them out"),
    ("text", dict(unet=dict(in_channels=9)), "reads 9 channels, its latents have 4.*reads 4"),
    ("text", dict(unet=dict(num_classes=10)), "reads 4 channels.*and no label"),
    ("image", dict(strength=1.1), "strength is 1.1.*between 0.*and 1"),
    ("image", dict(strength=-0.1), "strength is -0.1.*between 0.*and 1"),
    ("image", dict(strength=math.nan), "strength is nan"),
    ("image", dict(images=IMAGES[:1]), r"\[1, 16, 24, 3\]; 2 prompts need \[2, H, W, 3\]"),
    ("image", dict(images=IMAGES[..., 0]), r"\[2, 16, 24\]; 2 prompts need \[2, H, W, 3\]"),
    ("image", dict(images=2 * IMAGES), r"outside \[-1, 1\].*divide 8-bit ones by 127.5"),
    ("image", dict(images=np.zeros((2, 16, 24, 3), np.uint8)), r"divide 8-bit ones by 127.5"),
    ("image", dict(images=NAN), r"outside \[-1, 1\] or NaN"),
    ("image", dict(images=IMAGES[:, :-1]), "height is 15 px.*multiples of 8"),
    ("image", dict(seeds=[1, -1]), r"seed is -1.*0 and 2\*\*64 - 1"),
    ("image", dict(init_latents=np.zeros((1, 4, 6, 4))), r"need \[2, 4, 6, 4\]"),
    ("image", dict(unet=dict(in_channels=9)), "reads 9 channels.*takes a model that reads 4"),
    ("inpaint", dict(masks=np.zeros((2, 16, 23))), r"\[2, 16, 23\].*\[2, 16, 24\].*resize"),
    ("inpaint", dict(masks=np.full((2, 16, 24), 255)), r"outside \[0, 1\].*divide 8-bit"),
    ("inpaint", dict(masks=NAN[..., 0]), r"outside \[0, 1\] or NaN"),
    ("inpaint", dict(strength=2), "strength is 2.*between 0.*and 1"),
    ("inpaint 9", dict(unet=dict(in_channels=8)), "reads 8 channels.*reads 9"),
    ("inpaint 9", dict(batch_size=0), "batch_size is 0.*at least 1"),
    ("pix2pix", dict(unet=dict(in_channels=4)), "reads 4 channels.*reads 8"),
    ("pix2pix", dict(image_scale=-1), "image_scale is -1.*must not be negative"),
    ("pix2pix", dict(image_scale=math.nan), "image_scale is nan"),
    ("pix2pix", dict(images=NAN), r"outside \[-1, 1\] or NaN"),
    ("upscale", dict(unet=dict(num_classes=None)), "reads 7 channels.*reads 7 and a noise level"),
    ("upscale", dict(noise_level=351), "noise_level is 351.*between 0 and 350"),
    ("upscale", dict(images=IMAGES[:, :15]), "height is 60 px.*multiples of 8"),
    ("upscale", dict(images=NAN), r"outside \[-1, 1\] or NaN"),
    ("refine", dict(handoff=1.5), "handoff is 1.5.*between 0 and 1"),
    ("refine", dict(handoff=math.nan), "handoff is nan.*between 0 and 1"),
    ("refine", dict(height=15), "height is 15 px.*multiples of 8"),
    ("hires", dict(enlarge="pixel"), "'pixel'; choose latents or pixels"),
    ("hires", dict(strength=2), "strength is 2.*between 0.*and 1"),
    ("hires", dict(height=36), "height is 36 px.*multiples of 8"),
    ("hires", dict(first_width=12), "width is 12 px.*multiples of 8"),
    ("text", steer(hint=HINTS[:, :8]), r"\[2, 8, 24, 3\].*need \[2, 16, 24, 3\]"),
    ("text", steer(hint=HINTS[:1]), r"\[1, 16, 24, 3\].*need \[2, 16, 24, 3\]"),
    ("text", steer(hint=2 * HINTS), r"outside \[0, 1\].*divide 8-bit ones by 255"),
    ("text", steer(hint=NAN), r"outside \[0, 1\] or NaN"),
    ("text", steer(start=0.5, end=0.4), "from 0.5 to 0.4.*0 <= start <= end <= 1"),
    ("text", steer(ControlNet()), "of other widths; use one"),
    ("text", steer(ADAPTER.clone(downscale_factor=16)), "16 × 24 px.*multiples of 16"),
    ("text", dict(steps=0), "steps is 0.*1 to 1000"),
    ("text", steer(scale=math.nan), "scale of a ControlNet is nan"),
    ("text", steer(ADAPTER.clone(channels=(16, 64))), "of other widths; use one"),
    ("image", dict(prompts=[], images=IMAGES[:0]), "no prompts.*at least one"),
    ("refine", dict(base_layers=2, clip_skip=1), "clip_skip is 1.*0 to 0"),
    ("hires", dict(first_height=12, **steer(hint=np.zeros((2, 32, 48, 3)))),
     "height is 12 px.*multiples of 8"),
])
def test_what_is_out_of_range_is_told(tiny_model, compiled, way, changes, told):
  with pytest.raises(UserError, match=told) as caught:
    ask(tiny_model, way, **changes)
  assert "\n" not in str(caught.value) and not compiled
