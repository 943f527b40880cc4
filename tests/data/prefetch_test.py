import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from sdjax.data.pipeline import Options, Pipeline
from sdjax.data.prefetch import BATCH_SPEC, Prefetch, local_rows
from sdjax.data.sources import open_source
from sdjax.errors import UserError


def mesh_of(*shape):
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])


def make(source):
  return Pipeline([source], batch_size=8, seed=1, options=Options(resolutions=((0, 12),)))


def test_one_device_gets_the_batches_and_the_position_of_what_it_consumed(fifty):
  expected = make(fifty).batches(5)
  with Prefetch(make(fifty), mesh_of(1, 1, 1), start=5) as batches:
    assert batches.position()["step"] == 5
    for step in range(5, 12):
      batch, host = next(batches), next(expected)
      assert isinstance(batch["image"], jax.Array) and batch["image"].dtype == np.uint8
      np.testing.assert_array_equal(batch["image"], host["image"])
      assert batches.position() == make(fifty).position(step + 1)
  with pytest.raises(StopIteration):
    next(batches)
  expected.close()


def test_errors_of_the_thread_are_raised_by_next(make_shards):
  folder = make_shards()
  pipeline = make(open_source(str(folder), strict=True))
  for path in folder.glob("*.tar"):
    path.unlink()
  batches = Prefetch(pipeline, mesh_of(1, 1, 1))
  with pytest.raises(FileNotFoundError):
    next(batches)
  assert not batches._thread.is_alive()


EIGHT = textwrap.dedent("""
    import json, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding
    from sdjax.data import prefetch
    from sdjax.data.pipeline import Options, Pipeline
    from sdjax.data.sources import open_source
    from sdjax.errors import UserError

    pipeline = Pipeline([open_source(sys.argv[1])], batch_size=8, seed=1,
                        options=Options(resolutions=((0, 12),)))
    hosts = pipeline.batches()
    host = next(hosts)
    hosts.close()
    for shape in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)):
      mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"),
                           axis_types=(jax.sharding.AxisType.Auto,) * 3)
      sharding = NamedSharding(mesh, prefetch.BATCH_SPEC)
      assert prefetch.local_rows(sharding, 8) == slice(0, 8)
      with prefetch.Prefetch(pipeline, mesh) as batches:
        batch = next(batches)
      for name, value in batch.items():
        assert value.sharding.is_equivalent_to(sharding, value.ndim)
        rows = 8 // (shape[0] * shape[1])
        assert {s.data.shape[0] for s in value.addressable_shards} == {rows}
        np.testing.assert_array_equal(value, host[name])
      if shape[0] * shape[1] > 1:
        try:
          prefetch.local_rows(sharding, 9)
          raise SystemExit("9 rows were taken")
        except UserError:
          pass
    print(json.dumps({"devices": jax.device_count()}))
""")


def test_eight_devices_hold_their_rows_of_the_same_batch(make_shards):
  environment = os.environ | {"JAX_PLATFORMS": "cpu",
                              "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  done = subprocess.run([sys.executable, "-c", EIGHT, str(make_shards())], env=environment,
                        capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["devices"] == 8


class FakeSharding:
  """What one process of several sees of a sharding: `local_rows` asks nothing else."""

  def __init__(self, axes, blocks):
    self.mesh = type("Mesh", (), {"shape": axes})
    self.spec = BATCH_SPEC
    self.blocks = blocks

  def addressable_devices_indices_map(self, shape):
    return dict(enumerate((block,) for block in self.blocks))


def test_a_process_reads_the_rows_of_its_devices():
  axes = {"data": 4, "fsdp": 2, "tensor": 1}
  second_half = [slice(8, 10), slice(10, 12), slice(12, 14), slice(14, 16)]
  assert local_rows(FakeSharding(axes, second_half), 16) == slice(8, 16)
  # Devices of one "tensor" group on two processes: both need all rows.
  one_group = {"data": 1, "fsdp": 1, "tensor": 8}
  assert local_rows(FakeSharding(one_group, [slice(None)] * 4), 16) == slice(0, 16)
  with pytest.raises(UserError, match="12 is not divisible by 8"):
    local_rows(FakeSharding(axes, second_half), 12)
