"""Which text a sample trains with: one of its captions, cleaned or shuffled as asked, or none."""

import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data import plan
from sdjax.errors import UserError

PARTS = ("txt", "json")  # of a sample, that captions come from
DRAWS = 3                # uniforms that `Captions` takes
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
URL = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Captions:
  """How a sample's text is made: choose one of its captions, clean, shuffle tags, put words before.

  Attributes:
    dropout: share of rows, 0 … 1, that train with the empty text. That is what lets one network
      serve classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598,
      algorithm 1).
    clean: turn html's entities into characters, remove its tags and URLs, make one of several
      spaces. Angle brackets of textual inversion, `<cat-toy>`, go too; those of `trigger` stay.
    trigger: words for a subject or style to be learned, put before every text but a dropped one.
    shuffle_tags: order the parts between commas anew each time, for captions that are lists.
    keep_tags: of those, how many stay first.
    column: key of the json to take captions from, or several, of which `choices` takes all.
  """
  dropout: float = 0.0
  clean: bool = False
  trigger: str = ""
  shuffle_tags: bool = False
  keep_tags: int = 0
  column: str | tuple[str, ...] = ()

  def __post_init__(self):
    if not 0 <= self.dropout <= 1:
      raise UserError(f"caption dropout {self.dropout} is not within 0 … 1; give a share")
    if self.keep_tags < 0:
      raise UserError(f"keep_tags {self.keep_tags} is below 0; give a number of tags")

  def __call__(
      self,
      captions: Sequence[str],   # what `choices` gives
      draws: Sequence[float],    # [3] uniforms in [0, 1), such as `plan.uniforms` draws
  ) -> str:
    """The text of one row, the same whenever the draws are."""
    which, drop, order = draws
    if drop < self.dropout:
      return ""
    text = captions[int(which * len(captions))]
    if self.clean:
      text = clean(text)
    if self.shuffle_tags:
      text = shuffle_tags(text, self.keep_tags, order)
    return ", ".join(part for part in (self.trigger, text) if part)


def captions_of(parts: Mapping[str, bytes]) -> tuple[str, ...]:
  """All captions of a sample; at least one, which may be empty.

  The list "captions" of the json where there is one, else the txt, else the json's "caption".
  img2dataset writes a null caption as an empty txt and bare `NaN` into the json; both are taken.

  Raises:
    ValueError: text that is not UTF-8, or a json that is not one.
  """
  facts = json.loads(parts["json"]) if "json" in parts else {}
  if not isinstance(facts, dict):
    raise ValueError("json of the sample is not an object")
  several = facts.get("captions")
  if isinstance(several, list) and (texts := texts_of(several)):
    return texts
  if "txt" in parts:
    return (parts["txt"].decode("utf-8").strip(),)
  one = facts.get("caption")
  return (one.strip() if isinstance(one, str) else "",)


def choices(facts: Mapping[str, Any], column: str | Sequence[str] = ()) -> tuple[str, ...]:
  """All captions of a sample, of which `Captions` chooses one; at least one, which may be empty.

  The texts, or lists of texts, among the facts under `column`, in order: a name given twice counts
  twice. Without one, the list "captions", else "caption".

  Args:
    facts: as `sources.Source.read` gives them.
    column: a name or several.

  Raises:
    ValueError: none of these is among the facts.
  """
  names = (column,) if isinstance(column, str) else tuple(column)
  if names and not any(name in facts for name in names):
    raise ValueError(f"sample has no {' and no '.join(names)}")
  found = texts_of([facts.get(name) for name in names or ("captions",)])
  if found or names:
    return found or ("",)
  if "caption" not in facts:
    raise ValueError("caption of the sample cannot be read")
  return (facts["caption"],)


def texts_of(values: Sequence) -> tuple[str, ...]:
  """The texts among values that are texts or lists of texts, without empty ones."""
  several = (text for value in values for text in (value if isinstance(value, list) else [value]))
  return tuple(text.strip() for text in several if isinstance(text, str) and text.strip())


def clean(text: str) -> str:
  """Characters for html's entities, no html tags, no URLs, single spaces.

  Entities are resolved twice, as scraped texts often hold `&amp;quot;`.
  """
  text = html.unescape(html.unescape(text))
  return " ".join(URL.sub(" ", TAG.sub(" ", text)).split())


def shuffle_tags(
    text: str,                 # "tag, tag, …"
    keep_tags: int,            # how many stay first
    order: float,              # uniform in [0, 1) that decides on the order
) -> str:
  """The tags between commas in another order, all orders alike likely."""
  tags = [tag for tag in map(str.strip, text.split(",")) if tag]
  rest = tags[keep_tags:]
  # The draw's 53 bits are the seed of one key per tag.
  keys = plan.uniforms(int(order * 2**53), np.zeros(1, np.int64), len(rest))[0]
  return ", ".join(tags[:keep_tags] + [rest[i] for i in np.argsort(keys)])
