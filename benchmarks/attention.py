"""Measures the implementations of attention: time on this machine, memory when compiled for a TPU.

  python benchmarks/attention.py            this machine
  python benchmarks/attention.py tpu        ahead-of-time compilation for one v5e; needs `libtpu`
                                            from PyPI, and no TPU
"""

import os
import statistics
import sys
import time

# heads × channels of Stable Diffusion 1 and 2 at their levels, and of the autoencoder.
HEADS = ((8, 40), (10, 64), (8, 80), (8, 160), (1, 512))
LENGTH = 4096


def program(name):
  """Returns the loss of a pass and its gradients, attention computed by `name`."""
  import jax

  from sdjax.models import attention

  def loss(q, k, v):
    with attention.implementation(name):
      return attention.attention(q, k, v).astype("float32").sum()
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def time_here() -> None:
  """Prints milliseconds of forward and backward passes, in turn, the median of five."""
  import jax
  import numpy as np
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32, batch 1, "
        f"{LENGTH} queries and keys")
  for heads, d in HEADS:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, LENGTH, heads, d), np.float32) for _ in range(3)]
    programs = {name: program(name) for name in ("xla", "chunked")}
    times = {name: [] for name in programs}
    for run in programs.values():
      jax.block_until_ready(run(*arrays))
    for _ in range(5):
      for name, run in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{heads} × {d}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in medians.items())
          + f", ratio {medians['xla'] / medians['chunked']:.2f}")


def compile_for_tpu() -> None:
  """Prints MiB of temporary memory of the same program, bfloat16, batch 2."""
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
  import jax
  from jax.experimental import topologies
  device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  print(f"jax {jax.__version__}, compiled for one {device.device_kind}, bfloat16, batch 2, "
        f"{LENGTH} queries and keys")
  for heads, d in HEADS:
    shape = jax.ShapeDtypeStruct((2, LENGTH, heads, d), "bfloat16", sharding=sharding)
    memory = {}
    for name in ("xla", "chunked", "auto"):
      compiled = program(name).lower(shape, shape, shape).compile()
      memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{heads} × {d}: " + ", ".join(f"{name} {mib:.1f} MiB" for name, mib in memory.items()))


if __name__ == "__main__":
  compile_for_tpu() if sys.argv[1:] == ["tpu"] else time_here()
