"""Bytes of a picture → pixels of a fixed size.

What the web serves is turned into plain RGB: rotated as its EXIF tag says, CMYK, grey and palette
converted, 16 bits reduced to 8, transparency laid on white, the first frame of an animation.

Three decoders differ by a few grey levels, so a run keeps to one, and its checkpoint names it:

  pillow  JPEGs at the smallest of libjpeg's scales 1/8, 1/4, 1/2, 1 that is not below the size
          asked for, then bicubic
  fast    simplejpeg, which knows 3/8 as well, then OpenCV: the mean over areas where pictures
          shrink, bicubic where they grow. What simplejpeg cannot read goes to Pillow.
  exact   every pixel decoded, then bicubic with antialiasing: what evaluations compare with
"""

import dataclasses
import functools
import io
import json
import struct
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sdjax.errors import UserError

MAX_PIXELS = 100_000_000
EXIF_ORIENTATION = 0x0112
# EXIF 2.32, section 4.6.4 A, orientations 1 … 4: the steps along y and x by which the stored
# picture has to be walked to stand upright. 5 … 8 are the same after rows and columns are swapped.
STEPS = ((1, 1), (1, -1), (-1, -1), (-1, 1))
# How exifread, and so img2dataset, spells the orientations 1 … 8.
EXIFREAD = (
    "Horizontal (normal)", "Mirrored horizontal", "Rotated 180", "Mirrored vertical",
    "Mirrored horizontal then rotated 90 CCW", "Rotated 90 CW",
    "Mirrored horizontal then rotated 90 CW", "Rotated 90 CCW")
# What Pillow raises on damaged input, by decoder; anything else is a bug and shall be seen.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
          struct.error, zlib.error)
# Of a JPEG: how a segment begins; markers of the one that holds EXIF or XMP, and of the pixels.
SEGMENT = struct.Struct(">HH")
APP1, START_OF_SCAN = 0xFFE1, 0xFFDA


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is what counts


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


def read_header(blob: bytes, otherwise: int = 1) -> Header:
  """Reads no pixel. Raises BadPicture when the bytes are no picture.

  Args:
    blob: a file in any format that Pillow reads; its first part may do.
    otherwise: the orientation of a picture that has no tag itself, such as `orientation_of` gives.
  """
  picture = _open(blob)
  return Header(*picture.size, picture.format, picture.mode, _orientation(picture, otherwise))


def upright(sides: Sequence[int], orientation: int) -> Sequence[int]:
  """The two sides of a picture as stored, in either order, once it stands upright."""
  return sides[::-1] if orientation >= 5 else sides


def orientation_of(exif: str | None) -> int:
  """EXIF's orientation, 1 … 8, from the "exif" that img2dataset writes into a sample's json.

  That is a json of what exifread prints, as {"Image Orientation": "Rotated 90 CW"}. img2dataset
  does not turn the pictures that it encodes again, and leaves them no tag. 1 where `exif` does not
  tell; the names that `sdjax shards pack` writes do not, for it has turned its pictures already.
  """
  try:
    tags = json.loads(exif) if isinstance(exif, str) else None
  except (ValueError, RecursionError):
    return 1
  told = tags.get("Image Orientation") if isinstance(tags, dict) else None
  return EXIFREAD.index(told) + 1 if told in EXIFREAD else 1


def decoder_name(choice: str) -> str:
  """Which of "pillow", "fast", "exact" a choice means here: "auto" is "fast" where installed.

  Raises:
    UserError: an unknown choice, or "fast" without its two packages.
  """
  if choice == "auto":
    return "fast" if _fast_libraries() else "pillow"
  if choice not in DECODERS:
    raise UserError(f"decoder {choice!r} is not one of {', '.join(('auto', *DECODERS))}; name one")
  if choice == "fast" and not _fast_libraries():
    raise UserError("decoder 'fast' needs simplejpeg and opencv-python-headless; "
                    "pip install 'sdjax[fast]', or take decoder 'pillow'")
  return choice


