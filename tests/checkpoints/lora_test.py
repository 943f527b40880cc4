"""LoRA: every kind of file means the same, merging is what the layers compute, and is undone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import lora, tensors
from sdjax.errors import UserError
from sdjax.models.unet import UNet

SD1 = UNet(block_out_channels=(8, 16), attention=(False, True), layers_per_block=1)
SDXL = SD1.clone(added_dim=64)
BLOCK = "unet/down_blocks_1/attentions_0/transformer_blocks_0"
# Our module -> shape of its kernel.
SHAPES = {
    "unet/conv_in": (3, 3, 4, 8),
    "unet/time_embedding/linear_1": (8, 32),
    "unet/down_blocks_0/resnets_0/conv1": (3, 3, 8, 8),
    "unet/down_blocks_0/downsamplers_0/conv": (3, 3, 8, 8),
    "unet/down_blocks_1/attentions_0/proj_in": (1, 1, 16, 16),
    "unet/mid_block/resnets_1/conv_shortcut": (1, 1, 16, 12),
    f"{BLOCK}/attn1/to_q": (16, 16),
    f"{BLOCK}/attn2/to_k": (24, 16),
    f"{BLOCK}/attn2/to_out_0": (16, 16),
    f"{BLOCK}/ff/net_0/proj": (16, 128),
    "text_encoder/encoder/layers_0/self_attn/q_proj": (24, 24),
    "text_encoder/encoder/layers_0/self_attn/out_proj": (24, 24),
    "text_encoder/encoder/layers_0/mlp/fc1": (24, 48),
    "text_encoder_2/encoder/layers_0/self_attn/v_proj": (24, 24),
    "text_encoder_2/text_projection": (24, 20),
}
# The same modules as kohya's trainers call them: for SD1, and for SDXL where that differs.
KOHYA = {
    "unet/conv_in": "unet_conv_in",
    "unet/time_embedding/linear_1": "unet_time_embedding_linear_1",
    "unet/down_blocks_0/resnets_0/conv1": "unet_down_blocks_0_resnets_0_conv1",
    "unet/down_blocks_0/downsamplers_0/conv": "unet_down_blocks_0_downsamplers_0_conv",
    "unet/down_blocks_1/attentions_0/proj_in": "unet_down_blocks_1_attentions_0_proj_in",
    "unet/mid_block/resnets_1/conv_shortcut": "unet_mid_block_resnets_1_conv_shortcut",
    f"{BLOCK}/attn1/to_q": "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    f"{BLOCK}/attn2/to_k": "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
    f"{BLOCK}/attn2/to_out_0":
        "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
    f"{BLOCK}/ff/net_0/proj": "unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
    "text_encoder/encoder/layers_0/self_attn/q_proj":
        "te_text_model_encoder_layers_0_self_attn_q_proj",
    "text_encoder/encoder/layers_0/self_attn/out_proj":
        "te_text_model_encoder_layers_0_self_attn_out_proj",
    "text_encoder/encoder/layers_0/mlp/fc1": "te_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder_2/encoder/layers_0/self_attn/v_proj":
        "te2_text_model_encoder_layers_0_self_attn_v_proj",
    "text_encoder_2/text_projection": "te2_text_projection",
}
KOHYA_SDXL = KOHYA | {
    "unet/conv_in": "unet_input_blocks_0_0",
    "unet/time_embedding/linear_1": "unet_time_embed_0",
    "unet/down_blocks_0/resnets_0/conv1": "unet_input_blocks_1_0_in_layers_2",
    "unet/down_blocks_0/downsamplers_0/conv": "unet_input_blocks_2_0_op",
    "unet/down_blocks_1/attentions_0/proj_in": "unet_input_blocks_3_1_proj_in",
    "unet/mid_block/resnets_1/conv_shortcut": "unet_middle_block_2_skip_connection",
    f"{BLOCK}/attn1/to_q": "unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    f"{BLOCK}/attn2/to_k": "unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k",
    f"{BLOCK}/attn2/to_out_0": "unet_input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    f"{BLOCK}/ff/net_0/proj": "unet_input_blocks_3_1_transformer_blocks_0_ff_net_0_proj",
    "text_encoder/encoder/layers_0/self_attn/q_proj":
        "te1_text_model_encoder_layers_0_self_attn_q_proj",
    "text_encoder/encoder/layers_0/self_attn/out_proj":
        "te1_text_model_encoder_layers_0_self_attn_out_proj",
    "text_encoder/encoder/layers_0/mlp/fc1": "te1_text_model_encoder_layers_0_mlp_fc1",
}
ATTENTION = tuple(module for module in SHAPES if "attn" in module)


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  flat = {f"{module}/kernel": rng.standard_normal(shape, np.float32)
          for module, shape in SHAPES.items()}
  return pytrees.unflatten(flat | {"unet/conv_in/bias": np.ones(8, np.float32),
                                   "vae/conv_in/kernel": np.ones((3, 3, 3, 8), np.float32)})


def draw(modules=tuple(SHAPES), rank=3, alpha=2.0, mid=False, dtype=np.float32, seed=0):
  """Random factors, in PyTorch's layout, for kernels of `SHAPES`."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, np.float32).astype(dtype)
  loras = {}
  for module in modules:
    *window, inside, out = SHAPES[module]
    ones = (1,) * len(window)
    tucker = mid and window == [3, 3]
    loras[module] = lora.Factors(
        down=normal(rank, inside, *(ones if tucker else window)), up=normal(out, rank, *ones),
        alpha=alpha, mid=normal(rank, rank, 3, 3) if tucker else None)
  return loras


