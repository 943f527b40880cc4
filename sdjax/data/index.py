"""What one shard holds, as a table beside it: read once, asked for ever after.

A row per sample, in the order of the tar. Columns:

  key                        the sample's name
  PART.offset, PART.size     where each part lies in the tar, in bytes; offset -1: lacks the part
  width, height              of the upright picture, in px; null: not known
  caption, caption_length    the first caption, its characters; null: unreadable
  json.NAME                  what the sample's json says; see `column_of` and `_column`

`facts_of` tells what is known of the whole shard. The table is kept as parquet, so that a filter
reads the columns that it needs and nothing else.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from sdjax.data import captions, images, storage, tar
from sdjax.errors import UserError
from sdjax.files import write_whole

PICTURES = ("jpg", "jpeg", "png", "webp")  # parts, the first that a sample has is its picture
MOMENTS = "moments.npy"  # the part that stands for the picture in a latents cache
FORMAT = 1
METADATA = b"sdjax"
ROW_GROUP = 1000  # rows; a reader of one sample reads a group
HEAD = 1 << 16  # bytes in which all but a few pictures tell their size
MAX_JSON_COLUMNS = 1000  # some jsons have data for keys; a table of all of them would not end
# Python types of a json column's values, without null → the column's type. Others become text.
TYPES = {
    frozenset(): pa.null(), frozenset({bool}): pa.bool_(), frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(), frozenset({int, float}): pa.float64(),
    frozenset({str}): pa.string(),
}


@dataclasses.dataclass
class _Sample:
  """Where the parts of a sample lie, and the bytes of its captions.PARTS."""
  extents: dict[str, storage.Extent]
  texts: dict[str, bytes]


def load(store: storage.Storage, url: str, folder: str | Path | None = None,
         columns: Sequence[str] | None = None) -> pa.Table:
  """The index of a shard: the one that is kept if it is of this very tar, else a new one.

  Args:
    store: that reads the shard.
    url: of the tar.
    folder: see `path_of`.
    columns: the ones to return, of those that the index has; all by default.

  Raises:
    UserError: as `scan`.
    OSError: the shard cannot be read, or the index not be written.
  """
  path = path_of(url, folder)
  table = _kept(path, store.stat(url), columns)
  if table is None:
    table = scan(store, url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as file:
      parquet.write_table(table, file, row_group_size=ROW_GROUP)
    if columns is not None:
      table = table.select([name for name in table.column_names if name in columns])
  return table


def scan(store: storage.Storage, url: str) -> pa.Table:
  """Makes the index of a shard from the headers, captions and jsons in it; 50 µs a sample.

  Pictures are looked into only where the json does not tell their size. Samples without a picture
  are left out and counted. A key that comes twice is one sample, of each part the last, as if the
  tar had been unpacked. Of a tar that breaks off, the samples before the break are kept.

  Raises:
    UserError: not an uncompressed tar.
    OSError: the shard cannot be read.
  """
  stat = store.stat(url)
  problems = collections.defaultdict(dict)  # reason → keys, each once
  with store.open(url) as file:
    samples, truncated = _gather(file, url, problems)
    facts, sizes, texts = [], [], []
    for key, sample in samples.items():
      known = json_object(sample.texts.get("json", b"{}"))
      if known is None:
        problems["unreadable json"][key] = True
      facts.append(known or {})
      sizes.append(_size(file, sample, facts[-1]))
      texts.append(None if known is None else _caption(sample.texts, known))
  columns = {"key": _strings(samples)}
  columns |= _json_columns(facts)
  columns |= _extents([sample.extents for sample in samples.values()])
  columns |= {
      "width": pa.array([width for width, _ in sizes], pa.int32()),
      "height": pa.array([height for _, height in sizes], pa.int32()),
      "caption": _strings(texts),
      "caption_length": pa.array([None if text is None else len(text) for text in texts],
                                 pa.int32()),
  }
  told = {"format": FORMAT, "size": stat.size, "version": stat.version, "samples": len(samples),
          "truncated": truncated, "problems": {name: len(keys) for name, keys in problems.items()},
          "examples": {name: next(iter(keys)) for name, keys in problems.items()}}
  return pa.table(columns).replace_schema_metadata({METADATA: json.dumps(told)})


def facts_of(table: pa.Table) -> dict[str, Any]:
  """What an index tells of its shard as a whole.

  Returns:
    "format"; "size" in bytes and "version" of the tar; "samples"; "truncated": whether the tar
    breaks off; "problems": reason → samples, "examples": reason → key of one of them. Samples with
    "no picture" are not in the table, those with "unreadable json" or "duplicate name" are.
  """
  return json.loads(table.schema.metadata[METADATA])


def json_object(blob: bytes) -> dict[str, Any] | None:
  """A sample's json; None if it is not one, or not an object."""
  try:
    facts = json.loads(blob)
  except (ValueError, RecursionError):
    return None
  return facts if isinstance(facts, dict) else None


def column_of(key: str) -> str:
  """The column of a json's key; one that would look like a part's extent ends in _."""
  return f"json.{key}_" if f".{key}".endswith((".offset", ".size")) else f"json.{key}"


def path_of(url: str, folder: str | Path | None = None) -> Path:
  """Where the index of a shard is kept: beside it where that is possible, else in `folder`.

  Args:
    url: of the tar.
    folder: by default $SDJAX_CACHE/index, or ~/.cache/sdjax/index.
  """
  if "://" not in url:
    beside = Path(url.removesuffix(".tar") + ".index.parquet")
    if beside.is_file() or os.access(beside.parent, os.W_OK):
      return beside
    url = os.path.abspath(url)
  if folder is None:
    folder = Path(os.environ.get("SDJAX_CACHE", Path.home() / ".cache/sdjax")) / "index"
  return Path(folder) / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.parquet"


