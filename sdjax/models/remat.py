"""What the backward pass of a UNet computes again instead of keeping it in memory.

Chen et al. 2016, https://arxiv.org/abs/1604.06174: a quarter more compute where the inside of every
block is computed again; less where what takes longest in it is kept.
"""

import contextlib
import functools

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

# What is kept of the inside of each ResnetBlock and Transformer.
POLICIES = {
    "none": lambda module: module,  # everything
    "named": functools.partial(     # the names that `named_outputs` gives
        nn.remat, policy=jax.checkpoint_policies.save_only_these_names("convolution", "attention")),
    "blocks": nn.remat,             # nothing
}


def named_outputs(remat: str) -> contextlib.AbstractContextManager:
  """Within it, a UNet being applied names what "named" keeps; other policies need no names.

  These are what comes out of convolutions, and of attention: what goes into its projection. The
  fused kernel for TPUs itself names what its backward pass needs, see `flash.py`.
  """
  def intercept(call, args, kwargs, context):
    if context.method_name != "__call__":
      return call(*args, **kwargs)
    if context.module.name == "to_out_0":
      args = (checkpoint_name(args[0], "attention"),)
    y = call(*args, **kwargs)
    return checkpoint_name(y, "convolution") if isinstance(context.module, nn.Conv) else y

  return nn.intercept_methods(intercept) if remat == "named" else contextlib.nullcontext()
