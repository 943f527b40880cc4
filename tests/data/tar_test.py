import io
import tarfile

import pytest

from sdjax.data import tar
from sdjax.errors import UserError


def write(path, members, form=tarfile.USTAR_FORMAT):
  with tarfile.open(path, "w", format=form) as archive:
    for name, blob in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(blob)
      archive.addfile(member, io.BytesIO(blob))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extents_give_the_bytes_that_were_written(tmp_path, form):
  members = {f"{i:03d}.{part}": bytes([i]) * (i * 37) + part.encode()
             for i in range(20) for part in ("jpg", "TXT", "seg.png")}
  if form != tarfile.USTAR_FORMAT:
    members["日本" * 60 + ".jpg"] = b"long name"
  write(tmp_path / "a.tar", members, form)
  contents = tar.scan(tmp_path / "a.tar")
  assert not contents.truncated
  for name, blob in members.items():
    key, part = tar.split_name(name)
    assert tar.read(tmp_path / "a.tar", [contents.samples[key][part]]) == [blob]
  assert list(contents.samples["003"]) == ["jpg", "txt", "seg.png"]


def test_keys_are_webdatasets():
  assert tar.split_name("x.y/0001.seg.PNG") == ("x.y/0001", "seg.png")
  assert tar.split_name("000000012.jpg") == ("000000012", "jpg")


def test_a_tar_cut_anywhere_keeps_exactly_the_samples_before_the_cut(tmp_path):
  members = {f"{i}.{part}": b"x" * 700 for i in range(3) for part in ("jpg", "txt")}
  write(tmp_path / "a.tar", members)
  blob = (tmp_path / "a.tar").read_bytes()
  whole = tar.scan(tmp_path / "a.tar").samples
  for cut in range(600, 6 * 1536, 256):
    (tmp_path / "cut.tar").write_bytes(blob[:cut])
    found = tar.scan(tmp_path / "cut.tar")
    # A member takes 512 + 1024 bytes. The sample of the last header before the cut is left out:
    # even when two members of it are whole, a third might have followed.
    headers = (cut - 512) // 1536 + 1
    assert list(found.samples) == list(whole)[:(headers - 1) // 2], cut
    assert found.truncated, cut


def test_nonsense_in_the_middle_is_told(tmp_path):
  write(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 100 for i in range(4)})
  blob = bytearray((tmp_path / "a.tar").read_bytes())
  blob[2048:2560] = b"\xff" * 512
  (tmp_path / "a.tar").write_bytes(blob)
  contents = tar.scan(tmp_path / "a.tar")
  assert contents.truncated and list(contents.samples) == ["0"]


def test_what_is_no_tar_is_a_user_error(tmp_path):
  for blob in (b"", b"hello" * 500):
    (tmp_path / "a.tar").write_bytes(blob)
    with pytest.raises(UserError, match=r"a\.tar"):
      tar.scan(tmp_path / "a.tar")


def test_a_shard_that_shrank_is_a_user_error(tmp_path):
  write(tmp_path / "a.tar", {"0.jpg": b"x" * 5000})
  extent = tar.scan(tmp_path / "a.tar").samples["0"]["jpg"]
  (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
  with pytest.raises(UserError, match="changed"):
    tar.read(tmp_path / "a.tar", [extent])
