"""Programs by shape of batch, and what they tell of the chip."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.train import programs
from sdjax.train.goodput import Goodput
from sdjax.train.watchdog import Watchdog


def step(weights, batch):
  return weights - batch["x"].sum(), {"loss": (batch["x"] @ weights).sum()}


def test_one_program_for_each_shape(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # of CPUs nothing is counted
  spent = Goodput()
  advance = programs.Programs(jax.jit(step), 1, spent, Watchdog(0))
  weights = jnp.ones((8, 4))
  for _ in range(2):
    weights, found, few = advance(weights, {"x": jnp.ones((16, 8)), "y": jnp.ones(3)})
  compiled = spent.seconds()["compile"]
  assert compiled > 0 and found["loss"] == 16 * 8 * 4 * (1 - 128)
  _, _, again = advance(weights, {"x": jnp.zeros((16, 8)), "y": jnp.ones(3)})
  assert spent.seconds()["compile"] == compiled and again == few
  _, _, many = advance(weights, {"x": jnp.ones((160, 8)), "y": jnp.ones(3)})
  assert spent.seconds()["compile"] > compiled and many / few == pytest.approx(10, rel=0.05)


def test_operations_are_those_of_the_formula():
  """A product of [m k] and [k n] is 2 m k n; of its gradients, each as many."""
  m, k, n = 64, 128, 32
  loss = lambda w, x: jnp.square(x @ w).sum()
  w, x = np.ones((k, n), np.float32), np.ones((m, k), np.float32)
  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(w, x)
  assert programs.operations(lowered, 1) == pytest.approx(6 * m * k * n, rel=0.02)

  def in_parts(w, x):
    add = lambda total, rows: (total + jax.grad(loss)(w, rows), None)
    return jax.lax.scan(add, jnp.zeros_like(w), x.reshape(4, m // 4, k))[0]
  lowered = jax.jit(in_parts).lower(w, x)
  assert programs.operations(lowered, 4) == pytest.approx(4 * m * k * n, rel=0.05)


@pytest.mark.parametrize("kind, tflops", [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5p", 459), ("TPU v5", 459),
    ("TPU v6 lite", 918), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla T4", 65)])
def test_half_of_a_chips_peak_is_fifty_percent(kind, tflops):
  device = SimpleNamespace(platform="any", device_kind=kind)
  assert programs.utilization(4 * tflops / 2 * 1e12, device, 4) == {
      "tflops_per_device": pytest.approx(tflops / 2), "peak_percent": pytest.approx(50)}


def test_what_is_not_known_is_left_out():
  chip = SimpleNamespace(platform="gpu", device_kind="NVIDIA X", memory_stats=lambda: None)
  assert programs.utilization(3e12, chip, 3) == {"tflops_per_device": 1.0}
  assert programs.utilization(3e12, jax.devices("cpu")[0], 1) == {}
  assert programs.memory(chip) == {}
  chip.memory_stats = lambda: {"peak_bytes_in_use": 3 * 2**29}
  assert programs.memory(chip) == {"peak_memory_gib": 1.5}
