import itertools
import random

import numpy as np
import pytest

from sdjax.data import prompts, tokenizer
from sdjax.errors import UserError

BREAK = ("BREAK", -1)


@pytest.fixture(scope="module")
def clip():
  return tokenizer.clip()


@pytest.fixture(scope="module")
def short():
  """Six words per chunk."""
  return tokenizer.train(["a b c d e f g h i j , ( )"] * 2, length=8, vocab_size=600)


@pytest.mark.parametrize("text, expected", [
    # The examples that the web UI documents.
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", [
        ("a ", 1.0), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1.0), (" a ", 1.1),
        ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1)]),
    # What it does, too.
    ("", [("", 1.0)]),
    ("()", [("", 1.0)]),
    ("a] b) c:1.2) [d:1.2]", [("a] b) c:1.2) ", 1.0), ("d:1.2", 1 / 1.1)]),
    ("([a)b]", [("a", 1.1 / 1.1), ("b", 1 / 1.1)]),
    ("(a [b", [("a ", 1.1), ("b", 1.1 / 1.1)]),
    ("(a: -0.5 )", [("a", -0.5)]),
    ("(a:b:1.5)", [("a:b", 1.5)]),
    (r"C:\\dir \d (\(x\):2)", [("C:\\dir d ", 1.0), ("(x)", 2.0)]),
    ("a BREAK  b", [("a", 1.0), BREAK, ("b", 1.0)]),
    ("a, BREAK\n(b)BREAK", [
        ("a,", 1.0), BREAK, ("", 1.0), ("b", 1.1), ("", 1.0), BREAK, ("", 1.0)]),
    ("BREAKFAST break", [("BREAKFAST break", 1.0)]),
])
def test_syntax(text, expected):
  parts = prompts.parse(text)
  assert [words for words, _ in parts] == [words for words, _ in expected]
  np.testing.assert_allclose([w for _, w in parts], [w for _, w in expected], rtol=1e-15)


def test_escaping_every_bracket_gives_the_text_back():
  rng = random.Random(0)
  for _ in range(300):
    text = "".join(rng.choices("ab (:1.2)[]\\", k=rng.randrange(12)))
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert prompts.parse(escaped) == [(text, 1.0)]


@pytest.mark.parametrize("weight", ["1.2.3", ".", "+."])
def test_a_weight_that_is_no_number_is_a_user_error(weight):
  with pytest.raises(UserError, match=repr(weight).replace("+", r"\+")):
    prompts.parse(f"(a:{weight})")


def chunks(words, text, **options):
  """The texts of the chunks, without special tokens."""
  tokens, _ = prompts.encode(words, [text], **options)
  return [words.decode(row) for row in tokens.reshape(-1, words.length)]


@pytest.mark.parametrize("pad", [tokenizer.EOS, "!"])
def test_a_short_prompt_is_what_the_tokenizer_makes(pad):
  words = tokenizer.clip(pad)
  texts = ["", "a photo of a cat", "a cat: naïve, 😀", " ".join(["word"] * 75)]
  tokens, weights = prompts.encode(words, texts)
  np.testing.assert_array_equal(tokens, words(texts))
  assert tokens.dtype == np.int32 and weights.dtype == np.float32
  np.testing.assert_array_equal(weights, np.ones((4, 77)))


def test_weights_lie_on_their_words(clip):
  tokens, weights = prompts.encode(clip, ["a (red:1.5) [cat]", "a red cat"])
  np.testing.assert_array_equal(tokens[0], tokens[1])
  np.testing.assert_allclose(weights[0], [1, 1, 1.5, 1 / 1.1] + [1] * 73, rtol=1e-7)
  np.testing.assert_array_equal(weights[1], np.ones(77))


