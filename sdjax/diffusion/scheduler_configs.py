"""diffusers' scheduler classes as tables: every class and option, with its own conventions.

What the classes share is in `scheduler_levels`; here are their options' defaults and, in a few
lines each, their samplers. Where a class departs from its paper, so does its table: the third-order
DPM-Solver halves the curvature, its SDE versions have a slip of sign.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sdjax.diffusion import rules, schedules, spacings, tables
from sdjax.diffusion import scheduler_levels as levels
from sdjax.diffusion.scheduler_levels import Config, Path, choose, order_of, output_of
from sdjax.diffusion.tables import CLEAN, Node, Output, Row, Table, X
from sdjax.errors import UserError

BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
             trained_betas=None, prediction_type="epsilon")
K_BETAS = BETAS | dict(beta_start=0.00085, beta_end=0.012)
SPACED = dict(timestep_spacing="leading", steps_offset=0)
EVEN = dict(timestep_spacing="linspace", steps_offset=0)
CURVES = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
CLIP = dict(clip_sample=True, clip_sample_range=1.0)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
ZERO_SNR = dict(rescale_betas_zero_snr=False)
FINAL = dict(final_sigmas_type="zero")
# mu is not in the file: pipelines find it from the picture's size.
FLOW = dict(use_flow_sigmas=False, flow_shift=1.0, mu=None)
DYNAMIC = dict(use_dynamic_shifting=False, time_shift_type="exponential")
LEAST = dict(lambda_min_clipped=-math.inf, variance_type=None)
DPM = dict(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint")
EDM = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras",
           num_train_timesteps=1000, prediction_type="epsilon", rho=7.0)
DISTILLED = K_BETAS | CLIP | THRESHOLD | ZERO_SNR | SPACED | dict(
    beta_schedule="scaled_linear", original_inference_steps=50, clip_sample=False,
    set_alpha_to_one=True, timestep_scaling=10.0)


def table_of(path: Path, start: int, output: Output, sampler: Callable[..., Iterator[Row]],
             **options: Any) -> Table:
  """Tabulates a sampler on a path from its node number `start`."""
  rows = sampler(path.nodes[start:], path.landings[start:], output, **options)
  return tables.tabulate(rows, output, path.initial_scale)


def ipndm_steps(path: Path) -> Iterator[Row]:
  """iPNDM as the class does it: at pure noise, where v says x0, it takes zero for x0."""
  output = Output("v_prediction")
  rows = rules.multistep(
      path.nodes, path.landings, output, kind="noise", coordinate="index",
      orders=[min(4, n + 1) for n in range(len(path.nodes))],
      weights=lambda r, k: tables.adams(r))
  if path.nodes[0].a == 0:
    yield path.nodes[0], [path.landings[0].s * X, X]
    rows = itertools.islice(rows, 1, None)
  yield from rows


def tcd_split(c: Config, node: Node, landing: Node) -> tuple[float, float]:
  """(down, up) of TCD: to a lower level, and back up with fresh noise; gamma is `eta`."""
  share = np.float32(1 - c["eta"]) * np.float32(landing.t)  # as rounded there
  lower = levels.level(c, math.floor(share))
  grown = landing.a / lower.a
  return grown * lower.s, math.sqrt(max(1 - grown**2, 0.0))


def ddpm_split(c: Config, node: Node, landing: Node) -> tuple[float, float]:
  """(down, up) of DDPM: the posterior's mean, and one of two variances."""
  kind = choose(c, "variance_type", ("fixed_small", "fixed_large"),
                fixed_small_log="fixed_small", fixed_large_log="fixed_large")
  down, up = tables.ancestral(node, landing)
  if kind == "fixed_large":
    up = math.sqrt(1 - (node.a / landing.a) ** 2) if node.t > 0 else 0.0
  return down, up


def ddpm(c: Config, count: int, start: int) -> Table:
  """DDPMScheduler."""
  t = ddim_timesteps(c, count)
  nodes = [levels.level(c, time) for time in t]
  return table_of(Path(nodes, [*nodes[1:], CLEAN]), start, output_of(c), rules.one_step,
                  split=functools.partial(ddpm_split, c))


