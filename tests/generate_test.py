"""Pictures depend on what was asked, and on nothing else."""

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax import monitoring

from sdjax import generate
from sdjax.diffusion import solvers

PROMPTS = ["a small red circle above a large blue square on a white background",
           "a large green ring left of a small black triangle on a white background",
           "a small cyan square below a small orange circle on a white background"]


def make(model, rows, **changes):
  sd, params = model
  asked = dict(steps=3, guidance_scale=2.0, height=32, width=32, sampler="ddim")
  return generate.text_to_image(
      sd, params, [PROMPTS[row % len(PROMPTS)] for row in rows],
      seeds=[10 + row for row in rows], **asked | changes)


def test_an_image_does_not_depend_on_its_batch(tiny_model):
  """With a sampler that adds noise at each step. Matrix units may sum in another order."""
  rows, ask = np.arange(16), dict(sampler="euler_ancestral")
  together, latents = make(tiny_model, rows, **ask)
  assert together.shape == (16, 32, 32, 3) and latents.shape == (16, 8, 8, 4)
  assert np.abs(together).max() <= 1 and np.abs(together[0] - together[3]).max() > 1e-2
  turned, _ = make(tiny_model, rows[::-1], **ask)
  some = rows[::5]
  alone, _ = make(tiny_model, some, batch_size=1, **ask)
  for name, one, other in (("in another order", turned[::-1], together),
                           ("alone", alone, together[some])):
    error = np.square(one - other).mean(axis=(1, 2, 3)).max()
    psnr_db = 10 * math.log10(2**2 / max(error, 1e-20))
    print(f"{name}, images agree with those of a batch of 16 to {psnr_db:.0f} dB at least")
    assert psnr_db >= 90


def test_whatever_is_asked_one_program_makes_it(tiny_model):
  sd, params = tiny_model
  ask = dict(steps=4, guidance_scale=2.0, seeds=[1], height=32, width=32, guidance_rescale=0.7)
  make_one = lambda sd=sd, prompt="a red circle", **changes: generate.text_to_image(
      sd, params, [prompt], **ask | changes)
  make_one()
  compiled = []

  def tell(event, seconds, **facts):
    if event.endswith("/backend_compile_duration"):
      compiled.append(facts["fun_name"])

  monitoring.register_event_duration_secs_listener(tell)
  try:
    for sampler, steps in zip(solvers.SAMPLERS, itertools.cycle((4, 5, 9))):
      make_one(sampler=sampler, steps=steps)
    for spacing in ("leading", "linspace", "trailing"):
      make_one(dataclasses.replace(
          sd, scheduler_config=sd.scheduler_config | {"timestep_spacing": spacing}))
    make_one(prompt="a blue square", negative_prompts=["a green ring"], seeds=[2**64 - 1],
             guidance_scale=7.5, guidance_rescale=0.1,
             init_latents=np.zeros((1, 8, 8, 4)))
    assert not compiled
    jax.jit(lambda x: x)(0)
    assert compiled == ["jit(<lambda>)"]  # the count counts
  finally:
    monitoring.unregister_event_duration_listener(tell)


def test_the_negative_prompt_counts(tiny_model):
  """Away from the prompt itself the two halves cancel, whatever the scale."""
  guided, _ = make(tiny_model, [0])
  same, _ = make(tiny_model, [0], negative_prompts=[PROMPTS[0]])
  again, _ = make(tiny_model, [0], negative_prompts=[PROMPTS[0]], guidance_scale=5.0)
  np.testing.assert_allclose(same, again, atol=1e-4)
  assert np.abs(same - guided).max() > 1e-4


def test_given_latents_replace_the_seed(tiny_model):
  noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
  one, latents = make(tiny_model, [0], init_latents=noise)
  other, _ = make(tiny_model, [0], init_latents=noise + 0.1)
  assert np.abs(one - other).max() > 1e-3
  np.testing.assert_allclose(
      one, np.clip(jax.jit(tiny_model[0].decode_latents)(tiny_model[1], latents), -1, 1), atol=1e-4)


def test_batches_are_equal_and_cover_every_row():
  assert [list(rows) for rows in generate.batches(5, 2)] == [[0, 1], [2, 3], [4, 4]]
  assert [list(rows) for rows in generate.batches(3, 8)] == [[0, 1, 2]]


def test_weights_count_only_where_they_are_asked_for(tiny_model):
  sd, params = tiny_model
  ask = dict(steps=2, guidance_scale=2.0, height=32, width=32, sampler="ddim", seeds=[1])
  plain, _ = generate.text_to_image(sd, params, ["a red circle"], weighted=True, **ask)
  same, _ = generate.text_to_image(sd, params, ["a (red:1.0) circle"], weighted=True, **ask)
  strong, _ = generate.text_to_image(sd, params, ["a (red:1.8) circle"], weighted=True, **ask)
  literal, _ = generate.text_to_image(sd, params, ["a (red:1.0) circle"], **ask)
  np.testing.assert_allclose(same, plain, atol=1e-5)
  assert np.abs(strong - plain).max() > 1e-3 and np.abs(literal - plain).max() > 1e-3
