"""What servers do to a run: the same batches, or an error that says why; never a hang."""

import itertools
import threading
import time

import numpy as np
import pytest
from flaky_server import FlakyServer

from sdjax.data import plan
from sdjax.data.pipeline import AHEAD, Options, Pipeline
from sdjax.data.sources import open_source
from sdjax.data.storage import Missing, Storage, Unreachable
from sdjax.errors import UserError

ROWS = 8
SHARDS = "/{00000..00002}.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Indices of remote shards go here, not into the user's home."""
  monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(make_shards):
  """Three shards with pictures of some 3 kB; 00001 holds one that is damaged."""
  return make_shards(48, shard_size=16, side=32, bad=(20,))


@pytest.fixture
def server(folder):
  with FlakyServer(folder) as server:
    yield server


def tokenize(texts):
  """The number in "picture 17": int32 [b 1]."""
  return np.array([[int(text.split()[1]) if text else -1] for text in texts], np.int32)


def make(source):
  """A pipeline that keeps no pixels, so that each row is read."""
  return Pipeline([source], batch_size=ROWS, seed=1, tokenize=tokenize, threads=2, cache_bytes=0,
                  options=Options(resolutions=((0, 16),)))


def opened(server, timeout_s=10.0, attempts=30, strict=False):
  """The three shards as the server has them, and the storage that reads them."""
  store = Storage(timeout_s, attempts, pause_s=1e-4)
  return open_source(server.url + SHARDS, strict=strict, store=store), store


def run(source, steps):
  """The batches of the first steps, and the counts by then."""
  pipeline = make(source)
  batches = pipeline.batches()
  taken = list(itertools.islice(batches, steps))
  batches.close()
  return taken, pipeline.counters


def wait_until(condition, seconds=10):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it took too long"
    time.sleep(0.002)


def test_a_failing_server_gives_the_same_batches(folder, server):
  expected, counts = run(open_source(str(folder)), 12)
  assert set(counts) == {"corrupt picture"}
  server.fail_share = server.cut_share = 0.15
  source, store = opened(server)
  found, remote_counts = run(source, 12)
  for batch, other in zip(found, expected, strict=True):
    for name in ("image", "tokens", "weight"):
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
  assert remote_counts == counts
  # Some 110 requests; less than 5 of one kind have a probability of 1e-4.
  assert store.counters["retried: HTTP 503"] >= 5 and store.counters["retried: short body"] >= 5


def samples_of(steps):
  """The samples that the first steps read."""
  return plan.Plan((48,), (1.0,), ROWS, seed=1).at(np.arange(steps * ROWS)).sample


def bytes_of(picture, steps):
  """What the pictures of the first steps have, and nothing else."""
  return sum(len(picture(int(sample), 32)) for sample in samples_of(steps))


@pytest.mark.parametrize("remote", [False, True])
def test_no_byte_is_read_but_the_pictures(make_shards, picture, remote):
  folder = make_shards(48, shard_size=16, side=32)
  with FlakyServer(folder) as server:
    store = Storage()
    source = open_source(server.url + SHARDS if remote else str(folder), store=store)
    run(source, 6)                                          # all samples: all shards are indexed
    before = store.counters["bytes"]
    batches = make(source).batches()
    for _ in range(30):
      next(batches)
    used = bytes_of(picture, 30 + AHEAD)
    wait_until(lambda: store.counters["bytes"] - before >= used)
    batches.close()
    assert store.counters["bytes"] - before == used


def test_a_stall_gives_what_was_read_ahead_and_then_an_error(make_shards, picture):
  with FlakyServer(make_shards(48, shard_size=16, side=32)) as server:
    timeout_s, attempts = 0.2, 2
    source, store = opened(server, timeout_s=timeout_s, attempts=attempts)
    expected, _ = run(source, 6)
    before = store.counters["bytes"]
    batches = make(source).batches()
    next(batches)
    wait_until(lambda: store.counters["bytes"] - before == bytes_of(picture, 1 + AHEAD))
    server.stall_share, server.stall_s = 1.0, 60.0
    began = time.monotonic()
    for number in range(1, 1 + AHEAD):                      # read before the server fell silent
      np.testing.assert_array_equal(next(batches)["image"], expected[number]["image"])
    with pytest.raises(Unreachable, match=f"{server.url}/0000[0-2].tar.* timeout.* 2 attempts"):
      next(batches)
    assert time.monotonic() - began < 10 * timeout_s * attempts
    assert not {"read", "decode"} & {thread.name[:4] for thread in threading.enumerate()}


def test_a_server_that_comes_back_is_waited_for(server):
  source, store = opened(server)
  expected, _ = run(source, 8)
  batches = make(source).batches()
  found = [next(batches)]
  server.status, server.times = 500, 40
  found += itertools.islice(batches, 7)
  batches.close()
  for batch, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(batch["image"], other["image"])
  assert store.counters["retried: HTTP 500"] == 40


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_read_is_told_at_once(server, status):
  source, store = opened(server)
  batches = make(source).batches()
  next(batches)
  server.status = status
  with pytest.raises(UserError, match=rf"{server.url}/0000[0-2].tar .*HTTP {status}"):
    list(itertools.islice(batches, 2 + AHEAD))
  with pytest.raises(UserError, match=rf"{server.url}/0000[0-2].tar .*HTTP {status}"):
    opened(server)
  assert not any(what.startswith("retried") for what in store.counters)


@pytest.mark.parametrize("strict", [False, True])
def test_a_shard_that_goes_missing_is_replaced_and_counted_or_stops(folder, server, strict):
  source, _ = opened(server, strict=strict)
  run(source, 6)
  (folder / "00001.tar").unlink()
  if strict:
    with pytest.raises(Missing, match=f"{server.url}/00001.tar"):
      run(source, 12)
    return
  batches, counters = run(source, 12)
  numbers = np.concatenate([batch["tokens"][:, 0, 0] for batch in batches])
  order = samples_of(12)
  is_missing = order // 16 == 1
  np.testing.assert_array_equal(numbers[~is_missing], order[~is_missing])
  assert not np.any(numbers // 16 == 1)
  assert set(counters) == {"missing shard"}
  assert counters["missing shard"] >= is_missing.sum() == 32
