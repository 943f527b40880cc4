r"""The host side of every sampler: tables of float64 numbers, one row per network evaluation.

Samplers are written on unit vectors. With X, B, H0, H1, H2, F, C, z the rows of an 8 × 8 identity
(the carried latents, the network's output, the clipped denoised estimate, fresh noise), a sampler
yields for each network call its node and the five new latents as vectors in that basis; stacked
they are the matrix of `sampling.sample`, equation (4).

A *node* (a, s, t) stands for x = a·x0 + s·noise with a² + s² = 1;  lambda = log(a / s).
*The step* from a node (a0, s0) to (a1, s1), with estimates D of x0 and E of the noise:
  x' = a1·D + down·E + up·z,   down² + up² = s1²                                            (1)
where the one of D, E that is not given is implied by x = a0·D + s0·E.
*The quadrature*: a multistep sampler replaces D by the mean over the step of the polynomial
through the last estimates, under the density exp(k·r), r = 0 at this node and 1 at the next:
  D ≈ sum_j w_j D_j,   w = adams(r, k)                                                      (2)

Sources: DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16); DPM-Solver++
(Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from sdjax.diffusion import prediction, schedules
from sdjax.errors import UserError

STATE = 5
X, B, H0, H1, H2, F, C, Z = np.eye(8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
  """A sampler for one schedule, number of steps and meaning of the network's output.

  Attributes, n network evaluations, float64 unless said:
    mix: [n 5 8], equation (4) of `sampling`.
    c_in, t, c_skip, c_out: [n], equations (1) and (2) of `sampling`.
    clip: [n] limit of |D|; inf does not clip.
    noise_index: int32 [n]; which noise of the image this row adds.
    initial_scale: [] standard normal noise times this is the start.
  """
  mix: np.ndarray
  c_in: np.ndarray
  t: np.ndarray
  c_skip: np.ndarray
  c_out: np.ndarray
  clip: np.ndarray
  noise_index: np.ndarray
  initial_scale: np.ndarray

  def rows(self) -> dict[str, np.ndarray]:
    """Everything that has one entry per network evaluation."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
            if field.name != "initial_scale"}


class Node(NamedTuple):
  """A noise level: x = a·x0 + s·noise, known to the network as t (a float)."""
  a: float
  s: float
  t: float

  @property
  def log_ratio(self) -> float:
    """lambda = log(a / s), inf at s = 0."""
    return float(np.log(self.a / self.s)) if self.s else np.inf


Step = tuple[Node, np.ndarray]  # where the network is asked, and S' as vectors [≤ 5, 8]


def adams(r: list[float], k: float = 0.0) -> np.ndarray:
  """Weights w with sum_j w_j p(r_j) = mean of p over [0, 1] under density ∝ exp(k·r).

  Exact for polynomials p of degree < len(r). The classical Adams-Bashforth weights are k = 0.

  Args:
    r: distinct positions of the known values; 0 is this node, 1 the next, negative the past.
    k: exponent of the density.

  Returns:
    float64 [len(r)], summing to one.
  """
  points, measure = np.polynomial.legendre.leggauss(32)
  points = (points + 1) / 2
  density = measure * np.exp(k * (points - max(k > 0, 0)))  # scaled so that it cannot overflow
  density /= density.sum()
  moments = [(density * points**j).sum() for j in range(len(r))]
  return np.linalg.solve(np.vander(r, increasing=True).T, moments)


def step(node: Node, landing: Node, denoised: np.ndarray, up: float = 0.0,
         noise: np.ndarray | None = None) -> np.ndarray:
  """Equation (1): the landing latent as a vector in the basis.

  Args:
    node: where x stands now.
    landing: where it goes.
    denoised: D as a vector in the basis.
    up: standard deviation of fresh noise, in [0, landing.s].
    noise: E as a vector; None where it is implied by x and D.
  """
  if noise is None:
    noise = (X - node.a * denoised) / node.s
  down = np.sqrt(max(landing.s**2 - up**2, 0.0))
  return landing.a * denoised + down * noise + up * Z


