r"""Samplers by name, and the doors to them: what goes in is a schedule, what comes out a table.

Ours are exact: each step lands on the next node and the last on the clean latent, curves keep
fractions of timesteps, quadratures are those of the theory. `from_config` on the other hand keeps
the conventions of diffusers' classes.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sdjax.diffusion import rules, scheduler_configs, schedules, spacings, tables
from sdjax.diffusion.tables import CLEAN, Node, Output, Row, Table, Z
from sdjax.errors import UserError


class Path(NamedTuple):
  """Where one of our own samplers goes.

  Attributes:
    nodes: where the network is asked, noisiest first.
    landings: where the step from each ends.
    at: sigma -> its node, between the given ones.
    schedule: the noise levels of timesteps.
  """
  nodes: list[Node]
  landings: list[Node]
  at: Callable[[float], Node]
  schedule: schedules.Schedule


# What every sampler takes, but those on paths of their own. spacing None: the sampler's own.
PATH = dict(spacing=None, offset=0, rounded=False, timesteps=None, sigmas=None, final_sigma="zero",
            clip=math.inf, quantile=0.0, unit_variance=True)
EDM = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, spacing="karras",
           clip=math.inf, quantile=0.0)
FLOW = dict(shift=1.0, sigmas=None)


def between(name: str, value: float, low: float, high: float) -> float:
  """Returns an option's value, or raises UserError unless it lies in [low, high]."""
  if not low <= value <= high:
    raise UserError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
  return value


def diffusion_path(schedule: schedules.Schedule, prediction_type: str, count: int,
                   o: dict[str, Any]) -> tuple[Path, Output, float]:
  """The path of a variance-preserving schedule, what F means, and the scale of the start."""
  nodes = spacings.nodes(
      schedule, count, spacing=o["spacing"], offset=o["offset"], rounded=o["rounded"],
      timesteps_given=o["timesteps"], sigmas_given=o["sigmas"])
  finals = {"zero": CLEAN, "sigma_min": spacings.node_at(schedule, 0)}
  if o["final_sigma"] not in finals:
    raise UserError(f"final_sigma is {o['final_sigma']!r}; it must be one of {sorted(finals)}")
  table = spacings.sigma_table(schedule)
  path = Path(nodes, [*nodes[1:], finals[o["final_sigma"]]], lambda sigma: spacings.sigma_node(
      sigma, spacings.timestep_of(table, sigma)), schedule)
  scale = 1.0 if o["unit_variance"] else nodes[0].s
  return path, output_of(prediction_type, o), scale


def output_of(prediction_type: str, o: dict[str, Any], data_std: float = 1.0, sign: float = 1.0,
              ) -> Output:
  """What the network returns, and the limits that a user gave."""
  clip = between("clip", o["clip"], np.finfo(np.float32).tiny, math.inf)
  return Output(prediction_type, clip, between("quantile", o["quantile"], 0, 1), data_std, sign)


def edm_path(schedule: schedules.Schedule, prediction_type: str, count: int,
             o: dict[str, Any]) -> tuple[Path, Output, float]:
  """The path of EDM's own networks, which know no timesteps; `prediction_type` is not read."""
  curves = {"karras": functools.partial(spacings.karras, rho=o["rho"]),
            "exponential": spacings.exponential}
  if o["spacing"] not in curves:
    raise UserError(f"spacing is {o['spacing']!r}; EDM networks take one of {sorted(curves)}")
  spacings.check_steps(count, schedule.num_steps)
  at = functools.partial(spacings.edm_node, o["sigma_data"])
  nodes = [at(sigma) for sigma in curves[o["spacing"]](o["sigma_max"], o["sigma_min"], count)]
  output = output_of("v_prediction", o, o["sigma_data"], -1.0)
  scale = math.hypot(o["sigma_max"], o["sigma_data"]) * nodes[0].a
  return Path(nodes, [*nodes[1:], CLEAN], at, schedule), output, scale


