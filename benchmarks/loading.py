"""Measures what a full-size Stable Diffusion 1.5 of random float32 numbers takes to write and read.

  python benchmarks/loading.py write FOLDER     4.3 GB
  python benchmarks/loading.py read FOLDER      onto the host
  python benchmarks/loading.py fsdp FOLDER      onto 8 fake devices that share every tensor
"""

import os
import sys
import threading
import time

from sdjax.checkpoints import diffusers, tensors


class Peak:
  """The most anonymous memory of this process within the block, mapped files not counted."""

  def __enter__(self):
    self.bytes, self._over = 0, threading.Event()
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def _watch(self):
    while not self._over.wait(0.005):
      with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
      self.bytes = max(self.bytes, 1024 * int(line.split()[1]))

  def __exit__(self, *_):
    self._over.set()


def model():
  """Returns Stable Diffusion 1.5 without arrays."""
  from sdjax.data import tokenizer
  from sdjax.diffusion import schedules
  from sdjax.models import presets
  from sdjax.stable_diffusion import StableDiffusion
  modules = presets.preset("sd15")
  return StableDiffusion(
      unet=modules["unet"], vae=modules["vae"], text_encoders=modules["text_encoders"],
      tokenizers=(tokenizer.clip(),), schedule=schedules.Schedule())


def main(what: str, folder: str) -> None:
  """Does one of the three, and prints seconds and the peak of memory over the model's size."""
  import jax
  import numpy as np

  from sdjax import pytrees
  from sdjax.train import partitioning
  sd = model()
  shapes = sd.param_shapes()
  size = 4 * pytrees.count(shapes)
  start = time.perf_counter()
  with Peak() as peak:
    if what == "write":
      rng = np.random.default_rng(0)
      diffusers.save(folder, sd, jax.tree.map(lambda leaf: tensors.Tensor(
          leaf.shape, "float32", lambda: rng.standard_normal(leaf.shape, np.float32)), shapes))
    else:
      place = None
      if what == "fsdp":
        mesh = partitioning.make_mesh({"data": 1, "fsdp": 8})
        place = partitioning.placer(mesh, ((".*", "fsdp"),))
      params = diffusers.load(folder, place=place)[1]
      jax.block_until_ready(params)
  print(f"{what}: {time.perf_counter() - start:.1f} s, peak {peak.bytes / 1e9:.2f} GB, "
        f"{peak.bytes / size:.3f} × the model's {size / 1e9:.2f} GB")
  if what == "fsdp":
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(params):
      for shard in leaf.addressable_shards:
        held[shard.device] += shard.data.nbytes
    print("each device holds at most", round(max(held.values()) / size, 3), "of it")


if __name__ == "__main__":
  if sys.argv[1] == "fsdp":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  main(*sys.argv[1:])
