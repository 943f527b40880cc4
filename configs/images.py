r"""Your own captioned images on any machine: a small model of 64 px, trained from nothing.

  sdjax shards pack FOLDER SHARDS                       # name.jpg with name.txt, or metadata.jsonl
  sdjax train --config configs/images.py:stage=autoencoder --workdir RUN/autoencoder \
      --config.data.urls=SHARDS
  sdjax train --config configs/images.py:init_from=RUN/autoencoder/model --workdir RUN/model \
      --config.data.urls=SHARDS

`res` sets another side (a multiple of 16 px), `steps` the length of the run. A few hundred images
are learned by heart rather than generalised from; for pictures of quality start from released
weights, configs/sd15.py.
"""

from configs import common


def get_config(arg: str = ""):
  arg = common.parse_arg(arg, stage="diffusion", init_from="", res=64, batch=16, steps=2_000)

  c = common.defaults()
  c.model = "small"
  c.task, c.init_from, c.total_steps = arg.stage, arg.init_from, arg.steps
  c.data.resolution, c.data.batch_size = arg.res, arg.batch
  c.data.random_crop = True
  c.tokenizer.length, c.tokenizer.vocab_size = 32, 2_048
  c.objective.prediction_type = "v_prediction"
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.decay = 1e-3, 100, "cosine"
  c.optimizer.b2 = 0.98
  c.ema_decay = 0.995
  c.log_every_steps = 10
  c.checkpoint.every_steps = c.preview.every_steps = 250
  c.preview.guidance_scale = 3.0
  c.trainable = ("vae",) if arg.stage == "autoencoder" else ("unet", "text_encoder")
  return c.lock()
