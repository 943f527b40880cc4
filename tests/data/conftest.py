"""Small data sets that several tests of this folder read."""

import io

import numpy as np
import pytest
from PIL import Image

from sdjax.data import pack, sources


def _picture(number: int, side: int | tuple[int, int] = 12, form: str = "PNG") -> bytes:
  """A picture whose pixels tell its number; side in px, or (height, width)."""
  size = (side, side) if isinstance(side, int) else side
  pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, form)
  return buffer.getvalue()


def _write(folder, n=50, bad=(), shard_size=20, side=12, first=0, **extra):
  def samples():
    for i in range(first, first + n):
      blob = _picture(i, side(i) if callable(side) else side)
      yield {"png": blob[:60] if i in bad else blob, "txt": f"picture {i}", **extra}
  pack.write_shards(samples(), folder, shard_size)
  return folder


@pytest.fixture(scope="session")
def picture():
  """The function (number, side, format) → bytes that draws the pictures."""
  return _picture


@pytest.fixture
def make_shards(tmp_path):
  """Returns a function that writes n samples, of which `bad` are damaged, and gives the folder.

  `side` is that of all pictures, or a function of their number, which `first` begins.
  """
  def make(n=50, name="shards", **options):
    return _write(tmp_path / name, n, **options)
  return make


@pytest.fixture(scope="session")
def fifty(tmp_path_factory):
  """A source of 50 good samples in 3 shards, for tests that leave it as it is."""
  return sources.open_source(str(_write(tmp_path_factory.mktemp("fifty") / "shards")))
