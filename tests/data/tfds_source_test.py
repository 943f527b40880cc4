import concurrent.futures
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.data import captions, images
from sdjax.data.tfds_source import TFDS
from sdjax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")
ROOT = Path(__file__).parents[2]


def prepare(folder, features, examples, shards=1, name="pics"):
  """Writes a split "train" as `tfds build --file_format=array_record` does; returns the folder."""
  from etils import epath
  from tensorflow_datasets.core import naming, splits

  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(features)
  template = naming.ShardedFileTemplate(
      dataset_name=name, split="train", filetype_suffix="array_record", data_dir=epath.Path(folder))
  parts = [part.tolist() for part in np.array_split(np.arange(len(examples)), shards)]
  for path, part in zip(template.sharded_filepaths(shards), parts, strict=True):
    writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
    for number in part:
      writer.write(features.serialize_example(examples[number]))
    writer.close()
  split = splits.SplitInfo(name="train", shard_lengths=[len(part) for part in parts], num_bytes=0,
                           filename_template=template)
  tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=[split], version="1.0.0",
      filename_template=template, check_data=False)
  return folder


def text():
  return tfds.features.Text()


def pixels(number, channels=3):
  return np.random.default_rng(number).integers(0, 256, (4 + number, 6, channels), np.uint8)


@pytest.fixture(scope="module")
def coco(tmp_path_factory, picture):
  """Seven records in three files, laid out as coco_captions; some have no caption."""
  features = {"image": tfds.features.Image(encoding_format="jpeg"),
              "image/id": np.int64,
              "captions": tfds.features.Sequence({"id": np.int64, "text": text()}),
              "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()})}
  examples = [{"image": picture(i, 8 + i, "JPEG"), "image/id": i, "objects": [],
               "captions": [{"id": k, "text": f" ünï {i} {k}\n"} for k in range(i % 3)]}
              for i in range(7)]
  folder = tmp_path_factory.mktemp("tfds") / "pics" / "2014" / "1.0.0"
  return prepare(folder, features, examples, shards=3)


def test_pictures_are_passed_on_as_they_are_with_all_their_captions(coco, picture):
  source = TFDS(f"tfds:{coco}@train")
  assert (source.count, source.kind, source.problems, source.examples) == (7, "image", {}, {})
  facts = []
  for i in range(7):
    parts, fact = source.read(i)
    assert parts == {"jpg": picture(i, 8 + i, "JPEG")}
    facts.append(fact)
  assert facts[3] == {"caption": ""} and facts[4] == {"caption": "ünï 4 0"}
  assert facts[5] == {"caption": "ünï 5 0", "captions": ["ünï 5 0", "ünï 5 1"]}
  assert source.name(5) == f"tfds:{coco}@train:5"


@pytest.mark.parametrize("split, numbers", [
    ("train[2:5]", [2, 3, 4]), ("train[-2:]", [5, 6]), ("train[4:5]+train[:1]", [4, 0]),
    ("train[:50%]", [0, 1, 2, 3]),
])
def test_splits_are_those_of_tfds(coco, picture, split, numbers):
  source = TFDS(f"tfds:{coco}@{split}")
  assert [source.read(i)[0]["jpg"] for i in range(source.count)] == [
      picture(i, 8 + i, "JPEG") for i in numbers]


@pytest.mark.parametrize("channels, encoding", [(3, "none"), (1, "none"), (3, "zlib")])
def test_arrays_become_pngs_of_the_same_pixels(tmp_path, channels, encoding):
  shape = (None, 6, channels) if encoding == "none" else (None, None, channels)
  features = {"image": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=encoding),
              "label": tfds.features.ClassLabel(names=["great_ape", "cat"])}
  examples = [{"image": pixels(i, channels), "label": i - 1} for i in range(3)]
  source = TFDS(f"tfds:{prepare(tmp_path / 'x', features, examples)}@train")
  for i, caption in enumerate(["", "great ape", "cat"]):
    parts, facts = source.read(i)
    image = Image.open(io.BytesIO(parts["png"]))
    assert (np.asarray(image).reshape(4 + i, 6, channels) == pixels(i, channels)).all()
    assert image.format == "PNG" and facts == {"caption": caption}
  assert source.sizes(np.arange(3)).tolist() == [[4, 6], [5, 6], [6, 6]]