def flow_path(schedule: schedules.Schedule, prediction_type: str, count: int,
              o: dict[str, Any]) -> tuple[Path, Output, float]:
  """The straight path of flow matching, from pure noise; `prediction_type` is not read."""
  spacings.check_steps(count, schedule.num_steps)
  if o["shift"] <= 0:
    raise UserError(f"shift is {o['shift']}; it must be positive, 1 for none")
  sigmas = spacings.shifted(np.linspace(1, 0, count + 1)[:-1], o["shift"])
  if o["sigmas"] is not None:
    sigmas = spacings.falling("sigmas", o["sigmas"], np.finfo(np.float64).tiny, 1.0, count)

  def at(sigma):
    return spacings.flow_node(sigma, sigma * schedule.num_steps)

  nodes = [at(sigma) for sigma in sigmas]
  return Path(nodes, [*nodes[1:], CLEAN], at, schedule), Output("flow_prediction"), 1.0


def one_step(path: Path, output: Output, *, eta: float) -> Iterator[Row]:
  """DDIM: eta = 0 is deterministic and Euler's step, eta = 1 is DDPM's and ancestral Euler's."""
  between("eta", eta, 0, 1)
  return rules.one_step(path.nodes, path.landings, output, said_noise=True,
                        split=functools.partial(tables.ancestral, eta=eta))


def ancestral(path: Path, output: Output) -> Iterator[Row]:
  """DDPM, eq. 7: the posterior of the limited estimate."""
  return rules.one_step(path.nodes, path.landings, output, split=tables.ancestral)


def euler(path: Path, output: Output, *, s_churn: float, s_tmin: float, s_tmax: float,
          s_noise: float) -> Iterator[Row]:
  """EDM's algorithm 2 of first order: before each call but the first, noise may be added."""
  most = min(between("s_churn", s_churn, 0, math.inf) / len(path.nodes), math.sqrt(2) - 1)
  raised = [path.at(node.sigma * (1 + most)) if n and most and s_tmin <= node.sigma <= s_tmax
            else node for n, node in enumerate(path.nodes)]
  arrived = [*raised[1:], path.landings[-1]]
  for node, low, high in zip(raised, path.landings, arrived, strict=True):
    denoised, noise = output.estimates(node)
    added = s_noise * math.sqrt(max(high.sigma**2 - low.sigma**2, 0.0))
    yield node, [high.a * (denoised + low.sigma * noise + added * Z)]


def ddim_inverse(path: Path, output: Output) -> Iterator[Row]:
  """DDIM backwards, from timestep 0 to the first node."""
  first = spacings.node_at(path.schedule, 0)
  up = [first, *(node for node in path.nodes[::-1] if node.t > 0)]
  return rules.one_step(up[:-1], up[1:], output, said_noise=True)


def strided(path: Path, output: Output, *, runge_kutta: bool) -> Iterator[Row]:
  """PNDM and PLMS, which know timesteps of one stride."""
  t, count = [int(node.t) for node in path.nodes], len(path.nodes)
  if t != [node.t for node in path.nodes] or len({int(gap) for gap in np.diff(t)}) > 1:
    raise UserError("PNDM and PLMS need whole timesteps of one stride: choose the spacing leading, "
                    f"or trailing with steps that divide {path.schedule.num_steps}")
  stride = t[0] - t[1] if count > 1 else path.schedule.num_steps

  def node_at(time):
    return spacings.node_at(path.schedule, time) if time >= 0 else path.landings[-1]

  if not runge_kutta:
    return rules.linear_multistep([*t[:2], *t[1:]], stride, node_at, output)
  if count < 4:
    raise UserError(f"PNDM begins with 4 steps of Runge-Kutta, and {count} are asked for or left; "
                    "choose plms")
  return rules.pndm(t, stride, node_at, output)


def multistep(path: Path, output: Output, *, order: int, kind: str = "x0", tau: float = 0.0,
              solver_type: str = "heun", lower_order_final: bool = True) -> Iterator[Row]:
  """DPM-Solver and DPM-Solver++ multistep, and DEIS, which is their exact quadrature of noise.

  solver_type "midpoint" takes the line's middle at order 2, as the papers do. lower_order_final
  lowers the last two of fewer than 15 steps, as they advise.
  """
  if solver_type not in ("midpoint", "heun"):
    raise UserError(f"solver_type is {solver_type!r}; it must be midpoint or heun")
  few = lower_order_final and len(path.nodes) < 15
  rule = rules.middle_line if solver_type == "midpoint" else tables.adams
  return rules.multistep(
      path.nodes, path.landings, output, kind=kind, tau=between("tau", tau, 0, math.inf),
      weights=rule, orders=rules.lowered(
          len(path.nodes), between("order", order, 1, 3), 0, *((1, 2) if few else (3, 3))))


