"""The two losses: an autoencoder's, and latent diffusion's.

Each is a function (params, frozen, batch, key, part) -> (loss [], metrics of scalars), where
`params` and `frozen` together hold all networks of a model; only `params` is differentiated. `part`
tells which rows of the step's batch these are, for their random numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.diffusion import objectives
from sdjax.diffusion.parts import WHOLE
from sdjax.models.dropout import dropout_by_row
from sdjax.stable_diffusion import Condition, Params, StableDiffusion, to_unit

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]


def objective_of(config: Any, sd: StableDiffusion) -> objectives.Objective:
  """Returns what config.objective means for a model."""
  chosen = dict(config.objective) | {"prediction_type": sd.prediction_type}
  return objectives.Objective(sd.schedule, **chosen)


def moments_of(sd: StableDiffusion, params: Params, batch: Batch) -> jax.Array:  # [b h w 2c]
  """Returns the moments of a batch of a latents cache, or of pictures."""
  return batch["moments"] if "moments" in batch else sd.moments(params, to_unit(batch["image"]))


def condition_of(sd: StableDiffusion, params: Params, batch: Batch) -> Condition:
  """Returns the condition that a batch's tokens mean, or the states that a cache has of them."""
  if "context" in batch:
    return Condition(batch["context"], batch.get("pooled"), batch.get("size"))
  return sd.encode_text(params, batch["tokens"], batch.get("size"))


def autoencoder(sd: StableDiffusion, kl_weight: float) -> Loss:
  """Reconstruction (L1 + squared error) + kl_weight · KL(posterior || standard normal).

  Rombach et al. 2022 (https://arxiv.org/abs/2112.10752), section 3.1, without the adversary. The
  KL term is summed over a latent's entries as there, and averaged over images.
  """
  def loss_fn(params, frozen, batch, key, part=WHOLE):
    params = frozen | params
    image = to_unit(batch["image"])
    moments = sd.moments(params, image)
    latents = sd.latents(moments, key, part)
    error = sd.decode_latents(params, latents) - image
    l1, squared = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, -30.0, 20.0)
    kl = 0.5 * jnp.sum(
        jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3)).mean()
    loss = l1 + squared + kl_weight * kl
    return loss, {"l1": l1, "psnr_db": 10 * jnp.log10(4 / squared), "kl": kl}
  return loss_fn


def diffusion(sd: StableDiffusion, objective: objectives.Objective) -> Loss:
  """The weighted denoising loss of `objectives`, under the batch's tokens or states of texts."""
  def loss_fn(params, frozen, batch, key, part=WHOLE):
    key_latents, key_corrupt, key_dropout = jax.random.split(key, 3)
    params = frozen | params
    moments = moments_of(sd, params, batch)
    x0 = jax.lax.stop_gradient(sd.latents(moments, key_latents, part))
    noisy = objectives.corrupt(objective, key_corrupt, x0, part)
    condition = condition_of(sd, params, batch)
    with dropout_by_row(part.rows(x0.shape[0])):
      prediction = sd.predict(params, noisy.x_t, noisy.t, condition, train=True,
                              rngs={"dropout": key_dropout})
    squared = jnp.mean(
        jnp.square(prediction.astype(jnp.float32) - noisy.target), axis=(1, 2, 3))
    return jnp.mean(batch["weight"] * noisy.weight * squared), {"mse": jnp.mean(squared)}
  return loss_fn
