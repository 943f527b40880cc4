"""Bytes at a path or a URL: exact ranges, asked for again when a server fails in passing.

Local paths, http(s) servers, gs://, s3:// and the like (`places.py`) are read alike. Nothing here
knows what the bytes mean.
"""

import bisect
import collections
import io
import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from sdjax.data.places import Cloud, Http, Local, Passing, Stat
from sdjax.data.places import Missing as Missing  # for callers, who catch it

Extent = tuple[int, int]  # offset of the first byte, size; both in bytes
MAX_PAUSE_S = 60.0        # between two attempts, whatever a server's Retry-After asks for


class Unreachable(OSError):
  """A file could not be read in any of the attempts; it may well exist."""


class Storage:
  """Reads files wherever they lie. One object serves a whole run; threads share it.

  What fails in passing (HTTP 5xx and 429, timeouts, broken connections, bodies shorter than
  announced) is tried again after a pause, and counted. All methods raise:

    Missing: no such file; HTTP 404, 410.
    Unreachable: every attempt failed in passing.
    UserError: what will not mend itself: HTTP 401, 403 or no permission, an address that nothing
      can read, a file that ends before what is asked of it, a server that ignores ranges.
    OSError: a local disk fails.
  """

  def __init__(self, timeout_s: float = 20.0, attempts: int = 10, pause_s: float = 0.5):
    """Connects to nothing yet.

    Args:
      timeout_s: for how long a server may stay silent. At gs:// and s3://, how long a request may
        take.
      attempts: to do one thing, the first included.
      pause_s: before the second attempt, at most; twice as long before each further one, and at
        least what the server asks for by Retry-After (but no more than `MAX_PAUSE_S`).
    """
    self._attempts = attempts
    self._pause_s = pause_s
    self._local, self._http, self._cloud = Local(), Http(timeout_s), Cloud(timeout_s)
    self._counters = collections.Counter()
    self._lock = threading.Lock()

  @property
  def counters(self) -> collections.Counter:
    """So far: "requests", "bytes" that were handed out, "retried: HTTP 503", other reasons."""
    with self._lock:
      return self._counters.copy()

  def stat(self, url: str) -> Stat:
    """Size and version of a file. Over http, by asking for its first byte."""
    return self._patiently(self._place(url).stat, url)

  def read(self, url: str, extents: Sequence[Extent]) -> list[bytes]:
    """The bytes of each extent, in the order given. Extents that touch make one request."""
    spans = _joined(extents)
    place = self._place(url)
    if place is self._local:
      bodies = self._patiently(place.read, url, spans)
    else:
      bodies = [self._patiently(place.read, url, *span) for span in spans]
    self._count("bytes", sum(map(len, bodies)))
    return _cut(spans, bodies, extents)

  def read_all(self, url: str) -> bytes:
    """A whole file."""
    body = self._patiently(self._place(url).read_all, url)
    self._count("bytes", len(body))
    return body

  def list(self, url: str) -> list[str]:
    """Names, sorted, of the files directly in a folder; UserError for http, which cannot tell."""
    return self._patiently(self._place(url).list, url)

  def open(self, url: str, block: int = 2**20) -> BinaryIO:
    """A file to read and to seek in, for one thread. What is remote comes in blocks of bytes."""
    if (place := self._place(url)) is self._local:
      return place.open(url)
    return io.BufferedReader(_Remote(self, url), block)

  def _place(self, url: str) -> Local | Http | Cloud:
    if "://" not in url:
      return self._local
    known = {"file": self._local, "http": self._http, "https": self._http}
    return known.get(url.partition("://")[0].lower(), self._cloud)

  def _patiently(self, ask: Callable, url: str, *arguments):
    """ask(url, *arguments), again while it fails in passing."""
    for attempt in itertools.count(1):
      self._count("requests", 1)
      try:
        return ask(url, *arguments)
      except Passing as failure:
        if attempt >= self._attempts:
          raise Unreachable(f"{url} cannot be read: {_told(failure)} in the last of {attempt} "
                            "attempts; see to its server, and go on") from failure
        self._count(f"retried: {failure.reason}", 1)
        # At random, so that the readers of a server that was down do not all come back at once.
        pause_s = self._pause_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        time.sleep(min(max(pause_s, failure.wait_s), MAX_PAUSE_S))

  def _count(self, what: str, number: int) -> None:
    with self._lock:
      self._counters[what] += number


class _Remote(io.RawIOBase):
  """A remote file as `io` wants it; BufferedReader around it keeps one block."""

  def __init__(self, storage: Storage, url: str):
    self._storage, self._url, self._position = storage, url, 0
    self._size = storage.stat(url).size

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
    self._position = max(0, start + offset)
    return self._position

  def readinto(self, buffer: memoryview) -> int:
    size = max(0, min(len(buffer), self._size - self._position))
    buffer[:size] = self._storage.read(self._url, [(self._position, size)])[0]
    self._position += size
    return size


def _told(failure: Passing) -> str:
  detail = str(failure.__cause__ or "").partition("\n")[0]
  return f"{failure.reason} ({detail})" if detail else failure.reason


def _joined(extents: Sequence[Extent]) -> list[Extent]:
  """The fewest extents, ascending, that hold the given ones and no byte between them."""
  spans = []
  for offset, size in sorted(extent for extent in extents if extent[1]):
    if spans and offset <= sum(spans[-1]):
      start = spans[-1][0]
      spans[-1] = (start, max(sum(spans[-1]), offset + size) - start)
    else:
      spans.append((offset, size))
  return spans


def _cut(spans: Sequence[Extent], bodies: Sequence[bytes],
         extents: Sequence[Extent]) -> list[bytes]:
  """The bytes of `extents`, out of those of the spans that hold them."""
  starts = [start for start, _ in spans]
  blobs = []
  for offset, size in extents:
    if size == 0:  # it may lie outside of all spans
      blobs.append(b"")
      continue
    number = bisect.bisect_right(starts, offset) - 1
    first = offset - starts[number]
    blobs.append(bodies[number][first:first + size])
  return blobs
