import jax
import jax.numpy as jnp
import numpy as np

from sdjax import pytrees

TREE = {"unet": {"conv": {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros(8)}},
        "vae": {"scale": np.zeros(5)}}


def test_flatten_and_back():
  flat = pytrees.flatten(TREE)
  assert list(flat) == ["unet/conv/kernel", "unet/conv/bias", "vae/scale"]
  assert jax.tree.structure(pytrees.unflatten(flat)) == jax.tree.structure(TREE)


def test_first_match_wins_over_better_matches():
  rules = [("bias$", 1), ("unet/.*", 2), (".*", 3)]
  found = {path: pytrees.first_match(rules, path) for path in pytrees.flatten(TREE)}
  assert found == {"unet/conv/kernel": 2, "unet/conv/bias": 1, "vae/scale": 3}
  assert pytrees.first_match([], "a", "default") == "default"


def test_paths_reach_through_lists_and_tuples():
  paths = pytrees.map_paths(lambda path, _: path, {"a": [np.zeros(1), (np.zeros(1),)]})
  assert paths == {"a": ["a/0", ("a/1/0",)]}


def test_count_cast_and_overview():
  assert pytrees.count(TREE) == 3 * 3 * 4 * 8 + 8 + 5
  tree = pytrees.cast({"a": jnp.ones(2), "n": jnp.arange(2)}, jnp.bfloat16)
  assert tree["a"].dtype == jnp.bfloat16 and tree["n"].dtype == jnp.int32
  lines = pytrees.overview(TREE, depth=1).splitlines()
  assert [line.split() for line in lines] == [["unet", "296"], ["vae", "5"], ["total", "301"]]


def test_the_fingerprint_is_that_of_the_model(tiny_model):
  _, params = tiny_model
  here = pytrees.fingerprint(params, "epsilon", {})
  assert here == pytrees.fingerprint(dict(reversed(params.items())), "epsilon", {})
  kernel = params["unet"]["conv_in"]["kernel"]
  moved = params | {"unet": params["unet"] | {"conv_in": params["unet"]["conv_in"] | {
      "kernel": kernel * np.float32(1.0001)}}}
  assert here != pytrees.fingerprint(moved, "epsilon", {})
  assert here != pytrees.fingerprint(params, "epsilon", {"_class_name": "DDIMScheduler"})
