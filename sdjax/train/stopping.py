"""SIGTERM and Ctrl-C as wishes: all processes stop after the same step, which is saved."""

import contextlib
import logging
import signal
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger("sdjax")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASK_EVERY = 4  # steps: a collective among a few processes on one CPU costs it 3 ms


class Stopping:
  """Takes signals from the first `agreed` on; until then, nothing is lost by ending at once.

  A second signal does what it did before `agreed`: it ends the process at once.
  """

  def __init__(self, mesh: Mesh):
    """Prepares to ask all processes of `mesh`."""
    self._asked = 0
    self._before = None
    self._calls = 0
    self._sent = None  # what was asked of all processes, and not looked at yet
    self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def agreed(self) -> int:
    """Returns for which signal all processes stop now, or 0; to be called by all at each step.

    The largest number that any process has got wins: SIGTERM over Ctrl-C.
    """
    if self._before is None:
      self._listen()
    if jax.process_count() == 1:
      return self._asked
    self._calls += 1
    if self._calls % ASK_EVERY:
      return 0
    # The answer to the question before this one is long there: nothing waits.
    answer = 0 if self._sent is None else int(self._sent)
    own = np.full(1, self._asked, np.int32)
    self._sent = self._max(jax.make_array_from_callback(
        (self._split.mesh.size,), self._split, lambda _: own))
    return answer

  def leave(self, number: int, step: int) -> NoReturn:
    """Raises what ends the command with code 128 + `number`, as shells tell of a signal."""
    log.warning("stopped by %s after step %d, which is being saved; the same command goes on",
                signal.Signals(number).name, step)
    if number == signal.SIGINT and jax.process_count() == 1:
      raise KeyboardInterrupt  # what notebooks expect
    raise SystemExit(128 + number)

  def _listen(self) -> None:
    self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
      for number in SIGNALS:
        signal.signal(number, self._ask)

  def _ask(self, number, _) -> None:
    self._asked = max(self._asked, number)
    self._give_back()

  def _give_back(self) -> None:
    with contextlib.suppress(ValueError):
      for number, handler in (self._before or {}).items():
        signal.signal(number, handler)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._give_back()
