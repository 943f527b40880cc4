"""Where networks and diffusion meet: a Stable Diffusion model without its arrays.

  prompts ─► tokenize ─► encode_text ─┐
                                      ▼
  image ─► encode_image ─► x_t, t ─► predict ─► … ─► latents ─► decode_latents ─► image
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.tokenizer import Tokenizer
from sdjax.diffusion import prediction
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import UserError
from sdjax.models import initializers
from sdjax.models.clip import CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL

Params = dict[str, Any]


class Condition(NamedTuple):
  """What a picture is to be, as the network reads it."""
  context: jax.Array               # [b l d]
  pooled: jax.Array | None = None  # [b d]
  size: jax.Array | None = None    # [b 6]


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
  """Modules, noise schedule and tokenizers: static, hashable, no arrays.

  `params` of every method is {"unet": …, "vae": …, "text_encoder": …}; a method needs only the
  networks that it runs.

  Attributes:
    unet, vae, text_encoders: Linen modules.
    tokenizers: one per text encoder.
    schedule: noise levels of the network's timesteps.
    prediction_type: what `predict` returns, one of `prediction.TYPES`.
    scheduler_config: the model folder's scheduler_config.json.
  """
  unet: UNet
  vae: AutoencoderKL
  text_encoders: tuple[CLIPText, ...]
  schedule: Schedule
  prediction_type: str = "epsilon"
  tokenizers: tuple[Tokenizer, ...] = dataclasses.field(default=(), compare=False)
  scheduler_config: dict = dataclasses.field(default_factory=dict, compare=False)

  def __post_init__(self):
    prediction.check_type(self.prediction_type)

  @property
  def size_multiple(self) -> int:
    """Heights and widths of images, in pixels, must be multiples of this."""
    return self.vae.downsampling * self.unet.downsampling

  @property
  def default_size(self) -> int:
    """Side in px of the images that the model was trained on."""
    return self.unet.sample_size * self.vae.downsampling

  def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
    """Returns (h, w, c) for an image of `height` × `width` px.

    Raises:
      UserError: when a side is not a positive multiple of `size_multiple`.
    """
    for name, side in (("height", height), ("width", width)):
      if side <= 0 or side % self.size_multiple:
        near = max(round(side / self.size_multiple), 1) * self.size_multiple
        raise UserError(f"{name} is {side} px; this model makes multiples of "
                        f"{self.size_multiple} (the nearest is {near})")
    f = self.vae.downsampling
    return height // f, width // f, self.vae.latent_channels

  def tokenize(self, prompts: list[str]) -> np.ndarray:  # int32 [b k l]
    """Returns the tokens of `prompts` for each of the k text encoders."""
    return np.stack([tokenizer(prompts) for tokenizer in self.tokenizers], axis=1)

  def encode_text(self, params: Params, tokens: jax.Array) -> Condition:  # int32 [b k l]
    """Returns the condition of tokenized prompts."""
    return Condition(self.text_encoders[0].apply(
        {"params": params["text_encoder"]}, tokens[:, 0]))

  def predict(
      self,
      params: Params,
      x_t: jax.Array,          # [b h w c]
      t: jax.Array,            # [b] float
      condition: Condition,
      *,
      train: bool = False,
      rngs: dict[str, jax.Array] | None = None,
  ) -> jax.Array:              # [b h w c]
    """Returns the network's raw output, of `prediction_type`."""
    return self.unet.apply(
        {"params": params["unet"]}, x_t, t, condition.context, train=train, rngs=rngs)

  def moments(self, params: Params, image: jax.Array) -> jax.Array:
    """Returns mean and log variance of the latents, unscaled: [b H W 3] -> [b h w 2c]."""
    return self.vae.apply({"params": params["vae"]}, image, method="encode")

  def latents(self, moments: jax.Array, key: jax.Array | None) -> jax.Array:
    """Draws scaled latents from `moments` [b h w 2c] -> [b h w c]; key None takes the mean."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    if key is not None:
      deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
      mean = mean + deviation * jax.random.normal(key, mean.shape)
    return mean * self.vae.scaling_factor

  def encode_image(self, params: Params, image: jax.Array, key: jax.Array | None) -> jax.Array:
    """Returns scaled latents [b h w c] of images [b H W 3] in [-1, 1]; key None: the mean."""
    return self.latents(self.moments(params, image), key)

  def decode_latents(self, params: Params, latents: jax.Array) -> jax.Array:
    """Returns images [b H W 3], about [-1, 1], of scaled latents [b h w c]."""
    unscaled = latents / self.vae.scaling_factor
    return self.vae.apply({"params": params["vae"]}, unscaled, method="decode")

  def astype(self, dtype: str, remat: str = "none") -> "StableDiffusion":
    """Returns the model computing convolutions and matmuls in `dtype`.

    remat: what the UNet's backward pass computes again rather than keeps, see `UNet.remat`.
    """
    return dataclasses.replace(
        self, unet=self.unet.clone(dtype=dtype, remat=remat), vae=self.vae.clone(dtype=dtype),
        text_encoders=tuple(text.clone(dtype=dtype) for text in self.text_encoders))

  def param_shapes(self) -> Params:
    """Returns the tree of parameters as float32 `jax.ShapeDtypeStruct`s."""
    side = self.size_multiple
    image = jnp.zeros((1, side, side, 3))
    latents = jnp.zeros((1, *self.latent_shape(side, side)))
    text = self.text_encoders[0]
    tokens = jnp.zeros((1, text.max_length), jnp.int32)
    context = jnp.zeros((1, text.max_length, self.unet.cross_attention_dim))
    key = jax.random.key(0)
    shapes = {
        "unet": jax.eval_shape(self.unet.init, key, latents, jnp.zeros(1), context),
        "vae": jax.eval_shape(self.vae.init, key, image),
        "text_encoder": jax.eval_shape(text.init, key, tokens),
    }
    return {name: variables["params"] for name, variables in shapes.items()}

  def init(self, seed: int) -> Params:
    """Returns freshly drawn float32 parameters on the host; equal on every machine."""
    return initializers.draw(self.param_shapes(), seed)


def normalize_latents(
    sd: StableDiffusion,
    params: Params,
    mean: np.ndarray,       # [c] of the unscaled latents over a data set
    deviation: np.ndarray,  # [c]
) -> tuple[StableDiffusion, Params]:
  """Folds a shift and scale per channel into the autoencoder: its latents become standard.

  The convolutions around the latents are 1 × 1, so (z - mean) / deviation and its inverse are
  absorbed exactly; `scaling_factor` becomes 1 and every other program reads the result too.
  """
  vae = params["vae"]
  quant, post = vae["quant_conv"], vae["post_quant_conv"]
  scale = np.concatenate([1 / deviation, np.ones_like(deviation)]).astype(np.float32)
  # The second half of the moments is a log variance: dividing z shifts it.
  shift = np.concatenate([-mean / deviation, -2 * np.log(deviation)]).astype(np.float32)
  folded = {
      "quant_conv": {
          "kernel": quant["kernel"] * scale,
          "bias": quant["bias"] * scale + shift,
      },
      "post_quant_conv": {
          "kernel": post["kernel"] * deviation[:, None].astype(np.float32),
          "bias": post["bias"] + np.einsum("ijco,c->o", post["kernel"], mean).astype(np.float32),
      },
  }
  standard = dataclasses.replace(sd, vae=sd.vae.clone(scaling_factor=1.0))
  return standard, params | {"vae": vae | folded}