def adams_bashforth(path: Path, output: Output, *, coordinate: str, order: int) -> Iterator[Row]:
  """LMS, where the noise is a polynomial in sigma, and iPNDM, in the number of the step."""
  between("order", order, 1, 4)
  return rules.multistep(
      path.nodes, path.landings, output, kind="noise", coordinate=coordinate,
      orders=[min(order, n + 1) for n in range(len(path.nodes))],
      weights=lambda r, k: tables.adams(r))


def singlestep(path: Path, output: Output, *, order: int, kind: str = "x0", tau: float = 0.0,
               ) -> Iterator[Row]:
  """DPM-Solver and DPM-Solver++ singlestep: groups of `order` nodes, each a Runge-Kutta step."""
  between("order", order, 1, 3)
  orders = [n % order + 1 for n in range(len(path.nodes))]
  if not np.isfinite(path.landings[-1].log_ratio):
    orders[-1] = 1
  return rules.singlestep(path.nodes, path.landings, output, kind=kind, orders=orders,
                          weights=tables.adams, tau=between("tau", tau, 0, math.inf))


def heun(path: Path, output: Output) -> Iterator[Row]:
  """EDM's algorithm 1."""
  return rules.two_stage(path.nodes, path.landings, output, kind="noise", weights=(0.5, 0.5),
                         middle=lambda node, landing: landing)


def midpoint(path: Path, output: Output, *, kind: str, split: rules.Split = rules.quiet,
             is_brownian: bool = False) -> Iterator[Row]:
  """DPM2 ("noise") and DPM-Solver++ 2S ("x0") with a middle halfway in lambda."""
  middle_split = rules.quiet if is_brownian else split
  return rules.two_stage(
      path.nodes, path.landings, output, kind=kind, weights=(0.0, 1.0), split=split,
      middle=functools.partial(rules.halfway, path.at, middle_split), is_brownian=is_brownian)


def unipc(path: Path, output: Output, *, order: int, solver_type: str, kind: str = "x0",
          lower_order_final: bool = True) -> Iterator[Row]:
  """UniPC of B(h) "bh1" or "bh2"; each step is corrected when the next estimate is known."""
  known = {"bh1": rules.flat_line, "bh2": rules.middle_line}
  if solver_type not in known:
    raise UserError(f"solver_type is {solver_type!r}; it must be one of {sorted(known)}")
  between("order", order, 1, 3)
  count, rule = len(path.nodes), known[solver_type]
  predictors = [min(order, n + 1, count - n if lower_order_final else order) for n in range(count)]
  return rules.predictor_corrector(
      path.nodes, path.landings, output, kind=kind, predictors=predictors,
      correctors=[0, *(known + 1 for known in predictors[:-1])], predict=rule, correct=rule)


def sa_solver(path: Path, output: Output, *, predictor_order: int, corrector_order: int,
              tau: float, noisy_from: float, noisy_to: float) -> Iterator[Row]:
  """SA-Solver: the SDE of strength tau at timesteps in [noisy_from, noisy_to], else the ODE."""
  between("predictor_order", predictor_order, 1, 4)
  between("corrector_order", corrector_order, 0, 4)
  between("tau", tau, 0, math.inf)
  count = len(path.nodes)
  return rules.predictor_corrector(
      path.nodes, path.landings, output, kind="x0", predict=tables.adams, correct=tables.adams,
      predictors=[min(predictor_order, n + 1, count - n) for n in range(count)],
      correctors=[0, *(min(corrector_order, n + 1, count - n + 2) for n in range(1, count))],
      taus=[tau if noisy_from <= node.t <= noisy_to else 0.0 for node in path.nodes])


