"""Runs that are killed again and again, and go on by themselves, end as one that was not."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sdjax.checkpoints import records, train_state
from sdjax.cli import experiment

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import babysit  # noqa: E402
import local_multiprocess  # noqa: E402

BABYSIT = [sys.executable, str(ROOT / "launch/babysit.py")]
TRAINER = [sys.executable, str(ROOT / "tests/train/few_numbers.py")]
TOGETHER = [sys.executable, str(ROOT / "launch/local_multiprocess.py"), "--processes", "2",
            "--devices", "4", "--"]
STEPS_PER_KILL = 25
SAVE_EVERY = 6
LIMIT_S = 90  # without a step
BEGUN = re.compile(r"process (\d+) pid (\d+) step (\d+) rows (.*)")
# What metrics tell of the machine; all else must be the same.
OF_THE_CLOCK = re.compile(r"time|\w+_s|data_wait_share")


class Watched:
  """Commands that train, and the steps that their processes say they begin.

  Attributes:
    numbers: pid → which process of the run it is.
    steps: pid → the steps that it has begun, in order.
    rows: step → row of the batch → the samples that anybody has drawn for it.
    output: lines of all commands.
  """

  def __init__(self, workdir, processes, *commands):
    """Starts each of `commands`, (words, variables), together a run of so many processes."""
    self.workdir, self.processes, self.output, self.numbers = workdir, processes, [], {}
    self.steps = collections.defaultdict(list)
    self.rows = collections.defaultdict(lambda: collections.defaultdict(set))
    self.commands, self._readers, self._news = [], [], threading.Condition()
    for words, variables in commands:
      self.commands.append(subprocess.Popen(
          words, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables,
          cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
      self._readers.append(threading.Thread(
          target=self._read, args=self.commands[-1:], daemon=True))
      self._readers[-1].start()

  def _read(self, command):
    for line in command.stdout:
      with self._news:
        self.output.append(line)
        if found := BEGUN.search(line):
          number, pid, step = map(int, found.groups()[:3])
          self.numbers[pid] = number
          self.steps[pid].append(step)
          for row, sample in json.loads(found[4]).items():
            self.rows[step][row].add(sample)
        self._news.notify_all()

  def wait_for(self, condition):
    """Returns what `condition` returns as soon as that is true."""
    with self._news:
      self._news.wait_for(lambda: condition() or self.have_ended(), LIMIT_S)
      return condition() or pytest.fail("it did not happen:\n" + "".join(self.output[-60:]))

  def have_ended(self):
    return any(command.poll() is not None for command in self.commands)

  def finish(self):
    codes = [command.wait(LIMIT_S) for command in self.commands]
    for reader in self._readers:
      reader.join()
    assert codes == [0] * len(codes), "".join(self.output[-60:])

  def is_saving(self):
    """Whether there is a step that is not whole."""
    folder = self.workdir / "checkpoints"
    return any(path.name.isdigit() and not (path / records.NAME).exists()
               for path in folder.iterdir())

  def kill(self, number, after_steps, in_save, delay_s):
    """Kills process `number`; returns how long it takes until all of the run are gone."""
    def running():
      pids = list(filter(is_alive, self.steps))
      return len(pids) == self.processes and pids
    pids = self.wait_for(running)
    victim = next(pid for pid in pids if self.numbers[pid] == number)
    self.wait_for(lambda: len(self.steps[victim]) > after_steps)
    if in_save:
      until(self.is_saving)
    time.sleep(delay_s)
    os.kill(victim, signal.SIGKILL)
    return until(lambda: not any(map(is_alive, pids)))


def until(condition):
  """Waits for `condition`; returns for how long, in s."""
  began = time.monotonic()
  while not condition() and time.monotonic() < began + LIMIT_S:
    time.sleep(0.002)
  return time.monotonic() - began


def is_alive(pid):
  try:
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.fixture
def watch():
  started = []

  def start(*args):
    started.append(Watched(*args))
    return started[-1]
  yield start
  for watched in started:
    for command in watched.commands:
      command.kill()  # and the kernel all that it has started
      command.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, line):
  """(steps, processes) -> the workdir of a run in peace, and the samples that it drew."""
  found = {}

  def run(steps, processes):
    if (steps, processes) not in found:
      workdir = tmp_path_factory.mktemp("undisturbed")
      words = TRAINER + line(workdir, steps)
      watched = Watched(workdir, processes, (words if processes == 1 else TOGETHER + words, {}))
      watched.finish()
      found[steps, processes] = workdir, watched.rows
    return found[steps, processes]
  return run


@pytest.fixture(scope="module")
def line(arguments, numbered):
  def words(workdir, steps):
    return arguments(numbered, workdir, {
        "data.random_crop": False, "data.random_flip": False, "total_steps": steps,
        "checkpoint.every_steps": SAVE_EVERY, "optimizer.warmup_steps": 0, "mesh.data": 1,
        "mesh.fsdp": -1})
  return words


def commands(way, words):
  """(words, variables) of what starts a run again and again, in one of the ways of starting it."""
  if way == "by host":  # as on a pod: each host looks after its own process
    places = local_multiprocess.environments(2, 4, local_multiprocess.free_port())
    return [(BABYSIT + words, place) for place in places]
  return [(BABYSIT + (TOGETHER if way == "together" else []) + words, {})]


def rows_of(workdir):
  rows = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in row.items() if not OF_THE_CLOCK.fullmatch(name)}
          for row in rows]


def assert_same_end(workdir, expected, steps):
  assert rows_of(workdir) == rows_of(expected)
  assert [row["step"] for row in rows_of(workdir)] == list(range(1, steps + 1))
  # Parameters, average, state of the optimizer, step and key.
  found, facts = (records.read(run / "checkpoints" / str(steps)) for run in (workdir, expected))
  assert found["digests"] == facts["digests"] and len(facts["digests"]) > 8
  assert found["position"] == facts["position"]
  trees = [train_state.Checkpoints(run / "checkpoints").restore_params()
           for run in (workdir, expected)]
  jax.tree.map(np.testing.assert_array_equal, *trees)


LONG = pytest.mark.endurance


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("way, kills", [
    ("alone", 3), ("together", 2),
    pytest.param("alone", 20, marks=LONG), pytest.param("together", 10, marks=LONG),
    pytest.param("by host", 10, marks=LONG)])
def test_killed_again_and_again(watch, line, undisturbed, tmp_path, way, kills):
  rng, steps = np.random.default_rng(kills), kills * STEPS_PER_KILL
  processes = 1 if way == "alone" else 2
  expected, rows = undisturbed(steps, processes)
  watched = watch(tmp_path, processes, *commands(way, TRAINER + line(tmp_path, steps)))
  newest, in_save = [0], []
  for number in range(kills):
    # Every other one while a step is being written, the others at any time.
    aims = number % 2 == 0
    gone_s = watched.kill(int(rng.integers(processes)), rng.integers(1, 3 * SAVE_EVERY), aims,
                          rng.uniform(0, 0.02 if aims else 0.1))
    assert gone_s < experiment.HEARTBEAT_S + 5
    newest.append(max(babysit.newest_step(tmp_path), 0))
    in_save.append(watched.is_saving())
  watched.finish()

  assert newest == sorted(newest) and sum(in_save) >= kills // 4
  # Each goes on from what was whole on the disk, step by step.
  starts = [begun[0] for begun in watched.steps.values()]
  assert starts == [step + 1 for step in newest for _ in range(processes)]
  assert all(begun == list(range(begun[0], begun[-1] + 1)) for begun in watched.steps.values())
  assert watched.rows == rows
  assert_same_end(tmp_path, expected, steps)
