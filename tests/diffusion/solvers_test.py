"""Samplers against closed forms.

For data ~ N(0, c²) every ideal estimate is linear in x, so that the covariance of all that a
sampler carries follows from its table, and the probability-flow ODE has the solution
x(t1) = x(t0) · sqrt(var(t1) / var(t0)),  var(t) = a²c² + s².
"""

import functools

import numpy as np
import pytest

from sdjax.diffusion import prediction, rules, schedules, solvers, spacings, tables
from sdjax.diffusion.tables import Node, Output
from sdjax.errors import UserError

SCHEDULE = schedules.Schedule("linear", 1e-4, 0.02)
SPREAD = 0.8
EPS = Output("epsilon")


def variance(node):
  return node.a**2 * SPREAD**2 + node.s**2


def ideal(prediction_type, node):
  """What a perfect network multiplies x with."""
  x0, noise = node.a * SPREAD**2 / variance(node), node.s / variance(node)
  if prediction_type == "flow_prediction":
    return noise - x0
  return prediction.target(prediction_type, x0, noise, node.a, node.s)


def consistent(node):
  """The same of a network whose D is the end of the ODE, for distilled samplers (epsilon)."""
  return (1 - node.a * SPREAD / np.sqrt(variance(node))) / node.s


def final_std(table, prediction_type="epsilon", output=ideal, state=None, first=0):
  """The standard deviation of the last latent: S' = (mix of S, F, C) S + (mix of z) z."""
  covariance = np.zeros((5, 5))
  covariance[0, 0] = table.initial_scale**2
  if state is not None:
    covariance = np.outer(state, state)
  for n in range(first, len(table.t)):
    node = Node(table.a[n], table.s[n], table.t[n])
    f = output(prediction_type, node)
    d = table.c_skip[n] + table.c_out[n] * f
    linear = table.mix[n][:, :5].copy()
    linear[:, 0] += table.mix[n][:, 5] * f + table.mix[n][:, 6] * d
    noise = table.mix[n][:, 7]
    covariance = linear @ covariance @ linear.T + np.outer(noise, noise)
  return np.sqrt(covariance[0, 0])


def sigma_nodes(high, low, count):
  return [spacings.sigma_node(sigma, 0.0) for sigma in spacings.exponential(high, low, count + 1)]


def path_of(count, warm=0):
  """Evenly spaced in lambda, from sigma 2 to 0.1, after `warm` steps of the same size before."""
  nodes = sigma_nodes(2.0 * 20 ** (warm / count), 0.1, count + warm)
  return solvers.Path(nodes[:-1], nodes[1:], lambda sigma: spacings.sigma_node(sigma, 0.0),
                      SCHEDULE)


def order_of(error, count=60):
  return np.log2(error(count) / error(2 * count))


@pytest.mark.parametrize("rule, order", [
    (functools.partial(solvers.one_step, eta=0.0), 1),
    (functools.partial(solvers.euler, **solvers.CHURN), 1),
    (solvers.heun, 2),
    (functools.partial(solvers.midpoint, kind="noise"), 2),
    (functools.partial(solvers.midpoint, kind="x0"), 2),
    (functools.partial(solvers.singlestep, order=1), 1),
    (functools.partial(solvers.singlestep, order=2), 2),
    (functools.partial(solvers.singlestep, order=3), 3),
    (functools.partial(solvers.singlestep, order=2, kind="noise"), 2),
    (functools.partial(solvers.singlestep, order=3, kind="noise"), 3),
])
def test_order_of_one_and_single_step_solvers(rule, order):
  def error(count):
    path = path_of(count)
    table = tables.tabulate(rule(path, EPS), EPS)
    exact = np.sqrt(variance(path.landings[-1]) / variance(path.nodes[0]))
    return abs(final_std(table) - exact)
  measured = order_of(error)
  assert abs(measured - order) < 0.2, measured


# name -> (what is extrapolated, in which coordinate, through how many values, how, the order).
ADAMS = {
    "LMS 1": ("noise", "sigma", 1, lambda r, k: tables.adams(r), 1),
    "LMS 2": ("noise", "sigma", 2, lambda r, k: tables.adams(r), 2),
    "LMS 4": ("noise", "sigma", 4, lambda r, k: tables.adams(r), 4),
    # The number of the step is not the coordinate of the equation: higher orders are in name only.
    "iPNDM": ("noise", "index", 4, lambda r, k: tables.adams(r), 2),
    "DPM-Solver++ 2": ("x0", "lambda", 2, rules.middle_line, 2),
    "DPM-Solver++ 3": ("x0", "lambda", 3, tables.adams, 3),
    "DPM-Solver 2": ("noise", "lambda", 2, rules.middle_line, 2),
    "DPM-Solver 3": ("noise", "lambda", 3, tables.adams, 3),
    "exact 4": ("x0", "lambda", 4, tables.adams, 4),
}


