"""safetensors files, read and written one tensor at a time.

Reading maps the file into memory and copies a tensor when it is asked for; writing asks for one
tensor after another. At no time is there a second copy of a model. Nothing here runs code from a
file: pickles are refused (`checkpoints.pickles` reads them offline, for conversion).

https://github.com/safetensors/safetensors#format: eight bytes of length, a JSON header {name:
{"dtype", "shape", "data_offsets"}}, the tensors.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from sdjax.errors import UserError
from sdjax.files import write_whole

# safetensors' name of a dtype -> numpy's. Others (float8) are no parameters of ours.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}
SHARD_BYTES = 10 * 10**9  # of one file, as diffusers splits
SHOWN = 8                 # tensor names in an error


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that is somewhere else: `np.asarray` brings it here, a new copy each time.

  Attributes:
    shape, dtype: as of an array; the dtype is a name, and may be one that numpy lacks.
    read: () -> numpy array.
  """
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy  # always one
    array = self.read()
    return array if dtype is None else array.astype(dtype)


def open_file(file: str | Path) -> dict[str, Tensor]:
  """Returns the tensors of a file by name, unread.

  Raises:
    UserError: the file is missing, is not safetensors, or its header lies.
  """
  handle = _opened(Path(file))
  tensors = {}
  for name in sorted(handle.keys()):
    part = handle.get_slice(name)
    kind = part.get_dtype()
    tensors[name] = Tensor(tuple(part.get_shape()), DTYPES.get(kind, kind),
                           lambda name=name: handle.get_tensor(name))
  return tensors


def metadata(file: str | Path) -> dict[str, str]:
  """Returns what the header says beside the tensors; raises as `open_file`."""
  return dict(_opened(Path(file)).metadata() or {})


def _opened(file: Path) -> safetensors.safe_open:
  if not file.is_file():
    raise UserError(f"there is no file {file}; sdjax reads models with safetensors weights")
  try:
    return safetensors.safe_open(file, framework="numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{file} is broken or not safetensors ({error}); copy it again, or convert "
                    "it with sdjax convert if it is an older format") from error


def open_folder(folder: Path, stem: str) -> dict[str, Tensor]:
  """Returns the tensors of one network's folder, of one file or of several with an index.

  Full precision is preferred to a variant in 16 bits.

  Args:
    folder: holds `stem`.safetensors, or `stem`.safetensors.index.json and the files it names, or
      the same with "fp16" before the last word.
    stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).

  Raises:
    UserError: nothing of it is there, or as `open_file`.
  """
  for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json",
               f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"):
    if (folder / name).is_file():
      return _open_index(folder / name) if name.endswith("json") else open_file(folder / name)
  if pickles := sorted(path.name for path in folder.glob("*.bin")):
    raise UserError(f"{folder} has its weights as a pickle only ({pickles[0]}), which can run any "
                    "code; sdjax reads safetensors: convert the folder where you trust it")
  raise UserError(f"there is no file {folder / stem}.safetensors; sdjax reads models with "
                  "safetensors weights")


def _open_index(index: Path) -> dict[str, Tensor]:
  try:
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = sorted(set(places.values()))
    inside = all(name == Path(name).name and name.endswith(".safetensors") for name in files)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index} is not an index of safetensors files ({error!r}); copy it again"
                    ) from error
  if not inside:
    raise UserError(f"{index} names {', '.join(map(repr, files[:SHOWN]))}; only safetensors files "
                    "beside it are read")
  opened = {name: open_file(index.parent / name) for name in files}
  complain(index, "names, but its files lack,", (
      tensor for tensor, name in places.items() if tensor not in opened[name]))
  return {tensor: opened[name][tensor] for tensor, name in places.items()}


def write_file(file: Path, tensors: Mapping[str, Any],
               notes: Mapping[str, str] | None = None) -> None:
  """Writes a file, whole or not at all.

  Args:
    file: in a folder, which is made as needed.
    tensors: by name; anything that `np.asarray` turns into an array of floats, one at a time.
    notes: for the header. "format": "pt", without which transformers refuses a file, is added.

  Raises:
    UserError: a tensor has a dtype that safetensors lacks, or the disk is full.
  """
  kinds = {dtype: kind for kind, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}
  end = 0
  for name, tensor in tensors.items():
    dtype = str(tensor.dtype)
    if dtype not in kinds:
      raise UserError(f"tensor {name} is {dtype}; safetensors files hold {', '.join(kinds)}")
    start, end = end, end + _size(tensor)
    header[name] = {"dtype": kinds[dtype], "shape": list(tensor.shape),
                    "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(file, "wb") as out:
      out.write(len(text).to_bytes(8, "little") + text)
      for tensor in tensors.values():
        out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
  except OSError as error:
    raise UserError(f"{file} cannot be written ({error}); make room, or choose another folder"
                    ) from error


def write_folder(folder: Path, stem: str, tensors: Mapping[str, Any],
                 shard_bytes: int = SHARD_BYTES) -> None:
  """Writes one network: a file, or several and an index where it is larger than `shard_bytes`."""
  shards: list[dict[str, Any]] = [{}]
  room = shard_bytes
  for name, tensor in tensors.items():
    if _size(tensor) > room and shards[-1]:
      shards.append({})
      room = shard_bytes
    shards[-1][name] = tensor
    room -= _size(tensor)
  if len(shards) == 1:
    write_file(folder / f"{stem}.safetensors", tensors)
    return
  places = {}
  for number, shard in enumerate(shards, 1):
    file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    write_file(folder / file, shard)
    places |= dict.fromkeys(shard, file)
  index = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": places}
  with write_whole(folder / f"{stem}.safetensors.index.json", "w") as out:
    out.write(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _size(tensor: Any) -> int:
  return math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize


def complain(where: Any, what: str, names: Iterable[str]) -> None:
  """Raises UserError "`where` `what` 3 tensors: a, b, c" where there are any."""
  if names := sorted(names):
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise UserError(f"{where} {what} {len(names)} tensors: {', '.join(names[:SHOWN])}{more}")
