import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sdjax.data import images, pack
from sdjax.data.folder_source import Folder
from sdjax.errors import UserError


@pytest.fixture
def folder(tmp_path, picture):
  """Pictures of four kinds: with a text, in a folder of a class, with neither, broken."""
  folder = tmp_path / "pictures"
  for name in ("great-white_shark", "cat/small", ".thumbnails"):
    (folder / name).mkdir(parents=True)
  (folder / "a.png").write_bytes(picture(1, 20))
  (folder / "a.txt").write_text(" ünïcode \n", encoding="utf-8")
  (folder / "b.webp").write_bytes(picture(2, 10, "WEBP"))
  (folder / "broken.jpg").write_bytes(b"not a picture")
  (folder / "cat/small/1.PNG").write_bytes(picture(3))
  (folder / "great-white_shark/1.bmp").write_bytes(picture(4, 12, "BMP"))
  (folder / "great-white_shark/2.png").write_bytes(picture(5))
  (folder / "great-white_shark/2.txt").write_text("a very large one")
  (folder / ".thumbnails/3.png").write_bytes(picture(6))
  (folder / "cat/._1.png").write_bytes(picture(7))
  return folder


NAMES = ["a.png", "b.webp", "broken.jpg", "cat/small/1.PNG", "great-white_shark/1.bmp",
         "great-white_shark/2.png"]


def test_captions_are_texts_or_the_names_of_the_classes(folder):
  source = Folder(folder)
  assert (source.count, source.kind, source.problems, source.examples) == (6, "image", {}, {})
  assert [source.name(i) for i in range(6)] == [str(folder / name) for name in NAMES]
  samples = [source.read(i) for i in range(6)]
  assert [facts for _, facts in samples] == [
      {"caption": one} for one in
      ("ünïcode", "", "", "small", "great white shark", "a very large one")]
  assert [parts for parts, _ in samples] == [{"jpg": (folder / one).read_bytes()} for one in NAMES]


def write_metadata(folder, rows):
  (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_facts_of_the_metadata_are_kept_and_several_captions_with_them(folder):
  write_metadata(folder, [
      {"file_name": "b.webp", "captions": [" one", "", None, "two"], "score": 3.5},
      {"file_name": "a.png", "text": "this", "captions": ["that", "this"]},
      {"file_name": "gone.png", "caption": "lost", "captions": []}])
  source = Folder(folder)
  assert [source.read(i)[1] for i in (0, 1)] == [
      {"caption": "this", "captions": ["that", "this"]},
      {"caption": "one", "captions": ["one", "two"], "score": 3.5}]
  with pytest.raises(images.BadPicture, match="missing file"):
    source.read(2)
  assert source.sizes(np.array([2, 0])).tolist() == [[0, 0], [20, 20]]


def test_a_column_captions_of_a_csv_is_one_text(folder):
  (folder / "metadata.csv").write_text("file_name,captions\na.png,a text\n")
  assert pack.find_sources(folder) == [
      pack.Source("a.png", "a text", {"captions": ["a text"]})]


@pytest.mark.parametrize("captions", [[], [" "], [1], 7, {"a": 1}, None])
def test_a_picture_without_any_text_is_told(folder, captions):
  write_metadata(folder, [{"file_name": "a.png", "captions": captions}])
  with pytest.raises(UserError, match="line 1: no text for a.png"):
    Folder(folder)


def test_the_digest_is_of_the_samples_and_not_of_the_place(folder, tmp_path):
  before = Folder(folder).digest
  moved = shutil.copytree(folder, tmp_path / "elsewhere")
  assert Folder(moved).digest == before
  found = {before}
  for change in (lambda: (moved / "a.txt").write_text("another text"),
                 lambda: (moved / "b.webp").write_bytes(b"longer or shorter"),
                 lambda: (moved / "b.webp").rename(moved / "c.webp"),
                 lambda: (moved / "c.webp").unlink()):
    change()
    found.add(Folder(moved).digest)
  assert len(found) == 5


def test_sizes_are_those_of_upright_pictures_and_looked_up_once(folder):
  for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    (folder / f"turned{orientation}.jpg").write_bytes(buffer.getvalue())
  source = Folder(folder)
  number = {source.name(i).rpartition("/")[2]: i for i in range(source.count)}
  turned = np.array([number[f"turned{orientation}.jpg"] for orientation in range(1, 9)])
  sizes = source.sizes(turned)
  for i, size in zip(turned, sizes, strict=True):
    upright = images.decode_whole(source.read(int(i))[0]["jpg"])
    assert size.tolist() == [upright.height, upright.width]
  assert sizes.dtype == np.int32 and len(np.unique(sizes, axis=0)) == 2
  for path in folder.glob("turned*"):
    path.unlink()
  assert (source.sizes(turned[::-1]) == sizes[::-1]).all()
  assert source.sizes(np.array([number["broken.jpg"]] * 2)).tolist() == [[0, 0]] * 2


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder.parent))
  assert Folder("~/pictures").digest == Folder(folder).digest


def test_a_folder_without_pictures_is_refused(tmp_path):
  for place in (tmp_path, tmp_path / "none"):
    with pytest.raises(UserError, match=str(place)):
      Folder(place)
