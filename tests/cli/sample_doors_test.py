"""`sdjax sample` beyond text: each way of making pictures is the Python function of that name."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax import control, denoise, edit, pictures, pytrees
from sdjax.checkpoints import diffusers
from sdjax.cli import main as cli
from sdjax.cli import sample, sample_doors, sample_flags, sample_pictures
from sdjax.cli.sample_models import Models, Steering
from sdjax.data import prompt_files
from sdjax.errors import UserError
from sdjax.models import initializers
from sdjax.models.adapter import T2IAdapter
from sdjax.models.controlnet import ControlNet
from sdjax.models.unet import Encoder
from sdjax.train import partitioning

SIDE = 32
PROMPT = "a red circle"
ASK = ["--prompt", PROMPT, "--steps", 4, "--guidance-scale", 2, "--seed", 3]
ASKED = dict(prompts=[PROMPT], steps=4, guidance_scale=2.0, seeds=[3], batch_size=1)
# Models beside the tiny one: fields of its UNet.
OTHERS = {"inpainting": dict(in_channels=9), "pix2pix": dict(in_channels=8),
          "upscaler": dict(in_channels=7, num_classes=350)}


def perturbed(params, seed):
  rng = np.random.default_rng(seed)
  return pytrees.map_paths(
      lambda _, leaf: leaf + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def models(tiny_model):
  """{name: (sd, params)}, smaller than tiny: each door compiles programs of its own."""
  sd, _ = tiny_model
  sd = dataclasses.replace(
      sd, unet=sd.unet.clone(block_out_channels=(8,), attention=(True,), num_heads=1,
                             norm_groups=4),
      vae=sd.vae.clone(block_out_channels=(4, 4, 4), norm_groups=2))
  others = {name: dataclasses.replace(sd, unet=sd.unet.clone(**fields))
            for name, fields in OTHERS.items()}
  return {name: (one, perturbed(one.init(0), seed)) for seed, (name, one) in enumerate(
      [("tiny", sd), ("refiner", sd), *others.items()])}


@pytest.fixture(scope="module")
def networks(models):
  """{name: (module, params)} of controls."""
  unet = models["tiny"][0].unet
  fields = {field.name: getattr(unet, field.name) for field in dataclasses.fields(Encoder)
            if field.name not in ("parent", "name")}
  modules = {"canny": ControlNet(**fields | dict(hint_widths=(4, 4, 4))),
             "sketch": T2IAdapter(in_channels=1, channels=(8,), num_res_blocks=1,
                                  downscale_factor=4)}
  return {name: (module, perturbed(initializers.draw(jax.eval_shape(
      module.init, jax.random.key(0), *module.example())["params"], 0), 9))
          for name, module in modules.items()}


@pytest.fixture(scope="module")
def shelf(models, networks, tmp_path_factory):
  """A folder with all models and networks, and the pictures image.png, mask.png and edges.png."""
  folder = tmp_path_factory.mktemp("shelf")
  for name, model in models.items():
    diffusers.save(folder / name, *model)
  for name, network in networks.items():
    diffusers.save_network(folder / name, *network)
  rng = np.random.default_rng(4)
  for name, shape in (("image", (SIDE, SIDE, 3)), ("small", (SIDE // 4, SIDE // 4, 3)),
                      ("edges", (SIDE, SIDE))):
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
  mask = np.zeros((SIDE // 2, SIDE // 2), np.uint8)    # half as large as its image
  mask[4:12, 6:] = 255
  Image.fromarray(mask).save(folder / "mask.png")
  (folder / "broken.png").write_bytes((folder / "image.png").read_bytes()[:200])
  return folder


def pixels(path):
  return np.asarray(Image.open(path))


def image(path):
  return pixels(path)[None] * np.float32(2 / 255) - np.float32(1)


def run(shelf, out, *args, code=0):
  """Runs the command on files of the shelf, which are named by their {name} alone."""
  names = {path.name.removesuffix(".png"): path for path in shelf.iterdir()}
  command = ["sample", "--out", out, *args]
  assert cli.main([str(arg).format(**names) for arg in command]) == code


@functools.cache
def mesh():
  return partitioning.make_mesh({"data": -1})


def place(params):                                     # as the command: nothing compiles anew
  return pytrees.map_paths(partitioning.placer(mesh(), ((".*", "fsdp"),)), params)


MASKED = {"--image": "{image}", "--mask": "{mask}"}
DOORS = {
    "image": ("tiny", {"--image": "{image}", "--strength": 0.5}, dict(strength=0.5)),
    "mask": ("tiny", MASKED, dict(strength=0.75)),
    "inpainting": ("inpainting", MASKED | {"--strength": 1}, dict(strength=1.0)),
    "pix2pix": ("pix2pix", {"--image": "{image}", "--image-scale": 1.2}, dict(image_scale=1.2)),
    "upscaler": ("upscaler", {"--image": "{small}", "--noise-level": 9}, dict(noise_level=9)),
    "refiner": ("tiny", {"--refiner": "{refiner}", "--handoff": 0.6}, dict(handoff=0.6)),
    "hires": ("tiny", {"--hires": 1.5, "--hires-strength": 0.5, "--hires-enlarge": "pixels"},
              dict(strength=0.5, enlarge="pixels")),
    "control": ("tiny", {"--image": "{image}", "--control={canny}:{edges}:0.5:0:0.8": None,
                         "--control={sketch}:{edges}": None, "--guess": None},
                dict(strength=0.75)),
}


def expected(name, shelf, models, networks):
  """Returns what the Python function makes of what the flags of a door say."""
  model, _, options = DOORS[name]
  sd, params = models[model]
  options = ASKED | options
  images = dict(images=image(shelf / "image.png"))
  mask = pixels(shelf / "mask.png").repeat(2, axis=0).repeat(2, axis=1)[None] / np.float32(255)
  edges = pixels(shelf / "edges.png")[None, ..., None] / np.float32(255)
  size = dict(height=SIDE, width=SIDE)
  nets = {net: (module, place(params)) for net, (module, params) in networks.items()}
  make, given = {
      "image": (edit.image_to_image, images),
      "mask": (edit.inpaint, images | dict(masks=mask)),
      "inpainting": (edit.inpaint, images | dict(masks=mask)),
      "pix2pix": (edit.instruct_pix2pix, images),
      "upscaler": (edit.upscale, dict(images=image(shelf / "small.png"))),
      "refiner": (edit.base_to_refiner, size | dict(
          refiner=sd, refiner_params=place(models["refiner"][1]))),
      "hires": (edit.hires_fix, dict(
          height=48, width=48, first_height=SIDE, first_width=SIDE)),
      "control": (edit.image_to_image, images | dict(controls=[
          control.Control(*nets["canny"], edges.repeat(3, axis=-1), 0.5, 0.0, 0.8, guess=True),
          control.Control(*nets["sketch"], edges, guess=True)])),
  }[name]
  with jax.set_mesh(mesh()):
    return pictures.to_uint8(make(sd, place(params), **given, **options)[0][0])


TOLD = {
    "image": "Denoising strength: 0.5",
    "mask": "Denoising strength: 0.75, Mask blur: 0",
    "inpainting": "Denoising strength: 1, Mask blur: 0",
    "pix2pix": "CFG scale: 2, Image CFG scale: 1.2, Seed: 3, Size: 32x32",
    "upscaler": "Size: 32x32",
    "refiner": "Model: tiny, Refiner: refiner, Refiner switch at: 0.6",
    "hires": "Size: 32x32, Model: tiny, Denoising strength: 0.5, Hires upscale: 1.5, "
             "Hires upscaler: Lanczos",
    "control": 'ControlNet 0: "Module: none, Model: canny, Weight: 0.5, Resize Mode: Crop and '
               'Resize, Guidance Start: 0, Guidance End: 0.8, Control Mode: ControlNet is more '
               'important", ControlNet 1: "Module: none, Model: sketch, Weight: 1,',
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if model in OTHERS else [])
    for name, (model, *_) in DOORS.items()])
def test_each_door_is_the_function_of_that_name(shelf, models, networks, tmp_path, name):
  model, flags, _ = DOORS[name]
  args = [arg for pair in flags.items() for arg in pair if arg is not None]
  run(shelf, tmp_path, "--model", shelf / model, *ASK, *args)
  with Image.open(tmp_path / "00000.png") as picture:
    np.testing.assert_array_equal(
        np.asarray(picture), expected(name, shelf, models, networks))
    assert TOLD[name] in picture.text["parameters"]
    told = json.loads(picture.text["sdjax"])
  prefix = "hires_" if name == "hires" else ""
  options = {prefix + option: value for option, value in DOORS[name][2].items()}
  assert {option: told[option] for option in options} == options


def write_list(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_a_list_names_its_images_and_goes_on(shelf, tmp_path, capsys):
  for name in ("image", "mask", "edges"):
    (tmp_path / f"{name}.png").write_bytes((shelf / f"{name}.png").read_bytes())
  edit = {"prompt": PROMPT, "seed": 3, "image": "image.png"}
  prompts = write_list(tmp_path / "list.jsonl", [
      edit | {"strength": 0.5}, edit, {"prompt": PROMPT, "seed": 3},
      edit | {"mask": str(shelf / "mask.png")}])
  command = ["--model", shelf / "tiny", "--prompts", prompts, *ASK[2:6], "--batch-size", 1,
             "--strength", 0.25]
  run(shelf, tmp_path / "list", *command)
  made = [(tmp_path / "list" / f"0000{number}.png") for number in range(4)]
  parameters = [Image.open(path).text["parameters"] for path in made]
  strengths = [text.partition("strength: ")[2].partition(",")[0] for text in parameters]
  assert strengths == ["0.5", "0.25", "", "0.25"] and "Mask" in parameters[3]
  run(shelf, tmp_path / "alone", "--model", shelf / "tiny", *ASK, "--image", "{image}",
      "--strength", 0.5)
  np.testing.assert_array_equal(pixels(made[0]), pixels(tmp_path / "alone" / "00000.png"))

  before = made[1].read_bytes()
  made[1].unlink()
  run(shelf, tmp_path / "list", *command)
  assert made[1].read_bytes() == before
  capsys.readouterr()
  sample_pictures.examine.cache_clear()                # another process would not know them
  (tmp_path / "image.png").write_bytes((tmp_path / "edges.png").read_bytes())
  run(shelf, tmp_path / "list", *command, code=2)
  assert "begun with other prompts" in capsys.readouterr().err


def test_previews_are_estimates_and_ctrl_c_loses_nothing(shelf, tmp_path, monkeypatch, capsys):
  prompts = write_list(tmp_path / "list.jsonl", [{"prompt": PROMPT}, {"prompt": PROMPT}])
  command = ["--model", shelf / "tiny", "--prompts", prompts, *ASK[2:6], "--batch-size", 1,
             "--preview", 3]
  run(shelf, tmp_path / "whole", *command)
  final = pixels(tmp_path / "whole" / "00001.png").astype(int)
  # What the network takes the last noise to become is nearly what came of it.
  assert np.abs(pixels(tmp_path / "whole" / "preview.png") - final).mean() < 8
  save, seen = pictures.save_png, []

  def interrupt(path, *rest):
    save(path, *rest)
    seen.append(path.name)
    if len(seen) == 4:                                 # within the second picture
      raise KeyboardInterrupt
  monkeypatch.setattr(pictures, "save_png", interrupt)
  run(shelf, tmp_path / "stopped", *command, code=130)
  assert seen == ["preview.png", "preview.png", "00000.png", "preview.png"]
  assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == [
      "00000.png", "manifest.jsonl", "preview.png"]
  run(shelf, tmp_path / "stopped", *command)
  for name in ("00000.png", "00001.png", "manifest.jsonl"):
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_job_with_other_networks_or_hints_is_another(models, networks, tmp_path):
  flags, (canny, params), (sd, weights) = read(), networks["canny"], models["tiny"]
  Image.new("L", (8, 8)).save(tmp_path / "edges.png")
  picture, _ = sample_pictures.examine(str(tmp_path / "edges.png"))
  told = lambda steering, refiner: json.dumps(sample.settings(
      flags, {}, Models(sd, weights, refiner, (steering,))))
  steering = Steering(canny, params, sample_flags.Control("d", "edges.png", 1, 0, 1), picture)
  before = told(steering, models["refiner"])
  changed = [
      told(steering, models["tiny"]),
      told(steering._replace(params=perturbed(params, 5)), models["refiner"]),
      told(steering._replace(picture=dataclasses.replace(picture, sha256="0")), models["refiner"])]
  assert told(steering, models["refiner"]) == before
  assert len({before, *changed}) == 4


def test_each_picture_of_a_batch_is_made_from_its_own(models, tmp_path, monkeypatch):
  sd, params = models["tiny"]
  asked, doors = {}, sample_doors.DOORS["text-to-image"]
  make = lambda sd, params, **given: asked.update(given)
  monkeypatch.setitem(doors, ("image", "mask"), doors["image", "mask"]._replace(make=make))
  for name, grey in (("a", 0), ("b", 255)):
    Image.new("L", (SIDE, SIDE), grey).save(tmp_path / f"{name}.png")
  files = [str(tmp_path / f"{name}.png") for name in "ab"]
  lines = [(1, dict(prompt="a", image=files[0], mask=files[1], seed=5)),
           (2, dict(prompt="b", image=files[1], mask=files[0], negative_prompt="c"))]
  flags, chosen = read("--strength", 0.5, "--seed", 7), Models(sd, params, None, ())
  lines, options = sample_doors.complete(chosen, flags, lines, "")
  sample_doors.draw(chosen, flags, options, prompt_files.expand(lines, vars(flags), ""), None)
  assert asked["images"].mean(axis=(1, 2, 3)).tolist() == [-1, 1]
  assert asked["masks"].mean(axis=(1, 2)).tolist() == [1, 0]
  assert (asked["prompts"], asked["negative_prompts"]) == (["a", "b"], ["", "c"])
  assert (asked["seeds"], asked["strength"], asked["batch_size"]) == ([5, 8], 0.5, 2)


def read(*args):
  return sample_flags.read(["--model", "m", "--prompt", "a", *map(str, args)])


@pytest.mark.parametrize("model, size, flags, expected", [
    ("tiny", (30, 41), (), (32, 40)),                  # the nearest that the model makes
    ("tiny", (1, 41), (), (4, 40)),
    ("tiny", (30, 41), ("--height", 64), (64, 40)),
    ("tiny", None, (), (32, 32)),
    ("tiny", None, ("--hires", 1.6), (52, 52)),        # the first pass has the model's own size
    ("upscaler", (9, 5), (), (36, 20)),
    ("pix2pix", (9, 5), ("--width", 24), (8, 24)),
])
def test_sizes_are_those_of_the_image(models, tmp_path, model, size, flags, expected):
  if size is not None:
    lying = Image.new("RGB", size)                     # EXIF turns it: width becomes height
    lying.save(tmp_path / "image.jpg", exif=(exif := Image.Exif(), exif.__setitem__(274, 6))[0])
    flags = (*flags, "--image", tmp_path / "image.jpg")
  flags = read(*flags)
  (line,), _ = sample_doors.complete(
      Models(*models[model], None, ()), flags, [(1, {"prompt": "a"})], "")
  assert (line[1]["height"], line[1]["width"]) == expected


def test_pictures_are_cropped_in_the_middle(tmp_path):
  left, right = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
  Image.fromarray(np.concatenate([left, right], axis=1)).save(tmp_path / "a.png")
  picture, size = sample_pictures.examine(str(tmp_path / "a.png"))
  assert size == (8, 16)
  half = np.repeat([[-1.0] * 4 + [1.0] * 4], 8, axis=0)
  np.testing.assert_allclose(sample_pictures.load_image(picture, (8, 8))[..., 0], half)
  np.testing.assert_allclose(sample_pictures.load_grey(picture, (8, 8)), (half + 1) / 2)
  assert sample_pictures.load_hint(picture, (8, 8), 1).shape == (8, 8, 1)
  np.testing.assert_allclose(
      sample_pictures.load_hint(picture, (8, 8), 3), (half[..., None] + 1) / 2 * np.ones(3))
  # Transparency is laid on white: what is cut out is made anew.
  Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cut.png")
  picture, _ = sample_pictures.examine(str(tmp_path / "cut.png"))
  assert sample_pictures.load_grey(picture, (4, 4)).min() == 1


@pytest.mark.parametrize("mask, fits", [
    ((512, 768), True), ((256, 384), True), ((171, 256), True), ((512, 512), False),
    ((768, 512), False), ((512, 760), False)])
def test_masks_have_the_shape_of_their_image(mask, fits):
  if fits:
    return sample_pictures.check_mask("mask.png", mask, (512, 768))
  with pytest.raises(UserError, match="mask.png is .* its image 768 × 512"):
    sample_pictures.check_mask("mask.png", mask, (512, 768))


@pytest.mark.parametrize("model, flags, message", [
    ("tiny", ["--mask", "{mask}"], "takes nothing, --image, --image and --mask, --refiner, "
     "--hires; --mask was given"),
    ("tiny", ["--image", "{image}", "--hires", 2], "--image and --hires was given"),
    ("tiny", ["--image", "{image}", "--refiner", "{refiner}"], "--image and --refiner was given"),
    ("tiny", ["--refiner", "{refiner}", "--hires", 2], "--refiner and --hires was given"),
    ("inpainting", [], "for inpainting; beside prompts it takes --image and --mask; nothing was "
     "given"),
    ("pix2pix", [], "for instruct-pix2pix; beside prompts it takes --image; nothing was given"),
    ("upscaler", [], "for upscaling; beside prompts it takes --image; nothing was given"),
    ("upscaler", ["--image", "{small}", "--noise-level", 351], "noise_level is 351"),
    ("upscaler", ["--image", "{small}", "--strength", 1], "--strength is 1.0, but nothing"),
    ("tiny", ["--strength", 0.5], "--strength is 0.5, but nothing here reads it"),
    ("tiny", ["--image", "{image}", "--image-scale", 2], "--image-scale is 2.0, but nothing"),
    ("tiny", ["--image", "{image}", "--strength", 1.5], "strength is 1.5; it must lie between 0"),
    ("tiny", ["--image", "{image}", "--strength", "nan"], "strength is nan"),
    ("tiny", ["--image", "{image}", "--height", 30], "height is 30 px"),
    ("tiny", ["--image", "nowhere.png"], "nowhere.png cannot be read (No such file"),
    ("tiny", ["--image", "{broken}"], "broken.png cannot be used (corrupt picture)"),
    ("tiny", ["--image", "{tiny}/model_index.json"], "cannot be used (not a picture)"),
    ("tiny", ["--handoff", 0.5], "--handoff is 0.5, but nothing"),
    ("tiny", ["--hires-enlarge", "pixels"], "--hires-enlarge is pixels, but nothing"),
    ("tiny", ["--hires", 0.5], "--hires is 0.5; it must lie between 1 and 16"),
    ("tiny", ["--refiner", "{inpainting}"], "takes a model that reads 4"),
    ("tiny", ["--tile", 4], "--tile is 4"),
    ("tiny", ["--preview", 0], "--preview is 0"),
    ("tiny", ["--pag-scale", 3], "matches none"),      # this one has no middle
    ("tiny", ["--guess"], "--guess is for ControlNets"),
    ("tiny", ["--control", "{canny}"], "write DIR:FILE, DIR:FILE:0.8 or"),
    ("tiny", ["--control", "{canny}:{edges}:x"], "write DIR:FILE"),
    ("tiny", ["--control", "{canny}:{edges}:1:0.5:0.2"], "0 <= start <= end <= 1"),
    ("tiny", ["--control", "{canny}:{edges}:nan"], "must be finite"),
    ("tiny", ["--control", "{canny}:nowhere.png"], "nowhere.png cannot be read"),
    ("tiny", ["--control", "{tiny}/unet:{edges}"], "unet is a UNet; give the folder of a"),
])
def test_bad_flags_are_told_before_anything_is_compiled(
    shelf, tmp_path, capsys, monkeypatch, model, flags, message):
  monkeypatch.setattr(denoise, "run", None)
  run(shelf, tmp_path / "out", "--model", shelf / model, *ASK, *flags, code=2)
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1 and "compiled" not in error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line, message", [
    ({"mask": "mask.png"}, "--mask was given"), ({"image": "nowhere.png"}, "nowhere.png cannot"),
    ({"strength": 0.5}, "strength is 0.5, but nothing"),
    ({"height": 36, "steps": 3}, "36 × 32 px are no multiples of 8"),
])
def test_bad_lines_are_told_by_their_number(models, line, message, tmp_path):
  Image.new("L", (8, 8)).save(tmp_path / "edges.png")
  picture, _ = sample_pictures.examine(str(tmp_path / "edges.png"))
  sketch = Steering(T2IAdapter(in_channels=1, channels=(8,)), {},
                    sample_flags.Control("d", "f", 1, 0, 1), picture)
  with pytest.raises(UserError, match="list.txt line 2: .*" + message):
    sample_doors.complete(Models(*models["tiny"], None, (sketch,)), read(), [
        (1, {"prompt": "a"}), (2, {"prompt": "a"} | line)], "list.txt")


def test_a_model_of_another_kind_is_refused(models):
  sd, _ = models["tiny"]
  for fields in (dict(in_channels=5), dict(num_classes=3)):
    with pytest.raises(UserError, match="channels beside 4 of latents"):
      sample_doors.kind(dataclasses.replace(sd, unet=sd.unet.clone(**fields)))
