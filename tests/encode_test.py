"""A latents cache holds what the networks say of each picture, however often it was interrupted."""

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax import encode
from sdjax.data import images, latent_shards, pack, shapes
from sdjax.data.captions import Captions
from sdjax.data.pipeline import Options, Pipeline
from sdjax.data.sources import open_source
from sdjax.data.storage import Storage
from sdjax.errors import UserError

SMALL = encode.Options(resolution=16, text=True, shard_size=6, batch_size=4)


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
  """17 pictures; the fourth is cut off, and the sixth wears sizes and a score."""
  def samples():
    for number, sample in enumerate(shapes.samples(17, seed=0)):
      if number == 3:
        sample = sample | {"png": sample["png"][:60]}
      if number == 5:
        sample["json"] |= {"original_width": 640, "original_height": 960, "score": float("nan")}
      yield sample

  out = tmp_path_factory.mktemp("data") / "shards"
  pack.write_shards(samples(), out, shard_size=10)
  return str(out)


@pytest.fixture(scope="module")
def cache(tiny_model, urls, tmp_path_factory):
  """A cache of them with texts, never interrupted."""
  out = tmp_path_factory.mktemp("cache") / "out"
  return out, encode.run(*tiny_model, urls, out, SMALL)


def array(blob):
  return np.load(io.BytesIO(blob), allow_pickle=False)


def contents(folder):
  """Name → bytes of all files, but for what readers leave."""
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".parquet"}


def test_cache_holds_what_the_networks_say(tiny_model, urls, cache):
  sd, params = tiny_model
  out, result = cache
  assert (result.shards, result.planned, result.samples) == (3, 3, 16)
  assert result.size == sum(path.stat().st_size for path in out.glob("*.tar"))
  (failure,) = result.failures
  pictures = open_source(urls, parts=("txt", "json"))
  assert failure == pack.Failure(pictures.name(3), "corrupt picture")
  look, read = jax.jit(sd.moments), jax.jit(sd.encode_text)
  made = open_source(str(out), parts=("txt", "json", *latent_shards.STATES))
  assert made.kind == "moments" and made.count == 16
  assert made.name(3).endswith("00000.tar:000000004")  # what is left out keeps its number
  for number in (0, 5, 16):
    before, _ = pictures.read(number)
    after, _ = made.read(number - (number > 3))
    pixels = np.empty((16, 16, 3), np.float32)
    images.to_float(images.decode(before["png"], (16, 16)), pixels)
    moments = array(after["moments.npy"])
    assert moments.dtype == np.float16 and moments.shape == (4, 4, 8)
    np.testing.assert_allclose(moments, look(params, pixels[None])[0], atol=2e-3, rtol=2e-3)
    condition = read(params, sd.tokenize([before["txt"].decode()]))
    np.testing.assert_allclose(array(after["context.npy"]), condition.context[0], atol=2e-3,
                               rtol=1e-3)
    assert "pooled.npy" not in after and after["txt"] == before["txt"]
    known = json.loads(after["json"])
    size = known.pop("size")
    assert size == ([960, 640, 4, 0, 16, 16] if number == 5 else [32, 32, 0, 0, 16, 16])
    np.testing.assert_equal(known, json.loads(before["json"]))  # NaN is NaN