def ddim_timesteps(c: Config, count: int) -> np.ndarray:
  """Integer timesteps as DDIM chooses them."""
  return spacings.timesteps(
      choose(c, "timestep_spacing", ("leading", "trailing", "linspace")), count,
      c["num_train_timesteps"], offset=c["steps_offset"])


def ddim(c: Config, count: int, start: int) -> Table:
  """DDIMScheduler; the option eta is an argument of its step."""
  t = ddim_timesteps(c, count)
  # It steps by a constant stride, whatever the spacing.
  ends = [time - c["num_train_timesteps"] // count for time in t]
  path = Path([levels.level(c, time) for time in t],
              [levels.level(c, end) if end >= 0 else levels.final_level(c) for end in ends])
  return table_of(path, start, output_of(c), rules.one_step, said_noise=True,
                  split=functools.partial(tables.ancestral, eta=c["eta"]))


def ddim_inverse(c: Config, count: int, start: int) -> Table:
  """DDIMInverseScheduler, from the picture to noise; the network is told where the step lands."""
  t = ddim_timesteps(c, count)[::-1]
  # x0 networks tell nothing of the noise in a clean latent.
  first = levels.level(c, 0) if c["prediction_type"] == "sample" else levels.final_level(c)
  before = [min(time - c["num_train_timesteps"] // count, c["num_train_timesteps"] - 1)
            for time in t]
  nodes = [(levels.level(c, end) if end >= 0 else first)._replace(t=time)
           for end, time in zip(before, t, strict=True)]
  landings = [spacings.node_at(schedules.from_config(c), time) for time in t]
  return table_of(Path(nodes, landings), start, output_of(c), rules.one_step, said_noise=True)


def pndm(c: Config, count: int, start: int) -> Table:
  """PNDMScheduler, whose first steps are Runge-Kutta's or repeated."""
  t = [int(time) for time in ddim_timesteps(c, count)]
  whole = c["num_train_timesteps"]
  stride = whole // count

  def node_at(time):
    return levels.level(c, min(time, whole - 1)) if time >= 0 else levels.final_level(c)

  output = Output(c["prediction_type"])
  if c["skip_prk_steps"]:
    asked = [*t[:2], *t[1:]][start:]
    rows = rules.linear_multistep(asked, stride, node_at, output)
  elif count < 4 or start:
    raise UserError(f"PNDM with Runge-Kutta steps was asked for {count} steps from number {start}; "
                    "it needs at least 4, from the first: set skip_prk_steps=True")
  else:
    rows = rules.pndm(t, stride, node_at, output)
  return tables.tabulate(rows, output)


def lms(c: Config, count: int, start: int) -> Table:
  """LMSDiscreteScheduler, of fourth order."""
  return table_of(levels.exploding(c, count), start, output_of(c), rules.multistep, kind="noise",
                  coordinate="sigma", orders=rules.lowered(count, 4, start, 4, 4),
                  weights=lambda r, k: tables.adams(r))


def euler(c: Config, count: int, start: int) -> Table:
  """EulerDiscreteScheduler."""
  return table_of(levels.exploding(c, count), start, output_of(c), rules.one_step)


def euler_ancestral(c: Config, count: int, start: int) -> Table:
  """EulerAncestralDiscreteScheduler."""
  return table_of(levels.exploding(c, count), start, output_of(c), rules.one_step,
                  split=tables.ancestral)


def heun(c: Config, count: int, start: int) -> Table:
  """HeunDiscreteScheduler."""
  return table_of(levels.exploding(c, count), start, output_of(c), rules.two_stage, kind="noise",
                  middle=lambda node, landing: landing, weights=(0.5, 0.5))


def dpm2(c: Config, count: int, start: int, split: rules.Split = rules.quiet) -> Table:
  """KDPM2DiscreteScheduler."""
  return table_of(
      levels.exploding(c, count, round_karras=True), start, output_of(c), rules.two_stage,
      kind="noise", middle=functools.partial(rules.halfway, levels.sigma_nodes(c), split),
      weights=(0.0, 1.0), split=split)


def dpm2_ancestral(c: Config, count: int, start: int) -> Table:
  """KDPM2AncestralDiscreteScheduler."""
  return dpm2(c, count, start, tables.ancestral)


def dpm_sde(c: Config, count: int, start: int) -> Table:
  """DPMSolverSDEScheduler."""
  return table_of(
      levels.exploding(c, count), start, output_of(c), rules.two_stage, kind="x0",
      middle=functools.partial(rules.halfway, levels.sigma_nodes(c), rules.quiet),
      weights=(0.0, 1.0), split=tables.ancestral, is_brownian=True)


def dpm_algorithm(c: Config) -> tuple[str, float]:
  """(kind, tau) of a DPM-Solver's algorithm_type."""
  name = choose(c, "algorithm_type",
                ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
                deis="dpmsolver++")
  return "x0" if name.endswith("++") else "noise", float(name.startswith("sde"))


def dpm_type(c: Config) -> str:
  """"midpoint" or "heun"."""
  return choose(c, "solver_type", ("midpoint", "heun"), logrho="midpoint", bh1="midpoint",
                bh2="midpoint")


def multistep_weights(solver_type: str, slips: bool, r: Sequence[float], k: float) -> np.ndarray:
  """The quadrature of DPMSolverMultistepScheduler; `slips` in the SDE version of "++"."""
  means = tables.moments(len(r), 0.0 if len(r) == 2 and solver_type == "midpoint" else k)
  if len(r) == 3:
    means[2] = means[2] / 2 - (1 / (1 - math.exp(-k)) if slips else 0)
  return tables.weights(r, means)


def singlestep_weights(solver_type: str, slips: bool, r: Sequence[float], k: float) -> np.ndarray:
  """The quadrature of DPMSolverSinglestepScheduler; "midpoint" skips the node between."""
  if len(r) == 2:
    return tables.adams(r, 0.0 if solver_type == "midpoint" else k)
  if solver_type == "midpoint":
    first, last = tables.adams([r[0], r[2]], k)
    return np.array([first, 0.0, last])
  means = tables.moments(3, k)
  means[2] -= 2 / (1 - math.exp(-k)) if slips else 0
  return tables.weights(r, means)


def dpm_orders(c: Config, count: int, start: int) -> list[int]:
  """Orders of the DPM-Solver multistep classes: the last steps of few are lower."""
  few = c["lower_order_final"] and count < 15
  first = few or c["euler_at_final"] or c["final_sigmas_type"] == "zero"
  return rules.lowered(
      count, order_of(c, "solver_order", 3), start, 1 if first else 3, 2 if few else 3)


def dpm_multistep(c: Config, count: int, start: int) -> Table:
  """DPMSolverMultistepScheduler."""
  return multistep_on(levels.preserving(c, count), c, count, start, output_of(c))


def multistep_on(path: Path, c: Config, count: int, start: int, output: Output) -> Table:
  """DPM-Solver multistep on any path."""
  kind, tau = dpm_algorithm(c)
  return table_of(
      path, start, output, rules.multistep, kind=kind, tau=tau, orders=dpm_orders(c, count, start),
      weights=functools.partial(multistep_weights, dpm_type(c), bool(tau) and kind == "x0"))


def dpm_singlestep(c: Config, count: int, start: int) -> Table:
  """DPMSolverSinglestepScheduler."""
  kind, tau = dpm_algorithm(c)
  order = order_of(c, "solver_order", 3)
  orders = [n % order + 1 for n in range(count)]
  if c["final_sigmas_type"] == "zero" or c["lower_order_final"] and count % order == 0:
    orders[-1] = 1
  return table_of(
      levels.preserving(c | EVEN, count), start, output_of(c), rules.singlestep, kind=kind, tau=tau,
      orders=[min(known, n + 1) for n, known in enumerate(orders[start:])],
      weights=functools.partial(singlestep_weights, dpm_type(c), bool(tau) and kind == "x0"))


def deis(c: Config, count: int, start: int) -> Table:
  """DEISMultistepScheduler, which ends at the smallest sigma."""
  choose(c, "algorithm_type", ("deis",), **{"dpmsolver": "deis", "dpmsolver++": "deis"})
  choose(c, "solver_type", ("logrho",), midpoint="logrho", heun="logrho", bh1="logrho",
         bh2="logrho")
  few = c["lower_order_final"] and count < 15
  orders = rules.lowered(
      count, order_of(c, "solver_order", 3), start, *((1, 2) if few else (3, 3)))
  path = levels.preserving(c | {"final_sigmas_type": "sigma_min"}, count, repeats_last=True)
  return table_of(path, start, output_of(c), rules.multistep, kind="noise", orders=orders,
                  weights=tables.adams)


def unipc(c: Config, count: int, start: int) -> Table:
  """UniPCMultistepScheduler."""
  if c["solver_p"] is not None:
    raise UserError(f"scheduler option solver_p is {c['solver_p']!r}; only None has a table")
  kind = choose(c, "solver_type", ("bh1", "bh2"), midpoint="bh2", heun="bh2", logrho="bh2")
  order = order_of(c, "solver_order", 3)
  rule = {"bh1": rules.flat_line, "bh2": rules.middle_line}[kind]
  predictors = [min(order, n - start + 1, count - n if c["lower_order_final"] else order)
                for n in range(start, count)]
  correctors = [0, *(0 if start + n in c["disable_corrector"] else known + 1
                     for n, known in enumerate(predictors[:-1]))]
  return table_of(
      levels.preserving(c, count, repeats_last=True), start, output_of(c),
      rules.predictor_corrector, kind="x0" if c["predict_x0"] else "noise", predictors=predictors,
      correctors=correctors, predict=rule, correct=rule)


def sa(c: Config, count: int, start: int) -> Table:
  """SASolverScheduler, whose noise acts at timesteps 200 to 800."""
  kind = {"data_prediction": "x0", "noise_prediction": "noise"}[
      choose(c, "algorithm_type", ("data_prediction", "noise_prediction"))]
  if c["tau_func"] is not None:
    raise UserError("scheduler option tau_func is a program; only None, the default, has a table")
  last = count if c["lower_order_final"] else count + 4
  predictors = [min(order_of(c, "predictor_order", 4), n - start + 1, last - n)
                for n in range(start, count)]
  correctors = [0, *(min(order_of(c, "corrector_order", 4), n - start + 1, last - n + 2)
                     for n in range(start + 1, count))]
  path = levels.preserving(c | {"final_sigmas_type": "sigma_min"}, count, repeats_last=True)
  rule = rules.flat_line if kind == "x0" else tables.adams
  return table_of(
      path, start, output_of(c), rules.predictor_corrector, kind=kind, predictors=predictors,
      correctors=correctors, predict=rule, correct=rule,
      taus=[float(200 <= node.t <= 800) for node in path.nodes[start:]])


def ipndm(c: Config, count: int, start: int) -> Table:
  """IPNDMScheduler."""
  path = levels.ipndm_levels(c, count)
  path = Path(path.nodes[start:], path.landings[start:])
  return tables.tabulate(ipndm_steps(path), Output("v_prediction"))


def lcm(c: Config, count: int, start: int) -> Table:
  """LCMScheduler."""
  nodes = [levels.level(c, t) for t in levels.distilled_timesteps(c, count)]
  return table_of(Path(nodes, [*nodes[1:], CLEAN]), start, output_of(c), rules.lcm,
                  timestep_scaling=c["timestep_scaling"])


def tcd(c: Config, count: int, start: int) -> Table:
  """TCDScheduler, which never clips; the option eta, gamma in the paper, is of its step."""
  nodes = [levels.level(c, t) for t in levels.distilled_timesteps(c, count)]
  return table_of(Path(nodes, [*nodes[1:], levels.level(c, 0)]), start,
                  Output(c["prediction_type"]), rules.one_step,
                  split=functools.partial(tcd_split, c))


def edm_euler(c: Config, count: int, start: int) -> Table:
  """EDMEulerScheduler without churn."""
  return table_of(levels.edm_levels(c, count), start, levels.edm_output(c), rules.one_step)


def edm_multistep(c: Config, count: int, start: int) -> Table:
  """EDMDPMSolverMultistepScheduler."""
  return multistep_on(levels.edm_levels(c, count), c, count, start, levels.edm_output(c))


def flow_euler(c: Config, count: int, start: int) -> Table:
  """FlowMatchEulerDiscreteScheduler."""
  split = (lambda node, landing: (0.0, landing.s)) if c["stochastic_sampling"] else rules.quiet
  return table_of(levels.flow_levels(c, count), start, Output("flow_prediction"), rules.one_step,
                  split=split)


def flow_heun(c: Config, count: int, start: int) -> Table:
  """FlowMatchHeunDiscreteScheduler."""
  path = levels.flow_levels(c | FLOW_EULER, count)
  return table_of(path, start, Output("flow_prediction"), rules.flow_heun)


FLOW_ENDS = dict(num_train_timesteps=1000, shift=1.0)
FLOW_EULER = DYNAMIC | CURVES | dict(
    invert_sigmas=False, shift_terminal=None, stochastic_sampling=False, mu=None)
# Class -> (its options' defaults, its table). eta, mu and start come from the caller.
CLASSES = {
    "DDPMScheduler": (BETAS | SPACED | CLIP | THRESHOLD | ZERO_SNR | dict(
        variance_type="fixed_small"), ddpm),
    "DDIMScheduler": (BETAS | SPACED | CLIP | THRESHOLD | ZERO_SNR | dict(
        set_alpha_to_one=True, eta=0.0), ddim),
    "DDIMInverseScheduler": (BETAS | SPACED | CLIP | ZERO_SNR | dict(
        set_alpha_to_one=True), ddim_inverse),
    "PNDMScheduler": (BETAS | SPACED | dict(skip_prk_steps=False, set_alpha_to_one=False), pndm),
    "LMSDiscreteScheduler": (BETAS | EVEN | CURVES, lms),
    "EulerDiscreteScheduler": (BETAS | EVEN | CURVES | ZERO_SNR | levels.EULER, euler),
    "EulerAncestralDiscreteScheduler": (BETAS | EVEN | ZERO_SNR, euler_ancestral),
    "HeunDiscreteScheduler": (K_BETAS | EVEN | CURVES | CLIP | dict(clip_sample=False), heun),
    "KDPM2DiscreteScheduler": (K_BETAS | EVEN | CURVES, dpm2),
    "KDPM2AncestralDiscreteScheduler": (K_BETAS | EVEN | CURVES, dpm2_ancestral),
    "DPMSolverSDEScheduler": (K_BETAS | EVEN | CURVES, dpm_sde),
    "DPMSolverMultistepScheduler": (
        BETAS | EVEN | CURVES | THRESHOLD | ZERO_SNR | FINAL | FLOW | LEAST | DPM | dict(
            lower_order_final=True, euler_at_final=False, use_lu_lambdas=False), dpm_multistep),
    "DPMSolverSinglestepScheduler": (
        BETAS | CURVES | THRESHOLD | FINAL | FLOW | LEAST | DPM | dict(lower_order_final=False),
        dpm_singlestep),
    "DEISMultistepScheduler": (BETAS | EVEN | CURVES | THRESHOLD | FLOW | dict(
        solver_order=2, algorithm_type="deis", solver_type="logrho", lower_order_final=True), deis),
    "UniPCMultistepScheduler": (
        BETAS | EVEN | CURVES | THRESHOLD | ZERO_SNR | FINAL | FLOW | DYNAMIC | dict(
            solver_order=2, predict_x0=True, solver_type="bh2", lower_order_final=True,
            disable_corrector=[], solver_p=None, sigma_min=None, sigma_max=None,
            shift_terminal=None), unipc),
    "SASolverScheduler": (BETAS | EVEN | CURVES | THRESHOLD | FLOW | LEAST | dict(
        predictor_order=2, corrector_order=2, algorithm_type="data_prediction", tau_func=None,
        lower_order_final=True), sa),
    "IPNDMScheduler": (dict(num_train_timesteps=1000, trained_betas=None), ipndm),
    "LCMScheduler": (DISTILLED, lcm),
    "TCDScheduler": (DISTILLED | dict(eta=0.3), tcd),
    "EDMEulerScheduler": (EDM | FINAL, edm_euler),
    "EDMDPMSolverMultistepScheduler": (EDM | FINAL | THRESHOLD | DPM | dict(
        lower_order_final=True, euler_at_final=False), edm_multistep),
    "FlowMatchEulerDiscreteScheduler": (FLOW_ENDS | FLOW_EULER, flow_euler),
    "FlowMatchHeunDiscreteScheduler": (FLOW_ENDS, flow_heun),
}
