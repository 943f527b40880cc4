"""Pictures with captions → webdataset shards, laid out as img2dataset lays LAION out.

A shard `00012.tar` holds `000120000.jpg`, `.json`, `.txt`, then `000120001.jpg` …: five digits of
the shard, four of the sample. `00012_stats.json` beside it counts what went in. Layout and keys are
those of img2dataset 1.4x (https://github.com/rom1504/img2dataset, writer.py and logger.py), with
one difference: headers carry no time and no user, so that the same pictures give the same tars.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ExifTags, Image

from sdjax.data import captions, images, tar
from sdjax.data.index import MOMENTS, PICTURES
from sdjax.errors import UserError
from sdjax.files import temporary_beside

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SPACES = str.maketrans("_-", "  ")  # in names of folders that are captions
THREADS = 4  # that convert
AHEAD = 32  # pictures converted before they are written: a bound on memory


@dataclasses.dataclass(frozen=True)
class Source:
  """A picture to pack: `name` relative to the folder, `facts` for its json (may hold captions)."""
  name: str
  caption: str
  facts: dict


@dataclasses.dataclass(frozen=True)
class Failure:
  """A sample that could not be made; keeps its number, as a failed download does in img2dataset."""
  name: str
  reason: str

  def __str__(self) -> str:
    return f"{self.name}: {self.reason}"


@dataclasses.dataclass
class Result:
  """What `write_shards` wrote: shards, samples, bytes of the tars, and what was left out."""
  shards: int = 0
  samples: int = 0
  size: int = 0
  failures: list[Failure] = dataclasses.field(default_factory=list)


def pack(sources: list[Source], folder: str | Path, out: str | Path, shard_size: int = 1000,
         quality: int = 95, progress=iter) -> Result:
  """Packs the pictures that `find_sources` found in `folder` into new shards at `out`.

  RGB JPEGs that stand upright go in byte for byte; everything else becomes such a JPEG. A picture
  that cannot be decoded is left out and told in the result.

  Args:
    sources: what to pack, in this order.
    folder: that the names are relative to.
    out: a folder that does not exist yet, or is empty. It appears when all shards are complete.
    shard_size: pictures per shard, 1 … 10,000.
    quality: of JPEGs that have to be made, 1 … 95.
    progress: wraps the iterator of finished pictures, as tqdm does.

  Raises:
    UserError: `out` is taken, a value is out of range, or no picture at all could be used.
    OSError: the disk is full, or a file may not be read.
  """
  if not 1 <= quality <= 95:
    raise UserError(f"quality {quality} is not within 1 … 95; 95 is visually lossless")
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    finished = _map_ahead(pool, lambda source: convert(Path(folder), source, quality), sources)
    return write_shards(progress(finished), out, shard_size)


def find_sources(folder: str | Path) -> list[Source]:
  """Pictures of a folder (and folders in it) and their captions, sorted by name.

  From `metadata.jsonl` or `metadata.csv` if there is one (file_name, and text or caption, or a list
  "captions"; the list and other columns are facts, which go into the samples' json), else every
  picture `name.jpg` (png, webp …) with its `name.txt`. Without one, the caption is the name of the
  sub-folder that the picture lies in, `_` and `-` as spaces; at the top it is empty.

  Raises:
    UserError: no folder, nothing in it, or a bad line (named by its number).
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; give one that holds pictures and captions")
  for name in METADATA:
    if (folder / name).is_file():
      sources = _from_metadata(folder / name)
      break
  else:
    sources = _from_files(folder)
  if not sources:
    raise UserError(f"folder {folder} holds no pictures ({' '.join(SUFFIXES)}) and no metadata; "
                    "give one with name.jpg + name.txt, or with a metadata.jsonl")
  return sources


def convert(folder: Path, source: Source, quality: int) -> dict | Failure:
  """Makes the sample {"jpg", "txt", "json"} of one picture."""
  path = folder / source.name
  if not path.is_file():
    return Failure(source.name, "no such file")
  original = path.read_bytes()
  try:
    header = images.read_header(original)
    picture = images.decode_whole(original)
  except images.BadPicture as error:
    return Failure(source.name, str(error))
  blob = original
  if (header.format, header.mode, header.orientation) != ("JPEG", "RGB", 1):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)  # 4:4:4: colours stay sharp
    blob = buffer.getvalue()
  facts = {
      **source.facts, "url": source.facts.get("url", source.name),
      "width": picture.width, "height": picture.height,
      "original_width": picture.width, "original_height": picture.height,
      "exif": _exif(original), "sha256": hashlib.sha256(original).hexdigest(),
  }
  return {"jpg": blob, "txt": source.caption, "json": facts}


