"""Which samples exist: shard addresses spelled out, and one index over all of them.

The index is columns (numpy arrays, one entry per sample), not a list of objects: it costs some 60
bytes a sample and knows *what* can be read. *When* a sample is read is the plan's business
(`plan.py`); the two meet in `pipeline.py` and nowhere else.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdjax.data import tar
from sdjax.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
MOMENTS = "moments.npy"


@dataclasses.dataclass(frozen=True)
class Index:
  """Every sample of a data set and where its bytes lie. Samples are numbered 0 … count - 1.

  Attributes:
    shards: path of each tar.
    keys: name of each sample within its shard.
    shard: int32 [count], which of `shards`.
    offsets: part → int64 [count], its first byte in the tar; -1 where a sample lacks the part.
    sizes: part → int64 [count], in bytes.
    problems: reason → how many samples (or ends of shards) were left out of the index for it.
    examples: reason → one of them, as shard or shard:key.
  """
  shards: tuple[str, ...]
  keys: tuple[str, ...]
  shard: np.ndarray
  offsets: Mapping[str, np.ndarray]
  sizes: Mapping[str, np.ndarray]
  problems: Mapping[str, int]
  examples: Mapping[str, str]

  @property
  def count(self) -> int:
    """Number of samples."""
    return len(self.keys)

  @property
  def kind(self) -> str:
    """What a sample is: "moments" (of a latents cache) or "image"."""
    return "moments" if MOMENTS in self.offsets else "image"

  def read(self, sample: int, parts: Sequence[str]) -> dict[str, bytes]:
    """The bytes of those of `parts` that the sample has.

    Raises:
      UserError: the shard has become shorter since it was indexed.
      OSError: the shard cannot be read.
    """
    present = [part for part in parts if part in self.offsets and self.offsets[part][sample] >= 0]
    extents = [(int(self.offsets[part][sample]), int(self.sizes[part][sample]))
               for part in present]
    blobs = tar.read(self.shards[self.shard[sample]], extents)
    return dict(zip(present, blobs, strict=True))

  def name(self, sample: int) -> str:
    """Shard and key, for messages."""
    return f"{self.shards[self.shard[sample]]}:{self.keys[sample]}"

  def digest(self) -> str:
    """16 hex digits that change when samples are added, removed, reordered or resized.

    Paths of shards do not count, so a data set may move.
    """
    state = hashlib.sha256("\0".join(self.keys).encode())
    for part in sorted(self.sizes):
      state.update(part.encode() + self.sizes[part].tobytes())
    return state.hexdigest()[:16]


def expand(urls: str | Sequence[str]) -> list[str]:
  """Paths of the tars that `urls` mean, in order, each once.

  Args:
    urls: one or several of: a tar, a folder of tars, a glob ("data/*.tar"), a range with braces
      ("data/{00000..00041}.tar", "{a,b}/00000.tar").

  Raises:
    UserError: one of them matches nothing, or is on the network.
  """
  paths = []
  for url in [urls] if isinstance(urls, str | Path) else urls:
    found = list(itertools.chain.from_iterable(map(_matches, _expand_braces(str(url)))))
    if not found:
      raise UserError(f"no shards match {url}; give a tar, a folder that holds tars, a glob or a "
                      "range such as data/{00000..00041}.tar")
    paths += found
  if not paths:
    raise UserError("no shards given; give a tar or a folder that holds tars")
  return list(dict.fromkeys(paths))


def build_index(urls: str | Sequence[str], threads: int = 8) -> Index:
  """Scans the headers of all shards; 60 µs a sample from a warm disk.

  Samples without a picture are left out and counted in `problems`, as are shards that break off
  in the middle (the samples before the break are kept). The same files give the same index on
  every host, whatever order a file system lists them in.

  Args:
    urls: as `expand` takes them.
    threads: shards scanned at once. They wait for the disk or the network, not for Python.

  Raises:
    UserError: nothing matches, a shard is no tar or holds no sample, or only some of the samples
      come from a latents cache.
  """
  paths = expand(urls)
  with concurrent.futures.ThreadPoolExecutor(min(threads, len(paths))) as pool:
    contents = list(pool.map(tar.scan, paths))
  problems, examples = collections.Counter(), {}
  rows = []  # (shard, key, parts)
  for number, (path, content) in enumerate(zip(paths, contents, strict=True)):
    good = [(number, key, parts) for key, parts in content.samples.items()
            if MOMENTS in parts or any(part in parts for part in PICTURES)]
    if not good:
      raise UserError(f"shard {path} holds no sample with a picture ({', '.join(PICTURES)}); "
                      "leave it out or download it again")
    if lacking := list(content.samples.keys() - {key for _, key, _ in good}):
      problems["no picture"] += len(lacking)
      examples.setdefault("no picture", f"{path}:{min(lacking)}")
    if content.truncated:
      problems["truncated shard"] += 1
      examples.setdefault("truncated shard", path)
    rows += good
  encoded = sum(MOMENTS in parts for _, _, parts in rows)
  if 0 < encoded < len(rows):
    raise UserError(f"{len(rows) - encoded} of {len(rows)} samples have no {MOMENTS}; use shards "
                    "of pictures or shards of a latents cache, not both")
  return _columns(paths, rows, problems, examples)


def _columns(paths, rows, problems, examples) -> Index:
  names = sorted(set().union(*(parts for _, _, parts in rows)))
  extents = {name: np.array([parts.get(name, (-1, 0)) for _, _, parts in rows], np.int64)
             for name in names}
  return Index(
      shards=tuple(paths),
      keys=tuple(key for _, key, _ in rows),
      shard=np.array([number for number, _, _ in rows], np.int32),
      offsets={name: np.ascontiguousarray(extent[:, 0]) for name, extent in extents.items()},
      sizes={name: np.ascontiguousarray(extent[:, 1]) for name, extent in extents.items()},
      problems=problems,
      examples=examples)


def _expand_braces(url: str) -> list[str]:
  """"a{08..10}" → a08 a09 a10, padded like the first number; "{x,y}" → x y; left to right."""
  match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", url)
  if match is None:
    return [url]
  first, last, listed = match.groups()
  if listed is None:
    if int(last) < int(first):
      raise UserError(f"range {match.group()} in {url} runs backwards; put the lower number first")
    choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
  else:
    choices = listed.split(",")
  heads, tail = url[:match.start()], url[match.end():]
  return [expanded for choice in choices for expanded in _expand_braces(heads + choice + tail)]


def _matches(path: str) -> list[str]:
  """Tars that a path without braces means. A named file must exist, so a gap in a range is told."""
  if "://" in path:
    raise UserError(f"{path} is on the network; only local paths are read so far: copy it first")
  place = Path(path).expanduser()
  if place.is_dir():
    found = sorted(str(p) for p in place.glob("*.tar"))
    if not found:
      raise UserError(f"folder {path} holds no .tar; `sdjax shards pack` makes shards of pictures")
    return found
  if glob.has_magic(path) and not place.exists():
    return sorted(glob.glob(str(place)))
  if not place.is_file():
    raise UserError(f"shard {path} does not exist; mend the path or the range")
  return [str(place)]
