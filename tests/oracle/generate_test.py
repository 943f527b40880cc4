"""Whole pipelines against diffusers': 5-step latents of every way of making pictures."""

import dataclasses
import functools
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from sdjax import control, denoise, edit, generate
from sdjax.checkpoints import adapter_configs, lora, unet_configs
from sdjax.checkpoints import diffusers as folders

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
compare = pytest.importorskip("compare")
families = pytest.importorskip("diffusers_test")

pytestmark = pytest.mark.oracle

ATOL = 2e-4
HEIGHT, WIDTH = 32, 48
SIZE = dict(height=HEIGHT, width=WIDTH)
NEGATIVE = ["a triangle", ""]
NOISE = np.random.default_rng(0).standard_normal((2, 8, 12, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)
HINTS = np.random.default_rng(2).uniform(0, 1, (2, 2, HEIGHT, WIDTH, 3)).astype(np.float32)
MASKS = np.zeros((2, HEIGHT, WIDTH), np.float32)
MASKS[0, 5:20, 9:33] = MASKS[1, :, 20:] = 1

OURS = dict(steps=5, seeds=[0, 1], negative_prompts=NEGATIVE, init_latents=NOISE)
THEIRS = dict(num_inference_steps=5, negative_prompt=NEGATIVE, output_type="latent")


def small(unet):
  """Returns a shallower UNet of the same family: less to compile; unet_test.py has deep ones.

  SDXL's keeps its three levels, where an adapter's features come in.
  """
  config = dict(unet.config) | {"transformer_layers_per_block": 1}
  if not unet.config.addition_embed_type:
    config |= {name: config[name][:1] for name in ("block_out_channels", "down_block_types")}
    config |= {"up_block_types": config["up_block_types"][-1:], "attention_head_dim": 4}
  return compare.perturb(diffusers.UNet2DConditionModel.from_config(config), 0)


@functools.cache
def model(family):
  """(the pipeline in PyTorch, sd, params)."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    folder = Path(folder)
    pipeline = families.make_pipeline(folder, family)
    pipeline.register_modules(unet=small(pipeline.unet))
    pipeline.save_pretrained(folder / "model")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "model")
    sd, params = folders.load(folder / "model")
  pipeline.set_progress_bar_config(disable=True)
  return pipeline, sd, params


@pytest.fixture(autouse=True)
def one_decoder(monkeypatch):
  """Compiles the decoder once: all these models have the same beside their UNets."""
  decode, (_, first, _) = generate.decode, model("sd1")

  def shared(sd, params, *rest):
    return decode(first if sd.vae == first.vae else sd, {"vae": params["vae"]}, *rest)
  monkeypatch.setattr(generate, "decode", shared)


def as_pipeline(name, family, **parts):
  """Returns another pipeline of diffusers with the same networks."""
  pipeline, *_ = model(family)
  components = {key: part for key, part in pipeline.components.items() if key != "image_encoder"}
  if "safety_checker" in components:
    parts["requires_safety_checker"] = False
  made = getattr(diffusers, name)(**components | parts)
  made.set_progress_bar_config(disable=True)
  return made


def with_scheduler(family, name):
  """Returns another scheduler for the same noise levels."""
  config = dict(model(family)[0].scheduler.config) | {"skip_prk_steps": True}
  return getattr(diffusers, name).from_config(config | {"_class_name": name})


def without_chance(monkeypatch, pipeline):
  """Lets a pipeline start from `NOISE`, and encode images to the mean of their latents."""
  module = __import__(type(pipeline).__module__, fromlist=["randn_tensor"])
  monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: compare.nchw(NOISE))
  if hasattr(module, "retrieve_latents"):
    monkeypatch.setattr(
        module, "retrieve_latents", lambda output, **_: output.latent_dist.mode())


def pixels(images):
  """[-1, 1] -> [0, 1], as diffusers takes them."""
  return compare.nchw((images + 1) / 2)


def assert_same(name, made, theirs):
  images, latents = made
  assert images.shape == (2, HEIGHT, WIDTH, 3) and np.isfinite(images).all()
  compare.assert_close(name, latents, compare.nhwc(theirs.images), ATOL)


@pytest.mark.parametrize("family, rescale", [
    ("sd1", 0.0), ("sd1", 0.6), ("sd2", 0.7), ("sdxl", 0.0)])
def test_text_to_image(family, rescale):
  pipeline, sd, params = model(family)
  theirs = pipeline(families.WORDS, latents=compare.nchw(NOISE), guidance_scale=4.0,
                    guidance_rescale=rescale, **THEIRS, **SIZE)
  assert_same(f"{family} {rescale}", generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, guidance_rescale=rescale, **OURS, **SIZE),
      theirs)


def test_sdxl_is_told_sizes():
  """Theirs one by one: of several images, diffusers 0.42 mixes up sizes and negative sizes."""
  pipeline, sd, params = model("sdxl")
  sizes = np.array([[640, 480, 7, 9, 256, 512], [32, 48, 0, 3, 99, 77]])
  negative_sizes = np.array([[64, 48, 1, 2, 33, 44], [500, 400, 30, 20, 32, 48]])
  _, latents = generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, sizes=sizes, negative_sizes=negative_sizes,
      **OURS, **SIZE)
  names = "original_size", "crops_coords_top_left", "target_size"
  for n in range(2):
    told = {prefix + name: tuple(pair.tolist())
            for prefix, numbers in (("", sizes[n]), ("negative_", negative_sizes[n]))
            for name, pair in zip(names, numbers.reshape(3, 2))}
    theirs = pipeline(
        families.WORDS[n], latents=compare.nchw(NOISE[n:n + 1]), guidance_scale=4.0, **told,
        **THEIRS | dict(negative_prompt=NEGATIVE[n]), **SIZE)
    compare.assert_close(f"sizes {n}", latents[n:n + 1], compare.nhwc(theirs.images), ATOL)


@pytest.mark.parametrize("family, scheduler, strength", [
    ("sd1", "DDIMScheduler", 0.5), ("sd1", "DDIMScheduler", 1.0), ("sd2", "DDIMScheduler", 0.5),
    ("sd1", "DPMSolverMultistepScheduler", 0.7), ("sd1", "HeunDiscreteScheduler", 0.7),
    ("sd1", "PNDMScheduler", 0.7)])
def test_image_to_image(monkeypatch, family, scheduler, strength):
  _, sd, params = model(family)
  pipeline = as_pipeline("StableDiffusionImg2ImgPipeline", family,
                         scheduler=with_scheduler(family, scheduler))
  without_chance(monkeypatch, pipeline)
  theirs = pipeline(families.WORDS, image=pixels(IMAGES), strength=strength, guidance_scale=4.0,
                    **THEIRS)
  sd = dataclasses.replace(sd, scheduler_config=dict(pipeline.scheduler.config))
  assert_same(f"{family} {scheduler} {strength}", edit.image_to_image(
      sd, params, families.WORDS, IMAGES, strength=strength, guidance_scale=4.0, **OURS), theirs)


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_inpaint(monkeypatch, family, strength):
  _, sd, params = model(family)
  pipeline = as_pipeline("StableDiffusionInpaintPipeline", family)
  without_chance(monkeypatch, pipeline)
  # With a UNet that reads the mask diffusers encodes the masked picture only.
  theirs = pipeline(
      families.WORDS, image=pixels(IMAGES), mask_image=torch.tensor(MASKS)[:, None],
      strength=strength, guidance_scale=4.0, **THEIRS, **SIZE)
  assert_same(f"{family} {strength}", edit.inpaint(
      sd, params, families.WORDS, IMAGES, MASKS, strength=strength, guidance_scale=4.0, **OURS),
      theirs)


def test_instruct_pix2pix():
  pipeline, sd, params = model("pix2pix")
  theirs = pipeline(families.WORDS, image=pixels(IMAGES), latents=compare.nchw(NOISE),
                    guidance_scale=4.0, image_guidance_scale=1.5, **THEIRS)
  assert_same("pix2pix", edit.instruct_pix2pix(
      sd, params, families.WORDS, IMAGES, guidance_scale=4.0, image_scale=1.5, **OURS), theirs)


def ours_of(network, ours):
  """Returns what makes a Control of a picture, and settings, by PyTorch's network."""
  shapes = jax.eval_shape(ours.init, jax.random.key(0), *ours.example())["params"]
  return functools.partial(control.Control, ours, compare.load_params(network, shapes))


@functools.cache
def controlnet(family, seed, **options):
  """(PyTorch's, ours without a picture)."""
  pipeline, *_ = model(family)
  torch.manual_seed(seed)
  theirs = compare.perturb(diffusers.ControlNetModel.from_unet(
      pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16), **options), seed)
  return theirs, ours_of(theirs, unet_configs.read(
      dict(theirs.config) | {"_class_name": "ControlNetModel"}))


