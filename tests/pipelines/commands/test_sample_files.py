"""Where `sample` puts its pictures: beside what is there, never over it; and numbers that no sampling can mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from pipelines.commands.sampling import Request, Writer
from tests.pipelines.commands.test_sampling import FEW, PROMPT, rows_of, say  # noqa: F401
from tests.unidiffuser.test_generation import export  # noqa: F401
from unidiffuser.generation import Generated

RED, BLUE = (255, 0, 0), (0, 0, 255)


def writer(folder: Path) -> Writer:
    return Writer(Request("export", "t2i", prompts=[PROMPT]), folder, {})


def draw(folder: Path, colour: tuple[int, int, int], by: Writer | None = None) -> None:
    (by or writer(folder)).add(0, Generated(seed=0, source=0, image=Image.new("RGB", (8, 8), colour)))


def colours(folder: Path) -> dict[str, tuple[int, ...]]:
    return {file.name: Image.open(file).getpixel((0, 0)) for file in sorted(folder.glob("*.png"))}


def test_pictures_without_their_results_are_kept(tmp_path):
    draw(tmp_path, RED)
    (tmp_path / "results.jsonl").unlink()
    draw(tmp_path, BLUE)
    assert colours(tmp_path) == {"00000.png": RED, "00001.png": BLUE}
    assert [row["file"] for row in rows_of(tmp_path)] == ["00001.png"]


def test_numbered_pictures_of_ones_own_are_kept(tmp_path):
    for name in ("00007.png", "3.png", "a cat.png"):
        Image.new("RGB", (8, 8), RED).save(tmp_path / name)
    draw(tmp_path, BLUE)
    assert colours(tmp_path) == {"00007.png": RED, "00008.png": BLUE, "3.png": RED, "a cat.png": RED}


def test_two_commands_at_once_leave_each_others_pictures(tmp_path):
    first, second = writer(tmp_path), writer(tmp_path)
    draw(tmp_path, RED, first)
    draw(tmp_path, BLUE, second)
    draw(tmp_path, RED, first)
    assert colours(tmp_path) == {"00000.png": RED, "00001.png": BLUE, "00002.png": RED}
    assert [row["file"] for row in rows_of(tmp_path)] == ["00000.png", "00001.png", "00002.png"]


def test_a_picture_that_was_removed_gives_its_name_to_no_other(tmp_path):
    draw(tmp_path, RED)
    (tmp_path / "00000.png").unlink()
    draw(tmp_path, BLUE)
    assert colours(tmp_path) == {"00001.png": BLUE}


def test_a_line_that_was_cut_off_stays_alone(tmp_path):
    draw(tmp_path, RED)
    results = tmp_path / "results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole + whole[:20])
    draw(tmp_path, BLUE)
    lines = results.read_bytes().split(b"\n")
    assert lines[0] + b"\n" == whole and lines[1] == whole[:20] and json.loads(lines[2])["file"] == "00001.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guidance", "nan"), "'--guidance': Input should be less than or equal to 100"),
        (("--guidance", "inf"), "'--guidance': Input should be less than or equal to 100"),
        (("--seed", 2**64), "'--seed': Input should be less than or equal to 9223372036854775807"),
        (("--seed", 2**63 - 1, "--count", 2), "a seed must be in 0 .. 9223372036854775807"),
    ],
)
def test_numbers_that_nothing_can_be_drawn_with_are_one_line(export, arguments, message, tmp_path, say):  # noqa: F811
    out = tmp_path / "out"
    code, _, complaint = say("sample", export, "--task", "t2i", "--prompt", PROMPT, *FEW, "--out", out, *arguments)
    assert code == 2 and message in complaint and complaint.count("\n") == 1
    assert not out.exists()


def test_a_black_picture_is_an_error_instead(export, tmp_path, say, monkeypatch):  # noqa: F811
    def overflowing(self: object, x: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        return {name: part * float("nan") for name, part in x.items()}

    monkeypatch.setattr("unidiffuser.guidance.GuidedNoise.__call__", overflowing)
    out = tmp_path / "out"
    code, _, complaint = say("sample", export, "--task", "t2i", "--prompt", PROMPT, *FEW, "--out", out)
    assert code == 1 and complaint.count("\n") == 1 and not out.exists()
    assert (
        "error: sampling in float32 with guidance 7 gave values of latent, clip that are not finite: take another dtype"
        in complaint
    )


def test_a_file_is_no_folder_for_pictures(export, tmp_path, say):  # noqa: F811
    (tmp_path / "out").write_text("a letter")
    code, _, complaint = say("sample", export, "--task", "t2i", "--prompt", PROMPT, *FEW, "--out", tmp_path / "out")
    assert code == 2 and "there is a file of that name; name a folder" in complaint
    assert (tmp_path / "out").read_text() == "a letter"