def exact_start(path, kind, count):
  """x at node number `count`, where the equation's solution goes, and the estimates before it."""
  x = np.sqrt([variance(node) for node in path.nodes])
  estimates = [value * ideal({"x0": "sample", "noise": "epsilon"}[kind], node)
               for value, node in zip(x, path.nodes)]
  return x[count], estimates[:count][::-1]


@pytest.mark.parametrize("name", ADAMS)
def test_order_of_multistep_solvers_from_an_exact_start(name):
  kind, coordinate, values, weights, order = ADAMS[name]

  def error(count):
    path = path_of(count, warm=values - 1)
    rows = rules.multistep(path.nodes, path.landings, EPS, kind=kind, coordinate=coordinate,
                           orders=[values] * len(path.nodes), weights=weights)
    x, estimates = exact_start(path, kind, values - 1)
    state = np.array([x, *estimates, *[0.0] * (5 - values)])
    found = final_std(tables.tabulate(rows, EPS), state=state, first=values - 1)
    return abs(found - np.sqrt(variance(path.landings[-1])))
  measured = order_of(error)
  assert abs(measured - order) < 0.2, measured


@pytest.mark.parametrize("kind", ["x0", "noise"])
@pytest.mark.parametrize("rule", [rules.flat_line, rules.middle_line, tables.adams])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_corrector_adds_one_order(kind, rule, order):
  def error(count):
    path = path_of(count, warm=order)
    rows = rules.predictor_corrector(
        path.nodes, path.landings, EPS, kind=kind, predictors=[order] * len(path.nodes),
        correctors=[0] * order + [order + 1] * count, predict=rule, correct=rule)
    x, estimates = exact_start(path, kind, order)
    carry, _ = tables.leap(kind, *path.nodes[order - 1:order + 1], path.nodes[order].s)
    base = np.sqrt(variance(path.nodes[order - 1]))
    state = np.array([x, carry * base, *estimates, *[0.0] * (3 - order)])
    # The last latent is only predicted: look at the corrected one before it, S_1 = carry·x.
    table = tables.tabulate(rows, EPS)
    last_carry, _ = tables.leap(kind, path.nodes[-1], path.landings[-1], path.landings[-1].s)
    table.mix[-1][0] = table.mix[-1][1] / last_carry
    return abs(final_std(table, state=state, first=order) - np.sqrt(variance(path.nodes[-1])))
  measured = order_of(error)
  assert abs(measured - (order + 1)) < 0.25, measured


