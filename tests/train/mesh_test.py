"""The mesh changes where numbers are, not what they are. Runs on eight fake devices."""

import json
import os
import subprocess
import sys

import numpy as np

SCRIPT = r"""
import json, pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType
from configs import sd15
from sdjax.checkpoints import train_state
from sdjax.train import loop, partitioning

data, out = sys.argv[1:]
config = sd15.get_config("tiny")
with config.unlocked():
  config.update({"total_steps": 3, "log_every_steps": 1})
  config.data.update({"urls": data, "random_crop": False, "random_flip": False})
  config.preview.every_steps = 0

losses = {}
for data_size, fsdp in ((1, 1), (8, 1), (1, 8), (2, 4)):
  devices = jax.devices()[: data_size * fsdp]
  mesh = jax.make_mesh((data_size, fsdp, 1), partitioning.AXES, devices=devices,
                       axis_types=(AxisType.Auto,) * 3)
  workdir = pathlib.Path(out) / f"{data_size}x{fsdp}"
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


def test_losses_do_not_depend_on_the_mesh(latents, tmp_path, environment):
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  child = subprocess.run(
      [sys.executable, "-c", SCRIPT, str(latents), str(tmp_path)], capture_output=True, text=True,
      env=environment | {"XLA_FLAGS": flags}, timeout=240)
  assert child.returncode == 0, child.stderr
  losses = json.loads(child.stdout.splitlines()[-1])
  alone = losses.pop("1x1")
  assert len(alone) == 3 and len(set(alone)) == 3
  for mesh, values in losses.items():
    np.testing.assert_allclose(values, alone, rtol=1e-5, err_msg=mesh)
