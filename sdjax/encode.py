"""Makes latents caches: shards of pictures in, shards of VAE moments and states of texts out.

An autoencoder that does not train need not see the same picture in every epoch. A cached sample
keeps its caption and json and has in place of the picture

  moments.npy    float16 [h w 2c], mean and log variance before scaling, so that training still
                 draws its latents from the posterior;
  context.npy    on request, float16 [l d]: the first caption as the UNet reads it,
  pooled.npy     and, of SDXL, float16 [d].

`latent_shards.py` says how they lie in the folder. Each process makes whole shards on its own
devices and waits for no other.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax import generate, meshes, pytrees
from sdjax.data import buckets, captions, images, index, latent_shards, pack, pipeline, sources
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion, to_unit

AHEAD = 2            # batches decoded before they are encoded
READERS = 32         # threads, where pictures come from the network
PROBE = "a photograph of an astronaut riding a horse, 4k"  # its tokens tell tokenizers apart


@dataclasses.dataclass(frozen=True)
class Options:
  """How pictures become latents.

  Attributes:
    resolution: px, the side of the squares that the middles of pictures are resized to.
    bucket: whether they keep about their shape instead, see `buckets.shapes`.
    text: whether captions are encoded, too.
    shard_size: samples per shard, 1 … 10,000.
    batch_size: pictures encoded at once; rounded up to the number of devices.
  """
  resolution: int
  bucket: bool = False
  text: bool = False
  shard_size: int = 1000
  batch_size: int = 32


def run(sd: StableDiffusion, params: Params, urls: str | Sequence[str], out: str | Path,
        options: Options, *, rules: Sequence[Sequence] = (),
        progress: Callable[[Iterator, int], Iterable] = lambda items, count: items,
        ) -> latent_shards.Result:
  """Makes what is missing of a cache. With a mesh set, batches are split over its devices.

  Args:
    sd, params: the model; parameters on the host.
    urls: of the pictures, as `sources.open_source` takes them.
    out: a new folder, or that of this cache, begun before.
    options: see there.
    rules: what samples must fulfil, as `sources.open_source` takes them.
    progress: wraps the iterator of samples, of which it is told the number, as tqdm does.

  Raises:
    UserError: a side that the model cannot take, no pictures, or a folder of something else.
    OSError: pictures cannot be read, or the disk is full.
  """
  wanted = pipeline.facts_wanted(pipeline.Options(resolutions=(), size_condition=True))
  source = sources.open_source(urls, rules=rules, facts=wanted, parts=captions.PARTS)
  if source.kind != "image":
    raise UserError(f"{urls} holds latents; give the pictures that they were made of")
  side = options.resolution
  sizes = buckets.shapes(side) if options.bucket else [(side, side)]
  for size in sizes:
    sd.latent_shape(*size)
  if options.batch_size < 1:
    raise UserError(f"batch_size is {options.batch_size}; give at least 1")
  encoder = _Encoder(sd, params, source, options)
  shards = latent_shards.plan(source, sizes, options.shard_size)
  cache = latent_shards.Writer(out, describe(sd, params, source, options), shards)
  cache.begin(encoder.empty_text)
  missing = {shard.number for shard in cache.missing()}
  own = [shard for shard in shards[jax.process_index()::jax.process_count()]
         if shard.number in missing]
  made = progress(encoder.samples(own), sum(len(shard.samples) for shard in own))
  for number, pairs in itertools.groupby(made, key=operator.itemgetter(0)):
    cache.write(shards[number], (sample for _, sample in pairs))
  return cache.finish()


def describe(sd: StableDiffusion, params: Params, source: sources.Source,
             options: Options) -> dict[str, Any]:
  """What a cache remembers of how it was made; what a run's must agree with: `check_caches`."""
  return {
      "source": source.digest, "samples": source.count, "shard_size": options.shard_size,
      "resolution": options.resolution, "bucket": options.bucket, "crop": "middle",
      "decoder": images.decoder_name("auto"), "scaled": False,
      "autoencoder": autoencoder_fingerprint(params),
      "text": text_fingerprints(sd, params) if options.text else {},
      "states": list(latent_shards.STATES[:1 + sd.is_xl]) if options.text else []}


def autoencoder_fingerprint(params: Params) -> str:
  """Tells by what moments are made: an autoencoder's decoder has no part in them."""
  return pytrees.fingerprint({name: params["vae"][name] for name in ("encoder", "quant_conv")
                              if name in params["vae"]})


def text_fingerprints(sd: StableDiffusion, params: Params) -> dict[str, str]:
  """Tells by what texts are encoded: text encoder → fingerprint of it and its tokenizer."""
  return {name: pytrees.fingerprint(params[name], words([PROBE]).tolist())
          for name, words in zip(sd.text_names, sd.tokenizers, strict=True)}


def check_caches(caches: Mapping[str, Mapping | None], sd: StableDiffusion, params: Params,
                 resolution: int, with_text: bool) -> None:
  """Refuses caches that a run's own networks would not have made.

  Args:
    caches: of `latent_shards.caches_of`; those that tell nothing are taken on trust.
    sd, params: the run's model; parameters on the host.
    resolution: the run's, px.
    with_text: whether the run takes the states of texts from the caches.

  Raises:
    UserError: a cache is not complete, or was made otherwise; names the field.
  """
  told = {folder: known for folder, known in caches.items() if known}
  if not told:
    return
  wanted = {"resolution": resolution, "autoencoder": autoencoder_fingerprint(params)}
  if with_text:
    wanted["text"] = text_fingerprints(sd, params)
  for folder, known in told.items():
    if not known["complete"]:
      raise UserError(f"the latents cache {folder} is not complete; give the command that began "
                      "it, `sdjax shards encode …`, again")
    for name, value in wanted.items():
      if known[name] != value:
        raise UserError(f"{name} of the latents cache {folder} is {known[name]}, the run's is "
                        f"{value}; train with what made the cache, or encode the pictures anew")


