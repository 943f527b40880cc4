"""Where a model is, and what kind of thing stands there."""

import os
from pathlib import Path

from sdjax.checkpoints import diffusers, single_file, tensors, weights
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion

HUB = "hf://"
# Of a repository: folders of networks and tokenizers. Not single files beside them, not pickles.
WANTED = ("model_index.json", "config.json", "diffusion_pytorch_model*.safetensors*", "*/*.json",
          "*/*.txt", "*/*.safetensors")
UNWANTED = ("safety_checker/*", "*/*.fp16.*", "*/*non_ema*", "*/*flax*", "*/*openvino*")


def locate(source: str | os.PathLike) -> Path:
  """Returns the path of a source, which is downloaded first where it begins with hf://.

  Args:
    source: a path, or hf://owner/name or hf://owner/name@revision of huggingface.co.

  Raises:
    UserError: the repository is not there, or there is no network and no copy in the cache.
  """
  if not str(source).startswith(HUB):
    return Path(source)
  name, _, revision = str(source).removeprefix(HUB).partition("@")
  import huggingface_hub  # slow, and needed here only
  try:
    return Path(huggingface_hub.snapshot_download(
        name, revision=revision or None, allow_patterns=list(WANTED),
        ignore_patterns=list(UNWANTED)))
  except (OSError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(f"{source} cannot be fetched ({reason}); check the name and the network, or "
                    "give a folder on this machine") from error


def kind(path: Path) -> str:
  """Returns what stands at `path`, by its files and the names of its tensors.

  One of "model folder", "network folder", "single file", "LoRA", "textual inversion", "pickle".

  Raises:
    UserError: none of these.
  """
  if path.is_dir():
    if (path / "model_index.json").is_file():
      return "model folder"
    if (path / "config.json").is_file():
      return "network folder"
    raise UserError(f"{path} is no model folder (it has no model_index.json), no network's (no "
                    "config.json), and no run that has exported a model (no model/)")
  if not path.exists():
    raise UserError(f"there is no model {path}; give a folder that holds model_index.json, a "
                    "single .safetensors, or hf://owner/name")
  if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
    return "pickle"
  stored = tensors.open_file(path)
  if any(name.startswith(single_file.UNET) for name in stored):
    return "single file"
  if any("lora" in name for name in stored):
    return "LoRA"
  if stored and all(len(tensor.shape) <= 2 for tensor in stored.values()) and len(stored) <= 2:
    return "textual inversion"
  raise UserError(f"{path} is no model, LoRA or textual inversion that sdjax knows: its tensors "
                  f"are {', '.join(list(stored)[:tensors.SHOWN])}, …")


def exported(path: Path) -> Path:
  """Returns the model folder of a run that exported one; any other path as it is."""
  inside = path / "model"
  return inside if (inside / "model_index.json").is_file() else path


def describe(source: str | os.PathLike) -> StableDiffusion:
  """Returns the model of a source without reading its weights. Raises as `load`."""
  path = exported(locate(source))
  if kind(path) == "model folder":
    return diffusers.describe(path)
  return single_file.describe(path, tensors.open_file(path), tensors.metadata(path))


def load(
    source: str | os.PathLike,
    dtype: str | None = "float32",
    *,
    like: StableDiffusion | None = None,
    place: weights.Place | None = None,
    allow_unused: bool = False,
) -> tuple[StableDiffusion, Params]:
  """Reads a model folder, the export of a run, or a single file: see their `load`.

  Raises:
    UserError: it is something else, or broken.
  """
  path = exported(locate(source))
  options = dict(place=place, allow_unused=allow_unused)
  match what := kind(path):
    case "model folder":
      return diffusers.load(path, dtype, **options)
    case "single file":
      return single_file.load(path, dtype, like=like, **options)
  remedy = ("; convert it first, where you trust it: sdjax convert" if what == "pickle" else
            ", not a whole model")
  raise UserError(f"{path} is a {what}{remedy}")
