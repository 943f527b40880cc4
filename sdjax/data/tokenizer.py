"""Captions to token ids: CLIP's byte-pair encoding, as published, from a folder or learned.

A folder holds what diffusers writes beside a text encoder: `vocab.json` (token → id), `merges.txt`
(one merge per line, by rank) and `tokenizer_config.json` (length, special tokens); transformers 5
writes the first two as one `tokenizer.json`. Stable Diffusion 1 fills short captions up with the
end token, 2 with "!"; the folder decides.

Textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618) adds triggers: strings that
stand for new vectors of the text encoder, and so for new ids above all others.
"""

import collections
import gzip
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sdjax.data import byte_pairs
from sdjax.data.byte_pairs import BOS, END_OF_WORD, EOS
from sdjax.errors import UserError
from sdjax.files import write_whole

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


class Tokenizer:
  """Turns captions into int32 [b L]: start token, words, end token, padding.

  Longer captions are cut so that the end token stays. The same caption gives the same row always.
  Nothing changes after construction: threads may share one.

  Attributes:
    length: L, tokens per caption with the two special ones; 77 for Stable Diffusion.
    vocab_size: number of ids; every id is below it.
    bos_id: of the start token.
    eos_id: of the end token.
    pad_id: of the token that fills short captions up.
    triggers: of textual inversions, each with its ids.
  """

  def __init__(self, clip, triggers: Mapping[str, range]):
    """Wraps a `transformers.CLIPTokenizer` whose `model_max_length` is the length."""
    self._clip = clip
    self.length = int(clip.model_max_length)
    self.vocab_size = max([len(clip), *(ids.stop for ids in triggers.values())])
    self.bos_id = int(clip.bos_token_id)
    self.eos_id = int(clip.eos_token_id)
    self.pad_id = int(clip.pad_token_id)
    self.triggers = dict(triggers)
    # Of triggers that start at one place the longest wins: a regex takes the first that fits.
    # "(?!)" fits nowhere.
    longest_first = sorted(triggers, key=len, reverse=True)
    self._trigger_ids = [triggers[trigger] for trigger in longest_first]
    self._trigger = re.compile("|".join(map(_whole_string, longest_first)) or "(?!)", re.IGNORECASE)

  def __call__(self, captions: str | Sequence[str]) -> np.ndarray:
    """Token ids int32 [b L] of b captions (one caption: b = 1)."""
    captions = [captions] if isinstance(captions, str) else list(captions)
    rows = [self.row(ids[:self.length - 2]) for ids in self._words(captions)]
    return np.array(rows, np.int32).reshape(len(captions), self.length)

  def words(self, text: str) -> list[int]:
    """The ids of a text of any length, without special tokens."""
    return self._words([text])[0]

  def row(self, ids: Sequence[int]) -> list[int]:
    """The L ids of a caption whose words are `ids`, at most L - 2: with start, end and padding."""
    return [self.bos_id, *ids, self.eos_id] + [self.pad_id] * (self.length - 2 - len(ids))

  def _words(self, texts: Sequence[str]) -> list[list[int]]:
    pieces = [self._split(text) for text in texts]
    plain = [piece for row in pieces for piece in row if isinstance(piece, str)]
    # The backend directly: a call of `clip` would set padding and truncation anew each time, which
    # threads must not do at once.
    rows = iter(self._clip.backend_tokenizer.encode_batch(plain, add_special_tokens=False))
    return [[i for piece in row for i in (next(rows).ids if isinstance(piece, str) else piece)]
            for row in pieces]

  def _split(self, text: str) -> list[str | range]:
    """The text before, between and after its triggers, and the ids of each trigger."""
    text = unicodedata.normalize("NFC", text)  # as the words will be: CLIP's first step
    pieces, start = [], 0
    for match in self._trigger.finditer(text):
      pieces += [text[start:match.start()], self._trigger_ids[match.lastindex - 1]]
      start = match.end()
    return [*pieces, text[start:]]

  def decode(self, ids: np.ndarray) -> str:
    """The caption of one row [L], lower case (but for triggers), without special tokens."""
    words = [int(i) for i in ids[1:]]
    names = {ids.start: trigger for trigger, ids in self.triggers.items()}
    runs = itertools.groupby(words[:words.index(self.eos_id)], lambda i: i >= len(self._clip))
    return " ".join(" ".join(names[i] for i in run if i in names) if added
                    else self._clip.decode(list(run)) for added, run in runs)

  def with_tokens(self, counts: Mapping[str, int]) -> "Tokenizer":
    """A tokenizer that also reads each trigger as so many new ids, consecutive from `vocab_size`.

    A trigger is found anywhere, in upper or lower case, but not inside a word or number that goes
    on; of several the longest. Other text keeps its ids.

    Args:
      counts: {"<cat-toy>": 3, "easynegative": 8, ...}: the number of vectors of each trigger.

    Raises:
      UserError: an empty trigger, one that is there already, or a number of vectors that does not
        fit into a caption.
    """
    triggers, known = dict(self.triggers), {trigger.lower() for trigger in self.triggers}
    start = self.vocab_size
    for trigger, count in counts.items():
      trigger = unicodedata.normalize("NFC", trigger).strip()
      if not trigger or trigger.lower() in known:
        raise UserError(f"textual inversion {trigger!r} is empty or already there; give each "
                        "another trigger (upper and lower case are one)")
      if not 1 <= count <= self.length - 2:
        raise UserError(f"textual inversion {trigger!r} has {count} vectors; a caption of this "
                        f"model holds 1 to {self.length - 2}")
      triggers[trigger] = range(start, start + count)
      known.add(trigger.lower())
      start += count
    return Tokenizer(self._clip, triggers)

  def save(self, folder: str | Path) -> None:
    """Writes the folder that `load` and diffusers' `StableDiffusionPipeline` read.

    Raises:
      UserError: a trigger is spelled as a token of CLIP is; the format cannot tell them apart.
    """
    model = json.loads(self._clip.backend_tokenizer.to_str())["model"]
    # Old files of merges hold "a b" strings, new ones pairs.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = {"bos_token": self._clip.bos_token, "eos_token": self._clip.eos_token,
               "unk_token": self._clip.unk_token, "pad_token": self._clip.pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length,
              "do_lower_case": True, "add_prefix_space": False, "errors": "replace", **special}
    vocab = dict(sorted(self._clip.get_vocab().items(), key=lambda item: item[1]))
    added = _added_tokens(self.triggers)
    if clashes := [name for name in added.values() if name in vocab]:
      raise UserError(f"textual inversion {clashes[0]!r} cannot be saved: it is a token of CLIP's "
                      f"own; load it under another name, such as <{clashes[0]}>")
    if added:
      config["added_tokens_decoder"] = {str(i): {
          "content": name, "lstrip": False, "normalized": True, "rstrip": False,
          "single_word": False, "special": False} for i, name in added.items()}
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
    config = _read_json(folder / "tokenizer_config.json")
    vocab, merges, added = _read_model(folder, config)
    names = {key: _content(config[key])
             for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)}
    length = int(config.get("model_max_length", 77))
    return _clip_tokenizer(vocab, merges, length, added, **names)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"tokenizer folder {folder} cannot be read ({error}); "
                    "copy it again from the model it belongs to") from error


