"""Where numbers go: metrics.jsonl always, TensorBoard beside it, Weights & Biases where asked for.

metrics.jsonl has one object a line, {"step": n, name: float, …}; what is not finite is null. A
resumed run first drops the lines that lie after its checkpoint, so that the file reads as if
nothing had happened.
"""

import json
import math
import secrets
from pathlib import Path
from typing import Any

import tensorboardX

from sdjax.errors import UserError
from sdjax.files import write_whole

BEST = "validation_loss"


class Writer:
  """Writes scalars and pictures of a run; on any process but the first, does nothing.

  Attributes:
    kept, dropped: of the rows that were there, the newest up to the step that the run goes on
      from, and the oldest after it; None where there is none.
  """

  def __init__(self, workdir: Path, *, from_step: int, enabled: bool, wandb_project: str = "",
               config: dict[str, Any] | None = None):
    """Opens the files of `workdir` and drops what they say of steps after `from_step`.

    Args:
      workdir: is there.
      from_step: that the run goes on from.
      enabled: whether this is the process that writes.
      wandb_project: of Weights & Biases; "" for none.
      config: of the run, which is shown there.

    Raises:
      UserError: Weights & Biases is asked for and not installed.
    """
    self.kept = self.dropped = self._file = self._board = self._wandb = None
    self._best = math.inf
    if not enabled:
      return
    path = workdir / "metrics.jsonl"
    if path.exists():
      rows = list(filter(None, map(_read_row, path.read_text().splitlines())))
      kept = [row for row in rows if row["step"] <= from_step]
      self.kept = kept[-1] if kept else None
      self.dropped = next((row for row in rows if row["step"] > from_step), None)
      self._best = min((row[BEST] for row in kept if row.get(BEST) is not None), default=math.inf)
      with write_whole(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    if wandb_project:
      self._wandb = _start_wandb(wandb_project, workdir, config)
    self._file = path.open("a", buffering=1)
    self._board = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=from_step + 1, write_to_disk=True)

  def scalars(self, step: int, values: dict[str, float]) -> bool:
    """Writes one line; `step` counts finished updates. Returns whether validation is at its best.
    """
    if self._file is None:
      return False
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    self._file.write(json.dumps({"step": step} | dict.fromkeys(values) | finite) + "\n")
    for name, value in finite.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log({"step": step} | finite)
    is_best = finite.get(BEST, math.inf) < self._best
    self._best = min(self._best, finite.get(BEST, math.inf))
    return is_best

  def picture(self, step: int, name: str, picture) -> None:
    """Adds a uint8 [H W 3] picture to TensorBoard, and to Weights & Biases."""
    if self._board is not None:
      self._board.add_image(name, picture, step, dataformats="HWC")
    if self._wandb is not None:
      import wandb
      self._wandb.log({"step": step, name: wandb.Image(picture)})

  def close(self) -> None:
    """Flushes what is open."""
    if self._file is not None:
      self._file.close()
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _read_row(line: str) -> dict | None:
  """The row of a line; None for one that a kill cut short."""
  try:
    row = json.loads(line)
    return row if "step" in row else None
  except json.JSONDecodeError:
    return None


def _start_wandb(project: str, workdir: Path, config: dict[str, Any] | None) -> Any:
  """Opens the run of `workdir`, the same one after a restart."""
  try:
    import wandb
  except ImportError as error:
    raise UserError(f"config.wandb_project is {project!r}, but wandb is not installed; "
                    "pip install 'sdjax[wandb]', or leave it empty") from error
  path = workdir / "wandb_id"
  if not path.exists():
    path.write_text(secrets.token_hex(4) + "\n")
  run = wandb.init(project=project, id=path.read_text().strip(), resume="allow", config=config,
                   dir=str(workdir), name=workdir.name)
  # Steps are done again after a restart; W&B's own counter cannot go back.
  run.define_metric("*", step_metric="step")
  return run
