"""`sdjax evaluate`: scores a model on captions that it has not seen."""

from pathlib import Path

from sdjax.cli import device, experiment
from sdjax.errors import UserError

WHAT = """Samples the evaluation captions of the config with DIR/model and scores the pictures.
Writes DIR/evaluation.json and a labelled picture of the first ones."""


def main(argv: list[str]) -> int:
  """Evaluates the run in --workdir."""
  parsed = experiment.parse("evaluate", WHAT, argv)
  if parsed is None:
    return 0
  config, workdir = parsed
  device.cache_compilations()
  from sdjax.checkpoints import diffusers
  from sdjax.eval import held_out
  name = config.get("evaluation", {}).get("name")
  if name != "shapes":
    raise UserError(f"config.evaluation.name is {name!r}; the only evaluation here is 'shapes', "
                    "of configs/shapes.py")
  sd, params = diffusers.load(Path(workdir) / "model")
  result = held_out.evaluate(sd, params, config.evaluation)
  held_out.write(result, Path(workdir))
  print(held_out.describe(result))
  return 0
