"""The trainer's job on real photographs: a folder of JPEGs in, falling losses and pictures out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.cli import main as cli

pytestmark = pytest.mark.slow

# Of the pictures that scikit-image ships, the photographs.
PHOTOGRAPHS = {
    "astronaut.png": "an astronaut in an orange suit before a flag",
    "brick.png": "a wall of bricks", "camera.png": "a man behind a camera on a tripod",
    "cell.png": "a cell under a microscope", "chelsea.png": "the face of a tabby cat",
    "clock_motion.png": "a clock, blurred by motion", "coffee.png": "a cup of coffee on a table",
    "coins.png": "old coins in rows", "grass.png": "a lawn seen from above",
    "gravel.png": "gravel seen from above", "hubble_deep_field.jpg": "galaxies in the deep sky",
    "ihc.png": "stained tissue under a microscope", "moon.png": "craters of the moon",
    "motorcycle_left.png": "a motorcycle in a garage",
    "motorcycle_right.png": "a motorcycle in a garage, from further right",
    "page.png": "a page of a book in bad light", "retina.jpg": "the retina of an eye",
    "rocket.jpg": "a rocket on its launch pad", "text.png": "handwriting on paper",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """A folder of name.jpg with name.txt, the photographs in their own sizes."""
  folder = tmp_path_factory.mktemp("photographs")
  source = Path(pytest.importorskip("skimage").__file__).parent / "data"
  for name, caption in PHOTOGRAPHS.items():
    with Image.open(source / name) as picture:
      picture.convert("RGB").save((folder / name).with_suffix(".jpg"), quality=90)
    (folder / name).with_suffix(".txt").write_text(caption)
  return folder


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.array([row["loss"] for row in rows])


def test_photographs_become_shards_models_and_pictures(photographs, tmp_path, capsys, monkeypatch,
                                                       request):
  monkeypatch.chdir(request.config.rootpath)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
  run = lambda *args: cli.main([str(arg) for arg in args])
  shards, autoencoder, model = (tmp_path / name for name in ("shards", "autoencoder", "model"))
  assert run("shards", "pack", photographs, shards) == 0
  assert "19 pictures in 1 shards" in capsys.readouterr().out
  assert run("shards", "inspect", shards) == 0

  quick = ["--config.log_every_steps=1", "--config.optimizer.warmup_steps=10",
           f"--config.data.urls={shards}"]
  assert run("train", "--config", "configs/images.py:stage=autoencoder,steps=60,batch=4",
             "--workdir", autoencoder, *quick) == 0
  assert run("train", "--config", f"configs/images.py:init_from={autoencoder}/model,steps=60",
             "--workdir", model, *quick) == 0
  for workdir, share in ((autoencoder, 0.7), (model, 0.9)):
    found = losses(workdir)
    assert len(found) == 60 and found[-10:].mean() < share * found[:10].mean(), found
    with Image.open(workdir / "previews" / "0000060.png") as grid:
      assert grid.width >= 4 * 64 and np.asarray(grid).std() > 10
