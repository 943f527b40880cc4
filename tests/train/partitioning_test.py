import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sdjax.checkpoints import diffusers
from sdjax.errors import UserError
from sdjax.train import partitioning


@pytest.mark.parametrize("shape, shards, spec", [
    ((3, 3, 128, 64), 4, P(None, None, "fsdp", None)),   # convolution, inputs are more
    ((3, 3, 64, 128), 4, P(None, None, None, "fsdp")),
    ((3, 3, 130, 128), 4, P(None, None, None, "fsdp")),  # inputs do not divide
    ((512, 128), 8, P("fsdp", None)),
    ((130, 130), 4, P()),                                # neither divides
    ((4096,), 4, P()),                                   # a bias
    ((3, 3, 16, 16), 4, P()),                            # small
    ((512, 512), 1, P()),
])
def test_kernels_are_split_along_their_larger_channels(shape, shards, spec):
  assert partitioning.fsdp_spec(shape, shards) == spec


def test_first_matching_rule_decides():
  mesh = partitioning.make_mesh({"data": -1, "fsdp": 1})
  tree = {"unet": {"kernel": np.zeros((8, 8))}, "vae": {"kernel": np.zeros((8, 8))}}
  with pytest.raises(UserError, match="'everywhere'"):
    partitioning.shardings(tree, mesh, (("vae", "replicate"), (".*", "everywhere")))
  partitioning.shardings(tree, mesh, (("vae|unet", "replicate"), (".*", "everywhere")))


@pytest.mark.parametrize("sizes", [{"data": 3, "fsdp": 5}, {"data": -1, "fsdp": -1},
                                   {"data": 0}, {"data": -1, "pipeline": 1}])
def test_meshes_that_do_not_fit_are_refused(sizes):
  with pytest.raises(UserError, match="mesh"):
    partitioning.make_mesh(sizes)


SHARDED_LOAD = """
import sys
import jax, numpy as np
from sdjax import pytrees
from sdjax.checkpoints import diffusers
from sdjax.train import partitioning
partitioning.MIN_SHARDED_SIZE = 256
mesh = partitioning.make_mesh({"data": 1, "fsdp": 8})
_, whole = diffusers.load(sys.argv[1])
_, split = diffusers.load(sys.argv[1], place=partitioning.placer(mesh, ((".*", "fsdp"),)))
held = dict.fromkeys(range(8), 0)
for leaf in jax.tree.leaves(split):
  for shard in leaf.addressable_shards:
    held[shard.device.id] += shard.data.size
assert jax.tree.all(jax.tree.map(np.array_equal, whole, split))
print(max(held.values()) / pytrees.count(whole))
"""


def test_a_model_is_read_straight_onto_the_mesh(tiny_model, tmp_path):
  diffusers.save(tmp_path / "model", *tiny_model)
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  done = subprocess.run(
      [sys.executable, "-c", SHARDED_LOAD, tmp_path / "model"], env=environment, text=True,
      cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 0.2  # an eighth, and what is too small to be split
