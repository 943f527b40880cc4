"""CLIP's towers and their configs against transformers: every hidden state, pooling, gradients."""

import json

import jax
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import clip_configs, names
from sdjax.data import tokenizer
from sdjax.models.clip import CLIPText, CLIPVision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

BOS, EOS, VOCAB = 39, 40, 50  # ids from 41 are those of textual inversions

TEXTS = {
    # SD1, SDXL's first, SDXL's second, SD3's: activation, pooling, projection.
    "sd1": dict(hidden_act="quick_gelu", eos_token_id=2, projection_dim=None),
    "sd2": dict(hidden_act="gelu", eos_token_id=EOS, projection_dim=None),
    "xl": dict(hidden_act="gelu", eos_token_id=2, projection_dim=20),
    "sd3": dict(hidden_act="quick_gelu", eos_token_id=EOS, projection_dim=20),
}
VISIONS = {
    "openai": dict(hidden_act="quick_gelu", image_size=14, patch_size=7),
    "openclip": dict(hidden_act="gelu", image_size=16, patch_size=5),  # one column is not seen
}
TINY = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def config_of(theirs, folder):
  theirs.save_pretrained(folder)
  return json.loads((folder / "config.json").read_text())


def text_tower(kind, folder):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  options = dict(TEXTS[kind])
  if (width := options.pop("projection_dim")) is None:
    tower = transformers.CLIPTextModel
  else:
    tower, options["projection_dim"] = transformers.CLIPTextModelWithProjection, width
  theirs = compare.perturb(tower(transformers.CLIPTextConfig(
      **TINY, **options, vocab_size=VOCAB, max_position_embeddings=9,
      bos_token_id=BOS, pad_token_id=EOS)), 0)
  ours = clip_configs.read_text_encoder(config_of(theirs, folder))
  shapes = jax.eval_shape(ours.init, jax.random.key(0), texts())["params"]
  return theirs, ours, compare.load_params(theirs, shapes)


