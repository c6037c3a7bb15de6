"""A plan for this machine: what is measured, and what is foretold from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import plan as benchmark
from infra.dataset import point
from infra.store import Store
from pipelines.commands.planning import show
from pipelines.planning import probe
from pipelines.planning.calibration import Machine, calibrated
from pipelines.planning.foretold import foretold
from pipelines.planning.plan import Asked, asked_of, on_this_machine
from pipelines.planning.probe import Probe
from stages.runner.contract import StageError
from stages.runner.recipe import load_recipe
from tests.pipelines.commands.test_comparison import put
from unidiffuser.encoders import ImageLatents

TINY = ["train.shapes.workers=1", "train.shapes.model.width=16", "train.shapes.model.depth=2", "train.shapes.model.heads=2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return asked_of(load_recipe("configs/demo.yaml"), Store(str(tmp_path_factory.mktemp("plan") / "none")))


@pytest.fixture(scope="module")
def measured(demo: Asked) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    """What one process measures, in a hurry, but for training steps; and the shapes of the pictures that were encoded."""
    shapes: list[tuple[int, ...]] = []
    moments = ImageLatents.moments

    def noted(self: ImageLatents, pixels: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(pixels.shape))
        return moments(self, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SECONDS", 0.0)
        patch.setattr(probe, "PICTURES", 2)
        patch.setattr(ImageLatents, "moments", noted)
        return Probe(demo.recipe, (), 0, 1, lambda: None).measure(Path("none")), shapes


@pytest.fixture
def found(measured: tuple[dict[str, float], list[tuple[int, ...]]]) -> dict[str, float]:
    return measured[0]


@pytest.fixture
def machine(found: dict[str, float]) -> Machine:
    steps = {
        "start": 1.0,
        "begin train-256": 3.0,
        "step train-256": 0.1,
        "step train-512": 0.2,
        "call t2i": 1e-3,
        "call i2t": 1e-3,
    }
    return Machine(2, 2, 0, 40.0, found | steps | {"around t2i": 0.01, "around i2t": 0.02})


def test_every_piece_of_the_demo_is_measured(measured: tuple[dict[str, float], list[tuple[int, ...]]]) -> None:
    found, shapes = measured
    pieces = {"look", "score", "store", "text", "decode", "vae little-encode", "square large-encode", "torch", "flops"}
    assert pieces <= found.keys() and all(seconds > 0 for seconds in found.values())
    assert [(shape[0], shape[-1]) for shape in shapes] == 2 * [(2, 256)] + 2 * [(2, 512)], "each at its node's size, and one more"


def test_more_rows_and_slower_pieces_take_longer(demo: Asked, machine: Machine) -> None:
    told = foretold(demo, machine)
    assert told.keys() == demo.recipe.nodes.keys() and all(seconds > 0 for seconds in told.values())
    slower = replace(machine, found={**machine.found, "vae little-encode": machine.found["vae little-encode"] + 0.1})
    rows = next(work.rows_in for work in demo.works if work.node == "little-encode")
    # Two workers share them.
    assert foretold(demo, slower)["little-encode"] - told["little-encode"] == pytest.approx(rows * 0.1 / 2)
    assert {name for name in told if foretold(demo, slower)[name] != told[name]} == {"little-encode"}
    small, large = (demo.recipe.nodes[name].config.steps for name in ("train-256", "train-512"))
    assert told["train-512"] - told["train-256"] > large * 0.2 - small * 0.1


def test_a_gpu_has_a_worker_and_downloads_have_the_cores(demo: Asked, machine: Machine) -> None:
    told, one = foretold(demo, machine), foretold(demo, replace(machine, gpus=1))
    assert one["little-download"] == told["little-download"] and one["little-encode"] > told["little-encode"]


def test_what_was_not_measured_is_told_by_its_arithmetic(tmp_path: Path, machine: Machine) -> None:
    paper = asked_of(load_recipe("configs/paper-v0.yaml"), Store(str(tmp_path / "none")))
    alone = replace(machine, found={name: machine.found[name] for name in ("start", "ray", "torch", "flops", "store")})
    told = foretold(paper, alone)
    flop = next(training.flop for training in paper.trainings if training.node == "train-256")
    assert told["train-256"] == pytest.approx(flop / (machine.found["flops"] * 0.5 * 2), rel=1e-3)


def test_the_plan_of_this_machine_is_shown(demo: Asked, machine: Machine) -> None:
    found = on_this_machine(demo, machine.told(), foretold(demo, machine))
    console = Console(width=160, record=True, quiet=False)
    show(found, console)
    assert "on this machine (2 cores)" in console.export_text() and found["machine"]["calibrated"]
    assert found["work_seconds"] == pytest.approx(sum(node["seconds"] for node in found["nodes"]))
    json.dumps(found)


def test_processes_measure_the_trainers_own_steps(tmp_path: Path) -> None:
    """In processes of their own, as a plan does it: a world without pictures, and a training of a few thousand numbers."""
    recipe = load_recipe("configs/shapes.yaml", [*TINY, "evaluate=null", "train.shapes.compile=false"])
    measured = calibrated(asked_of(recipe, Store(str(tmp_path / "none"))))
    assert 0 < measured.found["step train-shapes"] < measured.found["begin train-shapes"]
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.planning import calibration

    (tmp_path / "0.failed").write_text("Traceback\nValueError: no such thing", encoding="utf-8")
    with pytest.raises(StageError, match="^measuring this machine failed: ValueError: no such thing$"):
        calibration._read(tmp_path, 0, 1)
    (tmp_path / "0.failed").unlink()
    with pytest.raises(StageError, match="took more than"):
        calibration._read(tmp_path, 0, None)


def test_the_benchmark_compares_with_what_the_store_says(tmp_path: Path, demo: Asked, machine: Machine) -> None:
    store = Store(str(tmp_path / "runs"))
    for node, letter, seconds in (("little-select", "a", 4.0), ("train-512", "b", 100.0)):
        made = put(store, demo.recipe.nodes[node].stage, node, letter, {})
        made.manifest.seconds = seconds
        store.write_json(f"{made.folder}/manifest.json", made.manifest.model_dump(mode="json", by_alias=True))
        point(store, "demo", node, made.manifest.reference())
    nodes = benchmark.compared(demo.recipe, store, machine, Store(str(tmp_path / "none")))
    told = foretold(demo, machine)
    assert {node: pair[1] for node, pair in nodes.items()} == {"little-select": 4.0, "train-512": 100.0}
    assert nodes["train-512"][0] == pytest.approx(told["train-512"], abs=0.01)
    assert benchmark.sums({"a": [12.0, 10.0], "b": [10.0, 10.0]}) == {"foretold_s": 22.0, "work_s": 20.0, "off_percent": 10.0}
