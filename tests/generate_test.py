"""Pictures depend on what was asked, and on nothing else."""

import dataclasses
import math

import numpy as np
import pytest

from sdjax import generate
from sdjax.errors import UserError

PROMPTS = ["a small red circle above a large blue square on a white background",
           "a large green ring left of a small black triangle on a white background",
           "a small cyan square below a small orange circle on a white background"]


def make(model, rows, **changes):
  sd, params = model
  asked = dict(steps=3, guidance_scale=2.0, height=32, width=32, sampler="ddim", batch_size=4)
  return generate.text_to_image(
      sd, params, [PROMPTS[row] for row in rows], seeds=[10 + row for row in rows],
      **asked | changes)


def test_an_image_does_not_depend_on_its_batch(tiny_model):
  together, latents = make(tiny_model, [0, 1])
  assert together.shape == (2, 32, 32, 3) and latents.shape == (2, 8, 8, 4)
  assert np.abs(together).max() <= 1 and np.abs(together[0] - together[1]).max() > 1e-2
  turned, _ = make(tiny_model, [1, 0])
  alone, _ = make(tiny_model, [1])
  error = max(np.square(alone[0] - together[1]).mean(), np.square(turned[::-1] - together).mean())
  psnr_db = 10 * math.log10(2**2 / max(error, 1e-20))
  print(f"images across batch sizes agree to {psnr_db:.0f} dB")
  assert psnr_db > 90


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
      one, np.clip(tiny_model[0].decode_latents(tiny_model[1], latents), -1, 1), atol=1e-4)


@pytest.mark.parametrize("changes, message", [
    (dict(height=36), "height is 36 px.*multiples of 8"),
    (dict(sampler="euler_zeta"), "'euler_zeta'.*ddim"),
    (dict(steps=0), "steps is 0"),
    (dict(guidance_scale=-1.0), "guidance_scale is -1"),
    (dict(init_latents=np.zeros((1, 8, 8, 3))), r"\[1, 8, 8, 3\].*\[1, 8, 8, 4\]"),
    (dict(init_latents=np.full((1, 8, 8, 4), np.nan)), "NaN"),
    (dict(negative_prompts=["", ""]), "2 negative_prompts for 1"),
    (dict(guidance_scale=[1.0, 2.0]), "2 guidance scales for 1"),
    (dict(guidance_scale=math.nan), "guidance_scale is nan"),
    (dict(guidance_rescale=1.5), "guidance_rescale is 1.5.*0 and 1"),
    (dict(guidance_interval=(2.0, 1.0)), "guidance_interval is .*falling"),
    (dict(every_rows=0), "every_rows is 0"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(sizes=np.zeros((1, 6))), r"sizes have shape \[1, 6\]; this model is told none"),
])
def test_bad_requests_say_what_is_wrong(tiny_model, changes, message):
  with pytest.raises(UserError, match=message):
    make(tiny_model, [0], **changes)


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


def test_models_that_read_more_than_text_are_told(tiny_model):
  sd, params = tiny_model
  editor = dataclasses.replace(sd, unet=sd.unet.clone(in_channels=9))
  ask = dict(steps=2, guidance_scale=2.0, height=32, width=32, seeds=[1])
  with pytest.raises(UserError, match="reads 9 channels, its latents have 4"):
    generate.text_to_image(editor, params, ["a"], **ask)
  with pytest.raises(UserError, match="clip_skip is 1.*0 to 0"):
    generate.text_to_image(sd, params, ["a"], clip_skip=1, **ask)
