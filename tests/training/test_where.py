"""Conditions as a recipe writes them: what each form means, and that every other form is refused in one line."""

from __future__ import annotations

import pyarrow as pa
import pytest

from training.names import column_of
from training.where import Comparison

LICENCES = ["CC BY 4.0", "Public domain, US", 'say "hi", then', "don't", "404", None]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('L in ["CC BY 4.0", "Public domain, US"]', [0, 1]),
        ("L in [CC BY 4.0,'Public domain, US' ]", [0, 1]),
        ('L not in ["Public domain, US"]', [0, 2, 3, 4]),
        ('L == "Public domain, US"', [1]),
        ("L == Public domain, US", [1]),
        (r'L == "say \"hi\", then"', [2]),
        ("""L == 'say "hi", then'""", [2]),
        ("L != don't", [0, 1, 2, 4]),
        ('L == "404"', [4]),
        ('L in [" 404 "]', [4]),
        ('"L" in [404, "don\'t"]', None),
        ('L in ["404", "don\'t"]', [3, 4]),
        ('L == "x in [404]"', []),
    ],
)
def test_quotes_keep_what_is_in_them(text, rows):
    if rows is None:
        with pytest.raises(ValueError, match="expected numbers or text, not both"):
            Comparison.parse(text)
        return
    where = Comparison.parse(text)
    assert where.column == "L"
    assert [row for row, passes in enumerate(where.passes(pa.array(LICENCES)).to_pylist()) if passes] == rows
    assert where.passes(pa.array(LICENCES))[-1].as_py() is None


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int64()])
def test_numbers_are_compared_as_the_column_has_them(kind):
    column = pa.array([1, 2, None] if kind == pa.int64() else [0.7, 2.0, None], kind)
    low = "1" if kind == pa.int64() else "0.7"
    for text, passes in (
        (f"x >= {low}", [True, True]),
        (f"x == +{low}", [True, False]),
        (f"x not in [{low}, 2]", [False, False]),
    ):
        assert Comparison.parse(text).passes(column).to_pylist() == [*passes, None]


@pytest.mark.parametrize(
    "text",
    [
        "NSFW", "NSFW in UNLIKELY", "NSFW > UNLIKELY", "x in [1, a]", "in [a]", "x = 3", "x in []", "x in [a, ]", "x in [,a]",
        'x == "a', "x == a'", 'x == "a" b', 'x in ["a]', 'x in ["a" b]', 'x in [a "b, c"]', "x in [a] and y in [b]", "x ==",
        '"x == 3', "x < 1e400", "x in [1, -1e400]", "x === a", "NSFW == [A, B]",
    ],
)  # fmt: skip
def test_another_form_is_refused_in_one_line(text):
    with pytest.raises(
        ValueError, match="write COLUMN OP|compares numbers|not both|is no value|is no list of values|too large"
    ) as error:
        Comparison.parse(text)
    assert "\n" not in str(error.value)


def test_a_column_is_found_by_its_name_here_and_in_laions_sets():
    columns = ["key", "aesthetic", "width", "Width"]
    assert column_of("AESTHETIC_SCORE", columns) == column_of("Aesthetic", columns) == "aesthetic"
    assert (column_of("Width", columns), column_of("WIDTH", columns)) == ("Width", "width")
    assert column_of("aesthetic", ["AESTHETIC_SCORE"]) == "AESTHETIC_SCORE"
    assert column_of("beauty", columns) is None and column_of("TEXT", columns) is None
