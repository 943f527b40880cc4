"""Batches against the plan; and what must not change them: stopping, processes, threads, caches."""

import io
import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from sdjax.data import buckets, pack, plan
from sdjax.data.captions import Captions
from sdjax.data.pipeline import Options, Pipeline, facts_wanted
from sdjax.data.sources import open_source
from sdjax.errors import UserError

PLAIN = {"captions": Captions(), "flip": False}
BUCKETS = {"resolutions": ((0, 256),), "bucket": True}   # 256 x 256, 192 x 320, 320 x 192


def tokenize(texts):
  """The number in "picture 17", and -1 for the empty caption: int32 [b 2]."""
  return np.array([[int(t.split()[1]) if t else -1, len(t)] for t in texts], np.int32)


def opened(address, **options):
  wanted = facts_wanted(Options(resolutions=(), size_condition=True))
  return open_source(str(address), **{"facts": wanted, **options})


def make(source, weights=(1.0,), **changes):
  """A pipeline of one source, or of a list of them; changes are of its arguments or options."""
  arguments = {"batch_size": 8, "seed": 3, "tokenize": tokenize, "threads": 2}
  arguments |= {name: changes.pop(name) for name in (*arguments, "cache_bytes") if name in changes}
  options = {"resolutions": ((0, 12),), "captions": Captions(dropout=0.2), "flip": True, **changes}
  return Pipeline(source if isinstance(source, list) else [source], weights,
                  options=Options(**options), **arguments)


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


def joined(parts):
  """Batches of several processes as those of one."""
  return [{name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
          for batches in zip(*parts, strict=True)]


def numbers(batches):
  return np.concatenate([batch["tokens"][:, 0, 0] for batch in batches])


def pixels_of(number, side=12):
  return np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)


def landscape_or_not(number):
  """Height and width: squares and others, some beyond all buckets."""
  return ((12, 12), (12, 20), (20, 12), (8, 30))[number % 4]


def test_a_batch_holds_what_the_plan_says(fifty):
  order = plan.Plan((50,), (1.0,), 8, seed=3)
  for step, batch in enumerate(take(make(fifty, **PLAIN), 10)):
    ids = order.rows(step).sample
    np.testing.assert_array_equal(batch["tokens"][:, 0, 0], ids)
    assert batch["tokens"].shape == (8, 1, 2) and batch["tokens"].dtype == np.int32
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["weight"], np.ones(8, np.float32))
    np.testing.assert_array_equal(batch["image"], [pixels_of(sample) for sample in ids])


def test_sources_are_mixed_by_their_weights(make_shards, fifty):
  some = opened(make_shards(7, first=100))
  batches = take(make([fifty, some], (3.0, 1.0), **PLAIN), 14)
  order = plan.Plan((50, 7), (3.0, 1.0), 8, 3)
  drawn = [order.rows(step) for step in range(14)]
  expected = np.concatenate([d.sample + 100 * d.source for d in drawn])
  np.testing.assert_array_equal(numbers(batches), expected)
  np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in batches]),
                                [pixels_of(number) for number in expected])
  # 28 of 112 rows: each of the seven samples comes once in each of four epochs.
  np.testing.assert_array_equal(np.bincount(expected)[100:], [4] * 7)
  with pytest.raises(UserError, match="2 sources and 1 weights"):
    make([fifty, some])


def assert_stops_and_processes_do_not_matter(new, starts=(1, 7, 8, 13, 39), steps=14):
  """`new` makes the pipeline, as each process and each run would."""
  whole = take(new(), max(*starts, steps) + 3)
  for start in starts:
    same(take(new(), 3, start), whole[start:start + 3])
  for processes in (2, 4, 8):
    share = 8 // processes
    parts = [take(new(), steps, rows=slice(i * share, (i + 1) * share)) for i in range(processes)]
    same(joined(parts), whole[:steps])


