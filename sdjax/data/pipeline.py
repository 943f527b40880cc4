"""Batches of a training run: sources say what exists, the plan when it is read.

  batch(step) = decode, crop, choose a caption (source[plan(seed, step)])

is a pure function of the data, the seed and the step number. So a run resumes at any step at once,
and 1, 2, 4 … processes that take their rows make the same global batch. A sample that cannot be
used is replaced by another, drawn at random for that row, as every process would draw it.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data import buckets, images, index, plan, shape_plan
from sdjax.data.captions import DRAWS as TEXT_DRAWS
from sdjax.data.captions import Captions, choices
from sdjax.data.sources import Source
from sdjax.errors import UserError

Batch = dict[str, np.ndarray]
AHEAD = 2            # batches made before they are asked for
ROWS_PER_TASK = 16   # few enough to keep all threads busy, enough to tokenize in bulk
SUBSTITUTES = 32     # samples tried for a row before its source is given up
DRAWN_FIRST = 1000   # samples drawn before their share of bad ones is judged
CROP_Y, CROP_X, MIRROR, TEXT = range(4)  # columns of a row's draws; texts take the last three
DRAWS = TEXT + TEXT_DRAWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How samples become rows.

  Attributes:
    resolutions: (first step, side in px), from step 0 on; several are stages of a run.
    bucket: whether batches take the shapes of `buckets.shapes` rather than squares.
    captions: how texts are made.
    random_crop: else the middle of each picture.
    flip: mirror half of the pictures. Not for captions that say left or right.
    size_condition: whether batches hold "size" (SDXL), see `images.size_condition`.
    min_side_px: of pictures; smaller ones are replaced.
    decoder: as `images.decoder_name` takes it.
    max_bad_share: of samples drawn; when more must be replaced, the run stops.
  """
  resolutions: Sequence[tuple[int, int]]
  bucket: bool = False
  captions: Captions = Captions()
  random_crop: bool = False
  flip: bool = False
  size_condition: bool = False
  min_side_px: int = 1
  decoder: str = "auto"
  max_bad_share: float = 0.05


def facts_wanted(options: Options) -> tuple[str, ...]:
  """Returns the keys of the samples' json that a pipeline needs among a source's facts."""
  column = options.captions.column or "captions"
  columns = (column,) if isinstance(column, str) else tuple(column)
  sizes = ("original_height", "original_width", "size") if options.size_condition else ()
  return (*columns, "exif", *sizes)


