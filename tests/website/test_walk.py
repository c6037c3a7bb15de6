"""A walk along the pages, over blocks that need no training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from examples.little_web.folder import write_folder
from website.blocks import Block
from website.pages import SiteError
from website.walk import filled_in, run_block


def block(code: str, language: str = "bash") -> Block:
    return Block("docs/some.md", 3, language, code, "")


def test_a_block_runs_in_the_clone_and_one_that_fails_is_told(tmp_path: Path) -> None:
    assert run_block(block("echo one > made\ncat made"), tmp_path) is None and (tmp_path / "made").read_text() == "one\n"
    said = run_block(block("echo before\nfalse | true\necho never"), tmp_path)
    assert said is not None and "ended with 1" in said and "before" in said and "never\n" not in said.partition("ended")[2]


def test_words_in_capitals_are_the_newest_dataset_of_their_stage(tmp_path: Path) -> None:
    for number, day in enumerate(("2026-01-02", "2026-01-03", "2026-01-01")):
        folder = tmp_path / "runs" / "export" / str(number)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": f"print{number}", "created": day}))
    assert filled_in("sample EXPORT --out EXPORTS", tmp_path) == "sample print1 --out EXPORTS"
    with pytest.raises(SiteError, match="FILTER stands for a dataset of filter, and no command before has made one"):
        filled_in("inspect FILTER", tmp_path)


def test_a_folder_of_pictures_is_one_as_people_keep_theirs(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 12)
    write_folder(tmp_path / "two", 12)
    pictures = sorted(path for path in (tmp_path / "one").rglob("*") if path.suffix in (".jpg", ".png", ".webp"))
    assert len(pictures) == 12
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) >= 320
        assert path.with_suffix(".txt").read_text().strip()
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    with pytest.raises(ValueError, match="count must be in 1"):
        write_folder(tmp_path / "none", 0)
