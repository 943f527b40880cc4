import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sdjax.data import tokenizer
from sdjax.errors import UserError

CAPTIONS = [f"a {size} {colour} {shape} {where} a {other} circle on a white background"
            for size in ("small", "large") for colour in ("red", "green", "three")
            for shape in ("square", "triangle") for where in ("above", "left of", "right of")
            for other in ("small", "large")]
HARD = ["naïve café 😀 zebra", "", "RED  Square!", " ".join(CAPTIONS), "<3 #1's"]


@pytest.fixture(scope="module")
def learned():
  return tokenizer.train(CAPTIONS, length=20, vocab_size=1000)


def test_frequent_words_are_one_token_each(learned):
  for caption in CAPTIONS:
    row = learned(caption)[0]
    words = len(caption.split())
    assert row[0] == learned.bos_id and row[words + 1] == learned.eos_id
    assert np.all(row[words + 1:] == learned.pad_id) and row.shape == (20,)


def test_any_text_survives_and_ids_stay_below_vocab_size(learned):
  rows = learned(["naïve 😀 zebra", "Red Square!"])
  assert rows.dtype == np.int32 and rows.max() < learned.vocab_size
  assert learned.decode(rows[0]) == "naïve 😀 zebra"
  assert learned.decode(rows[1]).replace(" ", "") == "redsquare!"


def test_truncation_keeps_the_end_token(learned):
  row = learned(" ".join(CAPTIONS))[0]
  assert row.shape == (20,) and row[-1] == learned.eos_id
  assert np.sum(row == learned.eos_id) == 1


