"""Which rows of an index train: rules such as ("aesthetic", ">=", 5.0), all of which must hold.

Rules look at the index alone, never at a picture, so that every host keeps the same samples.
A column is one of the index (`index.py`), "width" say; a key of the samples' json, "WIDTH" say,
where the index has no such column of its own ("json.width" is the json's); or

  min_side_px = min(width, height)    aspect = width / height    pixels = width · height

Of img2dataset's LAION: similarity, punsafe, pwatermark, aesthetic, LANGUAGE, NSFW.
"""

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdjax.data import index
from sdjax.errors import UserError

COMPARISONS = {
    ">=": pc.greater_equal, ">": pc.greater, "<=": pc.less_equal, "<": pc.less,
    "==": pc.equal, "!=": pc.not_equal, "in": pc.is_in,
    "not in": lambda column, values: pc.invert(pc.is_in(column, values)),
    "matches": pc.match_substring_regex,
}
ORDERED, LISTS = (">=", ">", "<=", "<"), ("in", "not in")
DERIVED = {
    "min_side_px": pc.min_element_wise,
    "aspect": lambda width, height: pc.divide(width.cast(pa.float64()), height),
    "pixels": lambda width, height: pc.multiply(width.cast(pa.int64()), height),
}
NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
SIGNS = "|".join(sorted((sign for sign in COMPARISONS if not sign[0].isalpha()), reverse=True))
WORDS = "|".join(sign for sign in COMPARISONS if sign[0].isalpha())
TEXT = re.compile(rf"(?P<column>[^<>=!]+?)(?:\s*(?P<sign>{SIGNS})\s*|\s+(?P<word>{WORDS})\s+)"
                  r"(?P<value>.+?)(?P<missing>\s+or missing)?")


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a sample has to fulfil.

  Numbers are compared with numbers: of a column of text, the values that spell one; the others
  count as missing. Texts (and true, false) are compared with what the column holds as text.

  Attributes:
    column: see the module.
    comparison: a key of COMPARISONS. "matches" looks for an RE2 pattern anywhere in the text.
    value: a number, a text, a truth value; of "in" and "not in" a tuple of them.
    missing: "drop" or "keep" the samples that lack the column's value.
  """
  column: str
  comparison: str
  value: Any
  missing: str = "drop"

  def __str__(self) -> str:
    value = ",".join(map(str, self.value)) if self.comparison in LISTS else self.value
    return f"{self.column} {self.comparison} {value}"


def parse(rules: Sequence[Sequence]) -> tuple[Rule, ...]:
  """Rules of a config: (column, comparison, value) or (column, comparison, value, missing) each.

  Raises:
    UserError: a rule that means nothing, by its text.
  """
  return tuple(map(_parse, rules))


def parse_text(text: str) -> Rule:
  """A rule of a command line: "aesthetic >= 5", "NSFW in UNLIKELY,UNSURE or missing".

  Values are numbers, true, false or text; quotes make a text of a number. "or missing" keeps.

  Raises:
    UserError: no such rule.
  """
  match = TEXT.fullmatch(text.strip())
  if match is None:
    raise UserError(f"filter {text!r} is not COLUMN COMPARISON VALUE [or missing] with one of "
                    f"{' '.join(COMPARISONS)}; write 'aesthetic >= 5'")
  comparison = match["sign"] or match["word"]
  value = match["value"]
  if comparison in LISTS:
    value = tuple(_spelled(item.strip()) for item in value.split(","))
  elif comparison != "matches":
    value = _spelled(value)
  return _parse((match["column"], comparison, value, "keep" if match["missing"] else "drop"))


def columns_of(rules: Sequence[Rule]) -> list[str]:
  """The columns of an index that rules may look at, which is all that `keep` needs of it."""
  names = dict.fromkeys(("key", "width", "height"))
  for rule in rules:
    names |= dict.fromkeys((rule.column, _json_column(rule.column)))
  return list(names)


def keep(table: pa.Table, rules: Sequence[Rule]) -> np.ndarray:
  """Which rows of an index fulfil all rules, bool [n]."""
  kept = np.ones(len(table), bool)
  for _, dropped in _judge(table, rules):
    kept &= ~dropped
  return kept


def counts(table: pa.Table, rules: Sequence[Rule]) -> collections.Counter:
  """Why rows are dropped: "aesthetic >= 5.0" or "aesthetic missing" → rows.

  A row counts once, for the first rule that drops it.
  """
  reasons = collections.Counter()
  kept = np.ones(len(table), bool)
  for reason, dropped in _judge(table, rules):
    reasons[reason] += int(np.sum(kept & dropped))
    kept &= ~dropped
  return +reasons


def _parse(rule: Sequence) -> Rule:
  """Checks one rule."""
  said = f"filter {rule!r}"
  if isinstance(rule, str) or not isinstance(rule, Sequence) or not 3 <= len(rule) <= 4:
    raise UserError(f"{said} is not (column, comparison, value) or (…, \"keep\"); "
                    "write (\"aesthetic\", \">=\", 5.0)")
  column, comparison, value, missing = (*rule, "drop")[:4]
  if not isinstance(column, str) or not column:
    raise UserError(f"{said}: {column!r} is not the name of a column; write \"aesthetic\", say")
  if comparison not in tuple(COMPARISONS):
    raise UserError(f"{said}: {comparison!r} is none of {' '.join(COMPARISONS)}; choose one")
  if missing not in ("drop", "keep"):
    raise UserError(f"{said}: {missing!r} is neither \"drop\" nor \"keep\"; choose one")
  if comparison in LISTS:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
      raise UserError(f"{said}: {value!r} is not a list of values; write (\"UNLIKELY\",)")
    value = tuple(value)
  for item in value if comparison in LISTS else (value,):
    if not isinstance(item, str) and not (
        isinstance(item, int | float) and abs(item) <= sys.float_info.max):
      raise UserError(f"{said}: {item!r} is no finite number, text, True or False; give one")
  if comparison in ORDERED and not _is_number(value):
    raise UserError(f"{said}: {value!r} is not a number; {comparison} compares numbers")
  if comparison == "matches":
    _check_pattern(said, value)
  return Rule(column, comparison, value, missing)


def _check_pattern(said: str, pattern) -> None:
  if not isinstance(pattern, str):
    raise UserError(f"{said}: {pattern!r} is not a pattern; write a text")
  try:
    pc.match_substring_regex(pa.array([""]), pattern)
  except pa.ArrowInvalid as error:
    raise UserError(f"{said}: {error}; mend the pattern (RE2's syntax)") from error


def _judge(table: pa.Table, rules: Sequence[Rule]) -> Iterator[tuple[str, np.ndarray]]:
  """Reasons to drop rows, and which rows, bool [n]."""
  for rule in rules:
    values = rule.value if rule.comparison in LISTS else (rule.value,)
    column = _column(table, rule.column)
    if all(map(_is_number, values)):
      column = _numbers(column)
      if not all(isinstance(value, int) and abs(value) < 2**63 for value in values):
        column, values = column.cast(pa.float64(), safe=False), tuple(map(float, values))
    else:
      column, values = column.cast(pa.string()), tuple(map(_text, values))
    value = pa.array(values, column.type) if rule.comparison in LISTS else values[0]
    missing = column.is_null().to_numpy(zero_copy_only=False)
    passes = COMPARISONS[rule.comparison](column, value).fill_null(False)
    yield str(rule), ~passes.to_numpy(zero_copy_only=False) & ~missing
    if rule.missing == "drop":
      yield f"{rule.column} missing", missing


def _column(table: pa.Table, name: str) -> pa.Array:
  if name in DERIVED:
    sides = [table[side].combine_chunks() for side in ("width", "height")]
    return pc.if_else(pc.and_(*(side.is_valid() for side in sides)), DERIVED[name](*sides), None)
  if name not in table.column_names or name.startswith("json."):
    name = _json_column(name)
  return table[name].combine_chunks() if name in table.column_names else pa.nulls(len(table))


def _json_column(name: str) -> str:
  return index.column_of(name.removeprefix("json."))


def _numbers(column: pa.Array) -> pa.Array:
  """A column as int64 or float64; text that spells no number becomes null."""
  if pa.types.is_string(column.type):
    column = pc.if_else(pc.match_substring_regex(column, NUMBER), column, None)
    column = pc.utf8_trim_whitespace(column)
  return column if pa.types.is_int64(column.type) else column.cast(pa.float64())


def _is_number(value) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value) -> str:
  """A value as columns of text have it."""
  return value if isinstance(value, str) else json.dumps(value)


def _spelled(text: str):
  """The number, truth value or text that a command line spells."""
  try:
    value = json.loads(text)
  except ValueError:
    return text
  return value if isinstance(value, int | float | str) else text
