"""Whatever becomes of the newest checkpoint, the one before is taken, and somebody says why."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from sdjax import pytrees
from sdjax.checkpoints import digests, train_state
from sdjax.errors import Gone
from sdjax.train import partitioning, state

ROOT = Path(__file__).parents[2]
TX = optax.adam(1e-3)
PARAMS = {"unet": {"kernel": np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32),
                   "bias": np.random.default_rng(1).normal(size=(8,)).astype(np.float32)}}


def make():
  mesh = partitioning.make_mesh({"data": -1})
  shapes = state.shapes(PARAMS, {}, TX)
  shardings = partitioning.shardings(shapes, mesh, ())
  return shapes, shardings, state.create(PARAMS, {}, TX, 5, shardings)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  """A folder with steps 10 and 20, whole."""
  folder = tmp_path_factory.mktemp("template") / "checkpoints"
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(folder, keep=5)) as saved:
    for step in (10, 20):
      saved.save(step, now.replace(step=now.step + step), {"step": step}, {})
  return folder


@pytest.fixture
def folder(template, tmp_path):
  return shutil.copytree(template, tmp_path / "checkpoints")


def words(now):
  """The leaves of a state as numpy arrays, by path."""
  plain = now.replace(key=jax.random.key_data(now.key))
  return {pytrees.path_of(path): np.array(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}


def resume(folder):
  """Returns the step that a run would go on from, and sees to it that it is that step."""
  shapes, shardings, now = make()
  found = train_state.Checkpoints(folder, keep=5).restore_newest(shapes, shardings, {})
  if found is None:
    return None
  step, back, position = found
  assert position == {"step": step}
  expected = words(now.replace(step=now.step + step))
  for path, leaf in words(back).items():
    assert leaf.tobytes() == expected[path].tobytes(), path
  return step


def pick(step, name):
  """The largest file of a step whose path matches."""
  return max((path for path in step.glob(name) if path.is_file()),
             key=lambda path: path.stat().st_size)


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


FILES = {"arrays": "**/d/*", "manifest": "manifest.ocdbt", "metadata": "_METADATA",
         "sharding": "_sharding", "array metadata": "array_metadatas/*",
         "record": "checkpoint.json"}
HURT = {"truncated": truncate, "emptied": lambda path: os.truncate(path, 0),
        "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("hurt", HURT)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_sends_back_to_the_step_before(folder, caplog, file, hurt):
  HURT[hurt](pick(folder / "20", FILES[file]))
  with caplog.at_level(logging.ERROR, logger="sdjax"):
    assert resume(folder) == 10
  assert (folder / "20.corrupt").is_dir() and not (folder / "20").exists()
  reasons = {"missing": ("No such file", "there is no"), "truncated": ("were written", "be read"),
             "emptied": ("has 0 bytes", "be read")}[hurt]
  (line,) = caplog.messages
  assert any(reason in line for reason in reasons) and line.endswith("It is now 20.corrupt")
  assert resume(folder) == 10                              # and says nothing new


@pytest.mark.parametrize("fill", ["empty", "half"])
def test_a_step_that_was_not_finished_is_passed_over(folder, caplog, fill):
  if fill == "empty":
    (folder / "30").mkdir()
  else:
    shutil.copytree(folder / "20", folder / "30")
    (folder / "30" / "checkpoint.json").unlink()
    (folder / "30" / "manifest.ocdbt").unlink()
  with caplog.at_level(logging.ERROR, logger="sdjax"):
    assert resume(folder) == 20
  assert "was not finished" in caplog.text
  assert (folder / "30.corrupt").is_dir()
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(folder, keep=5)) as saved:
    saved.save(30, now.replace(step=now.step + 30), {"step": 30}, {})
  assert not (folder / "30.corrupt").exists()              # nobody needs it now
  assert resume(folder) == 30


def test_bits_of_the_largest_file(folder):
  """Orbax alone gives most of these back without a word; some bits mean nothing."""
  rng = np.random.default_rng(0)
  path = pick(folder / "20", FILES["arrays"])
  whole = path.read_bytes()
  shutil.copytree(folder / "20", folder.parent / "20")
  steps = []
  for _ in range(12):
    shutil.copytree(folder.parent / "20", folder / "20", dirs_exist_ok=True)
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    steps.append(resume(folder))             # asserts that 20 would be the true 20
  assert steps.count(10) >= 10


def test_arrays_that_cannot_be_unpacked(folder, caplog):
  path = pick(folder / "20", FILES["arrays"])
  raw = path.read_bytes()
  zstd = b"\x28\xb5\x2f\xfd"                               # how each packed part begins
  assert zstd in raw
  path.write_bytes(raw.replace(zstd, b"\x29" + zstd[1:]))
  assert resume(folder) == 10
  assert "Orbax cannot read it" in caplog.text


def flipped(now, path, rng):
  """The state with one bit of one leaf changed."""
  def flip(at, leaf):
    if pytrees.path_of(at) != path:
      return leaf
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.array(jax.random.key_data(leaf) if is_key else leaf)
    raw = array.reshape(-1).view(np.uint8)
    raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
    damaged = jax.device_put(array, leaf.sharding)
    return jax.random.wrap_key_data(damaged, impl="threefry2x32") if is_key else damaged
  return jax.tree_util.tree_map_with_path(flip, now)


def test_one_bit_of_any_leaf(folder, monkeypatch, caplog):
  _, _, now = make()
  now = now.replace(step=now.step + 30)
  true = digests.of(now)
  rng = np.random.default_rng(0)
  for path in true:
    with monkeypatch.context() as patch, contextlib.closing(
        train_state.Checkpoints(folder, keep=5)) as saved:
      patch.setattr(digests, "of", lambda _: true)
      saved.save(30, flipped(now, path, rng), {"step": 30}, {})
    assert resume(folder) == 20
    assert f"the values of {path} are not" in caplog.text


def test_the_position_in_the_record(folder):
  """A position of the data with one digit changed would be read as JSON without a word."""
  path = folder / "20" / "checkpoint.json"
  text = path.read_text()
  assert text.count('"position": {"step": 20}') == 1
  path.write_text(text.replace('"position": {"step": 20}', '"position": {"step": 21}'))
  assert resume(folder) == 10


def damage_all(folder, hurt):
  for step in ("10", "20"):
    for path in sorted((folder / step).rglob("*")):
      if path.is_file():
        hurt(path)


@pytest.mark.parametrize("hurt", HURT)
def test_all_damaged_is_gone_and_stays_gone(folder, hurt):
  damage_all(folder, HURT[hurt])
  for _ in range(2):                         # also when the same command is given once more
    with pytest.raises(Gone, match="no checkpoint.*whole") as caught:
      resume(folder)
  assert caught.value.exit_code == 4
  assert {path.name for path in folder.glob("*.corrupt")} == {"10.corrupt", "20.corrupt"}


def test_a_first_step_that_was_not_finished_is_no_step(folder):
  shutil.rmtree(folder / "20")
  for name in ("saved", "10/checkpoint.json"):
    (folder / name).unlink()
  assert resume(folder) is None
  assert resume(folder) is None


# argv: a folder. Saves step 10 on 8 devices, reads it on other meshes, and is killed in step 20.
SCRIPT = r"""
import os, signal, sys
import jax, numpy as np
from jax.sharding import AxisType
from sdjax.checkpoints import digests, records, train_state
from sdjax.train import partitioning, state
from tests.checkpoints.damage_test import PARAMS, TX