def test_saved_folder_loads_here_and_in_transformers(learned, tmp_path):
  from transformers import CLIPTokenizer
  learned.save(tmp_path)
  again = tokenizer.load(tmp_path)
  np.testing.assert_array_equal(again(HARD), learned(HARD))
  assert (again.length, again.vocab_size) == (learned.length, learned.vocab_size)
  theirs = CLIPTokenizer.from_pretrained(tmp_path)(
      HARD, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
  np.testing.assert_array_equal(theirs, learned(HARD))
  again.save(tmp_path / "twice")
  for name in tokenizer.FILES:
    assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_folder_of_transformers_5_loads(learned, tmp_path):
  from transformers import CLIPTokenizer
  learned.save(tmp_path / "ours")
  CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
  again = tokenizer.load(tmp_path / "theirs")
  np.testing.assert_array_equal(again(HARD), learned(HARD))
  assert (again.length, again.vocab_size) == (learned.length, learned.vocab_size)


def test_padding_follows_the_folder(learned, tmp_path):
  learned.save(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  # As Stable Diffusion 2 ships it, and special tokens as dicts, as older files have them.
  config = json.loads(path.read_text()) | {
      "pad_token": "!", "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
  path.write_text(json.dumps(config))
  second = tokenizer.load(tmp_path)
  row = second("red")[0]
  assert second.pad_id == 0
  np.testing.assert_array_equal(row[2:], [second.eos_id] + [0] * 17)


def test_vocabulary_is_laid_out_as_clips(learned, tmp_path):
  learned.save(tmp_path)
  vocab = json.loads((tmp_path / "vocab.json").read_text())
  # Published ids of CLIP ViT-L/14's vocab.json.
  assert vocab["!"] == 0 and vocab["a"] == 64 and vocab["a</w>"] == 320 and vocab["~"] == 93
  assert vocab["<|endoftext|>"] == learned.eos_id == learned.vocab_size - 1
  assert sorted(vocab.values()) == list(range(learned.vocab_size))


def test_learning_does_not_depend_on_the_order_of_captions(learned, tmp_path):
  shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
  tokenizer.train(shuffled, 20, 1000).save(tmp_path / "a")
  learned.save(tmp_path / "b")
  assert (tmp_path / "a/merges.txt").read_bytes() == (tmp_path / "b/merges.txt").read_bytes()


def test_merges_by_hand(tmp_path):
  # Pairs of "abab abab abc": (a b) 2 + 1, (b a) 2, (a b</w>) 2, (b c</w>) 1.
  # After ab: (ab a) 2, (a b</w>) 2: "a" sorts first. Then (ab ab</w>) 2. Then nothing twice.
  tokenizer.train(["abab abab abc"], 8, 1000).save(tmp_path)
  lines = (tmp_path / "merges.txt").read_text().splitlines()
  assert lines[1:] == ["a b", "a b</w>", "ab ab</w>"]


def test_vocab_size_is_a_limit():
  assert tokenizer.train(CAPTIONS, 20, 520).vocab_size == 520
  with pytest.raises(UserError, match="513"):
    tokenizer.train(CAPTIONS, 20, 513)


@pytest.mark.parametrize("damage", ["vocab.json", "tokenizer_config.json"])
def test_a_damaged_folder_is_a_user_error(learned, tmp_path, damage):
  learned.save(tmp_path)
  (tmp_path / damage).write_text("{")
  with pytest.raises(UserError, match=str(tmp_path)):
    tokenizer.load(tmp_path)
  (tmp_path / damage).unlink()
  with pytest.raises(UserError, match=damage):
    tokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def clip():
  return tokenizer.clip()


def test_clips_own_vocabulary(clip):
  # Published ids; 256 is "!" as a whole word, 267 the comma.
  assert clip("a photo of a cat")[0].tolist() == (
      [49406, 320, 1125, 539, 320, 2368] + [49407] * 71)
  assert clip.words("Hello  world!") == [3306, 1002, 256]
  assert clip.words(",") == [267]
  assert (clip.vocab_size, clip.length) == (49408, 77)
  assert tokenizer.clip("!")("a cat")[0].tolist() == [49406, 320, 2368, 49407] + [0] * 73


def test_words_are_a_row_without_special_tokens_and_without_end(clip):
  text = " ".join(CAPTIONS)
  words = clip.words(text)
  assert len(words) == len(text.split()) > 300
  assert clip(text)[0].tolist() == [49406, *words[:75], 49407]
  assert clip.words("") == []


def test_threads_may_share_a_tokenizer(clip):
  texts = [f"{caption} {number}" for number, caption in enumerate(CAPTIONS)]
  expected = [clip.words(text) for text in texts]
  with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(clip.words, texts)) == expected


def test_triggers_are_new_ids(clip):
  words = clip.with_tokens({"<cat-toy>": 3, "EasyNegative": 2}).with_tokens({"cat": 1})
  toy, easy, cat = [49408, 49409, 49410], [49411, 49412], [49413]
  assert words.vocab_size == 49414 and clip.vocab_size == 49408
  assert words.triggers == {"<cat-toy>": range(49408, 49411), "EasyNegative": range(49411, 49413),
                            "cat": range(49413, 49414)}
  assert words.words("a <cat-toy>,easynegative") == [320, *toy, 267, *easy]
  assert words.words("x<CAT-TOY><cat-toy>y!") == [
      *clip.words("x"), *toy, *toy, *clip.words("y"), 256]
  assert words.words("Cat, a cat_") == [*cat, 267, 320, *cat, *clip.words("_")]
  for text in ("concatenate cats 1cat", "easynegative2", *HARD):  # in a longer word: no trigger
    assert words.words(text) == clip.words(text)
  assert clip.words("cat <cat-toy>")[0] == 2368
  assert words.decode(words("a <cat-toy> on EASYNEGATIVE")[0]) == "a <cat-toy> on EasyNegative"


def test_of_triggers_the_longest_that_fits_wins(clip):
  words = clip.with_tokens({"bad": 1, "bad hands": 2, "bad hands 5": 3, "cafe\u0301": 1})
  assert words.words("Bad Hands 5") == [49411, 49412, 49413]
  assert words.words("bad hands 55")[:2] == [49409, 49410]
  assert words.words("bad handstand") == [49408, *clip.words("handstand")]
  # Composed or not, it is the same letter.
  assert words.words("caf\u00e9") == words.words("cafe\u0301") == [49414]


@pytest.mark.parametrize("counts", [{"": 1}, {"a": 1, "A": 1}, {"x": 0}, {"x": 19}, {"x": -1}])
def test_impossible_triggers_are_user_errors(learned, counts):
  with pytest.raises(UserError):
    learned.with_tokens(counts)


def test_a_trigger_is_given_once(learned):
  words = learned.with_tokens({"toy": 18})  # as many as fit
  with pytest.raises(UserError, match="Toy"):
    words.with_tokens({"Toy": 1})


def test_saved_triggers_load_here_and_in_transformers(learned, tmp_path):
  from transformers import CLIPTokenizer
  words = learned.with_tokens({"<cat-toy>": 3, "zorg": 1, "zorgling": 2})
  words.save(tmp_path / "ours")
  theirs = CLIPTokenizer.from_pretrained(tmp_path / "ours")
  names = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "zorg", "zorgling", "zorgling_1"]
  assert theirs.convert_tokens_to_ids(names) == list(range(learned.vocab_size, words.vocab_size))
  assert theirs("a red zorg", add_special_tokens=False)["input_ids"] == words.words("a red zorg")
  theirs.save_pretrained(tmp_path / "theirs")
  for folder in ("ours", "theirs"):
    again = tokenizer.load(tmp_path / folder)
    assert (again.triggers, again.vocab_size) == (words.triggers, words.vocab_size)
    np.testing.assert_array_equal(again(["a <cat-toy>", *HARD]), words(["a <cat-toy>", *HARD]))


def test_a_trigger_that_the_format_cannot_hold_is_a_user_error(learned, tmp_path):
  words = learned.with_tokens({"a": 1})
  assert words.words("a") == [learned.vocab_size]
  with pytest.raises(UserError, match="<a>"):
    words.save(tmp_path / "words")
  assert not (tmp_path / "words").exists()
