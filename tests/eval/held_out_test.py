"""The evaluation asks for captions that were held out, judges, and writes what it found."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sdjax import generate
from sdjax.data import shapes
from sdjax.eval import held_out

CONFIG = SimpleNamespace(count=40, seed=3, steps=2, guidance_scale=3.0, sampler="ddim")


def draws_what_it_is_asked(sd, params, prompts, *, seeds, height, width, **_):
  made = [shapes.draw(shapes.parse(text), np.random.default_rng(seed))
          for text, seed in zip(prompts, seeds, strict=True)]
  assert np.shape(made)[1:] == (height, width, 3)
  return np.stack(made).astype(np.float32) / 127.5 - 1, None


def draws_the_next_caption(sd, params, prompts, **how):
  return draws_what_it_is_asked(sd, params, [*prompts[1:], prompts[0]], **how)


@pytest.mark.parametrize("draw, low, high", [
    (draws_what_it_is_asked, 1.0, 1.0), (draws_the_next_caption, 0.0, 0.05)])
def test_scores_are_those_of_the_pictures(monkeypatch, tmp_path, draw, low, high):
  monkeypatch.setattr(generate, "text_to_image", draw)
  result = held_out.evaluate(None, None, CONFIG)
  assert all(shapes.is_held_out(shapes.parse(text)) for text in result.captions)
  assert low <= result.scores["all"] <= high
  picture = held_out.write(result, tmp_path)
  written = json.loads((tmp_path / "evaluation.json").read_text())
  assert written == {"count": 40, **result.scores}
  with Image.open(picture) as image:
    assert image.width > 6 * 32 and np.asarray(image).std() > 10
  assert f"everything {result.scores['all']:.0%}" in held_out.describe(result)
