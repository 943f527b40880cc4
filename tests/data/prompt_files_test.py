"""Lists of prompts: four kinds of files that say the same, and errors that name the line."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from sdjax.data import prompt_files
from sdjax.errors import UserError

DEFAULTS = {"negative_prompt": "", "seed": 100, "steps": 30, "guidance_scale": 7.5, "height": 64,
            "width": 64, "num_images": 1, "image": None, "mask": None, "strength": None}
LINES = [(1, {"prompt": "a cat, asleep", "seed": 2**64 - 1, "guidance_scale": 3.0}),
         (2, {"prompt": "čaj 茶", "negative_prompt": "blurry", "steps": 5, "height": 32,
              "width": 96, "num_images": 2})]


def write(folder, name, text):
  (folder / name).write_text(text, encoding="utf-8")
  return folder / name


def test_all_kinds_of_files_say_the_same(tmp_path):
  values = [given | {"image": "in/a.png", "strength": 0.5} for _, given in LINES]
  whole = [(number, given | {"image": str(tmp_path / "in" / "a.png")})
           for (number, _), given in zip(LINES, values)]
  jsonl = write(tmp_path, "p.jsonl", "".join(json.dumps(given) + "\n" for given in values))
  assert prompt_files.read(jsonl) == whole
  columns = list(prompt_files.KINDS)
  rows = [[str(given.get(name, "")) for name in columns] for given in values]
  csv = write(tmp_path, "p.csv", "".join(
      ",".join(f'"{cell}"' for cell in row) + "\n" for row in [columns, *rows]))
  # The header is a line, too.
  assert prompt_files.read(csv) == [(number + 1, given) for number, given in whole]


def test_parquet(tmp_path):
  table = pyarrow.table({
      "prompt": ["a cat", "a dog"], "seed": pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
      "guidance_scale": pyarrow.array([3, None], pyarrow.int32())})
  parquet.write_table(table, tmp_path / "p.parquet")
  assert prompt_files.read(tmp_path / "p.parquet") == [
      (1, {"prompt": "a cat", "seed": 2**64 - 1, "guidance_scale": 3.0}), (2, {"prompt": "a dog"})]
  parquet.write_table(table.rename_columns(["text", "seed", "guidance_scale"]),
                      tmp_path / "named.parquet")
  with pytest.raises(UserError, match="column 'text' is not known; known are prompt"):
    prompt_files.read(tmp_path / "named.parquet")
  with pytest.raises(UserError, match="p2.parquet is no .parquet"):
    prompt_files.read(write(tmp_path, "p2.parquet", "a cat"))


def test_text_keeps_the_numbers_of_its_lines(tmp_path):
  # Windows' mark and line ends; U+2028 ends a line for `str.splitlines`, not for editors.
  path = tmp_path / "p.txt"
  path.write_bytes("\ufeffa cat\r\n\r\n  a dog\u2028asleep \r\n".encode())
  assert prompt_files.read(path) == [(1, {"prompt": "a cat"}), (3, {"prompt": "a dog\u2028asleep"})]


def test_every_copy_has_a_seed_of_its_own():
  made = prompt_files.expand([*LINES[1:], (3, {"prompt": "c", "seed": 7, "num_images": 2}),
                          (4, {"prompt": "d"})], DEFAULTS, "p.jsonl")
  assert [(r.line, r.copy, r.seed) for r in made] == [
      (2, 0, 100), (2, 1, 101), (3, 0, 7), (3, 1, 8), (4, 0, 104)]
  assert (made[0].steps, made[0].height, made[0].width, made[0].guidance_scale) == (5, 32, 96, 7.5)
  assert (made[4].steps, made[4].height, made[4].negative_prompt) == (30, 64, "")


def test_copies_share_their_files():
  image = prompt_files.Picture("a.png", "89ab")
  one, other = prompt_files.expand(
      [(1, {"prompt": "c", "image": image, "strength": 0.5, "num_images": 2})], DEFAULTS, "")
  assert (one.image, one.mask, one.strength) == (image, None, 0.5)
  assert (other.image, other.seed) == (image, 101)


def test_copies_beyond_64_bits_are_told():
  with pytest.raises(UserError, match="p.jsonl line 3: seed is 18446744073709551616; it must"):
    prompt_files.expand([(3, {"prompt": "c", "seed": 2**64 - 1, "num_images": 2})], DEFAULTS,
                    "p.jsonl")


@pytest.mark.parametrize("name, text, message", [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "steps": 0}', "line 2: steps is 0.*1 and 1000"),
    ("p.jsonl", '{"prompt": "a", "guidance_scale": NaN}', "line 1: guidance_scale is nan"),
    ("p.jsonl", '{"prompt": "a", "seed": 18446744073709551616}', "line 1: seed is 184467"),
    ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed is True; it must be int"),
    ("p.jsonl", '{"prompt": "a", "height": 64.5}', "line 1: height is 64.5; it must be int"),
    ("p.jsonl", '{"prompt": "\\ud83d"}', "line 1: prompt .*half a character"),
    ("p.jsonl", '{"prompt": "a", "guidance_scale": 1%s}' % ("0" * 400), "between 0 and 1000"),
    ("p.jsonl", '{"prompt": "a", "seed": 1%s}' % ("0" * 5000), "line 1: not JSON.*digits"),
    ("p.jsonl", '{"prompt": "a", "strength": 1.5}', "line 1: strength is 1.5.*0 and 1"),
    ("p.jsonl", '{"prompt": "a", "image": 3}', "line 1: image is 3; it must be str"),
    ("p.jsonl", '\n["a"]', "line 2: no object"),
    ("p.csv", "prompt,seed\na,1\nb,x\n", "line 3: seed is 'x'; it must be int"),
    ("p.csv", "prompt,seed\na cat, asleep,1\n", "line 2: not 2 columns"),
    ("p.csv", "prompt,seed\n,1\n", 'line 2: no "prompt"'),
    ("p.csv", "prompt,colour\na,b\n", "line 2: 'colour' is not known"),
    ("p.csv", "prompt\na\n" + 200_000 * "b", "line 2: not CSV.*limit"),
    ("p.csv", "prompt\n", "holds no prompts"),
    ("p.json", "[]", "none of .txt, .jsonl, .csv, .parquet"),
])
def test_bad_files_name_the_line(tmp_path, name, text, message):
  with pytest.raises(UserError, match=message):
    prompt_files.read(write(tmp_path, name, text))


def test_text_that_is_not_utf8_is_told(tmp_path):
  (tmp_path / "p.csv").write_bytes(b"prompt\n\xff\n")
  with pytest.raises(UserError, match="not UTF-8.*byte 7"):
    prompt_files.read(tmp_path / "p.csv")