def lcm(path: Path, output: Output, *, timestep_scaling: float) -> Iterator[Row]:
  """Multistep consistency sampling."""
  return rules.lcm(path.nodes, path.landings, output, timestep_scaling=timestep_scaling)


def tcd(path: Path, output: Output, *, gamma: float) -> Iterator[Row]:
  """TCD, algorithm 4: down to (1 - gamma)·t of the next timestep, and back up with noise."""
  between("gamma", gamma, 0, 1)

  def split(_, landing):
    if landing.s == 0:
      return 0.0, 0.0
    lower = spacings.node_at(path.schedule, (1 - gamma) * landing.t)
    grown = landing.a / lower.a
    return grown * lower.s, math.sqrt(max(1 - grown**2, 0.0))

  return rules.one_step(path.nodes, path.landings, output, split=split)


def flow_heun(path: Path, output: Output) -> Iterator[Row]:
  """Heun along straight lines."""
  return rules.flow_heun(path.nodes, path.landings, output)


CHURN = dict(s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0)
ANCESTRAL = dict(split=tables.ancestral)
Rule = Callable[..., Iterator[Row]]
# Name -> (rule, its options and their defaults, what the name fixes, the default spacing).
SAMPLERS: dict[str, tuple[Rule, dict[str, Any], dict[str, Any], str]] = {
    "ddpm": (ancestral, {}, {}, "trailing"),
    "ddim": (one_step, dict(eta=0.0), {}, "trailing"),
    "ddim_inverse": (ddim_inverse, {}, {}, "trailing"),
    "pndm": (strided, {}, dict(runge_kutta=True), "leading"),
    "plms": (strided, {}, dict(runge_kutta=False), "leading"),
    "lms": (adams_bashforth, dict(order=4), dict(coordinate="sigma"), "karras"),
    "ipndm": (adams_bashforth, dict(order=4), dict(coordinate="index"), "karras"),
    "euler": (euler, CHURN, {}, "trailing"),
    "euler_ancestral": (one_step, dict(eta=1.0), {}, "trailing"),
    "heun": (heun, {}, {}, "karras"),
    "dpm2": (midpoint, {}, dict(kind="noise"), "karras"),
    "dpm2_ancestral": (midpoint, {}, ANCESTRAL | dict(kind="noise"), "karras"),
    "dpmpp_2s_ancestral": (midpoint, {}, ANCESTRAL | dict(kind="x0"), "karras"),
    "dpmpp_sde": (midpoint, {}, ANCESTRAL | dict(kind="x0", is_brownian=True), "karras"),
    "dpmsolver": (multistep, dict(order=2, solver_type="midpoint", lower_order_final=True),
                  dict(kind="noise"), "trailing"),
    "dpmsolver_singlestep": (singlestep, dict(order=2), dict(kind="noise"), "exponential"),
    "dpmpp_2m": (multistep, dict(order=2, solver_type="midpoint", lower_order_final=True), {},
                 "trailing"),
    "dpmpp_3m": (multistep, dict(lower_order_final=True), dict(order=3), "trailing"),
    "dpmpp_2m_sde": (multistep, dict(solver_type="midpoint", lower_order_final=True, tau=1.0),
                     dict(order=2), "karras"),
    "dpmpp_3m_sde": (multistep, dict(lower_order_final=True, tau=1.0), dict(order=3),
                     "exponential"),
    "dpmpp_2s": (singlestep, dict(tau=0.0), dict(order=2), "exponential"),
    "dpmpp_3s": (singlestep, dict(tau=0.0), dict(order=3), "exponential"),
    "deis": (multistep, dict(order=3, lower_order_final=True), dict(kind="noise"), "trailing"),
    "unipc": (unipc, dict(order=2, solver_type="bh2", kind="x0", lower_order_final=True), {},
              "trailing"),
    "sa_solver": (sa_solver, dict(predictor_order=3, corrector_order=4, tau=1.0, noisy_from=200,
                                  noisy_to=800), {}, "trailing"),
    "lcm": (lcm, dict(timestep_scaling=10.0), {}, "distilled"),
    "tcd": (tcd, dict(gamma=0.3), {}, "distilled"),
    "edm_euler": (euler, CHURN, {}, "karras"),
    "edm_heun": (heun, {}, {}, "karras"),
    "edm_dpmpp_2m": (multistep, dict(order=2, solver_type="midpoint", lower_order_final=True), {},
                     "karras"),
    "flow_euler": (one_step, dict(eta=0.0), {}, ""),
    "flow_heun": (flow_heun, {}, {}, ""),
}
# Which networks a sampler is for, by the start of its name: (path, the path's options).
PATHS = {"edm": (edm_path, EDM), "flow": (flow_path, FLOW)}


