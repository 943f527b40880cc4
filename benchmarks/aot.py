"""Compiles the training step for 16 TPU v5e chips, ahead of time, and tells what it would move.

  python benchmarks/aot.py                  Stable Diffusion 1.5 on each of MESHES, as a table
  python benchmarks/aot.py sd15 remat       the policies of `models/remat.py` at the same batch
  python benchmarks/aot.py small            a network that compiles in a minute

Needs `libtpu` from PyPI (pip install 'sdjax[aot]'), and no TPU. Bytes are counted per chip and
step: what comes out of gathers, and what goes into reductions. Loops count once.
"""

import collections
import math
import os
import re
import sys
import time

TOPOLOGY = "v5e:4x4"
CHIPS = 16
# name -> sizes, rule, recomputed, images per chip of SD1.5. Splitting over one axis of two, never
# over all chips, keeps XLA from loops of permutations: `partitioning.warn_of_windows`.
MESHES = {
    "data": (dict(data=16), "replicate", "blocks", 1),
    "fsdp": (dict(data=4, fsdp=4), "fsdp", "blocks", 32),
    "zero1": (dict(data=4, fsdp=4), "zero1", "named", 16),
}
REMAT = {f"fsdp {remat}": (dict(data=4, fsdp=4), "fsdp", remat, 8)
         for remat in ("none", "named", "blocks")}
TABLES = {"meshes": MESHES, "remat": REMAT}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(text: str) -> dict[tuple[str, str], int]:
  """Returns {(kind, dtype): bytes} of a compiled program.

  Clones of an instruction that the compiler has split in time share a channel; a reduce-scatter is
  an all-reduce within a computation that so is called.
  """
  found, computation = {}, ""
  for line in text.splitlines():
    if line.startswith(("%", "ENTRY")):
      computation = line.split()[0]
    match = re.search(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(.*channel_id=(\d+)", line)
    if match:
      result, kind, is_start, channel = match.groups()
      if kind == "all-reduce" and "reduce-scatter" in computation:
        kind = "reduce-scatter"
      arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", result)
      # The start of a permutation returns what goes in, what comes out, and two numbers.
      found.setdefault((kind, channel), arrays[:1] if is_start and "permute" in kind else arrays)
  total = collections.Counter()
  for (kind, _), arrays in found.items():
    for dtype, shape in arrays:
      if dtype in BYTES:
        total[kind, dtype] += BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
  return dict(total)


def lower(model: str, name: str):
  """Returns (lowered step, shapes, shardings) of a model for a row of MESHES or REMAT."""
  import jax
  from jax.experimental import topologies
  from ml_collections import ConfigDict

  from configs import common
  from sdjax import meshes
  from sdjax.diffusion import objectives, schedules
  from sdjax.models import presets
  from sdjax.stable_diffusion import StableDiffusion
  from sdjax.train import losses, optimizer, partitioning, state, step

  sizes, rule, remat, images = (MESHES | REMAT)[name]
  config = common.defaults()
  config.dtype, config.partition, config.accumulate = "bfloat16", ((".*", rule),), 1
  config.mesh = ConfigDict(sizes)
  modules, side = presets.preset("sd15"), 64
  if model == "small":
    modules, side, images = presets.preset("tiny"), 16, 4
    modules["unet"] = modules["unet"].clone(
        block_out_channels=(64, 128), cross_attention_dim=32, mid_block=False)
  sd = StableDiffusion(**modules, schedule=schedules.Schedule()).astype(config.dtype, remat)
  tx = optimizer.make(config.optimizer, config.total_steps)
  params = sd.param_shapes()
  shapes = state.shapes({"unet": params.pop("unet")}, params, tx)

  mesh = partitioning.make_mesh(sizes, topologies.get_topology_desc(TOPOLOGY, "tpu").devices)
  shardings = partitioning.shardings(shapes, mesh, config.partition)
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  rows, length = CHIPS * images, modules["text_encoders"][0].max_length
  batch = {"moments": jax.ShapeDtypeStruct((rows, side, side, 8), "float32"),
           "tokens": jax.ShapeDtypeStruct((rows, 1, length), "int32"),
           "weight": jax.ShapeDtypeStruct((rows,), "float32")}
  spread = jax.sharding.NamedSharding(mesh, meshes.BATCH_SPEC)
  loss = losses.diffusion(sd, objectives.Objective(sd.schedule))
  # No `jax.set_mesh`: constants could not be put onto chips that are not there.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = step.jitted(config, mesh, loss, tx, shardings).lower(
        jax.tree.map(place, shapes, shardings),
        jax.tree.map(lambda leaf: place(leaf, spread), batch))
  return lowered, shapes, shardings


def measure(model: str, name: str) -> dict:
  """Compiles a row of MESHES or REMAT and returns what is known of it, sizes in bytes."""
  import jax
  lowered, shapes, shardings = lower(model, name)
  start = time.perf_counter()
  # A quarter of the time to compile, for a program that would run a little slower.
  compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0})
  memory, text = compiled.memory_analysis(), compiled.as_text()

  def split(name):
    leaves = zip(jax.tree.leaves(getattr(shapes, name)), jax.tree.leaves(getattr(shardings, name)))
    return sum(leaf.size for leaf, sharding in leaves if any(sharding.spec))

  return {
      "mesh": name,
      "seconds": time.perf_counter() - start,
      "params": sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
      "split": split("params"),         # numbers
      "split_frozen": split("frozen"),
      "arguments": memory.argument_size_in_bytes,
      "output": memory.output_size_in_bytes,
      "alias": memory.alias_size_in_bytes,
      "temporary": memory.temp_size_in_bytes,
      "windowed": len(re.findall(r"while\(.*windowed", text)),
      "collectives": {" ".join(key): size for key, size in collectives(text).items()},
  }


def main(model: str, table: str = "meshes") -> None:
  """Prints one of TABLES."""
  print("| mesh | rule | remat | images per chip | compile, s | state, GiB | temporary, GiB | "
        + " | ".join(f"{kind}, MiB" for kind in KINDS) + " |\n" + "|---" * (7 + len(KINDS)) + "|")
  for name, (sizes, rule, remat, images) in TABLES[table].items():
    found = measure(model, name)
    moved = [sum(size for key, size in found["collectives"].items() if key.startswith(kind + " "))
             for kind in KINDS]
    mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    print(f"| {mesh} | {rule} | {remat} | {images if model == 'sd15' else 4} | "
          f"{found['seconds']:.0f} | {found['arguments'] / 2**30:.2f} | "
          f"{found['temporary'] / 2**30:.2f} | "
          + " | ".join(f"{size / 2**20:.1f}" for size in moved) + " |", flush=True)


# Offline, and beside other processes that have libtpu open.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "JAX_PLATFORMS": "cpu"}
if __name__ == "__main__":
  main(*sys.argv[1:] or ["sd15"])
