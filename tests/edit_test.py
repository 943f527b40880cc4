"""Every way of making pictures, with networks whose answers are known in closed form."""

import dataclasses
import math
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import control, denoise, edit, generate
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.models.adapter import T2IAdapter
from sdjax.models.controlnet import ControlNet

SCHEDULE = schedules.Schedule()
DDIM = schedules.to_config(SCHEDULE, "epsilon") | {
    "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 1}
PROMPTS, NEGATIVE = ["a red circle", "a blue square"], ["a green ring", "a"]
ASK = dict(steps=5, seeds=[3, 4], guidance_scale=2.0)
SIZE = dict(height=16, width=24)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """The exact noise in latents of which each has a normal distribution around `mean`.

  Its variance, and what is added to all means, are parameters: they share one program.
  """
  in_channels: int = 4
  num_classes: int | None = None
  guidance_dim: int | None = None
  added_dim: int | None = None
  block_out_channels: tuple[int, ...] = (8, 8)
  cross_attention_dim: int = 8
  downsampling: int = 1
  sample_size: int = 8

  def mean(self, condition, read):
    """A number of the text, one of the label, and the sum of what is read."""
    mean = text_number(condition.context)[:, None, None, None] + jnp.sum(
        read, axis=-1, keepdims=True)
    return mean if condition.label is None else mean + 0.01 * condition.label[:, None, None, None]

  def apply(self, variables, x, t, condition, *, residuals=(), features=(), train, rngs):
    table = schedules.alphas_bar(SCHEDULE)
    alpha_bar = jnp.interp(t, jnp.arange(len(table)), jnp.asarray(table, jnp.float32))
    a, s = jnp.sqrt(alpha_bar)[:, None, None, None], jnp.sqrt(1 - alpha_bar)[:, None, None, None]
    latents = x[..., :4]
    variance, shift = (variables["params"][name] for name in ("variance", "shift"))
    mean = self.mean(condition, x[..., 4:]) + shift + sum(residuals) + sum(features)
    return s * (latents - a * mean) / (a**2 * variance + s**2)


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Latents are means of 4 × 4 pixels, halved, and a channel of zeros."""
  latent_channels: int = 4
  downsampling: int = 4
  scaling_factor: float = 0.5
  shift_factor: float = 0.0

  def apply(self, variables, x, method):
    if method == "decode":
      return x[..., :3].repeat(4, axis=1).repeat(4, axis=2)
    b, height, width, c = x.shape
    mean = x.reshape(b, height // 4, 4, width // 4, 4, c).mean(axis=(2, 4))
    return jnp.pad(mean, ((0, 0), (0, 0), (0, 0), (0, 5)))


@dataclasses.dataclass(frozen=True)
class Recorder(Pixels):
  """Also tells the heights of what it is given."""
  heights: ClassVar[list[int]] = []

  def apply(self, variables, x, method):
    self.heights.append(x.shape[1])
    return super().apply(variables, x, method)


@dataclasses.dataclass(frozen=True)
class Words:
  """The context of a token is its number, in thousandths."""
  max_length: int = 24
  layers: int = 1

  def apply(self, variables, tokens, method=None):
    return tokens if method else SimpleNamespace(hidden=[tokens[..., None] / 1000])


def text_number(context):
  return 10 * (context[:, 1:4] - 0.5).sum(axis=(1, 2))


@pytest.fixture(scope="module")
def model(tiny_model):
  """make(variance=, shift=, **fields of Gaussian) -> (sd, params)."""
  sd, params = tiny_model

  def make(variance=0.0, shift=0.0, **fields):
    return dataclasses.replace(
        sd, unet=Gaussian(**fields), vae=Pixels(), text_encoders=(Words(),), schedule=SCHEDULE,
        scheduler_config=DDIM), dict.fromkeys(params, {}) | {
            "unet": {"variance": np.float32(variance), "shift": np.float32(shift)}}
  return make


def numbers(model, texts):
  sd, params = model()
  return np.asarray(text_number(sd.encode_text(params, sd.tokenize(texts)).context))


def column(values):
  return np.reshape(values, (-1, 1, 1, 1))


def pictures(height=16, width=24, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def latents_of(images):
  mean = images.reshape(2, images.shape[1] // 4, 4, images.shape[2] // 4, 4, 3).mean(axis=(2, 4))
  return 0.5 * np.pad(mean, ((0, 0), (0, 0), (0, 0), (0, 1)))


def text_to_image(model, **changes):
  asked = ASK | SIZE | dict(negative_prompts=NEGATIVE) | changes
  return generate.text_to_image(*model, PROMPTS, **asked)


def test_guidance_moves_the_mean_of_each_image(model):
  wanted, unwanted = numbers(model, PROMPTS), numbers(model, NEGATIVE)
  assert np.abs(wanted - unwanted).min() > 0.1
  for scale in (1.0, 3.0, [0.5, 4.0]):
    _, latents = text_to_image(model(), guidance_scale=scale)
    expected = unwanted + np.array(scale) * (wanted - unwanted)
    np.testing.assert_allclose(latents, column(expected) * np.ones_like(latents), atol=1e-4)


def test_guidance_may_be_confined_to_an_interval_of_noise(model):
  wanted, unwanted = numbers(model, PROMPTS), numbers(model, NEGATIVE)
  guided = unwanted + 2 * (wanted - unwanted)
  # The last row alone decides where a network knows the picture.
  for interval, expected in (((0.5, 99.0), wanted), ((0.0, 0.5), guided), ((0.0, 99.0), guided)):
    _, latents = text_to_image(model(), guidance_interval=interval)
    np.testing.assert_allclose(latents, column(expected) * np.ones_like(latents), atol=1e-4)


def test_an_image_to_begin_with_needs_no_program_of_its_own(model):
  sd = model(variance=0.3)
  text_to_image(sd)
  before = denoise._denoise._cache_size()
  edit.image_to_image(*sd, PROMPTS, pictures(), strength=0.5, **ASK)
  assert denoise._denoise._cache_size() == before


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "dpmpp_sde"])
def test_watching_changes_nothing_and_may_end_it(model, sampler):
  seen = []
  _, alone = text_to_image(model(variance=0.3), sampler=sampler)
  _, watched = text_to_image(
      model(variance=0.3), sampler=sampler, every_rows=2, watch=seen.append)
  np.testing.assert_array_equal(watched, alone)
  rows = seen[0].rows
  assert [progress.row for progress in seen] == [*range(2, rows, 2), rows]
  assert seen[0].images.tolist() == [0, 1] and seen[0].denoised.shape == alone.shape

  class Enough(Exception):
    pass

  def stop(progress):
    seen.append(progress)
    raise Enough
  seen.clear()
  with pytest.raises(Enough):
    text_to_image(model(variance=0.3), sampler=sampler, every_rows=1, watch=stop)
  assert len(seen) == 1


def test_previews_show_what_the_network_takes_the_latents_to_become(model):
  seen = []
  _, latents = text_to_image(model(), every_rows=1, watch=seen.append)
  for progress in seen:
    np.testing.assert_allclose(progress.denoised, latents, atol=2e-3)


def test_strength_is_the_part_of_the_steps_that_is_run(model):
  images = pictures()
  for strength, rows in ((0.0, 0), (0.19, 0), (0.6, 3), (1.0, 5)):
    seen = []
    _, latents = edit.image_to_image(
        *model(), PROMPTS, images, strength=strength, every_rows=1, watch=seen.append, **ASK)
    assert len(seen) == rows
    if not rows:
      np.testing.assert_allclose(latents, latents_of(images), atol=1e-6)
    else:
      assert np.abs(latents - latents_of(images)).max() > 0.1


@pytest.mark.parametrize("sampler", [None, "ddim", "dpmpp_2m", "heun", "unipc"])
def test_an_image_is_made_as_noisy_as_its_first_step_wants(model, sampler):
  """Where all latents are N(m, v) the flow keeps (x - m·a) / sqrt(a² v + s²)."""
  images, variance = pictures(), 0.3
  noise = np.random.default_rng(1).standard_normal((2, 4, 6, 4)).astype(np.float32)
  _, latents = edit.image_to_image(
      *model(variance=variance), PROMPTS, images, strength=0.5, sampler=sampler,
      init_latents=noise, **ASK | dict(steps=200, guidance_scale=1.0))
  table = generate.sampler_table(model()[0], sampler, 200, skip=100)
  a, s = table.a[0], table.s[0]
  assert 0.3 < a < 0.9
  mean = column(numbers(model, PROMPTS))
  x = a * latents_of(images) + s * noise
  expected = mean + (x - a * mean) / math.sqrt(a**2 + s**2 / variance)
  np.testing.assert_allclose(latents, expected, atol=0.04)


def test_inpainting_keeps_what_is_not_masked(model):
  images, masks = pictures(), np.zeros((2, 16, 24), np.float32)
  masks[0, 4:12, 8:] = masks[1, :, :8] = 1
  inside = masks[:, ::4, ::4, None] > 0
  for strength in (0.6, 1.0):
    _, latents = edit.inpaint(
        *model(), PROMPTS, images, masks, strength=strength, **ASK | dict(guidance_scale=1.0))
    expected = np.where(inside, column(numbers(model, PROMPTS)), latents_of(images))
    np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_an_inpainting_model_reads_the_mask_and_what_is_left(model):
  images, masks = pictures(), np.zeros((2, 16, 24), np.float32)
  masks[:, :8] = 0.5
  _, latents = edit.inpaint(
      *model(in_channels=9), PROMPTS, images, masks, **ASK | dict(guidance_scale=1.0))
  left = latents_of(images * (masks < 0.5)[..., None]).sum(axis=-1, keepdims=True)
  expected = column(numbers(model, PROMPTS)) + left + (masks[:, ::4, ::4, None] >= 0.5)
  np.testing.assert_allclose(latents, expected * np.ones_like(latents), atol=1e-4)


def test_instructions_are_guided_by_text_and_by_image(model):
  images = pictures()
  _, latents = edit.instruct_pix2pix(
      *model(in_channels=8), PROMPTS, images, image_scale=1.5, negative_prompts=NEGATIVE,
      **ASK | dict(guidance_scale=3.0))
  wanted, unwanted = (column(numbers(model, texts)) for texts in (PROMPTS, NEGATIVE))
  picture = 2 * latents_of(images).sum(axis=-1, keepdims=True)  # unscaled
  expected = unwanted + 3.0 * (wanted - unwanted) + 1.5 * picture
  np.testing.assert_allclose(latents, expected * np.ones_like(latents), atol=2e-4)


def test_upscaling_reads_the_noisy_image_and_its_level(model):
  images, level = pictures(8, 4), 250
  made, latents = edit.upscale(
      *model(in_channels=7, num_classes=350), PROMPTS, images, noise_level=level,
      **ASK | dict(guidance_scale=1.0))
  assert made.shape == (2, 32, 16, 3) and latents.shape == (2, 8, 4, 4)
  kept = np.prod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000)[:level + 1] ** 2)
  noise = denoise.image_noise(
      denoise.seed_words(ASK["seeds"]), denoise.LOW_RESOLUTION, 0, (8, 4, 3))
  read = math.sqrt(kept) * images + math.sqrt(1 - kept) * np.asarray(noise)
  expected = column(numbers(model, PROMPTS)) + 0.01 * level + read.sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(latents, expected * np.ones_like(latents), atol=2e-4)


@pytest.mark.parametrize("sampler", [None, "ddim", "heun", "dpm2"])
def test_handing_over_to_oneself_changes_nothing(model, sampler):
  """Samplers that remember nothing from one step to the next."""
  sd = model(variance=0.3)
  _, whole = text_to_image(sd, sampler=sampler)
  for handoff in (0.0, 0.5, 1.0):
    _, latents = edit.base_to_refiner(
        *sd, *sd, PROMPTS, handoff=handoff, sampler=sampler, negative_prompts=NEGATIVE,
        **ASK | SIZE)
    np.testing.assert_allclose(latents, whole, atol=1e-4)


def test_the_refiner_has_the_last_word(model):
  for handoff, shift in ((0.5, 2.0), (1.0, 0.0)):
    _, latents = edit.base_to_refiner(
        *model(), *model(shift=2.0), PROMPTS, handoff=handoff,
        **ASK | SIZE | dict(guidance_scale=1.0))
    expected = column(numbers(model, PROMPTS)) + shift
    np.testing.assert_allclose(latents, expected * np.ones_like(latents), atol=1e-4)


def test_hires_fix_enlarges_what_the_first_pass_made(model):
  ask = ASK | dict(height=32, width=48, first_height=16, first_width=24)
  noise = np.random.default_rng(2).standard_normal((2, 4, 6, 4))
  _, small = text_to_image(model(variance=0.3), negative_prompts=None, init_latents=noise)
  _, latents = edit.hires_fix(
      *model(variance=0.3), PROMPTS, strength=0.0, init_latents=noise, **ask)
  np.testing.assert_allclose(
      latents, jax.image.resize(small, (2, 8, 12, 4), "bilinear"), atol=1e-5)
  hint = hints(height=32, width=48)
  for enlarge in ("latents", "pixels"):
    images, latents = edit.hires_fix(
        *model(), PROMPTS, strength=0.6, enlarge=enlarge, controls=[
            control.Control(NET, None, hint)], **ask | dict(guidance_scale=1.0))
    assert images.shape == (2, 32, 48, 3)
    expected = column(numbers(model, PROMPTS) + hint[..., 0].mean(axis=(1, 2)))
    np.testing.assert_allclose(latents, expected * np.ones_like(latents), atol=2e-4)


class Net(ControlNet):
  """Adds the mean of the picture's first channel, in the first of two residuals."""

  def apply(self, variables, x, t, condition, hint):
    first = hint[..., 0].mean(axis=(1, 2))[:, None, None, None]
    return [first * jnp.ones_like(x[..., :1]), 0 * x[..., :1]]


class Adapter(T2IAdapter):
  """Adds the mean of the whole picture."""

  def apply(self, variables, hint):
    return [hint.mean(axis=(1, 2, 3))[:, None, None, None]]


NET = Net(block_out_channels=(8, 8), cross_attention_dim=8)


def hints(seed=0, **size):
  return 0.5 + 0.5 * pictures(seed=seed, **size)


def test_controls_add_up_by_their_scales(model):
  """Guessing leaves a tenth of the first of two residuals, and is counted as guidance counts."""
  given = [hints(seed) for seed in range(6)]
  controls = [control.Control(module, None, hint, **options) for hint, (module, options) in zip(
      given, [(NET, dict(scale=0.5)), (NET.clone(hint_order="bgr"), {}), (NET, dict(guess=True)),
                 (NET.clone(pool=True), {}), (Adapter(channels=(8, 8)), dict(scale=-1.0)),
                 (NET, dict(end=0.8))])]
  plain, steered = (text_to_image(model(), controls=some, guidance_scale=3.0)[1]
                    for some in ((), controls))
  red, blue = (np.array([hint[..., channel].mean(axis=(1, 2)) for hint in given])
               for channel in (0, 2))
  # The last control has ended before the last step, which alone decides here.
  expected = 0.5 * red[0] + blue[1] + 3.0 * (0.1 * red[2] + red[3]) - given[4].mean((1, 2, 3))
  np.testing.assert_allclose(steered - plain, column(expected) * np.ones_like(plain), atol=3e-4)


def test_controls_act_in_their_part_of_the_steps(model):
  weights = control.weights([
      control.Control(NET, None, hints(), scale=2.0, start=0.2, end=0.61),
      control.Control(NET, None, hints())], 5)
  np.testing.assert_array_equal(weights, [[0, 1], [2, 1], [2, 1], [0, 1], [0, 1]])


def test_runge_kutta_has_no_step_to_begin_or_end_at(model):
  sd, _ = model()
  with pytest.raises(UserError, match="begins with 4 steps.*2 are asked for or left"):
    edit.image_to_image(
        sd, {}, PROMPTS, **ASK, images=pictures(), strength=0.5, sampler="pndm")
  with pytest.raises(UserError, match="asks 14 times in 5 steps"):
    edit.base_to_refiner(sd, {}, sd, {}, PROMPTS, **ASK, **SIZE, handoff=0.5, sampler="pndm")


def test_large_pictures_go_through_the_autoencoder_in_tiles(model):
  sd, params = model()
  whole = edit.image_to_image(sd, params, PROMPTS, pictures(40, 24), strength=0.5, **ASK)
  sd = dataclasses.replace(sd, vae=Recorder())
  tiled = edit.image_to_image(sd, params, PROMPTS, pictures(40, 24), strength=0.5, tile=8, **ASK)
  for one, other in zip(whole, tiled, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  assert set(Recorder.heights) == {32, 8}  # of pictures, then of latents
