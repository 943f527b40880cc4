"""What is in a data set, on one screen: counts, sizes, shapes, captions, scores, what is broken."""

import collections
import concurrent.futures
import dataclasses
import math

import numpy as np
from PIL import Image

from sdjax import pictures
from sdjax.data import captions, images, pipeline, sources
from sdjax.errors import UserError

THREADS = 4  # that decode
BAR = 24  # characters
QUANTILES = (0, 5, 50, 95, 100)  # per cent
# width / height of what a bin ends below; the shapes that cameras and screens have
ASPECTS = ((0.5, "below 1:2"), (0.7, "1:2 … 7:10"), (0.95, "7:10 … 19:20"),
           (1.06, "square"), (1.43, "20:19 … 10:7"), (2.0, "10:7 … 2:1"),
           (float("inf"), "2:1 and above"))
SCORES = ("similarity", "aesthetic", "punsafe", "pwatermark")  # that LAION is filtered by
FACTS = ("captions", "exif", *SCORES)  # that a source is to be opened with
CELL_PX, CAPTION = 192, 120  # on a sheet: longer side of a picture, characters


@dataclasses.dataclass(frozen=True)
class Report:
  """Facts of a data set. `sides` and `caption_lengths` have a row per good sample.

  Attributes:
    shards: number of tars; 0 where samples lie otherwise.
    size: of all tars, else of all parts, in bytes.
    parts: part → bytes, as far as the source was opened with them.
    samples: good and broken.
    kind: "image" or "moments".
    formats: "JPEG RGB" and the like → samples.
    sides: int64 [n 2], width and height in px (of moments: in latent px).
    caption_lengths: int64 [n], in characters; the first caption of each sample.
    scores: name → float64 [m], of the good samples that have the score.
    broken: reason → samples (or shards) that cannot be used.
    examples: reason → one sample broken that way, as shard:key.
  """
  shards: int
  size: int
  parts: dict[str, int]
  samples: int
  kind: str
  formats: dict[str, int]
  sides: np.ndarray
  caption_lengths: np.ndarray
  scores: dict[str, np.ndarray]
  broken: dict[str, int]
  examples: dict[str, str]


def inspect(source: sources.Source, progress=iter) -> Report:
  """Decodes every sample once (JPEGs at 1/8 of their size) and gathers the facts.

  Args:
    source: opened with `FACTS` and, to know their bytes, with `captions.PARTS`.
    progress: wraps the iterator over samples, as tqdm does.

  Raises:
    OSError: a shard cannot be read.
  """
  broken, examples = collections.Counter(source.problems), dict(source.examples)
  formats, parts, sides, lengths = collections.Counter(), collections.Counter(), [], []
  scores = collections.defaultdict(list)
  look = _look_at_moments if source.kind == "moments" else _look_at_picture

  def told(sample):
    try:
      blobs, facts = source.read(sample)
      return {part: len(blob) for part, blob in blobs.items()}, facts, *look(blobs, facts)
    except images.BadPicture as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for sample, found in enumerate(progress(pool.map(told, range(source.count)))):
      if isinstance(found, str):
        broken[found] += 1
        examples.setdefault(found, source.name(sample))
        continue
      sizes, facts, form, side, length = found
      parts.update(sizes)
      formats[form] += 1
      sides.append(side)
      lengths.append(length)
      for name in SCORES:
        if (score := _number(facts.get(name))) is not None:
          scores[name].append(score)
  return Report(
      shards=len(getattr(source, "shards", ())), size=getattr(source, "size", parts.total()),
      parts=dict(parts.most_common()), samples=source.count, kind=source.kind,
      formats=dict(formats.most_common()), sides=np.array(sides, np.int64).reshape(-1, 2),
      caption_lengths=np.array(lengths, np.int64),
      scores={name: np.array(scores[name]) for name in SCORES if name in scores},
      broken=dict(broken.most_common()), examples=examples)


