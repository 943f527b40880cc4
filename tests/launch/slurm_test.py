"""The rendered job on a real Slurm of two nodes, both of them this machine, over the loopback."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sdjax.data import pack, shapes

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
KILL_WAIT_S = 10

pytestmark = [
    pytest.mark.slow, pytest.mark.slurm,
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)) or os.geteuid() != 0,
        reason="apt-get install slurmctld slurmd slurm-client munge, and be root")]

# The first node bears this machine's name, by which its tasks find each other; two slurmds may
# share a machine under different names and ports.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
KillWait={kill_wait}
NodeName={host} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=zz-second NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
  with contextlib.ExitStack() as stack:
    probes = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
    return [probe.getsockname()[1] for probe in probes]


def wait_until(condition, seconds, what):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, what()
    time.sleep(0.1)


def read(path):
  """Returns a log; srun may have cut a character of the progress bar in two."""
  return path.read_text(errors="replace") if path.exists() else ""


class Slurm:
  """A cluster of two nodes; `call` runs one of its programs."""

  def __init__(self, folder: Path):
    self.folder, self._daemons = folder, []
    self._environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

  def start(self):
    config = CONFIG.format(folder=self.folder, ports=free_ports(3), kill_wait=KILL_WAIT_S,
                           host=socket.gethostname())
    (self.folder / "slurm.conf").write_text(config)
    (self.folder / "state").mkdir()
    key = self.folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid",
             "log-file": "munge.log", "seed-file": "munge.seed"}
    self._daemon("munged", "--foreground", "--force",
                 *(f"--{option}={self.folder / name}" for option, name in files.items()))
    wait_until((self.folder / "munge.sock").exists, 20, self.logs)
    self._daemon("slurmctld", "-D")
    for node in (socket.gethostname(), "zz-second"):
      self._daemon("slurmd", "-D", "-N", node)
    wait_until(lambda: self.call("sinfo", "-h", "-o", "%D %t").stdout == "2 idle\n", 30, self.logs)

  def _daemon(self, *words):
    with open(self.folder / f"{len(self._daemons)}-{words[0]}.log", "w") as log:
      self._daemons.append(subprocess.Popen(words, env=self._environment, stdout=log, stderr=log))

  def stop(self):
    for daemon in reversed(self._daemons):
      daemon.send_signal(signal.SIGTERM)
      try:
        daemon.wait(timeout=10)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()

  def call(self, *words, script=None):
    return subprocess.run(words, env=self._environment, cwd=ROOT, input=script, text=True,
                          capture_output=True, timeout=60)

  def logs(self):
    return "\n".join(read(path)[-2000:] for path in self.folder.glob("*.log"))

  def job(self, number):
    """Returns what scontrol says of a job, as a dict."""
    words = self.call("scontrol", "-o", "show", "job", number).stdout.split()
    return dict(word.partition("=")[::2] for word in words)


@pytest.fixture(scope="module")
def slurm():
  try:
    socket.gethostbyname(socket.gethostname())
  except OSError:
    pytest.skip("this machine's name is not known to itself")
  # Not pytest's folder, whose name is too long for a socket's.
  with tempfile.TemporaryDirectory(prefix="slurm") as folder:
    cluster = Slurm(Path(folder))
    try:
      cluster.start()
      yield cluster
    finally:
      cluster.call("scancel", "--user", "root")
      cluster.stop()


def render(target, *options, command):
  done = subprocess.run(
      [sys.executable, ROOT / "launch/render.py", "slurm", target, *options, "--", *command],
      capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_sbatch_reads_the_script(slurm):
  script = render("cpu", "--name", "tiny", "--count", "2", command=["true"])
  done = slurm.call("sbatch", "--test-only", script=script)
  assert done.returncode == 0, done.stderr
  assert "zz-second" in done.stderr                     # it would start on both nodes
  done = slurm.call("sbatch", "--test-only", script=script.replace("--nodes", "--noddes"))
  assert done.returncode != 0
  # No node here has GPUs: the script is read, and then refused for that alone.
  script = render("h100-8", "--name", "tiny", "--count", "2", command=["true"])
  assert "not available" in slurm.call("sbatch", "--test-only", script=script).stderr


SAVES = """
if [[ -n "${SLURM_RESTART_COUNT:-}" ]]; then echo again; exit 0; fi
trap "echo saved; exit 143" TERM
echo up
while true; do sleep 0.1; done
"""


def test_before_its_time_is_up_a_job_requeues_itself(slurm, tmp_path):
  job = submit(slurm, tmp_path / "run", ["bash", "-c", SAVES])
  log = tmp_path / "run/log"
  wait_until(lambda: read(log).count("up\n") == 2, 60, slurm.logs)
  assert slurm.call("scancel", "--batch", "--signal=USR1", job).returncode == 0
  hurry(slurm, job)
  text = finish(slurm, job, tmp_path / "run")
  assert text.count("saved\n") == text.count("again\n") == 2, text
  assert "starting it again" not in text                # not by babysit.py: its node is taken away


@pytest.fixture(scope="module")
def line(tmp_path_factory):
  """(workdir) -> a tiny run of training over two processes, which lasts long enough."""
  rng = np.random.default_rng(0)
  data = tmp_path_factory.mktemp("data") / "latents"
  samples = []
  for sample in shapes.samples(48, seed=0):
    file = tmp_path_factory.getbasetemp() / "moments.npy"
    np.save(file, rng.standard_normal((8, 8, 8)).astype(np.float16))
    samples.append({"moments.npy": file.read_bytes(), "txt": sample["txt"], "json": {}})
  pack.write_shards(samples, data, shard_size=16)
  changes = {"data.urls": data, "preview.every_steps": 0, "log_every_steps": 1, "total_steps": 60,
             "checkpoint.every_steps": 15, "data.random_crop": False, "data.random_flip": False}

  def command(workdir):
    return [sys.executable, "-m", "sdjax.cli.main", "train", "--config", "configs/sd15.py:tiny",
            "--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in changes.items())]
  return command


def submit(slurm, workdir, command):
  workdir.mkdir()
  script = render("cpu", "--name", "tiny", "--count", "2", command=command)
  done = slurm.call("sbatch", "--parsable", f"--output={workdir}/log", script=script)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def finish(slurm, job, workdir):
  def log():
    return slurm.logs() + read(workdir / "log")
  wait_until(lambda: slurm.job(job).get("JobState") not in
             ("RUNNING", "PENDING", "COMPLETING", "REQUEUED"), 400, log)
  assert slurm.job(job)["JobState"] == "COMPLETED", log()
  return read(workdir / "log")


def hurry(slurm, job):
  """Lets a requeued job start again at once: Slurm would wait for two minutes."""
  wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", 60, slurm.logs)
  assert slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0


def results(workdir):
  tensors = {path.relative_to(workdir): safetensors.numpy.load_file(path)
             for path in sorted((workdir / "model").rglob("*.safetensors"))}
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return tensors, {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def test_a_requeued_job_ends_as_one_that_was_not(slurm, line, tmp_path):
  whole, requeued = tmp_path / "whole", tmp_path / "requeued"
  finish(slurm, submit(slurm, whole, line(whole)), whole)

  job = submit(slurm, requeued, line(requeued))
  # The folder of a step appears before it is whole; by then the one before is.
  wait_until((requeued / "checkpoints/30/checkpoint.json").is_file, 200,
             lambda: slurm.logs() + read(requeued / "log"))
  assert slurm.call("scontrol", "requeue", job).returncode == 0
  hurry(slurm, job)
  log = finish(slurm, job, requeued)
  assert slurm.job(job)["Restarts"] == "1"
  assert "going on from step" in log

  (found, numbers), (expected, all_numbers) = results(requeued), results(whole)
  assert numbers == all_numbers and list(numbers) == list(range(1, 61))
  assert found.keys() == expected.keys() and found
  for path, tensors in expected.items():
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(found[path][name], tensor, err_msg=f"{path} {name}")
