"""`sdjax sample`: pictures from prompts."""

import argparse
import json
from pathlib import Path

from sdjax.errors import UserError


def parser() -> argparse.ArgumentParser:
  """Returns the flags of the command."""
  p = argparse.ArgumentParser(prog="sdjax sample", description=__doc__)
  p.add_argument("--model", required=True, metavar="DIR",
                 help="a folder in the diffusers layout, hf://owner/name, a single .safetensors, "
                 "or the --workdir of a run")
  what = p.add_mutually_exclusive_group(required=True)
  what.add_argument("--prompt", action="append", help="may be given several times")
  what.add_argument("--prompts", metavar="FILE",
                    help="a prompt a line (.txt), or .jsonl with prompt, and seed or "
                    "negative_prompt if wanted")
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
  p.add_argument("--sampler", help="ddim or dpmpp_2m; the model's own by default")
  p.add_argument("--seed", type=int, default=0, help="of the first image; the next adds one")
  p.add_argument("--height", type=int, help="px; the model's own by default")
  p.add_argument("--width", type=int, help="px; the model's own by default")
  p.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (8)")
  p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  p.add_argument("--init-latents", metavar="FILE.npy",
                 help="float32 standard normal noise [n h w c] in place of the seeds'")
  p.add_argument("--save-latents", metavar="FILE.npy", help="the final latents [n h w c]")
  p.add_argument("--out", default="pictures", metavar="DIR", help="(pictures)")
  return p


def main(argv: list[str]) -> int:
  """Makes the pictures that the flags ask for, and a grid of them."""
  flags = parser().parse_args(argv)
  requests = read_requests(flags)
  if flags.batch_size < 1:
    raise UserError(f"--batch-size is {flags.batch_size}; make at least 1 image at once")

  import numpy as np

  from sdjax import generate, pictures
  from sdjax.checkpoints import lora, sources, textual_inversion
  from sdjax.cli import device
  from sdjax.cli.convert import read_scale
  device.cache_compilations()
  given = None if flags.init_latents is None else read_latents(flags.init_latents)
  sd, params = sources.load(flags.model)
  if flags.lora:
    params = lora.merge(params, [
        (lora.load(file, sd.unet, params), scale) for file, scale in map(read_scale, flags.lora)])
  if flags.embedding:
    sd, params = textual_inversion.attach(
        sd, params, [textual_inversion.load(file) for file in flags.embedding])
  sd = sd.astype(flags.dtype)
  side = sd.default_size
  negative = [request["negative_prompt"] for request in requests]
  images, latents = generate.text_to_image(
      sd, params, [request["prompt"] for request in requests], steps=flags.steps,
      guidance_scale=flags.guidance_scale, seeds=[request["seed"] for request in requests],
      height=flags.height or side, width=flags.width or side,
      negative_prompts=negative if any(negative) else None, sampler=flags.sampler,
      init_latents=given, weighted=flags.weighted, clip_skip=flags.clip_skip,
      batch_size=flags.batch_size)
  out = Path(flags.out)
  drawn = pictures.to_uint8(images)
  for number, (picture, request) in enumerate(zip(drawn, requests, strict=True)):
    pictures.save_png(out / f"{number:05d}.png", picture, request | {
        "steps": flags.steps, "guidance_scale": flags.guidance_scale,
        "sampler": flags.sampler or "of the model", "model": flags.model})
  if flags.save_latents:
    np.save(flags.save_latents, latents)
  where = out / "00000.png"
  if len(requests) > 1:
    where = out / "grid.png"
    pictures.save_png(where, pictures.grid(
        drawn[:64], [request["prompt"] for request in requests][:64],
        scale=max(1, 128 // drawn.shape[1])))
  print(f"{len(requests)} pictures in {out}/; look at {where}")
  return 0


def read_requests(flags: argparse.Namespace) -> list[dict]:
  """Returns one {"prompt", "negative_prompt", "seed"} per picture."""
  if flags.num_images < 1:
    raise UserError(f"--num-images is {flags.num_images}; make at least 1")
  lines = [{"prompt": text} for text in flags.prompt] if flags.prompt else read_prompts(
      Path(flags.prompts))
  requests = []
  for line in lines:
    for copy in range(flags.num_images):
      seed = line["seed"] + copy if "seed" in line else flags.seed + len(requests)
      requests.append({"prompt": line["prompt"], "seed": seed, "negative_prompt":
                       line.get("negative_prompt", flags.negative_prompt)})
  return requests


KINDS = {"prompt": str, "negative_prompt": str, "seed": int}


def read_prompts(path: Path) -> list[dict]:
  """Reads a prompt file.

  Raises:
    UserError: for a line that cannot be read, by its number, or a file without prompts.
  """
  if not path.is_file():
    raise UserError(f"there is no prompt file {path}")
  lines = []
  try:
    text = path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    lines.append({"prompt": line.strip()} if path.suffix != ".jsonl" else
                 _read_object(line, f"{path} line {number}"))
  if not lines:
    raise UserError(f"{path} holds no prompts; write one a line")
  return lines


def _read_object(line: str, where: str) -> dict:
  try:
    entry = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not JSON ({error.msg}); write "
                    '{"prompt": "…"}') from error
  if not isinstance(entry, dict) or "prompt" not in entry:
    raise UserError(f"{where} has no \"prompt\"; write " '{"prompt": "…"}')
  for name, value in entry.items():
    if name not in KINDS:
      raise UserError(f"{where} has {name!r}; known are {', '.join(KINDS)}")
    if not isinstance(value, KINDS[name]) or isinstance(value, bool):
      raise UserError(f"{where}: {name} is {value!r}; it must be {KINDS[name].__name__}")
  return entry


def read_latents(path: str):
  """Reads a float array from a .npy file; never a pickle."""
  import numpy as np
  try:
    return np.load(path, allow_pickle=False)
  except ValueError as error:
    raise UserError(f"{path} is not a .npy file of numbers ({error})") from error