def format_report(report: Report) -> str:
  """The report as text for a terminal of 80 columns."""
  good = len(report.sides)
  shards = f"{report.shards:,}  " if report.shards else "none  "
  shares = {**report.parts, "the rest": report.size - sum(report.parts.values())}
  lines = [
      f"shards     {shards}({_bytes(report.size)})",
      f"samples    {good:,} good of {report.samples:,}  ({_bytes(report.size / report.samples)} "
      "each)",
      "kind       " + ", ".join(f"{name} {n:,}" for name, n in report.formats.items()),
      "bytes      " + ", ".join(f"{name} {n / max(1, report.size):.1%}"
                                for name, n in shares.items() if n > 0),
  ]
  if good:
    lines += _statistics(report)
  lines += ["", "broken          " + ("none" if not report.broken else "")]
  for reason, n in report.broken.items():
    example = report.examples.get(reason)
    lines.append(f"  {n:>7,}  {reason}" + (f", such as {example}" if example else ""))
  return "\n".join(line.rstrip() for line in lines)


def _statistics(report: Report) -> list[str]:
  """Lines on the good samples, of which there are some."""
  good, (width, height) = len(report.sides), report.sides.T
  unit = "latent px" if report.kind == "moments" else "px"
  head = "".join(f"{q:>9}" for q in ("least", "5 %", "median", "95 %", "most"))
  lines = ["", " " * 22 + head + ("  missing" if report.scores else "")]
  for name, values in ((f"width, {unit}", width), (f"height, {unit}", height),
                       (f"short side, {unit}", np.minimum(width, height)),
                       ("caption, characters", report.caption_lengths)):
    lines.append(f"{name:<22}" + "".join(f"{q:>9,.0f}" for q in np.percentile(values, QUANTILES)))
  for name, values in report.scores.items():
    lines.append(f"{name:<22}" + "".join(f"{q:>9.3g}" for q in np.percentile(values, QUANTILES))
                 + f"{good - len(values):>9,}")
  lines += ["", "aspect ratio, width : height", *_aspect_lines(width / height)]
  empty = int(np.sum(report.caption_lengths == 0))
  return [*lines, "", f"empty captions  {empty:,}  ({empty / good:.1%})"]


def sheet(source: sources.Source, count: int) -> Image.Image:
  """A page with the first `count` pictures that can be read, whole, and their first captions.

  Raises:
    UserError: a source of moments, or not one picture can be read.
  """
  if source.kind == "moments":
    raise UserError("a latents cache holds no pictures to draw; give the ones it was made of")
  cells, texts = [], []
  for sample in range(source.count):
    try:
      cells.append(_cell(source, sample))
    except images.BadPicture:
      continue
    try:
      texts.append(captions.choices(source.facts(sample))[0])
    except ValueError:
      texts.append("(unreadable caption)")
    if len(cells) == count:
      break
  if not cells:
    raise UserError("not one of these pictures can be read; look without --sheet")
  labels = [text if len(text) <= CAPTION else f"{text[:CAPTION]}…" for text in texts]
  return pictures.grid(np.stack(cells), labels)


def _cell(source: sources.Source, sample: int) -> np.ndarray:
  """A picture in the middle of a square, uint8 [CELL_PX CELL_PX 3]."""
  parts, facts = source.read(sample)
  sides = source.sizes(np.array([sample]))[0]
  height, width = (max(1, math.floor(CELL_PX * side / max(1, *sides))) for side in sides)
  pixels = images.decode(next(iter(parts.values())), (height, width),
                         orientation=images.orientation_of(facts.get("exif")))
  top, left = (CELL_PX - height) // 2, (CELL_PX - width) // 2
  cell = np.full((CELL_PX, CELL_PX, 3), pictures.PAGE, np.uint8)
  cell[top:top + height, left:left + width] = pixels
  return cell


def _look_at_picture(parts, facts):
  blob = next(iter(parts.values()))
  header = images.read_header(blob, images.orientation_of(facts.get("exif")))
  images.decode(blob, (8, 8))  # the smallest scale still reads every byte of a JPEG
  sides = images.upright((header.width, header.height), header.orientation)
  return f"{header.format} {header.mode}", sides, _caption_length(facts)


def _look_at_moments(parts, facts):
  moments = pipeline.read_moments(next(iter(parts.values())))
  height, width, channels = moments.shape
  return f"moments of {channels // 2} channels", (width, height), _caption_length(facts)


def _caption_length(facts) -> int:
  try:
    return len(captions.choices(facts)[0])
  except ValueError as error:
    raise images.BadPicture("unreadable caption") from error


def _number(value) -> float | None:
  """A score, which tables of text may hold as text."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    return None
  return number if math.isfinite(number) else None


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
