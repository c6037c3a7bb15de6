"""`unidiffuser demo`: the recipe configs/demo.yaml on a little web of composed pictures, served on loopback while it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from infra.external import state_folder
from infra.store import Store
from pipelines.commands.conduct import Wish, run_recipe
from pipelines.commands.evaluation import figures_table
from pipelines.flows.run import Run
from stages.runner.recipe import load_recipe

RECIPE = Path(__file__).parent.parent.parent / "configs" / "demo.yaml"
# The host that the little web's links name. It does not exist; the recipe's operational setting says where it is today.
HOST = "little-web.example"
# What the recipe takes of the shipped base, and the longer and quicker training that does without it.
FROM_SCRATCH = (
    "text-codec.weights=null",
    "evaluate.before=null",
    *(f"train.{name}.model.position_side=null" for name in (256, 512)),
    *(f"train.{name}.optimizer.{field}=2.0e-3" for name in (256, 512) for field in ("lr", "rest.lr")),
    "train.256.weights=null",
    *(f"train.{name}.{field}" for name in (256, 512) for field in ("checkpoint_every=150", "validation.every=100")),
    "train.256.steps=1100",
    "train.512.steps=600",
    "train.512.schedule.decay_steps=600",
)


def run_demo(store: Store, wish: Wish, console: Console, from_scratch: bool = False) -> int:
    """Build the little web if it is not there, serve it, run the recipe on it, and say where the results are.

    Args:
        from_scratch: begin with an untrained network and text codec instead of the shipped base.

    Returns the exit code; raises what `run_recipe` raises.
    """
    folder = state_folder(store).parent / "little-web"
    settings = [*of_web(folder), *(FROM_SCRATCH if from_scratch else ())]
    # What the person set comes last and wins; it is checked before anything is built.
    load_recipe(RECIPE, [*settings, *wish.overrides])
    _build_web(folder, console)
    from examples.little_web.server import LittleWeb

    with LittleWeb(folder) as web:
        settings.append(served(web.address))
        wish = replace(wish, overrides=[*settings, *wish.overrides])
        return run_recipe(load_recipe(RECIPE, wish.overrides), store, wish, console, lambda run: _say_results(run, console))


def of_web(folder: Path) -> list[str]:
    """Overrides of the recipe that have it read a little web from this folder."""
    return [
        f"subsets.little.select.metadata=['{folder}/metadata/part-*.parquet']",
        f"evaluate.prompts='{folder}/held_out.parquet'",
    ]


def served(address: str) -> str:
    """The override that has it fetch from a little web that is served at this address."""
    return f"subsets.little.download.hosts={{'{HOST}': '{address}'}}"


def _build_web(folder: Path, console: Console) -> None:
    # The file that `build` writes last.
    if (folder / "held_out.parquet").is_file():
        return
    from examples.little_web.build import build

    with console.status("building a little web of 1,000 links"):
        build(folder, rows=1000, seed=0)
    console.print(f"built a little web of 1,000 links in {folder}", soft_wrap=True)


def _say_results(run: Run, console: Console) -> None:
    """The figures of the evaluation, the pictures of the datasets, and the folder that holds the exported model."""
    made = [outcome.dataset for outcome in run.outcomes.values() if outcome.dataset is not None]
    for dataset in made:
        if dataset.manifest.stage == "evaluate":
            console.print(figures_table(dataset))
    for dataset in made:
        for entry in dataset.files:
            if entry.name.endswith(".png"):
                console.print(f"{dataset.manifest.node} {entry.name}: {dataset.url(entry)}", soft_wrap=True)
    for dataset in made:
        if dataset.manifest.stage == "export":
            console.print(f"exported model: {dataset.where}", soft_wrap=True)
