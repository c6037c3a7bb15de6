"""Text from outside, read as a browser reads it: UTF-8, or UTF-16 where a byte order mark says so; any of the usual line ends."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from itertools import chain
from typing import Any

CHUNK = 65_536


class TextError(ValueError):
    """Bytes that are no text; the message is one line that begins with the number of the line."""


def lines(file: Any) -> Iterator[str]:
    """The lines of a file that is open for bytes, without their ends; holds a piece of the file at a time.

    Raises:
        TextError: a line is not in the encoding of the file, or holds a NUL character.
    """
    start = file.read(2)
    utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("UTF-16", "surrogatepass") if utf16 else ("UTF-8-sig", "surrogateescape")
    # Both ways of handling errors let bad bytes through as lone surrogates, which then show in their own line.
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)
    number, rest = 0, ""
    for data in chain([start], iter(lambda: file.read(CHUNK), b""), [b""]):
        try:
            *whole, rest = (rest + decoder.decode(data, final=not data)).split("\n")
        except UnicodeDecodeError:
            raise TextError(f"line {number + 1} ends in the middle of a character of {encoding}") from None
        for line in whole:
            number += 1
            yield _checked(line, number, encoding)
    yield _checked(rest, number + 1, encoding)


def _checked(line: str, number: int, encoding: str) -> str:
    if "\0" in line:
        raise TextError(f"line {number} holds a NUL character, which no text has; save it as UTF-8")
    try:
        line.isascii() or line.encode()
    except UnicodeEncodeError:
        raise TextError(f"line {number} is not {encoding.removesuffix('-sig')}; save the file as UTF-8") from None
    return line


def text_of(data: bytes) -> str:
    """A whole text, its lines ended by ``\\n``; raises as `lines`."""
    return "\n".join(lines(io.BytesIO(data)))
