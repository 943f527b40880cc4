"""Tells a person what a model, LoRA or textual inversion is, from its header."""

import collections
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdjax.checkpoints import diffusers, single_file, sources, tensors
from sdjax.checkpoints.tensors import Tensor
from sdjax.stable_diffusion import StableDiffusion

# (family as `single_file.family` tells it, channels of the UNet's input) -> what people call it.
FAMILIES = {
    "sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL", "sdxl_refiner": "Stable Diffusion XL refiner",
}
TASKS = {5: "depth to image", 7: "x4 upscaler", 8: "edits by instruction", 9: "inpainting"}


def report(path: Path, like: StableDiffusion | None = None) -> str:
  """Returns lines: what it is, family, prediction type, schedule, networks, each file's sha256.

  Args:
    path: of a file or folder.
    like: the model that a single file of no released size has.

  Raises:
    UserError: nothing that sdjax knows stands there.
  """
  what = sources.kind(path)
  lines = {
      "model folder": _model_folder, "network folder": _network_folder, "LoRA": _lora,
      "single file": functools.partial(_single_file, like=like),
  }.get(what, lambda path: [])(path)
  files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
  lines = [_row("what", what), *lines, "sha256"]
  for file in files:
    with open(file, "rb") as opened:
      digest = hashlib.file_digest(opened, "sha256").hexdigest()
    lines.append(f"  {digest}  {file.relative_to(path) if path.is_dir() else file.name}")
  return "\n".join(lines)


def _row(name: str, value: object) -> str:
  return f"{name:<16} {value}"


def _model_folder(path: Path) -> list[str]:
  sd = diffusers.describe(path)
  networks = ("unet", "vae", *sd.text_names)
  return [
      *_model(sd), _row("scheduler", sd.scheduler_config.get("_class_name")),
      *(_network(name, tensors.open_folder(path / name, diffusers.STEMS[name]).values())
        for name in networks)]


def _single_file(path: Path, like: StableDiffusion | None) -> list[str]:
  stored = tensors.open_file(path)
  notes = tensors.metadata(path)
  sd = like or single_file.describe(path, stored, notes)
  groups = collections.defaultdict(list)
  for name, tensor in stored.items():
    groups[name.partition(".")[0]].append(tensor)
  return [*_model(sd), *(_network(name, group) for name, group in groups.items()),
          *_notes(notes)]


def _network_folder(path: Path) -> list[str]:
  config = diffusers.read_json(path / "config.json")
  name = diffusers.class_name(config)
  _, stem, _ = diffusers.networks_entry(path, config)
  return [_row("class", name), _network("parameters", tensors.open_folder(path, stem).values())]


def _lora(path: Path) -> list[str]:
  stored = tensors.open_file(path)
  down = {name: tensor for name, tensor in stored.items()
          if name.endswith((".lora_down.weight", ".lora_A.weight", "lora.down.weight"))}
  ranks = sorted({tensor.shape[0] for tensor in down.values()})
  return [_row("modules", len(down)), _row("ranks", ", ".join(map(str, ranks))),
          _network("parameters", stored.values()), *_notes(tensors.metadata(path))]


def _model(sd: StableDiffusion) -> list[str]:
  schedule = sd.schedule
  channels = sd.unet.in_channels
  task = TASKS.get(channels, f"{channels} channels in") if (
      channels != sd.vae.latent_channels) else "text to image"
  size = ", zero terminal SNR" if schedule.zero_terminal_snr else ""
  return [
      _row("family", FAMILIES[single_file.family(sd)]), _row("task", task),
      _row("prediction type", sd.prediction_type),
      _row("schedule", f"{schedule.name}, beta {schedule.beta_start} to {schedule.beta_end} in "
           f"{schedule.num_steps} steps{size}"),
      _row("image size", f"{sd.default_size} px"),
      _row("tokens", ", ".join(f"{words.length} of {words.vocab_size}"
                               for words in sd.tokenizers))]


def _network(name: str, stored: Iterable[Tensor]) -> str:
  stored = list(stored)
  count = sum(math.prod(tensor.shape) for tensor in stored)
  return _row(name, f"{count:,} parameters, {', '.join(sorted({t.dtype for t in stored}))}")


def _notes(notes: Mapping[str, str]) -> list[str]:
  return [_row("note", f"{name} = {text[:80]}") for name, text in sorted(notes.items())]
