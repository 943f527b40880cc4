"""A prepared data set of TensorFlow Datasets (TFDS) as a source of samples, without TensorFlow.

  tfds:NAME[/CONFIG][:VERSION]@SPLIT   what tfds.load("NAME/CONFIG:VERSION", split="SPLIT") gives,
                                       from $TFDS_DATA_DIR or ~/tensorflow_datasets
  tfds:FOLDER@SPLIT                    the same, of the folder that holds the dataset_info.json

SPLIT is what TFDS calls so (https://www.tensorflow.org/datasets/splits): train, test[:10%],
train[1000:2000]+validation. Files must be ArrayRecords, which can be read in any order: to prepare
them takes TensorFlow, `tfds build --file_format=array_record NAME`; to read them does not.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data import images
from sdjax.data.folder_source import HeaderSizes, Sample
from sdjax.errors import UserError

SCHEME = "tfds:"
# Where captions are looked for, first come first served: path of features → as in coco_captions.
CAPTIONS = (("caption",), ("captions",), ("text",), ("captions", "text"), ("captions", "caption"))
CHANNELS = (1, 3)  # of arrays that are taken for pictures


class TFDS:
  """A split of a data set that TFDS has prepared. See `sources.Source`.

  The picture is the feature "image", or the only one that can be a picture. Captions are the texts
  of one of `CAPTIONS`, else the name of the class "label" or of the only class, else empty.

  Attributes:
    count: records of the split.
    digest: changes with the data set's name, config and version, the records chosen and the sizes
      of their files, not with where they lie.
  """
  kind = "image"
  is_remote = False

  def __init__(self, address: str):
    """Opens the split; reads no record.

    Raises:
      UserError: tensorflow-datasets is missing, there is no such data set or split, its files are
        no ArrayRecords or have gone, or no feature is a picture.
    """
    try:
      import tensorflow_datasets as tfds
    except ImportError as error:
      raise UserError(f"{address} needs TensorFlow Datasets: pip install 'sdjax[tfds]'") from error
    place, _, split = address.removeprefix(SCHEME).rpartition("@")
    if not place:
      raise UserError(f"{address} names no split; write {address}@train")
    self._address = address
    builder = _open(tfds, place)
    self._records = _records(tfds, builder, split, address)
    self.count = len(self._records)
    self.digest = _digest(builder, split)
    self.problems, self.examples = {}, {}
    self.sizes = HeaderSizes(self.count, self.read)

    features = builder.info.features
    self._picture = _picture_of(tfds, features, address)
    self._captions = next((path for path in CAPTIONS if _holds_text(features, path)), None)
    self._label = None if self._captions else _label_of(tfds, features)
    self._classes = features[self._label].names if self._label else ()
    wanted = {self._picture, self._captions[0] if self._captions else self._label} - {None}
    self._wanted = tfds.features.FeaturesDict({name: features[name] for name in wanted})
    encoded = isinstance(features[self._picture], tfds.features.Image)
    self._decoders = {self._picture: tfds.decode.SkipDecoding()} if encoded else None

  def read(self, sample: int) -> Sample:
    """See `sources.Source.read`. An encoded picture is called "jpg" whatever it is; an array
    becomes a PNG. Threads may read at once: each file has one reader, which they share."""
    try:
      record = self._records[sample]
    except RuntimeError as error:       # all that ArrayRecord raises
      if "() failed" in str(error):     # of a call to the system, as in "open() failed: …"
        raise OSError(f"{self.name(sample)}: {error}") from error
      raise images.BadPicture("corrupt record") from error
    if not record:                      # and what it may give for the rest of a broken file
      raise images.BadPicture("corrupt record")
    example = self._wanted.deserialize_example_np(record, decoders=self._decoders)
    picture = example[self._picture]
    if picture is None:                 # so TFDS gives what a record lacks
      raise images.BadPicture("no picture")
    parts = {"png": _png(picture)} if self._decoders is None else {"jpg": picture}
    return parts, self._facts_of(example)

  def facts(self, sample: int) -> dict[str, Any]:
    """See `sources.Source.facts`."""
    return self.read(sample)[1]

  def name(self, sample: int) -> str:
    """See `sources.Source.name`."""
    return f"{self._address}:{sample}"

  def _facts_of(self, example: dict) -> dict[str, Any]:
    """The caption of a record, which may be empty, and the list of them if there are several."""
    if not self._captions:
      number = example[self._label] if self._label else -1  # TFDS's own "not known", too
      named = number in range(len(self._classes))
      return {"caption": self._classes[number].replace("_", " ") if named else ""}
    found = example
    for name in self._captions:
      found = found[name]
    found = [] if found is None else [found] if isinstance(found, bytes) else found
    try:
      texts = [text for text in (blob.decode().strip() for blob in found) if text] or [""]
    except UnicodeDecodeError:
      return {}  # bad for training, and good for an autoencoder
    return {"caption": texts[0]} | ({"captions": texts} if len(texts) > 1 else {})


def _open(tfds, place: str):
  """Returns the builder of a prepared data set."""
  folder = Path(place).expanduser()
  if (folder / "dataset_info.json").is_file():
    return tfds.builder_from_directory(folder)
  if folder.is_absolute():
    raise UserError(f"{folder} is no data set that TFDS has prepared; give the folder that holds "
                    "its dataset_info.json, such as …/cifar10/3.0.2")
  try:
    # Not tfds.builder, which asks the network about data sets that are not there.
    return tfds.core.read_only_builder.builder_from_files(place)
  except ValueError as error:
    raise UserError(
        f"no TFDS data set {place} is prepared in $TFDS_DATA_DIR or ~/tensorflow_datasets; mend "
        f"the name, or run tfds build --file_format=array_record {place}") from error


def _records(tfds, builder, split: str, address: str):
  """Returns a sequence of a split's records, each the bytes of a tf.train.Example."""
  try:
    count = builder.info.splits[split].num_examples
  except ValueError as error:
    raise UserError(f"{address} is no split of the data set; there are "
                    f"{', '.join(builder.info.splits)}, and parts such as train[:10%]") from error
  if not count:
    raise UserError(f"{address} holds no sample; choose another part of the split")
  formats = sorted(one.value for one in builder.info.available_file_formats())
  if "array_record" not in formats:
    raise UserError(
        f"{address} is prepared as {', '.join(formats)}, which cannot be read in any order; run "
        f"tfds convert_format --dataset_version_dir={builder.data_path} --out_file_format="
        "array_record, or remove that folder and run tfds build --file_format=array_record "
        f"{builder.info.full_name.rpartition('/')[0]}")
  return builder.as_data_source(split, file_format="array_record",
                                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _digest(builder, split: str) -> str:
  state = hashlib.sha256(builder.info.full_name.encode())
  for part in builder.info.splits[split].file_instructions:
    path = Path(part.filename)
    try:
      state.update(f"{path.name} {part.skip} {part.take} {path.stat().st_size}".encode())
    except FileNotFoundError as error:
      raise UserError(f"{path} is missing; prepare {builder.info.full_name} anew") from error
  return state.hexdigest()[:16]


def _picture_of(tfds, features, address: str) -> str:
  """Returns the name of the feature that is the picture."""
  def is_picture(one) -> bool:
    if isinstance(one, tfds.features.Image):  # of floats: their bits, in the colours of a PNG
      return one.np_dtype != np.float32
    return (isinstance(one, tfds.features.Tensor) and one.np_dtype == np.uint8
            and len(one.shape) == 3 and one.shape[2] in CHANNELS)

  found = sorted(name for name, one in features.items() if is_picture(one))
  if "image" in found:
    return "image"
  if len(found) != 1:
    raise UserError(f"{address} has {len(found)} features that may be the picture "
                    f"({', '.join(found or features)}); one must be, or be called image")
  return found[0]


def _holds_text(features, path: tuple[str, ...]) -> bool:
  """Tells whether there is a feature at `path` that is a text or a sequence of texts."""
  found = features.get_tensor_info()
  for name in path:
    if not isinstance(found, dict) or name not in found:
      return False
    found = found[name]
  return not isinstance(found, dict) and found.np_dtype.kind in "OSU" and len(found.shape) <= 1


def _label_of(tfds, features) -> str | None:
  """Returns the name of the feature whose class can serve as caption."""
  found = [name for name, one in features.items()
           if isinstance(one, tfds.features.ClassLabel) and one.num_classes]
  return "label" if "label" in found else found[0] if len(found) == 1 else None


def _png(pixels: np.ndarray) -> bytes:         # uint8 [h w 1] or [h w 3]
  """A PNG without compression, which would cost more time than its bytes do."""
  buffer = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(
      buffer, "PNG", compress_level=0)
  return buffer.getvalue()
