"""The webdataset library reads tars as sdjax does: the same keys, parts, bytes and captions."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax import encode, prompt_list
from sdjax.data import index, pack, pipeline, shapes, sources, storage
from sdjax.data.prompt_files import Wanted

webdataset = pytest.importorskip("webdataset")

pytestmark = pytest.mark.oracle

IMG2DATASET = Path(__file__).parents[1] / "data" / "img2dataset"
CAPTIONS = ("a cat", "", "un café à Paris — 咖啡", "“quotes”\nand lines")


def theirs(folder):
  """Key → part → bytes, in the order of the tars."""
  tars = sorted(map(str, folder.glob("*.tar")))
  return {sample["__key__"]: {part: blob for part, blob in sample.items() if part[:2] != "__"}
          for sample in webdataset.WebDataset(tars, shardshuffle=False)}


def ours(folder):
  """The same by our indices, of the samples that have a picture or moments."""
  store, samples = storage.Storage(), {}
  for path in sorted(folder.glob("*.tar")):
    table = index.scan(store, str(path))
    parts = [name.removesuffix(".offset") for name in table.column_names
             if name.endswith(".offset")]
    for row in table.to_pylist():
      here = [part for part in parts if row[f"{part}.offset"] >= 0]
      extents = [(row[f"{part}.offset"], row[f"{part}.size"]) for part in here]
      samples[row["key"]] = dict(zip(here, store.read(str(path), extents), strict=True))
  return samples


def agree(folder, count):
  """Checks samples in their order, and what a run would be told of them."""
  found = theirs(folder)
  assert len(found) == count
  assert list(found) == list(ours(folder)) and found == ours(folder)
  source = sources.open_source(str(folder))
  decoded = webdataset.WebDataset(
      sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).decode("pil")
  for number, sample in enumerate(decoded):
    parts, facts = source.read(number)
    assert source.name(number).endswith(f":{sample['__key__']}")
    ((part, blob), *_) = parts.items()
    assert found[sample["__key__"]][part] == blob
    assert facts["caption"] == sample["txt"].strip()
    if part == index.MOMENTS:
      np.testing.assert_array_equal(pipeline.read_moments(blob), sample[part])
  assert number == source.count - 1


def test_packed_folders_are_read_alike(tmp_path):
  (tmp_path / "pictures" / "sub.folder").mkdir(parents=True)
  for number in range(23):
    name = tmp_path / "pictures" / ("sub.folder", "")[number % 2] / f"picture.{number}"
    Image.new("RGB", (20 + number, 30), (10 * number, 0, 0)).save(f"{name}.png")
    Path(f"{name}.txt").write_text(CAPTIONS[number % len(CAPTIONS)], encoding="utf-8")
  pack.pack(pack.find_sources(tmp_path / "pictures"), tmp_path / "pictures", tmp_path / "shards",
            shard_size=10)
  agree(tmp_path / "shards", 23)


def test_shards_of_sample_are_read_alike(tmp_path):
  wanted = [Wanted(prompt=prompt, negative_prompt="", seed=number, steps=4, guidance_scale=2.0,
                   height=16, width=24, line=number + 1, copy=0)
            for number, prompt in enumerate(2 * CAPTIONS)]
  job = prompt_list.Job(tmp_path / "out", wanted, {"model": "tiny"}, lambda one: "", 5, True)
  job.begin(job.made())
  noise = np.random.default_rng(0).integers(0, 256, (len(wanted), 16, 24, 3), np.uint8)
  job.save(list(range(len(wanted))), noise)
  job.finish()
  agree(tmp_path / "out", len(wanted))
  for sample, picture in zip(theirs(tmp_path / "out").values(), noise, strict=True):
    np.testing.assert_array_equal(Image.open(io.BytesIO(sample["png"])), picture)


def test_latents_caches_are_read_alike(tiny_model, tmp_path):
  pack.write_shards(shapes.samples(9, seed=0), tmp_path / "shards", shard_size=5)
  agree(tmp_path / "shards", 9)
  encode.run(*tiny_model, str(tmp_path / "shards"), tmp_path / "cache",
             encode.Options(resolution=16, text=True, shard_size=4, batch_size=4))
  agree(tmp_path / "cache", 9)
  pairs = zip(theirs(tmp_path / "shards").values(), theirs(tmp_path / "cache").values(),
              strict=True)
  for before, after in pairs:
    assert before["txt"] == after["txt"]
    assert {"moments.npy", "context.npy", "json"} <= after.keys() and "png" not in after


@pytest.mark.parametrize("made", ["served", "resized"])
def test_shards_of_img2dataset_are_read_alike(made):
  found = theirs(IMG2DATASET / made)
  assert len(found) > 5 and list(found) == list(ours(IMG2DATASET / made))
  assert found == ours(IMG2DATASET / made)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names_are_grouped_alike(form, tmp_path):
  names = ["000.jpg", "000.txt", "000.seg.png", "001.JPG", "001.Txt", "a/000.jpg", "a/000.json",
           "v1.0/002.extra.jpg", "v1.0/003.jpg", "./004.webp", "noextension", ".hidden.jpg",
           "._005.jpg", "005.jpg", "b/._006.png", "b/006.png", f"{90 * 'd'}/{90 * 'f'}.jpg",
           "größe/007.jpg", "trailing./008.jpg", "009..jpg", "lonely.txt", "__meta__.json"]
  with tarfile.open(tmp_path / "0.tar", "w", format=form) as file:
    for name in names:
      blob = b"" if name == "v1.0/003.jpg" else name.encode()
      member = tarfile.TarInfo(name)
      member.size = len(blob)
      file.addfile(member, io.BytesIO(blob))
  found = {key: parts for key, parts in theirs(tmp_path).items()
           if set(parts) & set(index.PICTURES)}
  assert len(found) == 10
  assert found == ours(tmp_path)