def test_interrupted_anywhere_is_bit_equal_to_undisturbed(tiny_model, urls, cache, tmp_path):
  whole = contents(cache[0])
  for stop in (0, 7, 13):
    out = tmp_path / str(stop)
    out.mkdir()
    (out / "empty.context.npy").write_bytes(b"of a process killed before it wrote the facts")

    def interrupted(items, count, stop=stop):
      yield from itertools.islice(items, stop)
      raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
      encode.run(*tiny_model, urls, out, SMALL, progress=interrupted)
    there = contents(out)
    assert sum(name.endswith(".tar") for name in there) == stop // 6
    assert json.loads(there["cache.json"])["complete"] is False
    (out / ".00002.tar.0123abcd").write_bytes(b"of a killed process")
    asked = []

    def counting(items, count, asked=asked):
      asked.append(count)
      return items

    encode.run(*tiny_model, urls, out, SMALL, progress=counting)
    assert asked == [17 - 6 * (stop // 6)]  # nothing twice
    assert contents(out) == whole


def test_processes_share_the_shards_and_the_last_completes(
    tiny_model, urls, cache, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for process, shards in ((1, 1), (0, 3)):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    result = encode.run(*tiny_model, urls, tmp_path / "out", SMALL)
    assert result.shards == shards
  assert contents(tmp_path / "out") == contents(cache[0])


def test_bucketed_shards_hold_one_shape_each(tiny_model, tmp_path, monkeypatch):
  monkeypatch.setattr(encode.buckets, "shapes", lambda side: [(24, 16), (16, 24)])
  def every_fourth_pixel(sd, params, image):  # in place of the autoencoder
    return np.repeat(image[:, ::4, ::4, :1], 8, axis=3).astype(np.float16)

  monkeypatch.setattr(encode, "_moments", every_fourth_pixel)
  folder = tmp_path / "pictures"
  folder.mkdir()
  rng = np.random.default_rng(0)
  sides = [(20, 40), (40, 20), (30, 28), (28, 30), (60, 40), (24, 16)]
  for number, (width, height) in enumerate(sides):
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"picture {number}")
  options = encode.Options(16, bucket=True, shard_size=2, batch_size=2)
  encode.run(*tiny_model, str(folder), tmp_path / "out", options)
  source = open_source(str(tmp_path / "out"), parts=("txt", "json"))
  found = [source.read(number)[0] for number in range(6)]
  order = [0, 3, 1, 2, 4, 5]  # tall ones first
  assert [parts["txt"].decode() for parts in found] == [f"picture {i}" for i in order]
  assert [array(parts["moments.npy"]).shape for parts in found] == 2 * [(6, 4, 8)] + 4 * [(4, 6, 8)]
  assert json.loads(found[0]["json"])["size"] == [40, 20, 4, 0, 24, 16]
  pixels = np.array(Image.open(folder / "5.png"))  # has the size already
  np.testing.assert_array_equal(array(found[5]["moments.npy"])[..., 0], pixels[::4, ::4, 0])


def test_the_trainer_reads_states_of_texts(tiny_model, cache):
  sd, params = tiny_model
  source = open_source(str(cache[0]), facts=("captions",), parts=latent_shards.STATES)
  caches = latent_shards.caches_of([source], Storage())
  empty = latent_shards.empty_text(caches, Storage())
  assert set(empty) == {"context"} and empty["context"].dtype == np.float32

  def batch(dropout, column=(), **how):
    options = Options(resolutions=((0, 16),), captions=Captions(dropout=dropout, column=column))
    batches = Pipeline([source], batch_size=16, seed=0, options=options, **how).batches()
    with_it = next(batches)
    batches.close()
    return with_it

  read = jax.jit(sd.encode_text)
  for dropout in (0.0, 0.5):
    states = batch(dropout, empty_text=empty)
    tokens = batch(dropout, "caption", tokenize=sd.tokenize)  # the first of several
    assert "tokens" not in states and states["context"].dtype == np.float32
    np.testing.assert_array_equal(states["moments"], tokens["moments"])
    expected = read(params, tokens["tokens"]).context
    np.testing.assert_allclose(states["context"], expected, atol=2e-3, rtol=1e-3)
    dropped = (states["context"] == empty["context"]).all(axis=(1, 2))
    np.testing.assert_array_equal(dropped, (tokens["tokens"] == sd.tokenize([""])).all(axis=(1, 2)))
    assert dropped.any() == bool(dropout)


def test_a_cache_that_the_run_would_not_have_made_is_refused(tiny_model, cache):
  sd, params = tiny_model
  caches = latent_shards.caches_of([open_source(str(cache[0]))], Storage())
  check = encode.check_caches
  check(caches, sd, params, 16, with_text=True)
  check({"old": None}, sd, {}, 99, with_text=False)  # made by others

  def moved(name):
    return params | {name: jax.tree.map(lambda leaf: leaf * np.float32(1.001), params[name])}

  # Neither the UNet nor an autoencoder's decoder has a part in what a cache holds.
  decoder = params | {"vae": params["vae"] | {"decoder": moved("vae")["vae"]["decoder"]}}
  check(caches, sd, moved("unet") | {"vae": decoder["vae"]}, 16, with_text=True)
  check(caches, sd, moved("text_encoder"), 16, with_text=False)
  with pytest.raises(UserError, match="^text of"):
    check(caches, sd, moved("text_encoder"), 16, with_text=True)
  with pytest.raises(UserError, match="^autoencoder of"):
    check(caches, sd, moved("vae"), 16, with_text=False)
  with pytest.raises(UserError, match="^resolution of .* 16, the run's is 32"):
    check(caches, sd, params, 32, with_text=False)
  (folder, facts), = caches.items()
  with pytest.raises(UserError, match="not complete"):
    check({folder: facts | {"complete": False}}, sd, params, 16, with_text=False)


def test_other_caches_and_impossible_sides_are_refused(tiny_model, urls, cache, tmp_path):
  def run(out, **changes):
    encode.run(*tiny_model, urls, out, dataclasses.replace(SMALL, **changes))

  with pytest.raises(UserError, match="other resolution, shards;"):
    run(cache[0], resolution=32)
  with pytest.raises(UserError, match="other text, states;"):
    run(cache[0], text=False)
  for what, changes in (("18", {"resolution": 18}), ("shard_size 0", {"shard_size": 0}),
                        ("batch_size is 0", {"batch_size": 0})):
    with pytest.raises(UserError, match=what):
      run(tmp_path / "new", **changes)
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken/notes.txt").write_text("mine")
  with pytest.raises(UserError, match="no latents cache"):
    run(tmp_path / "taken")
  with pytest.raises(UserError, match="URL"):
    run("gs://bucket/cache")
  with pytest.raises(UserError, match="holds latents"):
    encode.run(*tiny_model, str(cache[0]), tmp_path / "new", SMALL)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.mark.slow
def test_killed_and_shared_among_processes(tiny_model, urls, tmp_path):
  from sdjax.checkpoints import diffusers
  diffusers.save(tmp_path / "model", *tiny_model)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

  def start(out, *launcher):
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "sdjax.cli.main", "shards", "encode", "--model",
         str(tmp_path / "model"), "--resolution", "32", "--text", "--shard-size", "2",
         "--batch-size", "4", urls, str(tmp_path / out)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def finish(child):
    output, _ = child.communicate(timeout=400)
    assert child.returncode == 0, output
    return output

  assert "16 encoded pictures in 9 of 9 shards" in finish(start("whole"))
  whole = contents(tmp_path / "whole")
  for shards in (0, 3):
    child = start("killed")
    while child.poll() is None and len(list(tmp_path.glob("killed/*.tar"))) <= shards:
      time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
  assert len(list(tmp_path.glob("killed/*.tar"))) < 9
  finish(start("killed"))
  assert contents(tmp_path / "killed") == whole

  launcher = Path(__file__).parents[1] / "launch/local_multiprocess.py"
  told = finish(start("shared", str(launcher), "--processes", "2", "--devices", "2", "--",
                      sys.executable))
  assert "in 9 of 9 shards" in told
  shared = open_source(str(tmp_path / "shared"), parts=("txt", "json", *latent_shards.STATES))
  alone = open_source(str(tmp_path / "whole"), parts=("txt", "json", *latent_shards.STATES))
  assert shared.count == alone.count == 16
  for number in range(16):
    mine, other = shared.read(number)[0], alone.read(number)[0]
    assert mine.keys() == other.keys() and mine["json"] == other["json"]
    for part in ("moments.npy", "context.npy"):  # two pictures on each device, not four
      np.testing.assert_allclose(array(mine[part]), array(other[part]), atol=2e-3, rtol=2e-3)
