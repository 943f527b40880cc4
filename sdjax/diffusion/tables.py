r"""Tables of float64 numbers: what every sampler becomes before it meets a device.

Samplers are written on unit vectors. With X, B, H0, H1, H2, F, C, Z the rows of an 8 × 8 identity
(the carried latents, the network's output, the limited denoised estimate, fresh noise), a sampler
yields for each network call its node and the new latents as vectors in that basis; stacked they
are the matrix of `sampling`, equation (4).

A *node* (a, s, t) stands for x = a·x0 + s·noise;  lambda = log(a / s),  sigma = s / a.  Nearly all
have a² + s² = 1; flow matching has a + s = 1. What others call variance exploding, x0 + sigma·noise
whose network sees x / sqrt(1 + sigma²), is the same latent in another scale.
*The step* from a node (a0, s0) to (a1, s1), with estimates D of x0 and E of the noise:
  x' = a1·D + down·E + up·z,   usually down² + up² = s1²                                    (1)
If one of D, E is a mean M over the step, the other is implied by x = a0·D + s0·E:
  x' = carry·x + gain·M + up·z                                                              (2)
*The quadrature*: M is the mean over the step of the polynomial through known estimates, under the
density exp(k·r), r = 0 at this node and 1 at the landing:
  M = sum_j w_j M_j,   w = adams(r, k)                                                      (3)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sdjax.diffusion import prediction
from sdjax.errors import UserError

STATE = 5
BASIS = np.eye(STATE + 3)
X, B, H0, H1, H2, F, C, Z = BASIS
LEGENDRE = np.polynomial.legendre.leggauss(64)  # points and weights of a quadrature on [-1, 1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
  """A sampler for one schedule, number of steps and meaning of the network's output.

  Attributes, n network evaluations, float64 unless said:
    mix: [n 5 8], equation (4) of `sampling`.
    t: [n] what the network is told.
    a, s: [n] the row's noise level, x = a·x0 + s·noise: where to start from a picture.
    c_skip, c_out: [n], equation (2) of `sampling`.
    clip: [n] limit of |D|; inf does not clip.
    quantile: [n] of dynamic thresholding; 0 is off, and then `clip` counts.
    noise_index: int32 [n]; which noise of the image this row adds.
    active: bool [n]; False pads at the end, and costs nothing.
    initial_scale: [] standard normal noise times this is the start.
  """
  mix: np.ndarray
  t: np.ndarray
  a: np.ndarray
  s: np.ndarray
  c_skip: np.ndarray
  c_out: np.ndarray
  clip: np.ndarray
  quantile: np.ndarray
  noise_index: np.ndarray
  active: np.ndarray
  initial_scale: np.ndarray

  def rows(self) -> dict[str, np.ndarray]:
    """Everything that has one entry per network evaluation."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
            if field.name != "initial_scale"}

  def padded(self, length: int) -> "Table":
    """Returns the table with inactive rows up to `length`, so that many share one program."""
    missing = length - len(self.t)
    if missing < 0:
      raise UserError(f"a table of {len(self.t)} network evaluations does not fit into {length}; "
                      "pad to more, or take fewer steps")
    return dataclasses.replace(self, **{
        name: np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
        for name, rows in self.rows().items()})

  def chunks(self, length: int) -> list[dict[str, np.ndarray]]:
    """Splits the rows into pieces of `length`, the last one padded: one program runs them all."""
    whole = self.padded(-(-len(self.t) // length) * length).rows()
    return [{name: rows[begin:begin + length] for name, rows in whole.items()}
            for begin in range(0, len(whole["t"]), length)]


class Node(NamedTuple):
  """A noise level: x = a·x0 + s·noise, known to the network as t (a float)."""
  a: float
  s: float
  t: float

  @property
  def log_ratio(self) -> float:
    """lambda = log(a / s); inf at s = 0, -inf at a = 0."""
    with np.errstate(divide="ignore"):
      return float(np.log(self.a) - np.log(self.s))

  @property
  def sigma(self) -> float:
    """s / a, inf at a = 0."""
    return float(self.s / self.a) if self.a else np.inf


CLEAN = Node(1.0, 0.0, 0.0)
Row = tuple[Node, Sequence[np.ndarray]]  # where the network is asked, and S' as vectors [≤ 5][8]


@dataclasses.dataclass(frozen=True)
class Output:
  """What a network's output F means, and how the denoised estimate is limited.

  Attributes:
    prediction_type: of `prediction.coefficients`.
    clip: limit of |D|, for pixel models; inf for latents. With `quantile`, the largest limit.
    quantile: of |D|, per image, that becomes its limit if above 1 (dynamic thresholding, Imagen,
      Saharia et al. 2022, https://arxiv.org/abs/2205.11487, section 2.3); 0 is off.
    data_std: of x0, by which EDM's networks are scaled (Karras et al. 2022,
      https://arxiv.org/abs/2206.00364, table 1): then a²·data_std² + s² = 1.
    sign: of F; EDM's own networks return -v.
  """
  prediction_type: str
  clip: float = np.inf
  quantile: float = 0.0
  data_std: float = 1.0
  sign: float = 1.0

  def coefficients(self, a: np.ndarray, s: np.ndarray) -> prediction.Coefficients:
    """`prediction.coefficients` of x0 and noise at (a, s).

    Raises:
      UserError: where the output tells nothing of x0: epsilon of pure noise.
    """
    c = prediction.coefficients(self.prediction_type, np.multiply(a, self.data_std), s)
    if not np.isfinite(c.c_out).all():
      raise UserError(
          f"{self.prediction_type} prediction at a timestep of pure noise says nothing of the "
          "picture: use a v_prediction network, or a spacing that leaves the last timestep out")
    return prediction.Coefficients(
        self.data_std * c.c_skip, self.sign * self.data_std * c.c_out,
        c.e_skip, self.sign * c.e_out)

  @property
  def is_limited(self) -> bool:
    """Tells whether D can differ from what the network said."""
    return np.isfinite(self.clip) or self.quantile > 0

  def noise(self, node: Node, x: np.ndarray = X, f: np.ndarray = F) -> np.ndarray:
    """E as the network said it, a vector, of the latent x and the output f."""
    c = self.coefficients(node.a, node.s)
    return c.e_skip * x + c.e_out * f

  def denoised(self, node: Node) -> np.ndarray:
    """D, a vector, for x at `node`."""
    if self.is_limited:
      return C
    c = self.coefficients(node.a, node.s)
    return c.c_skip * X + c.c_out * F

  def estimates(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
    """D and E, vectors, for x at `node`; if D is limited, the E that x then implies."""
    denoised = self.denoised(node)
    return denoised, (X - node.a * C) / node.s if self.is_limited else self.noise(node)


def moments(count: int, k: float = 0.0) -> np.ndarray:
  """Returns the means over [0, 1] of 1, r, r², … under density ∝ exp(k·r), float64 [count]."""
  points, measure = LEGENDRE
  points = (points + 1) / 2
  density = measure * np.exp(k * (points - (k > 0)))  # scaled so that it cannot overflow
  return points ** np.arange(count)[:, None] @ (density / density.sum())


def weights(r: Sequence[float], means: np.ndarray) -> np.ndarray:
  """Returns w with sum_j w_j p(r_j) = sum_i c_i means_i for p = sum_i c_i r^i, degree < len(r)."""
  return np.linalg.solve(np.vander(r, increasing=True).T, means)


def adams(r: Sequence[float], k: float = 0.0) -> np.ndarray:
  """Weights w with sum_j w_j p(r_j) = mean of p over [0, 1] under density ∝ exp(k·r).

  Exact for polynomials p of degree < len(r). The classical Adams-Bashforth weights are k = 0.

  Args:
    r: distinct positions of the known values; 0 is this node, 1 the next, negative the past.
    k: exponent of the density.

  Returns:
    float64 [len(r)], summing to one.
  """
  return weights(r, moments(len(r), k))


def decay(node: Node, landing: Node) -> float:
  """exp(-h), h the step in lambda: in [0, 1], also where a lambda is infinite."""
  return (landing.s * node.a) / (landing.a * node.s)


def ancestral(node: Node, landing: Node, eta: float = 1.0) -> tuple[float, float]:
  """(down, up) of equation (1): DDIM's eq. 16; at eta = 1 DDPM and ancestral Euler."""
  up = eta * landing.s * np.sqrt(max(1 - decay(node, landing) ** 2, 0.0))
  return np.sqrt(max(landing.s**2 - up**2, 0.0)), up


def stochastic(kind: str, node: Node, landing: Node, tau: float) -> tuple[float, float]:
  """(down, up) of equation (1) for the SDE of strength tau, solved exactly but for the mean.

  SA-Solver (Xue et al. 2023, https://arxiv.org/abs/2309.05019, eq. 14 and appendix B); tau = 1 are
  the SDE versions of DPM-Solver.

  Args:
    kind: "x0" or "noise": what the mean of equation (2) is of.
    node, landing: ends of the step.
    tau: 0 is the ODE.
  """
  if not tau:
    return landing.s, 0.0
  if kind == "x0":
    kept = decay(node, landing) ** tau**2
    return landing.s * kept, landing.s * np.sqrt(1 - kept**2)
  grown = landing.a * node.s / node.a  # s1·exp(h)
  return (landing.s - tau**2 * (grown - landing.s),
          tau * np.sqrt(max(grown**2 - landing.s**2, 0.0)))


def leap(kind: str, node: Node, landing: Node, down: float) -> tuple[float, float]:
  """(carry, gain) of equation (2), from (1) and the x that both estimates imply."""
  if kind == "x0":
    carry = down / node.s
    return carry, landing.a - carry * node.a
  carry = landing.a / node.a
  return carry, down - carry * node.s


def tabulate(rows: Iterator[Row], output: Output, initial_scale: float = 1.0) -> Table:
  """Stacks the rows of a sampler."""
  nodes, states = zip(*rows, strict=True)
  n = len(nodes)
  mix = np.zeros((n, STATE, len(BASIS)))
  for row, state in zip(mix, states, strict=True):
    row[: len(state)] = np.stack(state)
  a, s, t = (np.array(column, np.float64) for column in zip(*nodes, strict=True))
  c = output.coefficients(a, s)
  return Table(
      mix=mix, t=t, a=a, s=s, c_skip=c.c_skip, c_out=c.c_out, clip=np.full(n, output.clip),
      quantile=np.full(n, output.quantile), noise_index=np.arange(n, dtype=np.int32),
      active=np.ones(n, bool), initial_scale=np.array(initial_scale))
