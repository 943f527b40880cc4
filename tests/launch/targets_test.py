"""The table of targets: consistent in itself, and made of settings that the software knows."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import targets

ROOT = Path(__file__).parents[2]
RUN = ROOT / "launch/run.sh"
SHOW = "import os, sys; print(*(os.environ.get(name, '-') for name in sys.argv[1].split()))"


def run(*words, **environment):
  path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
  return subprocess.run([RUN, *words], capture_output=True, text=True, timeout=60,
                        env=os.environ | {"PATH": path} | environment)


@pytest.mark.parametrize("name", [n for n, t in targets.TARGETS.items() if t.platform == "tpu"])
def test_slices_are_their_topology(name):
  target = targets.TARGETS[name]
  generation, size = name.split("-")
  chips = math.prod(map(int, target.topology.split("x")))
  assert target.hosts * target.chips_per_host == chips
  assert int(size) == chips * (2 if generation in ("v4", "v5p") else 1)
  assert target.aot == f"{generation}:{target.topology}"
  assert target.accelerator.endswith(f"-{size}")
  assert len(target.topology.split("x")) == (3 if generation in ("v4", "v5p") else 2)


def test_some_targets_are_as_google_states_them():
  """From https://cloud.google.com/tpu/docs/v5e, v6e, v5p, v4 and GKE's table."""
  rows = {name: (t.hosts, t.chips_per_host, t.hbm_gib, t.topology, t.gke_accelerator)
          for name, t in targets.TARGETS.items()}
  assert rows["v5e-16"] == (4, 4, 16, "4x4", "tpu-v5-lite-podslice")
  assert rows["v5e-8"] == (1, 8, 16, "2x4", "tpu-v5-lite-podslice")
  assert rows["v6e-256"] == (64, 4, 32, "16x16", "tpu-v6e-slice")
  assert rows["v5p-128"] == (16, 4, 95, "4x4x4", "tpu-v5p-slice")
  assert rows["v4-32"] == (4, 4, 32, "2x2x4", "tpu-v4-podslice")


def test_every_setting_has_a_reason():
  for target in targets.TARGETS.values():
    assert target.settings
    assert all(len(reason.split()) > 3 for _, _, reason in target.settings)


def test_xla_knows_the_flags_of_gpus():
  """An unknown flag in XLA_FLAGS ends the process when a backend starts, on CPUs, too."""
  flags = " ".join(value for name, value, _ in targets.GPU if name == "XLA_FLAGS")
  assert flags
  done = subprocess.run(
      [sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True,
      timeout=100, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
  assert done.returncode == 0, done.stderr


def test_run_sets_the_environment_and_spares_the_users():
  names = "XLA_FLAGS NCCL_LAUNCH_MODE XLA_CLIENT_MEM_FRACTION"
  done = run("h100-8", sys.executable, "-c", SHOW, names, XLA_FLAGS="--mine=1",
             NCCL_LAUNCH_MODE="PARALLEL")
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == [
      "--xla_gpu_enable_latency_hiding_scheduler=true", "--mine=1", "PARALLEL", "0.9"]


def test_run_spares_the_old_name_of_a_variable():
  """JAX ends with a ValueError where both names are set."""
  names = "XLA_CLIENT_MEM_FRACTION XLA_PYTHON_CLIENT_MEM_FRACTION"
  words = ["h100-8", sys.executable, "-c", SHOW, names]
  assert run(*words, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5").stdout == "- 0.5\n"
  assert run(*words, XLA_CLIENT_MEM_FRACTION="0.6").stdout == "0.6 -\n"


def test_run_keeps_words_and_code_and_babysits(tmp_path):
  code = "import sys; print(sys.argv[1:]); sys.exit(3)"
  words = ["--workdir", "a b", "it's", "$HOME & *", ""]
  done = run("cpu", sys.executable, "-c", code, *words)
  assert (done.returncode, done.stdout) == (3, f"{words}\n")
  once = "import os, sys; p = sys.argv[1]; os.path.isdir(p) or sys.exit(os.mkdir(p) or 42)"
  done = run("cpu", sys.executable, "-c", once, str(tmp_path / "seen"))
  assert done.returncode == 0 and "hung" in done.stderr


def test_run_caches_programs_where_all_hosts_see_them(monkeypatch):
  words = ["cpu", sys.executable, "-c", SHOW, "JAX_COMPILATION_CACHE_DIR", "--workdir", "/nfs/run"]
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  assert run(*words).stdout == "/nfs/run/compiled\n"
  assert run(*words, JAX_COMPILATION_CACHE_DIR="mine").stdout == "mine\n"


@pytest.mark.parametrize("words", [[], ["cpu"], ["v5e-17", "sdjax"]])
def test_a_bad_call_is_one_line_and_code_2(words):
  done = run(*words)
  assert done.returncode == 2 and done.stdout == ""
  assert len(done.stderr.splitlines()) == 1 and "error:" in done.stderr