STOCHASTIC = {
    "ddpm": {}, "ddim": dict(eta=1.0), "euler_ancestral": {}, "dpm2_ancestral": {},
    "dpmpp_2s_ancestral": {}, "dpmpp_sde": {}, "dpmpp_2m_sde": {}, "dpmpp_3m_sde": {},
    "dpmpp_2s": dict(tau=0.8), "sa_solver": {}, "euler": dict(s_churn=30.0),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_have_the_variance_of_the_data(name):
  def error(count):
    table = solvers.named(name, SCHEDULE, "v_prediction", count, **STOCHASTIC[name])
    assert np.abs(table.mix[:, 0, 7]).max() > 0.01
    return abs(final_std(table, "v_prediction") / SPREAD - 1)
  assert error(120) < 0.1
  assert error(120) < 0.65 * error(60) + 2e-3  # first order at least


@pytest.mark.parametrize("name", sorted(
    name for name in solvers.SAMPLERS
    if name not in STOCHASTIC and name not in ("ddim_inverse", "lcm", "tcd")
    and not name.startswith("edm")))
def test_deterministic_samplers_follow_the_ode_to_the_data(name):
  is_flow = name.startswith("flow")
  kind = "flow_prediction" if is_flow else "epsilon"
  table = solvers.named(name, SCHEDULE, kind, 50)
  first = Node(table.a[0], table.s[0], table.t[0])
  assert abs(final_std(table, kind) / SPREAD * np.sqrt(variance(first)) - 1) < 0.03


@pytest.mark.parametrize("spacing", [*spacings.TIMESTEPS, *spacings.SIGMAS])
def test_every_spacing_leads_to_the_data(spacing):
  table = solvers.named("heun", SCHEDULE, "v_prediction", 30, spacing=spacing)
  first = Node(table.a[0], table.s[0], table.t[0])
  found = final_std(table, "v_prediction")
  assert abs(found / SPREAD * np.sqrt(variance(first)) - 1) < 0.02


@pytest.mark.parametrize("name, options", [
    ("lcm", dict(timestep_scaling=1e6)), ("tcd", dict(gamma=1.0))])
def test_distilled_samplers_have_the_variance_of_the_data_in_any_number_of_steps(name, options):
  for count in (1, 2, 4, 8):
    table = solvers.named(name, SCHEDULE, "epsilon", count, **options)
    found = final_std(table, output=lambda _, node: consistent(node))
    assert abs(found / SPREAD - 1) < 0.01, (count, found)


def test_tcd_without_noise_is_ddim():
  ours = solvers.named("tcd", SCHEDULE, "epsilon", 5, gamma=0.0)
  theirs = solvers.named("ddim", SCHEDULE, "epsilon", 5, spacing="distilled")
  np.testing.assert_allclose(ours.mix, theirs.mix, atol=1e-12)


def test_edm_networks_are_sampled_in_their_own_scale():
  def output(_, node):  # F = (D - c_skip·x) / c_out, of x = x0 + sigma·noise in the network's scale
    x0 = node.a * SPREAD**2 / variance(node)
    c = Output("v_prediction", data_std=0.5, sign=-1.0).coefficients(node.a, node.s)
    return (x0 - c.c_skip) / c.c_out
  for name, tolerance in (("edm_euler", 0.05), ("edm_heun", 5e-3), ("edm_dpmpp_2m", 5e-3)):
    table = solvers.named(name, SCHEDULE, "epsilon", 60)
    assert table.t[0] == 0.25 * np.log(80)
    assert abs(final_std(table, output=output) / SPREAD - 1) < tolerance


def test_ddim_inverted_and_back_is_where_it_began():
  there = solvers.named("ddim_inverse", SCHEDULE, "epsilon", 500)
  back = solvers.named("ddim", SCHEDULE, "epsilon", 500, final_sigma="sigma_min")
  assert (np.diff(there.t) > 0).all() and there.t[0] == 0
  assert abs(final_std(there) * final_std(back) - 1) < 1e-2
  assert abs(final_std(there) - 1 / SPREAD) < 1e-2  # from the data to standard noise


def test_euler_and_ddim_are_one_step_in_two_scales():
  for options in (dict(spacing="karras"), dict(spacing="leading", offset=1)):
    ours = solvers.named("euler", SCHEDULE, "v_prediction", 9, **options)
    theirs = solvers.named("ddim", SCHEDULE, "v_prediction", 9, **options)
    np.testing.assert_allclose(ours.mix, theirs.mix, atol=1e-14)


def test_ddim_step_is_the_papers_equation_12():
  table = solvers.from_config(schedules.to_config(SCHEDULE, "epsilon"), 10, eta=0.7, steps_offset=0)
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
  table = solvers.named("dpmpp_2m", SCHEDULE, "sample", 20)
  nodes = [Node(*level) for level in zip(table.a, table.s, table.t)]
  i, x, before, now = 7, 0.3, 0.9, -0.2
  h = nodes[i + 1].log_ratio - nodes[i].log_ratio
  r = (nodes[i].log_ratio - nodes[i - 1].log_ratio) / h
  mean = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
  paper = nodes[i + 1].s / nodes[i].s * x - nodes[i + 1].a * np.expm1(-h) * mean
  np.testing.assert_allclose(
      table.mix[i, 0] @ [x, before, 0, 0, 0, now, now, 0], paper, rtol=1e-10)


def test_churn_goes_up_to_the_papers_level_and_comes_down_in_one_step():
  # Karras et al. 2022, algorithm 2, lines 4 to 6.
  plain = solvers.named("edm_euler", SCHEDULE, "epsilon", 20)
  churned = solvers.named("edm_euler", SCHEDULE, "epsilon", 20, s_churn=4.0, s_tmin=0.05,
                          s_tmax=50.0, s_noise=1.003)
  sigma, raised = plain.s / plain.a, churned.s / churned.a
  expected = np.where((sigma > 0.05) & (sigma < 50), 1 + min(4 / 20, np.sqrt(2) - 1), 1.0)
  np.testing.assert_allclose(raised / sigma, expected)
  added = churned.mix[9, 0, 7] / churned.a[10]
  np.testing.assert_allclose(added, 1.003 * np.sqrt(raised[10] ** 2 - sigma[10] ** 2))


def test_a_list_of_levels_takes_the_place_of_a_spacing():
  sigmas, times = [9.0, 4.0, 0.5], [900, 301.5, 20]
  table = solvers.named("euler", SCHEDULE, "epsilon", 3, sigmas=sigmas)
  np.testing.assert_allclose(table.s / table.a, sigmas)
  table = solvers.named("euler", SCHEDULE, "epsilon", 3, timesteps=times)
  np.testing.assert_allclose(table.t, times)
  assert solvers.named("euler", SCHEDULE, "epsilon", 3, timesteps=times, rounded=True).t[1] == 302
  scaled = solvers.named("euler", SCHEDULE, "epsilon", 3, sigmas=sigmas, unit_variance=False)
  np.testing.assert_allclose(scaled.initial_scale, 9 / np.sqrt(82))


def test_scheduler_config_decides_unless_overridden():
  config = schedules.to_config(SCHEDULE, "epsilon")
  np.testing.assert_array_equal(solvers.from_config(config, 10).t, np.arange(10)[::-1] * 100 + 1)
  trailing = solvers.from_config(config, 10, timestep_spacing="trailing")
  np.testing.assert_array_equal(trailing.t, np.arange(10)[::-1] * 100 + 99)


@pytest.mark.parametrize("name", [
    "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler"])
def test_starting_late_is_the_same_path_without_its_beginning(name):
  config = {"_class_name": name, "clip_sample": False, "solver_order": 1}
  whole, late = solvers.from_config(config, 12), solvers.from_config(config, 12, start=5)
  rows = len(late.t)
  np.testing.assert_array_equal(late.t, whole.t[-rows:])
  # Steps without memory are the same steps.
  np.testing.assert_array_equal(late.mix, whole.mix[-rows:])


def test_every_sampler_can_start_late():
  for name in solvers.SAMPLERS:
    kind = "flow_prediction" if name.startswith("flow") else "epsilon"
    whole, late = (solvers.named(name, SCHEDULE, kind, 12, start=start) for start in (0, 4))
    assert np.isfinite(late.mix).all()
    assert late.s[0] < whole.s[0] or name == "ddim_inverse"
    if name in ("ddim", "euler_ancestral", "heun", "dpmpp_sde", "flow_heun"):
      np.testing.assert_array_equal(late.mix, whole.mix[-len(late.t):])


def test_a_late_multistep_solver_warms_up_again():
  config = {"_class_name": "DPMSolverMultistepScheduler"}
  late = solvers.from_config(config, 20, start=8)
  assert late.mix[0, 0, 1] == 0 and late.mix[1, 0, 1] != 0


def test_bad_requests_are_user_errors():
  named = functools.partial(solvers.named, schedule=SCHEDULE, prediction_type="epsilon")
  for message, request in {
      "'euler_zeta'.*ddim": lambda: named("euler_zeta", steps=10),
      "steps is 0": lambda: named("ddim", steps=0),
      "steps is 60.*1 to 50": lambda: named("lcm", steps=60),
      "eta is 1.5": lambda: named("ddim", steps=5, eta=1.5),
      "gamma is -1": lambda: named("tcd", steps=5, gamma=-1),
      "'eta'.*heun.*spacing": lambda: named("heun", steps=5, eta=1),
      "spacing 'even'.*karras": lambda: named("heun", steps=5, spacing="even"),
      "whole timesteps": lambda: named("plms", steps=7, spacing="karras"),
      "3 are asked for.*plms": lambda: named("pndm", steps=3),
      "sigmas are.*fall": lambda: named("euler", steps=2, sigmas=[1.0, 2.0]),
      "3 for 2 steps": lambda: named("euler", steps=2, timesteps=[900, 500, 100]),
      "both given": lambda: named("euler", steps=1, timesteps=[900], sigmas=[1.0]),
      "order is 5": lambda: named("lms", steps=5, order=5),
      "clip is -1": lambda: named("ddim", steps=5, clip=-1.0),
      "quantile is 2": lambda: named("ddim", steps=5, quantile=2),
      "solver_type is 'bh3'": lambda: named("unipc", steps=5, solver_type="bh3"),
      "final_sigma is 'one'": lambda: named("ddim", steps=5, final_sigma="one"),
      "pure noise": lambda: solvers.named(
          "ddim", schedules.Schedule(zero_terminal_snr=True), "epsilon", 10),
      "'VQDiffusionScheduler'": lambda: solvers.from_config(
          {"_class_name": "VQDiffusionScheduler"}, 5),
      "start is 5": lambda: solvers.from_config({"_class_name": "DDIMScheduler"}, 5, start=5),
      "algorithm_type is 'sgd'.*dpmsolver": lambda: solvers.from_config(
          {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sgd"}, 5),
      "steps is 10.*different": lambda: solvers.from_config(
          {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing",
           "lambda_min_clipped": 0.0}, 10),
      "solver_order is 4": lambda: solvers.from_config(
          {"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, 5),
      "karras and beta": lambda: solvers.from_config(
          {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True,
           "use_beta_sigmas": True}, 5),
      "option mu": lambda: solvers.from_config(
          {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 5),
      "variance_type is 'learned'.*fixed": lambda: solvers.from_config(
          {"_class_name": "DDPMScheduler", "variance_type": "learned"}, 5),
  }.items():
    with pytest.raises(UserError, match=message):
      request()