def timesteps(spacing: str, steps: int, num_steps: int, *, offset: int = 0,
              endpoint: bool = False) -> np.ndarray:
  """Chooses `steps` of `num_steps` timesteps, falling, as integers in float64.

  Args:
    spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, arxiv 2305.08891, table 2).
    steps: how many, 1 … num_steps.
    num_steps: of the network.
    offset: added to "leading" timesteps; 1 in released Stable Diffusion folders.
    endpoint: choose steps + 1 and drop the last, as the DPM-Solver family does.
  """
  if not 1 <= steps <= num_steps:
    raise UserError(f"steps is {steps}; this model takes 1 to {num_steps}")
  n = steps + endpoint
  match spacing:
    case "leading":
      chosen = np.arange(n)[::-1] * (num_steps // n) + offset
    case "trailing":
      chosen = np.round(num_steps - np.arange(steps) * num_steps / steps) - 1
    case "linspace":
      chosen = np.round(np.linspace(0, num_steps - 1, n))[::-1]
    case _:
      raise UserError(
          f"timestep spacing {spacing!r} is not known; choose leading, trailing or linspace")
  return np.clip(chosen[:steps], 0, num_steps - 1).astype(np.float64)


def node_at(schedule: schedules.Schedule, t: float) -> Node:
  """The node of an integer timestep."""
  alpha_bar = schedules.alphas_bar(schedule)[int(t)]
  return Node(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), float(t))


CLEAN = Node(1.0, 0.0, 0.0)


def ddim_steps(nodes: list[Node], landings: list[Node], prediction_type: str,
               eta: float) -> Iterator[Step]:
  """DDIM, eq. 12 with sigma of eq. 16: eta = 0 is deterministic, eta = 1 is DDPM."""
  for node, landing in zip(nodes, landings, strict=True):
    e = prediction.coefficients(prediction_type, node.a, node.s)
    noise = e.e_skip * X + e.e_out * F
    variance = (landing.s / node.s) ** 2 * (1 - (node.a / landing.a) ** 2)
    yield node, np.stack([step(node, landing, C, eta * np.sqrt(max(variance, 0.0)), noise)])


def dpmpp_2m_steps(nodes: list[Node], landings: list[Node], lower_order_final: bool,
                   ) -> Iterator[Step]:
  """DPM-Solver++(2M), algorithm 2: the mean of a line through the last two estimates in lambda.

  S_1 carries the estimate of the node before.
  """
  for n, (node, landing) in enumerate(zip(nodes, landings, strict=True)):
    h = landing.log_ratio - node.log_ratio
    is_last = n == len(nodes) - 1
    if n == 0 or not np.isfinite(h) or (is_last and lower_order_final):
      denoised = C
    else:
      weights = adams([0.0, (nodes[n - 1].log_ratio - node.log_ratio) / h])
      denoised = weights[0] * C + weights[1] * B
    yield node, np.stack([step(node, landing, denoised), C])


def tabulate(steps: Iterator[Step], prediction_type: str, clip: float | None) -> Table:
  """Stacks the rows of a sampler."""
  nodes, states = zip(*steps, strict=True)
  n = len(nodes)
  mix = np.zeros((n, STATE, len(X)))
  for row, state in zip(mix, states, strict=True):
    row[: len(state)] = state
  a, s, t = (np.array(column) for column in zip(*nodes, strict=True))
  c = prediction.coefficients(prediction_type, a, s)
  table = Table(
      mix=mix, c_in=np.ones(n), t=t, c_skip=c.c_skip, c_out=c.c_out,
      clip=np.full(n, np.inf if clip is None else clip),
      noise_index=np.arange(n, dtype=np.int32), initial_scale=np.ones(()))
  if not (np.isfinite(mix).all() and np.isfinite(c.c_out).all()):
    raise UserError(
        f"{prediction_type} prediction at a timestep of pure noise says nothing of the picture: "
        "use a v_prediction network, or a spacing that leaves the last timestep out")
  return table


