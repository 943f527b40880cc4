import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models.dropout import dropout_by_row


def drop(rows, rate=0.25, deterministic=False, seed=0):
  x = jnp.ones((len(rows), 64, 64))
  with dropout_by_row(jnp.array(rows)):
    return nn.Dropout(rate, deterministic=deterministic).apply(
        {}, x, rngs={"dropout": jax.random.key(seed)})


def test_a_row_is_masked_by_its_number_whatever_is_beside_it():
  y = drop([0, 1, 2, 3])
  np.testing.assert_array_equal(drop([2]), y[2:3])
  np.testing.assert_array_equal(drop([3, 1]), y[jnp.array([3, 1])])
  assert not np.array_equal(y[0], y[1]) and not np.array_equal(y, drop([0, 1, 2, 3], seed=1))


def test_as_much_is_dropped_as_was_asked_for_and_the_mean_stays():
  y = drop([0, 1, 2, 3])
  assert abs((y == 0).mean() - 0.25) < 0.02 and abs(y.mean() - 1) < 0.02
  assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75).item()}


def test_nothing_is_dropped_where_nothing_should_be():
  assert (drop([0], rate=0.0) == 1).all() and (drop([0], deterministic=True) == 1).all()