def decode(
    blob: bytes,
    size: tuple[int, int],                      # (H, W) px
    crop: tuple[float, float] = (0.5, 0.5),     # (y, x) in [0, 1]: 0 is top, left
    *,
    decoder: str = "pillow",
    orientation: int = 1,
    min_side_px: int = 1,
    out: np.ndarray | None = None,              # uint8 [H W 3], contiguous
) -> np.ndarray:                                # uint8 [H W 3]
  """The largest part of a picture that has the shape of `size`, resized to it.

  A picture that already has the size is not resampled. Lets go of Python's lock while it decodes.

  Args:
    blob: a file in any format that Pillow reads.
    size: of the result.
    crop: where the part lies along the side that is too long; 0.5 is the middle.
    decoder: "pillow", "fast" or "exact", see the top of this file; `decoder_name` gives it.
    orientation: EXIF's, 1 … 8, of a picture that has no such tag itself.
    min_side_px: of the picture as it is stored.
    out: what to write to and return, such as a row of a batch; None: a new array.

  Raises:
    BadPicture: "not a picture", "corrupt picture", "too small", or "too many pixels" (over
      `MAX_PIXELS`); the last two are told by the header, before anything is decoded.
  """
  if out is None:
    out = np.empty((*size, 3), np.uint8)
  DECODERS[decoder](blob, out, crop, orientation, min_side_px)
  return out


def decode_whole(blob: bytes) -> Image.Image:
  """All of a picture at its own size, upright, RGB. Raises BadPicture as `decode` does."""
  picture = _open(blob)
  try:
    return _upright(picture, 1)
  except DAMAGE as error:
    raise BadPicture("corrupt picture") from error


def copy(
    pixels: np.ndarray,        # uint8 [H W 3]
    out: np.ndarray,           # uint8 [H W 3], written
    flip: bool = False,
) -> None:
  """Copies a picture, optionally mirrored left to right."""
  if not flip:
    out[...] = pixels
    return
  for channel in range(3):  # pixels[:, ::-1] makes numpy loop over triples, 4 times slower
    out[..., channel] = pixels[:, ::-1, channel]


def to_float(
    pixels: np.ndarray,        # uint8 [H W 3]
    out: np.ndarray,           # float32 [H W 3], written
) -> None:
  """0 … 255 → -1 … 1."""
  out[...] = pixels  # first: a multiply that casts is slower than both
  np.multiply(out, np.float32(2 / 255), out=out)
  np.subtract(out, np.float32(1), out=out)


def size_condition(
    original: tuple[int, int],                  # (height, width) px, upright
    size: tuple[int, int],                      # (H, W) px
    crop: tuple[float, float] = (0.5, 0.5),     # (y, x) in [0, 1], as given to `decode`
    flip: bool = False,
) -> np.ndarray:                                # int32 [6]
  """What SDXL is told of a picture: original height and width, crop top and left, H and W.

  SDXL (Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.2) learns from all pictures,
  also small ones, and from random crops, and is told of both so that sampling can ask for neither.
  The crop is counted in px of the picture after it was resized and before it was cut to `size`; of
  a mirrored picture, from its new left edge, as diffusers' train_text_to_image_sdxl.py does.

  Args:
    original: before any resizing: img2dataset's original_height and original_width, where the json
      has them, else the size of the picture.
    size: of the result.
    crop: where the part lies.
    flip: whether `copy` mirrors it.
  """
  scale = min(original[0] / size[0], original[1] / size[1])
  y, x = crop[0], 1 - crop[1] if flip else crop[1]
  top = round(y * (original[0] / scale - size[0]))
  left = round(x * (original[1] / scale - size[1]))
  return np.array((*original, top, left, *size), np.int32)


def _decode_pillow(blob, out, crop, orientation, min_side_px, scaled=True) -> None:
  picture, size = _open(blob, min_side_px), out.shape[:2]
  try:
    if scaled and picture.format in ("JPEG", "MPO"):
      on_side = _orientation(picture, orientation) > 4
      _, (*_, width, height) = picture.draft(None, size if on_side else size[::-1])
      # Not always whole px: 767 at half scale are 383.5, though they come as 384.
      extent = (width, height) if on_side else (height, width)
      picture = _upright(picture, orientation)
    else:
      picture = _upright(picture, orientation)
      extent = picture.height, picture.width
    height, width = _part(extent, size)
    top, left = crop[0] * (extent[0] - height), crop[1] * (extent[1] - width)
    box = (left, top, min(left + width, extent[1]), min(top + height, extent[0]))
    out[...] = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
  except DAMAGE as error:
    raise BadPicture("corrupt picture") from error


