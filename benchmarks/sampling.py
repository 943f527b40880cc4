"""Measures text to image beside diffusers: the same weights, noise and scheduler, on two CPU cores.

  python benchmarks/sampling.py [--models tiny half]    needs `torch`, `diffusers`, `transformers`

tiny is the SD 1 of the tests, 64 px; half is SD 1 at half its width, 256 px, 5 minutes. Weights are
random. Both sides load one folder, and are timed in turn: one picture, float32, 20 steps of DDIM,
guidance 7.5. A ratio above 1 says how many times faster sdjax is once it has compiled. On a busy
machine PyTorch's threads wait for each other; OMP_WAIT_POLICY=PASSIVE helps them.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import numpy as np
import torch
import transformers

from sdjax import generate
from sdjax.checkpoints import diffusers as folders
from sdjax.data import tokenizer

THREADS = 2
PROMPT = "a small red circle above a large blue square"
# Side of the picture in px, timed runs of each side, and the three networks.
MODELS = {
    "tiny": dict(
        size=64, runs=9,
        text=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4),
        unet=dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                  attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        vae=dict(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)),
    "half": dict(
        size=256, runs=3,
        text=dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6),  # 12 layers
        unet=dict(block_out_channels=(160, 320, 640, 640)),
        vae=dict(block_out_channels=(64, 128, 256, 256), layers_per_block=2)),
}


def save(folder: Path, text: dict, unet: dict, vae: dict) -> None:
  """Writes a model of random weights, in the layout of diffusers."""
  torch.manual_seed(0)
  words = tokenizer.train([PROMPT], length=77, vocab_size=530)
  words.save(folder)
  levels = len(vae["block_out_channels"])
  diffusers.StableDiffusionPipeline(
      text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(
          vocab_size=words.vocab_size, bos_token_id=words.bos_id, eos_token_id=words.eos_id,
          pad_token_id=words.pad_id, **text)),
      tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
      unet=diffusers.UNet2DConditionModel(cross_attention_dim=text["hidden_size"], **unet),
      vae=diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * levels,
                                  up_block_types=["UpDecoderBlock2D"] * levels, **vae),
      scheduler=diffusers.DDIMScheduler(
          beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
          set_alpha_to_one=False, steps_offset=1),
      safety_checker=None, feature_extractor=None, requires_safety_checker=False,
  ).save_pretrained(folder)


def sides(folder: Path, size: int) -> tuple[Callable, Callable]:
  """Returns theirs and ours; each makes a picture and returns its latents [1 h w c]."""
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  sd, params = folders.load(folder)
  params = jax.device_put(params)
  noise = np.random.default_rng(0).standard_normal((1, *sd.latent_shape(size, size)), np.float32)
  asked = dict(height=size, width=size, guidance_scale=7.5)

  def theirs():
    latents = pipeline(PROMPT, latents=torch.tensor(noise).permute(0, 3, 1, 2), **asked,
                       num_inference_steps=20, output_type="latent").images
    with torch.no_grad():
      pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor)
    return latents.permute(0, 2, 3, 1).numpy()

  def ours():
    return generate.text_to_image(
        sd, params, [PROMPT], steps=20, seeds=[0], init_latents=noise, **asked)[1]
  return theirs, ours


def seconds(run: Callable) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def measure(name: str) -> None:
  """Prints the medians of one model's runs, and how far the two sides' latents differ."""
  size, runs, *networks = MODELS[name].values()
  with tempfile.TemporaryDirectory() as folder:
    save(Path(folder), *networks)
    theirs, ours = sides(Path(folder), size)
  first = seconds(ours)
  difference = np.abs(ours() - theirs()).max()
  their_s, our_s = np.median([(seconds(theirs), seconds(ours)) for _ in range(runs)], axis=0)
  print(f"{name}, {size} px: diffusers {their_s:.3f} s, sdjax {our_s:.3f} s after compiling for "
        f"{first - our_s:.1f} s, ratio {their_s / our_s:.2f}; latents differ by {difference:.1e}")


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
  names = parser.parse_args().models
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # XLA starts as many threads
  torch.set_num_threads(THREADS)
  print(f"diffusers {diffusers.__version__} on torch {torch.__version__}, jax {jax.__version__}, "
        f"{THREADS} cores of {os.uname().machine}")
  for name in names:
    measure(name)


if __name__ == "__main__":
  main()
