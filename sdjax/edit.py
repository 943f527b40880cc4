"""Edits and enlarges pictures: an image, or what another model made of it, beside the prompts.

Every function here turns its image into a `generate.Task`: latents to begin with, channels for the
UNet to read, or rows of the sampler's table to leave out. Keyword arguments that are not explained
are fields of `generate.Request`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sdjax import denoise, generate
from sdjax.diffusion import schedules
from sdjax.errors import UserError
from sdjax.generate import Request, Task
from sdjax.stable_diffusion import Params, StableDiffusion

Result = tuple[np.ndarray, np.ndarray]  # images [n H W 3] in [-1, 1], latents [n h w c]

# That of the released x4 upscaler's low_res_scheduler, and the most noise that it was shown.
AUGMENTATION = schedules.Schedule(beta_start=0.0001, beta_end=0.02)
MAX_NOISE_LEVEL = 350


def image_to_image(
    sd: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    images: np.ndarray,  # [n H W 3] in [-1, 1]
    *,
    strength: float,
    **options,
) -> Result:
  """Makes images anew from noisy ones (SDEdit, Meng et al. 2022, arxiv.org/abs/2108.01073).

  Args:
    sd, params, prompts, options: see `generate.text_to_image`.
    images: one for each prompt.
    strength: the part of the steps that is run: 0 changes nothing, 1 leaves next to nothing.

  Returns:
    images and latents, as `generate.text_to_image`.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  generate.check_channels(sd, 0, False, "starting from an image")
  request, skip = _edit(sd, prompts, images, strength, options)
  latents = generate.encode(sd, params, request, images)
  return generate.make(sd, params, request, Task(start=latents, skip=skip))


