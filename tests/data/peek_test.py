import numpy as np
import pytest

from sdjax.data import peek, shards
from sdjax.errors import UserError


def test_captions_come_sample_by_sample(make_shards):
  several = make_shards(3, json={"captions": ["one", "two"]})
  assert peek.first_captions(shards.build_index(several), 2) == [("one", "two")] * 2
  single = make_shards(3, name="single")
  assert peek.first_captions(shards.build_index(single), 9) == [
      ("picture 0",), ("picture 1",), ("picture 2",)]


def test_images_that_cannot_be_read_are_passed_over(make_shards):
  index = shards.build_index(make_shards(5, bad=(0, 2)))
  found = peek.first_images(index, 2, side_px=12)
  assert found.shape == (2, 12, 12, 3) and found.dtype == np.float32
  whole = peek.first_images(shards.build_index(make_shards(5, name="whole")), 4, side_px=12)
  np.testing.assert_array_equal(found, whole[[1, 3]])


def test_no_readable_image_is_told(make_shards):
  index = shards.build_index(make_shards(2, bad=(0, 1)))
  with pytest.raises(UserError, match="not one image"):
    peek.first_images(index, 2, side_px=12)
