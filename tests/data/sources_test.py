"""What exists: shards by their index or their sidecars, filtered, local or remote."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from flaky_server import FlakyServer
from PIL import Image

from sdjax.data import folder_source, images, pack
from sdjax.data.sources import open_source
from sdjax.data.storage import Missing, Storage
from sdjax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Where indices of remote shards go."""
  monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache/index"


def indices(folder):
  return sorted(path.name for path in folder.glob("*.parquet"))


def without_sidecars(folder):
  for path in folder.glob("*_stats.json"):
    path.unlink()
  return folder


def pack_scores(folder, n=12):
  """`n` samples in shards of 5, each with its number, a score and more in the json; every fourth
  without a score."""
  samples = ({"png": _png(i), "txt": f"picture {i}",
              "json": {"number": i, "tag": "odd" if i % 2 else "even", "WIDTH": 100 + i}
                      | ({"score": i / 2} if i % 4 else {})} for i in range(n))
  pack.write_shards(samples, folder, shard_size=5)
  return str(folder)


def _png(number, side=4):
  buffer = io.BytesIO()
  Image.new("RGB", (side, side), (number, 0, 0)).save(buffer, "PNG")
  return buffer.getvalue()


def write_tar(path, members):
  with tarfile.open(path, "w") as archive:
    for name, blob in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(blob)
      archive.addfile(member, io.BytesIO(blob))
  return str(path)


def numbers(source):
  return [source.facts(sample)["number"] for sample in range(source.count)]


def test_reads_back_every_sample(make_shards, picture):
  source = open_source(str(make_shards()))
  assert source.count == 50 and source.kind == "image" and not source.problems
  assert not source.is_remote
  for sample in range(50):
    assert source.read(sample) == ({"png": picture(sample)}, {"caption": f"picture {sample}"})
  assert source.name(20).endswith("00001.tar:000010000")
  more = open_source(str(make_shards(name="again")), parts=("txt", "json", "gone"))
  parts, _ = more.read(7)
  assert list(parts) == ["png", "txt", "json"]
  assert parts["txt"] == b"picture 7" and json.loads(parts["json"])["caption"] == "picture 7"


def test_counts_by_sidecars_and_indexes_what_is_read(make_shards):
  folder = make_shards()
  source = open_source(str(folder))
  assert source.count == 50
  assert indices(folder) == ["00000.index.parquet"]        # what kind it is had to be known
  source.read(45)
  assert indices(folder) == ["00000.index.parquet", "00002.index.parquet"]
  by_index = open_source(str(without_sidecars(folder)))
  assert by_index.count == 50 and len(indices(folder)) == 3
  assert by_index.digest == source.digest
  assert [by_index.name(i) for i in range(50)] == [source.name(i) for i in range(50)]


def test_facts_are_those_that_are_asked_for(make_shards, tmp_path):
  facts = {"captions": ["one", "two"], "blip": "[not a list", "score": 0.5, "nested": {"a": 1},
           "nothing": None, "odd": float("nan")}
  folder = str(make_shards(2, json=facts))
  wanted = ("captions", "blip", "score", "nested", "nothing", "odd", "gone", "width")
  source = open_source(folder, facts=wanted)
  expected = {"caption": "one", "captions": ["one", "two"], "blip": "[not a list", "score": 0.5,
              "nested": '{"a": 1}', "width": 12}
  assert source.facts(1) == expected and source.read(1)[1] == expected
  # The caption of the txt is a text whatever it looks like; the json's is asked for by its name.
  shard = write_tar(tmp_path / "0.tar", {"a.png": _png(0), "a.txt": b"[1, 2]",
                                         "a.json": b'{"caption": ["a", "b"]}'})
  assert open_source(shard).facts(0) == {"caption": "[1, 2]"}
  assert open_source(shard, facts=("caption",)).facts(0) == {"caption": ["a", "b"]}


