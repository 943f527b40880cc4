"""Several processes decide alike what is saved and what is read, whichever of them has failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# argv: a folder. Both processes run this; what they print after > must be the same.
SCRIPT = r"""
import os, sys
from pathlib import Path
from sdjax.cli import experiment
experiment.start_processes()
import jax
from sdjax.checkpoints import agreement, digests, train_state, writing
from sdjax.errors import Gone, UserError
from sdjax.train import partitioning, state
from tests.checkpoints.damage_test import PARAMS, TX

me, folder = jax.process_index(), Path(sys.argv[1])
partitioning.MIN_SHARDED_SIZE = 64
mesh = partitioning.make_mesh({"data": -1, "fsdp": 4})
jax.set_mesh(mesh)
assert agreement.first(lambda: f"ü {me}") == "ü 0" and agreement.first(lambda: "") == ""
assert agreement.any_reason("" if me == 0 else "disk") == "disk"
assert agreement.any_reason("") == ""

shapes = state.shapes(PARAMS, {}, TX)
shardings = partitioning.shardings(shapes, mesh, ((".*", "fsdp"),))
now = state.create(PARAMS, {}, TX, 5, shardings)
copy = writing.Writing._copy

def full(self, arrays):
  raise OSError(28, "No space left on device")

saved = train_state.Checkpoints(folder, keep=9)
for step, without_room in ((1, None), (2, 0), (3, None), (4, 1), (5, None)):
  writing.Writing._copy = full if me == without_room else copy
  saved.save(step, now, {"step": step}, {})
saved.close()
print("> failed", saved.failed_saves, "newest", saved.latest_step())

if me == 0:                                  # a bit of one process's part
  path = max(folder.glob("5/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 4
  path.write_bytes(raw)
saved = train_state.Checkpoints(folder, keep=9)
step, back, position = saved.restore_newest(shapes, shardings, {})
print("> restored", step, position, digests.of(back) == digests.of(now))

attempt = train_state._attempt
train_state._attempt = lambda *args, **options: (
    (None, "it cannot be read here") if me == 1 else attempt(*args, **options))
try:
  train_state.Checkpoints(folder).restore_newest(shapes, shardings, {})
except Gone:
  print("> gone")
"""


@pytest.mark.slow
def test_one_of_two_processes_fails(tmp_path):
  done = subprocess.run(
      [sys.executable, ROOT / "launch/local_multiprocess.py", "--processes", "2", "--devices", "2",
       "--", sys.executable, "-c", SCRIPT, tmp_path],
      capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stdout + done.stderr
  for index in (0, 1):
    lines = [line.partition(" > ")[2] for line in done.stdout.splitlines()
             if line.startswith(f"[{index}] > ")]
    assert lines == ["failed 2 newest 5", "restored 3 {'step': 3} True", "gone"]
  assert {path.name for path in tmp_path.iterdir()} == {
      "1.corrupt", "3.corrupt", "5.corrupt", "saved"}