def write_shards(samples: Iterable[dict | Failure], out: str | Path,
                 shard_size: int = 1000) -> Result:
  """Writes samples into `out`/00000.tar, 00001.tar … with a `_stats.json` beside each.

  All or nothing: shards are written into a temporary folder, which becomes `out` at the end.
  Otherwise an interrupted run would leave a data set that looks whole.

  Args:
    samples: each {"jpg" | "png" | "webp" | "moments.npy": bytes, "txt": str, "json": dict} (the
      json may be left out; img2dataset's keys are added to it), or a Failure, which is counted.
    out: a folder that does not exist yet, or is empty.
    shard_size: samples per shard, 1 … 10,000.

  Raises:
    UserError: `out` is taken, `shard_size` is out of range, or no sample was good.
    OSError: the disk is full. Nothing is left behind.
  """
  out = Path(out).resolve()
  check_shard_size(shard_size)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out} is not an empty folder; choose another, or remove it")
  out.parent.mkdir(parents=True, exist_ok=True)
  # A folder that exists may be a mount point, which nothing can be moved onto: fill it instead.
  in_place = out.exists()
  temporary = temporary_beside(out / "shards" if in_place else out)
  temporary.mkdir()
  result = Result()
  try:
    rest = iter(samples)
    while (first := next(rest, None)) is not None:
      members = itertools.chain([first], itertools.islice(rest, shard_size - 1))
      _write_shard(members, temporary, result)
    if not result.samples:
      raise UserError(f"no sample to write ({_told(result.failures)}); "
                      "mend the pictures, or give others")
    if in_place:
      for path in sorted(temporary.iterdir()):
        os.replace(path, out / path.name)
      temporary.rmdir()
    else:
      os.replace(temporary, out)
  except BaseException:
    shutil.rmtree(temporary)
    raise
  return result


def check_shard_size(shard_size: int) -> None:
  """Raises UserError unless the keys have room for so many samples per shard."""
  if not 1 <= shard_size <= 10**tar.SAMPLE_DIGITS:
    raise UserError(f"shard_size {shard_size} is not within 1 … {10**tar.SAMPLE_DIGITS}; "
                    "1000 suits most disks")


