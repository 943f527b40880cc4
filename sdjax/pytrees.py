"""Trees of arrays addressed by paths: "unet/down_blocks_0/resnets_1/conv1/kernel".

Sharding rules, initial values, freezing, learning-rate multipliers, weight decay and checkpoint
conversion all speak these paths, and choose by `first_match`.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
SEEN = 4096  # numbers of each array that make up a fingerprint


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
  """Returns {"a/b/c": leaf} of nested mappings, in their own order."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}/")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
  """The inverse of `flatten`."""
  tree = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def path_of(key_path: tuple) -> str:
  """Spells a `jax.tree_util` key path as "a/b/c", through dicts, sequences and dataclasses."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def map_paths(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
  """Maps `function(path, leaf)` over any pytree."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_of(path), leaf), tree)


def first_match(rules: Iterable[tuple[str, Any]], path: str, default: Any = None) -> Any:
  """Returns the value of the first (regex, value) whose regex matches anywhere in `path`."""
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  return default


def count(tree: Tree) -> int:
  """Returns the number of scalars in all leaves; leaves need only a shape."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def cast(tree: Tree, dtype: Any) -> Tree:
  """Casts floating-point leaves to `dtype` and leaves the others alone."""
  def cast_leaf(leaf):
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
  return jax.tree.map(cast_leaf, tree)


def fingerprint(params: Mapping, *facts: object) -> str:
  """Returns 16 hex digits that change with a model, wherever it was read from.

  They see evenly spread numbers of each array: training moves all of them, and reading all would
  take as long as loading did.

  Args:
    params: of the model, on the host.
    facts: what else tells it from others, as JSON can hold it.
  """
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  for path, leaf in sorted(flatten(params).items()):
    leaf = np.asarray(leaf)
    digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
    digest.update(leaf.reshape(-1)[::max(1, leaf.size // SEEN)].tobytes())
  return digest.hexdigest()[:16]


def overview(tree: Tree, depth: int = 2) -> str:
  """Returns a line of parameter counts per subtree, `depth` names deep, and the total."""
  sums: dict[str, int] = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = "/".join(path_of(key_path).split("/")[:depth])
    sums[name] = sums.get(name, 0) + math.prod(leaf.shape)
  width = max(map(len, sums), default=0)
  lines = [f"{name:<{width}}  {n:>15,}" for name, n in sums.items()]
  return "\n".join([*lines, f"{'total':<{width}}  {sum(sums.values()):>15,}"])
