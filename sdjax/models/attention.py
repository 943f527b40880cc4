"""Scaled dot-product attention: the one place where a model attends.

  softmax(q kᵀ / sqrt(d)) v                                                               (1)

for each head (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1). Written down as it
stands, it keeps n × m logits per head. Walking over chunks of keys needs three running numbers per
query instead: with the logits a_j of chunk j,

  M_j = max(M_{j-1}, max a_j)                                                             (2)
  S_j = exp(M_{j-1} - M_j) S_{j-1} + Σ exp(a_j - M_j)
  Y_j = exp(M_{j-1} - M_j) Y_{j-1} + exp(a_j - M_j) v_j

and (1) is Y / S after the last chunk (Rabe & Staats 2021, https://arxiv.org/abs/2112.05682).
"""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.models import flash

CHUNK = 512                     # queries, and keys, that "chunked" looks at in one step
MAX_LOGITS_BYTES = 2 * 2**30    # per device; "auto" walks in chunks rather than keep more
LONG = 1024                     # from so many queries and keys on, "xla" is not the fastest
MAX_CUDNN_HEAD_DIM = 128

_chosen = jax.make_user_context("auto")


def attention(
    q: jax.Array,  # [b n k d]
    k: jax.Array,  # [b m k d]
    v: jax.Array,  # [b m k d]
    *,
    causal: bool = False,
) -> jax.Array:    # [b n k d], in q's dtype
  """Returns softmax(q kᵀ / sqrt(d)) v for each of the k heads.

  Logits and softmax are float32 whatever the inputs are. Computed as `implementation` tells; the
  fused kernels, which "auto" may choose, differentiate in reverse mode only.

  Args:
    q, k, v: queries, keys and values, heads in the second last axis.
    causal: position i sees positions j <= i alone; needs n == m.

  Raises:
    UserError: for an implementation, chosen by name, that cannot do this.
  """
  def bind(name):
    return functools.partial(IMPLEMENTATIONS[name], causal=causal)

  if _chosen.value != "auto":
    check(_chosen.value, q, k)
    return bind(_chosen.value)(q, k, v)
  default, special = automatic(q, k)
  if not special:
    return bind(default)(q, k, v)
  # Decided when the program is lowered: it may be compiled here for a machine elsewhere.
  branches = {platform: bind(name) for platform, name in special.items()}
  return jax.lax.platform_dependent(q, k, v, default=bind(default), **branches)


def implementation(name: str) -> contextlib.AbstractContextManager:
  """Within `with implementation(name):`, `attention` is traced as `name` says.

  Part of the key of jit's cache: what is compiled in one context is not reused in another.

  Args:
    name: "auto", or one of IMPLEMENTATIONS:
      "xla": (1) as it stands; n × m logits in memory.
      "chunked": (2); memory grows with n + m. Training computes the logits three times over.
      "cudnn": the fused kernel of NVIDIA's library. 16-bit numbers, even lengths, heads of at
        most 128 channels, a multiple of 8; Ampere or later.
      "flash": the fused kernel for TPUs, see `flash.py`.

  Raises:
    UserError: there is no such implementation.
  """
  if name not in ("auto", *IMPLEMENTATIONS):
    raise UserError(f"attention {name!r} is not known; choose auto, {', '.join(IMPLEMENTATIONS)}")
  return _chosen(name)


