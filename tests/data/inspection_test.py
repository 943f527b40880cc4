import numpy as np
from PIL import Image

from sdjax.data import inspection, pack
from sdjax.data.sources import open_source


def test_report_counts_what_was_packed(make_shards):
  report = inspection.inspect(open_source(str(make_shards(bad=(3, 30)))))
  assert (report.samples, report.shards, len(report.sides)) == (50, 3, 48)
  assert report.formats == {"PNG RGB": 48} and report.broken == {"corrupt picture": 2}
  assert report.examples["corrupt picture"].endswith("00000.tar:000000003")
  assert np.all(report.sides == 12)
  text = inspection.format_report(report)
  assert "48 good of 50" in text and "corrupt picture" in text
  assert max(map(len, text.splitlines())) <= 160 and len(text.splitlines()) < 30


def test_aspects_and_captions_fall_into_their_bins(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  sides = [(100, 100)] * 3 + [(160, 90)] * 2 + [(90, 160), (300, 100)]
  for i, side in enumerate(sides):
    Image.new("RGB", side).save(folder / f"{i}.jpg")
    (folder / f"{i}.txt").write_text("x" * i)
  pack.pack(pack.find_sources(folder), folder, tmp_path / "out")
  report = inspection.inspect(open_source(str(tmp_path / "out")))
  assert sorted(report.caption_lengths) == list(range(7))
  lines = inspection.format_report(report).splitlines()
  counts = {label: int(next(line for line in lines if line.strip().startswith(label))
                       [len(label) + 2:].split()[0])
            for _, label in inspection.ASPECTS}
  assert counts == {"below 1:2": 0, "1:2 … 7:10": 1, "7:10 … 19:20": 0, "square": 3,
                    "20:19 … 10:7": 0, "10:7 … 2:1": 2, "2:1 and above": 1}
  assert any(line.startswith("empty captions  1") for line in lines)


def test_a_set_without_one_good_sample_is_reported_too(make_shards):
  report = inspection.inspect(open_source(str(make_shards(5, bad=range(5)))))
  assert "0 good of 5" in inspection.format_report(report)


def test_samples_that_are_not_there_are_told_by_their_place(make_shards):
  folder = make_shards(40)                       # of which the files beside the shards tell
  first = folder / "00000.tar"
  first.write_bytes(first.read_bytes()[:first.stat().st_size // 2])
  report = inspection.inspect(open_source(str(folder)))
  missing = 40 - len(report.sides)
  assert 5 < missing < 15 and report.broken == {"missing sample": missing}
  assert report.examples == {"missing sample": f"{first}, sample {20 - missing}"}
