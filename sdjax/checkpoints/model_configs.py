"""`config.json` of diffusers and transformers, read as modules and written from them.

Each file has three kinds of options: those that are fields of our modules, those that have to have
the one value that Stable Diffusion 1 and 2 give them, and those that change no number. All that is
unknown must be off. A file that leaves an option out means the default of diffusers' constructor.
"""

from collections.abc import Mapping
from typing import Any

from sdjax.data.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.models.clip import ACTIVATIONS, CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL

Config = Mapping[str, Any]

# option: (our field, default). The type of the default is the type of the option.
UNET_FIELDS = {
    "in_channels": ("in_channels", 4),
    "out_channels": ("out_channels", 4),
    "block_out_channels": ("block_out_channels", (320, 640, 1280, 1280)),
    "layers_per_block": ("layers_per_block", 2),
    "cross_attention_dim": ("cross_attention_dim", 1280),
    "use_linear_projection": ("linear_projection", False),
    "norm_num_groups": ("norm_groups", 32),
    "sample_size": ("sample_size", 64),
    "dropout": ("dropout", 0.0),
}
VAE_FIELDS = {
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "latent_channels": ("latent_channels", 4),
    "block_out_channels": ("block_out_channels", (64,)),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_groups", 32),
    "mid_block_add_attention": ("mid_block_attention", True),
    "scaling_factor": ("scaling_factor", 0.18215),
}
TEXT_FIELDS = {
    "vocab_size": ("vocab_size", 49408),
    "max_position_embeddings": ("max_length", 77),
    "hidden_size": ("width", 512),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 8),
    "intermediate_size": ("mlp_width", 2048),
    "hidden_act": ("activation", "quick_gelu"),
}

UNET_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
VAE_FIXED = {
    "act_fn": "silu",
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
TEXT_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"}

# Read below, or without effect: sizes of adapters that are off, precisions that we always keep.
UNET_OTHERS = (
    "attention_head_dim", "down_block_types", "mid_block_type", "up_block_types",
    "addition_embed_type_num_heads", "upcast_attention",
)
VAE_OTHERS = ("down_block_types", "up_block_types", "force_upcast", "sample_size")

# Block type -> whether it attends; of the middle, whether it is there.
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, None: False}


def read_unet(config: Config) -> UNet:
  """Returns the UNet of a `UNet2DConditionModel`'s config.

  Raises:
    UserError: for an option that the released SD1 and SD2 do not have so.
  """
  _check_fixed(config, "unet", UNET_FIXED)
  _check_off(config, "unet", (*UNET_FIELDS, *UNET_FIXED, *UNET_OTHERS))
  fields = _read_fields(config, "unet", UNET_FIELDS)
  levels = len(fields["block_out_channels"])

  heads = config.get("attention_head_dim", 8)
  heads = [heads] * levels if isinstance(heads, int) else heads
  down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
  up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
  middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
  _check_each("attention_head_dim", heads, range(1, 1025))
  _check_each("down_block_types", down, DOWN_BLOCKS)
  _check_each("up_block_types", up, UP_BLOCKS)
  _check_each("mid_block_type", [middle], MID_BLOCKS)
  attention = tuple(DOWN_BLOCKS[block] for block in down)
  if attention != tuple(UP_BLOCKS[block] for block in reversed(up)):
    raise UserError(f"unet: up_block_types {up} does not mirror down_block_types {down}; sdjax "
                    "reads networks that attend at the same levels on both ways")
  if not len(attention) == len(heads) == levels:
    raise UserError(f"unet: block_out_channels has {levels} levels, down_block_types "
                    f"{len(attention)} and attention_head_dim {len(heads)}; they must agree")
  return UNet(**fields, attention=attention, num_heads=tuple(heads), mid_block=MID_BLOCKS[middle])


def write_unet(unet: UNet) -> dict:
  """The inverse of `read_unet`."""
  attention = unet.attention
  return _write_fields("UNet2DConditionModel", unet, UNET_FIELDS) | UNET_FIXED | {
      "attention_head_dim": list(unet.num_heads),
      "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
      "mid_block_type": "UNetMidBlock2DCrossAttn" if unet.mid_block else None,
      "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
  }


