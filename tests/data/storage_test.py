import concurrent.futures
import contextlib
import io
import os
import socket
import sys
import tarfile
import time
import types

import fsspec
import numpy as np
import pytest
from flaky_server import FlakyServer

from sdjax.data import places, storage
from sdjax.data.storage import Missing, Storage, Unreachable
from sdjax.errors import UserError

CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("served")
  (folder / "a.bin").write_bytes(CONTENT)
  (folder / "empty").touch()
  (folder / "b.txt").write_text("b")
  (folder / "within").mkdir()
  return folder


@pytest.fixture
def server(folder):
  with FlakyServer(folder) as server:
    yield server


@pytest.fixture(scope="module")
def memory(folder):
  """The folder as an object store has it."""
  system = fsspec.filesystem("memory")
  for path in folder.iterdir():
    if path.is_file():
      system.pipe_file(f"/storage_test/{path.name}", path.read_bytes())
  system.pipe_file("/storage_test/within/c", b"c")
  yield "memory://storage_test"
  system.rm("/storage_test", recursive=True)


@pytest.fixture(params=["local", "file", "http", "memory"])
def base(request, folder):
  """The same files at every kind of place."""
  where = {"local": str(folder), "file": f"file://{folder}"}
  if request.param == "http":
    return request.getfixturevalue("server").url
  return where.get(request.param) or request.getfixturevalue("memory")


def quick(**options):
  return Storage(**{"timeout_s": 5.0, "pause_s": 1e-4, **options})


def ask(reader, url):
  return reader.read(url, [(0, 1)])


def test_every_place_gives_the_same_bytes(base):
  reader, url = quick(), f"{base}/a.bin"
  extents = [(2_999_990, 10), (0, 512), (512, 100), (5, 0), (1000, 70_000), (600, 20), (0, 0)]
  assert reader.read(url, extents) == [CONTENT[o:o + n] for o, n in extents]
  assert reader.counters["bytes"] == 10 + 620 + 70_000
  assert reader.read_all(url) == CONTENT and reader.read_all(f"{base}/empty") == b""
  assert reader.stat(url).size == len(CONTENT) and reader.stat(f"{base}/empty").size == 0
  assert reader.read(url, []) == []
  for missing in (reader.stat, reader.read_all, reader.open, lambda url: ask(reader, url)):
    with pytest.raises(Missing, match="nothing"):
      missing(f"{base}/nothing")
  with pytest.raises(UserError, match="ends before byte 3000001"):
    reader.read(url, [(2_999_999, 2)])
  with pytest.raises(UserError, match="ends before"):
    reader.read(url, [(4_000_000, 2)])


def test_paths_may_begin_at_home(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder))
  assert quick().read("~/b.txt", [(0, 1)]) == [b"b"] and "b.txt" in quick().list("~")


def test_files_of_a_folder(base):
  if base.startswith("http"):
    with pytest.raises(UserError, match="do not list"):
      quick().list(base)
    return
  assert quick().list(base) == quick().list(f"{base}/") == ["a.bin", "b.txt", "empty"]
  with pytest.raises(Missing):
    quick().list(f"{base}/nowhere")


def test_the_version_changes_with_the_content(server, tmp_path):
  server.folder = tmp_path
  file, reader = tmp_path / "a", quick()
  # Last-Modified knows whole seconds only.
  for url, etag, later_s in (
      (f"{server.url}/a", True, 0.25), (f"{server.url}/a", False, 1), (str(file), None, 0.25)):
    server.etag = etag
    seen = []
    for number, content in enumerate(("one", "one", "two", "three")):
      file.write_text(content)
      os.utime(file, (1e9, 1e9 + later_s * max(0, number - 1)))
      seen.append(reader.stat(url))
    assert seen[0] == seen[1] and len(set(seen)) == 3 and seen[3].size == 5
  system = fsspec.filesystem("memory")
  system.pipe_file("/version_test", b"one")
  before = reader.stat("memory://version_test")
  assert reader.stat("memory://version_test") == before
  system.pipe_file("/version_test", b"two")
  assert reader.stat("memory://version_test") != before
  system.rm("/version_test")


def test_requests_ask_for_exactly_what_is_wanted(server):
  reader = quick()
  reader.read(f"{server.url}/a.bin", [(100, 50), (150, 50), (201, 1), (160, 10), (7, 0)])
  assert [wanted for _, _, wanted, _ in server.log] == ["bytes=100-199", "bytes=201-201"]
  assert reader.counters == {"requests": 2, "bytes": 101}


