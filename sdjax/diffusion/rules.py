r"""Samplers as generators on unit vectors, in the notation of `tables`.

Each takes nodes, where the network is asked, and landings, where the steps from them end, and
yields one row per network call. What is carried:
  S_0 the latent, S_1 the estimate of the node before or the latent that a step starts from,
  S_2 … older estimates.

Sources: DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502); PNDM (Liu et al. 2022,
https://arxiv.org/abs/2202.09778); EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364);
DPM-Solver (Lu et al. 2022, https://arxiv.org/abs/2206.00927) and DPM-Solver++
(https://arxiv.org/abs/2211.01095); DEIS (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902);
UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867); SA-Solver (Xue et al. 2023,
https://arxiv.org/abs/2309.05019); LCM (Luo et al. 2023, https://arxiv.org/abs/2310.04378);
TCD (Zheng et al. 2024, https://arxiv.org/abs/2402.19159).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sdjax.diffusion import tables
from sdjax.diffusion.tables import H0, H1, H2, B, F, Node, Output, Row, X, Z

Nodes = Sequence[Node]
Split = Callable[[Node, Node], tuple[float, float]]  # (node, landing) -> (down, up)
Weights = Callable[[Sequence[float], float], np.ndarray]  # (positions r, k) -> weights


def quiet(node: Node, landing: Node) -> tuple[float, float]:
  """(down, up) of a step without noise."""
  return landing.s, 0.0


def one_step(nodes: Nodes, landings: Nodes, output: Output, *, split: Split = quiet,
             said_noise: bool = False) -> Iterator[Row]:
  """One network call per step, no memory: equation (1) of `tables`.

  Args:
    nodes, landings, output: as everywhere in this module.
    split: what of the landing's noise is the old one's and what is fresh.
    said_noise: use the noise as the network said it although D is limited, as DDIM does.
  """
  for node, landing in zip(nodes, landings, strict=True):
    down, up = split(node, landing)
    denoised = output.denoised(node)
    noise = output.noise(node) if said_noise else output.estimates(node)[1]
    yield node, [landing.a * denoised + down * noise + up * Z]


def lcm(nodes: Nodes, landings: Nodes, output: Output, *, timestep_scaling: float = 10.0,
        ) -> Iterator[Row]:
  """Multistep consistency sampling: jump to the denoised latent, add fresh noise."""
  for node, landing in zip(nodes, landings, strict=True):
    # The boundary condition of consistency models: at t = 0 the latent is its own estimate.
    t, spread = node.t * timestep_scaling, 0.5
    skip, out = spread**2 / (t**2 + spread**2), t / math.hypot(t, spread)
    denoised = out * output.denoised(node) + skip * X
    yield node, [landing.a * denoised + landing.s * Z]


COORDINATES = {"lambda": lambda node, n: node.log_ratio, "sigma": lambda node, n: node.sigma,
               "index": lambda node, n: n}


def positions(node: float, landing: float, past: Sequence[float]) -> list[float]:
  """[0, r_1, …]: this node and other known ones, where the step is [0, 1].

  Ends where a position or the step is infinite, for there nothing is extrapolated, and where the
  step is none.
  """
  found = [0.0]
  if landing != node and np.isfinite(landing):
    for value in past:
      r = (value - node) / (landing - node)
      if not np.isfinite(r):
        break
      found.append(r)
  return found


def multistep(nodes: Nodes, landings: Nodes, output: Output, *, kind: str, orders: Sequence[int],
              weights: Weights, coordinate: str = "lambda", tau: float = 0.0) -> Iterator[Row]:
  """Adams-Bashforth: DPM-Solver multistep, DEIS, LMS, iPNDM.

  Args:
    nodes, landings, output: as everywhere in this module.
    kind: "x0" or "noise": which estimate is extrapolated.
    orders: of each step, at most 4.
    weights: the quadrature.
    coordinate: a key of `COORDINATES`, in which the estimates are a polynomial.
    tau: strength of the SDE.
  """
  at = COORDINATES[coordinate]
  for n, (node, landing) in enumerate(zip(nodes, landings, strict=True)):
    estimates = output.estimates(node)
    now = estimates[kind == "noise"]
    here, end = at(node, n), at(landing, n + 1)
    down, up = tables.stochastic(kind, node, landing, tau)
    past = [at(nodes[n - j], n - j) for j in range(1, min(orders[n], n + 1))]
    r = positions(here, end, past)
    if len(r) == 1:
      moved = landing.a * estimates[0] + down * estimates[1] + up * Z
    else:
      carry, gain = tables.leap(kind, node, landing, down)
      w = weights(r, density(kind, node, landing, tau))
      moved = carry * X + gain * (w @ [now, B, H0, H1][:len(r)]) + up * Z
    yield node, [moved, now, B, H0, H1]


def lowered(count: int, order: int, start: int, last: int, before: int) -> list[int]:
  """Orders of a multistep solver: a warm-up from `start`, and bounds for the last two steps."""
  bounds = {count - 1: last, count - 2: before}
  return [min(order, n - start + 1, bounds.get(n, order)) for n in range(start, count)]


def density(kind: str, node: Node, landing: Node, tau: float) -> float:
  """The exponent k of the quadrature in lambda."""
  h = landing.log_ratio - node.log_ratio
  return (1 + tau**2) * h if kind == "x0" else -h


def flat_line(r: Sequence[float], k: float) -> np.ndarray:
  """Exact, but for two estimates the line's mean as if its weight over the step were even.

  UniPC's B(h) = h ("bh1"), and SA-Solver of order 2.
  """
  means = tables.moments(len(r), k)
  if len(r) == 2:
    means[1] = 0.5 * k / -math.expm1(-k)
  return tables.weights(r, means)


def middle_line(r: Sequence[float], k: float) -> np.ndarray:
  """Exact, but for two estimates the line's middle: UniPC's B(h) = exp(h) - 1, "bh2"."""
  return tables.adams(r, 0.0 if len(r) == 2 else k)


def singlestep(nodes: Nodes, landings: Nodes, output: Output, *, kind: str, orders: Sequence[int],
               weights: Weights, tau: float = 0.0) -> Iterator[Row]:
  """Runge-Kutta in lambda: rows of order 1, 2, … all start from the latent of the row of order 1.

  Arguments as in `multistep`.
  """
  for n, (node, landing) in enumerate(zip(nodes, landings, strict=True)):
    order = orders[n]
    base = nodes[n - order + 1]
    estimates = output.estimates(node)
    now = estimates[kind == "noise"]
    down, up = tables.stochastic(kind, base, landing, tau)
    if order == 1:
      start, moved = X, landing.a * estimates[0] + down * estimates[1] + up * Z
    else:
      past = [nodes[n - order + 1 + j].log_ratio for j in range(1, order)]
      r = positions(base.log_ratio, landing.log_ratio, past)
      carry, gain = tables.leap(kind, base, landing, down)
      known = [H0, now] if order == 2 else [H1, H0, now]
      start = B
      moved = carry * B + gain * (weights(r, density(kind, base, landing, tau)) @ known) + up * Z
    yield node, [moved, start, now, H0]


def two_stage(nodes: Nodes, landings: Nodes, output: Output, *, kind: str,
              middle: Callable[[Node, Node], Node], weights: Sequence[float],
              split: Split = quiet, is_brownian: bool = False) -> Iterator[Row]:
  """Two network calls per step: Heun, DPM2, DPM++ 2S ancestral, DPM++ SDE.

  The last step, onto the clean latent, needs but one.

  Args:
    nodes, landings, output: as everywhere in this module.
    kind: "x0" or "noise".
    middle: (node, landing) -> where the second call is made.
    weights: of the first and the second estimate.
    split: of the whole step's noise.
    is_brownian: split the way to the middle likewise, and let the whole step's noise be the sum of
      its two parts', as the increments of one Brownian motion in sigma².
  """
  for node, landing in zip(nodes, landings, strict=True):
    denoised, noise = output.estimates(node)
    down, up = split(node, landing)
    if landing.s == 0:
      yield node, [landing.a * denoised]
      continue
    between = middle(node, landing)
    first_down, first_up = split(node, between) if is_brownian else quiet(node, between)
    yield node, [between.a * denoised + first_down * noise + first_up * Z,
                 X, (denoised, noise)[kind == "noise"], Z]
    carry, gain = tables.leap(kind, node, landing, down)
    fresh = Z
    if is_brownian:
      share = (node.sigma - between.sigma) / (node.sigma - landing.sigma)
      fresh = math.sqrt(share) * H1 + math.sqrt(1 - share) * Z
    now = output.estimates(between)[kind == "noise"]
    yield between, [carry * B + gain * (weights[0] * H0 + weights[1] * now) + up * fresh]


def halfway(at: Callable[[float], Node], split: Split, node: Node, landing: Node) -> Node:
  """The node in the middle, in lambda, of a step's noiseless part; `at`: sigma -> its node."""
  return at(math.sqrt(node.sigma * split(node, landing)[0] / landing.a))


