"""Where diffusers' scheduler classes ask the network: levels of noise by each one's conventions.

Numbers and rules are those of diffusers 0.42 (https://github.com/huggingface/diffusers,
src/diffusers/schedulers), measured against it by tests/oracle/solvers_test.py; where it gives NaN,
a table is finite. Four families share a choice of noise levels: DDIM's integer timesteps,
k-diffusion's sigmas (`exploding`), DPM-Solver's n + 1 nodes of which the last is dropped
(`preserving`), and flow matching.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax.diffusion import schedules, spacings
from sdjax.diffusion.tables import CLEAN, Node, Output
from sdjax.errors import UserError

Config = dict[str, Any]


class Path(NamedTuple):
  """Where a sampler goes: its nodes, where each step lands, and the scale of the start."""
  nodes: list[Node]
  landings: list[Node]
  initial_scale: float = 1.0


def choose(c: Config, option: str, known: Sequence[str], **aliases: str) -> str:
  """Returns an option's value, or what stands for it, or raises UserError with the known ones."""
  value = aliases.get(c[option], c[option])
  if value not in known:
    raise UserError(f"scheduler option {option} is {c[option]!r}; it must be one of {list(known)}")
  return value


def order_of(c: Config, option: str, limit: int) -> int:
  """Returns an order, 1 … limit, or raises UserError."""
  if not 1 <= c[option] <= limit:
    raise UserError(f"scheduler option {option} is {c[option]}; it must be 1 to {limit}")
  return c[option]


def curve_of(c: Config) -> str | None:
  """Returns the spacing of sigmas that a config asks for, at most one."""
  names = ("karras", "exponential", "beta")
  chosen = [name for name in names if c.get(f"use_{name}_sigmas")]
  if len(chosen) > 1:
    raise UserError(f"scheduler options ask for {' and '.join(chosen)} sigmas; choose one")
  return chosen[0] if chosen else None


CURVES = {"karras": spacings.karras, "exponential": spacings.exponential, "beta": spacings.beta}


def output_of(c: Config) -> Output:
  """What the network returns and how D is limited: thresholding goes before clipping."""
  if c.get("variance_type") in ("learned", "learned_range"):
    raise UserError(f"scheduler option variance_type is {c['variance_type']!r}, which is read from "
                    "further channels of the network; only fixed variances have a table")
  clip = c["clip_sample_range"] if c.get("clip_sample") else np.inf
  if c.get("thresholding"):
    return Output(c["prediction_type"], c["sample_max_value"], c["dynamic_thresholding_ratio"])
  return Output(c["prediction_type"], clip)


def level(c: Config, t: float) -> Node:
  """The node of a timestep; pure noise where epsilon would say nothing becomes nearly pure."""
  node = spacings.node_at(schedules.from_config(c), t)
  if node.a == 0 and c["prediction_type"] == "epsilon":
    return spacings.sigma_node(math.sqrt(1 / spacings.LEAST_ALPHA_BAR - 1), node.t)
  return node


def final_level(c: Config) -> Node:
  """Where DDIM, PNDM and LCM step to from the last timestep."""
  return CLEAN if c["set_alpha_to_one"] else level(c, 0)


def sigma_nodes(c: Config) -> Callable[[float], Node]:
  """Returns sigma -> its node, at a fraction of a timestep."""
  table = spacings.sigma_table(schedules.from_config(c))
  return lambda sigma: spacings.sigma_node(sigma, spacings.timestep_of(table, sigma))


EULER = dict(interpolation_type="linear", timestep_type="discrete", final_sigmas_type="zero",
             sigma_min=None, sigma_max=None)


