"""The mesh changes where numbers are, not what they are."""

import json
import subprocess
import sys

import numpy as np
import pytest

# argv: "toy" or "tiny", then names of MESHES. Prints the metrics of each step on each.
SCRIPT = r"""
import json, sys
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np, optax
from sdjax import meshes
from sdjax.diffusion import objectives, parts, schedules
from sdjax.models import presets
from sdjax.stable_diffusion import StableDiffusion
from sdjax.train import losses, partitioning, state, step
partitioning.MIN_SHARDED_SIZE = 64

# sizes, rules, accumulate
MESHES = {
    "one": (dict(data=1), (), 1),
    "data": (dict(data=8), ((".*", "fsdp"),), 1),
    "fsdp": (dict(data=2, fsdp=4), ((".*", "fsdp"),), 1),
    "fsdp alone": (dict(fsdp=8), ((".*", "fsdp"),), 1),
    "fsdp in parts": (dict(data=2, fsdp=2, tensor=2), ((".*", "fsdp"),), 4),
    "zero1": (dict(data=4, fsdp=2), ((".*", "zero1"),), 1),
    "zero1 of moments": (dict(data=8), (("^params", "replicate"), (".*", "zero1")), 2),
    "tensor": (dict(data=2, tensor=4), ((".*", "fsdp"),), 1),
}


def toy():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {"unet": {"conv": {"kernel": draw(3, 3, 8, 16), "bias": draw(16)},
                     "dense": {"kernel": draw(16, 8) / 4}}}
  frozen = {"vae": {"scale": draw(8), "conv": {"kernel": draw(1, 1, 8, 8)}}}
  def loss(params, frozen, batch, key, part=parts.WHOLE):
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x0 = convolve(batch["moments"], frozen["vae"]["conv"]["kernel"])
    x = x0 + part.draw(lambda shape: jax.random.normal(key, shape), x0.shape)
    unet = params["unet"]
    y = jnp.tanh(convolve(x, unet["conv"]["kernel"]) + unet["conv"]["bias"])
    squared = jnp.square(y @ unet["dense"]["kernel"] - x0).mean(axis=(1, 2, 3))
    return jnp.mean(batch["weight"] * squared), {"mse": squared.mean()}
  batch = {"moments": draw(32, 4, 4, 8), "weight": np.abs(draw(32))}
  return params, frozen, loss, batch


def tiny():
  sd = StableDiffusion(**presets.preset("tiny"), schedule=schedules.Schedule())
  params = sd.init(0)
  rng = np.random.default_rng(0)
  batch = {"moments": rng.standard_normal((8, 8, 8, 8), np.float32),
           "tokens": rng.integers(0, 600, (8, 1, 24), np.int32), "weight": np.ones(8, np.float32)}
  loss = losses.diffusion(sd, objectives.Objective(sd.schedule))
  return {"unet": params.pop("unet")}, params, loss, batch


params, frozen, loss, batch = {"toy": toy, "tiny": tiny}[sys.argv[1]]()
tx = optax.adamw(1e-3, eps=1e-3)  # a small eps would enlarge what rounding does to no gradient
shapes = state.shapes(params, frozen, tx)
for name in sys.argv[2:]:
  sizes, rules, accumulate = MESHES[name]
  mesh = partitioning.make_mesh(sizes, jax.devices()[:int(np.prod(list(sizes.values())))])
  shardings = partitioning.shardings(shapes, mesh, rules)
  config = SimpleNamespace(
      partition=rules, dtype="float32", accumulate=accumulate, ema_decay=0.9)
  rows = jax.sharding.NamedSharding(mesh, meshes.BATCH_SPEC)
  with jax.set_mesh(mesh):
    now = state.create(params, frozen, tx, 0, shardings)
    advance = step.jitted(config, mesh, loss, tx, shardings)
    found = []
    for _ in range(3):
      now, metrics = advance(now, jax.device_put(batch, rows))
      found.append({key: float(value) for key, value in metrics.items()})
  def share(tree):
    held = lambda leaf: leaf.addressable_shards[0].data.size / leaf.size
    return max(held(leaf) for leaf in jax.tree.leaves(tree) if leaf.ndim > 1 and leaf.size >= 128)
  average = [float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(now.ema)]
  print(json.dumps({"mesh": name, "steps": found, "average": average,
                    "share": [share(now.params), share(now.ema), share(now.opt_state)]}))
"""


def run(environment, model, *meshes):
  flags = environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
  child = subprocess.run(
      [sys.executable, "-c", SCRIPT, model, "one", *meshes],
      capture_output=True, text=True, env=environment | {"XLA_FLAGS": flags}, timeout=600)
  assert child.returncode == 0, child.stderr
  found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
  assert [one["mesh"] for one in found] == ["one", *meshes]
  expected, *others = found
  for other in others:
    for a, b in zip(other["steps"], expected["steps"], strict=True):
      assert a.keys() == b.keys() and a["skipped_steps"] == 0 and a["update_norm"] > 1e-3
      for key in b:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=f"{other['mesh']} {key}")
    np.testing.assert_allclose(other["average"], expected["average"], rtol=1e-5)
  return {one["mesh"]: one["share"] for one in others}


def test_a_small_network_trains_alike_on_all_meshes(environment):
  shares = {  # of parameters, average and moments that one device holds
      "data": [1, 1, 1],
      "fsdp": [1 / 4, 1 / 4, 1 / 4],
      "fsdp alone": [1 / 8, 1 / 8, 1 / 8],
      "fsdp in parts": [1 / 2, 1 / 2, 1 / 2],
      "zero1": [1 / 4, 1 / 4, 1 / 4],
      "zero1 of moments": [1, 1 / 8, 1 / 8],
      "tensor": [1, 1, 1],
  }
  assert run(environment, "toy", *shares) == shares


@pytest.mark.slow
def test_latent_diffusion_trains_alike_on_all_meshes(environment):
  run(environment, "tiny", "data", "fsdp", "zero1", "tensor")