@pytest.mark.parametrize("options", [
    {}, {"random_crop": True, "resolutions": ((0, 8),)}, {"cache_bytes": 0}, {"threads": 5},
    {"resolutions": ((0, 12), (6, 8), (13, 16)), "size_condition": True}])
def test_resuming_is_not_stopping_and_processes_make_one_batch(make_shards, options):
  source = opened(make_shards(side=landscape_or_not))
  assert_stops_and_processes_do_not_matter(lambda: make(source, **options))


def test_so_they_do_with_buckets(make_shards):
  source = opened(make_shards(20, side=landscape_or_not))
  assert_stops_and_processes_do_not_matter(
      lambda: make(source, **BUCKETS), starts=(1, 7, 8), steps=4)


def test_so_they_do_with_several_sources(make_shards, fifty):
  nine = opened(make_shards(9, first=100))
  assert_stops_and_processes_do_not_matter(lambda: make([nine, fifty], (1.0, 2.0)))


def test_two_resumes_in_a_row_are_not_stopping(fifty):
  whole, found, position = take(make(fifty), 20), [], make(fifty).position(0)
  for steps in (7, 6, 7):
    pipeline = make(fifty)
    start = pipeline.restore(json.loads(json.dumps(position)))
    found += take(pipeline, steps, start)
    position = pipeline.position(start + steps)
  same(found, whole)
  assert position["step"] == 20 and position["samples"] == 160


def test_cache_threads_and_random_choices_do_not_touch_each_other(fifty):
  plain = take(make(fifty), 20)
  same(take(make(fifty, cache_bytes=0), 20), plain)
  same(take(make(fifty, cache_bytes=3000, threads=1), 20), plain)
  # Switching caption drop-out off leaves the flips as they were.
  for a, b in zip(plain, take(make(fifty, captions=Captions()), 20), strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])


def test_the_cache_spares_reading_from_the_second_epoch_on(fifty, monkeypatch):
  read, reads = fifty.read, []
  monkeypatch.setattr(fifty, "read", lambda sample: reads.append(sample) or read(sample))
  for cache_bytes, kept in ((2**20, 50), (10 * pixels_of(0).nbytes, 10), (0, 0)):
    reads.clear()
    take(make(fifty, batch_size=10, cache_bytes=cache_bytes, threads=1), 20)  # four epochs
    times = np.bincount(reads)
    assert np.sum(times == 1) == kept and np.sum(times >= 4) == 50 - kept


def test_drop_out_flip_and_crop_happen_at_their_rates(make_shards):
  texts = {"captions": ["picture 1", "picture 2"]}
  source = opened(make_shards(1, json=texts))
  straight = take(make(source, flip=False), 1)[0]["image"][0]
  batches = take(make(source, batch_size=1000), 2)
  tokens = numbers(batches)
  flipped = np.array([np.array_equal(row, straight[:, ::-1])
                      for b in batches for row in b["image"]])
  # Standard deviations of these shares are 0.009 to 0.011.
  assert abs(np.mean(tokens == -1) - 0.2) < 0.04
  assert abs(np.mean(tokens == 1) - 0.4) < 0.04 and abs(np.mean(tokens == 2) - 0.4) < 0.04
  assert abs(np.mean(flipped) - 0.5) < 0.05
  wide = opened(make_shards(1, name="wide", side=(12, 40)))
  crops = take(make(wide, random_crop=True, batch_size=64), 1)[0]["image"]
  assert len(np.unique(crops.reshape(64, -1), axis=0)) > 30


def test_captions_are_made_as_the_options_say(make_shards):
  facts = {"blip": "<b>picture 2</b>, b, a", "alt": ["[picture 3", "picture 4"]}
  source = opened(make_shards(1, json=facts), facts=("blip", "alt"))
  heard = []

  def listen(texts):
    heard.extend(texts)
    return np.zeros((len(texts), 1), np.int32)

  for captions, expected in (
      (Captions(), {"picture 0"}),
      (Captions(column="alt", trigger="<sks>"), {"<sks>, [picture 3", "<sks>, picture 4"}),
      (Captions(column=("blip",), clean=True, shuffle_tags=True, keep_tags=1),
       {"picture 2, b, a", "picture 2, a, b"})):
    heard.clear()
    take(make(source, captions=captions, tokenize=listen, batch_size=64), 1)
    assert set(heard) - {""} == expected
  pipeline = make(source, captions=Captions(column="gone"))
  with pytest.raises(UserError, match="unreadable caption"):
    take(pipeline, 1)


