"""Model folders: bit-exact round trips, and what is wrong with a folder told by name."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sdjax import pytrees
from sdjax.checkpoints import (
  clip_configs,
  diffusers,
  model_configs,
  sources,
  unet_configs,
)
from sdjax.cli import convert
from sdjax.data import tokenizer
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.models.presets import PRESETS, preset
from sdjax.stable_diffusion import StableDiffusion


def build(name="tiny"):
  modules = preset(name)
  words = tokenizer.train(["a red circle"], length=16, vocab_size=520)
  schedule = schedules.Schedule("scaled_linear", 0.001, 0.02)
  text = modules["text_encoders"][0].clone(
      vocab_size=words.vocab_size, max_length=words.length, eos_id=words.eos_id)
  return StableDiffusion(
      unet=modules["unet"], vae=modules["vae"], text_encoders=(text,), tokenizers=(words,),
      schedule=schedule, prediction_type="v_prediction",
      scheduler_config=schedules.to_config(schedule, "v_prediction"))


@pytest.fixture(scope="module")
def model():
  sd = build()
  rng = np.random.default_rng(0)
  return sd, jax.tree.map(
      lambda leaf: rng.standard_normal(leaf.shape, np.float32), sd.param_shapes())


@pytest.fixture
def folder(model, tmp_path):
  diffusers.save(tmp_path / "model", *model)
  return tmp_path / "model"


def edit_json(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change):
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


def assert_same_bits(a, b):
  a, b = pytrees.flatten(a), pytrees.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_keeps_every_bit_and_the_model(model, tmp_path, dtype):
  sd, params = model[0], pytrees.cast(model[1], dtype)
  diffusers.save(tmp_path / "new" / "model", sd, params)
  sd_again, again = diffusers.load(tmp_path / "new" / "model", dtype=None)
  assert_same_bits(params, again)
  assert sd_again == sd
  assert sd_again.scheduler_config == sd.scheduler_config
  np.testing.assert_array_equal(sd_again.tokenize(["a red circle"]), sd.tokenize(["a red circle"]))


def test_load_casts_as_asked(model, folder):
  _, params = diffusers.load(folder, "bfloat16")
  assert_same_bits(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model[1]))


def test_parameters_on_devices_are_saved_too(model, folder, tmp_path):
  diffusers.save(tmp_path / "b", model[0], jax.tree.map(jnp.asarray, model[1]))
  for network in model[1]:
    file = diffusers.STEMS[network] + ".safetensors"
    same = (folder / network / file).read_bytes() == (tmp_path / "b" / network / file).read_bytes()
    assert same, network


@pytest.mark.parametrize("name", PRESETS)
def test_configs_of_all_presets_are_invertible(name):
  modules = preset(name)
  words = build().tokenizers[0]
  through_json = lambda config: json.loads(json.dumps(config))
  unet = modules["unet"]
  assert unet_configs.read(through_json(unet_configs.write(unet))) == unet
  if "vae" in modules:
    vae = modules["vae"]
    assert model_configs.read_vae(through_json(model_configs.write_vae(vae, 64))) == vae
  for text in modules.get("text_encoders", ()):
    assert clip_configs.read_text_encoder(
        through_json(clip_configs.write_text_encoder(text, words))) == text


def test_files_of_other_versions_are_read(model, folder):
  def as_released(tensors):  # transformers 5, without the prefix, and transformers 4's extra
    for name in list(tensors):
      tensors[name.removeprefix("text_model.")] = tensors.pop(name)
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]

  edit_tensors(folder / "text_encoder" / "model.safetensors", as_released)
  assert_same_bits(diffusers.load(folder)[1], model[1])


def test_config_without_an_option_means_the_default_of_diffusers():
  assert unet_configs.read({"cross_attention_dim": 768}) == preset("sd15")["unet"]


@pytest.mark.parametrize("file, changes, told", [
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2, 3]}, "transformer_layers"),
    ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type"),
    ("unet/config.json", {"norm_eps": "small"}, "norm_eps"),
    ("unet/config.json", {"invented_later": 3}, "invented_later"),
    ("unet/config.json", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types"),
    ("unet/config.json", {"up_block_types": ["SimpleUpBlock"] * 2}, "SimpleUpBlock"),
    ("unet/config.json", {"block_out_channels": "wide"}, "block_out_channels"),
    ("unet/config.json", {"attention_head_dim": [2, None]}, "attention_head_dim"),
    ("unet/config.json", {"norm_num_groups": 7}, "cannot be built"),
    ("unet/config.json", {"cross_attention_dim": 31}, "to_k"),
    ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean"),
    ("vae/config.json", {"use_quant_conv": False}, "quant_conv"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "relu"),
    ("text_encoder/config.json", {"model_type": "t5"}, "t5"),
    ("text_encoder/config.json", {"vocab_size": 100}, "tokenizer"),
    ("text_encoder/config.json", {"num_hidden_layers": 2}, "encoder.layers.1"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "sigmoid"),
    ("scheduler/scheduler_config.json", {"prediction_type": "x0"}, "x0"),
    ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
    ("model_index.json", {"unet": None}, "without unet"),
])
def test_what_is_not_supported_is_told(folder, file, changes, told):
  edit_json(folder / file, **changes)
  with pytest.raises(UserError, match=told):
    diffusers.load(folder)


def drop(tensors):
  del tensors["conv_in.weight"], tensors["conv_out.bias"]


def add(tensors):
  tensors["controlnet.weight"] = np.zeros(3, np.float32)


def reshape(tensors):
  tensors["conv_in.weight"] = tensors["conv_in.weight"].transpose(2, 3, 1, 0).copy()


def to_integers(tensors):
  tensors["conv_in.bias"] = tensors["conv_in.bias"].astype(np.int32)


@pytest.mark.parametrize("change, told", [
    (drop, "conv_in.weight, conv_out.bias"), (add, "controlnet.weight"),
    (reshape, "conv_in.weight"), (to_integers, "conv_in.bias")])
def test_wrong_tensors_are_told_by_name(folder, change, told):
  edit_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", change)
  with pytest.raises(UserError, match=told):
    diffusers.load(folder)


def test_numbers_too_large_for_the_dtype_are_told(folder):
  def enlarge(tensors):
    tensors["conv_in.bias"][0] = 1e6

  edit_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", enlarge)
  with pytest.raises(UserError, match="float16.*conv_in.bias"):
    diffusers.load(folder, "float16")
  diffusers.load(folder, "bfloat16")


@pytest.mark.parametrize("file", [
    "model_index.json", "unet/config.json", "scheduler/scheduler_config.json",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_missing_and_broken_files_are_told(folder, file):
  path = folder / file
  whole = path.read_bytes()
  lies = struct.pack("<Q", 2**62) + whole[8:]
  for content in (b"\x80\x04pickle", whole[:-20], lies, b""):
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
      diffusers.load(folder)
  path.unlink()
  with pytest.raises(UserError, match=path.name):
    diffusers.load(folder)


def test_missing_folder_is_told(tmp_path):
  with pytest.raises(UserError, match="nowhere"):
    diffusers.load(tmp_path / "nowhere")


def test_save_replaces_a_model_and_nothing_else(model, folder, tmp_path):
  changed = jax.tree.map(lambda x: x + 1, model[1])
  diffusers.save(folder, model[0], changed)
  assert_same_bits(diffusers.load(folder)[1], changed)
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter").write_text("years of work")
  with pytest.raises(UserError, match="thesis"):
    diffusers.save(tmp_path / "thesis", *model)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]


def test_interrupted_save_leaves_the_old_model_and_no_litter(model, folder, tmp_path):
  unsaveable = {network: tree for network, tree in model[1].items() if network != "text_encoder"}
  with pytest.raises(KeyError):
    diffusers.save(folder, model[0], unsaveable)
  with pytest.raises(KeyError):
    diffusers.save(tmp_path / "other", model[0], unsaveable)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  assert_same_bits(diffusers.load(folder)[1], model[1])


def test_save_without_a_scheduler_config_writes_the_schedule(model, tmp_path):
  sd = dataclasses.replace(model[0], scheduler_config={})
  diffusers.save(tmp_path / "model", sd, model[1])
  assert diffusers.describe(tmp_path / "model") == model[0]


def test_convert_changes_the_dtype_and_verifies(model, folder, tmp_path, capsys):
  assert convert.main([str(folder), str(tmp_path / "half"), "--dtype", "float16"]) == 0
  assert_same_bits(diffusers.load(tmp_path / "half", None)[1], pytrees.cast(model[1], "float16"))
  with pytest.raises(UserError, match="choose another DST"):
    convert.main([str(folder), str(folder)])
  other = jax.tree.map(lambda x: x + 1, model[1])
  with pytest.raises(UserError, match="differently"):
    convert.verify(folder, model[0], other)


def test_inspect_tells_what_a_folder_is(model, folder, capsys):
  assert convert.main(["--inspect", str(folder)]) == 0
  told = capsys.readouterr().out
  for part in ("v_prediction", f"{pytrees.count(model[1]['unet']):,} parameters, float32",
               "scaled_linear", "unet/config.json"):
    assert part in told


def test_a_run_that_exported_a_model_is_a_source(model, folder, tmp_path):
  assert_same_bits(sources.load(tmp_path)[1], model[1])  # tmp_path/model is the folder
  with pytest.raises(UserError, match="nowhere"):
    sources.load(tmp_path / "nowhere")
