r"""Training objectives: clean latents in; noisy latents, targets and weights out.

The loss of an example is  weight · mean((F(x_t, t) - target)²),  x_t = a·x0 + s·noise         (1)

Weights (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting",
https://arxiv.org/abs/2303.09556, section 3.4): an x0 loss weighted by min(snr, gamma), which in
terms of the other targets is
  epsilon: min(snr, gamma) / snr     v: min(snr, gamma) / (snr + 1)     sample: min(snr, gamma)  (2)
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import prediction, schedules
from sdjax.diffusion.parts import WHOLE, Part
from sdjax.errors import UserError

WEIGHTINGS = ("uniform", "min_snr")


@dataclasses.dataclass(frozen=True)
class Objective:
  """Which target, at which noise levels, with which weight.

  Attributes:
    schedule: noise levels of the timesteps.
    prediction_type: one of `prediction.TYPES`.
    weighting: "uniform", or "min_snr" of equation (2).
    gamma: of equation (2), > 0; 5 in the paper.
    noise_offset: standard deviation of noise added to whole channels, which lets pictures be
      very dark or bright (https://www.crosslabs.org/blog/diffusion-with-offset-noise); 0 is off.
    high_noise_share: of the examples, in [0, 1], whose timestep is at least `high_noise_from`; the
      others are uniform over all. There a text-to-image model decides from the prompt what goes
      where (eDiff-I, Balaji et al. 2022, https://arxiv.org/abs/2211.01324, section 4): from
      scratch it learns composition sooner. The best prediction at a timestep stays what it is.
    high_noise_from: a timestep, 0 … num_steps - 1.
  """
  schedule: schedules.Schedule
  prediction_type: str = "epsilon"
  weighting: str = "uniform"
  gamma: float = 5.0
  noise_offset: float = 0.0
  high_noise_share: float = 0.0
  high_noise_from: int = 850

  def __post_init__(self):
    prediction.check_type(self.prediction_type)
    if self.weighting not in WEIGHTINGS:
      raise UserError(f"weighting {self.weighting!r} is not known; choose one of {WEIGHTINGS}")
    if self.gamma <= 0:
      raise UserError(f"min-SNR gamma is {self.gamma}; it must be positive, 5 in the paper")
    if not 0 <= self.high_noise_share <= 1:
      raise UserError(f"high_noise_share is {self.high_noise_share}; it must be in [0, 1]")
    if not 0 <= self.high_noise_from < self.schedule.num_steps:
      raise UserError(f"high_noise_from is {self.high_noise_from}; it must be a timestep, "
                      f"0 … {self.schedule.num_steps - 1}")


class Noisy(NamedTuple):
  """A corrupted batch."""
  x_t: jax.Array     # [b h w c]
  t: jax.Array       # [b] float32 in 0 … num_steps - 1
  target: jax.Array  # [b h w c]
  weight: jax.Array  # [b]


def weights(objective: Objective) -> np.ndarray:
  """Returns the loss weight of every timestep, float64 [num_steps]."""
  if objective.weighting == "uniform":
    return np.ones(objective.schedule.num_steps)
  alpha_bar = schedules.alphas_bar(objective.schedule)
  snr = alpha_bar / (1 - alpha_bar)
  clipped = np.minimum(snr, objective.gamma)
  match objective.prediction_type:
    case "epsilon":
      # At zero terminal SNR the limit of min(snr, gamma) / snr is one.
      return np.divide(clipped, snr, out=np.ones_like(snr), where=snr > 0)
    case "v_prediction":
      return clipped / (snr + 1)
    case "sample":
      return clipped


def density(objective: Objective) -> np.ndarray:
  """Returns the probability of every timestep, float64 [num_steps]."""
  steps, first = objective.schedule.num_steps, objective.high_noise_from
  p = np.full(steps, (1 - objective.high_noise_share) / steps)
  p[first:] += objective.high_noise_share / (steps - first)
  return p


def stratified_timesteps(key: jax.Array, batch: int, density: np.ndarray) -> jax.Array:
  """Draws one timestep from each of `batch` strata of equal probability: int32 [b].

  Each has `density` [num_steps] on its own; together they cover the range, so that the loss of a
  batch varies less (Variational Diffusion Models, Kingma et al. 2021, appendix I.1).
  """
  offset = jax.random.uniform(key)
  positions = (offset + jnp.arange(batch) / batch) % 1.0
  upper = jnp.asarray(np.cumsum(density)[:-1], jnp.float32)
  return jnp.searchsorted(upper, positions, side="right").astype(jnp.int32)


def corrupt(
    objective: Objective,
    key: jax.Array,
    x0: jax.Array,  # [b h w c] float32
    part: Part = WHOLE,
) -> Noisy:
  """Draws timesteps and noise for a batch of clean latents, or for a part of one."""
  key_t, key_noise, key_offset = jax.random.split(key, 3)
  normal = lambda key, shape: part.draw(functools.partial(jax.random.normal, key), shape)
  t = part.draw(
      lambda shape: stratified_timesteps(key_t, *shape, density(objective)), x0.shape[:1])
  noise = normal(key_noise, x0.shape)
  if objective.noise_offset:
    shape = (x0.shape[0], 1, 1, x0.shape[-1])
    noise += objective.noise_offset * normal(key_offset, shape)

  alpha_bar = schedules.alphas_bar(objective.schedule)
  a = jnp.asarray(np.sqrt(alpha_bar), jnp.float32)[t][:, None, None, None]
  s = jnp.asarray(np.sqrt(1 - alpha_bar), jnp.float32)[t][:, None, None, None]
  return Noisy(
      x_t=a * x0 + s * noise,
      t=t.astype(jnp.float32),
      target=prediction.target(objective.prediction_type, x0, noise, a, s),
      weight=jnp.asarray(weights(objective), jnp.float32)[t])
