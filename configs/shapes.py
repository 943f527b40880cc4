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
  c.objective.prediction_type, c.objective.weighting = "v_prediction", "uniform"
  # Where things stand is decided while little can be seen; uniform timesteps learn it last.
  c.objective.high_noise_share, c.objective.high_noise_from = 0.35, 850
  c.optimizer.name, c.optimizer.b1, c.optimizer.b2 = "muon", 0.95, 0.98
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 2e-3, 100
  c.ema_decay = 0.99
  c.checkpoint.keep = 1

  c.evaluation = dict(
      name="shapes", count=256, seed=0, steps=20, guidance_scale=2.0, sampler="dpmpp_2m")

  if arg.stage == "autoencoder":
    c.trainable = ("vae",)
    c.total_steps = 500
    c.data.batch_size = 8
    c.kl_weight = 1e-8
    c.optimizer.decay = "cosine"
    c.checkpoint.every_steps = c.preview.every_steps = 250
  else:
    c.trainable = ("unet", "text_encoder")
    c.total_steps = 2_600
    c.data.batch_size = 24
    c.optimizer.decay, c.optimizer.decay_from = "linear", 0.5
    c.checkpoint.every_steps = c.preview.every_steps = 650
    c.preview.guidance_scale, c.preview.steps = 2.0, 20
  return c.lock()
