"""The whole path of the demo, too short to learn: every stage, interrupted, resumed, repeated."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  import os
  return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


def start(environment, *args):
  return subprocess.Popen([sys.executable, "-m", "sdjax.cli.main", "demo", "--small", *args],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)


def finish(child, code=0):
  output, _ = child.communicate(timeout=600)
  assert child.returncode == code, output
  return output


def test_demo_goes_on_after_an_interruption_and_repeats_itself(environment, tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  output = finish(start(environment, "--workdir", str(whole)))
  assert "sdjax sample --model" in output and "relation" in output
  for folder, kind in (("shards", "*.tar"), ("latents", "*.tar"), ("diffusion/previews", "*.png"),
                       ("autoencoder/previews", "*.png"), ("export/unet", "*.safetensors")):
    assert list((whole / folder).glob(kind)), folder
  with Image.open(whole / "evaluation.png") as picture:
    assert picture.width > 6 * 32
  scores = json.loads((whole / "evaluation.json").read_text())
  assert scores.keys() >= {"colour", "size", "shape", "relation", "all"}

  child = start(environment, "--workdir", str(broken))
  deadline = time.monotonic() + 200
  while not (broken / "diffusion" / "metrics.jsonl").exists():
    assert child.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  child.send_signal(signal.SIGINT)
  assert "the same command goes on" in finish(child, code=130)
  assert not (broken / "export").exists()
  assert "shape" in finish(start(environment, "--workdir", str(broken)))
  for network in ("unet", "text_encoder", "vae"):
    one, other = (safetensors.numpy.load_file(next((run / "export" / network).glob("*.safe*")))
                  for run in (whole, broken))
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)
  # Same seed, same pictures.
  assert (whole / "evaluation.png").read_bytes() == (broken / "evaluation.png").read_bytes()

  told = finish(start(environment, "--workdir", str(whole), "--seed", "1"), code=2)
  assert "--fresh" in told and "Traceback" not in told
