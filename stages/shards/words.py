"""How many words a text has, whatever its script.

A word is what stands between white space. Scripts that write no space between words are counted as Unicode's default word
boundaries break them (UAX #29), which know no dictionary: a Chinese character or a hiragana is a word, a run of katakana is one,
and so is a letter of Thai, Lao, Khmer or Burmese with its marks. Punctuation beside them is none.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

WORDS = "what stands between white space; a Chinese character, a kana or a Thai letter is a word"

# The length mark and the middle dot belong to no script of their own, and stand in katakana words.
_KATAKANA = r"\p{Katakana}\x{30FC}\x{FF70}"
_ONE_BY_ONE = r"\p{Han}\p{Hiragana}"
_LETTERS = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNSPACED = _KATAKANA + _ONE_BY_ONE + _LETTERS
# A run of anything else, from its first letter or digit on.
_OTHERS = rf"[^\s\p{{Z}}\p{{P}}\p{{S}}\p{{M}}\p{{C}}{_UNSPACED}][^\s\p{{Z}}{_UNSPACED}]*"
_WORD = rf"[{_KATAKANA}]+|[{_ONE_BY_ONE}]|[{_LETTERS}]\p{{M}}*|{_OTHERS}"


def count_words(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Words of every text, null for null."""
    words = pc.count_substring_regex(texts, r"\S+")
    # Most captions are ASCII, and looking for a script takes half as long as counting.
    if pc.all(pc.string_is_ascii(texts)).as_py():
        return words
    unspaced = pc.match_substring_regex(texts, f"[{_UNSPACED}]")
    return pc.if_else(unspaced, pc.count_substring_regex(texts, _WORD), words)
