"""Caches of several shapes, made here without an autoencoder, and what training makes of them."""

import itertools
import json

import numpy as np
import pytest
from flaky_server import FlakyServer

from sdjax.data import latent_shards, pack
from sdjax.data.captions import Captions
from sdjax.data.pipeline import Options, Pipeline
from sdjax.data.sources import open_source
from sdjax.data.storage import Storage
from sdjax.errors import UserError

SIZES = [(24, 16), (16, 16), (16, 24)]
FACTS = {"text": {"text_encoder": "0123"}, "states": ["context.npy", "pooled.npy"]}
EMPTY = {"context.npy": np.full((2, 3), -1, np.float16),
         "pooled.npy": np.full(4, -1, np.float16)}


class Pictures:
  """A source whose samples have known sizes and nothing else; sample 7 is of no known size."""
  count, kind, is_remote = 40, "image", False

  def sizes(self, samples):
    sides = np.array([(30, 20), (100, 99), (99, 100), (20, 30), (20, 80)])[samples % 5]
    return np.where(samples[:, None] == 7, 0, sides)


def sample_of(number, size):
  """A sample whose arrays tell its number."""
  moments = np.full((size[0] // 8, size[1] // 8, 8), number, np.float16)
  return {"moments.npy": latent_shards.npy(moments), "txt": f"picture {number}".encode(),
          "json": json.dumps({"size": [number] * 6, "score": number}).encode(),
          "context.npy": latent_shards.npy(np.full((2, 3), number, np.float16)),
          "pooled.npy": latent_shards.npy(np.full(4, number, np.float16))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A cache of the 40 pictures in shards of 7; sample 11 is left out."""
  out = tmp_path_factory.mktemp("cache") / "out"
  shards = latent_shards.plan(Pictures(), SIZES, 7)
  writer = latent_shards.Writer(out, FACTS, shards)
  writer.begin(lambda: EMPTY)
  for shard in writer.missing():
    writer.write(shard, [pack.Failure("11", "bad") if number == 11 else
                         sample_of(number, shard.size) for number in shard.samples.tolist()])
  assert writer.finish().failures == [pack.Failure("11", "bad")]
  return out


def parts_of(address, **options):
  address = address if isinstance(address, list) else str(address)
  source = open_source(address, facts=("size",), parts=latent_shards.STATES, **options)
  caches = latent_shards.caches_of([source], Storage())
  return source, latent_shards.by_shape(source, caches), caches


def test_each_sample_goes_to_the_size_that_crops_it_least():
  shards = latent_shards.plan(Pictures(), SIZES, 7)
  assert [len(shard.samples) for shard in shards] == [7, 1, 7, 7, 2, 7, 7, 2]
  of = {size: np.concatenate([shard.samples for shard in shards if shard.size == size])
        for size in SIZES}
  numbers = np.arange(40)
  np.testing.assert_array_equal(of[24, 16], numbers[numbers % 5 == 0])
  np.testing.assert_array_equal(of[16, 16], numbers[np.isin(numbers % 5, (1, 2))])
  np.testing.assert_array_equal(of[16, 24], numbers[numbers % 5 > 2])
  assert len(latent_shards.plan(Pictures(), [(16, 16)], 40)) == 1  # asks for no size


def test_a_source_is_split_by_shape_and_nothing_is_lost(folder):
  source, parts, _ = parts_of(folder)
  assert [part.count for part in parts] == [8, 15, 16]  # 11 is not there
  names = [part.name(sample) for part in parts for sample in range(part.count)]
  assert names == [source.name(sample) for sample in range(source.count)]
  digests = [part.digest for part in parts]
  assert len(set(digests)) == 3
  some = [f"{folder}/{number:05d}.tar" for number in (6, 0, 5, 3)]  # of any number, in any order
  source, parts, _ = parts_of(some)
  assert [part.count for part in parts] == [14, 7, 7]
  assert [part.name(part.count - 1).rpartition("/")[2].partition(":")[0] for part in parts] == [
      "00005.tar", "00000.tar", "00003.tar"]


def batches_of(parts, n, rows=slice(None), **options):
  """The first n batches of 4 rows."""
  pipeline = Pipeline(parts, [part.count for part in parts], batch_size=4, seed=2,
                      options=Options(resolutions=((0, 16),), size_condition=True, **options),
                      empty_text={name.removesuffix(".npy"): array.astype(np.float32)
                                  for name, array in EMPTY.items()})
  batches = pipeline.batches(0, rows)
  taken = list(itertools.islice(batches, n))
  batches.close()
  assert not pipeline.counters
  return taken


def test_batches_have_one_shape_each_and_read_every_sample_once(folder):
  _, parts, _ = parts_of(folder)
  batches = batches_of(parts, 39)  # 4 epochs: 156 rows of 39 samples
  seen = {}
  for batch in batches:
    number = batch["moments"][:, 0, 0, 0]
    np.testing.assert_array_equal(batch["moments"], np.broadcast_to(
        number[:, None, None, None], batch["moments"].shape))
    for name in ("context", "pooled", "size"):
      assert (batch[name].reshape(4, -1) == number[:, None]).all(), name
    seen.setdefault(batch["moments"].shape[1:3], []).extend(number.astype(int).tolist())
  assert {shape: len(numbers) for shape, numbers in seen.items()} == {
      (3, 2): 32, (2, 2): 60, (2, 3): 64}
  for shape, part in zip(((3, 2), (2, 2), (2, 3)), parts, strict=True):
    for epoch in np.array(seen[shape]).reshape(4, part.count):
      assert len(set(epoch)) == part.count
  assert set(sum(seen.values(), [])) == set(range(40)) - {11}

  halves = [batches_of(parts, 39, rows) for rows in (slice(0, 2), slice(2, 4))]
  for batch, first, second in zip(batches, *halves, strict=True):
    for name in batch:
      np.testing.assert_array_equal(batch[name], np.concatenate([first[name], second[name]]))


def test_dropped_captions_have_the_states_of_the_empty_text(folder):
  _, parts, caches = parts_of(folder)
  empty = latent_shards.empty_text(caches, Storage())
  for name, array in EMPTY.items():
    np.testing.assert_array_equal(empty[name.removesuffix(".npy")], array)
  rows = [row for batch in batches_of(parts, 100, captions=Captions(dropout=0.3))
          for row in zip(batch["moments"][:, 0, 0, 0], batch["context"][:, 0, 0],
                         batch["pooled"][:, 0], strict=True)]
  dropped = np.array([context == -1 for _, context, _ in rows])
  assert abs(dropped.mean() - 0.3) < 0.07  # three deviations
  assert all(context == pooled and context in (number, -1) for number, context, pooled in rows)


def test_a_shape_may_be_filtered_away(folder):
  _, parts, _ = parts_of(folder, rules=[("score", "in", (1, 2, 3))])
  assert [part.count for part in parts] == [2, 1]
  assert parts[0].problems["score in 1,2,3"] == 36 and not parts[1].problems


def test_caches_on_the_network_and_those_that_tell_nothing(folder, make_shards, monkeypatch,
                                                           tmp_path):
  monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "indices"))
  with FlakyServer(folder) as server:
    _, parts, caches = parts_of(f"{server.url}/{{00000..00007}}.tar")
    assert list(caches) == [server.url] and len(parts) == 3
    assert set(latent_shards.empty_text(caches, Storage())) == {"context", "pooled"}
  shard = (folder / "00000.tar").read_bytes()
  (tmp_path / "old").mkdir()
  (tmp_path / "old/00000.tar").write_bytes(shard)
  source, parts, caches = parts_of(tmp_path / "old")
  assert parts == [source] and list(caches.values()) == [None]
  assert latent_shards.empty_text(caches, Storage()) is None
  pictures = open_source(str(make_shards(3)))
  assert latent_shards.caches_of([pictures], Storage()) == {}
  assert latent_shards.by_shape(pictures, {}) == [pictures]
  for text in ("{", "[]", '{"format": 0}'):
    (tmp_path / "old/cache.json").write_text(text)
    with pytest.raises(UserError, match="cache.json .*encode the pictures again"):
      parts_of(tmp_path / "old")
