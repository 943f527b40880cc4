"""The record of a checkpoint: what a step holds, and the proof that it is whole.

`checkpoint.json` is written last, when all other files are on the disk. It names each of them with
its size, and with its sha256 but for the arrays': a step without it was not finished, one that
differs from it is damaged. That works wherever one file can appear whole. Renaming a folder, the
other way to finish a step, copies file by file on the mount of a bucket, or is refused there.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO

from sdjax import files

NAME = "checkpoint.json"
ARRAYS = "d"  # folders of this name hold OCDBT's data files


class Damaged(Exception):
  """A step cannot be used; the message is the reason."""


def write(folder: Path, facts: dict) -> None:
  """Makes a step whole.

  Args:
    folder: of the step; all its files are there.
    facts: what JSON can hold.

  Raises:
    OSError: the disk does not take it.
  """
  written = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      with open(path, "rb") as file:
        os.fsync(file.fileno())  # after a loss of power, too, the record stands for whole files
        written[path.relative_to(folder).as_posix()] = _seen(path, file)
  facts = facts | {"files": written}
  with files.write_whole(folder / NAME, "w") as file:
    json.dump({"sha256": _sha256(facts), "facts": facts}, file)
    file.flush()
    os.fsync(file.fileno())


def read(folder: Path) -> dict:
  """Returns the facts of a whole step.

  Raises:
    Damaged: it was not finished, or its files are not those that were written. Of the files of
      arrays only the sizes are looked at.
    PermissionError: nothing is known of a file that may not be read.
  """
  try:
    stored = json.loads((folder / NAME).read_bytes())
    facts = stored["facts"]
    if stored["sha256"] != _sha256(facts):
      raise Damaged(f"{NAME} is not as it was written")
  except FileNotFoundError as error:
    raise Damaged(f"it was not finished: there is no {NAME}") from error
  except PermissionError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise Damaged(f"{NAME} cannot be read") from error
  for name, written in facts["files"].items():
    path = folder / name
    try:
      with open(path, "rb") as file:
        found = _seen(path, file)
    except PermissionError:
      raise
    except OSError as error:
      raise Damaged(f"{name}: {error.strerror}") from error
    if found[0] != written[0]:
      raise Damaged(f"{name} has {found[0]:,} bytes, {written[0]:,} were written")
    if found != written:
      raise Damaged(f"{name} is not as it was written")
  return facts


def _seen(path: Path, file: IO[bytes]) -> list:
  """Returns [bytes, sha256]; "" for the files of arrays, which are large, and have digests."""
  is_array = path.parent.name == ARRAYS
  return [os.fstat(file.fileno()).st_size,
          "" if is_array else hashlib.file_digest(file, "sha256").hexdigest()]


def _sha256(facts: dict) -> str:
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
