r"""Shapes: the embedded default, a text-to-image model trained in minutes on two CPU cores.

  sdjax demo                                                 # does all of the following
  sdjax train --config configs/shapes.py:stage=autoencoder --workdir W/autoencoder \
      --config.data.urls=W/shards
  sdjax shards encode --model W/autoencoder/model W/shards W/latents
  sdjax train --config configs/shapes.py --workdir W/model \
      --config.init_from=W/autoencoder/model --config.data.urls=W/latents

Pictures are 32 × 32 px: two coloured shapes, and a caption that says how they stand.
"""

from configs import common


def get_config(arg: str = ""):
  arg = common.parse_arg(arg, stage="diffusion")

  c = common.defaults()
  c.model = "shapes"
  c.task = arg.stage
  c.data.resolution = 32
  c.tokenizer.length, c.tokenizer.vocab_size = 20, 600
  # Where things stand is decided while little can be seen: half of this schedule's timesteps have
  # a signal-to-noise ratio below 0.075, against a quarter of Stable Diffusion's.
  c.schedule = dict(name="linear", beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False)
  c.objective.prediction_type, c.objective.weighting = "v_prediction", "uniform"
  c.optimizer.learning_rate, c.optimizer.b2, c.optimizer.warmup_steps = 2e-3, 0.98, 100
  c.ema_decay = 0.99
  c.checkpoint.keep = 1

  c.evaluation = dict(
      name="shapes", count=256, seed=0, steps=20, guidance_scale=3.0, sampler="dpmpp_2m")

  if arg.stage == "autoencoder":
    c.trainable = ("vae",)
    c.total_steps = 800
    c.data.batch_size = 8
    c.kl_weight = 1e-8
    c.optimizer.decay = "cosine"
    c.checkpoint.every_steps = c.preview.every_steps = 400
  else:
    c.trainable = ("unet", "text_encoder")
    c.total_steps = 3_300
    c.data.batch_size = 24
    c.optimizer.decay, c.optimizer.decay_from = "linear", 0.5
    c.checkpoint.every_steps = c.preview.every_steps = 1_100
    c.preview.guidance_scale, c.preview.steps = 3.0, 20
  return c.lock()