def _read_model(folder: Path, config: dict) -> tuple[dict, list[tuple[str, str]], dict[int, str]]:
  """Vocabulary, merges, added tokens; vocab.json and merges.txt decide where both forms are."""
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    vocab = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    # The first line is a version; "#" also starts merges of "#", so only that line is a comment.
    merges = [line for line in lines[lines[0].startswith("#version"):] if line]
    added = config.get("added_tokens_decoder") or {}
  else:
    whole = _read_json(folder / "tokenizer.json")
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    added = {token["id"]: token for token in whole.get("added_tokens", [])}
  pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
  if any(len(pair) != 2 for pair in pairs):
    raise ValueError("a merge is not two tokens")
  return vocab, pairs, {int(i): _content(token) for i, token in added.items()}


def _added_tokens(triggers: Mapping[str, range]) -> dict[int, str]:
  """Names every vector as diffusers does: `<cat-toy>`, `<cat-toy>_1`, `<cat-toy>_2`."""
  return {i: f"{trigger}_{k}" if k else trigger
          for trigger, ids in triggers.items() for k, i in enumerate(ids)}


def _triggers(added: Mapping[int, str]) -> dict[str, range]:
  """The inverse of `_added_tokens`."""
  triggers, trigger = {}, None
  for i in sorted(added):
    ids = triggers.get(trigger, range(0))
    if i == ids.stop and added[i] == f"{trigger}_{len(ids)}":
      triggers[trigger] = range(ids.start, i + 1)
    else:
      trigger = added[i]
      triggers[trigger] = range(i, i + 1)
  return triggers


def clip(pad: str = EOS) -> Tokenizer:
  """OpenAI's tokenizer of CLIP (49,408 ids, 77 tokens), for files that bring none.

  Args:
    pad: EOS in Stable Diffusion 1 and in the first tower of SDXL; "!", which has id 0, in
      Stable Diffusion 2 and in SDXL's second.
  """
  text = gzip.decompress(Path(__file__).with_name("clip_merges.txt.gz").read_bytes())
  merges = [tuple(line.split()) for line in text.decode("utf-8").splitlines()]
  return _clip_tokenizer(byte_pairs.vocabulary(merges), merges, 77, pad_token=pad)


def train(captions: Iterable[str], length: int, vocab_size: int) -> Tokenizer:
  """Learns an encoding in which frequent words of `captions` are one token each, see byte_pairs.

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
  merges = byte_pairs.learn(words, vocab_size - 514)
  return _clip_tokenizer(byte_pairs.vocabulary(merges), merges, length)


def _clip_tokenizer(vocab, merges, length, added=(), bos_token=BOS, eos_token=EOS, unk_token=EOS,
                    pad_token=EOS) -> Tokenizer:
  clip = _clip_class()(
      vocab=vocab, merges=merges, model_max_length=length, bos_token=bos_token,
      eos_token=eos_token, unk_token=unk_token, pad_token=pad_token)
  # Special tokens are added ones too; they are not beyond its size.
  return Tokenizer(clip, _triggers({i: added[i] for i in added if i >= len(clip)}))


def _clip_class():
  # Imported here because it is slow; and it would advise to install PyTorch, which we do not use.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import CLIPTokenizer
  return CLIPTokenizer


def _whole_string(trigger: str) -> str:
  """A regex, one group, of `trigger` where no letter or digit at its ends touches another."""
  before = r"(?<![^\W_])" if trigger[0].isalnum() else ""
  after = r"(?![^\W_])" if trigger[-1].isalnum() else ""
  return f"({before}{re.escape(trigger)}{after})"


def _read_json(file: Path) -> dict:
  return json.loads(file.read_text(encoding="utf-8"))


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
