"""`config.json` of CLIP's towers in transformers, read as modules and written from them.

What such a file has beside the options below (dropout, precision, …) changes no number.
"""

from collections.abc import Mapping
from typing import Any

from sdjax.checkpoints.model_configs import Config, Fields, check_fixed, read_fields, write_fields
from sdjax.data.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.models.clip import ACTIVATIONS, CLIPText, CLIPVision

# The classes of transformers; a text tower without projection may have a projection_dim too.
TEXT = "CLIPTextModel"
TEXT_PROJECTED = "CLIPTextModelWithProjection"
VISION = "CLIPVisionModelWithProjection"

TEXT_FIELDS = {
    "vocab_size": ("vocab_size", 49408, int),
    "max_position_embeddings": ("max_length", 77, int),
    "hidden_size": ("width", 512, int),
    "num_hidden_layers": ("layers", 12, int),
    "num_attention_heads": ("heads", 8, int),
    "intermediate_size": ("mlp_width", 2048, int),
    "hidden_act": ("activation", "quick_gelu", str),
    "projection_dim": ("projection", 512, int),
    "eos_token_id": ("eos_id", 49407, int),
}
VISION_FIELDS = {
    "image_size": ("image_size", 224, int),
    "patch_size": ("patch_size", 32, int),
    "hidden_size": ("width", 768, int),
    "num_hidden_layers": ("layers", 12, int),
    "num_attention_heads": ("heads", 12, int),
    "intermediate_size": ("mlp_width", 3072, int),
    "hidden_act": ("activation", "quick_gelu", str),
    "projection_dim": ("projection", 512, int),
}

TEXT_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
VISION_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_vision_model", "num_channels": 3}


def read_text_encoder(config: Config, where: str = "text_encoder") -> CLIPText:
  """Returns the text tower of the config of a `CLIPTextModel`, with projection or without.

  Args:
    config: which of the two it is of stands under "architectures".
    where: the network's name in errors.

  Raises:
    UserError: for an option that CLIP's text towers do not have so.
  """
  fields = _read(config, where, TEXT_FIELDS, TEXT_FIXED)
  if config.get("architectures") != [TEXT_PROJECTED]:
    fields["projection"] = None
  return CLIPText(**fields)


def write_text_encoder(text_encoder: CLIPText, tokenizer: Tokenizer) -> dict:
  """The inverse of `read_text_encoder`."""
  config = _write(class_name(text_encoder), text_encoder, TEXT_FIELDS, TEXT_FIXED)
  return config | {
      "bos_token_id": tokenizer.bos_id,
      "pad_token_id": tokenizer.pad_id,
      "projection_dim": text_encoder.projection or text_encoder.width,
  }


def class_name(text_encoder: CLIPText) -> str:
  """Returns transformers' class of a text tower."""
  return TEXT if text_encoder.projection is None else TEXT_PROJECTED


def read_image_encoder(config: Config) -> CLIPVision:
  """Returns the image tower of a `CLIPVisionModelWithProjection`'s config.

  Raises:
    UserError: for an option that CLIP's image towers do not have so.
  """
  check_fixed(config, "image_encoder", {"architectures": [VISION]})
  return CLIPVision(**_read(config, "image_encoder", VISION_FIELDS, VISION_FIXED))


def write_image_encoder(image_encoder: CLIPVision) -> dict:
  """The inverse of `read_image_encoder`."""
  return _write(VISION, image_encoder, VISION_FIELDS, VISION_FIXED)


def _read(config: Config, where: str, fields: Fields, fixed: Mapping[str, Any]) -> dict:
  check_fixed(config, where, fixed)
  values = read_fields(config, where, fields)
  if values["activation"] not in ACTIVATIONS:
    raise UserError(f"{where}: hidden_act is {values['activation']!r}; sdjax has "
                    f"{', '.join(ACTIVATIONS)}")
  return values


def _write(name: str, tower: CLIPText | CLIPVision, fields: Fields, fixed: Mapping[str, Any]
           ) -> dict:
  config = write_fields(name, tower, fields)
  # transformers names the class in a list of its own.
  del config["_class_name"], config["_diffusers_version"]
  return config | fixed | {"architectures": [name], "attention_dropout": 0.0}
