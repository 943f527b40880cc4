"""Measures how fast shards become batches, beside the webdataset library, per second of CPU time.

  pip install webdataset simplejpeg opencv-python-headless
  python benchmarks/data.py [ROUNDS]

512 px JPEGs become batches of 256², uint8, and their captions texts. Every contestant has a process
of its own, since what one does to the memory of a process meets the next. They run in turn, round
after round, and are compared within a round, so that other work on the machine meets all of them
alike. Two threads are compared with one by the clock on the wall, which needs an idle machine.
"""

import concurrent.futures
import contextlib
import functools
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from sdjax.data import images, pack
from sdjax.data.pipeline import Options, Pipeline
from sdjax.data.sources import Source, open_source

SAMPLES, BATCH = 512, 64
EPOCHS = 4  # that sdjax goes on for: it is made to run for weeks
SIDE_PX, SIZE = 512, (256, 256)
QUALITY = 95  # img2dataset's own
# (one, other) → how many times faster it shall be, per second of CPU time.
TARGETS = {
    ("sdjax, fast", "webdataset, PIL"): 4.0,
    ("sdjax, fast", "webdataset, fast"): 1.05,
    ("sdjax, fast", "the decoding alone"): 0.9,
    ("sdjax, pillow", "webdataset, PIL"): 2.2,
}
THREADS_TARGET = 1.9
NAMES = ("the decoding alone", "sdjax, fast", "webdataset, fast", "sdjax, pillow",
         "webdataset, PIL", "sdjax, two threads")


def photograph(seed: int) -> bytes:
  """A JPEG whose amplitudes fall with the frequency as those of photographs do, and as large."""
  rng = np.random.default_rng(seed)
  y, x = np.fft.fftfreq(SIDE_PX)[:, None], np.fft.rfftfreq(SIDE_PX)
  amplitude = 1 / np.maximum(np.hypot(y, x), 1 / SIDE_PX) ** 1.55
  phases = np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
  planes = np.fft.irfft2(amplitude * phases, (SIDE_PX, SIDE_PX))
  planes *= 50 / planes.std(axis=(1, 2), keepdims=True)
  luma, *chroma = planes
  colours = np.stack([luma + 0.2 * chroma[0], luma, luma + 0.2 * chroma[1]], -1)
  buffer = io.BytesIO()
  Image.fromarray(np.clip(128 + colours, 0, 255).astype(np.uint8)).save(
      buffer, "JPEG", quality=QUALITY)
  return buffer.getvalue()


