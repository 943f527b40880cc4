"""`sdjax train`: an autoencoder or a text-to-image model from a config."""

import os
import signal
import threading

from sdjax.cli import device, experiment
from sdjax.errors import Diverged

WHAT = """Trains from the newest checkpoint in DIR, or from the start. Ends with DIR/model, a folder
in the diffusers layout. Ctrl-C or SIGTERM saves and stops; the same command goes on."""
LEAVE_S = 5.0  # enough for processes that end for the same reason to meet


def main(argv: list[str]) -> int:
  """Runs the experiment that the flags name."""
  parsed = experiment.parse("train", WHAT, argv)
  if parsed is None:
    return 0
  config, workdir = parsed
  experiment.start_processes()
  # With several processes, JAX has taken it by now, and would pass over one that comes early.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  device.cache_compilations()
  device.log_to_stderr()
  from sdjax.train import loop
  try:
    folder = loop.train(config, workdir)
  except (SystemExit, Diverged):  # in all processes alike
    raise
  except BaseException as error:
    leave_soon(error)
    raise
  experiment.tell(f"\nfinished: {folder}\n"
                  f"next:     sdjax sample --model {folder} --prompt \"…\"")
  return 0


def leave_soon(error: BaseException) -> None:
  """Ends a process of several soon after `error`, which may be its own alone.

  JAX would have it wait minutes for the others when it exits, and they wait for it in a step.
  """
  import jax
  if jax.process_count() > 1:
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    timer = threading.Timer(LEAVE_S, os._exit, [code])
    timer.daemon = True
    timer.start()
