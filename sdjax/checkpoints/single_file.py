"""Whole models in one .safetensors, as CompVis and Stability released them.

A1111 and ComfyUI read these. Such a file has tensors and their names only: sizes come from the
family, which the names tell, the tokenizer is CLIP's own, and what is predicted is told by marks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import pytrees
from sdjax.checkpoints import names, single_file_names, tensors, weights
from sdjax.checkpoints.tensors import Tensor
from sdjax.data import tokenizer
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.models import presets
from sdjax.stable_diffusion import Params, StableDiffusion

# Width of the context -> the preset of that family.
FAMILIES = {768: "sd15", 1024: "sd21", 2048: "sdxl", 1280: "sdxl_refiner"}
UNET = single_file_names.PREFIXES["unet"]
# A text tower that was trained with "!" after the end: https://github.com/mlfoundations/open_clip
PADDED_WITH_ZERO = "gelu"
# ComfyUI's and A1111's marks of SDXL that predicts v, with zero terminal SNR.
MARKS = ("v_pred", "ztsnr")
# In SD2 files nothing tells 512-base from 768-v but the weights: ComfyUI's measure, which holds
# for all that were fine-tuned from either (comfy/supported_models.py, SD20.model_type).
V_MEASURED = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_DEVIATION = 0.09

# Stability's model metadata, https://github.com/Stability-AI/ModelSpec.
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base", "sdxl_refiner": "stable-diffusion-xl-v1-refiner",
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def load(
    file: str | Path,
    dtype: str | None = "float32",
    *,
    like: StableDiffusion | None = None,
    place: weights.Place | None = None,
    allow_unused: bool = False,
) -> tuple[StableDiffusion, Params]:
  """Reads a model.

  Args:
    file: .safetensors.
    dtype: of the parameters returned, "float32", "bfloat16" or "float16"; None as stored.
    like: a model of the same networks, tokenizers and schedule; None: one of `FAMILIES`.
    place, allow_unused: see `weights.read`.

  Returns:
    (sd, params), as `diffusers.load`.

  Raises:
    UserError: it is none of the families, or is broken.
  """
  file = Path(file)
  return from_tensors(file, tensors.open_file(file), tensors.metadata(file), dtype, like=like,
                      place=place, allow_unused=allow_unused)


def from_tensors(
    file: Path,
    stored: Mapping[str, Tensor],
    notes: Mapping[str, str],
    dtype: str | None,
    *,
    like: StableDiffusion | None,
    place: weights.Place | None,
    allow_unused: bool,
) -> tuple[StableDiffusion, Params]:
  """`load` of tensors that were opened already; `notes` are the header's metadata."""
  sd = like or describe(file, stored, notes)
  towers = _towers(sd, stored)
  ignored = list(single_file_names.IGNORED)
  if family(sd) == "sd2":
    # The released files have a last layer that Stable Diffusion 2 does not read.
    ignored.append(rf"^cond_stage_model\..*(resblocks|layers)\.{sd.text_encoders[0].layers}\.")
  found = {}
  for name, tensor in stored.items():
    today = names.canonical(name, ignored, single_file_names.SYNONYMS)
    if today is not None:
      found[today] = tensor
  shapes = pytrees.flatten(sd.param_shapes())
  tree = weights.read(file, found, places(sd, towers, shapes), shapes, dtype, place, allow_unused)
  return sd, tree


def save(file: str | Path, sd: StableDiffusion, params: Params) -> None:
  """Writes a model that A1111, ComfyUI and diffusers' `from_single_file` read.

  Args:
    file: .safetensors; replaced if it is there.
    sd, params: the model; each tensor is written in the dtype that it has.

  Raises:
    UserError: the networks have parts that this format has no names for.
  """
  flat = pytrees.flatten(params)
  written = weights.to_tensors(places(sd, single_file_names.TEXT[family(sd)], flat), flat)
  if sd.prediction_type == "v_prediction" and family(sd) == "sdxl":
    zero = sd.schedule.zero_terminal_snr
    written |= {mark: np.zeros(0, np.float32) for mark in MARKS[:1 + zero]}
  prediction = {ours: theirs for theirs, ours in PREDICTIONS.items()}[sd.prediction_type]
  side = sd.default_size
  tensors.write_file(Path(file), written, {
      "modelspec.sai_model_spec": "1.0.0",
      "modelspec.architecture": ARCHITECTURES[family(sd)],
      "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
      "modelspec.prediction_type": prediction,
      "modelspec.resolution": f"{side}x{side}",
  })


