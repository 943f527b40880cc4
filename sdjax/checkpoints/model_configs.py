"""`config.json` of diffusers and transformers, read as modules and written from them.

Each file has three kinds of options: those that are fields of our modules, those that have to have
the one value that all released models give them, and those that change no number. All that is
unknown must be off. A file that leaves an option out means the default of diffusers' constructor.
"""

from collections.abc import Mapping
from typing import Any

from sdjax.errors import UserError
from sdjax.models.vae import AutoencoderKL

Config = Mapping[str, Any]

# option: (our field, default, type). None stands for the default, whatever the type.
Fields = Mapping[str, tuple[str, Any, Any]]

VAE_FIELDS = {
    "in_channels": ("in_channels", 3, int),
    "out_channels": ("out_channels", 3, int),
    "latent_channels": ("latent_channels", 4, int),
    "block_out_channels": ("block_out_channels", (64,), tuple),
    "layers_per_block": ("layers_per_block", 1, int),
    "norm_num_groups": ("norm_groups", 32, int),
    "mid_block_add_attention": ("mid_block_attention", True, bool),
    "scaling_factor": ("scaling_factor", 0.18215, float),
    "shift_factor": ("shift_factor", 0.0, float),
    "use_post_quant_conv": ("post_quant_conv", True, bool),
    "use_quant_conv": ("quant_conv", True, bool),
}

VAE_FIXED = {"act_fn": "silu"}

# Read below, or without effect.
VAE_OTHERS = ("down_block_types", "up_block_types", "force_upcast", "sample_size")


def read_vae(config: Config) -> AutoencoderKL:
  """Returns the autoencoder of an `AutoencoderKL`'s config.

  Raises:
    UserError: for an option that no released autoencoder has so.
  """
  check_fixed(config, "vae", VAE_FIXED)
  check_off(config, "vae", (*VAE_FIELDS, *VAE_FIXED, *VAE_OTHERS))
  fields = read_fields(config, "vae", VAE_FIELDS)
  levels = len(fields["block_out_channels"])
  for option, block in (("down_block_types", "DownEncoderBlock2D"),
                        ("up_block_types", "UpDecoderBlock2D")):
    if config.get(option, [block] * levels) != [block] * levels:
      raise UserError(f"vae: {option} is {config[option]}; with {levels} block_out_channels sdjax "
                      f"reads {levels} × {block}")
  return AutoencoderKL(**fields)


def write_vae(vae: AutoencoderKL, sample_size_px: int = 512) -> dict:
  """The inverse of `read_vae`; `sample_size_px` is the side of images trained on."""
  levels = len(vae.block_out_channels)
  return write_fields("AutoencoderKL", vae, VAE_FIELDS) | VAE_FIXED | {
      "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels,
      "sample_size": sample_size_px,
  }


def check_fixed(config: Config, where: str, fixed: Mapping[str, Any]) -> None:
  """Raises UserError when an option has another value than the one in `fixed`."""
  for option, value in fixed.items():
    if config.get(option, value) != value:
      raise UserError(f"{where}: {option} is {config[option]!r}; sdjax reads {value!r} only")


def check_off(config: Config, where: str, known: tuple[str, ...]) -> None:
  """Raises UserError when an option that is not `known` is on."""
  for option, value in config.items():
    if not option.startswith("_") and option not in known and value not in (None, False):
      raise UserError(f"{where}: {option} is {value!r}; sdjax does not have this option yet and "
                      "reads networks without it")


def read_fields(config: Config, where: str, fields: Fields) -> dict[str, Any]:
  """Returns {our field: value}.

  Raises:
    UserError: a value is not of its type.
  """
  values = {}
  for option, (field, default, kind) in fields.items():
    value = config.get(option)
    if value is None:
      values[field] = default
      continue
    value = tuple(value) if isinstance(value, list) else value
    value = float(value) if kind is float and type(value) is int else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or (
        isinstance(value, tuple) and any(type(part) is not int for part in value)):
      raise UserError(f"{where}: {option} is {config[option]!r}; sdjax reads "
                      f"{str(kind).replace('tuple', 'list of int').removeprefix('<class ')}")
    values[field] = value
  return values


def write_fields(name: str, module: Any, fields: Fields) -> dict[str, Any]:
  """Returns {option: value} of a module, as the class `name` of diffusers has them."""
  # The version of diffusers that these options are those of.
  config = {"_class_name": name, "_diffusers_version": "0.30.0"}
  for option, (field, _, _) in fields.items():
    value = getattr(module, field)
    config[option] = list(value) if isinstance(value, tuple) else value
  return config
