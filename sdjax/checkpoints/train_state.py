"""Checkpoints of a run: state, position in the data, config and versions, as one step.

  checkpoints/
    2000/              one step
      checkpoint.json    written last: position, config, versions, digests, all files (records.py)
      d/, _METADATA, …   the arrays, as Orbax writes them
    1000.corrupt/      a step that could not be used, put aside
    best               the number of a step that stays
    saved              says that steps have been finished here

A step is written in the background and is whole when it has its record. It can be read onto any
mesh by any number of processes; what was read is compared with the digests that were taken on the
devices, for Orbax gives back flipped bits without a word. Process 0 alone looks at the folder, and
the others do what it found. This module and `writing` alone know Orbax.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sdjax import __version__, files, pytrees
from sdjax.checkpoints import agreement, digests, records, writing
from sdjax.errors import Gone, UserError

log = logging.getLogger("sdjax")
# Keys of the config that a run may go on with another value of, as regexes of how they begin.
CHANGEABLE = (
    r"total_steps$", r"log_every_steps$", r"checkpoint\.", r"preview\.", r"evaluation\.",
    r"mesh\.", r"partition$", r"remat$", r"data\.urls$", r"data\.strict$",
    r"data\.max_bad_share$", r"resume_changed$", r"validation\.", r"watchdog_s$",
    r"max_skipped$", r"wandb_project$", r"accumulate$")
SAVED, BEST = "saved", "best"
READ_ERRORS = (*writing.ERRORS, KeyError, TypeError)
LAST_WAIT_S = 600.0


class Checkpoints:
  """The checkpoints of one run. Every process makes one, and calls the same methods of it.

  Attributes:
    folder: holds one sub-folder per step.
    failed_saves: how many steps could not be written, so far, on process 0; others may learn of
      the last one late.
  """

  def __init__(self, folder: str | Path, *, keep: int = 1, keep_every: int = 0):
    """Opens `folder`, made if absent.

    Args:
      folder: seen by all processes.
      keep: so many steps stay, the newest; at least 1.
      keep_every: steps that it divides stay for ever; 0: none.

    Raises:
      UserError: for numbers out of range.
    """
    if keep < 1 or keep_every < 0:
      raise UserError(f"checkpoints: keep is {keep}, at least 1, and keep_every is {keep_every}, "
                      "at least 0")
    self.folder = Path(folder).absolute()
    self.failed_saves = 0
    self._keep, self._keep_every = keep, keep_every
    self._writing: writing.Writing | None = None
    self._newest: int | None = None
    self._lost = ""  # why the last step was not written
    if jax.process_index() == 0:
      self.folder.mkdir(parents=True, exist_ok=True)

  def latest_step(self) -> int | None:
    """Returns the newest step that was finished, None where there is none."""
    text = agreement.first(lambda: str(max(self._finished(), default="")))
    return int(text) if text else None

  def save(self, step: int, state: Any, position: dict, config: dict) -> None:
    """Begins to save; returns once the arrays are copied off the devices.

    Training goes on where a step cannot be written: it is logged as an error and counted, no part
    of it stays, older steps do, and the next call tries again.

    Args:
      step: the name of the checkpoint; the newest one, saved already, is left alone.
      state: a pytree of arrays.
      position: of the data, a dict that JSON can hold.
      config: of the run, likewise.
    """
    self._settle()
    if step == self._newest:
      return
    facts = {
        "step": step, "position": position, "config": config, "versions": versions(),
        "leaves": _describe(state), "digests": digests.of(state)}
    folder = self.folder / str(step)
    if reason := agreement.first(lambda: _make_empty(folder)):
      self._give_up(step, reason)
      return
    self._writing = writing.Writing(
        step, folder, state, finish=lambda: self._finish(step, facts),
        give_up=lambda reason: self._give_up(step, reason))

  def restore_newest(self, shapes: Any, shardings: Any,
                     config: dict | None) -> tuple[int, Any, dict] | None:
    """Reads the newest step that is whole onto any mesh.

    A damaged one becomes `N.corrupt`, and the one before is tried.

    Args:
      shapes: the state as `jax.ShapeDtypeStruct`s.
      shardings: where each leaf goes, a tree like `shapes`.
      config: of the run as it shall go on; None: it may differ from the one that was saved.

    Returns:
      (step, state, position), or None where no step was ever finished.

    Raises:
      Gone: there have been steps, and none of them is whole.
      UserError: the config has changed, or the state has other leaves or shapes.
    """
    # A sharding that does not fit raises here: later it would pass for a damaged file.
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), shapes, shardings)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, shardings)
    while facts := json.loads(agreement.first(self._find)):
      step = facts["step"]
      if config is not None:
        self._refuse_changes(step, facts["config"], config)
      self._refuse_other_leaves(step, facts["leaves"], _describe(shapes))
      state, reason = _attempt(
          ocp.StandardCheckpointHandler().restore, epath.Path(self.folder / str(step)),
          args=ocp.args.StandardRestore(target))
      # All or none of the processes take part in the digests.
      reason = agreement.any_reason(reason)
      reason = reason or digests.difference(facts["digests"], digests.of(state))
      if not reason:
        self._newest = step
        return step, state, facts["position"]
      self._put_aside(step, reason)
    self._refuse_to_begin_anew()
    return None

  def restore_params(self, step: int | None = None) -> dict[str, Any]:
    """Reads the parameters alone, on one process, for a look or for conversion.

    Args:
      step: the newest one where None.

    Returns:
      {"params": …, "ema": …} of numpy arrays.

    Raises:
      Gone: the step is not there, or damaged. It stays as it is.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise Gone(f"{self.folder} holds no checkpoint; give the folder of a run's checkpoints")
    folder = self.folder / str(step)
    try:
      facts = records.read(folder)
    except records.Damaged as error:
      raise Gone(f"{folder} cannot be used: {error}; give another step") from error
    chosen = {path: leaf for path, leaf in facts["leaves"].items()
              if path.startswith(("params/", "ema/"))}
    target = pytrees.unflatten({
        path: jax.ShapeDtypeStruct(shape, dtype) for path, (dtype, shape) in chosen.items()})
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    found, reason = _attempt(
        ocp.PyTreeCheckpointHandler().restore, epath.Path(folder),
        args=ocp.args.PyTreeRestore(target, restore_args=on_host, partial_restore=True))
    then = {path: facts["digests"][path] for path in chosen}
    if reason := reason or digests.difference(then, digests.of(found)):
      raise Gone(f"{folder} cannot be used: {reason}; give another step")
    return found

  def mark_best(self, step: int) -> None:
    """Keeps this step, too, until another one is marked."""
    if jax.process_index() == 0:
      try:
        with files.write_whole(self.folder / BEST, "w") as file:
          file.write(f"{step}\n")
      except OSError as error:
        log.error("step %d is the best, but this could not be written: %s", step, error)

  def close(self) -> None:
    """Waits for what is being written, for other processes' parts no longer than LAST_WAIT_S.

    Raises:
      UserError: the last step that was to be saved could not be written.
    """
    if self._writing is not None:
      self._lost = self._writing.error(LAST_WAIT_S)
      self._writing = None
    if self._lost:
      newest = max(self._finished(), default=None)
      again = "begins anew" if newest is None else f"goes on from step {newest}"
      raise UserError(f"the last checkpoint could not be written to {self.folder} ({self._lost}); "
                      f"make room there, and the same command {again}")

  def _settle(self) -> None:
    """Learns how the last save ended, on all processes alike."""
    if self._writing is None:
      return
    last, self._writing = self._writing, None
    reason = agreement.any_reason(last.part_error())
    if reason:
      last.stop()
    error = last.error()
    self._lost = agreement.first(lambda: reason or error)
    if not self._lost:
      self._newest = last.step
    elif jax.process_index() == 0:  # its thread has given up already
      _remove(self.folder / str(last.step))
    else:
      self._give_up(last.step, self._lost)

  def _finish(self, step: int, facts: dict) -> None:
    records.write(self.folder / str(step), facts)
    with contextlib.suppress(OSError):  # the step is whole, whatever comes of the others
      (self.folder / SAVED).touch()
      self._prune(step)

  def _prune(self, newest: int) -> None:
    whole = sorted(self._finished())
    kept = {*whole[-self._keep:], _read_number(self.folder / BEST),
            *(step for step in whole if self._keep_every and step % self._keep_every == 0)}
    for step in self._steps():
      if step < newest and step not in kept:
        _remove(self.folder / str(step))
    for aside in self.folder.glob("*.corrupt"):
      if not (aside / records.NAME).exists():  # it was never finished
        _remove(aside)

  def _give_up(self, step: int, reason: str) -> None:
    self.failed_saves += 1
    self._lost = reason
    if jax.process_count() == 1:  # others may be writing there yet
      _remove(self.folder / str(step))
    if jax.process_index() == 0:
      log.error("STEP %d IS NOT SAVED: %s. Training goes on; make room in %s, or what is lost if "
                "it stops is all after step %s", step, reason, self.folder,
                max(self._finished(), default="0"))

  def _find(self) -> str:
    """Returns the record of the newest step that seems whole, as JSON; "{}" where none does."""
    for step in sorted(self._steps(), reverse=True):
      try:
        return json.dumps(records.read(self.folder / str(step)))
      except records.Damaged as error:
        self._put_aside(step, str(error))
    return "{}"

  def _put_aside(self, step: int, reason: str) -> None:
    if jax.process_index() == 0:
      folder, aside = self.folder / str(step), self.folder / f"{step}.corrupt"
      if (folder / records.NAME).exists():
        (self.folder / SAVED).touch()
      log.error("checkpoint %s cannot be used: %s. It is now %s", folder, reason, aside.name)
      _remove(aside)
      shutil.move(folder, aside)  # copies where a folder cannot be renamed

  def _refuse_to_begin_anew(self) -> None:
    if agreement.first(lambda: "gone" if (self.folder / SAVED).exists() else ""):
      raise Gone(f"no checkpoint in {self.folder} is whole any more; bring one back from a copy, "
                 "or remove the folder to begin anew")

  def _refuse_changes(self, step: int, then: dict, now: dict) -> None:
    then, now = _flat(then), _flat(now)
    changes = [f"{key}: {then.get(key, 'absent')} → {now.get(key, 'absent')}"
               for key in sorted(then.keys() | now.keys())
               if then.get(key, _flat) != now.get(key, _flat)
               and not any(re.match(pattern, key) for pattern in CHANGEABLE)]
    if changes:
      raise UserError(
          f"the config is not the one of {self.folder / str(step)}: {'; '.join(changes)}. Take "
          "these back, give another --workdir, or say --config.resume_changed=True")

  def _refuse_other_leaves(self, step: int, then: dict, now: dict) -> None:
    for path in sorted(then.keys() | now.keys()):
      there, here = (" ".join(map(str, leaves.get(path, ["absent"]))) for leaves in (then, now))
      if there != here:
        raise UserError(
            f"checkpoint {self.folder / str(step)} does not fit this config: {path} is {there} "
            f"there and {here} here; use the config that it was made with, or another --workdir")

  def _steps(self) -> list[int]:
    return [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]

  def _finished(self) -> Iterator[int]:
    return (n for n in self._steps() if (self.folder / str(n) / records.NAME).exists())