def ddim(schedule: schedules.Schedule, prediction_type: str, steps: int, *, eta: float = 0.0,
         spacing: str = "leading", offset: int = 0, clip: float | None = None,
         final_alpha_one: bool = True) -> Table:
  """DDIM as a table.

  Args:
    schedule: noise levels.
    prediction_type: one of `prediction.TYPES`.
    steps: network evaluations, 1 … schedule.num_steps.
    eta: 0 deterministic … 1 as noisy as DDPM.
    spacing: of `timesteps`.
    offset: of `timesteps`.
    clip: limit of |D|, for pixel models; None for latents.
    final_alpha_one: land on the clean latent; else on timestep 0.

  Returns:
    A table whose last latent is the picture's.
  """
  if not 0 <= eta <= 1:
    raise UserError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (DDPM)")
  chosen = timesteps(spacing, steps, schedule.num_steps, offset=offset)
  nodes = [node_at(schedule, t) for t in chosen]
  # The reference steps by a constant stride, whatever the spacing.
  before = chosen - schedule.num_steps // steps
  final = CLEAN if final_alpha_one else node_at(schedule, 0)
  landings = [node_at(schedule, t) if t >= 0 else final for t in before]
  return tabulate(ddim_steps(nodes, landings, prediction_type, eta), prediction_type, clip)


def dpmpp_2m(schedule: schedules.Schedule, prediction_type: str, steps: int, *,
             spacing: str = "linspace", offset: int = 0, lower_order_final: bool = True,
             ) -> Table:
  """DPM-Solver++(2M) as a table; arguments as in `ddim`.

  lower_order_final takes the last step to first order when `steps` < 15, as the paper advises;
  a step onto the clean latent is of first order anyway.
  """
  chosen = timesteps(spacing, steps, schedule.num_steps, offset=offset,
                     endpoint=spacing != "trailing")
  nodes = [node_at(schedule, t) for t in chosen]
  rows = dpmpp_2m_steps(nodes, [*nodes[1:], CLEAN], lower_order_final and steps < 15)
  return tabulate(rows, prediction_type, None)


SAMPLERS: dict[str, Callable[..., Table]] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def named(sampler: str, schedule: schedules.Schedule, prediction_type: str, steps: int,
          **options) -> Table:
  """Returns the table of a sampler in `SAMPLERS`."""
  if sampler not in SAMPLERS:
    raise UserError(f"sampler {sampler!r} is not known; choose one of {sorted(SAMPLERS)}")
  return SAMPLERS[sampler](schedule, prediction_type, steps, **options)


# Options of diffusers' constructors: their defaults, and the only values that have a table here.
DEFAULTS = {
    "DDIMScheduler": dict(
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=0,
        set_alpha_to_one=True, clip_sample=True, clip_sample_range=1.0),
    "DPMSolverMultistepScheduler": dict(
        prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0,
        lower_order_final=True),
}
ONLY = {
    "DDIMScheduler": dict(thresholding=False, trained_betas=None),
    "DPMSolverMultistepScheduler": dict(
        thresholding=False, trained_betas=None, algorithm_type="dpmsolver++", solver_order=2,
        solver_type="midpoint", use_karras_sigmas=False, use_exponential_sigmas=False,
        use_beta_sigmas=False, use_lu_lambdas=False, use_flow_sigmas=False,
        euler_at_final=False, final_sigmas_type="zero", variance_type=None,
        lambda_min_clipped=-math.inf),
}


def from_config(scheduler_config: dict, steps: int, **options) -> Table:
  """Returns the table of a diffusers `scheduler_config.json`; `options` override its choices.

  Raises:
    UserError: for a scheduler class or an option that has no table here, naming it.
  """
  name = scheduler_config.get("_class_name")
  if name not in DEFAULTS:
    raise UserError(f"scheduler class {name!r} has no table here; name a sampler instead, "
                    f"one of {sorted(SAMPLERS)}")
  for option, value in ONLY[name].items():
    if scheduler_config.get(option, value) != value:
      raise UserError(f"scheduler option {option}={scheduler_config[option]!r} of {name} has no "
                      f"table here, only {value!r}; name a sampler instead, one of "
                      f"{sorted(SAMPLERS)}")
  config = DEFAULTS[name] | scheduler_config
  schedule = schedules.from_config(config)
  chosen = {"spacing": config["timestep_spacing"], "offset": config["steps_offset"]}
  if name == "DDIMScheduler":
    chosen["clip"] = config["clip_sample_range"] if config["clip_sample"] else None
    chosen["final_alpha_one"] = config["set_alpha_to_one"]
    return ddim(schedule, config["prediction_type"], steps, **chosen | options)
  chosen["lower_order_final"] = config["lower_order_final"]
  return dpmpp_2m(schedule, config["prediction_type"], steps, **chosen | options)
