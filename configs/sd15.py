r"""Stable Diffusion 1.5 at full size, fine-tuned or from scratch, on LAION-style shards.

  sdjax train --config configs/sd15.py:init_from=DIFFUSERS_FOLDER --workdir DIR \
      --config.data.urls='shards/{00000..00041}.tar'
  sdjax train --config configs/sd15.py:tiny --workdir DIR --config.data.urls=SHARDS

`init_from` is a folder in the diffusers layout: the UNet trains, autoencoder and text encoder are
frozen. Without it the networks start from nothing, UNet and text encoder train together, and the
autoencoder must come from somewhere: give a folder, or train one with `stage=autoencoder`.
`tiny` is the same run with networks of a few thousand parameters, for any laptop.

Cost and quality: not measured yet.
"""

from configs import common


def get_config(arg: str = ""):
  arg = common.parse_arg(arg, init_from="", res=512, batch=256, stage="diffusion", tiny=False)

  c = common.defaults()
  c.model = "tiny" if arg.tiny else "sd15"
  c.init_from = arg.init_from
  c.task = arg.stage
  c.dtype = "float32" if arg.tiny else "bfloat16"
  c.trainable = ("unet",) if arg.init_from else ("unet", "text_encoder")
  if arg.stage == "autoencoder":
    c.trainable = ("vae",)

  c.data.resolution, c.data.batch_size = arg.res, arg.batch
  c.data.random_crop = c.data.random_flip = True

  if arg.tiny:
    c.total_steps, c.log_every_steps, c.optimizer.warmup_steps = 20, 5, 5
    c.data.resolution, c.data.batch_size = 32, 8
    c.tokenizer.length, c.tokenizer.vocab_size = 24, 600
    c.checkpoint.every_steps = 10
    c.preview.every_steps, c.preview.count, c.preview.steps = 20, 4, 4
  return c.lock()
