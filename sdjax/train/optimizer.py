"""The optimizer of a config: AdamW behind a warm-up, with decay for kernels alone."""

from typing import Any

import optax

from sdjax import pytrees
from sdjax.errors import UserError

DECAYED = ((r"kernel$", True),)  # norms, biases and embeddings are not pulled to zero


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
  """Returns clip by global norm, then AdamW (Loshchilov & Hutter 2019) with `learning_rate`."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
          learning_rate(config, total_steps), b1=config.b1, b2=config.b2, eps=config.eps,
          weight_decay=config.weight_decay,
          mask=lambda params: pytrees.map_paths(
              lambda path, _: pytrees.first_match(DECAYED, path, False), params)))
