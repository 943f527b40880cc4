"""One training step: a batch in, a new TrainState and a few scalars out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sdjax import meshes
from sdjax.diffusion.parts import Part
from sdjax.errors import UserError
from sdjax.train import partitioning
from sdjax.train.losses import Batch, Loss, Metrics
from sdjax.train.state import Params, TrainState


def jitted(
    config: Any,
    mesh: jax.sharding.Mesh,
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    state_shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `train_step` as a run compiles it: on its mesh, in the memory of the state before.

  Args:
    config: as `configs.common.defaults` has it.
    mesh, state_shardings: of `partitioning`.
    loss_fn, tx: as in `train_step`.
  """
  partitioning.warn_of_windows(mesh, config.partition)
  spread = functools.partial(
      partitioning.working_copy, mesh=mesh, rules=config.partition, dtype=config.dtype)
  step = functools.partial(
      train_step, loss_fn=loss_fn, tx=tx, ema_decay=config.ema_decay,
      accumulate=config.accumulate, spread=spread, grad_shardings=state_shardings.ema)
  return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
    spread: Callable[[dict[str, Params]], dict[str, Params]] = lambda params: params,
    grad_shardings: Any = None,
) -> tuple[TrainState, Metrics]:
  """Advances `state` by one update on `batch`.

  Pure; the mean over the global batch is what makes XLA sum the gradients. Where loss or gradient
  are not finite, nothing but `step` changes.

  Args:
    state: at step n.
    batch: as `data.pipeline` makes it, global.
    loss_fn: of `losses`.
    tx: the optimizer.
    ema_decay: of the average, per step, in [0, 1), after warm-up.
    accumulate: parts that the batch is cut into, one after another in memory; see `gradients`.
    spread: {"params", "frozen"} as kept -> as computed with: `partitioning.working_copy`.
    grad_shardings: where gradients go: to average and moments, which lie alike; None: anywhere.

  Returns:
    The state at step n + 1 and float32 scalars: "loss", "grad_norm", "param_norm", "update_norm",
    "skipped_steps" (0 or 1), and those of the loss.
  """
  key = jax.random.fold_in(state.key, state.step)
  networks = spread({"params": state.params, "frozen": state.frozen})

  def finish(grads):
    # In this order the sums over devices are of the dtype computed in, and end where they belong.
    if grad_shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, grad_shardings)
    return jax.tree.map(lambda grad, kept: grad.astype(kept.dtype), grads, state.params)

  grads, metrics = gradients(
      loss_fn, networks["params"], networks["frozen"], batch, key, accumulate, finish)
  moved, updates = update(state, grads, tx, ema_decay)
  grad_norm = optax.tree.norm(grads)
  # The same on all devices and processes: both numbers are sums over all of them.
  is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
  kept = jax.tree.map(functools.partial(jnp.where, is_finite), moved, state)
  return kept.replace(step=state.step + 1), metrics | {
      "grad_norm": grad_norm,
      "param_norm": optax.tree.norm(kept.params),
      "update_norm": jnp.where(is_finite, optax.tree.norm(updates), 0.0),
      "skipped_steps": 1.0 - is_finite,
  }


def update(
    state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, Params]:
  """Returns the state after one update by `grads`, and what it added to the parameters."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # (1 + n) / (10 + n) lets the average leave its random start within the first steps.
  decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
  ema = optax.incremental_update(params, state.ema, 1 - decay)
  return state.replace(params=params, ema=ema, opt_state=opt_state), updates


def gradients(
    loss_fn: Loss,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
    finish: Callable[[Params], Params],
) -> tuple[Params, Metrics]:
  """Returns the mean gradients and metrics, "loss" among them, of a batch cut into parts.

  Only one part's activations are in memory at a time. Random numbers do not depend on the number
  of parts (`Part`), so that the result does not either, but for rounding.

  Args:
    loss_fn, params, frozen, batch, key: as in `losses`.
    accumulate: parts.
    finish: what is done to the gradients of each part before they are added.

  Raises:
    UserError: the batch cannot be cut so.
  """
  def one(rows, *part):
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, frozen, rows, key, *part)
    return finish(grads), metrics | {"loss": loss}

  def add(total, part):
    number, rows = part
    grads, metrics = one(jax.tree.map(meshes.shard_batch, rows), Part(number, accumulate))
    return jax.tree.map(jnp.add, total, grads), metrics

  if accumulate == 1:
    return one(jax.tree.map(meshes.shard_batch, batch))
  zeros = finish(jax.tree.map(jnp.zeros_like, params))
  total, metrics = jax.lax.scan(add, zeros, (jnp.arange(accumulate), cut(batch, accumulate)))
  return jax.tree.map(lambda x: x / accumulate, total), jax.tree.map(jnp.mean, metrics)


def cut(batch: Batch, parts: int) -> Batch:  # [B …] -> [parts B/parts …]
  """Cuts a batch into parts, every `parts`-th row to each: so each device has rows of all.

  Raises:
    UserError: a part does not spread evenly over the devices.
  """
  size = len(jax.tree.leaves(batch)[0])
  shards = meshes.batch_shards()
  if parts < 1 or size % (parts * shards):
    raise UserError(f"accumulate {parts} does not cut a batch of {size} rows evenly over {shards} "
                    f"devices; make data.batch_size a multiple of {max(parts, 1) * shards}")

  def cut_rows(x):
    x = x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return meshes.shard_batch(x, axis=1)
  return jax.tree.map(cut_rows, batch)
