import io
import random
import tarfile

import pytest

from sdjax.data import index, tar
from sdjax.data.storage import Storage
from sdjax.errors import UserError


def write(path, members, form=tarfile.USTAR_FORMAT):
  with tarfile.open(path, "w", format=form) as archive:
    for name, blob in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(blob)
      archive.addfile(member, io.BytesIO(blob))


def scan(path):
  """Key → part → (offset, size)."""
  samples = {}
  with open(path, "rb") as file:
    for name, *extent in tar.members(file, str(path)):
      key, part = tar.split_name(name)
      samples.setdefault(key, {})[part] = tuple(extent)
  return samples


def keys_before_the_break(path):
  """Those that an index keeps of a tar, which must be told to break off."""
  table = index.scan(Storage(), str(path))
  assert index.facts_of(table)["truncated"]
  return table["key"].to_pylist()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_extents_give_the_bytes_that_were_written(tmp_path, form):
  members = {f"{i:03d}.{part}": bytes([i]) * (i * 37) + part.encode()
             for i in range(20) for part in ("jpg", "TXT", "seg.png")}
  if form != tarfile.USTAR_FORMAT:
    members["日本" * 60 + ".jpg"] = b"long name"
  write(tmp_path / "a.tar", members, form)
  samples = scan(tmp_path / "a.tar")  # does not break off
  for name, blob in members.items():
    key, part = tar.split_name(name)
    assert Storage().read(str(tmp_path / "a.tar"), [samples[key][part]]) == [blob]
  assert list(samples["003"]) == ["jpg", "txt", "seg.png"]


def test_keys_are_webdatasets():
  assert tar.split_name("x.y/0001.seg.PNG") == ("x.y/0001", "seg.png")
  assert tar.split_name("000000012.jpg") == ("000000012", "jpg")


def test_a_tar_cut_anywhere_keeps_exactly_the_samples_before_the_cut(tmp_path):
  members = {f"{i}.{part}": b"x" * 700 for i in range(3) for part in ("jpg", "txt")}
  write(tmp_path / "a.tar", members)
  blob = (tmp_path / "a.tar").read_bytes()
  whole = list(scan(tmp_path / "a.tar"))
  for cut in range(600, 6 * 1536, 256):
    (tmp_path / "cut.tar").write_bytes(blob[:cut])
    found = keys_before_the_break(tmp_path / "cut.tar")
    # A member takes 512 + 1024 bytes. The sample of the last header before the cut is left out:
    # even when two members of it are whole, a third might have followed.
    headers = (cut - 512) // 1536 + 1
    assert found == whole[:(headers - 1) // 2], cut


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, form):
  with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers={"comment": "of all"}) as out:
    for number, name in enumerate((
        "0.jpg", "folder/", "x" * 90 + "/" + "y" * 60 + ".jpg", "ünï/0.txt", "link", "hard",
        *([] if form == tarfile.USTAR_FORMAT else ["日本/" * 60 + "0.jpg"]), "last.json")):
      member = tarfile.TarInfo(name)
      member.mtime = 1234567890 + (0 if form != tarfile.PAX_FORMAT else 0.5)  # as webdataset's
      member.type = {"folder/": tarfile.DIRTYPE, "link": tarfile.SYMTYPE,
                     "hard": tarfile.LNKTYPE}.get(name, tarfile.REGTYPE)
      member.linkname = "0.jpg" * 40 if name == "link" and form != tarfile.USTAR_FORMAT else "0.jpg"
      member.size = number * 511 if member.isreg() else 0
      out.addfile(member, io.BytesIO(b"d" * member.size))
  with tarfile.open(tmp_path / "a.tar") as archive:
    expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
  with open(tmp_path / "a.tar", "rb") as file:
    assert list(tar.members(file, "a.tar")) == expected
  assert len(expected) >= 4


def _header(**fields):
  """A header with fields of our own, which tarfile would not write."""
  member = tarfile.TarInfo("0.jpg")
  block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
  for place, value in fields.values():
    block[place:place + len(value)] = value
  block[148:156] = b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


def test_sizes_in_base_256_and_of_pax_records(tmp_path):
  size = _header(size=(124, b"\x80" + (700).to_bytes(11, "big")))
  record = b"17 comment=a\nb=c\n12 size=700\n"
  pax = _header(size=(124, b"%011o\0" % len(record)), kind=(156, b"x")) + record.ljust(512, b"\0")
  data = b"d" * 700 + bytes(324)
  (tmp_path / "a.tar").write_bytes(size + data + pax + _header(name=(0, b"1.jpg")) + data
                                   + bytes(1024))
  assert scan(tmp_path / "a.tar") == {
      "0": {"jpg": (512, 700)}, "1": {"jpg": (512 + 1024 + 1536, 700)}}


def test_sparse_files_are_refused(tmp_path):
  (tmp_path / "a.tar").write_bytes(_header(kind=(156, b"S")) + bytes(1024))
  with pytest.raises(UserError, match="sparse"):
    scan(tmp_path / "a.tar")


def test_damage_of_any_kind_ends_the_scan_and_nothing_else(tmp_path):
  rng = random.Random(0)
  for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
    write(tmp_path / "a.tar", {"n" * 200 + f"{i}.jpg": b"x" * 300 for i in range(3)}, form)
    whole = (tmp_path / "a.tar").read_bytes()
    for _ in range(300):
      blob = bytearray(whole)
      start = 512 * rng.randrange(len(blob) // 512)
      for _ in range(rng.choice((1, 3, 100))):
        blob[start + rng.randrange(512)] = rng.choice(b"0179xLKgS\0 \xff\x80-")
      if rng.random() < 0.5:  # damage that the checksum does not see
        blob[start + 148:start + 156] = b" " * 8
        blob[start + 148:start + 156] = b"%06o\0 " % sum(blob[start:start + 512])
      try:
        found = tar.members(io.BytesIO(blob), "a.tar")
        assert len(list(found)) <= len(blob) // 512
      except (tar.Truncated, UserError):
        pass


def test_nonsense_in_the_middle_is_told(tmp_path):
  write(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 100 for i in range(4)})
  blob = bytearray((tmp_path / "a.tar").read_bytes())
  blob[2048:2560] = b"\xff" * 512
  (tmp_path / "a.tar").write_bytes(blob)
  assert keys_before_the_break(tmp_path / "a.tar") == ["0"]


def test_what_is_no_tar_is_a_user_error(tmp_path):
  for blob in (b"", b"hello" * 500):
    (tmp_path / "a.tar").write_bytes(blob)
    with pytest.raises(UserError, match=r"a\.tar"):
      scan(tmp_path / "a.tar")


def test_a_shard_that_shrank_is_a_user_error(tmp_path):
  write(tmp_path / "a.tar", {"0.jpg": b"x" * 5000})
  extent = scan(tmp_path / "a.tar")["0"]["jpg"]
  (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
  with pytest.raises(UserError, match="changed"):
    Storage().read(str(tmp_path / "a.tar"), [extent])