class Pipeline:
  """Sources in the order of a run. Threads read and decode; nothing here knows of jax.

  Attributes:
    count: samples of all sources.
    batch_size: global, over all processes.
    replaced: reason → samples replaced for it, in the batches yielded so far by this process.
  """

  def __init__(
      self,
      sources: Sequence[Source],
      weights: Sequence[float] = (1.0,),
      *,
      batch_size: int,
      seed: int,
      options: Options,
      tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
      empty_text: Mapping[str, np.ndarray] | None = None,
      threads: int = os.cpu_count() or 2,
      readers: int = 32,
      cache_bytes: int = 128 * 2**20,
  ):
    """Describes the batches; reads nothing but the first sample of each latents cache.

    Args:
      sources: all of pictures or all of moments, opened with `facts_wanted`.
      weights: share of each source in the rows, relative to the others.
      batch_size: global.
      seed: of the order, the crops and the captions.
      options: see there.
      tokenize: captions → int32 [b L] or [b k L] for k text encoders; None leaves "tokens" out.
      empty_text: name → states of the empty text, see `latent_shards.empty_text`. Where given,
        batches hold such states of each sample's first caption, as its cache has them.
      threads: that decode. Decoders let go of Python's lock.
      readers: threads that read from the network.
      cache_bytes: memory for decoded pixels, which spares a small data set the decoding from its
        second epoch on; samples that find no room in it are decoded anew. 0: none. Without effect
        on what is in a batch, and where a sample is not always cut alike.

    Raises:
      UserError: options that exclude each other, or a value out of range.
    """
    kinds = {source.kind for source in sources}
    if len(kinds) > 1:
      raise UserError("some of these sources hold pictures and some a latents cache; train on one "
                      "kind")
    self._moments = kinds == {"moments"}
    if self._moments and (options.flip or options.random_crop or options.bucket
                          or len(options.resolutions) > 1):
      raise UserError("flip, random_crop, bucket and stages need pictures, these shards hold "
                      "moments; switch them off, or train from the pictures")
    self.count = sum(source.count for source in sources)
    self.batch_size = batch_size
    self._sources, self._weights = tuple(sources), tuple(weights)
    self._options, self._seed = options, seed
    self._decoder = images.decoder_name(options.decoder)
    self._plan = _order(self._sources, self._weights, batch_size, seed)
    self._buckets = {side: buckets.BucketPlan(
        self._plan, lambda source, samples: self._sources[source].sizes(samples),
        buckets.shapes(side)) for _, side in options.resolutions if options.bucket}
    self._tokenize, self._empty_text = tokenize, dict(empty_text or {})
    self._tokens_shape = None if tokenize is None else self._token_rows([""]).shape[1:]
    self._threads, self._readers = threads, readers
    self._drawn, self.replaced = 0, collections.Counter()
    always_alike = not (options.random_crop or options.bucket or len(options.resolutions) > 1)
    self._cache = _Cache(cache_bytes if always_alike else 0)

  @property
  def counters(self) -> collections.Counter:
    """Reason → samples that the sources left out, and those `replaced`."""
    return sum((collections.Counter(source.problems) for source in self._sources), self.replaced)

  def batches(self, start: int = 0, rows: slice = slice(None)) -> Iterator[Batch]:
    """The batches of steps `start`, `start` + 1, … without end.

    Two batches are made ahead, and no more: memory is bounded, and a slow consumer is waited for.
    Closing the iterator stops the threads.

    Args:
      start: number of the first step.
      rows: of the global batch that this process holds.

    Yields:
      "image" uint8 [B H W 3] or "moments" float32 [B h w 2c]; "tokens" int32 [B k L], or
      float32 "context" [B l d] and, of SDXL, "pooled" [B d]; "size" int32 [B 6], see
      `images.size_condition`; "weight" float32 [B], ones. B is the number of `rows`. One batch of
      moments has one shape. Arrays are the caller's to keep.

    Raises:
      UserError: too many bad samples, or a shard changed while in use.
      OSError: a shard cannot be read.
    """
    decoders = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
    readers = concurrent.futures.ThreadPoolExecutor(self._readers, thread_name_prefix="read")
    ahead = collections.deque()
    step = start
    try:
      while True:
        while len(ahead) <= AHEAD:
          ahead.append(self._begin(decoders, readers, step, rows))
          step += 1
        batch, tasks = ahead.popleft()
        for task in tasks:
          self._count(*task.result())
        yield batch
    finally:
      for pool in (decoders, readers):
        pool.shutdown(wait=False, cancel_futures=True)
      for pool in (decoders, readers):
        pool.shutdown(wait=True)

  def position(self, step: int) -> dict:
    """What a checkpoint keeps so that a run goes on at `step`: a few numbers, json-compatible."""
    told = dataclasses.asdict(self._options) | {"decoder": self._decoder}
    return {"step": int(step), "samples": int(step) * self.batch_size, "plan": {
        "batch_size": self.batch_size, "seed": self._seed, "weights": list(self._weights),
        "data": [source.digest for source in self._sources],
        **{name: told[name] for name in ("bucket", "decoder", "min_side_px")}}}

  def restore(self, position: Mapping) -> int:
    """The step to go on at.

    Raises:
      UserError: the position is of other data or another order; names the field that differs.
    """
    mine = self.position(position["step"])
    for name, now in mine["plan"].items():
      if (saved := position["plan"].get(name)) != now:
        raise UserError(f"the data's {name} is {now}, the checkpoint was written with {saved}; "
                        "set it back, or start in a new workdir")
    return mine["step"]

  def side_at(self, step: int) -> int:
    """Returns the resolution of a step, in px."""
    return max(stage for stage in self._options.resolutions if stage[0] <= step)[1]

  def _begin(self, decoders, readers, step, rows):
    """Allocates a batch and sets threads to fill it. Returns it with their futures."""
    side = self.side_at(step)
    if self._moments or self._options.bucket:
      shape, drawn = (self._plan if self._moments else self._buckets[side]).batch(step, rows)
    else:
      shape, drawn = (side, side), self._plan.rows(step, rows)
    n = len(drawn.sample)
    batch = {"moments": np.empty((n, *shape), np.float32)} if self._moments else {
        "image": np.empty((n, *shape, 3), np.uint8)}
    for name, state in self._empty_text.items():
      batch[name] = np.empty((n, *state.shape), np.float32)
    if self._tokenize is not None:
      batch["tokens"] = np.empty((n, *self._tokens_shape), np.int32)
    if self._options.size_condition:
      batch["size"] = np.empty((n, 6), np.int32)
    batch["weight"] = np.ones(n, np.float32)
    reads = [self._start_reading(readers, int(source), int(sample))
             for source, sample in zip(drawn.source, drawn.sample, strict=True)]
    parts = [slice(i, i + ROWS_PER_TASK) for i in range(0, n, ROWS_PER_TASK)]
    tasks = [decoders.submit(self._fill, plan.Drawn(*(column[part] for column in drawn)),
                             reads[part], {name: values[part] for name, values in batch.items()})
             for part in parts]
    return batch, tasks

  def _start_reading(self, readers, source: int, sample: int) -> Callable[[], Any]:
    """Returns what gives a sample's parts and facts: begun at once, if they come from afar."""
    read = functools.partial(self._sources[source].read, sample)
    if self._sources[source].is_remote and self._cache.find((source, sample)) is None:
      return readers.submit(read).result
    return read

  def _fill(self, drawn, reads, batch) -> tuple[int, collections.Counter]:
    """Writes some rows of a batch. Returns how many, and what had to be replaced."""
    replaced, chosen = collections.Counter(), []
    draws = plan.uniforms(self._seed, drawn.position, DRAWS)
    places = list(zip(*(column.tolist() for column in drawn), strict=True))
    # All in a row, for decoders drive out of the processor's caches what reading needs.
    reads = [read if self._cache.find(place[:2]) else _read_now(read)
             for read, place in zip(reads, places, strict=True)]
    for row, (read, place) in enumerate(zip(reads, places)):
      chosen.append(self._fill_row(
          *place, read, draws[row], {name: rows[row] for name, rows in batch.items()}, replaced))
    if self._tokenize is not None:
      batch["tokens"][:] = self._token_rows(chosen)
    return len(reads), replaced

  def _fill_row(self, source, sample, position, read, draws, out, replaced) -> str:
    """Writes a sample, or the first of its substitutes that can be used. Returns its text."""
    substitutes = None
    for attempt in range(SUBSTITUTES):
      try:
        return self._load(source, sample, read, draws, out)
      except images.BadPicture as error:
        replaced[str(error)] += 1
      if substitutes is None:
        substitutes = plan.uniforms(
            self._seed, np.array([position]), DRAWS + SUBSTITUTES)[0, DRAWS:]
      sample = int(substitutes[attempt] * self._sources[source].count)
      read = functools.partial(self._sources[source].read, sample)
    raise UserError(f"{SUBSTITUTES} samples in a row cannot be used ({_top(replaced)}); look with "
                    "`sdjax shards inspect`")

  def _load(self, source, sample, read, draws, out) -> str:
    """Writes a sample into the rows of a batch, and returns its text."""
    options = self._options
    crop = (draws[CROP_Y], draws[CROP_X]) if options.random_crop else (0.5, 0.5)
    flip = options.flip and draws[MIRROR] < 0.5
    if (found := self._cache.find((source, sample))) is None:
      parts, facts = read()
      texts, states = ("",), {}
      if self._tokenize is not None or self._empty_text:
        try:
          texts = choices(facts, options.captions.column)
        except ValueError as error:
          raise images.BadPicture("unreadable caption") from error
      if self._empty_text:  # the cache has the states of the first caption alone
        texts = texts[:1]
        states = {name: _read_state(parts, name, state.shape)
                  for name, state in self._empty_text.items()}
      if self._moments:
        pixels = read_moments(parts[index.MOMENTS], out["moments"].shape)
      else:
        pixels = images.decode(
            next(iter(parts.values())), out["image"].shape[:2], crop, decoder=self._decoder,
            orientation=images.orientation_of(facts.get("exif")), min_side_px=options.min_side_px,
            out=None if flip or self._cache.keeps else out["image"])
      found = (pixels, *states.values()), texts, facts
      self._cache.keep((source, sample), found)
    (pixels, *states), texts, facts = found
    if self._moments:
      out["moments"][:] = pixels
    elif pixels is not out["image"]:
      images.copy(pixels, out["image"], flip)
    if options.size_condition:
      out["size"][:] = self._size(source, sample, facts, pixels.shape[:2], crop, flip)
    text = options.captions(texts, draws[TEXT:])
    for (name, empty), state in zip(self._empty_text.items(), states, strict=True):
      out[name][:] = state if text else empty
    return text

  def _size(self, source, sample, facts, shape, crop, flip) -> Sequence[int]:
    """What SDXL is told of a sample: a cache of ours has it, of other caches we know the side."""
    told = facts.get("size")
    if self._moments and isinstance(told, list) and len(told) == 6:
      return told
    size = (self.side_at(0),) * 2 if self._moments else shape
    original = original_size(self._sources[source], sample, facts)
    return images.size_condition(original, size, crop, flip)

  def _token_rows(self, texts) -> np.ndarray:
    """int32 [b k L], also from a tokenizer that knows no k."""
    tokens = self._tokenize(texts)
    return tokens.reshape(len(texts), -1, tokens.shape[-1])

  def _count(self, drawn, replaced):
    self._drawn += drawn
    self.replaced.update(replaced)
    limit, bad = self._options.max_bad_share, self.replaced.total()
    if self._drawn >= DRAWN_FIRST and bad > limit * self._drawn:
      raise UserError(
          f"{bad} of {self._drawn} samples cannot be used ({_top(self.replaced)}), more than "
          f"max_bad_share {limit}; look with `sdjax shards inspect`, or raise it")


