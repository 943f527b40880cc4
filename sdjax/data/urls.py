"""Shard addresses spelled out: ranges, globs, folders and files of lines → one address per tar."""

import fnmatch
import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdjax.data.storage import Storage
from sdjax.errors import UserError


def expand(urls: str | Path | Sequence[str | Path], storage: Storage) -> list[str]:
  """Addresses of the tars that `urls` mean, in order, each once.

  Local tars must exist. Remote ones that are spelled out are taken on trust: asking for each of
  LAION's 41,408 would delay the start, and reading tells soon enough.

  Args:
    urls: one or several of, local or with http(s)://, gs://, s3:// before them:
      a tar;
      a folder of tars;
      a glob ("data/*.tar"; remote ones in the last part only);
      a range with braces ("data/{00000..00041}.tar", "{a,b}/00000.tar");
      a file that holds one of these per line ("shards.txt", or "@FILE" by any other name), where
      `#` begins a comment and relative paths start from the working directory.
    storage: lists the folders and reads the files.

  Raises:
    UserError: one of them matches nothing, or is on a web server and would need a listing.
    Unreachable: a listing, or a file of lines, could not be read.
  """
  found = []
  for url in [urls] if isinstance(urls, str | Path) else urls:
    found += itertools.chain.from_iterable(
        _tars(line, storage) for line in _lines(str(url), storage))
  if not found:
    raise UserError("no shards given; give a tar or a folder that holds tars")
  return list(dict.fromkeys(found))


def _lines(url: str, storage: Storage) -> Iterator[str]:
  """`url`, or if it is a file of lines these."""
  if not url.startswith("@") and not url.endswith(".txt"):
    yield url
    return
  name = url.removeprefix("@")
  try:
    text = storage.read_all(name).decode()
  except FileNotFoundError as error:
    raise UserError(f"list of shards {name} does not exist; mend the path") from error
  except UnicodeDecodeError as error:
    raise UserError(f"list of shards {name} is not UTF-8 ({error.reason}); give a text with one "
                    "address per line") from error
  for number, line in enumerate(text.splitlines(), 1):
    line = re.sub(r"(^|\s)#.*", "", line).strip()  # a # within an address is a part of it
    if line.startswith("@") or line.endswith(".txt"):
      raise UserError(f"{name} line {number} names another list, {line}; put its lines here")
    if line:
      yield line


def _tars(url: str, storage: Storage) -> list[str]:
  """Tars that one address means, braces, globs and folders included."""
  url = url.removeprefix("file://")
  matches = _remote_matches if "://" in url else _local_matches
  found = [tar for place in _expand_braces(url) for tar in matches(place, storage)]
  if not found:
    raise UserError(f"no shards match {url}, for there is no .tar; give a tar, a folder of tars, a "
                    "glob or a range such as data/{00000..00041}.tar; `sdjax shards pack` makes "
                    "shards of pictures")
  return found


def _expand_braces(url: str) -> list[str]:
  """"a{08..10}" → a08 a09 a10, padded like the first number; "{x,y}" → x y; left to right."""
  match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", url)
  if match is None:
    return [url]
  first, last, listed = match.groups()
  if listed is None:
    if int(last) < int(first):
      raise UserError(f"range {match.group()} in {url} runs backwards; put the lower number first")
    choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
  else:
    choices = listed.split(",")
  heads, tail = url[:match.start()], url[match.end():]
  return [expanded for choice in choices for expanded in _expand_braces(heads + choice + tail)]


def _local_matches(path: str, storage: Storage) -> list[str]:
  """A named file must exist, so that a gap in a range is told."""
  place = Path(path).expanduser()
  if place.is_dir():
    return _tars_in(str(place), "*", storage)
  if glob.has_magic(path) and not place.exists():
    return sorted(found for found in glob.glob(str(place)) if found.endswith(".tar"))
  if not place.is_file():
    raise UserError(f"shard {path} does not exist; mend the path or the range")
  return [str(place)]


def _remote_matches(url: str, storage: Storage) -> list[str]:
  """Asks the server only where a listing is needed; web servers have none, which it will say."""
  on_web = url.lower().startswith(("http://", "https://"))
  # In addresses of the web, ? begins a query and brackets may stand for themselves.
  has_magic = "*" in url if on_web else glob.has_magic(url)
  folder, _, pattern = url.rpartition("/")
  if has_magic and glob.has_magic(folder):
    raise UserError(f"{url} has wildcards before its last part; use braces there")
  if has_magic:
    return _tars_in(folder, pattern, storage)
  if url.endswith("/") or not (on_web or url.endswith(".tar")):
    return _tars_in(url.rstrip("/"), "*", storage)
  return [url]


def _tars_in(folder: str, pattern: str, storage: Storage) -> list[str]:
  try:
    names = storage.list(folder)
  except FileNotFoundError as error:
    raise UserError(f"folder {folder} does not exist; mend the address") from error
  # Hidden ones are no shards: macOS leaves a ._00000.tar beside each that it copies.
  return [f"{folder}/{name}" for name in names
          if name.endswith(".tar") and name[0] != "." and fnmatch.fnmatchcase(name, pattern)]
