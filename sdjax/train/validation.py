"""The validation loss: of samples, noise and timesteps that stay the same from run to run.

Timesteps 0 … T - 1 are cut into bins of equal width. Sample i of the validation data meets every
bin, at a timestep and with noise that are functions of i and the bin alone:

  loss(bin) = mean over i of  weight(t) · mean((F(x_t, t) - target)²),   t and noise by (i, bin) (1)

The weights are those of training, whose loss is the mean over the bins if it draws timesteps alike.
Latents are the posterior's mean, captions whole. So the number differs between two steps because
the parameters do, and is the same on any mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax import meshes
from sdjax.data.pipeline import Pipeline
from sdjax.data.prefetch import Prefetch
from sdjax.diffusion import objectives, prediction, schedules
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion
from sdjax.train import batches, losses
from sdjax.train.losses import Batch

SEED = 0  # of the order of the samples and of the noise, whatever the seed of the run is


def open_pipeline(config: Any, sd: StableDiffusion, params: Params) -> Pipeline | None:
  """Opens config.validation.urls; None where there are none.

  Args:
    config, sd, params: of the run; parameters on the host.

  Raises:
    UserError: as for training data; numbers out of range.
  """
  chosen = config.validation
  if not chosen.urls:
    return None
  if chosen.batches < 1 or not 1 <= chosen.bins <= sd.schedule.num_steps:
    raise UserError(f"config.validation has {chosen.batches} batches and {chosen.bins} bins; give "
                    f"at least 1 of each, and at most {sd.schedule.num_steps} bins")
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.seed = SEED
    config.data.update(dict(
        urls=chosen.urls, mix=(), filters=(), stages=(), bucket=False, random_crop=False,
        random_flip=False, caption_dropout=0.0, shuffle_tags=False))
  return batches.make(config, sd, params, *batches.open_sources(config))


@dataclasses.dataclass(frozen=True)
class Validation:
  """Measures parameters.

  Attributes:
    pipeline: of `open_pipeline`.
    mesh: that the parameters are on.
    loss: (params, batch, number of the first sample) -> [bins], jitted.
    names: of the bins.
    batches: how many there are.
  """
  pipeline: Pipeline
  mesh: Mesh
  loss: Callable[[Params, Batch, int], jax.Array]
  names: list[str]
  batches: int

  def __call__(self, params: Params) -> dict[str, float]:
    """Returns "validation_loss", the mean over the bins, and each bin's "validation_loss_0_249"."""
    size, found = self.pipeline.batch_size, []
    with Prefetch(self.pipeline, self.mesh) as data:
      for number in range(self.batches):
        # One at a time: on CPUs, collectives of many programs at once block each other for ever.
        found.append(jax.block_until_ready(self.loss(params, next(data), number * size)))
    each = np.mean(jax.device_get(found), axis=0, dtype=np.float64)
    return {"validation_loss": float(each.mean())} | dict(zip(self.names, each.tolist()))


def make(config: Any, sd: StableDiffusion, pipeline: Pipeline, mesh: Mesh) -> Validation:
  """Returns what measures the model of a run."""
  if config.task == "autoencoder":
    reconstruct, names = losses.autoencoder(sd, config.kl_weight), []
    loss = lambda params, batch, first: reconstruct(params, {}, batch, None)[0][None]
  else:
    edges = bin_edges(sd.schedule.num_steps, config.validation.bins)
    names = [f"validation_loss_{a}_{b - 1}" for a, b in zip(edges[:-1], edges[1:])]
    objective = losses.objective_of(config, sd)
    loss = lambda params, batch, first: by_bin(sd, objective, edges, params, batch, first)
  # Each sample once; a batch that is larger than the data has some twice.
  whole = max(pipeline.count // pipeline.batch_size, 1)
  everywhere = NamedSharding(mesh, PartitionSpec())
  return Validation(pipeline, mesh, jax.jit(loss, out_shardings=everywhere), names,
                    min(config.validation.batches, whole))


def bin_edges(steps: int, bins: int) -> np.ndarray:  # int [bins + 1]
  """Returns where bins of timesteps begin, and the end of the last one."""
  return np.linspace(0, steps, bins + 1).round().astype(int)


def by_bin(
    sd: StableDiffusion,
    objective: objectives.Objective,
    edges: np.ndarray,     # int [bins + 1]
    params: Params,
    batch: Batch,          # of b samples
    first: jax.Array,      # int32 []
) -> jax.Array:            # [bins]
  """Returns the loss (1) of samples `first` … `first` + b - 1."""
  x0 = sd.latents(losses.moments_of(sd, params, batch), None)
  condition = losses.condition_of(sd, params, batch)
  alpha_bar = schedules.alphas_bar(objective.schedule)
  scales, deviations, weights = (jnp.asarray(table, jnp.float32) for table in (
      np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), objectives.weights(objective)))
  root = jax.random.key(SEED, impl="threefry2x32")

  def draw(sample, place):  # (i, bin) -> t, noise
    key_t, key_noise = jax.random.split(jax.random.fold_in(jax.random.fold_in(root, sample), place))
    t = jax.random.randint(key_t, (), *jnp.asarray(edges)[place + jnp.arange(2)])
    return t, jax.random.normal(key_noise, x0.shape[1:])

  def one(place):
    t, noise = jax.vmap(draw, (0, None))(first + jnp.arange(len(x0)), place)
    noise = meshes.shard_batch(noise)
    a, s = (table[t][:, None, None, None] for table in (scales, deviations))
    target = prediction.target(objective.prediction_type, x0, noise, a, s)
    found = sd.predict(params, a * x0 + s * noise, t.astype(jnp.float32), condition)
    squared = jnp.square(found.astype(jnp.float32) - target).mean(axis=(1, 2, 3))
    return jnp.mean(weights[t] * squared)
  return jax.lax.map(one, jnp.arange(len(edges) - 1))
