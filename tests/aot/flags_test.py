"""libtpu knows the flags that launch/targets.py sets: an unknown one ends the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
pytest.importorskip("libtpu")

ROOT = Path(__file__).parents[2]
START = """
from jax.experimental import topologies
print(len(topologies.get_topology_desc("v6e:4x4", "tpu").devices))
"""


def start(flags=""):
  """Starts libtpu in the environment of v6e-16, which has the flags of all TPUs."""
  environment = os.environ | {
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": flags}
  done = subprocess.run(
      ["bash", "-c", 'eval "$("$1" launch/targets.py v6e-16)"; echo "$LIBTPU_INIT_ARGS" >&2; '
       '"$1" -c "$2"', "bash", sys.executable, START],
      cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
  return done.returncode, done.stdout, done.stderr


def test_libtpu_knows_the_flags():
  code, printed, said = start()
  assert (code, printed) == (0, "16\n"), said
  assert "--xla_tpu_scoped_vmem_limit_kib=98304" in said


def test_an_unknown_flag_would_be_heard():
  code, printed, said = start("--no_such_flag=1")
  assert (code != 0 or printed != "16\n") and "no_such_flag" in said.partition("\n")[2]
