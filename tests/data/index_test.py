import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from flaky_server import FlakyServer
from PIL import Image
from pyarrow import parquet

from sdjax.data import index, pack
from sdjax.data.storage import Storage
from sdjax.errors import UserError


def write(path, members, form=tarfile.PAX_FORMAT):
  """A tar of (name, bytes or what becomes a json)."""
  with tarfile.open(path, "w", format=form) as archive:
    for name, content in members:
      blob = content if isinstance(content, bytes) else json.dumps(content, indent=4).encode()
      member = tarfile.TarInfo(name)
      member.size, member.mtime = len(blob), 0.5
      archive.addfile(member, io.BytesIO(blob))
  return str(path)


def jpeg(width, height, orientation=None):
  exif = Image.Exif()
  if orientation:
    exif[0x0112] = orientation
  buffer = io.BytesIO()
  Image.new("RGB", (width, height)).save(buffer, "JPEG", exif=exif)
  return buffer.getvalue()


def scan(path, members, **kwargs):
  table = index.scan(Storage(), write(path, members, **kwargs))
  return table, index.facts_of(table)


@pytest.fixture
def laion(tmp_path):
  """A shard with what img2dataset writes for LAION, in download order."""
  rng = np.random.default_rng(0)
  members = []
  for i in map(int, rng.permutation(30)):
    facts = {"similarity": float("nan") if i == 3 else 0.25 + i, "hash": -2**62 + i,
             "LANGUAGE": None if i == 4 else "en", "WIDTH": 2 * i + 2, "HEIGHT": 3,
             "caption": None if i == 5 else f"picture {i}", "error_message": None,
             "width": i + 1, "height": 64, "exif": json.dumps({"Image Make": "x"})}
    members += [(f"{i:09d}.jpg", rng.bytes(1000 + 37 * i)), (f"{i:09d}.json", facts),
                (f"{i:09d}.txt", b"" if i == 5 else f"picture {i}\n".encode())]
  return write(tmp_path / "00000.tar", members), members


def test_each_row_is_a_sample_in_the_order_of_the_tar(laion):
  path, members = laion
  table, store = index.scan(Storage(), path), Storage()
  rows = table.to_pylist()
  assert [row["key"] for row in rows] == [name[:9] for name, _ in members[::3]]
  for number, row in enumerate(rows):
    i = int(row["key"])
    extents = [(row[f"{part}.offset"], row[f"{part}.size"]) for part in ("jpg", "txt")]
    assert store.read(path, extents) == [members[3 * number][1], members[3 * number + 2][1]]
    assert (row["width"], row["height"], row["json.WIDTH"]) == (i + 1, 64, 2 * i + 2)
    assert row["json.similarity"] == (None if i == 3 else 0.25 + i)
    assert row["json.LANGUAGE"] == (None if i == 4 else "en")
    caption = "" if i == 5 else f"picture {i}"
    assert (row["caption"], row["caption_length"]) == (caption, len(caption))
    assert row["json.hash"] == -2**62 + i and row["json.error_message"] is None
  told = index.facts_of(table)
  assert told["samples"] == 30 and not told["truncated"] and told["problems"] == {}
  assert told["size"] == os.stat(path).st_size


@pytest.mark.parametrize("values, kind, expected", [
    ([1, None, 3], "int64", [1, None, 3]),
    ([1, 2.5, None], "double", [1.0, 2.5, None]),
    ([float("nan"), 2.5, float("inf")], "double", [None, 2.5, float("inf")]),
    ([float("nan"), 7, -2**63], "int64", [None, 7, -2**63]),  # pandas' whole numbers with gaps
    ([True, None, False], "bool", [True, None, False]),
    (["5", "", None], "string", ["5", "", None]),
    ([None, None, float("nan")], "null", [None] * 3),
    ([1, "one", True], "string", ["1", "one", "true"]),
    ([True, 1, 0], "string", ["true", "1", "0"]),
    ([2**64, 1, None], "string", [str(2**64), "1", None]),
    ([2**60 + 1, 0.5, None], "string", [str(2**60 + 1), "0.5", None]),  # no float holds it
    ([[1, "ü"], {"a": None}, "[]"], "string", ['[1, "ü"]', '{"a": null}', "[]"]),
    (["\ud83d half", "\ud83d\ude00", "ü"], "string", ["? half", "😀", "ü"]),
])
def test_types_of_json_columns(tmp_path, values, kind, expected):
  table, _ = scan(tmp_path / "a.tar", [
      item for i, value in enumerate(values)
      for item in ((f"{i}.jpg", b""), (f"{i}.json", {"value": value}))])
  assert str(table.schema.field("json.value").type) == kind
  assert table["json.value"].to_pylist() == expected


