"""`sdjax sample`: pictures that say how they were made, from one process or several."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax import generate, pictures, pytrees
from sdjax.checkpoints import diffusers
from sdjax.cli import device
from sdjax.cli import main as cli
from sdjax.train import partitioning

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("model") / "tiny"
  diffusers.save(folder, *tiny_model)
  return folder


def write_lines(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def sample(*args):
  assert cli.main(["sample", *map(str, args)]) == 0


def test_pictures_say_how_they_were_made(model_folder, tmp_path, capsys):
  out = tmp_path / "out"
  prompts = write_lines(tmp_path / "p.jsonl", [
      {"prompt": "a red circle", "seed": 2**64 - 2}, {"prompt": "a blue square"}])
  sample("--model", model_folder, "--prompts", prompts, "--steps", 2, "--out", out,
         "--num-images", 2, "--seed", 100, "--save-latents", tmp_path / "latents.npy")
  assert sorted(path.name for path in out.iterdir()) == [
      "00000.png", "00001.png", "00002.png", "00003.png", "grid.png", "manifest.jsonl"]
  for number, (prompt, seed) in enumerate([
      ("a red circle", 2**64 - 2), ("a red circle", 2**64 - 1), ("a blue square", 102),
      ("a blue square", 103)]):
    with Image.open(out / f"{number:05d}.png") as picture:
      assert picture.size == (32, 32)
      assert picture.text["parameters"].startswith(f"{prompt}\nSteps: 2, Sampler: ")
      assert f"Seed: {seed}, Size: 32x32, Model: tiny" in picture.text["parameters"]
      assert json.loads(picture.text["sdjax"])["seed"] == seed
  latents = np.load(tmp_path / "latents.npy")
  assert latents.shape == (4, 8, 8, 4)
  assert "made 4 pictures in" in capsys.readouterr().err


def test_a_list_draws_what_its_lines_say_and_goes_on(model_folder, tiny_model, tmp_path, capsys):
  circle = {"prompt": "a red circle", "seed": 5}
  lines = [circle, {"prompt": "a blue square"}, circle | {"guidance_scale": 4},
           circle | {"negative_prompt": "a red circle"}, circle]
  out = tmp_path / "out"
  command = ("--model", model_folder, "--prompts", write_lines(tmp_path / "p.jsonl", lines),
             "--steps", 2, "--guidance-scale", 2, "--out", out, "--batch-size", 4)
  sample(*command)
  made = [np.asarray(Image.open(out / f"{number:05d}.png")).astype(int)
          for number in range(len(lines))]
  mesh = partitioning.make_mesh({"data": -1})
  with jax.set_mesh(mesh):                             # as the command: nothing compiles anew
    params = pytrees.map_paths(partitioning.placer(mesh, ()), tiny_model[1])
    for rows in ([0, 1, 2, 3], [4, 4, 4, 4]):
      images, _ = generate.text_to_image(
          tiny_model[0], params, [lines[row]["prompt"] for row in rows], steps=2,
          guidance_scale=[lines[row].get("guidance_scale", 2.0) for row in rows], height=32,
          width=32, batch_size=4,
          seeds=[lines[row].get("seed", row) for row in rows],
          negative_prompts=[lines[row].get("negative_prompt", "") for row in rows])
      for row, image in zip(rows, pictures.to_uint8(images), strict=True):
        assert np.abs(made[row] - image).max() <= 1
  assert np.abs(made[0] - made[4]).max() <= 1 < np.abs(made[0] - made[2]).max()
  (out / "00001.png").unlink()
  sample(*command)
  assert "made 1 pictures" in capsys.readouterr().err
  np.testing.assert_array_equal(np.asarray(Image.open(out / "00001.png")), made[1])
  assert cli.main(["sample", *map(str, command), "--clip-skip", "1"]) == 2
  assert "begun with other clip_skip; give the command" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    (["--mesh", "data"], "--mesh is 'data'"),
    (["--mesh", "moon=1"], "moon"),
    (["--mesh", "data=3,fsdp=7"], "does not fit"),
    (["--num-images", 0], "num_images is 0"),
    (["--steps", 0], "steps is 0"),
    (["--guidance-scale", "nan"], "guidance_scale is nan"),
    (["--format", "webdataset", "--shard-size", 0], "--shard-size is 0"),
    (["--width", 36], "width is 36 px"),
])
def test_bad_flags_are_told_before_anything_is_made(
    model_folder, tmp_path, capsys, changes, message):
  assert cli.main(["sample", "--model", str(model_folder), "--prompt", "a", "--out",
                   str(tmp_path / "out"), *map(str, changes)]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_fit_is_told_by_its_line(model_folder, tmp_path, capsys):
  prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "height": 36}])
  assert cli.main(["sample", "--model", str(model_folder), "--prompts", str(prompts), "--out",
                   str(tmp_path / "out")]) == 2
  assert "p.jsonl line 2: height is 36 px" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_latents_are_exchanged_for_all_pictures_or_none(model_folder, tmp_path, capsys):
  np.save(tmp_path / "latents.npy", np.zeros((3, 8, 8, 4)))
  command = ["sample", "--model", str(model_folder), "--prompt", "a", "--out",
             str(tmp_path / "out"), "--init-latents", str(tmp_path / "latents.npy")]
  assert cli.main(command) == 2
  assert "[3, 8, 8, 4] for 1 pictures" in capsys.readouterr().err
  np.save(tmp_path / "latents.npy", np.full((1, 8, 8, 4), np.nan))
  assert cli.main(command) == 2
  assert "NaN" in capsys.readouterr().err


def test_what_is_compiled_is_told_and_what_is_not_is_not(monkeypatch, caplog):
  monkeypatch.setattr(device, "WORTH_TELLING_S", 0)
  told = []
  monkeypatch.setattr(device.logging.getLogger("sdjax"), "info",
                      lambda text, *values: told.append(text % values))

  @jax.jit
  def _add_seven(x):
    return x + 7

  with device.logged_compilations():
    _add_seven(np.float32(1))
    _add_seven(np.float32(2))
    assert [line.rpartition(" in ")[0] for line in told] == ["compiled add seven"]
  _add_seven(np.zeros(3, np.float32))
  assert len(told) == 1


PICTURES = 200


def job(model_folder, prompts, out):
  return [sys.executable, "launch/local_multiprocess.py", "--processes", "2", "--devices", "4",
          "--", sys.executable, "-m", "sdjax.cli.main", "sample", "--model", str(model_folder),
          "--prompts", str(prompts), "--steps", "2", "--batch-size", "8", "--out", str(out)]


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def count(folder):
  return len(list(folder.glob("[0-9]*.png")))


@pytest.mark.slow
@pytest.mark.parametrize("form, kills", [
    ("folder", 2), ("webdataset", 1), pytest.param("folder", 10, marks=pytest.mark.endurance)])
def test_killed_at_random_moments_over_two_processes(model_folder, tmp_path, form, kills):
  prompts = write_lines(tmp_path / "p.jsonl", [
      {"prompt": f"a red circle {number}"} | ({"steps": 3} if number % 3 == 0 else {}) |
      ({"height": 40} if number % 5 == 0 else {}) for number in range(PICTURES)])
  environment = os.environ | {"PYTHONPATH": str(ROOT),
                              "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
  begin = lambda out: subprocess.Popen(
      [*job(model_folder, prompts, out), "--format", form, "--shard-size", "60"], cwd=ROOT,
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def finish(out):
    output, _ = (child := begin(out)).communicate(timeout=900)
    assert child.returncode == 0, output
    return contents(out)

  whole = finish(tmp_path / "whole")
  out, rng = tmp_path / "killed", random.Random(0)
  parts = out if form == "folder" else out / "parts"
  for left in range(kills, 0, -1):
    before = count(parts)
    goal = before + int(rng.random() * 2 * (PICTURES - before) / (left + 2))
    child = begin(out)
    while count(parts) < goal and child.poll() is None:
      time.sleep(0.02)
    # Where no picture is awaited, it dies while it starts.
    time.sleep(rng.uniform(0, 10 if goal == before else 0.2))
    assert not child.poll(), child.communicate()[0]
    child.send_signal(signal.SIGKILL)                  # Linux then kills its processes
    child.communicate()
    time.sleep(0.2)
    print(f"killed at {count(parts)} pictures")
  killed = finish(out)
  assert killed.keys() == whole.keys()
  assert killed == whole
  if form == "folder":
    assert sum(name[:5].isdigit() for name in whole) == PICTURES
