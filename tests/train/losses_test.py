from types import SimpleNamespace

import jax
import numpy as np

from sdjax.diffusion import objectives, schedules
from sdjax.train import losses


def test_diffusion_loss_of_a_silent_network_is_the_targets_second_moment(tiny_model):
  sd, params = tiny_model
  # conv_out is the last layer: zeros there make the prediction zero.
  params = params | {"unet": params["unet"] | {
      "conv_out": jax.tree.map(np.zeros_like, params["unet"]["conv_out"])}}
  rng = np.random.default_rng(0)
  batch = {"moments": rng.normal(size=(4, 8, 8, 8)).astype(np.float32),
           "tokens": sd.tokenize([""] * 4), "weight": np.array([1, 1, 0, 2], np.float32)}
  objective = objectives.Objective(sd.schedule, "epsilon", "min_snr")
  key = jax.random.key(7)
  loss, _ = jax.jit(losses.diffusion(sd, objective))(params, {}, batch, key)

  key_latents, key_corrupt, _ = jax.random.split(key, 3)
  noisy = objectives.corrupt(objective, key_corrupt, sd.latents(batch["moments"], key_latents))
  squared = np.square(noisy.target).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(loss, (batch["weight"] * noisy.weight * squared).mean(), rtol=1e-5)


def test_kl_is_that_of_the_gaussians(tiny_model):
  sd, params = tiny_model
  image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  _, metrics = jax.jit(losses.autoencoder(sd, 1.0))(params, {}, {"image": image}, jax.random.key(0))
  unit = (image / 127.5 - 1).astype(np.float32)
  mean, log_variance = np.split(np.asarray(sd.moments(params, unit), np.float64), 2, axis=-1)
  # E_q[log q - log p] with q = N(mean, exp(log_variance)), written from the densities.
  entropy = 0.5 * (1 + np.log(2 * np.pi) + log_variance)
  cross = 0.5 * (np.log(2 * np.pi) + np.square(mean) + np.exp(log_variance))
  np.testing.assert_allclose(metrics["kl"], (cross - entropy).sum() / 2, rtol=1e-5)


def test_states_of_texts_in_a_batch_are_the_condition():
  batch = {"moments": np.zeros((2, 4, 4, 8), np.float32), "context": np.ones((2, 3, 5)),
           "pooled": np.ones((2, 4)), "size": np.ones((2, 6)), "weight": np.ones(2, np.float32)}
  told = []

  def predict(params, x_t, t, condition, **_):
    told.append(condition)
    return x_t

  sd = SimpleNamespace(latents=lambda moments, *_: moments[..., :4], predict=predict)
  objective = objectives.Objective(schedules.Schedule(), "epsilon", "min_snr")
  losses.diffusion(sd, objective)({}, {}, batch, jax.random.key(0))
  (condition,) = told
  for name in ("context", "pooled", "size"):
    assert getattr(condition, name) is batch[name]
