"""Tensor names of single files (CompVis' and Stability's), against those of diffusers.

  unet   down_blocks.0.resnets.1.conv1           model.diffusion_model.input_blocks.2.0.in_layers.2
  vae    encoder.down_blocks.0.resnets.1.conv1   first_stage_model.encoder.down.0.block.1.conv1
  text   encoder.layers.3.layer_norm1            cond_stage_model.model.transformer.resblocks.3.ln_1

`unet`, `vae` and `openclip` return {prefix of diffusers' names: prefix of theirs}, for `rename`.
"""

import re
from collections.abc import Mapping

from sdjax.models.clip import CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL

# Our network -> where its tensors stand. Text towers: see `TEXT`.
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}

# Text towers by what the UNet reads: (prefix, whether by OpenCLIP's names), of each tower.
TEXT = {
    "sd1": (("cond_stage_model.transformer.text_model.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (("conditioner.embedders.0.transformer.text_model.", False),
             ("conditioner.embedders.1.model.", True)),
    "sdxl_refiner": (("conditioner.embedders.0.model.", True),),
}

# What real files carry beside the parameters: schedules as buffers, an EMA of which the file holds
# the weights already, networks that pictures are prepared with, marks.
IGNORED = (
    r"^model_ema\.", r"^first_stage_model\.(loss|model_ema)\.", r"^(depth|low_scale)_model\.",
    r"^[a-z_]*(alphas_cumprod|betas|variance|_coef\d)[a-z_]*$", r"^(logvar|lvlb_weights)$",
    r"^denoiser\.", r"^(v_pred|ztsnr|edm_mean|edm_std)$", r"^scale_factor$",
    r"\.position_ids$", r"\.(attn_mask|logit_scale)$",
    r"^(cond_stage_model|conditioner\.embedders\.\d)\.model\.visual\.",
    r"^cond_stage_model\.model\.text_projection$",
)
# Files of early trainers lack a word.
SYNONYMS = (
    (r"^cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\.",
     r"cond_stage_model.transformer.text_model.\1."),
)
# Tensors that lie as ours do, where PyTorch's layers would have them transposed.
AS_HERE = re.compile(r"text_projection$")
# Matrices that are 1 × 1 convolutions there.
EXPANDED = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}
# OpenCLIP. Queries, keys and values are one tensor there, stacked in this order.
STACKED = ("q_proj", "k_proj", "v_proj")
OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{part}.{leaf}": f"attn.in_proj_{leaf}"
       for leaf in ("weight", "bias") for part in STACKED},
}


def unet(network: UNet) -> dict[str, str]:
  """Blocks are numbered through there: the input convolution, residual blocks, resamplings."""
  levels, layers = len(network.block_out_channels), network.layers_per_block
  blocks, resnets = dict(UNET_ENDS), {}
  for level in range(levels):
    first = 1 + level * (layers + 1)
    for i in range(layers):
      resnets[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{first + i}.0"
      blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{first + i}.1"
    blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
  resnets |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
  blocks["mid_block.attentions.0"] = "middle_block.1"
  for level in range(levels):
    first = level * (layers + 1)
    for i in range(layers + 1):
      resnets[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{first + i}.0"
      blocks[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{first + i}.1"
    place = 1 + network.attention[levels - 1 - level]
    blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
  return blocks | _products(resnets, RESNET)


def vae(network: AutoencoderKL) -> dict[str, str]:
  """Levels of the decoder are numbered from the full resolution there, from the lowest here."""
  levels, layers = len(network.block_out_channels), network.layers_per_block
  blocks = {}
  for level in range(levels):
    here, there = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
    blocks[f"{here}.downsamplers.0"] = f"{there}.downsample"
    for i in range(layers):
      blocks |= _vae_resnet(f"{here}.resnets.{i}", f"{there}.block.{i}")
    here, there = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
    blocks[f"{here}.upsamplers.0"] = f"{there}.upsample"
    for i in range(layers + 1):
      blocks |= _vae_resnet(f"{here}.resnets.{i}", f"{there}.block.{i}")
  for half in ("encoder", "decoder"):
    for i in range(2):
      blocks |= _vae_resnet(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}")
    blocks |= _products({f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}, VAE_ATTENTION)
    blocks |= {f"{half}.conv_norm_out": f"{half}.norm_out", f"{half}.conv_in": f"{half}.conv_in",
               f"{half}.conv_out": f"{half}.conv_out"}
  return blocks | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}


def openclip(network: CLIPText) -> dict[str, str]:
  """The text towers of SD2, of SDXL's second encoder and of its refiner."""
  layers = {f"encoder.layers.{i}": f"transformer.resblocks.{i}" for i in range(network.layers)}
  return OPENCLIP | _products(layers, OPENCLIP_LAYER)


def rename(name: str, table: Mapping[str, str]) -> str | None:
  """Replaces the longest prefix of whole words that the table has; None: it has none."""
  prefix = name
  while prefix:
    if prefix in table:
      return table[prefix] + name[len(prefix):]
    prefix = prefix.rpartition(".")[0]
  return None


def _vae_resnet(here: str, there: str) -> dict[str, str]:
  return {here: there, f"{here}.conv_shortcut": f"{there}.nin_shortcut"}


def _products(outer: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
  return {f"{here}.{part}": f"{there}.{part_there}"
          for here, there in outer.items() for part, part_there in inner.items()}
