"""`sdjax convert`: writes a model in another dtype, exports a run, or tells what a folder holds."""

import argparse
import hashlib
from pathlib import Path

from sdjax.errors import UserError

# (cross_attention_dim, linear_projection) of the UNet.
FAMILIES = {(768, False): "Stable Diffusion 1", (1024, True): "Stable Diffusion 2"}


def parser() -> argparse.ArgumentParser:
  """Returns the flags of the command."""
  p = argparse.ArgumentParser(prog="sdjax convert", description=__doc__)
  p.add_argument("source", metavar="SRC",
                 help="a folder in the diffusers layout, or the --workdir of a run")
  p.add_argument("target", metavar="DST", nargs="?", help="the diffusers folder to write")
  p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                 help="of the weights written; as in SRC by default")
  p.add_argument("--inspect", action="store_true", help="tell what SRC is, and write nothing")
  return p


def main(argv: list[str]) -> int:
  """Converts or inspects, as the flags say."""
  flags = parser().parse_args(argv)
  if flags.inspect == (flags.target is not None):
    raise UserError("sdjax convert takes SRC and DST, or --inspect and SRC alone")
  if flags.inspect:
    print(inspect(flags.source))
    return 0
  if Path(flags.target).resolve() == model_folder(flags.source).resolve():
    raise UserError(f"SRC and DST are both {flags.target}; choose another DST")

  from sdjax.checkpoints import diffusers
  sd, params = load(flags.source, flags.dtype)
  diffusers.save(flags.target, sd, params)
  verify(flags.target, params)
  print(f"wrote {flags.target}; read back, all tensors are equal")
  return 0


def model_folder(source: str | Path) -> Path:
  """Returns the diffusers folder that SRC is, or that the run in SRC exported.

  Raises:
    UserError: SRC is neither.
  """
  for folder in (Path(source), Path(source) / "model"):
    if (folder / "model_index.json").is_file():
      return folder
  raise UserError(f"{source} is neither a model folder (it has no model_index.json) nor a run "
                  "that has exported one (it has no model/)")


def load(source: str | Path, dtype: str | None = "float32"):
  """Returns (sd, params) of whatever `sdjax convert` and `sdjax sample` take as a model.

  Args:
    source: a diffusers folder, or a run that has exported one.
    dtype: of the parameters; None as stored.
  """
  from sdjax.checkpoints import diffusers
  return diffusers.load(model_folder(source), dtype)


def verify(target: str | Path, params) -> None:
  """Reads a written folder back and compares every bit.

  Raises:
    UserError: a tensor differs: the disk or its driver is broken.
  """
  import jax
  import numpy as np

  from sdjax import pytrees
  from sdjax.checkpoints import diffusers
  _, again = diffusers.load(target, dtype=None)
  same = jax.tree.map(
      lambda a, b: a.dtype == b.dtype and np.array_equal(
          np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)), params, again)
  if different := [path for path, equal in pytrees.flatten(same).items() if not equal]:
    raise UserError(f"{target} reads back differently in {len(different)} tensors, first "
                    f"{different[0]}; check the disk and write it again")


def inspect(source: str | Path) -> str:
  """Returns lines: family, prediction type, schedule, networks, and each file's sha256."""
  import math

  from sdjax.checkpoints import diffusers
  folder = model_folder(source)
  sd = diffusers.describe(folder)
  kind = (sd.unet.cross_attention_dim, sd.unet.linear_projection)
  schedule = sd.schedule
  lines = [
      f"family           {FAMILIES.get(kind, 'Stable Diffusion, in a size of its own')}",
      f"prediction type  {sd.prediction_type}",
      f"schedule         {schedule.name}, beta {schedule.beta_start} to {schedule.beta_end} in "
      f"{schedule.num_steps} steps" + (", zero terminal SNR" if schedule.zero_terminal_snr else ""),
      f"scheduler        {sd.scheduler_config.get('_class_name')}",
      f"image size       {sd.unet.sample_size * sd.vae.downsampling} px",
      f"tokens           {sd.tokenizers[0].length} of {sd.tokenizers[0].vocab_size}",
  ]
  for network, file in diffusers.WEIGHTS.items():
    header = diffusers.read_header(folder / network / file).values()
    dtypes = sorted({diffusers.DTYPES.get(dtype, dtype) for dtype, _ in header})
    count = sum(math.prod(shape) for _, shape in header)
    lines.append(f"{network:<16} {count:,} parameters, {', '.join(dtypes)}")
  lines.append("sha256")
  for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    lines.append(f"  {digest}  {path.relative_to(folder)}")
  return "\n".join(lines)
