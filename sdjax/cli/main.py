"""The `sdjax` command: finds the door, opens it, and turns mistakes into one line.

Nothing heavy is imported before a door needs it: `--help` answers at once.
"""

import importlib
import sys

from sdjax.cli import device
from sdjax.errors import UserError

DOORS = {
    "demo": "draw a data set, train on it, sample, score and export: ten minutes on a laptop",
    "train": "train an autoencoder or a text-to-image model from a config",
    "sample": "make pictures from prompts with a trained or converted model",
    "evaluate": "score a model on captions that it has not seen",
    "convert": "export a run as a diffusers folder, change the dtype, look into a model folder",
    "shards": "pack, index, inspect and encode webdataset shards of captioned images",
}
TRAINING = ("demo", "train")
USAGE = """usage: sdjax COMMAND [ARGUMENTS]

{}

sdjax COMMAND --help tells more. Start with: sdjax demo"""


def usage() -> str:
  """Returns the text of `sdjax --help`."""
  return USAGE.format("\n".join(f"  {name:<10}{what}" for name, what in DOORS.items()))


def main(argv: list[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: without the program's name; by default `sys.argv[1:]` of a process of its own.

  Returns:
    The exit code: 0 done; that of a UserError (one line on stderr), 2 for others; 130 interrupted.
  """
  is_own_process = argv is None
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help"):
    print(usage())
    return 0
  name, *rest = argv
  if name == "--version":
    from sdjax import __version__
    print(__version__)
    return 0
  if name not in DOORS:
    print(f"sdjax: error: there is no command {name!r}; choose one of {', '.join(DOORS)}",
          file=sys.stderr)
    return 2
  if is_own_process and name in TRAINING:
    device.use_huge_pages()
  try:
    return importlib.import_module(f"sdjax.cli.{name}").main(rest) or 0
  except (UserError, OSError) as error:
    print(f"sdjax: error: {describe(error)}", file=sys.stderr)
    return getattr(error, "exit_code", 2)
  except KeyboardInterrupt:
    print("\nsdjax: interrupted; the same command goes on", file=sys.stderr)
    return 130


def describe(error: UserError | OSError) -> str:
  """Returns one line; an OSError says what was being touched and why it failed."""
  if isinstance(error, OSError) and error.strerror:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}"
  return " ".join(str(error).split())


if __name__ == "__main__":
  sys.exit(main())