def test_bad_samples_are_counted_and_replaced_alike_everywhere(make_shards):
  bad = (4, 5, 49)
  folder = make_shards(bad=bad)
  options = {"captions": Captions(), "max_bad_share": 0.2, "flip": False}
  pipeline = make(opened(folder), **options)
  whole = take(pipeline, 25)  # 200 rows: four epochs
  order = plan.Plan((50,), (1.0,), 8, seed=3).at(np.arange(25 * 8)).sample
  found, is_bad = numbers(whole), np.isin(order, bad)
  np.testing.assert_array_equal(found[~is_bad], order[~is_bad])
  assert is_bad.sum() == 12 and not set(found) & set(bad)
  assert len(set(found[is_bad])) > 6  # at random: no sample stands in for the same one each time
  for row in np.flatnonzero(is_bad):  # each row has its picture and its text of one sample
    np.testing.assert_array_equal(whole[row // 8]["image"][row % 8], pixels_of(found[row]))
  # A substitute may be bad itself, and counts.
  assert set(pipeline.counters) == {"corrupt picture"}
  assert 12 <= pipeline.counters["corrupt picture"] <= 16
  for processes in (2, 8):
    parts = [make(opened(folder), **options) for _ in range(processes)]
    share = 8 // processes
    same(joined([take(part, 25, rows=slice(i * share, (i + 1) * share))
                 for i, part in enumerate(parts)]), whole)
    assert sum((part.counters for part in parts), start=type(pipeline.counters)()) == (
        pipeline.counters)


def test_too_many_bad_samples_stop_the_run(make_shards):
  source = opened(make_shards(bad=range(0, 50, 10)))
  batches = make(source, batch_size=100).batches()
  for _ in range(9):
    next(batches)  # a tenth is bad, but 900 rows are too few to judge
  with pytest.raises(UserError, match="1[0-4]. of 1000 .*corrupt picture.*max_bad_share 0.05"):
    next(batches)
  all_bad = opened(make_shards(10, bad=range(10), name="bad"))
  with pytest.raises(UserError, match="32 samples in a row .*32 corrupt picture"):
    next(make(all_bad).batches())


def test_what_filters_drop_stops_no_run_and_is_not_named(make_shards):
  rules = (("caption_length", ">", len("picture 9")),)  # ten are dropped, four of forty are bad
  source = opened(make_shards(bad=range(0, 50, 10)), rules=rules)
  batches = make(source, batch_size=500, max_bad_share=0.05).batches()
  with pytest.raises(UserError, match=r"cannot be used \(\d+ corrupt picture\)"):
    for _ in range(2):
      next(batches)


def test_small_pictures_are_replaced(make_shards):
  source = opened(make_shards(20, side=lambda number: 6 if number == 11 else 12))
  pipeline = make(source, min_side_px=7, batch_size=20, **PLAIN)
  batch, = take(pipeline, 1)
  assert 11 not in batch["tokens"][:, 0, 0]
  assert set(pipeline.counters) == {"too small"}


def test_a_caption_that_cannot_be_read_is_a_skip(tmp_path, picture):
  samples = [{"png": picture(i), "txt": f"picture {i}"} for i in range(30)]
  pack.write_shards(samples, tmp_path / "s")
  path = tmp_path / "s/00000.tar"
  path.write_bytes(path.read_bytes().replace(b"picture 7\0", b"\xff\xff\xff\xff\xff\xff\xff 7\0"))
  pipeline = make(opened(path), batch_size=30, captions=Captions())
  batch, = take(pipeline, 1)
  assert set(pipeline.counters) == {"unreadable caption"} and pipeline.counters.total() <= 2
  assert 7 not in batch["tokens"][:, 0, 0]
  without = make(opened(path), batch_size=30, tokenize=None)
  assert set(take(without, 1)[0]) == {"image", "weight"} and not without.counters


def moments(number, shape=(2, 3, 8)):
  buffer = io.BytesIO()
  np.save(buffer, np.full(shape, number, np.float16))
  return {"moments.npy": buffer.getvalue(), "txt": f"picture {number}",
          "json": {"original_height": 480, "original_width": 960}}


def test_a_latents_cache_yields_moments(tmp_path, fifty):
  bad = {"moments.npy": b"\x93NUMPY", "txt": "picture 0"}
  pack.write_shards([bad, *map(moments, range(1, 9)), moments(9, (3, 3, 8))], tmp_path / "c")
  source = opened(tmp_path / "c")
  pipeline = make(source, **PLAIN, batch_size=10)
  batch = take(pipeline, 1)[0]
  assert batch["moments"].shape == (10, 2, 3, 8) and batch["moments"].dtype == np.float32
  np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0], batch["tokens"][:, 0, 0])
  # 0 is no array and 9 has another shape. Both may come again as substitutes.
  assert set(batch["tokens"][:, 0, 0]) >= set(range(1, 9))
  assert set(pipeline.counters) == {"corrupt moments", "moments of another shape"}
  for option in ({"flip": True}, {"random_crop": True}, BUCKETS,
                 {"resolutions": ((0, 64), (1, 128))}):
    with pytest.raises(UserError, match="moments"):
      make(source, **PLAIN | option)
  with pytest.raises(UserError, match="one kind"):
    make([source, fifty], (1.0, 1.0), **PLAIN)


