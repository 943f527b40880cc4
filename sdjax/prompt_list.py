"""Pictures of a list of prompts, batch by batch, so that a job killed at any moment goes on.

  OUT/manifest.jsonl    first the job, then a line for each picture that is there
  OUT/00012.png         picture 12 of the list; or, with shards,
  OUT/00003.tar         pictures 3000 … 3999 with their prompts, a webdataset, and
  OUT/parts/            the pictures of shards that are not complete

A picture is made when it is there: it appears whole, under a name that its place in the list alone
decides. Batches depend on the list, not on what is left of it, so that a picture made after a
restart is, bit for bit, the one that would have been made before.

All processes of a job make every batch together, each writes its share of the pictures, and
process 0 the manifest.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from sdjax import __version__, generate, pictures
from sdjax.data import tar
from sdjax.data.prompt_files import Wanted
from sdjax.errors import UserError
from sdjax.files import write_whole
from sdjax.stable_diffusion import StableDiffusion

log = logging.getLogger("sdjax")
MANIFEST = "manifest.jsonl"
WRITERS = 8                # threads: compressing a PNG of 512 px takes 0.1 s
# What `write_whole` leaves under our names when it is killed.
LEFT_OVER = re.compile(r"\.(\d+\.(png|tar)|preview\.png|manifest\.jsonl)\.[0-9a-f]{8}")


@dataclasses.dataclass(frozen=True)
class Job:
  """The pictures wanted, and the folder that they go to.

  Attributes:
    out: a folder that all processes see.
    wanted: one by one.
    settings: of all of them, as JSON can hold them. A job with others is another job.
    parameters: tells how a picture was made, in A1111's form.
    shard_size: pictures per tar; None writes pictures alone.
    restartable: whether pictures that are there are kept. If not, the job begins anew, and may
      replace pictures of others that did so.
  """
  out: Path
  wanted: Sequence[Wanted]
  settings: Mapping[str, object]
  parameters: Callable[[Wanted], str]
  shard_size: int | None
  restartable: bool

  def path(self, number: int) -> Path:
    """Returns where picture `number` is written."""
    if self.shard_size is None:
      return self.out / f"{number:0{max(5, len(str(len(self.wanted) - 1)))}d}.png"
    return self.out / "parts" / f"{self._key(number)}.png"

  def _key(self, number: int) -> str:
    return tar.sample_key(*divmod(number, self.shard_size))

  def _tar(self, number: int) -> Path:
    return self.out / f"{number // self.shard_size:05d}.tar"

  def header(self) -> dict:
    """Returns the first line of the manifest. A job with another one is another job."""
    return {"pictures": len(self.wanted), "shard_size": self.shard_size,
            "prompts": _hash([dataclasses.astuple(one) for one in self.wanted]),
            **self.settings, "restartable": self.restartable}

  def describe(self, number: int) -> dict:
    """Returns all that picture `number` depends on."""
    return {**dataclasses.asdict(self.wanted[number]), **self.settings}

  def text(self, number: int) -> dict[str, str]:
    """Returns the text of a PNG: "parameters" in A1111's form, and "sdjax", all as JSON."""
    return {
        "parameters": self.parameters(self.wanted[number]),
        "sdjax": json.dumps(
            self.describe(number) | {"version": __version__}, ensure_ascii=False),
    }

  def check(self) -> None:
    """Raises UserError where the folder holds another job's pictures."""
    manifest = self.out / MANIFEST
    if not manifest.is_file():
      if self.restartable and self._there().any():
        raise UserError(f"{self.out} holds pictures that no {MANIFEST} tells of; choose another "
                        "--out, or remove them")
      return
    with open(manifest, encoding="utf-8") as file:
      try:
        before = dict(json.loads(file.readline()))
      except (ValueError, TypeError) as error:
        raise UserError(f"{manifest} is not what sdjax sample writes ({error}); choose another "
                        "--out") from error
    header = json.loads(json.dumps(self.header()))
    different = [name for name in header if before.get(name) != header[name]]
    if different and (self.restartable or before.get("restartable", True)):
      raise UserError(f"{self.out} holds another job, begun with other {', '.join(different)}; "
                      "give the command that began it, or choose another --out")

  def made(self) -> np.ndarray:  # bool [n]
    """Returns which pictures need not be made, as process 0 sees it, the same on all processes."""
    there = self._there() if self.restartable else np.zeros(len(self.wanted), bool)
    return multihost_utils.broadcast_one_to_all(there.astype(np.uint8)).astype(bool)

  def _there(self) -> np.ndarray:
    paths = [self.path(number) for number in range(len(self.wanted))]
    names = _listed(self.out) | _listed(paths[0].parent)
    there = [path.name in names for path in paths]
    if self.shard_size is not None:
      there = [part or self._tar(number).name in names for number, part in enumerate(there)]
    return np.array(there, bool)

  def begin(self, made: np.ndarray) -> None:
    """Makes the folder: no picture is there before its manifest."""
    if jax.process_index() == 0:
      self.path(0).parent.mkdir(parents=True, exist_ok=True)
      for folder in {self.out, self.path(0).parent}:
        for name in filter(LEFT_OVER.fullmatch, _listed(folder)):
          (folder / name).unlink()
      self._write_manifest(made)
    _wait_for_all(f"begin {self.out}")

  def save(self, numbers: Sequence[int], drawn: np.ndarray) -> None:  # uint8 [n H W 3]
    """Writes pictures, each process its share, and waits until all are written."""
    share = slice(jax.process_index(), None, jax.process_count())
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
      list(pool.map(lambda number, picture: pictures.save_png(
          self.path(number), picture, self.text(number)), numbers[share], drawn[share]))
    _wait_for_all(f"picture {numbers[-1]}")
    if jax.process_index() == 0:
      with open(self.out / MANIFEST, "a", encoding="utf-8") as file:
        file.writelines(map(self._line, numbers))

  def _line(self, number: int) -> str:
    name = self.path(number).name
    if self.shard_size is not None:
      name = f"{self._tar(number).name}:{name}"
    line = {"file": name, "request": _hash(self.describe(number)),
            **dataclasses.asdict(self.wanted[number])}
    return json.dumps(line, ensure_ascii=False) + "\n"

  def _write_manifest(self, made: np.ndarray) -> None:
    with write_whole(self.out / MANIFEST, "w") as file:
      file.write(json.dumps(self.header(), ensure_ascii=False) + "\n")
      file.writelines(self._line(number) for number in np.flatnonzero(made).tolist())

  def finish(self) -> None:
    """Packs shards, and writes the manifest in order.

    Raises:
      UserError: pictures are missing: the processes do not see the same folder.
    """
    if self.shard_size is not None:
      starts = range(0, len(self.wanted), self.shard_size)
      for start in starts[jax.process_index()::jax.process_count()]:
        self._pack(range(start, min(start + self.shard_size, len(self.wanted))))
      _wait_for_all("shards")
    if jax.process_index() == 0:
      there = self._there()
      if not there.all():
        raise UserError(f"{(~there).sum()} pictures are not in {self.out} where process 0 looks, "
                        f"{self.path(int(there.argmin())).name} first; give a folder that all "
                        "hosts share, and the same command makes the rest")
      parts = self.path(0).parent
      if parts != self.out and parts.is_dir() and not _listed(parts):
        parts.rmdir()
      self._write_manifest(there)

  def _pack(self, numbers: Sequence[int]) -> None:
    """Writes the tar of a shard whose parts are all there; they go when it stands."""
    paths = [self.path(number) for number in numbers]
    if all(path.is_file() for path in paths):
      with (write_whole(self._tar(numbers[0])) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive):
        for number, path in zip(numbers, paths, strict=True):
          tar.add_sample(archive, self._key(number), self._members(number, path.read_bytes()))
    for path in paths:
      path.unlink(missing_ok=True)

  def _members(self, number: int, picture: bytes) -> dict[str, bytes]:
    facts = self.describe(number)
    facts |= {"key": self._key(number), "caption": facts["prompt"], "status": "success",
              "sha256": hashlib.sha256(picture).hexdigest()}
    return {"json": json.dumps(facts, indent=4).encode(), "png": picture,
            "txt": facts["prompt"].encode()}


