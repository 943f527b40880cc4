import collections
import csv
import io
import json
import os
import resource
import tarfile

import numpy as np
import pytest
from PIL import Image

from sdjax.data import pack
from sdjax.errors import UserError


def read_tar(path):
  with tarfile.open(path) as archive:
    return {m.name: archive.extractfile(m).read() for m in archive}


@pytest.fixture
def folder(tmp_path, picture):
  """JPEG, PNG with alpha, a rotated JPEG, a broken picture and one without a caption."""
  folder = tmp_path / "pictures"
  (folder / "deep").mkdir(parents=True)
  (folder / "a.jpg").write_bytes(picture(1, 40, "JPEG"))
  Image.new("RGBA", (30, 20)).save(folder / "b.png")
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (50, 20), "red").save(folder / "deep/c.jpeg", exif=exif)
  (folder / "d.jpg").write_bytes(picture(2, 40, "JPEG")[:900])
  (folder / "e.webp").write_bytes(picture(3, 10, "WEBP"))
  for name in ("a", "b", "deep/c", "d"):
    (folder / f"{name}.txt").write_text(f"caption {name}\n")
  return folder


def run(folder, out, **options):
  return pack.pack(pack.find_sources(folder), folder, out, **options)


def test_layout_is_img2datasets(folder, tmp_path):
  result = run(folder, tmp_path / "out", shard_size=3)
  assert (result.samples, result.shards) == (4, 2)
  assert [(f.name, f.reason) for f in result.failures] == [("d.jpg", "corrupt picture")]
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
      "00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json"]
  first, second = (read_tar(tmp_path / f"out/0000{i}.tar") for i in (0, 1))
  # a.jpg b.png (d.jpg) | deep/c.jpeg e.webp: the number of the broken one stays free.
  assert list(first) == [f"00000000{i}.{part}" for i in (0, 1) for part in ("jpg", "json", "txt")]
  assert list(second)[::3] == ["000010000.jpg", "000010001.jpg"]
  assert first["000000000.jpg"] == (folder / "a.jpg").read_bytes()
  assert first["000000000.txt"] == b"caption a" and second["000010001.txt"] == b""
  facts = json.loads(second["000010000.json"])
  assert list(facts) == ["caption", "url", "key", "status", "error_message", "width", "height",
                         "original_width", "original_height", "exif", "sha256"]
  assert facts["caption"] == "caption deep/c" and facts["url"] == "deep/c.jpeg"
  assert (facts["width"], facts["height"]) == (20, 50)
  assert (facts["original_width"], facts["original_height"]) == (20, 50)  # upright, too
  assert json.loads(facts["exif"]) == {"Orientation": "6"}
  upright = Image.open(io.BytesIO(second["000010000.jpg"]))
  assert upright.size == (20, 50) and 0x0112 not in upright.getexif()
  stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
  assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (3, 2, 1)
  assert stats["status_dict"] == {"success": 2, "corrupt picture": 1}
  assert {"failed_to_download", "duration", "start_time", "end_time"} <= set(stats)


def test_what_is_written_may_be_read_by_whom_the_umask_says(folder, tmp_path):
  before = os.umask(0o027)
  try:
    run(folder, tmp_path / "out")
  finally:
    os.umask(before)
  assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
  assert (tmp_path / "out/00000.tar").stat().st_mode & 0o777 == 0o640


def test_transparency_becomes_white_in_the_jpeg(folder, tmp_path):
  run(folder, tmp_path / "out")
  jpeg = Image.open(io.BytesIO(read_tar(tmp_path / "out/00000.tar")["000000001.jpg"]))
  assert jpeg.mode == "RGB" and np.asarray(jpeg).min() == 255


def test_an_empty_folder_is_filled_in_place(folder, tmp_path):
  out = tmp_path / "out"
  out.mkdir(mode=0o700)
  number = out.stat().st_ino
  run(folder, out)
  assert sorted(p.name for p in out.iterdir()) == ["00000.tar", "00000_stats.json"]
  assert out.stat().st_ino == number  # as it has to be where a disk is mounted


def test_the_same_pictures_give_the_same_tars(folder, tmp_path):
  for name in ("x", "y"):
    run(folder, tmp_path / name)
  assert (tmp_path / "x/00000.tar").read_bytes() == (tmp_path / "y/00000.tar").read_bytes()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_names_pictures_and_captions(folder, tmp_path, form):
  rows = [{"file_name": "deep/c.jpeg", "text": "with, comma", "mood": "calm"},
          {"file_name": "a.jpg", "text": "ünïcode", "mood": "wild"},
          {"file_name": "gone.jpg", "text": "no picture", "mood": ""}]
  with open(folder / f"metadata.{form}", "w", newline="", encoding="utf-8") as file:
    if form == "jsonl":
      file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  result = run(folder, tmp_path / "out")
  assert [(f.name, f.reason) for f in result.failures] == [("gone.jpg", "no such file")]
  members = read_tar(tmp_path / "out/00000.tar")
  texts = [members[name].decode() for name in members if name.endswith("txt")]
  assert texts == ["ünïcode", "with, comma"]
  assert json.loads(members["000000000.json"])["mood"] == "wild"


@pytest.mark.parametrize("name, text, said", [
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n\n{"file_name": "a.jpg"', "line 3"),
    ("metadata.jsonl", '["a.jpg"]', "line 1"),
    ("metadata.jsonl", '{"text": "x"}', "line 1: no file_name"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": null}', "line 1: no text"),
    ("metadata.csv", "file_name,text\na.jpg,x\nb.png,one,two\n", "line 3"),
    ("metadata.csv", "file_name,text\na.jpg\n", "line 2"),
])
def test_a_bad_line_of_metadata_is_named(folder, name, text, said):
  (folder / name).write_text(text)
  with pytest.raises(UserError, match=said):
    pack.find_sources(folder)


def test_unusable_input_leaves_nothing_behind(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  for place in (tmp_path / "empty", tmp_path / "none"):
    with pytest.raises(UserError, match=str(place)):
      pack.find_sources(place)
  with pytest.raises(UserError, match="not an empty folder"):
    run(folder, folder)
  with pytest.raises(UserError, match="corrupt picture"):
    pack.pack([pack.Source("d.jpg", "", {})], folder, tmp_path / "out")
  for options in ({"quality": 0}, {"quality": 96}, {"shard_size": 0}, {"shard_size": 10_001}):
    with pytest.raises(UserError, match=next(iter(options))):
      run(folder, tmp_path / "out", **options)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "pictures"]


def test_a_full_disk_leaves_no_shards(tmp_path, picture):
  samples = ({"png": picture(i), "txt": "x"} for i in range(60))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the second shard does not fit
  try:
    with pytest.raises(OSError):
      pack.write_shards(samples, tmp_path / "out", shard_size=20)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_while_packing():
  started = []

  class Pool:
    def submit(self, function, item):
      started.append(item)
      return collections.namedtuple("Future", "result")(lambda: function(item))

  finished = pack._map_ahead(Pool(), lambda x: 2 * x, range(1000))
  assert [next(finished) for _ in range(5)] == [0, 2, 4, 6, 8]
  assert len(started) <= pack.AHEAD + 5
  assert list(finished) == [2 * i for i in range(5, 1000)]
