"""How well a model draws what it was never trained on: held-out captions of shapes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import generate, pictures
from sdjax.data import shapes
from sdjax.eval import shapes as detector
from sdjax.files import write_whole
from sdjax.stable_diffusion import Params, StableDiffusion

SHOWN = 24  # pictures on the grid


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was asked, what came, and what of it is right.

  Attributes:
    captions: n texts.
    pictures: uint8 [n 32 32 3].
    scores: fractions of pictures, by measure of `detector.judge`.
  """
  captions: list[str]
  pictures: np.ndarray
  scores: dict[str, float]


def evaluate(sd: StableDiffusion, params: Params, config: Any) -> Evaluation:
  """Draws `config.count` held-out captions and judges the pictures.

  Args:
    sd, params: the model; one that makes 32 px pictures.
    config: `count`, `seed` (of the captions, and of the first picture), `steps`,
      `guidance_scale`, `sampler`.
  """
  captions = shapes.held_out_captions(config.count, config.seed)
  made, _ = generate.text_to_image(
      sd, params, captions, steps=config.steps, guidance_scale=config.guidance_scale,
      seeds=range(config.seed, config.seed + len(captions)), height=shapes.SIDE_PX,
      width=shapes.SIDE_PX, sampler=config.sampler, batch_size=32)
  drawn = pictures.to_uint8(made)
  return Evaluation(captions, drawn, detector.score(drawn, captions))


def write(evaluation: Evaluation, folder: Path) -> Path:
  """Writes evaluation.json and evaluation.png; returns the path of the picture."""
  shown, captions = evaluation.pictures[:SHOWN], evaluation.captions[:SHOWN]
  marks = [detector.judge(picture, text)["all"]
           for picture, text in zip(shown, captions, strict=True)]
  grid = pictures.grid(
      shown, [text.removesuffix(" on a white background") for text in captions], columns=6,
      scale=5, marks=marks, header="Captions it has never seen\n" + describe(evaluation))
  pictures.save_png(folder / "evaluation.png", grid)
  with write_whole(folder / "evaluation.json", "w") as file:
    json.dump({"count": len(evaluation.captions), **evaluation.scores}, file, indent=2)
  return folder / "evaluation.png"


def describe(evaluation: Evaluation) -> str:
  """Returns the scores as one line."""
  scores = {"everything" if name == "all" else name: score
            for name, score in evaluation.scores.items()}
  told = " · ".join(f"{name} {score:.0%}" for name, score in scores.items())
  return f"of {len(evaluation.captions)} pictures right: {told}"
