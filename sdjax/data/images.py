"""Bytes of a picture → pixels of a fixed size.

What the web serves is turned into plain RGB: rotated as its EXIF tag says, CMYK, grey and palette
converted, 16 bits reduced to 8, transparency laid on white, the first frame of an animation.
"""

import dataclasses
import io
import struct
import zlib

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000
EXIF_ORIENTATION = 0x0112
# EXIF 2.32, section 4.6.4 A: how the stored picture has to be turned to stand upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on damaged input, by decoder; anything else is a bug and shall be seen.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
          struct.error, zlib.error)


class BadPicture(ValueError):
  """A picture that cannot be used; `args[0]` is a short reason that counts can be kept by."""


@dataclasses.dataclass(frozen=True)
class Header:
  """What a picture says of itself before it is decoded; sizes in px, before EXIF rotation."""
  width: int
  height: int
  format: str
  mode: str
  orientation: int  # EXIF's; 1 is upright


def read_header(blob: bytes) -> Header:
  """Raises BadPicture when the bytes are no picture."""
  picture = _open(blob)
  return Header(*picture.size, picture.format, picture.mode, _orientation(picture))


def decode(
    blob: bytes,
    size: tuple[int, int],                      # (H, W) px
    crop: tuple[float, float] = (0.5, 0.5),     # (y, x) in [0, 1]: 0 is top, left
) -> np.ndarray:                                # uint8 [H W 3]
  """The largest part of a picture that has the shape of `size`, resized to it (bicubic).

  JPEGs are decoded at the smallest of libjpeg's scales (1/8 … 1) that is not below `size`, which
  saves most of the work on large ones. A picture that already has the size is not resampled.

  Args:
    blob: a file in any format that Pillow reads.
    size: of the result.
    crop: where the part lies along the side that is too long; 0.5 is the middle.

  Raises:
    BadPicture: "not a picture", "corrupt picture", or "too many pixels" (over `MAX_PIXELS`, told by
      the header before anything is decoded).
  """
  height, width = size
  picture = _open(blob)
  try:
    # EXIF may turn a picture on its side, so the smaller scale must suffice for both ways round.
    picture.draft(None, (max(size), max(size)))
    picture = _upright(picture)
    scale = min(picture.width / width, picture.height / height)
    left = crop[1] * (picture.width - scale * width)
    top = crop[0] * (picture.height - scale * height)
    # Rounding must not push the box over the edge by 1e-13.
    box = (left, top, min(left + scale * width, picture.width),
           min(top + scale * height, picture.height))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
  except DAMAGE as error:
    raise BadPicture("corrupt picture") from error


def decode_whole(blob: bytes) -> Image.Image:
  """All of a picture at its own size, upright, RGB. Raises BadPicture as `decode` does."""
  picture = _open(blob)
  try:
    return _upright(picture)
  except DAMAGE as error:
    raise BadPicture("corrupt picture") from error


def _upright(picture: Image.Image) -> Image.Image:
  """Plain 8-bit RGB of any Pillow picture, turned as its EXIF tag says, transparency on white."""
  picture.load()  # first: else damage met while looking for EXIF would be taken for broken EXIF
  turn = TURNS.get(_orientation(picture))
  picture = _flatten(picture)
  return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
  if picture.format == "PNG" and "exif" not in picture.info:
    return 1  # Pillow would decode the whole picture to look behind the pixels
  try:
    return picture.getexif().get(EXIF_ORIENTATION, 1)
  except DAMAGE:  # a broken tag does not make the pixels bad
    return 1


def _flatten(picture: Image.Image) -> Image.Image:
  if picture.mode == "RGB" and "transparency" not in picture.info:
    return picture
  if picture.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
    grey = np.asarray(picture).astype(np.float32) / 257.0
    return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
  return picture.convert("RGB")


def to_float(
    pixels: np.ndarray,        # uint8 [H W 3]
    out: np.ndarray,           # float32 [H W 3], written
    flip: bool = False,
) -> None:
  """0 … 255 → -1 … 1, optionally mirrored left to right."""
  np.multiply(pixels[:, ::-1] if flip else pixels, np.float32(2 / 255), out=out)
  np.subtract(out, np.float32(1), out=out)


def _open(blob: bytes) -> Image.Image:
  try:
    picture = Image.open(io.BytesIO(blob))
  except Image.DecompressionBombError as error:
    raise BadPicture("too many pixels") from error
  except DAMAGE as error:
    raise BadPicture("not a picture") from error
  if picture.width * picture.height > MAX_PIXELS:
    raise BadPicture("too many pixels")
  return picture
