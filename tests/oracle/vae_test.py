"""Autoencoders of all released kinds against diffusers: both ways, gradients, training."""

import functools
import json

import jax
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import model_configs, names
from sdjax.models.vae import AutoencoderKL

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

# SDXL's is that of SD1 and SD2 with another factor.
KINDS = {
    "sdxl": dict(block_out_channels=(8, 16, 24, 24), layers_per_block=2, scaling_factor=0.13025),
    "sd3": dict(block_out_channels=(8, 16, 24, 24), layers_per_block=1, latent_channels=16,
                scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False),
    "upscaler": dict(block_out_channels=(8, 16, 24), layers_per_block=2, scaling_factor=0.08333),
    "no middle": dict(block_out_channels=(8, 16), layers_per_block=1,
                      mid_block_add_attention=False, use_quant_conv=False),
}

RELEASED = {
    "sdxl": AutoencoderKL(),
    "sd3": AutoencoderKL(latent_channels=16, quant_conv=False, post_quant_conv=False),
    "upscaler": AutoencoderKL(block_out_channels=(128, 256, 512)),
}


def config_of(theirs):
  return json.loads(theirs.to_json_string())


@functools.cache
def autoencoder(kind):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  levels = len(KINDS[kind]["block_out_channels"])
  theirs = compare.perturb(diffusers.AutoencoderKL(
      **{"latent_channels": 4} | KINDS[kind], norm_num_groups=4,
      down_block_types=("DownEncoderBlock2D",) * levels,
      up_block_types=("UpDecoderBlock2D",) * levels), 0)
  ours = model_configs.read_vae(config_of(theirs))
  image = np.zeros((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), image)["params"]
  return theirs, ours, compare.load_params(theirs, shapes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [(16, 32), (33, 47)], ids=str)
def test_both_ways(kind, side):
  theirs, ours, params = autoencoder(kind)
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (2, *side, 3)).astype(np.float32)
  latents = rng.standard_normal((2, 3, 5, ours.latent_channels), np.float32)
  moments = theirs.encode(compare.nchw(image)).latent_dist.parameters
  decoded = theirs.decode(compare.nchw(latents)).sample
  (moments.square().sum() + decoded.square().sum()).backward()

  def loss(params):
    ways = (ours.apply({"params": params}, image, method="encode"),
            ours.apply({"params": params}, latents, method="decode"))
    return sum((way ** 2).sum() for way in ways), ways

  grads, ways = jax.jit(jax.grad(loss, has_aux=True))(params)
  compare.assert_close(f"{kind} encode", ways[0], compare.nhwc(moments), 1e-5)
  compare.assert_close(f"{kind} decode", ways[1], compare.nhwc(decoded), 5e-5)
  compare.assert_gradient_norms(theirs, grads)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_five_steps_of_adamw(kind):
  theirs, ours, params = autoencoder(kind)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)

  def their_loss(module):
    moments = module.encode(compare.nchw(image)).latent_dist
    decoded = module.decode(moments.mean).sample
    return (decoded - compare.nchw(image)).square().mean() + moments.parameters.square().mean()

  def our_loss(params):
    decoded, moments = ours.apply({"params": params}, image)
    return ((decoded - image) ** 2).mean() + (moments ** 2).mean()

  compare.assert_five_adamw_steps(theirs, their_loss, our_loss, params)


@pytest.mark.parametrize("kind", KINDS)
def test_config_is_written_as_it_was(kind):
  theirs, ours, _ = autoencoder(kind)
  config = config_of(theirs)
  written = json.loads(json.dumps(model_configs.write_vae(ours, config["sample_size"])))
  assert model_configs.read_vae(written) == ours
  different = {option: value for option, value in written.items()
               if option != "_diffusers_version" and config.get(option) != value}
  # Without a shift diffusers writes null, which reads as 0 in either program.
  assert different in ({}, {"shift_factor": 0.0})


@pytest.mark.parametrize("kind", RELEASED)
def test_released_ones_have_the_shapes_of_diffusers(kind):
  ours = RELEASED[kind]
  image = np.zeros((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), image)["params"]
  config = model_configs.write_vae(ours, 512)
  with torch.device("meta"):
    theirs = {name: tuple(tensor.shape) for name, tensor
              in diffusers.AutoencoderKL.from_config(config).state_dict().items()}
  assert theirs == {names.to_diffusers(path): names.shape_to_torch(path, leaf.shape)
                    for path, leaf in pytrees.flatten(shapes).items()}
