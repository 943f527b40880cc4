"""The machines that sdjax is launched on, as one table, and the environment that each asks for.

  python launch/targets.py           prints the table
  python launch/targets.py v5e-16    prints one target's environment, for launch/run.sh to evaluate

TPU slices bear the names that Google gives them: v4 and v5p count TensorCores, two to a chip, v5e
and v6e count chips. A GPU target is one node. Sources, read in November 2026:

  TPU slices, memory   https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e)
  runtime versions     https://cloud.google.com/tpu/docs/runtimes
  GKE labels           https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
  GPU nodes            https://cloud.google.com/compute/docs/gpus
"""

import dataclasses
import math
import sys


@dataclasses.dataclass(frozen=True)
class Target:
  """One slice of TPUs, one node of GPUs, or this machine.

  Attributes:
    platform: "tpu", "gpu" or "cpu".
    hosts: virtual machines, of one process each.
    chips_per_host: devices of each process.
    hbm_gib: memory of one chip, 0 where it is the host's. Of GPUs as NVIDIA states it, in GB.
    topology: of the slice's torus, as GKE labels it.
    accelerator: what Cloud TPU, xpk and SkyPilot call it, each with prefixes of its own.
    runtime_version: of a TPU VM's software.
    gke_accelerator: the node pool's label.
    aot: the name that `jax.experimental.topologies.get_topology_desc` takes, to compile without
      the machine.
    settings: (variable, value, reason) for the environment.
  """
  platform: str
  hosts: int
  chips_per_host: int
  hbm_gib: int = 0
  topology: str = ""
  accelerator: str = ""
  runtime_version: str = ""
  gke_accelerator: str = ""
  aot: str = ""
  settings: tuple[tuple[str, str, str], ...] = ()


# Variables whose words add up: what the user has set comes last, where it wins.
ADD_UP = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
# Older names of variables: JAX refuses both at once, so who has set the old one keeps it.
OLD_NAMES = {"XLA_CLIENT_MEM_FRACTION": "XLA_PYTHON_CLIENT_MEM_FRACTION"}

ALL = (
    ("PYTHONUNBUFFERED", "1", "lines appear when they are written"),
    ("SDJAX_START_TIMEOUT_S", "600", "the hosts of a pod come up minutes apart"),
)

# XLA fuses collectives with computation unasked: the flags that MaxText "makes sure" with
# (xla_tpu_enable_async_collective_fusion and its kin) changed nothing in a step compiled for
# v5e:4x4 with libtpu 0.0.42, so they are not here.
TPU = ALL + (
    ("LIBTPU_INIT_ARGS", "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
     "several slices: overlaps the sum of gradients over the data centre's network; MaxText's "
     "DATA_PARALLEL_OVERLAP"),
    ("LIBTPU_INIT_ARGS", "--xla_tpu_data_parallel_opt_different_sized_ops=true",
     "the same for sums of unequal size, as a UNet's are"),
)

V6E = TPU + (
    ("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304",
     "v6e has more fast memory than the default lets one fusion use; MaxText's value for it"),
)

# https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
GPU = ALL + (
    ("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true",
     "gathers and sums run beneath the computation; NVIDIA's images have it, too"),
    ("XLA_CLIENT_MEM_FRACTION", "0.9",
     "JAX takes 0.75 by default; the rest suffices for cuDNN and NCCL"),
    ("NCCL_LAUNCH_MODE", "GROUP",
     "one process drives all GPUs of a node, where cudaFree may else hang a collective"),
)

# name: (TensorCores by which names count, GiB per chip, accelerator, runtime, GKE label, settings,
#        topologies)
GENERATIONS = {
    "v4": (2, 32, "v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", TPU,
           ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")),
    "v5e": (1, 16, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", TPU,
            ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": (2, 95, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", TPU,
            ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")),
    "v6e": (1, 32, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", V6E,
            ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}

TARGETS = {
    "cpu": Target("cpu", 1, 1, settings=ALL[:1]),
    # A pod for the poor: two processes of this machine with four fake devices each.
    "cpu-2x4": Target("cpu", 2, 4, settings=ALL[:1]),
    "a100-8": Target("gpu", 1, 8, 40, "", "A100", "", "nvidia-tesla-a100", "", GPU),
    "h100-8": Target("gpu", 1, 8, 80, "", "H100", "", "nvidia-h100-80gb", "", GPU),
    "h200-8": Target("gpu", 1, 8, 141, "", "H200", "", "nvidia-h200-141gb", "", GPU),
    "b200-8": Target("gpu", 1, 8, 180, "", "B200", "", "nvidia-b200", "", GPU),
}

for generation, (cores, gib, prefix, runtime, label, settings, topologies) in GENERATIONS.items():
  for topology in topologies:
    chips = math.prod(map(int, topology.split("x")))
    # Hosts of a larger slice have four chips; the 2x4 of v5e and v6e is one host of eight.
    per_host = 8 if topology == "2x4" else 4
    TARGETS[f"{generation}-{chips * cores}"] = Target(
        "tpu", chips // per_host, per_host, gib, topology, f"{prefix}-{chips * cores}", runtime,
        label, f"{generation}:{topology}", settings)


def find(name: str) -> Target:
  """Returns the target called `name`.

  Raises:
    KeyError: whose message lists all.
  """
  if name not in TARGETS:
    raise KeyError(f"there is no target {name!r}; choose one of {', '.join(TARGETS)}")
  return TARGETS[name]


def environment(target: Target) -> str:
  """Returns lines of shell that set what `target` asks for and spare what the user has set."""
  lines = []
  for variable, value, reason in target.settings:
    ours = f"{value} ${{{variable}:-}}" if variable in ADD_UP else f"${{{variable}:-{value}}}"
    export = f'export {variable}="{ours}"'
    if variable in OLD_NAMES:
      export = f'[[ -n "${{{OLD_NAMES[variable]}:-}}" ]] || {export}'
    lines += [f"# {reason}", export]
  return "\n".join(lines)


def table() -> str:
  """Returns all targets as a table for people."""
  row = "{:<9} {:>5}  {:>10}  {:>8}  {:<8}  {}".format
  lines = [row("target", "hosts", "chips/host", "GiB/chip", "topology", "compiles ahead for")]
  lines += [row(name, target.hosts, target.chips_per_host, target.hbm_gib or "-",
                target.topology or "-", target.aot or "-") for name, target in TARGETS.items()]
  return "\n".join(lines)


def main(argv: list[str]) -> int:
  if not argv:
    print(table())
    return 0
  try:
    print(environment(find(argv[0])))
  except KeyError as error:
    print(f"targets: error: {error.args[0]}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
