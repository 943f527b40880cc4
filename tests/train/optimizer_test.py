from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.train import optimizer


def config(**changes):
  return SimpleNamespace(**dict(
      name="adamw", learning_rate=1.0, warmup_steps=10, decay="constant", decay_from=0.0, b1=0.9,
      b2=0.999, eps=1e-8, weight_decay=0.1, clip_norm=1.0) | changes)


@pytest.mark.parametrize("decay, at, expected", [
    ("constant", 5, 0.5), ("constant", 99, 1.0),
    ("cosine", 55, 0.5), ("cosine", 100, 0.0),
    ("linear", 5, 0.5), ("linear", 50, 1.0), ("linear", 75, 0.5), ("linear", 100, 0.0),
])
def test_learning_rate(decay, at, expected):
  rate = optimizer.learning_rate(config(decay=decay, decay_from=0.5), total_steps=100)
  np.testing.assert_allclose(rate(at), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_kernels_decay(name):
  params = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
            "norm": {"scale": jnp.ones(2)}}
  tx = optimizer.make(config(name=name, warmup_steps=0), 10)
  zero = {"conv": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
          "norm": {"scale": jnp.zeros(2)}}
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["conv"]["kernel"], -0.1, rtol=1e-6)
  assert not updates["conv"]["bias"].any() and not updates["norm"]["scale"].any()


def test_muon_moves_kernels_along_all_directions_alike():
  rng = np.random.default_rng(0)
  shapes = {"conv": {"kernel": (3, 3, 8, 16), "bias": (16,)},
            "token_embedding": {"embedding": (9, 8)}}
  draw = lambda: {room: {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
                         for name, shape in leaves.items()} for room, leaves in shapes.items()}
  params, grads = draw(), draw()
  grads["conv"]["kernel"] *= jnp.arange(1, 17)  # singular values far apart
  changes = dict(warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
  moved, _ = (tx := optimizer.make(config(name="muon", **changes), 10)).update(
      grads, tx.init(params), params)
  singular = np.linalg.svd(np.asarray(moved["conv"]["kernel"]).reshape(72, 16), compute_uv=False)
  # U Vᵀ of the gradient, each entry 0.2 in root mean square: Liu et al. 2025, equation 4. The
  # polynomial of Newton and Schulz leaves singular values between 0.7 and 1.2.
  assert 0.65 < singular.min() / (0.2 * 72**0.5) and singular.max() / (0.2 * 72**0.5) < 1.25
  # What is no kernel moves as Adam moves it at its first step: all entries alike, by their signs.
  for room, name in (("conv", "bias"), ("token_embedding", "embedding")):
    step = np.abs(moved[room][name]).mean()
    np.testing.assert_allclose(moved[room][name], -step * np.sign(grads[room][name]), rtol=1e-4)


def test_unknown_decay_is_named():
  with pytest.raises(UserError, match="'sawtooth'"):
    optimizer.make(config(decay="sawtooth"), 10)


def test_unknown_optimizer_is_named():
  with pytest.raises(UserError, match="'sgd'"):
    optimizer.make(config(name="sgd"), 10)
