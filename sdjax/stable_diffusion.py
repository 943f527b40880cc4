"""Where networks and diffusion meet: a Stable Diffusion model without its arrays.

  prompts ─► tokenize ─► encode_text ─┐
                                      ▼
  image ─► encode_image ─► x_t, t ─► predict ─► … ─► latents ─► decode_latents ─► image
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data import prompts as prompts_syntax
from sdjax.data.tokenizer import Tokenizer
from sdjax.diffusion import prediction
from sdjax.diffusion.parts import WHOLE, Part
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import UserError
from sdjax.models import initializers, tiling
from sdjax.models.clip import CLIPText
from sdjax.models.remat import POLICIES
from sdjax.models.unet import Condition, UNet
from sdjax.models.vae import AutoencoderKL

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
  """Modules, noise schedule and tokenizers: static, hashable, no arrays.

  `params` of every method is {"unet": …, "vae": …, and one of each of `text_names`}; a method
  needs only the networks that it runs.

  Attributes:
    unet, vae, text_encoders: Linen modules.
    tokenizers: one per text encoder.
    schedule: noise levels of the network's timesteps.
    prediction_type: what `predict` returns, one of `prediction.TYPES`.
    zeros_for_empty_prompt: where no negative prompt is given, the condition is zeros instead of
      that of an empty text (SDXL's force_zeros_for_empty_prompt).
    scheduler_config: the model folder's scheduler_config.json.
  """
  unet: UNet
  vae: AutoencoderKL
  text_encoders: tuple[CLIPText, ...]
  schedule: Schedule
  prediction_type: str = "epsilon"
  zeros_for_empty_prompt: bool = False
  tokenizers: tuple[Tokenizer, ...] = dataclasses.field(default=(), compare=False)
  scheduler_config: dict = dataclasses.field(default_factory=dict, compare=False)

  def __post_init__(self):
    prediction.check_type(self.prediction_type)

  @property
  def text_names(self) -> tuple[str, ...]:
    """Keys of the text encoders in `params`: what folders call them."""
    if self.is_xl and len(self.text_encoders) == 1:
      return ("text_encoder_2",)  # the refiner lacks the first
    return ("text_encoder", "text_encoder_2")[:len(self.text_encoders)]

  @property
  def is_xl(self) -> bool:
    """Whether the UNet reads a pooled text and sizes beside the context."""
    return self.unet.added_dim is not None

  @property
  def size_numbers(self) -> int:
    """How many numbers describe sizes: 6 in SDXL, 5 in its refiner, 0 elsewhere."""
    if not self.is_xl:
      return 0
    return (self.unet.added_dim - self.text_encoders[-1].projection) // self.unet.added_time_dim

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

  def tokenize_long(self, prompts: list[str], weighted: bool
                    ) -> tuple[np.ndarray, np.ndarray]:  # int32 [b k l], float32 [b k l]
    """Returns the tokens of prompts of any length, and their weights; see `prompts.encode`."""
    tokens, weights = zip(*(prompts_syntax.encode(words, prompts, weighted)
                            for words in self.tokenizers))
    return np.stack(tokens, axis=1), np.stack(weights, axis=1)

  def encode_text(
      self,
      params: Params,
      tokens: jax.Array,                  # int32 [b k l]
      size: jax.Array | None = None,      # [b size_numbers]
      weights: jax.Array | None = None,   # [b k l]
      skip: int = 0,
  ) -> Condition:
    """Returns the condition of tokenized prompts.

    Texts longer than the encoders' positions are read in pieces (l a multiple of `max_length`), of
    which the first alone is pooled.

    Args:
      params, tokens: see above.
      size: SDXL's; see `default_sizes`.
      weights: of tokens, 1 changes nothing: each state is multiplied by its token's weight, then
        a whole piece by one number that gives its mean back (AUTOMATIC1111's emphasis).
      skip: last layers of the text encoders not to read ("CLIP skip", 0 as trained).
    """
    contexts, states = [], None
    for i, (name, text) in enumerate(zip(self.text_names, self.text_encoders, strict=True)):
      variables = {"params": params[name]}
      pieces = tokens[:, i].reshape(-1, min(text.max_length, tokens.shape[-1]))
      states = text.apply(variables, pieces)
      if self.is_xl:
        context = states.hidden[-2 - skip]
      else:
        context = text.apply(variables, states.hidden[-1 - skip], method="normalize")
      if weights is not None:
        context = _emphasize(context, weights[:, i].reshape(pieces.shape))
      contexts.append(context.reshape(*tokens[:, i].shape, -1))
    pooled = None
    if self.is_xl:
      pooled = states.projected.reshape(tokens.shape[0], -1, states.projected.shape[-1])[:, 0]
    return Condition(jnp.concatenate(contexts, axis=-1), pooled, size)

  def default_sizes(self, n: int, height: int, width: int,
                    negative: bool = False) -> np.ndarray | None:
    """Returns what SDXL is told of n uncropped images of `height` × `width` px: [n size_numbers].

    Original height and width, top and left of the crop, and target height and width; in the
    refiner a score of beauty in place of the last two: 6, or 2.5 on the negative side. None for
    models that are told nothing.
    """
    if not self.is_xl:
      return None
    target = (height, width) if self.size_numbers == 6 else (2.5 if negative else 6.0,)
    return np.tile(np.array([height, width, 0, 0, *target], np.float32), (n, 1))

  def predict(
      self,
      params: Params,
      x_t: jax.Array,          # [b h w c]
      t: jax.Array,            # [b] float
      condition: Condition,
      *,
      residuals: Sequence[jax.Array] = (),
      features: Sequence[jax.Array] = (),
      train: bool = False,
      rngs: dict[str, jax.Array] | None = None,
  ) -> jax.Array:              # [b h w c]
    """Returns the network's raw output, of `prediction_type`; all see `UNet.__call__`."""
    return self.unet.apply({"params": params["unet"]}, x_t, t, condition, residuals=residuals,
                           features=features, train=train, rngs=rngs)

  def moments(self, params: Params, image: jax.Array, tile: int | None = None) -> jax.Array:
    """Returns mean and log variance of the latents, unscaled: [b H W 3] -> [b h w 2c].

    tile: side in latents of the pieces that a larger image is encoded in (`tiling.encode`),
      neighbours overlapping by a quarter; None: all at once.
    """
    if tile is not None:
      f = self.vae.downsampling
      return tiling.encode(self.vae, params["vae"], image, tile * f, tile // 4 * f)
    return self.vae.apply({"params": params["vae"]}, image, method="encode")

  def latents(self, moments: jax.Array, key: jax.Array | None, part: Part = WHOLE) -> jax.Array:
    """Draws scaled latents from `moments` [b h w 2c] -> [b h w c]; key None takes the mean.

    part: of the batch that the rows of `moments` are.
    """
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    if key is not None:
      deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
      draw = functools.partial(jax.random.normal, key)
      mean = mean + deviation * part.draw(draw, mean.shape)
    return (mean - self.vae.shift_factor) * self.vae.scaling_factor

  def encode_image(self, params: Params, image: jax.Array, key: jax.Array | None,
                   tile: int | None = None) -> jax.Array:
    """Returns scaled latents [b h w c] of images [b H W 3] in [-1, 1]; see `moments`, `latents`."""
    return self.latents(self.moments(params, image, tile), key)

  def decode_latents(self, params: Params, latents: jax.Array,
                     tile: int | None = None) -> jax.Array:
    """Returns images [b H W 3], about [-1, 1], of scaled latents [b h w c]; tile: see `moments`."""
    unscaled = latents / self.vae.scaling_factor + self.vae.shift_factor
    if tile is not None:
      return tiling.decode(self.vae, params["vae"], unscaled, tile, tile // 4)
    return self.vae.apply({"params": params["vae"]}, unscaled, method="decode")

  def astype(self, dtype: str, remat: str = "none") -> "StableDiffusion":
    """Returns the model computing convolutions and matmuls in `dtype`.

    remat: what the UNet's backward pass computes again, a key of `remat.POLICIES`.

    Raises:
      UserError: there is no such `remat`.
    """
    if remat not in POLICIES:
      raise UserError(f"remat {remat!r} is not known; choose one of {', '.join(POLICIES)}")
    return dataclasses.replace(
        self, unet=self.unet.clone(dtype=dtype, remat=remat), vae=self.vae.clone(dtype=dtype),
        text_encoders=tuple(text.clone(dtype=dtype) for text in self.text_encoders))

  def param_shapes(self) -> Params:
    """Returns the tree of parameters as float32 `jax.ShapeDtypeStruct`s."""
    modules = {"unet": self.unet, "vae": self.vae,
               **dict(zip(self.text_names, self.text_encoders, strict=True))}
    return {name: jax.tree.map(lambda leaf: leaf, _param_shapes(module))
            for name, module in modules.items()}

  def init(self, seed: int) -> Params:
    """Returns freshly drawn float32 parameters on the host; equal on every machine."""
    return initializers.draw(self.param_shapes(), seed)


@functools.cache
def _param_shapes(module: Any) -> Params:
  return jax.eval_shape(module.init, jax.random.key(0), *module.example())["params"]


def to_unit(image: jax.Array) -> jax.Array:  # uint8 [b H W 3] -> float32
  """Returns 0 … 255 as -1 … 1: pictures as files hold them, as networks want them."""
  return image.astype(jnp.float32) * (2 / 255) - 1


def _emphasize(context: jax.Array, weights: jax.Array) -> jax.Array:  # [b l d], [b l]
  mean = context.mean(axis=(1, 2), keepdims=True)
  weighted = context * weights[..., None]
  return weighted * (mean / weighted.mean(axis=(1, 2), keepdims=True))


def normalize_latents(
    sd: StableDiffusion,
    params: Params,
    mean: np.ndarray,       # [c] of the unscaled latents over a data set
    deviation: np.ndarray,  # [c]
) -> tuple[StableDiffusion, Params]:
  """Folds a shift and scale per channel into the autoencoder: its latents become standard.

  The convolutions around the latents are 1 × 1, so (z - mean) / deviation and its inverse are
  absorbed exactly; `scaling_factor` becomes 1 and every other program reads the result too.

  Raises:
    UserError: the autoencoder has no such convolutions (SD3, Flux).
  """
  if not (sd.vae.quant_conv and sd.vae.post_quant_conv):
    raise UserError("this autoencoder has no 1 × 1 convolutions around its latents, which would "
                    "take up their mean and deviation; train one with quant_conv")
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
  standard = dataclasses.replace(sd, vae=sd.vae.clone(scaling_factor=1.0, shift_factor=0.0))
  return standard, params | {"vae": vae | folded}
