"""`unidiffuser detect`: what `sample` has marked is found, with its checkpoint; a picture without a mark is no error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.little_web.compose import all_scenes, render
from infra.store import Store
from pipelines.commands.detection import detect, words
from tests.pipelines.commands.test_sampling import rows_of, say, store  # noqa: F401
from tests.unidiffuser.test_generation import export, noise_image  # noqa: F401
from tests.unidiffuser.test_provenance import TOLD
from unidiffuser.generation import UniDiffuser
from unidiffuser.provenance import write_provenance

SCENE = all_scenes()[7]

DRAW = ("--task", "i", "--steps", 1, "--beams", 1)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 pixels as the network draws it, of more as one would that has learned something: a scene."""
    decode = UniDiffuser.decode

    def decoded(self: UniDiffuser, parts: dict, *more: Any) -> Any:
        side = 4 * parts["latent"].shape[-1]
        return decode(self, parts, *more) if side == 32 else ([render(SCENE, side)], [])

    monkeypatch.setattr(UniDiffuser, "decode", decoded)


def test_samples_are_marked_unless_told_otherwise_and_the_mark_names_the_checkpoint(export, tmp_path, say):  # noqa: F811
    folder = Path(shutil.copytree(export, tmp_path / "told"))
    write_provenance(folder, {**TOLD, "fingerprint": "3f9a2c1d" + "0" * 16})
    for name, more in (("marked", ("--size", 256)), ("plain", ("--size", 256, "--no-mark")), ("small", ())):
        code, _, complaint = say("sample", folder, *DRAW, *more, "--out", tmp_path / name)
        assert code == 0, complaint
    pictures = [tmp_path / name / "00000.png" for name in ("marked", "plain", "small")]
    assert [rows_of(picture.parent)[0]["mark"] for picture in pictures] == ["tiled", None, None]
    one, other = (np.asarray(Image.open(picture), int) for picture in pictures[:2])
    assert 0 < np.abs(one - other).max() <= 16
    code, printed, _ = say("detect", *pictures, "--store", tmp_path / "none")
    assert code == 0
    marked, *rest = printed.splitlines()
    assert marked == f"{pictures[0]}: mark tiled, checkpoint 3f9a2c1d; its text fields name 3f9a2c1d0000"
    assert [line.split("; ")[0] for line in rest] == [f"{picture}: no mark found" for picture in pictures[1:]]
    Image.open(pictures[0]).save(tmp_path / "sent.jpg", quality=75)
    code, printed, _ = say("detect", tmp_path / "sent.jpg", "--json", "--store", tmp_path / "none")
    mark = {"kind": "tiled", "checkpoint": "3f9a2c1d", "node": None, "dataset": None}
    assert code == 0 and json.loads(printed) == {"image": str(tmp_path / "sent.jpg"), "mark": mark, "lineage": None}


def test_a_checkpoint_of_the_store_is_named_by_its_node(store, say, tmp_path):  # noqa: F811
    code, _, complaint = say("sample", "6578706f", "--store", store.root, *DRAW, "--size", 256, "--out", tmp_path)
    assert code == 0, complaint
    (row,) = detect([tmp_path / "00000.png"], Store(store.root), None)
    assert row["mark"] == {
        "kind": "tiled", "checkpoint": "6578706f", "node": "x-export", "dataset": "export/6578706f72746578706f7274"
    }  # fmt: skip
    assert row["lineage"]["export"] == "6578706f72746578706f7274"
    assert "checkpoint 6578706f: x-export export/6578706f72746578706f7274" in words(row)


def test_what_cannot_be_read_is_one_line_behind_what_is_told_of_the_others(tmp_path, say):  # noqa: F811
    (tmp_path / "text.png").write_text("no picture")
    noise_image(0).save(tmp_path / "good.png")
    good, text, none = (tmp_path / f"{name}.png" for name in ("good", "text", "none"))
    found, absent, damaged = f"{good}: no mark found\n", f"{none}: no such file", f"{text}: not a picture that can be read"
    assert say("detect", good, none) == (2, found, f"error: {absent}\n")
    assert say("detect", none, good, text) == (2, found, f"error: {absent}; {damaged} (not_an_image)\n")
    code, printed, _ = say("detect", none, good, "--json")
    assert code == 2 and json.loads(printed) == {"image": str(good), "mark": None, "lineage": None}
    code, _, complaint = say("detect", tmp_path / "good.png", "--mark-weights", tmp_path)
    assert code == 2 and complaint.startswith(f"error: --mark-weights {tmp_path}/encoder_Q.ckpt: no such file")
    assert len(complaint.splitlines()) == 1


def test_a_mark_of_a_checkpoint_without_fingerprint_says_so():
    mark = {"kind": "tiled", "checkpoint": None, "node": None, "dataset": None}
    row = {"image": "a.png", "mark": mark, "lineage": {"sha256": "ab" * 32}}
    assert words(row) == "a.png: mark tiled, a checkpoint that knew no fingerprint of its own; its text fields name abababababab"


@pytest.mark.parametrize("text", [{"Software": "unidiffuser", "lineage": "{"}, {"Software": "other", "lineage": "{}"}])
def test_text_fields_of_others_are_nobodys_word(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    fields = PngInfo()
    for name, value in text.items():
        fields.add_text(name, value)
    noise_image(0).save(tmp_path / "a.png", pnginfo=fields)
    assert next(detect([tmp_path / "a.png"], Store(str(tmp_path / "none")), None))["lineage"] is None