@functools.partial(jax.jit, static_argnames="sd")
def _moments(sd: StableDiffusion, params: Params, image: jax.Array) -> jax.Array:
  image = to_unit(meshes.shard_batch(image))
  return meshes.replicate(sd.moments(params, image).astype("float16"))


@functools.partial(jax.jit, static_argnames="sd")
def _states(sd: StableDiffusion, params: Params, tokens: jax.Array) -> list[jax.Array]:
  condition = sd.encode_text(params, meshes.shard_batch(tokens))
  return [meshes.replicate(state.astype("float16")) for state in condition[:1 + sd.is_xl]]


@jax.jit
def _to_devices(params: Params) -> Params:
  return jax.tree.map(meshes.replicate, params)


class _Read(NamedTuple):
  """A sample before it is encoded: what it keeps, part → bytes, and what is encoded of it."""
  kept: dict[str, bytes]
  pixels: np.ndarray         # uint8 [H W 3]
  caption: str


class _Encoder:
  """Reads samples in threads and encodes them in batches of one size."""

  def __init__(self, sd: StableDiffusion, params: Params, source: sources.Source,
               options: Options):
    self._sd, self._source, self._text = sd, source, options.text
    names = ("vae", *(sd.text_names if options.text else ()))
    self._params = _to_devices({name: params[name] for name in names})
    self._decoder = images.decoder_name("auto")
    self._batch_size = len(generate.batches(options.batch_size, options.batch_size)[0])

  def empty_text(self) -> dict[str, np.ndarray]:
    """Part → the states of the empty text; none where texts are not encoded."""
    return {part: np.asarray(states[0]) for part, states in self._begin_texts([]).items()}

  def samples(self, shards: Sequence[latent_shards.Shard],
              ) -> Iterator[tuple[int, dict[str, bytes] | pack.Failure]]:
    """Yields (number of its shard, a sample) in order, a batch behind what devices are at."""
    threads = READERS if self._source.is_remote else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      before = None
      for shard, reads in self._batches(pool, shards):
        begun = shard.number, reads, self._begin(shard.size, reads)
        if before is not None:
          yield from _finished(*before)
        before = begun
      if before is not None:
        yield from _finished(*before)

  def _batches(self, pool, shards):
    """Yields (shard, what is read of some of its samples), and has threads read ahead."""
    ahead = collections.deque()
    for shard in shards:
      for start in range(0, len(shard.samples), self._batch_size):
        reads = [pool.submit(self._read, int(sample), shard.size)
                 for sample in shard.samples[start:start + self._batch_size]]
        ahead.append((shard, reads))
        if len(ahead) > AHEAD:
          shard_before, reads = ahead.popleft()
          yield shard_before, [read.result() for read in reads]
    for shard, reads in ahead:
      yield shard, [read.result() for read in reads]

  def _read(self, sample: int, size: latent_shards.Shape) -> _Read | pack.Failure:
    try:
      parts, facts = self._source.read(sample)
      pixels = images.decode(next(iter(parts.values())), size, decoder=self._decoder,
                             orientation=images.orientation_of(facts.get("exif")))
      told = images.size_condition(pipeline.original_size(self._source, sample, facts), size)
    except images.BadPicture as error:
      return pack.Failure(self._source.name(sample), str(error))
    try:
      caption = captions.choices(facts)[0] if self._text else ""
    except ValueError:
      return pack.Failure(self._source.name(sample), "unreadable caption")
    # The source has counted jsons that cannot be read.
    known = (index.json_object(parts["json"]) or {}) if "json" in parts else facts
    kept = {"json": json.dumps(known | {"size": told.tolist()}, indent=4).encode(),
            "txt": parts["txt"] if "txt" in parts else facts.get("caption", "").encode()}
    return _Read(kept, pixels, caption)

  def _begin(self, size: latent_shards.Shape, reads) -> dict[str, jax.Array]:
    """Sets the devices to encode a batch, filled up with black. Returns part → what it will be."""
    image = np.zeros((self._batch_size, *size, 3), np.uint8)
    texts = [""] * len(reads)
    for row, read in enumerate(reads):
      if isinstance(read, _Read):
        image[row], texts[row] = read.pixels, read.caption
    return {index.MOMENTS: _moments(self._sd, self._params, image), **self._begin_texts(texts)}

  def _begin_texts(self, texts: list[str]) -> dict[str, jax.Array]:
    if not self._text:
      return {}
    tokens = self._sd.tokenize(texts + [""] * (self._batch_size - len(texts)))
    return dict(zip(latent_shards.STATES, _states(self._sd, self._params, tokens)))


def _finished(number, reads, encoded):
  encoded = {part: np.asarray(arrays) for part, arrays in encoded.items()}
  for row, read in enumerate(reads):
    if isinstance(read, _Read):
      made = {part: latent_shards.npy(arrays[row]) for part, arrays in encoded.items()}
      read = read.kept | made
    yield number, read
