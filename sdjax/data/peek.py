"""The first samples of a data set, in the order of its shards: to learn from before training."""

from collections.abc import Sequence

import numpy as np

from sdjax.data import captions, images
from sdjax.data.sources import Source
from sdjax.errors import UserError


def first_captions(source: Source, count: int, column: str | Sequence[str] = (),
                   ) -> list[tuple[str, ...]]:
  """Returns all captions of each of the first `count` samples; unreadable ones are passed over."""
  found = []
  for sample in range(min(source.count, count)):
    try:
      found.append(captions.choices(source.facts(sample), column))
    except ValueError:  # the pipeline counts it
      continue
  return found


def first_images(
    source: Source,
    count: int,
    side_px: int,
) -> np.ndarray:  # float32 [n side side 3] in [-1, 1], n <= count
  """Returns the middles of the first `count` images that can be read.

  Raises:
    UserError: none of them can.
  """
  found = []
  for sample in range(source.count):
    try:
      parts, facts = source.read(sample)
      pixels = images.decode(next(iter(parts.values())), (side_px, side_px),
                             orientation=images.orientation_of(facts.get("exif")))
    except images.BadPicture:
      continue
    found.append(np.empty(pixels.shape, np.float32))
    images.to_float(pixels, found[-1])
    if len(found) == count:
      break
  if not found:
    raise UserError("not one image of these shards can be read; look with `sdjax shards inspect`")
  return np.stack(found)
