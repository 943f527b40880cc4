"""Properties of CLIP's towers; their numbers are checked against transformers in tests/oracle."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import clip_configs
from sdjax.errors import UserError
from sdjax.models.clip import LEGACY_EOS_ID, CLIPText, CLIPVision

BIG_TEXT = dict(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu")

# Released towers -> parameters, as transformers counts them. Other texts: presets_test.py.
RELEASED = {
    "bigG text": (CLIPText(**BIG_TEXT, projection=1280), 694_659_840),
    "L image": (CLIPVision(), 303_966_208),
    "H image": (CLIPVision(width=1280, layers=32, mlp_width=5120, activation="gelu",
                           projection=1024), 632_076_800),
    "bigG image": (CLIPVision(width=1664, layers=48, mlp_width=8192, activation="gelu",
                              projection=1280), 1_844_907_264),
}


def draw(module, inputs):
  shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
  rng = np.random.default_rng(0)
  return pytrees.map_paths(
      lambda path, leaf: path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape, np.float32),
      shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, inputs):
  return module.apply(params, inputs)


@pytest.fixture(scope="module")
def tower():
  text = CLIPText(vocab_size=50, max_length=6, width=16, layers=2, heads=2, mlp_width=32,
                  projection=4, eos_id=40)
  tokens = jnp.array([[1, 7, 9, 40, 3, 40], [1, 7, 45, 12, 40, 40]])
  return text, draw(text, tokens), tokens


@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_have_the_released_number_of_parameters(name):
  module, parameters = RELEASED[name]
  inputs = jnp.zeros((1, 77), int) if name.endswith("text") else jnp.zeros((1, 224, 224, 3))
  assert pytrees.count(jax.eval_shape(module.init, jax.random.key(0), inputs)) == parameters


def test_a_position_sees_itself_and_what_comes_before(tower):
  text, params, tokens = tower

  def output(table):
    embeddings = params["params"]["embeddings"] | {"position_embedding": {"embedding": table}}
    params_of_table = {"params": params["params"] | {"embeddings": embeddings}}
    return text.apply(params_of_table, tokens[:1]).last[0]

  # [l d] outputs by [l d] inputs: which position moves which.
  table = params["params"]["embeddings"]["position_embedding"]["embedding"]
  jacobian = jax.jit(jax.jacobian(output))(table)
  seen = np.abs(jacobian).max(axis=(1, 3)) > 0
  np.testing.assert_array_equal(seen, np.tril(np.ones((6, 6), bool)))


@pytest.mark.parametrize("eos_id, ends", [(40, (3, 4)), (LEGACY_EOS_ID, (3, 2))])
def test_a_text_is_pooled_where_it_ends(tower, eos_id, ends):
  """At the first end token, or, in the old way, at the highest id."""
  text, params, tokens = tower
  states = apply(text.clone(eos_id=eos_id), params, tokens)
  np.testing.assert_allclose(
      states.pooled, states.last[jnp.arange(2), jnp.array(ends)], rtol=1e-6)
  kernel = params["params"]["text_projection"]["kernel"]
  np.testing.assert_allclose(states.projected, states.pooled @ kernel, atol=1e-5)


def test_an_inner_state_is_the_last_of_a_tower_with_fewer_layers(tower):
  text, params, tokens = tower
  states = apply(text, params, tokens)
  np.testing.assert_allclose(
      text.apply(params, states.hidden[-1], method="normalize"), states.last, atol=1e-6)
  shorter = apply(text.clone(layers=1), params, tokens)
  assert len(states.hidden) == len(shorter.hidden) + 1 == 3
  np.testing.assert_allclose(
      text.apply(params, states.hidden[-2], method="normalize"), shorter.last, atol=1e-6)


def test_more_tokens_than_positions_are_refused(tower):
  text, params, _ = tower
  with pytest.raises(UserError, match="7 tokens"):
    text.apply(params, jnp.zeros((1, 7), jnp.int32))


@pytest.fixture(scope="module")
def viewer():
  vision = CLIPVision(image_size=6, patch_size=2, width=16, layers=2, heads=2, mlp_width=32,
                      projection=4)
  image = np.random.default_rng(1).standard_normal((1, 6, 6, 3), np.float32)
  return vision, draw(vision, image), image


def test_patches_are_a_set_but_for_their_positions(viewer):
  """Vaswani et al. 2017: attention does not know order."""
  vision, params, image = viewer
  order = np.random.default_rng(2).permutation(9)
  patches = image.reshape(3, 2, 3, 2, 3).swapaxes(1, 2).reshape(9, 2, 2, 3)
  shuffled = patches[order].reshape(3, 3, 2, 2, 3).swapaxes(1, 2).reshape(image.shape)
  projected = lambda params, image: apply(vision, params, image).projected

  assert np.abs(projected(params, image) - projected(params, shuffled)).max() > 1e-2
  nowhere = pytrees.map_paths(
      lambda path, leaf: 0 * leaf if "position" in path else leaf, params)
  np.testing.assert_allclose(
      projected(nowhere, image), projected(nowhere, shuffled), atol=1e-5)


def test_states_are_float32_whatever_is_multiplied(viewer, tower):
  for module, params, inputs in (viewer, tower):
    states = jax.eval_shape(module.clone(dtype="bfloat16").apply, params, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(states)} == {jnp.dtype("float32")}


def test_an_image_of_another_size_is_refused(viewer):
  vision, params, _ = viewer
  with pytest.raises(UserError, match="6 × 8 px"):
    vision.apply(params, jnp.zeros((1, 6, 8, 3)))


# What SDXL's second text encoder says of itself.
SDXL_SECOND = {
    "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0, "bos_token_id": 0,
    "dropout": 0.0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_size": 1280,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 5120,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 20, "num_hidden_layers": 32, "pad_token_id": 1, "projection_dim": 1280,
    "torch_dtype": "float16", "vocab_size": 49408,
}


def test_a_config_is_a_tower():
  text = clip_configs.read_text_encoder(SDXL_SECOND)
  assert text == CLIPText(**BIG_TEXT, projection=1280, eos_id=LEGACY_EOS_ID)
  plain = clip_configs.read_text_encoder(SDXL_SECOND | {"architectures": ["CLIPTextModel"]})
  assert plain == text.clone(projection=None)
  words = SimpleNamespace(bos_id=0, pad_id=1)
  for tower in (text, plain):
    assert clip_configs.read_text_encoder(clip_configs.write_text_encoder(tower, words)) == tower
  vision = CLIPVision(projection=512, activation="gelu")
  assert clip_configs.read_image_encoder(clip_configs.write_image_encoder(vision)) == vision


@pytest.mark.parametrize("read, changed", [
    (clip_configs.read_text_encoder, {"hidden_act": "relu"}),
    (clip_configs.read_text_encoder, {"layer_norm_eps": 1e-6}),
    (clip_configs.read_text_encoder, {"eos_token_id": [2, 3]}),
    (clip_configs.read_image_encoder, {"model_type": "siglip_vision_model"}),
    (clip_configs.read_image_encoder, {"architectures": ["CLIPVisionModel"]}),
    (clip_configs.read_image_encoder, {"num_channels": 4}),
])
def test_what_is_no_tower_of_clip_is_refused(read, changed):
  with pytest.raises(UserError, match=next(iter(changed))):
    read(changed)
