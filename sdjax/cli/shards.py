"""`sdjax shards`: make webdataset shards from pictures, and look into shards."""

import argparse
import collections
import functools
import os
import sys

from sdjax.errors import UserError

DESCRIPTION = """Shards are tars in the layout of LAION: 00000.tar with 000000000.jpg, .txt and
.json per sample. `pack` makes them from a folder of pictures, `index` notes where their samples
lie and what their jsons say, `inspect` tells what is in them, `encode` runs an autoencoder over
them once, so that training need not."""
URLS = "tars, folders of tars, globs, ranges such as 'data/{00000..00041}.tar', @FILE of such lines"


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

  index = commands.add_parser("index", help="what a run has to know of shards, once", description=(
      "Keeps a table beside each shard: where its samples lie, their sizes, captions and jsons. "
      "Training makes those that are missing when it meets them; this makes them ahead, and tells "
      "what filters would drop. Run again, it makes what is missing. Started on several hosts "
      "with SDJAX_PROCESS_ID and SDJAX_NUM_PROCESSES, each makes its share."))
  index.add_argument("urls", nargs="+", metavar="URLS", help=URLS)
  index.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N",
                     help="shards read at once (default: %(default)s)")
  index.add_argument("--folder", metavar="DIR", help=(
      "for the tables of shards that nothing can be put beside (default: $SDJAX_CACHE/index, "
      "or ~/.cache/sdjax/index)"))
  index.add_argument("--filter", action="append", default=[], metavar="RULE", help=(
      "tell what this would drop: 'aesthetic >= 5', 'min_side_px >= 512', "
      "'NSFW in UNLIKELY,UNSURE or missing'; may be given several times"))
  index.set_defaults(run=_index)

  inspect = commands.add_parser("inspect", help="counts, sizes, captions, broken samples",
                                description="Decodes every sample once and reports on one screen.")
  inspect.add_argument("urls", nargs="+", metavar="URLS", help=f"{URLS}; or a folder of pictures; "
                       "or tfds:NAME@SPLIT")
  inspect.add_argument("--sheet", nargs="+", metavar=("FILE.png", "N"),
                       help="draw the first N pictures (64) with their captions, too")
  inspect.set_defaults(run=_inspect)

  encode = commands.add_parser("encode", help="pictures → latents of an autoencoder", description=(
      "Writes shards that hold, in place of each picture, the mean and log variance of its "
      "latents. `sdjax train` reads them as it reads pictures. Killed at any moment, the same "
      "command makes what is missing; several processes share the shards."))
  _encode_flags(encode)
  encode.set_defaults(run=_encode)
  return parser


def _encode_flags(encode: argparse.ArgumentParser) -> None:
  encode.add_argument("--model", required=True, metavar="DIR",
                      help="a folder in the diffusers layout, hf://owner/name, a single "
                      ".safetensors, or the --workdir of a run")
  encode.add_argument("--resolution", type=int, metavar="PX",
                      help="side of the square that pictures are cropped to; the model's own "
                      "by default")
  encode.add_argument("--bucket", action="store_true",
                      help="keep about the shape of each picture, of about as many px")
  encode.add_argument("--text", action="store_true",
                      help="encode the first caption of each picture, too")
  encode.add_argument("--filter", action="append", default=[], metavar="RULE",
                      help="encode only what keeps this, see `sdjax shards index`")
  encode.add_argument("--batch-size", type=int, default=32, metavar="N",
                      help="pictures at once (default: %(default)s)")
  encode.add_argument("--shard-size", type=int, default=1000, metavar="N",
                      help="pictures per shard, at most 10000 (default: %(default)s)")
  encode.add_argument("--mesh", default="data=-1", metavar="AXIS=N,…",
                      help="devices of all processes, which split the batches; all by default")
  encode.add_argument("urls", metavar="URLS", help="the pictures, as for inspect")
  encode.add_argument("out", metavar="OUT", help="folder for the shards, that all hosts see")


def _pack(arguments) -> int:
  from sdjax.data import pack
  sources = pack.find_sources(arguments.folder)
  result = pack.pack(
      sources, arguments.folder, arguments.out, arguments.shard_size, arguments.quality,
      progress=lambda done: _bar(done, len(sources), "packing"))
  _tell_failures(result.failures)
  failed = {failure.name for failure in result.failures}
  without = sum(not source.caption and source.name not in failed for source in sources)
  print(f"{result.samples} pictures in {result.shards} shards ({result.size / 1e6:.1f} MB) in "
        f"{arguments.out}; {len(result.failures)} left out, {without} without a caption")
  return 0


def _tell_failures(failures: list) -> None:
  for failure in failures[:20]:
    print(f"left out {failure}", file=sys.stderr)
  if len(failures) > 20:
    print(f"left out {len(failures) - 20} more", file=sys.stderr)


