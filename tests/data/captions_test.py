import collections

import numpy as np
import pytest

from sdjax.data import captions, plan
from sdjax.data.captions import Captions
from sdjax.errors import UserError


@pytest.mark.parametrize("parts, expected", [
    ({"txt": b" a cat \n"}, ("a cat",)),
    ({"txt": b"a cat", "json": b'{"caption": "other"}'}, ("a cat",)),
    ({"json": b'{"caption": "a dog", "similarity": NaN}'}, ("a dog",)),
    ({"txt": b"", "json": b'{"caption": null}'}, ("",)),
    ({"json": b'{"caption": null}'}, ("",)),
    ({"txt": b"x", "json": b'{"captions": ["a", " b ", "", null]}'}, ("a", "b")),
    ({"txt": b"x", "json": b'{"captions": []}'}, ("x",)),
    ({"txt": b"x", "json": b'{"captions": "y"}'}, ("x",)),
    ({}, ("",)),
])
def test_captions_of(parts, expected):
  assert captions.captions_of(parts) == expected


@pytest.mark.parametrize("parts", [{"txt": b"\xff\xfe"}, {"json": b"{"}, {"json": b"[1]"}])
def test_unreadable_captions_raise(parts):
  with pytest.raises(ValueError):
    captions.captions_of(parts)


@pytest.mark.parametrize("column, expected", [
    ((), ("the first",)),
    ("blip", ("a blip",)),
    (("blip", "alt"), ("a blip", "an alt", "another")),
    (("alt", "blip", "blip"), ("an alt", "another", "a blip", "a blip")),
    (("gone", "alt"), ("an alt", "another")),
    ("nan", ("",)),
    (("null", "blip"), ("a blip",)),
])
def test_columns_to_choose_from(column, expected):
  facts = {"caption": "the first", "blip": " a blip", "alt": ["an alt", "", "another"],
           "nan": float("nan"), "null": None}
  assert captions.choices(facts, column) == expected


def test_the_list_of_captions_comes_before_the_first():
  assert captions.choices({"caption": "a", "captions": ["a", "b"]}) == ("a", "b")
  assert captions.choices({"caption": "a", "captions": []}) == ("a",)


@pytest.mark.parametrize("facts, column", [
    ({}, ()), ({"caption": "x"}, "blip"), ({"caption": "x"}, ("blip", "alt"))])
def test_no_caption_raises(facts, column):
  with pytest.raises(ValueError):
    captions.choices(facts, column)


def test_choice_covers_all_and_drop_out_empties():
  texts = ("a", "b", "c")
  rules = Captions(dropout=0.1)
  assert [rules(texts, (u, 0.5, 0.0)) for u in (0.0, 0.34, 0.99999)] == ["a", "b", "c"]
  assert rules(texts, (0.5, 0.0999, 0.0)) == ""
  assert rules(texts, (0.5, 0.1, 0.0)) == "b"
  assert Captions()(texts, (0.5, 0.0, 0.0)) == "b"
  assert Captions(dropout=1.0)(texts, (0.5, 0.999999, 0.0)) == ""


def test_every_rule_acts_and_in_order():
  rules = Captions(dropout=0.25, clean=True, trigger="<sks>", shuffle_tags=True, keep_tags=1)
  texts = ("first,  a &amp; b,<b>bold</b>", "second")
  assert rules(texts, (0.7, 0.9, 0.0)) == "<sks>, second"
  assert rules(texts, (0.7, 0.2, 0.0)) == ""
  seen = {rules(texts, (0.1, 0.5, order)) for order in np.linspace(0, 0.99, 20)}
  assert seen == {"<sks>, first, a & b, bold", "<sks>, first, bold, a & b"}
  assert Captions(trigger="sks")(("",), (0.0, 0.0, 0.0)) == "sks"
  plain = " Left,  as&nbsp;it was "
  assert Captions()((plain,), (0.5, 0.0, 0.9)) == plain


@pytest.mark.parametrize("text, expected", [
    ("Tom &amp; Jerry&#39;s &quot;show&quot;", "Tom & Jerry's \"show\""),
    ("twice &amp;quot;escaped&amp;quot;", 'twice "escaped"'),
    ("a <b>bold</b><br/>cat", "a bold cat"),
    ("2 < 3 and 5 > 4 <3", "2 < 3 and 5 > 4 <3"),
    ("see https://a.b/c?d=e&amp;f, www.x.org/y and HTTP://z now", "see and now"),
    ("  many \t\n spaces ", "many spaces"),
    ("awww.nice", "awww.nice"),
    ("https://only.url", ""),
])
def test_clean(text, expected):
  assert captions.clean(text) == expected


def test_tags_keep_their_first_and_take_every_order_alike():
  draws = plan.uniforms(0, np.arange(6000), 1)[:, 0]
  orders = collections.Counter(captions.shuffle_tags("k, a,b , c,, ", 1, u) for u in draws)
  assert len(orders) == 6 and all(text.startswith("k, ") for text in orders)
  assert {tuple(sorted(text.split(", "))) for text in orders} == {("a", "b", "c", "k")}
  # Chi-square with 5 degrees of freedom; 20.5 is passed once in a thousand.
  assert sum((n - 1000) ** 2 / 1000 for n in orders.values()) < 20.5
  assert captions.shuffle_tags("a, b, c", 0, 0.3) == captions.shuffle_tags("a, b, c", 0, 0.3)
  assert captions.shuffle_tags("a, b", 5, 0.3) == "a, b"
  assert captions.shuffle_tags("", 0, 0.3) == ""


@pytest.mark.parametrize("wrong", [{"dropout": 1.1}, {"dropout": -0.1}, {"keep_tags": -1}])
def test_wrong_rules_are_refused(wrong):
  with pytest.raises(UserError, match=next(iter(wrong))):
    Captions(**wrong)
