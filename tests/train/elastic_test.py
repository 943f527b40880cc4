"""A run goes on with other numbers of processes and devices: the same samples, the same numbers."""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 16
LIMIT_S = 120
BEGUN = re.compile(r"step (\d+) rows (.*)")
NUMBERS = ("loss", "grad_norm", "update_norm", "param_norm")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(arguments, numbered):
  """(workdir, processes, devices of each, **variables) -> what trains there."""
  started = []

  def start(workdir, processes, devices, **variables):
    words = arguments(numbered, workdir, {
        "data.random_crop": False, "data.random_flip": False, "total_steps": STEPS,
        "checkpoint.every_steps": 0, "optimizer.warmup_steps": 0, "mesh.fsdp": 2})
    started.append(subprocess.Popen(
        [sys.executable, "launch/local_multiprocess.py", "--processes", str(processes),
         "--devices", str(devices), "--", sys.executable, "tests/train/few_numbers.py", *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return started[-1]
  yield start
  for process in started:
    process.kill()
    process.wait()


def samples(output):
  """Returns step → row of the batch → the samples drawn for it, by any process."""
  found = collections.defaultdict(lambda: collections.defaultdict(set))
  for step, rows in BEGUN.findall(output):
    for row, sample in json.loads(rows).items():
      found[int(step)][row].add(sample)
  return found


def numbers(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: [row[name] for name in NUMBERS] for row in rows}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
  """The samples and numbers of a run by 2 processes of 4 devices."""
  workdir = tmp_path_factory.mktemp("whole")
  process = train(workdir, 2, 4)
  output, _ = process.communicate(timeout=LIMIT_S)
  assert process.returncode == 0, output
  found = samples(output)
  assert list(found) == list(range(1, STEPS + 1))
  assert all(len(rows) == 8 and all(len(drawn) == 1 for drawn in rows.values())
             for rows in found.values())
  return found, numbers(workdir)


@pytest.fixture(scope="module")
def part(train, tmp_path_factory):
  """The workdir of a run by 2 processes of 4 devices that was told to stop, and its last step."""
  workdir = tmp_path_factory.mktemp("part")
  process = train(workdir, 2, 4)
  while "step 3 rows" not in process.stdout.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=LIMIT_S)
  assert process.returncode == 143, output
  last, = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
  assert 3 <= last < STEPS - 1
  return workdir, last


EXACT, CLOSE = 0, 1e-5


@pytest.mark.parametrize("processes, devices, variables, rtol", [
    (2, 4, {}, EXACT), (4, 2, {}, EXACT), (1, 8, {"GLOO": "1"}, EXACT),
    # Within one process XLA adds up what its devices have in another order than Gloo does.
    (1, 8, {}, CLOSE), (1, 4, {}, CLOSE), (2, 1, {}, CLOSE)])
def test_resumed_elsewhere(train, whole, part, tmp_path, processes, devices, variables, rtol):
  (expected_samples, expected), (stopped, last) = whole, part
  workdir = shutil.copytree(stopped, tmp_path / "run")
  process = train(workdir, processes, devices, **variables)
  output, _ = process.communicate(timeout=LIMIT_S)
  assert process.returncode == 0, output
  assert samples(output) == {step: expected_samples[step] for step in range(last + 1, STEPS + 1)}
  found = numbers(workdir)
  assert list(found) == list(range(1, STEPS + 1))
  rows, rows_expected = (np.array([*table.values()]) for table in (found, expected))
  np.testing.assert_array_equal(rows[:last], rows_expected[:last])
  np.testing.assert_allclose(rows, rows_expected, rtol=rtol)
