"""T2I-Adapters of all kinds against diffusers: features, gradients, training, configs."""

import functools
import json

import jax
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import adapter_configs, names
from sdjax.models.adapter import T2IAdapter

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

KINDS = {
    "full": dict(adapter_type="full_adapter", channels=[8, 16, 24, 24], downscale_factor=4),
    "sketch": dict(adapter_type="full_adapter", channels=[8, 16, 24, 24], downscale_factor=4,
                   in_channels=1, num_res_blocks=1),
    "xl": dict(adapter_type="full_adapter_xl", channels=[8, 16, 24, 24], downscale_factor=8),
    "light": dict(adapter_type="light_adapter", channels=[8, 16, 32], downscale_factor=4,
                  num_res_blocks=3),
}

RELEASED = {
    "full": T2IAdapter(),
    "xl": T2IAdapter(kind="full_adapter_xl", downscale_factor=16),
    "light": T2IAdapter(kind="light_adapter", channels=(320, 640, 1280), num_res_blocks=4),
}


def config_of(theirs):
  return json.loads(theirs.to_json_string())


@functools.cache
def adapter(kind):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  theirs = compare.perturb(diffusers.T2IAdapter(**KINDS[kind]), 0)
  ours = adapter_configs.read_adapter(config_of(theirs))
  shapes = jax.eval_shape(ours.init, jax.random.key(0), picture(ours, 8, 8))["params"]
  return theirs, ours, compare.load_params(theirs, shapes)


def picture(ours, h, w):
  shape = (2, h * ours.downscale_factor, w * ours.downscale_factor, ours.in_channels)
  return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [(8, 16), (7, 11)], ids=str)
def test_features(kind, side):
  theirs, ours, params = adapter(kind)
  hint = picture(ours, *side)
  expected = theirs(compare.nchw(hint))
  sum(x.square().sum() for x in expected).backward()

  def loss(params):
    features = ours.apply({"params": params}, hint)
    return sum((x ** 2).sum() for x in features), features

  grads, features = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert len(features) == len(expected) == 4
  for i, (x, their_x) in enumerate(zip(features, expected)):
    compare.assert_close(f"{kind} {i}", x, compare.nhwc(their_x), 5e-6)
  compare.assert_gradient_norms(theirs, grads)


@pytest.mark.parametrize("kind", ["full", "xl", "light"])
def test_five_steps_of_adamw(kind):
  theirs, ours, params = adapter(kind)
  hint = picture(ours, 8, 8)
  compare.assert_five_adamw_steps(
      theirs, lambda module: sum(x.square().mean() for x in module(compare.nchw(hint))),
      lambda params: sum((x ** 2).mean() for x in ours.apply({"params": params}, hint)), params)


@pytest.mark.parametrize("kind", KINDS)
def test_config_is_written_as_it_was(kind):
  theirs, ours, _ = adapter(kind)
  written = json.loads(json.dumps(adapter_configs.write_adapter(ours)))
  assert adapter_configs.read_adapter(written) == ours
  assert written == config_of(theirs) | {"_diffusers_version": written["_diffusers_version"]}


@pytest.mark.parametrize("kind", RELEASED)
def test_released_ones_have_the_shapes_of_diffusers(kind):
  ours = RELEASED[kind]
  shapes = jax.eval_shape(ours.init, jax.random.key(0), picture(ours, 8, 8))["params"]
  with torch.device("meta"):
    theirs = diffusers.T2IAdapter.from_config(adapter_configs.write_adapter(ours)).state_dict()
  assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
      names.to_diffusers(path): names.shape_to_torch(path, leaf.shape)
      for path, leaf in pytrees.flatten(shapes).items()}
