"""Dropout whose mask for a row depends on that row's number alone."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp


def dropout_by_row(rows: jax.Array) -> contextlib.AbstractContextManager:  # int32 [b]
  """Within it, each row of what a network drops out has a mask of its own number.

  So the mask does not depend on which other rows are computed at the same time. Listens to the
  modules, as `perturbed_attention` does, instead of being told to each block.

  Args:
    rows: numbers of the rows of what the network reads.
  """
  def intercept(call, args, kwargs, context):
    dropout = context.module
    if not isinstance(dropout, nn.Dropout) or dropout.deterministic or dropout.rate == 0:
      return call(*args, **kwargs)
    (x,) = args
    key, kept = dropout.make_rng("dropout"), 1 - dropout.rate
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, kept, x.shape[1:]))(keys)
    return jnp.where(mask, x / kept, 0)

  return nn.intercept_methods(intercept)
