"""The flags of experiments: `--config FILE.py[:ARG] --config.KEY=VALUE --workdir DIR`."""

import os
import sys
import threading
import time

from absl import flags
from ml_collections import config_flags

from sdjax.cli import rendezvous
from sdjax.errors import UserError

HEARTBEAT_S = 10  # a process that has been silent for as long is taken for dead
MIN_JOIN_S = 5.0  # for processes that have met late

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
  SDJAX_NUM_PROCESSES and SDJAX_PROCESS_ID; tasks of Slurm need nothing. SDJAX_COORDINATOR=auto asks
  JAX to find out, as it can on Cloud TPUs.

  Raises:
    UserError: for what would keep them from meeting. Where they do not meet within
      SDJAX_START_TIMEOUT_S (50 s by default), the process says so and ends with code 2.
  """
  if rendezvous.wants_tpu(os.environ):
    rendezvous.check_lock()
  defaults = {"SDJAX_START_TIMEOUT_S": "50"}
  timeout_s = rendezvous.number(defaults | os.environ, "SDJAX_START_TIMEOUT_S")
  if os.environ.get("SDJAX_COORDINATOR") == "auto":
    join("the cluster that JAX detects", timeout_s)
    return
  place = rendezvous.find_place(os.environ)
  if place is None:
    return
  rendezvous.check(place, os.environ)
  began = time.monotonic()
  if place.number > 0:
    rendezvous.wait_for_coordinator(place, timeout_s)
  left_s = max(timeout_s - (time.monotonic() - began), min(timeout_s, MIN_JOIN_S))
  # Detection would give a task of Slurm one GPU of its node; a process drives all that it sees.
  join(f"the {place.count} processes at {place.address}", left_s,
       coordinator_address=place.address, num_processes=place.count, process_id=place.number,
       cluster_detection_method="deactivate")


def join(whom: str, timeout_s: float, **place) -> None:
  """Connects to the other processes, or ends this one: JAX's own time limit ends in SIGABRT."""
  import jax
  jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM

  def give_up():
    print(f"sdjax: error: not all of {whom} have come within the time limit; see their logs, start "
          "them closer together, or raise SDJAX_START_TIMEOUT_S", file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)

  timer = threading.Timer(timeout_s, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
        initialization_timeout=int(timeout_s) + 60, heartbeat_timeout_seconds=HEARTBEAT_S, **place)
  except (ValueError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    raise UserError(f"cannot join {whom} ({reason}); set SDJAX_COORDINATOR, SDJAX_NUM_PROCESSES "
                    "and SDJAX_PROCESS_ID") from error
  finally:
    timer.cancel()


def tell(text: str) -> None:
  """Prints on the first process alone."""
  import jax
  if jax.process_index() == 0:
    print(text)
