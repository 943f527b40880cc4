"""The networks that the flags of `sdjax sample` ask for: a model, a second one, and controls."""

import argparse
from typing import Any, NamedTuple

from sdjax import pytrees
from sdjax.checkpoints import diffusers, lora, sources, textual_inversion
from sdjax.cli import sample_pictures
from sdjax.cli.convert import read_scale
from sdjax.cli.sample_flags import Control
from sdjax.data.prompt_files import Picture
from sdjax.errors import UserError
from sdjax.models.adapter import T2IAdapter
from sdjax.models.controlnet import ControlNet
from sdjax.stable_diffusion import Params, StableDiffusion


class Steering(NamedTuple):
  """A network that reads a picture, what of it the flags say, and that picture."""
  module: ControlNet | T2IAdapter
  params: Any
  flag: Control
  picture: Picture

  @property
  def channels(self) -> int:
    """Those of the picture."""
    adapter = isinstance(self.module, T2IAdapter)
    return self.module.in_channels if adapter else self.module.hint_channels


class Models(NamedTuple):
  """All networks: the model, one for the last steps or None, and controls."""
  sd: StableDiffusion
  params: Params
  refiner: tuple[StableDiffusion, Params] | None
  controls: tuple[Steering, ...]

  def place(self, put, dtype: str) -> "Models":
    """Returns the networks computing in `dtype`, each parameter where put(path, leaf) has it."""
    move = lambda params: pytrees.map_paths(put, params)
    return Models(
        self.sd.astype(dtype), move(self.params),
        self.refiner and (self.refiner[0].astype(dtype), move(self.refiner[1])),
        tuple(one._replace(module=one.module.clone(dtype=dtype), params=move(one.params))
              for one in self.controls))


def load(flags: argparse.Namespace) -> Models:
  """Reads them on the host, with what the flags merge into the first model.

  Raises:
    UserError: one of them is something else, or broken.
  """
  controls = tuple(map(_load_control, flags.control))  # small, and often mistyped
  sd, params = sources.load(flags.model)
  if flags.lora:
    params = lora.merge(params, [
        (lora.load(file, sd.unet, params), scale) for file, scale in map(read_scale, flags.lora)])
  if flags.embedding:
    sd, params = textual_inversion.attach(
        sd, params, [textual_inversion.load(file) for file in flags.embedding])
  return Models(sd, params, flags.refiner and sources.load(flags.refiner), controls)


def _load_control(flag: Control) -> Steering:
  picture, _ = sample_pictures.examine(flag.picture)
  module, params = diffusers.load_network(sources.locate(flag.folder))
  if not isinstance(module, ControlNet | T2IAdapter):
    raise UserError(f"--control {flag.folder} is a {type(module).__name__}; give the folder of a "
                    "ControlNet or T2I-Adapter")
  steering = Steering(module, params, flag, picture)
  if steering.channels not in (1, 3):
    raise UserError(f"--control {flag.folder} reads {steering.channels} channels; sdjax sample "
                    "gives it a grey or a coloured picture, 1 or 3")
  return steering
