import numpy as np
import pytest

from sdjax.diffusion import schedules, spacings
from sdjax.errors import UserError

SCHEDULE = schedules.Schedule()
TABLE = spacings.sigma_table(SCHEDULE)


def test_timesteps_are_table_2_of_lin_et_al():
  expected = {"leading": [801, 601, 401, 201, 1], "trailing": [999, 799, 599, 399, 199],
              "linspace": [999, 749, 500, 250, 0]}
  for spacing, t in expected.items():
    np.testing.assert_array_equal(spacings.timesteps(spacing, 5, 1000, offset=1), t)


def test_curves_meet_both_ends_and_fall():
  for curve in (spacings.karras, spacings.exponential, spacings.beta):
    found = curve(14.6, 0.03, 12)
    np.testing.assert_allclose(found[[0, -1]], [14.6, 0.03], rtol=1e-12)
    assert (np.diff(found) < 0).all()


def test_karras_is_equation_5():
  i, high, low = 3, 80.0, 0.002
  paper = (high ** (1 / 7) + i / 9 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
  np.testing.assert_allclose(spacings.karras(high, low, 10)[i], paper, rtol=1e-12)


def test_ays_of_ten_steps_is_the_authors_table():
  np.testing.assert_allclose(spacings.ays(spacings.AYS["ays"], 10), spacings.AYS["ays"][:10])
  halved = spacings.ays(spacings.AYS["ays_xl"], 20)
  np.testing.assert_allclose(halved[1], np.sqrt(14.615 * 6.315))


def test_a_sigma_and_its_timestep_are_one_level():
  for t in (0.0, 3.25, 500.0, 998.5, 999.0):
    node = spacings.node_at(SCHEDULE, t)
    assert abs(spacings.timestep_of(TABLE, node.sigma) - t) < 1e-6
    assert abs(node.a**2 + node.s**2 - 1) < 1e-12
  assert TABLE[3] < spacings.node_at(SCHEDULE, 3.25).sigma < TABLE[4]


def test_zero_terminal_snr_is_pure_noise_as_a_timestep_and_finite_as_a_sigma():
  schedule = schedules.Schedule(zero_terminal_snr=True)
  assert spacings.node_at(schedule, 999.0)[:2] == (0.0, 1.0)
  np.testing.assert_allclose(spacings.sigma_table(schedule)[-1], 4096, rtol=1e-6)


def test_our_own_nodes_fall_in_every_spacing_and_are_whole_on_request():
  for spacing in (*spacings.TIMESTEPS, *spacings.SIGMAS):
    for rounded in (False, True):
      nodes = spacings.nodes(SCHEDULE, 8, spacing=spacing, offset=0, rounded=rounded)
      assert len(nodes) == 8
      assert all(low.sigma < high.sigma for high, low in zip(nodes, nodes[1:]))
      assert not rounded or all(node.t == round(node.t) for node in nodes)


def test_steps_beyond_the_schedule_are_user_errors():
  for count in (0, 1001):
    with pytest.raises(UserError, match=f"steps is {count}.*1 to 1000"):
      spacings.timesteps("leading", count, 1000)