def test_filters_drop_and_count(tmp_path):
  folder = pack_scores(tmp_path / "s")
  source = open_source(folder, rules=(("score", ">=", 1.5), ("tag", "==", "odd")),
                       facts=("number",))
  assert numbers(source) == [3, 5, 7, 9, 11] and source.count == 5
  # 0, 4 and 8 have none; 1 and 2 are below; 6 and 10 are left for the second rule.
  assert source.problems == {"score missing": 3, "score >= 1.5": 2, "tag == odd": 2}
  assert source.examples["score missing"].endswith("00000.tar")
  assert source.read(0)[0] == {"png": _png(3)} and source.name(2).endswith("00001.tar:000010002")
  kept = open_source(folder, rules=(("score", ">=", 4, "keep"), ("WIDTH", "<", 109)),
                     facts=("number",))
  assert numbers(kept) == [0, 4, 8]
  assert len({kept.digest, source.digest, open_source(folder).digest}) == 3
  with pytest.raises(UserError, match=r"no sample is left of 3 shards \(9 score >= 100, 3 score "):
    open_source(folder, rules=(("score", ">=", 100),))


def test_sizes_are_those_of_upright_pictures(make_shards):
  turned = '{"Image Orientation": "Rotated 90 CW"}'
  sides = ((12, 20), (9, 7))
  straight = open_source(str(make_shards(30, shard_size=7, side=lambda i: sides[i % 2])))
  found = straight.sizes(np.array([0, 1, 29, 8]))
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, [sides[0], sides[1], sides[1], sides[0]])
  lying = open_source(str(make_shards(1, name="b", side=(12, 20), json={"exif": turned})))
  np.testing.assert_array_equal(lying.sizes(np.array([0])), [[20, 12]])


def test_samples_without_a_picture_and_broken_shards_are_counted(make_shards):
  folder = without_sidecars(make_shards(40))
  second = folder / "00001.tar"
  second.write_bytes(second.read_bytes()[:20_000])
  source = open_source(str(folder))
  assert source.problems == {"truncated shard": 1} and 20 < source.count < 40
  assert source.examples == {"truncated shard": str(second)}
  write_tar(folder / "00002.tar", {name: b"" for name in ("0.jpg", "1.txt", "1.json", "2.txt")})
  again = open_source(str(folder))
  assert again.count == source.count + 1
  assert again.problems == {"truncated shard": 1, "no picture": 2}
  assert again.examples["no picture"].endswith("00002.tar")
  second.write_bytes(b"no tar" * 100)
  with pytest.raises(UserError, match="00001.tar"):
    open_source(str(folder))


def test_a_json_that_is_none_is_a_bad_sample_and_no_problem_of_the_source(tmp_path):
  shard = write_tar(tmp_path / "0.tar", {"a.png": _png(0), "a.json": b"{", "b.png": _png(1)})
  source = open_source(shard)
  assert source.count == 2 and not source.problems
  assert source.facts(0) == {} and source.facts(1) == {"caption": ""}


def test_sidecars_that_promise_too_much_make_missing_samples(make_shards):
  folder = make_shards(40)
  (folder / "00000_stats.json").write_text('{"successes": 25}')
  (folder / "00001_stats.json").write_text('{"successes": 1020}')    # beyond a row group
  source = open_source(str(folder))
  assert source.count == 1045
  assert source.name(25).endswith("00001.tar:000010000") and source.read(44)
  for sample in (20, 24, 45, 1044):
    with pytest.raises(images.BadPicture, match="missing sample"):
      source.read(sample)
    np.testing.assert_array_equal(source.sizes(np.array([sample])), [[0, 0]])
  # The first shard may hold nothing at all.
  write_tar(folder / "00000.tar", {"a.txt": b"no picture"})
  assert open_source(str(folder)).kind == "image"
  (folder / "00001.tar").unlink()
  with pytest.raises(UserError, match="not one of 25 samples"):
    open_source(str(folder))


def test_a_latents_cache_has_its_own_parts(tmp_path, make_shards):
  buffer = io.BytesIO()
  np.save(buffer, np.zeros((2, 2, 8), np.float16))
  cached = write_tar(tmp_path / "c.tar", {
      f"a.{part}": buffer.getvalue() if part == "moments.npy" else part.encode()
      for part in ("jpg", "moments.npy", "context.npy", "pooled.npy", "txt")})
  source = open_source(cached)
  assert source.kind == "moments" and list(source.read(0)[0]) == ["moments.npy"]
  source = open_source(cached, parts=("context.npy", "pooled.npy"))
  assert source.read(0) == ({"moments.npy": buffer.getvalue(), "context.npy": b"context.npy",
                             "pooled.npy": b"pooled.npy"}, {"caption": "txt"})
  both = open_source([cached, str(make_shards(3))])
  assert both.kind == "moments" and both.count == 4
  with pytest.raises(images.BadPicture, match="no moments"):
    both.read(1)


