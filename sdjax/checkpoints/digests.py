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

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax import pytrees

GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio, odd


def of(tree: Any) -> dict[str, list[int]]:
  """Returns {path: [A, B]} of a pytree of arrays; all processes of its mesh must call.

  One small program per shape and sharding: one for the whole tree compiles five times longer.
  """
  found = {pytrees.path_of(path): _digest(leaf)
           for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  return {path: [int(a), int(b)] for path, (a, b) in jax.device_get(found).items()}


def difference(then: dict[str, list[int]], now: dict[str, list[int]]) -> str:
  """Returns "" where two results of `of` are equal, else a phrase that names what is not."""
  other = sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))
  if not other:
    return ""
  more = f" and of {len(other) - 1} more" if len(other) > 1 else ""
  return f"the values of {other[0]}{more} are not those that were saved"


@jax.jit
def _digest(
    x: jax.Array,     # of any shape; numbers of at most 32 bits, or typed keys
) -> jax.Array:       # uint32 [2]: A and B
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    step = math.prod(x.shape[axis + 1:]) * GOLDEN % 2**32
    place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(step)
  # One reduction of two operands: XLA reads the leaf once, and keeps nothing of its size.
  zero = jnp.uint32(0)
  sums = lax.reduce((_mix(bits ^ place), _mix(bits + place)), (zero, zero),
                    lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim)))
  return jnp.stack(sums)


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
