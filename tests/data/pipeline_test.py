import io
import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from sdjax.data import pack, plan, shards
from sdjax.data.pipeline import Pipeline
from sdjax.errors import UserError


def tokenize(texts):
  """The number in "picture 17", and -1 for the empty caption: int32 [b 2]."""
  return np.array([[int(t.split()[1]) if t else -1, len(t)] for t in texts], np.int32)


def make(index, **options):
  return Pipeline(index, **{"batch_size": 8, "seed": 3, "size": (12, 12), "tokenize": tokenize,
                            "caption_dropout": 0.2, "flip": True, **options})


def take(pipeline, n, start=0, rows=slice(None)):
  batches = pipeline.batches(start, rows)
  taken = list(itertools.islice(batches, n))
  batches.close()
  return taken


def same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_a_batch_holds_what_the_plan_says(fifty):
  for step, batch in enumerate(take(make(fifty, caption_dropout=0.0, flip=False), 10)):
    ids = plan.sample_ids(3, step, 8, 50)
    np.testing.assert_array_equal(batch["tokens"][:, 0, 0], ids)
    assert batch["tokens"].shape == (8, 1, 2) and batch["tokens"].dtype == np.int32
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["weight"], np.ones(8, np.float32))
    for row, sample in zip(batch["image"], ids, strict=True):
      pixels = np.random.default_rng(sample).integers(0, 256, (12, 12, 3), np.uint8)
      np.testing.assert_allclose(row, pixels / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"random_crop": True, "size": (8, 6)}, {"cache_bytes": 0},
                                     {"threads": 5}])
def test_resuming_is_not_stopping_and_processes_make_one_batch(fifty, options):
  whole = take(make(fifty, **options), 16)
  for start in (1, 7, 13):
    same(take(make(fifty, **options), 16 - start, start), whole[start:])
  for processes in (2, 4):
    share = 8 // processes
    parts = [take(make(fifty, **options), 16, rows=slice(i * share, (i + 1) * share))
             for i in range(processes)]
    same([{k: np.concatenate([b[k] for b in batch]) for k in batch[0]}
          for batch in zip(*parts, strict=True)], whole)


def test_cache_threads_and_random_choices_do_not_touch_each_other(fifty):
  plain = take(make(fifty), 20)
  same(take(make(fifty, cache_bytes=0), 20), plain)
  same(take(make(fifty, cache_bytes=3000, threads=1), 20), plain)
  # Switching caption drop-out off leaves the flips as they were.
  for a, b in zip(plain, take(make(fifty, caption_dropout=0.0), 20), strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])


def test_drop_out_flip_and_crop_happen_at_their_rates(make_shards):
  index = shards.build_index(make_shards(1, json={"captions": ["picture 1", "picture 2"]}))
  straight = take(make(index, flip=False), 1)[0]["image"][0]
  batches = take(make(index, batch_size=1000), 2)
  tokens = np.concatenate([b["tokens"][:, 0, 0] for b in batches])
  flipped = np.array([np.array_equal(row, straight[:, ::-1])
                      for b in batches for row in b["image"]])
  # Standard deviations of these shares are 0.009 to 0.011.
  assert abs(np.mean(tokens == -1) - 0.2) < 0.04
  assert abs(np.mean(tokens == 1) - 0.4) < 0.04 and abs(np.mean(tokens == 2) - 0.4) < 0.04
  assert abs(np.mean(flipped) - 0.5) < 0.05
  crops = take(make(index, size=(12, 6), random_crop=True, batch_size=64), 1)[0]["image"]
  assert len(np.unique(crops.reshape(64, -1), axis=0)) > 30


def test_bad_samples_are_counted_and_replaced_alike_everywhere(make_shards):
  index = shards.build_index(make_shards(bad=(4, 5, 49)))
  options = {"caption_dropout": 0.0, "max_bad_share": 0.1}
  pipeline = make(index, **options)
  whole = take(pipeline, 25)  # 200 rows: four epochs
  tokens = np.concatenate([b["tokens"][:, 0, 0] for b in whole])
  # 4 → 5 → 6 and 5 → 6 and 49 → 0, once in each epoch.
  assert pipeline.counters == {"corrupt picture": 4 * 4}
  np.testing.assert_array_equal(np.bincount(tokens, minlength=50)[[0, 4, 5, 6, 7, 49]],
                                [8, 0, 0, 12, 4, 0])
  halves = [make(index, **options) for _ in range(2)]
  parts = [take(half, 25, rows=rows)
           for half, rows in zip(halves, (slice(0, 4), slice(4, 8)), strict=True)]
  same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)], whole)
  assert halves[0].counters + halves[1].counters == pipeline.counters


