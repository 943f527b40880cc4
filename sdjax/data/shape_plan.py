"""Batches of a latents cache that holds several shapes: each step reads samples of one.

Steps are dealt among the shapes in proportion to their weights, and each shape is read by a plan
of its own (`plan.py`), so that every epoch of it visits each of its samples once. Between two
shapes, or two halves of the list of shapes, of which the first has the share w of the weight,

  (1)  A(n) = ⌊n w + 1/2⌋ of the first n steps belong to the first,

and step n does if A(n + 1) > A(n). It is step A(n) of the first, or step n − A(n) of the second,
which is divided in the same way until one shape is left. So a step is found in log₂ of the number
of shapes, exactly; no shape is ever more than half a step for each division ahead or behind.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sdjax.data import plan

Shape = tuple[int, ...]


class ShapePlan:
  """A plan whose batches each have one shape, which is that of a source."""

  def __init__(self, counts: Sequence[int], weights: Sequence[float], shapes: Sequence[Shape],
               batch_size: int, seed: int):
    """Groups the sources by their shapes.

    Args:
      counts, weights: of the sources, as `plan.Plan` takes them.
      shapes: of the sources' samples.
      batch_size, seed: as `plan.Plan` takes them.

    Raises:
      UserError: a count, weight or batch size out of range.
    """
    self._batch_size = batch_size
    self._shapes = tuple(dict.fromkeys(shapes))
    self._sources = [np.array([i for i, other in enumerate(shapes) if other == shape], np.int32)
                     for shape in self._shapes]
    self._plans = [plan.Plan([counts[i] for i in group], [weights[i] for i in group], batch_size,
                             seed) for group in self._sources]
    self._weights = [sum(Fraction(weights[i]) for i in group) for group in self._sources]

  def batch(self, step: int, rows: slice = slice(None)) -> tuple[Shape, plan.Drawn]:
    """The shape of a step's batch and what its rows read, or some of them."""
    shape, own_step = deal(step, self._weights)
    drawn = self._plans[shape].rows(own_step, rows)
    return self._shapes[shape], plan.Drawn(
        self._sources[shape][drawn.source], drawn.sample,
        plan.positions(step, self._batch_size, rows))


def deal(step: int, weights: Sequence[int | Fraction]) -> tuple[int, int]:
  """Whose turn it is at a step, and which of its turns: see (1)."""
  first, end = 0, len(weights)
  while end - first > 1:
    middle = (first + end) // 2
    share = Fraction(sum(weights[first:middle])) / sum(weights[first:end])
    before, after = ((2 * n * share + 1) // 2 for n in (step, step + 1))
    if after > before:
      step, end = before, middle
    else:
      step, first = step - before, middle
  return first, step
