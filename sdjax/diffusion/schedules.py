"""Noise schedules: how much signal and noise a latent holds at each of the network's timesteps.

A noisy latent is x_t = a·x0 + s·noise with a² = alpha_bar[t] and s² = 1 - alpha_bar[t]      (1)
where alpha_bar[t] = prod_{i<=t} (1 - beta[i])   (DDPM, Ho et al. 2020, eq. 4)               (2)

All tables are float64 numpy on the host: in bfloat16 an alpha near one rounds to one, and pictures
turn black.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from sdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A discrete variance-preserving schedule, named as in a diffusers scheduler_config.json.

  Attributes:
    name: a key of `BETAS`. Stable Diffusion uses "scaled_linear".
    beta_start: variance added at the first timestep, in (0, 1). Unused by "squaredcos_cap_v2".
    beta_end: variance added at the last timestep, in (0, 1). Likewise.
    num_steps: timesteps of the network, 1000 in all released models.
    zero_terminal_snr: rescale such that the last timestep is pure noise (Lin et al. 2023,
      https://arxiv.org/abs/2305.08891, algorithm 1).
    trained_betas: the variances themselves, in place of `name`; `num_steps` of them.
  """
  name: str = "scaled_linear"
  beta_start: float = 0.00085
  beta_end: float = 0.012
  num_steps: int = 1000
  zero_terminal_snr: bool = False
  trained_betas: tuple[float, ...] | None = None

  def __post_init__(self):
    if self.name not in BETAS:
      raise UserError(f"noise schedule {self.name!r} is not known; choose one of {sorted(BETAS)}")
    if self.num_steps < 1:
      raise UserError(f"num_steps is {self.num_steps}; a schedule needs at least 1 step")
    if self.trained_betas is not None and len(self.trained_betas) != self.num_steps:
      raise UserError(f"{len(self.trained_betas)} trained_betas for {self.num_steps} timesteps; "
                      "give one each")


def linear_betas(schedule: Schedule) -> np.ndarray:
  """DDPM, section 4."""
  return np.linspace(schedule.beta_start, schedule.beta_end, schedule.num_steps)


def scaled_linear_betas(schedule: Schedule) -> np.ndarray:
  """Latent diffusion (Rombach et al. 2022): linear in the square root."""
  return np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_steps) ** 2


def sigmoid_betas(schedule: Schedule) -> np.ndarray:
  """GeoDiff (Xu et al. 2022, https://arxiv.org/abs/2203.02923)."""
  share = 1 / (1 + np.exp(-np.linspace(-6, 6, schedule.num_steps)))
  return schedule.beta_start + (schedule.beta_end - schedule.beta_start) * share


def squared_cosine(t: np.ndarray) -> np.ndarray:
  """Improved DDPM (Nichol & Dhariwal 2021), eq. 17."""
  return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace(t: np.ndarray) -> np.ndarray:
  """Root of alpha_bar where log SNR has a Laplace density (Hang et al. 2024, arxiv 2407.03297)."""
  log_snr = -0.5 * np.copysign(1.0, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
  return np.sqrt(1 / (1 + np.exp(-log_snr)))


def capped_betas(alpha_bar: Callable[[np.ndarray], np.ndarray], schedule: Schedule) -> np.ndarray:
  """Returns the betas of alpha_bar(t), t in [0, 1], capped at 0.999."""
  levels = alpha_bar(np.arange(schedule.num_steps + 1) / schedule.num_steps)
  return np.minimum(1 - levels[1:] / levels[:-1], 0.999)


BETAS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": functools.partial(capped_betas, squared_cosine),
    "sigmoid": sigmoid_betas,
    "laplace": functools.partial(capped_betas, laplace),
    "exp": functools.partial(capped_betas, lambda t: np.exp(-12.0 * t)),
}


# Schedules that only one class of diffusers knows; there the others refuse them.
OF_ONE_CLASS = {"sigmoid": "DDPMScheduler", "laplace": "DDPMScheduler",
                "exp": "HeunDiscreteScheduler"}


@functools.cache
def alphas_bar(schedule: Schedule) -> np.ndarray:
  """Returns alpha_bar, float64 [num_steps], falling from nearly 1 to nearly (or exactly) 0."""
  given = schedule.trained_betas
  betas = BETAS[schedule.name](schedule) if given is None else np.array(given)
  alpha_bar = np.cumprod(1 - betas)
  if schedule.zero_terminal_snr:
    root = np.sqrt(alpha_bar)
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  alpha_bar.setflags(write=False)  # shared by the cache
  return alpha_bar


def log_snr(schedule: Schedule) -> np.ndarray:
  """Returns log(alpha_bar / (1 - alpha_bar)), float64 [num_steps]; -inf at zero terminal SNR."""
  alpha_bar = alphas_bar(schedule)
  with np.errstate(divide="ignore"):
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def from_config(scheduler_config: dict) -> Schedule:
  """Returns the schedule of a diffusers `scheduler_config.json` (a dict) of any class.

  What the file leaves out takes the value of diffusers' constructors.

  Raises:
    UserError: for a beta_schedule that is not known, or not in that class.
  """
  name, kind = scheduler_config.get("beta_schedule", "linear"), scheduler_config.get("_class_name")
  if OF_ONE_CLASS.get(name, kind) != kind:
    raise UserError(f"beta_schedule {name!r} is known in {OF_ONE_CLASS[name]} only, not in {kind}; "
                    f"choose one of {sorted(BETAS.keys() - OF_ONE_CLASS.keys())}")
  betas = scheduler_config.get("trained_betas")
  return Schedule(
      name=name,
      beta_start=scheduler_config.get("beta_start", 0.0001),
      beta_end=scheduler_config.get("beta_end", 0.02),
      num_steps=len(betas) if betas else scheduler_config.get("num_train_timesteps", 1000),
      zero_terminal_snr=scheduler_config.get("rescale_betas_zero_snr", False),
      trained_betas=tuple(betas) if betas else None)


def to_config(schedule: Schedule, prediction_type: str) -> dict:
  """Returns a diffusers `scheduler_config.json` for this schedule, of DDIM if that knows it."""
  return {
      "_class_name": OF_ONE_CLASS.get(schedule.name, "DDIMScheduler"),
      "beta_schedule": schedule.name,
      "beta_start": schedule.beta_start,
      "beta_end": schedule.beta_end,
      "num_train_timesteps": schedule.num_steps,
      "rescale_betas_zero_snr": schedule.zero_terminal_snr,
      "trained_betas": schedule.trained_betas and list(schedule.trained_betas),
      "prediction_type": prediction_type,
      # Trailing spacing reaches the last timestep, where a zero-SNR schedule starts.
      "timestep_spacing": "trailing" if schedule.zero_terminal_snr else "leading",
      "steps_offset": 0 if schedule.zero_terminal_snr else 1,
      "set_alpha_to_one": schedule.zero_terminal_snr,
      "clip_sample": False,
  }
