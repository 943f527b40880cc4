"""`sdjax sample`: pictures from prompts, a few or a list of any length."""

import argparse
import dataclasses
from pathlib import Path

from sdjax.cli import sample_flags
from sdjax.errors import UserError

GRID = 64  # pictures of a job that grid.png shows
# What flags say of all pictures, as the manifest and the pictures tell it.
SHARED = ("model", "sampler", "weighted", "clip_skip", "dtype", "lora", "embedding",
          "guidance_rescale", "pag_scale", "tile", "guess", "hires")


def main(argv: list[str]) -> int:
  """Makes the pictures that the flags ask for, and a grid of them."""
  flags = sample_flags.read(argv)
  lines = read_lines(flags)

  import jax
  import numpy as np

  from sdjax import prompt_list
  from sdjax.cli import device, experiment, sample_doors, sample_models
  from sdjax.train import partitioning
  experiment.start_processes()
  device.cache_compilations()
  device.log_to_stderr()
  mesh = partitioning.make_mesh(flags.mesh)
  models = sample_models.load(flags)
  source = flags.prompts or ""
  lines, options = sample_doors.complete(models, flags, lines, source)
  job = make_job(flags, lines, options, models)
  noise = None if flags.init_latents is None else read_latents(flags.init_latents)
  check_latents(flags, noise, job.wanted)
  with device.logged_compilations(), jax.set_mesh(mesh):
    # Split over "fsdp" as `configs.common` splits parameters for training.
    models = models.place(partitioning.placer(mesh, ((".*", "fsdp"),)), flags.dtype)
    latents = prompt_list.run(
        job, prompt_list.plan(models.sd, job.wanted, flags.weighted, flags.batch_size),
        lambda batch: sample_doors.draw(
            models, flags, options, [job.wanted[number] for number in batch],
            None if noise is None else noise[batch]),
        keep_latents=flags.save_latents is not None)
  if jax.process_index() == 0:
    if flags.save_latents:
      np.save(flags.save_latents, np.stack([latents[n] for n in range(len(job.wanted))]))
    print(f"{len(job.wanted)} pictures in {job.out}/; look at {show(job)}")
  return 0


def read_lines(flags: argparse.Namespace) -> list:
  """Returns the prompts as lines of `prompt_files.read`, and checks what the flags say of all."""
  from sdjax.data import prompt_files
  prompt_files.check(
      {name: getattr(flags, name) for name in prompt_files.KINDS if name != "prompt"}, "")
  if flags.prompt:
    return [(number, {"prompt": text}) for number, text in enumerate(flags.prompt, 1)]
  return prompt_files.read(flags.prompts)


def make_job(flags: argparse.Namespace, lines: list, options: dict[str, object], models):
  """Returns what is wanted, and where. Latents are exchanged as one file: such a job is anew."""
  from sdjax import prompt_list
  from sdjax.cli import infotext, sample_doors
  from sdjax.data import prompt_files
  shared = settings(flags, options, models)
  return prompt_list.Job(
      Path(flags.out), prompt_files.expand(lines, vars(flags), flags.prompts or ""), shared,
      lambda one: infotext.parameters(one, shared, sample_doors.first_size(models.sd, flags, one)),
      shard_size=flags.shard_size if flags.format == "webdataset" else None,
      restartable=bool(flags.prompts) and not (flags.init_latents or flags.save_latents))


def settings(flags: argparse.Namespace, options: dict[str, object], models) -> dict[str, object]:
  """Returns what all pictures of a job share; models are told apart by content, not by name.

  Args:
    flags, options, models: of `sample_doors.complete`.
  """
  from sdjax import pytrees
  from sdjax.cli import sample_doors

  def told(sd, params):
    return pytrees.fingerprint(params, sd.prediction_type, sd.scheduler_config)

  return {name: getattr(flags, name) for name in SHARED} | {
      name: options.get(name) for name in sample_doors.OPTIONS if name != "strength"} | {
      "fingerprint": told(models.sd, models.params),
      "scheduler": models.sd.scheduler_config.get("_class_name", ""),
      "refiner": models.refiner and {
          "model": flags.refiner, "fingerprint": told(*models.refiner)},
      "control": [
          dataclasses.asdict(one.flag) | {
              "picture": dataclasses.asdict(one.picture),
              "fingerprint": pytrees.fingerprint(one.params)} for one in models.controls]}


def read_latents(path: str):
  """Reads a float array from a .npy file; never a pickle."""
  import numpy as np
  try:
    return np.load(path, allow_pickle=False)
  except ValueError as error:
    raise UserError(f"{path} is not a .npy file of numbers ({error})") from error


def check_latents(flags: argparse.Namespace, given, wanted: list) -> None:
  """Raises UserError unless latents, where they are exchanged, fit into one array [n h w c]."""
  import numpy as np
  if not (flags.init_latents or flags.save_latents):
    return
  if len({(one.height, one.width) for one in wanted}) > 1:
    raise UserError("--init-latents and --save-latents take pictures of one size; these prompts "
                    "ask for several")
  if given is not None and given.shape[:1] != (len(wanted),):
    raise UserError(f"{flags.init_latents} has shape {list(given.shape)} for {len(wanted)} "
                    "pictures; give one latent [h w c] for each")
  if given is not None and not np.isfinite(given).all():  # of batches that come later, too
    raise UserError(f"{flags.init_latents}: the given latents hold NaN or infinity; they must be "
                    "standard normal noise")


def show(job) -> Path:
  """Draws a grid of the first pictures if they are of one size, and returns what to look at."""
  import numpy as np
  from PIL import Image

  from sdjax import pictures
  first = job.wanted[:GRID]
  if job.shard_size is not None:
    return job.out / "00000.tar"
  if len(first) == 1 or len({(one.height, one.width) for one in first}) > 1:
    return job.path(0)
  drawn = np.stack([np.asarray(Image.open(job.path(number))) for number in range(len(first))])
  pictures.save_png(job.out / "grid.png", pictures.grid(
      drawn, [one.prompt for one in first], scale=max(1, 128 // drawn.shape[1])))
  return job.out / "grid.png"
