"""A watchdog: ends a process that makes no steps, so that whoever started it can start it again.

A collective whose other side hangs waits for ever, and so does a read from a dead file server. A
peer that is gone altogether is noticed sooner, by the heartbeats of `jax.distributed`.
"""

import faulthandler
import logging
import os
import sys
import threading
import time

from sdjax.errors import UserError

log = logging.getLogger("sdjax")
EXIT_CODE = 42
TICK_S = 0.1
PATIENCE = 10  # how much longer than a step a compile, an evaluation or a save may take


class Watchdog:
  """Waits for beats in a thread; where none comes, writes all stacks and ends the process.

  Time in which the process itself was stopped (Ctrl-Z, a machine that sleeps or moves) does not
  count.
  """

  def __init__(self, timeout_s: float):
    """Begins to wait, patiently: the first step comes late.

    Args:
      timeout_s: without a beat, until the process ends with `EXIT_CODE`; 0: never.

    Raises:
      UserError: it is below 0.
    """
    if timeout_s < 0:
      raise UserError(f"config.watchdog_s is {timeout_s}; give seconds, or 0 for no watchdog")
    self._timeout_s, self._beats, self._patience = timeout_s, 0, PATIENCE
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    if timeout_s:
      self._thread.start()

  def beat(self) -> None:
    """Tells that a step is done."""
    self._patience = 1
    self._beats += 1

  def be_patient(self) -> None:
    """Waits `PATIENCE` times as long from now to the next beat."""
    self._patience = PATIENCE
    self._beats += 1

  def close(self) -> None:
    """Stops waiting."""
    self._closed.set()
    if self._timeout_s:
      self._thread.join()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _watch(self) -> None:
    seen, quiet_s, before = self._beats, 0.0, time.monotonic()
    while not self._closed.wait(TICK_S):
      now = time.monotonic()
      quiet_s, before = quiet_s + min(now - before, 3 * TICK_S), now
      if self._beats != seen:
        seen, quiet_s = self._beats, 0.0
      elif quiet_s > self._timeout_s * self._patience:
        bark(quiet_s)


def bark(quiet_s: float) -> None:
  """Writes where every thread stands to stderr, and ends the process."""
  log.error("no step for %.0f s: ending with code %d. All threads stand here:", quiet_s, EXIT_CODE)
  faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
  sys.__stderr__.flush()
  os._exit(EXIT_CODE)
