"""The flags of `sdjax sample`: what they are called, how they are written, how far they go."""

import argparse
import dataclasses
import math
import re

from sdjax.errors import UserError

# Numbers that are no columns of a list of prompts: least and most.
LIMITS = {
    "image_scale": (0, 1000), "handoff": (0, 1), "hires": (1, 16),
    "hires_strength": (0, 1), "guidance_rescale": (0, 1), "pag_scale": (0, 1000),
    "tile": (8, 2**16), "preview": (1, 1000), "batch_size": (1, 2**16),
    "shard_size": (1, 10_000),  # a key has four digits for the place in its shard
}
CONTROL = re.compile(r"((?:hf://)?[^:]+):([^:]+)(?::([^:]+)(?::([^:]+):([^:]+))?)?")


def parser() -> argparse.ArgumentParser:
  """Returns the flags of the command."""
  p = argparse.ArgumentParser(prog="sdjax sample",
                              description="Pictures from prompts, a few or a list of any length.")
  p.add_argument("--model", required=True, metavar="DIR",
                 help="a folder in the diffusers layout, hf://owner/name, a single .safetensors, "
                 "or the --workdir of a run")
  _prompts(p.add_argument_group("prompts"))
  _pictures(p.add_argument_group("from pictures"))
  _passes(p.add_argument_group("two passes"))
  _sampling(p.add_argument_group("sampling"))
  _machine(p.add_argument_group("machine"))
  _output(p.add_argument_group("output"))
  return p


def _prompts(p) -> None:
  what = p.add_mutually_exclusive_group(required=True)
  what.add_argument("--prompt", action="append", help="may be given several times")
  what.add_argument("--prompts", metavar="FILE",
                    help="a prompt a line (.txt), or .jsonl, .csv, .parquet with prompt and, where "
                    "wanted, negative_prompt, seed, steps, guidance_scale, height, width, "
                    "num_images, image, mask, strength; files beside FILE. Killed, the same "
                    "command makes the pictures that are missing")
  p.add_argument("--negative-prompt", default="", help="what to steer away from")
  p.add_argument("--weighted", action="store_true",
                 help="prompts weigh words: (word:1.2), [word], BREAK, as in A1111")
  p.add_argument("--clip-skip", type=int, default=0, metavar="N",
                 help="last layers of the text encoder not to read (0; A1111 counts one more)")
  p.add_argument("--lora", metavar="FILE[:SCALE]", action="append", default=[],
                 help="merge this into the model (scale 1); may be given several times")
  p.add_argument("--embedding", metavar="FILE", action="append", default=[],
                 help="a textual inversion, by its name in prompts; may be given several times")


def _pictures(p) -> None:
  p.add_argument("--image", metavar="FILE",
                 help="start from it; models that follow instructions or enlarge read it. Cropped "
                 "in the middle to --height and --width, by default nearly its own")
  p.add_argument("--mask", metavar="FILE",
                 help="of the shape of the image: white is made anew, black is kept")
  p.add_argument("--strength", type=float, metavar="S",
                 help="the part of the steps that is run: 0 keeps the image, 1 next to nothing "
                 "(0.75)")
  p.add_argument("--image-scale", type=float, metavar="S",
                 help="how closely instruct-pix2pix keeps to the image (1.5)")
  p.add_argument("--noise-level", type=int, metavar="T",
                 help="how much an upscaler may invent, 0 to 350 (20)")
  p.add_argument("--control", metavar="DIR:FILE[:SCALE[:START:END]]", action="append", default=[],
                 help="a ControlNet or T2I-Adapter and the edges, pose, depth, … that it reads "
                 "(scale 1, from 0 to 1 of the steps); may be given several times")
  p.add_argument("--guess", action="store_true",
                 help="ControlNets alone decide what to draw; prompts may be empty")


def _passes(p) -> None:
  p.add_argument("--refiner", metavar="MODEL", help="a second model for the last steps (SDXL)")
  p.add_argument("--handoff", type=float, metavar="PART",
                 help="the part of the noise that the first model removes (0.8)")
  p.add_argument("--hires", type=float, metavar="SCALE",
                 help="make pictures this much smaller, enlarge them, and make them anew")
  p.add_argument("--hires-strength", type=float, metavar="S", help="of the second pass (0.5)")
  p.add_argument("--hires-enlarge", choices=("latents", "pixels"), help="(latents)")