def assert_same(a, b):
  assert a.keys() == b.keys()
  for module in a:
    for field in dataclasses.fields(lora.Factors):
      ours, theirs = getattr(a[module], field.name), getattr(b[module], field.name)
      assert type(ours) is type(theirs), (module, field.name)
      np.testing.assert_array_equal(ours, theirs, err_msg=f"{module} {field.name}")
      assert np.asarray(ours).dtype == np.asarray(theirs).dtype


def write(file, flat, **notes):
  tensors.write_file(file, flat, notes)
  return file


def kohya(loras, names):
  flat = {}
  for module, factors in loras.items():
    name = f"lora_{names[module]}"
    flat |= {f"{name}.lora_down.weight": factors.down, f"{name}.lora_up.weight": factors.up,
             f"{name}.alpha": np.float32(factors.alpha)}
  return flat


def dotted(module, old_text=True):
  """diffusers' name of a module of `SHAPES`."""
  for part in ("down_blocks", "attentions", "transformer_blocks", "resnets", "downsamplers",
               "to_out", "net", "layers"):
    module = module.replace(f"/{part}_", f"/{part}.")
  name = module.replace("/", ".")
  return name.replace(".encoder.", ".text_model.encoder.") if old_text else name


def pairs(loras, name, down, up):
  return {name(module) + ending: array for module, factors in loras.items()
          for ending, array in ((down, factors.down), (up, factors.up))}


def processor(module):
  """The first of diffusers' names of an attention's layer."""
  name = dotted(module).replace(".to_out.0", ".to_out")
  for part in "q", "k", "v", "out":
    name = name.replace(f".{part}_proj", f".to_{part}")
  head, _, layer = name.rpartition(".")
  return f"{head}.processor.{layer}" if name.startswith("unet") else name