def texts():
  """Rows end at different places, two are filled up with ends, and the highest id is elsewhere."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, BOS, (3, 9)).astype(np.int32)
  tokens[:, 0] = BOS
  tokens[0, 4:], tokens[1, 8], tokens[2, 2:] = EOS, EOS, 0
  tokens[2, 2] = EOS
  tokens[1, [3, 5]] = VOCAB - 1
  return tokens


@pytest.mark.parametrize("kind", TEXTS)
def test_text(kind, tmp_path):
  theirs, ours, params = text_tower(kind, tmp_path)
  tokens = texts()
  expected = theirs(torch.tensor(tokens).long(), output_hidden_states=True)
  pooled = expected.pooler_output if ours.projection is None else expected.text_embeds
  (expected.last_hidden_state.square().sum() + pooled.square().sum()).backward()

  def loss(params):
    states = ours.apply({"params": params}, tokens)
    pooled = states.pooled if ours.projection is None else states.projected
    return (states.last ** 2).sum() + (pooled ** 2).sum(), states

  grads, states = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert len(states.hidden) == len(expected.hidden_states) == 4
  for i, (hidden, their_hidden) in enumerate(zip(states.hidden, expected.hidden_states)):
    compare.assert_close(f"{kind} hidden {i}", hidden, their_hidden.detach(), 2e-5)
  compare.assert_close(f"{kind} last", states.last, expected.last_hidden_state.detach(), 2e-5)
  if ours.projection is None:
    assert states.projected is None
    compare.assert_close(f"{kind} pooled", states.pooled, pooled.detach(), 2e-5)
  else:
    compare.assert_close(f"{kind} projected", states.projected, pooled.detach(), 2e-5)
    inner = theirs.text_model(torch.tensor(tokens).long()).pooler_output
    compare.assert_close(f"{kind} pooled", states.pooled, inner.detach(), 2e-5)
  compare.assert_gradient_norms(theirs, grads)

  # As diffusers' clip_skip=1 does for SD1 and SD2.
  norm = getattr(theirs, "text_model", theirs).final_layer_norm
  skipped = ours.apply({"params": params}, states.hidden[-2], method="normalize")
  compare.assert_close(
      f"{kind} skipped", skipped, norm(expected.hidden_states[-2]).detach(), 2e-5)


def test_text_through_five_steps_of_adamw(tmp_path):
  theirs, ours, params = text_tower("sd3", tmp_path)
  tokens = texts()

  def their_loss(module):
    states = module(torch.tensor(tokens).long())
    return states.last_hidden_state.square().mean() + states.text_embeds.square().mean()

  def our_loss(params):
    states = ours.apply({"params": params}, tokens)
    return (states.last ** 2).mean() + (states.projected ** 2).mean()

  compare.assert_five_adamw_steps(theirs, their_loss, our_loss, params)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_config_is_written_as_it_was(kind, tmp_path):
  theirs, ours, _ = text_tower(kind, tmp_path)
  words = tokenizer.train(["a red circle"], length=9, vocab_size=520)
  written = json.loads(json.dumps(clip_configs.write_text_encoder(ours, words)))
  assert clip_configs.read_text_encoder(written) == ours
  before = json.loads((tmp_path / "config.json").read_text())
  different = {key for key, value in written.items() if before.get(key) != value}
  # Ids of special tokens are the tokenizer's; a width without a projection means nothing.
  assert different <= {"bos_token_id", "pad_token_id"} | (
      {"projection_dim"} if ours.projection is None else set())
  again = getattr(transformers, written["architectures"][0])(
      transformers.CLIPTextConfig.from_dict(written))
  assert again.state_dict().keys() == theirs.state_dict().keys()


def vision_tower(kind, folder):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  theirs = compare.perturb(transformers.CLIPVisionModelWithProjection(
      transformers.CLIPVisionConfig(**TINY, **VISIONS[kind], projection_dim=20)), 0)
  ours = clip_configs.read_image_encoder(config_of(theirs, folder))
  side = ours.image_size
  image = np.random.default_rng(0).standard_normal((2, side, side, 3), np.float32)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), image)["params"]
  return theirs, ours, compare.load_params(theirs, shapes), image


@pytest.mark.parametrize("kind", VISIONS)
def test_vision(kind, tmp_path):
  theirs, ours, params, image = vision_tower(kind, tmp_path)
  expected = theirs(compare.nchw(image), output_hidden_states=True)
  expected.image_embeds.square().sum().backward()

  def loss(params):
    states = ours.apply({"params": params}, image)
    return (states.projected ** 2).sum(), states

  grads, states = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert len(states.hidden) == len(expected.hidden_states) == 4
  for i, (hidden, their_hidden) in enumerate(zip(states.hidden, expected.hidden_states)):
    compare.assert_close(f"{kind} hidden {i}", hidden, their_hidden.detach(), 2e-5)
  pooled = theirs.vision_model(compare.nchw(image)).pooler_output
  compare.assert_close(f"{kind} pooled", states.pooled, pooled.detach(), 2e-5)
  compare.assert_close(
      f"{kind} projected", states.projected, expected.image_embeds.detach(), 2e-5)
  compare.assert_gradient_norms(theirs, grads)


def test_vision_through_five_steps_of_adamw(tmp_path):
  theirs, ours, params, image = vision_tower("openai", tmp_path)
  compare.assert_five_adamw_steps(
      theirs, lambda module: module(compare.nchw(image)).image_embeds.square().mean(),
      lambda params: (ours.apply({"params": params}, image).projected ** 2).mean(), params)


@pytest.mark.parametrize("kind", VISIONS)
def test_vision_config_is_written_as_it_was(kind, tmp_path):
  _, ours, _, _ = vision_tower(kind, tmp_path)
  written = json.loads(json.dumps(clip_configs.write_image_encoder(ours)))
  assert clip_configs.read_image_encoder(written) == ours
  before = json.loads((tmp_path / "config.json").read_text())
  assert not {key for key, value in written.items() if before.get(key) != value}


@pytest.mark.parametrize("ours", [
    CLIPText(), CLIPText(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu",
                         projection=1280)], ids=["L", "bigG"])
def test_text_towers_of_full_size_have_the_shapes_of_transformers(ours):
  words = tokenizer.train(["a red circle"], length=9, vocab_size=520)
  config = clip_configs.write_text_encoder(ours, words)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), np.zeros((1, 77), np.int32))["params"]
  assert_same_shapes(getattr(transformers, config["architectures"][0]),
                     transformers.CLIPTextConfig.from_dict(config), shapes)


@pytest.mark.parametrize("ours", [
    CLIPVision(), CLIPVision(width=1664, layers=48, mlp_width=8192, activation="gelu",
                             projection=1280)], ids=["L", "bigG"])
def test_image_towers_of_full_size_have_the_shapes_of_transformers(ours):
  config = transformers.CLIPVisionConfig.from_dict(clip_configs.write_image_encoder(ours))
  image = np.zeros((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), image)["params"]
  assert_same_shapes(transformers.CLIPVisionModelWithProjection, config, shapes)


def assert_same_shapes(tower, config, shapes):
  with torch.device("meta"):
    theirs = {names.canonical(name): tuple(tensor.shape)
              for name, tensor in tower(config).state_dict().items()}
  assert theirs == {names.to_diffusers(path): names.shape_to_torch(path, leaf.shape)
                    for path, leaf in pytrees.flatten(shapes).items()}