def plan(sd: StableDiffusion, wanted: Sequence[Wanted], weighted: bool, batch_size: int,
         ) -> list[list[int]]:
  """Distributes pictures, by number, over batches that are made at once.

  One batch has one size, one number of steps, one strength, guidance or none, images or none, and
  prompts of as many chunks: beside a longer prompt, a short one would go on with empty chunks, and
  be another picture. Batches that differ in steps and strength alone are equally large and share
  their executables; a batch is filled up with copies of its last picture.

  Args:
    sd: reads the prompts.
    wanted: the pictures.
    weighted: whether prompts have the syntax of `data.prompts`.
    batch_size: pictures made at once, at most.
  """
  shapes: dict[tuple, dict[tuple, list[int]]] = {}
  for number, one in enumerate(wanted):
    texts = [one.prompt, one.negative_prompt]
    tokens, _ = sd.tokenize_long(texts, weighted)
    shape = (one.height, one.width, tokens.shape[-1], one.guidance_scale == 1,
             one.image is None, one.mask is None)
    # Zeros in place of the empty text are zeros for a whole batch.
    zeros = sd.zeros_for_empty_prompt and not one.negative_prompt
    alike = one.steps, one.strength, zeros
    shapes.setdefault(shape, {}).setdefault(alike, []).append(number)
  batches = []
  for groups in shapes.values():
    largest = min(batch_size, max(map(len, groups.values())))
    for group in groups.values():
      group += group[-1:] * (largest - len(group))
      batches += [[group[row] for row in rows] for rows in generate.batches(len(group), largest)]
  return batches


