"""The compiled step, one program for each shape of batch, and how much of its chip it can use."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from sdjax import pytrees
from sdjax.train.goodput import Goodput
from sdjax.train.losses import Batch, Metrics
from sdjax.train.state import TrainState
from sdjax.train.watchdog import Watchdog

# Operations per second of one device in dense bfloat16 matrix products, by its `device_kind`. Of
# TPUs: https://cloud.google.com/tpu/docs/v5p and so on, where v2, v3 and 7x have two devices to a
# chip; of GPUs: NVIDIA's data sheets, without sparsity.
PEAKS = (
    (r"^TPU v2", 22.5e12), (r"^TPU v3", 61.5e12), (r"^TPU v4$", 275e12),
    (r"^TPU v5 ?(lite|e)", 197e12), (r"^TPU v5", 459e12), (r"^TPU v6", 918e12),
    (r"^TPU ?7", 1153.5e12),
    (r"GB200", 2500e12), (r"B200", 2250e12), (r"H100 PCIe", 756e12), (r"H100 NVL", 835e12),
    (r"H100|H200", 989.4e12), (r"A100", 312e12), (r"L40S", 362e12), (r"L4$", 121e12),
    (r"RTX 4090", 165.2e12), (r"V100", 125e12), (r"T4$", 65e12),
)


class Programs:
  """Runs a step, compiled at the first batch of each shape."""

  def __init__(self, advance: Any, accumulate: int, goodput: Goodput, watch: Watchdog):
    """Compiles nothing yet.

    Args:
      advance: of `step.jitted`.
      accumulate: parts that its batch is cut into.
      goodput, watch: told when it compiles.
    """
    self._advance, self._accumulate = advance, accumulate
    self._goodput, self._watch = goodput, watch
    self._made: dict[Any, tuple[Callable, float]] = {}

  def __call__(self, now: TrainState, batch: Batch) -> tuple[TrainState, Metrics, float]:
    """Returns the next state, the metrics, and how many floating-point operations that takes."""
    shapes = tuple((name, batch[name].shape) for name in sorted(batch))
    if shapes not in self._made:
      self._watch.be_patient()
      with self._goodput.doing("compile"):
        lowered = self._advance.lower(now, batch)
        # Counting takes a second, and of CPUs nothing is told.
        count = 0.0 if jax.default_backend() == "cpu" else operations(lowered, self._accumulate)
        self._made[shapes] = lowered.compile(), count
        if jax.process_count() > 1:
          # One that finds its program in the cache is minutes ahead of one that compiles, and the
          # connections that the first run of a program makes are given up on CPUs after 30 s.
          multihost_utils.sync_global_devices("compiled")
    program, count = self._made[shapes]
    return *program(now, batch), count


def operations(lowered: jax.stages.Lowered, accumulate: int) -> float:
  """Returns the floating-point operations of a step on all devices together, about.

  As XLA counts them before it optimizes: what is computed again in the backward pass counts, and
  what a kernel of our own does is not seen. A loop counts once: of accumulation all turns are
  added here, with the little that lies outside.
  """
  return lowered.cost_analysis().get("flops", 0.0) * accumulate


def utilization(operations_per_s: float, device: jax.Device, count: int) -> dict[str, float]:
  """Returns operations per second and device, and their share of the peak where that is known.

  Args:
    operations_per_s: of all devices together.
    device: one of them. Of a CPU, nothing is told.
    count: how many there are.
  """
  if device.platform == "cpu" or not operations_per_s:
    return {}
  each = operations_per_s / count
  peak = pytrees.first_match(PEAKS, device.device_kind)
  known = {"peak_percent": 100 * each / peak} if peak else {}
  return {"tflops_per_device": each / 1e12} | known


def memory(device: jax.Device) -> dict[str, float]:
  """Returns the most memory that this process has used on `device`, where it can tell."""
  stats = device.memory_stats() or {}
  used = stats.get("peak_bytes_in_use")
  return {} if used is None else {"peak_memory_gib": used / 2**30}
