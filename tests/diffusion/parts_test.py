import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.parts import WHOLE, Part


@pytest.mark.parametrize("of", [1, 2, 4])
def test_parts_draw_what_the_batch_draws(of):
  draw = lambda shape: jax.random.normal(jax.random.key(3), shape)
  batch = draw((8, 3))
  for number in range(of):
    part = Part(jnp.int32(number), of)
    np.testing.assert_array_equal(part.draw(draw, (8 // of, 3)), batch[number::of])
    np.testing.assert_array_equal(batch[part.rows(8 // of)], batch[number::of])


def test_the_whole_is_a_part():
  np.testing.assert_array_equal(WHOLE.rows(5), np.arange(5))
