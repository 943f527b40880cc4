"""Every scheduler class of diffusers, option by option, against the tables made of its config.

The network is analytic: what a perfect one would return for data from a mixture of two Gaussians.
Noise is injected by the number of the network call. In float64 on both sides what is left must be
rounding; in float32, as people run both, at most 1e-4 · max(1, |x|).
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import sys
import types
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import sampling, scheduler_configs, schedules, solvers
from sdjax.errors import UserError

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SHAPE = (2, 6, 5, 2)
ROWS = 56                 # every table here is padded to these rows: one program
STEPS = (4, 10, 25)
LOG_SIGMAS = -0.5 * schedules.log_snr(schedules.Schedule("linear", 1e-4, 0.02))
Z = np.random.default_rng(1).standard_normal((ROWS, *SHAPE))

# What no constructor's signature tells: values to try beside the default.
VALUES = {
    "beta_start": [0.00085], "beta_end": [0.012], "num_train_timesteps": [400],
    "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [list(np.linspace(2e-4, 0.025, 1000))],
    "prediction_type": ["sample", "v_prediction"],
    "clip_sample_range": [0.7], "sample_max_value": [1.5], "dynamic_thresholding_ratio": [0.9],
    "timestep_spacing": ["leading", "trailing", "linspace"], "steps_offset": [1],
    "interpolation_type": ["log_linear"], "timestep_type": ["continuous"],
    "sigma_min": [0.05], "sigma_max": [12.0], "sigma_data": [1.0], "rho": [5.0],
    "solver_order": [1, 3], "predictor_order": [1, 3, 4], "corrector_order": [1, 3, 4],
    "lambda_min_clipped": [-2.0], "flow_shift": [3.0], "shift": [3.0],
    "algorithm_type": ["noise_prediction"], "disable_corrector": [[0, 2]],
    "original_inference_steps": [25], "timestep_scaling": [2.0], "shift_terminal": [0.1],
    "eta": [0.0, 0.7, 1.0],
}
# Options with no bearing on the numbers, or that change the network: see the reasons.
OUTSIDE = {
    "variance_type": "learned variances are further channels of the network",
    "solver_p": "another scheduler", "tau_func": "a program", "noise_sampler_seed": "noise is ours",
    "base_shift": "the pipeline's, for mu", "max_shift": "the pipeline's, for mu",
    "base_image_seq_len": "the pipeline's, for mu", "max_image_seq_len": "the pipeline's, for mu",
    "use_dynamic_shifting": "below, with mu", "time_shift_type": "below, with mu",
    "kwargs": "deprecated names", "algorithm_type": "below, with orders",
    "thresholding": "below, with its limits",
}
THRESHOLDS = [dict(thresholding=True, sample_max_value=1.4, dynamic_thresholding_ratio=0.8)]
CURVES = [dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True),
          dict(use_beta_sigmas=True)]


def product(**options):
  return [dict(zip(options, values)) for values in itertools.product(*options.values())]


DPM = [choice | ending for choice in product(
    algorithm_type=["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
    solver_order=[1, 2, 3], solver_type=["midpoint", "heun"]) for ending in (
        dict(final_sigmas_type="zero"), dict(final_sigmas_type="sigma_min"))]
FLOW = [dict(use_flow_sigmas=True, prediction_type="flow_prediction") | more
        for more in (dict(), dict(flow_shift=3.0))]
ZERO_SNR = product(rescale_betas_zero_snr=[True], prediction_type=["v_prediction", "sample"],
                   timestep_spacing=["trailing", "linspace"])
# Combinations beside one option at a time.
COMBINED = {
    "DDPMScheduler": [*ZERO_SNR, dict(timestep_spacing="leading", steps_offset=1,
                                      variance_type="fixed_large"),
                      dict(clip_sample=False), dict(beta_schedule="laplace"),
                      dict(variance_type="fixed_small_log"), *THRESHOLDS],
    "DDIMScheduler": [*ZERO_SNR, dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False),
                      dict(clip_sample=False, eta=1.0), *THRESHOLDS],
    "DDIMInverseScheduler": [dict(clip_sample=False, timestep_spacing="trailing",
                                  prediction_type="v_prediction", rescale_betas_zero_snr=True),
                             dict(clip_sample=False)],
    "PNDMScheduler": product(skip_prk_steps=[True, False], timestep_spacing=[
        "leading", "trailing", "linspace"], prediction_type=["epsilon", "v_prediction"]) + [
            dict(skip_prk_steps=True, steps_offset=1)],
    "LMSDiscreteScheduler": CURVES,
    "EulerDiscreteScheduler": [*ZERO_SNR, *CURVES] + [
        curve | dict(final_sigmas_type="sigma_min", sigma_min=0.05) for curve in CURVES] + [
            dict(timestep_type="continuous", prediction_type="v_prediction")],
    "EulerAncestralDiscreteScheduler": ZERO_SNR[:2],
    "HeunDiscreteScheduler": [*CURVES, dict(clip_sample=True, beta_schedule="exp")],
    "KDPM2DiscreteScheduler": CURVES,
    "KDPM2AncestralDiscreteScheduler": CURVES,
    "DPMSolverSDEScheduler": CURVES,
    "DPMSolverMultistepScheduler": [
        *DPM, *FLOW, *THRESHOLDS, *CURVES, dict(use_lu_lambdas=True), *ZERO_SNR,
        dict(THRESHOLDS[0], algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        dict(use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"),
        dict(solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"),
        dict(solver_order=3, euler_at_final=True, final_sigmas_type="sigma_min"),
        dict(use_flow_sigmas=True, use_dynamic_shifting=True, mu=0.8,
             prediction_type="flow_prediction")],
    "DPMSolverSinglestepScheduler": [
        *DPM, *FLOW, *THRESHOLDS, *CURVES,
        dict(solver_order=3, lower_order_final=True, final_sigmas_type="sigma_min")],
    "DEISMultistepScheduler": [*FLOW, *THRESHOLDS, *CURVES,
                               dict(solver_order=3, lower_order_final=False)],
    "UniPCMultistepScheduler": [
        *product(solver_order=[1, 2, 3], solver_type=["bh1", "bh2"], predict_x0=[True, False],
                 final_sigmas_type=["zero", "sigma_min"]),
        *FLOW, *THRESHOLDS, *CURVES, *ZERO_SNR,
        dict(use_flow_sigmas=True, use_karras_sigmas=True, prediction_type="flow_prediction"),
        dict(use_flow_sigmas=True, shift_terminal=0.1, prediction_type="flow_prediction"),
        dict(solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"),
        *product(use_flow_sigmas=[True], use_dynamic_shifting=[True], mu=[0.8],
                 prediction_type=["flow_prediction"], time_shift_type=["exponential", "linear"])],
    "SASolverScheduler": [
        *product(predictor_order=[1, 2, 3, 4], corrector_order=[1, 2, 3, 4],
                 algorithm_type=["data_prediction", "noise_prediction"]),
        *FLOW, *THRESHOLDS, *CURVES, dict(predictor_order=3, lower_order_final=False)],
    "LCMScheduler": [*THRESHOLDS, dict(clip_sample=True, prediction_type="v_prediction"),
                     dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")],
    "TCDScheduler": [dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", eta=0.0)],
    "EDMEulerScheduler": product(sigma_schedule=["karras", "exponential"],
                                 final_sigmas_type=["zero", "sigma_min"]),
    "EDMDPMSolverMultistepScheduler": [
        choice | THRESHOLDS[0] if choice["solver_type"] == "heun" else choice
        for choice in DPM if choice["algorithm_type"].endswith("++")],
    "FlowMatchEulerDiscreteScheduler": [
        *CURVES, dict(shift=3.0, use_karras_sigmas=True),
        *product(use_dynamic_shifting=[True], mu=[0.8], time_shift_type=["exponential", "linear"]),
        dict(stochastic_sampling=True, shift=3.0)],
}


def scheduler_class(name):
  # DPMSolverSDE needs torchsde only for its noise, which is injected.
  sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
  import diffusers
  if name == "DPMSolverSDEScheduler":
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return module.DPMSolverSDEScheduler
  return getattr(diffusers, name)


def signature(name):
  return {key: parameter for key, parameter in inspect.signature(
      scheduler_class(name).__init__).parameters.items() if key != "self"}


def cases(name):
  """All options of the constructor, one at a time, and the combinations above."""
  found = [{}]
  for key, parameter in signature(name).items():
    if key in OUTSIDE:
      continue
    if isinstance(parameter.default, bool) or key.startswith("use_"):
      values = [not parameter.default]
    elif typing.get_origin(parameter.annotation) is typing.Literal:
      values = typing.get_args(parameter.annotation)
    elif (name, key) == ("IPNDMScheduler", "trained_betas"):
      values = [[0.99, 0.9, 0.7, 0.5, 0.2, 0.0]]
    else:
      values = VALUES[key]
    found += [{key: value} for value in values]
  if "eta" in scheduler_configs.CLASSES[name][0]:
    found += [dict(eta=eta) for eta in VALUES["eta"]]
  found += COMBINED.get(name, [])
  return [case for n, case in enumerate(found) if case not in found[:n]]


def network(kind, x, t, xp=np):
  """The perfect output for data from a mixture of two Gaussians; smooth in x and t."""
  if kind == "edm":
    sigma = xp.exp(4 * t)
    a, s = 1 / xp.sqrt(1 + sigma**2), sigma / xp.sqrt(1 + sigma**2)
  elif kind == "flow_prediction":
    s = xp.clip(t / 1000, 1e-3, 1.0)
    a = 1 - s
  elif kind == "angle":
    a, s = xp.cos(t * xp.pi / 2), xp.clip(xp.sin(t * xp.pi / 2), 1e-4, 1.0)
  else:
    sigma = xp.exp(xp.interp(t, np.arange(1000.0), LOG_SIGMAS))
    a, s = 1 / xp.sqrt(1 + sigma**2), sigma / xp.sqrt(1 + sigma**2)
  spread, means = 0.6, (-0.7, 0.6)
  variance = a**2 * spread**2 + s**2
  logits = [-(x - a * mean) ** 2 / (2 * variance) for mean in means]
  first = 1 / (1 + xp.exp(logits[1] - logits[0]))
  parts = [mean + a * spread**2 / variance * (x - a * mean) for mean in means]
  x0 = first * parts[0] + (1 - first) * parts[1]
  noise = (x - a * x0) / s
  return {"sample": x0, "epsilon": noise, "flow_prediction": noise - x0}.get(
      kind, a * noise - s * x0)


def kind_of(name, options):
  if name.startswith("EDM"):
    return "edm"
  if name == "IPNDMScheduler":
    return "angle"
  if name.startswith("Flow"):
    return "flow_prediction"
  return options.get("prediction_type", "epsilon")


class Brownian:
  """Stands in for torchsde's tree: increments over half steps are the injected noise."""

  def __init__(self, x, low, high, seed):
    self.parts = {}

  def __call__(self, sigma, sigma_next):
    row = Brownian.row
    z = torch.tensor(Z[row]).movedim(-1, 1)
    if not row % 2:
      self.parts = {"end": float(sigma_next), "w": z * abs(float(sigma - sigma_next)) ** 0.5}
      return z
    rest = z * abs(self.parts["end"] - float(sigma_next)) ** 0.5
    return (self.parts["w"] + rest) / abs(float(sigma - sigma_next)) ** 0.5


