"""LoRA against diffusers and PEFT (PyTorch, CPU, float32): the same files, the same weights.

Factors are random for every matrix and convolution of the UNet and the text encoders.
"""

import copy
import json
import logging
import re
import warnings

import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import lora, names, single_file_names, tensors, unet_configs
from sdjax.data import tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

RANK = 3
TOLERANCE = 1e-6
NETWORKS = {"sd1": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2")}


def make_text(words, with_projection=False):
  config = transformers.CLIPTextConfig(
      vocab_size=words.vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
      num_attention_heads=4, max_position_embeddings=16, projection_dim=20,
      bos_token_id=words.bos_id, eos_token_id=words.eos_id, pad_token_id=words.pad_id)
  kind = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
  return compare.perturb(kind(config), 1)


def make_pipeline(family, folder):
  torch.manual_seed(0)
  torch.set_num_threads(1)
  words = tokenizer.train(["a red circle"], length=16, vocab_size=520)
  words.save(folder)
  clip = transformers.CLIPTokenizer.from_pretrained(folder)
  attends = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
  unet = dict(
      block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
      down_block_types=attends[0], up_block_types=attends[1], sample_size=8)
  if family == "sd1":
    unet |= dict(cross_attention_dim=24)
  else:
    unet |= dict(cross_attention_dim=48, use_linear_projection=True,
                 transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
                 addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8)
  parts = dict(
      unet=compare.perturb(diffusers.UNet2DConditionModel(**unet), 0),
      vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
      text_encoder=make_text(words), tokenizer=clip, scheduler=diffusers.DDIMScheduler())
  if family == "sd1":
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
  return diffusers.StableDiffusionXLPipeline(
      **parts, text_encoder_2=make_text(words, with_projection=True), tokenizer_2=clip)


def our_path(name, ndim):
  """The path of a parameter by its name in PyTorch, told from the name alone."""
  module, _, leaf = re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/").rpartition("/")
  if leaf == "weight":
    leaf = ("embedding" if module.endswith(("token_embedding", "position_embedding")) else
            "kernel" if ndim > 1 else "scale")
  return f"{module}/{leaf}"


def our_params(weights):
  """{network: {name: array}} of PyTorch as our tree."""
  flat = {}
  for network, arrays in weights.items():
    for name, array in arrays.items():
      path = our_path(name, array.ndim)
      assert names.to_diffusers(path) == name
      flat[f"{network}/{path}"] = names.array_from_torch(path, array)
  return pytrees.unflatten(flat)


def weights_of(pipeline):
  """{network: {today's name: array}}, without adapters around or beside the layers."""
  return {network: {
      names.canonical(name.replace(".base_layer.", ".")): tensor.detach().numpy().copy()
      for name, tensor in getattr(pipeline, network).state_dict().items()
      if ".lora_" not in name and names.canonical(name) is not None}
      for network in NETWORKS["sd1" if type(pipeline) is diffusers.StableDiffusionPipeline
                              else "sdxl"]}


@pytest.fixture(scope="module", params=NETWORKS)
def both(request, tmp_path_factory):
  """The pipeline in PyTorch, our UNet and parameters."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pipeline = make_pipeline(request.param, tmp_path_factory.mktemp("words"))
  unet = unet_configs.read(json.loads(pipeline.unet.to_json_string()))
  return pipeline, unet, our_params(weights_of(pipeline))


def draw(params, alpha, ranks=(RANK,), where=r"/kernel$", dora=False):
  """Random factors for every kernel whose path matches `where`."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: 0.3 * rng.standard_normal(shape, np.float32)
  result = {}
  for path, leaf in pytrees.flatten(params).items():
    if path.endswith("/kernel") and re.search(where, path):
      *window, inside, out = leaf.shape
      # diffusers reads no rank of its own for text_projection.
      rank = ranks[0 if "text_projection" in path else len(result) % len(ranks)]
      ones = (1,) * len(window)
      scale = np.abs(normal(out, 1, *ones)) + 0.5 if dora else None
      result[path.removesuffix("/kernel")] = lora.Factors(
          normal(rank, inside, *window), normal(out, rank, *ones), alpha or rank, None, scale)
  return result


def dotted(module, text_model=True):
  network, _, inner = module.partition("/")
  name = names.to_file(network, inner + "/kernel").removesuffix(".weight")
  return f"{network}.{name if text_model else name.removeprefix('text_model.')}"


def processor(module):
  name = dotted(module).replace(".to_out.0", ".to_out")
  name = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", name)
  head, _, layer = name.rpartition(".")
  return f"{head}.processor.{layer}" if name.startswith("unet") else name


def pairs(factors, name, down, up):
  return {name(module) + ending: array for module, each in factors.items()
          for ending, array in ((down, each.down), (up, each.up))}


def kohya(factors, unet, sgm, te):
  """kohya's names, by diffusers' blocks or by SGM's."""
  flat = {}
  for module, each in factors.items():
    network, _, name = dotted(module).partition(".")
    if network == "unet" and sgm:
      name = single_file_names.rename(name, single_file_names.unet(unet))
    prefix = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}[network]
    name = prefix + name.replace(".", "_")
    flat |= {f"{name}.lora_down.weight": each.down, f"{name}.lora_up.weight": each.up,
             f"{name}.alpha": np.float32(each.alpha)}
  return flat


