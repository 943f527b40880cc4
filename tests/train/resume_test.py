"""A run that is killed and started again is the run that was not."""

import json
import signal
import time

import numpy as np
import safetensors.numpy

NO_CROPS = {"data.random_crop": False, "data.random_flip": False}


def wait_for(condition, child, seconds):
  deadline = time.monotonic() + seconds
  while not condition():
    assert child.poll() is None, child.communicate()[0]
    assert time.monotonic() < deadline, "it took too long"
    time.sleep(0.05)


def finish(child, seconds=120):
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


def test_killed_twice_ends_bit_identical(start, arguments, numbers, pictures, tmp_path):
  changes = {"total_steps": 40, "checkpoint.every_steps": 8, "seed": 3}
  finish(start(*arguments(pictures, tmp_path / "whole", changes)))
  killed = tmp_path / "killed"
  for last in (10, 21):
    child = start(*arguments(pictures, killed, changes))
    wait_for(lambda last=last: max(numbers(killed), default=0) >= last, child, 90)
    child.send_signal(signal.SIGKILL)
    child.wait()
  output = finish(start(*arguments(pictures, killed, changes)))
  assert "going on from step" in output

  assert numbers(killed) == numbers(tmp_path / "whole")
  assert list(numbers(killed)) == list(range(1, 41))
  assert_same_weights(weights(killed), weights(tmp_path / "whole"))


def test_two_processes_agree_with_one_and_survive_a_kill(
    start, arguments, numbers, latents, tmp_path):
  changes = NO_CROPS | {"total_steps": 12, "checkpoint.every_steps": 4}
  one, two = tmp_path / "one", tmp_path / "two"
  finish(start(*arguments(latents, one, changes)))

  launcher = ("launch/local_multiprocess.py", "--processes", "2", "--devices", "4", "--",
              "python3")
  sharded = changes | {"mesh.fsdp": 2}
  child = start(*arguments(latents, two, sharded), launcher=launcher)
  wait_for(lambda: max(numbers(two), default=0) >= 6, child, 120)
  child.send_signal(signal.SIGKILL)
  child.wait()
  finish(start(*arguments(latents, two, sharded), launcher=launcher), 150)

  assert list(numbers(two)) == list(range(1, 13))
  for number, values in numbers(one).items():
    np.testing.assert_allclose(numbers(two)[number], values, rtol=1e-5, err_msg=str(number))
  # Only the first process writes: one config, one line per step.
  assert json.loads((two / "config.json").read_text())["total_steps"] == 12
