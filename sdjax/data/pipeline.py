"""Batches of a training run: the index says what exists, the plan when it is read.

  batch(step) = decode, crop, choose a caption (index[plan(seed, step)])

is a pure function of the files, the seed and the step number. So a run resumes at any step at once,
and 1, 2, 4 … processes that take their rows make the same global batch. A sample that cannot be
used is replaced by the next good one in the index, which every process would find likewise.
"""

import collections
import concurrent.futures
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sdjax.data import captions, images, plan, shards
from sdjax.errors import UserError

Batch = dict[str, np.ndarray]
AHEAD = 2            # batches decoded before they are asked for
ROWS_PER_TASK = 16   # few enough to keep all threads busy, enough to tokenize in bulk
CHAIN_LIMIT = 1000   # bad samples in a row: a whole broken shard of the usual size
DRAWN_FIRST = 1000   # samples drawn before their share of bad ones is judged


class Pipeline:
  """A data set in the order of a run. Threads decode; nothing here knows of jax.

  Attributes:
    count: samples in the data set.
    batch_size: global, over all processes.
    counters: reason → samples replaced for it, in the batches yielded so far by this process, and
      what the index left out.
  """

  def __init__(
      self,
      index: shards.Index,
      *,
      batch_size: int,
      seed: int,
      size: tuple[int, int],
      tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
      caption_dropout: float = 0.0,
      random_crop: bool = False,
      flip: bool = False,
      max_bad_share: float = 0.05,
      threads: int = 2,
      cache_bytes: int = 256 * 2**20,
  ):
    """Describes the batches; reads nothing but the first sample of a latents cache.

    Args:
      index: of the shards.
      batch_size: global.
      seed: of the order, the crops and the captions.
      size: (H, W) px of the pictures; not used with a latents cache, which has its own.
      tokenize: captions → int32 [b L] or [b k L] for k text encoders; None leaves "tokens" out.
      caption_dropout: share of rows that train with the empty caption.
      random_crop: else the middle of each picture.
      flip: mirror half of the pictures. Not for captions that say left or right.
      max_bad_share: of samples drawn; when more must be replaced, the run stops.
      threads: that decode. Pillow lets go of Python's lock while it decodes.
      cache_bytes: memory for decoded pixels, which spares a small data set the decoding from its
        second epoch on; samples that find no room in it are decoded anew. 0: none. Without effect
        on what is in a batch, and with `random_crop`.

    Raises:
      UserError: options that exclude each other, or a value out of range.
    """
    if batch_size < 1:
      raise UserError(f"batch_size {batch_size} is below 1; give at least one sample per step")
    if not 0 <= caption_dropout <= 1:
      raise UserError(f"caption_dropout {caption_dropout} is not within 0 … 1; give a share")
    if index.kind == "moments" and (flip or random_crop):
      raise UserError("flip and random_crop need pictures, these shards hold moments; switch them "
                      "off, or train from the pictures")
    self.count = index.count
    self.batch_size = batch_size
    self.counters = collections.Counter(index.problems)
    self._index = index
    self._digest = index.digest()
    self._seed = seed
    self._tokenize = tokenize
    self._tokens_shape = None if tokenize is None else self._token_rows([""]).shape[1:]
    self._caption_dropout = caption_dropout
    self._random_crop = random_crop
    self._flip = flip
    self._max_bad_share = max_bad_share
    self._threads = threads
    self._drawn = self._bad = 0
    self._cache = _Cache(0 if random_crop else cache_bytes)
    self._pixel_parts = (shards.MOMENTS,) if index.kind == "moments" else shards.PICTURES
    self._size = size
    self._moments_shape = self._first_moments_shape() if index.kind == "moments" else None

  def batches(self, start: int = 0, rows: slice = slice(None)) -> Iterator[Batch]:
    """The batches of steps `start`, `start` + 1, … without end.

    Two batches are decoded ahead, and no more: memory is bounded, and a slow consumer is waited
    for. Closing the iterator stops the threads.

    Args:
      start: number of the first step.
      rows: of the global batch that this process holds.

    Yields:
      "image" float32 [B H W 3] in [-1, 1] or "moments" float32 [B h w 2c]; "tokens" int32 [B k L];
      "weight" float32 [B], ones. B is the number of `rows`. Arrays are the caller's to keep.

    Raises:
      UserError: too many bad samples, or a shard changed while in use.
      OSError: a shard cannot be read.
    """
    pool = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
    ahead = collections.deque()
    step = start
    try:
      while True:
        while len(ahead) <= AHEAD:
          ahead.append(self._begin(pool, step, rows))
          step += 1
        batch, tasks = ahead.popleft()
        for task in tasks:
          self._count(*task.result())
        yield batch
    finally:
      pool.shutdown(wait=True, cancel_futures=True)

  def position(self, step: int) -> dict:
    """What a checkpoint keeps so that a run goes on at `step`: a few numbers, json-compatible."""
    return {"step": int(step), "samples": self.count, "plan": {
        "batch_size": self.batch_size, "seed": self._seed, "data": self._digest}}

  def restore(self, position: Mapping) -> int:
    """The step to go on at.

    Raises:
      UserError: the position is of other data or another order; names the field that differs.
    """
    mine = self.position(position["step"])
    fields = {"samples": (position["samples"], self.count)}
    fields |= {name: (position["plan"].get(name), value) for name, value in mine["plan"].items()}
    for name, (saved, now) in fields.items():
      if saved != now:
        raise UserError(f"the data's {name} is {now}, the checkpoint was written with {saved}; "
                        "set it back, or start in a new workdir")
    return mine["step"]

  def _begin(self, pool, step, rows):
    """Allocates a batch and sets threads to fill it. Returns it with their futures."""
    ids = plan.sample_ids(self._seed, step, self.batch_size, self.count, rows)
    # One column per use, so that switching one option on does not move the draws of the others.
    draws = plan.uniforms(self._seed, plan.positions(step, self.batch_size, rows), 5)
    if self._moments_shape is None:
      values = np.empty((len(ids), *self._size, 3), np.float32)
      batch = {"image": values}
    else:
      values = np.empty((len(ids), *self._moments_shape), np.float32)
      batch = {"moments": values}
    if self._tokenize is not None:
      batch["tokens"] = np.empty((len(ids), *self._tokens_shape), np.int32)
    batch["weight"] = np.ones(len(ids), np.float32)
    parts = [slice(i, i + ROWS_PER_TASK) for i in range(0, len(ids), ROWS_PER_TASK)]
    tasks = [pool.submit(self._fill, ids[part], draws[part], values[part],
                         batch["tokens"][part] if "tokens" in batch else None) for part in parts]
    return batch, tasks

  def _fill(self, ids, draws, values, tokens) -> tuple[int, collections.Counter]:
    """Writes some rows of a batch. Returns how many, and what had to be replaced."""
    replaced = collections.Counter()
    chosen = []
    for row, (sample, draw) in enumerate(zip(ids, draws, strict=True)):
      crop_y, crop_x, mirror, which, drop = draw
      crop = (crop_y, crop_x) if self._random_crop else (0.5, 0.5)
      pixels, texts = self._usable(int(sample), crop, replaced)
      if self._moments_shape is None:
        images.to_float(pixels, values[row], flip=self._flip and mirror < 0.5)
      else:
        values[row] = pixels
      chosen.append(captions.choose(texts, which, drop, self._caption_dropout))
    if tokens is not None:
      tokens[:] = self._token_rows(chosen)
    return len(ids), replaced

  def _usable(self, sample, crop, replaced):
    """Pixels and captions of a sample, or of the first good one after it in the index."""
    for distance in range(min(self.count, CHAIN_LIMIT)):
      number = (sample + distance) % self.count
      try:
        return self._load(number, crop)
      except images.BadPicture as error:
        replaced[str(error)] += 1
    raise UserError(f"{distance + 1} samples in a row from {self._index.name(sample)} cannot be "
                    f"used ({_top(replaced)}); look with `sdjax shards inspect`")

  def _load(self, sample, crop):
    """Pixels (uint8 [H W 3], or moments float16 [h w 2c]) and captions; remembers them."""
    if (found := self._cache.find(sample)) is not None:
      return found
    wanted = self._pixel_parts + (captions.PARTS if self._tokenize is not None else ())
    parts = self._index.read(sample, wanted)
    blob = next(parts[part] for part in self._pixel_parts if part in parts)
    if self._moments_shape is None:
      pixels = images.decode(blob, self._size, crop)
    else:
      pixels = read_moments(blob)
      if pixels.shape != self._moments_shape:
        raise images.BadPicture("moments of another shape")
    try:
      texts = captions.captions_of(parts) if self._tokenize is not None else ("",)
    except ValueError as error:
      raise images.BadPicture("unreadable caption") from error
    self._cache.keep(sample, (pixels, texts))
    return pixels, texts

  def _token_rows(self, texts) -> np.ndarray:
    """int32 [b k L], also from a tokenizer that knows no k."""
    tokens = self._tokenize(texts)
    return tokens.reshape(len(texts), -1, tokens.shape[-1])

  def _first_moments_shape(self):
    for sample in range(min(self.count, CHAIN_LIMIT)):
      try:
        return read_moments(self._index.read(sample, (shards.MOMENTS,))[shards.MOMENTS]).shape
      except images.BadPicture:
        continue
    raise UserError(f"no moments can be read from {self._index.name(0)} on; encode them again")

  def _count(self, drawn, replaced):
    self.counters.update(replaced)
    self._drawn += drawn
    self._bad += replaced.total()
    if self._drawn >= DRAWN_FIRST and self._bad > self._max_bad_share * self._drawn:
      raise UserError(
          f"{self._bad} of {self._drawn} samples cannot be used ({_top(self.counters)}), more than "
          f"max_bad_share {self._max_bad_share}; look with `sdjax shards inspect`, or raise it")