def _sampling(p) -> None:
  p.add_argument("--num-images", type=int, default=1, metavar="N", help="per prompt")
  p.add_argument("--steps", type=int, default=30, help="network evaluations (30)")
  p.add_argument("--guidance-scale", type=float, default=7.5, help="1 is off (7.5)")
  p.add_argument("--guidance-rescale", type=float, default=0.0, metavar="PHI",
                 help="how far guidance keeps the contrast; 0.7 with zero terminal SNR (0)")
  p.add_argument("--pag-scale", type=float, default=0.0, metavar="S",
                 help="perturbed-attention guidance; 3 is usual (0, off)")
  p.add_argument("--sampler", help="such as ddim or dpmpp_2m; the model's own by default")
  p.add_argument("--seed", type=int, default=0, help="of the first image; the next adds one")
  p.add_argument("--height", type=int, help="px; the model's own by default, or the image's")
  p.add_argument("--width", type=int, help="px; the model's own by default, or the image's")
  p.add_argument("--init-latents", metavar="FILE.npy",
                 help="float32 standard normal noise [n h w c] in place of the seeds'")


def _machine(p) -> None:
  p.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (8)")
  p.add_argument("--tile", type=int, metavar="LATENTS",
                 help="encode and decode large pictures in tiles of this side; 64 is usual")
  p.add_argument("--mesh", default="data=-1", metavar="AXIS=N,…",
                 help="data=4,fsdp=2 copies the model to four groups of devices and splits it "
                 "over the two of each; by default every device has a copy")
  p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def _output(p) -> None:
  p.add_argument("--out", default="pictures", metavar="DIR", help="(pictures)")
  p.add_argument("--preview", type=int, metavar="N",
                 help="write DIR/preview.png after every N network evaluations")
  p.add_argument("--save-latents", metavar="FILE.npy", help="the final latents [n h w c]")
  p.add_argument("--format", default="folder", choices=("folder", "webdataset"),
                 help="of DIR: 00000.png, … or 00000.tar, … with pictures and prompts (folder)")
  p.add_argument("--shard-size", type=int, default=1000, metavar="N",
                 help="pictures per tar (1000)")


@dataclasses.dataclass(frozen=True)
class Control:
  """One --control: a folder, the picture that its network reads, and when it acts how much."""
  folder: str
  picture: str
  scale: float
  start: float
  end: float


def read(argv: list[str]) -> argparse.Namespace:
  """Reads the command line; what argparse cannot read ends the process with code 2.

  Returns:
    The flags; `mesh` is {axis: devices}, `control` a list of `Control`.

  Raises:
    UserError: a number out of its limits, or a flag that needs another.
  """
  flags = parser().parse_args(argv)
  for name, (low, high) in LIMITS.items():
    value = getattr(flags, name)
    if value is not None and not low <= value <= high:  # also refuses NaN
      raise UserError(f"{flag(name)} is {value}; it must lie between {low} and {high}")
  flags.mesh = read_mesh(flags.mesh)
  flags.control = [read_control(text) for text in flags.control]
  if flags.guess and not flags.control:
    raise UserError("--guess is for ControlNets; give one with --control DIR:FILE")
  return flags


def flag(name: str) -> str:
  """Returns a flag as it is written."""
  return "--" + name.replace("_", "-")


def read_mesh(text: str) -> dict[str, int]:
  """Reads --mesh: "data=2,fsdp=4"."""
  pairs = [pair.partition("=") for pair in text.split(",")]
  try:
    return {axis: int(size) for axis, _, size in pairs}
  except ValueError as error:
    raise UserError(f"--mesh is {text!r}; write data=4,fsdp=2, one of them may be -1") from error


def read_control(text: str) -> Control:
  """Reads --control: "canny:edges.png", "canny:edges.png:0.8" or "canny:edges.png:0.8:0:0.5"."""
  found = CONTROL.fullmatch(text)
  try:
    folder, picture, *numbers = found.groups()
    scale, start, end = (float(number or usual) for number, usual in zip(numbers, (1, 0, 1)))
  except (AttributeError, ValueError) as error:
    raise UserError(f"--control is {text!r}; write DIR:FILE, DIR:FILE:0.8 or "
                    "DIR:FILE:0.8:0:0.5") from error
  if not (math.isfinite(scale) and 0 <= start <= end <= 1):
    raise UserError(f"--control {text}: scale {scale:g} from {start:g} to {end:g} of the steps; it "
                    "must be finite, and 0 <= start <= end <= 1")
  return Control(folder, picture, scale, start, end)
