"""Small data sets that the tests of training share, and one command that trains."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdjax.data import pack, shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """A folder of shards: 48 pictures of shapes with captions."""
  out = tmp_path_factory.mktemp("data") / "pictures"
  pack.write_shards(shapes.samples(48, seed=0), out, shard_size=16)
  return out


def write_latents(out, moments):
  """Packs a latents cache without an autoencoder: of arrays, with captions of shapes."""
  def samples():
    for sample, array in zip(shapes.samples(len(moments), seed=0), moments, strict=True):
      file = io.BytesIO()
      np.save(file, array)
      yield {"moments.npy": file.getvalue(), "txt": sample["txt"], "json": {}}

  pack.write_shards(samples(), out, shard_size=16)
  return out


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
  """A latents cache of the tiny model's shape."""
  moments = np.random.default_rng(0).standard_normal((48, 8, 8, 8)).astype(np.float16)
  return write_latents(tmp_path_factory.mktemp("data") / "latents", moments)


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
  """A latents cache for few_numbers.py: one number of each sample tells which it is."""
  moments = np.random.default_rng(0).standard_normal((48, 8, 8, 8)).astype(np.float16)
  moments[:, 0, 0, -1] = np.arange(48)
  return write_latents(tmp_path_factory.mktemp("data") / "numbered", moments)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  """Variables of a child process on the CPU, whose programs are compiled once for all tests."""
  return os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
      "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture(scope="session")
def arguments():
  """(data, workdir, changes) -> the command line of a tiny run, after `sdjax`."""
  def line(data: Path, workdir: Path, changes: dict) -> list[str]:
    changes = {"data.urls": data, "preview.every_steps": 0, "log_every_steps": 1} | changes
    return ["train", "--config", str(ROOT / "configs" / "sd15.py:tiny"), "--workdir",
            str(workdir), *(f"--config.{name}={value}" for name, value in changes.items())]
  return line


@pytest.fixture(scope="session")
def start(environment):
  """Starts `sdjax` in a child process; what is left of it is killed when all tests end."""
  children = []

  def start_one(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, *launcher, "-m", "sdjax.cli.main", *args], env=environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children.append(child)
    return child

  yield start_one
  for child in children:
    child.kill()
    child.wait()


@pytest.fixture(scope="session")
def numbers():
  """workdir -> {step: what does not depend on the clock} of a run's metrics."""
  names = ("loss", "mse", "grad_norm", "update_norm", "learning_rate")

  def read(workdir: Path) -> dict[int, tuple[float, ...]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: tuple(row[name] for name in names) for row in rows}
  return read


@pytest.fixture(scope="session")
def alone(start, arguments, numbers, latents, tmp_path_factory):
  """(workdir, changes to the config) of ten steps on latents by one process with one device."""
  changes = {"total_steps": 10, "checkpoint.every_steps": 2, "data.random_crop": False,
             "data.random_flip": False, "optimizer.warmup_steps": 0}
  workdir = tmp_path_factory.mktemp("alone")
  child = start(*arguments(latents, workdir, changes))
  output, _ = child.communicate(timeout=400)
  assert child.returncode == 0, output
  found = numbers(workdir)
  assert list(found) == list(range(1, 11))
  assert all(update_norm > 1e-3 for _, _, _, update_norm, _ in found.values())  # all steps move
  return workdir, changes
