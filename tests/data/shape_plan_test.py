"""Steps are dealt among shapes in proportion, in order, and each shape keeps its epochs strict."""

import math

import numpy as np
import pytest

from sdjax.data import plan
from sdjax.data.shape_plan import ShapePlan, deal


@pytest.mark.parametrize("weights", [[1], [3, 5, 1, 1], [1000, 1, 7, 300, 22], [1] * 7,
                                     [1, 10**9], [0.25, 1e-3, 3.5]])
def test_steps_are_dealt_in_proportion_and_counted_without_a_gap(weights):
  taken, total = [0] * len(weights), sum(weights)
  bound = math.ceil(math.log2(len(weights))) / 2 + 1e-9
  for step in range(3000):
    shape, own_step = deal(step, weights)
    assert own_step == taken[shape]
    taken[shape] += 1
    for count, weight in zip(taken, weights, strict=True):
      assert abs(count - (step + 1) * weight / total) <= bound
  # A step is found without those before it.
  shape, own_step = deal(10**15, weights)
  assert abs(own_step - 10**15 * weights[shape] / total) <= bound + 1


SHAPES = [(8, 8, 8), (6, 10, 8), (8, 8, 8), (10, 6, 8)]
COUNTS = (40, 60, 20, 5)


def test_every_epoch_of_each_shape_is_strict():
  shaped = ShapePlan(COUNTS, COUNTS, SHAPES, batch_size=5, seed=1)
  read = {shape: [] for shape in SHAPES}
  positions = []
  for step in range(25 * 3):
    shape, drawn = shaped.batch(step)
    assert {SHAPES[source] for source in drawn.source} == {shape}
    read[shape] += zip(drawn.source.tolist(), drawn.sample.tolist(), strict=True)
    positions += drawn.position.tolist()
  assert positions == list(range(25 * 3 * 5))
  for shape, pairs in read.items():
    whole = [(source, sample) for source, count in enumerate(COUNTS) if SHAPES[source] == shape
             for sample in range(count)]
    assert len(pairs) == 3 * len(whole)
    for source in {source for source, _ in whole}:  # each source of a shape has its own epochs
      mine = [sample for other, sample in pairs if other == source]
      for epoch in np.array(mine).reshape(3, -1):
        assert sorted(epoch) == list(range(COUNTS[source]))


def test_one_shape_is_read_as_by_a_plan():
  shaped = ShapePlan((30, 7), (2.0, 1.0), [(4, 4, 8)] * 2, batch_size=6, seed=4)
  for step in (0, 1, 17, 10**6):
    for found, expected in zip(shaped.batch(step, slice(2, 5))[1],
                               plan.Plan((30, 7), (2.0, 1.0), 6, 4).rows(step, slice(2, 5)),
                               strict=True):
      np.testing.assert_array_equal(found, expected)
