"""A latents cache holds what the autoencoder says of each picture, and tells which it could not."""

import io

import numpy as np
import pytest

from sdjax import encode
from sdjax.data import images, pack, shapes, shards
from sdjax.errors import UserError


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  """35 pictures, more than one batch; the fourth is cut off."""
  def samples():
    for number, sample in enumerate(shapes.samples(35, seed=0)):
      yield sample | {"png": sample["png"][:60]} if number == 3 else sample

  out = tmp_path_factory.mktemp("data") / "shards"
  pack.write_shards(samples(), out, shard_size=20)
  return shards.build_index(out)


def test_cache_holds_moments_and_captions(tiny_model, index, tmp_path):
  sd, params = tiny_model
  cached = list(encode.samples(sd, params, index, side_px=16))
  assert len(cached) == 35
  assert isinstance(cached[3], pack.Failure) and cached[3].name == index.name(3)
  for number in (0, 34):
    parts = index.read(number, ("png", "txt"))
    pixels = np.empty((16, 16, 3), np.float32)
    images.to_float(images.decode(parts["png"], (16, 16)), pixels)
    moments = np.load(io.BytesIO(cached[number]["moments.npy"]))
    assert moments.dtype == np.float16 and moments.shape == (4, 4, 8)
    np.testing.assert_allclose(moments, sd.moments(params, pixels[None])[0], atol=2e-3, rtol=2e-3)
    assert cached[number]["txt"] == parts["txt"].decode()
    assert cached[number]["json"]["captions"][0] == cached[number]["txt"]

  pack.write_shards(iter(cached), tmp_path / "latents", shard_size=20)
  again = shards.build_index(tmp_path / "latents")
  assert again.kind == "moments" and again.count == 34


def test_a_side_that_cannot_be_halved_is_refused(tiny_model, index):
  with pytest.raises(UserError, match="18"):
    next(encode.samples(*tiny_model, index, side_px=18))
