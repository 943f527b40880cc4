"""The training loop: draw a batch, step, and log what the step before has found.

A run is a function of its config and its files. Everything that it carries is in the checkpoint,
so that one killed at any moment and started again by the same command ends with the same numbers.
"""

import contextlib
import dataclasses
import functools
import logging
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from sdjax import pictures, pytrees
from sdjax.checkpoints import diffusers, train_state
from sdjax.data import peek, shards
from sdjax.data.pipeline import Pipeline
from sdjax.data.prefetch import Prefetch
from sdjax.diffusion import objectives
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion
from sdjax.train import losses, metrics, model, optimizer, partitioning, preview, state, step

log = logging.getLogger("sdjax")
TASKS = ("autoencoder", "diffusion")


@dataclasses.dataclass(frozen=True)
class Run:
  """What does not change while a run goes on."""
  config: Any
  workdir: Path
  index: shards.Index
  pipeline: Pipeline
  sd: StableDiffusion
  tx: Any
  shapes: state.TrainState
  shardings: state.TrainState


def train(config: Any, workdir: str | Path) -> Path:
  """Trains from the newest checkpoint of `workdir`, or from the start, to the end.

  Args:
    config: as `configs.common.defaults` has it.
    workdir: gets checkpoints/, metrics.jsonl, tensorboard/, previews/, config.json and, at the
      end, model/, a diffusers folder with the averaged parameters.

  Returns:
    The folder of the finished model.

  Raises:
    UserError: for data, a mesh, a model or a checkpoint that do not fit the config.
  """
  if "://" in str(workdir):
    raise UserError(f"--workdir {workdir} is a URL; give a folder that every host sees, such as "
                    "the bucket's mount point")
  workdir = Path(workdir)
  mesh = partitioning.make_mesh(config.mesh.to_dict())
  with jax.set_mesh(mesh):
    run, params = prepare(config, workdir, mesh)
    with contextlib.closing(
        train_state.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)) as saved:
      now, start = begin(run, params, saved)
      now = steps(run, mesh, now, start, saved)
      return export(run, now)


