"""What the steps of a run have found: awaited one step late, looked at, and written as rows."""

import collections
from typing import Any

import jax
import tqdm

from sdjax.data.pipeline import Pipeline
from sdjax.train import optimizer, programs
from sdjax.train.divergence import Divergence
from sdjax.train.goodput import Goodput, Pace
from sdjax.train.losses import Metrics
from sdjax.train.metrics import Writer
from sdjax.train.watchdog import Watchdog


class Journal:
  """Follows the steps on the device, in the order in which they were begun."""

  def __init__(self, config: Any, pipeline: Pipeline, writer: Writer, goodput: Goodput,
               watch: Watchdog, bar: tqdm.tqdm, start: int):
    """Begins before the step after `start`; `watch` and `bar` are told of each that is done."""
    self._config, self._pipeline, self._writer = config, pipeline, writer
    self._goodput, self._watch, self._bar = goodput, watch, bar
    self._rate = optimizer.learning_rate(config.optimizer, config.total_steps)
    self._divergence = Divergence(config.max_skipped)
    self._pace = Pace(goodput, start)
    self._done = start
    self._running: collections.deque[tuple[Metrics, float]] = collections.deque()
    self._unread: list[Metrics] = []

  def begun(self, found: Metrics, operations: float) -> None:
    """Notes a step that the device has been given, and how many operations it takes."""
    self._running.append((found, operations))

  def wait(self, but: int) -> bool:
    """Waits until all steps but the last `but` are done; returns whether there was one."""
    before = self._done
    while len(self._running) > but:
      jax.block_until_ready(self._running[0][0])
      self._take_time()
      self._unread.append(self._running.popleft()[0])
      self._done += 1
      self._watch.beat()
      self._bar.update()
    if self._running and self._running[0][0]["loss"].is_ready():
      self._take_time()  # a CPU may run a step within the call that begins it
    return self._done > before

  def _take_time(self) -> None:
    self._pace.done(self._done + 1, self._config.data.batch_size, self._running[0][1])

  def write(self, extra: dict[str, float]) -> bool:
    """Writes a row for the last step that is done; returns whether its validation is the best.

    Raises:
      Diverged: see `Divergence`.
    """
    number, unread, self._unread = self._done, self._unread, []
    *looks, last = jax.device_get(
        [(found["loss"], found["skipped_steps"]) for found in unread] + unread[-1:])
    values = {name: float(value) for name, value in last.items()} | extra
    values |= self._divergence.look(number - len(looks) + 1,
                                    ((float(loss), bool(skipped)) for loss, skipped in looks))
    values["learning_rate"] = float(self._rate(number - 1))
    values["images_per_s"], operations, values["data_wait_share"] = self._pace.lap()
    values["skipped_samples"] = float(self._pipeline.replaced.total())  # of this process's rows
    device = jax.local_devices()[0]
    values |= programs.utilization(operations, device, jax.device_count())
    values |= programs.memory(device) | self._goodput.row()
    self._bar.set_postfix_str(
        f"loss {values['loss']:.3f}  {values['images_per_s']:.0f} images/s", refresh=False)
    return self._writer.scalars(number, values)
