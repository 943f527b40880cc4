"""`sdjax convert`: writes models, LoRAs and textual inversions in another format, or tells what a
file is.
"""

import argparse
import contextlib
from pathlib import Path

from sdjax.errors import UserError


def parser() -> argparse.ArgumentParser:
  """Returns the flags of the command."""
  p = argparse.ArgumentParser(prog="sdjax convert", description=__doc__)
  p.add_argument("source", metavar="SRC",
                 help="a folder in the diffusers layout, hf://owner/name, the --workdir of a run, "
                 "a single .safetensors, a .ckpt that you trust, a LoRA, a textual inversion")
  p.add_argument("target", metavar="DST", nargs="?",
                 help="NAME.safetensors for a single file (A1111, ComfyUI), or a diffusers folder")
  p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                 help="of the weights written; as in SRC by default")
  p.add_argument("--like", metavar="MODEL",
                 help="the model that a LoRA or textual inversion is for, or whose sizes and "
                 "tokenizer a single file has")
  p.add_argument("--lora", metavar="FILE[:SCALE]", action="append", default=[],
                 help="merge this into the weights (scale 1); may be given several times")
  p.add_argument("--layout", choices=("kohya", "peft"), default="kohya",
                 help="of a LoRA written: kohya for A1111 and ComfyUI, peft for diffusers")
  p.add_argument("--allow-unused", action="store_true",
                 help="leave out tensors of SRC that are no parameters")
  p.add_argument("--inspect", action="store_true", help="tell what SRC is, and write nothing")
  return p


def main(argv: list[str]) -> int:
  """Converts or inspects, as the flags say."""
  flags = parser().parse_args(argv)
  if flags.inspect == (flags.target is not None):
    raise UserError("sdjax convert takes SRC and DST, or --inspect and SRC alone")
  from sdjax.checkpoints import sources
  source = sources.exported(sources.locate(flags.source))
  if flags.inspect:
    from sdjax.checkpoints import inspection
    print(inspection.report(source, like(flags)))
    return 0
  target = Path(flags.target)
  if target.resolve() in (source.resolve(), Path(flags.source).resolve()):
    raise UserError(f"SRC and DST are both {flags.target}; choose another DST")
  small = {"LoRA": convert_lora, "textual inversion": convert_embedding,
           "network folder": convert_network}
  small.get(sources.kind(source), convert_model)(source, target, flags)
  return 0


def like(flags: argparse.Namespace):
  """Returns the model of --like, or None."""
  from sdjax.checkpoints import sources
  return None if flags.like is None else sources.describe(flags.like)


def convert_model(source: Path, target: Path, flags: argparse.Namespace) -> None:
  """Reads a model of any format, merges LoRAs, writes it, and reads it back."""
  from sdjax import pytrees
  from sdjax.checkpoints import diffusers, lora, pickles, single_file, sources
  options = dict(like=like(flags), allow_unused=flags.allow_unused)
  with progress("read") as advance:
    if sources.kind(source) == "pickle":
      sd, params = single_file.from_tensors(
          source, pickles.open_file(source), {}, flags.dtype, place=advance, **options)
    else:
      sd, params = sources.load(source, flags.dtype, place=advance, **options)
  if flags.lora:
    params = lora.merge(params, [
        (lora.load(file, sd.unet, params), scale) for file, scale in map(read_scale, flags.lora)])
  save = single_file.save if target.suffix == ".safetensors" else diffusers.save
  with progress("wrote") as advance:
    save(target, sd, pytrees.map_paths(lambda path, leaf: shown(path, leaf, advance), params))
  verify(target, sd, params)
  print(f"wrote {target}; read back, all tensors are equal")


def convert_lora(source: Path, target: Path, flags: argparse.Namespace) -> None:
  """Writes a LoRA of any kind as another kind."""
  from sdjax.checkpoints import lora
  if (sd := like(flags)) is None:
    raise UserError(f"{source} is a LoRA; name the model that it is for with --like MODEL")
  factors = lora.load(source, sd.unet, sd.param_shapes(), allow_unused=flags.allow_unused)
  lora.save(target, factors, sd.unet, flags.layout)
  print(f"wrote {target}: {len(factors)} modules by the names of {flags.layout}")


def convert_embedding(source: Path, target: Path, flags: argparse.Namespace) -> None:
  """Writes a textual inversion of any kind as diffusers does."""
  from sdjax.checkpoints import textual_inversion
  textual_inversion.save(target, textual_inversion.load(source))
  print(f"wrote {target}")


def convert_network(source: Path, target: Path, flags: argparse.Namespace) -> None:
  """Writes the folder of one network in another dtype."""
  from sdjax.checkpoints import diffusers
  diffusers.save_network(target, *diffusers.load_network(source, flags.dtype))
  print(f"wrote {target}")


def read_scale(flag: str) -> tuple[str, float]:
  """Reads FILE or FILE:SCALE.

  Raises:
    UserError: the scale is no number.
  """
  file, colon, scale = flag.rpartition(":")
  if not colon or "/" in scale or "\\" in scale:
    return flag, 1.0
  try:
    return file, float(scale)
  except ValueError as error:
    raise UserError(f"--lora {flag}: {scale!r} is no number; write FILE:0.8") from error


@contextlib.contextmanager
def progress(what: str):
  """Shows a bar on a terminal: `with progress("read") as advance: leaf = advance(path, leaf)`."""
  import tqdm
  with tqdm.tqdm(desc=what, unit=" tensors", leave=False, disable=None) as bar:
    def advance(path, leaf):
      bar.set_postfix_str(path, refresh=False)
      bar.update()
      return leaf
    yield advance


def shown(path: str, leaf, advance):
  """Returns a leaf that moves the bar when it is written."""
  from sdjax.checkpoints.tensors import Tensor
  return Tensor(leaf.shape, str(leaf.dtype), lambda: advance(path, leaf))


def verify(target: str | Path, sd, params) -> None:
  """Reads what was written back, tensor by tensor, and compares every bit.

  Raises:
    UserError: a tensor differs: the disk or its driver is broken.
  """
  import numpy as np

  from sdjax import pytrees
  from sdjax.checkpoints import sources
  flat, different = pytrees.flatten(params), []

  def compare(path, leaf):
    mine = np.asarray(flat[path])
    if mine.dtype != leaf.dtype or not np.array_equal(mine.view(np.uint8), leaf.view(np.uint8)):
      different.append(path)

  sources.load(target, None, like=sd, place=compare)
  if different:
    raise UserError(f"{target} reads back differently in {len(different)} tensors, first "
                    f"{different[0]}; check the disk and write it again")
