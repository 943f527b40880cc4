"""Networks and folders against diffusers and transformers (PyTorch, CPU, float32).

Every parameter is perturbed, so that none is zero and none hides an error. Tolerances are below
what one wrong epsilon (1e-5) or a tanh gelu (7e-5) moves.
"""

import json
import warnings

import jax
import numpy as np
import pytest

from sdjax import generate
from sdjax.checkpoints import diffusers as folders
from sdjax.data import tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
compare = pytest.importorskip("compare")
assert_close, assert_gradient_norms = compare.assert_close, compare.assert_gradient_norms
nchw, nhwc, perturb = compare.nchw, compare.nhwc, compare.perturb

pytestmark = pytest.mark.oracle

# Like SD1: several heads of few channels, convolutions as doors. Like SD2: Dense doors, heads per
# level, exact gelu, v-prediction.
KINDS = {
    "sd1": dict(heads=4, linear=False, activation="quick_gelu", prediction="epsilon", middle=True),
    "sd2": dict(heads=[2, 4, 8], linear=True, activation="gelu", prediction="v_prediction",
                middle=False),
}


def make_pipeline(folder, heads, linear, activation, prediction, middle):
  words = tokenizer.train(["a red circle", "a blue square"], length=16, vocab_size=530)
  words.save(folder / "words")
  unet = diffusers.UNet2DConditionModel(
      block_out_channels=(16, 32, 48), layers_per_block=2, norm_num_groups=8,
      down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
      attention_head_dim=heads, use_linear_projection=linear, cross_attention_dim=24,
      sample_size=8)
  vae = diffusers.AutoencoderKL(
      block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4, latent_channels=4,
      down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
      mid_block_add_attention=middle)
  text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
      vocab_size=words.vocab_size, hidden_size=24, intermediate_size=48, num_hidden_layers=3,
      num_attention_heads=4, max_position_embeddings=16, hidden_act=activation,
      bos_token_id=words.bos_id, eos_token_id=words.eos_id, pad_token_id=words.pad_id))
  return diffusers.StableDiffusionPipeline(
      unet=perturb(unet, 0), vae=perturb(vae, 1), text_encoder=perturb(text, 2),
      tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
      scheduler=diffusers.DDIMScheduler(
          beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
          set_alpha_to_one=False, steps_offset=1, prediction_type=prediction),
      safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
  """The pipeline in PyTorch, and (sd, params) of the folder that it saves."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp(request.param)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pipeline = make_pipeline(folder, **KINDS[request.param])
    pipeline.save_pretrained(folder / "model")
  pipeline.set_progress_bar_config(disable=True)
  return pipeline, *folders.load(folder / "model")


def unet_inputs(side=(9, 13)):
  rng = np.random.default_rng(0)
  return (rng.standard_normal((2, *side, 4), np.float32), np.array([981, 3], np.float32),
          rng.standard_normal((2, 7, 24), np.float32))


@pytest.mark.parametrize("side", [(8, 8), (9, 13)], ids=str)
def test_unet(both, side):
  pipeline, sd, params = both
  x, t, context = unet_inputs(side)
  with torch.no_grad():
    theirs = pipeline.unet(nchw(x), torch.tensor(t), torch.tensor(context)).sample
  ours = jax.jit(sd.unet.apply)({"params": params["unet"]}, x, t, context)
  assert_close("unet", ours, nhwc(theirs), 5e-6)


def test_unet_gradient_norms(both):
  pipeline, sd, params = both
  x, t, context = unet_inputs()
  pipeline.unet(nchw(x), torch.tensor(t), torch.tensor(context)).sample.square().sum().backward()
  grads = jax.jit(jax.grad(lambda params: (
      sd.unet.apply({"params": params}, x, t, context) ** 2).sum()))(params["unet"])
  assert_gradient_norms(pipeline.unet, grads)


def test_text_encoder(both):
  pipeline, sd, params = both
  tokens = np.random.default_rng(0).integers(0, 500, (3, 16))
  theirs = pipeline.text_encoder(torch.tensor(tokens)).last_hidden_state
  theirs.square().sum().backward()
  apply = lambda params: sd.text_encoders[0].apply({"params": params}, tokens)
  assert_close("text", jax.jit(apply)(params["text_encoder"]), theirs.detach(), 2e-5)
  grads = jax.jit(jax.grad(lambda params: (apply(params) ** 2).sum()))(params["text_encoder"])
  assert_gradient_norms(pipeline.text_encoder, grads)


def test_vae(both):
  pipeline, sd, params = both
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (2, 34, 45, 3)).astype(np.float32)
  latents = rng.standard_normal((2, 5, 7, 4), np.float32)
  moments = pipeline.vae.encode(nchw(image)).latent_dist.parameters
  decoded = pipeline.vae.decode(nchw(latents)).sample
  (moments.square().sum() + decoded.square().sum()).backward()

  def apply(params):
    variables = {"params": params}
    return (sd.vae.apply(variables, image, method="encode"),
            sd.vae.apply(variables, latents, method="decode"))

  ours = jax.jit(apply)(params["vae"])
  assert_close("encode", ours[0], nhwc(moments), 1e-5)
  assert_close("decode", ours[1], nhwc(decoded), 5e-5)
  grads = jax.jit(jax.grad(lambda params: sum((y ** 2).sum() for y in apply(params))))(
      params["vae"])
  assert_gradient_norms(pipeline.vae, grads)


def test_exported_folder_opens_in_diffusers_and_is_the_same_model(both, tmp_path):
  pipeline, sd, params = both
  folders.save(tmp_path / "model", sd, params)
  again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
  for name in ("unet", "vae", "text_encoder"):
    theirs, ours = (getattr(p, name).state_dict() for p in (pipeline, again))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs), name
  for name in ("unet", "vae"):
    before, after = (json.loads(getattr(p, name).to_json_string()) for p in (pipeline, again))
    ignored = {"_name_or_path", "_diffusers_version", "_use_default_values", "sample_size"}
    changed = {key for key in before.keys() | after.keys()
               if before.get(key) != after.get(key)} - ignored
    # One number for all levels is written out per level.
    assert changed <= {"attention_head_dim"}
  prompts = ["a red circle", "a BLUE square, and many more words than there is room for"]
  theirs = again.tokenizer(prompts, padding="max_length", max_length=16, truncation=True)
  np.testing.assert_array_equal(theirs["input_ids"], sd.tokenize(prompts)[:, 0])


def test_pictures_are_those_of_the_pipeline(both):
  pipeline, sd, params = both
  noise = np.random.default_rng(0).standard_normal((2, 8, 12, 4), np.float32)
  prompts = ["a red circle", "a blue square"]
  theirs = pipeline(
      prompts, negative_prompt=["a circle"] * 2, latents=nchw(noise), height=32, width=48,
      num_inference_steps=4, guidance_scale=4.0, output_type="latent").images
  _, ours = generate.text_to_image(
      sd, params, prompts, steps=4, guidance_scale=4.0, seeds=[0, 1], height=32, width=48,
      negative_prompts=["a circle"] * 2, init_latents=noise)
  assert_close("latents", ours, nhwc(theirs), 1e-4)