@contextlib.contextmanager
def precision(dtype):
  """Lets diffusers compute in float64 although it says float32 everywhere."""
  if dtype == np.float32:
    yield
    return
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "float32", torch.float64)
    patch.setattr(np, "float32", np.float64)
    torch.set_default_dtype(torch.float64)
    try:
      yield
    finally:
      torch.set_default_dtype(torch.float)


def reference(name, options, steps, x, dtype, start=0):
  """Runs diffusers from step `start`: (what the network saw [n …], timesteps [n], the end)."""
  cls, options = scheduler_class(name), dict(options)
  module = sys.modules[cls.__module__]
  asked = {key: options.pop(key) for key in ("mu", "eta") if key in options}
  seen, times, kind = [], [], kind_of(name, options)

  def randn(shape, dtype=None, **_):
    return torch.tensor(Z[len(seen) - 1]).movedim(-1, 1).to(dtype)

  with precision(dtype), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for stand_in, target in (("randn_tensor", randn), ("BrownianTreeNoiseSampler", Brownian)):
      if hasattr(module, stand_in):
        patch.setattr(module, stand_in, target)
    # Some constructors set a thousand steps, slowly and for nothing: here they set these.
    set_timesteps, mu = cls.set_timesteps, {key: asked[key] for key in asked if key == "mu"}
    patch.setattr(cls, "set_timesteps", lambda self, *_, **__: set_timesteps(self, steps, **mu))
    scheduler = cls(**options)
    scheduler.set_timesteps()
    begin = start * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
      scheduler.set_begin_index(begin)
    x = torch.tensor(x.astype(dtype)).movedim(-1, 1)
    if start == 0:
      x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps[begin:]:
      told = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
      seen.append(told.movedim(1, -1).numpy().astype(np.float64))
      times.append(float(t))
      Brownian.row = len(seen) - 1
      f = exact_network(kind, told.numpy(), t)
      x = scheduler.step(torch.tensor(f), t, x, return_dict=False,
                         **{key: asked[key] for key in asked if key == "eta"})[0]
    return np.stack(seen), np.array(times), x.movedim(1, -1).numpy().astype(np.float64)


