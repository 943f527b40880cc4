"""LoRA files of all kinds: read, merged into parameters, written.

A LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds to a matrix W [out in] the product of
two narrow ones. In PyTorch's layout, which files and `Factors` have,

  ΔW = scale · alpha / r · up @ down          down [r in], up [out r]                          (1)

For a convolution `down` has its window and `up` is 1 × 1; or, in LyCORIS (Yeh et al. 2023,
https://arxiv.org/abs/2309.14859, section 3.2, "Tucker"), both are 1 × 1 and `mid` [r r h w] in
between has the window. DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5) makes of it

  W' = m (W + ΔW) / ‖W + ΔW‖                                                                   (2)

with a magnitude and a norm for each output (PEFT), or for each input (LyCORIS by default).
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import pytrees
from sdjax.checkpoints import names, single_file_names, tensors
from sdjax.errors import UserError
from sdjax.models.unet import UNet


@dataclasses.dataclass(frozen=True)
class Factors:
  """What a LoRA has for one module; arrays of as many axes as the module's weight in PyTorch.

  Attributes:
    down: [r in] or [r in h w].
    up: [out r] or [out r 1 1].
    alpha: see (1).
    mid: [r r h w] or None.
    dora_scale: the magnitudes of (2), [out 1] or [1 in], and 1 along further axes; or None.
  """
  down: np.ndarray
  up: np.ndarray
  alpha: float
  mid: np.ndarray | None = None
  dora_scale: np.ndarray | None = None

  @property
  def scale(self) -> float:
    """alpha / r."""
    return self.alpha / self.down.shape[0]


# {"unet/down_blocks_0/attentions_0/proj_in": factors, ...}: our module path, network included.
Lora = dict[str, Factors]

# How tensors of a file end -> which part of `Factors` they are. PEFT's magnitudes are per output
# whatever their shape.
PARTS = {
    # kohya's sd-scripts, LyCORIS, OneTrainer.
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".alpha": "alpha", ".dora_scale": "dora_scale",
    # PEFT, and diffusers since 0.22.
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    # diffusers before: attention processors, then layers of the UNet and of text encoders.
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
}
# Spellings of modules: (regex, today's by `_modules`).
SYNONYMS = (
    (r"^lora_te_", "lora_te1_"),                         # SD1 and SD2: there is but one
    (r"^(lora_te\d)_text_model_", r"\1_"),
    (r"^(text_encoder(?:_2)?)\.text_model\.", r"\1."),
    (r"^(?!unet\.|text_encoder|lora_)", "unet."),        # the first attention processors
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj"),
    (r"\.to_out$", ".to_out.0"),
)
# Our network -> what kohya puts before its modules.
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# Where diffusers since 0.34 keeps the settings of PEFT, as JSON.
PEFT_NOTES = "lora_adapter_metadata"


def load(file: str | Path, unet: UNet, shapes: Mapping, *, allow_unused: bool = False) -> Lora:
  """Reads a LoRA of any kind that `PARTS` and `SYNONYMS` tell apart.

  Args:
    file: safetensors.
    unet: whose blocks kohya numbers through in files for SDXL.
    shapes: the tree of parameters, {"unet", "text_encoder", ...}, or of leaves with their shapes.
    allow_unused: leaves out what belongs to no module of this model, or is no LoRA.

  Returns:
    The factors of each module in the file, in the file's dtype.

  Raises:
    UserError: the file is for another model, is incomplete, or has parts unknown here.
  """
  stored = tensors.open_file(file)
  flat = pytrees.flatten(shapes)
  found, unused, twice = _group(stored, _modules(unet, flat))
  if not found:
    raise UserError(f"{file} has no LoRA for a module of this model among its {len(stored)} "
                    "tensors; is it for another model, or of another kind?")
  if not allow_unused:
    tensors.complain(
        file, "has, besides a LoRA for this model (allow_unused=True would leave them out),",
        unused)
  tensors.complain(file, "has, under two names each,", twice)
  tensors.complain(file, "has, without the other factor,", (
      name for parts in found.values() if not {"down", "up"} <= parts.keys()
      for name in parts.values()))

  lora, misfits = {}, []
  alpha_of = _alphas(Path(file))
  for module, parts in found.items():
    kernel = f"{module}/kernel"
    arrays = {part: np.asarray(stored[name]) for part, name in parts.items()}
    factors = _factors(arrays, names.shape_to_torch(kernel, flat[kernel].shape))
    if factors is None:
      misfits += parts.values()
    elif "alpha" not in arrays:
      factors = dataclasses.replace(factors, alpha=alpha_of(module, factors.down.shape[0]))
    lora[module] = factors
  tensors.complain(file, "has, of shapes that do not fit this model,", misfits)
  return lora


def _modules(unet: UNet, flat: Mapping[str, Any]) -> dict[str, str]:
  """Returns {name in files: our module} of all that a LoRA may be for."""
  blocks = single_file_names.unet(unet)
  modules = {}
  for path in flat:
    network, _, inner = path.partition("/")
    if network in KOHYA and path.endswith("/kernel"):
      name = names.to_diffusers(inner).removesuffix(".weight")
      spellings = {f"{network}.{name}", KOHYA[network] + name.replace(".", "_")}
      if network == "unet" and (block := single_file_names.rename(name, blocks)):
        spellings.add(KOHYA[network] + block.replace(".", "_"))
      modules |= dict.fromkeys(spellings, path.removesuffix("/kernel"))
  return modules


def _group(stored: Mapping[str, Any], modules: Mapping[str, str]
           ) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
  """Returns {module: {part: tensor name}}, names that have no place, and names too many."""
  found: dict[str, dict[str, str]] = {}
  unused, twice = [], []
  for name in stored:
    ending = next((ending for ending in PARTS if name.endswith(ending)), None)
    spelling = names.canonical(name.removesuffix(ending or ""), (), SYNONYMS)
    module = modules.get(spelling)
    if ending is None or module is None:
      unused.append(name)
    elif found.setdefault(module, {}).setdefault(PARTS[ending], name) != name:
      twice.append(name)
  # Other kinds of adapters (LoHa, LoKr) have an alpha too.
  for module in [m for m, parts in found.items() if not {"down", "up"} & parts.keys()]:
    unused += found.pop(module).values()
  return found, unused, twice


def _factors(parts: Mapping[str, np.ndarray], kernel: tuple[int, ...]) -> Factors | None:
  """Returns `Factors` for a weight of shape `kernel` (PyTorch's), None where they do not fit it.

  A 1 × 1 convolution in the file may be a matrix here, and the other way round.
  """
  (out, inside), window = kernel[:2], kernel[2:]
  ones, r = (1,) * len(window), parts["down"].shape[:1]
  expected = {
      "down": (*r, inside, *(ones if "mid" in parts else window)),
      "up": (out, *r, *ones),
      "mid": (*r, *r, *window),
  }
  arrays = {}
  for part, shape in expected.items():
    if part in parts:
      if names.plain_shape(parts[part].shape) != names.plain_shape(shape):
        return None
      arrays[part] = parts[part].reshape(shape)

  scale = parts.get("magnitude", parts.get("dora_scale"))
  if scale is not None:
    per_input = "magnitude" not in parts and scale.ndim > 1 and scale.shape[0] == 1
    shape = (1, inside, *ones) if per_input else (out, 1, *ones)
    if scale.size != math.prod(shape):
      return None
    arrays["dora_scale"] = scale.reshape(shape)
  alpha = parts.get("alpha", np.asarray(r[0]))
  return Factors(**arrays, alpha=float(alpha.reshape(()))) if alpha.size == 1 else None


def _alphas(file: Path) -> Callable[[str, int], float]:
  """Returns (module, r) -> alpha where no tensor says it: by diffusers' notes, or else r.

  The notes are the arguments of `peft.LoraConfig`, each after its network's name; a pattern is a
  regex for the last words of a module's name.
  """
  try:
    notes = dict(json.loads(tensors.metadata(file).get(PEFT_NOTES, "{}")) or {})
    defaults = {network: float(notes[f"{network}.lora_alpha"])
                for network in KOHYA if f"{network}.lora_alpha" in notes}
    patterns = [(network, re.compile(rf"(.*\.)?({pattern.lstrip('^')})$"), float(alpha))
                for network in KOHYA
                for pattern, alpha in (notes.get(f"{network}.alpha_pattern") or {}).items()]
  except (ValueError, TypeError, AttributeError, re.error) as error:
    raise UserError(f"{file}: the note {PEFT_NOTES} in its header cannot be read ({error}); "
                    "write the file again") from error

  def alpha(module: str, r: int) -> float:
    network, name = _in_file(module)
    matches = (alpha for where, pattern, alpha in patterns
               if where == network and pattern.match(name))
    value = next(matches, defaults.get(network, float(r)))
    # Kalajdzievski 2023, https://arxiv.org/abs/2312.03732: divides by the root of r instead.
    return value * math.sqrt(r) if notes.get(f"{network}.use_rslora") else value

  return alpha


def merge(params: dict, loras: Sequence[tuple[Lora, float]]) -> dict:
  """Adds LoRAs to parameters, each by its scale.

  Several change each weight by the sum of what each alone would: their order is without effect.
  The old tree stays as it is and is the way back, exact to the bit, at the price of the changed
  leaves only.

  Args:
    params: {"unet", "text_encoder", ...}, on the host or on devices; in any dtype.
    loras: (LoRA, scale); 1 is as trained, 0 leaves it out, negative ones turn it around. With DoRA
      the scale is that of ΔW in (2), as in PEFT: the magnitudes are in effect whatever it is.

  Returns:
    A new tree that shares all leaves without a LoRA; the others are computed in float32 and have
    the dtype and the place that they had.

  Raises:
    UserError: a LoRA is for a module that these parameters lack or have in another shape.
  """
  flat = pytrees.flatten(params)
  by_path: dict[str, list[tuple[Factors, float]]] = {}
  for lora, scale in loras:
    for module, factors in lora.items() if scale else ():
      by_path.setdefault(f"{module}/kernel", []).append((factors, scale))
  misfits = [path for path, all_factors in by_path.items() if path not in flat or any(
      _delta_shape(factors) != names.shape_to_torch(path, flat[path].shape)
      for factors, _ in all_factors)]
  tensors.complain("the LoRA", "does not fit these parameters at", misfits)
  for path, all_factors in by_path.items():
    leaf = flat[path]
    weight = np.asarray(leaf).astype(np.float32)
    change = sum(_change(path, weight, factors, scale) for factors, scale in all_factors)
    merged = (weight + change).astype(leaf.dtype)
    flat[path] = jax.device_put(merged, leaf.sharding) if isinstance(leaf, jax.Array) else merged
  return pytrees.unflatten(flat)


def _change(path: str, weight: np.ndarray, factors: Factors, scale: float) -> np.ndarray:
  """W' - W of a weight in our layout, by (1) and (2)."""
  down, up = _down(factors), factors.up.astype(np.float32)
  delta = up.reshape(up.shape[:2]) @ down.reshape(down.shape[0], -1)
  delta = np.float32(scale * factors.scale) * delta.reshape(_delta_shape(factors))
  delta = names.array_from_torch(path, delta)
  if factors.dora_scale is None:
    return delta
  magnitude = names.array_from_torch(path, factors.dora_scale.astype(np.float32))
  axes = tuple(axis for axis, n in enumerate(magnitude.shape) if n == 1)
  norm = np.sqrt(np.sum(np.square(weight + delta), axis=axes, keepdims=True))
  return magnitude / np.maximum(norm, np.finfo(np.float32).tiny) * (weight + delta) - weight


def _down(factors: Factors) -> np.ndarray:
  """`down` with `mid` after it, one convolution: [r in h w] float32."""
  down = factors.down.astype(np.float32)
  if factors.mid is None:
    return down
  down = down.reshape(down.shape[:2])
  return np.einsum("ab...,bi->ai...", factors.mid.astype(np.float32), down, optimize=True)


def _delta_shape(factors: Factors) -> tuple[int, ...]:
  inner = factors.down if factors.mid is None else factors.mid
  return (factors.up.shape[0], factors.down.shape[1], *inner.shape[2:])


def save(file: str | Path, lora: Lora, unet: UNet, layout: str = "kohya") -> None:
  """Writes a LoRA in one of two kinds, which other programs read.

  Args:
    file: safetensors; replaced if it is there.
    lora: all modules of one model.
    unet: of that model.
    layout: "kohya", with alphas, as sd-scripts, A1111 and ComfyUI have it: blocks are numbered
      through for SDXL, else named as in diffusers (whose own reader takes one alpha for all of a
      network's attentions, and leaves DoRA out). "peft", as diffusers and PEFT have it: alpha / r
      and `mid` are multiplied into the factors, since most readers take alpha to be r; exact for a
      power of two, and else to float32's rounding.

  Raises:
    UserError: an unknown layout, or a DoRA that PEFT cannot express.
  """
  if layout not in LAYOUTS:
    raise UserError(f"LoRA layout {layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
  tensors.write_file(Path(file), LAYOUTS[layout](lora, unet))


def _to_kohya(lora: Lora, unet: UNet) -> dict[str, np.ndarray]:
  is_sdxl = unet.added_dim is not None
  blocks = single_file_names.unet(unet)
  prefixes = KOHYA if is_sdxl else KOHYA | {"text_encoder": "lora_te_"}
  flat = {}
  for module, factors in lora.items():
    network, name = _in_file(module)
    if network == "unet" and is_sdxl:
      name = single_file_names.rename(name, blocks) or name
    name = prefixes[network] + name.replace(".", "_")
    flat |= {f"{name}.lora_down.weight": factors.down, f"{name}.lora_up.weight": factors.up,
             f"{name}.alpha": np.float32(factors.alpha)}
    flat |= {} if factors.mid is None else {f"{name}.lora_mid.weight": factors.mid}
    flat |= {} if factors.dora_scale is None else {f"{name}.dora_scale": factors.dora_scale}
  return flat


def _to_peft(lora: Lora, unet: UNet) -> dict[str, np.ndarray]:
  del unet  # modules have diffusers' names, as here
  for network in KOHYA:
    kinds = {None if factors.dora_scale is None else factors.dora_scale.shape[1] == 1
             for module, factors in lora.items() if module.startswith(f"{network}/")}
    if len(kinds) > 1 or False in kinds:
      raise UserError(f"the LoRA has magnitudes (DoRA) for some modules of {network} only, or for "
                      "inputs; PEFT has them for the outputs of all: write it in layout 'kohya'")
  flat = {}
  for module, factors in lora.items():
    network, name = _in_file(module)
    name = f"{network}.{name}"
    down = factors.down if factors.mid is None else _down(factors)
    flat |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": _scaled_up(factors)}
    if (scale := factors.dora_scale) is not None:
      flat[f"{name}.lora_magnitude_vector.weight"] = (
          scale[:, 0] if scale.ndim == 2 else scale.swapaxes(0, 1))
  return flat


LAYOUTS = {"kohya": _to_kohya, "peft": _to_peft}


def _in_file(module: str) -> tuple[str, str]:
  """Returns (network, name of the module in diffusers' file of it)."""
  network, _, inner = module.partition("/")
  return network, names.to_file(network, f"{inner}/kernel").removesuffix(".weight")


def _scaled_up(factors: Factors) -> np.ndarray:
  """alpha / r · up: in the dtype of `up` where that holds it exactly, else in float32."""
  scaled = factors.up.astype(np.float32) * np.float32(factors.scale)
  narrow = scaled.astype(factors.up.dtype)
  return narrow if np.array_equal(narrow.astype(np.float32), scaled) else scaled
