import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
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
  assert partitioning.kernel_spec(shape, "fsdp", shards) == spec


def test_first_matching_rule_decides():
  mesh = partitioning.make_mesh({"data": -1, "fsdp": 1})
  tree = {"unet": {"kernel": np.zeros((8, 8))}, "vae": {"kernel": np.zeros((8, 8))}}
  with pytest.raises(UserError, match="'everywhere'"):
    partitioning.shardings(tree, mesh, (("vae", "replicate"), (".*", "everywhere")))
  partitioning.shardings(tree, mesh, (("vae|unet", "replicate"), (".*", "everywhere")))


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks of a device."""
  id: int
  slice_index: int = 0
  platform: str = "tpu"
  device_kind: str = "imagined"
  process_index: int = 0
  core_on_chip: int = 0

  @property
  def coords(self):
    return self.id % 4, self.id // 4, 0


def imagined_mesh(chips=16, slices=1, platform="tpu", **sizes):
  return partitioning.make_mesh(
      sizes, [Chip(i, i * slices // chips, platform) for i in range(chips)])


def test_rules_say_where_the_state_lies():
  kernel = jax.ShapeDtypeStruct((256, 128), np.float32)
  tree = {"params": {"unet": {"to_q": {"kernel": kernel},
                              "time_embedding": {"linear_1": {"kernel": kernel}}}},
          "opt_state": {"mu": {"unet": {"to_q": {"kernel": kernel}}}}}
  def specs(rules):
    found = partitioning.shardings(tree, imagined_mesh(data=4, fsdp=4), rules)
    assert found["params"]["unet"]["time_embedding"]["linear_1"]["kernel"].spec == P()
    return (found["params"]["unet"]["to_q"]["kernel"].spec,
            found["opt_state"]["mu"]["unet"]["to_q"]["kernel"].spec)
  assert specs(()) == (P(), P())
  assert specs(((".*", "fsdp"),)) == (P("fsdp", None),) * 2
  assert specs(((".*", "zero1"),)) == (P("data", None),) * 2
  assert specs((("^params/", "replicate"), (".*", "zero1"))) == (P(), P("data", None))


def test_slices_lie_along_data():
  mesh = imagined_mesh(chips=16, slices=2, data=-1, fsdp=4)
  slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 1}
  assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()
  with pytest.raises(UserError, match="2 slices"):
    imagined_mesh(chips=16, slices=2, data=1, fsdp=16)


@pytest.mark.parametrize("rule, sizes, platform, warns", [
    ("fsdp", dict(fsdp=16), "tpu", True),
    ("zero1", dict(data=16), "tpu", True),
    ("fsdp", dict(data=4, fsdp=4), "tpu", False),
    ("zero1", dict(data=4, fsdp=4), "tpu", False),
    ("fsdp", dict(data=16), "tpu", False),
    ("replicate", dict(data=16), "tpu", False),
    ("fsdp", dict(fsdp=16), "cuda", False),
])
def test_splitting_over_a_whole_tpu_is_warned_of(rule, sizes, platform, warns, caplog):
  types = (AxisType.Auto,) * 3
  shape = tuple(sizes.get(axis, 1) for axis in partitioning.AXES)
  chips = np.array([Chip(i, platform=platform) for i in range(16)], object).reshape(shape)
  mesh = jax.sharding.Mesh(chips, partitioning.AXES, axis_types=types)
  partitioning.warn_of_windows(mesh, ((".*", rule),))
  assert ("config.mesh.fsdp at least 2" in caplog.text) == warns


@pytest.mark.parametrize("sizes", [{"data": 3, "fsdp": 5}, {"data": -1, "fsdp": -1},
                                   {"data": 0}, {"data": -1, "pipeline": 1}])
def test_meshes_that_do_not_fit_are_refused(sizes):
  with pytest.raises(UserError, match="mesh"):
    partitioning.make_mesh(sizes)


def test_networks_compute_the_same_with_what_is_split_rounded(tiny_model, monkeypatch):
  monkeypatch.setattr(partitioning, "MIN_SHARDED_SIZE", 64)
  sd, params = tiny_model
  params = {name: params[name] for name in ("unet", "text_encoder")}
  shardings = partitioning.shardings(params, imagined_mesh(chips=4, data=4), ((".*", "zero1"),))
  sd = sd.astype("bfloat16")
  rng = np.random.default_rng(0)
  x, t = rng.standard_normal((2, 8, 8, 4), np.float32), np.array([0, 999], np.float32)
  run = jax.jit(lambda params: sd.predict(
      params, x, t, sd.encode_text(params, sd.tokenize(["a red circle", "b"]))))

  rounded = lambda leaf: np.asarray(leaf.astype(jax.numpy.bfloat16), np.float32)
  split = jax.tree.map(
      lambda leaf, sharding: leaf if sharding.spec == P() else rounded(leaf), params, shardings)
  np.testing.assert_array_equal(run(split), run(params))
  # So it is for no other reason than that these are computed in bfloat16.
  assert not np.array_equal(run(jax.tree.map(rounded, params)), run(params))
  assert sum(sharding.spec != P() for sharding in jax.tree.leaves(shardings)) > 60


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
