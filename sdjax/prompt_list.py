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
import io
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from sdjax import __version__, generate, pictures, pytrees
from sdjax.data.prompt_files import Wanted
from sdjax.errors import UserError
from sdjax.files import write_whole
from sdjax.stable_diffusion import Params, StableDiffusion

log = logging.getLogger("sdjax")
MANIFEST = "manifest.jsonl"
SHARD_SIZES = (1, 10_000)  # least and most; a key has four digits for the place in its shard
WRITERS = 8                # threads: compressing a PNG of 512 px takes 0.1 s
SEEN = 4096                # numbers of each array that make up a fingerprint
# What `write_whole` leaves under our names when it is killed.
LEFT_OVER = re.compile(r"\.(\d+\.(png|tar)|manifest\.jsonl)\.[0-9a-f]{8}")
# A1111's names of samplers, by ours and by the class in a scheduler_config.json.
A1111_SAMPLERS = {
    "ddim": "DDIM", "DDIMScheduler": "DDIM",
    "plms": "PLMS", "pndm": "PLMS", "PNDMScheduler": "PLMS",
    "lms": "LMS", "LMSDiscreteScheduler": "LMS",
    "euler": "Euler", "EulerDiscreteScheduler": "Euler",
    "euler_ancestral": "Euler a", "EulerAncestralDiscreteScheduler": "Euler a",
    "heun": "Heun", "HeunDiscreteScheduler": "Heun",
    "dpm2": "DPM2", "KDPM2DiscreteScheduler": "DPM2",
    "dpm2_ancestral": "DPM2 a", "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M", "DPMSolverMultistepScheduler": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE", "DPMSolverSDEScheduler": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC", "UniPCMultistepScheduler": "UniPC",
    "lcm": "LCM", "LCMScheduler": "LCM",
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all pictures of a job share.

  Attributes:
    model: where it was read from.
    fingerprint: of the model as it is used; see `fingerprint`.
    sampler: the model's own if None, a `scheduler` by class.
    weighted, clip_skip: as `generate.text_to_image` takes them.
    dtype: of compute.
    lora, embedding: what was merged into the model, as the user named it.
  """
  model: str
  fingerprint: str
  sampler: str | None
  scheduler: str
  weighted: bool
  clip_skip: int
  dtype: str
  lora: tuple[str, ...]
  embedding: tuple[str, ...]


def fingerprint(sd: StableDiffusion, params: Params) -> str:
  """Returns 16 hex digits that change with the model, wherever it was read from.

  They see evenly spread numbers of each array: training moves all of them, and reading all would
  take as long as loading did.
  """
  digest = hashlib.sha256(
      json.dumps([sd.prediction_type, sd.scheduler_config], sort_keys=True).encode())
  for path, leaf in sorted(pytrees.flatten(params).items()):
    leaf = np.asarray(leaf)
    digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
    digest.update(leaf.reshape(-1)[::max(1, leaf.size // SEEN)].tobytes())
  return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Job:
  """The pictures wanted, and the folder that they go to.

  Attributes:
    out: a folder that all processes see.
    wanted: one by one.
    settings: of all of them.
    shard_size: pictures per tar; None writes pictures alone.
    restartable: whether pictures that are there are kept. If not, the job begins anew, and may
      replace pictures of others that did so.
  """
  out: Path
  wanted: Sequence[Wanted]
  settings: Settings
  shard_size: int | None
  restartable: bool

  def path(self, number: int) -> Path:
    """Returns where picture `number` is written."""
    if self.shard_size is None:
      return self.out / f"{number:0{max(5, len(str(len(self.wanted) - 1)))}d}.png"
    return self.out / "parts" / f"{self._key(number)}.png"

  def _key(self, number: int) -> str:
    shard, place = divmod(number, self.shard_size)
    return f"{shard:05d}{place:04d}"

  def _tar(self, number: int) -> Path:
    return self.out / f"{number // self.shard_size:05d}.tar"

  def header(self) -> dict:
    """Returns the first line of the manifest. A job with another one is another job."""
    return {"pictures": len(self.wanted), "shard_size": self.shard_size,
            "prompts": _hash([dataclasses.astuple(one) for one in self.wanted]),
            **dataclasses.asdict(self.settings), "restartable": self.restartable}

  def describe(self, number: int) -> dict:
    """Returns all that picture `number` depends on."""
    return {**dataclasses.asdict(self.wanted[number]), **dataclasses.asdict(self.settings)}

  def text(self, number: int) -> dict[str, str]:
    """Returns the text of a PNG: "parameters" in A1111's form, and "sdjax", all as JSON."""
    one, settings = self.wanted[number], self.settings
    sampler = settings.sampler or settings.scheduler
    return {
        "parameters": pictures.parameters(one.prompt, one.negative_prompt, {
            "Steps": one.steps, "Sampler": A1111_SAMPLERS.get(sampler, sampler),
            "CFG scale": f"{one.guidance_scale:g}", "Seed": one.seed,
            "Size": f"{one.width}x{one.height}",
            "Model": Path(settings.model).name.removesuffix(".safetensors"),
            # A1111 counts the layers that it does read from the end.
            "Clip skip": settings.clip_skip + 1 if settings.clip_skip else None}),
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
          for part, blob in self._members(number, path.read_bytes()).items():
            member = tarfile.TarInfo(f"{self._key(number)}.{part}")
            member.size, member.mode = len(blob), 0o444
            archive.addfile(member, io.BytesIO(blob))
    for path in paths:
      path.unlink(missing_ok=True)

  def _members(self, number: int, picture: bytes) -> dict[str, bytes]:
    facts = self.describe(number)
    facts |= {"key": self._key(number), "caption": facts["prompt"], "status": "success",
              "sha256": hashlib.sha256(picture).hexdigest()}
    return {"json": json.dumps(facts, indent=4).encode(), "png": picture,
            "txt": facts["prompt"].encode()}


def plan(sd: StableDiffusion, job: Job, batch_size: int) -> list[list[int]]:
  """Distributes the pictures, by number, over batches that text_to_image makes at once.

  One batch has one size, one number of steps, guidance or none, and prompts of as many chunks:
  beside a longer prompt, a short one would go on with empty chunks, and be another picture. Batches
  that differ in steps alone are equally large and share their executables; a batch is filled up
  with copies of its last picture.
  """
  shapes: dict[tuple, dict[tuple, list[int]]] = {}
  for number, one in enumerate(job.wanted):
    texts = [one.prompt, one.negative_prompt]
    tokens, _ = sd.tokenize_long(texts, job.settings.weighted)
    shape = one.height, one.width, tokens.shape[-1], one.guidance_scale == 1
    # Zeros in place of the empty text are zeros for a whole batch.
    zeros = sd.zeros_for_empty_prompt and not one.negative_prompt
    shapes.setdefault(shape, {}).setdefault((one.steps, zeros), []).append(number)
  batches = []
  for groups in shapes.values():
    largest = min(batch_size, max(map(len, groups.values())))
    for group in groups.values():
      group += group[-1:] * (largest - len(group))
      batches += [[group[row] for row in rows] for rows in generate.batches(len(group), largest)]
  return batches


def run(
    job: Job,
    sd: StableDiffusion,
    params: Params,
    *,
    batch_size: int,
    init_latents: np.ndarray | None = None,  # float [n h w c]
    keep_latents: bool = False,
) -> dict[int, np.ndarray]:
  """Makes the pictures of a job that are not there yet. To be called by all processes alike.

  Args:
    job: what to make, and where.
    sd, params: the model; its mesh is set (`jax.set_mesh`).
    batch_size: pictures made at once; rounded up to the number of devices that share a batch.
    init_latents: noise in place of the seeds' own.
    keep_latents: whether to return latents; else they are dropped.

  Returns:
    The final latents, float32 [h w c], of the pictures made, by number.

  Raises:
    UserError: a request that the model cannot serve, or a folder that is another job's. Nothing
      has been written then.
  """
  job.check()
  batches = plan(sd, job, batch_size)
  made, kept, is_main = job.made(), {}, jax.process_index() == 0
  left = [batch for batch in batches if not made[batch].all()]
  new, began = int((~made).sum()), time.monotonic()
  with tqdm.tqdm(total=len(made), initial=int(made.sum()), unit=" images", desc="sampling",
                 disable=None if is_main else True) as bar:
    if made.any():
      job.begin(made)
    for batch in left:
      images, latents = _make(job, sd, params, batch, init_latents)
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


def _make(job: Job, sd: StableDiffusion, params: Params, batch: list[int],
          init_latents: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
  wanted, settings = [job.wanted[number] for number in batch], job.settings
  first = wanted[0]
  negative = [one.negative_prompt for one in wanted]
  return generate.text_to_image(
      sd, params, [one.prompt for one in wanted], steps=first.steps,
      guidance_scale=[one.guidance_scale for one in wanted], seeds=[one.seed for one in wanted],
      height=first.height, width=first.width, negative_prompts=negative if any(negative) else None,
      sampler=settings.sampler, weighted=settings.weighted, clip_skip=settings.clip_skip,
      init_latents=None if init_latents is None else init_latents[batch], batch_size=len(batch))


def _listed(folder: Path) -> set[str]:
  return set(os.listdir(folder)) if folder.is_dir() else set()


def _hash(value: object) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
