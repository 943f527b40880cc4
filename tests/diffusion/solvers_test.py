"""Samplers against closed forms.

For data ~ N(0, c²) every ideal estimate is linear in x, and the probability-flow ODE has the
solution  x(t1) = x(t0) · sqrt(var(t1) / var(t0)),  var(t) = a²c² + s².
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import prediction, sampling, schedules, solvers
from sdjax.errors import UserError

SCHEDULE = schedules.Schedule("linear", 1e-4, 0.02)
SPREAD = 0.5


def ideal_output(x, node, prediction_type):
  """What a perfect network returns for Gaussian data."""
  variance = node.a**2 * SPREAD**2 + node.s**2
  x0 = node.a * SPREAD**2 / variance * x
  noise = node.s / variance * x
  return prediction.target(prediction_type, x0, noise, node.a, node.s)


def run(table, x, prediction_type, noise=lambda index: 0.0, network=None):
  """The sampler in float64 numpy: equations (1)-(4) of sampling.py as a plain loop."""
  state = np.zeros((solvers.STATE, *np.shape(x)))
  state[0] = x
  for n in range(len(table.t)):
    if network is None:
      node = solvers.node_at(SCHEDULE, table.t[n])
      f = ideal_output(table.c_in[n] * state[0], node, prediction_type)
    else:
      f = network(table.c_in[n] * state[0], table.t[n])
    d = np.clip(table.c_skip[n] * state[0] + table.c_out[n] * f, -table.clip[n], table.clip[n])
    fresh = np.broadcast_to(noise(table.noise_index[n]), np.shape(x))
    state = np.tensordot(table.mix[n], np.stack([*state, f, d, fresh]), 1)
  return state[0]


def exact(table, x):
  first = solvers.node_at(SCHEDULE, table.t[0])
  return x * SPREAD / np.sqrt(first.a**2 * SPREAD**2 + first.s**2)


@pytest.mark.parametrize("prediction_type", prediction.TYPES)
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence_on_a_gaussian(sampler, order, prediction_type):
  # A range that leaves out the ends, where lambda's spacing is far from even.
  def error(steps):
    t = np.round(np.linspace(900, 300, steps + 1))
    nodes = [solvers.node_at(SCHEDULE, value) for value in t]
    if sampler == "ddim":
      rows = solvers.ddim_steps(nodes[:-1], nodes[1:], prediction_type, 0.0)
    else:
      rows = solvers.dpmpp_2m_steps(nodes[:-1], nodes[1:], False)
    table = solvers.tabulate(rows, prediction_type, None)
    first, last = nodes[0], nodes[-1]
    scale = np.sqrt((last.a**2 * SPREAD**2 + last.s**2) / (first.a**2 * SPREAD**2 + first.s**2))
    return abs(run(table, 1.0, prediction_type) - scale)
  measured = np.log2(error(30) / error(60))
  assert abs(measured - order) < 0.25, measured


@pytest.mark.parametrize("sampler, tolerance", [("ddim", 2e-2), ("dpmpp_2m", 5e-3)])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_whole_samplers_reach_the_data(sampler, tolerance, spacing):
  table = solvers.named(sampler, SCHEDULE, "epsilon", 100, spacing=spacing)
  assert abs(run(table, 1.0, "epsilon") - exact(table, 1.0)) < tolerance


def test_ddim_with_eta_one_has_the_variance_of_the_data():
  table = solvers.ddim(SCHEDULE, "v_prediction", 200, eta=1.0)
  rng = np.random.default_rng(0)
  final = run(table, rng.normal(size=3000), "v_prediction", lambda _: rng.normal(size=3000))
  assert abs(np.std(final) / SPREAD - 1) < 0.06


def test_ddim_step_is_the_papers_equation_12():
  table = solvers.ddim(SCHEDULE, "epsilon", 10, eta=0.7, offset=0)
  now, before = schedules.alphas_bar(SCHEDULE)[[900, 800]]
  sigma = 0.7 * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
  x, eps, z = 0.3, -0.4, 1.1
  paper = (np.sqrt(before) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
           + np.sqrt(1 - before - sigma**2) * eps + sigma * z)
  denoised = table.c_skip[0] * x + table.c_out[0] * eps
  assert table.t[0] == 900
  np.testing.assert_allclose(
      table.mix[0, 0] @ [x, 0, 0, 0, 0, eps, denoised, z], paper, rtol=1e-12)


def test_dpmpp_2m_step_is_the_papers_algorithm_2():
  table = solvers.dpmpp_2m(SCHEDULE, "sample", 20)
  nodes = [solvers.node_at(SCHEDULE, t) for t in table.t]
  i, x, before, now = 7, 0.3, 0.9, -0.2
  h = nodes[i + 1].log_ratio - nodes[i].log_ratio
  r = (nodes[i].log_ratio - nodes[i - 1].log_ratio) / h
  mean = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
  paper = nodes[i + 1].s / nodes[i].s * x - nodes[i + 1].a * np.expm1(-h) * mean
  np.testing.assert_allclose(
      table.mix[i, 0] @ [x, before, 0, 0, 0, 0, now, 0], paper, rtol=1e-10)


def test_adams_weights_are_the_classical_ones_and_exact_for_polynomials():
  np.testing.assert_allclose(solvers.adams([0, -1]), [3 / 2, -1 / 2])
  np.testing.assert_allclose(solvers.adams([0, -1, -2]), [23 / 12, -16 / 12, 5 / 12])
  r = np.linspace(0, 1, 200001)
  density = np.exp(1.7 * r) / np.trapezoid(np.exp(1.7 * r), r)
  expected = np.trapezoid(density * (2 - 3 * r + r**2), r)
  nodes = np.array([0.0, -0.4, -1.3])
  found = solvers.adams(list(nodes), k=1.7) @ (2 - 3 * nodes + nodes**2)
  np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_scan_computes_what_the_plain_loop_computes():
  network = lambda x, t: jnp.sin(x) * 0.3 + t[:, None, None, None] / 5000
  z = np.random.default_rng(0).normal(size=25)
  for table in (solvers.dpmpp_2m(SCHEDULE, "epsilon", 25),
                solvers.ddim(SCHEDULE, "epsilon", 25, eta=1.0, clip=1.0)):
    expected = run(table, 0.7, "epsilon", lambda n: z[n],
                   lambda x, t: np.sin(x) * 0.3 + t / 5000)
    noise = lambda index: jnp.broadcast_to(jnp.asarray(z, jnp.float32)[index], (2, 2, 2, 1))
    found = sampling.sample(table, network, jnp.full((2, 2, 2, 1), 0.7), noise)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_two_samplers_share_one_trace():
  traces = []

  @jax.jit
  def run_table(table, x):
    traces.append(1)
    return sampling.sample(table, lambda x, t: x, x, lambda index: jnp.zeros_like(x))

  x = jnp.ones((1, 2, 2, 1))
  run_table(solvers.ddim(SCHEDULE, "epsilon", 8, eta=0.3), x)
  run_table(solvers.dpmpp_2m(SCHEDULE, "v_prediction", 8, spacing="trailing"), x)
  assert len(traces) == 1


def test_scheduler_config_decides_unless_overridden():
  config = schedules.to_config(SCHEDULE, "epsilon")
  table = solvers.from_config(config, 10)
  np.testing.assert_array_equal(table.t, np.arange(10)[::-1] * 100 + 1)
  trailing = solvers.from_config(config, 10, spacing="trailing")
  np.testing.assert_array_equal(trailing.t, np.arange(10)[::-1] * 100 + 99)


def test_bad_requests_are_user_errors():
  with pytest.raises(UserError, match="'euler_zeta'.*ddim"):
    solvers.named("euler_zeta", SCHEDULE, "epsilon", 10)
  with pytest.raises(UserError, match="steps is 0"):
    solvers.ddim(SCHEDULE, "epsilon", 0)
  with pytest.raises(UserError, match="eta is 1.5"):
    solvers.ddim(SCHEDULE, "epsilon", 5, eta=1.5)
  with pytest.raises(UserError, match="use_karras_sigmas"):
    solvers.from_config(
        {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, 5)
  zero_snr = schedules.Schedule(zero_terminal_snr=True)
  with pytest.raises(UserError, match="pure noise"):
    solvers.ddim(zero_snr, "epsilon", 10, spacing="trailing")