def _decode_fast(blob, out, crop, orientation, min_side_px) -> None:
  """Leaves to Pillow what is no JPEG, is CMYK, or that simplejpeg complains of."""
  cv2, simplejpeg = _fast_libraries()
  leave = functools.partial(_decode_pillow, blob, out, crop, orientation, min_side_px)
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(blob)
  except ValueError:
    return leave()
  _refuse(width, height, min_side_px)
  if colours not in ("YCbCr", "RGB", "Gray"):
    return leave()
  if _may_tell_orientation(blob):
    orientation = _orientation(_open(blob), orientation)
  size, on_side = out.shape[:2], orientation > 4
  low, across = size[::-1] if on_side else size
  # From 1/2 to 1 libjpeg-turbo has no vector code, which costs more than the pixels saved.
  least = {"min_height": low, "min_width": across, "min_factor": 2}
  times = height // size[0]
  fits = (orientation == 1 and times in (1, 2, 4, 8)
          and (height, width) == (times * size[0], times * size[1]))
  try:
    pixels = simplejpeg.decode_jpeg(blob, **least, buffer=out if fits else None)
  except ValueError:
    return leave()
  if fits:
    return
  scale = (8 * max(pixels.shape[:2]) // max(height, width)) / 8  # before sides were rounded up
  extent = (scale * width, scale * height) if on_side else (scale * height, scale * width)
  sides = [max(1, round(side)) for side in _part(extent, size)]
  top, left = (round(at * (whole - side)) for at, whole, side in zip(crop, extent, sides))
  part = _turned(pixels, orientation)[top:top + sides[0], left:left + sides[1]]
  if part.shape == out.shape:
    out[...] = part
  else:
    shrinks = sides[0] > size[0] or sides[1] > size[1]
    cv2.resize(part, size[::-1], dst=out,
               interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _part(extent: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
  """Sides of the largest part of a picture that has the shape of `size`; all (y, x) in px."""
  scale = min(extent[0] / size[0], extent[1] / size[1])
  # Rounding must not make it larger than the picture by 1e-13.
  return min(scale * size[0], extent[0]), min(scale * size[1], extent[1])


DECODERS = {
    "pillow": _decode_pillow,
    "fast": _decode_fast,
    "exact": functools.partial(_decode_pillow, scaled=False),
}


@functools.cache
def _fast_libraries():
  """The modules cv2 and simplejpeg, or None where they are not installed."""
  try:
    import cv2
    import simplejpeg
  except ImportError:
    return None
  cv2.setNumThreads(0)  # pictures are what runs in parallel, not parts of them
  return cv2, simplejpeg


def _open(blob: bytes, min_side_px: int = 1) -> Image.Image:
  try:
    picture = Image.open(io.BytesIO(blob))
  except Image.DecompressionBombError as error:
    raise BadPicture("too many pixels") from error
  except DAMAGE as error:
    raise BadPicture("not a picture") from error
  _refuse(*picture.size, min_side_px)
  return picture


def _refuse(width: int, height: int, min_side_px: int) -> None:
  if width * height > MAX_PIXELS:
    raise BadPicture("too many pixels")
  if min(width, height) < min_side_px:
    raise BadPicture("too small")


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
  """Plain 8-bit RGB of any Pillow picture, turned as its EXIF tag says, transparency on white."""
  picture.load()  # first: else damage met while looking for EXIF would be taken for broken EXIF
  orientation = _orientation(picture, orientation)
  picture = _flatten(picture)
  if orientation == 1:
    return picture
  return Image.fromarray(_turned(np.asarray(picture), orientation))


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """A view of stored pixels [H W 3] that stands upright."""
  if orientation > 4:
    pixels = pixels.swapaxes(0, 1)
  y, x = STEPS[(orientation - 1) % 4]
  return pixels[::y, ::x]


def _orientation(picture: Image.Image, otherwise: int) -> int:
  if picture.format == "TIFF":
    return 1  # Pillow has turned it, and left it no tag
  if picture.format == "PNG" and "exif" not in picture.info:
    return otherwise  # Pillow would decode the whole picture to look behind the pixels
  try:
    told = picture.getexif().get(EXIF_ORIENTATION)
  except DAMAGE:  # a broken tag does not make the pixels bad
    return otherwise
  return int(told) if told in range(1, 9) else otherwise


def _may_tell_orientation(blob: bytes) -> bool:
  """Whether Pillow has to look for a JPEG's EXIF or XMP, 40 µs: not if no segment can hold them.

  A JPEG is two bytes, then segments (marker, length, data) up to the pixels (ITU T.81, B.1.1).
  """
  place = 2
  try:
    marker, length = SEGMENT.unpack_from(blob, place)
    while marker != START_OF_SCAN:
      if marker == APP1 or not 0xFF00 <= marker < 0xFFFF:
        return True  # found, or laid out in a way that Pillow shall judge
      place += 2 + length
      marker, length = SEGMENT.unpack_from(blob, place)
  except struct.error:  # it ends here: likewise
    return True
  return False


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
