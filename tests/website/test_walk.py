"""A walk along the pages, over blocks that need no training."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from examples.little_web.folder import write_folder
from pipelines.command import app
from website.blocks import Block, blocks, to_run
from website.pages import ROOT, SiteError, in_order, written
from website.walk import PICTURE, STAGES, filled_in, run_block

FILE = re.compile(r"[\w./-]+\.(?:jpg|png|parquet|yaml|html|pth|txt|csv)\b")
# Commands whose first argument is a checkpoint.
OF_CHECKPOINTS = ("sample", "evaluate", "convert")


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


def lacking(codes: Sequence[str]) -> Iterator[str]:
    """Words of commands, run one after another in a walk's clone, that name what is not there by then."""
    there = {PICTURE, *subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).split("\n")}
    for line in (line for code in codes for line in code.partition("<<")[0].split("\n")):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] != "make" and not words[0].startswith(".venv/bin/"):
            yield words[0]
        made = [after for word, after in zip(words, words[1:], strict=False) if word in ("--out", "examples.little_web.folder")]
        if "demo" in words:
            made.append("runs/little-web")
        if "convert" in words:
            made.append(words[words.index("convert") + 2])
            if made[-1] in there:
                yield made[-1]  # which it does not write over
        known = there | set(made)
        for name in FILE.findall(line.partition(" #")[0]):
            if known.isdisjoint([name, *map(str, Path(name).parents)]):
                yield name
        if len(words) > 2 and words[1] in OF_CHECKPOINTS and words[2] not in known.union(map(str.upper, STAGES)):
            yield words[2]
        there = known


def test_every_command_of_a_page_has_the_arguments_that_it_is_given() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for page in written():
        for block in blocks(page):
            lines = block.code.replace("\\\n", " ").split("\n") if block.language == "bash" else []
            for words in (shlex.split(line, comments=True) for line in lines if ".venv/bin/unidiffuser" in line):
                name, *given = words[words.index(".venv/bin/unidiffuser") + 1 :]
                try:
                    commands[name].make_context(name, given)
                except Exception as error:
                    raise AssertionError(f"{block.page}:{block.line}: {shlex.join(words)}: {error!r}") from error


def test_every_file_and_checkpoint_that_a_page_names_is_there_when_its_command_runs() -> None:
    run = [each for pages in in_order(written()).values() for page in pages for each in to_run(page)]
    assert list(lacking([each.code for each in run if each.language == "bash"])) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("unidiffuser list", ["unidiffuser"]),
        (".venv/bin/unidiffuser evaluate 3f9a2c", ["3f9a2c"]),
        (".venv/bin/unidiffuser evaluate EXPORT --prompts held_out.parquet  # a.png", ["held_out.parquet"]),
        (".venv/bin/unidiffuser detect out/0.png photo.jpg\nmake demo", ["out/0.png"]),
        (".venv/bin/unidiffuser sample EXPORT --out out\n.venv/bin/unidiffuser detect out/0.png photo.jpg", []),
        ("make demo\n.venv/bin/unidiffuser evaluate EXPORT --prompts runs/little-web/held_out.parquet", []),
        (".venv/bin/unidiffuser convert EXPORT a --to native\n.venv/bin/unidiffuser convert a b --to official", []),
        (".venv/bin/unidiffuser convert EXPORT a --to native\n.venv/bin/unidiffuser convert EXPORT a --to official", ["a"]),
    ],
)
def test_what_a_command_lacks_is_found(code: str, found: list[str]) -> None:
    assert list(lacking([code])) == found