def test_long_prompts_lose_no_word_and_all_rows_are_equally_long(clip):
  rng = random.Random(0)
  texts = [" ".join(rng.choices(["cat", "photograph", "extraordinarily", "(sea)", ","],
                                weights=[5, 5, 5, 1, comma], k=k))
           for k, comma in ((200, 0), (300, 0.3), (100, 3), (3, 0))]
  tokens, weights = prompts.encode(clip, texts)
  assert tokens.shape == weights.shape and tokens.shape[1] % 77 == 0
  for text, row, weight in zip(texts, tokens.reshape(4, -1, 77), weights.reshape(4, -1, 77)):
    assert np.all(row[:, 0] == clip.bos_id) and np.all(row[:, -1] == clip.eos_id)
    special = (row == clip.bos_id) | (row == clip.eos_id)
    parts = [(clip.words(words), w) for words, w in prompts.parse(text)]
    assert row[~special].tolist() == list(itertools.chain.from_iterable(ids for ids, _ in parts))
    np.testing.assert_allclose(weight[~special], [w for ids, w in parts for _ in ids], rtol=1e-6)
    assert np.all(weight[special] == 1)
  fill = tokens[3].reshape(-1, 77)[1:]
  np.testing.assert_array_equal(fill, clip([""] * len(fill)))


@pytest.mark.parametrize("since_comma, moved", [(1, 1), (19, 19), (20, 0), (0, 0)])
def test_a_chunk_ends_at_a_comma_among_its_last_20_words(clip, since_comma, moved):
  text = " ".join(["cat"] * (74 - since_comma) + [","] + ["dog"] * since_comma + ["end"])
  first, second = chunks(clip, text)
  assert len(first.split()) == 75 - moved
  assert second == " ".join(["dog"] * moved + ["end"])


def test_the_last_of_several_commas_counts_and_the_next_one_does_not(clip):
  text = " ".join(["cat"] * 60 + [",", "dog"] * 7 + ["fox"])
  assert len(text.split()) == 75
  assert chunks(clip, text + " end")[1] == "dog fox end"
  assert chunks(clip, text + " , end")[1] == ", end"


def test_break_fills_its_chunk(short):
  assert chunks(short, "a b BREAK c") == ["a b", "c"]
  assert chunks(short, "a b c d e f BREAK g BREAK") == ["a b c d e f", "g"]
  assert chunks(short, "BREAK a BREAK BREAK b") == ["", "a", "", "b"]
  assert chunks(short, "BREAK") == [""]


def test_unweighted_prompts_are_literal_but_as_long(short):
  assert chunks(short, "(a) b", weighted=False) == ["( a ) b"]
  assert chunks(short, "a a a a a BREAK", weighted=False)[0].startswith("a a a a a b")
  tokens, weights = prompts.encode(short, ["a b c d e f (g:2)"], weighted=False)
  assert tokens.shape[1] == 16 and np.all(weights == 1)


def test_textual_inversions_stay_together(short):
  words = short.with_tokens({"<toy>": 3, "all": 6})
  toy, fill = list(words.triggers["<toy>"]), list(words.triggers["all"])
  a = short.words("a")

  def rows(text):
    return [[i for i in row if i not in (words.bos_id, words.eos_id)]
            for row in prompts.encode(words, [text])[0].reshape(-1, 8).tolist()]

  assert rows("a a a <toy> a") == [a * 3 + toy, a]
  assert rows("a a a a <toy> a") == [a * 4, toy + a]
  assert rows("all a all") == [fill, a, fill]
  # A comma counts where the chunk is full, not where only the inversion is too long for it.
  comma = short.words(",")
  assert rows("a a a , a a <toy>") == [a * 3 + comma, a * 2 + toy]
  assert rows("a a , a a <toy>") == [a * 2 + comma + a * 2, toy]
  assert rows("(<TOY>:1.5)<toy>") == [toy + toy]
  _, weights = prompts.encode(words, ["a (<toy>:1.5)"])
  assert weights[0].tolist() == [1, 1, 1.5, 1.5, 1.5, 1, 1, 1]


def test_no_prompts_make_no_rows(short):
  assert prompts.encode(short, [])[0].shape == (0, 8)
