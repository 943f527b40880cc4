"""Pictures that steer: ControlNets and T2I-Adapters beside the prompt.

A ControlNet is asked at every step and adds to the UNet's skips; an adapter is asked once and adds
to its way down. Each has a weight per row of the sampler's table: its scale within its part of the
steps, and 0 elsewhere.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import guidance
from sdjax.errors import UserError
from sdjax.models.adapter import T2IAdapter
from sdjax.models.controlnet import ControlNet
from sdjax.models.unet import Condition
from sdjax.stable_diffusion import Params, StableDiffusion


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
  """A network that reads pictures of edges, poses, depths, …, and one picture for each image.

  Attributes:
    module: for the same UNet.
    params: its own, without a network's name.
    hint: float32 [n H W c] in [0, 1], of the images' size, channels in the order red, green, blue.
    scale: of what it adds; 1 is as trained.
    start, end: fractions of the steps between which it acts.
    guess: a ControlNet alone decides: it steers the conditional pass only, and high levels more
      than low ones (Zhang et al. 2023, https://arxiv.org/abs/2302.05543, section 3.5).
  """
  module: ControlNet | T2IAdapter
  params: Any
  hint: np.ndarray
  scale: float = 1.0
  start: float = 0.0
  end: float = 1.0
  guess: bool = False


class Net(NamedTuple):
  """What of a Control is static."""
  module: ControlNet | T2IAdapter
  conditional_only: bool


def check(control: Control, sd: StableDiffusion, n: int, height: int, width: int) -> None:
  """Raises UserError unless a control is for n images of this size and this UNet."""
  module, hint = control.module, control.hint
  is_adapter = isinstance(module, T2IAdapter)
  expected = (n, height, width, module.in_channels if is_adapter else module.hint_channels)
  if hint.shape != expected:
    raise UserError(f"the pictures of a {type(module).__name__} have shape {list(hint.shape)}; "
                    f"these images need {list(expected)}, [n H W c]")
  if not (np.isfinite(hint).all() and hint.min() >= 0 and hint.max() <= 1):
    raise UserError(f"the pictures of a {type(module).__name__} hold values outside [0, 1] or NaN; "
                    "divide 8-bit ones by 255")
  if not np.isfinite(control.scale):
    raise UserError(f"the scale of a {type(module).__name__} is {control.scale}; 1 is as trained, "
                    "0 is off")
  if not 0 <= control.start <= control.end <= 1:
    raise UserError(f"a control acts from {control.start} to {control.end} of the steps; it must "
                    "be 0 <= start <= end <= 1")
  if is_adapter:
    if height % module.downscale_factor or width % module.downscale_factor:
      raise UserError(f"{height} × {width} px are no multiples of {module.downscale_factor}, as "
                      "this T2IAdapter needs; choose another size")
    # SDXL's have one level more than its UNet.
    widths = all(map(operator.eq, module.channels, sd.unet.block_out_channels))
  else:
    widths = (module.block_out_channels, module.cross_attention_dim) == (
        sd.unet.block_out_channels, sd.unet.cross_attention_dim)
  if not widths:
    raise UserError(f"this {type(module).__name__} is for a UNet of other widths; use one that was "
                    "trained for this family of models")


def static(controls: Sequence[Control]) -> tuple[Net, ...]:
  """Returns what of controls is no array. Pooled residuals act on the conditional pass alone."""
  return tuple(
      Net(control.module, isinstance(control.module, ControlNet) and (
          control.guess or control.module.pool)) for control in controls)


def hints(controls: Sequence[Control], rows: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns the pictures of some images, channels in the order that each network reads."""
  return tuple(
      control.hint[rows, ..., ::-1] if getattr(control.module, "hint_order", "rgb") == "bgr"
      else control.hint[rows] for control in controls)


def weights(controls: Sequence[Control], rows: int) -> np.ndarray:
  """Returns how strongly each control acts at each of `rows` steps, float64 [rows k]."""
  step = np.arange(rows)[:, None]
  start, end, scale = (np.array([getattr(control, name) for control in controls]).reshape(1, -1)
                       for name in ("start", "end", "scale"))
  return np.where((step / rows >= start) & ((step + 1) / rows <= end), scale, 0.0)


def steered(
    sd: StableDiffusion,
    params: Params,
    nets: tuple[Net, ...],
    net_params: Sequence[Any],             # one per net
    pictures: Sequence[jax.Array],         # one per net, [b H W c]
    conditions: Sequence[Condition],       # one per pass
) -> Callable:
  """Returns predict(x [g·b h w c], t [g·b], appended [g·b h w c'] or None, weights [k]).

  predict runs the UNet in g interleaved passes, steered by all controls. What does not change from
  step to step is computed here, once.
  """
  passes = len(conditions)
  condition = jax.tree.map(guidance.interleave, *conditions)
  features = [net.module.apply({"params": p}, hint)
              for net, p, hint in zip(nets, net_params, pictures)
              if isinstance(net.module, T2IAdapter)]

  def predict(x, t, appended, weights):
    residual_sum, feature_sum, adapters = (), (), iter(features)
    for i, (net, p, hint) in enumerate(zip(nets, net_params, pictures)):
      if isinstance(net.module, T2IAdapter):
        more = [weights[i] * y.repeat(passes, axis=0) for y in next(adapters)]
        feature_sum = _add(feature_sum, more)
      elif net.conditional_only:
        more = _residuals(net, p, weights[i], guidance.separate(x, passes)[0],
                          guidance.separate(t, passes)[0], conditions[0], hint)
        more = [guidance.interleave(y, *[0 * y] * (passes - 1)) for y in more]
        residual_sum = _add(residual_sum, more)
      else:
        more = _residuals(net, p, weights[i], x, t, condition, hint.repeat(passes, axis=0))
        residual_sum = _add(residual_sum, more)
    if appended is not None:
      x = jnp.concatenate([x, appended], axis=-1)
    return sd.predict(params, x, t, condition, residuals=residual_sum, features=feature_sum)
  return predict


def _residuals(net: Net, params: Any, weight: jax.Array, *args) -> list[jax.Array]:
  """Returns what a ControlNet adds, times `weight`; where that is 0, the network does not run."""
  def run():
    residuals = net.module.apply({"params": params}, *args)
    fall = np.ones(len(residuals), np.float32)
    if net.conditional_only and not net.module.pool:
      fall = np.logspace(-1, 0, len(residuals), dtype=np.float32)  # guess mode: first a tenth
    return [weight * factor * y for factor, y in zip(fall, residuals)]

  nothing = jax.eval_shape(run)
  return jax.lax.cond(
      weight != 0, run, lambda: [jnp.zeros(y.shape, y.dtype) for y in nothing])


def _add(sums: Sequence[jax.Array], more: Sequence[jax.Array]) -> list[jax.Array]:
  return [a + b for a, b in zip(sums, more, strict=True)] if sums else list(more)