def exploding(given: Config, count: int, round_karras: bool = False) -> Path:
  """k-diffusion's levels: sigmas at fractions of timesteps, spaced between the chosen ends."""
  c = EULER | given  # only EulerDiscreteScheduler has these options
  table = spacings.sigma_table(schedules.from_config(c))
  spacing = choose(c, "timestep_spacing", ("linspace", "leading", "trailing"))
  t = spacings.timesteps(spacing, count, len(table), offset=c["steps_offset"], rounded=False)
  sigmas = np.interp(t, np.arange(len(table)), table)
  if choose(c, "interpolation_type", ("linear", "log_linear")) == "log_linear":
    # One more than timesteps.
    sigmas = spacings.exponential(table[-1], table[0], count + 1)
  if curve := curve_of(c):
    high, low = (sigmas[end] if c[name] is None else c[name]
                 for name, end in (("sigma_max", 0), ("sigma_min", -1)))
    sigmas = CURVES[curve](high, low, count)
    t = np.array([spacings.timestep_of(table, sigma) for sigma in sigmas])
    t = np.round(t) if round_karras and curve == "karras" else t
  last = {"zero": 0.0, "sigma_min": table[0]}[
      choose(c, "final_sigmas_type", ("zero", "sigma_min"))]
  sigmas = [*sigmas, last][: count + 1]
  if choose(c, "timestep_type", ("discrete", "continuous")) == "continuous" and (
      c["prediction_type"] == "v_prediction"):
    t = 0.25 * np.log(sigmas[:-1])
  nodes = [spacings.sigma_node(sigma, time) for sigma, time in zip(sigmas[:-1], t, strict=True)]
  start = sigmas[0] if spacing != "leading" else math.hypot(sigmas[0], 1)
  # The last latent stays in the exploding scale.
  return Path(nodes, [*nodes[1:], Node(1.0, sigmas[-1], 0.0)], start * nodes[0].a)


def flow_sigmas(c: Config, count: int, mu: float | None) -> np.ndarray:
  """Sigmas of flow matching as the DPM-Solver family spaces them; UniPC starts at one."""
  shift = math.exp(mu) if mu is not None else c["flow_shift"]
  if "shift_terminal" not in c:
    return spacings.shifted(
        1 - np.linspace(1, 1 / c["num_train_timesteps"], count + 1)[::-1], shift)[:-1]
  sigmas = np.linspace(1, 1 / c["num_train_timesteps"], count + 1)[:-1]
  sigmas = stretched(spacings.shifted(sigmas, flow_shift(c, mu, c["flow_shift"])), c)
  if abs(sigmas[0] - 1) < 1e-6:
    sigmas[0] -= 1e-6
  return sigmas


def flow_shift(c: Config, mu: float | None, shift: float) -> float:
  """The factor by which flow sigmas are shifted; mu is what depends on the picture's size."""
  if not c["use_dynamic_shifting"]:
    return shift
  if mu is None:
    raise UserError("this scheduler shifts its sigmas by the picture's size: give the option mu")
  kind = choose(c, "time_shift_type", ("exponential", "linear"))
  return math.exp(mu) if kind == "exponential" else mu


def stretched(sigmas: np.ndarray, c: Config) -> np.ndarray:
  """Flow sigmas whose last is `shift_terminal`, if that is set."""
  if not c["shift_terminal"]:
    return sigmas
  return 1 - (1 - sigmas) * (1 - c["shift_terminal"]) / (1 - sigmas[-1])


def preserving(c: Config, count: int, *, repeats_last: bool = False) -> Path:
  """DPM-Solver's levels: integer timesteps, curves over the whole table, flow on request.

  Args:
    c: with "timestep_spacing".
    count: network evaluations.
    repeats_last: a curve's last sigma is also where its last step lands.
  """
  schedule = schedules.from_config(c)
  table = spacings.sigma_table(schedule)
  is_flow, curve = c.get("use_flow_sigmas", False), curve_of(c)
  if (c["prediction_type"] == "flow_prediction") > is_flow:
    raise UserError("prediction_type flow_prediction needs use_flow_sigmas=True")
  whole, curve = len(table), "lu" if c.get("use_lu_lambdas") and curve != "karras" else curve
  if curve:
    shape = spacings.exponential if curve == "lu" else CURVES[curve]
    high, low = (table[end] if c.get(name) is None else c[name]
                 for name, end in (("sigma_max", -1), ("sigma_min", 0)))
    sigmas = shape(high, low, count)
    # Truncated below: whether the first is 999 or 998.9999998 is decided by float32 there.
    coarse = np.log(table.astype(np.float32)).astype(np.float64)
    t = np.interp(np.log(np.minimum(sigmas, np.float32(high))), coarse, np.arange(whole))
    if curve in ("karras", "lu") and not (
        "use_lu_lambdas" in c and c["beta_schedule"] == "squaredcos_cap_v2"):
      t = np.round(t)
    if is_flow:
      sigmas = sigmas / (1 + sigmas)
      t = sigmas * whole
  elif is_flow:
    sigmas = flow_sigmas(c, count, c["mu"])
    t = sigmas * whole
  else:
    last = int((-np.log(table) >= c.get("lambda_min_clipped", -np.inf)).sum())
    spacing = choose(c, "timestep_spacing", ("linspace", "leading", "trailing"))
    t = spacings.timesteps(spacing, count, whole, offset=c["steps_offset"],
                           endpoint=spacing != "trailing", last=last)
    if (different := len(set(t))) < count:
      raise UserError(f"steps is {count}; the scheduler's options leave {different} different "
                      "timesteps: take as many, or another timestep_spacing")
    sigmas = table[t.astype(int)]
  final = choose(c, "final_sigmas_type", ("zero", "sigma_min"))
  last = 0.0 if final == "zero" else (
      sigmas[-1] if repeats_last and (curve or is_flow) else table[0])
  node = spacings.flow_node if is_flow else spacings.sigma_node
  # The reference keeps timesteps as integers.
  nodes = [node(sigma, float(int(time))) for sigma, time in zip(sigmas, t, strict=True)]
  return Path(nodes, [*nodes[1:], node(last, 0.0)])


