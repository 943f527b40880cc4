"""Where samples come from: tars on a disk or the network, a folder of pictures, or TFDS.

  Source.read(sample) -> the sample's picture, and what is known of it

A source knows *what* exists, numbered 0 … count - 1; *when* a sample is read is the plan's
business (`plan.py`), and the two meet in `pipeline.py` and nowhere else.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from sdjax.data import filters, folder_source, images, index, storage, tfds_source, urls
from sdjax.errors import UserError

GROUPS = 512         # row groups of indices that are kept in memory, some 200 kB each
HEAD = 2**16         # bytes of each shard by which it is known again
THREADS = 64         # shards looked at at once; they wait for the disk or the network


class Source(Protocol):
  """What a data set is to the pipeline.

  Attributes:
    count: samples.
    kind: "image", or "moments" of a latents cache.
    is_remote: whether reading waits for a network.
    digest: changes with the samples, not with the place where they lie.
    problems: reason → samples (or shards) that are not among the `count`.
    examples: reason → one of them.
  """
  count: int
  kind: str
  is_remote: bool
  digest: str
  problems: Mapping[str, int]
  examples: Mapping[str, str]

  def read(self, sample: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns (part → its bytes, facts).

    facts has "caption", the first one, None if it cannot be read, and the columns of the sample's
    json that the source was asked for and the sample has; lists are lists.

    Raises:
      images.BadPicture: this sample cannot be had; others can.
      UserError, OSError: nothing can.
    """

  def facts(self, sample: int) -> dict[str, Any]:
    """Returns the facts of `read` alone."""

  def sizes(self, samples: np.ndarray) -> np.ndarray:
    """Returns height and width in px of upright pictures, int32 [n 2]; 0: not known."""

  def name(self, sample: int) -> str:
    """Returns how messages call a sample."""


def open_source(
    address: str | Sequence[str],
    *,
    rules: Sequence[Sequence] = (),
    facts: Sequence[str] = (),
    parts: Sequence[str] = (),
    strict: bool = False,
    store: storage.Storage | None = None,
) -> Source:
  """Returns the source that an address means.

  Args:
    address: shards as `urls.expand` takes them; a folder of pictures with captions, as
      `pack.find_sources` takes it; or what `tfds_source.TFDS` takes, "tfds:cifar10@train".
    rules: what the samples of shards must fulfil, see `filters.parse`.
    facts: keys of the samples' json that are wanted.
    parts: of samples in shards that are wanted, beside the picture or what a latents cache holds.
    strict: a shard that is missing is an error rather than replaced.
    store: that reads; shared by the sources of a run.

  Raises:
    UserError: there is nothing at the address, or nothing is left of it.
  """
  if isinstance(address, str) and address.startswith("tfds:"):
    chosen = tfds_source.TFDS
  elif isinstance(address, str | Path) and _holds_no_tar(Path(address)):
    chosen = folder_source.Folder
  else:
    return Shards(address, store or storage.Storage(), rules=rules, facts=facts, parts=parts,
                  strict=strict)
  if rules:
    raise UserError(f"{address} has no index that {rules[0]} could be asked of; make shards of it "
                    "with `sdjax shards pack`, or leave the filters out")
  return chosen(address)


def _holds_no_tar(folder: Path) -> bool:
  folder = folder.expanduser()
  return folder.is_dir() and not any(folder.glob("*.tar"))


class Group:
  """Some neighbouring rows of a shard's index.

  Attributes:
    keys: of the samples.
    sizes: int32 [n 2], height and width.
    extents: part → (offsets, sizes), int64 [n] each.
  """

  def __init__(self, table: pa.Table, parts: Sequence[str], facts: Sequence[str]):
    self.keys = table["key"]
    self.sizes = np.stack(
        [table[side].fill_null(0).to_numpy() for side in ("height", "width")], axis=1)
    self.extents = {part: tuple(table[f"{part}.{end}"].to_numpy() for end in ("offset", "size"))
                    for part in parts
                    if f"{part}.offset" in table.schema.names}
    # As whole arrays: a chunked one takes thrice as long to find a row.
    self._facts = {name: (table[column].combine_chunks(), column.startswith("json."))
                   for name, column in columns_of(facts).items() if column in table.schema.names}

  def facts(self, row: int) -> dict[str, Any]:
    """Returns what is known of a row, but for nulls."""
    facts = {name: _unfolded(column[row].as_py()) if is_json else column[row].as_py()
             for name, (column, is_json) in self._facts.items()}
    return {name: value for name, value in facts.items() if value is not None}


