"""Where the members of a tar lie, so that any sample can be read without reading the ones before.

Follows webdataset (https://github.com/webdataset/webdataset): files that share the path up to the
first dot of their base name are one sample, and the rest of the name says which part:
`a/000000012.seg.png` is part "seg.png" of sample "a/000000012".
"""

import dataclasses
import os
import tarfile
from pathlib import Path

from sdjax.errors import UserError

Extent = tuple[int, int]  # offset of a member's first byte in the tar, its size; both in bytes
BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a tar holds.

  Attributes:
    samples: key → part → where, in the order of the tar. Parts are lower case, without a dot first.
    truncated: the file ends, or turns into nonsense, in the middle. `samples` are the ones before;
      the sample being written there is left out, since its last parts may be missing.
  """
  samples: dict[str, dict[str, Extent]]
  truncated: bool


def scan(path: str | Path) -> Contents:
  """Reads the headers of a tar (ustar, PAX or GNU), 20 µs each, and none of its data.

  A download that broke off is common and no reason to stop: what came before the break is kept and
  `truncated` tells. A file that is no tar at all is an error.

  Raises:
    UserError: not an uncompressed tar.
    OSError: the file cannot be read.
  """
  samples: dict[str, dict[str, Extent]] = {}
  key = None
  try:
    with tarfile.open(path, "r:") as archive:
      try:
        for member in archive:
          archive.members = []  # tarfile remembers every member; a reader of millions must not
          if member.isreg():
            key, part = split_name(member.name)
            samples.setdefault(key, {})[part] = (member.offset_data, member.size)
        truncated = not _ends_well(archive)
      except tarfile.ReadError:
        truncated = True
  except tarfile.ReadError as error:
    raise UserError(f"{path} is not an uncompressed tar ({error}); download it again, "
                    "or leave it out") from error
  if truncated:
    samples.pop(key, None)
  return Contents(samples, truncated)


def read(path: str | Path, extents: list[Extent]) -> list[bytes]:
  """The bytes of some members. Needs no open file between calls, so threads may share it.

  Raises:
    UserError: the file has become shorter than it was when it was scanned.
    OSError: the file cannot be read.
  """
  handle = os.open(path, os.O_RDONLY)
  try:
    blobs = [os.pread(handle, size, offset) for offset, size in extents]
  finally:
    os.close(handle)
  if any(len(blob) != size for blob, (_, size) in zip(blobs, extents, strict=True)):
    raise UserError(f"{path} changed while it was in use; start again")
  return blobs


def split_name(name: str) -> tuple[str, str]:
  """The key of a member's sample, and which part of the sample it is."""
  folder, slash, base = name.rpartition("/")
  stem, _, part = base.partition(".")
  return folder + slash + stem, part.lower()


def _ends_well(archive: tarfile.TarFile) -> bool:
  """Whether a block of zeros, which ends a tar (POSIX pax, "ustar"), follows the last member.

  tarfile takes a broken header for the end as well, and the end of the file.
  """
  archive.fileobj.seek(archive.offset)
  block = archive.fileobj.read(BLOCK)
  return block == bytes(BLOCK)
