"""The loop around a model of three numbers: what it does when, and what survives what."""

import json
import logging
import math
import os
import signal
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from configs import sd15
from sdjax.checkpoints import train_state
from sdjax.errors import Diverged, Gone, UserError
from sdjax.train import goodput, loop

BUCKETS = [f"{name}_s" for name in goodput.BUCKETS]


@pytest.fixture
def small(latents, monkeypatch):
  """(workdir, changes) -> rows of a run that fits the mean of latents. Its `seen` tells the order.

  The run is `loop.train`, but for the networks and for what is exported.
  """
  seen = []
  sd = SimpleNamespace(is_xl=False, tokenize=lambda texts: np.zeros((len(texts), 1, 2), np.int32))

  def loss(params, frozen, batch, key):
    error = params["unet"]["kernel"] - batch["moments"].mean((1, 2))[:, :3]
    found = jnp.mean(jnp.square(error)) + 0 * batch["weight"].mean()
    return found, {"mse": found}

  monkeypatch.setattr(loop.model, "build", lambda *_: (sd, {"unet": {"kernel": np.ones(3, "f4")}}))
  monkeypatch.setattr(loop, "loss_of", lambda run: loss)
  monkeypatch.setattr(loop, "export", lambda run, now: now)
  draw, save = loop.draw_batch, train_state.Checkpoints.save

  def draw_and_tell(data):
    seen.append("draw")
    return draw(data)

  def save_and_tell(self, step, *rest):
    seen.append(f"save {step}")
    return save(self, step, *rest)
  monkeypatch.setattr(loop, "draw_batch", draw_and_tell)
  monkeypatch.setattr(train_state.Checkpoints, "save", save_and_tell)

  def run(workdir, **changes):
    config = sd15.get_config("tiny")
    with config.unlocked():
      config.update_from_flattened_dict({
          "data.urls": str(latents), "data.random_crop": False, "data.random_flip": False,
          "trainable": ("unet",), "total_steps": 12, "checkpoint.every_steps": 4,
          "log_every_steps": 1, "preview.every_steps": 0, "optimizer.learning_rate": 0.1,
          "optimizer.warmup_steps": 0} | changes)
    return loop.train(config, workdir)
  run.seen, run.loss = seen, loss
  return run


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir):
  return {row["step"]: (row["loss"], row["grad_norm"], row["param_norm"]) for row in rows(workdir)}


def plant(monkeypatch, at, act):
  """Calls act(batch) in place of drawing batch number `at`, `at` + 1, … of a process."""
  drawn, draw = [], loop.draw_batch

  def draw_planted(data):
    drawn.append(1)
    batch = draw(data)
    return act(batch) if len(drawn) - 1 in at else batch
  monkeypatch.setattr(loop, "draw_batch", draw_planted)


def with_nan(batch):
  return batch | {"weight": batch["weight"].at[0].set(math.nan)}


def test_it_learns_and_its_seconds_add_up(small, tmp_path):
  began = time.time()
  last = small(tmp_path)
  took_s = time.time() - began
  found = rows(tmp_path)
  assert [row["step"] for row in found] == list(range(1, 13))
  assert found[-1]["loss"] < found[0]["loss"] and last.step == 12
  spent_s = sum(found[-1][bucket] for bucket in BUCKETS)
  assert spent_s == pytest.approx(found[-1]["time"] - began, rel=0.02, abs=0.02)
  assert spent_s <= took_s
  assert found[-1]["compile_s"] > 0 and found[-1]["save_s"] > 0 and found[-1]["lost_s"] == 0
  fastest = max(row["images_per_s"] for row in found[:-1])
  assert found[-1]["images_per_s"] < 20 * fastest      # no absurd last lap


