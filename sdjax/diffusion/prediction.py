"""What a network's output means: eps, v, x0 or flow, and the closed forms between them.

With x = a·x0 + s·noise, a² + s² = 1, a network is trained to return one of
  epsilon        noise                        (DDPM, Ho et al. 2020)                      (1)
  v_prediction   v = a·noise - s·x0           (Salimans & Ho 2022, arxiv 2202.00512, app. D)  (2)
  sample         x0                                                                       (3)
Solving for x0 and for the noise gives linear forms in (x, F), F the network's output:
  D = c_skip·x + c_out·F,   E = e_skip·x + e_out·F                                        (4)
Networks of flow matching (Lipman et al. 2022, https://arxiv.org/abs/2210.02747), of any a + s > 0,
are sampled here but not trained:
  flow_prediction  noise - x0                                                             (5)
"""

from typing import NamedTuple

import jax
import numpy as np

from sdjax.errors import UserError

TYPES = ("epsilon", "v_prediction", "sample")


class Coefficients(NamedTuple):
  """Of equation (4): the denoised estimate D and the noise estimate E."""
  c_skip: np.ndarray
  c_out: np.ndarray
  e_skip: np.ndarray
  e_out: np.ndarray


def check_type(prediction_type: str) -> None:
  """Raises UserError unless `prediction_type` is one of `TYPES`."""
  if prediction_type not in TYPES:
    raise UserError(f"prediction_type {prediction_type!r} is not known; choose one of {TYPES}")


def coefficients(prediction_type: str, a: np.ndarray, s: np.ndarray) -> Coefficients:
  """Returns (4) at signal level `a` and noise level `s`, float64 of any one shape.

  epsilon cannot tell x0 at a = 0, nor sample the noise at s = 0: those entries are not finite.

  Raises:
    UserError: unless `prediction_type` is one of `TYPES` or "flow_prediction".
  """
  a, s = np.asarray(a, np.float64), np.asarray(s, np.float64)
  zero, one = np.zeros_like(a), np.ones_like(a)
  with np.errstate(divide="ignore", invalid="ignore"):
    match prediction_type:
      case "epsilon":
        return Coefficients(one / a, -s / a, zero, one)
      case "v_prediction":
        return Coefficients(a, -s, s, a)
      case "sample":
        return Coefficients(zero, one, one / s, -a / s)
      case "flow_prediction":
        return Coefficients(one / (a + s), -s / (a + s), one / (a + s), a / (a + s))
      case _:
        raise UserError(f"prediction_type {prediction_type!r} is not known; choose one of "
                        f"{(*TYPES, 'flow_prediction')}")


def target(
    prediction_type: str,
    x0: jax.Array,      # [b h w c]
    noise: jax.Array,   # [b h w c]
    a: jax.Array,       # broadcasts against x0
    s: jax.Array,
) -> jax.Array:         # [b h w c]
  """Returns what the network should have returned: (1), (2) or (3)."""
  check_type(prediction_type)
  match prediction_type:
    case "epsilon":
      return noise
    case "v_prediction":
      return a * noise - s * x0
    case "sample":
      return x0
