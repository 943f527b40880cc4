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


@functools.partial(jax.jit, static_argnames="sd")
def _encode_text(sd: StableDiffusion, params: Params, tokens: jax.Array) -> Condition:
  return sd.encode_text(params, shard_batch(tokens))


@functools.partial(jax.jit, static_argnames="shape")
def _initial_noise(words: jax.Array, shape: tuple) -> jax.Array:
  return replicate(image_noise(shard_batch(words), INITIAL, 0, shape))


@functools.partial(jax.jit, static_argnames=("sd", "guided"))
def _denoise(sd: StableDiffusion, params: Params, table: solvers.Table, x: jax.Array,
             words: jax.Array, condition: Condition, negative: Condition,
             guidance_scale: jax.Array, guided: bool) -> jax.Array:
  """x: [b h w c] standard noise; returns final latents."""
  if guided:
    condition = jax.tree.map(guidance.interleave, condition, negative)
  network = functools.partial(_predict, sd, params, condition)
  if guided:
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


def check_latents(latents: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns given noise as float32, or raises UserError unless it is finite and of `shape`."""
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
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes one image per prompt.

  Args:
    sd: the model.
    params: its arrays; sharded ones need their mesh set (`jax.set_mesh`).
    prompts: n texts.
    steps: network evaluations, 1 … 1000.
    guidance_scale: 1 is off and costs no unconditional pass; 7.5 is usual.
    seeds: n integers in [0, 2**64); equal seeds start from equal noise.
    height, width: of the images, px, multiples of `sd.size_multiple`.
    negative_prompts: n texts to steer away from; empty ones by default.
    sampler: a key of `solvers.SAMPLERS`; None asks the model's scheduler_config.json.
    init_latents: float32 [n h w c] standard normal noise in place of the seeds' own.
    batch_size: images made at once; rounded up to the number of devices that share a batch.

  Returns:
    images float32 [n H W 3] in [-1, 1], and final latents float32 [n h w c] in the UNet's scale.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  n = len(prompts)
  negative_prompts = negative_prompts or [""] * n
  check_request(n, guidance_scale, seeds, negative_prompts)
  shape = sd.latent_shape(height, width)
  table, words = sampler_table(sd, sampler, steps), seed_words(seeds)
  if init_latents is not None:
    init_latents = check_latents(init_latents, (n, *shape))
  images, latents = [], []
  for rows in batches(n, batch_size):
    tokens = sd.tokenize([prompts[row] for row in rows])
    negative = sd.tokenize([negative_prompts[row] for row in rows])
    x = _initial_noise(words[rows], shape) if init_latents is None else init_latents[rows]
    image, latent = _make(sd, params, table, x, words[rows], tokens, negative, guidance_scale)
    images.append(np.asarray(image))
    latents.append(np.asarray(latent))
  return np.concatenate(images)[:n], np.concatenate(latents)[:n]


def _make(sd: StableDiffusion, params: Params, table: solvers.Table, x: jax.Array,
          words: np.ndarray, tokens: np.ndarray, negative_tokens: np.ndarray,
          guidance_scale: float) -> tuple[jax.Array, jax.Array]:
  """Runs the three executables on one batch."""
  guided = guidance_scale != 1
  condition = _encode_text(sd, params, tokens)
  negative = _encode_text(sd, params, negative_tokens) if guided else condition
  latents = _denoise(sd, params, table, x, words, condition, negative,
                     np.float32(guidance_scale), guided)
  return _decode(sd, params, latents), latents


def batches(n: int, batch_size: int) -> list[np.ndarray]:
  """Splits rows 0 … n-1 into equal batches; the last is filled up with copies of its last row.

  Equal shapes compile once. With a mesh set, batches divide evenly over its batch axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
  size = -(-min(n, batch_size) // shards) * shards
  starts = range(0, n, size)
  return [np.minimum(np.arange(start, start + size), n - 1) for start in starts]