def test_a_tar_is_read_in_blocks(base, tmp_path):
  reader = quick()
  with reader.open(f"{base}/a.bin", block=1000) as file:
    assert file.seekable() and file.read(1) == CONTENT[:1]
    assert file.read(10) == CONTENT[1:11]
    assert file.seek(-5, io.SEEK_END) == 2_999_995 and file.read(100) == CONTENT[-5:]
    assert file.read(1) == b"" and file.seek(1_000_000) and file.read(5) == CONTENT[10**6:][:5]
    assert file.seek(5, io.SEEK_CUR) == 1_000_010 and file.read(3000) == CONTENT[1_000_010:][:3000]
  if base.startswith("http"):
    assert reader.counters["requests"] < 10


def test_tarfile_reads_over_http(server, tmp_path):
  server.folder = tmp_path
  with tarfile.open(tmp_path / "t.tar", "w") as archive:
    archive.add(__file__, "x.py")
  reader = quick()
  with reader.open(f"{server.url}/t.tar") as file, tarfile.open(fileobj=file) as archive:
    with open(__file__, "rb") as original:
      assert archive.extractfile("x.py").read() == original.read()
  assert reader.counters["requests"] == 2          # its size, then one block for all


def test_a_server_that_fails_often_gives_the_same_bytes(server):
  """15 % of answers are 503 and 15 % of bodies are cut; eight threads share one Storage."""
  server.fail_share = server.cut_share = 0.15
  rng = np.random.default_rng(1)
  wanted = [[(int(o), int(n)) for o, n in zip(rng.integers(0, 2_900_000, 3),
                                              rng.integers(1, 90_000, 3), strict=True)]
            for _ in range(60)]
  reader = quick(attempts=12)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    read = list(pool.map(lambda extents: reader.read(f"{server.url}/a.bin", extents), wanted))
  assert read == [[CONTENT[o:o + n] for o, n in extents] for extents in wanted]
  counters = reader.counters
  retried = counters["retried: HTTP 503"] + counters["retried: short body"]
  assert set(counters) == {"requests", "bytes", "retried: HTTP 503", "retried: short body"}
  # Of 180 or fewer requests (extents may touch) 27.75 % fail: 69 on average, ± 9.8.
  assert counters["requests"] == server.count and 35 < retried < 105
  assert server.count - retried == sum(len(storage._joined(extents)) for extents in wanted)
  assert reader.counters["bytes"] == sum(n for extents in wanted
                                         for _, n in storage._joined(extents))


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_what_passes_is_tried_again(server, status):
  server.status, server.times = status, 3
  reader = quick(attempts=4)
  assert ask(reader, f"{server.url}/a.bin") == [CONTENT[:1]]
  assert reader.counters == {"requests": 4, "bytes": 1, f"retried: HTTP {status}": 3}


def test_pauses_double_and_retry_after_is_honoured(server, monkeypatch):
  pauses = []
  monkeypatch.setattr(time, "sleep", pauses.append)
  server.status = 503
  with pytest.raises(Unreachable):
    ask(Storage(pause_s=1.0, attempts=5), f"{server.url}/a.bin")
  assert len(pauses) == 4
  assert all(0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(pauses))
  pauses.clear()
  # RFC 9110, 10.2.3: seconds, or a date; one that has passed asks for nothing.
  for told, pause_s in (("7", 7.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 1e-4), ("86400", 60.0)):
    server.status, server.times, server.retry_after = 429, 1, told
    ask(quick(), f"{server.url}/a.bin")
    assert pause_s / 2 <= pauses.pop() <= pause_s


@pytest.mark.parametrize("fault, reason", [
    ({"status": 503}, "HTTP 503"), ({"cut_share": 1.0}, "short body"),
    ({"stall_share": 1.0}, "timeout")])
def test_what_does_not_pass_is_told_with_its_reason(server, fault, reason):
  for name, value in fault.items():
    setattr(server, name, value)
  reader, begin = quick(timeout_s=0.1, attempts=3), time.monotonic()
  for read in (reader.read_all, lambda url: reader.read(url, [(0, 100)])):
    with pytest.raises(Unreachable, match=f"a.bin cannot be read: {reason}.* in the last of 3"):
      read(f"{server.url}/a.bin")
  assert reader.counters == {"requests": 6, f"retried: {reason}": 4}
  assert time.monotonic() - begin < 3


def test_a_server_that_is_away(server):
  server.close()
  with pytest.raises(Unreachable, match="no connection.* in the last of 2"):
    ask(quick(attempts=2), f"{server.url}/a.bin")


@contextlib.contextmanager
def parrot(answer, times):
  """A server that gives the same answer to so many connections; yields its address."""
  with (socket.create_server(("127.0.0.1", 0)) as listener,
        concurrent.futures.ThreadPoolExecutor(1) as pool):
    def serve():
      for _ in range(times):
        connection, _ = listener.accept()
        with connection:
          connection.recv(2**16)
          connection.sendall(answer)
    serving = pool.submit(serve)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.bin"
    serving.result()


