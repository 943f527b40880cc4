"""The shapes data set: its geometry, its language, and what it holds out."""

import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sdjax.data import shapes
from sdjax.errors import UserError


def pair_of(scene):
  return frozenset((scene.first, scene.second))


def test_caption_reads_as_english():
  scene = shapes.Scene(
      shapes.Thing("small", "red", "circle"), "above", shapes.Thing("large", "blue", "square"))
  assert shapes.caption(scene) == (
      "a small red circle above a large blue square on a white background")
  assert shapes.caption(shapes.swapped(scene)) == (
      "a large blue square below a small red circle on a white background")


def test_parse_inverts_caption():
  for scene in shapes.scenes(200, seed=0):
    assert shapes.parse(shapes.caption(scene)) == scene
    assert shapes.swapped(shapes.swapped(scene)) == scene


@pytest.mark.parametrize("text", ["", "a dog", "a small red circle above a large blue dog on a "
                                  "white background", "a red circle above a blue square"])
def test_parse_refuses_other_text(text):
  with pytest.raises(UserError):
    shapes.parse(text)


@pytest.mark.parametrize("shape, area", [
    ("circle", math.pi), ("square", 4), ("triangle", 2), ("ring", 0.75 * math.pi)])
def test_coverage_sums_to_the_area(shape, area):
  radius = 6.3
  covered = shapes.coverage(shape, radius, 15.8, 16.1)
  assert covered.min() == 0 and covered.max() == 1
  np.testing.assert_allclose(covered.sum(), area * radius**2, rtol=0.02)


def test_colours_are_well_apart():
  table = np.array(list(shapes.COLOURS.values()), float)
  assert len(table) >= 8
  assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(table, 2)) >= 100
  assert table.min(1).max() <= 40                 # each has ink in some channel


def test_things_never_touch_nor_leave_the_picture():
  for index, scene in enumerate(shapes.scenes(500, seed=3)):
    picture = shapes.draw(scene, np.random.default_rng(index))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    ink = (picture < 250).any(-1)
    assert not (ink[0].any() or ink[-1].any() or ink[:, 0].any() or ink[:, -1].any())
    labels, count = ndimage.label(ink, np.ones((3, 3)))
    assert count == 2, scene
    # The named colour is there, whole, in the component that stands as said.
    is_first = (picture == shapes.COLOURS[scene.first.colour]).all(-1)
    first = np.unique(labels[is_first])
    assert first.size == 1 and first[0] > 0
    middles = ndimage.center_of_mass(ink, labels, [first[0], 3 - first[0]])
    dy, dx = np.subtract(*middles)
    axis = {"above": -dy, "below": dy, "left of": -dx, "right of": dx}[scene.relation]
    assert axis > 1.5 * min(abs(dx), abs(dy))


def test_drawing_depends_on_the_generator_alone():
  scene = next(shapes.scenes(1, seed=0))
  a, b, c = (shapes.draw(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_scenes_repeat_and_continue():
  assert list(shapes.scenes(50, 7)) == list(shapes.scenes(80, 7))[:50]
  assert list(shapes.scenes(50, 7)) != list(shapes.scenes(50, 8))


def test_no_phrasing_of_a_held_out_pair_is_trained_on():
  train = {pair_of(scene) for scene in shapes.scenes(8000, seed=0)}
  held = {pair_of(scene) for scene in shapes.scenes(2000, seed=0, held_out=True)}
  assert held and train.isdisjoint(held)
  captions = shapes.held_out_captions(1000, seed=5)
  assert train.isdisjoint({pair_of(shapes.parse(text)) for text in captions})
  # About a seventh of the 8*7/2 * (2*4)² pairs is held out, and every name is on both sides.
  assert 1792 / 9 < len(held) < 1792 / 5
  for pairs in (train, held):
    things = set().union(*pairs)
    assert {thing.colour for thing in things} == set(shapes.COLOURS)
    assert {thing.shape for thing in things} == set(shapes.SHAPES)


def test_held_out_captions_are_distinct_and_repeat():
  captions = shapes.held_out_captions(256, seed=1)
  assert len(set(captions)) == 256
  assert captions == shapes.held_out_captions(256, seed=1)
  assert captions != shapes.held_out_captions(256, seed=2)
  with pytest.raises(UserError):
    shapes.held_out_captions(10**6, seed=1)


def test_samples_hold_the_picture_and_both_phrasings():
  made = list(shapes.samples(5, seed=2))
  for sample, scene in zip(made, shapes.scenes(5, seed=2), strict=True):
    assert sample["txt"] == shapes.caption(scene)
    assert sample["json"]["captions"] == [
        shapes.caption(scene), shapes.caption(shapes.swapped(scene))]
    with Image.open(io.BytesIO(sample["png"])) as picture:
      assert picture.mode == "RGB" and picture.size == (32, 32)
  assert made == list(shapes.samples(9, seed=2))[:5]
