"""Pages and curves of the sweeps and of robustness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.drawing.pictures import PALE

TITLES = {
    "guidance": "Guidance against quality",
    "samplers": "Samplers and steps against quality",
    "robustness": "Robustness to what is given",
}
# Scores as axes name them.
NAMES = {
    "fid": "FID",
    "fid_clip": "FID over CLIP's features",
    "clip_score_t2i": "CLIP score, text to image",
    "clip_score_i2t": "CLIP score, image to text",
    "t2i_accuracy": "all attributes right, text to image",
    "i2t_accuracy": "all attributes right, image to text",
    "image_tv": "total variation, image only",
}
Points = Sequence[Mapping[str, Any]]


def page(kind: str, points: Points, names: Sequence[str], about: str) -> str:
    """What was measured, a table with a row a point, and the curves."""
    return f"# {TITLES[kind]}\n\n{about}\n\n{table(points, names)}\n\n![The table as curves]({kind}.png)\n"


def table(points: Points, names: Sequence[str]) -> str:
    """A row a point: its settings, and its scores."""
    settings = list(dict.fromkeys(key for point in points for key in point if key != "values"))
    head = [*settings, *(NAMES[name] for name in names)]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in points:
        values = (f"{point['values'][name]:.4g}" if name in point["values"] else "" for name in names)
        rows.append(f"| {' | '.join([*(_said(point.get(key, '')) for key in settings), *values])} |")
    return "\n".join(rows)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def guidance_curves(file: Path, points: Points, names: Sequence[str]) -> None:
    """Each score against the scale; and the paper's curve, FID against CLIP score, where both are there."""
    fid = next((name for name in names if name.startswith("fid")), None)
    axes, figure = _panels(len(names) + (fid is not None))
    for place, name in zip(axes, names, strict=False):
        place.plot([point["guidance"] for point in points], _column(points, name), marker="o", markersize=4)
        place.set(xlabel="guidance scale", ylabel=NAMES[name])
    if fid is not None:
        scores, distances = _column(points, "clip_score_t2i"), _column(points, fid)
        axes[-1].plot(scores, distances, marker="o", markersize=4)
        for point, score, distance in zip(points, scores, distances, strict=True):
            axes[-1].annotate(f"{point['guidance']:g}", (score, distance), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes[-1].set(xlabel=NAMES["clip_score_t2i"], ylabel=NAMES[fid])
    _save(figure, axes, file)


def sampler_curves(file: Path, points: Points, names: Sequence[str]) -> None:
    """Each score against the number of steps, a line a sampler."""
    axes, figure = _panels(len(names))
    for place, name in zip(axes, names, strict=True):
        for sampler in dict.fromkeys(point["sampler"] for point in points):
            own = [point for point in points if point["sampler"] == sampler]
            place.plot([point["steps"] for point in own], _column(own, name), marker="o", markersize=3.5, label=sampler)
        place.set(xscale="log", xlabel="steps", ylabel=NAMES[name])
        steps = sorted({point["steps"] for point in points})
        place.set_xticks(steps, [str(number) for number in steps])
        place.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, axes, file)


def robustness_curves(file: Path, points: Points, names: Sequence[str]) -> None:
    """Each score against the noise on what is given, and below it a bar for each damage; the dashed line is what is undamaged."""
    axes, figure = _panels(2 * len(names), columns=len(names))
    for number, name in enumerate(names):
        having = [point for point in points if name in point["values"]]
        noise = [point for point in having if "noise" in point]
        curve, bars = axes[number], axes[len(names) + number]
        curve.plot([point["noise"] for point in noise], _column(noise, name), marker="o", markersize=4)
        curve.set(xlabel="timestep of the noise on what is given", ylabel=NAMES[name])
        hurt = [point for point in having if "damage" in point]
        bars.barh([point["damage"] for point in hurt][::-1], _column(hurt, name)[::-1], height=0.6)
        if noise:
            bars.axvline(noise[0]["values"][name], color=PALE, linestyle="--")
        bars.set(xlabel=NAMES[name])
    _save(figure, axes, file)


def _column(points: Points, name: str) -> list[float]:
    return [point["values"][name] for point in points]


def _panels(count: int, columns: int = 4) -> tuple[list[Any], Any]:
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=110, facecolor="white")
    return list(figure.subplots(rows, columns, squeeze=False).ravel()), figure


def _save(figure: Any, axes: Sequence[Any], file: Path) -> None:
    for place in axes:
        place.grid(color=PALE, alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        if not place.has_data():
            place.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, format="png", metadata={"Software": None})
