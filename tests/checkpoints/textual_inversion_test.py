"""Textual inversions: files of every kind, and words that find their vectors."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints import tensors, textual_inversion
from sdjax.checkpoints.textual_inversion import Embedding
from sdjax.data import tokenizer
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import UserError
from sdjax.models.clip import LEGACY_EOS_ID, CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.stable_diffusion import StableDiffusion

WIDTHS = {"sd1": (6,), "sdxl": (6, 10), "refiner": (10,)}


@functools.cache
def words():
  return tokenizer.train(["a red circle"], length=12, vocab_size=520)


def build(family="sd1", spare=0):
  """(sd, parameters of the token embeddings); `spare` rows more than the tokenizer has ids."""
  size = words().vocab_size + spare
  texts = tuple(CLIPText(vocab_size=size, width=width, projection=10, eos_id=LEGACY_EOS_ID)
                for width in WIDTHS[family])
  sd = StableDiffusion(
      unet=UNet(added_dim=None if family == "sd1" else 64), vae=AutoencoderKL(),
      text_encoders=texts, tokenizers=(words(),) * len(texts),
      schedule=Schedule("linear", 1e-3, 0.02))
  rng = np.random.default_rng(0)
  return sd, {name: {
      "embeddings": {
          "token_embedding": {"embedding": rng.standard_normal((size, text.width), np.float32)},
          "position_embedding": {"embedding": np.ones((12, text.width), np.float32)}},
      "final_layer_norm": {"scale": np.ones(text.width, np.float32)},
  } for name, text in zip(sd.text_names, texts, strict=True)}


def draw(trigger, n, widths=(6,), seed=1):
  rng = np.random.default_rng(seed)
  return Embedding(trigger, tuple(rng.standard_normal((n, width), np.float32) for width in widths))


def assert_same(a, b):
  assert a.trigger == b.trigger
  for ours, theirs in zip(a.vectors, b.vectors, strict=True):
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


def write(file, stored):
  tensors.write_file(file, stored)
  return file


def table_of(params, name):
  return params[name]["embeddings"]["token_embedding"]["embedding"]


def test_every_kind_is_read(tmp_path):
  one, several, both = draw("<toy>", 1), draw("file", 3), draw("file", 2, (6, 10))
  file = tmp_path / "file.safetensors"
  assert_same(textual_inversion.load(write(file, {"<toy>": one.vectors[0][0]})), one)
  assert_same(textual_inversion.load(write(file, {"<toy>": one.vectors[0]})), one)
  assert_same(textual_inversion.load(write(file, {"emb_params": several.vectors[0]})), several)
  assert_same(textual_inversion.load(
      write(file, {"clip_g": both.vectors[1], "clip_l": both.vectors[0]})), both)
  half = {"<toy>": one.vectors[0].astype(np.float16)}
  rounded = dataclasses.replace(one, vectors=(half["<toy>"].astype(np.float32),))
  assert_same(textual_inversion.load(write(file, half)), rounded)


@pytest.mark.parametrize("widths", [(6,), (6, 10)])
def test_what_is_saved_is_read_again(tmp_path, widths):
  embedding = draw("<toy>", 3, widths)
  textual_inversion.save(tmp_path / "<toy>.safetensors", embedding)
  assert_same(textual_inversion.load(tmp_path / "<toy>.safetensors"), embedding)


@pytest.mark.parametrize("stored, told", [
    ({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}, "no textual inversion"),
    ({"a": np.ones((2, 3, 4), np.float32)}, "no textual inversion"),
    ({"a": np.ones((2, 3), np.int32)}, "no textual inversion"),
    ({"clip_l": np.ones((2, 6), np.float32), "clip_g": np.ones((3, 10), np.float32)}, "2 and 3"),
])
def test_other_files_are_refused(tmp_path, stored, told):
  with pytest.raises(UserError, match=told):
    textual_inversion.load(write(tmp_path / "a.safetensors", stored))


def test_pickles_need_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "a.pt").write_bytes(b"")
  with pytest.raises(UserError, match="PyTorch"):
    textual_inversion.load(tmp_path / "a.pt")


@pytest.mark.parametrize("family", WIDTHS)
@pytest.mark.parametrize("spare", [0, 2, 20])
def test_words_find_their_vectors(family, spare):
  sd, params = build(family, spare)
  toy, style = draw("<toy>", 3, (6, 10)), draw("myStyle", 1, (6, 10), seed=2)
  if family == "sd1":
    toy, style = (dataclasses.replace(e, vectors=e.vectors[:1]) for e in (toy, style))
  new, new_params = textual_inversion.attach(sd, params, [toy, style])
  tokens = new.tokenize(["a <toy> in", "mystyle", "a red circle"])
  np.testing.assert_array_equal(tokens[2], sd.tokenize(["a red circle"])[0])
  taught = [row[row >= words().vocab_size] for row in tokens[:, 0]]
  for i, (name, text) in enumerate(zip(new.text_names, new.text_encoders, strict=True)):
    table, before = table_of(new_params, name), table_of(params, name)
    assert len(table) == text.vocab_size >= new.tokenizers[i].vocab_size
    assert text.vocab_size == max(words().vocab_size + 4, len(before))
    k = i - len(new.text_encoders)
    np.testing.assert_array_equal(table[taught[0]], toy.vectors[k])
    np.testing.assert_array_equal(table[taught[1]], style.vectors[k])
    for kept in slice(words().vocab_size), slice(words().vocab_size + 4, None):
      np.testing.assert_array_equal(table[kept], before[kept])
    assert new_params[name]["final_layer_norm"] is params[name]["final_layer_norm"]
    # By the legacy rule a text ends at its highest id, which now is a trigger's.
    assert text.eos_id == words().eos_id


def test_leaves_keep_their_dtype_and_their_kind():
  sd, params = build()
  for convert in (lambda x: x.astype(jnp.bfloat16), lambda x: jnp.asarray(x, jnp.float16)):
    given = jax.tree.map(convert, params)
    _, after = textual_inversion.attach(sd, given, [draw("<toy>", 2)])
    table = table_of(after, "text_encoder")
    assert table.dtype == table_of(given, "text_encoder").dtype
    assert isinstance(table, jax.Array) == isinstance(table_of(given, "text_encoder"), jax.Array)


def test_words_are_taught_one_after_another_too():
  sd, params = build()
  toy, style = draw("<toy>", 3), draw("myStyle", 2, seed=2)
  at_once, expected = textual_inversion.attach(sd, params, [toy, style])
  again, after = textual_inversion.attach(*textual_inversion.attach(sd, params, [toy]), [style])
  prompt = ["<toy> in myStyle"]
  np.testing.assert_array_equal(at_once.tokenize(prompt), again.tokenize(prompt))
  np.testing.assert_array_equal(
      table_of(after, "text_encoder"), table_of(expected, "text_encoder"))
  same, unchanged = textual_inversion.attach(sd, params, [])
  np.testing.assert_array_equal(
      table_of(unchanged, "text_encoder"), table_of(params, "text_encoder"))
  assert same.text_encoders[0].vocab_size == sd.text_encoders[0].vocab_size


@pytest.mark.parametrize("family, widths, told", [
    ("sd1", (7,), ("width 7", "read 6")),
    ("sd1", (6, 10), ("6 and 10", "read 6 ")),
    ("sdxl", (6,), ("width 6", "6 and 10")),
    ("refiner", (6,), ("width 6", "read 10")),
])
def test_another_models_words_are_refused(family, widths, told):
  with pytest.raises(UserError) as error:
    textual_inversion.attach(*build(family), [draw("<toy>", 2, widths)])
  assert all(part in str(error.value) for part in ("<toy>", *told))


def test_a_trigger_is_one_words():
  with pytest.raises(UserError, match="<toy>"):
    textual_inversion.attach(*build(), [draw("<toy>", 2), draw("<toy>", 1)])
  taught = textual_inversion.attach(*build(), [draw("<toy>", 2)])
  with pytest.raises(UserError, match="<TOY>"):
    textual_inversion.attach(*taught, [draw("<TOY>", 1)])
