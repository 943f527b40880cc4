"""What several processes must decide alike: which checkpoint to take, whether one was written.

Every process of the run must call these at the same place; with one process nothing is sent.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

REASON_BYTES = 400


def first(look: Callable[[], str]) -> str:
  """Calls `look` on process 0 alone, and returns what it finds on all of them."""
  text = look() if jax.process_index() == 0 else ""
  if jax.process_count() == 1:
    return text
  own = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.uint32(own.size)))
  sent = np.zeros(max(size, 1), np.uint8)  # XLA sends no empty arrays
  if jax.process_index() == 0:
    sent[:size] = own
  return bytes(multihost_utils.broadcast_one_to_all(sent)[:size]).decode()


def any_reason(reason: str) -> str:
  """Returns the first process's reason that is not empty, on all of them; "" where all are."""
  if jax.process_count() == 1:
    return reason
  own = reason.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
  rows = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
  reasons = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows)
  return next(filter(None, reasons), "")
