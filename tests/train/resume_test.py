"""A run that is killed and started again is the run that was not."""

import json
import signal
import sys
import time

import numpy as np
import pytest
import safetensors.numpy


def wait_for(condition, child, seconds):
  deadline = time.monotonic() + seconds
  while not condition():
    assert child.poll() is None, child.communicate()[0]
    assert time.monotonic() < deadline, "it took too long"
    time.sleep(0.05)


def finish(child, seconds=400):
  output, _ = child.communicate(timeout=seconds)
  assert child.returncode == 0, output
  return output


def weights(workdir):
  return {network: safetensors.numpy.load_file(next((workdir / "model" / network).glob("*.safet*")))
          for network in ("unet", "text_encoder", "vae")}


def assert_same_weights(a, b):
  for network in a:
    assert a[network].keys() == b[network].keys()
    for name, tensor in a[network].items():
      np.testing.assert_array_equal(tensor, b[network][name], err_msg=f"{network}/{name}")


@pytest.mark.slow
def test_killed_ends_bit_identical(start, arguments, numbers, latents, alone, tmp_path):
  whole, changes = alone
  child = start(*arguments(latents, tmp_path, changes))
  wait_for((tmp_path / "checkpoints" / "2" / "checkpoint.json").exists, child, 300)
  child.send_signal(signal.SIGKILL)
  child.wait()
  assert max(numbers(tmp_path)) < changes["total_steps"]
  output = finish(start(*arguments(latents, tmp_path, changes)))
  assert "going on from step" in output
  assert numbers(tmp_path) == numbers(whole)
  assert_same_weights(weights(tmp_path), weights(whole))


LAUNCHER = ("launch/local_multiprocess.py", "--processes", "2")


def assert_agree(found, expected):
  assert found.keys() == expected.keys()
  for number, values in expected.items():
    np.testing.assert_allclose(found[number], values, rtol=1e-5, err_msg=str(number))


@pytest.mark.slow
def test_two_processes_agree_with_one(start, arguments, numbers, latents, alone, tmp_path):
  whole, changes = alone
  launcher = (*LAUNCHER, "--devices", "2", "--", sys.executable)
  finish(start(*arguments(latents, tmp_path, changes | {"total_steps": 4}), launcher=launcher))
  expected = numbers(whole)
  assert_agree(numbers(tmp_path), {number: expected[number] for number in range(1, 5)})
  # Only the first process writes: one config, one line per step.
  assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 4


@pytest.mark.slow
def test_two_sharded_processes_are_killed_and_one_goes_on(
    start, arguments, numbers, latents, alone, tmp_path):
  """The launcher and all that it has started; kill_test.py has the same processes go on."""
  whole, changes = alone
  launcher = (*LAUNCHER, "--devices", "4", "--", sys.executable)
  child = start(*arguments(latents, tmp_path, changes | {"mesh.fsdp": 2}), launcher=launcher)
  wait_for((tmp_path / "checkpoints" / "2" / "checkpoint.json").exists, child, 300)
  child.send_signal(signal.SIGKILL)
  child.wait()
  assert max(numbers(tmp_path)) < changes["total_steps"]
  finish(start(*arguments(latents, tmp_path, changes)))
  assert_agree(numbers(tmp_path), numbers(whole))