ATTENTION, LINEAR_TEXT = r"attn\d?/", r"^unet/|layers_\d/(self_attn|mlp)/"
# kind -> (families, factors, tensors)
KINDS = {
    # diffusers overlooks add_embedding by this name.
    "kohya, diffusers' blocks": (
        ("sd1", "sdxl"), dict(alpha=2.0, where="^(?!unet/add_embedding)"),
        lambda given, unet: kohya(
            given, unet, False, "lora_te_" if unet.added_dim is None else "lora_te1_")),
    "kohya, SGM's blocks": (("sdxl",), dict(alpha=2.0), lambda given, unet: kohya(
        given, unet, True, "lora_te1_")),
    "PEFT": (("sd1", "sdxl"), dict(alpha=None, ranks=(3, 2, 3, 3)), lambda given, unet: pairs(
        given, dotted, ".lora_A.weight", ".lora_B.weight")),
    "PEFT, DoRA": (("sd1", "sdxl"), dict(alpha=None, dora=True), lambda given, unet: pairs(
        given, dotted, ".lora_A.weight", ".lora_B.weight") | {
            # transformers wants the last word, PEFT's own files lack it.
            dotted(module) + ".lora_magnitude_vector" + (
                "" if module.startswith("unet") else ".weight"):
            each.dora_scale[:, 0] if each.dora_scale.ndim == 2 else each.dora_scale.swapaxes(0, 1)
            for module, each in given.items()}),
    "layers": (("sd1", "sdxl"), dict(alpha=None, where=LINEAR_TEXT), lambda given, unet: {
        name.replace(".lora.", ".lora_linear_layer.") if name.startswith("text") else name: array
        for name, array in pairs(
            given, dotted, ".lora.down.weight", ".lora.up.weight").items()}),
    "processors": (("sd1", "sdxl"), dict(alpha=None, where=ATTENTION), lambda given, unet: pairs(
        given, processor, "_lora.down.weight", "_lora.up.weight")),
}


class Told(logging.Handler):
  """Collects all that the libraries warn of."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.messages = []

  def emit(self, record):
    self.messages.append(record.getMessage())


def fused(pipeline, file, scale):
  """(weights of a copy of the pipeline with the file's LoRA fused, what the libraries told)."""
  parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
  options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
  pipeline = type(pipeline)(**parts, **options)
  told = Told()
  roots = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
  for root in roots:
    root.addHandler(told)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
  for root in roots:
    root.removeHandler(told)
  pipeline.fuse_lora(lora_scale=scale, components=list(pipeline._lora_loadable_modules))
  return weights_of(pipeline), told.messages + [str(warning.message) for warning in caught]


def assert_merged_alike(name, pipeline, file, scale, params, loaded):
  expected, told = fused(pipeline, file, scale)
  before = pytrees.flatten(params)
  expected = pytrees.flatten(our_params(expected))
  ours = pytrees.flatten(lora.merge(params, [(loaded, scale)]))
  assert ours.keys() == expected.keys()
  changed = {path for path, leaf in expected.items() if not np.array_equal(leaf, before[path])}
  assert changed == {f"{module}/kernel" for module in loaded}
  error = max(np.abs(ours[path] - leaf).max() for path, leaf in expected.items())
  print(f"{name}, scale {scale}: {len(loaded)} modules, max error {error:.2g}")
  assert error <= TOLERANCE
  return told


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_as_in_diffusers(both, tmp_path, kind):
  pipeline, unet, params = both
  families, how, spell = KINDS[kind]
  if ("sd1" if unet.added_dim is None else "sdxl") not in families:
    pytest.skip("this family has no such files")
  given = draw(params, **how)
  tensors.write_file(tmp_path / "a.safetensors", spell(given, unet))
  loaded = lora.load(tmp_path / "a.safetensors", unet, params)
  assert loaded.keys() == given.keys()
  for scale in 1.0, 0.7, -0.5:
    assert_merged_alike(kind, pipeline, tmp_path / "a.safetensors", scale, params, loaded)


def test_alphas_are_read_from_diffusers_notes(both, tmp_path):
  pipeline, unet, params = both
  given, notes = draw(params, alpha=None), {}
  for network in params.keys() & lora.KOHYA.keys():
    inner = [dotted(module).partition(".")[2] for module in given
             if module.startswith(f"{network}/")]
    some = [name for name in inner if "attn" in name]
    settings = {
        "r": RANK, "lora_alpha": 2.0, "use_rslora": network == "text_encoder",
        "alpha_pattern": {"to_q": 5.0, "^" + re.escape(some[1]): 7.0} if network == "unet" else {},
        "target_modules": inner if network == "unet" else [
            name.removeprefix("text_model.") for name in inner]}
    notes |= {f"{network}.{key}": value for key, value in settings.items()}
  file = tmp_path / "a.safetensors"
  tensors.write_file(file, pairs(given, dotted, ".lora_A.weight", ".lora_B.weight"),
                     {"lora_adapter_metadata": json.dumps(notes)})
  loaded = lora.load(file, unet, params)
  assert {2.0, 5.0, 7.0, 2.0 * RANK**0.5} == {factors.alpha for factors in loaded.values()}
  for scale in 1.0, 0.7, -0.5:
    assert_merged_alike("notes", pipeline, file, scale, params, loaded)


@pytest.mark.parametrize("layout", lora.LAYOUTS)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_files_written_here_are_read_there_without_a_word(both, tmp_path, layout, dora):
  pipeline, unet, params = both
  if dora and layout == "kohya":
    pytest.skip("diffusers leaves dora_scale out of kohya's files, and says so")
  ranks = (RANK,) if layout == "kohya" else (3, 2, 3, 3)
  given = draw(params, alpha=2.0, dora=dora, ranks=ranks)
  file = tmp_path / "a.safetensors"
  lora.save(file, given, unet, layout)
  for scale in 1.0, 0.7, -0.5:
    told = assert_merged_alike(layout, pipeline, file, scale, params, given)
    assert not told
