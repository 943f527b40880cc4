"""Small data sets that several tests of this folder read."""

import io

import numpy as np
import pytest
from PIL import Image

from sdjax.data import pack, shards


def _picture(number: int, side: int = 12, form: str = "PNG") -> bytes:
  """A picture whose pixels tell its number."""
  pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, form)
  return buffer.getvalue()


@pytest.fixture(scope="session")
def picture():
  """The function (number, side, format) → bytes that draws the pictures."""
  return _picture


@pytest.fixture
def make_shards(tmp_path):
  """Returns a function that writes n samples, of which `bad` are damaged, and gives the folder."""
  def make(n=50, bad=(), shard_size=20, name="shards", **extra):
    def samples():
      for i in range(n):
        blob = _picture(i)
        yield {"png": blob[:60] if i in bad else blob, "txt": f"picture {i}", **extra}
    pack.write_shards(samples(), tmp_path / name, shard_size)
    return tmp_path / name
  return make


@pytest.fixture
def fifty(make_shards):
  """An index of 50 good samples in 3 shards."""
  return shards.build_index(make_shards())
