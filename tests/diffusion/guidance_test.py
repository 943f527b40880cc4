import jax.numpy as jnp
import numpy as np

from sdjax.diffusion import guidance


def test_pairs_stay_neighbours():
  pairs = guidance.interleave(jnp.array([[1.0], [2.0]]), jnp.array([[-1.0], [-2.0]]))
  np.testing.assert_array_equal(pairs[:, 0], [1, -1, 2, -2])


def test_scale_extrapolates_from_unconditional_through_conditional_per_image():
  context = guidance.interleave(jnp.array([10.0, 20.0]), jnp.array([1.0, 2.0]))
  network = lambda x, t: x * 0 + (context + t)[:, None, None, None]
  x, t = jnp.zeros((2, 1, 1, 1)), jnp.array([100.0, 200.0])
  guided = guidance.classifier_free(network, jnp.array([1.0, 3.0]))(x, t)
  # Scale 1 is the conditional output; scale 3: 202 + 3·(220 - 202).
  np.testing.assert_allclose(guided[:, 0, 0, 0], [110.0, 256.0])
  everywhere_zero = guidance.classifier_free(network, jnp.float32(0.0))(x, t)
  np.testing.assert_allclose(everywhere_zero[:, 0, 0, 0], [101.0, 202.0])


def test_several_conditions_are_dropped_one_after_another():
  outputs = np.random.default_rng(0).standard_normal((3, 2, 2, 2, 1)).astype(np.float32)
  network = lambda x, t: guidance.interleave(*outputs)
  x, t = jnp.zeros((2, 2, 2, 1)), jnp.zeros(2)
  both, image, none = outputs
  guided = guidance.classifier_free(network, jnp.float32(7.0), jnp.array([1.5, 2.0]))(x, t)
  scale = np.array([1.5, 2.0]).reshape(2, 1, 1, 1)
  np.testing.assert_allclose(
      guided, none + 7 * (both - image) + scale * (image - none), rtol=1e-5, atol=1e-5)
  assert guidance.classifier_free(network) is network
  for given, back in zip(outputs, guidance.separate(guidance.interleave(*outputs), 3)):
    np.testing.assert_array_equal(given, back)


def test_perturbed_attention_guidance_is_its_papers_equation():
  outputs = np.random.default_rng(2).standard_normal((3, 2, 2, 2, 1)).astype(np.float32)
  x, t = jnp.zeros((2, 2, 2, 1)), jnp.zeros(2)
  text, perturbed, none = outputs
  scales = guidance.with_perturbed(np.array([[7.0, 2.0]]), 3.0)
  guided = guidance.classifier_free(lambda x, t: guidance.interleave(*outputs), *scales)(x, t)
  scale = np.array([7.0, 2.0]).reshape(2, 1, 1, 1)
  np.testing.assert_allclose(
      guided, none + scale * (text - none) + 3 * (text - perturbed), rtol=1e-5, atol=1e-5)
  scales = guidance.with_perturbed(np.zeros((0, 2)), 3.0)
  guided = guidance.classifier_free(lambda x, t: guidance.interleave(*outputs[:2]), *scales)(x, t)
  np.testing.assert_allclose(guided, text + 3 * (text - perturbed), rtol=1e-5, atol=1e-5)


def test_rescaling_gives_the_deviation_of_the_conditional_output_back():
  outputs = np.random.default_rng(1).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
  network = lambda x, t: guidance.interleave(*outputs)
  x, t = jnp.zeros((3, 4, 4, 2)), jnp.zeros(3)
  plain, whole, half = (
      np.asarray(guidance.classifier_free(network, jnp.float32(5.0), rescale=rescale)(x, t))
      for rescale in (None, jnp.float32(1.0), jnp.array([0.0, 0.5, 1.0])))
  deviation = lambda f: f.std(axis=(1, 2, 3))
  np.testing.assert_allclose(deviation(whole), deviation(outputs[0]), rtol=1e-5)
  part = np.array([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
  np.testing.assert_allclose(half, part * whole + (1 - part) * plain, rtol=1e-5, atol=1e-6)


def test_outside_of_the_interval_nothing_is_guided():
  scale = np.full((4, 1, 2), [3.0, 5.0])
  inside = guidance.in_interval(scale, np.array([np.inf, 5.0, 2.0, 1.0]), (1.0, 5.0))
  np.testing.assert_array_equal(inside[:, 0], [[1, 1], [3, 5], [3, 5], [1, 1]])