def _index(arguments) -> int:
  from sdjax.data import filters, urls
  if arguments.processes < 1:
    raise UserError(f"--processes {arguments.processes} is not at least 1; leave it out")
  rules = tuple(map(filters.parse_text, arguments.filter))
  shards = _own_share(urls.expand(arguments.urls, _store()))
  found = _in_processes(functools.partial(_index_shard, folder=arguments.folder, rules=rules),
                        shards, min(arguments.processes, len(shards)))
  total, failures = collections.Counter(), []
  for counts, failure in _bar(found, len(shards), "indexing", " shards"):
    total.update(counts)
    failures += failure
  _tell_failures(failures)
  size, samples, kept = (total.pop(name, 0) for name in ("bytes", "samples", "kept"))
  print(f"shards     {len(shards) - len(failures):,}  ({size / 1e9:.3g} GB)"
        + (f", and {len(failures):,} that cannot be read" if failures else ""))
  print(f"samples    {samples:,}")
  if rules:
    print(f"kept       {kept:,}  ({kept / max(1, samples):.1%})")
  for reason, count in (+total).most_common():
    print(f"{count:>13,}  {reason}")
  return 1 if failures else 0


def _own_share(urls: list[str]) -> list[str]:
  """The shards that fall to this host, where the same command runs on several."""
  names = ("SDJAX_PROCESS_ID", "SDJAX_NUM_PROCESSES")
  process, processes = (os.environ.get(name) for name in names)
  if process is None and processes is None:
    return urls
  if not all(text and text.isdecimal() for text in (process, processes)) or (
      int(process) >= int(processes)):
    raise UserError(f"SDJAX_PROCESS_ID={process} is not one of SDJAX_NUM_PROCESSES={processes}, "
                    "counted from 0; set both or neither")
  return urls[int(process)::int(processes)]


def _in_processes(function, items: list, processes: int):
  """Yields function(item) in order, from several processes: the work is Python's own."""
  if processes <= 1:
    yield from map(function, items)
    return
  import concurrent.futures
  import multiprocessing
  import signal
  # Ctrl-C is for this process, which lets the others finish what they are at.
  pool = concurrent.futures.ProcessPoolExecutor(
      processes, multiprocessing.get_context("spawn"), signal.signal,
      (signal.SIGINT, signal.SIG_IGN))
  try:
    yield from pool.map(function, items)
  finally:
    pool.shutdown(cancel_futures=True)


def _index_shard(url: str, folder: str | None, rules) -> tuple[collections.Counter, list[str]]:
  """Counts of one shard, its index made if need be; or why it cannot be read."""
  from sdjax.data import filters, index, storage
  try:
    table = index.load(_store(), url, folder, filters.columns_of(rules))
  except (storage.Missing, storage.Unreachable) as error:
    return collections.Counter(), [str(error)]
  told = index.facts_of(table)
  counts = collections.Counter(
      samples=len(table), bytes=told["size"], kept=int(filters.keep(table, rules).sum()))
  for kind, reasons in (("dropped", filters.counts(table, rules)), ("found", told["problems"]),
                        ("found", {"truncated shard": int(told["truncated"])})):
    counts.update({f"{kind}: {reason}": n for reason, n in reasons.items()})
  return counts, []


@functools.cache
def _store():
  """What this process reads with; connections are kept from shard to shard."""
  from sdjax.data import storage
  return storage.Storage()


def _inspect(arguments) -> int:
  from sdjax import pictures
  from sdjax.data import captions, inspection
  from sdjax.data.sources import open_source
  file, *count = arguments.sheet or ("",)
  if len(count) > 1 or not all(text.isdecimal() and 1 <= int(text) <= 10_000 for text in count):
    raise UserError(f"--sheet {' '.join(arguments.sheet)}: give FILE.png and, where wanted, a "
                    "number from 1 to 10000, after the URLS")
  urls = arguments.urls[0] if len(arguments.urls) == 1 else arguments.urls
  source = open_source(urls, facts=inspection.FACTS, parts=captions.PARTS)
  if file:
    pictures.save_png(file, inspection.sheet(source, *map(int, count or (64,))))
  report = inspection.inspect(
      source, progress=lambda done: _bar(done, source.count, "reading"))
  print(inspection.format_report(report))
  return 0


def _encode(arguments) -> int:
  import dataclasses

  import jax

  from sdjax import encode
  from sdjax.checkpoints import sources
  from sdjax.cli import device, experiment, sample_flags
  from sdjax.data import filters
  from sdjax.train import partitioning
  rules = [dataclasses.astuple(filters.parse_text(rule)) for rule in arguments.filter]
  experiment.start_processes()
  device.cache_compilations()
  mesh = partitioning.make_mesh(sample_flags.read_mesh(arguments.mesh))
  sd, params = sources.load(arguments.model)
  options = encode.Options(arguments.resolution or sd.default_size, arguments.bucket,
                           arguments.text, arguments.shard_size, arguments.batch_size)
  with jax.set_mesh(mesh.local_mesh):  # each process makes shards of its own
    result = encode.run(sd, params, arguments.urls, arguments.out, options, rules=rules,
                        progress=lambda items, count: _bar(items, count, "encoding"))
  _tell_failures(result.failures)
  print(f"{result.samples} encoded pictures in {result.shards} of {result.planned} shards "
        f"({result.size / 1e6:.1f} MB) in {arguments.out}; {len(result.failures)} left out")
  return 0


def _bar(items, total: int, what: str, unit: str = " pictures"):
  """A progress bar on stderr; silent where stderr is a file."""
  import tqdm
  return tqdm.tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, disable=None,
                   leave=False)
