"""The training loop: evaluate, save, draw a batch, step, and read what the step before has found.

A run is a function of its config and its files. Everything that it carries is in the checkpoint,
so that one killed at any moment and started again by the same command ends with the same numbers.
Reading a number waits for the device; so those of a step are read while the next one runs, and
the device waits for the host only where a state is evaluated or saved.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tqdm

from sdjax import pictures, pytrees
from sdjax.checkpoints import diffusers, train_state
from sdjax.data import peek
from sdjax.data.pipeline import Pipeline
from sdjax.data.prefetch import Prefetch
from sdjax.data.sources import Source
from sdjax.errors import Gone, UserError
from sdjax.stable_diffusion import Params, StableDiffusion
from sdjax.train import (
  batches,
  losses,
  metrics,
  model,
  optimizer,
  partitioning,
  preview,
  programs,
  state,
  step,
  validation,
)
from sdjax.train.goodput import Goodput
from sdjax.train.journal import Journal
from sdjax.train.stopping import Stopping
from sdjax.train.watchdog import Watchdog

log = logging.getLogger("sdjax")
TASKS = ("autoencoder", "diffusion")
Evaluate = Callable[[int, Params], dict[str, float]]  # step, averaged parameters -> numbers


@dataclasses.dataclass(frozen=True)
class Run:
  """What does not change while a run goes on."""
  config: Any
  workdir: Path
  source: Source  # the first one
  pipeline: Pipeline
  held_out: Pipeline | None  # of the validation data
  sd: StableDiffusion
  tx: Any
  shapes: state.TrainState
  shardings: state.TrainState


def train(config: Any, workdir: str | Path) -> Path:
  """Trains from the newest checkpoint of `workdir`, or from the start, to the end.

  SIGTERM or Ctrl-C, given to any process, stops all after the same step, which is saved; a second
  one ends the process at once.

  Args:
    config: as `configs.common.defaults` has it.
    workdir: gets checkpoints/, metrics.jsonl, tensorboard/, previews/, config.json and, at the
      end, model/, a diffusers folder with the averaged parameters.

  Returns:
    The folder of the finished model.

  Raises:
    UserError: for data, a mesh, a model or a checkpoint that do not fit the config.
    Diverged: for too many steps in a row whose loss or gradient is not finite.
    Gone: for data or checkpoints that were there.
    KeyboardInterrupt, SystemExit: stopped by Ctrl-C, or by SIGTERM with code 143.
  """
  goodput = Goodput()
  if "://" in str(workdir):
    raise UserError(f"--workdir {workdir} is a URL; give a folder that every host sees, such as "
                    "the bucket's mount point")
  workdir = Path(workdir)
  mesh = partitioning.make_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh):
    run, params = prepare(config, workdir, mesh)
    with contextlib.closing(train_state.Checkpoints(
        workdir / "checkpoints", keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every)) as saved:
      now, start = begin(run, params, saved)
      del params
      now = steps(run, mesh, now, start, saved, goodput)
      return export(run, now)


def prepare(config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> tuple[Run, Params]:
  """Opens the data, builds the model and decides where each array goes."""
  if config.task not in TASKS:
    raise UserError(f"config.task {config.task!r} is not known; choose one of {TASKS}")
  for name in ("total_steps", "log_every_steps"):
    if config[name] < 1:
      raise UserError(f"config.{name} is {config[name]}; give at least 1 step")
  sources, weights = batches.open_sources(config)
  if config.task == "autoencoder" and sources[0].kind == "moments":
    raise UserError("these shards hold latents; an autoencoder trains on images")
  sd, params = model.build(config, sources[0])
  pipeline = batches.make(config, sd, params, sources, weights)
  held_out = validation.open_pipeline(config, sd, params)
  tx = optimizer.make(config.optimizer, config.total_steps)
  shapes = state.shapes(*model.split(params, config.trainable), tx)
  shardings = partitioning.shardings(shapes, mesh, config.partition)
  moving = pytrees.count(shapes.params)
  log.info("%s model: %s parameters, %s of them training; %s samples; mesh %s", config.task,
           f"{pytrees.count(params):,}", f"{moving:,}", f"{pipeline.count:,}", dict(mesh.shape))
  return Run(config, workdir, sources[0], pipeline, held_out, sd, tx, shapes, shardings), params


def begin(run: Run, params: Params, saved: train_state.Checkpoints) -> tuple[state.TrainState, int]:
  """Returns the state to go on from and its step."""
  config = run.config
  found = saved.restore_newest(run.shapes, run.shardings,
                               None if config.resume_changed else train_state.plain(config))
  if jax.process_index() == 0:
    train_state.save_config(run.workdir, config)
  if found is None:
    trained, frozen = model.split(params, config.trainable)
    return state.create(trained, frozen, run.tx, config.seed, run.shardings), 0
  number, now, position = found
  log.info("going on from step %d of %s", number, saved.folder)
  return now, run.pipeline.restore(position)


def loss_of(run: Run) -> losses.Loss:
  """Returns the loss that the config's task means."""
  config = run.config
  if config.task == "autoencoder":
    return losses.autoencoder(run.sd, config.kl_weight)
  return losses.diffusion(run.sd, losses.objective_of(config, run.sd))


