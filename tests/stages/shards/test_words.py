"""Words of captions in any script, against the word boundaries of Unicode as the `regex` package has them."""

from __future__ import annotations

import pyarrow as pa
import pytest
import regex

from stages.shards.words import count_words

SPACED = [
    "a photo of a dog",
    "  it's 2 cats , or - maybe 3 ",
    "",
    "caf\u00e9 au lait",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5 \uc785\ub2c8\ub2e4",
    "\u092c\u093f\u0932\u094d\u0932\u0940 \u0915\u093e \u092c\u091a\u094d\u091a\u093e",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f408 cat",
]
UNSPACED = [
    "\u4e00\u53ea\u732b\uff0c\u5750\u7740\u3002",
    "\u30b3\u30fc\u30d2\u30fc\u3092\u98f2\u3080",
    "\u6771\u4eac\u3000tower\u3000bridge",
    "2026\u5e7411\u670828\u65e5",
    "a cat, it's \u732b !",
    "\u0e2b\u0e49\u0e2d\u0e07\u0e19\u0e49\u0e33\u0e2a\u0e27\u0e22",
    "\u0eaa\u0eb0\u0e9a\u0eb2\u0e8d",
    "\u1781\u17d2\u1798\u17c2\u179a",
]


def words_of_unicode(text: str) -> int:
    return sum(bool(regex.search(r"[\p{L}\p{N}]", piece)) for piece in regex.split(r"(?w)\b", text))


@pytest.mark.parametrize("others", [[], UNSPACED])
def test_what_stands_between_spaces_is_a_word(others):
    """Whatever the other captions of the batch are written in."""
    assert count_words(pa.array(SPACED + others)).to_pylist()[: len(SPACED)] == [len(text.split()) for text in SPACED]


def test_scripts_without_spaces_are_counted_as_unicode_breaks_them():
    counted = count_words(pa.chunked_array([UNSPACED, [None]])).to_pylist()
    assert counted == [*map(words_of_unicode, UNSPACED), None]
    assert counted[0] == 5 and min(counted[:-1]) >= 3, "the filter's default keeps them"
