r"""Where samplers ask the network: timesteps, noise levels, and the ways between them.

A noise level is a timestep t of the schedule, or its sigma = s / a. Between timesteps sigma is
interpolated, linearly or in its logarithm. Sources:
  leading, trailing, linspace   Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2
  Karras                        Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5
  beta                          Lee et al. 2024, https://arxiv.org/abs/2407.12173
  AYS                           Sabour et al. 2024, https://arxiv.org/abs/2404.14507, appendix
  flow shift                    Esser et al. 2024, https://arxiv.org/abs/2403.03206, eq. 23
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from sdjax.diffusion import schedules
from sdjax.diffusion.tables import Node
from sdjax.errors import UserError

LEAST_ALPHA_BAR = 2.0**-24  # stands for zero where sigma must be finite

# Ten steps, found by the authors for two families of models.
AYS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
TIMESTEPS = ("leading", "trailing", "linspace", "sgm_uniform", "beta", "distilled")
DISTILLED_STEPS = 50  # of the teacher, in released consistency models
SIGMAS = ("karras", "exponential", *AYS)


def check_steps(steps: int, limit: int) -> None:
  """Raises UserError unless 1 <= steps <= limit."""
  if not 1 <= steps <= limit:
    raise UserError(f"steps is {steps}; this model takes 1 to {limit}")


def timesteps(spacing: str, steps: int, num_steps: int, *, offset: int = 0,
              endpoint: bool = False, rounded: bool = True, last: int | None = None) -> np.ndarray:
  """Chooses `steps` of `num_steps` timesteps, falling, float64.

  Args:
    spacing: one of `TIMESTEPS`; "sgm_uniform" and "beta" keep fractions, as "linspace" may.
    steps: how many, 1 … num_steps.
    num_steps: of the network.
    offset: added to "leading" timesteps; 1 in released Stable Diffusion folders.
    endpoint: choose steps + 1 and drop the last, as the DPM-Solver family does.
    rounded: to integers; "leading" and "trailing" always are.
    last: use only timesteps below this one.
  """
  check_steps(steps, num_steps)
  n, last = steps + endpoint, num_steps if last is None else last
  match spacing:
    case "leading":
      chosen = np.arange(n)[::-1] * (last // n) + offset
    case "trailing":
      chosen = np.round(last - np.arange(steps) * num_steps / steps) - 1
    case "linspace":
      chosen = np.linspace(0, last - 1, n)[::-1]
      chosen = np.round(chosen) if rounded else chosen
    case "sgm_uniform":
      chosen = np.linspace(last - 1, 0, steps + 1)
    case "beta":
      chosen = beta(last - 1, 0, steps + 1)
    case "distilled":
      chosen = distilled(DISTILLED_STEPS, steps, num_steps)
    case _:
      raise UserError(f"spacing {spacing!r} is not known; choose one of {(*TIMESTEPS, *SIGMAS)}")
  return np.clip(chosen[:steps], 0, num_steps - 1).astype(np.float64)


def distilled(original: int, steps: int, num_steps: int) -> np.ndarray:
  """Chooses `steps` of the `original` timesteps that a consistency model was distilled at."""
  check_steps(original, num_steps)
  check_steps(steps, original)
  known = (np.arange(original) + 1) * (num_steps // original) - 1
  return known[::-1][np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> np.ndarray:
  """Sigmas from `high` to `low`, evenly spaced in sigma^(1/rho)."""
  return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def exponential(high: float, low: float, steps: int) -> np.ndarray:
  """Sigmas from `high` to `low`, evenly spaced in their logarithm."""
  return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(high: float, low: float, steps: int) -> np.ndarray:
  """From `high` to `low` at quantiles of a Beta(0.6, 0.6) distribution: dense at both ends."""
  return low + (high - low) * special.betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))


def ays(table: Sequence[float], steps: int) -> np.ndarray:
  """An "align your steps" table, interpolated in log sigma; its last entry is not asked."""
  found = np.exp(np.interp(np.linspace(0, len(table) - 1, steps + 1), np.arange(len(table)),
                           np.log(table)))
  return found[:-1]


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """Flow sigmas in [0, 1] moved to more noise, as larger pictures need."""
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def sigma_table(schedule: schedules.Schedule) -> np.ndarray:
  """Returns sigma of every timestep, float64 [num_steps], rising; 4096 at zero terminal SNR."""
  alpha_bar = schedules.alphas_bar(schedule)
  alpha_bar = np.where(alpha_bar == 0, LEAST_ALPHA_BAR, alpha_bar)
  return np.sqrt((1 - alpha_bar) / alpha_bar)


def timestep_of(table: np.ndarray, sigma: float) -> float:
  """The float timestep whose log sigma is interpolated to `sigma`, inside the table."""
  return float(np.interp(np.log(max(sigma, 1e-10)), np.log(table), np.arange(len(table))))


def sigma_node(sigma: float, t: float) -> Node:
  """The node of a variance-exploding noise level, in the scale that the network sees."""
  a = 1 / math.sqrt(1 + sigma**2)
  return Node(a, sigma * a, t)


def edm_node(data_std: float, sigma: float) -> Node:
  """The node of EDM's preconditioning (Karras et al. 2022, table 1): t is log(sigma) / 4."""
  a = 1 / math.hypot(sigma, data_std)
  return Node(a, sigma * a, 0.25 * math.log(sigma))


