"""What is in a set of shards, on one screen: counts, sizes, shapes, captions, what is broken."""

import collections
import concurrent.futures
import dataclasses
from pathlib import Path

import numpy as np

from sdjax.data import captions, images, pipeline, shards

BAR = 24  # characters
QUANTILES = (0, 5, 50, 95, 100)  # per cent
# width / height of what a bin ends below; the shapes that cameras and screens have
ASPECTS = ((0.5, "below 1:2"), (0.7, "1:2 … 7:10"), (0.95, "7:10 … 19:20"),
           (1.06, "square"), (1.43, "20:19 … 10:7"), (2.0, "10:7 … 2:1"),
           (float("inf"), "2:1 and above"))


@dataclasses.dataclass(frozen=True)
class Report:
  """Facts of a data set. `sides` and `caption_lengths` have a row per good sample.

  Attributes:
    shards: number of tars.
    size: of all tars, in bytes.
    samples: in the index, good and broken.
    kind: "image" or "moments".
    formats: "JPEG RGB" and the like → samples.
    sides: int64 [n 2], width and height in px (of moments: in latent px).
    caption_lengths: int64 [n], in characters; the first caption of each sample.
    broken: reason → samples (or shards) that cannot be used.
    examples: reason → one sample broken that way, as shard:key.
  """
  shards: int
  size: int
  samples: int
  kind: str
  formats: dict[str, int]
  sides: np.ndarray
  caption_lengths: np.ndarray
  broken: dict[str, int]
  examples: dict[str, str]


def inspect(index: shards.Index, threads: int = 4, progress=iter) -> Report:
  """Decodes every sample once (JPEGs at 1/8 of their size) and gathers the facts.

  Args:
    index: of the shards.
    threads: that decode.
    progress: wraps the iterator over samples, as tqdm does.

  Raises:
    OSError: a shard cannot be read.
  """
  broken, examples = collections.Counter(index.problems), dict(index.examples)
  formats, sides, lengths = collections.Counter(), [], []
  look = _look_at_moments if index.kind == "moments" else _look_at_picture

  def facts(sample):
    try:
      return look(index, sample)
    except images.BadPicture as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for sample, found in enumerate(progress(pool.map(facts, range(index.count)))):
      if isinstance(found, str):
        broken[found] += 1
        examples.setdefault(found, index.name(sample))
      else:
        formats[found[0]] += 1
        sides.append(found[1])
        lengths.append(found[2])
  return Report(
      shards=len(index.shards), size=sum(Path(path).stat().st_size for path in index.shards),
      samples=index.count, kind=index.kind, formats=dict(formats.most_common()),
      sides=np.array(sides, np.int64).reshape(-1, 2), caption_lengths=np.array(lengths, np.int64),
      broken=dict(broken.most_common()), examples=examples)


def format_report(report: Report) -> str:
  """The report as text for a terminal of 80 columns."""
  good = len(report.sides)
  lines = [
      f"shards     {report.shards:,}  ({_bytes(report.size)})",
      f"samples    {good:,} good of {report.samples:,}  ({_bytes(report.size / report.samples)} "
      "each)",
      "kind       " + ", ".join(f"{name} {n:,}" for name, n in report.formats.items()),
  ]
  if good:
    width, height = report.sides.T
    head = "".join(f"{q:>9}" for q in ("least", "5 %", "median", "95 %", "most"))
    unit = "latent px" if report.kind == "moments" else "px"
    lines += ["", " " * 22 + head]
    for name, values in ((f"width, {unit}", width), (f"height, {unit}", height),
                         (f"short side, {unit}", np.minimum(width, height)),
                         ("caption, characters", report.caption_lengths)):
      lines.append(f"{name:<22}" + "".join(f"{q:>9,.0f}" for q in np.percentile(values, QUANTILES)))
    lines += ["", "aspect ratio, width : height", *_aspect_lines(width / height)]
    empty = int(np.sum(report.caption_lengths == 0))
    lines += ["", f"empty captions  {empty:,}  ({empty / good:.1%})"]
  lines += ["", "broken          " + ("none" if not report.broken else "")]
  for reason, n in report.broken.items():
    example = report.examples.get(reason)
    lines.append(f"  {n:>7,}  {reason}" + (f", such as {example}" if example else ""))
  return "\n".join(line.rstrip() for line in lines)


def _look_at_picture(index, sample):
  parts = index.read(sample, (*shards.PICTURES, *captions.PARTS))
  blob = next(parts[part] for part in shards.PICTURES if part in parts)
  header = images.read_header(blob)
  images.decode(blob, (8, 8))  # the smallest scale still reads every byte of a JPEG
  sides = (header.width, header.height)
  turned = sides[::-1] if header.orientation >= 5 else sides
  return f"{header.format} {header.mode}", turned, _caption_length(parts)


def _look_at_moments(index, sample):
  parts = index.read(sample, (shards.MOMENTS, *captions.PARTS))
  moments = pipeline.read_moments(parts[shards.MOMENTS])
  height, width, channels = moments.shape
  return f"moments of {channels // 2} channels", (width, height), _caption_length(parts)


def _caption_length(parts) -> int:
  try:
    return len(captions.captions_of(parts)[0])
  except ValueError as error:
    raise images.BadPicture("unreadable caption") from error


def _aspect_lines(aspects: np.ndarray) -> list[str]:
  bins = np.digitize(aspects, [limit for limit, _ in ASPECTS[:-1]])
  counts = np.bincount(bins, minlength=len(ASPECTS))
  return [f"  {name:<14} {n:>9,}  {'█' * round(BAR * n / counts.max())}"
          for (_, name), n in zip(ASPECTS, counts, strict=True)]


def _bytes(size: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if size < 1000:
      return f"{size:.3g} {unit}"
    size /= 1000
  return f"{size:.3g} TB"
