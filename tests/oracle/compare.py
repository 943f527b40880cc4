"""What the oracles share: perturbed PyTorch modules, layouts, comparisons that print figures."""

import copy

import jax
import numpy as np
import optax
import torch

from sdjax import pytrees
from sdjax.checkpoints import names


def perturb(module, seed):
  """Moves every parameter, so that none is zero and none hides an error."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      spread = 0.1 if parameter.ndim == 1 else 0.1 * max(float(parameter.std()), 0.05)
      parameter += spread * torch.randn(parameter.shape, generator=generator)
  return module.eval()


def params_of(module):
  """Returns the parameters of a PyTorch network as the tree of the same network here."""
  flat = {}
  for name, tensor in module.state_dict().items():
    if (name := names.canonical(name)) is not None:
      flat[name] = tensor.detach().numpy().copy()
  return flat


def load_params(module, shapes):
  """Returns {path: array} as a tree for `shapes`, a tree of leaves with shapes, none left over."""
  theirs = params_of(module)
  wanted = {names.to_diffusers(path): path for path in pytrees.flatten(shapes)}
  assert wanted.keys() == theirs.keys(), wanted.keys() ^ theirs.keys()
  return pytrees.unflatten({
      path: names.array_from_torch(path, theirs[name]) for name, path in wanted.items()})


def nchw(x):
  return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
  return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(name, ours, theirs, atol):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
  error = np.abs(ours - theirs).max()
  print(f"{name}: max error {error:.2g} (at most {atol:g}), "
        f"largest value {np.abs(theirs).max():.2g}")
  assert error <= atol


def assert_gradient_norms(module, ours, rtol=1e-4):
  """Compares the norm of the gradient of every parameter by its name."""
  ours = {names.to_diffusers(path): np.linalg.norm(leaf)
          for path, leaf in pytrees.flatten(ours).items()}
  theirs = {names.canonical(name): float(parameter.grad.norm())
            for name, parameter in module.named_parameters()}
  module.zero_grad()
  assert ours.keys() == theirs.keys()
  zero = without_gradient(theirs)
  floor = 1e-5 * max(theirs.values())
  assert all(max(ours[name], theirs[name]) < floor for name in zero)
  errors = {name: abs(ours[name] - norm) / norm for name, norm in theirs.items()
            if name not in zero}
  worst = max(errors, key=errors.get)
  print(f"gradient norms: worst {errors[worst]:.2g} of {worst}")
  assert errors[worst] <= rtol


def without_gradient(keys):
  """Biases of keys shift all logits of a query alike: their gradients are zero but for rounding."""
  return {name for name in keys if name.endswith((".k_proj.bias", ".to_k.bias"))}


def assert_five_adamw_steps(module, their_loss, our_loss, params):
  """Trains both for five steps of AdamW and compares losses and what each parameter moved.

  Args:
    module: PyTorch's network; a copy of it is trained.
    their_loss: module -> scalar tensor.
    our_loss: params -> scalar.
    params: ours, equal to the module's.
  """
  module = copy.deepcopy(module)
  settings = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
  optimizer = torch.optim.AdamW(module.parameters(), **settings)
  tx = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(our_loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  start, state, losses = params, tx.init(params), []
  for _ in range(5):
    optimizer.zero_grad()
    loss = their_loss(module)
    loss.backward()
    optimizer.step()
    params, state, ours = step(params, state)
    losses.append((float(ours), float(loss.detach())))
  np.testing.assert_allclose(*zip(*losses), rtol=1e-4)
  assert losses[-1][1] < losses[0][1]

  after = load_params(module, start)
  moved = jax.tree.map(
      lambda a, ours, theirs: np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - a),
      start, params, after)
  errors = {names.to_diffusers(path): error for path, error in pytrees.flatten(moved).items()}
  errors = {name: errors[name] for name in errors.keys() - without_gradient(errors)}
  worst = max(errors, key=errors.get)
  print(f"five AdamW steps: loss {losses[0][1]:.3g} to {losses[-1][1]:.3g}; "
        f"worst update {errors[worst]:.2g} off, of {worst}")
  # Adam divides by the gradient's size: elements whose gradient is rounding move at random.
  assert errors[worst] <= 5e-3
