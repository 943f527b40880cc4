"""Checkpoints hold all of a state, and say when they do not fit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.checkpoints import train_state
from sdjax.errors import UserError
from sdjax.train import partitioning, state

TX = optax.adam(1e-3)


def tree(width):
  rng = np.random.default_rng(0)
  return {"unet": {"kernel": rng.normal(size=(4, width)).astype(np.float32)}}


def make(width=3):
  mesh = partitioning.make_mesh({"data": -1})
  shapes = state.shapes(tree(width), {"vae": {"bias": np.ones(2, np.float32)}}, TX)
  shardings = partitioning.shardings(shapes, mesh, ())
  return shapes, shardings, state.create(
      tree(width), {"vae": {"bias": np.ones(2, np.float32)}}, TX, 5, shardings)


def test_a_state_comes_back_whole_with_its_key_and_position(tmp_path):
  shapes, shardings, now = make()
  now = now.replace(step=now.step + 7, ema=jax.tree.map(lambda x: x + 1, now.ema))
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=2)) as saved:
    assert saved.latest_step() is None
    for step in (5, 6, 7):
      saved.save(step, now, {"step": step, "samples": 10})
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=2)) as saved:
    assert saved.latest_step() == 7
    back, position = saved.restore(7, shapes, shardings)
  assert position == {"step": 7, "samples": 10}
  assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["6", "7"]
  assert (jax.random.key_data(back.key) == jax.random.key_data(now.key)).all()
  plain = lambda s: jax.tree.leaves(s.replace(key=jnp.zeros(())))
  for a, b in zip(plain(back), plain(now), strict=True):
    np.testing.assert_array_equal(a, b)


def test_another_networks_checkpoint_is_refused(tmp_path):
  _, _, now = make()
  with contextlib.closing(train_state.Checkpoints(tmp_path, keep=1)) as saved:
    saved.save(1, now, {})
    shapes, shardings, _ = make(width=5)
    with pytest.raises(UserError, match="does not fit this config"):
      saved.restore(1, shapes, shardings)


def test_a_checkpoint_without_room_is_told_and_leaves_nothing(tmp_path, no_room):
  _, _, now = make(width=100_000)
  saved = train_state.Checkpoints(tmp_path, keep=1)
  with pytest.raises(UserError, match="make room"):  # at once, or from the background
    saved.save(1, now, {})
    saved.close()
  assert list(tmp_path.iterdir()) == []
