"""A latents cache on disk: what goes into which shard, and what the folder tells of itself.

  OUT/cache.json          how the latents were made, and whether all are there
  OUT/empty.context.npy   where texts were encoded too, the states of the empty one
  OUT/00012.tar           000120003.moments.npy, .txt, .json, .context.npy … of each sample
  OUT/00012_stats.json    how many samples the shard has, and which were left out

All latents of a shard have one shape. A shard appears whole, and what it holds is decided by its
number alone, so that a cache which was interrupted any number of times is, bit for bit, the one
that was not.
"""

import collections
import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.data import buckets, pack, tar
from sdjax.data.buckets import Shape
from sdjax.data.sources import Source
from sdjax.data.storage import Storage
from sdjax.errors import UserError
from sdjax.files import write_whole

FACTS, EMPTY = "cache.json", "empty."
FORMAT = 1
SIZES_AT_ONCE = 10_000       # samples whose sizes are looked up together
STATES = ("context.npy", "pooled.npy")  # parts that hold the states of a text


class Shard(NamedTuple):
  """A shard to be made: its number, the size of its pictures, and which samples they are."""
  number: int
  size: Shape
  samples: np.ndarray        # int64 [n]


def plan(source: Source, sizes: Sequence[Shape], shard_size: int) -> list[Shard]:
  """Divides the samples of a source among shards, in their order.

  Args:
    source: with pictures.
    sizes: that pictures may be cut to; each sample gets the one that crops it least.
    shard_size: samples per shard, 1 … 10,000.

  Raises:
    UserError: `shard_size` is out of range.
  """
  pack.check_shard_size(shard_size)
  best = np.zeros(source.count, np.int16)
  if len(sizes) > 1:
    for start in range(0, source.count, SIZES_AT_ONCE):
      some = np.arange(start, min(start + SIZES_AT_ONCE, source.count))
      best[some] = nearest(source.sizes(some), sizes)
  shards = []
  for number, size in enumerate(sizes):
    members = np.flatnonzero(best == number)
    for start in range(0, len(members), shard_size):
      shards.append(Shard(len(shards), size, members[start:start + shard_size]))
  return shards


def nearest(
    pictures: np.ndarray,      # int [n 2], height and width; 0: not known, which counts as square
    sizes: Sequence[Shape],
) -> np.ndarray:               # int64 [n], places in `sizes`
  """Which size crops each picture least: the one whose aspect ratio differs by the least factor."""
  differences = buckets.log_ratios(pictures)[:, None] - buckets.log_ratios(sizes)
  return np.abs(differences).argmin(axis=1)


@dataclasses.dataclass(frozen=True)
class Result:
  """What a cache holds so far: shards, of how many, samples, bytes of the tars, and what not."""
  shards: int
  planned: int
  samples: int
  size: int
  failures: list[pack.Failure]


