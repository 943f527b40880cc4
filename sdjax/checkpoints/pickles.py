"""Pickled checkpoints (.ckpt, .pt, .bin), for conversion only: needs PyTorch.

A pickle can run any code when it is opened. `torch.load(weights_only=True)` builds tensors and
plain containers and refuses all else; only `sdjax convert` and textual inversions come here.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints.tensors import Tensor
from sdjax.errors import UserError


def load(file: str | Path) -> Any:
  """Returns what was pickled, of torch tensors on the host, mapped from the file where possible.

  Raises:
    UserError: PyTorch is missing, the file is broken, or holds more than tensors and containers.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(f"{file} is a pickle, which PyTorch alone reads; install it: "
                    "pip install torch") from error
  file = Path(file)
  if not file.is_file():
    raise UserError(f"there is no file {file}")
  try:
    # Only PyTorch's newer format, a zip, can be mapped.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
  except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"{file} was refused ({reason}): it is broken, or holds more than tensors and "
                    "could run code; get a .safetensors of it") from error


def open_file(file: str | Path) -> dict[str, Tensor]:
  """Returns the tensors of a checkpoint by name, those under "state_dict" where it has that.

  Raises:
    UserError: see `load`; or it holds no tensors by name.
  """
  found = load(file)
  found = found.get("state_dict", found) if isinstance(found, dict) else {}
  stored = {name: _tensor(value) for name, value in found.items() if hasattr(value, "numpy")}
  if not stored:
    raise UserError(f"{file} holds no tensors by name; sdjax reads checkpoints of whole models")
  return stored


def to_numpy(tensor: Any) -> np.ndarray:
  """Returns a torch tensor's values; numpy has no bfloat16 of its own."""
  import torch
  if tensor.dtype == torch.bfloat16:
    return tensor.detach().contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
  return tensor.detach().numpy()


def _tensor(value: Any) -> Tensor:
  return Tensor(tuple(value.shape), str(value.dtype).removeprefix("torch."),
                lambda: to_numpy(value))
