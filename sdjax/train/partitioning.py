"""Which device holds which part of which array.

Axes of the mesh: "data" splits the batch and copies parameters; "fsdp" splits both; "tensor" is
kept for layers split within. The rules for parameters were chosen by compiling the full step for
TPU topologies: kernels split along their larger channel axis compile to plain all-gathers and
reduce-scatters, other choices make XLA partition convolutions or rematerialise whole arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax import pytrees
from sdjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
MIN_SHARDED_SIZE = 2**14  # elements; below, the gather costs more than the copy


def make_mesh(axis_sizes: dict[str, int]) -> Mesh:
  """Arranges all devices as (data, fsdp, tensor).

  Args:
    axis_sizes: devices per axis; absent axes are 1, and one may be -1: all that are left.

  Raises:
    UserError: when the sizes do not multiply to the number of devices.
  """
  sizes = {axis: axis_sizes.get(axis, 1) for axis in AXES}
  devices = jax.device_count()
  if unknown := set(axis_sizes) - set(AXES):
    raise UserError(f"mesh axis {sorted(unknown)} is not known; the axes are {AXES}")
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or fixed < 1 or devices % fixed or (not free and fixed != devices):
    raise UserError(f"mesh {dict(axis_sizes)} does not fit {devices} devices; the sizes must "
                    "multiply to that number, and one of them may be -1")
  for axis in free:
    sizes[axis] = devices // fixed
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fsdp_spec(shape: tuple[int, ...], shards: int) -> P:
  """Splits the larger of the two channel axes of a kernel that divides evenly; else nothing."""
  if len(shape) < 2 or math.prod(shape) < MIN_SHARDED_SIZE or shards == 1:
    return P()
  inputs, outputs = len(shape) - 2, len(shape) - 1
  order = (inputs, outputs) if shape[inputs] >= shape[outputs] else (outputs, inputs)
  for axis in order:
    if shape[axis] % shards == 0:
      return P(*(["fsdp" if i == axis else None for i in range(len(shape))]))
  return P()


def shardings(tree: Any, mesh: Mesh, rules: Any) -> Any:
  """Returns a tree of NamedShardings for any pytree of shaped leaves.

  Args:
    tree: leaves with a shape: parameters, or a whole TrainState, whose optimizer moments carry
      the paths of their parameters.
    mesh: from `make_mesh`.
    rules: (path regex, "fsdp" | "replicate") pairs, first match wins, none: replicate.
  """
  def spec(path, leaf):
    match pytrees.first_match(rules, path, "replicate"):
      case "fsdp":
        return NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"]))
      case "replicate":
        return NamedSharding(mesh, P())
      case other:
        raise UserError(f"partition rule {other!r} is not known; use 'fsdp' or 'replicate'")
  return pytrees.map_paths(spec, tree)


def placer(mesh: Mesh, rules: Any) -> Callable[[str, np.ndarray], jax.Array]:
  """Returns what puts one parameter, by its path, on the mesh: `place` of `diffusers.load`.

  A model read so never is whole anywhere: one tensor after another goes to its devices.
  """
  def put(path, leaf):
    sharding = shardings(pytrees.unflatten({path: leaf}), mesh, rules)
    return place(leaf, *jax.tree.leaves(sharding))
  return put


def place(tree: Any, tree_shardings: Any) -> Any:
  """Puts host arrays on the mesh; each process hands over only the parts of its own devices."""
  def put(leaf, sharding):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
  return jax.tree.map(put, tree, tree_shardings)
