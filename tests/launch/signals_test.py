"""Processes that are told to stop, stand still or die: who ends how, and what is left on disk."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sdjax.checkpoints import train_state
from sdjax.data import pack, shapes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import local_multiprocess  # noqa: E402

# `sdjax train` around a model of three numbers, so that it starts in seconds; a step takes 30 ms.
# argv: what to plant, then the command line. It says "compiling" and "step N" as they begin.
TRAINER = r"""
import math, os, sys, time
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np
from sdjax.cli import main
from sdjax.train import loop, programs

planted = sys.argv.pop(1)
sd = SimpleNamespace(is_xl=False, tokenize=lambda texts: np.zeros((len(texts), 1, 2), np.int32))
kernel = np.ones(3, np.float32)
drawn = [0]

@jax.custom_vjp
def gradient_of_weight(x, weight):
  return x
gradient_of_weight.defvjp(lambda x, weight: (x, weight), lambda weight, g: (g * weight, 0 * weight))

def loss(params, frozen, batch, key):
  error = params["unet"]["kernel"] - batch["moments"].mean((1, 2))[:, :3]
  found = jnp.mean(jnp.square(error)) + ("batch" in planted) * 0 * batch["weight"].mean()
  return gradient_of_weight(found, batch["weight"].mean()), {"mse": found}

def draw(data, draw=loop.draw_batch):
  time.sleep(0.03)
  batch = draw(data)
  drawn[0] += 1
  print("step", drawn[0], flush=True)
  if planted.startswith("nan") and (drawn[0] in (3, 4, 9) or drawn[0] > 9 and "ever" in planted):
    rows = lambda at: np.full(batch["weight"].shape, math.nan, np.float32)[at]
    weight = batch["weight"]
    batch |= {"weight": jax.make_array_from_callback(weight.shape, weight.sharding, rows)}
  if planted == "gone" and drawn[0] == 5 and jax.process_index() == 1:
    raise loop.Gone("shard 3 is gone")
  return batch

class Compiling(programs.Programs):
  def __call__(self, *args):
    if drawn[0] == 1:
      print("compiling", flush=True)
      if planted == "compile":
        np.asarray(jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: x * 1.1, x))(1.0))
    return super().__call__(*args)

