"""Host batches → global `jax.Array`s, two ahead of the step that uses them."""

import math
import queue
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdjax.data.pipeline import AHEAD, Pipeline
from sdjax.errors import UserError
from sdjax.meshes import BATCH_SPEC


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
  """The rows of the global batch that this process's devices hold.

  Asks the sharding rather than dividing by the number of processes: devices along a "tensor" axis
  hold the same rows, on one process or on several. Rows between two blocks of a process, where a
  mesh deals blocks out in turns, are counted in (and read, and not used).

  Raises:
    UserError: the batch cannot be dealt out evenly.
  """
  shards = math.prod(sharding.mesh.shape[axis] for axis in sharding.spec[0])
  if batch_size % shards:
    raise UserError(f"batch_size {batch_size} is not divisible by {shards}, the devices along the "
                    f"mesh's data and fsdp axes; give a multiple of {shards}")
  blocks = [index[0].indices(batch_size)
            for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
  return slice(min(start for start, _, _ in blocks), max(stop for _, stop, _ in blocks))


class Prefetch:
  """Iterates over the global batches of a pipeline from a step on; a thread works ahead.

  Use it in a `with` block, which ends the thread. What goes wrong in the thread is raised by the
  `next` that would have returned the batch.
  """

  def __init__(self, pipeline: Pipeline, mesh: Mesh, start: int = 0):
    """Starts reading.

    Args:
      pipeline: the same on every process.
      mesh: with axes "data" and "fsdp", over which rows are dealt out.
      start: the first step, from `Pipeline.restore` when resuming.
    """
    self._pipeline = pipeline
    self._sharding = NamedSharding(mesh, BATCH_SPEC)
    self._rows = local_rows(self._sharding, pipeline.batch_size)
    self._step = start
    self._ready = queue.Queue(AHEAD)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._work, args=(start,), name="prefetch", daemon=True)
    self._thread.start()

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, jax.Array]:
    """The next step's batch: each array global, sharded over ("data", "fsdp") along its rows."""
    if self._closed.is_set():
      raise StopIteration
    item = self._ready.get()
    if isinstance(item, BaseException):
      self.close()
      raise item
    self._step += 1
    return item

  def is_ready(self) -> bool:
    """Whether the next batch is there, so that `next` waits for nothing."""
    return not self._ready.empty()

  def position(self) -> dict:
    """Where to go on after the batches returned so far; those read ahead are not counted."""
    return self._pipeline.position(self._step)

  def close(self) -> None:
    """Ends the threads; batches read ahead are dropped."""
    self._closed.set()
    while self._thread.is_alive():
      try:  # a thread that waits for room sees `_closed` once it gets it
        self._ready.get_nowait()
      except queue.Empty:
        self._thread.join(timeout=0.01)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _work(self, start):
    try:
      batches = self._pipeline.batches(start, self._rows)
      try:
        for batch in batches:
          self._ready.put({name: self._make_global(rows) for name, rows in batch.items()})
          if self._closed.is_set():
            break
      finally:
        batches.close()
    except BaseException as error:  # whatever it is, the consumer shall raise it, not hang
      self._ready.put(error)

  def _make_global(self, rows: np.ndarray) -> jax.Array:
    first = self._rows.start
    shape = (self._pipeline.batch_size, *rows.shape[1:])

    def block(index):
      start, stop, _ = index[0].indices(self._pipeline.batch_size)
      return rows[start - first:stop - first]

    return jax.make_array_from_callback(shape, self._sharding, block)
