"""The two losses: an autoencoder's, and latent diffusion's.

Each is a function (params, frozen, batch, key, part) -> (loss [], metrics of scalars), where
`params` and `frozen` together hold all networks of a model; only `params` is differentiated. `part`
tells which rows of the step's batch these are, for their random numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.diffusion import objectives
from sdjax.diffusion.parts import WHOLE
from sdjax.models.dropout import dropout_by_row
from sdjax.stable_diffusion import Condition, StableDiffusion

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]


def to_unit(image: jax.Array) -> jax.Array:  # uint8 [b H W 3] -> float32
  """Returns 0 … 255 as -1 … 1: what a batch holds, as networks want it."""
  return image.astype(jnp.float32) * (2 / 255) - 1


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
    moments = (batch["moments"] if "moments" in batch
               else sd.moments(params, to_unit(batch["image"])))
    x0 = jax.lax.stop_gradient(sd.latents(moments, key_latents, part))
    noisy = objectives.corrupt(objective, key_corrupt, x0, part)
    if "context" in batch:
      condition = Condition(batch["context"], batch.get("pooled"), batch.get("size"))
    else:
      condition = sd.encode_text(params, batch["tokens"], batch.get("size"))
    with dropout_by_row(part.rows(x0.shape[0])):
      prediction = sd.predict(params, noisy.x_t, noisy.t, condition, train=True,
                              rngs={"dropout": key_dropout})
    squared = jnp.mean(
        jnp.square(prediction.astype(jnp.float32) - noisy.target), axis=(1, 2, 3))
    return jnp.mean(batch["weight"] * noisy.weight * squared), {"mse": jnp.mean(squared)}
  return loss_fn
