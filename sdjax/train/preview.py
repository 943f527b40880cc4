"""Pictures drawn while training: what the averaged parameters can do by now."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdjax import generate, pictures
from sdjax.stable_diffusion import Params, StableDiffusion


def diffusion(config: Any, sd: StableDiffusion, params: Params, size_px: int,
              prompts: Sequence[str]) -> np.ndarray:  # uint8 [H W 3]
  """Returns a labelled grid of pictures made from `prompts`, one seed each."""
  made, _ = generate.text_to_image(
      sd, params, prompts, steps=config.steps, guidance_scale=config.guidance_scale,
      seeds=range(len(prompts)), height=size_px, width=size_px, sampler=config.sampler)
  return np.asarray(pictures.grid(
      pictures.to_uint8(made), list(prompts), scale=max(1, 128 // size_px)))


def autoencoder(sd: StableDiffusion, params: Params, originals: np.ndarray) -> np.ndarray:
  """Returns a grid of images float32 [n H W 3] and, beside each, its reconstruction."""
  rebuilt = np.concatenate([
      generate.reconstruct(sd, params, originals[rows]) for rows in
      generate.batches(len(originals), 16)])[: len(originals)]
  pairs = np.stack([originals, rebuilt], axis=1).reshape(-1, *originals.shape[1:])
  labels = ["original", "reconstruction"] * len(originals)
  scale = max(1, 96 // originals.shape[1])
  return np.asarray(pictures.grid(pictures.to_uint8(pairs), labels, columns=8, scale=scale))

