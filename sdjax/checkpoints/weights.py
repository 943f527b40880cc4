"""From tensors of files to trees of parameters, and back.

Both ways take {our path: the file's tensor name}. Several paths may share a name: that tensor is
theirs stacked along its first axis, in their order.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import pytrees
from sdjax.checkpoints import names
from sdjax.checkpoints.single_file_names import AS_HERE, EXPANDED
from sdjax.checkpoints.tensors import Tensor, complain

Place = Callable[[str, np.ndarray], Any]
FLOATS = ("float64", "float32", "float16", "bfloat16")


def read(
    where: Path,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, str],
    shapes: Mapping[str, Any],
    dtype: str | None,
    place: Place | None = None,
    allow_unused: bool = False,
) -> dict:
  """Reads parameters one by one.

  Args:
    where: what errors name.
    tensors: of the file, by today's names.
    places: {path: tensor name} of all parameters that must be there.
    shapes: {path: leaf with a shape}.
    dtype: to cast to; None as stored.
    place: (path, array) -> what becomes the leaf; puts it on devices. None: stays on the host.
    allow_unused: tensors that are no parameters are left alone, instead of being an error.

  Returns:
    The tree of parameters.

  Raises:
    UserError: tensors are missing, unknown, of another shape, or no longer finite in `dtype`.
  """
  groups: dict[str, list[str]] = {}
  for path, name in places.items():
    groups.setdefault(name, []).append(path)
  stored = {name: _file_shape(name, [(path, shapes[path].shape) for path in paths])
            for name, paths in groups.items()}
  complain(where, "lacks", groups.keys() - tensors.keys())
  if not allow_unused:
    complain(where, "has unknown", tensors.keys() - groups.keys())
  complain(where, "has, of another shape than its configuration says,", [
      name for name in groups
      if names.plain_shape(tensors[name].shape) != names.plain_shape(stored[name])])
  complain(where, "has, of a dtype other than floats of 16 to 64 bits,", [
      name for name in groups if tensors[name].dtype not in FLOATS])

  flat, overflown = {}, []
  for name, paths in groups.items():
    array = np.asarray(tensors[name]).reshape(stored[name])
    for path, part in zip(paths, np.split(array, len(paths)), strict=True):
      part = _from_file(name, path, part.reshape(_layer_shape(name, path, shapes[path].shape)))
      leaf = part if dtype is None else cast(part, dtype)
      if leaf.dtype.itemsize < part.dtype.itemsize and not _as_finite(part, leaf):
        overflown.append(name)
      flat[path] = leaf if place is None else place(path, leaf)
  complain(where, f"has, too large for {dtype} (bfloat16 or float32 would hold them),", overflown)
  return pytrees.unflatten(flat)


def to_tensors(places: Mapping[str, str], flat: Mapping[str, Any]) -> dict[str, Tensor]:
  """Returns the tensors that a file holds for parameters {path: array}, made when asked for."""
  groups: dict[str, list[str]] = {}
  for path, name in places.items():
    groups.setdefault(name, []).append(path)
  tensors = {}
  for name, paths in groups.items():
    shape = _file_shape(name, [(path, flat[path].shape) for path in paths])
    def read(name=name, paths=paths, shape=shape):
      parts = [_to_file(name, path, np.asarray(flat[path])) for path in paths]
      return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(shape)
    tensors[name] = Tensor(shape, str(flat[paths[0]].dtype), read)
  return tensors


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
  """Returns a host array as "float32", "bfloat16" or "float16"; what is too large becomes inf."""
  with np.errstate(over="ignore"):
    return array.astype(jnp.dtype(dtype), copy=False)


def _as_finite(before: np.ndarray, after: np.ndarray) -> bool:
  finite = np.isfinite(after)
  return bool(finite.all()) or bool((finite == np.isfinite(before)).all())


def _from_file(name: str, path: str, array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array) if AS_HERE.search(name) else names.array_from_torch(
      path, array)


def _to_file(name: str, path: str, array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array) if AS_HERE.search(name) else names.array_to_torch(path, array)


def _layer_shape(name: str, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape if AS_HERE.search(name) else names.shape_to_torch(path, shape)


def _file_shape(name: str, parts: list[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
  """The shape of a file's tensor that holds parameters of these paths and shapes."""
  first, *rest = _layer_shape(name, *parts[0])
  ones = (1, 1) if EXPANDED.search(name) else ()
  return (first * len(parts), *rest, *ones)
