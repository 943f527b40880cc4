"""`sdjax shards`: make webdataset shards from pictures, and look into shards."""

import argparse
import sys

DESCRIPTION = """Shards are tars in the layout of LAION: 00000.tar with 000000000.jpg, .txt and
.json per sample. `pack` makes them from a folder of pictures, `inspect` tells what is in them,
`encode` runs an autoencoder over them once, so that training need not."""


def main(argv: list[str]) -> int:
  """Runs `sdjax shards …` and returns the exit code; errors are for the caller to tell."""
  arguments = _parser().parse_args(argv)
  return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="sdjax shards", description=DESCRIPTION)
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  pack = commands.add_parser("pack", help="pictures with captions → shards", description=(
      "Packs the pictures of FOLDER: name.jpg (png, webp …) with name.txt, or those that a "
      "metadata.jsonl or metadata.csv lists (file_name, text). A broken picture is left out and "
      "named."))
  pack.add_argument("folder", metavar="FOLDER", help="holds the pictures")
  pack.add_argument("out", metavar="OUT", help="new folder for the shards")
  pack.add_argument("--shard-size", type=int, default=1000, metavar="N",
                    help="pictures per shard, at most 10000 (default: %(default)s)")
  pack.add_argument("--quality", type=int, default=95, metavar="Q",
                    help="of JPEGs made from other formats, 1 to 95 (default: %(default)s); "
                    "upright RGB JPEGs are copied unchanged")
  pack.set_defaults(run=_pack)

  inspect = commands.add_parser("inspect", help="counts, sizes, captions, broken samples",
                                description="Decodes every sample once and reports on one screen.")
  inspect.add_argument("urls", nargs="+", metavar="URLS", help=(
      "tars, folders of tars, globs, or ranges such as 'data/{00000..00041}.tar'"))
  inspect.set_defaults(run=_inspect)

  encode = commands.add_parser("encode", help="pictures → latents of an autoencoder", description=(
      "Writes shards that hold, in place of each picture, the mean and log variance of its "
      "latents. `sdjax train` reads them as it reads pictures."))
  encode.add_argument("--model", required=True, metavar="DIR",
                      help="a folder in the diffusers layout, or the --workdir of a run")
  encode.add_argument("--resolution", type=int, metavar="PX",
                      help="side of the square that pictures are cropped to; the model's own "
                      "by default")
  encode.add_argument("urls", metavar="URLS", help="shards of pictures")
  encode.add_argument("out", metavar="OUT", help="new folder for the shards")
  encode.set_defaults(run=_encode)
  return parser


def _pack(arguments) -> int:
  from sdjax.data import pack
  sources = pack.find_sources(arguments.folder)
  result = pack.pack(
      sources, arguments.folder, arguments.out, arguments.shard_size, arguments.quality,
      progress=lambda done: _bar(done, len(sources), "packing"))
  for failure in result.failures[:20]:
    print(f"left out {failure.name}: {failure.reason}", file=sys.stderr)
  if len(result.failures) > 20:
    print(f"left out {len(result.failures) - 20} more", file=sys.stderr)
  failed = {failure.name for failure in result.failures}
  without = sum(not source.caption and source.name not in failed for source in sources)
  print(f"{result.samples} pictures in {result.shards} shards ({result.size / 1e6:.1f} MB) in "
        f"{arguments.out}; {len(result.failures)} left out, {without} without a caption")
  return 0


def _inspect(arguments) -> int:
  from sdjax.data import inspection, shards
  index = shards.build_index(arguments.urls)
  report = inspection.inspect(
      index, progress=lambda done: _bar(done, index.count, "reading"))
  print(inspection.format_report(report))
  return 0


def _encode(arguments) -> int:
  from sdjax import encode
  from sdjax.checkpoints import sources
  from sdjax.cli import device
  from sdjax.data import pack, shards
  device.cache_compilations()
  index = shards.build_index(arguments.urls)
  sd, params = sources.load(arguments.model)
  samples = encode.samples(sd, params, index, arguments.resolution or sd.default_size)
  result = pack.write_shards(_bar(samples, index.count, "encoding"), arguments.out)
  print(f"{result.samples} encoded pictures in {result.shards} shards "
        f"({result.size / 1e6:.1f} MB) in {arguments.out}; {len(result.failures)} left out")
  return 0


def _bar(items, total: int, what: str):
  """A progress bar on stderr; silent where stderr is a file."""
  import tqdm
  return tqdm.tqdm(items, total=total, desc=what, unit=" pictures", file=sys.stderr, disable=None,
                   leave=False)
