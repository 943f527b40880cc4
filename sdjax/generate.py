"""Makes pictures: prompts, seeds and a sampler's table in, images and latents out.

Three executables, each compiled once per shape: text encoding, denoising (`sampling.sample`) and
decoding. An image's noise depends on its own 64-bit seed alone: neither on the batch that it is
made in, nor on its place there, nor on the number of devices.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sdjax.diffusion import guidance, sampling, solvers
from sdjax.errors import UserError
from sdjax.stable_diffusion import Condition, Params, StableDiffusion

BATCH_AXES = ("data", "fsdp")
INITIAL, STEPS = 0, 1  # streams of an image's noise


def seed_words(seeds: Sequence[int]) -> np.ndarray:
  """Returns both 32-bit words of each seed, uint32 [n 2].

  `jax.random.key` would silently drop the upper word.
  """
  for seed in seeds:
    if not 0 <= seed < 2**64:
      raise UserError(f"seed is {seed}; it must lie between 0 and 2**64 - 1")
  return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def image_noise(words: jax.Array, stream: int, index: jax.Array, shape: tuple) -> jax.Array:
  """Returns standard noise [b *shape] of images with the seeds `words`, uint32 [b 2]."""
  def one(word):
    key = jax.random.wrap_key_data(word, impl="threefry2x32")
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), index), shape)
  return jax.vmap(one)(words)


def shard_batch(x: jax.Array) -> jax.Array:
  """Spreads the leading axis over the mesh, where one is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def replicate(x: jax.Array) -> jax.Array:
  """Brings `x` whole to every device, where a mesh is set, so that any process can read it."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P())


@functools.partial(jax.jit, static_argnames=("sd", "skip"))
def _encode_text(sd: StableDiffusion, params: Params, tokens: jax.Array,
                 weights: jax.Array | None, size: jax.Array | None, skip: int) -> Condition:
  return sd.encode_text(params, *jax.tree.map(shard_batch, (tokens, size, weights)), skip)


@functools.partial(jax.jit, static_argnames="shape")
def _initial_noise(words: jax.Array, shape: tuple) -> jax.Array:
  return replicate(image_noise(shard_batch(words), INITIAL, 0, shape))


@functools.partial(jax.jit, static_argnames="sd")
def _denoise(sd: StableDiffusion, params: Params, table: solvers.Table, x: jax.Array,
             words: jax.Array, condition: Condition, negative: Condition | None,
             guidance_scale: jax.Array) -> jax.Array:
  """x: [b h w c] standard noise; negative None: no guidance. Returns final latents."""
  if negative is not None:
    condition = jax.tree.map(guidance.interleave, condition, negative)
  network = functools.partial(_predict, sd, params, condition)
  if negative is not None:
    network = guidance.classifier_free(network, guidance_scale)
  x = shard_batch(x) * table.initial_scale.astype(x.dtype)
  return replicate(sampling.sample(
      table, network, x, lambda index: image_noise(words, STEPS, index, x.shape[1:])))


def _predict(sd, params, condition, x, t):
  return sd.predict(params, x, t, condition)


@functools.partial(jax.jit, static_argnames="sd")
def _decode(sd: StableDiffusion, params: Params, latents: jax.Array) -> jax.Array:
  return replicate(jnp.clip(sd.decode_latents(params, shard_batch(latents)), -1.0, 1.0))


@functools.partial(jax.jit, static_argnames="sd")
def reconstruct(sd: StableDiffusion, params: Params, image: jax.Array) -> jax.Array:
  """Returns images [b H W 3] in [-1, 1] after a pass through the autoencoder, without noise."""
  latents = sd.encode_image(params, shard_batch(image), None)
  return replicate(jnp.clip(sd.decode_latents(params, latents), -1.0, 1.0))


def sampler_table(sd: StableDiffusion, sampler: str | None, steps: int) -> solvers.Table:
  """Returns the table of a named sampler, or of the model's own scheduler_config.json."""
  if sampler is None:
    return solvers.from_config(sd.scheduler_config, steps)
  return solvers.named(sampler, sd.schedule, sd.prediction_type, steps)


def check_request(n: int, guidance_scale: float, seeds: Sequence[int],
                  negative_prompts: Sequence[str]) -> None:
  """Raises UserError unless there is a prompt, and a seed and a negative prompt for each."""
  if n == 0:
    raise UserError("no prompts were given; give at least one")
  if guidance_scale < 0:
    raise UserError(f"guidance_scale is {guidance_scale}; it must not be negative (1 is off)")
  for name, values in (("seeds", seeds), ("negative_prompts", negative_prompts)):
    if len(values) != n:
      raise UserError(f"{len(values)} {name} for {n} prompts; give one each")


def check_model(sd: StableDiffusion, clip_skip: int) -> None:
  """Raises UserError unless the UNet reads latents alone, and the encoders have layers to skip."""
  if sd.unet.in_channels != sd.vae.latent_channels or sd.unet.num_classes is not None:
    raise UserError(f"this model's UNet reads {sd.unet.in_channels} channels, its latents have "
                    f"{sd.vae.latent_channels}: it edits or enlarges pictures, and cannot make "
                    "them from text alone")
  layers = min(text.layers for text in sd.text_encoders) - sd.is_xl
  if not 0 <= clip_skip < layers:
    raise UserError(f"clip_skip is {clip_skip}; this model can skip 0 to {layers - 1} layers")