def check_start(start: int, steps: int) -> None:
  """Raises UserError unless a step is left."""
  if not 0 <= start < steps:
    raise UserError(f"start is {start}; of {steps} steps, 0 to {steps - 1} can be left out")


def named(sampler: str, schedule: schedules.Schedule, prediction_type: str, steps: int,
          **options: Any) -> Table:
  """Returns the table of a sampler in `SAMPLERS`.

  Args:
    sampler: a key of `SAMPLERS`; "edm_…" and "flow_…" are for networks trained so.
    schedule: noise levels.
    prediction_type: of `prediction.coefficients`.
    steps: 1 … schedule.num_steps; samplers of two stages ask the network twice in each.
    **options: the sampler's own, in `SAMPLERS`, and its path's, in `PATH`, `EDM` or `FLOW`:
      spacing one of `spacings.TIMESTEPS` or `spacings.SIGMAS`; offset of leading timesteps;
      rounded: ask at whole timesteps only; timesteps or sigmas: a list in place of a spacing;
      final_sigma "zero" or "sigma_min"; clip and quantile of `tables.Output`; unit_variance:
      start from the noise as it is, or (False) scaled to the first node's noise level; and
      `start`, steps left out at the beginning (image to image begins at the table's first a, s).

  Returns:
    A table whose last latent is the picture's.

  Raises:
    UserError: for an unknown sampler or option, or a value out of range.
  """
  if sampler not in SAMPLERS:
    raise UserError(f"sampler {sampler!r} is not known; choose one of {sorted(SAMPLERS)}")
  rule, own, fixed, spacing = SAMPLERS[sampler]
  start = options.pop("start", 0)
  make_path, path_options = PATHS.get(sampler.split("_")[0], (diffusion_path, PATH))
  if unknown := options.keys() - own.keys() - path_options.keys():
    raise UserError(f"option {min(unknown)!r} is not one of {sampler}'s: choose from "
                    f"{sorted(own.keys() | path_options.keys())}")
  chosen = path_options | {"spacing": path_options.get("spacing") or spacing} | options
  path, output, scale = make_path(schedule, prediction_type, steps, chosen)
  check_start(start, steps)
  path = path._replace(nodes=path.nodes[start:], landings=path.landings[start:])
  rows = rule(path, output, **fixed, **own | {key: options[key] for key in own.keys() & options})
  return tables.tabulate(rows, output, scale)


def from_config(scheduler_config: dict, steps: int, **options: Any) -> Table:
  """Returns the table of a diffusers `scheduler_config.json`, with that class's conventions.

  Args:
    scheduler_config: the file's content; what a class's constructor does not know is passed over.
    steps: num_inference_steps there.
    **options: override the file; besides `start`, steps left out at the beginning (image to
      image), eta of DDIM and TCD, and mu of flow matching with dynamic shifting.

  Raises:
    UserError: for a class or an option that has no table, naming it.
  """
  name = scheduler_config.get("_class_name")
  if name not in scheduler_configs.CLASSES:
    raise UserError(f"scheduler class {name!r} has no table here; name a sampler instead, "
                    f"one of {sorted(SAMPLERS)}")
  defaults, make = scheduler_configs.CLASSES[name]
  start = options.pop("start", 0)
  if unknown := options.keys() - defaults.keys():
    raise UserError(f"option {min(unknown)!r} is not one of {name}'s: choose from "
                    f"{sorted(defaults)}")
  given = {key: scheduler_config[key] for key in defaults.keys() & scheduler_config}
  config = defaults | given | options | {"_class_name": name}
  spacings.check_steps(steps, config["num_train_timesteps"])
  check_start(start, steps)
  return make(config, steps, start)
