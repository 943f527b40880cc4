"""Prompts against transformers and diffusers: ids of text and of textual inversions."""

import numpy as np
import pytest

from sdjax.data import prompts, tokenizer

torch = pytest.importorskip("torch")
compare = pytest.importorskip("compare")
loaders = pytest.importorskip("diffusers.loaders")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

TEXTS = ["a <cat-toy> on a table, by zorg!", "x<cat-toy>y <CAT-TOY", "naïve café 😀 it's 2024",
         "", "(a:b) " * 60]


@pytest.mark.parametrize("pad", [tokenizer.EOS, "!"])
def test_saved_tokenizer_reads_prompts_as_diffusers_does(pad, tmp_path):
  words = tokenizer.clip(pad).with_tokens({"<cat-toy>": 3, "zorg": 2, "sks": 1})
  words.save(tmp_path)
  theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
  expand = loaders.TextualInversionLoaderMixin().maybe_convert_prompt
  rows = theirs(expand(TEXTS, theirs), padding="max_length", max_length=77, truncation=True)
  np.testing.assert_array_equal(rows["input_ids"], words(TEXTS))
  tokens, _ = prompts.encode(words, TEXTS[:4], weighted=False)
  np.testing.assert_array_equal(tokens, words(TEXTS[:4]))


def test_diffusers_gives_a_new_inversion_the_same_ids(tmp_path):
  words = tokenizer.clip()
  words.save(tmp_path)
  theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
  tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(
      vocab_size=49408, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
      num_attention_heads=1))
  pipeline = loaders.TextualInversionLoaderMixin()
  pipeline.tokenizer, pipeline.text_encoder = theirs, tower
  pipeline.hf_device_map, pipeline.components = None, {}
  pipeline.load_textual_inversion({"<cat-toy>": torch.ones(3, 8)})
  rows = theirs(pipeline.maybe_convert_prompt(TEXTS[:3], theirs), padding="max_length",
                max_length=77, truncation=True)["input_ids"]
  np.testing.assert_array_equal(rows, words.with_tokens({"<cat-toy>": 3})(TEXTS[:3]))
