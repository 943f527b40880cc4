"""Digests change with any bit, follow their formula, and do not ask where an array is."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints import digests


def mix(h):
  h ^= h >> np.uint32(16)
  h *= np.uint32(0x85EBCA6B)
  h ^= h >> np.uint32(13)
  h *= np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


def by_numpy(x):
  """The formula of the module's docstring, one row-major index at a time."""
  bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
  place = np.arange(bits.size, dtype=np.uint32) * np.uint32(0x9E3779B9)
  return [int(mix(bits ^ place).sum(dtype=np.uint32)), int(mix(bits + place).sum(dtype=np.uint32))]


@pytest.mark.parametrize("x", [
    np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32),
    np.random.default_rng(1).normal(size=(4, 6)).astype(jnp.bfloat16),
    np.arange(-3, 3, dtype=np.int8), np.array([True, False]), np.int32(7)],
    ids=lambda x: f"{x.dtype} {x.shape}")
def test_a_digest_follows_its_formula(x):
  assert digests.of({"a": jnp.asarray(x)})["a"] == by_numpy(np.asarray(x))


def test_mix_is_murmurs():
  """The first values of fmix32 of the reference implementation, by its published constants."""
  assert int(digests._mix(jnp.uint32(0))) == 0
  assert int(digests._mix(jnp.uint32(1))) == 0x514E28B7


def test_a_key_is_digested_as_its_words():
  words = np.array([1, 2], np.uint32)
  key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
  assert digests.of({"key": key})["key"] == by_numpy(words)


# Prints the digest of one array on 8 devices, laid out in many ways, and who talks to whom.
SCRIPT = r"""
import json, re
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sdjax.checkpoints import digests

mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
x = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
for spec in P(), P("a"), P(None, "b"), P(("b", "a"), None), P("b", "a"):
  leaf = jax.device_put(x, NamedSharding(mesh, spec))
  program = digests._digest.lower(mesh, spec, leaf).compile().as_text()
  print(json.dumps([digests.of({"a": leaf})["a"],
                    re.findall("all-|collective|reduce-scatter", program)]))
"""


def test_no_mesh_changes_a_digest_and_no_device_talks():
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  child = subprocess.run(
      [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True,
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
  x = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
  assert [json.loads(line) for line in child.stdout.splitlines()] == [[by_numpy(x), []]] * 5


def test_every_single_bit_changes_both_numbers():
  x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
  before = digests.of({"a": x})["a"]
  for bit in range(8 * x.nbytes):
    damaged = x.copy()
    damaged.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    after = digests.of({"a": damaged})["a"]
    assert after[0] != before[0] and after[1] != before[1], bit


def test_exchanged_numbers_are_seen():
  x = np.arange(12, dtype=np.float32)
  assert digests.of({"a": x}) != digests.of({"a": x[::-1].copy()})


def test_what_differs_is_named():
  then = {"b": [1, 2], "a": [3, 4], "c": [5, 6]}
  assert digests.difference(then, dict(then)) == ""
  assert "of b are" in digests.difference(then, then | {"b": [1, 3]})
  assert "a and of 1 more" in digests.difference(then, {"b": [1, 2], "c": [5, 7]})
