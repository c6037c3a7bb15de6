"""What each choice of the recipe of shapes gives: a training for each single change of it, all with the same number of steps.

Few steps tell changes apart where all of the recipe's would meet every bar. The pairs are made once, and what is there is used
again: a run that was stopped goes on. Beside the result lies a page with the table, under the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.before import commit_of
from benchmarks.frame import Result, machine, progress
from benchmarks.shapes import AT_LEAST, AT_MOST, RECIPE, learned
from stages.runner.recipe import load_recipe

FIGURES = {
    "t2i_accuracy": "text to image",
    "i2t_accuracy": "image to text",
    "joint_consistency": "joint",
    "image_marginal_tv": "image only, total variation",
    "text_marginal_tv": "text only, total variation",
    "core_minutes": "minutes of processor time",
}
assert FIGURES.keys() > AT_LEAST.keys() | AT_MOST.keys()


@dataclass(frozen=True)
class Change:
    """One change of the recipe.

    Attributes:
        told: it in words.
        fields: those that are otherwise.
        share: of the steps.
    """

    told: str
    fields: tuple[str, ...] = ()
    share: float = 1.0


def _training(**fields: str) -> tuple[str, ...]:
    return tuple(f"train.shapes.{name.replace('__', '.')}={value}" for name, value in fields.items())


# What few steps cannot show is not here: a slower average, which has hardly warmed up by then, and fewer pairs, of which such a
# training sees the first only.
CHANGES = {
    "none": Change("the recipe"),
    "another-seed": Change("another seed", _training(seed="1")),
    "adamw": Change(
        "AdamW for all parameters, in place of Muon for the matrices, at the same learning rate",
        _training(optimizer="{kind: adamw, lr: 2.0e-3, weight_decay: 0.01, betas: [0.9, 0.98]}"),
    ),
    "constant-rate": Change(
        "a constant learning rate, in place of a cosine", _training(schedule__decay="none", schedule__decay_steps="null")
    ),
    "half-the-rate": Change("half the learning rate", _training(optimizer__lr="1.0e-3", optimizer__rest__lr="1.0e-3")),
    "twice-the-rate": Change("twice the learning rate", _training(optimizer__lr="4.0e-3", optimizer__rest__lr="4.0e-3")),
    "uniform-timesteps": Change("timesteps drawn at random, in place of Sobol's", _training(timesteps="uniform")),
    "random-scenes": Change("scenes drawn at random, in place of Sobol's", ("subsets.shapes.world.draws=random",)),
    "shuffled-rows": Change("rows shuffled, which breaks up the sequence", _training(data__order="shuffled")),
    "gamma-5": Change("min-SNR weights with gamma 5, in place of 0.5", _training(objective__min_snr_gamma="5")),
    "no-gamma": Change("no min-SNR weights", _training(objective__min_snr_gamma="null")),
    "noise-of-stable-diffusion": Change(
        "Stable Diffusion's noise schedule, which leaves 7% of the data at its end, in place of 2%", _training(noise="{}")
    ),
    "noise-that-ends-lower": Change("a noise schedule that leaves 0.3%", _training(noise="{beta_start: 0.005, beta_end: 0.02}")),
    "no-average": Change("the weights as trained, in place of their moving average", _training(ema__decay="0")),
    "half-the-batch-twice-the-steps": Change("batches of 32, and twice the steps", _training(global_batch="32"), 2),
    "twice-the-batch-half-the-steps": Change("batches of 128, and half the steps", _training(global_batch="128"), 0.5),
    "half-the-steps": Change("half the steps", share=0.5),
    "twice-the-steps": Change("twice the steps", share=2),
    "not-compiled": Change("not compiled", _training(compile="false")),
    "bf16": Change("bf16", _training(precision="bf16", zero_stage="1")),
}


def trained(name: str, change: Change, steps: int, samples: int, draw_steps: int, store: str) -> dict[str, Any]:
    """A row of the table.

    Args:
        steps: of a training whose share is 1.
        samples: of each task without an input.
        draw_steps: steps of the sampler.
    """
    done = round(steps * change.share)
    measured = [f"evaluate.measures=[{{kind: shapes, samples: {samples}}}]", f"evaluate.steps={draw_steps}"]
    length = [f"train.shapes.steps={done}", f"train.shapes.schedule.decay_steps={done}"]
    found = learned(store, [f"name=shapes-{name}", *measured, *length, *change.fields])
    floor = found["details"]["i"]["floor"]["joint"]
    return {**asdict(change), **{figure: found[figure] for figure in FIGURES}, "steps": done, "tv_floor": floor}


def page(record: Mapping[str, Any]) -> str:
    """The table as Markdown, the best joint samples first."""
    found = record["details"]
    rows = sorted(found["table"].items(), key=lambda row: -row[1]["joint_consistency"])
    lines = [f"| | {' | '.join(FIGURES.values())} |", "|---|" + "---|" * len(FIGURES)]
    for name, row in rows:
        mark = "**" if name == "none" else ""
        lines.append(f"| {mark}{row['told']}{mark} | {' | '.join(f'{row[figure]:.3g}' for figure in FIGURES)} |")
    missing = [change.told for name, change in CHANGES.items() if name not in found["table"]]
    left_out = f"\n\nNot measured: {'; '.join(missing)}." if missing else ""
    first = found["table"]["none"]
    return f"""# Shapes: what gives how much

Each row is a training of its own of the recipe of [shapes](shapes.md) with one change, and with {found["steps"]:,} steps in place
of {found["recipe_steps"]:,}, where most meet no bar, and so can be told apart. Rows are sorted by the joint samples whose picture
and caption agree in all four attributes; the other accuracies are means over the attributes. Total variations are over all
scenes; {found["samples"]:,} samples of the truth itself have {first["tv_floor"]:.3f} on average. Samples are drawn in
{found["draw_steps"]} steps. The row of another seed tells how far chance goes. Few steps favour what learns fast: what is
best after all of them may be another. Processor time grows where other work runs beside.

{chr(10).join(lines)}{left_out}

Measured {record["date"]} by `{record["command"]}` on {record["machine"]}.
"""


def main(
    only: Annotated[list[str] | None, typer.Option(help="Of the changes, these.", metavar="NAME")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each training.", min=2)] = 1000,
    samples: Annotated[int, typer.Option(help="Samples of each task without an input.", min=1)] = 1000,
    draw_steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=1)] = 25,
    store: Annotated[str, typer.Option(help="Folder of the datasets.")] = "runs/shapes",
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, and a page beside it.", metavar="FILE")
    ] = None,
) -> None:
    """Train once for each single change; the ratio is the share of consistent joint samples over that of the best change."""
    config: Any = load_recipe(RECIPE).nodes["train-shapes"].config
    words = machine(torch.device("cpu"))
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(["none", *(only or CHANGES)]):
        table[name] = trained(name, CHANGES[name], steps, samples, draw_steps, store)
        progress(" ".join([name, *(f"{figure}={table[name][figure]}" for figure in FIGURES)]))
    joint = {name: row["joint_consistency"] for name, row in table.items()}
    best = max((name for name in joint if name != "none"), key=lambda name: joint[name], default="none")
    Result(
        name="shapes_changes",
        ratio=joint["none"] / joint[best],
        peer=best,
        figures={figure: table["none"][figure] for figure in FIGURES},
        machine=words,
        details={
            "commit": commit_of(), "steps": steps, "recipe_steps": config.steps, "samples": samples, "draw_steps": draw_steps,
            "table": table,
        },
    ).finish(file)  # fmt: skip
    if file is not None:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
