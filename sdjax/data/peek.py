"""The first samples of a data set, in the order of its shards: to learn from before training."""

import numpy as np

from sdjax.data import captions, images
from sdjax.data.shards import PICTURES, Index
from sdjax.errors import UserError


def first_captions(index: Index, count: int) -> list[tuple[str, ...]]:
  """Returns all captions of each of the first `count` samples; unreadable ones are passed over."""
  found = []
  for sample in range(min(index.count, count)):
    parts = index.read(sample, captions.PARTS)
    try:
      found.append(captions.captions_of(parts))
    except ValueError:  # the pipeline counts it
      continue
  return found


def first_images(
    index: Index,
    count: int,
    side_px: int,
) -> np.ndarray:  # float32 [n side side 3] in [-1, 1], n <= count
  """Returns the middles of the first `count` images that can be read.

  Raises:
    UserError: none of them can.
  """
  found = []
  for sample in range(index.count):
    blob = next(iter(index.read(sample, PICTURES).values()))
    try:
      pixels = images.decode(blob, (side_px, side_px))
    except images.BadPicture:
      continue
    found.append(np.empty(pixels.shape, np.float32))
    images.to_float(pixels, found[-1])
    if len(found) == count:
      break
  if not found:
    raise UserError("not one image of these shards can be read; look with `sdjax shards inspect`")
  return np.stack(found)
