"""How many parts a batch is computed in changes memory, not what is learned."""

import dataclasses
import functools

import jax
import numpy as np

from sdjax.diffusion import objectives
from sdjax.diffusion.parts import Part
from sdjax.models.unet import UNet
from sdjax.train import losses


def test_losses_of_parts_are_that_of_the_batch_with_all_its_noise(tiny_model):
  # One level and no middle: the fewest operations to compile.
  sd = dataclasses.replace(tiny_model[0], unet=UNet(
      block_out_channels=(8,), attention=(True,), layers_per_block=1, num_heads=(2,),
      cross_attention_dim=8, norm_groups=4, mid_block=False, dropout=0.3))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), sd.init(0))
  batch = {"moments": rng.normal(size=(4, 3, 4, 8)).astype(np.float32),
           "context": rng.normal(size=(4, 6, 8)).astype(np.float32),
           "weight": np.array([1, 1, 0.5, 2], np.float32)}
  loss = losses.diffusion(
      sd, objectives.Objective(sd.schedule, weighting="min_snr", noise_offset=0.1))

  @functools.partial(jax.jit, static_argnums=2)
  def run(rows, number, parts):
    return loss(params, {}, rows, jax.random.key(7), Part(number, parts))[0]

  def mean(parts):
    return np.mean([run({name: x[i::parts] for name, x in batch.items()}, i, parts)
                    for i in range(parts)])

  whole = mean(1)
  for parts in (2, 4):
    np.testing.assert_allclose(mean(parts), whole, rtol=1e-6)


def test_latents_of_parts_are_drawn_as_of_the_batch(tiny_model):
  sd, _ = tiny_model
  moments, key = np.random.default_rng(0).normal(size=(6, 4, 4, 8)), jax.random.key(0)
  whole = sd.latents(moments, key)
  for i in range(3):
    np.testing.assert_array_equal(sd.latents(moments[i::3], key, Part(i, 3)), whole[i::3])
