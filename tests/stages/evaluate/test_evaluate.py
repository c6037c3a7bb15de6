"""evaluate: what it takes of the prompts, by which network each floor and ceiling is drawn, and what its score counts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from infra.dataset import FileEntry, Stats
from infra.store import Store
from stages.evaluate.preference import Draw, Model, Report, plan_draws, plan_report
from stages.evaluate.stage import EvaluateConfig
from stages.runner.contract import Job, Output, Unit, UnitRecord
from tests.stages.committed import dataset_of
from unidiffuser.modalities import paper_modalities
from unidiffuser.uvit import UViT, UViTConfig


def png(image: Image.Image, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return file.getvalue()


def test_pictures_of_prompts_are_taken_as_one_sees_them() -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    model = Model.__new__(Model)
    values = [png(upright.transpose(Image.Transpose.ROTATE_90), exif=exif), png(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))]
    model.prompts = pa.table({"image": values})
    turned, clear = model.real_images(0, 2)
    assert np.array_equal(np.asarray(turned), np.asarray(upright))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)


def test_the_floor_is_drawn_by_a_network_that_has_learned_nothing_and_the_rest_by_the_trained_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = UViTConfig(width=8, depth=2, heads=1, modalities=paper_modalities((4, 2, 2), clip=8, text=(2, 8)))
    trained = UViT(sizes)
    drawn_by: list[tuple[list[int], torch.Tensor]] = []

    def generate(task: str, seeds: list[int], **_: Any) -> list[Any]:
        drawn_by.append((seeds, torch.cat([weight.flatten() for weight in network.uvit.parameters()])))
        return [SimpleNamespace(image=Image.new("RGB", (1, 1)))] * len(seeds)

    network: Any = SimpleNamespace(uvit=trained, generate=generate)
    draw = Draw.__new__(Draw)
    draw.unidiffuser, draw.trained, draw.device = network, trained, "cpu"
    draw.config = EvaluateConfig(prompts="prompts.txt", seed=7)
    draw.prompts = pa.table({"caption": [f"prompt {n}" for n in range(6)]})
    rows = []
    for number, (kind, start, stop) in enumerate([("model", 0, 2), ("untrained", 0, 3), ("model", 2, 6), ("untrained", 3, 5)]):
        out = Output(tmp_path / str(number))
        draw.run(Unit(kind, (), {"kind": kind, "start": start, "stop": stop}), out)
        rows.append((pq.read_metadata(out.folder / "drawn.parquet").num_rows, out.stats.rows_in, out.stats.rows_out))
    # A prompt counts once, whoever draws for it.
    assert rows == [(2, 2, 2), (3, 0, 0), (4, 4, 4), (2, 0, 0)]
    assert [seeds for seeds, _ in drawn_by] == [[7, 8], [7, 8, 9], [9, 10, 11, 12], [10, 11]]
    torch.manual_seed(7)
    fresh, learned = (torch.cat([weight.flatten() for weight in each.parameters()]) for each in (UViT(sizes), trained))
    for (_, weights), expected in zip(drawn_by, (learned, fresh, learned, fresh), strict=True):
        assert torch.equal(weights, expected)


def test_the_floor_has_prompts_of_its_own_number(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(60)))
    config = EvaluateConfig(prompts="prompts.txt", count=52, untrained=30)
    job = Job(Store(str(tmp_path)), "evaluate", "evaluate", config, {}, {str(tmp_path / "prompts.txt"): "d"}, {})
    assert [(unit.name, unit.payload["stop"]) for unit in plan_draws(job)] == [
        ("model-00000", 25), ("model-00025", 50), ("model-00050", 52), ("untrained-00000", 25), ("untrained-00025", 30),
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [3, 25])
def test_a_preference_is_what_a_count_by_hand_finds_of_pairs_half_the_list_apart(batch: int) -> None:
    count, half = 12, 6
    chance = np.random.default_rng(0)
    texts = chance.normal(size=(count, 5)).astype(np.float32)
    # Drawn pictures that resemble their captions, each twice as long as the one before it: a cosine knows no length.
    images = ((texts + chance.normal(scale=1.5, size=texts.shape)) * 2.0 ** np.arange(count)[:, None]).astype(np.float32)
    images[2 + half] = images[2]
    report = Report.__new__(Report)
    report.config = EvaluateConfig(prompts="prompts.txt", batch=batch)
    clip: Any = SimpleNamespace(
        text=lambda captions: torch.from_numpy(texts[[int(caption) for caption in captions]]),
        image=lambda pictures: torch.from_numpy(images[list(pictures)]),
    )
    report.unidiffuser = SimpleNamespace(clip_image=clip)  # type: ignore[assignment]

    def preferred(apart: int) -> float:
        def cosine(text: int, image: int) -> float:
            return float(texts[text] @ images[image] / np.linalg.norm(texts[text]) / np.linalg.norm(images[image]))

        pairs = [(cosine(n, n), cosine(n, (n + apart) % count)) for n in range(count)]
        return sum(0.5 if np.isclose(own, other) else own > other for own, other in pairs) / count

    score = report.preference([str(n) for n in range(count)], list(range(count)))
    assert score == round(preferred(half), 4)
    assert len({preferred(apart) for apart in (1, half, count - 1)}) > 1, "neighbours would give the same: the test shows nothing"


def solid(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


@pytest.fixture
def reported(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Any]]:
    """The report on four prompts, of which the untrained network has drawn two, and the rows of its sheet.

    Every picture has a shade of its own, and scores are what is compared, as ``CAPTIONS of SHADES``.
    """

    def table(kind: str, number: int, column: str, values: list[Any]) -> UnitRecord:
        (tmp_path / "drawn").mkdir(exist_ok=True)
        pq.write_table(pa.table({column: values}), place := tmp_path / "drawn" / f"{kind}-{number:05d}.parquet")
        store.publish(place, path := f"drawn/{place.name}")
        return UnitRecord(f"k{number}", place.stem, [FileEntry(path, len(values), 1, f"{kind}{number}", "u")], Stats())

    records = [
        table("model", 0, "image", [png(solid(shade)) for shade in (10, 11, 12)]),
        table("model", 3, "image", [png(solid(13))]),
        table("untrained", 0, "image", [png(solid(shade)) for shade in (20, 21)]),
        table("captions", 0, "caption", ["w0", "w1", "w2", "w3"]),
    ]
    (tmp_path / "losses").mkdir()
    rows = [{"kind": kind, "step": step, "loss": 1 / step} for step in (1, 3) for kind in ("train", "validation")]
    (tmp_path / "losses" / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    checkpoint = dataset_of(store, "train", tmp_path / "losses", {})
    config = EvaluateConfig(prompts="prompts.txt", count=4, untrained=2)
    inputs = {"checkpoint": checkpoint, "history.train-x": checkpoint}
    job = Job(store, "evaluate", "evaluate", config, inputs, {}, {})
    report = Report.__new__(Report)
    report.job, report.config = job, config
    report.prompts = pa.table({"caption": ["p0", "p1", "p2", "p3"], "image": [png(solid(shade)) for shade in (30, 31, 32, 33)]})

    def preference(captions: list[str], images: list[Image.Image]) -> str:
        return f"{' '.join(captions)} of {' '.join(str(image.getpixel((0, 0))[0]) for image in images)}"  # type: ignore[index]

    monkeypatch.setattr(report, "preference", preference)
    monkeypatch.setattr(report, "generate", lambda task, count: [SimpleNamespace(image=solid(90), caption=task)] * count)
    (unit,) = plan_report(job, {"draw": records})
    assert unit.digests == (checkpoint.manifest.fingerprint, "model0", "model3", "untrained0", "captions0")

    sheet: list[Any] = []
    monkeypatch.setattr("stages.evaluate.preference.sample_sheet", lambda file, rows: sheet.extend(rows))
    monkeypatch.setattr("stages.evaluate.preference.loss_curve", lambda file, histories: None)
    report.run(unit, out := Output(tmp_path / "report"))
    return json.loads((out.folder / "report.json").read_text()), sheet


def test_a_report_compares_floor_score_and_ceiling_each_with_its_own_pictures(reported: tuple[dict[str, Any], list[Any]]) -> None:
    facts, _ = reported
    assert facts["prompts"] == 4 and facts["preference"] == {
        "text_to_image": "p0 p1 p2 p3 of 10 11 12 13",
        "text_to_image_untrained": "p0 p1 of 20 21",
        "text_to_image_real": "p0 p1 p2 p3 of 30 31 32 33",
        "image_to_text": "w0 w1 w2 w3 of 30 31 32 33",
    }
    assert facts["validation_loss"] == {"train-x": [[1, 1.0], [3, 0.33333]]}


def test_the_sheet_of_a_report_shows_pictures_under_their_own_words(reported: tuple[dict[str, Any], list[Any]]) -> None:
    _, sheet = reported
    shown = [(title, [(image and image.getpixel((0, 0))[0], words) for image, words in cells]) for title, cells in sheet]
    assert shown == [
        ("Text to image", [(10, "p0"), (11, "p1"), (12, "p2"), (13, "p3")]),
        ("Image to text", [(30, "w0"), (31, "w1"), (32, "w2"), (33, "w3")]),
        ("Joint: image and text together", [(90, "joint")] * 6),
        ("Image only", [(90, "")] * 6),
        ("Text only", [(None, "t")] * 6),
    ]
