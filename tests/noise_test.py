"""An image's noise is of its seed alone: no batch, mesh or number of processes changes a bit.

What is compared is what the loop itself draws: with a sampler whose every row forgets the latents
for that row's noise, the latents after row n are noise n.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

from sdjax import denoise, generate
from sdjax.cli import experiment
from sdjax.cli import main as cli
from sdjax.data import tokenizer
from sdjax.diffusion import schedules, solvers, tables
from sdjax.errors import UserError
from sdjax.models import presets
from sdjax.models.unet import UNet
from sdjax.stable_diffusion import StableDiffusion
from sdjax.train import partitioning

ROOT = Path(__file__).parents[1]
SEEDS = [*range(8), 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63, 2**64 - 2, 2**64 - 1]
ROWS = 3
SHAPE = (8, 12, 4)
FORGETFUL = (lambda path, output: ((node, [tables.Z]) for node in path.nodes), {}, {}, "trailing")


class Silent(UNet):
  """Predicts zeros, whatever it is shown."""

  def apply(self, variables, x, *_, **__):
    return 0 * x


@dataclasses.dataclass(frozen=True)
class Mute:
  """A text encoder without parameters."""
  max_length: int = 24
  layers: int = 1

  def apply(self, variables, tokens, method=None):
    return tokens if method else SimpleNamespace(hidden=[tokens[..., None] * 0.0])


MODEL = StableDiffusion(
    unet=Silent(block_out_channels=(8, 8)), vae=presets.preset("tiny")["vae"],
    text_encoders=(Mute(),), tokenizers=(tokenizer.train(["a"], 24, 600),),
    schedule=schedules.Schedule())


def drawn(seeds, **changes):
  """Returns the noise of the start, then of each row: [n 1+ROWS *SHAPE]."""
  request = generate.Request(
      prompts=["a"] * len(seeds), seeds=seeds, steps=ROWS, sampler="forgetful", guidance_scale=1.0,
      height=32, width=48, **changes)
  params = {"unet": {}, "text_encoder": {}}
  with mock.patch.dict(solvers.SAMPLERS, forgetful=FORGETFUL):
    return np.stack([generate.make_latents(MODEL, params, request, generate.Task(end=end))
                     for end in range(1 + ROWS)], axis=1)


def main(out, *meshes):
  """Draws on each mesh, "data x fsdp", of the devices of all processes."""
  experiment.start_processes()
  found = {}
  for name in meshes:
    data, fsdp = map(int, name.split("x"))
    mesh = jax.make_mesh((data, fsdp, 1), partitioning.AXES, devices=jax.devices()[:data * fsdp],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
      found[name] = drawn(SEEDS)
      start = denoise.initial_noise(denoise.seed_words(SEEDS), denoise.INITIAL, SHAPE)
      assert len(start.sharding.device_set) == data * fsdp
  if jax.process_index() == 0:
    np.savez(out, **found)


@pytest.fixture(scope="module")
def together():
  return drawn(SEEDS)


def test_batches_change_no_bit(together):
  assert together.shape == (len(SEEDS), 1 + ROWS, *SHAPE)
  order = np.random.default_rng(0).permutation(len(SEEDS))
  np.testing.assert_array_equal(drawn([SEEDS[i] for i in order]), together[order])
  np.testing.assert_array_equal(drawn(SEEDS, batch_size=5), together)  # the last is filled up
  for i in (0, 5, 15):
    np.testing.assert_array_equal(drawn(SEEDS[i:i + 1]), together[i:i + 1])


def test_noise_is_normal_and_no_two_are_alike(together):
  """All 64 bits of a seed count: `jax.random.key` would drop the upper half of them."""
  noises = together.reshape(-1, np.prod(SHAPE))
  assert np.abs(noises.mean()) < 0.05 and np.abs(noises.std() - 1) < 0.05
  alike = np.corrcoef(noises) - np.eye(len(noises))
  assert np.abs(alike).max() < 6 / np.sqrt(np.prod(SHAPE))


def test_noise_is_that_of_the_seed_in_jax(together):
  """The key of the seed, folded with the stream, then with the row; this must never change."""
  key = jax.random.fold_in(jax.random.key(5, impl="threefry2x32"), denoise.STEPS)
  for row in range(ROWS):
    np.testing.assert_allclose(
        together[5, 1 + row], jax.random.normal(jax.random.fold_in(key, row), SHAPE), atol=1e-6)


@pytest.mark.parametrize("processes, meshes", [
    (1, ("1x1", "2x1", "1x4", "4x2")),
    pytest.param(2, ("8x1", "2x4"), marks=pytest.mark.slow)], ids=["one", "two"])
def test_meshes_and_processes_change_no_bit(together, tmp_path, processes, meshes):
  child = subprocess.run(
      [sys.executable, str(ROOT / "launch/local_multiprocess.py"), "--processes", str(processes),
       "--devices", str(8 // processes), "--", sys.executable, __file__,
       str(tmp_path / "drawn.npz"), *meshes],
      capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert child.returncode == 0, child.stdout + child.stderr
  found = np.load(tmp_path / "drawn.npz")
  assert set(found) == set(meshes)
  for mesh, noises in found.items():
    np.testing.assert_array_equal(noises, together, err_msg=mesh)


def test_seeds_beyond_64_bits_are_refused(capsys):
  for seed in (-1, 2**64):
    with pytest.raises(UserError, match=f"seed is {seed}; .*between 0 and 2\\*\\*64 - 1"):
      denoise.seed_words([0, seed])
    assert cli.main(["sample", "--model", "none", "--prompt", "a", "--seed", str(seed)]) == 2
    told = capsys.readouterr().err
    assert str(seed) in told and str(2**64 - 1) in told and told.count("\n") == 1


if __name__ == "__main__":
  main(*sys.argv[1:])
