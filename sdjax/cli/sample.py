"""`sdjax sample`: pictures from prompts, a few or a list of any length."""

import argparse
from pathlib import Path

from sdjax.errors import UserError

GRID = 64  # pictures of a job that grid.png shows


def parser() -> argparse.ArgumentParser:
  """Returns the flags of the command."""
  p = argparse.ArgumentParser(prog="sdjax sample", description=__doc__)
  p.add_argument("--model", required=True, metavar="DIR",
                 help="a folder in the diffusers layout, hf://owner/name, a single .safetensors, "
                 "or the --workdir of a run")
  what = p.add_mutually_exclusive_group(required=True)
  what.add_argument("--prompt", action="append", help="may be given several times")
  what.add_argument("--prompts", metavar="FILE",
                    help="a prompt a line (.txt), or .jsonl, .csv, .parquet with prompt and, where "
                    "wanted, negative_prompt, seed, steps, guidance_scale, height, width, "
                    "num_images. Killed, the same command makes the pictures that are missing")
  p.add_argument("--negative-prompt", default="", help="what to steer away from")
  p.add_argument("--weighted", action="store_true",
                 help="prompts weigh words: (word:1.2), [word], BREAK, as in A1111")
  p.add_argument("--clip-skip", type=int, default=0, metavar="N",
                 help="last layers of the text encoder not to read (0; A1111 counts one more)")
  p.add_argument("--lora", metavar="FILE[:SCALE]", action="append", default=[],
                 help="merge this into the model (scale 1); may be given several times")
  p.add_argument("--embedding", metavar="FILE", action="append", default=[],
                 help="a textual inversion, by its name in prompts; may be given several times")
  p.add_argument("--num-images", type=int, default=1, metavar="N", help="per prompt")
  p.add_argument("--steps", type=int, default=30, help="network evaluations (30)")
  p.add_argument("--guidance-scale", type=float, default=7.5, help="1 is off (7.5)")
  p.add_argument("--sampler", help="such as ddim or dpmpp_2m; the model's own by default")
  p.add_argument("--seed", type=int, default=0, help="of the first image; the next adds one")
  p.add_argument("--height", type=int, help="px; the model's own by default")
  p.add_argument("--width", type=int, help="px; the model's own by default")
  p.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (8)")
  p.add_argument("--mesh", default="data=-1", metavar="AXIS=N,…",
                 help="data=4,fsdp=2 copies the model to four groups of devices and splits it "
                 "over the two of each; by default every device has a copy")
  p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  p.add_argument("--init-latents", metavar="FILE.npy",
                 help="float32 standard normal noise [n h w c] in place of the seeds'")
  p.add_argument("--save-latents", metavar="FILE.npy", help="the final latents [n h w c]")
  p.add_argument("--out", default="pictures", metavar="DIR", help="(pictures)")
  p.add_argument("--format", default="folder", choices=("folder", "webdataset"),
                 help="of DIR: 00000.png, … or 00000.tar, … with pictures and prompts (folder)")
  p.add_argument("--shard-size", type=int, default=1000, metavar="N",
                 help="pictures per tar (1000)")
  return p


def main(argv: list[str]) -> int:
  """Makes the pictures that the flags ask for, and a grid of them."""
  flags = parser().parse_args(argv)
  lines = read_lines(flags)
  axes = read_mesh(flags.mesh)
  if flags.batch_size < 1:
    raise UserError(f"--batch-size is {flags.batch_size}; make at least 1 image at once")

  import jax
  import numpy as np

  from sdjax import prompt_list, pytrees
  from sdjax.cli import device, experiment
  from sdjax.train import partitioning
  experiment.start_processes()
  device.cache_compilations()
  device.log_to_stderr()
  mesh = partitioning.make_mesh(axes)
  sd, params = load(flags)
  job = make_job(flags, lines, sd, params)
  given = None if flags.init_latents is None else read_latents(flags.init_latents)
  check_latents(flags, given, job.wanted)
  with device.logged_compilations(), jax.set_mesh(mesh):
    # Split over "fsdp" as `configs.common` splits parameters for training.
    params = pytrees.map_paths(partitioning.placer(mesh, ((".*", "fsdp"),)), params)
    latents = prompt_list.run(
        job, sd.astype(flags.dtype), params, batch_size=flags.batch_size, init_latents=given,
        keep_latents=flags.save_latents is not None)
  if jax.process_index() == 0:
    if flags.save_latents:
      np.save(flags.save_latents, np.stack([latents[n] for n in range(len(job.wanted))]))
    print(f"{len(job.wanted)} pictures in {job.out}/; look at {show(job)}")
  return 0


def read_lines(flags: argparse.Namespace) -> list:
  """Returns the prompts as lines of `prompt_files.read`, and checks what the flags say of all."""
  from sdjax.data import prompt_files
  prompt_files.check(defaults(flags), "")
  if flags.prompt:
    return [(number, {"prompt": text}) for number, text in enumerate(flags.prompt, 1)]
  return prompt_files.read(flags.prompts)


def defaults(flags: argparse.Namespace) -> dict:
  """Returns what the flags say of every picture, by the names of `prompt_files.KINDS`."""
  names = ("negative_prompt", "seed", "steps", "guidance_scale", "height", "width", "num_images")
  return {name: getattr(flags, name) for name in names}


def read_mesh(text: str) -> dict[str, int]:
  """Reads --mesh: "data=2,fsdp=4"."""
  pairs = [pair.partition("=") for pair in text.split(",")]
  try:
    return {axis: int(size) for axis, _, size in pairs}
  except ValueError as error:
    raise UserError(f"--mesh is {text!r}; write data=4,fsdp=2, one of them may be -1") from error


def load(flags: argparse.Namespace):
  """Returns the model with what the flags merge into it, on the host."""
  from sdjax.checkpoints import lora, sources, textual_inversion
  from sdjax.cli.convert import read_scale
  sd, params = sources.load(flags.model)
  if flags.lora:
    params = lora.merge(params, [
        (lora.load(file, sd.unet, params), scale) for file, scale in map(read_scale, flags.lora)])
  if flags.embedding:
    sd, params = textual_inversion.attach(
        sd, params, [textual_inversion.load(file) for file in flags.embedding])
  return sd, params


def make_job(flags: argparse.Namespace, lines: list, sd, params):
  """Returns what is wanted, and where. Latents are exchanged as one file: such a job is anew."""
  from sdjax import prompt_list
  from sdjax.data import prompt_files
  low, high = prompt_list.SHARD_SIZES
  if not low <= flags.shard_size <= high:
    raise UserError(f"--shard-size is {flags.shard_size}; it must lie between {low} and {high}")
  side, source = sd.default_size, flags.prompts or ""
  wanted = prompt_files.expand(
      lines, defaults(flags) | {"height": flags.height or side, "width": flags.width or side},
      source)
  for one in wanted:
    try:
      sd.latent_shape(one.height, one.width)
    except UserError as error:
      raise UserError(f"{prompt_files.place(source, one.line)}{error}") from error
  settings = prompt_list.Settings(
      model=flags.model, fingerprint=prompt_list.fingerprint(sd, params), sampler=flags.sampler,
      scheduler=sd.scheduler_config.get("_class_name", ""), weighted=flags.weighted,
      clip_skip=flags.clip_skip, dtype=flags.dtype, lora=tuple(flags.lora),
      embedding=tuple(flags.embedding))
  return prompt_list.Job(
      Path(flags.out), wanted, settings,
      shard_size=flags.shard_size if flags.format == "webdataset" else None,
      restartable=bool(flags.prompts) and not (flags.init_latents or flags.save_latents))


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
