"""Shards of the real img2dataset, of awkward pictures with LAION's columns (img2dataset/)."""

import collections
import io
import itertools
import json
import operator
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.data import filters, images, index, inspection, pack, pipeline, sources, storage
from sdjax.data.captions import Captions

MADE = Path(__file__).parent / "img2dataset"
COLOURS = ((255, 0, 0), (0, 200, 0), (0, 0, 255), (255, 255, 0))  # from the top left, by rows
BAD = {"truncated": "corrupt picture", "corrupt": "corrupt picture", "html": "not a picture"}
ORDER = {">=": operator.ge, "<": operator.lt, "==": operator.eq,
         "in": lambda value, values: value in values,
         "not in": lambda value, values: value not in values,
         "matches": lambda value, pattern: re.search(pattern, value) is not None}


@pytest.fixture(scope="module", params=["served", "resized"])
def made(request, tmp_path_factory):
  """A copy of a set of shards: indices are kept beside them."""
  folder = tmp_path_factory.mktemp("made") / request.param
  return Path(shutil.copytree(MADE / request.param, folder))


@pytest.fixture
def table(made):
  return index.load(storage.Storage(), str(made / "00000.tar"))


def samples_of(folder):
  """Key → part → bytes, as the standard library reads the tar."""
  samples = collections.defaultdict(dict)
  with tarfile.open(folder / "00000.tar") as file:
    for member in file:
      key, _, part = member.name.partition(".")
      samples[key][part] = file.extractfile(member).read()
  return samples


def jsons_of(folder):
  """Key → what the sample's json says; NaN is None."""
  jsons = {key: json.loads(parts["json"]) for key, parts in samples_of(folder).items()}
  return {key: {name: None if value != value else value for name, value in facts.items()}
          for key, facts in jsons.items()}


def kind_of(facts):
  """What the picture is like, by the name it was served under: 00007-turned-6.jpg."""
  return facts["url"].rpartition("/")[2][len("00007-"):-len(".jpg")].replace("-", " ")


def test_the_tar_is_what_img2dataset_makes(made):
  """Were this not so, the tests below would test less than they say."""
  samples = samples_of(made)
  assert list(samples) != sorted(samples)                # in the order of their arrival
  blobs = [parts["json"] for parts in samples.values()]
  assert any(b'"aesthetic": NaN' in blob for blob in blobs)
  assert any(b'"caption": null' in blob for blob in blobs)
  facts = jsons_of(made)[next(iter(samples))]
  assert list(facts) == [
      "similarity", "hash", "punsafe", "pwatermark", "aesthetic", "LANGUAGE", "NSFW", "WIDTH",
      "HEIGHT", "caption", "url", "key", "status", "error_message", "width", "height",
      "original_width", "original_height", "exif", "sha256"]
  with tarfile.open(made / "00000.tar") as file:
    assert file.next().pax_headers


def test_the_index_says_what_the_jsons_say(made, table):
  rows = {row["key"]: row for row in table.to_pylist()}
  jsons, samples = jsons_of(made), samples_of(made)
  assert list(rows) == list(samples)
  tar = (made / "00000.tar").read_bytes()
  for key, row in rows.items():
    for part, blob in samples[key].items():
      assert tar[row[f"{part}.offset"]:][:row[f"{part}.size"]] == blob
    assert {name: row[f"json.{name}"] for name in jsons[key]} == jsons[key]
    assert row["caption"] == (jsons[key]["caption"] or "") == samples[key]["txt"].decode()
  told = index.facts_of(table)
  assert (told["samples"], told["truncated"], told["problems"]) == (len(samples), False, {})


def test_sizes_are_those_of_upright_pictures(made, table):
  upright = {"served": (40, 30), "resized": (32, 24)}[made.name]
  kinds = [kind_of({"url": url}) for url in table["json.url"].to_pylist()]
  expected = {"pixel": (1, 1), "html": (None, None)}
  found = zip(table["width"].to_pylist(), table["height"].to_pylist())
  assert dict(zip(kinds, found)) == {kind: expected.get(kind, upright) for kind in kinds}


def test_samples_are_counted_by_the_sidecars(made, table, tmp_path):
  store, alone = storage.Storage(), tmp_path / "00000.tar"
  shutil.copy(made / "00000.tar", alone)
  assert index.count_of(store, str(alone)) is None
  for sidecar in ("00000.parquet", "00000_stats.json"):
    shutil.copy(made / sidecar, tmp_path)
    assert index.count_of(store, str(alone)) == len(table)
    (tmp_path / sidecar).unlink()


@pytest.mark.parametrize("rules", [
    [("aesthetic", ">=", 5.0)],
    [("aesthetic", ">=", 5.0, "keep")],
    [("punsafe", "<", 0.5), ("pwatermark", "<", 0.8, "keep")],
    [("NSFW", "in", ("UNLIKELY", "UNSURE"))],
    [("NSFW", "not in", ("NSFW",), "keep"), ("LANGUAGE", "==", "en", "keep")],
    [("similarity", "<", 0.35), ("LANGUAGE", "matches", "^(de|zh)$")],
    [("WIDTH", ">=", 40), ("json.width", ">=", 32)],
    [("json.width", "<", 32, "keep"), ("caption_length", ">=", 1)],
])
def test_filters_keep_what_plain_python_keeps(made, table, rules):
  dropped = collections.Counter()
  kept = []
  for facts in jsons_of(made).values():
    facts |= {"json.width": facts["width"], "caption_length": len(facts["caption"] or "")}
    for column, comparison, value, missing in ((*rule, "drop")[:4] for rule in rules):
      if facts[column] is None and missing == "drop":
        reason = f"{column} missing"
      elif facts[column] is not None and not ORDER[comparison](facts[column], value):
        reason = f"{column} {comparison} {','.join(value) if type(value) is tuple else value}"
      else:
        continue
      dropped[reason] += 1
      break
    else:
      kept.append(facts["key"])
  parsed = filters.parse(rules)
  assert table["key"].filter(filters.keep(table, parsed)).to_pylist() == kept
  assert filters.counts(table, parsed) == dropped


