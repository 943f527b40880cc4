"""`config.json` of diffusers' T2I-Adapters, read as modules and written from them."""

from sdjax.checkpoints.model_configs import Config, check_off, read_fields, write_fields
from sdjax.errors import UserError
from sdjax.models.adapter import KINDS, T2IAdapter

ADAPTER_FIELDS = {
    "in_channels": ("in_channels", 3, int),
    "channels": ("channels", (320, 640, 1280, 1280), tuple),
    "num_res_blocks": ("num_res_blocks", 2, int),
    "downscale_factor": ("downscale_factor", 8, int),
    "adapter_type": ("kind", "full_adapter", str),
}


def read_adapter(config: Config) -> T2IAdapter:
  """Returns the network of a `T2IAdapter`'s config.

  Raises:
    UserError: for an option that diffusers does not have, or a value that it does not have so.
  """
  check_off(config, "adapter", tuple(ADAPTER_FIELDS))
  fields = read_fields(config, "adapter", ADAPTER_FIELDS)
  if fields["kind"] not in KINDS:
    raise UserError(f"adapter: adapter_type is {fields['kind']!r}; sdjax has {', '.join(KINDS)}")
  return T2IAdapter(**fields)


def write_adapter(adapter: T2IAdapter) -> dict:
  """The inverse of `read_adapter`."""
  return write_fields("T2IAdapter", adapter, ADAPTER_FIELDS)