def plain(table, kind, start):
  """Runs a table in float64 numpy: (what the network saw, timesteps, the final latent)."""
  state = np.zeros((5, *SHAPE))
  state[0] = start * table.initial_scale
  seen = []
  for n, mix in enumerate(table.mix):
    seen.append(state[0])
    f = network(kind, state[0], table.t[n])
    d = table.c_skip[n] * state[0] + table.c_out[n] * f
    limit, scale = table.clip[n], 1.0
    if table.quantile[n]:
      limit = scale = np.minimum(np.maximum(np.quantile(
          np.abs(d), table.quantile[n], axis=(1, 2, 3), keepdims=True), 1), limit)
    state = np.tensordot(mix, np.stack([*state, f, np.clip(d, -limit, limit) / scale,
                                        Z[table.noise_index[n]]]), 1)
  return np.stack(seen), table.t, state[0]


@jax.jit
def sample(table, kind, x):
  def asked(x, t):
    # In float64, as over there: the network's own rounding is not what is compared.
    with jax.enable_x64(True):
      wide, t = x.astype(jnp.float64), t[0].astype(jnp.float64)
      f = jax.lax.switch(kind, [functools.partial(network, name, wide, t, jnp) for name in KINDS])
      return f.astype(x.dtype)
  noise = jnp.asarray(Z, jnp.float32)
  return sampling.sample(table, asked, x * table.initial_scale.astype(x.dtype),
                         lambda index: noise[index])