def flow_node(sigma: float, t: float) -> Node:
  """The node of flow matching: x = (1 - sigma)·x0 + sigma·noise."""
  return Node(1 - sigma, sigma, t)


def node_at(schedule: schedules.Schedule, t: float) -> Node:
  """The node of a timestep; between integers log sigma is interpolated."""
  low = int(t)
  if t == low:
    alpha_bar = schedules.alphas_bar(schedule)[low]
    return Node(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), float(t))
  log_sigmas = np.log(sigma_table(schedule))
  return sigma_node(math.exp(np.interp(t, np.arange(len(log_sigmas)), log_sigmas)), float(t))


def falling(name: str, values: Sequence[float], low: float, high: float, count: int) -> np.ndarray:
  """Returns `count` values that a user gave, falling within [low, high], or raises UserError."""
  given = np.asarray(values, np.float64)
  if given.shape != (count,):
    raise UserError(f"{name} are {given.size} for {count} steps; give one for each")
  if not np.isfinite(given).all() or (np.diff(given) >= 0).any() or (
      given[0] > high or given[-1] < low):
    raise UserError(f"{name} are {list(values)}; they must fall from at most {high:g} to at least "
                    f"{low:g} without repeating a value")
  return given


def nodes(schedule: schedules.Schedule, steps: int, *, spacing: str, offset: int, rounded: bool,
          timesteps_given: Sequence[float] | None = None,
          sigmas_given: Sequence[float] | None = None) -> list[Node]:
  """Returns the nodes of our own samplers, noisiest first.

  Args:
    schedule: noise levels.
    steps: how many; a given list must be as long.
    spacing: one of `TIMESTEPS` or `SIGMAS`.
    offset: of `timesteps`.
    rounded: ask the network only at integer timesteps.
    timesteps_given, sigmas_given: in place of a spacing, falling; a final 0 sigma is implied.
  """
  check_steps(steps, schedule.num_steps)
  table = sigma_table(schedule)
  if timesteps_given is not None and sigmas_given is not None:
    raise UserError("timesteps and sigmas were both given; give one of them")
  if timesteps_given is not None:
    chosen = falling("timesteps", timesteps_given, 0, schedule.num_steps - 1, steps)
  elif sigmas_given is not None or spacing in SIGMAS:
    curves = {"karras": karras, "exponential": exponential}
    if sigmas_given is not None:
      sigmas = falling("sigmas", sigmas_given, np.finfo(np.float64).tiny, np.inf, steps)
    elif spacing in AYS:
      sigmas = ays(AYS[spacing], steps)
    else:
      sigmas = curves[spacing](table[-1], table[0], steps)
    chosen = [timestep_of(table, sigma) for sigma in sigmas]
    return [sigma_node(sigma, round(t) if rounded else t)
            for sigma, t in zip(sigmas, chosen, strict=True)]
  else:
    chosen = timesteps(spacing, steps, schedule.num_steps, offset=offset, rounded=rounded)
  return [node_at(schedule, t) for t in (np.round(chosen) if rounded else chosen)]
