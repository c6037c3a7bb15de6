"""Prompts of an evaluation: what is taken of them, and that the rest is refused before anything runs."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.store import Store
from stages.measuring.prompts import Prompts
from stages.runner.contract import StageError
from stages.runner.graph import plan
from stages.runner.recipe import RecipeError, load_recipe
from tests.stages.packed import encoded

RECIPE = """
name: judged
subsets: {a: {folder: {images: [a.jpg]}, filter: {}, encode: {}}}
text-codec: {captions: a}
train: {small: {data: [a], steps: 10, global_batch: 4}}
evaluate: {prompts: prompts.*}
"""
CAPTIONS = ["one", " two ", "three"]
PICTURES = [encoded(Image.new("RGB", (8, 8), colour), "JPEG") for colour in ("red", "green", "blue")]
STRUCTS = [{"bytes": picture, "path": "x.jpg"} for picture in PICTURES]


@pytest.mark.parametrize(
    "columns",
    [
        {"caption": CAPTIONS, "image": PICTURES},
        {"TEXT": pa.array(CAPTIONS, pa.string_view()), "image": pa.array(PICTURES, pa.large_binary())},
        {"url": PICTURES, "caption": pa.array(CAPTIONS).dictionary_encode(), "image": pa.array(PICTURES, pa.binary_view())},
        {"caption": CAPTIONS, "text": ["no", "no", "no"], "image": STRUCTS},
        {"caption": CAPTIONS, "image": pa.array(PICTURES).dictionary_encode()},
    ],
)
def test_captions_and_pictures_in_whatever_type(tmp_path: Path, columns: dict) -> None:
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet", row_group_size=2)
    (tmp_path / "prompts.parquet").rename(tmp_path / "prompts")
    prompts = Prompts({str(tmp_path / "prompts"): "d"}, 100)
    prompts.check()
    assert (prompts.count, prompts.pictures, prompts.captions(0, 3)) == (3, True, ["one", "two", "three"])
    assert prompts.references(1, 3) == [["two"], ["three"]]
    assert [picture.getpixel((0, 0)) for picture in prompts.images(1, 3)] == [pixel(picture) for picture in PICTURES[1:]]
    assert Prompts({str(tmp_path / "prompts"): "d"}, 2).count == 2


def pixel(picture: bytes) -> object:
    return Image.open(io.BytesIO(picture)).getpixel((0, 0))


def test_rows_of_several_files_follow_each_other_and_count_by_their_own_file(tmp_path: Path) -> None:
    sources = {}
    for number, words in enumerate((["a", "b", "c"], ["d"], ["e", "f"], ["g"])):
        pq.write_table(pa.table({"caption": words}), place := str(tmp_path / f"{number}.parquet"), row_group_size=1)
        sources[place] = f"digest {number}"
    prompts = Prompts(sources, 6)
    assert (prompts.count, prompts.pictures) == (6, False)
    for start in range(6):
        for stop in range(start + 1, 7):
            assert prompts.captions(start, stop) == list("abcdef")[start:stop]
    assert prompts.digests(0, 3) == ("digest 0",) and prompts.digests(2, 5) == ("digest 0", "digest 1", "digest 2")
    pq.write_table(pa.table({"caption": ["g"], "image": PICTURES[:1]}), list(sources)[1])
    with pytest.raises(StageError, match="0.parquet: has no column image, and others have; give all, or leave image out of all"):
        Prompts(sources, 6).pictures  # noqa: B018


@pytest.mark.parametrize("beside", [{}, {"caption": ["p", "q"]}])
def test_several_captions_of_a_picture_are_all_references_and_the_first_is_the_prompt(tmp_path: Path, beside: dict) -> None:
    pq.write_table(pa.table({**beside, "captions": [["one", "uno", None], ["two"]]}), place := str(tmp_path / "prompts.parquet"))
    prompts = Prompts({place: "d"}, 9)
    prompts.check()
    assert prompts.references(0, 2) == [["one", "uno"], ["two"]]
    assert prompts.captions(0, 2) == beside.get("caption", ["one", "two"])


def test_a_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("caf\u00e9\r\n\r\n two \r\nthree".encode("utf-16"))
    prompts = Prompts({str(tmp_path / "prompts.txt"): "d"}, 2)
    prompts.check()
    assert (prompts.captions(0, 2), prompts.captions(1, 2)) == (["caf\u00e9", "two"], ["two"]) and not prompts.pictures


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"captions": CAPTIONS}, "column captions is string, expected lists of text"),
        ({"captions": [["one"], [" "]]}, "row 1: has no caption"),
        ({"words": CAPTIONS}, "columns found: words; needed: caption"),
        ({"caption": [1, 2, 3]}, "column caption is int64, expected string"),
        ({"caption": ["one", "two", " "]}, "row 2: has no caption"),
        ({"caption": ["one", None, "three"]}, "row 1: has no caption"),
        ({"caption": CAPTIONS, "image": ["http://x/1.jpg"] * 3}, "column image is string, expected the bytes of pictures"),
        (
            {"caption": CAPTIONS, "image": [{"bytes": 1}] * 3},
            "column image is struct<bytes: int64>, expected the bytes of pictures",
        ),
        ({"caption": CAPTIONS, "image": [*PICTURES[:2], None]}, "row 2: its picture is not in the file"),
        (
            {"caption": CAPTIONS, "image": [PICTURES[0], b"<html>", PICTURES[2]]},
            r"row 1: its picture cannot be read \(not_an_image\)",
        ),
        ({"caption": CAPTIONS, "image": [STRUCTS[0], {"bytes": None, "path": "x"}, None]}, "row 1: its picture is not"),
        ({"caption": ["one"]}, "has 1 rows; at least 2 prompts"),
        ({"caption": pa.array([], pa.string())}, "has 0 rows; at least 2 prompts"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(tmp_path: Path, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet", row_group_size=1)
    with pytest.raises(StageError, match=f"prompts.parquet(: |, ){message}") as error:
        Prompts({str(tmp_path / "prompts.parquet"): "d"}, 100).check()
    assert "\n" not in str(error.value)


def test_prompts_are_opened_in_the_plan(tmp_path: Path, store: Store) -> None:
    for name, text in (("a.jpg", "no picture yet"), ("a.txt", "a"), ("prompts.1", "one\n"), ("recipe.yaml", RECIPE)):
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=r"evaluate: .*prompts.1: has 1 rows; at least 2 prompts") as error:
        plan(load_recipe(tmp_path / "recipe.yaml"), store)
    assert "\n" not in str(error.value)
    (tmp_path / "prompts.2").write_text("two\nthree\n")
    assert plan(load_recipe(tmp_path / "recipe.yaml"), store)["evaluate"].state == "miss"
