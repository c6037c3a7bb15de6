"""The world of shapes, learned by the command that anyone would use: minutes, accuracies and distributions.

`--before REV` runs an earlier commit's command for the same experiment too. What is there is used again: a run that was stopped
goes on. What single changes of the recipe give is in `benchmarks.shapes_changes`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.before import ROOT, commit_of, worktree
from benchmarks.frame import Result, machine, progress
from infra.dataset import pointed
from infra.store import Store
from stages.runner.recipe import load_recipe

RECIPE = ROOT / "configs" / "shapes.yaml"
AT_LEAST = {"t2i_accuracy": 0.99, "i2t_accuracy": 0.99, "joint_consistency": 0.99}
AT_MOST = {"image_marginal_tv": 0.05, "text_marginal_tv": 0.05}
SHOWN = (*AT_LEAST, *AT_MOST, "minutes", "core_minutes")


def learned(store: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """What shapes.json says of a training.

    Args:
        settings: of fields of the recipe, as for `--set`; with a `name` of their own, trainings stand beside each other.

    Raises:
        typer.Exit: the run failed, and has said why.
    """
    command = [sys.executable, "-m", "pipelines.command", "run", str(RECIPE), "--store", store]
    run([*command, *(part for setting in settings for part in ("--set", setting))], ROOT)
    dataset = pointed(Store(store), load_recipe(RECIPE, list(settings)).name, "evaluate")
    assert dataset is not None
    return json.loads(dataset.store.read(dataset.file("shapes.json").path))


def learned_before(revision: str, store: str) -> dict[str, Any]:
    """What shapes.json says of the training of an earlier commit, by its own command."""
    out = Path(store, "before").resolve()
    with worktree(revision) as place:
        own = ["-m", "examples.shapes", "--state", str(out / "state"), "--out", str(out)]
        if (place / "configs" / "shapes.yaml").is_file():
            run([sys.executable, "-m", "pipelines.command", "run", "configs/shapes.yaml", "--store", str(out)], place)
            own = ["-m", "examples.shapes", "--store", str(out), "--out", str(out)]
        run([sys.executable, *own], place)
    return json.loads((out / "shapes.json").read_text(encoding="utf-8"))


def run(command: list[str], folder: Path) -> None:
    if (code := subprocess.run(command, stdout=sys.stderr, cwd=folder).returncode) != 0:
        raise typer.Exit(code)


def met(values: dict[str, Any]) -> bool:
    """Whether all bars but that of the minutes are met."""
    return all(values[name] >= bar for name, bar in AT_LEAST.items()) and all(
        values[name] <= bar for name, bar in AT_MOST.items()
    )


def main(
    before: Annotated[str | None, typer.Option(help="An earlier commit, whose minutes are compared.", metavar="REV")] = None,
    store: Annotated[str, typer.Option(help="Folder of the datasets.")] = "runs/shapes",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Learn the world of shapes; the ratio is that of an earlier commit's minutes, or of the bar's 28, to this one's."""
    words = machine(torch.device("cpu"))
    found = learned(store)
    values = {name: found[name] for name in SHOWN} | {"steps": found["training"]["steps"]}
    progress(" ".join(f"{name}={value}" for name, value in values.items()))
    peer = learned_before(before, store) if before else None
    Result(
        name="shapes",
        ratio=(peer["minutes"] if peer else 28) / values["minutes"],
        peer="before" if peer else "bar",
        figures=values | {"met": str(met(values)).lower()},
        machine=words,
        details={"commit": commit_of()}
        | ({"before": {"commit": commit_of(before), **{name: peer[name] for name in SHOWN}}} if peer and before else {}),
    ).finish(file)


if __name__ == "__main__":
    typer.run(main)
