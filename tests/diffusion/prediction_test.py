import numpy as np
import pytest

from sdjax.diffusion import prediction


@pytest.mark.parametrize("prediction_type", prediction.TYPES)
def test_coefficients_recover_signal_and_noise_from_the_target(prediction_type):
  rng = np.random.default_rng(0)
  x0, noise = rng.normal(size=(2, 5))
  angle = np.array([0.01, 0.4, 0.8, 1.2, 1.56])
  a, s = np.cos(angle), np.sin(angle)
  x = a * x0 + s * noise
  output = prediction.target(prediction_type, x0, noise, a, s)
  c = prediction.coefficients(prediction_type, a, s)
  np.testing.assert_allclose(c.c_skip * x + c.c_out * output, x0, atol=1e-12)
  np.testing.assert_allclose(c.e_skip * x + c.e_out * output, noise, atol=1e-12)


def test_v_says_all_at_pure_noise_and_eps_nothing():
  v = prediction.coefficients("v_prediction", 0.0, 1.0)
  assert (v.c_skip, v.c_out) == (0.0, -1.0)
  assert not np.isfinite(prediction.coefficients("epsilon", 0.0, 1.0).c_out)
