"""Which networks a config means: those of a folder, or new ones of a preset."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from sdjax import generate
from sdjax.checkpoints import sources
from sdjax.data import peek, tokenizer
from sdjax.data.sources import Source
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.models import presets
from sdjax.stable_diffusion import Params, StableDiffusion, normalize_latents

CAPTIONS_READ = 20_000      # samples whose captions teach a tokenizer
STANDARDIZED_ON = 512       # images that a new latent space is measured on


def build(config: Any, source: Source) -> tuple[StableDiffusion, Params]:
  """Returns the model of a config and its float32 parameters on the host.

  Args:
    config: as `configs.common.defaults` has it.
    source: of the training data; its captions teach a tokenizer where no folder brings one.

  Raises:
    UserError: a folder whose noise schedule or prediction type is not the config's, a network in
      `trainable` that the model does not have.
  """
  wanted = schedules.Schedule(**config.schedule)
  prediction_type = config.objective.prediction_type
  if config.init_from:
    sd, params = sources.load(config.init_from)
    for name, here, there in (("schedule", wanted, sd.schedule),
                              ("objective.prediction_type", prediction_type, sd.prediction_type)):
      if here != there:
        raise UserError(f"{config.init_from} was trained with {there}, the config says {here}; "
                        f"set config.{name} to match")
  else:
    captions = itertools.chain.from_iterable(peek.first_captions(
        source, CAPTIONS_READ, config.data.caption_column))
    words = tokenizer.train(captions, config.tokenizer.length, config.tokenizer.vocab_size)
    sd = new(config.model, words, wanted, prediction_type)
    params = None
  if sd.size_numbers not in (0, 6) or sd.unet.in_channels != sd.vae.latent_channels:
    raise UserError(f"config.model {config.init_from or config.model} reads more than latents, "
                    "texts and sizes, and its training is not there yet; train a model like sd15, "
                    "sd21 or sdxl")
  sd.latent_shape(config.data.resolution, config.data.resolution)  # refuses what it cannot halve
  params = params or sd.init(config.seed)
  unet = sd.unet.clone(sample_size=config.data.resolution // sd.vae.downsampling)
  sd = dataclasses.replace(sd, unet=unet)
  if unknown := set(config.trainable) - set(params):
    raise UserError(f"config.trainable names {sorted(unknown)}; this model has {sorted(params)}")
  return sd.astype(config.dtype, remat=config.remat), params


def new(preset: str, words: tokenizer.Tokenizer, schedule: schedules.Schedule,
        prediction_type: str) -> StableDiffusion:
  """Returns an untrained model of a preset, its text encoder fitted to a tokenizer."""
  modules = presets.preset(preset)
  text_encoder = modules["text_encoders"][0].clone(
      vocab_size=words.vocab_size, max_length=words.length, eos_id=words.eos_id)
  return StableDiffusion(
      unet=modules["unet"], vae=modules["vae"], text_encoders=(text_encoder,),
      tokenizers=(words,), schedule=schedule, prediction_type=prediction_type,
      scheduler_config=schedules.to_config(schedule, prediction_type))


def split(params: Params, trainable: tuple[str, ...]) -> tuple[Params, Params]:
  """Returns the networks that move, and those that do not."""
  return ({name: params[name] for name in trainable},
          {name: params[name] for name in params if name not in trainable})


def to_host(params: Params) -> Params:
  """Gathers parameters from all devices of all processes: float32 numpy, leaf by leaf."""
  mesh = jax.sharding.get_abstract_mesh()
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  gather = jax.jit(lambda leaf: leaf, out_shardings=whole)
  return jax.tree.map(lambda leaf: jax.device_get(gather(leaf)), params)


def standardize(sd: StableDiffusion, params: Params, source: Source,
                side_px: int) -> tuple[StableDiffusion, Params]:
  """Scales and shifts a trained autoencoder's latents to mean 0, variance 1 per channel.

  Measured on the first images of the data set, posterior noise included: what Rombach et al.
  2022 (appendix G) do with one factor for all channels.
  """
  images = peek.first_images(source, STANDARDIZED_ON, side_px)
  measure = jax.jit(sd.moments)
  moments = np.concatenate([
      measure(params, images[rows]) for rows in generate.batches(len(images), 32)])
  mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
  total = mean.var(axis=(0, 1, 2)) + np.exp(log_variance).mean(axis=(0, 1, 2))
  return normalize_latents(sd, params, mean.mean(axis=(0, 1, 2)), np.sqrt(total))
