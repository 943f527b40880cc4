"""All implementations of attention against its formula in float64 numpy, and their choice."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from sdjax.errors import UserError
from sdjax.models import attention as attention_module
from sdjax.models import flash
from sdjax.models.attention import attention, automatic, implementation


def reference(q, k, v, causal):
  logits = np.einsum("bnkd,bmkd->bknm", *(x.astype(np.float64) for x in (q, k)))
  logits /= np.sqrt(q.shape[-1])
  if causal:
    logits[..., ~np.tri(*logits.shape[-2:], dtype=bool)] = -np.inf
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  return np.einsum("bknm,bmkd->bnkd", weights, v)


def inputs(n, m, d=8, seed=0, scale=3.0):
  rng = np.random.default_rng(seed)
  return [scale * rng.standard_normal((2, length, 3, d), np.float32) for length in (n, m, m)]


def value_and_grads(function, *arrays):
  """Returns the result and the gradients of a sum of it in which every element counts anew."""
  def loss(q, k, v):
    y = function(q, k, v).astype(jnp.float32)
    return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y
  (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
  return y, *grads


def assert_close(found, expected, tolerance):
  """`tolerance` is relative to the largest number of each array."""
  for one, other in zip(found, expected):
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(attention_module, "CHUNK", 16)


@pytest.mark.parametrize("name", ["xla", "chunked"])
@pytest.mark.parametrize("d, n, m, causal", [
    (8, 33, 33, True), (64, 37, 23, False), (512, 20, 20, False)])
def test_equals_the_formula(small_chunks, name, d, n, m, causal):
  q, k, v = inputs(n, m, d, scale=3.0 * (8 / d)**0.25)
  with implementation(name):
    y = attention(q, k, v, causal=causal)
  assert_close([y], [reference(q, k, v, causal)], 2e-6)


@pytest.mark.parametrize("d, n, m, causal", [(40, 33, 23, False), (160, 37, 37, True)])
def test_chunks_change_neither_values_nor_gradients(small_chunks, d, n, m, causal):
  arrays = inputs(n, m, d, scale=1.0)
  expected = value_and_grads(lambda *x: attention_module.xla(*x, causal=causal), *arrays)
  found = value_and_grads(lambda *x: attention_module.chunked(*x, causal=causal), *arrays)
  assert_close(found, expected, 2e-6)


def test_the_tpu_kernel_interpreted_changes_neither_values_nor_gradients():
  arrays = inputs(70, 600, 40, scale=1.0)              # both padded; two blocks of keys
  expected = value_and_grads(lambda *x: attention_module.xla(*x, causal=False), *arrays)
  found = value_and_grads(lambda *x: flash.flash(*x, causal=False, interpret=True), *arrays)
  assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("d, causal", [(64, True), (160, False)])
def test_the_tpu_kernel_interpreted_equals_the_formula(d, causal):
  q, k, v = inputs(20, 20, d, scale=1.0)
  y = flash.flash(q, k, v, causal=causal, interpret=True)
  assert_close([y], [reference(q, k, v, causal)], 2e-6)


@pytest.mark.parametrize("name", ["xla", "chunked"])
def test_bfloat16_keeps_the_softmax_in_float32(name):
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(64, 600, scale=1.0))
  with implementation(name):
    y = attention(q, k, v)
  exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)), causal=False)
  assert y.dtype == jnp.bfloat16
  # A sum of 600 terms in bfloat16 would be off by more than the 2^-8 of the result's rounding.
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=2e-3, rtol=2**-7)


@pytest.mark.parametrize("name, causal", [("xla", False), ("chunked", True)])
def test_large_logits_stay_finite_with_finite_gradients(small_chunks, name, causal):
  q, k, v = inputs(40, 40, scale=100.0)                # logits to ±1e4 and more
  function = attention_module.IMPLEMENTATIONS[name]
  found = value_and_grads(lambda *x: function(*x, causal=causal), q, k, v)
  assert all(np.isfinite(x).all() for x in found)
  assert_close(found[:1], [reference(q, k, v, causal)], 2e-6)


def test_memory_of_chunks_does_not_grow_with_the_square():
  n = 2**14
  x = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
  grads = jax.grad(lambda *x: attention_module.chunked(*x, causal=False).sum(), argnums=(0, 1, 2))
  memory = jax.jit(grads).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * n**2 / 32     # of the logits, 1 GiB


def test_the_context_chooses_and_is_part_of_the_key_of_jit():
  x = jnp.ones((1, 4, 1, 8))
  function = jax.jit(lambda x: attention(x, x, x))

  def has_loops():
    return "while" in function.lower(x).as_text()
  assert not has_loops()
  with implementation("chunked"):
    assert has_loops()
    with implementation("auto"):
      assert not has_loops()
  assert not has_loops()


def test_what_cannot_be_is_told():
  with pytest.raises(UserError, match="nope.*xla, chunked, cudnn, flash"):
    implementation("nope")
  x = jnp.ones((1, 4, 1, 8))
  with implementation("flash"), pytest.raises(UserError, match="TPU"):
    attention(x, x, x)
  with implementation("cudnn"):
    for n, d, dtype, message in [
        (4, 8, "float32", "float32"), (4, 160, "bfloat16", "160 channels"),
        (77, 64, "bfloat16", "77 keys"), (4, 64, "bfloat16", "NVIDIA GPU")]:
      with pytest.raises(UserError, match=message):
        attention(*[jnp.ones((1, n, 1, d), dtype)] * 3)


# Batch, queries, keys, heads, channels, dtype; the default; what special platforms take instead.
CHOICES = {
    "a small model": ((8, 64, 64, 4, 32, "float32"), "xla", {}),
    "in 16 bits": ((8, 64, 64, 4, 32, "bfloat16"), "xla", {"cuda": "cudnn"}),
    "text": ((8, 4096, 77, 8, 40, "bfloat16"), "xla", {}),
    "512 px": ((2, 4096, 4096, 8, 40, "bfloat16"), "xla",
               {"tpu": "flash", "cpu": "chunked", "cuda": "cudnn"}),
    "512 px, heads too wide": ((2, 1024, 1024, 8, 160, "bfloat16"), "xla",
                               {"tpu": "flash", "cpu": "chunked"}),
    "an autoencoder at 2048 px": ((1, 2**16, 2**16, 1, 512, "float32"), "chunked",
                                  {"tpu": "flash", "cpu": "chunked"}),
    "many short": ((2048, 256, 1023, 8, 40, "float32"), "chunked", {}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_chooses_by_length_memory_and_platform(monkeypatch, name):
  (b, n, m, heads, d, dtype), default, special = CHOICES[name]
  monkeypatch.setattr(attention_module, "has_cudnn", lambda: True)
  q, k = (jax.ShapeDtypeStruct((b, length, heads, d), dtype) for length in (n, m))
  assert automatic(q, k) == (default, special)


def mesh_of(data, fsdp, tensor):
  return AbstractMesh(
      (data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_memory_is_counted_per_device():
  x = jax.ShapeDtypeStruct((2048, 256, 8, 40), jnp.float32)
  assert automatic(x, x)[0] == "chunked"
  with jax.sharding.use_abstract_mesh(mesh_of(4, 2, 1)):
    assert automatic(x, x)[0] == "xla"


def lowered(platform, shape):
  """Returns the program of gradients for `platform`, no matter what this machine is."""
  def grads(*x):
    return jax.grad(lambda *x: attention(*x).sum(), argnums=(0, 1, 2))(*x)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.jit(grads).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()


def test_auto_is_resolved_for_the_platform_compiled_for():
  kernels = {p: lowered(p, (2, 1024, 1, 8)).count("tpu_custom_call") for p in ("tpu", "cpu")}
  assert kernels == {"tpu": 3, "cpu": 0}               # forward; dq; dk and dv


def test_small_programs_are_those_of_xla_alone():
  short = lowered("cpu", (2, 1023, 1, 8))
  with implementation("xla"):
    assert lowered("cpu", (2, 1023, 1, 8)) == short


def test_the_tpu_kernel_is_handed_the_part_of_one_device():
  with jax.sharding.use_abstract_mesh(mesh_of(2, 2, 2)):
    assert "tensor<2x3x1024x128xf32>" in lowered("tpu", (8, 1024, 6, 40))
    # Neither does the batch divide here, nor do the heads.
    assert "tensor<2x3x1024x128xf32>" in lowered("tpu", (2, 1024, 3, 40))


SPLIT = r"""
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sdjax.models import attention, flash

def grads(function):
  return jax.jit(lambda *x: jax.grad(
      lambda *x: (function(*x) ** 2).sum(), argnums=(0, 1, 2))(*x))

mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
x = np.random.default_rng(0).standard_normal((3, 2, 40, 1, 8), np.float32)  # one head, not split
expected = grads(lambda *x: attention.xla(*x, causal=False))(*x)
with jax.set_mesh(mesh):
  x = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
  found = grads(lambda *x: flash.flash(*x, causal=False, interpret=True))(*x)
for one, other in zip(found, expected):
  np.testing.assert_allclose(one, other, atol=2e-6)
"""


def test_the_tpu_kernel_split_over_devices_computes_the_same():
  child = subprocess.run(
      [sys.executable, "-c", SPLIT], capture_output=True, text=True, timeout=120,
      env=dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4"))
  assert child.returncode == 0, child.stderr
