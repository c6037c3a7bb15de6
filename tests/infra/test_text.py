"""Text from outside: however it is encoded and its lines end, it is the same text; what is no text is named by its line."""

from __future__ import annotations

import codecs
import io

import pytest

from infra import text

WORDS = "caf\u00e9\n\u65e5\u672c \U0001f600 \ufffd\n\nlast"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encode",
    [
        lambda words: words.encode(),
        lambda words: words.encode("utf-8-sig"),
        lambda words: codecs.BOM_UTF16_LE + words.encode("utf-16-le"),
        lambda words: codecs.BOM_UTF16_BE + words.encode("utf-16-be"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 65_536])
def test_encodings_and_line_ends_make_no_difference(monkeypatch, end, encode, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    data = encode(WORDS.replace("\n", end))
    assert text.text_of(data) == WORDS
    assert list(text.lines(io.BytesIO(data))) == WORDS.split("\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("fine\ncaf\u00e9\n".encode("latin-1"), "line 2 is not UTF-8; save the file as UTF-8"),
        (b"fine\n\xed\xa0\x80\n", "line 2 is not UTF-8"),
        ("fine\nwide\n".encode("utf-16-le"), "line 1 holds a NUL character"),
        (codecs.BOM_UTF16_LE + "fine\n\ud800\n".encode("utf-16-le", "surrogatepass"), "line 2 is not UTF-16"),
        (codecs.BOM_UTF16_LE + "fine\nx".encode("utf-16-le") + b"y", "line 2 ends in the middle of a character of UTF-16"),
    ],
)
def test_what_is_no_text_is_named_by_its_line(data, message):
    with pytest.raises(text.TextError, match=message):
        text.text_of(data)


def test_an_empty_file_is_one_empty_line():
    assert list(text.lines(io.BytesIO(b""))) == [""]