def _write_shard(samples: Iterator[dict | Failure], folder: Path, result: Result) -> None:
  """Writes one tar and its statistics; adds what it wrote to `result`."""
  start, number = time.time(), result.shards
  status = collections.Counter()
  path = folder / f"{number:05d}.tar"
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
    for position, sample in enumerate(samples):
      if isinstance(sample, Failure):
        status[sample.reason] += 1
        result.failures.append(sample)
        continue
      status["success"] += 1
      key = tar.sample_key(number, position)
      tar.add_sample(archive, key, _members(key, sample))
  end = time.time()
  failed = status.total() - status["success"]
  stats = {"count": status.total(), "successes": status["success"], "failed_to_download": 0,
           "failed_to_resize": failed, "duration": end - start, "start_time": start,
           "end_time": end, "status_dict": dict(status)}
  (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")
  result.shards += 1
  result.samples += status["success"]
  result.size += path.stat().st_size


def _members(key: str, sample: dict) -> dict[str, bytes]:
  """The parts of a sample as bytes, its json completed with img2dataset's keys in its order."""
  part = next(part for part in (*PICTURES, MOMENTS) if part in sample)
  blob, caption, given = sample[part], sample["txt"], dict(sample.get("json", {}))
  if part != MOMENTS and "width" not in given:
    header = images.read_header(blob)
    given |= {"width": header.width, "height": header.height}
  facts = {"caption": caption, "url": given.pop("url", None), "key": key, "status": "success",
           "error_message": None}
  for name in ("width", "height"):
    facts[name] = given.pop(name, None)
  for name in ("width", "height"):
    facts[f"original_{name}"] = given.pop(f"original_{name}", facts[name])
  facts["exif"] = given.pop("exif", "{}")
  facts["sha256"] = given.pop("sha256", None) or hashlib.sha256(blob).hexdigest()
  # What else is given may add to these keys but not contradict them.
  facts = {**given, **facts}
  return {part: blob, "txt": caption.encode(), "json": json.dumps(facts, indent=4).encode()}


def _from_files(folder: Path) -> list[Source]:
  sources = []
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder)
    if any(part.startswith(".") for part in name.parts):
      continue  # what macOS, notebooks and git keep for themselves
    if path.suffix.lower() in SUFFIXES and path.is_file():
      text = path.with_suffix(".txt")
      try:
        caption = (text.read_text(encoding="utf-8") if text.is_file()
                   else name.parent.name.translate(SPACES))
      except UnicodeDecodeError as error:
        raise UserError(f"{text} is not UTF-8 ({error.reason}); save it as UTF-8") from error
      sources.append(Source(str(name), caption.strip(), {}))
  return sources


def _from_metadata(path: Path) -> list[Source]:
  rows = _rows_of_csv if path.suffix == ".csv" else _rows_of_jsonl
  sources = []
  try:
    for number, row in rows(path):
      name = row.pop("file_name", None)
      if not isinstance(name, str) or not name:
        raise UserError(f"{path} line {number}: no file_name; give the picture's name")
      caption = next((row.pop(column) for column in ("text", "caption") if column in row), None)
      # In a .csv, which knows no lists, it is one text.
      if several := captions.texts_of([row.pop("captions", None)]):
        row["captions"] = list(several)
        caption = several[0] if caption is None else caption
      if not isinstance(caption, str):
        raise UserError(f"{path} line {number}: no text for {name}; give text, caption or captions")
      sources.append(Source(name, caption.strip(), row))
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
  return sorted(sources, key=lambda source: source.name)


def _rows_of_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        try:
          row = json.loads(line)
        except ValueError as error:
          raise UserError(f"{path} line {number}: not json ({error}); mend the line") from error
        if not isinstance(row, dict):
          raise UserError(f"{path} line {number}: not an object; write {{\"file_name\": …}}")
        yield number, row


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict]]:
  with open(path, encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file)
    for row in reader:
      if None in row or None in row.values():
        raise UserError(f"{path} line {reader.line_num}: not {len(reader.fieldnames)} columns; "
                        "quote texts that hold commas")
      yield reader.line_num, row


def _exif(blob: bytes) -> str:
  """EXIF tags by name as a json string, as img2dataset keeps them; blobs are left out."""
  try:
    tags = Image.open(io.BytesIO(blob)).getexif()
    return json.dumps({ExifTags.TAGS.get(tag, str(tag)): str(value).strip()
                       for tag, value in tags.items() if not isinstance(value, bytes)})
  except images.DAMAGE:
    return "{}"


def _map_ahead(pool, function, items: Iterable) -> Iterator:
  """`pool.map` in order that starts no more than `AHEAD` items before they are taken."""
  waiting = collections.deque()
  for item in items:
    waiting.append(pool.submit(function, item))
    if len(waiting) == AHEAD:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


def _told(failures: list[Failure]) -> str:
  if not failures:
    return "none was given"
  return f"{len(failures)} failed, the first is {failures[0]}"