@pytest.mark.parametrize("family, count, guess", [
    ("sd1", 1, False), ("sd1", 1, True), ("sd1", 2, False), ("sd1", 2, True), ("sd2", 1, False),
    ("sdxl", 1, False), ("sdxl", 1, True)])
def test_controlnets(family, count, guess):
  _, sd, params = model(family)
  nets = [controlnet(family, seed) for seed in range(count - 1)]
  nets.append(controlnet(family, 7, controlnet_conditioning_channel_order="bgr"))
  scale, start, end = [0.8, 1.3][:count], [0.0, 0.2][:count], [0.7, 1.0][:count]
  xl = "XL" if sd.is_xl else ""
  pipeline = as_pipeline(f"StableDiffusion{xl}ControlNetPipeline", family,
                         controlnet=[theirs for theirs, _ in nets])
  theirs = pipeline(
      families.WORDS, image=[compare.nchw(hint) for hint in HINTS[:count]],
      latents=compare.nchw(NOISE), controlnet_conditioning_scale=scale,
      control_guidance_start=start, control_guidance_end=end, guess_mode=guess,
      guidance_scale=4.0, **THEIRS)
  controls = [make(hint, *settings, guess=guess)
              for (_, make), hint, *settings in zip(nets, HINTS, scale, start, end)]
  made = generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, controls=controls, **OURS, **SIZE)
  assert_same(f"{family}, {count} ControlNets", made, theirs)
  plain = generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, **OURS, **SIZE)
  assert np.abs(plain[1] - made[1]).max() > 100 * ATOL


