"""A list of prompts: few shapes, and after any number of kills the right pictures, each once.

What draws here is a fake that needs no compiler: each picture is a pure function of what is asked.
"""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from sdjax import pictures, prompt_list
from sdjax.data.prompt_files import Picture, Wanted
from sdjax.data.sources import open_source
from sdjax.errors import UserError

SETTINGS = {"model": "models/sd15.safetensors", "fingerprint": "0123", "sampler": None,
            "clip_skip": 0}


class Killed(BaseException):
  """Stands for SIGKILL: no code may catch it."""


def ask(number, **changes):
  chosen = dict(negative_prompt="", seed=number, steps=4, guidance_scale=2.0, height=32, width=32,
                line=number + 1, copy=0)
  return Wanted(**{"prompt": f"picture {number}"} | chosen | changes)


# Sizes, steps and scales alternate, so that batches do not follow the list.
LIST = [ask(number, width=(32, 48)[number % 2], steps=(4, 6, 4)[number % 3],
                guidance_scale=(2.0, 1.0, 3.0, 2.0)[number % 4],
                negative_prompt=("", "blurry")[number % 5 == 0]) for number in range(23)]


def job(out, wanted=LIST, settings=SETTINGS, shard_size=None, restartable=True):
  return prompt_list.Job(
      out, wanted, settings, lambda one: f"seed {one.seed}", shard_size, restartable)


def plan(sd, wanted, batch_size):
  return prompt_list.plan(sd, wanted, False, batch_size)


def draw(one):
  digest = hashlib.sha256(repr(dataclasses.replace(one, line=0, copy=0)).encode()).digest()
  rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
  return rng.uniform(-1, 1, (one.height, one.width, 3)).astype(np.float32)


def expected(one):
  return pictures.to_uint8(draw(one))


