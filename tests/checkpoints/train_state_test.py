"""Checkpoints hold all of a run, say when they do not fit, and survive a full disk."""

import contextlib
import json
import logging
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.checkpoints import train_state
from sdjax.errors import Gone, UserError
from sdjax.train import partitioning, state

TX = optax.adam(1e-3)
CONFIG = {"seed": 0, "total_steps": 9, "optimizer": {"name": "adamw", "rate": 1e-4},
          "data": {"urls": "a", "mix": [1, 2]}}


def tree(width):
  rng = np.random.default_rng(0)
  return {"unet": {"kernel": rng.normal(size=(4, width)).astype(np.float32)}}


def make(width=3):
  mesh = partitioning.make_mesh({"data": -1})
  shapes = state.shapes(tree(width), {"vae": {"bias": np.ones(2, np.float32)}}, TX)
  shardings = partitioning.shardings(shapes, mesh, ())
  return shapes, shardings, state.create(
      tree(width), {"vae": {"bias": np.ones(2, np.float32)}}, TX, 5, shardings)


def assert_same(found, expected):
  plain = lambda s: jax.tree.leaves(s.replace(key=jax.random.key_data(s.key)))
  for a, b in zip(plain(found), plain(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def steps_in(folder):
  return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_state_comes_back_whole_with_its_key_and_position(tmp_path):
  shapes, shardings, now = make()
  now = now.replace(step=now.step + 7, ema=jax.tree.map(lambda x: x + 1, now.ema))
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=2)) as saved:
    assert saved.latest_step() is None
    assert saved.restore_newest(shapes, shardings, CONFIG) is None
    for step in (5, 6, 7, 7):
      saved.save(step, now, {"step": step, "samples": 10}, CONFIG)
    # Training goes on in the same buffers while the step is being written.
    advance = jax.jit(lambda s: s.replace(ema=jax.tree.map(lambda x: x * 0, s.ema)),
                      donate_argnums=0)
    kept = jax.device_get(now.replace(key=jax.random.key_data(now.key)))
    advance(now)
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=2)) as saved:
    assert saved.latest_step() == 7
    step, back, position = saved.restore_newest(shapes, shardings, CONFIG)
  assert (step, position) == (7, {"step": 7, "samples": 10})
  assert steps_in(tmp_path) == ["6", "7"]
  assert_same(back, kept.replace(key=jax.random.wrap_key_data(kept.key, impl="threefry2x32")))


def test_a_step_tells_what_made_it(tmp_path):
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(tmp_path)) as saved:
    saved.save(3, now, {"step": 3}, CONFIG)
  facts = json.loads((tmp_path / "3" / "checkpoint.json").read_text())["facts"]
  assert facts["config"] == CONFIG
  assert facts["versions"]["jax"] == jax.__version__
  assert set(facts["versions"]) == {"sdjax", "jax", "orbax"}
  assert facts["leaves"]["params/unet/kernel"] == ["float32", [4, 3]]


def test_what_stays(tmp_path):
  """The newest two, each fourth, and the best, also after a new start."""
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=2, keep_every=4)) as saved:
    for step in range(1, 7):
      saved.save(step, now, {}, CONFIG)
      if step == 3:
        saved.mark_best(3)
  assert steps_in(tmp_path) == ["3", "4", "5", "6"]
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=2, keep_every=4)) as saved:
    saved.save(7, now, {}, CONFIG)
    saved.mark_best(7)
    saved.save(9, now, {}, CONFIG)
  assert steps_in(tmp_path) == ["4", "7", "9"]
  with pytest.raises(UserError, match="at least 1"):
    train_state.Checkpoints(tmp_path, keep=0)


def test_parameters_alone(tmp_path):
  _, _, now = make()
  now = now.replace(ema=jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), now.ema))
  saved = train_state.Checkpoints(tmp_path)
  with pytest.raises(Gone, match="no checkpoint"):
    saved.restore_params()
  saved.save(1, now, {}, CONFIG)
  saved.close()
  found = saved.restore_params()
  assert found.keys() == {"params", "ema"}
  np.testing.assert_array_equal(found["params"]["unet"]["kernel"], tree(3)["unet"]["kernel"])
  assert isinstance(found["ema"]["unet"]["kernel"], np.ndarray)
  np.testing.assert_array_equal(found["ema"]["unet"]["kernel"], now.ema["unet"]["kernel"])
  with pytest.raises(Gone, match="another step"):
    saved.restore_params(2)


