"""Properties of the text tower; its numbers are checked against transformers in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.models import initializers
from sdjax.models.clip import CLIPText


@pytest.fixture(scope="module")
def tower():
  text = CLIPText(vocab_size=50, max_length=6, width=16, layers=2, heads=2, mlp_width=32)
  tokens = jnp.array([[1, 7, 9, 3, 2, 2]])
  shapes = jax.eval_shape(text.init, jax.random.key(0), tokens)["params"]
  return text, {"params": initializers.draw({"text_encoder": shapes}, 0)["text_encoder"]}, tokens


def test_a_position_sees_itself_and_what_comes_before(tower):
  text, params, tokens = tower

  def output(table):
    embeddings = params["params"]["embeddings"] | {"position_embedding": {"embedding": table}}
    return text.apply({"params": params["params"] | {"embeddings": embeddings}}, tokens)[0]

  # [l d] outputs by [l d] inputs: which position moves which.
  jacobian = jax.jacobian(output)(params["params"]["embeddings"]["position_embedding"]["embedding"])
  seen = np.abs(jacobian).max(axis=(1, 3)) > 0
  np.testing.assert_array_equal(seen, np.tril(np.ones((6, 6), bool)))


def test_more_tokens_than_positions_are_refused(tower):
  text, params, _ = tower
  with pytest.raises(UserError, match="7 tokens"):
    text.apply(params, jnp.zeros((1, 7), jnp.int32))