def test_keys_that_some_jsons_lack_and_keys_like_columns(tmp_path):
  table, _ = scan(tmp_path / "a.tar", [
      ("0.jpg", b"12345"), ("0.json", {"size": 7, "a": 1}), ("1.jpg", b""),
      ("1.json", {"width": 5, "height": 6, "offset": "x", "crop.size": 3, "": 4})])
  assert table["jpg.size"].to_pylist() == [5, 0]
  assert table[index.column_of("size")].to_pylist() == [7, None]
  assert table[index.column_of("offset")].to_pylist() == [None, "x"]
  assert table[index.column_of("crop.size")].to_pylist() == [None, 3]
  assert table["json.a"].to_pylist() == [1, None] and table["json."].to_pylist() == [None, 4]
  # Whatever jsons hold, these are places in the tar.
  assert {name[:-7] for name in table.column_names if name.endswith(".offset")} == {"jpg", "json"}
  assert table["json.size"].to_pylist() == [len(json.dumps(facts, indent=4)) for facts in (
      {"size": 7, "a": 1},
      {"width": 5, "height": 6, "offset": "x", "crop.size": 3, "": 4})]


def test_jsons_with_data_for_keys_keep_the_common_ones(tmp_path):
  members = [item for i in range(30) for item in (
      (f"{i}.jpg", b""), (f"{i}.json", {f"{i}-{j}": 1 for j in range(50)} | {"score": i}))]
  table, _ = scan(tmp_path / "a.tar", members)
  assert table["json.score"].to_pylist() == list(range(30)) and table.num_columns < 1010


def test_sizes_are_those_of_upright_pictures(tmp_path):
  turned = json.dumps({"Image Orientation": "Rotated 90 CW"})
  big = jpeg(40, 30, 6)
  big = big[:2] + (b"\xff\xe2" + (65533).to_bytes(2, "big") + bytes(65531)) * 2 + big[2:]
  cases = {
      "json": (b"", {"width": 7, "height": 5}, (7, 5)),
      "json-turned": (b"", {"width": 7, "height": 5, "exif": turned}, (5, 7)),
      "json-flipped": (
          b"", {"width": 7, "height": 5,
                "exif": json.dumps({"Image Orientation": "Mirrored vertical"})}, (7, 5)),
      "json-odd": (jpeg(20, 10), {"width": "7", "height": None, "exif": ["x"]}, (20, 10)),
      "header": (jpeg(20, 10), {}, (20, 10)),
      "header-turned": (jpeg(20, 10, 8), {}, (10, 20)),
      "header-json-turned": (jpeg(20, 10), {"width": None, "exif": turned}, (10, 20)),
      "far": (big, {}, (30, 40)),
      "broken": (b"no picture", {"width": 0, "height": 5}, (None, None)),
  }
  table, _ = scan(tmp_path / "a.tar", [
      item for name, (blob, facts, _) in cases.items()
      for item in ((f"{name}.jpg", blob), (f"{name}.json", facts))])
  found = {row["key"]: (row["width"], row["height"]) for row in table.to_pylist()}
  assert found == {name: expected for name, (_, _, expected) in cases.items()}


def test_what_is_wrong_is_counted(tmp_path):
  deep = b"[" * 100_000
  table, told = scan(tmp_path / "a.tar", [
      ("0.jpg", b""), ("0.json", '"ü"'.encode("latin-1")), ("0.txt", b"a"),
      ("1.png", b""), ("1.json", b"[1]"), ("2.WEBP", b""), ("2.json", deep),
      ("3.txt", b"lonely"), ("4.json", {}), ("5.jpeg", b""), ("5.txt", b"\xff"),
      ("6.moments.npy", b""), ("6.json", {"width": 8, "caption": "c"}),
      ("7.jpg", b"old"), ("7.txt", b"old"), ("8.jpg", b""), ("7.jpg", b"new"), ("7.txt", b"new"),
      ("9.jpg", b""), ("9.json", {"captions": ["", " two ", "three"]}), ("9.txt", b"one")])
  assert told["problems"] == {"no picture": 2, "unreadable json": 3, "duplicate name": 1}
  assert told["examples"] == {"no picture": "3", "unreadable json": "0", "duplicate name": "7"}
  rows = {row["key"]: row for row in table.to_pylist()}
  assert {key: row["caption"] for key, row in rows.items()} == {
      "0": None, "1": None, "2": None, "5": None, "6": "c", "7": "new", "8": "", "9": "two"}
  assert rows["9"]["caption_length"] == 3 and rows["0"]["caption_length"] is None
  assert rows["0"]["json.width"] is None and rows["6"]["json.width"] == 8
  assert rows["6"]["moments.npy.offset"] > 0 and rows["6"]["jpg.offset"] == -1
  path = str(tmp_path / "a.tar")
  assert Storage().read(path, [(rows["7"]["jpg.offset"], rows["7"]["jpg.size"])]) == [b"new"]


def test_a_tar_that_breaks_off_keeps_the_samples_before(laion, tmp_path):
  path, members = laion
  whole = index.scan(Storage(), path)
  ends = [row["txt.offset"] + row["txt.size"] for row in whole.to_pylist()]
  for cut in (ends[9] + 600, ends[20] + 2000):
    with open(path, "rb") as file:
      (tmp_path / "cut.tar").write_bytes(file.read(cut))
    table = index.scan(Storage(), str(tmp_path / "cut.tar"))
    assert index.facts_of(table)["truncated"]
    # The last one whose headers have come may lack a part.
    n = len(table)
    assert sum(end < cut for end in ends) - n in (0, 1)
    assert table["key"].to_pylist() == whole["key"].to_pylist()[:n]
  (tmp_path / "cut.tar").write_bytes(b"<html>")
  with pytest.raises(UserError, match="cut.tar"):
    index.scan(Storage(), str(tmp_path / "cut.tar"))