def versions() -> dict[str, str]:
  """Returns what wrote a checkpoint."""
  return {"sdjax": __version__, "jax": jax.__version__, "orbax": ocp.__version__}


def plain(config: Any) -> dict:
  """Returns an `ml_collections.ConfigDict` as JSON can hold it."""
  return json.loads(config.to_json_best_effort())


def save_config(workdir: Path, config: Any) -> None:
  """Writes the resolved config beside the checkpoints, `config.json`."""
  text = config.to_json_best_effort(indent=2)
  (workdir / "config.json").write_text(text + "\n")


def _describe(tree: Any) -> dict[str, list]:
  """Returns {path: [dtype, shape]}, as JSON has it."""
  return {pytrees.path_of(path): [str(leaf.dtype), list(leaf.shape)]
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _flat(config: dict) -> dict[str, Any]:
  flat = pytrees.flatten(json.loads(json.dumps(config)))
  return {path.replace("/", "."): value for path, value in flat.items()}


def _make_empty(folder: Path) -> str:
  """Makes the folder of a step; returns why it could not, or ""."""
  try:
    _remove(folder)
    # Other processes wait in Orbax for process 0 to make this one, which then may have failed.
    (folder / "array_metadatas").mkdir(parents=True)
  except OSError as error:
    return writing.reason(error)
  return ""


def _attempt(restore: Callable[..., Any], *args, **options) -> tuple[Any, str]:
  """Calls Orbax; returns what was read, or why it could not be."""
  with futures.ThreadPoolExecutor(1, "restore") as pool:
    reading = pool.submit(restore, *args, **options)
  error = reading.exception()
  if type(error) is Exception:  # so Orbax wraps what TensorStore says of a part of an array
    error = error.__cause__
  if isinstance(error, READ_ERRORS):
    return None, f"Orbax cannot read it ({writing.reason(error)})"
  return reading.result(), ""


def _read_number(path: Path) -> int | None:
  text = path.read_text().strip() if path.exists() else ""
  return int(text) if text.isdigit() else None


def _remove(folder: Path) -> None:
  # Without its record first: half a folder is not taken for a step.
  with contextlib.suppress(OSError):
    (folder / records.NAME).unlink()
  shutil.rmtree(folder, ignore_errors=True)