def test_sdxl_is_told_sizes_of_cached_pictures_in_px(tmp_path):
  pack.write_shards([moments(0)], tmp_path / "c")
  batch, = take(make(opened(tmp_path / "c"), **PLAIN, resolutions=((0, 512),),
                     size_condition=True, batch_size=1), 1)
  # 480 x 960 becomes 512 x 1024, of which the middle was cut.
  np.testing.assert_array_equal(batch["size"], [[480, 960, 0, 256, 512, 512]])


@pytest.mark.parametrize("side, facts, expected", [
    ((24, 48), {}, [24, 48, 0, 6, 12, 12]),           # 12 x 24, its middle from column 6 on
    ((48, 24), {}, [48, 24, 6, 0, 12, 12]),
    ((24, 48), {"original_width": 960, "original_height": 480}, [480, 960, 0, 6, 12, 12]),
    # As img2dataset tells of a picture that lies on its side: sides as they are stored.
    ((24, 48), {"original_width": 960, "original_height": 480,
                "exif": '{"Image Orientation": "Rotated 90 CW"}'}, [960, 480, 6, 0, 12, 12]),
    ((12, 12), {"original_width": "?", "original_height": 9}, [12, 12, 0, 0, 12, 12])])
def test_sdxl_is_told_sizes_and_crops(make_shards, side, facts, expected):
  source = opened(make_shards(1, side=side, json=facts))
  batch, = take(make(source, size_condition=True, batch_size=2), 1)
  np.testing.assert_array_equal(batch["size"], [expected] * 2)
  assert batch["size"].dtype == np.int32


def test_the_crop_that_sdxl_is_told_is_where_the_pixels_are_from(tmp_path):
  columns = np.tile(np.arange(48, dtype=np.uint8)[:, None] * 5, (12, 1, 3))
  buffer = io.BytesIO()
  Image.fromarray(columns).save(buffer, "PNG")
  pack.write_shards([{"png": buffer.getvalue(), "txt": "picture 0"}], tmp_path / "s")
  pipeline = make(opened(tmp_path / "s"), random_crop=True, size_condition=True, batch_size=64)
  batch, = take(pipeline, 1)
  rows = batch["image"][:, 6, :, 0].astype(float) / 5
  mirrored = rows[:, 0] > rows[:, -1]
  assert 10 < mirrored.sum() < 54
  # Of a mirrored picture, the crop is counted from its new left edge.
  left = np.where(mirrored, 47 - rows[:, 0], rows[:, 0])
  np.testing.assert_allclose(batch["size"][:, 3], left, atol=0.8)
  assert np.ptp(left) > 25


