import numpy as np
import pytest

from sdjax.diffusion import schedules
from sdjax.errors import UserError


def test_alphas_bar_are_the_product_of_the_papers_betas():
  # DDPM (2020), section 4, written as a loop; latent diffusion's is linear in sqrt(beta).
  linear = schedules.Schedule("linear", 1e-4, 0.02)
  scaled = schedules.Schedule("scaled_linear", 0.00085, 0.012)
  for schedule, beta in (
      (linear, lambda i: 1e-4 + (0.02 - 1e-4) * i / 999),
      (scaled, lambda i: (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2)):
    product, expected = 1.0, []
    for i in range(1000):
      product *= 1 - beta(i)
      expected.append(product)
    np.testing.assert_allclose(schedules.alphas_bar(schedule), expected, rtol=1e-12)


def test_cosine_alphas_bar_follow_nichol_and_dhariwal_where_betas_are_not_capped():
  t = np.arange(1, 901) / 1000
  expected = (np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
  found = schedules.alphas_bar(schedules.Schedule("squaredcos_cap_v2"))
  np.testing.assert_allclose(found[:900], expected, rtol=1e-10)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_level():
  plain = schedules.Schedule()
  rescaled = schedules.Schedule(zero_terminal_snr=True)
  assert schedules.alphas_bar(rescaled)[-1] == 0.0
  np.testing.assert_allclose(
      schedules.alphas_bar(rescaled)[0], schedules.alphas_bar(plain)[0], rtol=1e-12)
  assert schedules.log_snr(rescaled)[-1] == -np.inf


def test_a_schedule_survives_its_scheduler_config():
  for schedule in (schedules.Schedule(), schedules.Schedule("linear", 1e-4, 0.02, 500, True)):
    assert schedules.from_config(schedules.to_config(schedule, "epsilon")) == schedule


def test_an_unknown_schedule_is_named_with_the_known_ones():
  with pytest.raises(UserError, match="'quadratic'.*scaled_linear"):
    schedules.Schedule("quadratic")
