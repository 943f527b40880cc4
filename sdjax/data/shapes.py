"""The demo's captioned pictures: two coloured shapes on a white background, drawn from text.

A picture holds two things of different colours, and a caption names both and how they stand:
"a small red circle above a large blue square on a white background". The same picture has a second
true caption, with the things in the other order ("… blue square below … red circle …").

A seventh of the unordered pairs of things is held out by a hash of their names alone, so that no
phrasing and no arrangement of a held-out pair is ever trained on, whatever the seed.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdjax.errors import UserError

SIDE_PX = 32
MARGIN_PX = 1.0                       # from a thing's box to the edge of the picture
GAP_PX = 2.0                          # between the boxes of the two things, along the relation
SUBPIXELS = 4                         # per side: edges are antialiased by 16 samples a pixel
HELD_OUT_ONE_IN = 7

RADIUS_PX = {"small": (4.1, 4.5), "large": (6.2, 6.7)}
# No two nearer than 100 in RGB, and each with a channel near 0: ink is told from white by it.
COLOURS = {
    "red": (220, 30, 40),
    "orange": (255, 120, 0),
    "yellow": (255, 225, 30),
    "green": (20, 150, 60),
    "cyan": (0, 190, 230),
    "blue": (25, 60, 220),
    "purple": (150, 30, 190),
    "black": (20, 20, 20),
}
# Of diamond, star, cross and ring, the ring stays furthest from circle, square and triangle in
# squared pixel distance at 4 px, sharp or blurred, whatever the other's size and offset.
SHAPES = ("circle", "square", "triangle", "ring")
# (x, y) from the second thing to the first, y down.
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


@dataclass(frozen=True)
class Thing:
  """One object; each field is a key of the table of its name."""
  size: str
  colour: str
  shape: str

  def __str__(self) -> str:
    return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
  """`first` stands in `relation` to `second`; their colours differ."""
  first: Thing
  relation: str
  second: Thing


def caption(scene: Scene) -> str:
  """Returns the sentence of `scene`; `parse` reads it back."""
  return f"a {scene.first} {scene.relation} a {scene.second} on a white background"


def swapped(scene: Scene) -> Scene:
  """Returns the other phrasing of the same picture: A above B is B below A."""
  return Scene(scene.second, OPPOSITE[scene.relation], scene.first)


_THING = f"({'|'.join(RADIUS_PX)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(f"an? {_THING} ({'|'.join(RELATIONS)}) an? {_THING} on a white background")


def parse(text: str) -> Scene:
  """Returns the scene of a caption.

  Raises:
    UserError: the text is not a sentence that `caption` can write.
  """
  found = _CAPTION.fullmatch(text.strip().lower())
  if found is None:
    raise UserError(f"{text!r} is not a caption of shapes: write e.g. "
                    '"a small red circle above a large blue square on a white background"')
  *first, relation = found.groups()[:4]
  return Scene(Thing(*first), relation, Thing(*found.groups()[4:]))


def coverage(
    shape: str,
    radius: float,
    x: float,
    y: float,
    side: int = SIDE_PX,
    subpixels: int = SUBPIXELS,
) -> np.ndarray:                         # [side side] float32 in [0, 1]
  """Returns the share of each pixel that a shape covers.

  Args:
    shape: one of `SHAPES`.
    radius: half the side of the shape's square box, px.
    x, y: the middle of that box, px; 0 is the outer edge of the first pixel.
    side: of the picture, px.
    subpixels: samples per pixel and side.
  """
  grid = (np.arange(side * subpixels, dtype=np.float32) + 0.5) / subpixels
  u, v = (grid - x)[None, :] / radius, (grid - y)[:, None] / radius   # the box is [-1, 1]²
  if shape == "square":
    inside = (np.abs(u) <= 1) & (np.abs(v) <= 1)
  elif shape == "triangle":
    inside = (np.abs(u) <= (v + 1) / 2) & (v <= 1)
  else:
    square = u * u + v * v
    inside = square <= 1
    if shape == "ring":
      inside &= square >= 0.25
  samples = inside.reshape(side, subpixels, side, subpixels)
  return samples.sum(axis=(1, 3), dtype=np.uint16) / np.float32(subpixels**2)


def draw(
    scene: Scene,
    rng: np.random.Generator,
) -> np.ndarray:                         # uint8 [32 32 3]
  """Draws `scene`; `rng` chooses radii and positions.

  The boxes of the things are at least 2 px apart along the relation's axis and 1 px inside the
  picture; across that axis the middles differ by at most 0.4 of their distance along it.
  """
  radii = np.array([rng.uniform(*RADIUS_PX[thing.size]) for thing in (scene.first, scene.second)])
  room = SIDE_PX - 2 * MARGIN_PX
  distance = radii.sum() + GAP_PX
  distance = rng.uniform(distance, min(distance + 4, room - radii.sum()))
  offset = rng.uniform(-0.4, 0.4) * distance
  direction = np.array(RELATIONS[scene.relation], float)
  across = direction[::-1]
  middles = np.stack([direction * distance + across * offset, np.zeros(2)])   # [thing xy]
  low = (middles - radii[:, None]).min(0)
  high = (middles + radii[:, None]).max(0)
  middles += MARGIN_PX - low + rng.uniform(size=2) * (room - (high - low))

  picture = np.full((SIDE_PX, SIDE_PX, 3), 255, np.float32)
  for thing, radius, (x, y) in zip((scene.first, scene.second), radii, middles):
    ink = np.array(COLOURS[thing.colour], np.float32) - 255
    picture += coverage(thing.shape, radius, x, y)[..., None] * ink
  return (picture + 0.5).astype(np.uint8)


def is_held_out(scene: Scene) -> bool:
  """Tells whether the scene's pair of things is kept from training; blind to order and relation."""
  pair = " and ".join(sorted((str(scene.first), str(scene.second))))
  return hashlib.sha256(pair.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def scenes(count: int, seed: int, held_out: bool = False) -> Iterator[Scene]:
  """Yields `count` random scenes, all from the held-out pairs or all from the others.

  The same seed yields the same scenes, and a larger count continues a smaller one.
  """
  rng = np.random.default_rng([seed, held_out])
  tables = [tuple(table) for table in (RADIUS_PX, COLOURS, SHAPES)]
  relations = tuple(RELATIONS)
  while count > 0:
    first, second = (Thing(*(table[rng.integers(len(table))] for table in tables))
                     for _ in range(2))
    scene = Scene(first, relations[rng.integers(len(relations))], second)
    if first.colour != second.colour and is_held_out(scene) == held_out:
      yield scene
      count -= 1


def held_out_captions(count: int, seed: int) -> list[str]:
  """Returns `count` distinct captions of held-out pairs, in an order drawn from `seed`.

  Raises:
    UserError: there are fewer such captions than `count`.
  """
  things = [Thing(*names) for names in itertools.product(RADIUS_PX, COLOURS, SHAPES)]
  every = [caption(scene) for scene in itertools.starmap(
      Scene, itertools.product(things, RELATIONS, things))
      if scene.first.colour != scene.second.colour and is_held_out(scene)]
  if count > len(every):
    raise UserError(f"{count} held-out captions asked for, but there are {len(every)}: "
                    "ask for at most that many")
  order = np.random.default_rng(seed).permutation(len(every))
  return [every[i] for i in order[:count]]


def samples(count: int, seed: int, held_out: bool = False) -> Iterator[dict]:
  """Yields the data set as samples for shards, deterministic in `seed`.

  Returns:
    Per picture {"png": bytes, "txt": caption, "json": {"captions": [both phrasings]}}.
  """
  for index, scene in enumerate(scenes(count, seed, held_out)):
    png = io.BytesIO()
    picture = draw(scene, np.random.default_rng([seed, held_out, index]))
    Image.fromarray(picture).save(png, "PNG")
    phrasings = [caption(scene), caption(swapped(scene))]
    yield {"png": png.getvalue(), "txt": phrasings[0], "json": {"captions": phrasings}}
