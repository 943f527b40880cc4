"""Textual inversions: words of a person's own, as rows that text encoders look up.

Gal et al. 2022, https://arxiv.org/abs/2208.01618. A trigger such as "<cat-toy>" is one or several
vectors in the space of token embeddings, for each text encoder of a model. Files have them as

  {"<cat-toy>": [n d]}                            diffusers
  {"emb_params": [n d]}                           A1111, .safetensors
  {"string_to_param": {"*": [n d]}, "name": …}    A1111, .pt
  {"clip_l": [n 768], "clip_g": [n 1280]}         SDXL

Those without a name have that of their file, as in A1111 and ComfyUI.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints import pickles, tensors
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion

# Of SDXL's text encoders.
TOWERS = ("clip_l", "clip_g")


@dataclasses.dataclass(frozen=True)
class Embedding:
  """A word.

  Attributes:
    trigger: how prompts spell it.
    vectors: float32 [n d] for each text encoder, of the same n.
  """
  trigger: str
  vectors: tuple[np.ndarray, ...]


def load(file: str | Path) -> Embedding:
  """Reads a textual inversion of any of the four kinds.

  Args:
    file: .safetensors; all else is taken to be a pickle, which is read by PyTorch and refused where
      it holds more than tensors and containers.

  Raises:
    UserError: it is none of them, or see `pickles.load` and `tensors.open_file`.
  """
  file = Path(file)
  stored = tensors.open_file(file) if file.suffix == ".safetensors" else pickles.load(file)
  trigger, found = _find(stored, file.stem)
  if not trigger or not found or not all(
      len(getattr(value, "shape", ())) in (1, 2) and "float" in str(value.dtype)
      for value in found):
    raise UserError(f"{file} is no textual inversion that sdjax knows; it has to hold vectors of "
                    "floats under a trigger, emb_params, string_to_param, or clip_l and clip_g")
  vectors = tuple(_array(value) for value in found)
  if len({len(rows) for rows in vectors}) > 1:
    raise UserError(f"{file} has {' and '.join(str(len(rows)) for rows in vectors)} vectors for "
                    "its text encoders; all must have as many")
  return Embedding(trigger, vectors)


def _find(stored: Any, name: str) -> tuple[str, list]:
  """Returns (trigger, what should be vectors); ("", []) where nothing is known."""
  if not isinstance(stored, Mapping):
    return "", []
  if isinstance(params := stored.get("string_to_param"), Mapping):
    return str(stored.get("name") or name), list(params.values())[:1]
  if stored.keys() >= set(TOWERS):
    return name, [stored[tower] for tower in TOWERS]
  if "emb_params" in stored:
    return name, [stored["emb_params"]]
  return (str(next(iter(stored))), list(stored.values())) if len(stored) == 1 else ("", [])


def _array(value: Any) -> np.ndarray:
  array = np.asarray(value) if isinstance(value, tensors.Tensor) else pickles.to_numpy(value)
  return array.astype(np.float32).reshape(-1, array.shape[-1])


def save(file: str | Path, embedding: Embedding) -> None:
  """Writes diffusers' form, or that of SDXL, in which the file's name is the trigger."""
  keys = TOWERS if len(embedding.vectors) == len(TOWERS) else (embedding.trigger,)
  tensors.write_file(Path(file), dict(zip(keys, embedding.vectors, strict=True)))


def attach(sd: StableDiffusion, params: Params, embeddings: Sequence[Embedding]
           ) -> tuple[StableDiffusion, Params]:
  """Teaches a model words.

  Args:
    sd, params: stay as they are.
    embeddings: of different triggers. SDXL's refiner has the second text encoder only, and takes
      that part of what SDXL takes.

  Returns:
    (sd, params): tokenizers that know the triggers, text encoders of a larger vocabulary, and their
    parameters: all but the table of token embeddings is shared with what was given.

  Raises:
    UserError: vectors are for another kind of model, or a trigger is taken.
  """
  widths = [text.width for text in sd.text_encoders]
  counts: dict[str, int] = {}
  for embedding in embeddings:
    theirs = [rows.shape[1] for rows in embedding.vectors]
    if theirs[-len(widths):] != widths:
      raise UserError(
          f"textual inversion {embedding.trigger!r} has vectors of width {_listed(theirs)}; the "
          f"text encoders of this model read {_listed(widths)} (Stable Diffusion 1: 768, 2: 1024, "
          "XL: 768 and 1280); use one made for this model")
    if embedding.trigger in counts:
      raise UserError(f"two textual inversions have the trigger {embedding.trigger!r}; rename one "
                      "of the files")
    counts[embedding.trigger] = len(embedding.vectors[0])

  encoders, params = [], dict(params)
  for i, (name, text) in enumerate(zip(sd.text_names, sd.text_encoders, strict=True)):
    rows = [embedding.vectors[i - len(widths)] for embedding in embeddings]
    params[name] = _with_rows(params[name], sd.tokenizers[i].vocab_size, rows)
    size = params[name]["embeddings"]["token_embedding"]["embedding"].shape[0]
    # New ids are above that of the end: a text no longer ends at its highest id.
    encoders.append(text.clone(vocab_size=size, eos_id=sd.tokenizers[i].eos_id))
  return dataclasses.replace(
      sd, text_encoders=tuple(encoders),
      tokenizers=tuple(words.with_tokens(counts) for words in sd.tokenizers)), params


def _with_rows(params: Params, first: int, rows: Sequence[np.ndarray]) -> Params:
  """Puts rows into a text encoder's table from id `first` on; it may have had unused rows there."""
  token = params["embeddings"]["token_embedding"]
  table = token["embedding"]
  concatenate = jnp.concatenate if isinstance(table, jax.Array) else np.concatenate
  end = first + sum(map(len, rows))
  table = concatenate(
      [table[:first], *(each.astype(table.dtype) for each in rows), table[end:]])
  return params | {"embeddings": params["embeddings"] | {
      "token_embedding": token | {"embedding": table}}}


def _listed(widths: Sequence[int]) -> str:
  return " and ".join(map(str, widths))
