"""An evaluation as a whole, on the smallest world: what is drawn for whom, what is drawn again, and what a report holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.dataset import Dataset
from infra.store import Store
from stages.evaluate.stage import Evaluate
from stages.measuring.painters import World
from stages.measuring.samples import Samples
from stages.runner.contract import Job, Output
from stages.runner.here import run_here
from stages.runner.worker import PoolWorker

ASKED: dict[str, Any] = {
    "count": 8, "steps": 1, "batch": 4, "guidance": 1.0, "seed": 3, "beams": 1,
    "measures": [
        {"kind": "fid"}, {"kind": "kid", "subset": 4, "subsets": 3}, {"kind": "cmmd"}, {"kind": "precision-recall"},
        {"kind": "clip-score"}, {"kind": "captions"}, {"kind": "preference", "untrained": 4}, {"kind": "shapes", "samples": 8},
    ],
}  # fmt: skip
FIGURES = [
    "fid_clip", "kid_clip", "cmmd", "precision_clip", "recall_clip", "clip_score_t2i", "clip_score_i2t", "clip_score_real",
    "bleu4", "cider", "preference_t2i", "preference_i2t", "preference_real", "preference_untrained", "t2i_accuracy",
    "i2t_accuracy", "joint_consistency", "image_marginal_tv", "text_marginal_tv",
]  # fmt: skip


@pytest.fixture
def inputs(checkpoint: Dataset, made: Dataset) -> dict[str, Dataset]:
    return {"checkpoint": checkpoint, "codec": made, "history.x-train": checkpoint}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Samples, int, int]]]:
    """What is drawn, in order."""
    seen: list[tuple[Samples, int, int]] = []
    draw = World.draw

    def counting(self: World, samples: Samples, start: int, stop: int) -> Any:
        seen.append((samples, start, stop))
        return draw(self, samples, start, stop)

    monkeypatch.setattr(World, "draw", counting)
    yield seen


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their drawings, which take longer than all else here."""
    for name in ("sample_sheet", "loss_curve"):
        monkeypatch.setattr(f"stages.measuring.phases.{name}", lambda file, _: file.write_bytes(b""))


def moved(dataset: Dataset, store: Store) -> Dataset:
    return Dataset(store, dataset.manifest)