def test_a_tar_without_samples_has_an_index_without_rows(tmp_path):
  for members in ([], [("readme.txt", b"")]):
    table, told = scan(tmp_path / "a.tar", members)
    assert len(table) == 0 == told["samples"]
    assert {"key", "width", "height", "caption", "caption_length"} <= set(table.column_names)


def test_an_index_is_kept_until_the_tar_changes(laion, monkeypatch):
  path, members = laion
  new = index.load(Storage(), path)
  place = index.path_of(path)
  assert str(place) == path.removesuffix(".tar") + ".index.parquet"
  calls = []
  scan = index.scan
  monkeypatch.setattr(index, "scan", lambda *a: calls.append(a) or scan(*a))
  kept = index.load(Storage(), path)
  assert kept.equals(new, check_metadata=True) and not calls
  some = ["json.size", "width", "json.nowhere"]
  assert sorted(index.load(Storage(), path, columns=some).column_names) == ["json.size", "width"]
  assert parquet.ParquetFile(place).metadata.row_group(0).num_rows == 30 and not calls
  os.utime(path, ns=(1, 1))                                            # another version
  assert index.load(Storage(), path, columns=some).column_names == ["json.size", "width"]
  write(path, members[:30])                                            # another tar
  assert len(index.load(Storage(), path)) == 10
  whole = place.read_bytes()
  for damage in (b"", whole[:-9], b"nonsense"):
    place.write_bytes(damage)
    assert len(index.load(Storage(), path)) == 10
  parquet.write_table(pa.table({"key": ["a"]}), place)                 # not one of ours
  assert len(index.load(Storage(), path)) == 10
  assert len(calls) == 6
  assert [name for name in os.listdir(place.parent) if name.startswith(".")] == []


def test_where_an_index_is_kept(tmp_path, monkeypatch):
  shard = write(tmp_path / "a.tar", [])
  monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
  remote = index.path_of("https://server/a.tar")
  assert remote.parent == tmp_path / "cache/index"
  assert remote != index.path_of("https://server/b.tar")
  assert index.path_of("gs://bucket/a.tar", tmp_path / "f").parent == tmp_path / "f"
  monkeypatch.setattr(os, "access", lambda *_: False)
  away = index.path_of(shard, tmp_path / "f")
  assert away.parent == tmp_path / "f" and away.suffix == ".parquet"
  (tmp_path / "a.index.parquet").touch()
  assert index.path_of(shard, tmp_path / "f") == tmp_path / "a.index.parquet"
  monkeypatch.delenv("SDJAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert index.path_of("https://server/a.tar").parent == tmp_path / ".cache/sdjax/index"


def test_a_shard_behind_a_bad_server_has_the_same_index(laion, tmp_path):
  path, _ = laion
  local = index.scan(Storage(), path)
  with FlakyServer(tmp_path, fail_share=0.15, cut_share=0.15) as server:
    store, url = Storage(pause_s=0.001), f"{server.url}/00000.tar"
    far = index.load(store, url, tmp_path / "cache")
    assert far.equals(local)
    before = server.count
    assert index.load(store, url, tmp_path / "cache").equals(far, check_metadata=True)
    assert sum(entry[3] == 206 for entry in server.log[before:]) == 1  # its version, no more


def test_counts_by_the_files_that_img2dataset_leaves(tmp_path, picture):
  store = Storage(pause_s=0.001)
  samples = [{"png": picture(0), "txt": ""}, pack.Failure("x", "bad")] * 3
  pack.write_shards(samples, tmp_path / "shards")
  shard = str(tmp_path / "shards/00000.tar")
  assert index.count_of(store, shard) == 3
  stats = tmp_path / "shards/00000_stats.json"
  table = pa.table(
      {"key": list("abcd"), "status": ["success", "failed_to_download", "success", None]})
  parquet.write_table(table, tmp_path / "shards/00000.parquet")
  for nonsense in (b"", b"[]", b"{}"):
    stats.write_bytes(nonsense)
    assert index.count_of(store, shard) == 2
  stats.unlink()
  assert index.count_of(store, shard) == 2
  with FlakyServer(tmp_path / "shards") as server:
    assert index.count_of(store, f"{server.url}/00000.tar") == 2
    server.status = 403                                                # S3: not there
    assert index.count_of(store, f"{server.url}/00000.tar") is None
    server.status = 503
    with pytest.raises(OSError):
      index.count_of(store, f"{server.url}/00000.tar")
  parquet.write_table(table.select(["key"]), tmp_path / "shards/00000.parquet")
  assert index.count_of(store, shard) is None
  assert index.count_of(store, str(tmp_path / "none.tar")) is None
