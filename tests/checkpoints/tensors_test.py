"""safetensors files: equal to the library's, streamed, and refused when they lie."""

import json
import pickle
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sdjax.checkpoints import tensors
from sdjax.errors import UserError

EXAMPLE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
    "c": np.array(3, np.float16),
    "mark": np.zeros(0, np.float32),
}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    read = np.asarray(found[name])
    assert read.dtype == array.dtype and read.tobytes() == array.tobytes(), name
    assert found[name].shape == array.shape and found[name].dtype == str(array.dtype)


def test_files_are_those_of_the_library(tmp_path):
  tensors.write_file(tmp_path / "ours.safetensors", EXAMPLE, {"note": "1"})
  theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
  assert theirs.keys() == EXAMPLE.keys()
  for name, array in EXAMPLE.items():
    np.testing.assert_array_equal(theirs[name], array)
  assert tensors.metadata(tmp_path / "ours.safetensors") == {"format": "pt", "note": "1"}
  safetensors.numpy.save_file(EXAMPLE, tmp_path / "theirs.safetensors")
  assert_same(tensors.open_file(tmp_path / "theirs.safetensors"), EXAMPLE)
  assert_same(tensors.open_file(tmp_path / "ours.safetensors"), EXAMPLE)


def test_large_networks_are_split_and_found_by_their_index(tmp_path):
  many = {f"t{i}": np.full(100, i, np.float32) for i in range(7)}
  tensors.write_folder(tmp_path, "model", many, shard_bytes=1000)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [*(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
                   "model.safetensors.index.json"]
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 7 * 400 and index["weight_map"].keys() == many.keys()
  assert_same(tensors.open_folder(tmp_path, "model"), many)


def test_full_precision_comes_before_a_variant(tmp_path):
  half = {"a": np.ones(2, np.float16)}
  tensors.write_file(tmp_path / "model.fp16.safetensors", half)
  assert_same(tensors.open_folder(tmp_path, "model"), half)
  tensors.write_file(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
  assert tensors.open_folder(tmp_path, "model")["a"].dtype == "float32"


def test_reading_and_writing_hold_one_tensor_at_a_time(tmp_path):
  size = 4 * 2**20
  lazy = {f"t{i}": tensors.Tensor((size // 4,), "float32", lambda i=i: np.full(
      size // 4, i, np.float32)) for i in range(16)}
  tracemalloc.start()
  tensors.write_file(tmp_path / "big.safetensors", lazy)
  stored = tensors.open_file(tmp_path / "big.safetensors")
  for i, name in enumerate(sorted(stored, key=lambda name: int(name[1:]))):
    assert np.asarray(stored[name])[-1] == i
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 3 * size


def test_an_interrupted_write_leaves_nothing(tmp_path):
  def fail():
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    tensors.write_file(tmp_path / "x.safetensors",
                       EXAMPLE | {"z": tensors.Tensor((2,), "float32", fail)})
  assert not list(tmp_path.iterdir())


def header(entries, data=b"\0" * 64):
  text = json.dumps(entries).encode()
  return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class Touch:
  """A pickle that makes a file when it is loaded."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return (open, (self.path, "w"))


BROKEN = {
    "empty": b"",
    "no header": b"\x01\x02",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 10**9) + b"{}",
    "header no JSON": struct.pack("<Q", 4) + b"\xff{}{",
    "offsets past the end": header({"a": entry(shape=(2**20,), offsets=(0, 2**22))}),
    "offsets of 2^63": header({"a": entry(shape=(2**61,), offsets=(0, 2**63))}),
    "shape that overflows": header({"a": entry(shape=(2**40, 2**40), offsets=(0, 16))}),
    "overlapping": header({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24),
    "backwards": header({"a": entry(offsets=(16, 0))}),
    "shape and offsets disagree": header({"a": entry(shape=(5,))}, b"\0" * 16),
    "hole": header({"a": entry(), "b": entry(offsets=(32, 48))}, b"\0" * 48),
    "unknown dtype": header({"a": entry(dtype="F7")}, b"\0" * 16),
    "negative size": header({"a": entry(shape=(-4,))}, b"\0" * 16),
    "more bytes than tensors": header({"a": entry()}, b"\0" * 20),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_lies_is_refused_at_once(tmp_path, name):
  file = tmp_path / "bad.safetensors"
  file.write_bytes(BROKEN[name])
  tracemalloc.start()
  with pytest.raises(UserError, match="bad.safetensors is broken or not safetensors"):
    tensors.open_file(file)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20


def test_a_pickle_by_another_name_is_not_executed(tmp_path):
  file, touched = tmp_path / "model.safetensors", tmp_path / "touched"
  file.write_bytes(pickle.dumps({"state_dict": Touch(touched)}))
  with pytest.raises(UserError, match="not safetensors"):
    tensors.open_file(file)
  assert not touched.exists()
  pickle.loads(file.read_bytes())  # it would have
  assert touched.exists()


def test_a_truncated_file_is_refused(tmp_path):
  file = tmp_path / "a.safetensors"
  tensors.write_file(file, EXAMPLE)
  whole = file.read_bytes()
  for cut in (4, 20, len(whole) - 1):
    file.write_bytes(whole[:cut])
    with pytest.raises(UserError, match="copy it again"):
      tensors.open_file(file)


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "x.bin", "..", ""])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
  folder = tmp_path / "unet"
  tensors.write_file(tmp_path / "secret.safetensors", EXAMPLE)
  tensors.write_file(folder / "sub" / "x.safetensors", EXAMPLE)
  (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
  with pytest.raises(UserError, match="only safetensors files beside it"):
    tensors.open_folder(folder, "m")


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_told(tmp_path, text):
  (tmp_path / "m.safetensors.index.json").write_text(text)
  with pytest.raises(UserError, match="index"):
    tensors.open_folder(tmp_path, "m")


def test_an_index_whose_files_lack_a_tensor_names_it(tmp_path):
  tensors.write_file(tmp_path / "x.safetensors", EXAMPLE)
  (tmp_path / "m.safetensors.index.json").write_text(
      json.dumps({"weight_map": {"a": "x.safetensors", "gone": "x.safetensors"}}))
  with pytest.raises(UserError, match="1 tensors: gone"):
    tensors.open_folder(tmp_path, "m")


def test_a_folder_of_pickles_is_told(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match="pickle"):
    tensors.open_folder(tmp_path, "model")
