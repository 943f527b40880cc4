"""Configs can be read without JAX, and their resolved text does not change unnoticed.

The golden files are the record of what each experiment is: when one changes on purpose, write it
anew with `python tests/configs/configs_test.py` and let the review see the difference.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = ("shapes", "shapes:stage=autoencoder", "sd15", "sd15:init_from=folder",
               "sd15:tiny", "images", "images:stage=autoencoder")


def resolved(experiment: str) -> str:
  name, _, arg = experiment.partition(":")
  config = importlib.import_module(f"configs.{name}").get_config(arg)
  return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"


def golden(experiment: str) -> Path:
  return GOLDEN / (experiment.replace(":", "-").replace("=", "-") + ".json")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_resolved_config_is_the_recorded_one(experiment):
  assert resolved(experiment) == golden(experiment).read_text()


def test_every_config_file_is_recorded():
  files = {path.stem for path in Path(common.__file__).parent.glob("*.py")}
  assert files - {"__init__", "common"} == {name.partition(":")[0] for name in EXPERIMENTS}


def test_configs_do_not_import_jax():
  script = "import sys; from configs import sd15; sd15.get_config(); sys.exit('jax' in sys.modules)"
  subprocess.run([sys.executable, "-c", script], check=True)


def test_arguments_after_the_colon():
  arg = common.parse_arg("res=256,tiny", res=512, tiny=False, name="x")
  assert (arg.res, arg.tiny, arg.name) == (256, True, "x")
  with pytest.raises(ValueError, match="resolution"):
    common.parse_arg("resolution=3", res=512)
  with pytest.raises(ValueError, match="tiny='maybe'"):
    common.parse_arg("tiny=maybe", tiny=False)


if __name__ == "__main__":
  GOLDEN.mkdir(exist_ok=True)
  for one in EXPERIMENTS:
    golden(one).write_text(resolved(one))