def steps(run: Run, mesh: jax.sharding.Mesh, now: state.TrainState, start: int,
          saved: train_state.Checkpoints, goodput: Goodput) -> state.TrainState:
  """Runs the steps from `start` to the end of the config, and returns the last state."""
  config, total = run.config, run.config.total_steps
  is_main = jax.process_index() == 0
  writer = metrics.Writer(run.workdir, from_step=start, enabled=is_main,
                          wandb_project=config.wandb_project, config=train_state.plain(config))
  evaluations = [(config.validation.every_steps, validator(run, mesh)),
                 (config.preview.every_steps, previewer(run, writer))]
  bar = tqdm.tqdm(total=total, initial=start, unit="step", desc=config.task, smoothing=0.05,
                  disable=not is_main, mininterval=0.5)
  with (contextlib.closing(writer), Prefetch(run.pipeline, mesh, start) as data,
        Stopping(mesh) as stopping, Watchdog(config.watchdog_s) as watch, bar):
    advance = programs.Programs(step.jitted(config, mesh, loss_of(run), run.tx, run.shardings),
                                config.accumulate, goodput, watch)
    goodput.go_on(writer.kept, writer.dropped)
    goodput.switch("step")
    journal = Journal(config, run.pipeline, writer, goodput, watch, bar, start)
    for number in range(start, total + 1):
      # `number` updates have been made; the device may still be at the last one.
      is_last = number == total
      stop_for = stopping.agreed() if number > start else 0
      saves = stop_for or is_last or due(number, config.checkpoint.every_steps)
      wanted = [evaluate for every_steps, evaluate in evaluations
                if due(number, every_steps, total) and not stop_for]
      if number > start and (saves or wanted):
        journal.wait(but=0)
        watch.be_patient()
        found = {}
        with goodput.doing("evaluation"):
          for evaluate in wanted:
            found |= evaluate(number, now.frozen | now.ema)
        is_best = False
        if found or due(number, config.log_every_steps, total):
          is_best = journal.write(found)
        if saves:
          with goodput.doing("save"):
            saved.save(number, now, data.position(), train_state.plain(config))
            if is_best:
              saved.mark_best(number)
        if stop_for:
          stopping.leave(stop_for, number)
      if is_last:
        return now
      with goodput.doing("step" if data.is_ready() else "data_wait"):
        batch = draw_batch(data)
      now, found, operations = advance(now, batch)
      journal.begun(found, operations)
      # Reading a step's numbers waits for it; the step before is done while this one runs.
      if journal.wait(but=1) and due(number, config.log_every_steps):
        journal.write({})


def due(number: int, every_steps: int, total: int = 0) -> bool:
  """Whether what happens every so many steps, 0 for never, and at step `total`, happens now."""
  return every_steps > 0 and (number % every_steps == 0 or number == total)


def draw_batch(data: Prefetch) -> losses.Batch:
  """Returns the next batch.

  Raises:
    Gone: it cannot be read.
  """
  try:
    return next(data)
  except OSError as error:
    where = f"{error.filename}: " if error.filename else ""
    raise Gone(f"the training data cannot be read any more ({where}{error.strerror or error}); "
               "bring it back, and the same command goes on") from error


def validator(run: Run, mesh: jax.sharding.Mesh) -> Evaluate:
  """Returns what measures the validation losses, where there is validation data."""
  if run.held_out is None:
    return lambda *_: {}
  measure = validation.make(run.config, run.sd, run.held_out, mesh)
  return lambda number, params: measure(params)


def previewer(run: Run, writer: metrics.Writer) -> Evaluate:
  """Returns what draws pictures, and writes them beside the metrics."""
  config = run.config.preview
  side = run.config.data.resolution
  if config.every_steps == 0:
    return lambda *_: {}
  if run.config.task == "autoencoder":
    originals = peek.first_images(run.source, config.count, side)
    draw = lambda params: preview.autoencoder(run.sd, params, originals)
  else:
    prompts = list(config.prompts)[: config.count] or [
        captions[0] for captions in peek.first_captions(
            run.source, config.count, run.config.data.caption_column)]
    draw = lambda params: preview.diffusion(config, run.sd, params, side, prompts)

  def draw_and_write(number, params):
    grid = draw(params)
    if jax.process_index() == 0:
      pictures.save_png(run.workdir / "previews" / f"{number:07d}.png", grid)
      writer.picture(number, "preview", grid)
    return {}
  return draw_and_write


def export(run: Run, now: state.TrainState) -> Path:
  """Writes the averaged parameters as a diffusers folder, `workdir`/model."""
  sd, params = run.sd.astype("float32"), model.to_host(now.frozen | now.ema)
  if run.config.task == "autoencoder":
    sd, params = model.standardize(sd, params, run.source, run.config.data.resolution)
  folder = run.workdir / "model"
  if jax.process_index() == 0:
    diffusers.save(folder, sd, params)
  return folder
