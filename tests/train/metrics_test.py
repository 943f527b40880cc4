"""What is written of a run, where, and what a restart makes of it."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.train import metrics


def rows(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path):
  writer = metrics.Writer(tmp_path, from_step=0, enabled=True)
  for step in range(1, 6):
    writer.scalars(step, {"loss": step / 10})
  writer.close()
  assert writer.kept is None and writer.dropped is None
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')  # cut short by a kill

  writer = metrics.Writer(tmp_path, from_step=3, enabled=True)
  assert (writer.kept, writer.dropped) == ({"step": 3, "loss": 0.3}, {"step": 4, "loss": 0.4})
  writer.scalars(4, {"loss": 0.4})
  writer.close()
  assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.Writer(tmp_path, from_step=0, enabled=False, wandb_project="any")
  assert not writer.scalars(1, {"loss": 1.0, metrics.BEST: 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_null(tmp_path):
  writer = metrics.Writer(tmp_path, from_step=0, enabled=True)
  writer.scalars(1, {"loss": math.nan, "grad_norm": math.inf, "skipped_steps": 1.0})
  writer.close()
  line = (tmp_path / "metrics.jsonl").read_text()

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")
  assert json.loads(line, parse_constant=refuse) == {
      "step": 1, "loss": None, "grad_norm": None, "skipped_steps": 1.0}


def test_the_best_validation_is_known_over_restarts(tmp_path):
  def write(from_step, values):
    writer = metrics.Writer(tmp_path, from_step=from_step, enabled=True)
    best = [writer.scalars(step, {} if value is None else {metrics.BEST: value})
            for step, value in enumerate(values, from_step + 1)]
    writer.close()
    return best
  assert write(0, [3.0, None, 2.0, math.nan, 2.5, 1.0]) == [True, False, True, False, False, True]
  # Gone on from step 5: the best one after it has not happened.
  assert write(5, [2.2, 1.5, 1.5]) == [False, True, False]


@pytest.fixture
def wandb(monkeypatch):
  """What has been called of a module that stands for wandb."""
  calls = []
  run = SimpleNamespace(
      log=lambda values: calls.append(("log", values)), finish=lambda: calls.append(("finish",)),
      define_metric=lambda *names, **options: calls.append(("define_metric", names, options)))
  module = SimpleNamespace(init=lambda **options: calls.append(("init", options)) or run,
                           Image=lambda picture: ("picture", picture.shape))
  monkeypatch.setitem(sys.modules, "wandb", module)
  return calls


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, wandb):
  for from_step in (0, 1):
    writer = metrics.Writer(tmp_path, from_step=from_step, enabled=True, wandb_project="cats",
                            config={"seed": 3})
    writer.scalars(2, {"loss": 0.5, "grad_norm": math.nan})
    writer.picture(2, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.close()
  (_, first), (_, second) = (call for call in wandb if call[0] == "init")
  assert first == second and first["id"] and first["resume"] == "allow"
  assert (first["project"], first["config"]) == ("cats", {"seed": 3})
  assert [call for call in wandb[:len(wandb) // 2] if call[0] != "init"] == [
      ("define_metric", ("*",), {"step_metric": "step"}), ("log", {"step": 2, "loss": 0.5}),
      ("log", {"step": 2, "preview": ("picture", (4, 6, 3))}), ("finish",)]


def test_weights_and_biases_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install"):
    metrics.Writer(tmp_path, from_step=0, enabled=True, wandb_project="cats")