def test_all_measures_share_what_is_drawn_and_an_interrupted_evaluation_ends_with_the_same_numbers(
    inputs: dict[str, Dataset],
    store: Store,
    make: Callable[..., Dataset],
    drawn: list[tuple[Samples, int, int]],
    digests: Callable[[Dataset], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(store.root, tmp_path / "copy")
    whole = make(Evaluate, store, inputs, **ASKED)
    report = json.loads(store.read(whole.file("report.json").path))
    assert [figure["name"] for figure in report["figures"]] == FIGURES
    assert whole.manifest.summary["figures"] == report["figures"]
    assert report["checkpoint"] == inputs["checkpoint"].manifest.fingerprint and report["prompts"] == 8
    assert report["sampling"] == {"sampler": "dpm++2m-sde", "steps": 1, "guidance": 1.0, "beams": 1}
    for name in ("sample-sheet.png", "loss-curve.png", "shapes-samples.png"):
        with whole.open(whole.file(name)) as file:
            assert min(Image.open(file).size) > 200
    # Eight of each task in units of four, and four by the untrained network; nothing twice, whoever asks for it.
    stretches = [(samples.task, samples.of, start, stop) for samples, start, stop in drawn]
    assert sorted(stretches) == sorted(
        [(task, "checkpoint", start, start + 4) for task in ("t2i", "i2t", "joint", "i", "t") for start in (0, 4)]
        + [("t2i", "untrained", 0, 4)]
    )
    assert whole.manifest.stats.rows_in == whole.manifest.stats.rows_out == 5 * 8 + 4

    other, publish, left = Store(str(tmp_path / "copy")), Output.publish, [7]

    def failing(self: Output, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return publish(self, *arguments)

    monkeypatch.setattr(Output, "publish", failing)
    copies = {name: moved(dataset, other) for name, dataset in inputs.items()}
    interruptions = 0
    while True:
        try:
            again = make(Evaluate, other, copies, **ASKED)
            break
        except KeyboardInterrupt:
            interruptions, left[0] = interruptions + 1, 7
    assert interruptions >= 3 and digests(again) == digests(whole)


def test_another_measure_draws_only_what_is_not_there(
    inputs: dict[str, Dataset],
    store: Store,
    make: Callable[..., Dataset],
    drawn: list[tuple[Samples, int, int]],
    no_pictures: None,
) -> None:
    few = {**ASKED, "measures": [{"kind": "fid"}, {"kind": "captions"}]}
    make(Evaluate, store, inputs, **few)
    assert {samples.task for samples, _, _ in drawn} == {"t2i", "i2t", "joint", "i", "t"}
    drawn.clear()
    first = make(Evaluate, store, inputs, **{**few, "measures": [*few["measures"], {"kind": "clip-score"}, {"kind": "cmmd"}]})
    assert drawn == [] and len(first.manifest.summary["figures"]) == 1 + 2 + 3 + 1
    make(Evaluate, store, inputs, **{**few, "guidance": 2.0})
    assert {samples.guidance for samples, _, _ in drawn} == {2.0}


def test_units_that_are_run_here_are_those_of_the_stage(
    inputs: dict[str, Dataset],
    store: Store,
    make: Callable[..., Dataset],
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few: dict[str, Any] = {**ASKED, "measures": [{"kind": "clip-score"}]}
    config = Evaluate.Config.model_validate(few)
    job = Job(store, "evaluate", "beside", config, inputs, {}, Evaluate.weights(config))
    records = run_here(Evaluate, job)
    summary = records["report"][0].notes
    assert [figure["name"] for figure in summary["figures"]] == ["clip_score_t2i", "clip_score_i2t", "clip_score_real"]
    again = run_here(Evaluate, job)
    assert [record.key for record in again["draw"]] == [record.key for record in records["draw"]]
    monkeypatch.setattr(PoolWorker, "run", lambda *_: pytest.fail("a unit was done again"))
    monkeypatch.setattr("stages.runner.pool.run_pool", lambda *_: pytest.fail("a unit was done again"))
    run_here(Evaluate, job)
    assert make(Evaluate, store, inputs, **few).manifest.summary["figures"] == summary["figures"]


def test_one_measure_over_two_networks_has_figures_and_details_of_both(
    inputs: dict[str, Dataset], store: Store, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.measuring.phases.network", lambda name, _: lambda values: np.full((len(values), 4), len(name)))
    monkeypatch.setattr("stages.measuring.pictures.kid", lambda drawn, *_: (float(drawn[0, 0]), 0.5))
    kids = [{"kind": "kid"}, {"kind": "kid", "features": "inception"}]
    config = Evaluate.Config.model_validate({**ASKED, "measures": kids, "inception": "weights.pth"})
    report = run_here(Evaluate, Job(store, "evaluate", "kids", config, inputs, {}, dict.fromkeys(("judge", "inception"), "")))[
        "report"
    ][0]
    assert {figure["name"]: figure["value"] for figure in report.notes["figures"]} == {"kid_clip": 10, "kid": 9}
    [path] = [entry.path for entry in report.files if entry.path.endswith("report.json")]
    assert json.loads(store.read(path))["details"] == {"kid": {"kid_clip_deviation": 0.5, "kid_deviation": 0.5}}


def test_the_floor_is_drawn_by_a_network_that_has_learned_nothing(
    inputs: dict[str, Dataset], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from unidiffuser.uvit import UViT

    config = Evaluate.Config.model_validate(ASKED)
    painter = World(Job(store, "evaluate", "x", config, inputs, {}, {}))
    way = Samples("t2i", 1, 1.0, "dpm++2m")
    learned = painter.artist(way).model
    torch.manual_seed(ASKED["seed"])
    fresh = UViT(learned.config)
    floor = painter.artist(replace(way, of="untrained")).model
    for name, values in floor.state_dict().items():
        assert torch.equal(values, fresh.state_dict()[name])
    assert any(not torch.equal(values, floor.state_dict()[name]) for name, values in learned.state_dict().items())
