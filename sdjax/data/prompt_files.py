"""Which pictures are wanted: lists of prompts in .txt, .jsonl, .csv or .parquet files.

A .txt has a prompt a line. A line of the others has "prompt" and, where it differs from the rest
of the list, any of `KINDS`; a line left out, or a cell left empty, means the default. Paths begin
in the folder of the list.
"""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sdjax.errors import UserError

KINDS = {"prompt": str, "negative_prompt": str, "seed": int, "steps": int, "guidance_scale": float,
         "height": int, "width": int, "num_images": int, "image": str, "mask": str,
         "strength": float}
LIMITS = {"seed": (0, 2**64 - 1), "steps": (1, 1000), "guidance_scale": (0, 1000),
          "height": (1, 2**16), "width": (1, 2**16), "num_images": (1, 10**6), "strength": (0, 1)}
PATHS = ("image", "mask")

Line = tuple[int, dict]  # its number, from 1; {name: value} of what it gives


@dataclasses.dataclass(frozen=True)
class Picture:
  """A file that pictures are made from; another one of the same name is another picture."""
  path: str
  sha256: str


@dataclasses.dataclass(frozen=True)
class Wanted:
  """One picture: what it shows, its sides in px, what it is made from, and who wants it.

  Attributes:
    line, copy: of the list, from 1 and from 0.
    image, mask: None: from the text alone.
    strength: of the change to the image; None where there is no choice.
    others: as in `KINDS`.
  """
  prompt: str
  negative_prompt: str
  seed: int
  steps: int
  guidance_scale: float
  height: int
  width: int
  line: int
  copy: int
  image: Picture | None = None
  mask: Picture | None = None
  strength: float | None = None


def expand(lines: Sequence[Line], defaults: Mapping[str, object], source: str) -> list[Wanted]:
  """Returns what is wanted, picture by picture.

  Args:
    lines: of `read`, each "image" and "mask" a `Picture` or None.
    defaults: values of all `KINDS` but "prompt" for lines that do not give them. The seed is that
      of the first picture; each picture whose line gives no seed has one more than the one before.
    source: the file, for messages; "" if there is none.

  Raises:
    UserError: a seed grows beyond 64 bits.
  """
  wanted = []
  names = [field.name for field in dataclasses.fields(Wanted) if field.name in KINDS]
  for number, given in lines:
    values = {**defaults, **given}
    for copy in range(values["num_images"]):
      seed = given["seed"] + copy if "seed" in given else defaults["seed"] + len(wanted)
      check({"seed": seed}, place(source, number))
      chosen = {name: values[name] for name in names} | {"seed": seed}
      wanted.append(Wanted(**chosen, line=number, copy=copy))
  return wanted


def place(source: str | Path, number: int) -> str:
  """Returns how messages about a line begin."""
  return f"{source} line {number}: " if source else ""


def read(path: str | Path) -> list[Line]:
  """Reads a list of prompts. Paths that it gives are returned as seen from here.

  Raises:
    UserError: a line that cannot be read (by its number), or a file without prompts or of another
      kind.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"there is no prompt file {path}")
  if path.suffix not in READERS:
    raise UserError(f"prompt file {path} is none of {', '.join(READERS)}; write a prompt a line "
                    "into a .txt")
  lines = []
  try:
    for number, values in READERS[path.suffix](path):
      given = check(values, place(path, number))
      if "prompt" not in given:
        raise UserError(f"{place(path, number)}no \"prompt\"; each line needs one")
      given |= {name: str(path.parent / given[name]) for name in PATHS if name in given}
      lines.append((number, given))
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as "
                    "UTF-8") from error
  if not lines:
    raise UserError(f"{path} holds no prompts; write one a line")
  return lines


def check(values: Mapping[str, object], where: str) -> dict:
  """Returns values by name without those that are None, guidance scales as float.

  Raises:
    UserError: a name that is none of `KINDS`, or a value that is not of its kind or in its limits;
      the message begins with `where`.
  """
  checked = {}
  for name, value in values.items():
    if name not in KINDS:
      raise UserError(f"{where}{name!r} is not known; known are {', '.join(KINDS)}")
    if value is None:
      continue
    kind = KINDS[name]
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
      raise UserError(f"{where}{name} is {value!r}; it must be {kind.__name__}")
    if kind is str and any("\ud800" <= character <= "\udfff" for character in value):
      raise UserError(f"{where}{name} is {value!r}, with half a character; mend the \\u escapes")
    low, high = LIMITS.get(name, (value, value))
    if not low <= value <= high:  # also refuses NaN
      raise UserError(f"{where}{name} is {value}; it must lie between {low} and {high}")
    checked[name] = kind(value)
  return checked


def _read_txt(path: Path) -> Iterator[Line]:
  with open(path, encoding="utf-8-sig") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield number, {"prompt": line.strip()}


def _read_jsonl(path: Path) -> Iterator[Line]:
  with open(path, encoding="utf-8-sig") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        values = json.loads(line)
      except ValueError as error:  # mostly JSONDecodeError, whose text has a line 1 of its own
        raise UserError(f"{place(path, number)}not JSON ({getattr(error, 'msg', error)}); write "
                        '{"prompt": "…"}') from error
      if not isinstance(values, dict):
        raise UserError(f"{place(path, number)}no object; write " '{"prompt": "…"}')
      yield number, values


def _read_csv(path: Path) -> Iterator[Line]:
  with open(path, encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file)
    try:
      for row in reader:
        where = place(path, reader.line_num)
        if None in row or None in row.values():
          raise UserError(f"{where}not {len(reader.fieldnames)} columns; quote texts that hold "
                          "commas")
        yield reader.line_num, {name: _value(name, text, where) for name, text in row.items()}
    except csv.Error as error:
      raise UserError(f"{place(path, reader.line_num)}not CSV ({error})") from error


def _value(name: str, text: str, where: str) -> object:
  """Reads a cell; an empty one is None, and columns that are not known are left to `check`."""
  kind = KINDS.get(name, str)
  try:
    return kind(text) if text.strip() else None
  except ValueError as error:
    raise UserError(f"{where}{name} is {text!r}; it must be {kind.__name__}") from error


def _read_parquet(path: Path) -> Iterator[Line]:
  import pyarrow  # here: lists of other kinds do not wait for it
  from pyarrow import parquet
  try:
    with parquet.ParquetFile(path) as file:
      check(dict.fromkeys(file.schema_arrow.names), f"{path}: column ")
      rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
      yield from enumerate(rows, 1)
  except pyarrow.ArrowException as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{path} is no .parquet that can be read ({reason})") from error


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
