"""Single files: bit-exact round trips, what real ones carry, and which model one is."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import diffusers, single_file, single_file_names, sources, tensors, weights
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.models.presets import preset
from sdjax.stable_diffusion import StableDiffusion

# Written by hand from the index of the released files.
RELEASED = {
    "unet/conv_in/kernel": "input_blocks.0.0.weight",
    "unet/time_embedding/linear_2/bias": "time_embed.2.bias",
    "unet/down_blocks_0/resnets_1/conv1/kernel": "input_blocks.2.0.in_layers.2.weight",
    "unet/down_blocks_0/downsamplers_0/conv/kernel": "input_blocks.3.0.op.weight",
    "unet/down_blocks_1/resnets_0/conv_shortcut/bias": "input_blocks.4.0.skip_connection.bias",
    "unet/down_blocks_2/attentions_1/transformer_blocks_0/attn2/to_out_0/kernel":
        "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0.weight",
    "unet/mid_block/resnets_1/time_emb_proj/kernel": "middle_block.2.emb_layers.1.weight",
    "unet/up_blocks_0/upsamplers_0/conv/bias": "output_blocks.2.1.conv.bias",
    "unet/up_blocks_1/upsamplers_0/conv/bias": "output_blocks.5.2.conv.bias",
    "unet/up_blocks_3/attentions_2/transformer_blocks_0/ff/net_0/proj/kernel":
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
    "unet/conv_out/kernel": "out.2.weight",
    "vae/encoder/down_blocks_1/resnets_0/conv_shortcut/kernel":
        "encoder.down.1.block.0.nin_shortcut.weight",
    "vae/decoder/up_blocks_0/upsamplers_0/conv/kernel": "decoder.up.3.upsample.conv.weight",
    "vae/decoder/mid_block/attentions_0/to_out_0/kernel": "decoder.mid.attn_1.proj_out.weight",
    "text_encoder/encoder/layers_11/mlp/fc1/kernel": "encoder.layers.11.mlp.fc1.weight",
}


def assert_same_bits(a, b):
  a, b = pytrees.flatten(a), pytrees.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path


def model(name, **changes):
  modules = preset(name)
  return StableDiffusion(
      unet=modules["unet"].clone(**changes), vae=modules["vae"],
      text_encoders=modules["text_encoders"], schedule=schedules.Schedule())


@functools.cache
def full_size(name):
  """{path: shape} of all parameters."""
  return pytrees.flatten(model(name).param_shapes())


def header(name, channels=4):
  """What `open_file` of a full-size file returns; nothing is in it."""
  sd, flat = model(name), dict(full_size(name))
  width = sd.unet.block_out_channels[0]
  flat["unet/conv_in/kernel"] = jax.ShapeDtypeStruct((3, 3, channels, width), "float32")
  return weights.to_tensors(
      single_file.places(sd, single_file_names.TEXT[single_file.family(sd)], flat), flat)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trips_keep_every_bit_through_both_formats(family, tmp_path, dtype):
  _, sd, params = family
  params = pytrees.cast(params, dtype)
  file = tmp_path / "new" / "model.safetensors"
  single_file.save(file, sd, params)
  _, from_file = single_file.load(file, None, like=sd)
  assert_same_bits(params, from_file)
  diffusers.save(tmp_path / "folder", sd, from_file)
  sd_again, from_folder = diffusers.load(tmp_path / "folder", None)
  assert_same_bits(params, from_folder)
  assert sd_again == sd


def test_names_are_those_of_the_released_files():
  places = single_file.places(
      model("sd15"), single_file_names.TEXT["sd1"], full_size("sd15"))
  prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
              "text_encoder": "cond_stage_model.transformer.text_model."}
  for path, name in RELEASED.items():
    assert places[path] == prefixes[path.partition("/")[0]] + name
  assert len(set(places.values())) == len(places)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_openclip_stacks_queries_keys_and_values(family, tmp_path):
  _, sd, params = family
  single_file.save(tmp_path / "m.safetensors", sd, params)
  stored = tensors.open_file(tmp_path / "m.safetensors")
  block = "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_"
  attention = params["text_encoder_2"]["encoder"]["layers_2"]["self_attn"]
  for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
    rows = slice(12 * i, 12 * (i + 1))
    np.testing.assert_array_equal(
        np.asarray(stored[block + "weight"])[rows], attention[part]["kernel"].T)
    np.testing.assert_array_equal(
        np.asarray(stored[block + "bias"])[rows], attention[part]["bias"])
  # A parameter x @ projection there, as here; a Dense layer of [out in] in diffusers.
  np.testing.assert_array_equal(
      np.asarray(stored["conditioner.embedders.1.model.text_projection"]),
      params["text_encoder_2"]["text_projection"]["kernel"])
  assert stored["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)


def test_what_real_files_carry_besides_is_ignored(family, tmp_path):
  name, sd, params = family
  file = tmp_path / "m.safetensors"
  single_file.save(file, sd, params)
  more = {key: np.ones(3, np.float32) for key in (
      "model_ema.diffusion_modelinput_blocks00weight", "model_ema.num_updates", "betas",
      "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_log_variance_clipped",
      "posterior_mean_coef1", "logvar", "first_stage_model.loss.logvar", "denoiser.sigmas",
      "cond_stage_model.transformer.text_model.embeddings.position_ids",
      "cond_stage_model.model.logit_scale", "cond_stage_model.model.attn_mask",
      "conditioner.embedders.0.model.visual.proj", "depth_model.model.pretrained.bias")}
  if name == "sd2":  # the layer after the last that is read
    more |= {"cond_stage_model.model.transformer.resblocks.3.ln_1.weight": np.ones(12)}
  tensors.write_file(file, tensors.open_file(file) | more)
  assert_same_bits(params, single_file.load(file, like=sd)[1])

  tensors.write_file(file, tensors.open_file(file) | {"model.diffusion_model.new": np.ones(2)})
  with pytest.raises(UserError, match="1 tensors: model.diffusion_model.new"):
    single_file.load(file, like=sd)
  assert_same_bits(params, single_file.load(file, like=sd, allow_unused=True)[1])


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_missing_and_misshaped_tensors_are_named(family, tmp_path):
  _, sd, params = family
  file = tmp_path / "m.safetensors"
  single_file.save(file, sd, params)
  stored = tensors.open_file(file)
  gone = "model.diffusion_model.out.2.weight"
  tensors.write_file(file, {name: leaf for name, leaf in stored.items() if name != gone})
  with pytest.raises(UserError, match=f"lacks 1 tensors: {gone}"):
    single_file.load(file, like=sd)
  tensors.write_file(file, stored | {gone: np.ones((3, 3), np.float32)})
  with pytest.raises(UserError, match=f"another shape.*{gone}"):
    single_file.load(file, like=sd)


@pytest.mark.parametrize("family", ["sd2"], indirect=True)
def test_sd2_in_the_layout_of_sd1_is_read(family, tmp_path):
  _, sd, params = family
  flat = pytrees.flatten(params)
  places = single_file.places(sd, single_file_names.TEXT["sd1"], flat)
  tensors.write_file(tmp_path / "m.safetensors", weights.to_tensors(places, flat))
  assert_same_bits(params, single_file.load(tmp_path / "m.safetensors", like=sd)[1])


@pytest.mark.parametrize("name, channels, kind", [
    ("sd15", 4, "sd1"), ("sd15", 9, "sd1"), ("sd15", 8, "sd1"), ("sd21", 4, "sd2"),
    ("sd21", 5, "sd2"), ("sdxl", 4, "sdxl"), ("sdxl_refiner", 4, "sdxl_refiner")])
def test_the_family_is_told_by_the_tensors(name, channels, kind, tmp_path):
  sd = model(name, in_channels=channels)
  stored = header(name, channels)
  stored[single_file.V_MEASURED] = tensors.Tensor(
      (320,), "float32", lambda: np.zeros(320, np.float32))
  found = single_file.describe(tmp_path / "m.safetensors", stored, {})
  assert found.unet == sd.unet and found.vae == sd.vae
  assert found.text_encoders == sd.text_encoders and single_file.family(found) == kind
  assert found.prediction_type == "epsilon"
  # CLIP's end token fills up short captions; OpenCLIP's towers were given "!", whose id is 0.
  assert [words.pad_id for words in found.tokenizers] == [
      0 if text.activation == "gelu" else 49407 for text in found.text_encoders]


def depths(stored):
  """Transformer blocks after each residual block of the way down, as ComfyUI counts them."""
  unet, found = "model.diffusion_model.", []
  for i in range(1, 12):
    if f"{unet}input_blocks.{i}.0.in_layers.0.weight" in stored:
      blocks = (f"{unet}input_blocks.{i}.1.transformer_blocks.{j}.norm1.bias" for j in range(12))
      found.append(sum(name in stored for name in blocks))
  return found


@pytest.mark.parametrize("name, text, linear, added, depth", [
    ("sd15", "cond_stage_model.transformer.text_model.final_layer_norm.weight", False, None,
     [1, 1, 1, 1, 1, 1, 0, 0]),
    ("sd21", "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", True, None,
     [1, 1, 1, 1, 1, 1, 0, 0]),
    ("sdxl", "conditioner.embedders.1.model.ln_final.weight", True, 2816, [0, 0, 2, 2, 10, 10]),
    ("sdxl_refiner", "conditioner.embedders.0.model.ln_final.weight", True, 2560,
     [0, 0, 4, 4, 4, 4, 0, 0]),
])
def test_files_have_what_comfyui_and_a1111_tell_families_by(name, text, linear, added, depth):
  """comfy/supported_models.py, A1111's modules/sd_models_config.py."""
  stored = header(name)
  unet = "model.diffusion_model."
  assert text in stored and depths(stored) == depth
  door = "input_blocks.4.1.proj_in.weight"
  assert len(stored[unet + door].shape) == (2 if linear else 4)
  label = stored.get(unet + "label_emb.0.0.weight")
  assert (label and label.shape[1]) == added
  assert stored[unet + "input_blocks.0.0.weight"].shape[0] == (384 if added == 2560 else 320)


