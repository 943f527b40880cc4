import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

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
