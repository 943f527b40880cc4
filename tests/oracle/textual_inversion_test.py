"""Textual inversions against diffusers (PyTorch, CPU, float32), and pickles that bite."""

import os
import pickle
import warnings

import jax
import numpy as np
import pytest

from sdjax.checkpoints import clip_configs, textual_inversion
from sdjax.data import tokenizer
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import UserError
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.stable_diffusion import StableDiffusion

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

LENGTH, WIDTHS = 32, (24, 36)
PROMPTS = ["a <toy> circle", "<toy>", "a red circle, <toy>, and a <toy> in a square",
           "a red circle", "a red circle " * 9 + "<toy>"]


def make_text(words, width, kind):
  config = transformers.CLIPTextConfig(
      vocab_size=words.vocab_size, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
      num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=20,
      bos_token_id=words.bos_id, eos_token_id=words.eos_id, pad_token_id=words.pad_id)
  return compare.perturb(getattr(transformers, kind)(config), width)


@pytest.fixture
def both(tmp_path):
  """SDXL's pipeline, as far as texts go, and (sd, params)."""
  torch.manual_seed(0)
  torch.set_num_threads(1)
  words = tokenizer.train(["a red circle", "a blue square"] * 9, length=LENGTH, vocab_size=540)
  words.save(tmp_path / "words")
  kinds = (clip_configs.TEXT, clip_configs.TEXT_PROJECTED)
  theirs = [make_text(words, width, kind) for width, kind in zip(WIDTHS, kinds)]
  clips = [transformers.CLIPTokenizer.from_pretrained(tmp_path / "words") for _ in theirs]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=theirs[0], text_encoder_2=theirs[1], tokenizer=clips[0],
        tokenizer_2=clips[1], scheduler=diffusers.DDIMScheduler(),
        unet=diffusers.UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=4,
                                            down_block_types=("DownBlock2D",),
                                            up_block_types=("UpBlock2D",)))
  ours = tuple(clip_configs.read_text_encoder(module.config.to_dict() | {"architectures": [kind]})
               for module, kind in zip(theirs, kinds))
  params = {
      name: compare.load_params(module, jax.eval_shape(
          text.init, jax.random.key(0), np.zeros((1, LENGTH), np.int32))["params"])
      for name, module, text in zip(("text_encoder", "text_encoder_2"), theirs, ours)}
  sd = StableDiffusion(
      unet=UNet(added_dim=68), vae=AutoencoderKL(), text_encoders=ours, tokenizers=(words, words),
      schedule=Schedule("linear", 1e-3, 0.02))
  return pipeline, sd, params


def towers(pipeline):
  return ((pipeline.tokenizer, pipeline.text_encoder),
          (pipeline.tokenizer_2, pipeline.text_encoder_2))


def read_as_diffusers(pipeline, clip, text):
  prompts = pipeline.maybe_convert_prompt(PROMPTS, clip)
  ids = clip(prompts, padding="max_length", max_length=LENGTH, truncation=True,
             return_tensors="pt").input_ids
  with torch.no_grad():
    return ids.numpy(), text(ids)


def assert_alike(pipeline, sd, params, towers_taught):
  tokens = sd.tokenize(PROMPTS)
  for i, (clip, text) in enumerate(towers(pipeline)):
    if not towers_taught[i]:
      continue
    ids, expected = read_as_diffusers(pipeline, clip, text)
    np.testing.assert_array_equal(tokens[:, i], ids)
    assert set(sd.tokenizers[i].triggers["<toy>"]) <= set(ids.flat)
    states = jax.jit(sd.text_encoders[i].apply)({"params": params[sd.text_names[i]]}, tokens[:, i])
    compare.assert_close("last hidden state", states.last, expected.last_hidden_state, 2e-5)
    if i:
      compare.assert_close("projected", states.projected, expected.text_embeds, 2e-5)


def draw(n, width):
  return np.random.default_rng(width).standard_normal((n, width), np.float32)


