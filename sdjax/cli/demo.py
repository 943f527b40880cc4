"""`sdjax demo`: from nothing to a text-to-image model that draws captions it has never seen."""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from sdjax.errors import UserError

INTRODUCTION = """\
sdjax demo: a text-to-image model from nothing, about {minutes} minutes on two CPU cores.

  1 draw         {pictures:,} captioned pictures of shapes, as webdataset shards
  2 autoencoder  pictures to latents and back
  3 encode       every picture once
  4 train        the text encoder and the UNet on latents and captions
  5 evaluate     draw captions that were held out, and score them
  6 export       to a folder in the diffusers layout, and back

Everything goes into {workdir}/. Ctrl-C stops; the same command goes on where it stopped.
"""
MINUTES = 9
SMALL = {"total_steps": 20, "data": {"batch_size": 8}, "evaluation": {"count": 32}}
NEXT = """
What to try next:
  look at       {picture}
  your words    sdjax sample --model {model} --guidance-scale 2 --num-images 4 --prompt \\
                  "a large green ring left of a small red circle on a white background"
  your images   sdjax shards pack FOLDER SHARDS    (name.jpg with name.txt)
                sdjax train --config configs/images.py --workdir RUN --config.data.urls=SHARDS
  the curves    tensorboard --logdir {workdir}
"""


@dataclasses.dataclass(frozen=True)
class Demo:
  """The folders of a demo and its size."""
  workdir: Path
  pictures: int
  seed: int
  overrides: dict[str, Any]  # of the config

  def folder(self, name: str) -> Path:
    """A folder of the demo."""
    return self.workdir / name


def parser() -> argparse.ArgumentParser:
  """Returns the flags of the command."""
  p = argparse.ArgumentParser(prog="sdjax demo", description=__doc__)
  p.add_argument("--workdir", default="sdjax-demo", metavar="DIR", help="(sdjax-demo)")
  p.add_argument("--seed", type=int, default=0, help="same seed, same pictures (0)")
  p.add_argument("--fresh", action="store_true", help="delete DIR and start again")
  p.add_argument("--small", action="store_true",
                 help="a few steps of everything in a minute: to see that it runs, not to learn")
  return p


def main(argv: list[str]) -> int:
  """Runs all stages that are not done yet."""
  flags = parser().parse_args(argv)
  workdir = Path(flags.workdir)
  if flags.fresh and workdir.exists():
    _remove(workdir)
  demo = Demo(
      workdir, pictures=200 if flags.small else 10_000, seed=flags.seed,
      overrides=SMALL if flags.small else {})
  print(INTRODUCTION.format(minutes=1 if flags.small else MINUTES, pictures=demo.pictures,
                            workdir=workdir))
  from sdjax.cli import device
  device.cache_compilations()
  device.log_to_stderr()
  _check_same(demo, {"seed": flags.seed, "small": flags.small})
  began = time.monotonic()
  for number, stage in enumerate((draw, autoencoder, encode, diffusion, evaluate, export), 1):
    stage_began = time.monotonic()
    print(f"── {number} {stage.__name__}", flush=True)
    told = stage(demo)
    print(f"   {told}  ({time.monotonic() - stage_began:.0f} s)", flush=True)
  minutes = (time.monotonic() - began) / 60
  print(f"\nDone in {minutes:.1f} minutes.")
  print(NEXT.format(picture=workdir / "evaluation.png", model=workdir / "export",
                    workdir=workdir))
  return 0


def _remove(workdir: Path) -> None:
  if not (workdir / "demo.json").is_file():
    raise UserError(f"{workdir} was not made by this command; delete it yourself, or choose "
                    "another --workdir")
  shutil.rmtree(workdir)


def _check_same(demo: Demo, flags: dict) -> None:
  """Refuses to go on with other flags than those that began."""
  path = demo.workdir / "demo.json"
  if path.is_file() and json.loads(path.read_text()) != flags:
    raise UserError(f"{demo.workdir} was begun with {path.read_text().strip()}, not {flags}; "
                    "use the same flags, --fresh, or another --workdir")
  if not path.is_file():
    if demo.workdir.exists() and any(demo.workdir.iterdir()):
      raise UserError(f"{demo.workdir} holds something else; choose another --workdir")
    demo.workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(flags) + "\n")


def draw(demo: Demo) -> str:
  """Stage 1: pictures with captions into shards."""
  from sdjax.data import pack, shapes
  out = demo.folder("shards")
  if not out.is_dir():
    pack.write_shards(_bar(shapes.samples(demo.pictures, demo.seed), demo.pictures), out)
  return f"{demo.pictures:,} pictures in {out}"


def _config(demo: Demo, stage: str):
  from configs import shapes
  config = shapes.get_config(f"stage={stage}")
  config.seed = demo.seed
  config.update(demo.overrides)
  return config


def _train(demo: Demo, stage: str, urls: Path, init_from: str = "") -> Path:
  from sdjax.train import loop
  config = _config(demo, stage)
  config.data.urls, config.init_from = str(urls), init_from
  out = demo.folder(stage)
  return out / "model" if (out / "model").is_dir() else loop.train(config, out)


def autoencoder(demo: Demo) -> str:
  """Stage 2."""
  return f"reconstructions in {_train(demo, 'autoencoder', demo.folder('shards')).parent}/previews"


def encode(demo: Demo) -> str:
  """Stage 3."""
  from sdjax import encode as cache
  from sdjax.checkpoints import diffusers
  out = demo.folder("latents")
  sd, params = diffusers.load(demo.folder("autoencoder") / "model")
  cache.run(sd, params, str(demo.folder("shards")), out, cache.Options(sd.default_size),
            progress=_bar)
  return f"latents in {out}"


def diffusion(demo: Demo) -> str:
  """Stage 4."""
  model = _train(demo, "diffusion", demo.folder("latents"),
                 str(demo.folder("autoencoder") / "model"))
  return f"samples along the way in {model.parent}/previews"


def evaluate(demo: Demo) -> str:
  """Stage 5."""
  from sdjax.checkpoints import diffusers
  from sdjax.eval import held_out
  sd, params = diffusers.load(demo.folder("diffusion") / "model")
  result = held_out.evaluate(sd, params, _config(demo, "diffusion").evaluation)
  held_out.write(result, demo.workdir)
  return held_out.describe(result)


def export(demo: Demo) -> str:
  """Stage 6: the model leaves in float32, comes back, and draws the same pictures."""
  import numpy as np

  from sdjax import generate
  from sdjax.checkpoints import diffusers
  from sdjax.data import shapes
  sd, params = diffusers.load(demo.folder("diffusion") / "model")
  out = demo.folder("export")
  diffusers.save(out, sd, params)
  captions = shapes.held_out_captions(8, demo.seed)
  made = [generate.text_to_image(
      *model, captions, steps=10, guidance_scale=2.0, seeds=range(8), height=shapes.SIDE_PX,
      width=shapes.SIDE_PX, sampler="dpmpp_2m")[0] for model in ((sd, params), diffusers.load(out))]
  if not np.array_equal(*made):
    raise RuntimeError(f"the model re-imported from {out} draws other pictures: a bug, report it")
  return f"{out} draws the same pictures, bit for bit"


def _bar(items, total: int):
  import tqdm
  return tqdm.tqdm(items, total=total, unit=" pictures", leave=False)