def family(sd: StableDiffusion) -> str:
  """Returns which of `single_file_names.TEXT` the model is of, by its networks."""
  if sd.unet.added_dim is not None:
    return "sdxl" if len(sd.text_encoders) == 2 else "sdxl_refiner"
  return "sd2" if sd.text_encoders[0].activation == PADDED_WITH_ZERO else "sd1"


def places(sd: StableDiffusion, towers: tuple, paths: Mapping[str, Any]) -> dict[str, str]:
  """Returns {our path: tensor name} of all parameters of a model.

  Args:
    sd: the model.
    towers: (prefix, whether by OpenCLIP's names) of each text encoder.
    paths: of the parameters.

  Raises:
    UserError: a parameter has no name there.
  """
  prefixes = dict(single_file_names.PREFIXES)
  tables = {"unet": single_file_names.unet(sd.unet), "vae": single_file_names.vae(sd.vae)}
  for network, text, (prefix, openclip) in zip(
      sd.text_names, sd.text_encoders, towers, strict=True):
    prefixes[network] = prefix
    tables[network] = single_file_names.openclip(text) if openclip else None
  found, nameless = {}, []
  for path in sorted(paths, key=_place_in_stack):
    network, _, inner = path.partition("/")
    name = names.to_diffusers(inner)
    theirs = name if tables[network] is None else single_file_names.rename(name, tables[network])
    if theirs is None:
      nameless.append(path)
    else:
      found[path] = prefixes[network] + theirs
  tensors.complain("the format of single files", "has no names for", nameless)
  return found


def _place_in_stack(path: str) -> int:
  module = path.split("/")[-2]
  stacked = single_file_names.STACKED
  return stacked.index(module) if module in stacked else 0


def describe(file: Path, stored: Mapping[str, Tensor], notes: Mapping[str, str]
             ) -> StableDiffusion:
  """Returns the model that a file holds.

  Raises:
    UserError: it is of none of the released sizes.
  """
  widths = {tensor.shape[1] for name, tensor in stored.items()
            if name.startswith(UNET) and name.endswith("attn2.to_k.weight")}
  if len(widths) != 1 or not widths <= FAMILIES.keys():
    known = ", ".join(f"{width} ({name})" for width, name in FAMILIES.items())
    found = " and ".join(map(str, sorted(widths))) or "absent"
    raise UserError(f"{file} is no single file of Stable Diffusion: the width of its context is "
                    f"{found}, known are {known}; for networks of your own sizes give a model "
                    "folder that it is like (sdjax convert --like)")
  width = widths.pop()
  modules = presets.preset(FAMILIES[width])
  channels = stored[f"{UNET}input_blocks.0.0.weight"].shape[1]
  prediction = _prediction_type(stored, notes, width)
  schedule = schedules.Schedule(zero_terminal_snr=MARKS[1] in stored)
  return StableDiffusion(
      unet=modules["unet"].clone(in_channels=channels), vae=modules["vae"],
      text_encoders=modules["text_encoders"],
      tokenizers=tuple(tokenizer.clip("!" if text.activation == PADDED_WITH_ZERO else
                                      tokenizer.EOS) for text in modules["text_encoders"]),
      schedule=schedule, prediction_type=prediction,
      scheduler_config=schedules.to_config(schedule, prediction),
      zeros_for_empty_prompt=FAMILIES[width] == "sdxl")


def _prediction_type(stored: Mapping[str, Tensor], notes: Mapping[str, str], width: int) -> str:
  spec = notes.get("modelspec.prediction_type")
  if spec in PREDICTIONS:
    return PREDICTIONS[spec]
  if MARKS[0] in stored:
    return "v_prediction"
  if FAMILIES[width] == "sd21" and V_MEASURED in stored:
    deviation = np.asarray(stored[V_MEASURED]).astype(jnp.float32).std()
    return "v_prediction" if deviation > V_DEVIATION else "epsilon"
  return "epsilon"


def _towers(sd: StableDiffusion, stored: Mapping[str, Tensor]) -> tuple[tuple[str, bool], ...]:
  """Where the text towers of this file are: an SD2 may have its by the names of SD1."""
  first, *_ = alike = single_file_names.TEXT["sd1"]
  if family(sd) == "sd2" and f"{first[0]}final_layer_norm.weight" in stored:
    return alike
  return single_file_names.TEXT[family(sd)]
