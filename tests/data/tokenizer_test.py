import json
import random

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