@pytest.mark.parametrize("features, example, facts", [
    (lambda: {"caption": text(), "text": text()}, {"caption": "a", "text": "b"}, {"caption": "a"}),
    (lambda: {"text": text()}, {"text": ""}, {"caption": ""}),
    (lambda: {"captions": tfds.features.Sequence(text())}, {"captions": ["a", " ", "b"]},
     {"caption": "a", "captions": ["a", "b"]}),
    (lambda: {"captions": {"text": text()}}, {"captions": {"text": "a"}}, {"caption": "a"}),
    (lambda: {"text": np.int64, "kind": tfds.features.ClassLabel(names=["cat"])},
     {"text": 3, "kind": 0}, {"caption": "cat"}),
    (lambda: {"fine": tfds.features.ClassLabel(names=["cat"]),
              "label": tfds.features.ClassLabel(num_classes=9)}, {"fine": 0, "label": 7},
     {"caption": "7"}),
    (lambda: {"fine": tfds.features.ClassLabel(names=["cat"]),
              "coarse": tfds.features.ClassLabel(num_classes=9)}, {"fine": 0, "coarse": 7},
     {"caption": ""}),
], ids=["caption", "empty", "several", "nested", "the only class", "label", "none"])
def test_where_captions_come_from(tmp_path, picture, features, example, facts):
  place = prepare(tmp_path / "x", {"photo": tfds.features.Image(), **features()},
                  [{"photo": picture(0), **example}])
  assert TFDS(f"tfds:{place}@train").read(0) == ({"jpg": picture(0)}, facts)


