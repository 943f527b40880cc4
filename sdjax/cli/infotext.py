"""How a picture was made, in the words of AUTOMATIC1111's web UI, which many programs read.

Its `create_infotext`, and `extra_generation_params` in modules/processing.py; those of ControlNet
are its extension's. Its "Size" is that of the first pass.
"""

from collections.abc import Mapping
from pathlib import Path

from sdjax import pictures
from sdjax.data.prompt_files import Wanted

# A1111's names of samplers, by ours and by the class in a scheduler_config.json.
SAMPLERS = {
    "ddim": "DDIM", "DDIMScheduler": "DDIM",
    "plms": "PLMS", "pndm": "PLMS", "PNDMScheduler": "PLMS",
    "lms": "LMS", "LMSDiscreteScheduler": "LMS",
    "euler": "Euler", "EulerDiscreteScheduler": "Euler",
    "euler_ancestral": "Euler a", "EulerAncestralDiscreteScheduler": "Euler a",
    "heun": "Heun", "HeunDiscreteScheduler": "Heun",
    "dpm2": "DPM2", "KDPM2DiscreteScheduler": "DPM2",
    "dpm2_ancestral": "DPM2 a", "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M", "DPMSolverMultistepScheduler": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE", "DPMSolverSDEScheduler": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC", "UniPCMultistepScheduler": "UniPC",
    "lcm": "LCM", "LCMScheduler": "LCM",
}
UPSCALERS = {"latents": "Latent", "pixels": "Lanczos"}


def parameters(one: Wanted, settings: Mapping, first: tuple[int, int]) -> str:
  """Returns the text "parameters" of a PNG.

  Args:
    one: the picture.
    settings: of all pictures of its job, see `cli.sample.settings`.
    first: (H, W) px of the first pass.
  """
  sampler, refiner = settings["sampler"] or settings["scheduler"], settings["refiner"]
  return pictures.parameters(one.prompt, one.negative_prompt, {
      "Steps": one.steps, "Sampler": SAMPLERS.get(sampler, sampler),
      "CFG scale": _number(one.guidance_scale),
      "Image CFG scale": _number(settings["image_scale"]),
      "Seed": one.seed, "Size": f"{first[1]}x{first[0]}", "Model": _name(settings["model"]),
      "Denoising strength": _number(
          settings["hires_strength"] if one.strength is None else one.strength),
      # A1111 counts the layers that it does read from the end.
      "Clip skip": settings["clip_skip"] + 1 if settings["clip_skip"] else None,
      "Mask blur": 0 if one.mask else None,
      "Hires upscale": _number(settings["hires"]),
      "Hires upscaler": UPSCALERS.get(settings["hires_enlarge"]),
      "Refiner": _name(refiner["model"]) if refiner else None,
      "Refiner switch at": _number(settings["handoff"]),
      **{f"ControlNet {number}": _control(control, settings["guess"])
         for number, control in enumerate(settings["control"])}})


def _control(control: Mapping, guess: bool) -> str:
  mode = "ControlNet is more important" if guess else "Balanced"
  return ", ".join(f"{name}: {value}" for name, value in {
      "Module": "none", "Model": _name(control["folder"]), "Weight": _number(control["scale"]),
      "Resize Mode": "Crop and Resize", "Guidance Start": _number(control["start"]),
      "Guidance End": _number(control["end"]), "Control Mode": mode}.items())


def _number(value: float | None) -> str | None:
  return None if value is None else f"{value:g}"


def _name(model: str) -> str:
  return Path(model).name.removesuffix(".safetensors")
