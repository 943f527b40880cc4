"""Tensor names and layouts of diffusers and transformers, against the parameter paths of sdjax.

  unet/down_blocks_0/resnets_1/conv1/kernel   float32 [h w in out]     here
  down_blocks.0.resnets.1.conv1.weight        float32 [out in h w]     unet/*.safetensors

Both sides name modules alike, so that the tables below are all there is. PyTorch's layouts (NCHW
images, OIHW convolutions, [out, in] matrices) exist in this file only.
"""

import re
from collections.abc import Iterable

import numpy as np

# PyTorch's lists of modules: `resnets_1` here is `resnets.1` there. Other names end in a number
# too (`conv1`, `linear_1`), and keep it.
LISTS = (
    "attentions", "blocks", "body", "controlnet_down_blocks", "down_blocks", "downsamplers",
    "layers", "net", "resnets", "to_out", "transformer_blocks", "up_blocks", "upsamplers",
)

# Our leaf -> theirs. Unique within a module, so that renaming is one-to-one.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
          "class_embedding": "class_embedding"}

# (our leaf, number of axes) -> axes of their array in our order; all other leaves are alike.
AXES = {
    ("kernel", 4): (2, 3, 1, 0),  # [out in h w] -> [h w in out]
    ("kernel", 2): (1, 0),        # [out in] -> [in out]
}

# What files of one network put before every name that does not begin with one of `PROJECTIONS`.
PREFIXES = {"text_encoder": "text_model.", "text_encoder_2": "text_model.",
            "image_encoder": "vision_model."}
PROJECTIONS = ("text_projection.", "visual_projection.")

# Spellings of other versions: (regex, today's). The autoencoders of the first releases have their
# attention by diffusers' old names; transformers 5 leaves out the prefix of text towers.
SYNONYMS = (
    (r"^(text|vision)_model\.", ""),
    (r"\.query\.(weight|bias)$", r".to_q.\1"),
    (r"\.key\.(weight|bias)$", r".to_k.\1"),
    (r"\.value\.(weight|bias)$", r".to_v.\1"),
    (r"\.proj_attn\.(weight|bias)$", r".to_out.0.\1"),
)

# Tensors without information: 0, 1, 2, … up to the number of positions.
IGNORED = (r"(^|\.)embeddings\.position_ids$",)

_LIST_ITEM = re.compile(rf"(^|\.)({'|'.join(LISTS)})_(\d+)(?=\.|$)")


def to_diffusers(path: str) -> str:
  """Returns today's name, without prefix, of a path within one network ("conv_in/kernel")."""
  module, _, leaf = path.rpartition("/")
  return _LIST_ITEM.sub(r"\1\2.\3", module.replace("/", ".")) + "." + LEAVES[leaf]


def to_file(network: str, path: str) -> str:
  """Returns the name of a path in diffusers' file of `network` ("unet", "text_encoder", …)."""
  name = to_diffusers(path)
  return name if name.startswith(PROJECTIONS) else PREFIXES.get(network, "") + name


def canonical(
    name: str,
    ignored: Iterable[str] = IGNORED,
    synonyms: Iterable[tuple[str, str]] = SYNONYMS,
) -> str | None:
  """Returns today's name, without prefix, of a name in a file; None where it says nothing."""
  if any(re.search(pattern, name) for pattern in ignored):
    return None
  for pattern, replacement in synonyms:
    name = re.sub(pattern, replacement, name)
  return name


def _axes(path: str, ndim: int) -> tuple[int, ...]:
  return AXES.get((path.rpartition("/")[2], ndim), tuple(range(ndim)))


def array_from_torch(path: str, array: np.ndarray) -> np.ndarray:
  """Returns PyTorch's array in our layout, contiguous."""
  return np.ascontiguousarray(array.transpose(_axes(path, array.ndim)))


def array_to_torch(path: str, array: np.ndarray) -> np.ndarray:
  """The inverse of `array_from_torch`; contiguous, since safetensors writes memory as it lies."""
  return np.ascontiguousarray(array.transpose(np.argsort(_axes(path, array.ndim))))


def shape_to_torch(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape that `array_to_torch` gives an array of `shape`."""
  return tuple(shape[axis] for axis in np.argsort(_axes(path, len(shape))))


def plain_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns PyTorch's shape, alike for a matrix and a 1 × 1 convolution of the same numbers."""
  return shape[:2] if shape[2:] == (1, 1) else shape