class _Cache:
  """Decoded samples up to a number of bytes. What is in is never replaced: an epoch visits every
  sample once, so that one that was pushed out would be missed as surely as the one let in is hit.
  """

  def __init__(self, budget_bytes: int):
    self.keeps = budget_bytes > 0
    self._left = budget_bytes
    self._found = {}
    self._lock = threading.Lock()

  def find(self, sample):
    return self._found.get(sample)

  def keep(self, sample, value):
    if not self.keeps:
      return
    arrays, *_ = value
    size = sum(array.nbytes for array in arrays)
    with self._lock:
      if sample not in self._found and size <= self._left:
        self._left -= size
        self._found[sample] = value
      elif size > self._left:
        self.keeps = False  # what is in stays


def _read_now(read: Callable[[], Any]) -> Callable[[], Any]:
  """Calls `read`; returns what gives its result, or raises its BadPicture, in its place."""
  try:
    found = read()
  except images.BadPicture as error:
    return functools.partial(_raise, error)
  return lambda: found


def _raise(error: Exception):
  raise error


def original_size(source: Source, sample: int, facts: Mapping[str, Any]) -> tuple[int, int]:
  """Returns height and width of an upright picture before whoever made the shard resized it."""
  sides = facts.get("original_height"), facts.get("original_width")
  if not all(isinstance(side, int | float) and side >= 1 for side in sides):
    sides = source.sizes(np.array([sample]))[0]
  else:  # img2dataset tells them of the picture as it was stored
    sides = images.upright(sides, images.orientation_of(facts.get("exif")))
  return int(sides[0]), int(sides[1])


