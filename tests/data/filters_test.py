import itertools
import operator
import re

import numpy as np
import pyarrow as pa
import pytest

from sdjax.data import filters
from sdjax.errors import UserError

COMPARISONS = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq,
    "!=": operator.ne, "in": lambda a, b: a in b, "not in": lambda a, b: a not in b,
    "matches": lambda a, b: re.search(b, a) is not None,
}


@pytest.fixture(scope="module")
def table():
  rng = np.random.default_rng(0)
  n = 200

  def gaps(values, kind):
    return pa.array(values, kind, mask=rng.random(n) < 0.2)

  score = rng.integers(0, 20, n) / 2
  return pa.table({
      "width": gaps(rng.integers(1, 100, n), pa.int32()),
      "height": gaps(rng.integers(1, 100, n), pa.int32()),
      "caption_length": gaps(rng.integers(0, 9, n), pa.int32()),
      "json.width": gaps(rng.integers(1, 100, n), pa.int64()),
      "json.WIDTH": gaps(rng.integers(1, 100, n), pa.int64()),
      "json.aesthetic": gaps(score, pa.float64()),
      "json.spelled": gaps([f" {x}" if x > 5 else "unknown" for x in score], pa.string()),
      "json.NSFW": gaps(rng.choice(["UNLIKELY", "UNSURE", "NSFW", ""], n), pa.string()),
      "json.flag": gaps(score > 5, pa.bool_()),
      "json.size": pa.array(np.full(n, 7)), "json.size_": gaps(score, pa.float64()),
      "json.empty": pa.nulls(n),
  })


def expected(values, rule):
  """What Python makes of a rule; None: missing."""
  compare = COMPARISONS[rule.comparison]
  return np.array([rule.missing == "keep" if value is None else bool(compare(value, rule.value))
                   for value in values])


@pytest.mark.parametrize("missing", ["drop", "keep"])
@pytest.mark.parametrize("column, source, values", [
    ("aesthetic", "json.aesthetic", (5, 5.0, 4.75, 2**70)),
    ("width", "width", (40, 40.5)), ("json.width", "json.width", (40,)),
    ("WIDTH", "json.WIDTH", (40, -2**63)), ("caption_length", "caption_length", (3,)),
    ("flag", "json.flag", (0.5, 1)), ("json.size", "json.size_", (5,)),
    ("size", "json.size_", (5,)), ("empty", "json.empty", (1,)), ("nowhere", None, (1,))])
def test_numbers_are_compared_as_python_compares_them(table, column, source, values, missing):
  rows = table[source].to_pylist() if source else [None] * len(table)
  for sign, value in itertools.product((">=", ">", "<=", "<", "==", "!="), values):
    (rule,) = filters.parse([(column, sign, value, missing)])
    np.testing.assert_array_equal(filters.keep(table, [rule]), expected(rows, rule), str(rule))
  for sign, value in itertools.product(("in", "not in"), ((5, 40), (4.5, 40, 1))):
    (rule,) = filters.parse([(column, sign, list(value), missing)])
    np.testing.assert_array_equal(filters.keep(table, [rule]), expected(rows, rule), str(rule))


@pytest.mark.parametrize("missing", ["drop", "keep"])
@pytest.mark.parametrize("sign, value", [
    ("==", "UNSURE"), ("!=", "UNSURE"), ("==", ""), ("in", ("UNLIKELY", "")), ("in", ("x", 5)),
    ("not in", ("NSFW",)), ("matches", "^UN"), ("matches", "L.*K"), ("matches", "")])
def test_texts_are_compared_as_python_compares_them(table, sign, value, missing):
  (rule,) = filters.parse([("NSFW", sign, value, missing)])
  rows = table["json.NSFW"].to_pylist()
  np.testing.assert_array_equal(filters.keep(table, [rule]), expected(rows, rule))


def test_numbers_in_columns_of_text_and_texts_of_other_columns(table):
  spelled = [float(x) if x not in (None, "unknown") else None
             for x in table["json.spelled"].to_pylist()]
  (rule,) = filters.parse([("spelled", ">=", 7)])
  np.testing.assert_array_equal(filters.keep(table, [rule]), expected(spelled, rule))
  assert 0 < filters.keep(table, [rule]).sum() < len(table)
  odd = pa.table({"json.a": ["1e3", "+.5", "0x10", "nan", "1_0", "", "-2.E1\n", "1e999"]})
  assert filters.keep(odd, filters.parse([("a", ">", -100, "drop")])).tolist() == [
      True, True, False, False, False, False, True, True]
  for rules in ([("flag", "==", True)], [("flag", "in", (True,))], [("flag", "matches", "true")]):
    np.testing.assert_array_equal(filters.keep(table, filters.parse(rules)),
                                  [x is True for x in table["json.flag"].to_pylist()])


