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
  c.remat = "none"                 # named | blocks: less memory, more compute

  c.mesh = ConfigDict(dict(data=-1, fsdp=1))   # devices per axis; -1: all that are left
  c.partition = ((".*", "fsdp"),)              # (path regex, replicate | fsdp | zero1), first wins

  c.data = _data()
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
  c.accumulate = 1                 # parts that a batch is cut into, where memory is short

  c.log_every_steps = 50
  c.wandb_project = ""             # of Weights & Biases, beside TensorBoard; "": none
  c.max_skipped = 10               # steps in a row without a finite loss and gradient end the run
  c.watchdog_s = 900.0             # without a step, and the process ends with code 42; 0: never
  c.checkpoint = ConfigDict(dict(
      every_steps=2_000, keep=2,   # the newest so many
      keep_every=0))               # and for ever the steps that this divides; 0: none
  c.resume_changed = False         # go on from a checkpoint although other keys have changed
  c.preview = ConfigDict(dict(     # pictures drawn while training; 0 steps: none
      every_steps=2_000, count=16, steps=30, guidance_scale=5.0, sampler="dpmpp_2m",
      prompts=()))                 # empty: captions of the data
  c.validation = ConfigDict(dict(  # losses of the averaged parameters, see train/validation.py
      urls="",                     # shards that are not trained on; "": no validation
      every_steps=2_000, batches=8,
      bins=4))                     # of timesteps
  return c


def _data() -> ConfigDict:
  return ConfigDict(dict(
      urls="",                     # shards: a folder, a glob, braces {00000..00041}.tar, a file of
                                   # lines, also on the network; or pictures; or tfds:NAME@SPLIT
      mix=(),                      # in place of urls: dicts of urls, filters, and weight | repeats
      filters=(),                  # ("aesthetic", ">=", 5.0), …, see data/filters.py
      strict=False,                # a missing shard stops the run; else it is counted
      max_bad_share=0.05,          # of samples that cannot be used
      resolution=512,              # px, the side of squares
      bucket=False,                # of about as many px, in the pictures' aspect ratios
      stages=(),                   # (first step, resolution), …, the last one as above
      batch_size=64,               # global
      min_side_px=1,               # smaller pictures are left out when they are met
      decoder="auto",              # pillow | fast | exact, see data/images.py
      random_flip=False,
      random_crop=False,
      caption_column=(),           # key(s) of the json to take captions from
      caption_dropout=0.1,         # to the empty caption, for guidance
      clean_captions=False,        # of html and URLs
      trigger="",                  # words before each caption
      shuffle_tags=False,          # of captions that are lists with commas,
      keep_tags=0))                # but for so many
