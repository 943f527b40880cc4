"""The validation loss, of a denoiser whose loss is known in closed form."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sd15
from sdjax.data import prefetch
from sdjax.diffusion import objectives, schedules
from sdjax.errors import UserError
from sdjax.train import validation

SCHEDULE = schedules.Schedule()
MOMENTS = np.random.default_rng(0).normal(size=(8, 4, 4, 8)).astype(np.float32)
EPSILON = objectives.Objective(SCHEDULE)
FIRST = jnp.int32(0)


def model(predict):
  """A model whose latents are the means of moments, and whose network is `predict`(x_t, t)."""
  return SimpleNamespace(
      schedule=SCHEDULE, prediction_type="epsilon", is_xl=False,
      latents=lambda moments, key, *part: moments[..., :4] if key is None else 1 / 0,
      encode_text=lambda params, tokens, size: None,
      predict=lambda params, x_t, t, condition: predict(x_t, t),
      tokenize=lambda texts: np.zeros((len(texts), 1, 2), np.int32))


def batch(rows=slice(None)):
  return {"moments": jnp.asarray(MOMENTS[rows]), "tokens": jnp.zeros((8, 1, 2), jnp.int32)[rows]}


def of_time(x_t, t):
  """(x_t - a x0) / s + t: what the noise is, wrong by t."""
  alpha_bar = jnp.asarray(schedules.alphas_bar(SCHEDULE), jnp.float32)[t.astype(int)]
  a, s = (jnp.sqrt(x)[:, None, None, None] for x in (alpha_bar, 1 - alpha_bar))
  return (x_t - a * MOMENTS[:len(x_t), ..., :4]) / s + t[:, None, None, None]


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_every_bin_has_its_own_timesteps(bins):
  """The loss is the mean square of the timesteps, which lie in their bin."""
  edges = validation.bin_edges(1000, bins)
  assert edges[0] == 0 and edges[-1] == 1000 and (np.diff(edges) == 1000 // bins).all()
  rms = np.sqrt(validation.by_bin(model(of_time), EPSILON, edges, {}, batch(), FIRST))
  assert rms.shape == (bins,)
  assert ((edges[:-1] <= rms) & (rms <= edges[1:])).all()
  if bins == 1:    # all over the range: the root of the mean square of 0 … 999 is 577
    assert 400 < rms[0] < 750


def test_noise_is_standard_and_of_one_sample_and_bin():
  """A network that predicts nothing has the loss E[noise²] = 1; one row's is chi-squared."""
  edges = validation.bin_edges(1000, 4)
  one = jax.jit(lambda first: validation.by_bin(
      model(lambda x_t, t: 0 * x_t), EPSILON, edges, {}, batch(slice(1)), first))
  found = np.array([one(first) for first in range(8)])
  assert len(np.unique(found)) == found.size                       # no two share their noise
  assert found.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / (64 * 32)))
  assert (np.abs(found - 1) < 5 * np.sqrt(2 / 64)).all()


def test_it_does_not_matter_which_batch_a_sample_is_in():
  edges = validation.bin_edges(1000, 4)
  sd = model(lambda x_t, t: jnp.tanh(x_t))
  whole = validation.by_bin(sd, EPSILON, edges, {}, batch(), FIRST)
  halves = [validation.by_bin(sd, EPSILON, edges, {}, batch(slice(a, a + 4)), jnp.int32(a))
            for a in (0, 4)]
  np.testing.assert_allclose(np.mean(halves, axis=0), whole, rtol=1e-6)
  shifted = validation.by_bin(sd, EPSILON, edges, {}, batch(), jnp.int32(8))
  assert (np.abs(shifted - whole) > 1e-3).all()


def test_weights_are_those_of_training():
  weighted = objectives.Objective(SCHEDULE, weighting="min_snr", gamma=5.0)
  edges = validation.bin_edges(1000, 1000)           # a bin for each timestep
  sd = model(lambda x_t, t: 0 * x_t)
  found, plain = (validation.by_bin(sd, objective, edges, {}, batch(), FIRST)
                  for objective in (weighted, EPSILON))
  alpha_bar = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)
  snr = alpha_bar / (1 - alpha_bar)
  np.testing.assert_allclose(found / plain, np.minimum(snr, 5) / snr, rtol=1e-4)


@pytest.fixture
def config(latents):
  config = sd15.get_config("tiny")
  with config.unlocked():
    config.validation.urls, config.data.bucket = str(latents), True
    config.data.filters = (("aesthetic", ">", 5.0),)
  return config


def test_samples_are_read_once_in_one_order(config, monkeypatch):
  read = []
  monkeypatch.setattr(validation, "by_bin", lambda sd, objective, edges, params, batch, first: (
      batch["moments"].mean((1, 2, 3)).reshape(2, 4).sum(1) * params["scale"]))
  pipeline = validation.open_pipeline(config, model(None), {})
  mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
  monkeypatch.setattr(prefetch.Prefetch, "__next__", lambda self, draw=prefetch.Prefetch.__next__: (
      read.append(draw(self)) or read[-1]))
  with config.unlocked():
    config.validation.batches, config.validation.bins = 99, 2
  measure = validation.make(config, model(None), pipeline, mesh)
  first, second = measure({"scale": 1.0}), measure({"scale": 2.0})
  assert list(first) == ["validation_loss", "validation_loss_0_499", "validation_loss_500_999"]
  assert second == {name: pytest.approx(2 * value, rel=1e-6) for name, value in first.items()}
  assert first["validation_loss"] == pytest.approx(
      (first["validation_loss_0_499"] + first["validation_loss_500_999"]) / 2)
  seen = np.concatenate([np.asarray(batch["moments"]) for batch in read]).reshape(2, 48, -1)
  np.testing.assert_array_equal(*seen)
  assert len(np.unique(seen[0], axis=0)) == 48                     # all of them, once


def test_an_autoencoder_has_its_own_loss(config, pictures):
  with config.unlocked():
    config.task, config.validation.urls, config.kl_weight = "autoencoder", str(pictures), 0.0
  sd = model(None)
  sd.moments = lambda params, image: jnp.concatenate([image, image], -1)
  sd.latents = lambda moments, key, *part: moments[..., :3] if key is None else 1 / 0
  sd.decode_latents = lambda params, latents: latents + params["wrong"]
  pipeline = validation.open_pipeline(config, sd, {})
  mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
  found = validation.make(config, sd, pipeline, mesh)({"wrong": jnp.float32(0.5)})
  assert found == {"validation_loss": pytest.approx(0.5 + 0.25, rel=1e-6)}


def test_none_is_none_and_nonsense_is_refused(config):
  for name in ("batches", "bins"):
    with config.unlocked():
      config.validation[name] = 0
    with pytest.raises(UserError, match=f"0 {name}"):
      validation.open_pipeline(config, model(None), {})
  with config.unlocked():
    config.validation.urls = ""
  assert validation.open_pipeline(config, model(None), {}) is None
