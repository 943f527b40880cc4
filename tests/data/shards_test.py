import io
import shutil
import tarfile

import numpy as np
import pytest

from sdjax.data import pack, shards
from sdjax.errors import UserError


def names(paths):
  return [path.rsplit("/", 1)[-1] for path in paths]


def test_expand_folder_glob_range_and_list(make_shards):
  folder = make_shards()  # 00000 … 00002
  assert names(shards.expand(folder)) == ["00000.tar", "00001.tar", "00002.tar"]
  assert names(shards.expand(f"{folder}/*1.tar")) == ["00001.tar"]
  assert names(shards.expand(f"{folder}/{{00001..00002}}.tar")) == ["00001.tar", "00002.tar"]
  assert names(shards.expand([f"{folder}/0000{{2,0}}.tar", str(folder)])) == [
      "00002.tar", "00000.tar", "00001.tar"]


@pytest.mark.parametrize("url, said", [
    ("{}/{{00001..00003}}.tar", "00003"),          # a gap in the range is named
    ("{}/*.zip", "no shards match"), ("{}/empty", "no .tar"), ("{}/none.tar", "does not exist"),
    ("{}/{{3..1}}.tar", "backwards"), ("gs://bucket/{{0..3}}.tar", "network"), ([], "no shards")])
def test_what_matches_nothing_is_a_user_error(make_shards, url, said):
  folder = make_shards()
  (folder / "empty").mkdir()
  with pytest.raises(UserError, match=said):
    shards.expand(url.format(folder) if isinstance(url, str) else url)


def test_index_reads_back_every_sample(make_shards):
  index = shards.build_index(make_shards())
  assert index.count == 50 and index.kind == "image" and not index.problems
  for sample in range(50):
    assert index.read(sample, ("txt", "jpg")) == {"txt": f"picture {sample}".encode()}
  assert set(index.read(7, ("png", "json", "moments.npy"))) == {"png", "json"}
  assert index.keys[20] == "000010000" and index.name(20).endswith("00001.tar:000010000")


def test_samples_without_a_picture_and_broken_shards_are_counted(make_shards, tmp_path):
  folder = make_shards(40, shard_size=20)
  second = folder / "00001.tar"
  second.write_bytes(second.read_bytes()[:20_000])
  index = shards.build_index(folder)
  assert index.problems == {"truncated shard": 1} and 20 < index.count < 40
  assert index.examples == {"truncated shard": str(second)}
  with tarfile.open(folder / "00002.tar", "w") as archive:
    for name in ("0.jpg", "1.txt", "1.json", "2.txt"):
      archive.addfile(tarfile.TarInfo(name))
  again = shards.build_index(folder)
  assert again.count == index.count + 1
  assert again.problems == {"truncated shard": 1, "no picture": 2}
  assert again.examples["no picture"].endswith("00002.tar:1")
  (folder / "00001.tar").write_bytes(b"\0" * 10240)
  with pytest.raises(UserError, match="00001.tar"):
    shards.build_index(folder)


def test_digest_tells_data_sets_apart_but_not_places(make_shards, tmp_path):
  folder = make_shards()
  digest = shards.build_index(folder).digest()
  shutil.move(folder, tmp_path / "elsewhere")
  assert shards.build_index(tmp_path / "elsewhere").digest() == digest
  assert shards.build_index(make_shards(49)).digest() != digest
  assert shards.build_index(make_shards(name="other", txt="other")).digest() != digest


def test_a_latents_cache_and_pictures_do_not_mix(make_shards, tmp_path):
  buffer = io.BytesIO()
  np.save(buffer, np.zeros((2, 2, 8), np.float16))
  pack.write_shards([{"moments.npy": buffer.getvalue(), "txt": "a"}], tmp_path / "cache")
  assert shards.build_index(tmp_path / "cache").kind == "moments"
  with pytest.raises(UserError, match=r"50 of 51"):
    shards.build_index([str(tmp_path / "cache"), str(make_shards())])