def test_evaluate_then_save_then_draw(small, tmp_path, monkeypatch):
  values = iter([3.0, 1.0, 2.0])

  def evaluate(number, params):
    small.seen.append(f"evaluate {number}")
    assert set(params["unet"]) == {"kernel"}
    return {"validation_loss": next(values)}
  monkeypatch.setattr(loop, "validator", lambda run, mesh: evaluate)
  small(tmp_path, **{"validation.every_steps": 4, "log_every_steps": 5, "total_steps": 10,
                     "checkpoint.keep": 1})
  expected = []
  for number in range(11):
    if number in (4, 8, 10):
      expected += [f"evaluate {number}", f"save {number}"]
    expected += ["draw"] * (number < 10)
  assert small.seen == expected
  assert [row["step"] for row in rows(tmp_path)] == [4, 5, 8, 10]   # one row where both are due
  assert [row.get("validation_loss") for row in rows(tmp_path)] == [3.0, None, 1.0, 2.0]
  assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["10", "8"]


@pytest.mark.parametrize("number, raised", [
    (signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stopped_run_is_the_run_that_was_not(small, tmp_path, monkeypatch, number, raised):
  small(tmp_path / "whole")
  with monkeypatch.context() as planted:
    plant(planted, [5], lambda batch: os.kill(os.getpid(), number) or batch)
    with pytest.raises(raised) as stopped:
      small(tmp_path / "stopped")
  if raised is SystemExit:
    assert stopped.value.code == 143
  assert (tmp_path / "stopped/checkpoints/6").is_dir()              # of the step that it was in
  small.seen.clear()
  small(tmp_path / "stopped")
  assert small.seen.count("draw") == 6                              # no step is done again
  assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
  first, *_, last = rows(tmp_path / "stopped")
  began = first["time"] - sum(first[bucket] for bucket in BUCKETS)
  assert sum(last[bucket] for bucket in BUCKETS) == pytest.approx(
      last["time"] - began, rel=0.02, abs=0.02)
  assert first["lost_s"] == 0 < last["lost_s"]


def test_what_is_not_finite_is_skipped_and_counted(small, tmp_path, monkeypatch, caplog):
  plant(monkeypatch, [2, 3, 7], with_nan)
  monkeypatch.setattr(logging.getLogger("sdjax"), "propagate", True)
  last = small(tmp_path)
  found = {row["step"]: row for row in rows(tmp_path)}
  assert [step for step, row in found.items() if row["skipped_steps"]] == [3, 4, 8]
  assert found[3]["loss"] is None and found[3]["param_norm"] == found[2]["param_norm"]
  assert np.isfinite(last.params["unet"]["kernel"]).all() and found[12]["loss"] < found[1]["loss"]
  # Each once, however many of pytest's handlers hear it.
  assert len({message for message in caplog.messages if "changes nothing" in message}) == 3


def test_too_much_of_it_ends_the_run(small, tmp_path, monkeypatch):
  plant(monkeypatch, range(5, 99), with_nan)
  with pytest.raises(Diverged, match="3 steps in a row, up to step 8"):
    small(tmp_path, max_skipped=3)
  kept = train_state.Checkpoints(tmp_path / "checkpoints").restore_params()
  assert np.isfinite(kept["params"]["unet"]["kernel"]).all()
  assert np.isfinite(kept["ema"]["unet"]["kernel"]).all()


def test_data_that_go_are_told_from_a_bad_config(small, tmp_path, monkeypatch):
  def fail(batch):
    raise FileNotFoundError(2, "No such file or directory", "/data/00003.tar")
  monkeypatch.setattr(loop.Prefetch, "__next__", fail)
  with pytest.raises(Gone, match="/data/00003.tar"):
    small(tmp_path)
  for name in ("total_steps", "log_every_steps", "max_skipped"):
    with pytest.raises(UserError, match=name):
      small(tmp_path / name, **{name: 0})


def test_a_finished_run_has_nothing_to_do(small, tmp_path):
  small(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text()
  small.seen.clear()
  assert small(tmp_path).step == 12
  assert small.seen == [] and (tmp_path / "metrics.jsonl").read_text() == before
