"""Signals as wishes, in one process and as one of several would see them."""

import os
import signal

import jax
import pytest

from sdjax.train import stopping
from sdjax.train.stopping import Stopping

MESH = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                     devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def handlers():
  """What the signals did before; SIGTERM is noted, for the default would end the tests."""
  noted = []
  before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
  signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
  yield noted
  for number, handler in before.items():
    signal.signal(number, handler)


def kill(number):
  os.kill(os.getpid(), number)


def test_a_signal_is_a_wish_from_the_first_question_on(handlers):
  with Stopping(MESH) as stop:
    kill(signal.SIGTERM)
    assert handlers == [signal.SIGTERM]           # nothing to lose yet: what it did before
    assert stop.agreed() == 0
    kill(signal.SIGTERM)
    assert handlers == [signal.SIGTERM]
    assert stop.agreed() == stop.agreed() == signal.SIGTERM
    kill(signal.SIGTERM)
    assert len(handlers) == 2                     # the second one is at once
    with pytest.raises(KeyboardInterrupt):
      kill(signal.SIGINT)


def test_handlers_are_given_back(handlers):
  with Stopping(MESH) as stop:
    stop.agreed()
  kill(signal.SIGTERM)
  assert handlers == [signal.SIGTERM]
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_leaving():
  with Stopping(MESH) as stop:
    with pytest.raises(KeyboardInterrupt):
      stop.leave(signal.SIGINT, step=3)
    with pytest.raises(SystemExit) as left:
      stop.leave(signal.SIGTERM, step=3)
  assert left.value.code == 143


def test_several_processes_are_asked(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with Stopping(MESH) as stop:
    for _ in range(3 * stopping.ASK_EVERY):
      assert stop.agreed() == 0
    kill(signal.SIGINT)
    answers = [stop.agreed() for _ in range(2 * stopping.ASK_EVERY)]
    assert answers == [0] * (2 * stopping.ASK_EVERY - 1) + [signal.SIGINT]
    with pytest.raises(SystemExit) as left:
      stop.leave(answers[-1], step=3)
  assert left.value.code == 130
