"""Captions to token ids: CLIP's byte-pair encoding, read from a folder or learned from captions.

A folder holds what diffusers writes beside a text encoder: `vocab.json` (token → id), `merges.txt`
(one merge per line, by rank) and `tokenizer_config.json` (length, special tokens); transformers 5
writes the first two as one `tokenizer.json`. Stable Diffusion 1 fills short captions up with the
end token, 2 with "!"; the folder decides.

Learning follows Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909, algorithm 1) on CLIP's
alphabet: 256 bytes, the same 256 as ends of words (`</w>`), then one token per merge, then the two
special tokens, so that the end token has the highest id, where CLIP's pooling looks for it.
"""

import collections
import heapq
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sdjax.errors import UserError
from sdjax.files import write_whole

BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


class Tokenizer:
  """Turns captions into int32 [b L]: start token, words, end token, padding.

  Longer captions are cut so that the end token stays. The same caption gives the same row always.

  Attributes:
    length: L, tokens per caption with the two special ones; 77 for Stable Diffusion.
    vocab_size: number of ids; every id is below it.
    bos_id: of the start token.
    eos_id: of the end token.
    pad_id: of the token that fills short captions up.
  """

  def __init__(self, clip):
    """Wraps a `transformers.CLIPTokenizer` whose `model_max_length` is the length."""
    self._clip = clip
    self.length = int(clip.model_max_length)
    self.vocab_size = len(clip)
    self.bos_id = int(clip.bos_token_id)
    self.eos_id = int(clip.eos_token_id)
    self.pad_id = int(clip.pad_token_id)
    # Set once and used directly: a call of `clip` sets them anew each time, which threads must not
    # do at once, and costs four times as much.
    backend = clip.backend_tokenizer
    backend.enable_truncation(self.length)
    backend.enable_padding(length=self.length, pad_id=self.pad_id, pad_token=clip.pad_token)

  def __call__(self, captions: str | Sequence[str]) -> np.ndarray:
    """Token ids int32 [b L] of b captions (one caption: b = 1)."""
    captions = [captions] if isinstance(captions, str) else list(captions)
    rows = self._clip.backend_tokenizer.encode_batch(captions)
    return np.array([row.ids for row in rows], np.int32).reshape(len(captions), self.length)

  def decode(self, ids: np.ndarray) -> str:
    """The caption of one row [L], lower case, without special tokens."""
    words = [int(i) for i in ids[1:]]
    return self._clip.decode(words[:words.index(self.eos_id)])

  def save(self, folder: str | Path) -> None:
    """Writes the folder that `load` and diffusers' `StableDiffusionPipeline` read."""
    model = json.loads(self._clip.backend_tokenizer.to_str())["model"]
    # Old files of merges hold "a b" strings, new ones pairs.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {"bos_token": self._clip.bos_token, "eos_token": self._clip.eos_token,
               "unk_token": self._clip.unk_token, "pad_token": self._clip.pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length,
              "do_lower_case": True, "add_prefix_space": False, "errors": "replace", **special}
    vocab = dict(sorted(self._clip.get_vocab().items(), key=lambda item: item[1]))
    texts = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      with write_whole(folder / name, "w") as file:
        file.write(text)


def load(folder: str | Path) -> Tokenizer:
  """Reads the tokenizer of a diffusers folder (`MODEL/tokenizer`).

  Raises:
    UserError: a file is missing or is not what it should be.
  """
  folder = Path(folder)
  files = ("tokenizer.json", FILES[-1]) if (folder / "tokenizer.json").is_file() else FILES
  if missing := [name for name in files if not (folder / name).is_file()]:
    raise UserError(f"tokenizer folder {folder} lacks {', '.join(missing)}; give the folder "
                    "`tokenizer` of a model in diffusers layout")
  try:
    vocab, merges = _read_merges(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {key: _content(config[key])
             for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)}
    return _clip_tokenizer(vocab, merges, int(config.get("model_max_length", 77)), **names)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"tokenizer folder {folder} cannot be read ({error}); "
                    "copy it again from the model it belongs to") from error


