"""Model folders in the layout of diffusers' Stable Diffusion pipelines, read and written.

  model_index.json
  scheduler/scheduler_config.json
  tokenizer/vocab.json merges.txt tokenizer_config.json        (and tokenizer_2/)
  text_encoder/config.json model.safetensors                   (and text_encoder_2/)
  unet/config.json diffusion_pytorch_model.safetensors
  vae/config.json diffusion_pytorch_model.safetensors

Folders of single networks (ControlNets, adapters, image encoders, pixel UNets) are read and written
by `load_network` and `save_network`.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sdjax import pytrees
from sdjax.checkpoints import (
  adapter_configs,
  clip_configs,
  model_configs,
  names,
  tensors,
  unet_configs,
  weights,
)
from sdjax.data import tokenizer
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.models.adapter import T2IAdapter
from sdjax.models.clip import CLIPVision
from sdjax.models.controlnet import ControlNet
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.stable_diffusion import Params, StableDiffusion

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}
# (whether SDXL, channels of the UNet's input) -> the pipeline that a folder is written for. Any
# pipeline is read that has these networks.
PIPELINES = {
    (False, 4): "StableDiffusionPipeline",
    (False, 5): "StableDiffusionDepth2ImgPipeline",
    (False, 7): "StableDiffusionUpscalePipeline",
    (False, 8): "StableDiffusionInstructPix2PixPipeline",
    (False, 9): "StableDiffusionInpaintPipeline",
    (True, 4): "StableDiffusionXLPipeline",
    (True, 8): "StableDiffusionXLInstructPix2PixPipeline",
    (True, 9): "StableDiffusionXLInpaintPipeline",
}
REFINER, GUIDED = "StableDiffusionXLImg2ImgPipeline", "LatentConsistencyModelPipeline"
# Parts of those pipelines that sdjax has no network for: named, and left out.
ABSENT = ("feature_extractor", "image_encoder", "safety_checker")


def load(
    folder: str | Path,
    dtype: str | None = "float32",
    *,
    place: weights.Place | None = None,
    allow_unused: bool = False,
) -> tuple[StableDiffusion, Params]:
  """Reads a model folder.

  Args:
    folder: holds model_index.json.
    dtype: of the parameters returned, "float32", "bfloat16" or "float16"; None as stored.
    place, allow_unused: see `weights.read`; paths begin with the network ("unet/…").

  Returns:
    (sd, params): modules that compute in float32, and {"unet", "vae", "text_encoder", …} of numpy
    arrays on the host, or of what `place` made of them.

  Raises:
    UserError: something is missing, broken, or is no Stable Diffusion.
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
    params |= _read(Path(folder) / network, network, STEMS[network], tree, dtype, place,
                    allow_unused)
  return sd, params


def _read(folder: Path, network: str, stem: str, shapes: Any, dtype: str | None,
          place: weights.Place | None, allow_unused: bool) -> Params:
  """Returns {network: tree} of one network's folder."""
  found = {}
  for name, tensor in tensors.open_folder(folder, stem).items():
    if (today := names.canonical(name)) is not None:
      found[today] = tensor
  flat = pytrees.flatten({network: shapes})
  places = {path: names.to_diffusers(path.partition("/")[2]) for path in flat}
  return weights.read(folder, found, places, flat, dtype, place, allow_unused)


def describe(folder: str | Path) -> StableDiffusion:
  """Reads all of a model folder but its weights. Raises as `load`."""
  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(f"there is no model folder {folder}")
  index = read_json(folder / "model_index.json")
  present = [name for name in ("text_encoder", "text_encoder_2")
             if isinstance(index.get(name), list) and index[name][0]]
  lacking = [name for name in ("unet", "vae", "scheduler") if not index.get(name)]
  if lacking or not present or "StableDiffusion3" in str(index.get("_class_name")):
    raise UserError(f"{folder / 'model_index.json'} is of a {index.get('_class_name')} "
                    f"{'without ' + ', '.join(lacking) if lacking else ''}; sdjax reads Stable "
                    "Diffusion 1, 2 and XL")
  scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
  if scheduler.get("trained_betas") is not None:
    raise UserError(f"{folder}: the scheduler has trained_betas; sdjax reads schedules by name")
  texts = tuple(clip_configs.read_text_encoder(read_json(folder / name / "config.json"), name)
                for name in present)
  tokenizers = tuple(tokenizer.load(folder / name.replace("text_encoder", "tokenizer"))
                     for name in present)
  for text, words in zip(texts, tokenizers, strict=True):
    if words.vocab_size > text.vocab_size or words.length > text.max_length:
      raise UserError(
          f"{folder}: the tokenizer makes {words.length} tokens of {words.vocab_size} ids, the "
          f"text encoder reads {text.max_length} of {text.vocab_size}; they belong to different "
          "models")
  return StableDiffusion(
      unet=unet_configs.read(read_json(folder / "unet" / "config.json")),
      vae=model_configs.read_vae(read_json(folder / "vae" / "config.json")),
      text_encoders=texts,
      tokenizers=tokenizers,
      schedule=schedules.from_config(scheduler),
      prediction_type=scheduler.get("prediction_type", "epsilon"),
      zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", False)),
      scheduler_config=scheduler)


