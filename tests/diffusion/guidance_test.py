import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import guidance


def test_pairs_stay_neighbours():
  pairs = guidance.interleave(jnp.array([[1.0], [2.0]]), jnp.array([[-1.0], [-2.0]]))
  np.testing.assert_array_equal(pairs[:, 0], [1, -1, 2, -2])


def test_scale_extrapolates_from_unconditional_through_conditional_per_image():
  context = guidance.interleave(jnp.array([10.0, 20.0]), jnp.array([1.0, 2.0]))
  network = lambda x, t: x * 0 + (context + t)[:, None, None, None]
  x, t = jnp.zeros((2, 1, 1, 1)), jnp.array([100.0, 200.0])
  guided = guidance.classifier_free(network, jnp.array([1.0, 3.0]))(x, t)
  # Scale 1 is the conditional output; scale 3: 202 + 3·(220 - 202).
  np.testing.assert_allclose(guided[:, 0, 0, 0], [110.0, 256.0])
  everywhere_zero = guidance.classifier_free(network, jnp.float32(0.0))(x, t)
  np.testing.assert_allclose(everywhere_zero[:, 0, 0, 0], [101.0, 202.0])
