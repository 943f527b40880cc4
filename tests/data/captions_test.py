import pytest

from sdjax.data import captions


@pytest.mark.parametrize("parts, expected", [
    ({"txt": b" a cat \n"}, ("a cat",)),
    ({"txt": b"a cat", "json": b'{"caption": "other"}'}, ("a cat",)),
    ({"json": b'{"caption": "a dog", "similarity": NaN}'}, ("a dog",)),
    ({"txt": b"", "json": b'{"caption": null}'}, ("",)),
    ({"json": b'{"caption": null}'}, ("",)),
    ({"txt": b"x", "json": b'{"captions": ["a", " b ", "", null]}'}, ("a", "b")),
    ({"txt": b"x", "json": b'{"captions": []}'}, ("x",)),
    ({}, ("",)),
])
def test_captions_of(parts, expected):
  assert captions.captions_of(parts) == expected


@pytest.mark.parametrize("parts", [{"txt": b"\xff\xfe"}, {"json": b"{"}, {"json": b"[1]"}])
def test_unreadable_captions_raise(parts):
  with pytest.raises(ValueError):
    captions.captions_of(parts)


def test_choice_covers_all_and_drop_out_empties():
  texts = ("a", "b", "c")
  assert [captions.choose(texts, u, 0.5, 0.1) for u in (0.0, 0.34, 0.99999)] == ["a", "b", "c"]
  assert captions.choose(texts, 0.5, 0.0999, 0.1) == ""
  assert captions.choose(texts, 0.5, 0.1, 0.1) == "b"
  assert captions.choose(texts, 0.5, 0.0, 0.0) == "b"
  assert captions.choose(texts, 0.5, 0.999999, 1.0) == ""