def test_digest_tells_data_sets_apart_but_not_places(make_shards, tmp_path):
  digest_of = lambda folder: open_source(str(folder)).digest
  folder = make_shards()
  digest = digest_of(folder)
  shutil.move(folder, tmp_path / "elsewhere")
  assert digest_of(tmp_path / "elsewhere") == digest
  others = [make_shards(49), make_shards(name="other", txt="other " * 500),
            make_shards(name="in other shards", shard_size=10)]
  assert len({digest, *map(digest_of, others)}) == 4


def test_a_shard_that_goes_missing_is_replaced_or_stops(make_shards):
  folder = make_shards()
  lenient, strict = (open_source(str(folder), strict=strict) for strict in (False, True))
  for source in (lenient, strict):
    source.read(21)              # its index is known, only the bytes have gone
  (folder / "00001.tar").unlink()
  (folder / "00002.tar").unlink()
  for sample in (22, 45):
    with pytest.raises(images.BadPicture, match="missing shard"):
      lenient.read(sample)
    with pytest.raises(Missing, match=f"0000{sample // 20}.tar"):
      strict.read(sample)
  assert lenient.read(3) and lenient.name(45).endswith("00002.tar, sample 5")


def test_a_shard_that_is_missing_from_the_start_is_counted_or_stops(make_shards, cache):
  folder = make_shards()
  (folder / "00001.tar").unlink()
  with FlakyServer(folder) as server:
    url = f"{server.url}/{{00000..00002}}.tar"
    source = open_source(url, store=Storage())
    assert source.count == 30 and source.problems == {"missing shard": 1}
    assert source.examples == {"missing shard": f"{server.url}/00001.tar"}
    assert source.name(20) == f"{server.url}/00002.tar:000020000"
    with pytest.raises(Missing, match="00001.tar"):
      open_source(url, strict=True, store=Storage())


@pytest.mark.parametrize("touched", [False, True])
def test_a_shard_that_changes_under_its_index_stops_with_its_name(make_shards, touched):
  folder = make_shards()
  source = open_source(str(folder))
  shard = folder / "00002.tar"
  if touched:                    # what is read then ends beyond the end of the new one
    source.read(49)
  shutil.copy(make_shards(2, name="less") / "00000.tar", shard)
  with pytest.raises(UserError, match="00002.tar"):
    source.read(49)
  assert open_source(str(without_sidecars(folder))).count == 42


def test_remote_shards_read_alike(make_shards, cache):
  folder = make_shards()
  local = open_source(str(folder), facts=("sha256",))
  with FlakyServer(folder) as server:
    remote = open_source(f"{server.url}/{{00000..00002}}.tar", facts=("sha256",),
                         store=Storage())
    assert remote.is_remote and remote.count == 50 and remote.digest == local.digest
    assert len(indices(cache)) == 1
    for sample in (0, 19, 20, 49):
      assert remote.read(sample) == local.read(sample)
    assert len(indices(cache)) == 3
    np.testing.assert_array_equal(remote.sizes(np.arange(50)), local.sizes(np.arange(50)))


def test_other_addresses(tmp_path, picture):
  (tmp_path / "a.png").write_bytes(picture(0))
  (tmp_path / "a.txt").write_text("a cat")
  source = open_source(str(tmp_path))
  assert isinstance(source, folder_source.Folder) and source.facts(0)["caption"] == "a cat"
  for address in (str(tmp_path), "tfds:cifar10@train"):
    with pytest.raises(UserError, match="no index .*score"):
      open_source(address, rules=(("score", ">", 1),))
  with pytest.raises(UserError, match="names no split|TensorFlow Datasets"):
    open_source("tfds:cifar10")
  with pytest.raises(UserError, match="does not exist"):
    open_source(str(tmp_path / "gone.tar"))
