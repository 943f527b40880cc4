import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import objectives, prediction, schedules
from sdjax.errors import UserError

SCHEDULE = schedules.Schedule()


def test_corrupt_mixes_signal_and_noise_as_the_schedule_says():
  objective = objectives.Objective(SCHEDULE, "epsilon")
  x0 = jax.random.normal(jax.random.key(1), (16, 4, 4, 2))
  noisy = objectives.corrupt(objective, jax.random.key(2), x0)
  alpha_bar = schedules.alphas_bar(SCHEDULE)[np.asarray(noisy.t, int)][:, None, None, None]
  # The epsilon target is the noise itself.
  expected = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * noisy.target
  np.testing.assert_allclose(noisy.x_t, expected, atol=1e-5)
  assert abs(float(jnp.std(noisy.target)) - 1) < 0.1


def test_every_target_names_the_same_clean_latent():
  x0 = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
  for prediction_type in prediction.TYPES:
    objective = objectives.Objective(SCHEDULE, prediction_type)
    noisy = objectives.corrupt(objective, jax.random.key(2), x0)
    alpha_bar = schedules.alphas_bar(SCHEDULE)[np.asarray(noisy.t, int)][:, None, None, None]
    c = prediction.coefficients(prediction_type, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    np.testing.assert_allclose(c.c_skip * noisy.x_t + c.c_out * noisy.target, x0, atol=2e-4)


def draws(objective, batch=8, count=4000):
  density = objectives.density(objective)
  draw = jax.vmap(lambda key: objectives.stratified_timesteps(key, batch, density))
  return np.asarray(draw(jax.random.split(jax.random.key(0), count)))


def test_timesteps_are_one_per_stratum_and_uniform_over_many_draws():
  t = draws(objectives.Objective(SCHEDULE))
  assert t.min() >= 0 and t.max() <= 999
  assert (np.sort(t // 125, axis=1) == np.arange(8)).mean() > 0.99
  histogram = np.bincount(t[:, 3] // 100, minlength=10) / 4000
  np.testing.assert_allclose(histogram, 0.1, atol=0.02)


def test_the_share_of_high_noise_is_what_was_asked_for():
  t = draws(objectives.Objective(SCHEDULE, high_noise_share=0.4, high_noise_from=900))
  # 0.4 of them, and a tenth of the uniform rest; both parts flat.
  assert abs((t >= 900).mean() - 0.46) < 0.005
  for begin, end, share in ((0, 450, 0.27), (450, 900, 0.27), (900, 950, 0.23), (950, 1000, 0.23)):
    assert abs(((t >= begin) & (t < end)).mean() - share) < 0.005
  only_last = objectives.Objective(SCHEDULE, high_noise_share=1.0, high_noise_from=999)
  assert (draws(only_last) == 999).all()


def test_min_snr_weights_are_the_papers_x0_weight_whatever_the_target():
  # An error d of the target is an error c_out·d of x0: weight / c_out² must be min(snr, gamma).
  alpha_bar = schedules.alphas_bar(SCHEDULE)
  snr = alpha_bar / (1 - alpha_bar)
  for prediction_type in prediction.TYPES:
    objective = objectives.Objective(SCHEDULE, prediction_type, "min_snr", gamma=5.0)
    c_out = prediction.coefficients(
        prediction_type, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)).c_out
    np.testing.assert_allclose(
        objectives.weights(objective), c_out**2 * np.minimum(snr, 5.0), rtol=1e-9)


def test_min_snr_is_finite_at_zero_terminal_snr():
  schedule = dataclasses.replace(SCHEDULE, zero_terminal_snr=True)
  for prediction_type in prediction.TYPES:
    objective = objectives.Objective(schedule, prediction_type, "min_snr")
    assert np.isfinite(objectives.weights(objective)).all()


def test_noise_offset_shifts_whole_channels():
  x0 = jnp.zeros((64, 8, 8, 2))
  objective = objectives.Objective(SCHEDULE, "epsilon", noise_offset=1.0)
  noise = objectives.corrupt(objective, jax.random.key(0), x0).target
  means = np.asarray(noise.mean(axis=(1, 2)))
  assert 0.7 < means.std() < 1.3  # without an offset it would be 1/8


def test_bad_choices_are_user_errors():
  for bad in (dict(prediction_type="noise"), dict(weighting="p2"), dict(gamma=0.0),
              dict(high_noise_share=1.5), dict(high_noise_from=1000)):
    with pytest.raises(UserError):
      objectives.Objective(SCHEDULE, **bad)
