import numpy as np
import pytest

from sdjax.data import plan
from sdjax.data.plan import Plan
from sdjax.errors import UserError


def single(count, batch_size=256, seed=0):
  return Plan((count,), (1.0,), batch_size, seed)


def batches(order, steps):                             # int64 [steps B]
  return np.stack([order.rows(step).sample for step in steps])


@pytest.mark.parametrize("count", [1, 2, 7, 24, 100, 1000, 100_000])
@pytest.mark.parametrize("batch_size", [1, 8, 24, 100, 256])
def test_every_epoch_visits_each_sample_once(count, batch_size):
  order = single(count, batch_size, seed=5)
  epochs = order.at(np.arange(3 * count)).sample.reshape(3, count)
  np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(count), (3, count)))
  step = 2 * count // batch_size                       # wherever it lies, steps are cut from this
  first = step * batch_size
  np.testing.assert_array_equal(
      order.rows(step).sample[:3 * count - first], epochs.ravel()[first:first + batch_size])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_rows_of_processes_make_the_global_batch(processes):
  order = Plan((1000, 30, 300_000), (3, 1, 2), 24, seed=3)
  rows = [slice(i * 24 // processes, (i + 1) * 24 // processes) for i in range(processes)]
  for step in (0, 1, 17, 10**7):
    parts = [order.rows(step, part) for part in rows]
    for whole, *columns in zip(order.rows(step), *parts, strict=True):
      np.testing.assert_array_equal(np.concatenate(columns), whole)


@pytest.mark.parametrize("shards", [100, 10])
def test_batches_mix_shards_like_a_perfect_shuffle(shards):
  count, batch_size, steps = 100_000, 256, 390
  shard = batches(single(count, batch_size), range(steps)) // (count // shards)
  held = np.stack([np.bincount(row, minlength=shards) for row in shard])
  chance = (count // shards - 1) / (count - 1)
  # Pairs from one shard: within a batch, and across two consecutive ones.
  within = np.sum(held * (held - 1) / 2) / (steps * batch_size * (batch_size - 1) / 2)
  across = np.sum(held[1:] * held[:-1]) / ((steps - 1) * batch_size**2)
  assert abs(within / chance - 1) < 0.05
  assert abs(across / chance - 1) < 0.05
  # Nor does a row of the batch prefer a region: each reads all over the data.
  assert abs(shard.mean() / ((shards - 1) / 2) - 1) < 0.02


@pytest.mark.parametrize("count", [262_144, 1_000_003])  # the first: all stretches equally long
def test_a_process_reads_few_units_each_from_end_to_end(count):
  order, steps = single(count), range(100, 484)
  for process in (0, 3):
    rows = slice(process * 64, process * 64 + 64)
    of_row = np.stack([order.rows(step, rows).sample for step in steps])
    # The next sample of a unit is read 8 steps later in the same row; a unit holds 16.
    follows = of_row[8:] == of_row[:-8] + 1
    assert abs(follows.mean() - 15 / 16) < 0.01   # a stretch also has ends
    # New units come evenly, not all readers in one step.
    assert np.ptp((~follows).sum(1)) < 20 and (~follows).sum(1).mean() == pytest.approx(4, abs=0.4)
    # What is read are whole units, but for those that 512 readers have open at either end.
    assert len(np.unique(of_row)) == of_row.size
    stretches = of_row.size - np.isin(of_row - 1, of_row).sum()
    assert of_row.size / 16 < stretches < of_row.size / 16 + 512


def test_units_have_other_bounds_in_each_epoch():
  count, columns = 300_000, 2048
  bounds = set()
  for epoch in range(8):
    turns = single(count).at(epoch * count + np.arange(8 * columns)).sample.reshape(8, columns)
    begun = turns[1:][turns[1:] != turns[:-1] + 1] % 16
    bounds.add(int(np.bincount(begun).argmax()))
  assert len(bounds) > 2                               # 6.5 of 16 by chance


def test_small_sources_are_shuffled_sample_by_sample():
  samples = batches(single(10_000), range(39)).ravel()
  assert np.sum(np.abs(samples[2048:] - samples[:-2048]) == 1) < 10    # 2 by chance
  # |difference| of two random samples averages count / 3.
  assert abs(np.abs(np.diff(samples)).mean() / (10_000 / 3) - 1) < 0.02


@pytest.mark.parametrize("count, orders, limit", [(3, 6, 20.5), (5, 120, 173)])
def test_small_permutations_are_all_equally_likely(count, orders, limit):
  epochs = single(count, 7).at(np.arange(200 * orders * count)).sample.reshape(-1, count)
  found, times = np.unique(epochs, axis=0, return_counts=True)
  assert len(found) == orders
  # Chi-square with orders - 1 degrees of freedom; the limit is passed once in a thousand.
  assert np.sum((times - 200) ** 2 / 200) < limit


@pytest.mark.parametrize("count", [7, 24, 100])
def test_any_sample_may_come_first_whatever_the_seed(count):
  first = np.array([single(count, 8, seed).at(np.zeros(1, np.int64)).sample[0]
                    for seed in range(20 * count)])
  times = np.bincount(first, minlength=count)
  excess = np.sum((times - 20) ** 2 / 20) - (count - 1)
  assert excess < 4 * np.sqrt(2 * (count - 1))         # four standard deviations of chi-square


@pytest.mark.parametrize("count", [1000, 300_000])
def test_epochs_and_seeds_and_sources_differ(count):
  def epoch(order, number):
    return order.at(np.arange(1000) + number * count).sample

  pair = Plan((count, count), (1, 1), 256, 0).at(np.arange(2000))
  orders = [epoch(single(count), 0), epoch(single(count), 1), epoch(single(count, seed=1), 0),
            pair.sample[pair.source == 1]]
  # Two random orders agree in one place on average; 16 in a row where two units happen to meet.
  assert max(np.sum(a == b) for i, a in enumerate(orders) for b in orders[:i]) < 40


@pytest.mark.parametrize("parts", [(1,), (7, 2, 1), (1, 1, 1, 1, 1, 1, 1), (10, *[1] * 10),
                                   (37, 63), (97, 1, 1, 1)])
@pytest.mark.parametrize("batch_size", [8, 256])
def test_no_source_is_ever_a_sample_ahead_or_behind(parts, batch_size):
  total = sum(parts)
  order = Plan((1000,) * len(parts), [part / total for part in parts], batch_size, 0)
  for first in (0, 10**7 * batch_size // total * total):   # where all sources are exactly on time
    source = order.at(np.arange(first, first + 5000)).source
    drawn = np.cumsum(source[:, None] == np.arange(len(parts)), axis=0)
    assert np.abs(drawn - np.outer(np.arange(1, 5001), parts) / total).max() < 1


def test_mixed_sources_walk_strict_epochs():
  counts = (70, 23, 5000)
  drawn = Plan(counts, (0.7, 0.2, 0.1), 24, 1).at(np.arange(60_000))
  for number, count in enumerate(counts):
    samples = drawn.sample[drawn.source == number]
    epochs = samples[:len(samples) // count * count].reshape(-1, count)
    assert len(epochs) >= 1
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(count), epochs.shape))


def test_a_late_step_goes_on_where_the_closed_form_says():
  # After 10^7 steps of 10 rows, all three sources begin an epoch: 7 · 10^7 / 700 and so on.
  order = Plan((700, 200, 100), (0.7, 0.2, 0.1), 10, 2)
  position = 10**8 + np.arange(1000)
  late = order.at(position)
  np.testing.assert_array_equal(late.position, position)
  for number, count in enumerate(order.counts):
    samples = late.sample[late.source == number]
    np.testing.assert_array_equal(np.sort(samples), np.arange(count))
    before = order.at(position - 50)
    assert len(set(before.sample[before.source == number].tolist())) < count


def test_mixed_sources_are_read_from_end_to_end_too():
  order = Plan((400_000, 100_000), (0.8, 0.2), 40, 0)
  apart = 25                                           # 1024 columns in steps of 40, at least
  now, later = (order.rows(step) for step in (100, 100 + apart))
  np.testing.assert_array_equal(now.source, later.source)
  assert np.mean(later.sample == now.sample + 1) > 0.8


def test_a_huge_source_is_read_as_fast_as_a_small_one():
  order = Plan((5 * 10**9, 3), (0.5, 0.5), 256, 2**63)
  drawn = order.rows(10**7)
  big = drawn.sample[drawn.source == 0]
  assert len(set(big.tolist())) == len(big) == 128 and 0 <= big.min() and big.max() < 5 * 10**9
  assert big.max() > 4 * 10**9 and drawn.sample.dtype == np.int64


def test_epochs_are_counted_in_steps_of_the_longest_source():
  assert single(1000, 24).steps_per_epoch * 24 == 1000
  # 0.2 · 10 rows a step: 150 steps for 300 samples; 0.8 · 10 rows: 50 for 400.
  assert Plan((300, 400), (0.2, 0.8), 10, 0).steps_per_epoch == 150


@pytest.mark.parametrize("counts, weights, batch_size, told", [
    ((10,), (1,), 0, "batch_size 0"), ((10, 10), (1,), 4, "2 sources and 1 weights"),
    ((), (), 4, "0 sources"), ((10, 0), (1, 1), 4, "source 1 holds 0"),
    ((10, 10), (1, 0), 4, "weight 0 of source 1"), ((10,), (float("nan"),), 4, "weight nan"),
    ((10,), (float("inf"),), 4, "weight inf"), ((10, 10), (1, 1e-9), 4, "weight 1e-09 of source 1"),
])
def test_what_cannot_be_planned_is_refused(counts, weights, batch_size, told):
  with pytest.raises(UserError, match=told):
    Plan(counts, weights, batch_size, 0)


def test_draws_belong_to_the_position_alone():
  of_64 = plan.uniforms(9, plan.positions(1, 64), 5)
  of_16 = plan.uniforms(9, plan.positions(5, 16), 5)   # positions 80 … 95
  np.testing.assert_array_equal(of_64[16:32], of_16)
  many = plan.uniforms(9, np.arange(50_000), 4)
  assert many.min() >= 0 and many.max() < 1
  # Mean of n uniforms is 1/2 ± 1/sqrt(12 n); four standard errors.
  np.testing.assert_allclose(many.mean(0), 0.5, atol=4 / np.sqrt(12 * 50_000))
  assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.02
