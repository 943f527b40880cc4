import numpy as np
import pytest

from sdjax.data import plan


@pytest.mark.parametrize("count, batch_size", [(1, 1), (1, 5), (2, 3), (20, 64), (1000, 7),
                                               (4097, 256)])
def test_every_epoch_visits_each_sample_once(count, batch_size):
  epochs = 3
  steps = -(-epochs * count // batch_size)
  ids = np.concatenate([plan.sample_ids(5, s, batch_size, count) for s in range(steps)])
  for epoch in ids[:epochs * count].reshape(epochs, count):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_a_hundred_thousand_ids_are_a_permutation_that_looks_random():
  count, shard = 100_000, 1000
  ids = plan.sample_ids(0, 0, count, count)
  np.testing.assert_array_equal(np.sort(ids), np.arange(count))
  # Pairs of one batch from one shard, against what a perfect shuffle has.
  same = sum(np.sum(np.bincount(batch // shard) * (np.bincount(batch // shard) - 1) // 2)
             for batch in ids[:99_840].reshape(-1, 256))
  expected = 390 * (256 * 255 / 2) * (shard - 1) / (count - 1)
  assert 0.9 < same / expected < 1.1
  # Neighbours in time are no neighbours in the index: |difference| averages count / 3.
  assert abs(np.abs(np.diff(ids)).mean() / (count / 3) - 1) < 0.02


def test_small_permutations_are_all_equally_likely():
  epochs = plan.sample_ids(0, 0, 3 * 6000, 3).reshape(6000, 3)
  orders, counts = np.unique(epochs, axis=0, return_counts=True)
  assert len(orders) == 6
  # Chi-square with 5 degrees of freedom; 20.5 is passed once in a thousand.
  assert np.sum((counts - 1000) ** 2 / 1000) < 20.5


def test_epochs_and_seeds_differ():
  first, second = (plan.sample_ids(0, epoch, 1000, 1000) for epoch in range(2))
  other = plan.sample_ids(1, 0, 1000, 1000)
  # Two random orders of n agree in one place on average.
  assert np.sum(first == second) < 10 and np.sum(first == other) < 10


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_processes_make_the_global_batch(processes):
  whole = plan.sample_ids(3, 17, 16, 100)
  rows = [slice(i * 16 // processes, (i + 1) * 16 // processes) for i in range(processes)]
  parts = [plan.sample_ids(3, 17, 16, 100, r) for r in rows]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_draws_belong_to_the_position_alone():
  of_64 = plan.uniforms(9, plan.positions(1, 64), 5)
  of_16 = plan.uniforms(9, plan.positions(5, 16), 5)   # positions 80 … 95
  np.testing.assert_array_equal(of_64[16:32], of_16)
  many = plan.uniforms(9, np.arange(50_000), 4)
  assert many.min() >= 0 and many.max() < 1
  # Mean of n uniforms is 1/2 ± 1/sqrt(12 n); four standard errors.
  np.testing.assert_allclose(many.mean(0), 0.5, atol=4 / np.sqrt(12 * 50_000))
  assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.02


def test_a_late_step_costs_no_more_than_the_first():
  ids = plan.sample_ids(2**63, 10**7, 256, 400_000_000)
  assert ids.shape == (256,) and ids.min() >= 0 and ids.max() < 400_000_000
  assert len(set(ids.tolist())) == 256