loop.model.build = lambda *_: (sd, {name: {"kernel": kernel} for name in ("unet", "text_encoder")})
loop.loss_of, loop.draw_batch = lambda run: loss, draw
loop.export = lambda run, now: run.workdir
loop.programs.Programs = Compiling
sys.exit(main.main(sys.argv[1:]))
"""

pytestmark = pytest.mark.slow
LIMIT_S = 120  # of each process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("data")
  samples = []
  for sample in shapes.samples(48, seed=0):
    np.save(folder / "moments.npy", rng.standard_normal((8, 8, 8)).astype(np.float16))
    samples.append(
        {"moments.npy": (folder / "moments.npy").read_bytes(), "txt": sample["txt"], "json": {}})
  pack.write_shards(samples, folder / "latents", shard_size=16)
  return folder / "latents"


class Child:
  """A process and what it prints."""

  def __init__(self, words, environment):
    self.process = subprocess.Popen(
        words, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    self.output = ""
    limit = threading.Timer(LIMIT_S, self.process.kill)
    limit.daemon = True
    limit.start()

  def wait_for(self, text):
    """Reads up to the line that ends with `text`."""
    for line in self.process.stdout:
      self.output += line
      if line.rstrip().endswith(text):
        return
    pytest.fail(f"no {text!r} in:\n{self.output}")

  def finish(self, timeout_s=60):
    """Returns the exit code as a shell tells it, and the seconds until then."""
    began = time.monotonic()
    self.output += self.process.communicate(timeout=timeout_s)[0]
    code = self.process.returncode
    return code if code >= 0 else 128 - code, time.monotonic() - began


@pytest.fixture
def start(data, tmp_path, request):
  """(planted, processes, **changes to the config) -> one Child per process, without a launcher."""
  children = []

  def start_all(planted="nothing", processes=1, **changes):
    changes = {"data.urls": data, "data.random_crop": False, "data.random_flip": False,
               "preview.every_steps": 0, "log_every_steps": 1, "total_steps": 100_000,
               "checkpoint.every_steps": 0, "optimizer.warmup_steps": 0} | changes
    words = [sys.executable, "-c", TRAINER, planted, "train", "--config", "configs/sd15.py:tiny",
             "--workdir", str(tmp_path / "run"),
             *(f"--config.{name}={value}" for name, value in changes.items())]
    places = local_multiprocess.environments(processes, 2, local_multiprocess.free_port())
    children.extend(Child(words, place if processes > 1 else {}) for place in places)
    return children[-processes:]
  yield start_all
  for child in children:
    child.process.kill()
    child.process.wait()


def last_row(tmp_path):
  rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
  return rows[-1]


def saved(tmp_path):
  return train_state.Checkpoints(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("told", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_two_processes_save_the_same_step(start, tmp_path, told, number, code):
  children = start(processes=2)
  for child in children:
    child.wait_for("step 8")
  for index in told:
    children[index].process.send_signal(number)
  assert [child.finish()[0] for child in children] == [code, code], children[0].output
  step = last_row(tmp_path)["step"]
  assert saved(tmp_path).latest_step() == step < 40
  assert "after step" in children[0].output


def test_one_process(start, tmp_path):
  for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    child, = start()
    child.wait_for("step 4")
    child.process.send_signal(number)
    assert child.finish()[0] == code
    assert saved(tmp_path).latest_step() == last_row(tmp_path)["step"]
  child, = start(total_steps=saved(tmp_path).latest_step() + 3)
  assert child.finish() and "going on from step" in child.output and child.process.returncode == 0


@pytest.mark.parametrize("when", ["before", "compile", "twice"])
def test_what_has_nothing_to_lose_ends_at_once(start, tmp_path, when):
  """In the midst of a program, too: only the kernel can end a process there."""
  child, = start("compile" if when == "compile" else "nothing",
                 **{"checkpoint.every_steps": 2} if when == "twice" else {})
  if when == "compile":
    child.wait_for("compiling")
    time.sleep(1)
  elif when == "twice":
    child.wait_for("step 8")
    child.process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
  child.process.send_signal(signal.SIGTERM)
  code, took_s = child.finish()
  assert code == 143 and took_s < 10
  if when != "twice":
    assert saved(tmp_path).latest_step() is None
  else:
    before = saved(tmp_path).latest_step()
    assert before >= 4
    child, = start(total_steps=before + 2)
    assert child.finish()[0] == 0 and f"going on from step {before}" in child.output


def test_two_processes_in_the_midst_of_a_compile(start, tmp_path):
  children = start("compile", processes=2)
  for child in children:
    child.wait_for("compiling")
  time.sleep(1)
  for child in children:
    child.process.send_signal(signal.SIGTERM)
  assert [child.finish()[0] for child in children] == [143, 143]


def test_during_a_save_nothing_is_lost(start, tmp_path):
  child, = start(**{"checkpoint.every_steps": 1})
  child.wait_for("step 10")
  child.process.send_signal(signal.SIGTERM)
  assert child.finish()[0] == 143
  assert saved(tmp_path).latest_step() == last_row(tmp_path)["step"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_watchdog_ends_those_that_wait_for_a_stopped_one(start, tmp_path, stopped):
  timeout_s = 4
  children = start(processes=2, watchdog_s=timeout_s)
  for child in children:
    child.wait_for("step 8")
  children[stopped].process.send_signal(signal.SIGSTOP)
  code, took_s = children[1 - stopped].finish()
  assert code == 42, children[1 - stopped].output
  assert timeout_s - 1 < took_s < timeout_s + 2
  assert "in wait" in children[1 - stopped].output     # of journal.py: where the main thread was
  children[stopped].process.send_signal(signal.SIGCONT)
  assert children[stopped].finish()[0] != 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_dead_peer_is_noticed(start, tmp_path, killed):
  children = start(processes=2)
  for child in children:
    child.wait_for("step 8")
  children[killed].process.kill()
  code, took_s = children[1 - killed].finish()
  assert code != 0 and took_s < 15


def test_what_one_process_alone_meets_ends_all(start, tmp_path):
  children = start("gone", processes=2)
  code, _ = children[1].finish()
  assert code == 4 and "shard 3 is gone" in children[1].output
  code, took_s = children[0].finish()
  assert code != 0 and took_s < 15


@pytest.mark.parametrize("planted", ["nan in a batch", "nan in gradients"])
def test_what_is_not_finite_is_skipped_by_all_alike(start, tmp_path, planted):
  found = []
  for processes in (1, 2):
    children = start(planted, processes=processes, total_steps=12)
    assert [child.finish()[0] for child in children] == [0] * processes, children[0].output
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    found.append([[json.loads(row)[name] for name in ("step", "skipped_steps", "param_norm")]
                  for row in rows])
    for tree in saved(tmp_path).restore_params().values():
      assert np.isfinite(tree["unet"]["kernel"]).all()
    (tmp_path / "run").rename(tmp_path / f"of {processes}")
  alone, together = map(np.array, found)
  assert alone[alone[:, 1] == 1, 0].tolist() == [3, 4, 9]
  np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_too_much_of_it_ends_all_alike(start, tmp_path):
  children = start("nan in a batch for ever", processes=2, max_skipped=4,
                   **{"checkpoint.every_steps": 2})
  assert [child.finish()[0] for child in children] == [3, 3], children[0].output
  assert "4 steps in a row, up to step 12" in children[0].output
  assert saved(tmp_path).latest_step() == 10
  assert np.isfinite(saved(tmp_path).restore_params()["params"]["unet"]["kernel"]).all()
