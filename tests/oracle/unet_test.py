"""UNets and ControlNets of every family against diffusers (PyTorch, CPU, float32)."""

import functools
import json

import jax
import numpy as np
import pytest

from sdjax.checkpoints import unet_configs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
compare = pytest.importorskip("compare")

pytestmark = pytest.mark.oracle

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
ATTENDS = ("AttnDownBlock2D", "AttnUpBlock2D")


def levels(*blocks):
  return dict(down_block_types=tuple(down for down, _ in blocks),
              up_block_types=tuple(up for _, up in reversed(blocks)))


SMALL = dict(norm_num_groups=8, layers_per_block=1, sample_size=8)
TEXT = SMALL | dict(block_out_channels=(16, 32), cross_attention_dim=24, attention_head_dim=4)
SHALLOW = TEXT | levels(CROSS) | dict(block_out_channels=(16,))  # of one level: compiled sooner
SDXL = SMALL | levels(PLAIN, CROSS, CROSS) | dict(
    block_out_channels=(16, 32, 32), cross_attention_dim=24, use_linear_projection=True,
    attention_head_dim=(2, 4, 4), transformer_layers_per_block=(1, 1, 2),
    addition_embed_type="text_time", addition_time_embed_dim=8)
PIXELS = SMALL | dict(block_out_channels=(16, 32, 32))

UNETS = {
    # SD1: heads alike at all levels, doors are convolutions.
    "sd1": TEXT | levels(CROSS, PLAIN) | dict(layers_per_block=2),
    "sd2": TEXT | levels(CROSS, PLAIN) | dict(
        use_linear_projection=True, attention_head_dim=(2, 4)),
    "sdxl": SDXL | dict(projection_class_embeddings_input_dim=12 + 6 * 8),
    "refiner": SDXL | levels(PLAIN, CROSS, PLAIN) | dict(
        projection_class_embeddings_input_dim=20 + 5 * 8),
    "inpaint": SHALLOW | dict(in_channels=9),
    "pix2pix": SHALLOW | dict(in_channels=8),
    "depth": SHALLOW | dict(in_channels=5, use_linear_projection=True),
    "upscaler": TEXT | levels(PLAIN, CROSS) | dict(
        in_channels=7, use_linear_projection=True, num_class_embeds=10,
        only_cross_attention=(True, False)),
    "upscaler, all levels": TEXT | levels(CROSS, CROSS) | dict(only_cross_attention=True),
    "lcm": TEXT | levels(CROSS, PLAIN) | dict(time_cond_proj_dim=8),
    "pixels": PIXELS | levels(PLAIN, ATTENDS, PLAIN) | dict(attention_head_dim=8),
    "pixels of classes": PIXELS | levels(PLAIN, ATTENDS, PLAIN) | dict(
        num_class_embeds=7, attention_head_dim=None),
    # CIFAR-10: sines first, epsilon 1e-6, padded after only.
    "ddpm": PIXELS | levels(PLAIN, ATTENDS, PLAIN) | dict(
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        attention_head_dim=None),
}
CONTROLNETS = {
    "sd1": {},
    "sd2": dict(use_linear_projection=True, attention_head_dim=(2, 4)),
    "sdxl": {key: value for key, value in SDXL.items()
             if key not in ("up_block_types", "sample_size")} | dict(
                 projection_class_embeddings_input_dim=12 + 6 * 8),
    "shuffle": dict(global_pool_conditions=True),
}


def config_of(module):
  return json.loads(module.to_json_string())


@functools.cache
def unet(name):
  """(PyTorch's network, ours, its parameters)."""
  torch.manual_seed(0)
  torch.set_num_threads(1)
  make = diffusers.UNet2DModel if name.startswith(("pixels", "ddpm")) else (
      diffusers.UNet2DConditionModel)
  theirs = compare.perturb(make(**UNETS[name]), 0)
  ours = unet_configs.read(config_of(theirs))
  shapes = jax.eval_shape(ours.init, jax.random.key(0), *ours.example())["params"]
  return theirs, ours, compare.load_params(theirs, shapes)


def draw(ours, side, seed=0):
  """x [2 *side c], t and a condition of standard normal numbers, sizes in px, labels."""
  rng = np.random.default_rng(seed)
  x, t, condition, *_ = ours.example(2, side, length=7)
  normal = lambda like: None if like is None else rng.standard_normal(like.shape, np.float32)
  condition = condition._replace(
      context=normal(condition.context), pooled=normal(condition.pooled),
      label=None if condition.label is None else np.array([3, 0], np.int32),
      guidance=None if condition.guidance is None else np.array([7.5, 1.3], np.float32))
  if ours.added_dim is not None:
    count = {12 + 6 * 8: 6, 20 + 5 * 8: 5}[ours.added_dim]
    sizes = np.array([[1024, 768, 0, 13, 1000, 512], [64, 64, 5, 0, 6.5, 1]], np.float32)
    condition = condition._replace(
        pooled=rng.standard_normal((2, ours.added_dim - 8 * count), np.float32),
        size=sizes[:, :count])
  return normal(x), np.array([981.0, 3.5], np.float32), condition


def guidance_embedding(guidance, width):
  """As LatentConsistencyModelPipeline makes it."""
  pipeline = diffusers.LatentConsistencyModelPipeline
  return pipeline.get_guidance_scale_embedding(None, torch.tensor(guidance) - 1, width)