class Artist:
  """Draws what jobs want; `drawn` has the numbers of each batch."""

  def __init__(self, sd):
    self.sd, self.drawn = sd, []

  def run(self, job, **options):
    def make(batch):
      self.drawn.append(batch)
      images = np.stack([draw(job.wanted[number]) for number in batch])
      return images, np.zeros((len(batch), *np.array(images.shape[1:3]) // 4, 4), np.float32)
    return prompt_list.run(job, plan(self.sd, job.wanted, 4), make, **options)


@pytest.fixture
def artist(tiny_model):
  return Artist(tiny_model[0])


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def lines(folder):
  header, *rest = [json.loads(line) for line in
                   (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
  return header, rest


def assert_whole(folder, wanted=LIST):
  """Each picture is there, the one that was asked for, and the manifest has it in its place."""
  assert names(folder) == [f"{number:05d}.png" for number in range(len(wanted))] + [
      "manifest.jsonl"]
  header, rest = lines(folder)
  assert header["pictures"] == len(wanted)
  assert [line["file"] for line in rest] == names(folder)[:-1]
  for line, one in zip(rest, wanted, strict=True):
    assert line["seed"] == one.seed and line["line"] == one.line
    with Image.open(folder / line["file"]) as picture:
      np.testing.assert_array_equal(np.asarray(picture), expected(one))


def test_few_shapes_and_every_picture_once(tiny_model):
  sd = tiny_model[0]
  batches = plan(sd, LIST, 4)
  made = [number for batch in batches for number in dict.fromkeys(batch)]
  assert sorted(made) == list(range(len(LIST)))
  sizes = {}
  for batch in batches:
    (shape, _), = {((LIST[n].width, LIST[n].guidance_scale == 1), LIST[n].steps) for n in batch}
    sizes.setdefault(shape, set()).add(len(batch))
  # The last but one has 3 pictures of 4 steps and 2 of 6.
  assert sizes == {(32, False): {4}, (48, False): {3}, (48, True): {4}}
  # Alone on the list, a few pictures are not filled up.
  assert plan(sd, LIST[:1], 4) == [[0]]


def test_prompts_of_other_lengths_do_not_share_a_batch(tiny_model):
  sd = tiny_model[0]
  long = "a red circle, " * 40
  wanted = [ask(0), ask(1, prompt=long), ask(2, negative_prompt=long), ask(3)]
  chunks = [sd.tokenize_long([one.prompt, one.negative_prompt], False)[0].shape[-1]
            for one in wanted]
  batches = plan(sd, wanted, 8)
  assert chunks[0] < chunks[1] and [0, 3] in batches
  # Where no negative prompt means zeros, it does so for a whole batch.
  zeros = dataclasses.replace(sd, zeros_for_empty_prompt=True)
  wanted = [ask(0), ask(1, negative_prompt="blurry"), ask(2)]
  assert plan(sd, wanted, 8) == [[0, 1, 2]]
  assert plan(zeros, wanted, 8) == [[0, 2], [1, 1]]


def test_undisturbed(tmp_path, artist):
  kept = artist.run(job(tmp_path / "out"))
  assert kept == {}
  assert_whole(tmp_path / "out")
  count = len(artist.drawn)
  artist.run(job(tmp_path / "out"))
  assert len(artist.drawn) == count  # nothing was left to do
  with Image.open(tmp_path / "out" / "00005.png") as picture:
    assert picture.text["parameters"] == "seed 5"
    told = json.loads(picture.text["sdjax"])
  assert (told["prompt"], told["seed"], told["fingerprint"]) == ("picture 5", 5, "0123")


@pytest.mark.parametrize("shard_size", [None, 5])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    tmp_path, artist, monkeypatch, shard_size):
  out = tmp_path / "out"
  monkeypatch.setattr(prompt_list, "WRITERS", 1)
  artist.run(job(tmp_path / "whole", shard_size=shard_size))
  whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names(tmp_path / "whole")}
  written, life = [], 0                                # how many files may still move or go

  def step():
    nonlocal life
    if life == 0:
      raise Killed
    life -= 1

  def replace(source, target, move=os.replace):
    step()
    move(source, target)
    written.append(target.name)

  def unlink(path, missing_ok=False):
    if path.name.startswith(".") and life == 0:
      return                                           # `write_whole`, which a kill gives no time
    step()
    if not missing_ok or path.exists():
      os.remove(path)

  monkeypatch.setattr("sdjax.files.os.replace", replace)
  monkeypatch.setattr(type(out), "unlink", unlink)
  for starts in range(100):
    life = 2 * starts                                  # each start lives longer than the one before
    try:
      artist.run(job(out, shard_size=shard_size))
      break
    except Killed:
      pass
  assert 4 < starts < 99
  assert {name: (out / name).read_bytes() for name in names(out)} == whole
  made = [name for name in written if name.endswith(".png")]
  assert len(made) == len(set(made)) == len(LIST)


def test_a_picture_that_was_removed_is_made_again(tmp_path, artist):
  out = tmp_path / "out"
  artist.run(job(out))
  before, artist.drawn[:] = (out / "00003.png").read_bytes(), []
  (out / "00003.png").unlink()
  with open(out / "manifest.jsonl", "a") as file:
    file.write('{"file": "000')                        # what a kill leaves of a line
  artist.run(job(out))
  assert len(artist.drawn) == 1 and 3 in artist.drawn[0]  # by the batch that it was made in before
  assert (out / "00003.png").read_bytes() == before
  assert_whole(out)


@pytest.mark.parametrize("other, told", [
    (dict(wanted=[*LIST[:-1], ask(22, prompt="another")]), "prompts"),
    (dict(wanted=LIST[:-1]), "pictures, prompts"),
    (dict(wanted=[dataclasses.replace(LIST[0], image=Picture("a.png", "89ab")), *LIST[1:]]),
     "prompts"),
    (dict(settings=SETTINGS | {"fingerprint": "4567"}), "fingerprint"),
    (dict(settings=SETTINGS | {"sampler": "ddim", "clip_skip": 1}), "sampler, clip_skip"),
    (dict(shard_size=10), "shard_size"),
    (dict(restartable=False), "restartable"),
])
def test_another_job_is_refused(tmp_path, artist, other, told):
  out = tmp_path / "out"
  artist.run(job(out))
  before, artist.drawn[:] = (out / "manifest.jsonl").read_bytes(), []
  with pytest.raises(UserError, match=f"begun with other {told}; .*choose another --out"):
    artist.run(job(out, **other))
  assert not artist.drawn and (out / "manifest.jsonl").read_bytes() == before


def test_foreign_folders_are_refused(tmp_path, artist):
  (tmp_path / "00003.png").write_bytes(b"somebody's")
  with pytest.raises(UserError, match="no manifest.jsonl tells of"):
    artist.run(job(tmp_path))
  for text in ("a list of cargo\n", '["a"]\n', "{}\n"):
    (tmp_path / "manifest.jsonl").write_text(text)
    for restartable in (True, False):
      with pytest.raises(UserError, match="choose another --out"):
        artist.run(job(tmp_path, restartable=restartable))
  assert not artist.drawn


def test_a_job_of_flags_begins_anew(tmp_path, artist):
  run = lambda wanted: artist.run(job(tmp_path, wanted, restartable=False), keep_latents=True)
  assert {number: latent.shape for number, latent in run(LIST[:2]).items()} == {
      0: (8, 8, 4), 1: (8, 12, 4)}
  run(LIST[2:4])
  assert_whole(tmp_path, LIST[2:4])
  assert sum(map(len, artist.drawn)) == 4


def test_hosts_that_do_not_share_the_folder_are_told(tmp_path, artist, monkeypatch):
  save = prompt_list.pictures.save_png
  monkeypatch.setattr(prompt_list.pictures, "save_png", lambda path, *rest: (
      path.name == "00007.png" or save(path, *rest)))
  with pytest.raises(UserError, match="1 pictures are not in .* 00007.png first; .* all hosts"):
    artist.run(job(tmp_path))


def test_shards_hold_pictures_and_prompts(tmp_path, artist):
  artist.run(job(tmp_path, shard_size=10))
  assert names(tmp_path) == ["00000.tar", "00001.tar", "00002.tar", "manifest.jsonl"]
  source = open_source(str(tmp_path), parts=("txt", "json"))
  assert source.count == len(LIST) and not source.problems
  for number, one in enumerate(LIST):
    sample, _ = source.read(number)
    shard = f"{number // 10:05d}"
    assert source.name(number) == f"{tmp_path}/{shard}.tar:{shard}{number % 10:04d}"
    assert sample["txt"].decode() == one.prompt
    assert json.loads(sample["json"])["seed"] == one.seed
    (tmp_path / "read.png").write_bytes(sample["png"])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "read.png")), expected(one))
  assert [line["file"] for line in lines(tmp_path)[1]][10] == "00001.tar:000010000.png"


def test_what_is_asked_otherwise_does_not_share_a_batch(tiny_model):
  sd, picture = tiny_model[0], Picture("a.png", "89ab")
  edit = dict(image=picture, strength=0.5)
  wanted = [ask(0), ask(1, **edit), ask(2, **edit, mask=picture), ask(3, **edit), ask(4, **edit),
            ask(5, **edit | {"strength": 0.7})]
  # Strength decides where a program begins, not which one it is: batches of one size.
  assert plan(sd, wanted, 8) == [[0], [1, 3, 4], [5, 5, 5], [2]]
