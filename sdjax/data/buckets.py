"""Batches of like-shaped pictures: aspect-ratio buckets, the same on every host at every step.

A compiled step takes one shape, so all pictures of a batch are scaled and cropped to the same
bucket. The plan's rows of a window of steps are sorted by aspect ratio a = W / H and cut into as
many batches, which come in a keyed order. Each batch takes the bucket s that loses least:

  (1)  the share of a picture cut away when it is scaled to cover s:  1 − min(a / a_s, a_s / a)
  (2)  s(batch) = argmin_s Σ over the batch of (1)

The rows are only reordered within their window, so nothing is dropped, nothing depends on the
number of hosts, and nobody needs to ask another. Windows lie within an epoch (of the source that
takes longest). The rows of a batch come in the order of their rows in the plan, so that a process
keeps near the stretches of the data set that the plan gave it.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from sdjax.data import plan
from sdjax.errors import UserError

Shape = tuple[int, int]  # (H, W) px
LEAST_AREA = 0.9         # of resolution²; at 1024 px it gives the list of SDXL
MULTIPLE = 64            # px; of sides
WINDOW_STEPS = 64        # that are sorted together. More crop less, and cost more at once.


def shapes(resolution_px: int, max_aspect: float = 2.0) -> list[Shape]:
  """The buckets of a resolution, from tall to wide.

  Sides are multiples of 64 px, areas 0.9 … 1 of resolution², aspect ratios at most
  `max_aspect` either way. For 1024 px these are the ratios 0.5 … 2 of SDXL (Podell et al. 2023,
  https://arxiv.org/abs/2307.01952, appendix I, and `SD_XL_BASE_RATIOS` of its authors' code).

  Raises:
    UserError: `resolution_px` is no multiple of 64, or `max_aspect` is below 1.
  """
  if resolution_px < 1 or resolution_px % MULTIPLE:
    raise UserError(f"resolution {resolution_px} px is not a multiple of {MULTIPLE}; buckets need "
                    f"one, such as {max(1, round(resolution_px / MULTIPLE)) * MULTIPLE}")
  if not max_aspect >= 1:
    raise UserError(f"max_aspect {max_aspect} is below 1; 2 keeps ratios from 1:2 to 2:1")
  area = resolution_px**2
  longest = math.floor(resolution_px * math.sqrt(max_aspect))
  sides = range(MULTIPLE, longest + 1, MULTIPLE)
  found = [(height, width) for height in sides for width in sides
           if LEAST_AREA * area <= height * width <= area
           and max(height, width) <= max_aspect * min(height, width)]
  return sorted(found, key=lambda shape: shape[1] / shape[0])


def log_ratios(sizes: Sequence[Shape] | np.ndarray) -> np.ndarray:  # float64 [n]
  """log(W / H) of sizes (H, W). Where a side is 0, not known, that of a square: 0."""
  sizes = np.asarray(sizes)
  known = (sizes > 0).all(axis=1)
  height, width = np.where(known[:, None], sizes, 1).T
  return np.log(width / height)


class BucketPlan:
  """A plan whose batches each have one shape."""

  def __init__(self, base: plan.Plan, sizes_of: Callable[[int, np.ndarray], np.ndarray],
               shapes: Sequence[Shape]):
    """Reads nothing yet.

    Args:
      base: which samples are read in which window of steps.
      sizes_of: (source, samples int64 [n]) → int [n 2], height and width of the upright pictures;
        0 where unknown, which counts as square.
      shapes: the buckets.
    """
    self._plan = base
    self._sizes_of = sizes_of
    self._shapes = tuple(shapes)
    # Two, because threads that prepare batches ahead may stand on either side of a boundary.
    self._sorted = functools.lru_cache(maxsize=2)(self._sort)

  def batch(self, step: int, rows: slice = slice(None)) -> tuple[Shape, plan.Drawn]:
    """The shape of a step's batch and what its rows read, or some of them.

    `position` is the number of the row in the plan: draws stay with the sample. May be called from
    several threads.
    """
    first, end = self._window(step)
    drawn, bucket = self._sorted(first, end)
    return (self._shapes[bucket[step - first]],
            plan.Drawn(*(column[step - first][rows] for column in drawn)))

  def _window(self, step: int) -> tuple[int, int]:
    """First and one past the last step that are sorted together with this one.

    The whole steps of an epoch are cut into windows of nearly equal length. A step with rows of two
    epochs is a window of its own, lest a sample were read twice before another was read once.
    """
    steps = self._plan.steps_per_epoch
    epoch = step // steps
    first, end = math.ceil(epoch * steps), math.floor((epoch + 1) * steps)
    if step >= end:
      return step, step + 1
    windows = -(-(end - first) // WINDOW_STEPS)
    number = (step - first) * windows // (end - first)
    return tuple(first - (-i * (end - first) // windows) for i in (number, number + 1))

  def _sort(self, first: int, end: int) -> tuple[plan.Drawn, np.ndarray]:
    """What a window's batches read, [steps B] each, and their buckets [steps]."""
    size = self._plan.batch_size
    drawn = self._plan.at(np.arange(first * size, end * size))
    ratio = log_ratios(self._sizes(drawn))
    batches = np.argsort(ratio, kind="stable").reshape(-1, size)
    kept = [np.exp(-np.abs(ratio[batches] - bucket)).sum(1) for bucket in log_ratios(self._shapes)]
    order = np.argsort(plan.keys(self._plan.seed, plan.BUCKETS, np.arange(first, end)))
    rows = np.argsort(batches % size, axis=1, kind="stable")
    batches = np.take_along_axis(batches, rows, axis=1)[order]
    return (plan.Drawn(*(column[batches] for column in drawn)),
            np.argmax(kept, axis=0)[order])

  def _sizes(self, drawn: plan.Drawn) -> np.ndarray:
    """int64 [n 2]: height and width, 0 where unknown."""
    sizes = np.zeros((len(drawn.sample), 2), np.int64)
    for source in np.unique(drawn.source):
      here = drawn.source == source
      sizes[here] = self._sizes_of(int(source), drawn.sample[here])
    return sizes