@pytest.mark.parametrize("name, notes, mark, deviation, expected", [
    ("sd21", {}, None, 0.05, "epsilon"),
    ("sd21", {}, None, 0.2, "v_prediction"),
    ("sd21", {"modelspec.prediction_type": "v"}, None, 0.05, "v_prediction"),
    ("sdxl", {}, "v_pred", 0.05, "v_prediction"),
    ("sdxl", {}, None, 0.2, "epsilon"),
    ("sd15", {"modelspec.prediction_type": "v"}, None, 0.05, "v_prediction"),
])
def test_the_prediction_type_is_told_by_marks(name, notes, mark, deviation, expected, tmp_path):
  stored = header(name)
  values = np.random.default_rng(0).normal(0, deviation, 320).astype(np.float32)
  stored[single_file.V_MEASURED] = tensors.Tensor((320,), "float32", lambda: values)
  if mark:
    stored[mark] = stored["ztsnr"] = tensors.Tensor((0,), "float32", lambda: np.zeros(0))
  found = single_file.describe(tmp_path / "m.safetensors", stored, notes)
  assert found.prediction_type == expected
  assert found.schedule.zero_terminal_snr == bool(mark)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_marks_of_sdxl_that_predicts_v_are_written(family, tmp_path):
  _, sd, params = family
  file = tmp_path / "m.safetensors"
  single_file.save(file, sd, params)
  assert {"v_pred", "ztsnr"} <= tensors.open_file(file).keys()
  assert tensors.metadata(file)["modelspec.prediction_type"] == "v"
  plain = dataclasses.replace(sd, schedule=schedules.Schedule())
  single_file.save(file, plain, params)
  assert "v_pred" in tensors.open_file(file) and "ztsnr" not in tensors.open_file(file)
  single_file.save(file, dataclasses.replace(plain, prediction_type="epsilon"), params)
  assert "v_pred" not in tensors.open_file(file)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_other_files_are_told_what_they_are(family, tmp_path):
  _, sd, params = family
  file = tmp_path / "m.safetensors"
  single_file.save(file, sd, params)
  with pytest.raises(UserError, match="context is 20,.*768 .sd15.*like"):
    single_file.load(file)
  tensors.write_file(file, {"transformer.x": np.ones((2, 2, 2), np.float32)})
  with pytest.raises(UserError, match="no model, LoRA or textual inversion"):
    sources.load(file)


def test_a_network_without_names_there_is_told(tmp_path):
  extra = {"unet/time_embedding/cond_proj/kernel": jax.ShapeDtypeStruct((256, 320), "float32")}
  with pytest.raises(UserError, match="no names for 1 tensors: unet/time_embedding/cond_proj"):
    single_file.save(tmp_path / "m.safetensors", model("sd15"),
                     pytrees.unflatten(full_size("sd15") | extra))


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_parameters_go_straight_to_their_devices(family, tmp_path):
  _, sd, params = family
  single_file.save(tmp_path / "m.safetensors", sd, params)
  placed = []

  def place(path, leaf):
    placed.append(path)
    return jax.device_put(leaf)

  _, found = single_file.load(tmp_path / "m.safetensors", like=sd, place=place)
  assert sorted(placed) == sorted(pytrees.flatten(params))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
  assert_same_bits(params, jax.tree.map(np.asarray, found))