def test_another_networks_checkpoint_is_refused_and_stays(tmp_path):
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(tmp_path)) as saved:
    saved.save(1, now, {}, CONFIG)
  shapes, shardings, _ = make(width=5)
  with pytest.raises(UserError, match=r"does not fit .*kernel.*\[4, 3\] there.*\[4, 5\] here"):
    saved.restore_newest(shapes, shardings, None)
  assert steps_in(tmp_path) == ["1"]


@pytest.mark.parametrize("change, told", [
    ({"seed": 1}, ["seed: 0 → 1"]),
    ({"optimizer": {"name": "muon", "rate": 2e-4}},
     ["optimizer.name: adamw → muon", "optimizer.rate: 0.0001 → 0.0002"]),
    ({"data": {"urls": "b", "mix": [1, 3]}}, ["data.mix: [1, 2] → [1, 3]"]),
    ({"trigger": "x"}, ["trigger: absent → x"]),
    ({"total_steps": 99, "mesh": {"data": 4}, "checkpoint": {"keep": 3},
      "data": {"urls": "b", "mix": (1, 2)}}, [])],
    ids=["seed", "optimizer", "data", "new key", "changeable"])
def test_a_changed_config_is_refused_key_by_key(tmp_path, change, told):
  shapes, shardings, now = make()
  with contextlib.closing(train_state.Checkpoints(tmp_path)) as saved:
    saved.save(1, now, {}, CONFIG)
  changed = CONFIG | change
  if told:
    with pytest.raises(UserError) as caught:
      saved.restore_newest(shapes, shardings, changed)
    listed = str(caught.value).partition("/1: ")[2]
    assert all(one in listed for one in told) and "urls" not in listed
    assert listed.count("→") == len(told)
    assert steps_in(tmp_path) == ["1"]
    changed = None                                       # config.resume_changed
  step, _, _ = saved.restore_newest(shapes, shardings, changed)
  assert step == 1


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 1 MiB."""
  if os.geteuid() != 0 or not shutil.which("mount"):
    pytest.skip("only root can mount")
  folder = tmp_path / "disk"
  folder.mkdir()
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder],
                    capture_output=True).returncode:
    pytest.skip("nothing can be mounted here")
  yield folder
  subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_does_not_stop_training(small_disk, caplog):
  shapes, shardings, now = make(width=10_000)              # a step takes about half the disk
  saved = train_state.Checkpoints(small_disk / "checkpoints", keep=5)
  filler = small_disk / "filler"
  with caplog.at_level(logging.ERROR, logger="sdjax"):
    saved.save(1, now, {"step": 1}, CONFIG)
    saved._settle()
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    for step in (2, 3):
      saved.save(step, now, {"step": step}, CONFIG)
    saved._settle()
  assert saved.failed_saves == 2
  assert steps_in(small_disk / "checkpoints") == ["1"]
  assert "STEP 3 IS NOT SAVED: No space left" in caplog.text
  assert "after step 1" in caplog.text
  filler.unlink()
  saved.save(4, now, {"step": 4}, CONFIG)
  saved.close()                                            # the last one is whole: no error
  assert saved.failed_saves == 2
  step, back, _ = saved.restore_newest(shapes, shardings, CONFIG)
  assert step == 4
  assert_same(back, now)


def test_a_run_that_ends_without_its_last_checkpoint_says_so(tmp_path, no_room):
  _, _, now = make(width=100_000)
  saved = train_state.Checkpoints(tmp_path)
  saved.save(1, now, {}, CONFIG)
  with pytest.raises(UserError, match="File too large.*make room.*begins anew"):
    saved.close()
  assert saved.failed_saves == 1
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path):
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(tmp_path)) as saved:
    (tmp_path / "1").write_text("in the way")
    saved.save(1, now, {}, CONFIG)
    assert saved.failed_saves == 1
    saved.save(2, now, {}, CONFIG)
  assert saved.latest_step() == 2
