"""Names and layouts: complete and one-to-one for the released sizes, and invertible."""

import functools

import jax
import numpy as np
import pytest

from sdjax import pytrees
from sdjax.checkpoints import names
from sdjax.models.presets import PRESETS, preset


@functools.cache
def shapes(name):
  modules = preset(name)
  networks = {network: modules[network] for network in ("unet", "vae") if network in modules}
  for network, text in zip(("text_encoder", "text_encoder_2"), modules.get("text_encoders", ())):
    networks[network] = text
  return {network: pytrees.flatten(
      jax.eval_shape(module.init, jax.random.key(0), *module.example())["params"])
          for network, module in networks.items()}


# Written by hand from the index files of the released models.
RELEASED = {
    "unet": {
        "conv_in/kernel": "conv_in.weight",
        "time_embedding/linear_1/bias": "time_embedding.linear_1.bias",
        "down_blocks_0/resnets_1/conv1/kernel": "down_blocks.0.resnets.1.conv1.weight",
        "down_blocks_0/downsamplers_0/conv/bias": "down_blocks.0.downsamplers.0.conv.bias",
        "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/kernel":
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
        "up_blocks_1/attentions_2/transformer_blocks_0/ff/net_0/proj/kernel":
            "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj.weight",
        "up_blocks_1/attentions_2/transformer_blocks_0/norm3/scale":
            "up_blocks.1.attentions.2.transformer_blocks.0.norm3.weight",
    },
    "vae": {
        "encoder/mid_block/attentions_0/group_norm/scale":
            "encoder.mid_block.attentions.0.group_norm.weight",
        "decoder/up_blocks_0/upsamplers_0/conv/kernel":
            "decoder.up_blocks.0.upsamplers.0.conv.weight",
        "post_quant_conv/kernel": "post_quant_conv.weight",
    },
    "text_encoder": {
        "embeddings/token_embedding/embedding": "embeddings.token_embedding.weight",
        "encoder/layers_11/self_attn/q_proj/kernel": "encoder.layers.11.self_attn.q_proj.weight",
        "encoder/layers_11/layer_norm1/scale": "encoder.layers.11.layer_norm1.weight",
        "final_layer_norm/bias": "final_layer_norm.bias",
    },
}


@pytest.mark.parametrize("network", RELEASED)
def test_names_are_those_of_the_released_files(network):
  trees = shapes("sd15")[network]
  for path, name in RELEASED[network].items():
    assert path in trees and names.to_diffusers(path) == name


@pytest.mark.parametrize("name", PRESETS)
def test_names_are_one_to_one_and_their_own_canonical_form(name):
  for network, flat in shapes(name).items():
    found = [names.to_diffusers(path) for path in flat]
    assert len(set(found)) == len(found)
    assert [names.canonical(names.to_file(network, path)) for path in flat] == found


def test_layouts_of_every_kind_of_tensor():
  kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # [h w in out]
  theirs = names.array_to_torch("conv/kernel", kernel)
  assert theirs.shape == (5, 4, 2, 3) == names.shape_to_torch("conv/kernel", kernel.shape)
  assert theirs[4, 3, 1, 2] == kernel[1, 2, 3, 4]
  matrix = kernel[0, 0]
  np.testing.assert_array_equal(names.array_to_torch("to_q/kernel", matrix), matrix.T)
  np.testing.assert_array_equal(names.array_to_torch("token/embedding", matrix), matrix)


def test_layouts_are_invertible_and_contiguous():
  rng = np.random.default_rng(0)
  for path, shape in (("a/kernel", (3, 3, 4, 5)), ("a/kernel", (4, 5)), ("a/embedding", (4, 5)),
                      ("a/scale", (4,)), ("a/bias", (4,))):
    array = rng.standard_normal(shape)
    theirs = names.array_to_torch(path, array)
    again = names.array_from_torch(path, theirs)
    assert theirs.flags.c_contiguous and again.flags.c_contiguous
    np.testing.assert_array_equal(again, array)


def test_spellings_of_other_versions_are_known():
  assert names.canonical("text_model.final_layer_norm.weight") == "final_layer_norm.weight"
  assert names.canonical("text_model.embeddings.position_ids") is None
  old = "decoder.mid_block.attentions.0."
  assert names.canonical(old + "query.weight") == old + "to_q.weight"
  assert names.canonical(old + "proj_attn.bias") == old + "to_out.0.bias"
