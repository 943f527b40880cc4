"""Tiled passes of the autoencoder against whole ones."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.errors import UserError
from sdjax.models import tiling
from sdjax.models.vae import AutoencoderKL

F = 4


def repeat_and_average(variables, x, method):
  """Stands in for an autoencoder that knows no neighbours: tiles change nothing."""
  del variables
  if method == "decode":
    return x.repeat(F, axis=1).repeat(F, axis=2)
  b, h, w, c = x.shape
  return x.reshape(b, h // F, F, w // F, F, c).mean(axis=(2, 4))


LOCAL = types.SimpleNamespace(downsampling=F, apply=repeat_and_average)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("side, size, overlap", [
    (8, 8, 2), (9, 8, 2), (15, 8, 2), (14, 8, 2), (31, 8, 7), (100, 64, 16), (200, 64, 1)])
def test_tiles_cover_the_side_and_weights_sum_to_one(side, size, overlap):
  begin = tiling.starts(side, size, overlap)
  assert begin[0] == 0 and begin[-1] == side - size
  assert (np.diff(begin) <= size - overlap).all()
  assert len(begin) == 1 or size + (len(begin) - 2) * (size - overlap) < side  # no tile too many
  weights = tiling.weights(begin, size)
  total = np.zeros(side)
  for start, weight in zip(begin, weights):
    total[start:start + size] += weight
  np.testing.assert_allclose(total, 1, atol=1e-12)
  assert (weights >= 0).all()
  assert weights[0, 0] == weights[-1, -1] == 1         # no ramp at the border of the picture


def test_ramps_are_linear_over_the_overlap():
  weights = tiling.weights(np.array([0, 4]), 8)
  np.testing.assert_allclose(weights[0], [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125])
  np.testing.assert_allclose(weights[1], weights[0][::-1])


@pytest.mark.parametrize("h, w", [(19, 8), (5, 17), (13, 22)])
def test_a_local_autoencoder_does_not_notice(h, w):
  latents = noise(2, h, w, 3)
  np.testing.assert_allclose(
      tiling.decode(LOCAL, {}, latents, tile=8, overlap=3),
      repeat_and_average({}, latents, "decode"), atol=1e-6)
  image = noise(2, h * F, w * F, 3)
  np.testing.assert_allclose(
      tiling.encode(LOCAL, {}, image, tile=8 * F, overlap=3 * F),
      repeat_and_average({}, image, "encode"), atol=1e-6)


def test_tiles_are_blended_in_two_dimensions():
  """A stub whose result is its tile's mean: the closed form is the outer product of weights."""
  mean = types.SimpleNamespace(downsampling=1, apply=lambda variables, x, method: jnp.broadcast_to(
      x.mean(axis=(1, 2), keepdims=True), x.shape))
  latents = noise(1, 20, 13, 1)
  expected = np.zeros((20, 13))
  rows, columns = tiling.starts(20, 8, 2), tiling.starts(13, 8, 2)
  tiles = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
  for i, j in reversed(tiles):                         # the other way: order does not matter
    window = np.s_[rows[i]:rows[i] + 8, columns[j]:columns[j] + 8]
    weight = np.outer(tiling.weights(rows, 8)[i], tiling.weights(columns, 8)[j])
    expected[window] += weight * latents[0, :, :, 0][window].mean()
  found = tiling.decode(mean, {}, latents, tile=8, overlap=2)
  np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-6)


@pytest.fixture(scope="module")
def tiny():
  """An autoencoder all of whose parameters are random, and functions of latents and images."""
  vae = AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_groups=4)
  shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    scale = np.prod(leaf.shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.1
    one = 1.0 if path.endswith("scale") else 0.0
    return one + scale * rng.standard_normal(leaf.shape).astype(np.float32)
  return vae, pytrees.map_paths(draw, shapes)


@pytest.mark.parametrize("method, function, channels", [
    ("decode", tiling.decode, 4), ("encode", tiling.encode, 3)])
def test_a_picture_of_one_tile_is_done_whole(tiny, method, function, channels):
  vae, params = tiny
  x = np.zeros((1, 6, 8, channels), np.float32)
  tiled = jax.make_jaxpr(lambda x: function(vae, params, x, 8, 2))(x)
  whole = jax.make_jaxpr(lambda x: vae.apply({"params": params}, x, method=method))(x)
  assert str(tiled) == str(whole)


def test_a_real_autoencoder_comes_close(tiny):
  vae, params = tiny
  latents = noise(1, 48, 24, 4)
  whole = jax.jit(lambda x: vae.apply({"params": params}, x, method="decode"))(latents)
  tiled = jax.jit(lambda x: tiling.decode(vae, params, x, tile=24, overlap=12))(latents)
  assert tiled.shape == whole.shape
  # Found: 0.09. Norms and attention see one tile; of noise each differs from the whole.
  assert jnp.sqrt(jnp.square(tiled - whole).mean()) < 0.12 * whole.std()


def test_memory_is_that_of_one_tile(tiny):
  vae, params = tiny

  def temporary_bytes(side):
    x = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
    decode = jax.jit(lambda x: tiling.decode(vae, params, x, tile=16, overlap=4))
    return decode.lower(x).compile().memory_analysis().temp_size_in_bytes

  image_bytes = 4 * 3 * (2 * 64)**2                    # the result may be held twice, no more
  assert temporary_bytes(64) <= temporary_bytes(32) + image_bytes


@pytest.mark.parametrize("tile, overlap", [(8, 8), (8, 0), (0, 0), (8, -1)])
def test_an_overlap_that_cannot_be_is_told(tile, overlap):
  with pytest.raises(UserError, match=f"overlap is {overlap} and tile {tile}"):
    tiling.decode(LOCAL, {}, noise(1, 20, 20, 3), tile, overlap)


def test_lengths_between_latents_are_told():
  image = noise(1, 20 * F + 1, 20 * F, 3)
  with pytest.raises(UserError, match="height.* 81 px"):
    tiling.encode(LOCAL, {}, image, 8 * F, 2 * F)
  with pytest.raises(UserError, match="overlap is 7 px"):
    tiling.encode(LOCAL, {}, image, 8 * F, 7)
