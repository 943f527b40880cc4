"""A folder of pictures with captions as a source of samples."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data import images, pack

Sample = tuple[dict[str, bytes], dict[str, Any]]  # part → its bytes, what is known of it


class Folder:
  """A folder of pictures with captions, as `pack.find_sources` reads it. See `sources.Source`.

  Attributes:
    count: pictures.
    digest: changes with their names, captions and sizes in bytes, not with where the folder lies.
  """
  kind = "image"
  is_remote = False

  def __init__(self, folder: str | Path):
    """Lists the pictures and reads their captions.

    Raises:
      UserError: no folder, nothing in it, or captions that cannot be read.
    """
    self._folder = Path(folder).expanduser()
    self._found = pack.find_sources(self._folder)
    self.count = len(self._found)
    self.problems, self.examples = {}, {}
    self.sizes = HeaderSizes(self.count, self.read)
    state = hashlib.sha256()
    for one in self._found:
      path = self._folder / one.name
      state.update(f"{one} {path.stat().st_size if path.is_file() else None}".encode())
    self.digest = state.hexdigest()[:16]

  def read(self, sample: int) -> Sample:
    """See `sources.Source.read`. The part is called "jpg" whatever it is: its bytes will tell."""
    one = self._found[sample]
    try:
      blob = (self._folder / one.name).read_bytes()
    except FileNotFoundError as error:
      raise images.BadPicture("missing file") from error
    return {"jpg": blob}, self.facts(sample)

  def facts(self, sample: int) -> dict[str, Any]:
    """See `sources.Source.facts`."""
    one = self._found[sample]
    return {**one.facts, "caption": one.caption}

  def name(self, sample: int) -> str:
    """See `sources.Source.name`."""
    return str(self._folder / self._found[sample].name)


class HeaderSizes:
  """Sizes of pictures that no index knows, each looked up in its header once.

  A function, int64 [n] samples → int32 [n 2] height and width of the upright pictures in px; 0
  where a picture cannot be read. See `sources.Source.sizes`.
  """

  def __init__(self, count: int, read: Callable[[int], Sample]):
    """Reads nothing yet.

    Args:
      count: of the source's samples.
      read: of the source.
    """
    self._known = np.zeros((count, 2), np.int32)
    self._read = read

  def __call__(self, samples: np.ndarray) -> np.ndarray:
    for sample in np.unique(samples[self._known[samples, 0] == 0]):
      try:
        parts, facts = self._read(int(sample))
        (blob,) = parts.values()
        header = images.read_header(blob, images.orientation_of(facts.get("exif")))
      except images.BadPicture:  # reading it will tell
        continue
      self._known[sample] = images.upright((header.height, header.width), header.orientation)
    return self._known[samples]
