"""Initial parameters, drawn leaf by leaf on the host.

Each leaf has a random stream of its own, keyed by the seed and its path: the values depend
neither on the mesh nor on the number of hosts nor on other leaves, and nothing is compiled (a
compiled initialisation of a small network takes longer than its first hundred steps).
"""

import hashlib
import math
from typing import Any

import numpy as np

from sdjax import pytrees

# (path regex, standard deviation or constant of the leaf), first match wins.
RULES = (
    (r"scale$", "one"),
    (r"bias$", "zero"),
    # Residual branches that start silent: DDPM (Ho et al. 2020) and LDM (Rombach et al. 2022).
    (r"unet/conv_out/kernel$", "zero"),
    (r"unet/.*conv2/kernel$", "zero"),
    (r"unet/.*/proj_out/kernel$", "zero"),
    # ControlNets begin as nothing (Zhang et al. 2023, section 3.1).
    (r"controlnet_(down|mid)_block[s_\d]*/kernel$", "zero"),
    (r"controlnet_cond_embedding/conv_out/kernel$", "zero"),
    # CLIP (Radford et al. 2021), section 2.5.
    (r"token_embedding/embedding$", "normal_0.02"),
    (r"position_embedding/embedding$", "normal_0.01"),
    (r"embeddings/class_embedding$", "normal_0.02"),
    # One vector per class, of the size of the time's.
    (r"class_embedding/embedding$", "normal_1.0"),
    (r"kernel$", "fan_in"),
)


def draw_leaf(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Draws one float32 leaf by the first rule that matches its path."""
  rule = pytrees.first_match(RULES, path)
  if rule is None:
    raise ValueError(f"no initial value is known for parameter {path!r} of shape {shape}")
  if rule in ("one", "zero"):
    return np.full(shape, float(rule == "one"), np.float32)
  key = int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:16], "little")
  normal = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)
  if rule == "fan_in":
    return normal * np.float32(1 / math.sqrt(math.prod(shape[:-1])))
  return normal * np.float32(rule.removeprefix("normal_"))


def draw(shapes: Any, seed: int) -> Any:
  """Draws a tree of parameters like `shapes` (leaves need a shape); float32 numpy."""
  return pytrees.map_paths(lambda path, leaf: draw_leaf(path, leaf.shape, seed), shapes)