def test_buckets_hold_every_picture_once_in_the_shape_that_suits(make_shards):
  source = opened(make_shards(48, side=landscape_or_not))
  order = buckets.BucketPlan(
      plan.Plan((48,), (1.0,), 8, 3),
      lambda _, samples: np.array([landscape_or_not(int(sample)) for sample in samples]),
      buckets.shapes(256))
  batches = take(make(source, **PLAIN | BUCKETS, size_condition=True), 6)
  assert sorted(numbers(batches)) == list(range(48))
  shapes = set()
  for step, batch in enumerate(batches):
    shape, drawn = order.batch(step)
    assert batch["image"].shape == (8, *shape, 3)
    np.testing.assert_array_equal(batch["tokens"][:, 0, 0], drawn.sample)
    np.testing.assert_array_equal(batch["size"][:, 4:], [shape] * 8)
    np.testing.assert_array_equal(batch["size"][:, :2],
                                  [landscape_or_not(sample) for sample in drawn.sample])
    shapes.add(shape)
  assert shapes == {(256, 256), (192, 320), (320, 192)}


def test_stages_change_the_size_and_nothing_else(fifty):
  staged = make(fifty, **PLAIN, resolutions=((0, 12), (4, 8), (6, 24)))
  batches = take(staged, 8)
  assert [batch["image"].shape[1] for batch in batches] == [12] * 4 + [8] * 2 + [24] * 2
  assert [staged.side_at(step) for step in (3, 4, 1000)] == [12, 8, 24]
  np.testing.assert_array_equal(numbers(batches), numbers(take(make(fifty, **PLAIN), 8)))
  same(batches[:4], take(make(fifty, **PLAIN), 4))
  same(batches[6:], take(make(fifty, **PLAIN, resolutions=((0, 24),)), 2, 6))


def test_position_restores_and_names_what_differs(fifty, make_shards):
  position = json.loads(json.dumps(make(fifty).position(41)))
  assert make(fifty).restore(position) == 41
  less = opened(make_shards(49, name="b"))
  others = {"batch_size": make(fifty, batch_size=16), "seed": make(fifty, seed=4),
            "weights": make([fifty, less], (1.0, 1.0)), "data": make(less),
            "bucket": make(fifty, **BUCKETS), "decoder": make(fifty, decoder="exact"),
            "min_side_px": make(fifty, min_side_px=2)}
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


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_bug_in_a_thread_reaches_the_consumer(fifty, error):
  def broken(texts):
    if texts != [""]:
      raise error("boom")
    return tokenize(texts)
  with pytest.raises(error, match="boom"):
    next(make(fifty, tokenize=broken).batches())


@pytest.mark.parametrize("option, said", [
    ({"batch_size": 0}, "batch_size 0"), ({"weights": (-1.0,)}, "weight -1"),
    ({"decoder": "sharp"}, "'sharp'"), ({"bucket": True, "resolutions": ((0, 100),)}, "100 px")])
def test_values_out_of_range_are_user_errors(fifty, option, said):
  with pytest.raises(UserError, match=said):
    make(fifty, **option)


def test_importing_the_pipeline_imports_neither_jax_nor_transformers():
  code = ("import sys, sdjax.data.pipeline, sdjax.data.sources, sdjax.data.tokenizer, "
          "sdjax.data.pack, sdjax.data.inspection, sdjax.data.peek; "
          "print({'jax', 'transformers', 'tensorflow_datasets', 'fsspec'} & set(sys.modules))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"
