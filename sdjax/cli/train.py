"""`sdjax train`: an autoencoder or a text-to-image model from a config."""

import os
import signal
import threading

from sdjax.cli import device, experiment

WHAT = """Trains from the newest checkpoint in DIR, or from the start. Ends with DIR/model, a folder
in the diffusers layout. Ctrl-C or SIGTERM saves and stops; the same command goes on."""
LEAVE_S = 5.0  # that processes which end for the same reason take to meet


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
  except BaseException as error:
    leave_soon(error)
    raise
  experiment.tell(f"\nfinished: {folder}\n"
                  f"next:     sdjax sample --model {folder} --prompt \"…\"")
  return 0


def leave_soon(error: BaseException) -> None:
  """Ends a process of several for `error` even if the others do not end.

  JAX, when a process exits, has it wait for the others for minutes, as they wait for it in the
  midst of a step.
  """
  import jax
  if jax.process_count() == 1:
    return
  if isinstance(error, SystemExit):
    code = error.code
  else:
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
  timer = threading.Timer(LEAVE_S, os._exit, [code])
  timer.daemon = True
  timer.start()
