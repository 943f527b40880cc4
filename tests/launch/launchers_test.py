"""The launchers' dry runs: whatever the machine, the same `sdjax train` line comes out whole."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
LINE = ["sdjax", "train", "--config", "configs/sd15.py:res=256", "--workdir", "gs://bucket/a run",
        "--config.c=\"it's & IMAGE\""]


def launch(*words, **environment):
  return subprocess.run(
      [str(word) for word in words], capture_output=True, text=True, timeout=60,
      env=os.environ | environment)


def test_tpu_vm_runs_the_line_on_all_workers():
  done = launch(LAUNCH / "tpu_vm.sh", "--dry-run", "--name", "pod", "--zone", "here", "--", *LINE)
  assert done.returncode == 0, done.stderr
  words = shlex.split(done.stdout)
  assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
  assert "--worker=all" in words
  remote = shlex.split(words[words.index("--command") + 1])
  assert remote == ["cd", "sdjax", "&&", "SDJAX_COORDINATOR=auto", *LINE]


def test_slurm_runs_the_line_on_all_nodes():
  done = launch(LAUNCH / "slurm.sbatch", "--dry-run", *LINE)
  assert done.returncode == 0, done.stderr
  words = shlex.split(done.stdout)
  assert words[-len(LINE):] == LINE
  assert "srun" in words


def test_slurm_tells_each_task_where_it_stands(tmp_path):
  """With Slurm's two programs played by scripts that run everything here."""
  for name, script in {
      "scontrol": 'printf "%s\\n" node7 node8',
      "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i "$@"; done'}.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / name).chmod(0o755)
  code = ("import os, sys; print(*(os.environ['SDJAX_' + name] for name in "
          "('COORDINATOR', 'NUM_PROCESSES', 'PROCESS_ID')), *sys.argv[1:])")
  done = launch(
      LAUNCH / "slurm.sbatch", sys.executable, "-c", code, "two words",
      PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="node[7-8]",
      SLURM_JOB_ID="45", SLURM_NTASKS="2")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
      "node7:20045 2 0 two words", "node7:20045 2 1 two words"]


def test_gke_puts_the_line_into_the_manifest():
  yaml = pytest.importorskip("yaml")
  done = launch(LAUNCH / "gke/launch.sh", "--dry-run", "--name", "sd15", "--image", "reg/sdjax:1",
                "--hosts", "8", "--", *LINE)
  assert done.returncode == 0, done.stderr
  manifest = yaml.safe_load(done.stdout)
  assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "sd15")
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 8
  (container,) = job["template"]["spec"]["containers"]
  assert container["command"] == LINE
  assert container["image"] == "reg/sdjax:1"
  environment = {entry["name"]: entry.get("value") for entry in container["env"]}
  assert environment["SDJAX_COORDINATOR"] == "sd15-workers-0-0.sd15:8476"
  assert environment["SDJAX_NUM_PROCESSES"] == "8"
  assert "SDJAX_PROCESS_ID" in environment


@pytest.mark.parametrize("words", [
    ["tpu_vm.sh", "--name", "pod", "--", "sdjax"],
    ["tpu_vm.sh", "--name", "pod", "--zone", "here"],
    ["tpu_vm.sh", "--nmae", "pod"],
    ["slurm.sbatch"],
    ["slurm.sbatch", "sdjax"],
    ["gke/launch.sh", "--image", "a", "--", "sdjax"],
    ["gke/launch.sh", "--name", "Not_A_Name", "--image", "a", "--", "sdjax"],
    ["gke/launch.sh", "--name", "a", "--image"]])
def test_a_bad_call_is_one_line_and_code_2(words):
  done = launch(LAUNCH / words[0], *words[1:], SLURM_JOB_NODELIST="")
  assert done.returncode == 2
  assert done.stdout == ""
  assert len(done.stderr.splitlines()) == 1 and "error:" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_is_content():
  scripts = [*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH.parent / ".ci/run"]
  done = launch("shellcheck", *scripts)
  assert done.returncode == 0, done.stdout