def _unfolded(value: Any) -> Any:
  """The list that a column keeps as text; what only looks like one stays a text."""
  if not (isinstance(value, str) and value.startswith("[")):
    return value
  try:
    return json.loads(value)
  except (ValueError, RecursionError):
    return value


def columns_of(facts: Sequence[str]) -> dict[str, str]:
  """Returns name → column of the index."""
  return {"caption": "caption"} | {name: index.column_of(name) for name in facts}


class Shards:
  """Tars in webdataset's layout, such as img2dataset makes them. See `Source`.

  Which rows of a tar are samples is known from its index (`index.py`). Where nothing is filtered
  and img2dataset's sidecars tell how many samples a tar has, it is indexed when a sample of it is
  first read; if it then has fewer, the rest are bad samples, "missing sample".

  Attributes:
    shards: their addresses.
    starts: numbers of their first samples, and the count.
  """

  def __init__(self, addresses: str | Sequence[str], store: storage.Storage, *,
               rules: Sequence[Sequence] = (), facts: Sequence[str] = (),
               parts: Sequence[str] = (), strict: bool = False):
    """Finds the shards, counts their samples, and filters them.

    Raises:
      UserError: an address matches nothing, a shard is no tar, or no sample is left.
    """
    self._store, self._strict = store, strict
    self._facts, self._more = tuple(facts), tuple(parts)
    self._rules = filters.parse(rules)
    self.shards = tuple(urls.expand(addresses, store))
    self.is_remote = any("://" in url for url in self.shards)
    self._locks = collections.defaultdict(threading.Lock)
    self._indexed = set()
    self._group = functools.lru_cache(GROUPS)(self._read_group)
    with concurrent.futures.ThreadPoolExecutor(min(THREADS, len(self.shards))) as pool:
      found = list(pool.map(self._look, self.shards))
    self._stats, heads, counts, self._kept, problems = zip(*found, strict=True)
    self.starts = list(itertools.accumulate(counts, initial=0))
    self.count = self.starts[-1]
    self.problems, self.examples = collections.Counter(), {}
    for url, some in zip(self.shards, problems, strict=True):
      self.problems.update(some)
      self.examples = dict.fromkeys(some, url) | self.examples
    if not self.count:
      top = ", ".join(f"{n} {reason}" for reason, n in self.problems.most_common(3))
      raise UserError(f"no sample is left of {len(self.shards)} shards ({top}); loosen the "
                      "filters, or look with `sdjax shards inspect`")
    self.kind = self._first_kind()
    state = hashlib.sha256(repr(self._rules).encode())
    for url, count, stat, head in zip(self.shards, counts, self._stats, heads, strict=True):
      name = url.partition("?")[0].rpartition("/")[2]  # without what a URL is signed by
      state.update(f"{name} {count} {stat and stat.size}".encode() + head)
    self.digest = state.hexdigest()[:16]

  @property
  def size(self) -> int:
    """Of all tars, in bytes."""
    return sum(stat.size for stat in self._stats if stat)

  def _look(self, url: str) -> tuple[
      storage.Stat | None, bytes, int, np.ndarray | None, Mapping[str, int]]:
    """Returns a shard's stat, first bytes, samples, their rows in its index (None: all), and
    problems."""
    try:
      stat = self._store.stat(url)
    except storage.Missing:
      if self._strict:
        raise
      return None, b"", 0, None, {"missing shard": 1}
    (head,) = self._store.read(url, [(0, min(HEAD, stat.size))])
    if not self._rules and (count := index.count_of(self._store, url)) is not None:
      return stat, head, count, None, {}
    table = index.load(self._store, url, columns=filters.columns_of(self._rules))
    told = index.facts_of(table)
    # The other problems are those of samples that are in the table; reading them will tell.
    problems = collections.Counter({"no picture": told["problems"].get("no picture", 0),
                                    "truncated shard": int(told["truncated"])})
    if not self._rules:
      return stat, head, len(table), None, +problems
    kept = np.flatnonzero(filters.keep(table, self._rules)).astype(np.uint32)
    return stat, head, len(kept), kept, problems + filters.counts(table, self._rules)

  def read(self, sample: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """See `Source.read`."""
    shard, row = self._locate(sample)
    group, row = self._find(shard, row)
    extents = {part: (int(offsets[row]), int(sizes[row]))
               for part, (offsets, sizes) in group.extents.items() if offsets[row] >= 0}
    first = (index.MOMENTS,) if self.kind == "moments" else index.PICTURES
    wanted = next((part for part in first if part in extents), None)
    if wanted is None:
      raise images.BadPicture("no picture" if self.kind == "image" else "no moments")
    names = [wanted, *(part for part in self._more if part in extents)]
    with self._replacing():
      blobs = self._store.read(self.shards[shard], [extents[name] for name in names])
    return dict(zip(names, blobs, strict=True)), group.facts(row)

  def facts(self, sample: int) -> dict[str, Any]:
    """See `Source.facts`."""
    group, row = self._find(*self._locate(sample))
    return group.facts(row)

  def sizes(self, samples: np.ndarray) -> np.ndarray:
    """See `Source.sizes`."""
    found = np.zeros((len(samples), 2), np.int32)
    for number, sample in enumerate(samples):
      try:
        group, row = self._find(*self._locate(sample))
        found[number] = group.sizes[row]
      except images.BadPicture:  # reading will tell
        continue
    return found

  def name(self, sample: int) -> str:
    """See `Source.name`."""
    shard, row = self._locate(sample)
    try:
      group, place = self._find(shard, row)
    except images.BadPicture:
      return f"{self.shards[shard]}, sample {row}"
    return f"{self.shards[shard]}:{group.keys[place]}"

  def _first_kind(self) -> str:
    """By the first sample that is there: sidecars may tell of more than there are."""
    for first in sorted(set(self.starts) - {self.count}):
      with contextlib.suppress(images.BadPicture):
        group, _ = self._find(*self._locate(first))
        return "moments" if index.MOMENTS in group.extents else "image"
    raise UserError(f"not one of {self.count} samples is in {len(self.shards)} shards, though the "
                    "files beside them tell so; download them again")

  @contextlib.contextmanager
  def _replacing(self):
    """Has the samples of a shard that goes missing replaced, where that is allowed."""
    try:
      yield
    except storage.Missing as error:
      if self._strict:
        raise
      raise images.BadPicture("missing shard") from error

  def _locate(self, sample: int) -> tuple[int, int]:
    shard = bisect.bisect_right(self.starts, sample) - 1
    place, kept = int(sample) - self.starts[shard], self._kept[shard]
    return shard, place if kept is None else int(kept[place])

  def _find(self, shard: int, row: int) -> tuple[Group, int]:
    number, row = divmod(row, index.ROW_GROUP)
    group = self._group(shard, number)
    if row >= len(group.keys):
      raise images.BadPicture("missing sample")
    return group, row

  def _read_group(self, shard: int, number: int) -> Group:
    url = self.shards[shard]
    with self._replacing(), self._locks[shard]:  # or two threads would index it twice
      if self._store.stat(url) != self._stats[shard]:
        raise UserError(f"{url} has changed since the run began; start again")
      if shard not in self._indexed:
        index.load(self._store, url, columns=[])
        self._indexed.add(shard)
    parts = (index.MOMENTS, *index.PICTURES, *self._more)
    extents = {f"{part}.{end}" for part in parts for end in ("offset", "size")}
    wanted = {"key", "height", "width", *columns_of(self._facts).values()} | extents
    with parquet.ParquetFile(index.path_of(url)) as file:
      if number >= file.num_row_groups:
        raise images.BadPicture("missing sample")
      names = [name for name in file.schema_arrow.names if name in wanted]
      return Group(file.read_row_group(number, columns=names), parts, self._facts)
