import pytest

from sdjax.files import write_whole


def test_a_file_appears_only_when_the_block_ends_well(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with pytest.raises(KeyboardInterrupt), write_whole(path, "w") as file:
    file.write("half")
    raise KeyboardInterrupt
  assert path.read_text() == "old"
  with write_whole(path, "w") as file:
    file.write("naïve")
    assert path.read_text() == "old"
  assert path.read_bytes() == "naïve".encode()
  (tmp_path / "b").touch()
  assert path.stat().st_mode == (tmp_path / "b").stat().st_mode
  (tmp_path / "b").unlink()
  assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
