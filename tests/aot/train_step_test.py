"""What the training step becomes when it is compiled for 16 chips, without one.

Needs `libtpu` from PyPI. Each mesh compiles a small network in about a minute of two cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
pytest.importorskip("libtpu")

REMATERIALIZATION = "Involuntary full rematerialization"
WARNING = "config.mesh.fsdp at least 2"  # of an axis that spans all chips
ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys
from benchmarks import aot
aot.MESHES["zero1 over all"] = (dict(data=16), "zero1", "none", 1)
print(json.dumps(aot.measure(sys.argv[1], sys.argv[2])))
"""


def run(script, timeout_s, *args):
  """What a child process says on both streams, its last line last."""
  environment = os.environ | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
      "TPU_STDERR_LOG_LEVEL": "0", "TF_CPP_MIN_LOG_LEVEL": "0"}
  done = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, env=environment,
                        capture_output=True, text=True, timeout=timeout_s)
  assert done.returncode == 0, done.stderr
  return done.stderr + done.stdout


def compiled(model, mesh, timeout_s):
  """(what was measured, what the compiler said)."""
  said = run(MEASURE, timeout_s, model, mesh)
  return json.loads(said.splitlines()[-1]), said


def moved(found, kind):
  """Bytes of one kind of collective, by dtype."""
  return {key.split()[1]: size for key, size in found["collectives"].items()
          if key.startswith(kind + " ")}


def check(found, said, scattered):
  """Asserts what every mesh has in common; `scattered`: at least so much of what is split."""
  assert REMATERIALIZATION not in said
  assert WARNING not in said
  assert found["windowed"] == 0
  total = sum(found["collectives"].values())
  strays = [*moved(found, "collective-permute").values(), *moved(found, "all-to-all").values()]
  assert sum(strays) < 0.01 * total
  # The state takes the place of the one before; metrics are all that comes on top.
  assert 0 <= found["output"] - found["alias"] < 2**16

  whole, split = 2 * found["params"], 2 * found["split"]
  gathered = moved(found, "all-gather")
  assert gathered.pop("s32", 0) < 2**16                # tokens, where the table of words is split
  assert set(gathered) <= {"bf16"}
  assert sum(gathered.values()) <= 2.2 * (split + 2 * found["split_frozen"])
  assert sum(moved(found, "reduce-scatter").values()) >= scattered * split
  # The quarters of what is split, and all of what is not (that in float32 in part).
  bound = split / 4 + 2 * (whole - split) if split else whole
  assert sum(moved(found, "all-reduce").values()) <= 1.1 * bound + (1 - scattered) * split


@pytest.mark.parametrize("mesh", ["data", "fsdp", "zero1"])
def test_the_step_moves_what_the_rules_mean(mesh):
  # In a network so small a seventh of the kernels are too narrow to be scattered by tiles.
  check(*compiled("small", mesh, 900), scattered=0.8)


def test_splitting_over_all_chips_becomes_loops():
  """Else the warning of `partitioning.warn_of_windows` can go, and so can this test."""
  found, said = compiled("small", "zero1 over all", 900)
  assert found["windowed"] > 0
  assert WARNING in said


@pytest.mark.endurance
@pytest.mark.parametrize("mesh", ["data", "fsdp", "zero1"])
def test_stable_diffusion_fits(mesh):
  found, said = compiled("sd15", mesh, 3600)
  check(found, said, scattered=0.9)
  assert found["arguments"] + found["temporary"] < 15.75 * 2**30  # what XLA has of a v5e's 16 GB


RESHARD = """
import numpy as np
from benchmarks import aot
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
chips = topologies.get_topology_desc(aot.TOPOLOGY, "tpu").devices
mesh = Mesh(np.array(chips).reshape(2, 2, 4), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
before, after = (NamedSharding(mesh, spec) for spec in (P("a", "b"), P(None, ("a", "c"), "b")))
move = lambda x: jax.lax.with_sharding_constraint(x, after)
jax.jit(move, in_shardings=before, out_shardings=after).lower(
    jax.ShapeDtypeStruct((48, 48, 48), "float32")).compile()
"""


def test_a_rematerialization_would_be_heard():
  assert REMATERIALIZATION in run(RESHARD, 300)
