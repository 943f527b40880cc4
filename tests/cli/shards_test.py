import subprocess
import sys
import time

import pytest
from PIL import Image

from sdjax.cli import shards
from sdjax.errors import UserError


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i in range(5):
    Image.new("RGB", (20 + i, 20), (40 * i, 0, 0)).save(folder / f"{i}.jpg")
    (folder / f"{i}.txt").write_text(f"number {i}")
  (folder / "bad.png").write_bytes(b"nothing")
  return folder


def test_pack_then_inspect(folder, tmp_path, capsys):
  out = tmp_path / "out"
  assert shards.main(["pack", str(folder), str(out), "--shard-size", "4"]) == 0
  printed = capsys.readouterr()
  assert "5 pictures in 2 shards" in printed.out and "1 left out, 0 without" in printed.out
  assert "bad.png: not a picture" in printed.err
  assert shards.main(["inspect", str(out / "{00000..00001}.tar")]) == 0
  printed = capsys.readouterr().out
  assert "5 good of 5" in printed and "JPEG RGB 5" in printed


def test_bad_input_is_a_user_error(folder, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  for argv in (["inspect", str(empty)], ["pack", str(empty), str(tmp_path / "out")],
               ["pack", str(folder), str(folder)]):
    with pytest.raises(UserError):
      shards.main(argv)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "pictures"]


def test_help_imports_nothing_heavy():
  code = ("import sys; from sdjax.cli import shards\n"
          "try: shards.main(['--help'])\n"
          "except SystemExit: print({'numpy', 'PIL', 'jax'} & set(sys.modules))")
  start = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip().endswith("set()") and "pack" in done.stdout
  assert time.monotonic() - start < 5
