"""Where the time of a run goes: each of its seconds is in one of a few buckets.

  start       before the first step: data, model, checkpoint
  compile     the step's programs, one for each shape of batch
  data_wait   no batch was ready
  step        training
  save        taking a state off the devices; it is written while steps go on
  evaluation  validation losses and previews
  lost        to restarts: from the checkpoint that was gone on from until that happened

They are carried on over restarts and add up to the time since the run was first started.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping

BUCKETS = ("start", "compile", "data_wait", "step", "save", "evaluation", "lost")


class Goodput:
  """Seconds by bucket; there is always one that time goes into, "start" at first."""

  def __init__(self):
    self._seconds = dict.fromkeys(BUCKETS, 0.0)
    self._bucket, self._since = "start", time.monotonic()

  def switch(self, bucket: str) -> str:
    """Lets time go into another bucket; returns the one before."""
    now = time.monotonic()
    self._seconds[self._bucket] += now - self._since
    before, self._bucket, self._since = self._bucket, bucket, now
    return before

  @contextlib.contextmanager
  def doing(self, bucket: str) -> Iterator[None]:
    """Lets the time of the block go into `bucket`."""
    before = self.switch(bucket)
    try:
      yield
    finally:
      self.switch(before)

  def seconds(self) -> dict[str, float]:
    """Returns seconds by bucket up to now."""
    self.switch(self._bucket)
    return dict(self._seconds)

  def row(self) -> dict[str, float]:
    """Returns what `go_on` needs: {"step_s": …, and so on, "time": in s since 1970}."""
    return {f"{name}_s": s for name, s in self.seconds().items()} | {"time": time.time()}

  def go_on(self, kept: Mapping | None, dropped: Mapping | None) -> None:
    """Takes over the seconds of a run that was begun before this process.

    Args:
      kept: the newest row up to the checkpoint that is gone on from.
      dropped: the oldest one after it, to tell when a run began that has no row to keep.
    """
    own = sum(self.seconds().values())
    row = kept or dropped
    if row is None or "time" not in row:
      return
    seconds = {name: row[f"{name}_s"] for name in BUCKETS}
    then = row["time"] if kept else row["time"] - sum(seconds.values())
    for name, s in (seconds if kept else {}).items():
      self._seconds[name] += s
    self._seconds["lost"] += max(time.time() - own - then, 0.0)


class Pace:
  """How fast steps are done, in the time between two rows that was spent training."""

  def __init__(self, goodput: Goodput, step: int):
    """Begins at `step`."""
    self._goodput, self._step = goodput, step
    self._images = self._operations = 0.0
    self._from = self._to = goodput.seconds()

  def done(self, step: int, images: int, operations: float) -> None:
    """Tells that `step`, of so many images and floating-point operations, is done by now."""
    if step > self._step:
      self._step, self._to = step, self._goodput.seconds()
      self._images += images
      self._operations += operations

  def lap(self) -> tuple[float, float, float]:
    """Returns images and operations per second, and the share of time spent waiting for data."""
    waited_s, stepped_s = (self._to[name] - self._from[name] for name in ("data_wait", "step"))
    elapsed_s = max(waited_s + stepped_s, 1e-9)
    lap = self._images / elapsed_s, self._operations / elapsed_s, waited_s / elapsed_s
    self._from, self._images, self._operations = self._to, 0.0, 0.0
    return lap