def _read_merges(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """The vocabulary and the merges; vocab.json and merges.txt decide where both forms are there."""
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    # The first line is a version; "#" also starts merges of "#", so only that line is a comment.
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]
  else:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab, merges = model["vocab"], model["merges"]
  pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
  if any(len(pair) != 2 for pair in pairs):
    raise ValueError("a merge is not two tokens")
  return vocab, pairs


def train(captions: Iterable[str], length: int, vocab_size: int) -> Tokenizer:
  """Learns an encoding in which frequent words of `captions` are one token each.

  Deterministic: equally frequent pairs are merged in alphabetical order.

  Args:
    captions: any number of texts.
    length: tokens per caption, start and end token included; at least 3.
    vocab_size: the most ids to use; fewer when no pair occurs twice any more.

  Raises:
    UserError: `vocab_size` leaves no room for the 512 byte tokens and two special ones.
  """
  if vocab_size < 514:
    raise UserError(f"vocab_size {vocab_size} is below 514, the 2 × 256 bytes and two special "
                    "tokens; give at least 514")
  if length < 3:
    raise UserError(f"token length {length} is below 3 (start, one word, end); give at least 3")
  words = _count_words(captions)
  merges = _learn_merges(words, vocab_size - 514)
  alphabet = _byte_alphabet()
  # Two pairs can spell one token ("ab" + "c", "a" + "bc"): both merge, it gets one id.
  merged = dict.fromkeys(a + b for a, b in merges)
  tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *merged, BOS, EOS]
  return _clip_tokenizer({token: i for i, token in enumerate(tokens)}, merges, length)


def _clip_tokenizer(vocab, merges, length, bos_token=BOS, eos_token=EOS, unk_token=EOS,
                    pad_token=EOS) -> Tokenizer:
  return Tokenizer(_clip_class()(
      vocab=vocab, merges=merges, model_max_length=length, bos_token=bos_token,
      eos_token=eos_token, unk_token=unk_token, pad_token=pad_token))


def _clip_class():
  # Imported here because it is slow; and it would advise to install PyTorch, which we do not use.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import CLIPTokenizer
  return CLIPTokenizer


def _content(token: str | dict) -> str:
  """A special token is its text, or (in older files) a dict that holds it."""
  return token["content"] if isinstance(token, dict) else token


def _count_words(captions: Iterable[str]) -> dict[tuple[str, ...], int]:
  """Counts the words of all captions, each spelled as CLIP's bytes with `</w>` on the last."""
  backend = _clip_class()().backend_tokenizer
  counts = collections.Counter()
  for caption, times in collections.Counter(captions).items():
    text = backend.normalizer.normalize_str(caption)
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
      counts[(*word[:-1], word[-1] + END_OF_WORD)] += times
  return counts


def _learn_merges(words: dict[tuple[str, ...], int], limit: int) -> list[tuple[str, str]]:
  """The `limit` most frequent pairs, each counted after the merges before it."""
  spellings = sorted(words)
  times = [words[word] for word in spellings]
  count = collections.Counter()
  where = collections.defaultdict(set)  # pair → indices of the words that may hold it

  def add(index, sign):
    word = spellings[index]
    for pair in itertools.pairwise(word):
      count[pair] += sign * times[index]
      where[pair].add(index)

  for index in range(len(spellings)):
    add(index, +1)
  heap = [(-n, pair) for pair, n in count.items()]
  heapq.heapify(heap)
  merges = []
  while heap and len(merges) < limit:
    negative, pair = heapq.heappop(heap)
    if -negative != count[pair]:  # an old entry: its count has changed since
      continue
    if -negative < 2:
      break
    merges.append(pair)
    touched = set()
    for index in sorted(where.pop(pair)):
      touched.update(itertools.pairwise(spellings[index]))
      add(index, -1)
      spellings[index] = _merge(spellings[index], pair)
      add(index, +1)
      touched.update(itertools.pairwise(spellings[index]))
    for changed in sorted(touched):
      if count[changed] > 0:
        heapq.heappush(heap, (-count[changed], changed))
  return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  merged, i = [], 0
  while i < len(word):
    if word[i:i + 2] == pair:
      merged.append(pair[0] + pair[1])
      i += 2
    else:
      merged.append(word[i])
      i += 1
  return tuple(merged)


def _byte_alphabet() -> list[str]:
  """One printable character per byte, in the order of CLIP's vocabulary (id 0 is "!")."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