def call(theirs, x, t, condition, **more):
  """PyTorch's network on our inputs; [b h w c]."""
  tensor = lambda a: None if a is None else torch.tensor(a)
  if isinstance(theirs, diffusers.UNet2DModel):
    return theirs(compare.nchw(x), tensor(t), class_labels=tensor(condition.label)).sample
  if condition.guidance is not None:
    more["timestep_cond"] = guidance_embedding(
        condition.guidance, theirs.config.time_cond_proj_dim)
  if condition.pooled is not None:
    more["added_cond_kwargs"] = {
        "text_embeds": tensor(condition.pooled), "time_ids": tensor(condition.size)}
  return theirs(compare.nchw(x), tensor(t), tensor(condition.context),
                class_labels=tensor(condition.label), **more)


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
  theirs, ours, params = unet(name)
  # PyTorch's UNet2DModel cannot return to an odd size.
  side = (8, 12) if isinstance(theirs, diffusers.UNet2DModel) else (9, 13)
  x, t, condition = draw(ours, side)
  expected = call(theirs, x, t, condition)
  expected = expected if isinstance(expected, torch.Tensor) else expected.sample
  expected.square().sum().backward()
  apply = lambda params: ours.apply({"params": params}, x, t, condition)

  def loss(params):
    y = apply(params)
    return (y ** 2).sum(), y

  grads, y = jax.jit(jax.grad(loss, has_aux=True))(params)
  compare.assert_close(name, y, compare.nhwc(expected), 5e-6)
  compare.assert_gradient_norms(theirs, grads)


@pytest.mark.parametrize("name", ["inpaint", "sdxl", "ddpm"])
def test_five_steps_of_adamw(name):
  theirs, ours, params = unet(name)
  x, t, condition = draw(ours, (8, 8))

  def their_loss(module):
    y = call(module, x, t, condition)
    return (y if isinstance(y, torch.Tensor) else y.sample).square().mean()

  compare.assert_five_adamw_steps(
      theirs, their_loss, lambda params: (
          ours.apply({"params": params}, x, t, condition) ** 2).mean(), params)


@pytest.mark.parametrize("name", UNETS)
def test_config_is_written_as_it_was(name):
  theirs, ours, _ = unet(name)
  config = config_of(theirs)
  written = json.loads(json.dumps(unet_configs.write(ours)))
  assert unet_configs.read(written) == ours
  ignored = {"_diffusers_version", "_use_default_values", "_name_or_path"}
  different = {key: (config.get(key), value) for key, value in written.items()
               if config.get(key) != value and key not in ignored}
  assert not different
  again = type(theirs)(**{key: value for key, value in written.items() if key[0] != "_"})
  assert again.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_unet_with_residuals_and_features(name):
  """What ControlNets and T2I-Adapters hand over."""
  theirs, ours, params = unet(name)
  x, t, condition = draw(ours, (9, 13))
  rng = np.random.default_rng(1)
  normal = lambda shape: rng.standard_normal(shape, np.float32)
  *skips, middle = skip_shapes(ours, x, t, condition)
  residuals = [normal(shape) for shape in (*skips, middle)]
  # The adapter's features have the size of what they are added to.
  features = ([(2, 9, 13, 16), (2, 5, 7, 32)] if name == "sd1" else
              [(2, 5, 7, 16), (2, 5, 7, 32), (2, 3, 4, 32), (2, 3, 4, 32)])
  features = [normal(shape) for shape in features]
  with torch.no_grad():
    expected = call(
        theirs, x, t, condition,
        down_block_additional_residuals=[compare.nchw(r) for r in residuals[:-1]],
        mid_block_additional_residual=compare.nchw(residuals[-1]),
        down_intrablock_additional_residuals=[compare.nchw(f) for f in features]).sample
  y = jax.jit(ours.apply)(
      {"params": params}, x, t, condition, residuals=residuals, features=features)
  compare.assert_close(name, y, compare.nhwc(expected), 5e-6)


def skip_shapes(ours, x, t, condition):
  """Shapes of all skips and of the middle, by a ControlNet of the same fields."""
  fields = {name: getattr(ours, name) for name in unet_configs.ControlNet.__dataclass_fields__
            if hasattr(ours, name) and name not in ("parent", "name")}
  net = unet_configs.ControlNet(**fields, hint_widths=(8, 8, 8, 8))
  hint = np.zeros((2, 8 * x.shape[1], 8 * x.shape[2], 3), np.float32)
  out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, condition, hint)
  return [y.shape for y in out]


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnet(name):
  torch.manual_seed(0)
  base = dict(block_out_channels=(16, 32), cross_attention_dim=24, attention_head_dim=4,
              down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
              layers_per_block=1, conditioning_embedding_out_channels=(4, 8, 8, 12))
  theirs = compare.perturb(diffusers.ControlNetModel(**base | CONTROLNETS[name]), 0)
  ours = unet_configs.read(config_of(theirs))
  assert unet_configs.read(json.loads(json.dumps(unet_configs.write(ours)))) == ours
  x, t, condition = draw(ours, (8, 12))
  hint = np.random.default_rng(2).uniform(size=(2, 64, 96, 3)).astype(np.float32)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), x, t, condition, hint)["params"]
  params = compare.load_params(theirs, shapes)
  expected = call(theirs, x, t, condition, controlnet_cond=compare.nchw(hint))
  expected = [*expected.down_block_res_samples, expected.mid_block_res_sample]
  sum(y.square().sum() for y in expected).backward()

  def loss(params):
    y = ours.apply({"params": params}, x, t, condition, hint)
    return sum((part ** 2).sum() for part in y), y

  grads, y = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert len(y) == len(expected)
  for i, (a, b) in enumerate(zip(y, expected)):
    compare.assert_close(f"{name} {i}", a, compare.nhwc(b), 5e-6)
  compare.assert_gradient_norms(theirs, grads)


