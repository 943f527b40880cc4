"""Where bytes lie: this machine, web servers, object stores; one attempt at reading each.

A place answers stat, read, read_all and list for a URL, or tells by its exception what went wrong:
`Missing` (no such file), `Passing` (may mend itself: `storage.py` asks again), UserError (will
not mend itself).
"""

import contextlib
import dataclasses
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from http.client import IncompleteRead
from typing import BinaryIO

import urllib3
from urllib3 import exceptions

from sdjax.errors import UserError

MAX_REDIRECTS = 8
CONNECTIONS = 64   # kept open per host; further threads open and close their own
# Where object stores keep what changes with a file's content, the most exact first.
VERSIONS = ("etag", "ETag", "generation", "md5Hash", "last_modified", "LastModified", "mtime",
            "created")
# What drivers of object stores raise beside OSErrors. Whoever met one has loaded its module.
DRIVER_ERRORS = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"),
                 ("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError"))
NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError")   # of botocore, of google.auth


class Missing(FileNotFoundError):
  """There is no such file."""


class Passing(OSError):
  """A failure that may mend itself.

  Attributes:
    reason: short, for counts.
    wait_s: for how long the server asks to be left alone.
  """

  def __init__(self, reason: str, wait_s: float = 0.0):
    super().__init__(reason)
    self.reason, self.wait_s = reason, wait_s


@dataclasses.dataclass(frozen=True)
class Stat:
  """Size of a file in bytes, and a text that changes with its content (ETag, time …)."""
  size: int
  version: str


