"""The mesh changes where numbers are, not what they are."""

import json
import subprocess
import sys

import numpy as np
import pytest

# argv: shards, folder for the runs, changes to the config as JSON, meshes as "2x4".
SCRIPT = r"""
import json, pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType
from configs import sd15
from sdjax.checkpoints import train_state
from sdjax.train import loop, partitioning

data, out, changes, *meshes = sys.argv[1:]
config = sd15.get_config("tiny")
with config.unlocked():
  config.update_from_flattened_dict(json.loads(changes))
  config.log_every_steps, config.data.urls = 1, data
  config.preview.every_steps = 0

losses = {}
for name in meshes:
  data_size, fsdp = map(int, name.split("x"))
  devices = jax.devices()[: data_size * fsdp]
  mesh = jax.make_mesh((data_size, fsdp, 1), partitioning.AXES, devices=devices,
                       axis_types=(AxisType.Auto,) * 3)
  workdir = pathlib.Path(out) / name
  with jax.set_mesh(mesh):
    run, params = loop.prepare(config, workdir, mesh)
    saved = train_state.Checkpoints(workdir / "checkpoints", keep=1)
    now, start = loop.begin(run, params, saved)
    if fsdp > 1:
      kernel = now.params["unet"]["up_blocks_0"]["resnets_0"]["conv1"]["kernel"]
      shard = kernel.addressable_shards[0].data
      assert shard.size * fsdp == kernel.size, kernel.sharding
    now = loop.steps(run, mesh, now, start, saved)
    saved.close()
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses[workdir.name] = [row["loss"] for row in rows]
print(json.dumps(losses))
"""


@pytest.mark.parametrize("meshes", [
    ("2x4",), pytest.param(("8x1", "1x8"), marks=pytest.mark.slow)], ids=" ".join)
def test_losses_do_not_depend_on_the_mesh(latents, tmp_path, environment, alone, meshes):
  changes, expected = alone
  few = json.dumps(changes | {"total_steps": 2})
  flags = environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
  child = subprocess.run(
      [sys.executable, "-c", SCRIPT, str(latents), str(tmp_path), few, *meshes],
      capture_output=True, text=True, env=environment | {"XLA_FLAGS": flags}, timeout=600)
  assert child.returncode == 0, child.stderr
  losses = json.loads(child.stdout.splitlines()[-1])
  assert losses.keys() == set(meshes)
  for mesh, values in losses.items():
    np.testing.assert_allclose(values, [expected[1][0], expected[2][0]], rtol=1e-5, err_msg=mesh)