def exact_network(kind, x, t):
  return network(kind, np.asarray(x, np.float64), float(t)).astype(x.dtype)


KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm", "angle")
START = np.random.default_rng(0).standard_normal(SHAPE)


def table_of(name, options, steps):
  return solvers.from_config({"_class_name": name} | options, steps)


def reference_fails(name, options, steps):
  """Tells whether diffusers raises or gives NaN; a table must be finite all the same."""
  o = scheduler_configs.CLASSES[name][0] | options
  algorithm, order = o.get("algorithm_type"), o.get("solver_order")
  to_zero = o.get("final_sigmas_type") == "zero"
  match name:
    # Not implemented.
    case ("EulerAncestralDiscreteScheduler" | "KDPM2DiscreteScheduler" | "DPMSolverSDEScheduler"
          | "KDPM2AncestralDiscreteScheduler"):
      return o["prediction_type"] == "sample"
    case "DPMSolverMultistepScheduler":  # sigma 0 refused; at third order a branch is missing
      return algorithm in ("dpmsolver", "sde-dpmsolver") and to_zero or (
          algorithm == "sde-dpmsolver" and order == 3 and steps > 4)
    case "DPMSolverSinglestepScheduler":
      return algorithm == "sde-dpmsolver" or algorithm == "dpmsolver" and to_zero
    case "EDMDPMSolverMultistepScheduler":  # the same branch
      return algorithm == "sde-dpmsolver++" and order == 3 and steps > 4
    # 0 / 0 or infinity times zero.
    case "UniPCMultistepScheduler":
      return to_zero and not (
          o["predict_x0"] and o["solver_type"] == "bh2" and o["lower_order_final"]) or (
          bool(o["shift_terminal"]) and not o["use_flow_sigmas"])
    case "DDIMInverseScheduler":
      return o["prediction_type"] == "sample" and o["set_alpha_to_one"]
    case "LCMScheduler" | "TCDScheduler":
      return o["rescale_betas_zero_snr"] and o["prediction_type"] == "epsilon"
  return False


def is_refused(name, options):
  """Tells whether ours refuses what has no meaning: noise levels of another kind of network."""
  return options.get("prediction_type") == "flow_prediction" and (
      not options.get("use_flow_sigmas")) or (
          name == "EDMDPMSolverMultistepScheduler" and options.get("prediction_type") == "sample")


def relative(ours, theirs):
  return np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())


class Errors(typing.NamedTuple):
  """Of one case, relative to max(1, |x|)."""
  exact: float        # both in float64, all latents, timesteps and the end
  ours: float         # our float32 scan against our float64
  both: float         # our float32 scan against their float32; nan where theirs is nan
  theirs: float       # their float32 against their float64