def test_derived_columns(table):
  width, height = (table[name].to_pylist() for name in ("width", "height"))
  for column, derive, limit in (("min_side_px", min, 30), ("aspect", operator.truediv, 1.5),
                                ("pixels", operator.mul, 900)):
    values = [None if None in sides else derive(*sides) for sides in zip(width, height)]
    for missing in ("drop", "keep"):
      (rule,) = filters.parse([(column, ">=", limit, missing)])
      np.testing.assert_array_equal(filters.keep(table, [rule]), expected(values, rule))
  large = pa.table({side: pa.array([2**31 - 1], pa.int32()) for side in ("width", "height")})
  assert filters.keep(large, filters.parse([("pixels", ">", 2**61)])).all()


def test_large_integers_are_compared_exactly():
  table = pa.table({"json.hash": [2**53 + 1, 2**62 + 1, None]})
  for value, kept in ((2**53, 0), (2**53 + 1, 1), (2**62, 0), (2**62 + 1, 1)):
    assert filters.keep(table, filters.parse([("hash", "==", value)])).sum() == kept
    assert filters.keep(table, filters.parse([("hash", "in", (value,))])).sum() == kept


def test_a_row_counts_once_for_the_first_rule_that_drops_it(table):
  rules = filters.parse([("aesthetic", ">=", 5.0), ("NSFW", "in", ("UNLIKELY",), "keep"),
                         ("width", ">", 50)])
  counts = filters.counts(table, rules)
  assert set(counts) == {"aesthetic >= 5.0", "aesthetic missing", "NSFW in UNLIKELY", "width > 50",
                         "width missing"}
  assert counts["aesthetic missing"] == table["json.aesthetic"].null_count
  left = np.ones(len(table), bool)
  for rule in rules:
    kept = left & filters.keep(table, [rule])
    reasons = [str(rule), f"{rule.column} missing"]
    assert sum(counts[reason] for reason in reasons) == left.sum() - kept.sum()
    left = kept
  np.testing.assert_array_equal(filters.keep(table, rules), left)
  assert filters.counts(table, ()) == {} and filters.keep(table, ()).all()
  assert filters.keep(table.slice(0, 0), rules).tolist() == []


def test_columns_of_rules_are_all_that_they_need(table):
  rules = filters.parse([("aesthetic", ">=", 3), ("aspect", "<", 2), ("size", ">", 1),
                         ("json.width", ">", 10), ("caption_length", ">", 1, "keep")])
  names = [name for name in filters.columns_of(rules) if name in table.column_names]
  assert "json.NSFW" not in names
  np.testing.assert_array_equal(filters.keep(table.select(names), rules),
                                filters.keep(table, rules))


@pytest.mark.parametrize("text, rule", [
    ("aesthetic >= 5", ("aesthetic", ">=", 5)), ("a>=5.5", ("a", ">=", 5.5)),
    ("NSFW in UNLIKELY, UNSURE or missing", ("NSFW", "in", ("UNLIKELY", "UNSURE"), "keep")),
    ("min_side_px not in 1,2", ("min_side_px", "not in", (1, 2))),
    ("url matches ^a b$ or missing", ("url", "matches", "^a b$", "keep")),
    ("digits matches 5", ("digits", "matches", "5")),
    ('k == "5"', ("k", "==", "5")), ("two words!=true", ("two words", "!=", True)),
    ("  LANGUAGE == en ", ("LANGUAGE", "==", "en"))])
def test_rules_of_the_command_line(text, rule):
  (parsed,) = filters.parse([rule])
  assert filters.parse_text(text) == parsed
  assert repr(filters.parse_text(text)) == repr(parsed)                # makes the plan's hash


@pytest.mark.parametrize("text", ["", "aesthetic", "a => 5", "a = 5", "a >= b", ">= 5", "a in",
                                  "a matches (", "a >= NaN", "a >= 5,6"])
def test_texts_that_are_no_rule(text):
  with pytest.raises(UserError) as raised:
    filters.parse_text(text)
  assert "filter" in str(raised.value) and text[:1] in str(raised.value)


@pytest.mark.parametrize("rule", [
    "aesthetic >= 5", 5, ("a",), ("a", ">=", 5, "keep", 1), (5, ">=", 5), ("", ">=", 5),
    ("a", "=>", 5), ("a", [], 5), ("a", ">=", "5"), ("a", ">", True), ("a", ">", float("nan")),
    ("a", "in", "abc"), ("a", "in", ()), ("a", "in", (None,)), ("a", "==", None), ("a", "==", [5]),
    ("a", "matches", "("), ("a", "matches", 5), ("a", "<", 5, "maybe"), ("a", "<", 10**400),
    ("a", "<", float("inf"))])
def test_rules_that_mean_nothing_are_named(rule):
  with pytest.raises(UserError) as raised:
    filters.parse([("b", ">", 1), rule])
  assert repr(rule)[:40] in str(raised.value) and "\n" not in str(raised.value)
