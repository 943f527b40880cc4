"""The optimizer of a config: AdamW or Muon behind a warm-up, with decay for kernels alone."""

from typing import Any

import optax
import optax.contrib

from sdjax import pytrees
from sdjax.errors import UserError


def learning_rate(config: Any, total_steps: int) -> optax.Schedule:
  """Returns step -> learning rate.

  Args:
    config: `learning_rate` (peak), `warmup_steps`, `decay` ("constant", "cosine", "linear") and
      `decay_from`: the fraction of the run, in [0, 1], after which a linear decay to 0 begins.
    total_steps: of the run.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(total_steps - warmup, 1)
  match config.decay:
    case "constant":
      after = optax.constant_schedule(peak)
    case "cosine":
      after = optax.cosine_decay_schedule(peak, rest)
    case "linear":
      flat = min(int(config.decay_from * total_steps), total_steps - 1)
      after = optax.linear_schedule(peak, 0.0, total_steps - flat, max(flat - warmup, 0))
    case other:
      raise UserError(
          f"learning-rate decay {other!r} is not known; choose constant, cosine or linear")
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make(config: Any, total_steps: int) -> optax.GradientTransformation:
  """Returns clip by global norm, then the optimizer of `config.name` with `learning_rate`.

  "adamw" is Loshchilov & Hutter 2019. "muon" orthogonalises the momentum of each kernel (Jordan et
  al. 2024, https://kellerjordan.github.io/posts/muon) and scales it to the size of AdamW's updates
  (Liu et al. 2025, https://arxiv.org/abs/2502.16982, equation 4), so that it takes AdamW's
  learning rates; all that is no kernel moves by AdamW with Nesterov's momentum.
  """
  rate = learning_rate(config, total_steps)
  match config.name:
    case "adamw":
      update = optax.adamw(
          rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
          mask=_kernels)
    case "muon":
      update = optax.contrib.muon(
          rate, beta=config.b1, adam_b1=config.b1, adam_b2=config.b2, eps=config.eps,
          weight_decay=config.weight_decay, muon_weight_dimension_numbers=_matrices,
          consistent_rms=0.2)
    case other:
      raise UserError(f"optimizer {other!r} is not known; choose adamw or muon")
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _kernels(params: Any) -> Any:
  """What is pulled to zero: norms, biases and embeddings are not."""
  return pytrees.map_paths(lambda path, _: path.endswith("kernel"), params)


def _matrices(params: Any) -> Any:
  """Kernels as matrices from all that goes in to the channels that come out, for Muon."""
  def axes(path, leaf):
    if not path.endswith("kernel"):
      return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
  return pytrees.map_paths(axes, params)
