"""The world of shapes, learned by the command that anyone would use: minutes, accuracies, distributions, and single changes.

`--before REV` runs an earlier commit's command for the same experiment too. `--changes` trains once for each single change of
`CHANGES`, all with `--steps` steps. The pairs are made once, and what is there is used again: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Change:
    """Fields of the recipe that are otherwise, and how many of the steps are done with them."""

    fields: tuple[str, ...] = ()
    share: float = 1.0


def _training(**fields: str) -> tuple[str, ...]:
    return tuple(f"train.shapes.{name.replace('__', '.')}={value}" for name, value in fields.items())


CHANGES = {
    "none": Change(),
    "half-the-steps": Change(share=0.5),
    "twice-the-steps": Change(share=2),
    "adamw": Change(_training(optimizer="{kind: adamw, lr: 2.0e-3, weight_decay: 0.01, betas: [0.9, 0.98]}")),
    "half-the-rate": Change(_training(optimizer__lr="1.0e-3", optimizer__rest__lr="1.0e-3")),
    "twice-the-rate": Change(_training(optimizer__lr="4.0e-3", optimizer__rest__lr="4.0e-3")),
    "constant-rate": Change(_training(schedule__decay="none", schedule__decay_steps="null")),
    "uniform-timesteps": Change(_training(timesteps="uniform")),
    "shuffled-rows": Change(_training(data__order="shuffled")),
    "random-scenes": Change(("subsets.shapes.world.draws=random",)),
    "fewer-pairs": Change(("subsets.shapes.world.rows=65536",)),
    "gamma-5": Change(_training(objective__min_snr_gamma="5")),
    "no-gamma": Change(_training(objective__min_snr_gamma="null")),
    "noise-of-stable-diffusion": Change(_training(noise="{}")),
    "noise-that-ends-lower": Change(_training(noise="{beta_start: 0.005, beta_end: 0.02}")),
    "average-999": Change(_training(ema__decay="0.999")),
    "average-9999": Change(_training(ema__decay="0.9999")),
    "half-the-batch": Change(_training(global_batch="32")),
    "half-the-batch-twice-the-steps": Change(_training(global_batch="32"), 2),
    "twice-the-batch-half-the-steps": Change(_training(global_batch="128"), 0.5),
    "bf16": Change(_training(precision="bf16", zero_stage="1")),
    "not-compiled": Change(_training(compile="false")),
}


def learned(store: str, name: str, change: Change, steps: int, samples: int) -> dict[str, Any]:
    """What shapes.json says of a training with a change; a recipe of its own name, so that the trainings stand beside each other.

    Args:
        samples: of each task without an input.

    Raises:
        typer.Exit: the run failed, and has said why.
    """
    recipe, done = f"shapes-{name}", round(steps * change.share)
    length = [f"train.shapes.steps={done}", f"train.shapes.schedule.decay_steps={done}"]
    settings = [f"name={recipe}", f"evaluate.measures=[{{kind: shapes, samples: {samples}}}]", *length, *change.fields]
    command = [sys.executable, "-m", "pipelines.command", "run", str(RECIPE), "--store", store]
    _run([*command, *(part for setting in settings for part in ("--set", setting))], ROOT)
    dataset = pointed(Store(store), recipe, "evaluate")
    assert dataset is not None
    return json.loads(dataset.store.read(dataset.file("shapes.json").path))


def learned_before(revision: str, store: str) -> dict[str, Any]:
    """What shapes.json says of the training of an earlier commit, by its own command."""
    out = Path(store, "before").resolve()
    with worktree(revision) as place:
        own = ["-m", "examples.shapes", "--state", str(out / "state"), "--out", str(out)]
        if (place / "configs" / "shapes.yaml").is_file():
            _run([sys.executable, "-m", "pipelines.command", "run", "configs/shapes.yaml", "--store", str(out)], place)
            own = ["-m", "examples.shapes", "--store", str(out), "--out", str(out)]
        _run([sys.executable, *own], place)
    return json.loads((out / "shapes.json").read_text(encoding="utf-8"))


def _run(command: list[str], folder: Path) -> None:
    if (code := subprocess.run(command, stdout=sys.stderr, cwd=folder).returncode) != 0:
        raise typer.Exit(code)


def met(values: dict[str, Any]) -> bool:
    """Whether all bars but that of the minutes are met."""
    return all(values[name] >= bar for name, bar in AT_LEAST.items()) and all(
        values[name] <= bar for name, bar in AT_MOST.items()
    )


def main(
    before: Annotated[str | None, typer.Option(help="An earlier commit, whose minutes are compared.", metavar="REV")] = None,
    changes: Annotated[bool, typer.Option("--changes", help="Train once for each single change instead.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Of the changes, these.", metavar="NAME")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of the recipe's.", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Samples of each task without an input.", min=1)] = 20_000,
    store: Annotated[str, typer.Option(help="Folder of the datasets.")] = "runs/shapes",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Learn the world of shapes; the ratio is that of an earlier commit's minutes, or of the bar's 28, to this one's."""
    config: Any = load_recipe(RECIPE).nodes["train-shapes"].config
    words = machine(torch.device("cpu"))
    chosen = {name: CHANGES[name] for name in (only or CHANGES)} if changes else {"none": CHANGES["none"]}
    table: dict[str, dict[str, Any]] = {}
    for name, change in chosen.items():
        found = learned(store, name, change, steps or config.steps, samples)
        table[name] = {figure: found[figure] for figure in SHOWN} | {"steps": found["training"]["steps"]}
        progress(" ".join([name, *(f"{figure}={value}" for figure, value in table[name].items())]))
    peer = learned_before(before, store) if before else None
    first = next(iter(table.values()))
    Result(
        name="shapes",
        ratio=(peer["minutes"] if peer else 28) / first["minutes"],
        peer="before" if peer else "bar",
        figures=first | {"met": str(met(first)).lower()},
        machine=words,
        details={"commit": commit_of(), "samples": samples, "table": table}
        | ({"before": {"commit": commit_of(before), **{name: peer[name] for name in SHOWN}}} if peer and before else {}),
    ).finish(file)


if __name__ == "__main__":
    typer.run(main)
