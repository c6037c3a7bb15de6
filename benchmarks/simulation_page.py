"""The page and the plot of what `benchmarks.simulation` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK = "#8b949e"
# Memory of a head in GiB, and calls of a worker for a shard: to do it, and to say when there is room for the next.
HEAD_GIB, CALLS = 16, 2
# Seconds of a worker that a shard takes, as the simulation has it, and shards of LAION-5B.
SHARD_S, LAION_5B = 170, 585_000

Rows = Sequence[Mapping[str, Any]]


def of_workers(rows: Rows, workers: int) -> list[Mapping[str, Any]]:
    """The sizes with so many workers, the smallest first."""
    return sorted((row for row in rows if row["workers"] == workers), key=lambda row: row["shards"])


def page(record: Mapping[str, Any]) -> str:
    rows, figures = record["details"]["sizes"], record["figures"]
    happened = of_workers(rows, figures["workers"])[-1]["happened"]
    return f"""# laion2B-en on a thousand workers, simulated

{figures["rows"]:,} rows in {figures["shards"]:,} shards go through a download by {figures["workers"]:,} workers. The plan,
the runner, the pool that schedules, the records and the commit are those of every run. The cluster and its clock are made up,
and so is the web: nothing here says how fast a real one is. Nodes vanish and come back, some cannot be reached for a while,
workers die, shards fail, hang or take long, the store is slow, and the head is lost in the middle, after which another run
resumes. Three shards can be done by nobody: the run refuses and names them, and is run again with these skipped.

**{figures["lost_rows"]} rows are lost**: for every reason, the committed dataset has the count that was drawn beforehand, and
every shard once. A shard costs the driver {figures["cost_growth"]:.2f} times the processor time that it costs at a tenth of the
size.

![Cost and memory against scale](simulation.png)

## Cost and memory

All runs of a size together; a head is lost and one run refused in each. Processor time is the driver's, on the machine below.

{_sizes(rows)}

{_further(of_workers(rows, figures["workers"]))}

What happened at the largest size:

{_happened(happened)}

## The first wall

{_wall(rows, figures)}

## Simulated speed-up

Without faults; some shards take longer than others, and each worker has at least fifty to do. A real cluster shares its
network and its store, which this one does not.

{_speeds(record["details"]["shards_per_simulated_hour"])}

Simulated {record["date"]} by `{record["command"]}` on {record["machine"]}.
"""


def _sizes(rows: Rows) -> str:
    lines = ["| shards | workers | driver, a shard | peak memory | simulated time | rows lost |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["shards"], row["workers"])):
        cells = (f"{row['shards']:,}", f"{row['workers']:,}", f"{row['driver_us']:.0f} us", f"{row['peak_mib']:,} MiB")
        lines.append(f"| {' | '.join(cells)} | {row['hours']:.1f} h | {row['lost_rows']} |")
    return "\n".join(lines)


def _further(rows: Rows) -> str:
    """What each shard more takes, from size to size."""
    pairs = list(zip(rows, rows[1:], strict=False))
    costs = [
        f"{(more['driver_us'] * more['shards'] - less['driver_us'] * less['shards']) / (more['shards'] - less['shards']):.0f} us"
        f" from {less['shards']:,} to {more['shards']:,}"
        for less, more in pairs
    ]
    return f"""Each size waits for hours for the shard that hangs when all others are done, and looks at its nodes every few
seconds, which weighs the more the fewer shards there are. Without that, a further shard costs
{" and ".join(costs)}."""


def _happened(happened: Mapping[str, int]) -> str:
    lines = ["| what | times |", "|---|---|", *(f"| {what} | {times:,} |" for what, times in sorted(happened.items()))]
    return "\n".join(lines)


def kib_a_shard(rows: Rows, workers: int) -> float:
    """What a shard more takes of the driver's memory, by the two largest sizes; of small ones that cannot be seen."""
    *_, part, whole = of_workers(rows, workers)
    return max(0.1, 1024.0 * (whole["peak_mib"] - part["peak_mib"]) / (whole["shards"] - part["shards"]))


def _wall(rows: Rows, figures: Mapping[str, Any]) -> str:
    each, crowd = kib_a_shard(rows, figures["workers"]), max(rows, key=lambda row: row["workers"])
    most = HEAD_GIB * 2**20 / each
    called = figures["ray_call_us"]
    per_s = 1e6 / (figures["driver_us"] + CALLS * called)
    return f"""The driver's memory. A shard takes {each:.1f} KiB of it for its unit, its record and its files, all of which the
manifest names: {LAION_5B:,} shards, all of LAION-5B, take {LAION_5B * each / 2**20:.1f} GiB, and a head of {HEAD_GIB} GiB is full
at {most / 1e6:.1f} million shards, or {most * 1e-5:.0f} billion rows.

Processor time comes later. A shard costs {figures["driver_us"]:.0f} us here, and {crowd["driver_us"]:.0f} us with
{crowd["workers"]:,} workers, of which each has two or three shards only: every few seconds all workers are looked at. Ray itself
takes {called} us for each of the {CALLS} calls of a shard, measured on a real one with a worker that does nothing. One core then
serves {per_s:,.0f} shards a second. A shard takes a worker {SHARD_S} seconds, so that is the work of {per_s * SHARD_S:,.0f}
workers. How many Ray itself can hold is not told here."""


def _speeds(found: Mapping[str, float]) -> str:
    alone = found["1"]
    lines = ["| workers | shards a simulated hour | speed-up, simulated | of the ideal |", "|---|---|---|---|"]
    for workers, rate in found.items():
        lines.append(f"| {workers} | {rate:,.0f} | {rate / alone:.1f} | {rate / alone / int(workers):.0%} |")
    return "\n".join(lines)


def plot(file: Path, record: Mapping[str, Any]) -> None:
    """Cost and memory against shards, and cost against workers."""
    from matplotlib.figure import Figure

    rows, figures = record["details"]["sizes"], record["figures"]
    by_shards = of_workers(rows, figures["workers"])
    by_workers = sorted((row for row in rows if row["shards"] == by_shards[-2]["shards"]), key=lambda row: row["workers"])
    panels = (
        ("shards", by_shards, "driver_us", "driver, us a shard", f"{figures['workers']:,} workers"),
        ("shards", by_shards, "peak_mib", "driver, peak MiB", f"{figures['workers']:,} workers"),
        ("workers", by_workers, "driver_us", "driver, us a shard", f"{by_shards[-2]['shards']:,} shards"),
    )
    figure = Figure(figsize=(11, 3.6), dpi=110, facecolor="white")
    for axes, (across, points, up, label, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot([row[across] for row in points], [row[up] for row in points], marker="o", markersize=4)
        axes.set(xscale="log", xlabel=across, ylabel=label, title=title)
        axes.set_ylim(bottom=0)
        axes.set_xticks([row[across] for row in points], [f"{row[across]:,}" for row in points])
        axes.minorticks_off()
        axes.grid(color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, format="png", metadata={"Software": None})