class Local:
  """Files of this machine. An OSError other than Missing is the disk's."""

  def stat(self, url: str) -> Stat:
    with _told(url):
      status = os.stat(_path(url))
    if not stat.S_ISREG(status.st_mode):
      raise Missing(f"{url} is not a file")
    return Stat(status.st_size, f"{status.st_size}-{status.st_mtime_ns}")

  def read(self, url: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Several (offset, size) at once: on network file systems it is the opening that costs."""
    with _told(url):
      handle = os.open(_path(url), os.O_RDONLY)
    try:
      bodies = [os.pread(handle, size, offset) for offset, size in spans]
    finally:
      os.close(handle)
    for body, (offset, size) in zip(bodies, spans, strict=True):
      if len(body) < size:
        raise _ended(url, offset + size)
    return bodies

  def read_all(self, url: str) -> bytes:
    with self.open(url) as file:
      return file.read()

  def list(self, url: str) -> list[str]:
    with _told(url), os.scandir(_path(url)) as entries:
      return sorted(entry.name for entry in entries if entry.is_file())

  def open(self, url: str) -> BinaryIO:
    with _told(url):
      return open(_path(url), "rb")


class Http:
  """Web servers (RFC 9110: section 14 on ranges, 10.2.3 on Retry-After)."""

  def __init__(self, timeout_s: float):
    # False: failures come as they are, and `storage.py` decides whether to ask again.
    self._retries = urllib3.Retry(
        total=None, connect=False, read=False, status=False, other=False, redirect=MAX_REDIRECTS)
    self._pool = urllib3.PoolManager(
        maxsize=CONNECTIONS, timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s))

  def stat(self, url: str) -> Stat:
    # Not HEAD, which addresses that are signed for GET refuse and some servers answer emptily.
    with self._get(url, Range="bytes=0-0") as response:
      headers = response.headers
      size = headers.get("Content-Length", "") if response.status == 200 else (
          headers.get("Content-Range", "").rpartition("/")[2])
    if not size.isdigit():
      raise UserError(f"{url}: the server does not tell its size; copy the file first")
    return Stat(int(size), headers.get("ETag") or headers.get("Last-Modified") or size)

  def read(self, url: str, offset: int, size: int) -> bytes:
    end = offset + size
    with self._get(url, Range=f"bytes={offset}-{end - 1}") as response:
      length = response.headers.get("Content-Length")
      if response.status == 200 and (offset, length) != (0, str(size)):
        raise UserError(f"{url}: the server ignores byte ranges (it answers HTTP 200 to bytes "
                        f"{offset} … {end - 1}); use one that honours them, or copy the file")
      told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
      if response.status == 416 or told and told[2].isdigit() and int(told[2]) < end:
        raise _ended(url, end)
      if response.status == 206 and (told is None or int(told[1]) != offset):
        raise Passing("wrong range")
      return _whole(response.read(), size)

  def read_all(self, url: str) -> bytes:
    with self._get(url) as response:
      return response.read()

  def list(self, url: str) -> list[str]:
    raise UserError(f"{url}: web servers do not list their files; give a range such as "
                    "{00000..00041}.tar, or a .txt with one address per line")

  @contextlib.contextmanager
  def _get(self, url: str, **headers: str) -> Iterator[urllib3.BaseHTTPResponse]:
    """An answer, 200, 206 or (to a range) 416, whose body has not been read yet."""
    try:
      # Ranges of a compressed body would be other bytes.
      headers = {"Accept-Encoding": "identity", "User-Agent": "sdjax", **headers}
      with self._pool.request("GET", url, headers=headers, retries=self._retries,
                              preload_content=False) as response:
        self._judge(url, response)
        yield response
    except exceptions.LocationValueError as error:
      raise UserError(f"{url} is no address ({error}); mend it") from error
    except exceptions.NewConnectionError as error:
      raise Passing("no connection") from error
    except exceptions.TimeoutError as error:
      raise Passing("timeout") from error
    except exceptions.HTTPError as error:
      short = isinstance(error.__cause__, IncompleteRead)
      raise Passing("short body" if short else "broken connection") from error

  def _judge(self, url: str, response: urllib3.BaseHTTPResponse) -> None:
    status = response.status
    if status in (404, 410):
      raise Missing(f"{url} does not exist (HTTP {status})")
    if status in (401, 403):
      raise _refused(url, f"HTTP {status}")
    if status >= 500 or status in (408, 425, 429):
      raise Passing(f"HTTP {status}", self._retries.get_retry_after(response) or 0.0)
    if status not in (200, 206, 416):
      raise UserError(f"{url} is answered with HTTP {status}; mend the address")


class Cloud:
  """Object stores, and whatever else fsspec knows (https://filesystem-spec.readthedocs.io).

  Who may read what is the affair of its drivers and their usual credentials; its options can be
  set by variables, FSSPEC_S3_ANON=true for instance.
  """

  def __init__(self, timeout_s: float):
    self._timeout_s = timeout_s

  def stat(self, url: str) -> Stat:
    facts = self._call(url, "info")
    if facts["type"] != "file":
      raise Missing(f"{url} is not a file")
    version = next((facts[name] for name in VERSIONS if facts.get(name)), facts["size"])
    return Stat(facts["size"], str(version))

  def read(self, url: str, offset: int, size: int) -> bytes:
    end = offset + size
    try:
      return _whole(self._call(url, "cat_file", start=offset, end=end), size)
    except Passing as failure:
      # Drivers cut short what lies beyond the end, or fail with an error of their own.
      if failure.reason != "timeout" and self.stat(url).size < end:
        raise _ended(url, end) from failure
      raise

  def read_all(self, url: str) -> bytes:
    return self._call(url, "cat_file")

  def list(self, url: str) -> list[str]:
    names = (facts["name"].rpartition("/")[2] for facts in self._call(url, "ls", detail=True)
             if facts["type"] == "file")
    return sorted(filter(None, names))  # an object named like the folder, "a/", stands for it

  def _call(self, url: str, method: str, **arguments):
    """What a method of the file system that holds `url` returns."""
    try:
      import fsspec  # an extra
      # Without this no change of a file would ever be seen.
      system, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
      raise UserError(f"{url} cannot be read ({error}); pip install 'sdjax[cloud]'") from error
    except ValueError as error:
      raise UserError(f"{url} cannot be read ({error}); give a path, or an address at http(s)://, "
                      "gs:// or s3://") from error
    if system.async_impl:
      arguments["timeout"] = self._timeout_s
    with _told(url):
      try:
        return getattr(system, method)(path, **arguments)
      except (FileNotFoundError, PermissionError):
        raise
      except (OSError, *_driver_errors()) as error:
        raise _judged(url, error) from error


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
  """Names the url in the two errors that every file system has."""
  try:
    yield
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Missing(f"{url} does not exist") from error
  except PermissionError as error:
    raise _refused(url, error.strerror or str(error)) from error


def _path(url: str) -> str:
  return os.path.expanduser(url.removeprefix("file://"))


def _whole(body: bytes, size: int) -> bytes:
  if len(body) != size:
    raise Passing("short body")
  return body


def _ended(url: str, end: int) -> UserError:
  return UserError(f"{url} ends before byte {end}: it changed since it was indexed; start again")


def _refused(url: str, reason: str) -> UserError:
  return UserError(f"{url} may not be read ({reason}); sign in, or ask its owner for access")


def _driver_errors() -> tuple[type[Exception], ...]:
  return tuple(getattr(sys.modules[module], name) for module, name in DRIVER_ERRORS
               if module in sys.modules)


def _judged(url: str, error: Exception) -> OSError | UserError:
  """What an object store's error comes to: gcsfs tells 403 in words, others by a code."""
  name = type(error).__name__
  if (getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden")
      or name in NO_CREDENTIALS):
    return _refused(url, str(error).partition("\n")[0])
  return Passing("timeout" if isinstance(error, TimeoutError) else name)