ADAPTERS = {
    "sd1": dict(adapter_type="full_adapter", channels=[16], downscale_factor=4),
    "sdxl": dict(adapter_type="full_adapter_xl", channels=[16, 32, 32, 32], downscale_factor=8),
}


@functools.cache
def adapter(family, seed):
  torch.manual_seed(seed)
  theirs = compare.perturb(diffusers.T2IAdapter(**ADAPTERS[family]), seed)
  return theirs, ours_of(theirs, adapter_configs.read_adapter(dict(theirs.config)))


@pytest.mark.parametrize("family, count", [("sd1", 1), ("sd1", 2), ("sdxl", 1)])
def test_adapters(family, count):
  _, sd, params = model(family)
  nets = [adapter(family, seed) for seed in range(count)]
  scale, hints = [0.8, 1.3][:count], [compare.nchw(hint) for hint in HINTS[:count]]
  xl = "XL" if sd.is_xl else ""
  pipeline = as_pipeline(f"StableDiffusion{xl}AdapterPipeline", family,
                         adapter=[theirs for theirs, _ in nets] if count > 1 else nets[0][0])
  theirs = pipeline(
      families.WORDS, image=hints if count > 1 else hints[0], latents=compare.nchw(NOISE),
      adapter_conditioning_scale=scale if count > 1 else scale[0], guidance_scale=4.0, **THEIRS,
      **SIZE)
  made = generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, **OURS, **SIZE,
      controls=[make(hint, one) for (_, make), hint, one in zip(nets, HINTS, scale)])
  assert_same(f"{family}, {count} adapters", made, theirs)
  plain = generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, **OURS, **SIZE)
  assert np.abs(plain[1] - made[1]).max() > 100 * ATOL


@pytest.mark.parametrize("handoff, scheduler", [
    (0.4, "DDIMScheduler"), (0.7, "DDIMScheduler"), (0.7, "DPMSolverMultistepScheduler")])
def test_base_to_refiner(monkeypatch, handoff, scheduler):
  """Not Heun's: diffusers 0.42 ends the base in the middle of a step that the refiner repeats."""
  base, sd, params = model("sdxl")
  refiner, *other = model("refiner")
  for pipeline in (base, refiner):
    monkeypatch.setattr(pipeline, "scheduler", with_scheduler("sdxl", scheduler))
  sd = dataclasses.replace(sd, scheduler_config=dict(base.scheduler.config))
  other[0] = dataclasses.replace(other[0], scheduler_config=dict(base.scheduler.config))
  half = base(families.WORDS, latents=compare.nchw(NOISE), guidance_scale=4.0,
              denoising_end=handoff, **THEIRS, **SIZE).images
  theirs = refiner(families.WORDS, image=half, denoising_start=handoff, guidance_scale=4.0,
                   **THEIRS)
  assert_same(f"refiner {handoff} {scheduler}", edit.base_to_refiner(
      sd, params, *other, families.WORDS, handoff=handoff, guidance_scale=4.0, **OURS, **SIZE),
      theirs)


