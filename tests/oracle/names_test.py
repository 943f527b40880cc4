"""Full-size networks have the tensors of diffusers' and transformers' own, and of single files.

Nothing is allocated: shapes here, the meta device there.
"""

import json

import jax
import pytest

from sdjax import pytrees
from sdjax.checkpoints import (
  clip_configs,
  model_configs,
  names,
  single_file,
  single_file_names,
  unet_configs,
  weights,
)
from sdjax.data import tokenizer
from sdjax.diffusion import schedules
from sdjax.models.clip import CLIPVision
from sdjax.models.controlnet import ControlNet
from sdjax.models.presets import preset
from sdjax.stable_diffusion import StableDiffusion

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

FAMILIES = ("sd15", "sd21", "sdxl", "sdxl_refiner")
SD15 = preset("sd15")["unet"]
UPSCALER = preset("sd21")["unet"].clone(
    in_channels=7, block_out_channels=(256, 512, 512, 1024), attention=(False, True, True, True),
    num_heads=8, num_classes=1000, self_attention=(False, False, False, True))
XL = preset("sdxl")["unet"]
ENCODER = {name: getattr(XL, name) for name in ControlNet.__dataclass_fields__
           if hasattr(XL, name) and name not in ("parent", "name")}

NETWORKS = {
    **{f"{name} unet": preset(name)["unet"] for name in FAMILIES},
    "inpaint unet": SD15.clone(in_channels=9),
    "pix2pix unet": SD15.clone(in_channels=8),
    "depth unet": preset("sd21")["unet"].clone(in_channels=5),
    "upscaler unet": UPSCALER,
    "lcm unet": SD15.clone(guidance_dim=256),
    "cifar10 unet": preset("cifar10")["unet"],
    "church unet": preset("cifar10")["unet"].clone(
        block_out_channels=(128, 128, 256, 256, 512, 512), attention=(False,) * 4 + (True, False)),
    "sd1 controlnet": ControlNet(),
    "sd2 controlnet": ControlNet(
        num_heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True),
    "sdxl controlnet": ControlNet(**ENCODER),
    "sd1 vae": preset("sd15")["vae"],
    "sdxl vae": preset("sdxl")["vae"],
    "upscaler vae": preset("sd15")["vae"].clone(
        block_out_channels=(128, 256, 512), scaling_factor=0.08333),
    "flux vae": preset("sd15")["vae"].clone(
        latent_channels=16, quant_conv=False, post_quant_conv=False, scaling_factor=0.3611,
        shift_factor=0.1159),
    **{f"{name} text {i}": text for name in FAMILIES
       for i, text in enumerate(preset(name)["text_encoders"])},
    "l14 vision": CLIPVision(),
    "h14 vision": CLIPVision(width=1280, layers=32, mlp_width=5120, activation="gelu",
                             projection=1024),
    "bigG14 vision": CLIPVision(width=1664, layers=48, mlp_width=8192, activation="gelu",
                                projection=1280),
}


def config_of(name, module):
  kind = name.split()[1]
  write = {"vae": model_configs.write_vae, "vision": clip_configs.write_image_encoder,
           "text": lambda text: clip_configs.write_text_encoder(text, tokenizer.clip())}
  return json.loads(json.dumps(write.get(kind, unet_configs.write)(module)))


def on_meta(config):
  """PyTorch's network of a config.json."""
  name = config.get("_class_name") or config["architectures"][0]
  options = {key: value for key, value in config.items() if key[0] != "_"}
  with torch.device("meta"):
    if hasattr(diffusers, name):
      return getattr(diffusers, name)(**options)
    network = getattr(transformers, name)
    return network(network.config_class(**options))


def shapes(module):
  return pytrees.flatten(
      jax.eval_shape(module.init, jax.random.key(0), *module.example())["params"])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_its_name_and_shape(name):
  module = NETWORKS[name]
  theirs = {names.canonical(key): tuple(tensor.shape)
            for key, tensor in on_meta(config_of(name, module)).state_dict().items()}
  theirs.pop(None, None)
  assert {names.to_diffusers(path): names.shape_to_torch(path, leaf.shape)
          for path, leaf in shapes(module).items()} == theirs


def model(family, **changes):
  modules = preset(family)
  return StableDiffusion(
      unet=modules["unet"].clone(**changes), vae=modules["vae"],
      text_encoders=modules["text_encoders"], schedule=schedules.Schedule())


@pytest.mark.parametrize("family, channels", [
    *((family, 4) for family in FAMILIES), ("sd15", 9), ("sd15", 8), ("sd21", 5), ("sdxl", 9)])
def test_single_files_are_what_diffusers_converts(family, channels):
  """diffusers' converters, run on our names, give diffusers' names and shapes."""
  from diffusers.loaders import single_file_utils as utils
  sd = model(family, in_channels=channels)
  towers = single_file_names.TEXT[single_file.family(sd)]
  flat = pytrees.flatten(sd.param_shapes())
  tensors = weights.to_tensors(single_file.places(sd, towers, flat), flat)
  checkpoint = {name: torch.empty(tensor.shape, device="meta")
                for name, tensor in tensors.items()}

  def assert_same(converted, network, config):
    expected = {names.canonical(key): tuple(tensor.shape)
                for key, tensor in on_meta(config).state_dict().items()}
    expected.pop(None, None)
    found = {names.canonical(key): tuple(tensor.shape) for key, tensor in converted.items()}
    assert found == expected, network

  config = unet_configs.write(sd.unet)
  assert_same(utils.convert_ldm_unet_checkpoint(dict(checkpoint), config), "unet", config)
  config = model_configs.write_vae(sd.vae)
  assert_same(utils.convert_ldm_vae_checkpoint(dict(checkpoint), config), "vae", config)
  for text, (prefix, openclip) in zip(sd.text_encoders, towers, strict=True):
    config = clip_configs.write_text_encoder(text, tokenizer.clip())
    if openclip:
      converted = utils.convert_open_clip_checkpoint(on_meta(config), dict(checkpoint), prefix)
    else:
      prefix = prefix.removesuffix("text_model.")
      converted = utils.convert_ldm_clip_checkpoint(dict(checkpoint), prefix)
    assert_same(converted, "text", config)
  assert all(name.startswith((*single_file_names.PREFIXES.values(), *(p for p, _ in towers)))
             for name in checkpoint)