@pytest.mark.parametrize("n", [1, 3])
def test_two_towers(both, tmp_path, n):
  pipeline, sd, params = both
  given = textual_inversion.Embedding("<toy>", tuple(draw(n, width) for width in WIDTHS))
  textual_inversion.save(tmp_path / "<toy>.safetensors", given)
  loaded = textual_inversion.load(tmp_path / "<toy>.safetensors")
  for (clip, text), vectors in zip(towers(pipeline), loaded.vectors):
    pipeline.load_textual_inversion(
        torch.tensor(vectors), token="<toy>", tokenizer=clip, text_encoder=text)
  assert_alike(pipeline, *textual_inversion.attach(sd, params, [loaded]), (True, True))


def save_diffusers(file, vectors):
  textual_inversion.save(file, textual_inversion.Embedding("<toy>", (vectors,)))


def save_bin(file, vectors):
  torch.save({"<toy>": torch.nn.Parameter(torch.tensor(vectors))}, file)


def save_a1111(file, vectors):
  torch.save({
      "string_to_token": {"*": 265}, "string_to_param": {"*": torch.tensor(vectors)},
      "name": "<toy>", "step": 1500, "sd_checkpoint": None, "sd_checkpoint_name": "v1-5"}, file)


def save_a1111_of_old(file, vectors):
  torch.save({"string_to_param": {"*": torch.tensor(vectors)}, "name": "<toy>"}, file,
             _use_new_zipfile_serialization=False)


KINDS = {
    "learned_embeds.safetensors": save_diffusers, "learned_embeds.bin": save_bin,
    "a1111.pt": save_a1111, "old.pt": save_a1111_of_old,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_files_mean_what_they_mean_in_diffusers(both, tmp_path, name, n):
  """The first tower of the pipeline alone is all that SD1 has."""
  pipeline, sd, params = both
  KINDS[name](tmp_path / name, draw(n, WIDTHS[0]))
  pipeline.load_textual_inversion(str(tmp_path), weight_name=name)
  loaded = textual_inversion.load(tmp_path / name)
  assert loaded.trigger == "<toy>"
  both_towers = textual_inversion.Embedding(
      loaded.trigger, (*loaded.vectors, np.zeros((n, WIDTHS[1]), np.float32)))
  assert_alike(pipeline, *textual_inversion.attach(sd, params, [both_towers]), (True, False))


def test_bfloat16_pickles_are_read(tmp_path):
  vectors = torch.tensor(draw(2, 24)).to(torch.bfloat16)
  torch.save({"<toy>": vectors}, tmp_path / "a.bin")
  loaded = textual_inversion.load(tmp_path / "a.bin").vectors[0]
  np.testing.assert_array_equal(loaded, vectors.float().numpy())


class Bite:
  """Makes a folder when it is unpickled."""

  def __init__(self, folder):
    self.folder = str(folder)

  def __reduce__(self):
    return os.mkdir, (self.folder,)


@pytest.mark.parametrize("save, trust", [
    (torch.save, lambda file: torch.load(file, weights_only=False)),
    (lambda stored, file: file.write_bytes(pickle.dumps(stored)),
     lambda file: pickle.loads(file.read_bytes())),
], ids=["torch", "plain"])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path, save, trust):
  file, bitten = tmp_path / "a.pt", tmp_path / "bitten"
  save({"<toy>": torch.ones(2, 24), "string_to_param": Bite(bitten)}, file)
  with pytest.raises(UserError, match="safetensors"):
    textual_inversion.load(file)
  assert not bitten.exists()
  trust(file)  # it would have
  assert bitten.exists()


@pytest.mark.parametrize("stored", [
    torch.ones(2, 24), {"string_to_param": {"*": "x"}}, {"string_to_param": {}},
    {"<toy>": torch.ones(2, 24), "b": torch.ones(2)}, ["<toy>"]])
def test_other_pickles_are_refused(tmp_path, stored):
  torch.save(stored, tmp_path / "a.pt")
  with pytest.raises(UserError, match="no textual inversion"):
    textual_inversion.load(tmp_path / "a.pt")


def test_broken_pickles_are_refused(tmp_path):
  (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 and then nothing")
  with pytest.raises(UserError, match="broken"):
    textual_inversion.load(tmp_path / "a.pt")
