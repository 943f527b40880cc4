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
  for schedule in (schedules.Schedule(), schedules.Schedule("linear", 1e-4, 0.02, 500, True),
                   schedules.Schedule("exp"),
                   schedules.Schedule(num_steps=3, trained_betas=(0.1, 0.2, 0.4))):
    assert schedules.from_config(schedules.to_config(schedule, "epsilon")) == schedule


def test_given_betas_take_the_place_of_a_name():
  schedule = schedules.Schedule(num_steps=2, trained_betas=(0.25, 0.5))
  np.testing.assert_allclose(schedules.alphas_bar(schedule), [0.75, 0.375])
  with pytest.raises(UserError, match="2 trained_betas for 1000"):
    schedules.Schedule(trained_betas=(0.25, 0.5))


def test_exponential_and_sigmoid_schedules_follow_their_formulas():
  falling = schedules.alphas_bar(schedules.Schedule("exp"))
  np.testing.assert_allclose(falling[[99, 899]], np.exp([-1.2, -10.8]))
  betas = 1 - np.exp(np.diff(np.log(schedules.alphas_bar(
      schedules.Schedule("sigmoid", 0.001, 0.02)))))
  middle = betas[498] - 0.0105  # half way, up to the step from one timestep to its neighbour
  assert abs(middle) < 1e-4 and abs(betas[-1] - 0.02) < 1e-4


def test_schedules_of_one_class_are_refused_in_others():
  config = {"beta_schedule": "sigmoid", "_class_name": "DDPMScheduler"}
  assert schedules.from_config(config).name == "sigmoid"
  with pytest.raises(UserError, match="sigmoid.*DDPMScheduler"):
    schedules.from_config(config | {"_class_name": "DDIMScheduler"})


def test_an_unknown_schedule_is_named_with_the_known_ones():
  with pytest.raises(UserError, match="'quadratic'.*scaled_linear"):
    schedules.Schedule("quadratic")
