"""Model folders in the layout of diffusers' `StableDiffusionPipeline`, read and written.

  model_index.json
  scheduler/scheduler_config.json
  tokenizer/vocab.json merges.txt tokenizer_config.json
  text_encoder/config.json model.safetensors
  unet/config.json diffusion_pytorch_model.safetensors
  vae/config.json diffusion_pytorch_model.safetensors
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sdjax import pytrees
from sdjax.checkpoints import model_configs, names
from sdjax.data import tokenizer
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion

PIPELINE = "StableDiffusionPipeline"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
# safetensors' name of a dtype -> numpy's. Others (integers, float8) are no parameters of ours.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHOWN = 8  # tensor names in an error


def load(folder: str | Path, dtype: str | None = "float32") -> tuple[StableDiffusion, Params]:
  """Reads a model folder.

  Args:
    folder: holds model_index.json.
    dtype: of the parameters returned, "float32", "bfloat16" or "float16"; None as stored.

  Returns:
    (sd, params): modules that compute in float32, and {"unet", "vae", "text_encoder"} of numpy
    arrays on the host.

  Raises:
    UserError: something is missing, broken, or is none of Stable Diffusion 1 and 2.
  """
  sd = describe(folder)
  try:
    shapes = sd.param_shapes()
  except (ValueError, TypeError, ZeroDivisionError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(f"{folder}: config.json describes networks that cannot be built: {reason}"
                    ) from error
  params = {}
  for network, tree in shapes.items():
    file = Path(folder) / network / WEIGHTS[network]
    params[network] = read_tensors(file, pytrees.flatten(tree), dtype)
  return sd, params


def describe(folder: str | Path) -> StableDiffusion:
  """Reads all of a model folder but its weights. Raises as `load`."""
  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(f"there is no model folder {folder}")
  pipeline = read_json(folder / "model_index.json").get("_class_name")
  if pipeline != PIPELINE:
    raise UserError(f"{folder / 'model_index.json'} is of a {pipeline}; sdjax reads {PIPELINE}")
  scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
  if scheduler.get("trained_betas") is not None:
    raise UserError(f"{folder}: the scheduler has trained_betas; sdjax reads schedules by name")
  text_encoder = model_configs.read_text_encoder(read_json(folder / "text_encoder" / "config.json"))
  words = tokenizer.load(folder / "tokenizer")
  if words.vocab_size > text_encoder.vocab_size or words.length > text_encoder.max_length:
    raise UserError(
        f"{folder}: the tokenizer makes {words.length} tokens of {words.vocab_size} ids, the text "
        f"encoder reads {text_encoder.max_length} of {text_encoder.vocab_size}; they belong to "
        "different models")
  return StableDiffusion(
      unet=model_configs.read_unet(read_json(folder / "unet" / "config.json")),
      vae=model_configs.read_vae(read_json(folder / "vae" / "config.json")),
      text_encoders=(text_encoder,),
      tokenizers=(words,),
      schedule=schedules.from_config(scheduler),
      prediction_type=scheduler.get("prediction_type", "epsilon"),
      scheduler_config=scheduler)


def save(folder: str | Path, sd: StableDiffusion, params: Params) -> None:
  """Writes a model folder that diffusers reads too; whole or not at all.

  Args:
    folder: made; a model folder already there is replaced, anything else is not.
    sd: brings the configs, the tokenizer and the scheduler.
    params: {"unet", "vae", "text_encoder"}, each written in the dtype that it has.

  Raises:
    UserError: `folder` exists and is no model folder.
  """
  scheduler = sd.scheduler_config or schedules.to_config(sd.schedule, sd.prediction_type)
  text_encoder, words = sd.text_encoders[0], sd.tokenizers[0]
  index = {
      "_class_name": PIPELINE,
      "_diffusers_version": "0.30.0",
      "feature_extractor": [None, None],
      "image_encoder": [None, None],
      "requires_safety_checker": False,
      "safety_checker": [None, None],
      "scheduler": ["diffusers", scheduler["_class_name"]],
      "text_encoder": ["transformers", "CLIPTextModel"],
      "tokenizer": ["transformers", "CLIPTokenizer"],
      "unet": ["diffusers", "UNet2DConditionModel"],
      "vae": ["diffusers", "AutoencoderKL"],
  }
  side_px = sd.unet.sample_size * sd.vae.downsampling
  with whole_folder(Path(folder)) as new:
    write_json(new / "model_index.json", index)
    write_json(new / "scheduler" / "scheduler_config.json", scheduler)
    write_json(new / "unet" / "config.json", model_configs.write_unet(sd.unet))
    write_json(new / "vae" / "config.json", model_configs.write_vae(sd.vae, side_px))
    write_json(new / "text_encoder" / "config.json",
               model_configs.write_text_encoder(text_encoder, words))
    words.save(new / "tokenizer")
    for network, file in WEIGHTS.items():
      write_tensors(new / network / file, pytrees.flatten(params[network]),
                    names.PREFIXES.get(network, ""))


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Returns {tensor name: (dtype as in `DTYPES`, shape)} of a safetensors file, in order of name.

  Raises:
    UserError: the file is missing or is not safetensors.
  """
  with _opened(file) as tensors:
    slices = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_tensors(file: Path, shapes: dict[str, Any], dtype: str | None) -> dict:
  """Reads one network.

  Args:
    file: safetensors, by diffusers' names.
    shapes: {path: leaf with a shape} of all parameters that must be there, and no others.
    dtype: to cast to; None as stored.

  Returns:
    The tree of parameters.

  Raises:
    UserError: tensors are missing, unknown, of another shape, or no longer finite in `dtype`.
  """
  stored = read_header(file)
  place = {names.canonical(name): name for name in stored if names.canonical(name) is not None}
  wanted = {names.to_diffusers(path): path for path in shapes}
  _complain(file, "lacks", wanted.keys() - place.keys())
  _complain(file, "has unknown", [place[name] for name in place.keys() - wanted.keys()])
  _complain(file, "has, of another shape than config.json says,", [
      place[name] for name, path in wanted.items()
      if stored[place[name]][1] != names.shape_to_torch(path, shapes[path].shape)])
  _complain(file, "has, of a dtype other than floats of 16 to 64 bits,", [
      place[name] for name in wanted if stored[place[name]][0] not in DTYPES])

  flat, overflown = {}, []
  with _opened(file) as tensors:
    for name, path in wanted.items():
      array = names.array_from_torch(path, tensors.get_tensor(place[name]))
      flat[path] = array if dtype is None else cast(array, dtype)
      if flat[path].dtype.itemsize < array.dtype.itemsize and not _as_finite(array, flat[path]):
        overflown.append(place[name])
  _complain(file, f"has, too large for {dtype} (bfloat16 or float32 would hold them),", overflown)
  return pytrees.unflatten(flat)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
  """Returns a host array as "float32", "bfloat16" or "float16"; what is too large becomes inf."""
  with np.errstate(over="ignore"):
    return array.astype(jnp.dtype(dtype), copy=False)


