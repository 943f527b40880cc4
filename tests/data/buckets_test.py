import collections
import concurrent.futures

import numpy as np
import pytest

from sdjax.data import buckets
from sdjax.data.plan import Plan
from sdjax.errors import UserError


def sizes_like_laion(count):                           # int32 [count 2]
  """Heights and widths: mostly the ratios of screens and cameras, a few of anything to 4:1."""
  rng = np.random.default_rng(0)
  kind = rng.choice(6, count, p=[0.2, 0.35, 0.15, 0.1, 0.15, 0.05])
  portrait = np.where(rng.random(count) < 0.5, 3 / 4, 2 / 3)
  anything = np.exp(rng.uniform(-np.log(4), np.log(4), count))
  ratio = np.choose(kind, [1.0, 4 / 3, 3 / 2, 16 / 9, portrait, anything])
  height = rng.integers(300, 1500, count)
  return np.stack([height, np.rint(height * ratio)], axis=1).astype(np.int32)


SIZES = sizes_like_laion(60_000)


def bucketed(count, batch_size, resolution_px=512, seed=0):
  order = Plan((count,), (1,), batch_size, seed)
  return buckets.BucketPlan(order, lambda _, samples: SIZES[samples],
                            buckets.shapes(resolution_px))


def cut_away(shape, sizes):
  """Share of each picture's area that is lost when it is scaled to cover the shape."""
  scale = np.max(shape / sizes, axis=1)
  return 1 - np.prod(shape) / np.prod(sizes * scale[:, None], axis=1)


@pytest.mark.parametrize("resolution_px", [512, 1024])
@pytest.mark.parametrize("batch_size", [8, 64, 256])
def test_little_is_cropped(resolution_px, batch_size):
  order = bucketed(len(SIZES), batch_size, resolution_px)
  known = set(buckets.shapes(resolution_px))
  lost = []
  for step in range(min(256, len(SIZES) // batch_size)):
    shape, drawn = order.batch(step)
    assert shape in known and len(drawn.sample) == batch_size
    lost.append(cut_away(shape, SIZES[drawn.sample]).mean())
  square = cut_away((resolution_px, resolution_px), SIZES).mean()
  assert np.mean(lost) < {512: 0.062, 1024: 0.037}[resolution_px] < square / 3


def test_a_batch_takes_the_bucket_that_loses_least():
  order = bucketed(4096, 64)
  for step in range(0, 64, 5):
    shape, drawn = order.batch(step)
    lost = {each: cut_away(each, SIZES[drawn.sample]).mean() for each in buckets.shapes(512)}
    assert lost[shape] == pytest.approx(min(lost.values()))


def test_the_sdxl_list_at_1024():
  # Widths and heights of SD_XL_BASE_RATIOS 0.5 … 2 in Stability's generative-models.
  wide = [(1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768),
          (1344, 768), (1344, 704), (1408, 704)]
  assert buckets.shapes(1024) == [*reversed(wide), (1024, 1024), *((h, w) for w, h in wide)]
  assert len(buckets.shapes(1024, max_aspect=4.0)) == 41     # appendix I has 40, without 704 × 1344
  assert buckets.shapes(512) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
  assert buckets.shapes(64) == [(64, 64)]


@pytest.mark.parametrize("resolution_px, options, told", [
    (500, {}, "500 px is not a multiple of 64.*512"), (0, {}, "0 px.*64"),
    (512, {"max_aspect": 0.5}, "max_aspect 0.5")])
def test_resolutions_without_buckets_are_refused(resolution_px, options, told):
  with pytest.raises(UserError, match=told):
    buckets.shapes(resolution_px, **options)


@pytest.mark.parametrize("count, batch_size", [(1000, 24), (1000, 8), (50, 64), (20, 4), (2048, 8)])
def test_every_epoch_is_read_once_before_the_next_begins(count, batch_size):
  order = bucketed(count, batch_size)
  steps = -(-3 * count // batch_size)
  drawn = [order.batch(step)[1] for step in range(steps)]
  plain = Plan((count,), (1,), batch_size, 0).at(np.arange(3 * count))
  # The rows of the plan, each with its position, only in other steps.
  position, sample = (np.concatenate([getattr(rows, name) for rows in drawn])
                      for name in ("position", "sample"))
  sample = sample[np.argsort(position)][:3 * count]
  np.testing.assert_array_equal(np.sort(position)[:3 * count], np.arange(3 * count))
  np.testing.assert_array_equal(sample, plain.sample)
  epochs = np.stack([[(r.position // count).min(), (r.position // count).max()] for r in drawn])
  assert (epochs[1:, 0] >= epochs[:-1, 1]).all()       # nothing of an epoch comes after the next's


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_agree_without_asking_each_other(processes):
  whole = bucketed(5000, 24, seed=3)
  hosts = [bucketed(5000, 24, seed=3) for _ in range(processes)]
  rows = [slice(i * 24 // processes, (i + 1) * 24 // processes) for i in range(processes)]
  for step in (0, 63, 64, 207, 208, 209, 10**7):
    shape, drawn = whole.batch(step)
    parts = [host.batch(step, part) for host, part in zip(hosts, rows, strict=True)]
    assert {shape} == {part_shape for part_shape, _ in parts}
    for column, *columns in zip(drawn, *(part for _, part in parts), strict=True):
      np.testing.assert_array_equal(np.concatenate(columns), column)


def test_shapes_come_in_no_order():
  ratios = np.array([np.log(w / h) for (h, w), _ in map(bucketed(60_000, 64).batch, range(512))])
  # Were batches read as they are sorted, neighbours in time would be correlated almost fully.
  assert abs(np.corrcoef(ratios[1:], ratios[:-1])[0, 1]) < 0.2


def test_windows_are_cut_evenly_and_sorted_once():
  asked = []

  def sizes_of(source, samples):
    asked.append((source, len(samples)))
    return SIZES[samples]

  order = buckets.BucketPlan(Plan((1300, 650), (2, 1), 30, 0), sizes_of, buckets.shapes(512))
  for step in range(65):                               # an epoch of both; two windows of it
    order.batch(step)
  assert asked == [(0, 660), (1, 330), (0, 640), (1, 320)]


def test_threads_see_the_same_batches():
  order, alone = bucketed(60_000, 16), bucketed(60_000, 16)
  steps = np.random.default_rng(0).integers(0, 200, 60).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(order.batch, steps))
  for step, (shape, drawn) in zip(steps, found, strict=True):
    wanted_shape, wanted = alone.batch(step)
    assert shape == wanted_shape
    np.testing.assert_array_equal(drawn.sample, wanted.sample)


def test_pictures_of_unknown_size_count_as_square():
  sizes = np.array([[0, 0], [0, 700], [500, 1000], [1000, 500]])
  order = buckets.BucketPlan(Plan((4000,), (1,), 8, 0), lambda _, samples: sizes[samples % 4],
                             [(704, 352), (512, 512), (352, 704)])
  found = collections.Counter()
  for step in range(500):
    shape, drawn = order.batch(step)
    found.update((shape, kind) for kind in (drawn.sample % 4).tolist())
  right = [found[shape, kind] for kind, shape in enumerate(
      [(512, 512), (512, 512), (352, 704), (704, 352)])]
  assert min(right) > 950                              # but for the batches at the edges


def test_rows_keep_near_the_stretches_of_their_process():
  order = bucketed(60_000, 64)
  rows = np.stack([order.batch(step)[1].position % 64 for step in range(128)])
  assert (np.diff(rows, axis=1) >= 0).all()
  assert np.abs(rows - np.arange(64)).mean() < 6       # a random row would be 21 away
