import numpy as np
import pytest

from sdjax.diffusion import schedules, solvers, tables
from sdjax.diffusion.tables import C, F, Node, Output, X
from sdjax.errors import UserError


def test_adams_weights_are_the_classical_ones_and_exact_for_polynomials():
  np.testing.assert_allclose(tables.adams([0, -1]), [3 / 2, -1 / 2])
  np.testing.assert_allclose(tables.adams([0, -1, -2]), [23 / 12, -16 / 12, 5 / 12])
  r = np.linspace(0, 1, 200001)
  for k in (1.7, -25.0):
    density = np.exp(k * r) / np.trapezoid(np.exp(k * r), r)
    expected = np.trapezoid(density * (2 - 3 * r + r**2), r)
    nodes = np.array([0.0, -0.4, -1.3])
    found = tables.adams(list(nodes), k) @ (2 - 3 * nodes + nodes**2)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("kind", ["x0", "noise"])
def test_a_leap_is_the_step_with_the_implied_estimate(kind):
  node, landing, x, x0 = Node(0.6, 0.8, 500.0), Node(0.8, 0.6, 400.0), 0.3, -0.9
  noise = (x - node.a * x0) / node.s
  carry, gain = tables.leap(kind, node, landing, down=0.4)
  found = carry * x + gain * {"x0": x0, "noise": noise}[kind]
  np.testing.assert_allclose(found, landing.a * x0 + 0.4 * noise)


def test_noise_of_tau_one_is_ddims_of_eta_one_and_none_of_tau_zero():
  node, landing = Node(0.6, 0.8, 500.0), Node(0.8, 0.6, 400.0)
  # DDIM, eq. 16 with sigma of eta = 1.
  variance = (0.6 / 0.8) ** 2 * (1 - 0.6**2 / 0.8**2)
  for down, up in (tables.stochastic("x0", node, landing, 1.0), tables.ancestral(node, landing)):
    np.testing.assert_allclose([up**2, down**2 + up**2], [variance, landing.s**2])
  assert tables.stochastic("noise", node, landing, 0.0) == (landing.s, 0.0)


def test_an_edm_network_is_read_with_the_papers_preconditioning():
  # Karras et al. 2022, table 1: c_skip·x + c_out·F for x = x0 + sigma·noise.
  sigma, spread, x, f = 3.0, 0.5, 1.2, -0.4
  a = 1 / np.hypot(sigma, spread)
  c = Output("v_prediction", data_std=spread, sign=-1.0).coefficients(a, sigma * a)
  paper = spread**2 / (sigma**2 + spread**2) * x + sigma * spread / np.hypot(sigma, spread) * f
  np.testing.assert_allclose(c.c_skip * (a * x) + c.c_out * f, paper)


def test_limited_estimates_keep_the_latent():
  node = Node(0.6, 0.8, 500.0)
  for output in (Output("v_prediction"), Output("v_prediction", clip=1.0)):
    x0, noise = output.estimates(node)
    np.testing.assert_allclose(node.a * x0 + node.s * noise, X, atol=1e-15)
  assert (x0 == C).all()
  np.testing.assert_allclose(Output("epsilon").noise(node), F)


def test_padding_is_inactive_and_chunks_are_the_rows():
  table = solvers.named("dpmpp_2m", schedules.Schedule(), "epsilon", 10)
  padded = table.padded(16)
  assert padded.mix.shape[0] == 16 and padded.active.sum() == 10 and not padded.active[10:].any()
  chunks = table.chunks(4)
  assert [len(chunk["t"]) for chunk in chunks] == [4, 4, 4]
  for name, rows in table.rows().items():
    np.testing.assert_array_equal(np.concatenate([chunk[name] for chunk in chunks])[:10], rows)
  with pytest.raises(UserError, match="10 network evaluations.*8"):
    table.padded(8)