def inpaint(
    sd: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    images: np.ndarray,  # [n H W 3] in [-1, 1]
    masks: np.ndarray,   # [n H W] in [0, 1]
    *,
    strength: float = 1.0,
    **options,
) -> Result:
  """Makes anew what lies under a mask.

  With a UNet that reads the mask and the masked picture (Rombach et al. 2022, section 4.5) these
  are further channels; with any other the latents outside of the mask are set after each step to
  the picture's own, as noisy (RePaint, Lugmayr et al. 2022, arxiv.org/abs/2201.09865, eq. 8).

  Args:
    sd, params, prompts, images, strength, options: see `image_to_image`.
    masks: 0.5 and more is made anew.

  Returns:
    images and latents; outside of the mask images are those given but for the autoencoder.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  c = sd.vae.latent_channels
  reads_mask = sd.unet.in_channels != c
  generate.check_channels(sd, (1 + c) * reads_mask, False, "inpainting")
  request, skip = _edit(sd, prompts, images, strength, options)
  if masks.shape != images.shape[:3]:
    raise UserError(f"masks have shape {list(masks.shape)}, the images "
                    f"{list(images.shape[:3])}, [n H W]; resize the masks")
  if not np.isfinite(masks).all() or masks.min() < 0 or masks.max() > 1:
    raise UserError("masks hold values outside [0, 1] or NaN; divide 8-bit ones by 255")
  mask = (masks >= 0.5).astype(np.float32)[..., None]
  f = sd.vae.downsampling
  small = np.ascontiguousarray(mask[:, ::f, ::f])
  start = None
  if skip or not reads_mask:
    start = generate.encode(sd, params, request, images)
  if not reads_mask:
    return generate.make(sd, params, request, Task(start=start, skip=skip, mask=small))
  masked = generate.encode(sd, params, request, images * (1 - mask))
  read = np.concatenate([small, masked], axis=-1)
  return generate.make(sd, params, request, Task(start=start, skip=skip, appended=(read, read)))


def instruct_pix2pix(
    sd: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    images: np.ndarray,  # [n H W 3] in [-1, 1]
    *,
    image_scale: float,
    **options,
) -> Result:
  """Follows instructions to change images (Brooks et al. 2023, https://arxiv.org/abs/2211.09800).

  Args:
    sd, params, options: see `generate.text_to_image`; guidance_scale is that of the text.
    prompts: what to do, "make it snow".
    images: one for each prompt.
    image_scale: of guidance towards the image; 1 is off, 1.5 is usual.

  Returns:
    images and latents.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  generate.check_channels(sd, sd.vae.latent_channels, False, "instruct-pix2pix")
  if not 0 <= image_scale < np.inf:
    raise UserError(f"image_scale is {image_scale}; it must not be negative (1 is off)")
  request, _ = _edit(sd, prompts, images, 1.0, options)
  scaled = generate.encode(sd, params, request, images)
  # This model was trained on the latents as the autoencoder makes them.
  read = scaled / np.float32(sd.vae.scaling_factor) + np.float32(sd.vae.shift_factor)
  return generate.make(sd, params, request, Task(
      appended=(read, read, np.zeros_like(read)), image_scale=image_scale))


def upscale(
    sd: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    images: np.ndarray,  # [n H W 3] in [-1, 1]
    *,
    noise_level: int = 20,
    **options,
) -> Result:
  """Enlarges images as often as the autoencoder does latents: four times in the released model.

  Args:
    sd, params, prompts, options: see `generate.text_to_image`.
    images: one for each prompt.
    noise_level: timestep of the noise that is put on the images first, 0 … 350: more of it lets
      more be invented (cascaded diffusion, Ho et al. 2022, arxiv.org/abs/2106.15282, section 4).

  Returns:
    images [n 4H 4W 3] and latents [n H W c].

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  generate.check_channels(sd, 3, True, "upscaling")
  if not 0 <= noise_level <= MAX_NOISE_LEVEL:
    raise UserError(f"noise_level is {noise_level}; it must lie between 0 and {MAX_NOISE_LEVEL}")
  _check_images(images, len(prompts))
  _, height, width, _ = images.shape
  f = sd.vae.downsampling
  request = Request(prompts=prompts, height=f * height, width=f * width, **options)
  generate.check_request(sd, request)
  alpha_bar = schedules.alphas_bar(AUGMENTATION)[noise_level]
  noise = denoise.initial_noise(
      denoise.seed_words(request.seeds), denoise.LOW_RESOLUTION, images.shape[1:])
  read = np.float32(alpha_bar**0.5) * images + np.float32((1 - alpha_bar)**0.5) * np.asarray(noise)
  return generate.make(sd, params, request, Task(appended=(read, read), label=noise_level))


def base_to_refiner(
    sd: StableDiffusion,
    params: Params,
    refiner: StableDiffusion,
    refiner_params: Params,
    prompts: Sequence[str],
    *,
    handoff: float,
    **options,
) -> Result:
  """Makes images in the rows of one table, by one model at high and another at low noise.

  Podell et al. 2023 (SDXL), https://arxiv.org/abs/2307.01952, section 2.5. Both have the same
  latents and noise schedule.

  Args:
    sd, params: the model that begins.
    refiner, refiner_params: the model that ends, and decodes; the first one's sampler goes on.
    prompts, options: see `generate.text_to_image`; sizes and controls are the first model's, the
      refiner is told its default sizes.
    handoff: the part of the timesteps that the first model makes; 0.8 is usual.

  Returns:
    images and latents.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  if not 0 <= handoff <= 1:
    raise UserError(f"handoff is {handoff}; it must lie between 0 and 1")
  for model in (sd, refiner):
    generate.check_channels(model, 0, False, "making pictures from text alone")
  latents, others = ((model.schedule, model.vae.downsampling, model.vae.latent_channels,
                      model.vae.scaling_factor, model.vae.shift_factor) for model in (sd, refiner))
  if latents != others:
    raise UserError("the two models have different noise schedules or latents; use a refiner of "
                    "the same family")
  request = Request(prompts=prompts, **options)
  table = generate.sampler_table(sd, request.sampler, request.steps)
  per_step = generate.rows_per_step(table, request.steps)
  cutoff = round(sd.schedule.num_steps * (1 - handoff))
  skip = int((table.t[::per_step] >= cutoff).sum())
  end = min(skip * per_step, len(table.t))  # the last step may ask once
  refiner = dataclasses.replace(refiner, scheduler_config=sd.scheduler_config | {
      "prediction_type": refiner.prediction_type})
  second = dataclasses.replace(request, sizes=None, negative_sizes=None, controls=())
  generate.check_request(refiner, second, skip)
  latents = generate.make_latents(sd, params, request, Task(end=end))
  return generate.make(refiner, refiner_params, second, Task(resume=latents, skip=skip))


def hires_fix(
    sd: StableDiffusion,
    params: Params,
    prompts: Sequence[str],
    *,
    height: int,
    width: int,
    first_height: int,
    first_width: int,
    strength: float,
    enlarge: str = "latents",
    **options,
) -> Result:
  """Makes images at a size that the model knows, enlarges them, and makes them anew.

  Args:
    sd, params, prompts, options: see `generate.text_to_image`; init_latents are of the first pass,
      the pictures of controls of the result's size.
    height, width: of the result, px.
    first_height, first_width: of the first pass.
    strength: of the second, see `image_to_image`; 0.5 and more where latents are enlarged, which
      blurs them.
    enlarge: "latents", or "pixels" at the price of a decoding and an encoding.

  Returns:
    images and latents.

  Raises:
    UserError: for any argument out of range, before anything is compiled.
  """
  if enlarge not in ("latents", "pixels"):
    raise UserError(f"enlarge is {enlarge!r}; choose latents or pixels")
  generate.check_channels(sd, 0, False, "making pictures from text alone")
  second = Request(prompts=prompts, height=height, width=width,
                   **options | dict(init_latents=None))
  skip = _skipped(second, strength)
  generate.check_request(sd, second, skip)
  shape = sd.latent_shape(height, width)
  sd.latent_shape(first_height, first_width)  # before anything is resized
  first = Request(prompts=prompts, height=first_height, width=first_width, **options | dict(
      controls=[dataclasses.replace(control, hint=_resize(
          control.hint, (first_height, first_width), "linear")) for control in second.controls]))
  latents = generate.make_latents(sd, params, first, Task())
  if enlarge == "latents":
    start = _resize(latents, shape[:2], "bilinear")
  else:
    small = generate.decode(sd, params, first, latents)
    start = generate.encode(
        sd, params, second, _resize(small, (height, width), "lanczos3"))
  return generate.make(sd, params, second, Task(
      start=start, skip=skip, stream=denoise.SECOND))


def _resize(x: np.ndarray, side: tuple[int, int], method: str) -> np.ndarray:
  return np.asarray(jax.image.resize(x, (len(x), *side, x.shape[-1]), method))


def _edit(sd: StableDiffusion, prompts: Sequence[str], images: np.ndarray, strength: float,
          options: dict) -> tuple[Request, int]:
  """Returns the request for images of the size of those given, and how many steps to skip."""
  _check_images(images, len(prompts))
  _, height, width, _ = images.shape
  request = Request(prompts=prompts, height=height, width=width, **options)
  skip = _skipped(request, strength)
  generate.check_request(sd, request, skip)
  return request, skip


def _check_images(images: np.ndarray, n: int) -> None:
  if images.ndim != 4 or images.shape[0] != n or images.shape[3] != 3:
    raise UserError(f"images have shape {list(images.shape)}; {n} prompts need [{n}, H, W, 3]")
  if not n:
    raise UserError("no prompts were given; give at least one")
  if not np.isfinite(images).all() or np.abs(images).max() > 1 or images.dtype == np.uint8:
    raise UserError("images hold values outside [-1, 1] or NaN; divide 8-bit ones by 127.5 and "
                    "subtract 1")


def _skipped(request: Request, strength: float) -> int:
  """Returns how many steps come before the last `strength` of them."""
  if not 0 <= strength <= 1:
    raise UserError(f"strength is {strength}; it must lie between 0 (the image as it is) and 1")
  return request.steps - min(int(request.steps * strength), request.steps)
