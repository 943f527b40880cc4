"""`config.json` of diffusers' UNets and ControlNets, read as modules and written from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.checkpoints.model_configs import (
  Config,
  Fields,
  check_fixed,
  check_off,
  read_fields,
  write_fields,
)
from sdjax.errors import UserError
from sdjax.models.controlnet import ControlNet
from sdjax.models.unet import Encoder, UNet


@dataclasses.dataclass(frozen=True)
class Kind:
  """How one class of diffusers spells the options of one of our modules.

  Attributes:
    name: of the class.
    module: ours.
    fields, fixed, others: see `model_configs`.
    down, up: block type -> whether it attends; a class without a way up has no `up`.
    middle: block type -> whether the middle is there.
  """
  name: str
  module: type[Encoder]
  fields: Fields
  fixed: Mapping[str, Any]
  others: tuple[str, ...]
  down: Mapping[str, bool]
  up: Mapping[str, bool]
  middle: Mapping[str | None, bool]


# Options that all three classes have.
_SHARED = {
    "block_out_channels": ("block_out_channels", (320, 640, 1280, 1280), tuple),
    "in_channels": ("in_channels", 4, int),
    "layers_per_block": ("layers_per_block", 2, int),
    "norm_eps": ("norm_epsilon", 1e-5, float),
    "norm_num_groups": ("norm_groups", 32, int),
    "num_class_embeds": ("num_classes", None, int),
}
_CONDITIONED = _SHARED | {
    "addition_time_embed_dim": ("added_time_dim", 256, int),
    "attention_head_dim": ("num_heads", 8, int | tuple),
    "cross_attention_dim": ("cross_attention_dim", 1280, int),
    "projection_class_embeddings_input_dim": ("added_dim", None, int),
    "transformer_layers_per_block": ("transformer_layers", 1, int | tuple),
    "use_linear_projection": ("linear_projection", False, bool),
}
_GENERATES = {
    "dropout": ("dropout", 0.0, float),
    "out_channels": ("out_channels", 4, int),
    "sample_size": ("sample_size", 64, int),
}
_FIXED = {
    "act_fn": "silu",
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
}
_CONDITIONED_FIXED = _FIXED | {
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
# Read below, or without effect: sizes of what is off, precisions that we always keep.
_BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")
_CONDITIONED_OTHERS = (
    *_BLOCKS, "addition_embed_type", "addition_embed_type_num_heads", "only_cross_attention",
    "num_attention_heads", "upcast_attention",
)
_ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}

UNET = Kind(
    name="UNet2DConditionModel", module=UNet,
    fields=_CONDITIONED | _GENERATES | {"time_cond_proj_dim": ("guidance_dim", None, int)},
    fixed=_CONDITIONED_FIXED | {
        "attention_type": "default", "conv_in_kernel": 3, "conv_out_kernel": 3,
        "resnet_out_scale_factor": 1, "time_embedding_type": "positional"},
    others=_CONDITIONED_OTHERS,
    down=_ATTENDS,
    up={"CrossAttnUpBlock2D": True, "UpBlock2D": False},
    middle={"UNetMidBlock2DCrossAttn": True, None: False})

PIXEL_UNET = Kind(
    name="UNet2DModel", module=UNet,
    fields=_SHARED | _GENERATES | {
        "block_out_channels": ("block_out_channels", (224, 448, 672, 896), tuple),
        "downsample_padding": ("downsample_padding", 1, int),
        "freq_shift": ("frequency_shift", 0, int),
        "in_channels": ("in_channels", 3, int),
        "out_channels": ("out_channels", 3, int)},
    fixed=_FIXED | {
        "add_attention": True, "downsample_type": "conv", "time_embedding_type": "positional",
        "upsample_type": "conv"},
    others=(*_BLOCKS, "attention_head_dim", "flip_sin_to_cos", "num_train_timesteps"),
    down={"AttnDownBlock2D": True, "DownBlock2D": False},
    up={"AttnUpBlock2D": True, "UpBlock2D": False},
    middle={"UNetMidBlock2D": True, None: False})

CONTROLNET = Kind(
    name="ControlNetModel", module=ControlNet,
    fields=_CONDITIONED | {
        "conditioning_channels": ("hint_channels", 3, int),
        "conditioning_embedding_out_channels": ("hint_widths", (16, 32, 96, 256), tuple),
        "controlnet_conditioning_channel_order": ("hint_order", "rgb", str),
        "global_pool_conditions": ("pool", False, bool)},
    fixed=_CONDITIONED_FIXED,
    others=_CONDITIONED_OTHERS,
    down=_ATTENDS, up={},
    middle={"UNetMidBlock2DCrossAttn": True, None: False})

KINDS = {kind.name: kind for kind in (UNET, PIXEL_UNET, CONTROLNET)}


def read(config: Config) -> UNet | ControlNet:
  """Returns the network of a config of any of the `KINDS`.

  Raises:
    UserError: for an option that no released model has so.
  """
  kind = KINDS.get(config.get("_class_name", UNET.name))
  if kind is None:
    raise UserError(f"unet: _class_name is {config['_class_name']!r}; sdjax reads "
                    f"{', '.join(KINDS)}")
  check_fixed(config, "unet", kind.fixed)
  check_off(config, "unet", (*kind.fields, *kind.fixed, *kind.others))
  fields = read_fields(config, "unet", kind.fields)
  fields |= _read_blocks(config, kind, len(fields["block_out_channels"]))
  fields |= (_read_pixel if kind is PIXEL_UNET else _read_conditioned)(config, fields)
  for name in ("num_heads", "transformer_layers", "self_attention", "attention"):
    value = fields.get(name)
    if isinstance(value, tuple) and len(value) != len(fields["block_out_channels"]):
      raise UserError(f"unet: block_out_channels has {len(fields['block_out_channels'])} levels, "
                      f"{name} {len(value)}; they must agree")
  return kind.module(**fields)


def write(module: UNet | ControlNet) -> dict:
  """The inverse of `read`."""
  kind = CONTROLNET if isinstance(module, ControlNet) else (
      PIXEL_UNET if module.cross_attention_dim is None else UNET)
  names = {attends: name for name, attends in kind.down.items()}
  config = write_fields(kind.name, module, kind.fields) | kind.fixed | {
      "down_block_types": [names[attends] for attends in module.attention],
      "mid_block_type": next(n for n, there in kind.middle.items() if there == module.mid_block),
  }
  if kind.up:
    names = {attends: name for name, attends in kind.up.items()}
    config["up_block_types"] = [names[attends] for attends in reversed(module.attention)]
  if kind is PIXEL_UNET:
    return config | {"attention_head_dim": _head_dim(module), "flip_sin_to_cos":
                     not module.sines_first}
  if module.added_dim is None:
    config["addition_time_embed_dim"] = None
  return config | {
      "addition_embed_type": None if module.added_dim is None else "text_time",
      "only_cross_attention": _negated(module.self_attention),
  }


def _read_blocks(config: Config, kind: Kind, levels: int) -> dict:
  """Which levels attend, alike on both ways, and whether there is a middle."""
  attends, plain = kind.down
  down = config.get("down_block_types", [attends] * (levels - 1) + [plain])
  middle = config.get("mid_block_type", next(iter(kind.middle)))
  _check_each("down_block_types", down, kind.down)
  _check_each("mid_block_type", [middle], kind.middle)
  attention = tuple(kind.down[block] for block in down)
  if kind.up:
    names = {attends: name for name, attends in kind.up.items()}
    up = config.get("up_block_types", [names[attends] for attends in reversed(attention)])
    _check_each("up_block_types", up, kind.up)
    if attention != tuple(kind.up[block] for block in reversed(up)):
      raise UserError(f"unet: up_block_types {up} does not mirror down_block_types {down}; sdjax "
                      "reads networks that attend at the same levels on both ways")
  return {"attention": attention, "mid_block": kind.middle[middle]}


def _read_conditioned(config: Config, fields: Mapping[str, Any]) -> dict:
  expected = None if fields["added_dim"] is None else "text_time"
  if config.get("addition_embed_type") != expected:
    raise UserError(f"unet: addition_embed_type is {config.get('addition_embed_type')!r} where "
                    f"projection_class_embeddings_input_dim is {fields['added_dim']}; sdjax reads "
                    "\"text_time\" with a number, or neither")
  only_cross = config.get("only_cross_attention", False)
  only_cross = tuple(only_cross) if isinstance(only_cross, list) else only_cross
  heads = config.get("num_attention_heads")
  if heads not in (None, config.get("attention_head_dim", 8)):
    raise UserError(f"unet: num_attention_heads is {heads}; sdjax reads the number of heads from "
                    "attention_head_dim, as diffusers does")
  _check_each("attention_head_dim", fields["num_heads"], range(1, 1025))
  return {"self_attention": _negated(only_cross)}


def _read_pixel(config: Config, fields: Mapping[str, Any]) -> dict:
  # Here attention_head_dim is what it says; None is one head of all channels.
  widths, head_dim = fields["block_out_channels"], config.get("attention_head_dim", 8)
  if head_dim is not None and (type(head_dim) is not int or any(
      width % max(head_dim, 1) for width in widths) or head_dim < 1):
    raise UserError(f"unet: attention_head_dim is {head_dim!r}; it must divide each of "
                    f"block_out_channels {list(widths)}")
  heads = 1 if head_dim is None else tuple(width // head_dim for width in widths)
  return {"num_heads": heads, "cross_attention_dim": None,
          "sines_first": not config.get("flip_sin_to_cos", True)}


def _head_dim(module: UNet) -> int | None:
  if module.num_heads == 1:
    return None
  heads = module.num_heads
  heads = heads if isinstance(heads, tuple) else (heads,) * len(module.block_out_channels)
  dims = {width // n for width, n in zip(module.block_out_channels, heads, strict=True)}
  if len(dims) > 1:
    raise UserError(f"unet: heads have {sorted(dims)} channels at different levels; diffusers' "
                    "UNet2DModel has one number for all")
  return dims.pop()


def _negated(flags: bool | tuple[bool, ...]) -> bool | tuple[bool, ...]:
  return tuple(not flag for flag in flags) if isinstance(flags, tuple) else not flags


def _check_each(option: str, values: Any, known: Any) -> None:
  known = list(known)
  for value in values if isinstance(values, list | tuple) else [values]:
    if value not in known:
      few = ", ".join(map(str, known)) if len(known) < 10 else f"{known[0]} to {known[-1]}"
      raise UserError(f"unet: {option} has {value!r}; sdjax reads {few}")