def count_of(store: storage.Storage, url: str) -> int | None:
  """How many samples a shard has by img2dataset's files beside it; None where there are none.

  That is STEM_stats.json, else STEM.parquet, which has a row per picture that was asked for
  (https://github.com/rom1504/img2dataset, logger.py and writer.py).

  Raises:
    OSError: they cannot be read.
  """
  stem = url.removesuffix(".tar")
  # S3 answers 403 for what is not there, unless one may list the bucket.
  absent = (FileNotFoundError, UserError)
  try:
    return int(json.loads(store.read_all(f"{stem}_stats.json"))["successes"])
  except (*absent, ValueError, KeyError, TypeError):
    pass  # absent, or not img2dataset's
  try:
    with store.open(f"{stem}.parquet") as file:
      status = parquet.ParquetFile(file).read(columns=["status"])["status"]
  except (*absent, pa.ArrowInvalid, KeyError):
    return None
  return status.to_pylist().count("success")


def _kept(path: Path, stat: storage.Stat, columns: Sequence[str] | None) -> pa.Table | None:
  """The index at `path`, unless it is absent, damaged or that of another tar."""
  try:
    with parquet.ParquetFile(path) as file:
      told = json.loads(file.schema_arrow.metadata[METADATA])
      if (told["format"], told["size"], told["version"]) != (FORMAT, stat.size, stat.version):
        return None
      return file.read(columns)
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _gather(file: BinaryIO, url: str, problems) -> tuple[dict[str, _Sample], bool]:
  """Samples with a picture by their keys, and whether the tar breaks off."""
  samples = collections.defaultdict(lambda: _Sample({}, {}))
  key, truncated = None, False
  try:
    for name, offset, size in tar.members(file, url):
      key, part = tar.split_name(name)
      sample = samples[key]
      if part in sample.extents:
        problems["duplicate name"][key] = True
      sample.extents[part] = (offset, size)
      if part in captions.PARTS:
        file.seek(offset)
        sample.texts[part] = file.read(size)
  except tar.Truncated:
    samples.pop(key, None)  # its last parts may be missing
    truncated = True
  good = {}
  for key, sample in samples.items():
    if MOMENTS in sample.extents or any(part in sample.extents for part in PICTURES):
      good[key] = sample
    else:
      problems["no picture"][key] = True
  return good, truncated


def _caption(texts: dict[str, bytes], facts: dict[str, Any]) -> str | None:
  if "txt" in texts and "captions" not in facts:
    texts = {"txt": texts["txt"]}  # saves reading the json a second time
  try:
    return captions.captions_of(texts)[0]
  except ValueError:
    return None


def _size(file: BinaryIO, sample: _Sample, facts: dict[str, Any]) -> tuple[int | None, int | None]:
  """Width and height of the upright picture; None, None if nothing tells.

  img2dataset's are those of the picture as it is stored, which its EXIF tags may turn: it reads
  pictures by OpenCV's IMREAD_UNCHANGED (resizer.py).
  """
  orientation = images.orientation_of(facts.get("exif"))
  sides = facts.get("width"), facts.get("height")
  if not all(type(side) in (int, float) and 1 <= side < 2**31 for side in sides):
    header = _header(file, sample, orientation)
    if header is None:
      return None, None
    sides, orientation = (header.width, header.height), header.orientation
  return images.upright(tuple(map(int, sides)), orientation)


def _header(file: BinaryIO, sample: _Sample, orientation: int) -> images.Header | None:
  """What a sample's picture says of itself; None without one, or one that is damaged."""
  part = next((part for part in PICTURES if part in sample.extents), None)
  if part is None:
    return None
  offset, size = sample.extents[part]
  for length in (min(HEAD, size), size):
    file.seek(offset)
    try:
      return images.read_header(file.read(length), orientation)
    except images.BadPicture:
      continue  # some have more than HEAD before their size
  return None


def _extents(samples: Sequence[dict[str, storage.Extent]]) -> dict[str, np.ndarray]:
  columns = {}
  for part in sorted(set().union(*samples)):
    extents = np.array([sample.get(part, (-1, 0)) for sample in samples], np.int64)
    columns[f"{part}.offset"], columns[f"{part}.size"] = extents.T.copy()
  return columns


def _json_columns(rows: Sequence[dict[str, Any]]) -> dict[str, pa.Array]:
  keys = collections.Counter(itertools.chain.from_iterable(rows)).most_common(MAX_JSON_COLUMNS)
  return {_utf8(column_of(key)): _column([row.get(key) for row in rows]) for key, _ in keys}


def _column(values: list) -> pa.Array:
  """Values of a json's key as int64, float64, bool or string; null where all are.

  The bare NaN of img2dataset's jsons is null. Lists, objects, and all of what has no common type
  (or no room in 64 bits) are text, as json spells it; strings stand for themselves.
  """
  if float in set(map(type, values)):
    values = [None if value != value else value for value in values]
  common = TYPES.get(frozenset(map(type, values)) - {type(None)})
  if common == pa.string():
    return _strings(values)
  if common is not None:
    try:
      return pa.array(values, common)
    except (OverflowError, pa.ArrowInvalid):  # an integer beyond 64 bits
      pass
  return _strings(
      value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
      for value in values)


def _strings(values: Iterable[str | None]) -> pa.Array:
  values = list(values)
  try:
    return pa.array(values, pa.string())
  except UnicodeEncodeError:
    return pa.array([None if value is None else _utf8(value) for value in values], pa.string())


def _utf8(text: str) -> str:
  """Text as it can be stored: half a surrogate pair, which jsons may hold, becomes "?"."""
  return text.encode("utf-8", "replace").decode("utf-8")
