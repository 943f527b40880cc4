import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdjax.data import images

RED = (200, 30, 40)


def encode(picture, form, **options):
  buffer = io.BytesIO()
  picture.save(buffer, form, **options)
  return buffer.getvalue()


def kinds():
  """name → (bytes, the colour that all of it should have)."""
  red = Image.new("RGB", (40, 30), RED)
  clear = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
  half = Image.new("RGBA", (40, 30), (0, 0, 0, 128))
  grey16 = Image.fromarray(np.full((30, 40), 100 * 257, np.uint16))
  frames = [red, Image.new("RGB", (40, 30), "blue")]
  quantized = red.quantize(4)
  return {
      "rgb jpeg": (encode(red, "JPEG", quality=95), RED),
      "progressive": (encode(red, "JPEG", quality=95, progressive=True), RED),
      "cmyk jpeg": (encode(red.convert("CMYK"), "JPEG", quality=95), RED),
      "grey jpeg": (encode(Image.new("L", (40, 30), 100), "JPEG"), (100,) * 3),
      "webp": (encode(red, "WEBP", lossless=True), RED),
      "palette": (encode(quantized, "PNG"), RED),
      "palette, transparent": (encode(quantized, "PNG", transparency=quantized.getpixel((0, 0))),
                               (255,) * 3),
      "bilevel": (encode(Image.new("1", (40, 30), 1), "PNG"), (255,) * 3),
      "grey alpha": (encode(clear.convert("LA"), "PNG"), (255,) * 3),
      "transparent": (encode(clear, "PNG"), (255,) * 3),
      "half transparent": (encode(half, "PNG"), (127,) * 3),
      "transparent colour": (encode(red, "PNG", transparency=RED), (255,) * 3),
      "16 bit": (encode(grey16, "PNG"), (100,) * 3),
      "animated": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), RED),
  }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_picture_becomes_rgb(kind):
  blob, colour = kinds()[kind]
  pixels = images.decode(blob, (16, 24))
  assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8
  np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
  corners = np.zeros((64, 32, 3), np.uint8)
  corners[:32, :16], corners[:32, 16:], corners[32:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
  exif = Image.Exif()
  exif[images.EXIF_ORIENTATION] = orientation
  stored = encode(Image.fromarray(corners), "JPEG", quality=95, subsampling=0, exif=exif)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
  whole = images.decode_whole(stored)
  np.testing.assert_array_equal(np.asarray(whole), np.asarray(upright))
  height, width = (64, 32) if orientation < 5 else (32, 64)
  np.testing.assert_array_equal(images.decode(stored, (height, width)), np.asarray(upright))


def test_the_crop_lies_where_it_is_asked_for():
  ramp = np.tile(np.arange(200, dtype=np.uint8), (50, 1))
  blob = encode(Image.fromarray(ramp), "PNG")
  for x, first in ((0.0, 0), (0.5, 75), (1.0, 150)):
    row = images.decode(blob, (50, 50), crop=(0.7, x))[25, :, 0]
    np.testing.assert_array_equal(row, np.arange(first, first + 50))
  # Tall ones are cropped along y, and the scale fits the short side.
  pixels = images.decode(encode(Image.fromarray(ramp.T), "PNG"), (25, 25), crop=(1.0, 0.3))
  np.testing.assert_allclose(pixels[:, 5, 0], 150.5 + 2 * np.arange(25), atol=1)


def test_a_picture_of_the_size_is_not_resampled():
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  np.testing.assert_array_equal(
      images.decode(encode(Image.fromarray(pixels), "PNG"), (32, 32)), pixels)


def test_extreme_shapes_do_not_break():
  for width, height in ((1, 1), (5000, 50), (3, 700)):
    blob = encode(Image.new("RGB", (width, height), RED), "JPEG", quality=95)
    assert np.abs(images.decode(blob, (64, 64), (0.999, 0.999)).astype(int) - RED).max() <= 3


def test_scaled_jpeg_decoding_is_close_to_the_full_one():
  y, x = np.mgrid[:512, :768]
  smooth = np.stack([x / 3, y / 2, 255 - x / 3], -1).astype(np.uint8)
  full = Image.fromarray(smooth).resize((48, 32), Image.Resampling.BICUBIC)
  pixels = images.decode(encode(Image.fromarray(smooth), "JPEG", quality=95), (32, 48))
  assert np.abs(pixels.astype(int) - np.asarray(full)).max() <= 4


def png_of_claimed_size(width, height):
  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_say_why():
  jpeg = encode(Image.effect_noise((64, 64), 90), "JPEG")
  png = encode(Image.effect_noise((64, 64), 90), "PNG")
  broken = png[:41] + bytes(40) + png[81:]  # no zlib header
  cases = [(b"", "not a picture"), (b"\xff\xd8hello", "not a picture"),
           (b"<html>", "not a picture"), (jpeg[:len(jpeg) // 2], "corrupt picture"),
           (png[:200], "corrupt picture"), (broken, "corrupt picture"),
           (png_of_claimed_size(10_001, 10_000), "too many pixels"),
           (png_of_claimed_size(60_000, 60_000), "too many pixels")]
  for blob, reason in cases:
    for act in (lambda b: images.decode(b, (8, 8)), images.decode_whole):
      with pytest.raises(images.BadPicture, match=reason):
        act(blob)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_tag_does_not_make_the_picture_bad():
  exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 20
  blob = encode(Image.new("RGB", (20, 20), RED), "JPEG", quality=95, exif=exif)
  np.testing.assert_allclose(images.decode(blob, (8, 8))[4, 4], RED, atol=3)


def test_float_range_and_flip():
  pixels = np.array([[[0, 51, 255], [255, 0, 0]]], np.uint8)
  out = np.empty((1, 2, 3), np.float32)
  images.to_float(pixels, out)
  np.testing.assert_allclose(out, [[[-1, -0.6, 1], [1, -1, -1]]], atol=1e-6)
  assert out.min() >= -1 and out.max() <= 1
  images.to_float(pixels, out, flip=True)
  np.testing.assert_allclose(out, [[[1, -1, -1], [-1, -0.6, 1]]], atol=1e-6)