def sdjax(source: Source, decoder: str, threads: int = 1) -> int:
  """Takes the batches of `EPOCHS` from the pipeline; returns how many samples it made.

  Those are more, since it works ahead until it is closed.
  """
  made = []

  def tokenize(texts):
    made.append(len(texts))
    return np.zeros((len(texts), 1), np.int32)

  batches = Pipeline(
      [source], batch_size=BATCH, seed=0, threads=threads, cache_bytes=0, tokenize=tokenize,
      options=Options(resolutions=((0, SIZE[0]),), decoder=decoder)).batches()
  for _ in range(EPOCHS * SAMPLES // BATCH):
    next(batches)
  batches.close()
  return sum(made)


def with_webdataset(folder: str, decoder: str) -> int:
  """Fills batches with the same samples, in the order of the tar; returns how many."""
  import webdataset
  samples = webdataset.WebDataset(f"{folder}/00000.tar", shardshuffle=False)
  if decoder == "PIL":
    samples = samples.decode("pil")
  for number, (picture, text) in enumerate(samples.to_tuple("jpg", "txt")):
    if number % BATCH == 0:
      batch, texts = np.empty((BATCH, *SIZE, 3), np.uint8), []
    if decoder == "PIL":
      batch[number % BATCH] = np.asarray(picture.resize(SIZE, Image.Resampling.BICUBIC))
      texts.append(text)
    else:
      batch[number % BATCH] = images.decode(picture, SIZE, decoder=decoder)
      texts.append(text.decode())
  return SAMPLES


def decoding_alone(blobs) -> int:
  """Does what no loader can do faster: bytes in memory to pixels in memory."""
  import simplejpeg
  for blob in blobs:
    simplejpeg.decode_jpeg(blob, min_height=SIZE[0], min_width=SIZE[1], min_factor=2)
  return len(blobs)


def write_shard(folder: str) -> str:
  """Returns a folder with one shard of photographs."""
  blobs = [photograph(seed) for seed in range(SAMPLES)]
  print(f"{SAMPLES} JPEGs of {SIDE_PX} px, {sum(map(len, blobs)) / SAMPLES / 1000:.0f} kB each")
  pack.write_shards(({"jpg": blob, "txt": f"photograph {number}"}
                     for number, blob in enumerate(blobs)), f"{folder}/shards", SAMPLES)
  return f"{folder}/shards"


@functools.cache
def contestant(name: str, shards: str):
  """Returns a function that goes through the samples, and returns how many it made."""
  source = open_source(shards)
  match name.split(", "):
    case ["the decoding alone"]:
      blobs = [source.read(sample)[0]["jpg"] for sample in range(SAMPLES)]
      return functools.partial(decoding_alone, blobs)
    case ["sdjax", "two threads"]:
      return functools.partial(sdjax, source, "fast", threads=2)
    case ["sdjax", decoder]:
      return functools.partial(sdjax, source, decoder)
    case ["webdataset", decoder]:
      return functools.partial(with_webdataset, shards, decoder)


def run(name: str, shards: str) -> tuple[float, float]:
  """Returns the seconds a sample that a contestant takes: of CPU time, and on the wall."""
  go = contestant(name, shards)
  began = time.process_time(), time.perf_counter()
  made = go()
  return (time.process_time() - began[0]) / made, (time.perf_counter() - began[1]) / made


def measure(shards: str, rounds: int) -> tuple[dict, dict]:
  """Returns name → what `run` returns, in every round, of CPU time and on the wall."""
  cpu, wall = ({name: [] for name in NAMES} for _ in range(2))
  spawn = multiprocessing.get_context("spawn")
  with contextlib.ExitStack() as stack:
    pools = {name: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, spawn))
             for name in NAMES}
    for number in range(rounds + 1):
      for name, pool in pools.items():
        found = pool.submit(run, name, shards).result()
        if number:  # the first round warms up
          cpu[name].append(found[0])
          wall[name].append(found[1])
  return cpu, wall


def main(rounds: int = 9) -> None:
  """Prints milliseconds a sample, and the ratios with what is wanted of them."""
  try:
    import webdataset
  except ImportError:
    sys.exit("nothing to compare with: pip install webdataset")
  images.decoder_name("fast")  # tells what is missing
  with tempfile.TemporaryDirectory() as folder:
    cpu, wall = measure(write_shard(folder), rounds)
  print(f"webdataset {webdataset.__version__}, Pillow {Image.__version__}, {rounds} rounds\n\n"
        f"{'ms a sample':<22}{'CPU':>6}{'wall':>8}")
  for name, seconds in cpu.items():
    print(f"{name:<22}{1000 * statistics.median(seconds):6.2f}"
          f"{1000 * statistics.median(wall[name]):8.2f}")
  print()
  for (one, other), target in TARGETS.items():
    ratio = statistics.median(b / a for a, b in zip(cpu[one], cpu[other]))
    print(f"{one} is {ratio:.2f} × {other}; wanted: {target}")
  # Of the best rounds: the others tell what else ran on the machine.
  ratio = min(wall["sdjax, fast"]) / min(wall["sdjax, two threads"])
  print(f"two threads are {ratio:.2f} × one, by the clock; wanted: {THREADS_TARGET} "
        f"(load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
