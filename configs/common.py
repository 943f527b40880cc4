"""What config files share: reading `config.py:res=256,tiny`, and the values most runs keep."""

from types import SimpleNamespace

from ml_collections import ConfigDict


def parse_arg(arg: str, **defaults) -> SimpleNamespace:
  """Reads "res=256,tiny" against typed defaults; a bare name means True.

  Raises:
    ValueError: for a name that has no default, or a value that its type cannot read.
  """
  given = dict(item.partition("=")[::2] for item in (arg or "").split(",") if item)
  if unknown := set(given) - set(defaults):
    raise ValueError(f"config argument {sorted(unknown)} is not one of {sorted(defaults)}")

  def read(name, default):
    text = given.get(name)
    if text is None:
      return default
    if isinstance(default, bool):
      if text.lower() not in ("", "true", "false"):
        raise ValueError(f"config argument {name}={text!r} must be true or false")
      return text.lower() != "false"
    return type(default)(text)

  return SimpleNamespace(**{name: read(name, default) for name, default in defaults.items()})


def defaults() -> ConfigDict:
  """Returns a config with every key that the trainer reads; experiments change what they mean."""
  c = ConfigDict()
  c.task = "diffusion"             # diffusion | autoencoder
  c.seed = 0                       # of parameters, noise, order and augmentation
  c.total_steps = 100_000
  c.model = "sd15"                 # a key of models/presets.py, where init_from is empty
  c.init_from = ""                 # a diffusers folder to start from
  c.trainable = ("unet",)          # networks that move; the others stay frozen
  c.dtype = "float32"              # of convolutions and matmuls; parameters are float32
  c.remat = "none"                 # blocks: less memory, a quarter more compute

  c.mesh = ConfigDict(dict(data=-1, fsdp=1))   # devices per axis; -1: all that are left
  c.partition = ((".*", "fsdp"),)              # (path regex, rule), first match wins

  c.data = ConfigDict(dict(
      urls="",                     # shards: a folder, a glob, or braces {00000..00041}.tar
      resolution=512,              # px, square
      batch_size=64,               # global
      caption_dropout=0.1,         # to the empty caption, for guidance
      random_flip=False,
      random_crop=False))
  # Without init_from, a tokenizer is learned from the captions.
  c.tokenizer = ConfigDict(dict(length=77, vocab_size=4096))

  c.schedule = ConfigDict(dict(
      name="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=False))
  c.objective = ConfigDict(dict(   # diffusion/objectives.py
      prediction_type="epsilon", weighting="min_snr", gamma=5.0, noise_offset=0.0,
      high_noise_share=0.0, high_noise_from=850))
  c.kl_weight = 1e-6               # of the autoencoder's KL term
  c.optimizer = ConfigDict(dict(
      name="adamw",                # adamw | muon: fewer steps from scratch, each dearer
      learning_rate=1e-4, warmup_steps=1_000, decay="constant", decay_from=0.0,
      b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip_norm=1.0))
  c.ema_decay = 0.9999

  c.log_every_steps = 50
  c.checkpoint = ConfigDict(dict(every_steps=2_000, keep=2))
  c.preview = ConfigDict(dict(     # pictures drawn while training; 0 steps: none
      every_steps=2_000, count=16, steps=30, guidance_scale=5.0, sampler="dpmpp_2m",
      prompts=()))                 # empty: captions of the data
  return c