def read_moments(blob: bytes, shape: tuple[int, ...] | None = None) -> np.ndarray:
  """float16 [h w 2c] of a latents cache.

  Raises:
    images.BadPicture: the bytes are something else, or of another shape than `shape`, if given.
  """
  moments = _read_array(blob, "moments")
  if moments.ndim != 3:
    raise images.BadPicture("corrupt moments")
  if shape not in (None, moments.shape):
    raise images.BadPicture("moments of another shape")
  return moments


def _read_state(parts: Mapping[str, bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
  if f"{name}.npy" not in parts:
    raise images.BadPicture(f"no {name}")
  state = _read_array(parts[f"{name}.npy"], name)
  if state.shape != shape:
    raise images.BadPicture(f"{name} of another shape")
  return state


def _read_array(blob: bytes, what: str) -> np.ndarray:
  try:
    array = np.load(io.BytesIO(blob), allow_pickle=False)
  except images.DAMAGE as error:
    raise images.BadPicture(f"corrupt {what}") from error
  if not (isinstance(array, np.ndarray) and array.dtype.kind == "f" and np.isfinite(array).all()):
    raise images.BadPicture(f"corrupt {what}")
  return array


def _order(sources, weights, batch_size, seed) -> plan.Plan | shape_plan.ShapePlan:
  """When samples are read; of moments, also the shape of each step."""
  counts = tuple(source.count for source in sources)
  if sources[0].kind == "image":
    return plan.Plan(counts, weights, batch_size, seed)
  return shape_plan.ShapePlan(counts, weights, list(map(_shape_of, sources)), batch_size, seed)


def _shape_of(source: Source) -> tuple[int, ...]:
  """The shape of a source's first moments that can be read."""
  for sample in range(min(source.count, SUBSTITUTES)):
    try:
      parts, _ = source.read(sample)
      return read_moments(parts[index.MOMENTS]).shape
    except images.BadPicture:
      continue
  raise UserError(f"no moments can be read from {source.name(0)} on; encode them again")


def _top(counts: Mapping[str, int]) -> str:
  """The three most frequent reasons, as "12 corrupt picture, 3 not a picture"."""
  return ", ".join(f"{n} {reason}" for reason, n in collections.Counter(counts).most_common(3))