def predictor_corrector(
    nodes: Nodes, landings: Nodes, output: Output, *, kind: str, predictors: Sequence[int],
    correctors: Sequence[int], predict: Weights, correct: Weights,
    taus: Sequence[float] | None = None) -> Iterator[Row]:
  """UniPC and SA-Solver: each new estimate first corrects the step that led to it.

  S_1 is what the last step takes from its corrected start and its noise; S_2 … are estimates.

  Args:
    nodes, landings, output, kind: as in `multistep`.
    predictors: estimates that each step uses, 1 to 4.
    correctors: estimates, the new one among them, that correct the latent of each node; 0: none.
    predict, correct: quadratures of both.
    taus: strength of the SDE in each step.
  """
  history = [H0, H1, H2]
  for n, (node, landing) in enumerate(zip(nodes, landings, strict=True)):
    denoised, noise = output.estimates(node)
    now = noise if kind == "noise" else denoised
    start = X
    if correctors[n]:
      tau, before = taus[n - 1] if taus else 0.0, nodes[n - 1]
      past = [nodes[n - j].log_ratio for j in range(2, correctors[n])]
      r = positions(before.log_ratio, node.log_ratio, past)[:correctors[n] - 1]
      known = [*history[:len(r)], now]
      w = correct([*r, 1.0], density(kind, before, node, tau))
      down, _ = tables.stochastic(kind, before, node, tau)
      start = B + tables.leap(kind, before, node, down)[1] * (w @ known)
    tau = taus[n] if taus else 0.0
    past = [nodes[n - j].log_ratio for j in range(1, predictors[n])]
    r = positions(node.log_ratio, landing.log_ratio, past)
    w = [1.0] if len(r) == 1 else predict(r, density(kind, node, landing, tau))
    down, up = tables.stochastic(kind, node, landing, tau)
    carry, gain = tables.leap(kind, node, landing, down)
    kept = carry * start + up * Z
    yield node, [kept + gain * (w @ np.stack([now, *history][:len(r)])), kept, now, H0, H1]


