"""Digests change with any bit, follow their formula, and do not ask where an array is."""

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