def save(folder: str | Path, sd: StableDiffusion, params: Params) -> None:
  """Writes a model folder that diffusers reads too; whole or not at all.

  Args:
    folder: made; a model folder already there is replaced, anything else is not.
    sd: brings the configs, the tokenizers and the scheduler.
    params: {"unet", "vae", "text_encoder", …}, each tensor written in the dtype that it has.

  Raises:
    UserError: `folder` exists and is no model folder.
  """
  scheduler = sd.scheduler_config or schedules.to_config(sd.schedule, sd.prediction_type)
  with whole_folder(Path(folder)) as new:
    write_json(new / "model_index.json", _index(sd, scheduler))
    write_json(new / "scheduler" / "scheduler_config.json", scheduler)
    write_json(new / "unet" / "config.json", unet_configs.write(sd.unet))
    write_json(new / "vae" / "config.json", model_configs.write_vae(sd.vae, sd.default_size))
    for name, text, words in zip(sd.text_names, sd.text_encoders, sd.tokenizers, strict=True):
      write_json(new / name / "config.json", clip_configs.write_text_encoder(text, words))
      words.save(new / name.replace("text_encoder", "tokenizer"))
    for network in ("unet", "vae", *sd.text_names):
      _write(new / network, network, STEMS[network], params[network])


def _index(sd: StableDiffusion, scheduler: dict) -> dict:
  if sd.size_numbers == 5:
    pipeline = REFINER
  elif sd.unet.guidance_dim is not None:
    pipeline = GUIDED
  else:
    pipeline = PIPELINES.get((sd.is_xl, sd.unet.in_channels), PIPELINES[sd.is_xl, 4])
  index = {
      "_class_name": pipeline,
      "_diffusers_version": "0.30.0",
      "scheduler": ["diffusers", scheduler["_class_name"]],
      "unet": ["diffusers", "UNet2DConditionModel"],
      "vae": ["diffusers", "AutoencoderKL"],
      **{name: [None, None] for name in ABSENT},
  }
  if sd.is_xl:
    index |= {"force_zeros_for_empty_prompt": sd.zeros_for_empty_prompt,
              "text_encoder": [None, None], "tokenizer": [None, None]}
    del index["safety_checker"]
  else:
    index["requires_safety_checker"] = False
  if pipeline == REFINER:
    index["requires_aesthetics_score"] = True
  for name, text in zip(sd.text_names, sd.text_encoders, strict=True):
    index[name] = ["transformers", clip_configs.class_name(text)]
    index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
  return index


def _write(folder: Path, network: str, stem: str, tree: Any) -> None:
  flat = pytrees.flatten(tree)
  places = {path: names.to_file(network, path) for path in flat}
  tensors.write_folder(folder, stem, weights.to_tensors(places, flat))


# Class -> (what its file is called like, stem of the weights, reader of its config.json).
NETWORKS = {
    "AutoencoderKL": ("vae", "diffusion_pytorch_model", model_configs.read_vae),
    "CLIPVisionModelWithProjection": ("image_encoder", "model", clip_configs.read_image_encoder),
    "ControlNetModel": ("controlnet", "diffusion_pytorch_model", unet_configs.read),
    "T2IAdapter": ("adapter", "diffusion_pytorch_model", adapter_configs.read_adapter),
    "UNet2DConditionModel": ("unet", "diffusion_pytorch_model", unet_configs.read),
    "UNet2DModel": ("unet", "diffusion_pytorch_model", unet_configs.read),
}
WRITERS = {
    AutoencoderKL: model_configs.write_vae,
    CLIPVision: clip_configs.write_image_encoder,
    ControlNet: unet_configs.write,
    T2IAdapter: adapter_configs.write_adapter,
    UNet: unet_configs.write,
}


def load_network(folder: str | Path, dtype: str | None = "float32", *,
                 place: weights.Place | None = None) -> tuple[Any, Any]:
  """Reads the folder of one network.

  Args:
    folder: holds the config.json of one of `NETWORKS`, and its weights.
    dtype, place: as in `load`.

  Returns:
    (module, params).

  Raises:
    UserError: as `load`.
  """
  folder = Path(folder)
  config = read_json(folder / "config.json")
  network, stem, read = networks_entry(folder, config)
  module = read(config)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())["params"]
  return module, _read(folder, network, stem, shapes, dtype, place, False)[network]


def save_network(folder: str | Path, module: Any, params: Any) -> None:
  """The inverse of `load_network`; files there are replaced."""
  config = WRITERS[type(module)](module)
  network, stem, _ = NETWORKS[class_name(config)]
  write_json(Path(folder) / "config.json", config)
  _write(Path(folder), network, stem, params)


def networks_entry(folder: Path, config: dict) -> tuple:
  """Returns the row of `NETWORKS` for the config.json of `folder`, or raises UserError."""
  name = class_name(config)
  if name not in NETWORKS:
    raise UserError(f"{folder / 'config.json'} is of a {name}; sdjax reads {', '.join(NETWORKS)}")
  return NETWORKS[name]


def class_name(config: dict) -> str | None:
  """Returns whose config it is: diffusers writes a name, transformers a list of one."""
  return config.get("_class_name") or (config.get("architectures") or [None])[0]


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