def _as_finite(before: np.ndarray, after: np.ndarray) -> bool:
  finite = np.isfinite(after)
  return bool(finite.all()) or bool((finite == np.isfinite(before)).all())


def write_tensors(file: Path, flat: dict[str, Any], prefix: str) -> None:
  """Writes parameters {path: array} under diffusers' names, each after `prefix`."""
  file.parent.mkdir(parents=True, exist_ok=True)
  tensors = {prefix + names.to_diffusers(path): names.array_to_torch(path, np.asarray(leaf))
             for path, leaf in flat.items()}
  try:
    # Without this mark transformers refuses the file.
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  except safetensors.SafetensorError as error:  # not an OSError, even when the disk is full
    raise UserError(f"{file} cannot be written ({error}); make room, or choose another folder"
                    ) from error


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safetensors.safe_open]:
  if not file.is_file():
    raise UserError(f"there is no file {file}; sdjax reads models with safetensors weights")
  try:
    tensors = safetensors.safe_open(file, framework="numpy")
  except safetensors.SafetensorError as error:
    raise UserError(f"{file} is broken or not safetensors ({error}); copy it again") from error
  with tensors as opened:
    yield opened


def _complain(file: Path, what: str, tensors) -> None:
  if tensors := sorted(tensors):
    more = f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
    raise UserError(f"{file} {what} {len(tensors)} tensors: {', '.join(tensors[:SHOWN])}{more}")


def read_json(file: Path) -> dict:
  """Reads a JSON object.

  Raises:
    UserError: there is no such file, or something else is in it.
  """
  if not file.is_file():
    raise UserError(f"there is no file {file}; a model folder in the layout of diffusers has it")
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is not JSON ({error}); copy it again") from error
  if not isinstance(value, dict):
    raise UserError(f"{file} holds no JSON object; copy it again")
  return value


def write_json(file: Path, value: dict) -> None:
  """Writes a JSON object, in folders made as needed."""
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
  """Yields a new folder that becomes `folder` when the block ends well, and vanishes otherwise.

  Raises:
    UserError: `folder` exists and holds something else than a model.
  """
  if folder.exists() and not (folder / "model_index.json").is_file() and (
      not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"{folder} exists and is not a model folder; choose another name")
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
    new, old = Path(temporary) / "new", Path(temporary) / "old"
    new.mkdir()
    yield new
    if folder.exists():
      folder.rename(old)
    try:
      new.rename(folder)
    except OSError:
      if old.exists():
        old.rename(folder)
      raise
