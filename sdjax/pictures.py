"""Pictures for people: PNG files that say how they were made, and labelled grids."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sdjax.files import write_whole

PAGE = (250, 249, 246)
FRAME = (221, 218, 211)
INK = (38, 38, 42)
FAINT = (120, 118, 114)
RIGHT = (38, 148, 84)
WRONG = (208, 58, 52)
FONT_PX = 14
LINE_PX = 19
LABEL_GAP_PX = 8
MARK_PX = 22


def to_uint8(
    image: np.ndarray,                   # [... H W 3] float in [-1, 1]; clipped
) -> np.ndarray:                         # [... H W 3] uint8
  """Rounds an image of the network's range to bytes."""
  image = np.asarray(image, np.float32)
  return np.floor(np.clip((image + 1) * 127.5, 0, 255) + 0.5).astype(np.uint8)


def save_png(
    path: str | os.PathLike,
    picture: np.ndarray | Image.Image,   # uint8 [H W 3]
    text: Mapping[str, object] | None = None,
) -> None:
  """Writes a PNG in one step: `path` never holds half a picture.

  Args:
    path: ends in .png by convention; missing folders are made.
    picture: an array or a Pillow image.
    text: entries of metadata, e.g. {"prompt": …, "seed": 3}; readers show them as text.

  Raises:
    OSError: the disk is full or the folder not writable; nothing is left behind.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(picture, Image.Image):
    picture = Image.fromarray(np.asarray(picture))
  metadata = PngImagePlugin.PngInfo()
  for name, value in (text or {}).items():
    metadata.add_text(name, str(value))       # iTXt by itself where Latin-1 does not suffice
  with write_whole(path) as file:
    picture.save(file, "PNG", pnginfo=metadata)


def parameters(prompt: str, negative_prompt: str, facts: Mapping[str, object]) -> str:
  """Returns the text "parameters" of a PNG, as A1111 writes it and many programs read it:

    a red fox
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 3, Size: 512x512, Model: sd15

  Source: `create_infotext` of AUTOMATIC1111's web UI, modules/processing.py.

  Args:
    prompt, negative_prompt: an empty negative prompt has no line.
    facts: what the last line tells, in this order; those that are None are left out.
  """
  def quoted(value):
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text

  told = ", ".join(f"{name}: {quoted(value)}" for name, value in facts.items()
                   if value is not None)
  negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
  return f"{prompt}{negative}\n{told}".strip()


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """Breaks `text` between words into lines at most `width` px long, as even as they can be."""
  def greedy(limit):
    lines = []
    for word in text.split():
      joined = f"{lines[-1]} {word}" if lines else word
      if lines and font.getlength(joined) <= limit:
        lines[-1] = joined
      else:
        lines.append(word)
    return lines

  lines = greedy(width)
  # The narrowest width that needs no more lines: leaves no single word at the end.
  while len(lines) > 1 and width > 8 and len(greedy(width - 4)) == len(lines):
    width -= 4
    lines = greedy(width)
  return lines


def _mark(right: bool) -> Image.Image:
  """Draws a round badge, [22 22] RGBA: a white tick on green, or a white cross on red."""
  zoom = 8
  badge = Image.new("RGBA", (MARK_PX * zoom,) * 2)
  draw = ImageDraw.Draw(badge)
  side = MARK_PX * zoom - 1
  draw.ellipse((0, 0, side, side), fill=(*PAGE, 255))
  rim = 2 * zoom
  draw.ellipse((rim, rim, side - rim, side - rim), fill=(*(RIGHT if right else WRONG), 255))
  if right:
    strokes = [[(0.31, 0.52), (0.45, 0.66), (0.70, 0.37)]]
  else:
    strokes = [[(0.36, 0.36), (0.64, 0.64)], [(0.64, 0.36), (0.36, 0.64)]]
  for stroke in strokes:
    points = [(x * side, y * side) for x, y in stroke]
    draw.line(points, fill="white", width=2 * zoom, joint="curve")
    for x, y in points:                       # round ends
      draw.ellipse((x - zoom, y - zoom, x + zoom, y + zoom), fill="white")
  return badge.resize((MARK_PX, MARK_PX), Image.Resampling.LANCZOS)


def _banner(header: str) -> Image.Image:
  """Sets a title and smaller lines below it; an empty header has no height."""
  lines = [(text, ImageFont.load_default(16), FAINT, 24) for text in header.splitlines()]
  if not lines:
    return Image.new("RGB", (1, 0))
  lines[0] = (lines[0][0], ImageFont.load_default(26), INK, 36)
  width = math.ceil(max(font.getlength(text) for text, font, *_ in lines)) + 1
  banner = Image.new("RGB", (width, sum(step for *_, step in lines) + 12), PAGE)
  top = 0
  for text, font, colour, step in lines:
    ImageDraw.Draw(banner).text((0, top), text, colour, font)
    top += step
  return banner


def _place(page: Image.Image, cell: Image.Image, lines: list[str], left: int, top: int) -> None:
  """Puts a framed picture on the page, and the lines of its label centred below."""
  pen = ImageDraw.Draw(page)
  pen.rectangle((left - 1, top - 1, left + cell.width, top + cell.height), outline=FRAME)
  page.paste(cell, (left, top))
  font = ImageFont.load_default(FONT_PX)
  for n, line in enumerate(lines):
    where = (left + cell.width / 2, top + cell.height + LABEL_GAP_PX + n * LINE_PX)
    pen.text(where, line, INK, font, anchor="ma")


def grid(
    pictures: np.ndarray,                # uint8 [n H W 3]
    labels: Sequence[str] | None = None,
    *,
    columns: int = 0,
    scale: int = 1,
    header: str = "",
    marks: Sequence[bool] | None = None,
) -> Image.Image:
  """Lays pictures out on a page, each with its label below.

  Args:
    pictures: one or more.
    labels: one for each picture, wrapped to its width.
    columns: 0 makes the page about as wide as high.
    scale: enlarges each picture this many times. Up to 64 px a side the pixels stay sharp
      squares; larger pictures are interpolated (Lanczos).
    header: a title; what follows its first line break is set smaller.
    marks: for each picture, whether to stamp it with a green tick or a red cross.

  Returns:
    An RGB image.
  """
  count, height, width = pictures.shape[:3]
  columns = min(columns or math.ceil(math.sqrt(count)), count)
  cell_w, cell_h = width * scale, height * scale
  gap = max(14, cell_w // 8)
  margin = max(24, gap)
  font = ImageFont.load_default(FONT_PX)
  wrapped = [_wrap(label, font, cell_w + gap - 8) for label in labels or [""] * count]
  rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
  text_px = [max(len(wrapped[i]) for i in row) * LINE_PX for row in rows]
  row_px = [cell_h + (LABEL_GAP_PX + text if text else 0) + gap for text in text_px]

  banner = _banner(header)
  width_px = 2 * margin + max(columns * (cell_w + gap) - gap, banner.width)
  page = Image.new("RGB", (width_px, 2 * margin + banner.height + sum(row_px) - gap), PAGE)
  page.paste(banner, (margin, margin))
  top = margin + banner.height
  sharp = max(height, width) <= 64
  method = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
  for row, step in zip(rows, row_px):
    for column, i in enumerate(row):
      left = margin + column * (cell_w + gap)
      cell = Image.fromarray(pictures[i]).resize((cell_w, cell_h), method)
      _place(page, cell, wrapped[i], left, top)
      if marks is not None:
        badge = _mark(marks[i])
        page.paste(badge, (left + cell_w - MARK_PX * 2 // 3, top - MARK_PX // 3), badge)
    top += step
  return page
