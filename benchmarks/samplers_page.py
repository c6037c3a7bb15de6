"""Tables and curves of what `benchmarks.samplers` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unidiffuser.solver import DEFAULT_SAMPLER, DEFAULT_STEPS, SAMPLERS

INK = "#8b949e"
# The last steps that samplers have.
TAKEN = ("first order", "its own")


def gaussian_section(record: Mapping[str, Any]) -> str:
    """What was found in the Gaussian world, as Markdown."""
    tables = "\n".join(
        f"### {name[0].upper()}{name[1:]} noise schedule\n\n{_gaussian(rows)}\n"
        for name, rows in record["details"]["gaussian"].items()
    )
    return f"""## Against the truth

A Gaussian world with ten numbers, in which the network is exact. The figure is the distance of the samples from the data
(2-Wasserstein, over the root of the summed variances): 0 is the truth. A row is a sampler with one way to end: a last step of its
own order, one of first order, or one to no noise at all. All but the last end at timestep 1, where a little noise is left. The
marked rows are what `--sampler` takes; the lowest figure of each column is bold.

Samplers without fresh noise carry the start's error to the end: the schedule leaves some of the data at its last timestep, and
they begin with pure noise. So they have a floor, and the others have none.

Where nothing else is said, samples are drawn in {DEFAULT_STEPS} steps of `{DEFAULT_SAMPLER}`. With Stable Diffusion's schedule,
which is the paper's, it is the nearest to the truth from 20 steps on, and of the trained network of shapes too, which gains
nothing from 50 steps. With the shapes' schedule `era` is nearer in this world, and with 5 steps most are.

On the pictures of the demo it is not the nearest at every guidance. By FID ([both curves](guidance.md)) it is with none and from
5 on, also at the 7 of `sample`; at 1 to 3 `dpm++2m` is. CLIP scores are alike. Its pictures of 10 steps are worse than those of
others. So take `dpm++2m` where FID at a low guidance is what counts, as the preset `paper` does, or where steps are few, as
`laptop` and the previews of a training do.

{tables}
### With guidance

Guided samples are of no distribution that is known, but each has its place: where a thousand steps take the same noise. The
figure is the distance from there, over the spread of the samples. Samplers that add noise have no such place.

{_guided(record["details"]["guided"])}

![Error against steps](samplers.png)

Measured {record["date"]} by `{record["command"]}`.
"""


def _gaussian(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = list(rows[0]["error"])
    lines = [f"| sampler | last step | {' | '.join(f'{n} steps' for n in steps)} |", "|---|---|" + "---|" * len(steps)]
    lowest = {n: min(row["error"][n] for row in rows) for n in steps}
    for row in rows:
        cells = [f"**{row['error'][n]:.4f}**" if row["error"][n] == lowest[n] else f"{row['error'][n]:.4f}" for n in steps]
        mark = " (taken)" if row["last step"] in TAKEN else ""
        lines.append(f"| {row['sampler']} | {row['last step']}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _guided(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    steps = list(next(iter(found.values()))[0]["error"])
    lines = [f"| guidance | sampler | {' | '.join(f'{n} steps' for n in steps)} |", "|---|---|" + "---|" * len(steps)]
    for scale, rows in found.items():
        lowest = {n: min(row["error"][n] for row in rows) for n in steps}
        for row in rows:
            cells = [f"**{row['error'][n]:.4f}**" if row["error"][n] == lowest[n] else f"{row['error'][n]:.4f}" for n in steps]
            lines.append(f"| {scale} | {row['sampler']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(file: Path, record: Mapping[str, Any]) -> None:
    """Error against steps, of the samplers as they are taken, a panel a schedule."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    gaussian = record["details"]["gaussian"]
    figure = Figure(figsize=(9, 3.8), dpi=110, facecolor="white")
    for axes, (name, rows) in zip(figure.subplots(1, len(gaussian), squeeze=False)[0], gaussian.items(), strict=True):
        for row in rows:
            if row["last step"] in TAKEN:
                number = list(SAMPLERS).index(row["sampler"])
                steps = [int(n) for n in row["error"]]
                axes.plot(
                    steps, list(row["error"].values()), marker="o", markersize=3.5, color=f"C{number}", label=row["sampler"]
                )
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="distance from the truth", title=f"{name} noise schedule")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
        # Decades alone would be one tick where all figures are within one.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, format="png", metadata={"Software": None})
