"""Checkpoints of a run: the state, the position in the data and the config, as one step.

The only module that knows Orbax. A step is written in the background and appears under its final
name when it is whole; a run killed at any moment finds the last whole one.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sdjax.errors import UserError


class Checkpoints:
  """The checkpoints of one run, newest last.

  Attributes:
    folder: holds one sub-folder per step.
  """

  def __init__(self, folder: str | Path, *, keep: int = 1):
    """Opens `folder`, made if absent; the last `keep` steps stay on disk."""
    self.folder = Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
        self.folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        item_names=("state", "position"))

  def latest_step(self) -> int | None:
    """Returns the newest whole step, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, position: dict) -> None:
    """Begins to save; returns once the arrays are copied off the devices.

    Args:
      step: the name of the checkpoint; a step saved already is left alone.
      state: a pytree of arrays.
      position: of the data, a dict that JSON can hold.

    Raises:
      UserError: when this step, or the one before in the background, cannot be written.
    """
    if step in self._manager.all_steps():
      return
    with self._told_when_unwritten():
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)))

  def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict]:
    """Reads a step onto any mesh.

    Args:
      step: one that exists.
      shapes: the state as `jax.ShapeDtypeStruct`s.
      shardings: where each leaf goes, a tree like `shapes`.

    Returns:
      (state, position).

    Raises:
      UserError: when the stored state has other leaves or shapes.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, shardings)
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore()))
    except (ValueError, KeyError) as error:
      raise UserError(
          f"checkpoint {self.folder / str(step)} does not fit this config ({error}); use the "
          "config that it was made with, or another --workdir") from error
    return restored["state"], restored["position"]

  def close(self) -> None:
    """Waits for what is being written.

    Raises:
      UserError: when it cannot be written.
    """
    with self._told_when_unwritten():
      self._manager.wait_until_finished()
    self._manager.close()

  @contextlib.contextmanager
  def _told_when_unwritten(self):
    """Makes one line of a failed write, a full disk above all, and leaves no part of it."""
    try:
      yield
    except (ValueError, OSError) as error:  # TensorStore's errors are ValueErrors
      for part in self.folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(part, ignore_errors=True)
      newest = self.latest_step()
      reason = str(error).partition('"')[0].strip()  # TensorStore goes on with paths and sources
      again = "begins anew" if newest is None else f"goes on from step {newest}"
      raise UserError(
          f"a checkpoint cannot be written to {self.folder} ({reason}); make room there, and "
          f"the same command {again}") from error


def save_config(workdir: Path, config: Any) -> None:
  """Writes the resolved config beside the checkpoints, `config.json`."""
  text = config.to_json_best_effort(indent=2)
  (workdir / "config.json").write_text(text + "\n")


def load_config(workdir: Path) -> dict:
  """Reads what `save_config` wrote."""
  path = workdir / "config.json"
  if not path.is_file():
    raise UserError(f"{workdir} holds no config.json: it is not the --workdir of a run")
  return json.loads(path.read_text())
