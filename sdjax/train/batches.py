"""Which data a config means: its sources, and the pipeline that makes batches of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdjax import encode
from sdjax.data import captions, latent_shards, pipeline, sources, storage
from sdjax.errors import UserError
from sdjax.stable_diffusion import Params, StableDiffusion

MIX = {"urls", "weight", "repeats", "filters"}  # what an entry of config.data.mix may hold


def options(config: Any, size_condition: bool = False) -> pipeline.Options:
  """Returns what config.data says of rows.

  Args:
    config: as `configs.common.defaults` has it.
    size_condition: whether the model is told sizes.

  Raises:
    UserError: stages that do not begin at step 0, or fall.
  """
  data = config.data
  stages = tuple(map(tuple, data.stages)) or ((0, data.resolution),)
  if stages[0][0] != 0 or [first for first, _ in stages] != sorted({first for first, _ in stages}):
    raise UserError(f"config.data.stages is {stages}; give (first step, px) with rising steps, "
                    "from step 0 on")
  if stages[-1][1] != data.resolution:
    raise UserError(f"config.data.stages ends with {stages[-1][1]} px, and config.data.resolution "
                    f"is {data.resolution}; make them equal")
  return pipeline.Options(
      resolutions=stages, bucket=data.bucket, random_crop=data.random_crop, flip=data.random_flip,
      size_condition=size_condition, min_side_px=data.min_side_px, decoder=data.decoder,
      max_bad_share=data.max_bad_share, captions=captions.Captions(
          dropout=data.caption_dropout, clean=data.clean_captions, trigger=data.trigger,
          shuffle_tags=data.shuffle_tags, keep_tags=data.keep_tags, column=data.caption_column))


def takes_states(config: Any) -> bool:
  """Whether a run may take the states of texts from a latents cache.

  It may if it would make the same: its text encoders do not train, and nothing is done to captions
  but to drop them.
  """
  chosen = options(config).captions
  return (config.task == "diffusion" and chosen == captions.Captions(dropout=chosen.dropout)
          and not any(name.startswith("text_encoder") for name in config.trainable))


def open_sources(config: Any) -> tuple[list[sources.Source], list[float]]:
  """Returns the sources of config.data and their weights.

  Args:
    config: as `configs.common.defaults` has it.

  Raises:
    UserError: entries that cannot be understood, or have no data.
  """
  data, store = config.data, storage.Storage()
  # Whether the model wants sizes is not known before it is built, for which captions are read.
  facts = pipeline.facts_wanted(options(config, size_condition=True))
  parts = latent_shards.STATES if takes_states(config) else ()
  if bool(data.urls) == bool(data.mix):
    raise UserError("config.data.urls and config.data.mix are "
                    f"{'both given' if data.urls else 'empty'}; give one of them")
  found, weights = [], []
  for entry in map(_checked, data.mix or ({"urls": data.urls},)):
    source = sources.open_source(
        entry["urls"], rules=(*data.filters, *entry.get("filters", ())), facts=facts,
        parts=parts, strict=data.strict, store=store)
    found.append(source)
    weights.append(float(entry.get("weight", source.count * entry.get("repeats", 1))))
  return found, weights


def _checked(entry: Mapping) -> Mapping:
  if not isinstance(entry, Mapping) or not {"urls"} <= set(entry) <= MIX or (
      {"weight", "repeats"} <= set(entry)):
    raise UserError(f"config.data.mix holds {entry}; an entry is a dict of urls and, where wanted, "
                    "filters and either weight or repeats")
  return entry


def make(config: Any, sd: StableDiffusion, params: Params, found: Sequence[sources.Source],
         weights: Sequence[float]) -> pipeline.Pipeline:
  """Returns the pipeline of a run; an autoencoder's has no texts.

  States of texts are taken from latents caches where all have them, see `takes_states`.

  Args:
    config, sd, params: of the run; parameters on the host.
    found, weights: of `open_sources`.

  Raises:
    UserError: a latents cache that these networks would not have made, or options that exclude
      each other.
  """
  has_texts = config.task == "diffusion"
  wanted = options(config, size_condition=has_texts and sd.is_xl)
  store = storage.Storage()
  caches = latent_shards.caches_of(found, store)
  empty_text = latent_shards.empty_text(caches, store) if takes_states(config) else None
  encode.check_caches(caches, sd, params, config.data.resolution, empty_text is not None)
  parts = [(part, weight * (part.count / source.count))
           for source, weight in zip(found, weights, strict=True)
           for part in latent_shards.by_shape(source, caches)]
  return pipeline.Pipeline(
      [part for part, _ in parts], [weight for _, weight in parts],
      batch_size=config.data.batch_size, seed=config.seed, options=wanted,
      tokenize=sd.tokenize if has_texts and empty_text is None else None, empty_text=empty_text)
