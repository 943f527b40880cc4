"""Where the members of a tar lie, so that any sample can be read without those before it.

Follows webdataset (https://github.com/webdataset/webdataset): files that share the path up to the
first dot of their base name are one sample, and the rest of the name says which part:
`a/000000012.seg.png` is part "seg.png" of sample "a/000000012". `add_sample` writes them so.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from sdjax.errors import UserError

BLOCK = 512
FILES, WITHOUT_DATA = b"0\x007", b"123456"  # kinds of members: files; links, devices, folders
# Headers before a member's own: PAX records (of it, of all), GNU's long name (of it, of its link).
PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK = b"x", b"g", b"L", b"K"
MAX_EXTENSION = 1 << 20  # bytes of such a header; a path is far below
SAMPLE_DIGITS = 4  # of the keys that we write; a shard has at most 10,000 samples


class Truncated(Exception):
  """A tar that ends, or turns into nonsense, in the middle: a download that broke off."""


def members(file: BinaryIO, url: str) -> Iterator[tuple[str, int, int]]:
  """Name, offset and size of each file in a tar (ustar, PAX or GNU), in its order.

  The standard library's tarfile takes 43 µs a member of img2dataset's shards, this a fifth of it.
  Between two members the caller may read and seek as it likes.

  Args:
    file: seekable.
    url: for messages.

  Raises:
    Truncated: where the tar breaks off; the member before may lack a part of its data.
    UserError: not an uncompressed tar, or one with sparse files.
  """
  end = file.seek(0, io.SEEK_END)
  position = 0
  records = {}  # what the headers before a member's own say of it
  while True:
    file.seek(position)
    header = file.read(BLOCK)
    if header == bytes(BLOCK):  # ends a tar (POSIX pax, "ustar")
      return
    if not _is_header(header):
      if position == 0:
        raise UserError(f"{url} is not an uncompressed tar; download it again, or leave it out")
      raise Truncated
    kind = header[156:157]
    offset = position + BLOCK
    size = 0 if kind in WITHOUT_DATA else _size(records.get(b"size"), header)
    position = offset + -(-size // BLOCK) * BLOCK
    if kind in (PAX, LONG_NAME):
      if size > MAX_EXTENSION:
        raise Truncated
      records |= _extension(kind, file.read(size))
    elif kind not in (PAX_GLOBAL, LONG_LINK):
      if kind == b"S" or b"GNU.sparse.major" in records:
        raise UserError(f"{url} holds sparse files; make it again without tar's --sparse")
      name = _name(records.get(b"path"), header)
      if kind in FILES and not name.endswith("/"):  # a slash: a folder in tars before POSIX
        yield name, offset, size
      records = {}
    if offset + size > end:
      raise Truncated


def add_sample(archive: tarfile.TarFile, key: str, parts: Mapping[str, bytes]) -> None:
  """Appends a sample's parts, sorted: members KEY.PART that anyone may read.

  Without time and owner, so that the same samples make the same tar.
  """
  for part, blob in sorted(parts.items()):
    member = tarfile.TarInfo(f"{key}.{part}")
    member.size, member.mode = len(blob), 0o444
    archive.addfile(member, io.BytesIO(blob))


def sample_key(shard: int, place: int) -> str:
  """The key of a sample as img2dataset counts them: "000120003" is sample 3 of 00012.tar."""
  return f"{shard:05d}{place:0{SAMPLE_DIGITS}d}"


def split_name(name: str) -> tuple[str, str]:
  """The key of a member's sample, and which part of the sample it is."""
  folder, slash, base = name.rpartition("/")
  stem, _, part = base.partition(".")
  return folder + slash + stem, part.lower()


def _is_header(block: bytes) -> bool:
  """Whether the checksum of a header, the sum of its bytes with eight spaces in its place, holds.

  The low half of Adler-32 is one more than the sum of the bytes modulo 65521 (RFC 1950, section
  8.2), at a thirtieth of the price of a sum in Python.
  """
  if len(block) != BLOCK:
    return False
  try:
    stated = _octal(block[148:156])
  except ValueError:
    return False
  return zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xFFFF == (stated + 1) % 65521


def _size(record: bytes | None, header: bytes) -> int:
  """Of a member's data: decimal in a PAX record, else octal, else GNU's base 256."""
  try:
    if record is not None:
      size = int(record)
    elif header[124] == 0x80:
      size = int.from_bytes(header[125:136], "big")
    else:
      size = _octal(header[124:136])
  except ValueError as error:
    raise Truncated from error
  if size < 0:
    raise Truncated
  return size


def _octal(field: bytes) -> int:
  return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name(record: bytes | None, header: bytes) -> str:
  """The path of a member. Bytes that are not UTF-8 become \\x.. so that the name can be stored."""
  path = record
  if path is None:
    path = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:  # POSIX; GNU keeps other things there
      path = header[345:500].partition(b"\0")[0] + b"/" + path
  return path.decode("utf-8", "backslashreplace")


def _extension(kind: bytes, blob: bytes) -> dict[bytes, bytes]:
  """Records of a PAX header, "LENGTH KEY=VALUE\\n" each, or GNU's long name as one of them."""
  if kind == LONG_NAME:
    return {b"path": blob.partition(b"\0")[0]}
  blob = blob.rstrip(b"\0")  # some writers pad
  records, start = {}, 0
  while start < len(blob):
    length, _, _ = blob[start:start + 20].partition(b" ")
    if not length.isdigit() or int(length) <= len(length):
      raise Truncated
    key, _, value = blob[start + len(length) + 1:start + int(length) - 1].partition(b"=")
    records[key] = value
    start += int(length)
  return records