def test_too_many_bad_samples_stop_the_run(make_shards):
  index = shards.build_index(make_shards(bad=range(0, 50, 10)))
  batches = make(index, batch_size=100).batches()
  for _ in range(9):
    next(batches)  # a tenth is bad, but 900 rows are too few to judge
  with pytest.raises(UserError, match="100 of 1000 .*corrupt picture.*max_bad_share"):
    next(batches)
  all_bad = shards.build_index(make_shards(10, bad=range(10), name="bad"))
  with pytest.raises(UserError, match="10 samples in a row"):
    next(make(all_bad).batches())


def test_a_caption_that_cannot_be_read_is_a_skip(tmp_path, picture):
  samples = [{"png": picture(i), "txt": f"picture {i}"} for i in range(30)]
  pack.write_shards(samples, tmp_path / "s")
  path = tmp_path / "s/00000.tar"
  path.write_bytes(path.read_bytes().replace(b"picture 7\0", b"\xff\xff\xff\xff\xff\xff\xff 7\0"))
  pipeline = make(shards.build_index(path), batch_size=30)
  take(pipeline, 1)
  assert pipeline.counters == {"unreadable caption": 1}
  without = make(shards.build_index(path), batch_size=30, tokenize=None)
  assert set(take(without, 1)[0]) == {"image", "weight"} and not without.counters


def test_a_latents_cache_yields_moments(tmp_path):
  def sample(i, shape=(2, 3, 8)):
    buffer = io.BytesIO()
    np.save(buffer, np.full(shape, i, np.float16))
    return {"moments.npy": buffer.getvalue(), "txt": f"picture {i}"}
  bad = {"moments.npy": b"\x93NUMPY", "txt": "picture 0"}
  pack.write_shards([bad, *(sample(i) for i in range(1, 9)), sample(9, (3, 3, 8))], tmp_path / "c")
  index = shards.build_index(tmp_path / "c")
  pipeline = make(index, flip=False, caption_dropout=0.0, batch_size=10)
  batch = take(pipeline, 1)[0]
  assert batch["moments"].shape == (10, 2, 3, 8) and batch["moments"].dtype == np.float32
  np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0], batch["tokens"][:, 0, 0])
  # 9 has another shape and goes to 0, which is no array and goes to 1; so does 0 itself.
  assert pipeline.counters == {"corrupt moments": 2, "moments of another shape": 1}
  with pytest.raises(UserError, match="flip"):
    make(index)


def test_position_restores_and_names_what_differs(fifty, make_shards):
  position = json.loads(json.dumps(make(fifty).position(41)))
  assert make(fifty).restore(position) == 41
  others = {"batch_size": make(fifty, batch_size=16), "seed": make(fifty, seed=4),
            "samples": make(shards.build_index(make_shards(49, name="b"))),
            "data": make(shards.build_index(make_shards(txt="picture 123", name="c")))}
  for field, other in others.items():
    with pytest.raises(UserError, match=f"data's {field} "):
      other.restore(position)


def test_look_ahead_is_bounded_and_closing_ends_the_threads(fifty):
  before = threading.active_count()
  seen = []

  def counting(texts):
    seen.append(len(texts))
    return tokenize(texts)

  batches = make(fifty, tokenize=counting).batches()
  for _ in range(5):
    next(batches)
  assert threading.active_count() > before
  batches.close()
  assert threading.active_count() == before
  assert sum(seen) <= 1 + 8 * (5 + 2)


def test_a_bug_in_a_thread_reaches_the_consumer(fifty):
  def broken(texts):
    if texts != [""]:
      raise RuntimeError("boom")
    return tokenize(texts)
  with pytest.raises(RuntimeError, match="boom"):
    next(make(fifty, tokenize=broken).batches())


def test_a_missing_shard_is_an_error_not_a_skip(make_shards):
  folder = make_shards()
  pipeline = make(shards.build_index(folder))
  (folder / "00001.tar").unlink()
  with pytest.raises(FileNotFoundError, match="00001"):
    take(pipeline, 3)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"caption_dropout": 1.5}])
def test_values_out_of_range_are_user_errors(fifty, option):
  with pytest.raises(UserError, match=next(iter(option))):
    make(fifty, **option)


def test_importing_the_pipeline_imports_neither_jax_nor_transformers():
  code = ("import sys, sdjax.data.pipeline, sdjax.data.tokenizer, sdjax.data.pack, "
          "sdjax.data.inspection; print({'jax', 'transformers'} & set(sys.modules))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"
