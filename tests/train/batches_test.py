"""What a run takes from a latents cache, and which caches it refuses."""

import json

import numpy as np
import pytest

from configs import common
from sdjax import encode
from sdjax.data import latent_shards
from sdjax.data.sources import open_source
from sdjax.errors import UserError
from sdjax.train import batches


@pytest.fixture(scope="module")
def cache(tiny_model, pictures, tmp_path_factory):
  """A cache of two shapes with texts, that tells of the tiny model but is not made by it."""
  sd, params = tiny_model
  out = tmp_path_factory.mktemp("cache") / "out"
  source = open_source(str(pictures))
  options = encode.Options(32, bucket=True, text=True)
  shards = [latent_shards.Shard(number, size, np.arange(8))
            for number, size in enumerate([(40, 24), (24, 40), (24, 40)])]
  writer = latent_shards.Writer(out, encode.describe(sd, params, source, options), shards)
  state = np.ones((2, 3), np.float16)
  writer.begin(lambda: {"context.npy": state})
  for shard in shards:
    moments = np.zeros((shard.size[0] // 4, shard.size[1] // 4, 8), np.float16)
    sample = {"moments.npy": latent_shards.npy(moments), "context.npy": latent_shards.npy(state),
              "txt": b"a circle", "json": json.dumps({"captions": ["a circle", "one"]}).encode()}
    writer.write(shard, [sample] * 8)
  writer.finish()
  return out


def first_of(tiny_model, cache, trainable=("unet",), **data):
  config = common.defaults()
  config.trainable = trainable
  config.data.update({"urls": str(cache), "resolution": 32, "batch_size": 4, **data})
  found, weights = batches.open_sources(config)
  pipeline = batches.make(config, *tiny_model, found, weights)
  assert pipeline.count == 24
  taken = pipeline.batches()
  firsts = [next(taken) for _ in range(6)]
  taken.close()
  assert sorted(batch["moments"].shape for batch in firsts) == (
      4 * [(4, 6, 10, 8)] + 2 * [(4, 10, 6, 8)])
  return set(firsts[0])


def test_states_of_texts_are_taken_where_the_run_would_make_the_same(tiny_model, cache):
  assert first_of(tiny_model, cache) == {"moments", "context", "weight"}
  tokens = {"moments", "tokens", "weight"}
  assert first_of(tiny_model, cache, trigger="sks") == tokens
  assert first_of(tiny_model, cache, trainable=("unet", "text_encoder")) == tokens


def test_caches_of_other_networks_are_refused(tiny_model, cache):
  sd, params = tiny_model
  with pytest.raises(UserError, match="^resolution of"):
    first_of(tiny_model, cache, resolution=64)
  other = sd.init(1)
  with pytest.raises(UserError, match="^autoencoder of"):
    first_of((sd, other | {"text_encoder": params["text_encoder"]}), cache)
  mixed = sd, params | {"text_encoder": other["text_encoder"]}
  with pytest.raises(UserError, match="^text of"):
    first_of(mixed, cache)
  assert "tokens" in first_of(mixed, cache, clean_captions=True)