@pytest.mark.parametrize("headers, reason", [
    ("", "broken connection"),
    ("206 Partial Content\r\nContent-Range: bytes 7-7/100", "wrong range"),
    ("206 Partial Content", "wrong range"),
    ("206 Partial Content\r\nContent-Range: bytes 0-4/100", "short body")])
def test_a_server_that_talks_nonsense(headers, reason):
  answer = f"HTTP/1.1 {headers}\r\nContent-Length: 1\r\n\r\nx".encode() if headers else b""
  with parrot(answer, 2) as url:
    with pytest.raises(Unreachable, match=f"{reason}.* in the last of 2"):
      quick(attempts=2).read(url, [(0, 5)])


def test_redirections_are_followed_and_a_file_without_a_size_is_refused(server):
  moved = f"HTTP/1.1 302 Found\r\nLocation: {server.url}/a.bin\r\nContent-Length: 0\r\n\r\n"
  with parrot(moved.encode(), 1) as url:
    assert quick().read(url, [(5, 10)]) == [CONTENT[5:15]]
  assert server.log[-1][2:] == ("bytes=5-14", 206)
  with parrot(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 1) as url:
    with pytest.raises(UserError, match="does not tell its size"):
      quick().stat(url)


@pytest.mark.parametrize("status, error, said", [
    (401, UserError, "sign in"), (403, UserError, "sign in"), (400, UserError, "mend the address"),
    (404, Missing, "does not exist"), (410, Missing, "does not exist")])
def test_what_will_not_mend_itself_is_told_at_once(server, status, error, said):
  server.status = status
  url = f"{server.url}/a.bin"
  with pytest.raises(error, match=f"(?=.*{said}){url}.*HTTP {status}"):
    ask(quick(), url)
  assert server.count == 1


def test_a_server_without_ranges_serves_whole_files_only(server):
  server.ranges = False
  reader, url = quick(), f"{server.url}/a.bin"
  assert reader.stat(url).size == len(CONTENT)
  assert reader.read(url, [(0, len(CONTENT))]) == [CONTENT]
  for extent in ((0, 10), (5, len(CONTENT) - 5)):
    with pytest.raises(UserError, match="ignores byte ranges"):
      reader.read(url, [extent])
  assert not any("retried" in reason for reason in reader.counters)


def test_addresses_that_nothing_can_read(monkeypatch):
  for url in ("nonsense://bucket/a.tar", "http:///a.tar"):
    with pytest.raises(UserError, match=f"{url} "):
      ask(quick(), url)
  monkeypatch.setitem(sys.modules, "gcsfs", None)       # as if it were not installed
  with pytest.raises(UserError, match=r"pip install 'sdjax\[cloud\]'"):
    ask(quick(), "gs://bucket/a.tar")


class DriverError(Exception):
  """Stands for gcsfs.retry.HttpError, which is no OSError and knows the status as `code`."""

  def __init__(self, code):
    super().__init__(f"code {code}")
    self.code = code


class Store(fsspec.AbstractFileSystem):
  """Holds one file, "abc", and answers first what it is told, as drivers of object stores do."""
  protocol, cachable, answers = "failing", False, []

  def info(self, path, **_):
    return {"name": path, "size": 3, "type": "file", "ETag": "tag"}

  def cat_file(self, path, start=None, end=None, **_):
    answer = self.answers.pop(0) if self.answers else b"abc"[start:end]
    if isinstance(answer, bytes):
      return answer
    raise answer


def test_object_stores_that_fail(monkeypatch):
  fsspec.register_implementation("failing", Store, clobber=True)
  driver = types.SimpleNamespace(DriverError=DriverError)
  monkeypatch.setitem(sys.modules, "driver_of_tests", driver)
  monkeypatch.setattr(places, "DRIVER_ERRORS", (("driver_of_tests", "DriverError"),))
  reader = quick(attempts=5)
  Store.answers = [OSError("reset"), TimeoutError(), DriverError(503), b"b"]
  assert reader.read("failing://a", [(1, 2)]) == [b"bc"]
  assert reader.counters == {
      "requests": 5, "bytes": 2, "retried: OSError": 1, "retried: timeout": 1,
      "retried: DriverError": 1, "retried: short body": 1}
  assert reader.stat("failing://a") == storage.Stat(3, "tag")
  for refusal in (DriverError(403), OSError("Forbidden: a"), PermissionError("denied")):
    Store.answers = [refusal]
    with pytest.raises(UserError, match="failing://a may not be read"):
      ask(reader, "failing://a")
  Store.answers = [FileNotFoundError("a")]
  with pytest.raises(Missing, match="failing://a"):
    ask(reader, "failing://a")
