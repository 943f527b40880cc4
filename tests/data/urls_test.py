import fsspec
import pytest
from flaky_server import FlakyServer

from sdjax.data import urls
from sdjax.data.storage import Storage, Unreachable
from sdjax.errors import UserError

NAMES = ("00000.tar", "00001.tar", "00002.tar", "00000_stats.json", "00000.parquet", "._00000.tar",
         "within/00003.tar")


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Shards as img2dataset leaves them, and as the working directory."""
  for name in NAMES:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def bucket():
  """The same in memory, which fsspec addresses as it does gs:// and s3://."""
  system = fsspec.filesystem("memory")
  for name in NAMES:
    system.pipe_file(f"/urls_test/{name}", b"")
  yield "memory://urls_test"
  system.rm("/urls_test", recursive=True)


@pytest.fixture(params=["local", "memory"])
def base(request):
  if request.param == "local":
    return str(request.getfixturevalue("folder"))
  return request.getfixturevalue("bucket")


def expand(given):
  return urls.expand(given, Storage(attempts=2, pause_s=1e-4))


def names(base, given):
  """What `given`, with % for the folder, means, without the folder."""
  given = [given] if isinstance(given, str) else given
  found = expand([url.replace("%", base) for url in given])
  assert all(path.startswith(f"{base}/") for path in found)
  return [path.removeprefix(f"{base}/").removesuffix(".tar") for path in found]


@pytest.mark.parametrize("given, meant", [
    ("%/00001.tar", ["00001"]),
    ("%", ["00000", "00001", "00002"]),
    ("%/", ["00000", "00001", "00002"]),
    ("%/*", ["00000", "00001", "00002"]),
    ("%/*[12].tar", ["00001", "00002"]),
    ("%/0000?.tar", ["00000", "00001", "00002"]),
    ("%/{00001..00002}.tar", ["00001", "00002"]),
    ("%/0000{2,0}.tar", ["00002", "00000"]),
    ("%{/within,}", ["within/00003", "00000", "00001", "00002"]),
    ("%/{00000,within/00003}.tar", ["00000", "within/00003"]),
    (["%/00002.tar", "%/*.tar", "%/00000.tar"], ["00002", "00000", "00001"])])
def test_what_is_meant(base, given, meant):
  assert names(base, given) == meant


def test_braces_multiply_and_keep_their_width(bucket):
  found = expand(f"{bucket}/{{a,b}}/{{08..11}}-{{0..1}}.tar")      # taken on trust
  assert found == [f"{bucket}/{letter}/{i:02d}-{j}.tar"
                   for letter in "ab" for i in range(8, 12) for j in range(2)]
  assert len(expand("gs://bucket/{00000..41407}.tar")) == 41408


def test_files_of_lines(base, bucket):
  lines = ("# LAION, by hand\r\n", f"{base}/{{00001..00002}}.tar  # a range\n", "\n",
           f"  {base}/within\n", "https://host/a#b.tar\n")
  system = fsspec.filesystem("memory")
  for name in ("list.txt", "list.of shards"):
    system.pipe_file(f"/urls_test/{name}", "".join(lines).encode())
  meant = [f"{base}/00001.tar", f"{base}/00002.tar", f"{base}/within/00003.tar",
           "https://host/a#b.tar"]
  for given in (f"{bucket}/list.txt", f"@{bucket}/list.txt", f"@{bucket}/list.of shards"):
    assert expand(given) == meant
  assert expand([f"{base}/00000.tar", f"{bucket}/list.txt"]) == [f"{base}/00000.tar", *meant]


def test_paths_may_be_relative_or_begin_at_home(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder))
  (folder / "list").write_text("00001.tar\n~/00002.tar\n")
  assert expand("@list") == ["00001.tar", f"{folder}/00002.tar"]
  assert expand("~/within") == [f"{folder}/within/00003.tar"]
  assert expand(f"file://{folder}/00000.tar") == [f"{folder}/00000.tar"]
  assert expand([folder / "00001.tar"]) == expand(folder / "00001.tar")
  assert expand("*/*.tar") == ["within/00003.tar"]


def test_addresses_of_the_web_are_taken_as_they_are(folder):
  signed = "https://host/00000.tar?X-Amz-Signature=1[2]"
  assert expand([signed, "http://host/{0..1}.tar"]) == [
      signed, "http://host/0.tar", "http://host/1.tar"]
  with FlakyServer(folder) as server:
    (folder / "list.txt").write_text(f"{server.url}/{{00000..00001}}.tar\n")
    assert expand(f"{server.url}/list.txt") == [
        f"{server.url}/00000.tar", f"{server.url}/00001.tar"]
    assert server.count == 1
    server.status = 503
    with pytest.raises(Unreachable):
      expand(f"{server.url}/list.txt")
  for url in ("https://host/*.tar", "https://host/shards/"):
    with pytest.raises(UserError, match="do not list their files"):
      expand(url)


@pytest.mark.parametrize("given, said", [
    ("%/*.zip", "no shards match"), ("%/empty", "no shards match .*/empty"),
    ("%/nowhere/", "nowhere.* does not exist"), ("@%/nowhere", "list of shards .* does not exist"),
    ("%/other.txt", "line 2 names another list, @x"), ("%/latin.txt", "not UTF-8"),
    ("%/{3..1}.tar", "backwards"), ("%/nothing.txt", "no shards given"), ([], "no shards given")])
def test_what_means_nothing_is_a_user_error(base, folder, given, said):
  files = {"other.txt": b"00000.tar\n@x", "latin.txt": b"caf\xe9.tar", "nothing.txt": b"# none\n",
           "empty/x.json": b"{}"}
  (folder / "empty").mkdir()
  for name, content in files.items():
    (folder / name).write_bytes(content)
    if base.startswith("memory"):
      fsspec.filesystem("memory").pipe_file(f"/urls_test/{name}", content)
  with pytest.raises(UserError, match=said):
    expand(given.replace("%", base) if isinstance(given, str) else given)


def test_gaps_and_wildcards_that_cannot_be_followed(folder, bucket):
  with pytest.raises(UserError, match="00003.tar does not exist"):
    expand("{00001..00003}.tar")
  with pytest.raises(UserError, match="before its last part"):
    expand(f"{bucket}/*/00003.tar")
