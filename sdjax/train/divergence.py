"""Steps that went wrong: those without an update, and those whose loss stands out."""

import collections
import logging
import math
from collections.abc import Iterable

import numpy as np

from sdjax.errors import Diverged, UserError

log = logging.getLogger("sdjax")
WINDOW = 200     # losses that a new one is compared with
LEAST = 50       # of them, before any is said to stand out
DEVIATIONS = 6   # from their mean


class Divergence:
  """Looks at all steps in their order, the same on all processes."""

  def __init__(self, max_skipped: int):
    """Begins without having seen a loss.

    Args:
      max_skipped: so many steps without an update in a row end the run.

    Raises:
      UserError: it is below 1.
    """
    if max_skipped < 1:
      raise UserError(f"config.max_skipped is {max_skipped}; give a number of steps, at least 1")
    self._max_skipped, self._in_a_row = max_skipped, 0
    self._losses = collections.deque(maxlen=WINDOW)

  def look(self, first: int, steps: Iterable[tuple[float, bool]]) -> dict[str, float]:
    """Counts skipped steps and spikes among some steps.

    Args:
      first: number of the first of them.
      steps: loss and whether the update was skipped, of each.

    Raises:
      Diverged: too many were skipped in a row.
    """
    skipped = spikes = 0
    for number, (loss, is_skipped) in enumerate(steps, first):
      self._in_a_row = self._in_a_row + 1 if is_skipped else 0
      skipped += is_skipped
      if self._in_a_row >= self._max_skipped:
        raise Diverged(
            f"loss or gradient were not finite in {self._in_a_row} steps in a row, up to step "
            f"{number} (config.max_skipped is {self._max_skipped}); the parameters are those from "
            "before: lower optimizer.learning_rate, say config.resume_changed=True and go on")
      if is_skipped:
        log.warning("step %d changes nothing: its loss or gradient is not finite", number)
      elif self._is_spike(loss):
        spikes += 1
        log.warning("the loss of step %d is %.4g, %d standard deviations above the mean of the "
                    "last %d", number, loss, DEVIATIONS, len(self._losses))
      if math.isfinite(loss):
        self._losses.append(loss)
    return {"skipped_steps": float(skipped), "loss_spikes": float(spikes)}

  def _is_spike(self, loss: float) -> bool:
    if len(self._losses) < LEAST:
      return False
    return loss > np.mean(self._losses) + DEVIATIONS * np.std(self._losses)