def test_pictures_stand_upright_in_their_colours(made):
  source = sources.open_source(str(made), facts=("exif", "url"))
  seen = set()
  for sample in range(source.count):
    parts, facts = source.read(sample)
    kind = kind_of(facts)
    if kind in BAD or kind in ("pixel", "grey16"):
      continue
    pixels = images.decode(parts["jpg"], (24, 32),
                           orientation=images.orientation_of(facts["exif"]))
    expected = list(COLOURS)
    if kind == "transparent":                            # laid on white
      expected[0] = (255, 255, 255)
    np.testing.assert_allclose(pixels[6::12, 8::16].reshape(4, 3), expected, atol=12, err_msg=kind)
    seen.add(kind)
  assert len(seen) == {"served": 4, "resized": 7}[made.name]


def test_epochs_visit_every_good_sample_and_count_the_others(made):
  urls = [facts["url"] for facts in jsons_of(made).values()]
  bad = {number for number, url in enumerate(urls) if kind_of({"url": url}) in BAD}
  options = pipeline.Options(resolutions=((0, 16),), captions=Captions(column="url"),
                             max_bad_share=1.0)
  source = sources.open_source(str(made), facts=pipeline.facts_wanted(options))
  assert source.count == len(urls)                       # known from the sidecar
  tokenize = lambda texts: np.array([[urls.index(text) if text else -1] for text in texts])
  batches = pipeline.Pipeline([source], batch_size=len(urls), seed=0, options=options,
                              tokenize=tokenize)
  for batch in itertools.islice(batches.batches(), 4):   # an epoch each
    seen = collections.Counter(batch["tokens"].ravel().tolist())
    assert seen.keys() == set(range(len(urls))) - bad
    assert seen.total() == len(urls)
  first = collections.Counter(BAD[kind_of({"url": urls[number]})] for number in bad)
  assert batches.counters.keys() == first.keys()
  assert all(batches.counters[reason] >= 4 * n for reason, n in first.items())
  assert inspection.inspect(source).broken == first


def test_filters_leave_a_run_what_they_keep(made):
  rules = [("NSFW", "in", ("UNLIKELY", "UNSURE")), ("caption_length", ">", 0)]
  source = sources.open_source(str(made), rules=rules, facts=("url",))
  kept = [facts["url"] for facts in jsons_of(made).values()
          if facts["NSFW"] in ("UNLIKELY", "UNSURE") and facts["caption"]]
  assert [source.facts(sample)["url"] for sample in range(source.count)] == kept
  assert sum(source.problems.values()) == len(jsons_of(made)) - len(kept)


def test_pillow_turns_a_tiff_itself(tmp_path):
  exif = Image.Exif()
  exif[0x112] = 6
  stored = np.zeros((40, 30, 3), np.uint8)
  stored[:20] = 255                                          # the top; upright, the right
  buffer = io.BytesIO()
  Image.fromarray(stored).save(buffer, "TIFF", exif=exif)
  upright = images.decode(buffer.getvalue(), (30, 40), orientation=6)
  assert upright[:, 30:].min() == 255 and upright[:, :10].max() == 0
  tags = {"width": None, "height": None, "exif": '{"Image Orientation": "Rotated 90 CW"}'}
  pack.write_shards([{"jpg": buffer.getvalue(), "txt": "", "json": tags}], tmp_path / "s")
  source = sources.open_source(str(tmp_path / "s"), facts=inspection.FACTS)
  np.testing.assert_array_equal(source.sizes(np.array([0])), [[30, 40]])
  np.testing.assert_array_equal(inspection.inspect(source).sides, [[40, 30]])


def test_a_pictures_own_tag_comes_before_that_of_its_json(tmp_path):
  stored = np.zeros((30, 40, 3), np.uint8)
  stored[:, :20] = 255                                       # the left
  tags = {"width": None, "height": None, "exif": '{"Image Orientation": "Rotated 90 CW"}'}
  for own, size, white in ((1, (30, 40), np.s_[:, :20]), (8, (40, 30), np.s_[20:])):
    exif = Image.Exif()
    exif[0x112] = own
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    pixels = images.decode(buffer.getvalue(), size, orientation=6)
    assert pixels[white].min() == 255 and pixels.mean() < 128, own
    pack.write_shards([{"png": buffer.getvalue(), "txt": "", "json": tags}], tmp_path / str(own))
    source = sources.open_source(str(tmp_path / str(own)), facts=inspection.FACTS)
    np.testing.assert_array_equal(source.sizes(np.array([0])), [size])
    np.testing.assert_array_equal(inspection.inspect(source).sides, [size[::-1]])
