import numpy as np
import pytest

from sdjax.data import peek
from sdjax.data.sources import open_source
from sdjax.errors import UserError


def test_captions_come_sample_by_sample(make_shards):
  several = make_shards(3, json={"captions": ["one", "two"], "blip": "a blip"})
  source = open_source(str(several), facts=("captions", "blip"))
  assert peek.first_captions(source, 2) == [("one", "two")] * 2
  assert peek.first_captions(source, 2, column=("blip", "captions")) == [
      ("a blip", "one", "two")] * 2
  single = open_source(str(make_shards(3, name="single")))
  assert peek.first_captions(single, 9) == [("picture 0",), ("picture 1",), ("picture 2",)]


def test_captions_that_cannot_be_read_are_passed_over(make_shards):
  path = make_shards(3) / "00000.tar"
  path.write_bytes(path.read_bytes().replace(b"picture 1\0", b"\xff\xff\xff\xff\xff\xff\xff 1\0"))
  assert peek.first_captions(open_source(str(path)), 9) == [("picture 0",), ("picture 2",)]


def test_images_that_cannot_be_read_are_passed_over(make_shards):
  source = open_source(str(make_shards(5, bad=(0, 2))))
  found = peek.first_images(source, 2, side_px=12)
  assert found.shape == (2, 12, 12, 3) and found.dtype == np.float32
  for row, number in zip(found, (1, 3), strict=True):
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    np.testing.assert_allclose(row, pixels / 127.5 - 1, atol=1e-6)


def test_images_are_turned_as_their_json_says(make_shards):
  facts = {"exif": '{"Image Orientation": "Rotated 180"}'}
  turned = open_source(str(make_shards(1, json=facts)), facts=("exif",))
  straight = open_source(str(make_shards(1, name="straight")))
  np.testing.assert_array_equal(peek.first_images(turned, 1, 12)[:, ::-1, ::-1],
                                peek.first_images(straight, 1, 12))


def test_no_readable_image_is_told(make_shards):
  source = open_source(str(make_shards(2, bad=(0, 1))))
  with pytest.raises(UserError, match="not one image"):
    peek.first_images(source, 2, side_px=12)
