"""Random numbers for a part of a batch that are those of the whole."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
  """Every `of`-th row of a batch, from row `number` on: what one pass of accumulation sees.

  Numbers are drawn for the whole batch, and a part takes those of its rows: what a row gets does
  not depend on how many parts there are.
  """
  number: jax.Array | int = 0  # 0 … of - 1
  of: int = 1

  def rows(self, size: int) -> jax.Array:  # int32 [size]
    """Returns where the `size` rows of this part stand in the batch."""
    return self.number + self.of * jnp.arange(size)

  def draw(
      self,
      draw: Callable[[tuple[int, ...]], jax.Array],
      shape: tuple[int, ...],
  ) -> jax.Array:
    """Returns the rows of this part of `draw(shape of the batch)`.

    Args:
      draw: shape -> array.
      shape: of the part, rows first.
    """
    size, *rest = shape
    batch = draw((size * self.of, *rest))
    return batch.reshape(size, self.of, *rest)[:, self.number]


WHOLE = Part()
