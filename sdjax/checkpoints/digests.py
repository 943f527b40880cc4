"""Digests of arrays: two numbers per leaf that change with any bit, however the leaf is sharded.

A digest is a sum over elements, so it is the same on every mesh, and exact: all of it is integer
arithmetic modulo 2^32. With b the bits of element i of a leaf, in row-major order,

  p_i = i · 0x9E3779B9         (1)   where it stands: a bijection of i
  A   = Σ mix(b_i ⊕ p_i)       (2)
  B   = Σ mix(b_i + p_i)       (3)

where mix is the finalizer of MurmurHash3 (Appleby 2011, public domain,
https://github.com/aappleby/smhasher/wiki/MurmurHash3). For a given i each term is a bijection of b,
so damage to one element always changes both numbers; damage to several goes unseen with
probability about 2^-64. They protect from accidents, not from forgery.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax import pytrees

GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio, odd


def of(tree: Any) -> dict[str, list[int]]:
  """Returns {path: [A, B]} of a pytree of arrays; all processes of its mesh must call.

  Each device adds up its own part of a leaf, and the host the sums: nothing is gathered. One small
  program per shape and sharding: one for the whole tree compiles five times longer.
  """
  leaves = {pytrees.path_of(path): _sums(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  parts = jax.device_get(list(leaves.values()))
  sums = np.stack([np.concatenate(part).sum(axis=0, dtype=np.uint32) for part in parts])
  if jax.process_count() > 1:
    sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
  return {path: row.tolist() for path, row in zip(leaves, sums)}


def difference(then: dict[str, list[int]], now: dict[str, list[int]]) -> str:
  """Returns "" where two results of `of` are equal, else a phrase that names what is not."""
  other = sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))
  if not other:
    return ""
  more = f" and of {len(other) - 1} more" if len(other) > 1 else ""
  return f"the values of {other[0]}{more} are not those that were saved"


def _sums(leaf: Any) -> list[jax.Array]:  # of this process's devices, uint32 [1 2] each
  leaf = jnp.asarray(leaf)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf.sharding, NamedSharding):
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
  else:
    mesh, spec = Mesh([*leaf.devices()], ("device",)), PartitionSpec()
  return [shard.data for shard in _digest(mesh, spec, leaf).addressable_shards]


@functools.partial(jax.jit, static_argnames=("mesh", "spec"))
def _digest(
    mesh: Mesh,
    spec: PartitionSpec,
    x: jax.Array,     # of any shape; numbers of at most 32 bits
) -> jax.Array:       # uint32 [devices 2]: their parts of A and B
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  strides = [math.prod(x.shape[axis + 1:]) * GOLDEN % 2**32 for axis in range(x.ndim)]
  split = [() if names is None else (names,) if isinstance(names, str) else tuple(names)
           for names in (*spec, *[None] * (x.ndim - len(spec)))]

  def part(bits):
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, (stride, names) in enumerate(zip(strides, split)):
      along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
      if names:
        along += lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(bits.shape[axis])
      place += along * jnp.uint32(stride)
    # One reduction of two operands: XLA reads the part once, and keeps nothing of its size.
    zero = jnp.uint32(0)
    sums = lax.reduce((_mix(bits ^ place), _mix(bits + place)), (zero, zero),
                      lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(bits.ndim)))
    copies = tuple(name for name in mesh.axis_names if name not in sum(split, ()))
    counted = lax.axis_index(copies) == 0 if copies else True  # one copy of each part
    return jnp.where(counted, jnp.stack(sums), zero)[None]

  return jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(mesh.axis_names),
                       check_vma=False)(bits)


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
