import collections
import io
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from flaky_server import FlakyServer
from PIL import Image

from sdjax.cli import shards
from sdjax.data import pack
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


def index(capsys, *argv):
  """Exit code and what was printed."""
  code = shards.main(["index", "--processes", "1", *argv])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def test_index_tells_what_filters_would_drop_and_is_resumed(folder, tmp_path, capsys):
  out = tmp_path / "out"
  shards.main(["pack", str(folder), str(out), "--shard-size", "2"])
  capsys.readouterr()
  code, printed, _ = index(capsys, str(out), "--filter", "min_side_px >= 20", "--filter",
                           "width > 22", "--filter", "aesthetic > 5 or missing")
  lines = [line.split() for line in printed.splitlines()]
  assert code == 0
  assert ["samples", "5"] in lines and ["kept", "2", "(40.0%)"] in lines
  assert ["3", "dropped:", "width", ">", "22"] in lines and len(lines) == 4
  made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.parquet")}
  assert sorted(made) == [f"{i:05d}.index.parquet" for i in range(3)]
  (out / "00001.index.parquet").unlink()
  blob = (out / "00002.tar").read_bytes()
  (out / "00002.tar").write_bytes(blob[:300])                # another tar, cut in its first header
  with pytest.raises(UserError, match="00002.tar"):
    index(capsys, str(out))
  (out / "00002.tar").write_bytes(blob[:700])
  code, printed, _ = index(capsys, str(out))
  assert code == 0 and "samples    4\n" in printed and "1  found: truncated shard" in printed
  again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.parquet")}
  assert {name for name in made if again[name] == made[name]} == {"00000.index.parquet"}


def test_index_is_shared_out_among_hosts(folder, tmp_path, capsys, monkeypatch):
  out = tmp_path / "out"
  shards.main(["pack", str(folder), str(out), "--shard-size", "1"])
  for process, made in ((1, [1, 3, 5]), (0, [0, 1, 2, 3, 4, 5])):  # the last holds no sample
    monkeypatch.setenv("SDJAX_PROCESS_ID", str(process))
    monkeypatch.setenv("SDJAX_NUM_PROCESSES", "2")
    assert index(capsys, str(out))[0] == 0
    assert sorted(int(path.name[:5]) for path in out.glob("*.parquet")) == made
  for process in ("2", "-1", "x", None):
    monkeypatch.delenv("SDJAX_PROCESS_ID") if process is None else monkeypatch.setenv(
        "SDJAX_PROCESS_ID", process)
    with pytest.raises(UserError, match="SDJAX_NUM_PROCESSES=2"):
      index(capsys, str(out))


def test_index_of_remote_shards_goes_on_without_one_that_is_missing(folder, tmp_path, capsys):
  out, kept = tmp_path / "out", tmp_path / "indices"
  shards.main(["pack", str(folder), str(out), "--shard-size", "2"])
  with FlakyServer(out) as server:
    code, printed, told = index(
        capsys, f"{server.url}/{{00000..00003}}.tar", "--folder", str(kept))
  assert code == 1 and len(list(kept.iterdir())) == 3
  assert "samples    5\n" in printed and "1 that cannot be read" in printed
  (line,) = [line for line in told.splitlines() if "left out" in line and "00003.tar" in line]
  assert line.count("00003.tar") == 1


def test_index_in_several_processes(folder, tmp_path, capsys):
  out = tmp_path / "out"
  shards.main(["pack", str(folder), str(out), "--shard-size", "2"])
  assert shards.main(["index", str(out), "--processes", "2", "--filter", "width > 22"]) == 0
  assert "3  dropped: width > 22" in capsys.readouterr().out
  assert len(list(out.glob("*.index.parquet"))) == 3
  (out / "00001.tar").write_bytes(b"no tar")
  with pytest.raises(UserError, match="00001.tar"):
    shards.main(["index", str(out), "--processes", "2"])


def test_bad_input_is_a_user_error(folder, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  for argv in (["inspect", str(empty)], ["pack", str(empty), str(tmp_path / "out")],
               ["pack", str(folder), str(folder)], ["index", str(empty)],
               ["index", str(folder), "--processes", "0"], ["index", str(folder), "--filter", "a"]):
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


def test_inspect_tells_scores_and_shares_of_bytes(tmp_path, capsys):
  def samples():
    for i in range(21):
      file = io.BytesIO()
      Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)).save(
          file, "PNG")
      scores = {"aesthetic": i / 4, "punsafe": float("nan")} | ({"similarity": 0.3} if i else {})
      yield {"png": file.getvalue(), "txt": "x" * 100, "json": scores}
  pack.write_shards(samples(), tmp_path / "out")
  assert shards.main(["inspect", str(tmp_path / "out")]) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line.split()[1:] for line in lines if line}
  assert rows["aesthetic"] == ["0", "0.25", "2.5", "4.75", "5", "0"]
  assert rows["similarity"] == ["0.3"] * 5 + ["1"] and "punsafe" not in rows
  sizes = collections.Counter()
  with tarfile.open(tmp_path / "out/00000.tar") as tar:
    for member in tar:
      sizes[member.name.partition(".")[2]] += member.size
  whole = (tmp_path / "out/00000.tar").stat().st_size
  sizes = dict(sizes.most_common()) | {"the rest": whole - sizes.total()}
  assert f"bytes      {', '.join(f'{k} {n / whole:.1%}' for k, n in sizes.items())}" in lines


def test_inspect_takes_a_folder_and_draws_a_sheet(folder, tmp_path, capsys):
  assert shards.main(["inspect", str(folder), "--sheet", str(tmp_path / "sheet.png"), "4"]) == 0
  printed = capsys.readouterr().out
  assert "5 good of 6" in printed and "not a picture, such as" in printed
  assert "shards     none" in printed
  page = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
  assert page.shape[1] > 2 * 192
  for red in (0, 40, 80, 120):  # the four pictures, whose long sides fill their cells
    filled = (abs(page - (red, 0, 0)).max(axis=2) < 4).sum()
    assert 192 * 150 < filled <= 192 * 192 + 2000
  for wrong in (["zero"], ["0"], ["4", "5"]):
    with pytest.raises(UserError, match="--sheet"):
      shards.main(["inspect", str(folder), "--sheet", str(tmp_path / "no.png"), *wrong])


def test_encode_makes_what_is_missing(tiny_model, tmp_path, capsys):
  from sdjax.checkpoints import diffusers
  sd, params = tiny_model
  diffusers.save(tmp_path / "model", sd, params)
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i in range(5):
    Image.new("RGB", (20 + i, 20), (40 * i, 0, 0)).save(folder / f"{i}.jpg")
  (folder / "bad.png").write_bytes(b"nothing")
  pack.pack(pack.find_sources(folder), folder, tmp_path / "shards", 2)
  out = tmp_path / "latents"
  line = ["encode", "--model", str(tmp_path / "model"), "--resolution", "16", "--shard-size", "2",
          "--batch-size", "2", "--filter", "width > 20", str(tmp_path / "shards"), str(out)]
  for _ in range(2):
    assert shards.main(line) == 0
    assert "4 encoded pictures in 2 of 2 shards" in capsys.readouterr().out
    (out / "00001.tar").unlink()
  with pytest.raises(UserError, match="other source, samples"):
    shards.main([*line, "--filter", "width > 21"])
  with pytest.raises(UserError, match="--mesh"):
    shards.main([*line, "--mesh", "two"])