class _Cache:
  """Decoded samples up to a number of bytes. What is in is never replaced: an epoch visits every
  sample once, so that one that was pushed out would be missed as surely as the one let in is hit.
  """

  def __init__(self, budget_bytes: int):
    self._left = budget_bytes
    self._found = {}
    self._lock = threading.Lock()

  def find(self, sample):
    return self._found.get(sample)

  def keep(self, sample, value):
    pixels, _ = value
    with self._lock:
      if sample not in self._found and pixels.nbytes <= self._left:
        self._left -= pixels.nbytes
        self._found[sample] = value


def read_moments(blob: bytes) -> np.ndarray:
  """float16 [h w 2c] of a latents cache. Raises BadPicture when the bytes are something else."""
  try:
    moments = np.load(io.BytesIO(blob), allow_pickle=False)
  except images.DAMAGE as error:
    raise images.BadPicture("corrupt moments") from error
  if not (isinstance(moments, np.ndarray) and moments.ndim == 3 and np.isfinite(moments).all()):
    raise images.BadPicture("corrupt moments")
  return moments


def _top(counts: Mapping[str, int]) -> str:
  """The three most frequent reasons, as "12 corrupt picture, 3 not a picture"."""
  return ", ".join(f"{n} {reason}" for reason, n in collections.Counter(counts).most_common(3))