def run(
    job: Job,
    batches: Sequence[Sequence[int]],
    draw: Callable[[list[int]], tuple[np.ndarray, np.ndarray]],
    keep_latents: bool = False,
) -> dict[int, np.ndarray]:
  """Makes the pictures of a job that are not there yet. To be called by all processes alike.

  Args:
    job: what to make, and where.
    batches: of `plan`.
    draw: makes the pictures of one batch: images float [n H W 3] in [-1, 1] and latents [n h w c].
    keep_latents: whether to return latents; else they are dropped.

  Returns:
    The final latents, float32 [h w c], of the pictures made, by number.

  Raises:
    UserError: the folder is another job's. Nothing has been written then, nor where the first
      batch cannot be drawn.
  """
  job.check()
  made, kept, is_main = job.made(), {}, jax.process_index() == 0
  left = [batch for batch in batches if not made[batch].all()]
  new, began = int((~made).sum()), time.monotonic()
  with tqdm.tqdm(total=len(made), initial=int(made.sum()), unit=" images", desc="sampling",
                 disable=None if is_main else True) as bar:
    if made.any():
      job.begin(made)
    for batch in left:
      images, latents = draw(batch)
      if not made.any():  # not before: a request that cannot be served leaves no folder
        job.begin(made)
      numbers = [number for number in dict.fromkeys(batch) if not made[number]]
      rows = [batch.index(number) for number in numbers]
      job.save(numbers, pictures.to_uint8(images[rows]))
      if keep_latents:
        kept |= dict(zip(numbers, latents[rows], strict=True))
      made[numbers] = True
      bar.update(len(numbers))
  job.finish()
  if new:
    seconds = time.monotonic() - began
    log.info("made %d pictures in %.1f s, %.3g images/s", new, seconds, new / seconds)
  return kept


def _listed(folder: Path) -> set[str]:
  return set(os.listdir(folder)) if folder.is_dir() else set()


def _hash(value: object) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