def test_names_are_found_in_the_data_folder_and_nothing_imports_tensorflow(coco):
  code = """
import sys
from sdjax.data.tfds_source import TFDS
for address in sys.argv[1:]:
  source = TFDS(address)
  print(source.count, source.digest, source.read(2)[1]["caption"])
print({name.partition(".")[0] for name in sys.modules} & {"tensorflow", "jax", "torch"})"""
  addresses = ["tfds:pics/2014@train", "tfds:pics/2014:1.0.0@train", f"tfds:{coco}@train"]
  done = subprocess.run(
      [sys.executable, "-c", code, *addresses], cwd=ROOT, capture_output=True, text=True,
      env={**os.environ, "TFDS_DATA_DIR": str(coco.parents[2]), "PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr
  *lines, imported = done.stdout.splitlines()
  assert lines == [f"7 {TFDS(f'tfds:{coco}@train').digest} ünï 2 0"] * 3 and imported == "set()"


def test_threads_may_read_at_once(coco):
  source, alone = TFDS(f"tfds:{coco}@train"), TFDS(f"tfds:{coco}@train")
  order = np.random.default_rng(0).integers(0, 7, 2000).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(source.read, order))
  expected = [alone.read(i) for i in range(7)]
  assert all(one == expected[i] for one, i in zip(found, order, strict=True))


def test_the_digest_is_of_the_data_and_not_of_the_place(coco, tmp_path):
  def digest(folder, split="train"):
    return TFDS(f"tfds:{folder}@{split}").digest

  moved = shutil.copytree(coco, tmp_path / "moved")
  assert digest(moved) == digest(coco) == digest(coco, "train[:100%]")
  others = {digest(coco, split) for split in ("train[1:]", "train[:-1]", "train[:1]", "train[1:2]")}
  assert len({digest(coco), *others}) == 5
  with open(moved / "pics-train.array_record-00001-of-00003", "ab") as file:
    file.write(b"x")
  assert digest(moved) != digest(coco)


def test_a_damaged_record_is_bad_and_its_neighbours_are_not(coco, tmp_path):
  folder = shutil.copytree(coco, tmp_path / "damaged")
  path = folder / "pics-train.array_record-00000-of-00003"  # records 0, 1, 2
  blob = bytearray(path.read_bytes())
  blob[300] ^= 1
  path.write_bytes(blob)
  source, whole = TFDS(f"tfds:{folder}@train"), TFDS(f"tfds:{coco}@train")
  for _ in range(2):
    with pytest.raises(images.BadPicture, match="corrupt record"):
      source.read(0)
    assert all(source.read(i) == whole.read(i) for i in range(1, 7))
  assert source.sizes(np.array([0, 1, 6])).tolist() == [[0, 0], [9, 9], [14, 14]]


def test_a_record_may_lack_its_caption_and_is_bad_without_its_picture(tmp_path, picture):
  features = {"image": tfds.features.Image(), "caption": tfds.features.Text(optional=True)}
  examples = [{"image": picture(0), "caption": one} for one in ("a", None, b"\xff")]
  folder = prepare(tmp_path / "x", features, examples)
  source = TFDS(f"tfds:{folder}@train")
  assert [source.read(i)[1] for i in range(3)] == [{"caption": "a"}, {"caption": ""}, {}]
  assert [source.facts(i) for i in range(3)] == [{"caption": "a"}, {"caption": ""}, {}]
  with pytest.raises(ValueError):
    captions.choices(source.facts(2))  # as the pipeline finds out that there is none to be read
  texts_alone = prepare(tmp_path / "y", {"caption": text()}, [{"caption": "a"}])
  shutil.copy(folder / "features.json", texts_alone)
  with pytest.raises(images.BadPicture, match="no picture"):
    TFDS(f"tfds:{texts_alone}@train").read(0)


def test_a_file_that_goes_is_an_error_and_no_bad_picture(coco, tmp_path):
  folder = shutil.copytree(coco, tmp_path / "lost")
  source = TFDS(f"tfds:{folder}@train")
  os.remove(folder / "pics-train.array_record-00001-of-00003")
  with pytest.raises(OSError, match="00001-of-00003"):
    source.read(3)
  with pytest.raises(UserError, match="00001-of-00003 is missing"):
    TFDS(f"tfds:{folder}@train")
  assert TFDS(f"tfds:{folder}@train[:3]").count == 3


@pytest.mark.parametrize("address, said", [
    ("{coco}", "names no split"), ("{coco}@test", "there are train,"),
    ("{coco}@train[:", "no split"), ("{coco}@train[90:99]", "no split"),
    ("{coco}@train[3:3]", "no sample"), ("{coco}/nowhere@train", "dataset_info.json"),
    ("no_such_set@train", "tfds build --file_format=array_record no_such_set"),
    ("a b@train", "no TFDS data set a b"),
])
def test_a_bad_address_is_told_in_a_line(coco, address, said):
  with pytest.raises(UserError) as caught:
    TFDS("tfds:" + address.format(coco=coco))
  assert said in str(caught.value) and "\n" not in str(caught.value)


def test_tfrecords_are_refused_with_the_command_that_converts_them(coco, tmp_path):
  folder = shutil.copytree(coco, tmp_path / "tfrecord")
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(UserError, match=f"tfds convert_format --dataset_version_dir={folder} "):
    TFDS(f"tfds:{folder}@train")


@pytest.mark.parametrize("features, said", [
    (lambda: {"a": tfds.features.Image(), "b": tfds.features.Image()}, r"2 features .*\(a, b\)"),
    (lambda: {"depth": tfds.features.Image(shape=(2, 2, 1), dtype=np.float32)}, "0 features"),
    (lambda: {"text": text()}, "0 features"),
])
def test_it_must_be_clear_what_the_picture_is(tmp_path, features, said):
  folder = prepare(tmp_path / "x", features(), [])
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace('"0"', '"1"'))
  with pytest.raises(UserError, match=said):
    TFDS(f"tfds:{folder}@train")


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(UserError, match=r"pip install 'sdjax\[tfds\]'"):
    TFDS("tfds:cifar10@train")
