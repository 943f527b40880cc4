"""How a batch lies on the mesh that is set: its rows over the axes "data" and "fsdp"."""

import math

import jax
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")
BATCH_SPEC = P(BATCH_AXES)


def batch_shards() -> int:
  """Returns over how many devices a batch is spread; 1 where no mesh is set."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def shard_batch(x: jax.Array, axis: int = 0) -> jax.Array:
  """Spreads the rows of a batch, along `axis`, over the mesh, where one is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*[None] * axis, *BATCH_SPEC))


def replicate(x: jax.Array) -> jax.Array:
  """Brings `x` whole to every device, where a mesh is set, so that any process can read it."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P())
