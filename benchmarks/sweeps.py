"""Guidance, samplers and robustness of a checkpoint, on pages of docs/results that hold several networks beside each other.

Runs `unidiffuser evaluate` with the measures `guidance`, `samplers` and `robustness`, and writes what it finds into
`guidance.json`, `samplers.json` and `robustness.json` under a name, with a page and curves beside each. What was drawn before is
not drawn again. One line a network, which also refreshes it:

    python -m benchmarks.sweeps train/3f9a2c --name mine --prompts held_out.parquet --count 200
    python -m benchmarks.sweeps shapes/train-shapes --name shapes --scenes --count 400 --guidance 1
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.frame import machine, progress
from benchmarks.samplers_page import gaussian_section
from infra.dataset import pointed
from infra.store import Store
from stages.measuring.damage import BLUR, COVERED, DROPPED, JPEG_QUALITY
from stages.measuring.sweep_pages import TITLES, guidance_curves, robustness_curves, sampler_curves, table

CURVES = {"guidance": guidance_curves, "samplers": sampler_curves, "robustness": robustness_curves}
RESULTS = Path("docs/results")
# What `stages.measuring.damage` does, for readers of the page.
DAMAGE = {
    "words-dropped": f"each word of the caption is left out with a chance of {DROPPED:.0%}",
    "words-swapped": "two words of the caption have changed places",
    "masked": f"a grey square, {COVERED:.0%} as wide as the picture, somewhere on it",
    "jpeg-10": f"a JPEG of quality {JPEG_QUALITY}",
    "blurred": f"Gaussian blur, with a radius of {BLUR:.0%} of the picture's side",
    "grey": "without colours",
    "outlines": "a drawing of its outlines, on white",
    "negative": "every colour is its opposite",
}


def newest(checkpoint: str, store: str) -> str:
    """What a recipe's node points at, as STAGE/FINGERPRINT; any other name as it is."""
    found = pointed(Store(store), *checkpoint.split("/")) if checkpoint.count("/") == 1 else None
    return checkpoint if found is None else f"{found.manifest.stage}/{found.manifest.fingerprint}"


def evaluated(checkpoint: str, measures: list[dict[str, Any]], settings: Mapping[str, Any], store: str) -> dict[str, Any]:
    """The report of an evaluation by these measures.

    Raises:
        typer.Exit: the evaluation failed, and has said why.
    """
    given = {"measures": json.dumps(measures), **{name: value for name, value in settings.items() if value is not None}}
    sets = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "pipelines.command", "evaluate", checkpoint, "--store", store, "--json", *sets]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise typer.Exit(done.returncode)
    return json.loads(done.stdout)


def kept(file: Path) -> dict[str, Any]:
    """The trained networks in a file of results, by name; none if there is no file."""
    return json.loads(file.read_text()).get("trained", {}) if file.is_file() else {}


def keep(file: Path, trained: Mapping[str, Any]) -> None:
    """Put the trained networks into a file of results, and write its page."""
    record = json.loads(file.read_text()) if file.is_file() else {}
    record["trained"] = dict(trained)
    file.write_text(json.dumps(record, indent=2) + "\n")
    file.with_suffix(".md").write_text(page(file.stem, record))


def page(kind: str, record: Mapping[str, Any]) -> str:
    """A section for each network; and of samplers, before them, one for the world in which the network is exact."""
    sections = [gaussian_section(record)] if "details" in record else []
    if kind == "robustness":
        sections.append(given())
    for name, found in record["trained"].items():
        sections.append(
            f"## {name}\n\n{found['about']}\n\n{table(found['points'], found['figures'])}\n\n"
            f"![The table as curves]({kind}-{name}.png)\n\n"
            f"Checkpoint {found['checkpoint'][:12]} of {found['node']}. Measured {found['date']} by `{found['command']}`.\n"
        )
    return "\n".join([f"# {TITLES[kind]}\n", *sections])


def given() -> str:
    """What happens to the captions and pictures that are given, as Markdown."""
    return (
        "The caption or the picture that is given is noised or damaged. What comes is compared with what was given before that.\n"
        "`noise` is a timestep: at 0 there is none, and at 1000 nothing is left of what was given. `damage` is one of these:\n\n"
        + "".join(f"- `{name}`: {words}\n" for name, words in DAMAGE.items())
    )


def main(
    checkpoint: Annotated[
        str, typer.Argument(help="As of `unidiffuser evaluate`, or RECIPE/NODE, as shapes/train-shapes: the newest of a recipe.")
    ],
    name: Annotated[str, typer.Option(help="What the network is called on the pages.")],
    prompts: Annotated[Path | None, typer.Option(help="Held-out captions with pictures, Parquet.", metavar="FILE")] = None,
    scenes: Annotated[bool, typer.Option("--scenes", help="Scored by the truth of the world of shapes.")] = False,
    kind: Annotated[
        list[str] | None, typer.Option(help="guidance, samplers or robustness (repeatable); all if not given.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Captions; 200 if not given.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples without an input, of --scenes.")] = 2000,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance where it does not change; 3 if not given.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler where it does not change; the default if not given.")] = None,
    store: Annotated[str, typer.Option(help="Folder of the datasets.")] = "runs",
    out: Annotated[Path, typer.Option(help="Folder of the pages.")] = RESULTS,
) -> None:
    """Measure guidance, samplers and robustness of a checkpoint, and write the pages."""
    kinds = kind or list(CURVES)
    if unknown := set(kinds) - set(CURVES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(CURVES)}", param_hint="--kind")
    words = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {"prompts": prompts and prompts.resolve(), "count": count, "guidance": guidance, "sampler": sampler, "beams": 1}
    features = "scenes" if scenes else "clip"
    own = {"samplers": {"samples": samples}}
    measures = [{"kind": each, "features": features, **own.get(each, {})} for each in kinds]
    report = evaluated(newest(checkpoint, store), measures, settings, store)
    told = {
        "checkpoint": report["checkpoint"], "node": report["node"], "date": datetime.date.today().isoformat(), "machine": words,
        "command": " ".join(["python -m benchmarks.sweeps", *sys.argv[1:]]),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for each in kinds:
        found = report["details"][each]
        file = out / f"{each}.json"
        keep(file, kept(file) | {name: told | found})
        CURVES[each](out / f"{each}-{name}.png", found["points"], found["figures"])
        progress(f"{file.with_suffix('.md')}")


if __name__ == "__main__":
    typer.run(main)