def compared(name, options, steps):
  """Returns Errors, or None where the reference fails as expected."""
  table, kind = table_of(name, options, steps), kind_of(name, options)
  ours = plain(table, kind, START)
  assert np.isfinite(ours[2]).all()
  scanned = np.asarray(sample(
      table.padded(ROWS), np.int32(KINDS.index(kind)),
      jnp.asarray(START, jnp.float32)), np.float64)
  assert np.isfinite(scanned).all()
  try:
    theirs, coarse = (reference(name, options, steps, START, dtype)
                      for dtype in (np.float64, np.float32))
    failed = not np.isfinite(theirs[2]).all()
  except (ValueError, NotImplementedError, UnboundLocalError):
    failed = True
  assert failed == reference_fails(name, options, steps)
  if failed:
    return None
  # Whether they truncate 998.9999998 or 999 is a matter of float32, which we follow.
  exact = 0.0
  if not np.abs(theirs[1] - coarse[1]).max() >= 0.5:
    exact = max(relative(mine, other) for mine, other in zip(ours, theirs, strict=True))
  return Errors(exact, relative(scanned, ours[2]), relative(scanned, coarse[2]),
                relative(coarse[2], theirs[2]))


@pytest.mark.parametrize("name", scheduler_configs.CLASSES)
def test_every_class_and_option(name):
  wrong, rounding, worst = [], [], np.zeros(4)
  for options, steps in itertools.product(cases(name), STEPS):
    if is_refused(name, options):
      with pytest.raises(UserError):
        table_of(name, options, steps)
      continue
    try:
      errors = compared(name, options, steps)
    except AssertionError as error:
      wrong.append((options, steps, error))
      continue
    if errors is None:
      continue
    worst = np.fmax(worst, errors)
    label = (options, steps, *(f"{error:.1e}" for error in errors))
    # The cosine schedule begins at sigma = 20000, whose square some of their formulas cancel.
    cosine = options.get("beta_schedule") == "squaredcos_cap_v2"
    if errors.exact > (1e-8 if cosine else 1e-9):
      wrong.append(label)
    elif not errors.both <= 1e-4:
      # Then float64 agrees, and what remains is what float32 costs the other side as well.
      (rounding if not errors.both > 3 * errors.theirs else wrong).append(label)
  print(name, *(f"{what} {error:.1e}" for what, error in zip(Errors._fields, worst)))
  for what, lines in (("ROUNDING", rounding), ("WRONG", wrong)):
    for line in lines:
      print(what, name, *line)
  assert not wrong


LATE = {
    "DDIMScheduler": {}, "DDPMScheduler": {}, "PNDMScheduler": dict(skip_prk_steps=True),
    "EulerDiscreteScheduler": {}, "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {}, "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {}, "DPMSolverSDEScheduler": {},
    "DPMSolverMultistepScheduler": dict(solver_order=3), "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": dict(solver_order=3, disable_corrector=[6]),
    "DEISMultistepScheduler": dict(solver_order=3), "SASolverScheduler": dict(predictor_order=3),
    "EDMDPMSolverMultistepScheduler": {}, "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", LATE)
def test_a_path_begun_late_is_that_of_image_to_image(name):
  # Both start from the same level: they add sigma·noise, we a·x0 + s·noise, and scale.
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    exploding = getattr(scheduler_class(name)(), "init_noise_sigma", 1.0) != 1.0
  for steps, begin in ((10, 3), (20, 5)):
    table = solvers.from_config({"_class_name": name} | LATE[name], steps, start=begin)
    table.initial_scale[...] = 1.0
    scale = 1 / table.a[0] if exploding else 1.0
    theirs = reference(name, LATE[name], steps, START * scale, np.float64, start=begin)
    for ours, other in zip(plain(table, kind_of(name, LATE[name]), START), theirs, strict=True):
      assert relative(ours, other) < 1e-9


def test_one_program_serves_all_classes_options_and_numbers_of_steps():
  for name, (_, steps) in zip(scheduler_configs.CLASSES, itertools.cycle(
      itertools.pairwise(range(4, 20)))):
    sample(table_of(name, {}, steps).padded(ROWS), np.int32(0),
           jnp.asarray(START, jnp.float32))
  assert sample._cache_size() == 1


@pytest.mark.parametrize("name", scheduler_configs.CLASSES)
def test_no_option_of_a_constructor_is_forgotten(name):
  ours, theirs = scheduler_configs.CLASSES[name][0], signature(name)
  from_the_caller = {"eta", "mu"}
  assert theirs.keys() - ours.keys() <= OUTSIDE.keys()
  assert ours.keys() - theirs.keys() <= from_the_caller
  for key in ours.keys() & theirs.keys():
    assert ours[key] == theirs[key].default, key
