"""The clock of a run, on a clock that the test moves."""

import pytest

from sdjax.train import goodput
from sdjax.train.goodput import BUCKETS, Goodput, Pace


class Clock:
  now = 1000.0

  def monotonic(self):
    return self.now

  def time(self):
    return self.now + 1e9


@pytest.fixture
def clock(monkeypatch):
  made = Clock()
  monkeypatch.setattr(goodput, "time", made)
  return made


def test_every_second_is_in_one_bucket(clock):
  spent = Goodput()
  clock.now += 5
  spent.switch("step")
  clock.now += 1
  with spent.doing("evaluation"):
    clock.now += 2
    with spent.doing("compile"):
      clock.now += 4
    clock.now += 8
  with pytest.raises(OSError), spent.doing("save"):
    clock.now += 16
    raise OSError
  clock.now += 32
  assert spent.seconds() == dict(
      start=5, compile=4, data_wait=0, step=33, save=16, evaluation=10, lost=0)
  assert sum(spent.seconds().values()) == 68


def total(row):
  return sum(row[f"{name}_s"] for name in BUCKETS)


def test_a_restart_costs_the_time_since_the_last_row(clock):
  began = clock.time()
  first = Goodput()
  clock.now += 3
  first.switch("step")
  clock.now += 10
  kept = first.row()
  clock.now += 7                                       # killed before the next checkpoint,
  dropped = first.row()
  clock.now += 100                                     # and found dead
  second = Goodput()
  clock.now += 2
  second.go_on(kept, dropped)
  row = second.row()
  assert (row["start_s"], row["step_s"], row["lost_s"]) == (5, 10, 107)
  assert total(row) == row["time"] - began

  third = Goodput()                                    # again, and now without a row to keep
  clock.now += 1
  third.go_on(None, dropped)
  row = third.row()
  assert (row["start_s"], row["step_s"], row["lost_s"]) == (1, 0, 122)
  assert total(row) == row["time"] - began


def test_a_new_run_and_one_of_an_older_version_begin_at_zero(clock):
  spent = Goodput()
  spent.go_on(None, None)
  spent.go_on({"step": 3, "loss": 1.0}, None)
  assert set(spent.seconds().values()) == {0.0}


def test_pace_sees_the_time_spent_training_alone(clock):
  spent = Goodput()
  clock.now += 50
  spent.switch("step")
  pace = Pace(spent, step=7)
  for step in (8, 9):
    clock.now += 3
    with spent.doing("data_wait"):
      clock.now += 1
    pace.done(step, images=16, operations=1e12)
    pace.done(step, images=16, operations=1e12)        # is counted once
  with spent.doing("save"):
    clock.now += 1000
  clock.now += 5                                       # of a step that is not done yet
  assert pace.lap() == (4.0, 0.25e12, 0.25)
  pace.done(10, images=16, operations=1e12)
  assert pace.lap() == (16 / 5, 0.2e12, 0.0)
