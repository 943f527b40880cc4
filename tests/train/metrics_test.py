import json

from sdjax.train import metrics


def rows(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path):
  writer = metrics.Writer(tmp_path, from_step=0, enabled=True)
  for step in range(1, 6):
    writer.scalars(step, {"loss": step / 10})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')  # cut short by a kill

  writer = metrics.Writer(tmp_path, from_step=3, enabled=True)
  writer.scalars(4, {"loss": 0.4})
  writer.close()
  assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.Writer(tmp_path, from_step=0, enabled=False)
  writer.scalars(1, {"loss": 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []
