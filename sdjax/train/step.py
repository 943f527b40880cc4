"""One training step: a batch in, a new TrainState and a few scalars out."""

import jax
import jax.numpy as jnp
import optax

from sdjax.train.losses import Batch, Loss, Metrics
from sdjax.train.state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
  """Advances `state` by one update on `batch`.

  Pure: the loop binds the keyword arguments, jits, and donates `state`. Nothing in here knows of
  devices; the mean over the global batch is what makes XLA sum the gradients.

  Args:
    state: at step n.
    batch: as `data.pipeline` makes it, global.
    loss_fn: of `losses`.
    tx: the optimizer.
    ema_decay: of the average, per step, in [0, 1), after warm-up.

  Returns:
    The state at step n + 1 and float32 scalars: "loss", "grad_norm", "update_norm", and those of
    the loss.
  """
  key = jax.random.fold_in(state.key, state.step)
  (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, state.frozen, batch, key)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # (1 + n) / (10 + n) lets the average leave its random start within the first steps.
  decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
  metrics |= {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "update_norm": optax.tree.norm(updates),
  }
  return state.replace(
      step=state.step + 1,
      params=params,
      ema=optax.incremental_update(params, state.ema, 1 - decay),
      opt_state=opt_state), metrics
