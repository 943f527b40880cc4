"""`sdjax train`: an autoencoder or a text-to-image model from a config."""

from sdjax.cli import device, experiment

WHAT = """Trains from the newest checkpoint in DIR, or from the start. Ends with DIR/model, a folder
in the diffusers layout. Ctrl-C saves and stops; the same command goes on."""


def main(argv: list[str]) -> int:
  """Runs the experiment that the flags name."""
  parsed = experiment.parse("train", WHAT, argv)
  if parsed is None:
    return 0
  config, workdir = parsed
  experiment.start_processes()
  device.cache_compilations()
  device.log_to_stderr()
  from sdjax.train import loop
  folder = loop.train(config, workdir)
  experiment.tell(f"\nfinished: {folder}\n"
                  f"next:     sdjax sample --model {folder} --prompt \"…\"")
  return 0
