"""Which way of making pictures a model and what it is given ask for, and how it is asked.

Five kinds of models are told apart by what their UNet reads; `DOORS` has, for each, what may be
given beside a prompt and what is then called.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sdjax import control, denoise, edit, generate, meshes, pictures
from sdjax.cli import sample_pictures
from sdjax.cli.sample_flags import flag
from sdjax.cli.sample_models import Models
from sdjax.data.prompt_files import Line, Picture, Wanted, place
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion


class Door(NamedTuple):
  """A way of making pictures.

  Attributes:
    make: what is called.
    options: flags that it reads and others do not, with their defaults.
  """
  make: Callable
  options: dict[str, object] = {}


GIVEN = ("image", "mask", "refiner", "hires")
INPAINT = Door(edit.inpaint, {"strength": 0.75})
# Kind of model → {what is given: door}.
DOORS = {
    "text-to-image": {
        (): Door(generate.text_to_image),
        ("image",): Door(edit.image_to_image, {"strength": 0.75}),
        ("image", "mask"): INPAINT,
        ("refiner",): Door(edit.base_to_refiner, {"handoff": 0.8}),
        ("hires",): Door(edit.hires_fix, {"hires_strength": 0.5, "hires_enlarge": "latents"}),
    },
    "inpainting": {("image", "mask"): INPAINT},
    "instruct-pix2pix": {("image",): Door(edit.instruct_pix2pix, {"image_scale": 1.5})},
    "upscaling": {("image",): Door(edit.upscale, {"noise_level": 20})},
}
OPTIONS = sorted({name for doors in DOORS.values() for door in doors.values()
                  for name in door.options})
# Flags that are fields of `generate.Request`.
REQUEST = ("sampler", "weighted", "clip_skip", "guidance_rescale", "pag_scale", "tile")
ROWS = 10  # network evaluations between two moments when Ctrl-C is heard


def kind(sd: StableDiffusion) -> str:
  """Returns the key of `DOORS` for a model.

  Raises:
    UserError: there is none, as for depth.
  """
  c, labels = sd.vae.latent_channels, sd.unet.num_classes is not None
  extra = sd.unet.in_channels - c
  kinds = {(0, False): "text-to-image", (1 + c, False): "inpainting",
           (c, False): "instruct-pix2pix", (3, True): "upscaling"}
  if (extra, labels) not in kinds:
    raise UserError(f"this model's UNet reads {extra} channels beside {c} of latents"
                    f"{' and a label' if labels else ''}; sdjax sample knows models that read "
                    f"{', '.join(str(extra) for extra, _ in kinds)}")
  return kinds[extra, labels]


def choose(sd: StableDiffusion, asked: dict) -> Door:
  """Returns the door for what is given.

  Args:
    sd: the model.
    asked: {name: value}, of `GIVEN` at least.

  Raises:
    UserError: this model takes something else.
  """
  doors, given = DOORS[kind(sd)], tuple(name for name in GIVEN if asked[name])
  if given not in doors:
    raise UserError(f"this is a model for {kind(sd)}; beside prompts it takes "
                    f"{', '.join(map(_told, doors))}; {_told(given)} was given")
  return doors[given]


def _told(names: Sequence[str]) -> str:
  return " and ".join(map(flag, names)) or "nothing"


def complete(models: Models, flags: argparse.Namespace, lines: Iterable[Line], source: str,
             ) -> tuple[list[Line], dict[str, object]]:
  """Looks into the files of a list and fills in what depends on them.

  Args:
    models: they serve all lines.
    flags: what lines do not give.
    lines: of `prompt_files.read`.
    source: the file, for messages; "" if there is none.

  Returns:
    The lines with height, width, image, mask and strength, the last three None where there are
    none; and the options of all doors that they ask for, as the flags have them, or else the
    default.

  Raises:
    UserError: a line that this model cannot serve, or a flag that says nothing to any.
  """
  whole, options = [], {}

  @functools.cache
  def check(height, width, steps):
    models.sd.latent_shape(height, width)
    generate.sampler_table(models.sd, flags.sampler, steps)
    for one in controls(models, flags, (height, width)):
      control.check(one, models.sd, 1, height, width)

  for number, given in lines:
    asked = vars(flags) | given
    try:
      door = choose(models.sd, asked)
      found = _complete(models.sd, door, asked)
      if "strength" in given and "strength" not in door.options:
        raise UserError(_unread("strength", given["strength"], models.sd))
      check(found["height"], found["width"], asked["steps"])
    except UserError as error:
      raise UserError(f"{place(source, number)}{error}") from error
    whole.append((number, given | found))
    options |= door.options
  for name in OPTIONS:
    if (value := getattr(flags, name)) is not None:
      if name not in options:
        raise UserError(_unread(flag(name), value, models.sd))
      options[name] = value
  return whole, options


def _unread(name: str, value: object, sd: StableDiffusion) -> str:
  return (f"{name} is {value}, but nothing here reads it; leave it out, or give a model for "
          f"{kind(sd)} what it is for")


def _complete(sd: StableDiffusion, door: Door, asked: dict) -> dict:
  """Returns what `complete` adds to a line."""
  found = {"image": None, "mask": None, "strength": None}
  own, factor = (sd.default_size,) * 2, asked["hires"] or 1  # the first pass has the model's size
  if asked["image"]:
    found["image"], own = sample_pictures.examine(asked["image"])
    factor = enlargement(sd, door)
  if asked["mask"]:
    found["mask"], mask = sample_pictures.examine(asked["mask"])
    sample_pictures.check_mask(asked["mask"], mask, own)
  if "strength" in door.options:
    strength = asked["strength"]
    found["strength"] = door.options["strength"] if strength is None else strength
  for name, side in zip(("height", "width"), own):
    found[name] = asked[name] or nearest(factor * side, sd)
  return found


def enlargement(sd: StableDiffusion, door: Door) -> int:
  """Returns how much larger than its image a picture is."""
  return sd.vae.downsampling if door.make is edit.upscale else 1


def nearest(px: float, sd: StableDiffusion) -> int:
  """Returns the nearest side that the model makes."""
  return max(round(px / sd.size_multiple), 1) * sd.size_multiple


def first_size(sd: StableDiffusion, flags: argparse.Namespace, one: Wanted) -> tuple[int, int]:
  """Returns (H, W) px of the first pass of a picture, which has two with --hires."""
  height, width = one.height, one.width
  if flags.hires:
    return nearest(height / flags.hires, sd), nearest(width / flags.hires, sd)
  return height, width


@functools.lru_cache(maxsize=8)
def _hint(picture: Picture, size: tuple[int, int], channels: int) -> np.ndarray:
  return sample_pictures.load_hint(picture, size, channels)


def controls(models: Models, flags: argparse.Namespace, size: tuple[int, int], n: int = 1,
             ) -> list[control.Control]:
  """Returns the controls of n images of one size, (H, W) px."""
  return [
      control.Control(
          one.module, one.params, np.stack([_hint(one.picture, size, one.channels)] * n),
          scale=one.flag.scale, start=one.flag.start, end=one.flag.end, guess=flags.guess)
      for one in models.controls]


def draw(
    models: Models,
    flags: argparse.Namespace,
    options: dict[str, object],
    wanted: Sequence[Wanted],
    noise: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a batch of pictures of one size, one number of steps, one strength, by one door.

  Args:
    models: on their devices.
    flags, options: of `complete`.
    wanted: one or more.
    noise: [n h w c] in place of the seeds'; None: theirs.

  Returns:
    images [n H W 3] in [-1, 1] and latents [n h w c].
  """
  first, sd = wanted[0], models.sd
  size = first.height, first.width
  door = choose(sd, vars(flags) | {"image": first.image, "mask": first.mask})
  asked = {name: getattr(flags, name) for name in REQUEST}
  asked |= {name.removeprefix("hires_"): options[name] for name in door.options}
  if first.image:
    small = tuple(side // enlargement(sd, door) for side in size)
    asked["images"] = np.stack([sample_pictures.load_image(one.image, small) for one in wanted])
  else:
    asked |= dict(height=size[0], width=size[1])
  if first.mask:
    asked["masks"] = np.stack([sample_pictures.load_grey(one.mask, size) for one in wanted])
  if first.strength is not None:
    asked["strength"] = first.strength
  if flags.refiner:
    asked |= dict(zip(("refiner", "refiner_params"), models.refiner))
  if flags.hires:
    asked |= dict(zip(("first_height", "first_width"), first_size(sd, flags, first)))
  negative = [one.negative_prompt for one in wanted]
  return door.make(
      sd, models.params, prompts=[one.prompt for one in wanted], steps=first.steps,
      guidance_scale=[one.guidance_scale for one in wanted], seeds=[one.seed for one in wanted],
      negative_prompts=negative if any(negative) else None, init_latents=noise,
      controls=controls(models, flags, size, len(wanted)), batch_size=len(wanted),
      every_rows=flags.preview or ROWS, watch=functools.partial(watch, models, flags), **asked)


def watch(models: Models, flags: argparse.Namespace, progress: denoise.Progress) -> None:
  """Writes what the network takes the first picture of a batch to become, if --preview says so.

  It is decoded by the model's own autoencoder, as no table of colours fits all latents.
  """
  if flags.preview is None:
    return
  image = np.asarray(_decode_preview(models.sd, models.params, progress.denoised[:1], flags.tile))
  if jax.process_index() == 0:
    pictures.save_png(Path(flags.out) / "preview.png", pictures.to_uint8(image[0]))


@functools.partial(jax.jit, static_argnames=("sd", "tile"))
def _decode_preview(sd: StableDiffusion, params: Params, latents: jax.Array,
                    tile: int | None) -> jax.Array:
  return meshes.replicate(sd.decode_latents(params, latents, tile))
