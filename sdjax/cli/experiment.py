"""The flags of experiments: `--config FILE.py[:ARG] --config.KEY=VALUE --workdir DIR`."""

import os

from absl import flags
from ml_collections import config_flags

from sdjax.errors import UserError

HELP = """usage: sdjax {command} --config FILE.py[:ARG] --workdir DIR [--config.KEY=VALUE …]

{what}

  --config FILE.py[:ARG]   the experiment; ARG as the file's docstring says
  --config.KEY=VALUE       changes one entry, as in --config.optimizer.learning_rate=1e-4
  --workdir DIR            where checkpoints, metrics and pictures go; the same folder resumes
"""


def parse(command: str, what: str, argv: list[str]):
  """Reads the flags of an experiment.

  Returns:
    (config, workdir), or None when help was asked for and printed.

  Raises:
    UserError: for a missing or unknown flag, a config that is not there, a key that it lacks.
  """
  if not argv or "--help" in argv or "-h" in argv:
    print(HELP.format(command=command, what=what))
    return None
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
      "config", None, "", flag_values=values, sys_argv=[command, *argv])
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  for arg in argv:
    if arg.startswith("--config="):
      _check_file(arg.removeprefix("--config="))
  for before, arg in zip(argv, argv[1:]):
    if before == "--config":
      _check_file(arg)
  try:
    rest = values([command, *argv])[1:]
  except (flags.Error, KeyError, AttributeError, TypeError) as error:
    # What goes wrong inside a config file arrives as its whole traceback, reason last.
    reason = str(error).strip().splitlines()[-1]
    raise UserError(f"{reason}; see sdjax {command} --help") from error
  if rest:
    raise UserError(f"{rest[0]!r} is not a flag; see sdjax {command} --help")
  if values["config"].value is None or workdir.value is None:
    raise UserError(f"sdjax {command} needs both --config FILE.py and --workdir DIR")
  return config.value, workdir.value


def _check_file(config: str) -> None:
  path = config.partition(":")[0]
  if not os.path.isfile(path):
    raise UserError(f"there is no config file {path!r}; those that come with sdjax are in configs/")


def start_processes() -> None:
  """Joins the processes of one run, where there are several.

  Hosts that JAX cannot detect by itself set SDJAX_COORDINATOR (host:port of process 0),
  SDJAX_NUM_PROCESSES and SDJAX_PROCESS_ID. SDJAX_COORDINATOR=auto asks JAX to find out, as the
  launchers of SLURM and Cloud TPU do.
  """
  import jax
  if os.environ.get("SDJAX_COORDINATOR") == "auto":
    jax.distributed.initialize()
    return
  contract = ("SDJAX_COORDINATOR", "SDJAX_NUM_PROCESSES", "SDJAX_PROCESS_ID")
  given = [name for name in contract if name in os.environ]
  if given and len(given) < len(contract):
    missing = sorted(set(contract) - set(given))
    raise UserError(f"{given[0]} is set but {', '.join(missing)} is not; set all three or none")
  if given:
    jax.distributed.initialize(
        os.environ["SDJAX_COORDINATOR"], int(os.environ["SDJAX_NUM_PROCESSES"]),
        int(os.environ["SDJAX_PROCESS_ID"]))


def tell(text: str) -> None:
  """Prints on the first process alone."""
  import jax
  if jax.process_index() == 0:
    print(text)
