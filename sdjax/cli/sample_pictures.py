"""Pictures that users give to `sdjax sample`: images to change, masks, and what controls read.

All are turned upright, laid on white, cropped in the middle to the shape that is wanted, and
resized (bicubic).
"""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.data import images
from sdjax.data.prompt_files import Picture
from sdjax.errors import UserError

Size = tuple[int, int]  # (H, W) px


@functools.cache  # a list may give one file in many lines
def examine(path: str) -> tuple[Picture, Size]:
  """Reads a picture once, to know that it can be, and returns it with its size.

  Raises:
    UserError: it is not there, or no picture.
  """
  try:
    blob = Path(path).read_bytes()
    whole = images.decode_whole(blob)
  except OSError as error:
    reason = os.strerror(error.errno)
    raise UserError(f"{path} cannot be read ({reason}); check the name") from error
  except images.BadPicture as error:
    raise UserError(f"{path} cannot be used ({error}); give a PNG or JPEG") from error
  return Picture(path, hashlib.sha256(blob).hexdigest()), (whole.height, whole.width)


def check_mask(path: str, mask: Size, image: Size) -> None:
  """Raises UserError unless a mask has the shape of its image, but for a rounded pixel."""
  if abs(mask[0] * image[1] - mask[1] * image[0]) > max(image):
    raise UserError(f"{path} is {mask[1]} × {mask[0]} px, its image {image[1]} × {image[0]}; give "
                    "a mask of the shape of the image")


def load_image(picture: Picture, size: Size) -> np.ndarray:
  """Returns float32 [H W 3] in [-1, 1]."""
  pixels = _load(picture, size)
  out = np.empty(pixels.shape, np.float32)
  images.to_float(pixels, out)
  return out


def load_grey(picture: Picture, size: Size) -> np.ndarray:
  """Returns brightness, float32 [H W] in [0, 1]."""
  return np.asarray(Image.fromarray(_load(picture, size)).convert("L")) / np.float32(255)


def load_hint(picture: Picture, size: Size, channels: int) -> np.ndarray:
  """Returns what a control reads, float32 [H W channels] in [0, 1]; channels: 1 or 3."""
  if channels == 1:
    return load_grey(picture, size)[..., None]
  return _load(picture, size) / np.float32(255)


def _load(picture: Picture, size: Size) -> np.ndarray:  # uint8 [H W 3]
  return images.decode(Path(picture.path).read_bytes(), size)
