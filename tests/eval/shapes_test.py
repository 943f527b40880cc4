"""The detector against pictures whose content is known, and against pictures of nothing."""

import numpy as np
import pytest
from scipy import ndimage

from sdjax.data import shapes as data
from sdjax.errors import UserError
from sdjax.eval import shapes

COUNT = 600


@pytest.fixture(scope="module")
def rendered():
  scenes = list(data.scenes(COUNT, seed=11))
  pictures = [data.draw(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
  return np.stack(pictures), [data.caption(scene) for scene in scenes]


def spoil(pictures, blur_px, noise):
  """Does what an autoencoder does to a picture, more or less; `noise` of 255."""
  soft = ndimage.gaussian_filter(pictures.astype(float), (0, blur_px, blur_px, 0))
  soft += np.random.default_rng(0).normal(0, noise, soft.shape)
  return np.clip(soft, 0, 255).astype(np.uint8)


def test_rendered_pictures_are_right(rendered):
  pictures, captions = rendered
  assert min(shapes.score(pictures, captions).values()) >= 0.99


def test_both_phrasings_are_right(rendered):
  pictures, captions = rendered
  other = [data.caption(data.swapped(data.parse(text))) for text in captions[:200]]
  assert min(shapes.score(pictures[:200], other).values()) >= 0.99


@pytest.mark.parametrize("blur_px, noise", [(0.5, 5), (0.8, 10)])
def test_blur_and_noise_are_tolerated(rendered, blur_px, noise):
  pictures, captions = rendered
  assert min(shapes.score(spoil(pictures, blur_px, noise), captions).values()) >= 0.97


def test_middles_are_measured(rendered):
  radius, x, y = 4.3, 10.2, 20.6
  ink = np.array(data.COLOURS["green"]) - 255.0
  picture = 255 + data.coverage("circle", radius, x, y)[..., None] * ink
  (found,) = shapes.detect(picture.astype(np.uint8))
  assert (found.colour, found.shape, found.size) == ("green", "circle", "small")
  np.testing.assert_allclose((found.x, found.y), (x, y), atol=0.1)


@pytest.mark.parametrize("attribute, old, new", [
    ("colour", "red", "blue"), ("size", "small", "large"), ("shape", "circle", "ring"),
    ("relation", "above", "left of")])
def test_one_wrong_word_is_one_wrong_measure(attribute, old, new):
  text = "a small red circle above a small green square on a white background"
  picture = data.draw(data.parse(text), np.random.default_rng(0))
  verdict = shapes.judge(picture, text.replace(old, new, 1))
  wrong = {name for name, right in verdict.items() if not right}
  assert wrong == {attribute, "all"}


def test_swapped_order_is_a_wrong_relation():
  text = "a small red circle above a large green square on a white background"
  picture = data.draw(data.parse(text), np.random.default_rng(0))
  verdict = shapes.judge(picture, text.replace("above", "below"))
  assert verdict == dict(colour=True, size=True, shape=True, relation=False, all=False)


def test_noise_and_blank_pages_are_wrong(rendered):
  pictures, captions = rendered
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, pictures.shape, np.uint8)
  assert max(shapes.score(noise, captions).values()) <= 0.01
  assert max(shapes.score(np.full_like(pictures, 255), captions).values()) == 0
  smooth = ndimage.gaussian_filter(rng.normal(size=pictures.shape), (0, 2, 2, 0))
  blobs = np.clip(235 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
  assert shapes.score(blobs, captions)["all"] <= 0.01


def test_shuffled_captions_score_at_chance(rendered):
  """Chance, for a picture and an unrelated caption, both drawn evenly.

  colour: the pair of colours agrees, one of 8*7/2 = 28: 3.6 %.
  relation: the axis agrees (1/2) and the sign (1/2): 25 %, however the things are assigned.
  size: 1/2 * 1/2 = 25 % under an assignment blind to size, 37.5 % (both multisets agree) under one
    made for size; ours looks at it second, so in between.
  shape: likewise 1/4 * 1/4 = 6.3 % to (4 + 6 * 4) / 256 = 10.9 %.
  all: 2 phrasings of one of 1792 pairs * 4 arrangements: 0.03 %.
  The slack is three standard deviations of a fraction of `COUNT` pictures.
  """
  pictures, captions = rendered
  order = np.roll(np.arange(COUNT), 1)
  scores = shapes.score(pictures, [captions[i] for i in order])

  def is_within(name, low, high):
    slack = 3 * np.sqrt(high * (1 - high) / COUNT)
    return low - slack <= scores[name] <= high + slack

  assert is_within("colour", 1 / 28, 1 / 28), scores
  assert is_within("relation", 1 / 4, 1 / 4), scores
  assert is_within("size", 1 / 4, 3 / 8), scores
  assert is_within("shape", 1 / 16, 28 / 256), scores
  assert is_within("all", 0, 1 / 3584), scores


def test_a_third_thing_makes_everything_wrong():
  text = "a small red circle above a small green square on a white background"
  picture = np.full((32, 32, 3), 255.0)
  for name, shape, x, y in [("red", "circle", 8, 8), ("green", "square", 8, 22)]:
    ink = np.array(data.COLOURS[name]) - 255.0
    picture += data.coverage(shape, 4.3, x, y)[..., None] * ink
  assert shapes.judge(picture.astype(np.uint8), text)["all"]
  picture += data.coverage("ring", 4.3, 24, 15)[..., None] * (
      np.array(data.COLOURS["blue"]) - 255.0)
  assert not any(shapes.judge(picture.astype(np.uint8), text).values())


def test_score_refuses_what_does_not_match(rendered):
  pictures, captions = rendered
  with pytest.raises(UserError):
    shapes.score(pictures[:2], captions[:3])
  with pytest.raises(UserError):
    shapes.score(pictures[:0], [])
