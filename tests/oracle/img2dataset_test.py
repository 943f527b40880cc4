"""Shards that the real img2dataset makes of a web server's pictures, of every awkward kind.

img2dataset wants its own versions of much, so it may live in an environment of its own: it is run
by the interpreter that SDJAX_IMG2DATASET_PYTHON names, else by the one that runs the tests.
`make` also made the shards in tests/data/img2dataset.
"""

import collections
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from flaky_server import FlakyServer
from PIL import Image
from pyarrow import parquet

from sdjax.cli import main as cli
from sdjax.data import images, index, inspection, pipeline, sources, storage

pytestmark = pytest.mark.oracle

COLOURS = ((255, 0, 0), (0, 200, 0), (0, 0, 255), (255, 255, 0))  # from the top left, by rows
# What turns an upright picture into the one stored with that EXIF orientation, as Pillow calls it.
STORED = {1: (), 2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,),
          4: (Image.Transpose.FLIP_TOP_BOTTOM,), 5: (Image.Transpose.TRANSPOSE,),
          6: (Image.Transpose.ROTATE_90,), 7: (Image.Transpose.TRANSVERSE,),
          8: (Image.Transpose.ROTATE_270,)}
PROGRAM = "import json, sys, img2dataset; img2dataset.download(**json.loads(sys.argv[1]))"
QUIET = {"NO_PROXY": "*", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
# Columns of LAION-5B's parquets that people save along; "url" and "caption" are URL and TEXT there.
COLUMNS = ("similarity", "hash", "punsafe", "pwatermark", "aesthetic", "LANGUAGE", "NSFW",
           "WIDTH", "HEIGHT")


def draw(width, height):
  """A picture of four rectangles that tells which way up it is."""
  picture = Image.new("RGB", (width, height))
  for number, colour in enumerate(COLOURS):
    row, column = divmod(number, 2)
    picture.paste(colour, (column * width // 2, row * height // 2,
                           (column + 1) * width // 2, (row + 1) * height // 2))
  return picture


def save(picture, form, **options):
  buffer = io.BytesIO()
  picture.save(buffer, form, **options)
  return buffer.getvalue()


def jpeg(picture, **options):
  return save(picture, "JPEG", **{"quality": 90, "subsampling": 0, **options})


def turned(picture, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  exif[0x010F] = "sdjax"  # the maker of the camera, so that there is more than one tag
  for step in STORED[orientation]:
    picture = picture.transpose(step)
  return jpeg(picture, exif=exif)


def grey16(picture):
  return save(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG")


def transparent(picture):
  """Its top left quarter is see-through, and red behind."""
  alpha = np.full((picture.height, picture.width), 255, np.uint8)
  alpha[:picture.height // 2, :picture.width // 2] = 0
  picture = picture.convert("RGBA")
  picture.putalpha(Image.fromarray(alpha))
  return save(picture, "PNG")


def animated(picture, form):
  frames = [Image.new("RGB", picture.size, colour) for colour in COLOURS]
  return save(picture, form, save_all=True, append_images=frames, duration=50)


GOOD = {
    "jpeg": jpeg,
    "progressive": lambda picture: jpeg(picture, progressive=True),
    "png": lambda picture: save(picture, "PNG"),
    "webp": lambda picture: save(picture, "WEBP", lossless=True),
    "tiff": lambda picture: save(picture, "TIFF"),
    "grey": lambda picture: jpeg(picture.convert("L")),
    "cmyk": lambda picture: save(picture.convert("CMYK"), "JPEG", quality=90),
    "grey16": grey16,
    "transparent": transparent,
    "palette": lambda picture: save(picture.quantize(8), "PNG", transparency=7),
    "gif": lambda picture: animated(picture, "GIF"),
    "animated webp": lambda picture: animated(picture, "WEBP"),
    "pixel": lambda picture: jpeg(picture.resize((1, 1))),
    "strip": lambda picture: jpeg(picture.resize((5000, 50))),
} | {f"turned {n}": lambda picture, n=n: turned(picture, n) for n in STORED}
# With the reason for which training leaves them out.
BAD = {
    "truncated": ("corrupt picture", lambda picture: jpeg(picture)[:-len(jpeg(picture)) // 4]),
    "corrupt": ("corrupt picture", lambda picture: damaged(save(picture, "PNG"))),
    "bomb": ("too many pixels", lambda _: save(Image.new("1", (20_000, 5_001)), "PNG")),
    "html": ("not a picture", lambda _: b"<!DOCTYPE html><title>404</title>"),
    "svg": ("not a picture", lambda _: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "empty": ("not a picture", lambda _: b""),
}
KINDS = GOOD | {name: function for name, (_, function) in BAD.items()}
NOT_THERE = ("missing", "broken server")  # pictures that img2dataset cannot download


def damaged(blob):
  """The same with a byte of its pixels changed, so that PNG's checksum tells."""
  middle = blob.index(b"IDAT") + 8
  return blob[:middle] + bytes([blob[middle] ^ 0xFF]) + blob[middle + 1:]


def make(python, folder, kinds, sizes, seed=0, **options):
  """Serves a picture of each kind, and has img2dataset download them into `folder`/shards.

  Args:
    python: that has img2dataset.
    folder: new.
    kinds: a name of KINDS or NOT_THERE per picture.
    sizes: (width, height) in px per picture, of what the kind does not fix.
    seed: of the scores.
    options: of img2dataset.download.

  Returns:
    The folder of the shards.
  """
  (folder / "web").mkdir(parents=True)
  with (FlakyServer(folder / "web") as server,
        FlakyServer(folder / "web", status=500) as broken):
    urls = []
    for number, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
      name = f"{number:05d}-{kind.replace(' ', '-')}.jpg"
      if kind in KINDS:
        (folder / "web" / name).write_bytes(KINDS[kind](draw(*size)))
      urls.append(f"{(broken if kind == 'broken server' else server).url}/{name}")
    parquet.write_table(table(urls, kinds, sizes, seed), folder / "urls.parquet")
    options = {
        "url_list": str(folder / "urls.parquet"), "output_folder": str(folder / "shards"),
        "input_format": "parquet", "output_format": "webdataset", "url_col": "URL",
        "caption_col": "TEXT", "save_additional_columns": COLUMNS, "thread_count": 8, **options}
    told = subprocess.run([python, "-c", PROGRAM, json.dumps(options)], env=os.environ | QUIET,
                          capture_output=True, text=True, timeout=600)
  assert told.returncode == 0, told.stderr
  return folder / "shards"


def table(urls, kinds, sizes, seed):
  """What LAION says of pictures, now and then by null or NaN: every third caption, score or tag."""
  draws = np.random.default_rng(seed)
  n = len(urls)
  some = lambda values, nothing: [
      nothing if draws.random() < 1 / 3 else value for value in values]
  scores = lambda low, high: some(draws.uniform(low, high, n).round(4).tolist(), float("nan"))
  return pa.table({
      "URL": urls,
      "TEXT": some([f"a {kind} picture, number {i}" for i, kind in enumerate(kinds)], None),
      "similarity": scores(0.28, 0.4), "hash": draws.integers(-2**63, 2**63, n),
      "punsafe": scores(0, 1), "pwatermark": scores(0, 1), "aesthetic": scores(3, 7),
      "LANGUAGE": some(draws.choice(["en", "de", "zh"], n).tolist(), None),
      "NSFW": some(draws.choice(["UNLIKELY", "UNSURE", "NSFW"], n).tolist(), None),
      "WIDTH": [width for width, _ in sizes], "HEIGHT": [height for _, height in sizes]})


# Mode → options, and which kinds of BAD are in its tars; img2dataset leaves out the others, which
# OpenCV cannot read, and a bomb that was made small is none.
MODES = {
    "served": ({"resize_mode": "no", "disable_all_reencoding": True}, set(BAD)),
    "kept": ({"resize_mode": "no", "skip_reencode": True}, {"bomb"}),
    "resized": ({"resize_mode": "keep_ratio", "image_size": 64}, set()),
    "cropped": ({"resize_mode": "center_crop", "image_size": 64}, set()),
}
LEFT_OUT = {"truncated", "corrupt", "html", "svg", "empty"}
COLOURED = set(GOOD) - {"grey", "grey16", "transparent", "pixel", "strip"}
FIXED = {"pixel", "strip", "bomb"}  # kinds that come in a size of their own


@pytest.fixture(scope="module")
def python():
  """An interpreter that has img2dataset."""
  named = os.environ.get("SDJAX_IMG2DATASET_PYTHON", sys.executable)
  look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('img2dataset') is None)"
  if subprocess.run([named, "-c", look]).returncode:
    pytest.skip(f"{named} has no img2dataset; name one that has in SDJAX_IMG2DATASET_PYTHON")
  return named


@pytest.fixture(scope="module", params=MODES)
def made(request, python, tmp_path_factory):
  """(mode, kinds, folder) of three pictures of each kind, in shards of 40."""
  kinds = 3 * [*KINDS, *NOT_THERE]
  sizes = np.random.default_rng(1).integers(24, 160, (len(kinds), 2)).tolist()
  options, _ = MODES[request.param]
  folder = make(python, tmp_path_factory.mktemp(request.param), kinds, sizes,
                number_sample_per_shard=40, **options)
  return request.param, kinds, folder


def kind_of(facts):
  return facts["url"].rpartition("/")[2][len("00000-"):-len(".jpg")].replace("-", " ")


def test_counts_are_what_img2dataset_says(made):
  mode, kinds, folder = made
  told, ours = collections.Counter(), collections.Counter()
  for path in sorted(folder.glob("*.tar")):
    stats = json.loads(Path(str(path).replace(".tar", "_stats.json")).read_text())
    told.update({name: stats[name] for name in (
        "count", "successes", "failed_to_download", "failed_to_resize")})
    table = index.load(storage.Storage(), str(path))
    assert index.count_of(storage.Storage(), str(path)) == len(table) == stats["successes"]
    assert not index.facts_of(table)["problems"] and not index.facts_of(table)["truncated"]
    ours += collections.Counter(kind_of({"url": url}) for url in table["json.url"].to_pylist())
  left_out = set() if mode == "served" else LEFT_OUT
  assert ours == collections.Counter(kind for kind in kinds if kind in set(KINDS) - left_out)
  assert told == {"count": len(kinds), "successes": ours.total(), "failed_to_download": 6,
                  "failed_to_resize": 3 * len(left_out)}
  print(mode, dict(told))


def test_what_cannot_train_is_told_with_its_reason(made):
  mode, _, folder = made
  expected = collections.Counter(BAD[kind][0] for kind in 3 * list(MODES[mode][1]))
  report = inspection.inspect(sources.open_source(str(folder)))
  assert report.broken == expected
  options = pipeline.Options(resolutions=((0, 16),), max_bad_share=1.0)
  source = sources.open_source(str(folder), facts=pipeline.facts_wanted(options))
  batches = pipeline.Pipeline([source], batch_size=source.count, seed=0, options=options)
  for epoch, _ in zip(range(1, 4), batches.batches()):
    # Substitutes may be bad, too.
    assert batches.counters.keys() == expected.keys()
    assert all(batches.counters[reason] >= epoch * n for reason, n in expected.items())
  print(mode, dict(expected), dict(batches.counters))


def test_pictures_stand_upright_in_their_colours(made):
  mode, _, folder = made
  source = sources.open_source(str(folder), facts=("exif", "url", "WIDTH", "HEIGHT"))
  seen = set()
  for sample in range(source.count):
    parts, facts = source.read(sample)
    kind = kind_of(facts)
    ((height, width),) = source.sizes(np.array([sample]))
    stated = facts["WIDTH"], facts["HEIGHT"]
    if mode in ("served", "kept") and kind in set(GOOD) - FIXED:
      assert (width, height) == stated, kind
    if mode == "resized" and kind in set(GOOD) - FIXED:
      assert min(width, height) == 64
      assert abs(width / height - stated[0] / stated[1]) <= 1 / min(stated), kind
    if kind in COLOURED:
      pixels = images.decode(parts["jpg"], (height, width),
                             orientation=images.orientation_of(facts.get("exif")))
      found = [pixels[y * height // 4, x * width // 4] for y in (1, 3) for x in (1, 3)]
      np.testing.assert_allclose(found, COLOURS, atol=12, err_msg=kind)
      seen.add(kind)
  assert seen == COLOURED


def test_captions_and_scores_are_those_of_the_list(made):
  _, _, folder = made
  rows = {row["URL"]: row for row in parquet.read_table(folder.parent / "urls.parquet").to_pylist()}
  tables = [index.load(storage.Storage(), str(path)) for path in sorted(folder.glob("*.tar"))]
  for row in itertools.chain.from_iterable(table.to_pylist() for table in tables):
    theirs = rows.pop(row["json.url"])
    assert row["caption"] == (theirs["TEXT"] or "")
    for name in COLUMNS:
      value = theirs[name]
      assert row[f"json.{name}"] == (None if value != value else value), name


@pytest.mark.parametrize("made", ["served"], indirect=True)  # which has every kind of bad picture
def test_a_run_trains_on_them_and_counts_what_it_left_out(made, tmp_path, monkeypatch, request):
  _, _, folder = made
  monkeypatch.chdir(request.config.rootpath)
  assert cli.main(["train", "--config", "configs/sd15.py:tiny,stage=autoencoder",
                   "--workdir", str(tmp_path), f"--config.data.urls={folder}",
                   "--config.data.max_bad_share=0.5", "--config.total_steps=10"]) == 0
  *_, last = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  assert last["step"] == 10 and np.isfinite(last["loss"]) and last["skipped_samples"] > 0