PEFT = ".lora_A.weight", ".lora_B.weight"
# kind -> (modules, tensors of their factors); alphas are the rank where files do not have them.
KINDS = {
    "kohya": (tuple(SHAPES), lambda given: kohya(given, KOHYA)),
    "kohya, SDXL's blocks": (tuple(SHAPES), lambda given: kohya(given, KOHYA_SDXL)),
    "PEFT": (tuple(SHAPES), lambda given: pairs(given, dotted, *PEFT)),
    "PEFT, transformers 5": (tuple(SHAPES), lambda given: pairs(
        given, lambda module: dotted(module, old_text=False), *PEFT)),
    "layers": (tuple(SHAPES), lambda given: pairs(
        given, dotted, ".lora.down.weight", ".lora.up.weight")),
    "text layers": (ATTENTION, lambda given: pairs(
        given, dotted, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "processors": (ATTENTION, lambda given: pairs(
        given, processor, "_lora.down.weight", "_lora.up.weight")),
    "first processors": (ATTENTION[:3], lambda given: pairs(
        given, lambda module: processor(module).removeprefix("unet."),
        "_lora.down.weight", "_lora.up.weight")),
}


@pytest.mark.parametrize("unet", [SD1, SDXL], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(tmp_path, params, kind, unet):
  modules, spell = KINDS[kind]
  expected = draw(modules, alpha=2.0 if "kohya" in kind else 3.0, dtype=np.float16)
  file = write(tmp_path / "a.safetensors", spell(expected))
  assert_same(lora.load(file, unet, params), expected)


def test_conv1x1_and_matrices_are_read_for_each_other(tmp_path, params):
  modules = ("unet/down_blocks_1/attentions_0/proj_in", f"{BLOCK}/attn1/to_q")
  expected = draw(modules)
  shapes = {"proj_in": (3, 16), "to_q": (3, 16, 1, 1)}
  flat = {name: array.reshape(array.shape[:2] + (1,) * (len(shapes[key]) - 2))
          if name.endswith("weight") else array
          for name, array in kohya(expected, KOHYA).items() for key in shapes if key in name}
  file = write(tmp_path / "a.safetensors", flat)
  assert_same(lora.load(file, SD1, params), expected)


def test_alphas_in_the_notes_of_diffusers(tmp_path, params):
  notes = {
      "unet.r": 3, "unet.lora_alpha": 6, "text_encoder.lora_alpha": 3,
      "text_encoder.use_rslora": True,
      "unet.alpha_pattern": {"attn1.to_q": 5, r"^down_blocks\.0\.resnets\.0\.conv1": 7}}
  file = write(tmp_path / "a.safetensors", pairs(draw(), dotted, *PEFT),
               lora_adapter_metadata=json.dumps(notes))
  alphas = {module: factors.alpha for module, factors in lora.load(file, SDXL, params).items()}
  special = {f"{BLOCK}/attn1/to_q": 5, "unet/down_blocks_0/resnets_0/conv1": 7}
  expected = {"unet": 6, "text_encoder": 3 * 3**0.5, "text_encoder_2": 3}
  assert alphas == {
      module: special.get(module, expected[module.split("/")[0]]) for module in SHAPES}
  write(file, pairs(draw(), dotted, *PEFT), lora_adapter_metadata="{broken")
  with pytest.raises(UserError, match="lora_adapter_metadata"):
    lora.load(file, SDXL, params)


def drop(name):
  return lambda flat: flat.pop(name)


def put(name, *shape):
  return lambda flat: flat.update({name: np.ones(shape, np.float32)})


TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("change, told", [
    (put("lora_unet_nowhere.lora_up.weight", 2, 2), ("lora_unet_nowhere", "allow_unused")),
    (put(f"{TO_Q}.hada_w1_a", 2, 2), ("hada_w1_a",)),
    (put("unet.conv_in.lora_A.weight", 3, 4, 3, 3), ("two names", "conv_in")),
    (drop(f"{TO_Q}.lora_up.weight"), ("without the other", f"{TO_Q}.lora_down.weight")),
    (put(f"{TO_Q}.lora_up.weight", 16, 2), ("shapes", TO_Q)),
    (put(f"{TO_Q}.lora_down.weight", 3, 15), ("shapes", TO_Q)),
    (put(f"{TO_Q}.lora_down.weight", 3), ("shapes", TO_Q)),
    (put(f"{TO_Q}.lora_mid.weight", 3, 3, 3, 3), ("shapes", TO_Q)),
    (put(f"{TO_Q}.dora_scale", 17, 1), ("shapes", TO_Q)),
    (put(f"{TO_Q}.alpha", 2), ("shapes", TO_Q)),
    (lambda flat: [flat.pop(name) for name in list(flat)] + [put("x.alpha", 1)(flat)],
     ("no LoRA", "another model")),
])
def test_what_is_wrong_is_told_by_name(tmp_path, params, change, told):
  flat = kohya(draw(), KOHYA)
  change(flat)
  with pytest.raises(UserError) as error:
    lora.load(write(tmp_path / "a.safetensors", flat), SD1, params)
  assert all(part in str(error.value) for part in (*told, "a.safetensors"))


def test_unused_tensors_are_left_out_on_request(tmp_path, params):
  flat = kohya(draw(), KOHYA)
  expected = lora.load(write(tmp_path / "a.safetensors", flat), SD1, params)
  others = {f"{TO_Q.replace('to_q', 'to_v')}.alpha": np.ones(()), "bundle_emb.x": np.ones(2)}
  file = write(tmp_path / "b.safetensors", flat | others)
  assert_same(lora.load(file, SD1, params, allow_unused=True), expected)
  with pytest.raises(UserError, match="no LoRA"):
    lora.load(write(tmp_path / "c.safetensors", others), SD1, params, allow_unused=True)


def conv(x, kernel):  # kernel in PyTorch's layout
  pad = kernel.shape[2] // 2
  return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), ((pad, pad),) * 2, dimension_numbers=("NHWC", "OIHW", "NHWC"))


@pytest.mark.parametrize("mid", [False, True], ids=["plain", "Tucker"])
@pytest.mark.parametrize("scale", [1.0, 0.7, -0.5])
def test_merged_convolution_is_the_sum_of_both_branches(params, mid, scale):
  module = "unet/down_blocks_0/resnets_0/conv1"
  factors = draw([module], mid=mid)[module]
  x = np.random.default_rng(1).standard_normal((1, 5, 6, 8), np.float32)
  kernel = pytrees.flatten(params)[f"{module}/kernel"].transpose(3, 2, 0, 1)
  branch = conv(x, factors.down)
  branch = conv(branch if factors.mid is None else conv(branch, factors.mid), factors.up)
  merged = pytrees.flatten(lora.merge(params, [({module: factors}, scale)]))[f"{module}/kernel"]
  np.testing.assert_allclose(
      conv(x, merged.transpose(3, 2, 0, 1)), conv(x, kernel) + scale * 2 / 3 * branch, atol=2e-4)


def test_merged_matrix_is_the_sum_of_both_branches(params):
  module = f"{BLOCK}/ff/net_0/proj"
  factors = draw([module])[module]
  x = np.random.default_rng(1).standard_normal((5, 16), np.float32)
  merged = pytrees.flatten(lora.merge(params, [({module: factors}, -1.5)]))[f"{module}/kernel"]
  expected = x @ pytrees.flatten(params)[f"{module}/kernel"] - (
      1.5 * 2 / 3 * (x @ factors.down.T) @ factors.up.T)
  np.testing.assert_allclose(x @ merged, expected, atol=2e-5)


@pytest.mark.parametrize("module", [
    "unet/down_blocks_0/resnets_0/conv1", f"{BLOCK}/attn2/to_k"])
@pytest.mark.parametrize("per_input", [False, True], ids=["per output", "per input"])
def test_dora_sets_the_norms_and_keeps_the_directions(tmp_path, params, module, per_input):
  flat = pytrees.flatten(params)
  plain = draw([module])
  *window, inside, out = SHAPES[module]
  n, axis = (inside, -2) if per_input else (out, -1)
  magnitudes = np.random.default_rng(2).uniform(0.5, 2, n).astype(np.float32)
  name = f"lora_{KOHYA[module]}"
  ones = (1,) * len(window)
  file = write(tmp_path / "a.safetensors", kohya(plain, KOHYA) | {
      f"{name}.dora_scale": magnitudes.reshape((1, n, *ones) if per_input else (n, 1, *ones))})
  dora = lora.load(file, SD1, params)
  merged = pytrees.flatten(lora.merge(params, [(dora, 0.7)]))[f"{module}/kernel"]
  direction = pytrees.flatten(lora.merge(params, [(plain, 0.7)]))[f"{module}/kernel"]
  assert not np.allclose(direction, flat[f"{module}/kernel"])

  rows = lambda kernel: np.moveaxis(kernel, axis, 0).reshape(n, -1)
  np.testing.assert_allclose(np.linalg.norm(rows(merged), axis=1), magnitudes, rtol=1e-5)
  cosines = np.sum(rows(merged) * rows(direction), 1) / (
      np.linalg.norm(rows(merged), axis=1) * np.linalg.norm(rows(direction), axis=1))
  np.testing.assert_allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merging_is_undone_to_the_bit_by_the_old_tree(params, dtype):
  params = pytrees.cast(params, dtype)
  before = {path: leaf.tobytes() for path, leaf in pytrees.flatten(params).items()}
  some = draw(("unet/conv_in", "text_encoder_2/text_projection"))
  merged = lora.merge(params, [(some, 0.7)])
  old, new = pytrees.flatten(params), pytrees.flatten(merged)
  assert {path: leaf.tobytes() for path, leaf in old.items()} == before
  changed = {path for path in old if new[path] is not old[path]}
  assert changed == {f"{module}/kernel" for module in some}
  assert all(new[path].dtype == dtype and new[path].tobytes() != before[path] for path in changed)
  unchanged = pytrees.flatten(lora.merge(params, [(some, 0.0)]))
  assert all(unchanged[path] is leaf for path, leaf in old.items())


def test_several_at_once_in_any_order_and_their_opposite(params):
  a, b = draw(seed=1), draw(tuple(SHAPES)[:8], rank=2, mid=True, seed=2)
  ab, ba = (pytrees.flatten(lora.merge(params, loras))
            for loras in ([(a, 0.7), (b, -0.5)], [(b, -0.5), (a, 0.7)]))
  one_by_one = pytrees.flatten(lora.merge(lora.merge(params, [(a, 0.7)]), [(b, -0.5)]))
  nothing = pytrees.flatten(lora.merge(params, [(a, 0.7), (b, 2.0), (b, -2.0), (a, -0.7)]))
  for path, leaf in pytrees.flatten(params).items():
    np.testing.assert_array_equal(ab[path], ba[path])
    np.testing.assert_allclose(ab[path], one_by_one[path], atol=1e-5)
    np.testing.assert_allclose(nothing[path], leaf, atol=1e-5)


def test_leaves_on_devices_stay_there(params):
  on_device = jax.tree.map(jnp.asarray, params)
  merged = lora.merge(on_device, [(draw(), 1.0)])
  expected = pytrees.flatten(lora.merge(params, [(draw(), 1.0)]))
  for path, leaf in pytrees.flatten(merged).items():
    assert isinstance(leaf, jax.Array)
    np.testing.assert_array_equal(leaf, expected[path])


def test_merging_into_another_model_is_refused(params):
  del params["text_encoder_2"]
  params["unet"]["conv_in"]["kernel"] = np.ones((3, 3, 9, 8), np.float32)
  with pytest.raises(UserError) as error:
    lora.merge(params, [(draw(), 1.0)])
  assert "unet/conv_in" in str(error.value) and "text_encoder_2/text_pro" in str(error.value)
  assert "down_blocks" not in str(error.value)


@pytest.mark.parametrize("unet, spelled", [(SD1, KOHYA), (SDXL, KOHYA_SDXL)], ids=["sd1", "sdxl"])
def test_kohya_files_have_kohyas_names_and_all_parts(tmp_path, params, unet, spelled):
  expected = draw(mid=True, dtype=np.float16)
  expected |= {module: dataclasses.replace(factors, dora_scale=np.full(
      (1, factors.down.shape[1], *factors.up.shape[2:]), 2.0, np.float32))
      for module, factors in expected.items()}
  lora.save(tmp_path / "a.safetensors", expected, unet)
  modules = {name.partition(".")[0] for name in tensors.open_file(tmp_path / "a.safetensors")}
  assert modules == {f"lora_{name}" for name in spelled.values()}
  assert_same(lora.load(tmp_path / "a.safetensors", unet, params), expected)


@pytest.mark.parametrize("alpha, dtype", [(1.5, np.float16), (2.0, np.float32)])
def test_peft_files_merge_alike(tmp_path, params, alpha, dtype):
  given = draw(alpha=alpha, mid=True, dtype=dtype)
  lora.save(tmp_path / "a.safetensors", given, SDXL, "peft")
  stored = tensors.open_file(tmp_path / "a.safetensors")
  assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored)
  again = lora.load(tmp_path / "a.safetensors", SDXL, params)
  if alpha == 1.5:  # half the rank: exact in every dtype
    assert all(factors.up.dtype == dtype for factors in again.values())
  merged, expected = (pytrees.flatten(lora.merge(params, [(each, 0.7)]))
                      for each in (again, given))
  for path, leaf in merged.items():
    np.testing.assert_allclose(leaf, expected[path], atol=3e-6)


def test_alpha_is_folded_without_loss_of_digits():
  factors = draw(["unet/conv_in"], alpha=1.0, dtype=np.float16)["unet/conv_in"]
  flat = lora._to_peft({"unet/conv_in": factors}, SD1)
  up = flat["unet.conv_in.lora_B.weight"]
  assert up.dtype == np.float32
  np.testing.assert_allclose(up, factors.up.astype(np.float64) / 3, rtol=2**-23)


def test_what_peft_cannot_say_and_unknown_layouts_are_refused(tmp_path):
  given = draw(ATTENTION[:2])
  first = dataclasses.replace(given[ATTENTION[0]], dora_scale=np.ones((16, 1), np.float32))
  some = given | {ATTENTION[0]: first}
  inputs = {ATTENTION[0]: dataclasses.replace(first, dora_scale=np.ones((1, 16), np.float32))}
  for refused in (some, inputs):
    with pytest.raises(UserError, match="kohya"):
      lora.save(tmp_path / "a", refused, SD1, "peft")
    lora.save(tmp_path / "b", refused, SD1)
  with pytest.raises(UserError, match="kohya, peft"):
    lora.save(tmp_path / "a", given, SD1, "diffusers")
  assert not (tmp_path / "a").exists()
