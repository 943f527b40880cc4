"""Judges pictures of shapes by measuring them: what is there, and is it what the caption says?

The detector never sees the caption. It takes connected ink for a thing, the nearest colour of the
palette for its colour, and the best of a thousand or so drawn templates for its shape and size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sdjax.data import shapes
from sdjax.errors import UserError

INK = 0.5                             # of the darkest channel; less is background
MIN_AREA_PX = 12                      # smaller specks are noise: the smallest thing covers 33
MAX_WHITE = 0.2                       # in the ink of a thing, where blur has thinned it
WINDOW_PX = 21                        # holds the largest template at every offset
TEMPLATE_RADII_PX = np.arange(3.4, 7.8, 0.3)
TEMPLATE_OFFSETS_PX = np.arange(-0.5, 0.75, 0.25)
# Templates are a little soft, as the edges of decoded pictures are.
TEMPLATE_BLUR_PX = 0.4


@dataclass(frozen=True)
class Found:
  """A thing in a picture: names as in `shapes.Thing`, and its middle in px (y down)."""
  colour: str
  shape: str
  size: str
  x: float
  y: float


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, float]]]:
  """Returns the drawn coverages [n window²], their squared norms [n], and (shape, radius) of each.

  Each has its centre of mass, not the middle of its box, near the middle of the window.
  """
  drawn, names = [], []
  middle = WINDOW_PX / 2
  for shape in shapes.SHAPES:
    for radius in TEMPLATE_RADII_PX:
      # A triangle's centre of mass is a third of its radius below the middle of its box.
      sink = radius / 3 if shape == "triangle" else 0
      for x in TEMPLATE_OFFSETS_PX:
        for y in TEMPLATE_OFFSETS_PX:
          template = shapes.coverage(shape, radius, middle + x, middle + y - sink, WINDOW_PX)
          drawn.append(ndimage.gaussian_filter(template, TEMPLATE_BLUR_PX).ravel())
          names.append((shape, radius))
  stack = np.stack(drawn)
  return stack, np.square(stack).sum(1), names


def _name_colour(pixels: np.ndarray) -> str:                 # [n 3] in [0, 255]
  """Names the colour that, mixed with at most `MAX_WHITE`, comes nearest to the median pixel.

  The strokes of a small ring are two pixels wide: the least blur mixes white into all of them.
  """
  palette = np.array(list(shapes.COLOURS.values())) - 255.0
  ink = np.median(pixels, axis=0) - 255
  strength = np.clip(palette @ ink / np.square(palette).sum(1), 1 - MAX_WHITE, 1)
  nearest = np.square(strength[:, None] * palette - ink).sum(1).argmin()
  return tuple(shapes.COLOURS)[nearest]


def _find(picture: np.ndarray, ink: np.ndarray, mask: np.ndarray) -> Found:
  """Measures the one thing whose ink is where `mask` [H W] is set."""
  core = mask & (ink >= 0.9 * np.quantile(ink[mask], 0.8))
  colour = _name_colour(picture[core])
  # How far each pixel has gone from white to that colour; soft edges lie just outside the mask.
  from_white = np.array(shapes.COLOURS[colour], np.float32) - 255
  cover = np.clip((picture - 255) @ from_white / (from_white @ from_white), 0, 1)
  cover = np.where(ndimage.binary_dilation(mask, iterations=2), cover, 0)

  rows, columns = np.indices(mask.shape)
  y, x = ((axis * cover).sum() / cover.sum() for axis in (rows, columns))
  half = WINDOW_PX // 2
  top, left = int(round(y)), int(round(x))
  window = np.pad(cover, half)[top:top + WINDOW_PX, left:left + WINDOW_PX]

  stack, norms, names = _templates()
  # Not `@`: threads of a BLAS cost more than they give here, and much more on a busy machine.
  matches = np.einsum("nw,w->n", stack, window.ravel())
  shape, radius = names[int((norms - 2 * matches).argmin())]
  border = (shapes.RADIUS_PX["small"][1] + shapes.RADIUS_PX["large"][0]) / 2
  size = "small" if radius < border else "large"
  return Found(colour, shape, size, float(x) + 0.5, float(y) + 0.5)


def detect(
    picture: np.ndarray,                 # uint8 [H W 3], drawn at the size of `shapes.draw`
) -> list[Found]:
  """Returns the things in a picture, from top to bottom; knows nothing of any caption."""
  picture = picture.astype(np.float32)
  ink = (255 - picture).max(-1) / 255
  labels, count = ndimage.label(ink >= INK)
  found = []
  for label in range(1, count + 1):
    mask = labels == label
    if mask.sum() >= MIN_AREA_PX:
      found.append(_find(picture, ink, mask))
  return sorted(found, key=lambda thing: thing.y)


def _stand(first: Found, second: Found) -> str:
  """Names how `first` stands to `second`: the sign along the axis where they differ most."""
  x, y = first.x - second.x, first.y - second.y
  if abs(x) > abs(y):
    return "left of" if x < 0 else "right of"
  return "above" if y < 0 else "below"


def judge(picture: np.ndarray, caption: str) -> dict[str, bool]:
  """Tells what of `caption` is right in `picture` (uint8 [32 32 3]).

  Everything is wrong unless there are exactly two things. They are assigned to the two named ones
  so that most colours agree, then most shapes and sizes.

  Returns:
    "colour", "size", "shape": both things have it as said; "relation": they stand as said along
    the dominant axis; "all": all four.

  Raises:
    UserError: the caption is not one of shapes.
  """
  scene = shapes.parse(caption)
  named = (scene.first, scene.second)
  found = detect(picture)
  if len(found) != 2:
    return dict.fromkeys(("colour", "size", "shape", "relation", "all"), False)

  def agreement(pair):
    def count(attribute):
      return sum(getattr(a, attribute) == getattr(b, attribute) for a, b in zip(pair, named))
    return count("colour"), count("shape") + count("size")

  pair = max((found, found[::-1]), key=agreement)
  right = {
      attribute: all(getattr(a, attribute) == getattr(b, attribute) for a, b in zip(pair, named))
      for attribute in ("colour", "size", "shape")
  }
  right["relation"] = _stand(*pair) == scene.relation
  return right | {"all": all(right.values())}


def score(
    pictures: np.ndarray,                # uint8 [n 32 32 3]
    captions: Sequence[str],             # n of them
) -> dict[str, float]:
  """Returns the fractions of pictures that are right by each measure of `judge`.

  Raises:
    UserError: there are no pictures, or not one caption each, or a caption is not one of shapes.
  """
  if len(pictures) != len(captions) or not len(pictures):
    raise UserError(f"{len(pictures)} pictures with {len(captions)} captions cannot be scored: "
                    "give one caption for each picture, and at least one")
  verdicts = [judge(picture, caption) for picture, caption in zip(pictures, captions)]
  return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}
