import dataclasses

import jax
import numpy as np
import pytest

from sdjax import pytrees, stable_diffusion
from sdjax.errors import UserError


def test_normalizing_latents_is_exact_and_changes_no_picture(tiny_model):
  sd, params = tiny_model
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
  mean, deviation = rng.normal(size=4), rng.uniform(0.5, 2, size=4)
  other, folded = stable_diffusion.normalize_latents(sd, params, mean, deviation)
  plain = sd.encode_image(params, image, None) / sd.vae.scaling_factor
  normal = other.encode_image(folded, image, None)
  np.testing.assert_allclose(normal, (plain - mean) / deviation, atol=2e-5)

  key = jax.random.key(0)
  drawn = sd.encode_image(params, image, key) / sd.vae.scaling_factor
  np.testing.assert_allclose(
      other.encode_image(folded, image, key), (drawn - mean) / deviation, atol=5e-5)
  np.testing.assert_allclose(
      other.decode_latents(folded, normal),
      sd.decode_latents(params, plain * sd.vae.scaling_factor), atol=2e-5)


def test_posterior_draws_have_the_mean_and_variance_of_the_moments(tiny_model):
  sd, _ = tiny_model
  moments = np.zeros((1, 64, 64, 8), np.float32)
  moments[..., :4], moments[..., 4:] = 3.0, np.log(0.25)
  drawn = sd.latents(moments, jax.random.key(0)) / sd.vae.scaling_factor
  assert abs(drawn.mean() - 3) < 0.02 and abs(drawn.std() - 0.5) < 0.02
  np.testing.assert_allclose(sd.latents(moments, None), 3 * sd.vae.scaling_factor, rtol=1e-6)


def test_initial_parameters_depend_on_seed_and_path_alone(tiny_model):
  sd, _ = tiny_model
  first, second = pytrees.flatten(sd.init(0)), pytrees.flatten(sd.init(1))
  again = pytrees.flatten(sd.init(0))
  assert all(np.array_equal(first[path], again[path]) for path in first)
  kernels = [path for path in first if path.endswith("kernel") and first[path].any()]
  assert all(not np.array_equal(first[path], second[path]) for path in kernels)
  kernel = first["vae/decoder/mid_block/resnets_0/conv1/kernel"]
  assert abs(kernel.std() * np.sqrt(np.prod(kernel.shape[:-1])) - 1) < 0.1
  # The UNet begins as the zero function, so that the first loss is the target's variance.
  assert not first["unet/conv_out/kernel"].any()


def test_sizes_that_cannot_be_halved_name_the_nearest(tiny_model):
  sd, _ = tiny_model
  assert sd.latent_shape(32, 48) == (8, 12, 4)
  with pytest.raises(UserError, match="width is 35 px.*multiples of 8.*nearest is 32"):
    sd.latent_shape(32, 35)


def test_a_model_is_hashable_and_equal_to_its_copy(tiny_model):
  sd, _ = tiny_model
  assert hash(sd.astype("float32")) == hash(sd) and sd.astype("float32") == sd
  assert sd.astype("bfloat16") != sd


def test_long_prompts_are_read_piece_by_piece(tiny_model):
  sd, params = tiny_model
  long = "a small red circle above a large blue square on a white background, " * 3
  tokens, weights = sd.tokenize_long(["a circle", long], weighted=False)
  length = sd.text_encoders[0].max_length
  pieces = tokens.shape[-1] // length
  assert pieces > 1 and (weights == 1).all()
  whole = sd.encode_text(params, tokens).context
  for i in range(pieces):
    rows = slice(i * length, (i + 1) * length)
    alone = sd.encode_text(params, tokens[..., rows]).context
    np.testing.assert_allclose(whole[:, rows], alone, atol=1e-5)
  # A short one among them is followed by empty prompts.
  np.testing.assert_array_equal(tokens[0, 0, length:2 * length], sd.tokenize([""])[0, 0])


def test_weights_multiply_states_and_keep_the_mean_of_each_piece(tiny_model):
  sd, params = tiny_model
  text = "a (red:1.5) circle, " + "and [white] squares, " * 8
  tokens, weights = sd.tokenize_long([text, "a circle"], weighted=True)
  plain = np.asarray(sd.encode_text(params, tokens).context, np.float64)
  found = sd.encode_text(params, tokens, weights=weights).context
  length = sd.text_encoders[0].max_length
  for i in range(0, plain.shape[1], length):
    piece = plain[:, i:i + length]
    weighted = piece * weights[:, 0, i:i + length, None]
    ratio = piece.mean(axis=(1, 2)) / weighted.mean(axis=(1, 2))
    np.testing.assert_allclose(
        found[:, i:i + length], weighted * ratio[:, None, None], rtol=1e-3, atol=1e-5)
  assert np.abs(found[0] - plain[0]).max() > 0.1
  np.testing.assert_allclose(found[1], plain[1], atol=1e-6)  # all of its weights are 1


def test_skipped_layers_are_not_read(tiny_model):
  sd, params = tiny_model
  deeper = dataclasses.replace(sd, text_encoders=(sd.text_encoders[0].clone(layers=2),))
  encoder = dict(params["text_encoder"])
  encoder["encoder"] = {name: encoder["encoder"]["layers_0"] for name in ("layers_0", "layers_1")}
  tokens = sd.tokenize(["a red circle"])
  skipped = deeper.encode_text(params | {"text_encoder": encoder}, tokens, skip=1)
  np.testing.assert_allclose(skipped.context, sd.encode_text(params, tokens).context, atol=1e-6)


def test_large_pictures_may_go_tile_by_tile(tiny_model):
  sd, params = tiny_model
  latents = np.random.default_rng(0).standard_normal((1, 8, 12, 4), np.float32)
  whole = sd.decode_latents(params, latents)
  np.testing.assert_array_equal(sd.decode_latents(params, latents, tile=12), whole)
  tiled = sd.decode_latents(params, latents, tile=8)
  assert tiled.shape == whole.shape and 0 < np.abs(tiled - whole).mean() < 0.5 * whole.std()
  image = np.asarray(whole)
  moments = sd.moments(params, image)
  np.testing.assert_array_equal(sd.moments(params, image, tile=12), moments)
  tiled = sd.moments(params, image, tile=8)
  assert tiled.shape == moments.shape and 0 < np.abs(tiled - moments).mean() < 0.5 * moments.std()
  with pytest.raises(UserError, match="overlap is 0 and tile 3"):
    sd.decode_latents(params, latents, tile=3)
