"""Attention against its formula in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.attention import attention


def reference(q, k, v, causal):
  out = np.zeros(q.shape)
  for b, n, head in np.ndindex(q.shape[:3]):
    seen = n + 1 if causal else k.shape[1]
    logits = k[b, :seen, head].astype(np.float64) @ q[b, n, head] / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max())
    out[b, n, head] = weights / weights.sum() @ v[b, :seen, head]
  return out


def inputs(n, m, seed=0, scale=3.0):
  rng = np.random.default_rng(seed)
  return [scale * rng.standard_normal((2, length, 3, 8), np.float32) for length in (n, m, m)]


@pytest.mark.parametrize("n, m, causal", [(5, 7, False), (6, 6, True)])
def test_equals_the_formula(n, m, causal):
  q, k, v = inputs(n, m)
  np.testing.assert_allclose(
      attention(q, k, v, causal=causal), reference(q, k, v, causal), atol=5e-6)


def test_large_logits_stay_finite_with_finite_gradients():
  q, k, v = inputs(4, 4, scale=100.0)
  value, grads = jax.value_and_grad(lambda *x: attention(*x).sum(), argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)


def test_bfloat16_keeps_the_softmax_in_float32():
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(64, 512, scale=1.0))
  y = attention(q, k, v)
  exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)), causal=False)
  assert y.dtype == jnp.bfloat16
  # A sum of 512 terms in bfloat16 would be off by more than the 2^-8 of the result's rounding.
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=2e-3, rtol=2**-7)
