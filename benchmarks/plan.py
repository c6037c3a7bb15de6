"""What `plan` foretells against what runs took here: work seconds of the demo, and of its data stages at three sizes.

The demo must have been run into the store before. What is foretold sees nothing of that: it is measured here, in up to a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.frame import Result, machine, progress
from benchmarks.overhead import timed_command
from examples.little_web.build import build
from examples.little_web.server import LittleWeb
from infra.dataset import pointed
from infra.store import Store
from pipelines.commands.demo import RECIPE, of_web, served
from pipelines.planning.calibration import Machine, calibrated
from pipelines.planning.foretold import foretold
from pipelines.planning.plan import asked_of
from stages.runner.recipe import Recipe, load_recipe

# The node up to which a run of another size goes: select, download, filter, text-codec, encode.
UNTIL = "little-encode"


def compared(recipe: Recipe, store: Store, measured: Machine, fresh: Store) -> dict[str, list[float]]:
    """Node -> seconds of work as foretold, and as its dataset tells; of nodes that the store has.

    Args:
        fresh: an empty store, so that nothing of the runs is seen.
    """
    told = foretold(asked_of(recipe, fresh), measured)
    made = {node: pointed(store, recipe.name, node) for node in told}
    return {node: [round(told[node], 2), found.manifest.seconds] for node, found in made.items() if found is not None}


def of_size(rows: int, measured: Machine) -> dict[str, list[float]]:
    """The same for the data stages of a little web of so many links, which is built, served and run."""
    with tempfile.TemporaryDirectory() as folder:
        web, store = build(Path(folder, "web"), rows), Store(f"{folder}/runs")
        with LittleWeb(web) as server:
            settings = [*of_web(web), served(server.address), "subsets.little.select.shard_rows=128"]
            arguments = [part for setting in settings for part in ("--set", setting)]
            timed_command("run", str(RECIPE), "--until", UNTIL, "--store", store.root, *arguments)
        return compared(load_recipe(RECIPE, settings), store, measured, Store(f"{folder}/none"))


def sums(nodes: dict[str, list[float]]) -> dict[str, float]:
    """What is foretold and what it was, of all nodes together."""
    told, was = (sum(pair[side] for pair in nodes.values()) for side in (0, 1))
    return {"foretold_s": round(told, 1), "work_s": round(was, 1), "off_percent": round(100 * (told / was - 1), 1)}


def main(
    store: Annotated[str, typer.Option("--store", help="Where the demo was run.", metavar="STORE")] = "runs",
    sizes: Annotated[str, typer.Option("--sizes", help="Links of other runs, with commas; or none.")] = "250,1000,2000",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Compare a plan with runs on this machine."""
    words, place = machine(torch.device("cpu")), Store(store)
    recipe = load_recipe(RECIPE)
    if pointed(place, recipe.name, "evaluate") is None:
        raise SystemExit(f"{store}: no demo was run into it; run `unidiffuser demo --store {store}` first")
    with tempfile.TemporaryDirectory() as folder:
        empty = Store(folder)
        measured = calibrated(asked_of(recipe, empty))
        progress(f"measured this machine in {measured.seconds:.0f} s")
        demo = compared(recipe, place, measured, empty)
    others = {rows: of_size(int(rows), measured) for rows in sizes.split(",") if rows}
    whole = sums(demo)
    figures: dict[str, Any] = {**whole, "calibration_s": measured.seconds}
    figures |= {f"off_percent_{rows}": sums(nodes)["off_percent"] for rows, nodes in others.items()}
    details = {"demo": demo, "sizes": others, "measured": {name: round(value, 6) for name, value in measured.found.items()}}
    Result("plan", round(whole["foretold_s"] / whole["work_s"], 3), "the_run", figures, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
