import concurrent.futures
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdjax.data import images
from sdjax.errors import UserError

RED = (200, 30, 40)


@pytest.fixture(params=images.DECODERS)
def decoder(request):
  """The name of each decoder; "fast" where it is installed."""
  if request.param == "fast":
    need_fast()
  return request.param


def need_fast():
  pytest.importorskip("simplejpeg")
  pytest.importorskip("cv2")


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
  rows = b"".join(b"\0" + struct.pack(">3H", *(257 * c for c in RED)) * 40 for _ in range(30))
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
      "16 bit tiff": (encode(grey16, "TIFF"), (100,) * 3),
      "16 bit colour": (png(40, 30, 16, zlib.compress(rows)), RED),
      "stored as rgb": (encode(red, "JPEG", quality=95, keep_rgb=True), RED),
      "several jpegs": (encode(red, "MPO", quality=95, save_all=True, append_images=frames[1:]),
                        RED),
      "animated": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), RED),
  }


def png(width, height, bits, data):
  """An RGB PNG that says it has this size, whatever its data."""
  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
          + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_picture_becomes_rgb(kind, decoder):
  blob, colour = kinds()[kind]
  pixels = images.decode(blob, (16, 24), decoder=decoder)
  assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8
  np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=3)


CORNERS = np.zeros((64, 32, 3), np.uint8)
CORNERS[:32, :16], CORNERS[:32, 16:], CORNERS[32:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def tagged(orientation, form="JPEG", **options):
  exif = Image.Exif()
  exif[images.EXIF_ORIENTATION] = orientation
  return encode(Image.fromarray(CORNERS), form, exif=exif, **options)


SHARP = {"quality": 95, "subsampling": 0}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation, decoder):
  stored = tagged(orientation, **SHARP)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
  whole = images.decode_whole(stored)
  np.testing.assert_array_equal(np.asarray(whole), np.asarray(upright))
  height, width = (64, 32) if orientation < 5 else (32, 64)
  pixels = images.decode(stored, (height, width), decoder=decoder)
  np.testing.assert_array_equal(pixels, np.asarray(upright))
  # What img2dataset encoded again has lost its tag; the json tells. A tag is believed before it.
  bare = encode(Image.fromarray(CORNERS), "JPEG", **SHARP)
  for blob, told in ((bare, orientation), (stored, 9 - orientation)):
    pixels = images.decode(blob, (height, width), decoder=decoder, orientation=told)
    np.testing.assert_array_equal(pixels, np.asarray(upright))
  # At a quarter of the size, cut at the end of the longer side: eight rows or columns of 16.
  pixels = images.decode(stored, (8, 8), (1.0, 1.0), decoder=decoder).astype(int)
  expected = np.asarray(upright.resize((width // 4, height // 4), Image.Resampling.BOX))[-8:, -8:]
  assert np.abs(pixels - expected)[::7, ::7].max() < 30  # the corners: bicubic rings at the edges


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP"])
def test_other_formats_are_turned_once(form):
  lossless = {"lossless": True} if form == "WEBP" else {}
  pixels = images.decode(tagged(6, form, **lossless), (32, 64))
  np.testing.assert_array_equal(pixels, np.rot90(CORNERS, -1))


def test_orientation_in_xmp_or_behind_other_segments_is_found(decoder):
  jpeg = encode(Image.fromarray(CORNERS), "JPEG", **SHARP)
  xmp = b"http://ns.adobe.com/xap/1.0/\0" + b'<x tiff:Orientation="6"/>'

  def segment(marker, data):
    return marker + struct.pack(">H", len(data) + 2) + data

  comment, xmp = segment(b"\xff\xfe", b"\xff\xda a comment"), segment(b"\xff\xe1", xmp)
  fill = b"\xff" * 3  # allowed before a marker: ITU T.81, B.1.1.2
  for between in (xmp, comment + xmp, comment + fill + xmp):
    pixels = images.decode(jpeg[:2] + between + jpeg[2:], (32, 64), decoder=decoder)
    assert np.abs(pixels.astype(int) - np.rot90(CORNERS, -1)).max() < 30


@pytest.mark.parametrize("exif, orientation", [
    ({"Image Orientation": "Horizontal (normal)", "Image Make": "x"}, 1),
    ({"Image Orientation": "Mirrored horizontal"}, 2), ({"Image Orientation": "Rotated 180"}, 3),
    ({"Image Orientation": "Mirrored vertical"}, 4),
    ({"Image Orientation": "Mirrored horizontal then rotated 90 CCW"}, 5),
    ({"Image Orientation": "Rotated 90 CW"}, 6),
    ({"Image Orientation": "Mirrored horizontal then rotated 90 CW"}, 7),
    ({"Image Orientation": "Rotated 90 CCW"}, 8),
    ({"Image Orientation": "0"}, 1), ({"Image Orientation": [6]}, 1), ({"Orientation": "6"}, 1),
    ({}, 1), (["Image Orientation"], 1)])
def test_orientation_as_img2dataset_writes_it(exif, orientation):
  assert images.orientation_of(json.dumps(exif)) == orientation


def test_orientation_of_no_exif():
  assert [images.orientation_of(exif) for exif in (None, "", "null", "{", "NaN")] == [1] * 5


def test_the_crop_lies_where_it_is_asked_for():
  # PNG is Pillow's in every decoder.
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


def test_extreme_shapes_do_not_break(decoder):
  for width, height in ((1, 1), (5000, 50), (3, 700), (29, 3000)):
    blob = encode(Image.new("RGB", (width, height), RED), "JPEG", quality=95)
    # (29 / 56) · 56 is above 29 in floating point.
    for size, crop in (((64, 64), (0.999, 0.999)), ((8, 56), (1.0, 1.0)), ((8, 1024), (1.0, 1.0))):
      pixels = images.decode(blob, size, crop, decoder=decoder)
      assert pixels.shape == (*size, 3) and np.abs(pixels.astype(int) - RED).max() <= 3


def waves(height, width, period):
  """A JPEG of stripes that slant, and the same as a function of (y, x) px."""
  def value(y, x):
    return 128 + 100 * np.sin(2 * np.pi * (x + y / 3) / period)
  grey = value(*np.mgrid[:height, :width] + 0.5)
  return encode(Image.fromarray(grey.astype(np.uint8)).convert("RGB"), "JPEG", quality=95), value


@pytest.mark.parametrize("side", [1024, 1022, 1021, 768, 767, 699, 400, 200])
def test_every_pixel_lies_where_it_should(decoder, side):
  """Also where a scaled JPEG is no whole number of px wide: 767 / 2. A shift of 1 px is 40 levels.

  OpenCV is given whole px, so the fast decoder may be off by half of one, the crop by half too.
  """
  blob, value = waves(side, side + 200, period=side / 16)
  pixels = images.decode(blob, (256, 256), (0.0, 0.5), decoder=decoder)[..., 0]
  y, x = (np.mgrid[:256, :256] + 0.5) * side / 256
  difference = np.abs(pixels - value(y, x + 100))[4:-4, 4:-4]  # not the edges, which filters mirror
  assert difference.max() < (30 if decoder == "fast" else 12)


def test_scaled_decoding_reads_all_it_needs_for_long_pictures():
  """The scale is that of the picture's shape, not of the longer side of the size."""
  need_fast()
  for decoder in ("pillow", "fast"):
    blob, _ = waves(256, 2048, 64)
    exact = images.decode(blob, (32, 256), decoder="exact").astype(int)
    pixels = images.decode(blob, (32, 256), decoder=decoder).astype(int)
    assert np.abs(pixels - exact).mean() < 2


def test_what_the_fast_decoder_leaves_is_pillows():
  need_fast()
  noise = Image.effect_noise((200, 160), 60).convert("RGB")
  jpeg = encode(noise, "JPEG", quality=90)
  scan = jpeg.index(b"\xff\xda")
  odd = jpeg[:scan] + b"12345" + jpeg[scan:]  # libjpeg warns of bytes between segments
  for blob in (odd, encode(noise.convert("CMYK"), "JPEG"), encode(noise, "WEBP")):
    np.testing.assert_array_equal(images.decode(blob, (50, 64), decoder="fast"),
                                  images.decode(blob, (50, 64), decoder="pillow"))


def test_half_scale_is_the_same_in_pillow_and_simplejpeg():
  """Both are libjpeg-turbo: a resume with the other decoder is off by resampling only."""
  need_fast()
  blob, _ = waves(512, 512, 40)
  difference = (images.decode(blob, (256, 256), decoder="fast").astype(int)
                - images.decode(blob, (256, 256), decoder="pillow"))
  assert np.abs(difference).max() <= 1


def test_pixels_go_where_they_are_wanted(decoder):
  """Whether a picture is decoded straight there, cut, shrunk, enlarged, turned, left to Pillow."""
  noise = Image.effect_noise((200, 160), 60).convert("RGB")
  files = [(encode(noise, form), size) for form in ("JPEG", "PNG")
           for size in ((80, 100), (160, 200), (160, 160), (50, 60), (300, 300))]
  for blob, size in (*files, (tagged(6, **SHARP), (32, 64)), (tagged(6, **SHARP), (20, 20))):
    batch = np.full((3, *size, 3), 7, np.uint8)
    pixels = images.decode(blob, size, decoder=decoder, out=batch[1])
    assert pixels.base is batch and (batch[::2] == 7).all()
    np.testing.assert_array_equal(batch[1], images.decode(blob, size, decoder=decoder))


def test_threads_do_not_disturb_each_other(decoder):
  blobs = [waves(300 + 20 * i, 300, 20 + i)[0] for i in range(8)]
  act = lambda blob: images.decode(blob, (64, 64), decoder=decoder)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for pixels, blob in zip(pool.map(act, blobs * 4), blobs * 4):
      np.testing.assert_array_equal(pixels, act(blob))


def test_a_choice_of_decoder_becomes_a_name(monkeypatch):
  monkeypatch.setattr(images, "_fast_libraries", lambda: ("cv2", "simplejpeg"))
  choices = ("auto", "pillow", "fast", "exact")
  assert [images.decoder_name(c) for c in choices] == ["fast", "pillow", "fast", "exact"]
  monkeypatch.setattr(images, "_fast_libraries", lambda: None)
  assert [images.decoder_name(c) for c in ("auto", "pillow", "exact")] == ["pillow"] * 2 + ["exact"]
  with pytest.raises(UserError, match=r"sdjax\[fast\]"):
    images.decoder_name("fast")
  with pytest.raises(UserError, match="'turbo'.*auto, pillow, fast, exact"):
    images.decoder_name("turbo")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [(0.0, 0.0), (0.5, 0.5), (0.25, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("original", [(100, 400), (400, 100)])
def test_sdxl_is_told_what_was_cut(original, crop, flip):
  """The pixels tell it too: their grey is their place in the picture resized, here to half."""
  y, x = np.mgrid[:original[0], :original[1]]
  places = np.stack([y // 2, x // 2, y * 0], -1).astype(np.uint8)
  out = np.empty((50, 50, 3), np.uint8)
  images.copy(images.decode(encode(Image.fromarray(places), "PNG"), (50, 50), crop), out, flip)
  height, width, top, left, *size = images.size_condition(original, (50, 50), crop, flip)
  assert ((height, width), tuple(size)) == (original, (50, 50))
  assert out[25, 25, 0] == top + 25
  assert out[25, 25, 1] == (original[1] // 2 - 1 - (left + 25) if flip else left + 25)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_say_why(decoder):
  jpeg = encode(Image.effect_noise((64, 64), 90), "JPEG")
  noise = encode(Image.effect_noise((64, 64), 90), "PNG")
  broken = noise[:41] + bytes(40) + noise[81:]  # no zlib header
  cases = [(b"", "not a picture"), (b"\xff\xd8hello", "not a picture"),
           (b"<html>", "not a picture"), (jpeg[:len(jpeg) // 2], "corrupt picture"),
           (noise[:200], "corrupt picture"), (broken, "corrupt picture"),
           (png(10_001, 10_000, 8, b""), "too many pixels"),
           (png(60_000, 60_000, 8, b""), "too many pixels"),
           (jpeg_of_claimed_size(10_001, 10_000), "too many pixels")]
  for blob, reason in cases:
    for act in (lambda b: images.decode(b, (8, 8), decoder=decoder), images.decode_whole):
      with pytest.raises(images.BadPicture, match=reason):
        act(blob)


def jpeg_of_claimed_size(width, height):
  blob = encode(Image.new("RGB", (8, 8)), "JPEG")
  frame = blob.index(b"\xff\xc0") + 5  # marker, length, precision, then height and width
  return blob[:frame] + struct.pack(">HH", height, width) + blob[frame + 4:]


def test_small_pictures_are_refused_where_a_limit_is_given(decoder):
  for form in ("JPEG", "PNG"):
    blob = encode(Image.new("RGB", (40, 30), RED), form)
    with pytest.raises(images.BadPicture, match="too small"):
      images.decode(blob, (8, 8), decoder=decoder, min_side_px=31)
    assert images.decode(blob, (8, 8), decoder=decoder, min_side_px=30).shape == (8, 8, 3)


def test_lack_of_memory_is_no_bad_picture(monkeypatch, decoder):
  def fail(*_, **__):
    raise MemoryError
  if decoder == "fast":
    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
  monkeypatch.setattr(Image.Image, "resize", fail)
  with pytest.raises(MemoryError):
    images.decode(encode(Image.new("RGB", (40, 30), RED), "JPEG"), (8, 8), decoder=decoder)


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
  for flip, expected in ((False, pixels), (True, [[[255, 0, 0], [0, 51, 255]]])):
    copied = np.empty((1, 2, 3), np.uint8)
    images.copy(pixels, copied, flip)
    np.testing.assert_array_equal(copied, expected)
