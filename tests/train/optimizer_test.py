from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.train import optimizer


def config(**changes):
  return SimpleNamespace(**dict(
      learning_rate=1.0, warmup_steps=10, decay="constant", decay_from=0.0, b1=0.9, b2=0.999,
      eps=1e-8, weight_decay=0.1, clip_norm=1.0) | changes)


@pytest.mark.parametrize("decay, at, expected", [
    ("constant", 5, 0.5), ("constant", 99, 1.0),
    ("cosine", 55, 0.5), ("cosine", 100, 0.0),
    ("linear", 5, 0.5), ("linear", 50, 1.0), ("linear", 75, 0.5), ("linear", 100, 0.0),
])
def test_learning_rate(decay, at, expected):
  rate = optimizer.learning_rate(config(decay=decay, decay_from=0.5), total_steps=100)
  np.testing.assert_allclose(rate(at), expected, atol=1e-6)


def test_only_kernels_decay():
  params = {"conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
            "norm": {"scale": jnp.ones(2)}}
  tx = optimizer.make(config(warmup_steps=0), 10)
  zero = {"conv": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
          "norm": {"scale": jnp.zeros(2)}}
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["conv"]["kernel"], -0.1, rtol=1e-6)
  assert not updates["conv"]["bias"].any() and not updates["norm"]["scale"].any()


def test_unknown_decay_is_named():
  with pytest.raises(UserError, match="'sawtooth'"):
    optimizer.make(config(decay="sawtooth"), 10)
