"""Pictures on disk and on the page."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from sdjax import pictures


def checker(count, side=8):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, side, side, 3), np.uint8)


def test_to_uint8_spans_the_range_and_clips():
  image = np.array([-2, -1, 0, 1, 2, np.nextafter(1, 0)])
  np.testing.assert_array_equal(pictures.to_uint8(image), [0, 0, 128, 255, 255, 255])


def test_to_uint8_inverts_the_input_scaling():
  every = np.arange(256)
  np.testing.assert_array_equal(pictures.to_uint8(every / 127.5 - 1), every)


def test_png_keeps_pixels_and_text(tmp_path):
  (picture,) = checker(1)
  path = tmp_path / "new" / "a.png"
  pictures.save_png(path, picture, {"prompt": "čaj 茶", "seed": 3})
  with Image.open(path) as read:
    assert read.text == {"prompt": "čaj 茶", "seed": "3"}
    np.testing.assert_array_equal(np.asarray(read), picture)
  assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
  first, second = checker(2)
  path = tmp_path / "a.png"
  pictures.save_png(path, first)

  def fill_the_disk(self, file, *args, **kwargs):
    file.write(b"half a picture")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Image.Image, "save", fill_the_disk)
  with pytest.raises(OSError):
    pictures.save_png(path, second)
  monkeypatch.undo()
  with Image.open(path) as read:
    np.testing.assert_array_equal(np.asarray(read), first)
  assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_every_picture_is_on_the_page_in_order():
  tiles = np.stack([np.full((8, 8, 3), 10 * i, np.uint8) for i in range(5)])
  page = np.asarray(pictures.grid(tiles, columns=3, scale=4))
  tops = [np.argwhere((page == 10 * i).all(-1)).min(0) for i in range(5)]
  counts = [(page == 10 * i).all(-1).sum() for i in range(5)]
  assert counts == [32 * 32] * 5                       # enlarged sharply, nothing overlaps
  rows, columns = np.transpose(tops)
  assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4]
  assert columns[0] == columns[3] < columns[1] == columns[4] < columns[2]


def test_labels_header_and_marks_leave_the_pictures_alone():
  tiles = np.zeros((4, 16, 16, 3), np.uint8)
  tiles[..., 2] = 200
  plain = pictures.grid(tiles, columns=2, scale=4)
  full = pictures.grid(
      tiles, ["a caption of several words that must be wrapped to be read", "b", "", "d"],
      columns=2, scale=4, header="Title\nsubtitle", marks=[True, False, True, True])
  assert full.height > plain.height
  colours = {tuple(colour) for colour in np.asarray(full).reshape(-1, 3)}
  assert {pictures.RIGHT, pictures.WRONG, pictures.INK} <= colours
  blue = (np.asarray(full) == (0, 0, 200)).all(-1).sum()
  assert blue > 0.95 * 4 * 64 * 64                     # a mark covers a corner only


def test_labels_are_wrapped_to_the_width_without_losing_words():
  font = pictures.ImageFont.load_default(pictures.FONT_PX)
  text = "a small red circle above a large blue square on a white background"
  lines = pictures._wrap(text, font, 150)
  assert len(lines) > 1 and " ".join(lines) == text
  assert max(font.getlength(line) for line in lines) <= 150
  assert pictures._wrap("", font, 150) == []


def test_parameters_have_the_form_of_a1111():
  facts = {"Steps": 20, "Sampler": "Euler a", "CFG scale": "7.5", "Seed": 3, "Size": "512x512",
           "Model": "sd15", "Clip skip": None}
  last = "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 3, Size: 512x512, Model: sd15"
  assert pictures.parameters("a fox", "blurry", facts) == f"a fox\nNegative prompt: blurry\n{last}"
  assert pictures.parameters("a fox\nat night", "", facts) == f"a fox\nat night\n{last}"
  # The expression by which A1111 reads the last line back (modules/infotext_utils.py).
  field = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
  odd = pictures.parameters("a", "", {"Steps": 1, "Model": 'a, b: "c"', "Seed": 2})
  read = dict(field.findall(odd.splitlines()[-1]))
  assert (read["Steps"], json.loads(read["Model"]), read["Seed"]) == ("1", 'a, b: "c"', "2")
