r"""Prompts as people write them: words weighted by brackets, and texts longer than one caption.

The syntax, its numbers and the places of cuts are those of AUTOMATIC1111's web UI
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features), so that prompts mean the
same here:

  (word)       weight × 1.1; brackets nest, so ((word)) is × 1.21
  (word:1.25)  weight × 1.25
  [word]       weight ÷ 1.1
  \( \) \[ \]  the bracket itself; \\ is a backslash
  BREAK        what follows starts a new chunk

A chunk is what the text encoder reads at once: start token, 75 words, end token. A long prompt is
several chunks, encoded one by one, their contexts joined.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from sdjax.data.tokenizer import Tokenizer
from sdjax.errors import UserError

BREAK = ("BREAK", -1)                     # among weighted texts: the end of a chunk
FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING = {")": "(", "]": "["}
COMMA_WINDOW = 20                         # tokens; how far from its end a chunk may end earlier

# An escape, a bracket, ":1.25)", text, a lone colon. Every character belongs to one of them.
_SYNTAX = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^()\[\]:\\]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")

Chunk = list[tuple[int, float]]           # (id, weight) of each word


def parse(text: str) -> list[tuple[str, float]]:
  """Reads the syntax of weights.

  A bracket that nothing closes ends with the text; one that nothing opens is text; a backslash
  before anything but a bracket or backslash is dropped.

  Returns:
    Texts with weights, neighbours of unlike weight; ("BREAK", -1) where a chunk ends.

  Raises:
    UserError: a weight that is no number, as in "(word:1.2.3)".
  """
  parts = []                              # [text, weight]
  opened = {"(": [], "[": []}             # of each open bracket, the number of parts before it

  def close(start, factor):
    for part in parts[start:]:
      part[1] *= factor

  for match in _SYNTAX.finditer(text):
    token, number = match[0], match[1]
    bracket = OPENING.get(token[-1])
    if token[0] == "\\":
      parts.append([token[1:], 1.0])
    elif token in FACTORS:
      opened[token].append(len(parts))
    elif bracket and opened[bracket]:
      close(opened[bracket].pop(), FACTORS[bracket] if number is None else _weight(number))
    else:
      words, *after_break = _BREAK.split(token)
      parts.append([words, 1.0])
      for words in after_break:
        parts += [list(BREAK), [words, 1.0]]
  for bracket, starts in opened.items():
    for start in starts:
      close(start, FACTORS[bracket])

  runs = itertools.groupby(parts or [["", 1.0]], key=lambda part: part[1])
  return [("".join(words for words, _ in run), weight) for weight, run in runs]


def _weight(number: str) -> float:
  try:
    return float(number)
  except ValueError as error:
    raise UserError(f"prompt: the weight {number!r} is no number; write (word:1.25), or \\( and "
                    "\\) for brackets that weigh nothing") from error


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    weighted: bool = True,
) -> tuple[np.ndarray, np.ndarray]:       # int32 [b l], float32 [b l]
  """Tokens and their weights of b prompts, each cut into as many chunks as the longest needs.

  A chunk full within 20 tokens after a comma ends with that comma: the words since then start the
  next one. The ids of a textual inversion stay together. Start, end and padding weigh 1.

  Args:
    tokenizer: its length is that of a chunk with start and end token.
    texts: prompts, in the syntax of `parse`.
    weighted: False takes brackets and BREAK literally.

  Returns:
    l is the length of a chunk, 77, times their number; shorter prompts go on with chunks of the
    empty prompt. A prompt without syntax that fits into one has the row that `tokenizer` makes.

  Raises:
    UserError: a weight that is no number.
  """
  prompts = [_chunks(tokenizer, parse(text) if weighted else [(text, 1.0)]) for text in texts]
  n = max(map(len, prompts), default=1)
  tokens = np.empty((len(texts), n, tokenizer.length), np.int32)
  weights = np.ones(tokens.shape, np.float32)
  for b, chunks in enumerate(prompts):
    for i, chunk in enumerate(chunks + [[]] * (n - len(chunks))):
      tokens[b, i] = tokenizer.row([word for word, _ in chunk])
      weights[b, i, 1:1 + len(chunk)] = [weight for _, weight in chunk]
  shape = (len(texts), n * tokenizer.length)
  return tokens.reshape(shape), weights.reshape(shape)


def _chunks(tokenizer: Tokenizer, parts: list[tuple[str, float]]) -> list[Chunk]:
  """Distributes weighted texts over at least one chunk of at most length - 2 words."""
  size = tokenizer.length - 2
  comma = tokenizer.words(",")
  chunks = [[]]
  for text, weight in parts:
    if (text, weight) == BREAK:
      chunks.append([])
      continue
    for ids in _inseparable(tokenizer, text):
      while len(chunks[-1]) + len(ids) > size:
        full = len(chunks[-1]) == size
        chunks.append(_cut_after_comma(chunks[-1], comma) if full and ids != comma else [])
      chunks[-1] += [(i, weight) for i in ids]
  if not chunks[-1] and len(chunks) > 1:  # BREAK was the last word
    chunks.pop()
  return chunks


def _inseparable(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
  """The words of a text one by one, those of a textual inversion at once."""
  count = {ids.start: len(ids) for ids in tokenizer.triggers.values()}
  ids = iter(tokenizer.words(text))
  for first in ids:
    yield [first, *itertools.islice(ids, count.get(first, 1) - 1)]


def _cut_after_comma(chunk: Chunk, comma: list[int]) -> Chunk:
  """Removes the words after the last comma of the window from a chunk, and returns them."""
  for i in range(len(chunk) - 1, max(len(chunk) - COMMA_WINDOW, 0) - 1, -1):
    if [chunk[i][0]] == comma:
      moved = chunk[i + 1:]
      del chunk[i + 1:]
      return moved
  return []