def test_latent_consistency(monkeypatch):
  """A distilled model: it reads the guidance scale, and each step draws fresh noise."""
  pipeline, sd, params = model("lcm")
  pipeline.scheduler = with_scheduler("lcm", "LCMScheduler")
  sd = dataclasses.replace(sd, scheduler_config=dict(pipeline.scheduler.config))
  words = denoise.seed_words([0, 1])
  drawn = iter(range(5))
  module = __import__(type(pipeline.scheduler).__module__, fromlist=["randn_tensor"])
  monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: compare.nchw(
      denoise.image_noise(words, denoise.STEPS, next(drawn), NOISE.shape[1:])))
  theirs = pipeline(
      families.WORDS, latents=compare.nchw(NOISE), guidance_scale=4.0, num_inference_steps=4,
      output_type="latent", **SIZE)
  assert_same("lcm", generate.text_to_image(
      sd, params, families.WORDS, guidance_scale=4.0, **OURS | dict(steps=4), **SIZE), theirs)


def test_upscale(monkeypatch):
  """With v-prediction, as released, and the text encoder and autoencoder of the tiny SD2."""
  parts, sd, params = model("sd2")
  unet = compare.perturb(families.unet(
      families.CROSS, families.PLAIN, in_channels=7, num_class_embeds=400, **families.SD2), 5)
  pipeline = diffusers.StableDiffusionUpscalePipeline(
      unet=unet, low_res_scheduler=diffusers.DDPMScheduler(
          beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
      **{key: parts.components[key] for key in ("vae", "text_encoder", "tokenizer", "scheduler")})
  pipeline.set_progress_bar_config(disable=True)
  ours = unet_configs.read(dict(unet.config) | {"_class_name": "UNet2DConditionModel"})
  shapes = jax.eval_shape(ours.init, jax.random.key(0), *ours.example())["params"]
  sd = dataclasses.replace(sd, unet=ours)
  params = params | {"unet": compare.load_params(unet, shapes)}

  small = IMAGES[:, ::4, ::4]
  noise = np.asarray(denoise.initial_noise(
      denoise.seed_words([0, 1]), denoise.LOW_RESOLUTION, small.shape[1:]))
  module = __import__(type(pipeline).__module__, fromlist=["randn_tensor"])
  monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: compare.nchw(noise))
  theirs = pipeline(families.WORDS, image=pixels(small), latents=compare.nchw(NOISE),
                    guidance_scale=4.0, noise_level=30, **THEIRS)
  assert_same("upscaler", edit.upscale(
      sd, params, families.WORDS, small, noise_level=30, guidance_scale=4.0, **OURS), theirs)


def test_lora(tmp_path):
  pipeline, sd, params = model("sd1")
  rng = np.random.default_rng(4)
  factors = {}
  for name in ("to_q", "to_k", "to_out_0"):
    module = f"unet/down_blocks_0/attentions_0/transformer_blocks_0/attn2/{name}"
    kernel = params["unet"]["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn2"][
        name]["kernel"]
    factors[module] = lora.Factors(
        down=rng.standard_normal((4, kernel.shape[0])).astype(np.float32),
        up=0.3 * rng.standard_normal((kernel.shape[1], 4)).astype(np.float32), alpha=4.0)
  lora.save(tmp_path / "lora.safetensors", factors, sd.unet, layout="peft")
  ask = dict(guidance_scale=4.0, **OURS, **SIZE)
  plain = generate.text_to_image(sd, params, families.WORDS, **ask)
  merged = lora.merge(params, [(lora.load(tmp_path / "lora.safetensors", sd.unet, params), 0.7)])
  made = generate.text_to_image(sd, merged, families.WORDS, **ask)
  pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="one")
  pipeline.set_adapters("one", 0.7)
  theirs = pipeline(families.WORDS, latents=compare.nchw(NOISE), guidance_scale=4.0, **THEIRS,
                    **SIZE)
  pipeline.unload_lora_weights()
  assert_same("lora", made, theirs)
  assert np.abs(plain[1] - made[1]).max() > 100 * ATOL
