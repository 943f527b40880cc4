"""Rows are run in stretches, and devices do not talk while they run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdjax import denoise


def test_stretches_end_where_guidance_does_and_where_someone_watches():
  scales = np.array([1, 1, 2, 2, 2, 1], np.float32).reshape(-1, 1, 1)
  assert denoise._stretches(scales, 6) == [(0, 2), (2, 5), (5, 6)]
  assert denoise._stretches(scales, 4) == [(0, 2), (2, 4), (4, 5), (5, 6)]
  assert denoise._stretches(scales[:0], 4) == []
  assert denoise._stretches(scales[:, :0], 9) == [(0, 6)]


SCRIPT = r"""
import importlib.util, sys
import jax, numpy as np
from sdjax import denoise, generate

spec = importlib.util.spec_from_file_location("conftest", sys.argv[1])
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
sd, params = conftest.tiny_model.__wrapped__()

def make():
  return generate.text_to_image(
      sd, params, ["a red circle"] * 8, steps=3, guidance_scale=2.0, seeds=range(8), height=32,
      width=32, sampler="euler_ancestral")[1]

alone = make()
mesh = jax.make_mesh((4, 2, 1), ("data", "fsdp", "tensor"),
                     axis_types=(jax.sharding.AxisType.Auto,) * 3)
advance, asked = denoise._denoise, []
denoise._denoise = lambda *args: asked.append(args) or advance(*args)
with jax.set_mesh(mesh):
  params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  np.testing.assert_allclose(make(), alone, atol=1e-4)
  print(advance.lower(*asked[0]).compile().as_text())
"""


@pytest.mark.slow
def test_eight_devices_do_not_talk_while_they_denoise():
  flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
  child = subprocess.run(
      [sys.executable, "-c", SCRIPT, str(Path(__file__).with_name("conftest.py"))],
      capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}, timeout=600)
  assert child.returncode == 0, child.stderr
  collectives = r"= .* (all-\w+|collective-permute|reduce-scatter)(-start)?\("
  talking = {}  # computation -> how many; only the entry may, to bring the results together
  for line in child.stdout.splitlines():
    if line.endswith("{") and "(" in line:
      computation = line.split()[0]
    elif re.search(collectives, line):
      talking[computation] = talking.get(computation, 0) + 1
  assert talking == {"ENTRY": 2}
