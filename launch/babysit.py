#!/usr/bin/env python3
"""Runs a command, and runs it again while its exit code means "run me again" and it gets on.

  python launch/babysit.py sdjax train --config configs/sd15.py --workdir /mnt/bucket/run

What a code means (README.md beside this file has the table): 143, 42, 1 and the end by a signal
start the command again; 0, 2, 3, 4, 130 and others end it. A run that does not get on, which is to
say that the newest step under WORKDIR/checkpoints does not grow, is given up after
`MAX_WITHOUT_PROGRESS` restarts. A SIGTERM or SIGINT is handed on to the command, whose end is then
the end: a scheduler that takes the machine away starts it elsewhere.
"""

import os
import signal
import subprocess
import sys
import threading

from local_multiprocess import die_with_parent

MAX_WITHOUT_PROGRESS = 5
MAX_PAUSE_S = 60
AGAIN = {1: "failed", 42: "hung", 143: "was asked to stop"}
INTERRUPTED = 130                     # Ctrl-C: the user wants it to end


def why_again(code: int) -> str:
  """Returns in words why a command that ended with `code` is started again; "" if it is not."""
  is_signal = 128 < code < 128 + signal.NSIG and code != INTERRUPTED
  return AGAIN.get(code, f"was killed by signal {code - 128}" if is_signal else "")


def find_workdir(command: list[str]) -> str | None:
  """Returns the value of --workdir among the words of a command."""
  for word, after in zip(command, [*command[1:], None]):
    if word == "--workdir":
      return after
    if word.startswith("--workdir="):
      return word.partition("=")[2]
  return None


def newest_step(workdir: str | None) -> int:
  """Returns the newest whole step under `workdir`/checkpoints, -1 where there is none."""
  folder = os.path.join(workdir or "", "checkpoints")
  if workdir is None or not os.path.isdir(folder):
    return -1
  whole = (name for name in os.listdir(folder)
           if name.isdecimal() and os.path.isfile(os.path.join(folder, name, "checkpoint.json")))
  return max(map(int, whole), default=-1)


def pause_s(lost: int) -> float:
  """Returns how long to wait before the next start, after `lost` without progress."""
  return min(3 ** lost / 4, MAX_PAUSE_S)


class Babysitter:
  """Runs one command at a time and hands signals on to it."""

  def __init__(self, command: list[str]):
    self._command, self._workdir = command, find_workdir(command)
    self._child, self._asked = None, threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._hand_on)

  def _hand_on(self, number, _):
    self._asked.set()
    if self._child is not None:
      self._child.send_signal(number)

  def run(self) -> int:
    """Returns the exit code of the last run, 128 + N for signal N."""
    best, lost = newest_step(self._workdir), 0
    while True:
      code = self._run_once()
      why = why_again(code)
      if not why or self._asked.is_set():
        return code
      newest = newest_step(self._workdir)
      best, lost = max(best, newest), 0 if newest > best else lost + 1
      if lost > MAX_WITHOUT_PROGRESS:
        say(f"{self._command[0]} {why}; no new checkpoint in {MAX_WITHOUT_PROGRESS} restarts: "
            f"giving up with code {code}")
        return code
      say(f"{self._command[0]} {why} (code {code}), its newest step is {newest}; starting it again")
      # The first restart is quick; what fails each time gives a broken machine time to mend.
      if self._asked.wait(pause_s(lost)):
        return code

  def _run_once(self) -> int:
    environment = dict(os.environ)
    if self._workdir is not None:
      # All processes read the cache, but only the first writes it: it must be where all see it.
      environment.setdefault(
          "JAX_COMPILATION_CACHE_DIR", os.path.join(self._workdir, "compiled"))
    # Its own session: a terminal's Ctrl-C comes once, from here.
    self._child = subprocess.Popen(
        self._command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    if self._asked.is_set():          # between the last look and the start
      self._child.terminate()
    code = self._child.wait()
    return code if code >= 0 else 128 - code


def say(text: str) -> None:
  print(f"babysit: {text}", file=sys.stderr, flush=True)


def main(command: list[str]) -> int:
  if not command or command[0].startswith("-"):
    say("error: give the command to run: babysit.py sdjax train …")
    return 2
  try:
    return Babysitter(command).run()
  except OSError as error:
    say(f"error: cannot start {command[0]}: {error.strerror}")
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
