"""Doors: quick help, one-line errors, exit code 2, nothing half-written."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sdjax.checkpoints import diffusers
from sdjax.cli import device
from sdjax.cli import main as cli

CHEAP = ["--prompt", "a red circle", "--steps", "2"]


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("model") / "tiny"
  diffusers.save(folder, *tiny_model)
  return folder


def fails(capsys, *args, code=2):
  """Runs a command that must fail, and returns its one line."""
  assert cli.main([str(arg) for arg in args]) == code
  error = capsys.readouterr().err.strip()
  assert error.startswith("sdjax: error: ") and "\n" not in error and "Traceback" not in error
  return error


@pytest.mark.parametrize("command", [[], *([door] for door in cli.DOORS)])
def test_help_imports_nothing_heavy(command):
  script = f"""
import sys
from sdjax.cli import main
try:
  code = main.main({[*command, '--help']!r})
except SystemExit as exit:
  code = exit.code
heavy = [name for name in ("jax", "flax", "numpy", "transformers") if name in sys.modules]
sys.exit(f"imports {{heavy}}" if heavy else code)
"""
  child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert child.returncode == 0, child.stderr
  assert "usage: sdjax" in child.stdout


def test_unknown_command_names_the_known_ones(capsys):
  assert "'paint'" in (error := fails(capsys, "paint")) and "sample" in error


@pytest.mark.parametrize("args, parts", [
    (["sample", "--model", "nowhere", *CHEAP], ["nowhere", "model_index.json"]),
    (["train", "--config", "configs/nothing.py", "--workdir", "w"], ["configs/nothing.py"]),
    (["train", "--config", "configs/shapes.py"], ["--workdir"]),
    (["train", "--config", "configs/shapes.py:moon", "--workdir", "w"], ["moon"]),
    (["train", "--config", "configs/shapes.py", "--workdir", "w", "--config.colour=3"],
     ["colour"]),
    (["train", "--config", "configs/shapes.py", "--workdir", "w", "--learn"], ["learn"]),
    (["train", "--config", "configs/shapes.py", "--workdir", "gs://b/w"], ["gs://b/w", "mount"]),
    (["evaluate", "--config", "configs/images.py", "--workdir", "w"], ["evaluation", "shapes"]),
    (["evaluate", "--config", "configs/shapes.py", "--workdir", "nowhere"], ["nowhere/model"]),
    (["convert", "nowhere", "there"], ["nowhere"]),
    (["sample", "--model", "m", "--prompts", "nothing.txt"], ["nothing.txt"]),
    (["shards", "inspect", "nowhere"], ["nowhere"]),
])
def test_bad_input_is_one_line(capsys, monkeypatch, request, args, parts):
  monkeypatch.chdir(request.config.rootpath)
  error = fails(capsys, *args)
  assert all(part in error for part in parts), error


def test_bad_requests_of_a_model(capsys, model_folder, tmp_path):
  sample = ["sample", "--model", model_folder, "--out", tmp_path / "out", *CHEAP]
  assert "height is 36 px" in fails(capsys, *sample, "--height", 36)
  assert "'magic'" in fails(capsys, *sample, "--sampler", "magic")
  assert "seed is -1" in fails(capsys, *sample, "--seed", -1)
  np.save(tmp_path / "latents.npy", np.zeros((1, 3, 3, 4)))
  assert "[1, 3, 3, 4]" in fails(capsys, *sample, "--init-latents", tmp_path / "latents.npy")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, text, parts", [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["line 2", "JSON"]),
    ("p.jsonl", '{"prompt": "a", "seed": "x"}\n', ["line 1", "seed"]),
    ("p.jsonl", '{"text": "a"}\n', ["line 1", "prompt"]),
    ("p.jsonl", '{"prompt": "a", "stepz": 3}\n', ["line 1", "stepz"]),
    ("p.txt", "\n\n", ["no prompts"]),
])
def test_bad_prompt_files_name_the_line(capsys, tmp_path, name, text, parts):
  (tmp_path / name).write_text(text)
  error = fails(capsys, "sample", "--model", "m", "--prompts", tmp_path / name)
  assert all(part in error for part in parts), error


def test_a_full_disk_is_one_line_and_leaves_nothing(capsys, model_folder, tmp_path, no_room):
  error = fails(capsys, "convert", model_folder, tmp_path / "copy")
  assert "safetensors cannot be written" in error and "make room" in error
  assert list(tmp_path.iterdir()) == []


def test_training_commands_start_again_with_huge_pages_once(monkeypatch):
  started = []
  monkeypatch.setattr(device.os, "execv", lambda *words: started.append(words))
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "sdjax.cli.main", "train"])
  monkeypatch.setattr(sys, "argv", ["sdjax", "train"])
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  for _ in range(2):
    assert cli.main() == 0
  assert started == [(sys.executable, [sys.executable, "-m", "sdjax.cli.main", "train"])]
  assert "hugetlb=1" in os.environ["GLIBC_TUNABLES"]
