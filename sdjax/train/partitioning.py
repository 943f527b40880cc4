"""Which device holds which part of which array.

Axes of the mesh: "data" splits the batch and copies parameters (but by the rule "zero1"); "fsdp"
splits both; "tensor" is kept for layers split within. The rules for parameters were chosen by
compiling the full step for TPU topologies: kernels split along their larger channel axis compile to
plain all-gathers and reduce-scatters, other choices make XLA partition convolutions or
rematerialise whole arrays.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax import pytrees
from sdjax.errors import UserError

log = logging.getLogger("sdjax")
AXES = ("data", "fsdp", "tensor")
MIN_SHARDED_SIZE = 2**14  # elements; below, the gather costs more than the copy
# What networks compute in float32 whatever their dtype is. Small, so never split: all that is split
# may then be gathered in the dtype that it is computed in.
FLOAT32 = r"(time|add|class)_embedding/"


class Rule(NamedTuple):
  """How kernels lie between steps, and during one.

  Attributes:
    axis: of the mesh, over which they are split; None: every device has all of them.
    whole: whether each step begins with putting them together, once; else XLA does that for each
      layer where it is used, and once more in the backward pass where that computes it again.
  """
  axis: str | None
  whole: bool


RULES = {
    "replicate": Rule(None, whole=False),
    # Zhao et al. 2023, https://arxiv.org/abs/2304.11277 ("full shard" within the axis).
    "fsdp": Rule("fsdp", whole=False),
    # Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5.1: optimizer state, which
    # there too includes float32 parameters, is split; those computed with are copies.
    "zero1": Rule("data", whole=True),
}


def make_mesh(axis_sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Arranges devices as (data, fsdp, tensor); several slices of TPUs along "data" first.

  Args:
    axis_sizes: devices per axis; absent axes are 1, and one may be -1: all that are left.
    devices: all of this run where none are given.

  Raises:
    UserError: when the sizes do not multiply to the number of devices, or "data" cannot be cut
      into slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: axis_sizes.get(axis, 1) for axis in AXES}
  if unknown := set(axis_sizes) - set(AXES):
    raise UserError(f"mesh axis {sorted(unknown)} is not known; the axes are {AXES}")
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
    raise UserError(f"mesh {dict(axis_sizes)} does not fit {len(devices)} devices; the sizes must "
                    "multiply to that number, and one of them may be -1")
  for axis in free:
    sizes[axis] = len(devices) // fixed
  # Of TPUs alone: other networks have no shape that the order of devices could fit.
  is_tpu = devices[0].platform == "tpu"
  slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
  if sizes["data"] % slices:
    raise UserError(f"mesh data={sizes['data']} cannot be cut into {slices} slices; only data may "
                    f"go across the network between them: make it a multiple of {slices}")
  types = (AxisType.Auto,) * len(AXES)
  if slices == 1:
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
  within = sizes | {"data": sizes["data"] // slices}
  array = mesh_utils.create_hybrid_device_mesh(tuple(within.values()), (slices, 1, 1), devices)
  return Mesh(array, AXES, axis_types=types)


def kernel_spec(shape: tuple[int, ...], axis: str, shards: int) -> P:
  """Splits the larger of the two channel axes of a kernel that divides evenly; else nothing."""
  if len(shape) < 2 or math.prod(shape) < MIN_SHARDED_SIZE or shards == 1:
    return P()
  inputs, outputs = len(shape) - 2, len(shape) - 1
  order = (inputs, outputs) if shape[inputs] >= shape[outputs] else (outputs, inputs)
  for channels in order:
    if shape[channels] % shards == 0:
      return P(*([axis if i == channels else None for i in range(len(shape))]))
  return P()


def rule_of(path: str, rules: Any) -> Rule:
  """Returns the rule for an array; rules as in `shardings`."""
  name = pytrees.first_match(rules, path, "replicate")
  if name not in RULES:
    raise UserError(f"partition rule {name!r} is not known; choose one of {', '.join(RULES)}")
  return RULES["replicate" if re.search(FLOAT32, path) else name]


def shardings(tree: Any, mesh: Mesh, rules: Any) -> Any:
  """Returns a tree of NamedShardings for any pytree of shaped leaves.

  Args:
    tree: leaves with a shape: parameters, or a whole TrainState, whose optimizer moments carry
      the paths of their parameters.
    mesh: from `make_mesh`.
    rules: (path regex, key of RULES) pairs, first match wins, none: replicate.
  """
  def spec(path, leaf):
    axis = rule_of(path, rules).axis
    split = P() if axis is None else kernel_spec(leaf.shape, axis, mesh.shape[axis])
    return NamedSharding(mesh, split)
  return pytrees.map_paths(spec, tree)


def warn_of_windows(mesh: Mesh, rules: Any) -> None:
  """Logs a warning where XLA would compile kernels split over all chips of a TPU to loops.

  A gradient that is summed over the same axis that it is split over, and over no other, becomes a
  loop of permutations instead of a reduce-scatter.
  """
  if mesh.devices.flat[0].platform != "tpu":
    return
  used = {name for _, name in rules}
  for name, (axis, _) in RULES.items():
    if name in used and axis is not None and mesh.shape[axis] == mesh.size > 1:
      log.warning("%s=%d spans all chips of the mesh and rule %r splits kernels over it, which XLA "
                  "compiles to loops of permutations; make config.mesh.data and config.mesh.fsdp "
                  "at least 2 each", axis, mesh.size, name)


def working_copy(tree: Any, mesh: Mesh, rules: Any, dtype: str) -> Any:
  """Returns the parameters that a step computes with, of those that it keeps.

  What is split is rounded to `dtype` before it moves, half the bytes in bfloat16, and made whole
  if its rule says so. Networks round it where they use it anyway: no result changes.

  Args:
    tree: of float32 parameters; paths as in a TrainState, {"params": …, "frozen": …}.
    mesh, rules: as in `shardings`.
    dtype: config.dtype.
  """
  def copy(path, leaf, kept):
    if kept.spec == P():
      return leaf
    # Said before and after the cast: XLA would else be free to gather float32.
    leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), kept)
    whole = rule_of(path, rules).whole
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P())) if whole else leaf
  kept = pytrees.flatten(shardings(tree, mesh, rules))
  return pytrees.map_paths(lambda path, leaf: copy(path, leaf, kept[path]), tree)


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
