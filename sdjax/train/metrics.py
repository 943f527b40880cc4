"""Where numbers go: metrics.jsonl always, TensorBoard beside it.

metrics.jsonl has one object a line, {"step": n, name: float, …}. A resumed run first drops the
lines that lie after its checkpoint, so that the file reads as if nothing had happened.
"""

import json
from pathlib import Path

import tensorboardX

from sdjax.files import write_whole


class Writer:
  """Writes scalars and pictures of a run; on any process but the first, does nothing."""

  def __init__(self, workdir: Path, *, from_step: int, enabled: bool):
    """Opens the files of `workdir` and drops what they say of steps after `from_step`."""
    self._file = self._board = None
    if not enabled:
      return
    path = workdir / "metrics.jsonl"
    if path.exists():
      whole = [line for line in path.read_text().splitlines() if _step_of(line) <= from_step]
      with write_whole(path, "w") as file:
        file.writelines(line + "\n" for line in whole)
    self._file = path.open("a", buffering=1)
    self._board = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=from_step + 1, write_to_disk=True)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes one line; `step` counts finished updates."""
    if self._file is None:
      return
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def picture(self, step: int, name: str, picture) -> None:
    """Adds a uint8 [H W 3] picture to TensorBoard."""
    if self._board is not None:
      self._board.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    """Flushes both files."""
    if self._file is not None:
      self._file.close()
      self._board.close()


def _step_of(line: str) -> float:
  """The step of a line; infinite for one that a kill cut short."""
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError):
    return float("inf")
