"""Files appear whole or not at all: written beside their name, then moved onto it."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def write_whole(path: str | Path, mode: str = "wb") -> Iterator[IO]:
  """Opens a file for writing that gets the name `path` only when the block ends well.

  A full disk or an interruption leaves neither half a file under `path` nor a temporary one.

  Args:
    path: its folder must exist; a file already there is replaced.
    mode: "wb", or "w" for UTF-8 text.
  """
  path = Path(path)
  temporary = temporary_beside(path)
  try:
    with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
      yield file
    os.replace(temporary, path)
  except BaseException:  # also KeyboardInterrupt: whatever ends the block, nothing is left behind
    temporary.unlink(missing_ok=True)
    raise


def temporary_beside(path: Path) -> Path:
  """A hidden name in the folder of `path` that nobody else uses.

  Unlike those of `tempfile`, what is made under it gets the permissions that the user's umask says.
  """
  return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