def edm_levels(c: Config, count: int) -> Path:
  """EDM's levels: the network sees x / sqrt(sigma² + data_std²) and log(sigma) / 4."""
  high, low, spread = c["sigma_max"], c["sigma_min"], c["sigma_data"]
  spacings.check_steps(count, c["num_train_timesteps"])
  kind = choose(c, "sigma_schedule", ("karras", "exponential"))
  sigmas = (spacings.karras(high, low, count, c["rho"]) if kind == "karras"
            else spacings.exponential(high, low, count))
  nodes = [spacings.edm_node(spread, sigma) for sigma in sigmas]
  last = {"zero": 0.0, "sigma_min": sigmas[-1]}[
      choose(c, "final_sigmas_type", ("zero", "sigma_min"))]
  return Path(nodes, [*nodes[1:], Node(1.0, last, 0.0)], math.hypot(high, 1) * nodes[0].a)


def edm_output(c: Config) -> Output:
  """EDM's preconditioned network, a v-prediction of scaled data."""
  kind, limits = choose(c, "prediction_type", ("epsilon", "v_prediction")), output_of(c)
  return Output("v_prediction", limits.clip, limits.quantile, c["sigma_data"],
                -1.0 if kind == "epsilon" else 1.0)


def flow_levels(c: Config, count: int) -> Path:
  """The levels of both flow-matching classes; `shift` acts on the ends and on all between."""
  whole, shift = c["num_train_timesteps"], c["shift"]
  spacings.check_steps(count, whole)
  ends = np.array([1.0, 1 / whole])
  if not c["use_dynamic_shifting"]:
    ends = spacings.shifted(ends, shift)
  sigmas = spacings.shifted(np.linspace(*ends, count), flow_shift(c, c["mu"], shift))
  sigmas = stretched(sigmas, c)
  if curve := curve_of(c):
    sigmas = CURVES[curve](sigmas[0], sigmas[-1], count)
  last = 0.0
  if c["invert_sigmas"]:
    sigmas, last = 1 - sigmas, 1.0
  nodes = [spacings.flow_node(sigma, sigma * whole) for sigma in sigmas]
  return Path(nodes, [*nodes[1:], spacings.flow_node(last, 0.0)])


def ipndm_levels(c: Config, count: int) -> Path:
  """iPNDM's own schedule; if betas were given, one step for each but the last."""
  s = np.sin(np.linspace(1, 0, count + 1) * math.pi / 2) ** 2
  if c["trained_betas"] is not None:
    s = np.array(c["trained_betas"])
  nodes = [Node(math.sqrt(1 - noise**2), noise, math.asin(noise) / math.pi * 2) for noise in s]
  return Path(nodes[:-1], nodes[1:])


def distilled_timesteps(c: Config, count: int) -> np.ndarray:
  """LCM's and TCD's timesteps: some of those that the model was distilled at."""
  return spacings.distilled(c["original_inference_steps"], count, c["num_train_timesteps"])