found = {}
def on(data, fsdp):
  mesh = jax.make_mesh((data, fsdp, 1), partitioning.AXES, axis_types=(AxisType.Auto,) * 3,
                       devices=jax.devices()[:data * fsdp])
  shapes = state.shapes(PARAMS, {}, TX)
  return shapes, partitioning.shardings(shapes, mesh, ((".*", "fsdp"),))

partitioning.MIN_SHARDED_SIZE = 64
shapes, shardings = on(2, 4)
now = state.create(PARAMS, {}, TX, 5, shardings)
now = now.replace(step=now.step + 10)
saved = train_state.Checkpoints(sys.argv[1])
saved.save(10, now, {"step": 10}, {})
saved.close()
expected = digests.of(now)
for data, fsdp in ((1, 1), (2, 1), (1, 4), (8, 1), (1, 8)):
  shapes, shardings = on(data, fsdp)
  step, back, _ = saved.restore_newest(shapes, shardings, {})
  kernel = back.params["unet"]["kernel"]
  assert kernel.addressable_shards[0].data.size * fsdp == kernel.size
  assert digests.of(back) == expected, (data, fsdp)
print("agree", flush=True)

records.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
saved.save(20, now, {"step": 20}, {})
saved.close()
"""


def test_any_mesh_and_a_kill_while_saving(tmp_path):
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  child = subprocess.run(
      [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300,
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
  assert child.stdout == "agree\n", child.stderr
  assert child.returncode == -signal.SIGKILL
  assert (tmp_path / "20").is_dir()
  assert resume(tmp_path) == 10                            # here, on another number of devices
  assert (tmp_path / "20.corrupt").is_dir()
