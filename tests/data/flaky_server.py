"""A web server on loopback that serves a folder and fails as it is told, for tests of reading.

  with FlakyServer(folder, fail_share=0.15, cut_share=0.15) as server:
    storage.Storage(pause_s=0.001).read(f"{server.url}/00000.tar", [(0, 512)])
    assert server.count > 1
    server.fail_share = 0.0               # takes effect with the next request

It answers GET and HEAD with single byte ranges, Content-Length and ETag, over connections that
stay open (HTTP/1.1). Requests are numbered 0, 1, 2 … as they arrive, and which of them fail is a
function of `seed` and that number: from one thread, the same reads fail alike in every run; a
second attempt has another number, and so another fate.
"""

import dataclasses
import email.utils
import http.server
import random
import re
import threading
import urllib.parse
from pathlib import Path


@dataclasses.dataclass
class FlakyServer:
  """Serves `folder` at `url` from the moment it is made until `close`.

  Attributes:
    folder: its files, and those of folders in it, are served.
    fail_share: of requests answered 503, in [0, 1].
    cut_share: of bodies that break off in the middle, after headers that announce all of them.
    stall_share: of requests that are answered only after `stall_s` seconds.
    stall_s: or until `close`, which ends all stalls.
    status: answer with it (401, 403, 404, 410, 429, 500 …) instead of looking for the file.
    times: how many requests get that `status`, counted from now on; None: all.
    retry_after: value of that header, sent along with `status` and 503.
    ranges: False: answers ranges with 200 and the whole file, as simple servers do.
    etag: False: only Last-Modified tells versions apart.
    seed: of the requests that fail.
    log: (method, path with query, value of the Range header or None, status), one per request.
  """
  folder: Path
  fail_share: float = 0.0
  cut_share: float = 0.0
  stall_share: float = 0.0
  stall_s: float = 30.0
  status: int | None = None
  times: int | None = None
  retry_after: str | None = None
  ranges: bool = True
  etag: bool = True
  seed: int = 0
  log: list[tuple[str, str, str | None, int]] = dataclasses.field(default_factory=list)

  def __post_init__(self):
    self._numbers = 0
    self._lock = threading.Lock()
    self._closing = threading.Event()
    self._server = _Server(("127.0.0.1", 0), _Handler)
    self._server.flaky = self
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    # shutdown() waits for the poll.
    threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

  @property
  def count(self) -> int:
    """Requests so far."""
    return self._numbers

  def close(self) -> None:
    """Stops serving, also on connections that are open; further attempts to connect fail."""
    self._closing.set()
    self._server.shutdown()
    self._server.server_close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def fate(self) -> tuple[int | None, bool]:
    """Of the next request: the status to fail with or None, and whether to cut its body.

    Sits out the stall.
    """
    with self._lock:
      number = self._numbers
      self._numbers += 1
      refused = self.status is not None and self.times != 0
      if refused and self.times is not None:
        self.times -= 1
    draws = random.Random(f"{self.seed}:{number}")
    fails, is_cut, stalls = (
        draws.random() < share for share in (self.fail_share, self.cut_share, self.stall_share))
    if stalls:
      self._closing.wait(self.stall_s)
    return (self.status if refused else 503 if fails else None), is_cut


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 64                 # many threads may connect at once

  def handle_error(self, request, client_address):
    """Clients that give up, in the tests of timeouts, are no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True          # else each body waits 40 ms for the headers' receipt
  wbufsize = 2**16

  def do_GET(self):
    flaky = self.server.flaky
    status, is_cut = flaky.fate()
    if flaky._closing.is_set():
      self.close_connection = True
      return
    file = flaky.folder / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
    if status is None and not file.is_file():
      status = 404
    if status is not None:
      again = {} if flaky.retry_after is None else {"Retry-After": flaky.retry_after}
      self._answer(status, f"HTTP {status}\n".encode(), again)
      return
    facts, content = file.stat(), file.read_bytes()
    tag = f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
    headers = {"Accept-Ranges": "bytes" if flaky.ranges else "none",
               "Last-Modified": email.utils.formatdate(facts.st_mtime, usegmt=True)}
    headers |= {"ETag": tag} if flaky.etag else {}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not (wanted and flaky.ranges and any(wanted.groups())):
      self._answer(200, content, headers, is_cut)
      return
    first, last = wanted.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= end:
      self._answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    else:
      told = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
      self._answer(206, content[start:end], headers | told, is_cut)

  do_HEAD = do_GET

  def _answer(self, status, body, headers, is_cut=False):
    self.server.flaky.log.append((self.command, self.path, self.headers.get("Range"), status))
    self.send_response(status)
    for name, value in {"Content-Length": len(body), **headers}.items():
      self.send_header(name, str(value))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body[:len(body) // 2] if is_cut else body)
    self.close_connection |= is_cut       # an early end is the only sign of a cut body

  def log_message(self, *_):
    """Keeps quiet: pytest shows what matters."""
