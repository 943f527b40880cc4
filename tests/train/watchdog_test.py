"""The watchdog bites a process that hangs, and no other. Each case is a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax.errors import UserError
from sdjax.train.watchdog import Watchdog

T = 0.6
START = f"import sys, time\nfrom sdjax.train import watchdog\nwatch = watchdog.Watchdog({T})\n"
TELL = "print(time.time(), flush=True)\n"


def start(code):
  return subprocess.Popen([sys.executable, "-c", START + code], cwd=Path(__file__).parents[2],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_bites_what_hangs_and_nothing_else():
  hung = start("def wait_for_ever(): time.sleep(60)\n"
               "watch.beat()\n" + TELL + "wait_for_ever()")
  beating = start(f"for _ in range(6): watch.beat(); time.sleep({T / 2})\n")
  compiling = start(f"time.sleep({2 * T})\n"                        # the first step is long
                    f"watch.beat(); watch.be_patient(); time.sleep({2 * T})\n")
  compiled = start("watch.beat(); watch.be_patient(); watch.beat()\n" + TELL + "time.sleep(60)")
  closed = start(f"watch.beat(); watch.close(); time.sleep({3 * T})\n")
  stopped = start("watch.beat()\n" + TELL + f"time.sleep({T / 4}); watch.close()")

  stopped.stdout.readline()
  stopped.send_signal(signal.SIGSTOP)
  for child in (hung, compiled):
    began = float(child.stdout.readline())
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 42, errors
    assert T < time.time() - began < T + 2
    assert "no step for" in errors and "most recent call first" in errors
    assert ("wait_for_ever" in errors) == (child is hung)
  time.sleep(T)
  stopped.send_signal(signal.SIGCONT)
  for child in (beating, compiling, closed, stopped):
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 0, errors


def test_zero_is_never_and_less_is_refused():
  with Watchdog(0) as watch:
    watch.beat()
  with pytest.raises(UserError, match="watchdog_s is -1"):
    Watchdog(-1)
