"""Folders of single networks through diffusers and back; pickled checkpoints."""

import warnings

import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import diffusers as folders
from sdjax.checkpoints import pickles, single_file, single_file_names, sources, weights
from sdjax.cli import convert
from sdjax.errors import UserError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

NETWORKS = {
    "controlnet": lambda: diffusers.ControlNetModel(
        block_out_channels=(16, 32), cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
        conditioning_embedding_out_channels=(4, 8, 8, 12)),
    "pixels": lambda: diffusers.UNet2DModel(
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, sample_size=8),
    "vae": lambda: diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
    "adapter": lambda: diffusers.T2IAdapter(channels=(8, 16), adapter_type="light_adapter"),
    "vision": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, projection_dim=8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folders_of_one_network_go_round(name, tmp_path):
  theirs = compare.perturb(NETWORKS[name](), 0)
  theirs.save_pretrained(tmp_path / "theirs")
  module, params = folders.load_network(tmp_path / "theirs")
  folders.save_network(tmp_path / "ours", module, params)
  again = type(theirs).from_pretrained(tmp_path / "ours")
  before, after = theirs.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  assert all(torch.equal(before[key], after[key]) for key in before)
  assert folders.load_network(tmp_path / "ours")[0] == module


def test_files_of_several_parts_and_variants_are_read_as_diffusers_writes_them(tmp_path):
  theirs = compare.perturb(NETWORKS["controlnet"](), 0)
  theirs.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
  assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
  _, whole = folders.load_network(tmp_path / "parts")
  theirs.half().save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
  _, half = folders.load_network(tmp_path / "half", None)
  for a, b in zip(pytrees.flatten(whole).values(), pytrees.flatten(half).values(), strict=True):
    assert b.dtype == np.float16
    np.testing.assert_array_equal(a.astype(np.float16), b)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
  """(sd, params, their folder, their tensors as PyTorch's)."""
  sd, params = tiny_model
  folder = tmp_path_factory.mktemp("ckpt") / "model"
  folders.save(folder, sd, params)
  flat = pytrees.flatten(params)
  stored = weights.to_tensors(single_file.places(sd, single_file_names.TEXT["sd1"], flat), flat)
  return sd, params, folder, {
      name: torch.tensor(np.asarray(tensor)) for name, tensor in stored.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_tensors_is_converted(checkpoint, tmp_path, dtype, zipped):
  sd, params, folder, state = checkpoint
  state = {name: tensor.to(dtype) for name, tensor in state.items()}
  torch.save({"state_dict": state | {"model_ema.decay": torch.ones(())}, "global_step": 3},
             tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
  convert.main([str(tmp_path / "m.ckpt"), str(tmp_path / "out"), "--like", str(folder)])
  _, found = folders.load(tmp_path / "out", None)
  expected = pytrees.flatten(pytrees.cast(params, str(dtype).removeprefix("torch.")))
  for path, leaf in pytrees.flatten(found).items():
    assert leaf.dtype == expected[path].dtype and leaf.tobytes() == expected[path].tobytes()
  with pytest.raises(UserError, match="sdjax convert"):
    sources.load(tmp_path / "m.ckpt")


class Touch:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(checkpoint, tmp_path, zipped):
  *_, state = checkpoint
  torch.save({"state_dict": state, "callback": Touch(tmp_path / "touched")}, tmp_path / "m.ckpt",
             _use_new_zipfile_serialization=zipped)
  with pytest.raises(UserError, match="could run code"):
    convert.main([str(tmp_path / "m.ckpt"), str(tmp_path / "out")])
  assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.load(tmp_path / "m.ckpt", weights_only=False)  # it would have
  assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04nonsense"])
def test_what_is_no_checkpoint_is_told(tmp_path, content):
  (tmp_path / "m.ckpt").write_bytes(content)
  with pytest.raises(UserError, match="m.ckpt"):
    pickles.open_file(tmp_path / "m.ckpt")
