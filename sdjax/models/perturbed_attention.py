"""Perturbed attention: some images of a batch attend to nothing but each pixel to itself.

The weights softmax(q kᵀ / sqrt(d)) of a self-attention become the identity, so that what it returns
is v (Ahn et al. 2024, https://arxiv.org/abs/2403.17377, eq. 12). Guidance away from what a network
makes of that, `guidance.perturbed_scales`, needs no text.
"""

import contextlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp


def perturbed_attention(
    layers: str,
    rows: jax.Array | None,  # bool [b]
) -> contextlib.AbstractContextManager:
  """Within it, self-attentions of a UNet that is being applied return v for the images `rows`.

  Listens to the modules instead of being told to each of them: it stands between the projections
  "to_v" and "to_out_0" of every "attn1".

  Args:
    layers: regex of parameter paths, searched for: "mid_block", "up_blocks_1/attentions_0".
    rows: which images; None changes nothing.
  """
  if rows is None:
    return contextlib.nullcontext()
  values = {}

  def intercept(call, args, kwargs, context):
    path, inside = context.module.path, context.module.path[:-1]
    if context.method_name != "__call__" or path[-1:] not in (("attn1",), ("to_v",), ("to_out_0",)):
      return call(*args, **kwargs)
    if path[-1] == "attn1" and args[1] is None and re.search(layers, "/".join(path)):
      values[path] = None  # attends to itself: to be perturbed
    if path[-1] == "to_out_0" and inside in values:
      args = (jnp.where(rows[:, None, None], values.pop(inside), args[0]),)
    y = call(*args, **kwargs)
    if path[-1] == "to_v" and inside in values:
      values[inside] = y
    return y

  return nn.intercept_methods(intercept)
