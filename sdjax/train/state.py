"""What a run carries from step to step: arrays only."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.train import partitioning

Params = Any


@flax.struct.dataclass
class TrainState:
  """Everything a run needs to go on, and nothing that is not an array."""
  step: jax.Array          # int32 []
  params: Params           # float32; what the optimizer moves
  ema: Params              # float32; what sampling and evaluation use
  opt_state: optax.OptState
  frozen: Params           # networks that do not train, float32
  key: jax.Array           # never split: each step folds its number in


def shapes(params: Params, frozen: Params, tx: optax.GradientTransformation) -> TrainState:
  """Returns a TrainState of `jax.ShapeDtypeStruct`s for parameters that need only shapes."""
  def build(params, frozen):
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema=params, opt_state=tx.init(params),
        frozen=frozen, key=jax.random.key(0, impl="threefry2x32"))
  return jax.eval_shape(build, params, frozen)


def create(
    params: Params,   # host arrays
    frozen: Params,   # host arrays
    tx: optax.GradientTransformation,
    seed: int,
    state_shardings: TrainState,
) -> TrainState:
  """Returns the state at step 0, born sharded."""
  placed = partitioning.place(params, state_shardings.params)
  replicated = state_shardings.step
  key = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
  words = partitioning.place(np.asarray(key), replicated)
  return TrainState(
      step=partitioning.place(np.zeros((), np.int32), replicated),
      params=placed,
      ema=partitioning.place(params, state_shardings.ema),
      opt_state=jax.jit(tx.init, out_shardings=state_shardings.opt_state)(placed),
      frozen=partitioning.place(frozen, state_shardings.frozen),
      key=jax.random.wrap_key_data(words, impl="threefry2x32"))
