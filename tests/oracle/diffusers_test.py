"""Whole models of every family: folders and single files, in and out of diffusers."""

import json
import warnings

import numpy as np
import pytest

from sdjax import generate
from sdjax.checkpoints import diffusers as folders
from sdjax.checkpoints import single_file
from sdjax.data import tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
WORDS = ["a red circle", "a blue square"]


def unet(*blocks, **options):
  options = dict(layers_per_block=1, norm_num_groups=8, sample_size=8) | options
  return diffusers.UNet2DConditionModel(
      block_out_channels=(16, 32, 32)[:len(blocks)],
      down_block_types=tuple(down for down, _ in blocks),
      up_block_types=tuple(up for _, up in reversed(blocks)), **options)


def vae(**options):
  levels = 3
  return diffusers.AutoencoderKL(
      block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
      down_block_types=("DownEncoderBlock2D",) * levels,
      up_block_types=("UpDecoderBlock2D",) * levels, **options)


def text(words, width, projection=None, **options):
  config = transformers.CLIPTextConfig(
      vocab_size=words.vocab_size, hidden_size=width, intermediate_size=2 * width,
      num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=words.length,
      bos_token_id=words.bos_id, eos_token_id=words.eos_id, pad_token_id=words.pad_id,
      projection_dim=projection or width, **options)
  kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
  return kind(config)


SD2 = dict(cross_attention_dim=24, use_linear_projection=True, attention_head_dim=(2, 4))
SDXL = dict(
    use_linear_projection=True, attention_head_dim=(2, 4, 4),
    transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time",
    addition_time_embed_dim=8)
OPENCLIP = dict(hidden_act="gelu")

# family -> (diffusers' pipeline, UNet, text encoders, prediction type)
FAMILIES = {
    "sd1": ("StableDiffusionPipeline", lambda: unet(
        CROSS, PLAIN, cross_attention_dim=24, attention_head_dim=4), [(24, None, {})], "epsilon"),
    "sd2": ("StableDiffusionPipeline", lambda: unet(CROSS, PLAIN, **SD2),
            [(24, None, OPENCLIP)], "v_prediction"),
    "inpaint": ("StableDiffusionInpaintPipeline", lambda: unet(
        CROSS, PLAIN, cross_attention_dim=24, attention_head_dim=4, in_channels=9),
                [(24, None, {})], "epsilon"),
    "pix2pix": ("StableDiffusionInstructPix2PixPipeline", lambda: unet(
        CROSS, PLAIN, cross_attention_dim=24, attention_head_dim=4, in_channels=8),
                [(24, None, {})], "epsilon"),
    "sdxl": ("StableDiffusionXLPipeline", lambda: unet(
        PLAIN, CROSS, CROSS, cross_attention_dim=56,
        projection_class_embeddings_input_dim=20 + 6 * 8, **SDXL),
             [(24, None, {}), (32, 20, OPENCLIP)], "epsilon"),
    "refiner": ("StableDiffusionXLImg2ImgPipeline", lambda: unet(
        PLAIN, CROSS, PLAIN, cross_attention_dim=32,
        projection_class_embeddings_input_dim=20 + 5 * 8, **SDXL),
                [(32, 20, OPENCLIP)], "epsilon"),
}
LCM = ("LatentConsistencyModelPipeline", lambda: unet(
    CROSS, PLAIN, cross_attention_dim=24, attention_head_dim=4, time_cond_proj_dim=16),
       [(24, None, {})], "epsilon")
MAKES_PICTURES = ("sd1", "sd2", "sdxl")