ADAMS_BASHFORTH = {order: tables.adams([-float(j) for j in range(order)]) for order in (1, 2, 3, 4)}


def transfer(output: Output, node: Node, landing: Node, start: np.ndarray, mean: np.ndarray,
             ) -> np.ndarray:
  """PNDM's transfer: DDIM with a mean output, read as the noise at the start of the step."""
  carry, gain = tables.leap("noise", node, landing, landing.s)
  return carry * start + gain * output.noise(node, start, mean)


def linear_multistep(asked: Sequence[int], stride: int, node_at: Callable[[int], Node],
                     output: Output, known: int = 0) -> Iterator[Row]:
  """PLMS: Adams-Bashforth of up to four raw outputs; S_1 … S_3 are the last of them.

  Without `known` outputs the first step is made again with the mean of the outputs at both ends:
  asked[1] then is the landing of asked[0], and repeated.

  Args:
    asked: timesteps, falling.
    stride: of every step, in timesteps.
    node_at: the node of a timestep; of negative ones the final node.
    output: never limited.
    known: how many outputs lie in the state at the start.
  """
  for n, t in enumerate(asked):
    node, landing = node_at(t), node_at(t - stride)
    if not known and n == 1:
      start = node_at(t + stride)
      yield node, [transfer(output, start, node, H0, (F + B) / 2), B]
      continue
    count = min(4, known + n + 1 - (n > 1 and not known))
    mean = ADAMS_BASHFORTH[count] @ [F, B, H0, H1][:count]
    moved = transfer(output, node, landing, X, mean)
    yield node, [moved, F, X] if not known and n == 0 else [moved, F, B, H0]


def runge_kutta(starts: Sequence[int], half: int, node_at: Callable[[int], Node], output: Output,
                ) -> Iterator[Row]:
  """PNDM's first steps: classical Runge-Kutta of fourth order in the transfer, four calls each.

  The outputs at each step's start go to S_2 … S_4, in the end to S_1 … S_3 for
  `linear_multistep`.

  Args:
    starts: timesteps from each of which, but the last, a step leads to the next.
    half: of their stride.
    node_at: the node of a timestep.
    output: never limited.
  """
  nothing, history = np.zeros_like(X), (H0, H1, H2)
  for t, next_t in itertools.pairwise(starts):
    node, between, end = node_at(t), node_at(next_t + half), node_at(next_t)
    yield node, [transfer(output, node, node_at(t - half), X, F), X, F, H0, H1]
    yield between, [transfer(output, node, between, B, F), B, *history]
    # The second output is read back from the latent that it led to: one latent less to carry.
    carry = transfer(output, node, between, X, nothing) @ X
    slope = transfer(output, node, between, nothing, F) @ F
    outputs = H0 / 6 + (X - carry * B) / slope / 3 + F / 3
    yield between, [transfer(output, node, end, B, F),
                    transfer(output, node, end, B, outputs), *history]
    moved = B + transfer(output, node, end, nothing, F / 6)
    yield end, [moved, H0, H1, H2] if next_t == starts[-1] else [moved, nothing, *history]


def pndm(asked: Sequence[int], stride: int, node_at: Callable[[int], Node], output: Output,
         ) -> Iterator[Row]:
  """PNDM: three steps of `runge_kutta`, then `linear_multistep`; at least 4 timesteps."""
  return itertools.chain(
      runge_kutta(asked[:4], stride // 2, node_at, output),
      linear_multistep(asked[3:], stride, node_at, output, known=3))


def flow_heun(nodes: Nodes, landings: Nodes, output: Output) -> Iterator[Row]:
  """Heun along the straight lines of flow matching: the mean of both velocities."""
  for node, landing in zip(nodes, landings, strict=True):
    stride = landing.s - node.s
    if landing.s == 0:
      yield node, [X + stride * F]
      continue
    yield node, [X + stride * F, X, F]
    yield landing, [B + stride * (H0 + F) / 2]