def automatic(q: jax.Array, k: jax.Array) -> tuple[str, dict[str, str]]:
  """Returns the implementation that suits arrays like these, and on which platforms another does.

  Short sequences are "xla" but on NVIDIA's GPUs, and then nothing depends on the platform. CPUs
  walk through long ones in chunks not for memory alone: those stay in the cache, and a forward pass
  of 4096 queries and keys takes a quarter (8 heads of 40) to all (1 of 512) of the time. cuDNN's
  kernel is offered only where there is such a GPU: JAX asks the library as soon as it traces.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = math.prod(
      mesh.shape[axis] for axis in flash.split_axes(("data", "fsdp"), q.shape[0]))
  b, n, heads, _ = q.shape
  m = k.shape[1]
  default = "chunked" if 4 * b // shards * heads * n * m > MAX_LOGITS_BYTES else "xla"
  special = {}
  if min(n, m) >= LONG:
    special["cpu"] = "chunked"
    # A shard_map that checks its results, as it does by default, refuses kernels within it.
    if not mesh.manual_axes:
      special["tpu"] = "flash"
  if fits_cudnn(q, k) and has_cudnn():
    special["cuda"] = "cudnn"
  return default, special


def xla(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
  """Equation (1); arguments as in `attention`."""
  # Heads go first: on CPU the products are then four times as fast as on the layout above.
  queries, keys, values = (x.swapaxes(1, 2) for x in (q, k, v))
  queries = queries * q.shape[-1] ** -0.5
  logits = jnp.einsum("bknd,bkmd->bknm", queries, keys, preferred_element_type=jnp.float32)
  if causal:
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)

  # Dividing after the product with v spares a pass over [b k n m]; the shift cancels.
  shift = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - shift)
  y = jnp.einsum(
      "bknm,bkmd->bknd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
  y = y / weights.sum(axis=-1, keepdims=True)
  return y.astype(q.dtype).swapaxes(1, 2)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
  """Equations (2); arguments as in `attention`.

  The backward pass computes each chunk's logits again rather than keep them (jax.checkpoint).
  """
  b, n, heads, d = q.shape
  m = k.shape[1]
  queries, keys, values = (split(x) for x in (q * d**-0.5, k, v))  # [chunks b k chunk d]
  size_q, size_k = queries.shape[3], keys.shape[3]

  @jax.checkpoint
  def attend(i, queries):
    row = i * size_q + jnp.arange(size_q)[:, None]

    @jax.checkpoint
    def step(carry, chunk):
      shift, total, y = carry
      j, keys, values = chunk
      logits = jnp.einsum("bknd,bkmd->bknm", queries, keys, preferred_element_type=jnp.float32)
      column = j * size_k + jnp.arange(size_k)
      seen = (column < m) & ((column <= row) | (not causal))
      logits = jnp.where(seen, logits, -jnp.inf)

      new_shift = jax.lax.stop_gradient(
          jnp.maximum(shift, logits.max(axis=-1, keepdims=True)))
      weights = jnp.exp(logits - new_shift)
      shrink = jnp.exp(shift - new_shift)
      total = shrink * total + weights.sum(axis=-1, keepdims=True)
      y = shrink * y + jnp.einsum("bknm,bkmd->bknd", weights.astype(v.dtype), values,
                                  preferred_element_type=jnp.float32)
      return (new_shift, total, y), None

    # Finite, unlike the logits that are masked: -inf less -inf has no value.
    zeros = jnp.zeros_like(queries, jnp.float32)
    lowest = jnp.full_like(zeros[..., :1], jnp.finfo(jnp.float32).min)
    (_, total, y), _ = jax.lax.scan(
        step, (lowest, zeros[..., :1], zeros), (jnp.arange(len(keys)), keys, values))
    return (y / total).astype(q.dtype)

  y = jax.lax.map(lambda chunk: attend(*chunk), (jnp.arange(len(queries)), queries))
  return jnp.moveaxis(y, 0, 2).reshape(b, heads, -1, d)[:, :, :n].swapaxes(1, 2)


def split(x: jax.Array) -> jax.Array:  # [b n k d] -> [chunks b k chunk d]
  """Cuts a sequence into chunks of one length, zeros at the end."""
  b, n, heads, d = x.shape
  chunks = -(-n // CHUNK)
  size = -(-n // chunks)               # no longer than need be: 513 are 2 × 257
  x = jnp.pad(x, ((0, 0), (0, chunks * size - n), (0, 0), (0, 0)))
  return x.reshape(b, chunks, size, heads, d).transpose(1, 0, 3, 2, 4)


def fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
  """Tells whether cuDNN's kernel takes arrays like these.

  JAX refuses to differentiate it at odd lengths, such as the 77 tokens of CLIP.
  """
  d = q.shape[-1]
  return (q.dtype in (jnp.bfloat16, jnp.float16) and d % 8 == 0 and d <= MAX_CUDNN_HEAD_DIM
          and q.shape[1] % 2 == k.shape[1] % 2 == 0)


def has_cudnn() -> bool:
  """Tells whether there is an NVIDIA GPU that runs cuDNN's kernel: Ampere or later."""
  device = jax.local_devices()[0]
  return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
  """Equation (1) in one kernel of cuDNN; arguments as in `attention`."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def check(name: str, q: jax.Array, k: jax.Array) -> None:
  """Raises UserError when implementation `name` does not take these, or does not run here."""
  device = jax.local_devices()[0]
  if name == "cudnn" and not fits_cudnn(q, k):
    raise UserError(
        f"cudnn attention has no kernel for {q.shape[1]} queries and {k.shape[1]} keys of "
        f"{q.shape[-1]} channels in {q.dtype}; it takes even lengths, multiples of 8 up to "
        f"{MAX_CUDNN_HEAD_DIM} channels, bfloat16 or float16. Choose auto")
  if name == "cudnn" and not has_cudnn():
    raise UserError("cudnn attention needs an NVIDIA GPU of compute capability 8.0 or more; this "
                    f"is {device.device_kind}. Choose auto")
  if name == "flash" and device.platform != "tpu":
    raise UserError(f"flash attention runs on TPUs; this is {device.device_kind}. Choose auto")


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla,
    "chunked": chunked,
    "cudnn": cudnn,
    "flash": flash.flash,
}
