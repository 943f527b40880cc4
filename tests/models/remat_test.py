import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sdjax.errors import UserError
from sdjax.models import initializers, remat
from sdjax.models.unet import Condition, UNet

# One level and no middle: the fewest operations to compile.
FLAT = UNet(block_out_channels=(8,), attention=(True,), layers_per_block=1, num_heads=(2,),
            cross_attention_dim=8, norm_groups=4, mid_block=False)


@pytest.fixture(scope="module")
def setting():
  """(params of which none is zero, arguments)."""
  rng = np.random.default_rng(0)
  args = (rng.standard_normal((2, 3, 4, 4), np.float32), np.array([3, 981], np.float32),
          Condition(rng.standard_normal((2, 6, 8), np.float32)))
  shapes = jax.eval_shape(FLAT.init, jax.random.key(0), *args)["params"]
  drawn = initializers.draw({"unet": shapes}, 0)["unet"]
  return jax.tree.map(
      lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), drawn), args


def gradient(policy, args):
  unet = FLAT.clone(remat=policy)
  return jax.grad(lambda params: jnp.square(unet.apply({"params": params}, *args)).sum())


def test_what_is_named_changes_no_gradient(setting):
  params, args = setting
  plain, again = (jax.jit(gradient(policy, args))(params) for policy in ("none", "named"))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * np.abs(a).max())


def test_convolutions_are_computed_again_only_where_nothing_is_kept(setting):
  params, args = setting
  count = {}
  for policy in remat.POLICIES:
    program = str(jax.make_jaxpr(gradient(policy, args))(params))
    count[policy] = program.count("conv_general_dilated["), program.count(" exp ")
  convolutions, exponentials = zip(*count.values())
  none, named, blocks = convolutions
  assert none == named < blocks, count
  # The inside of attention is computed again by both.
  assert exponentials[0] < exponentials[1] <= exponentials[2], count


def test_the_kernel_for_tpus_runs_again_only_where_nothing_is_kept(setting):
  """Lowered for a TPU, which needs none: 32 × 32 tokens are the fewest that it attends to."""
  params, (_, t, condition) = setting
  args = (np.zeros((2, 32, 32, 4), np.float32), t, condition)
  count = {}
  with jax.set_mesh(jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
    for policy in remat.POLICIES:
      traced = jax.jit(gradient(policy, args)).trace(params)
      text = traced.lower(lowering_platforms=("tpu",)).as_text()
      count[policy] = [text.count(f"splash_mha_{name}") for name in ("fwd", "dq", "dkv")]
  assert count == {"none": [1, 1, 1], "named": [1, 1, 1], "blocks": [2, 1, 1]}


def test_unknown_policies_are_named(tiny_model):
  with pytest.raises(UserError, match="'everything'.*none, named, blocks"):
    tiny_model[0].astype("float32", remat="everything")
