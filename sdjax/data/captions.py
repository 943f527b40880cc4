"""Which text a sample trains with: one of its captions, or none."""

import json
from collections.abc import Mapping

PARTS = ("txt", "json")  # of a sample, that captions come from


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
  if isinstance(several, list):
    texts = tuple(text.strip() for text in several if isinstance(text, str) and text.strip())
    if texts:
      return texts
  if "txt" in parts:
    return (parts["txt"].decode("utf-8").strip(),)
  one = facts.get("caption")
  return (one.strip() if isinstance(one, str) else "",)


def choose(
    captions: tuple[str, ...],
    which: float,              # uniform in [0, 1)
    drop: float,               # uniform in [0, 1)
    dropout: float,            # rate in [0, 1]
) -> str:
  """One caption, or the empty one in a share `dropout` of cases.

  Training without text at times is what lets one network serve classifier-free guidance (Ho &
  Salimans 2022, https://arxiv.org/abs/2207.12598, algorithm 1).
  """
  if drop < dropout:
    return ""
  return captions[int(which * len(captions))]
