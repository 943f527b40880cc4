"""Attention in one kernel on TPUs: the logits never leave the core's own memory.

FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), forward and backward, as JAX
ships it for Pallas under the name of splash attention. Chosen over JAX's older `flash_attention`
because it keeps one number per query for the backward pass rather than two, skips blocks that a
causal mask hides, and can be interpreted on a CPU, which is how it is tested.

The compiler cannot split a kernel over devices, as it does all else: under a mesh (`jax.set_mesh`)
each device is handed its part by `shard_map`, the batch over "data" and "fsdp", heads over
"tensor", each where it divides evenly.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

LANES = 128      # a vector register's width: blocks are multiples of it
MAX_BLOCK = 512  # queries, and keys, per step


def flash(
    q: jax.Array,  # [b n k d]
    k: jax.Array,  # [b m k d]
    v: jax.Array,  # [b m k d]
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:    # [b n k d]
  """Returns softmax(q kᵀ / sqrt(d)) v, see `attention.attention`.

  Reverse-mode gradients only.

  Args:
    q, k, v, causal: as in `attention.attention`.
    interpret: run the kernel operation by operation, on any platform, to test it.
  """
  attend = functools.partial(attend_here, causal=causal, interpret=interpret)
  auto = jax.sharding.get_abstract_mesh().auto_axes
  if not auto:
    return attend(q, k, v)
  spec = P(split_axes(("data", "fsdp"), q.shape[0]), None, split_axes(("tensor",), q.shape[2]))
  # The kernels do not tell over which axes their results vary: nothing to check.
  return jax.shard_map(
      attend, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(auto), check_vma=False)(q, k, v)


def split_axes(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
  """Returns which of `axes` of the current mesh an array's axis of `size` is split over."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in axes if axis in mesh.auto_axes)
  return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def attend_here(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool,
                interpret: bool) -> jax.Array:
  """`flash` of the arrays of one device."""
  _, n, heads, d = q.shape
  m = k.shape[1]
  block_q, block_k = (min(MAX_BLOCK, round_up(length, LANES)) for length in (n, m))
  padded_n, padded_m = round_up(n, block_q), round_up(m, block_k)
  mask = (masks.CausalMask if causal else masks.FullMask)((padded_n, padded_m))
  kernel = splash.make_splash_mha_single_device(
      masks.MultiHeadMask([mask] * heads),
      # The gradients of queries have a kernel of their own: fused with that of keys and values it
      # would write one copy of them per block of keys.
      block_sizes=splash.BlockSizes(
          block_q=block_q, block_kv=block_k,
          block_q_dkv=block_q, block_kv_dkv=block_k,
          block_q_dq=block_q, block_kv_dq=block_k),
      # What the backward pass needs of the forward one, so that the policy "named" of `remat.py`
      # need not run that again: without it, it would keep the result and compute it all the same.
      residual_checkpoint_name="attention",
      interpret=interpret)

  # Only positions of one segment see each other. In causal attention padding is in the future.
  segments = None
  if padded_m > m and not causal:
    segments = splash.SegmentIds(
        q=jnp.zeros(padded_n, jnp.int32), kv=(jnp.arange(padded_m) >= m).astype(jnp.int32))

  def pad(x, length):
    # Channels of zeros change no product, and registers hold as many anyway.
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -d % LANES)))
    return x.swapaxes(1, 2)

  y = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
      pad(q * d**-0.5, padded_n), pad(k, padded_m), pad(v, padded_m), segments)
  return y[:, :, :n, :d].swapaxes(1, 2)


def round_up(length: int, multiple: int) -> int:
  """Returns the least multiple of `multiple` that is no less than `length`."""
  return -(-length // multiple) * multiple