def read_vae(config: Config) -> AutoencoderKL:
  """Returns the autoencoder of an `AutoencoderKL`'s config.

  Raises:
    UserError: for an option that the released SD1 and SD2 do not have so.
  """
  _check_fixed(config, "vae", VAE_FIXED)
  _check_off(config, "vae", (*VAE_FIELDS, *VAE_FIXED, *VAE_OTHERS))
  fields = _read_fields(config, "vae", VAE_FIELDS)
  levels = len(fields["block_out_channels"])
  for option, block in (("down_block_types", "DownEncoderBlock2D"),
                        ("up_block_types", "UpDecoderBlock2D")):
    if config.get(option, [block] * levels) != [block] * levels:
      raise UserError(f"vae: {option} is {config[option]}; with {levels} block_out_channels sdjax "
                      f"reads {levels} × {block}")
  return AutoencoderKL(**fields)


def write_vae(vae: AutoencoderKL, sample_size_px: int) -> dict:
  """The inverse of `read_vae`; `sample_size_px` is the side of images trained on."""
  levels = len(vae.block_out_channels)
  return _write_fields("AutoencoderKL", vae, VAE_FIELDS) | VAE_FIXED | {
      "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels,
      "sample_size": sample_size_px,
  }


def read_text_encoder(config: Config) -> CLIPText:
  """Returns the text tower of a `CLIPTextModel`'s config; what it does not know changes nothing.

  Raises:
    UserError: for an option that CLIP's text towers do not have so.
  """
  _check_fixed(config, "text_encoder", TEXT_FIXED)
  fields = _read_fields(config, "text_encoder", TEXT_FIELDS)
  if fields["activation"] not in ACTIVATIONS:
    raise UserError(f"text_encoder: hidden_act is {fields['activation']!r}; sdjax has "
                    f"{', '.join(ACTIVATIONS)}")
  return CLIPText(**fields)


def write_text_encoder(text_encoder: CLIPText, tokenizer: Tokenizer) -> dict:
  """The inverse of `read_text_encoder`."""
  config = _write_fields("CLIPTextModel", text_encoder, TEXT_FIELDS)
  del config["_class_name"], config["_diffusers_version"]
  return config | TEXT_FIXED | {
      "architectures": ["CLIPTextModel"],
      "attention_dropout": 0.0,
      "bos_token_id": tokenizer.bos_id,
      "eos_token_id": tokenizer.eos_id,
      "pad_token_id": tokenizer.pad_id,
      "projection_dim": text_encoder.width,
  }


def _check_fixed(config: Config, where: str, fixed: Mapping[str, Any]) -> None:
  for option, value in fixed.items():
    if config.get(option, value) != value:
      raise UserError(f"{where}: {option} is {config[option]!r}; sdjax reads {value!r} only")


def _check_off(config: Config, where: str, known: tuple[str, ...]) -> None:
  for option, value in config.items():
    if not option.startswith("_") and option not in known and value not in (None, False):
      raise UserError(f"{where}: {option} is {value!r}; sdjax does not have this option yet and "
                      "reads networks without it")


def _check_each(option: str, values: Any, known: Any) -> None:
  known = list(known)
  for value in values if isinstance(values, list) else [values]:
    if value not in known:
      few = ", ".join(map(str, known)) if len(known) < 10 else f"{known[0]} to {known[-1]}"
      raise UserError(f"unet: {option} has {value!r}; sdjax reads {few}")


def _read_fields(config: Config, where: str, fields: Mapping[str, tuple[str, Any]]) -> dict:
  values = {}
  for option, (field, default) in fields.items():
    value = default if config.get(option) is None else config[option]
    value = tuple(value) if isinstance(value, list) else value
    value = float(value) if isinstance(default, float) and type(value) is int else value
    whole = not isinstance(value, tuple) or all(type(part) is int for part in value)
    if type(value) is not type(default) or not whole:
      raise UserError(f"{where}: {option} is {config[option]!r}; sdjax reads a value like "
                      f"{list(default) if isinstance(default, tuple) else default!r}")
    values[field] = value
  return values


def _write_fields(name: str, module: Any, fields: Mapping[str, tuple[str, Any]]) -> dict:
  # The version of diffusers that these options are those of.
  config = {"_class_name": name, "_diffusers_version": "0.30.0"}
  for option, (field, _) in fields.items():
    value = getattr(module, field)
    config[option] = list(value) if isinstance(value, tuple) else value
  return config