class Writer:
  """Fills the folder of a cache. Several processes may do so at once, each with its shards."""

  def __init__(self, out: str | Path, facts: Mapping[str, Any], shards: Sequence[Shard]):
    """Writes nothing yet.

    Args:
      out: a folder that all processes see.
      facts: how the latents are made, as JSON can hold it.
      shards: all of them.

    Raises:
      UserError: `out` is a URL, or holds something else than the beginning of this cache.
    """
    if "://" in str(out):
      raise UserError(f"{out} is a URL; give a folder, such as the bucket's mount point")
    self._out, self._shards = Path(out), shards
    counts = collections.Counter(shard.size for shard in shards)  # in the order of the shards
    self._facts = json.loads(json.dumps({"format": FORMAT, **facts, "shards": [
        {"size": size, "count": count} for size, count in counts.items()]}))
    begun = facts_of(str(out), Storage())
    if begun is None:
      # What begins a cache may be there before the facts: `begin` was killed.
      if self._out.exists() and (not self._out.is_dir() or any(
          not name.startswith((".", EMPTY)) for name in os.listdir(self._out))):
        raise UserError(f"{out} holds no latents cache; choose another folder, or empty it")
      return
    if different := [name for name in self._facts if begun.get(name) != self._facts[name]]:
      raise UserError(f"{out} holds another cache, of other {', '.join(different)}; give the "
                      "command that began it, or choose another folder")

  def begin(self, empty: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """Makes the folder. No shard is there before the facts are, nor these before `empty`.

    Args:
      empty: gives, where the facts are not there, part → the states of the empty text.
    """
    self._out.mkdir(parents=True, exist_ok=True)
    if (self._out / FACTS).is_file():
      return
    for part, array in empty().items():
      with write_whole(self._out / f"{EMPTY}{part}") as file:
        file.write(npy(array))
    self._tell(complete=False)

  def missing(self) -> list[Shard]:
    """The shards that are not there."""
    names = set(os.listdir(self._out)) if self._out.is_dir() else set()
    return [shard for shard in self._shards if f"{shard.number:05d}.tar" not in names]

  def write(self, shard: Shard, samples: Iterable[dict[str, bytes] | pack.Failure]) -> None:
    """Writes a shard of samples, part → bytes each, or why one is left out."""
    stem = f"{shard.number:05d}"
    for path in self._out.glob(f".{stem}[._]*"):  # what a killed process has left
      path.unlink()
    failures = []
    with write_whole(self._out / f"{stem}.tar") as file:
      with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for place, sample in enumerate(samples):
          if isinstance(sample, pack.Failure):
            failures.append(dataclasses.asdict(sample))
            continue
          tar.add_sample(archive, tar.sample_key(shard.number, place), sample)
      count = len(shard.samples)
      with write_whole(self._out / f"{stem}_stats.json", "w") as stats:
        json.dump({"count": count, "successes": count - len(failures), "failures": failures},
                  stats, indent=4)

  def finish(self) -> Result:
    """Tells what is there, and, where nothing is missing, that the cache is complete."""
    missing = {shard.number for shard in self.missing()}
    there = [f"{shard.number:05d}" for shard in self._shards if shard.number not in missing]
    stats = [json.loads((self._out / f"{stem}_stats.json").read_text()) for stem in there]
    if not missing:
      self._tell(complete=True)
    return Result(
        len(there), len(self._shards), sum(one["successes"] for one in stats),
        sum((self._out / f"{stem}.tar").stat().st_size for stem in there),
        [pack.Failure(**failure) for one in stats for failure in one["failures"]])

  def _tell(self, complete: bool) -> None:
    with write_whole(self._out / FACTS, "w") as file:
      json.dump(self._facts | {"complete": complete}, file, indent=2)


def npy(array: np.ndarray) -> bytes:
  """An array as a .npy file."""
  file = io.BytesIO()
  np.save(file, array, allow_pickle=False)
  return file.getvalue()


def facts_of(folder: str, store: Storage) -> dict[str, Any] | None:
  """What a folder or URL tells of how its latents were made; None if it tells nothing.

  Raises:
    UserError: what it tells cannot be understood.
    OSError: it cannot be read.
  """
  url = f"{folder}/{FACTS}"
  try:
    facts = json.loads(store.read_all(url))
  except (FileNotFoundError, UserError):  # S3 answers 403 for what is not there
    return None
  except ValueError as error:
    raise UserError(f"{url} is damaged ({error}); encode the pictures again") from error
  if not isinstance(facts, dict) or facts.get("format") != FORMAT:
    raise UserError(f"{url} is of another version of sdjax; encode the pictures again")
  return facts


def caches_of(sources: Iterable[Source], store: Storage) -> dict[str, dict[str, Any] | None]:
  """Folder → what it tells, of all caches that sources of kind "moments" read."""
  folders = dict.fromkeys(
      url.rpartition("/")[0] or "." for source in sources if source.kind == "moments"
      for url in source.shards)
  return {folder: facts_of(folder, store) for folder in folders}


def empty_text(caches: Mapping[str, Mapping | None], store: Storage,
               ) -> dict[str, np.ndarray] | None:
  """The empty text's states by name, "context" float32 [l d] and, of SDXL, "pooled" [d].

  None where a cache has none: its texts were not encoded.
  """
  if not caches or not all(facts and facts["text"] for facts in caches.values()):
    return None
  folder, facts = next(iter(caches.items()))
  states = {part.removesuffix(".npy"): store.read_all(f"{folder}/{EMPTY}{part}")
            for part in facts["states"]}
  return {name: np.load(io.BytesIO(blob), allow_pickle=False).astype(np.float32)
          for name, blob in states.items()}


def by_shape(source: Source, caches: Mapping[str, Mapping | None]) -> list[Source]:
  """A source as several that have latents of one shape each: itself, unless it is a bucketed cache.

  Args:
    source: of any kind.
    caches: of `caches_of`.
  """
  shapes = [_size_of(url, caches) for url in source.shards] if source.kind == "moments" else []
  if len(set(shapes)) < 2:
    return [source]
  parts = [Part(source, np.array([shape == other for other in shapes]))
           for shape in dict.fromkeys(shapes)]
  parts = [part for part in parts if part.count]  # a rare shape may be filtered away
  parts[0].problems, parts[0].examples = source.problems, source.examples
  return parts


def _size_of(url: str, caches: Mapping[str, Mapping | None]) -> Shape | None:
  folder, _, name = url.rpartition("/")
  stem = name.removesuffix(".tar")
  if not (facts := caches[folder or "."]) or not stem.isdecimal():
    return None
  ends = np.cumsum([alike["count"] for alike in facts["shards"]])
  if int(stem) >= ends[-1]:
    return None
  return tuple(facts["shards"][int(np.searchsorted(ends, int(stem), side="right"))]["size"])


class Part:
  """Some shards of a source. See `sources.Source`."""

  def __init__(self, source: Source, chosen: np.ndarray):  # bool [shards]
    """Takes the samples of the chosen shards, in their order."""
    starts = np.array(source.starts)
    counts = np.diff(starts)[chosen]
    self._source, self._ends = source, np.cumsum(counts)
    self._shifts = starts[:-1][chosen] - (self._ends - counts)
    self.shards = [url for url, is_in in zip(source.shards, chosen, strict=True) if is_in]
    self.count, self.kind, self.is_remote = int(self._ends[-1]), source.kind, source.is_remote
    self.digest = f"{source.digest} {self._shifts[0]} {self.count}"
    self.problems, self.examples = {}, {}  # the whole's, which one part tells: see `by_shape`

  def read(self, sample: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """See `sources.Source.read`."""
    return self._source.read(int(self._whole(sample)))

  def facts(self, sample: int) -> dict[str, Any]:
    """See `sources.Source.facts`."""
    return self._source.facts(int(self._whole(sample)))

  def sizes(self, samples: np.ndarray) -> np.ndarray:
    """See `sources.Source.sizes`."""
    return self._source.sizes(self._whole(samples))

  def name(self, sample: int) -> str:
    """See `sources.Source.name`."""
    return self._source.name(int(self._whole(sample)))

  def _whole(self, sample):
    """Numbers of samples in the source that this is a part of."""
    return sample + self._shifts[np.searchsorted(self._ends, sample, side="right")]
