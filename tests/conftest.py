"""Models that several tests share."""

import importlib.metadata
import os

import pytest

# Before JAX wakes, here and in child processes: tests wait for compilers, not for what they make.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones do not know the flag
  FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)


@pytest.fixture(scope="session")
def tiny_model():
  """(sd, params) of the tiny preset, untrained, every network's output made non-zero."""
  import numpy as np

  from sdjax import pytrees
  from sdjax.data import shapes, tokenizer
  from sdjax.diffusion import schedules
  from sdjax.train import model

  captions = [shapes.caption(scene) for scene in shapes.scenes(100, seed=0)]
  sd = model.new("tiny", tokenizer.train(captions, 24, 600), schedules.Schedule(), "epsilon")
  rng = np.random.default_rng(0)

  def perturb(path, leaf):
    return leaf + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32)
  return sd, pytrees.map_paths(perturb, sd.init(0))


@pytest.fixture
def no_room():
  """Lets no file of this process grow beyond 64 KiB: writes fail as on a full disk."""
  resource = pytest.importorskip("resource")
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)
