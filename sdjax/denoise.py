"""Denoising one batch: the program that every way of making pictures runs.

One executable per model and shape serves all samplers, numbers of steps, scales, seeds and texts.
It runs any stretch of a table's rows, so that previews, hand-offs and cancelling lie between two
calls of it. An image's noise depends on its own 64-bit seed alone: neither on the batch that it is
made in, nor on its place there, nor on the number of devices.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import control
from sdjax.diffusion import guidance, sampling, tables
from sdjax.errors import UserError
from sdjax.meshes import replicate, shard_batch
from sdjax.stable_diffusion import Condition, Params, StableDiffusion

INITIAL, STEPS, SECOND, LOW_RESOLUTION = range(4)  # streams of an image's noise
ROWS = 1024  # tables are filled up to a multiple of this: their own length is no shape


def seed_words(seeds: Sequence[int]) -> np.ndarray:
  """Returns both 32-bit words of each seed, uint32 [n 2].

  `jax.random.key` would silently drop the upper word.
  """
  seeds = [operator.index(seed) for seed in seeds]  # numpy's integers overflow
  for seed in seeds:
    if not 0 <= seed < 2**64:
      raise UserError(f"seed is {seed}; it must lie between 0 and 2**64 - 1")
  return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def image_noise(words: jax.Array, stream: jax.Array, index: jax.Array, shape: tuple) -> jax.Array:
  """Returns standard noise [b *shape] of images with the seeds `words`, uint32 [b 2]."""
  def one(word):
    key = jax.random.wrap_key_data(word, impl="threefry2x32")
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), index), shape)
  return jax.vmap(one)(words)


@functools.partial(jax.jit, static_argnames="shape")
def initial_noise(words: jax.Array, stream: jax.Array, shape: tuple) -> jax.Array:
  """Returns `image_noise` of index 0 on every device."""
  return replicate(image_noise(shard_batch(words), stream, 0, shape))


class Known(NamedTuple):
  """What an inpainted picture is outside of its mask.

  Attributes:
    latents: [b h w c], clean.
    noise: [b h w c], standard; what the start was made with.
    mask: [b h w 1], 1 where the picture is made anew.
  """
  latents: jax.Array
  noise: jax.Array
  mask: jax.Array


class Batch(NamedTuple):
  """What a batch is denoised under.

  Attributes:
    words: uint32 [b 2] of the seeds.
    conditions: one per pass, that which has all of them first.
    appended: [b h w c'] per pass, what the UNet reads as further channels; None: nothing.
    known: of inpainting with a UNet that reads latents alone.
    rescale: [b], of `guidance.classifier_free`.
    hints: [b H W c], one per control.
  """
  words: jax.Array
  conditions: tuple[Condition, ...]
  appended: tuple[jax.Array, ...] | None = None
  known: Known | None = None
  rescale: jax.Array | None = None
  hints: tuple[jax.Array, ...] = ()


class Rows(NamedTuple):
  """What changes from row to row of a sampler's table; axes of N rows lead.

  Attributes:
    table: of `tables.Table.rows`.
    levels: [N+1 2], of `levels`.
    scales: [N g-1 b], of guidance.
    weights: [N k], of controls.
  """
  table: dict[str, np.ndarray]
  levels: np.ndarray
  scales: np.ndarray
  weights: np.ndarray


class Progress(NamedTuple):
  """How far a batch is.

  Attributes:
    images: which ones of the request are being made, [b]; copies of the last fill a batch up.
    row, rows: network evaluations done and to do.
    denoised: [b h w c], what the network takes the latents to become.
  """
  images: np.ndarray
  row: int
  rows: int
  denoised: np.ndarray


def levels(table: tables.Table) -> np.ndarray:
  """Returns (a, s) where each row asks and after the last, a·x0 + s·noise: float64 [n+1 2]."""
  return np.append(np.stack([table.a, table.s], axis=1), [[1.0, 0.0]], axis=0)


def run(
    sd: StableDiffusion,
    params: Params,
    rows: Rows,
    end: int,
    x: np.ndarray,              # [b h w c] latents where the first row asks
    batch: Batch,
    controls: Sequence[control.Control] = (),
    every_rows: int | None = None,
    watch: Callable[[int, np.ndarray], None] = lambda row, denoised: None,
) -> jax.Array:                 # [b h w c]
  """Runs the rows 0 … end-1, one after another.

  Rows without guidance, all of whose scales are 1, run without the passes that guide.

  Args:
    sd, params, x, batch, controls: see above.
    rows: of the whole table.
    end: how many rows to run.
    every_rows: `watch` is called each time so many are done, with their number and the estimate
      of the clean latents; None: never. What it raises ends the run.
    watch: see above.
  """
  nets, net_params = control.static(controls), tuple(c.params for c in controls)
  rows = _filled_up(rows)
  state, latents = jax.jit(sampling.start)(x), x
  for begin, stop in _stretches(rows.scales[:end], every_rows or end):
    guided = bool((rows.scales[begin] != 1).any())
    now = batch if guided else batch._replace(
        conditions=batch.conditions[:1], rescale=None,
        appended=batch.appended and batch.appended[:1])
    scaled = rows if guided else rows._replace(scales=rows.scales[:, :0])
    state, latents, denoised = _denoise(
        sd, nets, params, net_params, scaled, begin, stop, state, now)
    if every_rows and (stop == end or not stop % every_rows):
      watch(stop, np.asarray(denoised))
  return latents


def _stretches(scales: np.ndarray, every: int) -> list[tuple[int, int]]:
  """Splits rows where guidance begins or ends, and at every so many."""
  guided = (scales != 1).any(axis=(1, 2))
  cuts = [row for row in range(1, len(scales))
          if guided[row] != guided[row - 1] or not row % every]
  return list(itertools.pairwise([0, *cuts, len(scales)])) if len(scales) else []


def _filled_up(rows: Rows) -> Rows:
  """Fills rows up with copies of the last, never run, and casts them for the device."""
  length = -(-len(rows.levels) // ROWS) * ROWS

  def fill(leaf):
    leaf = leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf
    return leaf[np.minimum(np.arange(length), len(leaf) - 1)]
  return jax.tree.map(fill, rows)


@functools.partial(jax.jit, static_argnames=("sd", "nets"))
def _denoise(sd: StableDiffusion, nets: tuple[control.Net, ...], params: Params,
             net_params: tuple[Any, ...], rows: Rows, first: jax.Array, end: jax.Array,
             state: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the state after the rows first … end-1, its latents, and the last clean estimate."""
  batch = jax.tree.map(shard_batch, batch)
  state = shard_batch(state, axis=1)
  predict = control.steered(
      sd, params, nets, net_params, batch.hints, batch.conditions)
  appended = batch.appended and guidance.interleave(*batch.appended)

  def step(n, carry):
    state, _ = carry
    row, scales, weights, after = (
        jax.tree.map(lambda leaf, n=n + later: leaf[n], part) for part, later in (
            (rows.table, 0), (rows.scales, 0), (rows.weights, 0), (rows.levels, 1)))
    network = guidance.classifier_free(
        lambda x, t: predict(x, t, appended, weights), *scales, rescale=batch.rescale)
    x = state[0]
    f = network(x, jnp.broadcast_to(row["t"], x.shape[:1]))
    state = sampling.step(
        row, lambda *_: f, state,
        lambda index: image_noise(batch.words, STEPS, index, x.shape[1:]))
    if batch.known is not None:
      there = after[0] * batch.known.latents + after[1] * batch.known.noise
      state = state.at[0].set(jnp.where(batch.known.mask > 0, state[0], there))
    return state, row["c_skip"] * x + row["c_out"] * f

  state, denoised = jax.lax.fori_loop(first, end, step, (state, state[0]))
  return state, replicate(state[0]), replicate(denoised)