def check_latents(latents: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
  """Returns noise, if any, as float32, or raises UserError unless it is finite and of `shape`."""
  if latents is None:
    return None
  if latents.shape != shape:
    raise UserError(f"given latents have shape {list(latents.shape)}; these prompts and this "
                    f"size need {list(shape)}, [n h w c]")
  if not np.isfinite(latents).all():
    raise UserError("given latents hold NaN or infinity; they must be standard normal noise")
  return latents.astype(np.float32)


def text_to_image(
    sd: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
    height: int,
    width: int,
    negative_prompts: Sequence[str] | None = None,
    sampler: str | None = None,
    init_latents: np.ndarray | None = None,
    weighted: bool = False,
    clip_skip: int = 0,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes one image per prompt.

  Args:
    sd: the model.
    params: its arrays; sharded ones need their mesh set (`jax.set_mesh`).
    prompts: n texts of any length.
    steps: network evaluations, 1 … 1000.
    guidance_scale: 1 is off and costs no unconditional pass; 7.5 is usual.
    seeds: n integers in [0, 2**64); equal seeds start from equal noise.
    height, width: of the images, px, multiples of `sd.size_multiple`.
    negative_prompts: n texts to steer away from; by default nothing: empty ones, or zeros where
      the model was trained so (SDXL).
    sampler: a key of `solvers.SAMPLERS`; None asks the model's scheduler_config.json.
    init_latents: float32 [n h w c] standard normal noise in place of the seeds' own.
    weighted: prompts have the syntax of `data.prompts`: (word:1.2), [word], BREAK.
    clip_skip: last layers of the text encoders not to read, 0 as trained.
    batch_size: images made at once; rounded up to the number of devices that share a batch.

  Returns:
    images float32 [n H W 3] in [-1, 1], and final latents float32 [n h w c] in the UNet's scale.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  n = len(prompts)
  zeros = negative_prompts is None and sd.zeros_for_empty_prompt
  negative_prompts = negative_prompts or [""] * n
  check_request(n, guidance_scale, seeds, negative_prompts)
  check_model(sd, clip_skip)
  shape = sd.latent_shape(height, width)
  table, words = sampler_table(sd, sampler, steps), seed_words(seeds)
  init_latents = check_latents(init_latents, (n, *shape))
  images, latents = [], []
  for rows in batches(n, batch_size):
    condition, negative = _conditions(
        sd, params, [prompts[row] for row in rows], [negative_prompts[row] for row in rows],
        zeros, height, width, weighted, clip_skip)
    x = _initial_noise(words[rows], shape) if init_latents is None else init_latents[rows]
    image, latent = _make(
        sd, params, table, x, words[rows], condition, negative, np.float32(guidance_scale))
    images.append(np.asarray(image))
    latents.append(np.asarray(latent))
  return np.concatenate(images)[:n], np.concatenate(latents)[:n]


def _make(sd: StableDiffusion, params: Params, table: solvers.Table, x: jax.Array,
          words: np.ndarray, condition: Condition, negative: Condition,
          guidance_scale: np.float32) -> tuple[jax.Array, jax.Array]:
  """Denoises and decodes one batch."""
  if sd.unet.guidance_dim is not None:  # distilled: it reads the scale, in one pass
    condition = condition._replace(guidance=np.full(len(x), guidance_scale))
    negative = None
  latents = _denoise(sd, params, table, x, words, condition,
                     None if guidance_scale == 1 else negative, guidance_scale)
  return _decode(sd, params, latents), latents


def _conditions(sd: StableDiffusion, params: Params, prompts: list[str], negative: list[str],
                zeros: bool, height: int, width: int, weighted: bool, clip_skip: int
                ) -> tuple[Condition, Condition]:
  """Encodes prompts and what to steer away from (zeros, if so), as many chunks of both."""
  n = len(prompts)
  tokens, weights = sd.tokenize_long(prompts + negative, weighted)
  wanted, unwanted = (
      _encode_text(sd, params, tokens[rows], weights[rows] if weighted else None,
                   sd.default_sizes(n, height, width, negative=side == 1), clip_skip)
      for side, rows in enumerate((slice(n), slice(n, None))))
  if zeros:
    unwanted = unwanted._replace(context=unwanted.context * 0, pooled=unwanted.pooled * 0)
  return wanted, unwanted


def batches(n: int, batch_size: int) -> list[np.ndarray]:
  """Splits rows 0 … n-1 into equal batches; the last is filled up with copies of its last row.

  Equal shapes compile once. With a mesh set, batches divide evenly over its batch axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
  size = -(-min(n, batch_size) // shards) * shards
  starts = range(0, n, size)
  return [np.minimum(np.arange(start, start + size), n - 1) for start in starts]
