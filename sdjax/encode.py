"""Makes latents caches: shards of images in, shards of VAE moments out.

An autoencoder that does not train need not see the same image in every epoch. A cached sample keeps
its caption and json and has `moments.npy`, float16 [h w 2c], in place of the picture: mean and log
variance before scaling, so that training still draws its latents from the posterior.
"""

import functools
import io
import json
from collections.abc import Iterator

import jax
import numpy as np

from sdjax import generate
from sdjax.data import images, pack
from sdjax.data.shards import PICTURES, Index
from sdjax.stable_diffusion import Params, StableDiffusion

BATCH_SIZE = 32


@functools.partial(jax.jit, static_argnames="sd")
def _moments(sd: StableDiffusion, params: Params, image: jax.Array) -> jax.Array:
  return generate.replicate(sd.moments(params, generate.shard_batch(image)))


def samples(sd: StableDiffusion, params: Params, index: Index,
            side_px: int) -> Iterator[dict | pack.Failure]:
  """Yields the samples of a cache for `pack.write_shards`, in the order of `index`.

  Args:
    sd, params: the model whose autoencoder encodes.
    index: of shards with images.
    side_px: images are cropped in the middle to a square and resized to this.

  Raises:
    UserError: a side that the model cannot take.
  """
  sd.latent_shape(side_px, side_px)
  for start in range(0, index.count, BATCH_SIZE):
    rows = range(start, min(start + BATCH_SIZE, index.count))
    contents = [index.read(row, (*PICTURES, "txt", "json")) for row in rows]
    batch = np.zeros((BATCH_SIZE, side_px, side_px, 3), np.float32)
    failures = {}
    for place, (row, parts) in enumerate(zip(rows, contents, strict=True)):
      blob = next(parts[part] for part in PICTURES if part in parts)
      try:
        images.to_float(images.decode(blob, (side_px, side_px)), batch[place])
      except images.BadPicture as error:
        failures[place] = pack.Failure(index.name(row), str(error))
    moments = np.asarray(_moments(sd, params, batch), np.float16)
    for place, parts in enumerate(contents):
      yield failures.get(place) or _sample(moments[place], parts)


def _sample(moments: np.ndarray, parts: dict[str, bytes]) -> dict:
  file = io.BytesIO()
  np.save(file, moments, allow_pickle=False)
  return {
      "moments.npy": file.getvalue(),
      "txt": parts.get("txt", b"").decode("utf-8", "replace"),
      "json": json.loads(parts.get("json", b"{}")),
  }
