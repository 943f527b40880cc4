"""One step on its way to the disk: every process writes its part, process 0 makes the step whole.

Orbax's own checkpointers wait for each other at barriers, and one process that cannot write leaves
the others there until a timeout; so sdjax takes Orbax's handlers, which wait for nobody, and lets
processes tell process 0 through small files in the step's folder: `done.I` or `failed.I`.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

LOOK_EVERY_S = 0.5
# A full disk, a permission that is missing; TensorStore's errors are ValueErrors.
ERRORS = (OSError, ValueError)


class Writing:
  """Writes one step in a thread of its own, from the moment that the arrays are off the devices.

  Attributes:
    step: which one.
  """

  def __init__(self, step: int, folder: Path, state: Any, *,
               finish: Callable[[], None], give_up: Callable[[str], None]):
    """Returns when the arrays are copied off the devices.

    Args:
      step: the name of the checkpoint.
      folder: is there, and empty.
      state: a pytree of arrays.
      finish: makes the step whole; called in the thread of process 0 when all parts are there.
      give_up: in its place when they will not be, or when `finish` fails, with the reason.
    """
    self.step = step
    self._folder, self._handler = epath.Path(folder), ocp.StandardCheckpointHandler()
    self._finish, self._give_up = finish, give_up
    self._stopped = threading.Event()
    pool = futures.ThreadPoolExecutor(1, "checkpoint")
    copied = pool.submit(self._copy, state)
    self._part = pool.submit(self._write_part, copied)
    self._whole = pool.submit(self._complete) if jax.process_index() == 0 else self._part
    pool.shutdown(wait=False)
    futures.wait([copied])

  def part_error(self) -> str:
    """Waits for this process's part; returns why it could not be written, or ""."""
    return _error(self._part)

  def error(self, timeout_s: float | None = None) -> str:
    """Waits until the step is whole, where this is process 0; returns why it is not, or "".

    Args:
      timeout_s: what has not been written by then is given up.
    """
    if not futures.wait([self._whole], timeout_s).done:
      self.stop()
      if not futures.wait([self._whole], 10 * LOOK_EVERY_S).done:
        return f"it has not been written within {timeout_s:.0f} s"
    return _error(self._whole)

  def stop(self) -> None:
    """Waits no more for other processes."""
    self._stopped.set()

  def _copy(self, state: Any) -> list:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
      return loop.run_until_complete(self._handler.async_save(
          self._folder, args=ocp.args.StandardSave(state)))

  def _write_part(self, copied: futures.Future) -> None:
    try:
      for future in copied.result():
        future.result()
      (self._folder / f"done.{jax.process_index()}").touch()
    except ERRORS as error:
      with contextlib.suppress(OSError):
        (self._folder / f"failed.{jax.process_index()}").write_text(reason(error))
      raise

  def _complete(self) -> None:
    try:
      self._await_parts()
      self._handler.finalize(self._folder)
      self._finish()
    except ERRORS as error:
      self._give_up(reason(error))
      raise

  def _await_parts(self) -> None:
    self._part.result()
    done = {f"done.{index}" for index in range(jax.process_count())}
    while missing := done - (there := {path.name for path in self._folder.iterdir()}):
      for name in sorted(there):
        if name.startswith("failed."):
          raise OSError(f"{name}: {(self._folder / name).read_text()}")
      if self._stopped.wait(LOOK_EVERY_S):
        raise OSError(f"of other processes' parts there is no {', '.join(sorted(missing))}")
    for name in done:
      (self._folder / name).unlink()


def _error(future: futures.Future) -> str:
  try:
    future.result()
  except ERRORS as error:
    return reason(error)
  return ""


def reason(error: Exception) -> str:
  """Returns in few words why something could not be written or read."""
  text, brackets, _ = str(error).partition(" [")
  if brackets:  # TensorStore's: what it was doing, the reason, and in brackets where
    text = text.rpartition(": ")[2]
  return getattr(error, "strerror", None) or " ".join(text.split())[:200]