def prepare(config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> tuple[Run, Params]:
  """Reads the data's index, builds the model and decides where each array goes."""
  if config.task not in TASKS:
    raise UserError(f"config.task {config.task!r} is not known; choose one of {TASKS}")
  if config.total_steps < 1:
    raise UserError(f"config.total_steps is {config.total_steps}; train for at least 1 step")
  index = shards.build_index(config.data.urls)
  sd, params = model.build(config, index)
  side = config.data.resolution
  if config.task == "autoencoder" and index.kind == "moments":
    raise UserError("these shards hold latents; an autoencoder trains on images")
  pipeline = Pipeline(
      index, batch_size=config.data.batch_size, seed=config.seed, size=(side, side),
      tokenize=sd.tokenize if config.task == "diffusion" else None,
      caption_dropout=config.data.caption_dropout, random_crop=config.data.random_crop,
      flip=config.data.random_flip)
  tx = optimizer.make(config.optimizer, config.total_steps)
  shapes = state.shapes(*model.split(params, config.trainable), tx)
  shardings = partitioning.shardings(shapes, mesh, config.partition)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    train_state.save_config(workdir, config)
  moving = pytrees.count(shapes.params)
  log.info("%s model: %s parameters, %s of them training; %s samples; mesh %s", config.task,
           f"{pytrees.count(params):,}", f"{moving:,}", f"{index.count:,}", dict(mesh.shape))
  return Run(config, workdir, index, pipeline, sd, tx, shapes, shardings), params


def begin(run: Run, params: Params, saved: train_state.Checkpoints) -> tuple[state.TrainState, int]:
  """Returns the state to go on from and its step."""
  newest = saved.latest_step()
  if newest is None:
    trained, frozen = model.split(params, run.config.trainable)
    return state.create(trained, frozen, run.tx, run.config.seed, run.shardings), 0
  now, position = saved.restore(newest, run.shapes, run.shardings)
  log.info("going on from step %d of %s", newest, saved.folder)
  return now, run.pipeline.restore(position)


def loss_of(run: Run) -> losses.Loss:
  """Returns the loss that the config's task means."""
  config = run.config
  if config.task == "autoencoder":
    return losses.autoencoder(run.sd, config.kl_weight)
  chosen = dict(config.objective) | {"prediction_type": run.sd.prediction_type}
  return losses.diffusion(run.sd, objectives.Objective(run.sd.schedule, **chosen))


def steps(run: Run, mesh: jax.sharding.Mesh, now: state.TrainState, start: int,
          saved: train_state.Checkpoints) -> state.TrainState:
  """Runs the steps from `start` to the end of the config, and returns the last state."""
  config, total = run.config, run.config.total_steps
  is_main = jax.process_index() == 0
  advance = jax.jit(
      functools.partial(step.train_step, loss_fn=loss_of(run), tx=run.tx,
                        ema_decay=config.ema_decay),
      donate_argnums=0, out_shardings=(run.shardings, None))
  rate = optimizer.learning_rate(config.optimizer, total)
  draw_preview = previewer(run)
  writer = metrics.Writer(run.workdir, from_step=start, enabled=is_main)
  bar = tqdm.tqdm(total=total, initial=start, unit="step", desc=config.task, smoothing=0.05,
                  disable=not is_main, mininterval=0.5)
  with (contextlib.closing(writer), Prefetch(run.pipeline, mesh, start) as data,
        Interruption() as interrupted, bar):
    clock = Clock(start)
    previous = None
    for number in range(start, total):
      if due(number, config.preview.every_steps) and number > start:
        draw_preview(number, now, writer)
      if number > start and (due(number, config.checkpoint.every_steps) or interrupted.asked):
        saved.save(number, now, data.position())
      if interrupted.asked:
        raise KeyboardInterrupt
      with clock.waiting():
        batch = next(data)
      now, found = advance(now, batch)
      # Reading a step's numbers waits for it; the step before is done while this one runs.
      if previous is not None and due(number, config.log_every_steps):
        report(number, previous, rate, clock, run, writer, bar)
      previous = found
      bar.update()
    if previous is not None:
      report(total, previous, rate, clock, run, writer, bar)
      saved.save(total, now, data.position())
      draw_preview(total, now, writer)
  return now


def due(number: int, every_steps: int) -> bool:
  """Whether something that happens every so many steps happens after `number` of them."""
  return every_steps > 0 and number % every_steps == 0


def report(number: int, found: dict[str, jax.Array], rate: Any, clock: "Clock", run: Run,
           writer: metrics.Writer, bar: tqdm.tqdm) -> None:
  """Writes the numbers of update `number`."""
  values = {name: float(value) for name, value in jax.device_get(found).items()}
  if not np.isfinite(values["loss"]):
    raise UserError(
        f"the loss is {values['loss']} at step {number}; lower config.optimizer.learning_rate, "
        "raise warmup_steps, or resume from an earlier checkpoint")
  values["learning_rate"] = float(rate(number - 1))
  values |= clock.lap(number, run.config.data.batch_size)
  values["skipped_samples"] = float(run.pipeline.counters.total())
  writer.scalars(number, values)
  bar.set_postfix_str(f"loss {values['loss']:.3f}  {values['images_per_s']:.0f} images/s",
                      refresh=False)


def previewer(run: Run):
  """Returns (step, state, writer) -> None, which draws what the average can do by now."""
  config = run.config.preview
  side = run.config.data.resolution
  if config.every_steps == 0:
    return lambda *_: None
  if run.config.task == "autoencoder":
    originals = peek.first_images(run.index, config.count, side)
    draw = lambda params: preview.autoencoder(run.sd, params, originals)
  else:
    prompts = list(config.prompts)[: config.count] or [
        captions[0] for captions in peek.first_captions(run.index, config.count)]
    draw = lambda params: preview.diffusion(config, run.sd, params, side, prompts)

  def draw_and_write(number, now, writer):
    grid = draw(now.frozen | now.ema)
    if jax.process_index() == 0:
      pictures.save_png(run.workdir / "previews" / f"{number:07d}.png", grid)
      writer.picture(number, "preview", grid)
  return draw_and_write


def export(run: Run, now: state.TrainState) -> Path:
  """Writes the averaged parameters as a diffusers folder, `workdir`/model."""
  sd, params = run.sd.astype("float32"), model.to_host(now.frozen | now.ema)
  if run.config.task == "autoencoder":
    sd, params = model.standardize(sd, params, run.index, run.config.data.resolution)
  folder = run.workdir / "model"
  if jax.process_index() == 0:
    diffusers.save(folder, sd, params)
  return folder


class Clock:
  """Measures images per second and the share of time spent waiting for data."""

  def __init__(self, number: int):
    self._began, self._number, self._waited_s = time.monotonic(), number, 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Times one wait for data."""
    began = time.monotonic()
    yield
    self._waited_s += time.monotonic() - began

  def lap(self, number: int, batch_size: int) -> dict[str, float]:
    """Returns what happened since the last lap, and begins another."""
    elapsed = max(time.monotonic() - self._began, 1e-9)
    images = (number - self._number) * batch_size
    lap = {"images_per_s": images / elapsed, "data_wait_share": self._waited_s / elapsed}
    self._began, self._number, self._waited_s = time.monotonic(), number, 0.0
    return lap


class Interruption:
  """Turns Ctrl-C into a wish: the loop saves at the next step, then stops.

  A second Ctrl-C stops at once. With several processes the default handler stays: they would
  save at different steps.
  """
  asked = False

  def __enter__(self):
    self._before = signal.getsignal(signal.SIGINT)
    if jax.process_count() == 1:
      with contextlib.suppress(ValueError):  # signals belong to the main thread
        signal.signal(signal.SIGINT, self._ask)
    return self

  def _ask(self, *_):
    self.asked = True
    signal.signal(signal.SIGINT, self._before)

  def __exit__(self, *_):
    with contextlib.suppress(ValueError):
      signal.signal(signal.SIGINT, self._before)
