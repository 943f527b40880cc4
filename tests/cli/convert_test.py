"""`sdjax convert` between all formats, on tiny models made here."""

import json

import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import diffusers, lora, single_file, sources, tensors, textual_inversion
from sdjax.cli import convert
from sdjax.errors import UserError

KERNEL = "unet/up_blocks_0/attentions_1/proj_in"


def same(a, b):
  a, b = pytrees.flatten(a), pytrees.flatten(b)
  return a.keys() == b.keys() and all(
      a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes() for path in a)


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
  """(sd, params, its folder)."""
  sd, params = tiny_model
  folder = tmp_path_factory.mktemp("convert") / "model"
  diffusers.save(folder, sd, params)
  return sd, params, folder


@pytest.fixture(scope="module")
def adapter(model):
  """A LoRA of one module, rank 3, alpha 6."""
  sd, params, _ = model
  kernel = pytrees.flatten(params)[f"{KERNEL}/kernel"]
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  inputs, outputs = kernel.shape[-2:]
  ones = (1,) * (kernel.ndim - 2)
  return {KERNEL: lora.Factors(normal(3, inputs, *ones), normal(outputs, 3, *ones), 6.0)}


def test_folder_to_single_file_and_back(model, tmp_path, capsys):
  sd, params, folder = model
  file = tmp_path / "m.safetensors"
  convert.main([str(folder), str(file), "--dtype", "bfloat16"])
  assert "all tensors are equal" in capsys.readouterr().out
  convert.main([str(file), str(tmp_path / "again"), "--like", str(folder)])
  sd_again, again = diffusers.load(tmp_path / "again", None)
  assert same(again, pytrees.cast(params, "bfloat16")) and sd_again == sd
  with pytest.raises(UserError, match="single file of Stable Diffusion"):
    convert.main([str(file), str(tmp_path / "third")])  # no released size, and nothing to be like


def test_a_file_that_reads_back_differently_is_told(model, tmp_path):
  sd, params, folder = model
  single_file.save(tmp_path / "m.safetensors", sd, params)
  other = pytrees.map_paths(
      lambda path, leaf: leaf + 1 if path == "unet/conv_in/bias" else leaf, params)
  with pytest.raises(UserError, match="differently in 1 tensors, first unet/conv_in/bias"):
    convert.verify(tmp_path / "m.safetensors", sd, other)


def test_loras_are_merged_at_their_scale(model, adapter, tmp_path):
  sd, params, folder = model
  lora.save(tmp_path / "a.safetensors", adapter, sd.unet)
  flag = f"{tmp_path / 'a.safetensors'}:0.5"
  convert.main([str(folder), str(tmp_path / "merged"), "--lora", flag, "--lora", flag])
  merged = pytrees.flatten(diffusers.load(tmp_path / "merged")[1])
  factors = adapter[KERNEL]
  change = 2.0 * np.tensordot(factors.up.reshape(-1, 3), factors.down.reshape(3, -1), 1)
  before = pytrees.flatten(params)
  np.testing.assert_allclose(
      merged[f"{KERNEL}/kernel"].squeeze(), before[f"{KERNEL}/kernel"].squeeze() + change.T,
      atol=1e-5)
  assert all(np.array_equal(before[path], merged[path]) for path in before if KERNEL not in path)


def test_lora_between_layouts(model, adapter, tmp_path, capsys):
  sd, params, folder = model
  kohya, peft = tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"
  lora.save(kohya, adapter, sd.unet)
  with pytest.raises(UserError, match="--like"):
    convert.main([str(kohya), str(peft)])
  convert.main([str(kohya), str(peft), "--like", str(folder), "--layout", "peft"])
  assert all(name.startswith("unet.") and ".lora_" in name for name in tensors.open_file(peft))
  shapes = sd.param_shapes()
  a, b = (lora.merge(params, [(lora.load(file, sd.unet, shapes), 1.0)]) for file in (kohya, peft))
  for one, other in zip(pytrees.flatten(a).values(), pytrees.flatten(b).values(), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_textual_inversions_are_written_as_diffusers_does(tmp_path):
  vectors = np.arange(8, dtype=np.float32).reshape(2, 4)
  tensors.write_file(tmp_path / "cat.safetensors", {"emb_params": vectors})
  convert.main([str(tmp_path / "cat.safetensors"), str(tmp_path / "new.safetensors")])
  found = textual_inversion.load(tmp_path / "new.safetensors")
  assert found.trigger == "cat"
  np.testing.assert_array_equal(found.vectors[0], vectors)


def test_folder_of_one_network(model, tmp_path):
  sd, params, folder = model
  convert.main([str(folder / "unet"), str(tmp_path / "unet"), "--dtype", "float16"])
  module, tree = diffusers.load_network(tmp_path / "unet", None)
  assert module == sd.unet and same(tree, pytrees.cast(params["unet"], "float16"))


def test_inspect_tells_what_each_is(model, adapter, tmp_path, capsys):
  sd, params, folder = model
  lora.save(tmp_path / "a.safetensors", adapter, sd.unet)
  tensors.write_file(tmp_path / "cat.safetensors", {"emb_params": np.ones((2, 4), np.float32)})
  count = f"{pytrees.count(params['unet']):,} parameters, float32"
  single_file.save(tmp_path / "m.safetensors", sd, params)
  for source, told in (
      (tmp_path / "m.safetensors", (
          "single file", "Stable Diffusion 1", "modelspec.prediction_type = epsilon",
          f"model            {pytrees.count(params['unet']):,} parameters")),
      (folder, ("model folder", "Stable Diffusion 1", "text to image", count)),
      (folder / "unet", ("network folder", "UNet2DConditionModel", count)),
      (tmp_path / "a.safetensors", ("LoRA", "modules          1", "ranks            3")),
      (tmp_path / "cat.safetensors", ("textual inversion",))):
    assert convert.main(["--inspect", str(source), "--like", str(folder)]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in (*told, "sha256")), out


@pytest.mark.parametrize("arguments, told", [
    (["nowhere", "there"], "there is no model nowhere"),
    (["--inspect", "nowhere"], "there is no model nowhere"),
    (["hf://nobody/nothing", "there"], "hf://nobody/nothing cannot be fetched"),
    (["{folder}", "there", "--lora", "x.safetensors:half"], "'half' is no number"),
    (["{folder}"], "SRC and DST"),
    (["{folder}", "{folder}"], "choose another DST"),
])
def test_what_is_wrong_is_told(model, arguments, told, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  with pytest.raises(UserError, match=told):
    convert.main([argument.format(folder=model[2]) for argument in arguments])
  assert not list(tmp_path.iterdir())


def test_sources_know_runs_and_folders(model, tmp_path):
  _, params, folder = model
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "model").symlink_to(folder)
  assert same(sources.load(tmp_path / "run")[1], params)
  assert sources.describe(folder) == model[0]
  index = json.loads((folder / "model_index.json").read_text())
  assert index["_class_name"] == "StableDiffusionPipeline"