def make_pipeline(folder, family):
  name, make_unet, towers, prediction = FAMILIES.get(family, LCM)
  parts = dict(unet=compare.perturb(make_unet(), 0), vae=compare.perturb(vae(), 1))
  names = ("text_encoder", "text_encoder_2")
  if family == "refiner":
    parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    names = names[1:]
  for number, (part, (width, projection, options)) in enumerate(zip(names, towers)):
    words = tokenizer.train(WORDS, length=16, vocab_size=530)
    words.save(folder / part)
    words_of = transformers.CLIPTokenizer.from_pretrained(folder / part)
    if options:  # OpenCLIP pads with the first id
      words_of.pad_token = "!"
    parts[part] = compare.perturb(text(words, width, projection, **options), 2 + number)
    parts[part.replace("text_encoder", "tokenizer")] = words_of
  if family not in ("sdxl", "refiner"):
    parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
  scheduler = diffusers.DDIMScheduler(
      beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
      set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
  return getattr(diffusers, name)(scheduler=scheduler, **parts)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
  """(family, the pipeline in PyTorch, its folder, sd, params of that folder)."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp(request.param)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pipeline = make_pipeline(folder, request.param)
    pipeline.save_pretrained(folder / "model")
    # Tokenizers read from a folder take "!" for padding where that is the padding.
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "model")
  pipeline.set_progress_bar_config(disable=True)
  return request.param, pipeline, folder / "model", *folders.load(folder / "model")


def networks(pipeline):
  names = ("unet", "vae", "text_encoder", "text_encoder_2")
  return {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}


def assert_same_networks(theirs, ours):
  theirs, ours = networks(theirs), networks(ours)
  assert theirs.keys() == ours.keys()
  for name in theirs:
    a, b = theirs[name].state_dict(), ours[name].state_dict()
    assert a.keys() == b.keys(), name
    assert all(torch.equal(a[key], b[key]) for key in a), name


def test_exported_folder_opens_in_diffusers_and_is_the_same_model(both, tmp_path):
  family, pipeline, folder, sd, params = both
  folders.save(tmp_path / "model", sd, params)
  again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
  assert type(again).__name__ == FAMILIES[family][0]
  assert_same_networks(pipeline, again)
  index, index_again = (json.loads((path / "model_index.json").read_text())
                        for path in (folder, tmp_path / "model"))
  for key in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
    assert bool(index.get(key)) == bool(index_again.get(key)), key
  for name in ("unet", "vae"):
    before, after = (json.loads(getattr(p, name).to_json_string()) for p in (pipeline, again))
    ignored = {"_name_or_path", "_diffusers_version", "_use_default_values", "sample_size",
               "shift_factor"}
    assert not {key for key in before.keys() | after.keys()
                if before.get(key) != after.get(key)} - ignored, name
  prompts = ["a red circle", "a BLUE square, and many more words than there is room for"]
  for i, name in enumerate(sd.text_names):
    words = getattr(again, name.replace("text_encoder", "tokenizer"))
    theirs = words(prompts, padding="max_length", max_length=16, truncation=True)
    np.testing.assert_array_equal(theirs["input_ids"], sd.tokenize(prompts)[:, i])


def test_exported_single_file_opens_in_diffusers_and_is_the_same_model(both, tmp_path):
  """`from_single_file` with the folder's configs, since no released model is so small."""
  family, pipeline, folder, sd, params = both
  single_file.save(tmp_path / "model.safetensors", sd, params)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    again = type(pipeline).from_single_file(
        tmp_path / "model.safetensors", config=str(folder), local_files_only=True)
  assert_same_networks(pipeline, again)


def encode(pipeline, prompts, **options):
  """(context, pooled) by diffusers."""
  made = pipeline.encode_prompt(
      prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **options)
  return (made[0], made[2]) if len(made) == 4 else (made[0], None)


@pytest.mark.parametrize("skip", [0, 1])
def test_conditions_are_those_of_the_pipeline(both, skip):
  family, pipeline, _, sd, params = both
  if skip and family not in ("sdxl", "refiner"):
    # diffusers 0.42 cannot skip layers of transformers' newest CLIPTextModel; clip_test.py does.
    pytest.skip("this pipeline skips no layers")
  options = {"clip_skip": skip} if skip else {}
  prompts = ["a red circle", "a blue square! and many more words than there is room for"]
  if family == "pix2pix":
    context, pooled = pipeline._encode_prompt(prompts, "cpu", 1, False), None
  else:
    context, pooled = encode(pipeline, prompts, **options)
  ours = sd.encode_text(params, sd.tokenize(prompts), skip=skip)
  compare.assert_close("context", ours.context, context.detach(), 2e-5)
  if pooled is not None:
    compare.assert_close("pooled", ours.pooled, pooled.detach(), 2e-5)


def test_sizes_are_those_of_the_pipeline(both):
  family, pipeline, _, sd, _ = both
  if family == "sdxl":
    theirs = pipeline._get_add_time_ids(
        (32, 48), (0, 0), (32, 48), torch.float32, text_encoder_projection_dim=20)
    np.testing.assert_array_equal(sd.default_sizes(1, 32, 48), theirs)
  elif family == "refiner":
    theirs = pipeline._get_add_time_ids(
        (32, 48), (0, 0), (32, 48), 6.0, 2.5, (32, 48), (0, 0), (32, 48), torch.float32,
        text_encoder_projection_dim=20)
    for negative, ids in enumerate(theirs):
      np.testing.assert_array_equal(sd.default_sizes(1, 32, 48, bool(negative)), ids)
  else:
    assert sd.default_sizes(1, 32, 48) is None


@pytest.mark.parametrize("negative", [None, "a circle"])
def test_pictures_are_those_of_the_pipeline(both, negative):
  family, pipeline, _, sd, params = both
  if family not in MAKES_PICTURES:
    with pytest.raises(generate.UserError, match="channels") if family != "refiner" else (
        warnings.catch_warnings()):
      generate.text_to_image(sd, params, ["a"], steps=1, guidance_scale=1, seeds=[0], height=32,
                             width=32)
    return
  noise = np.random.default_rng(0).standard_normal((2, 8, 12, 4), np.float32)
  theirs = pipeline(
      WORDS, negative_prompt=negative and [negative] * 2, latents=compare.nchw(noise), height=32,
      width=48, num_inference_steps=4, guidance_scale=4.0, output_type="latent").images
  _, ours = generate.text_to_image(
      sd, params, WORDS, steps=4, guidance_scale=4.0, seeds=[0, 1], height=32, width=48,
      negative_prompts=negative and [negative] * 2, init_latents=noise)
  compare.assert_close("latents", ours, compare.nhwc(theirs), 1e-4)


def test_a_distilled_model_is_guided_by_its_embedding(tmp_path):
  pipeline = make_pipeline(tmp_path, "lcm")
  pipeline.scheduler = diffusers.LCMScheduler(
      beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
  pipeline.save_pretrained(tmp_path / "model")
  sd, params = folders.load(tmp_path / "model")
  folders.save(tmp_path / "again", sd, params)
  again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
  assert_same_networks(pipeline, again)
  x = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
  condition = sd.encode_text(params, sd.tokenize(WORDS[:1]))._replace(
      guidance=np.array([7.5], np.float32))
  w = pipeline.get_guidance_scale_embedding(torch.tensor([6.5]), 16)
  with torch.no_grad():
    theirs = again.unet(compare.nchw(x), 500, torch.tensor(np.asarray(condition.context)),
                        timestep_cond=w).sample
  ours = sd.predict(params, x, np.array([500.0], np.float32), condition)
  compare.assert_close("lcm", ours, compare.nhwc(theirs), 5e-6)
