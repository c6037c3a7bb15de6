"""docs/results/leaderboard.md: the public clocks, made from the results beside it.

`enter` takes what the results say now into docs/results/leaderboard.json, where entries stay; `page` writes them as a page.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from website.made import read
from website.pages import SiteError

# What two measurements have in common of which the later counts.
SAME = ("clock", "date", "commit", "machine")
ENTRIES, PAGE = "leaderboard.json", "leaderboard.md"


@dataclass(frozen=True)
class Clock:
    """One figure that is measured again and again.

    Attributes:
        name: of its result in `docs/results`, too.
        figure: where it is in the result: names, and a dot between them.
        less: whether less is better.
        beside: further figures that an entry shows, by the words for them.
        command: what measures it, with the file that it writes.
    """

    name: str
    what: str
    figure: str
    unit: str
    less: bool
    beside: Mapping[str, str]
    command: str


CLOCKS = (
    Clock(
        "shapes", "Minutes until one small network has learned five distributions of known truth, codec included", "minutes",
        "minutes", True,
        {"text to image": "t2i_accuracy", "image to text": "i2t_accuracy", "joint": "joint_consistency",
         "total variation of pictures": "image_marginal_tv", "of captions": "text_marginal_tv"},
        "make shapes",
    ),
    Clock(
        "demo", "Minutes of `make demo`, from metadata to samples, after installation", "minutes", "minutes", True,
        {"named right of 50": "named_of_50", "judged right": "judge.all_four"}, "make demo",
    ),
    Clock(
        "sampling", "Seconds for ten pictures of one prompt, encoding and decoding included, by a U-ViT of random weights",
        "details.tasks.t2i.median.ours", "seconds", True,
        {"times diffusers": "figures.t2i_ratio", "ten captions, s": "details.tasks.i2t.median.ours"},
        "python -m benchmarks.sampling --json docs/results/sampling.json",
    ),
    Clock(
        "loader", "Rows a second that the loader reads, mixes and draws, in one process with one thread", "figures.rows_per_s",
        "rows a second", False, {"times litdata": "ratio", "MiB": "figures.memory_mib"},
        "python -m benchmarks.loader --json docs/results/loader.json",
    ),
    Clock(
        "encode", "Pictures a second that the encode stage turns into latents, with the embedded encoders at 256 px",
        "figures.rows_per_s", "pictures a second", False, {"times a bare loop": "ratio"},
        "python -m benchmarks.encode --json docs/results/encode.json",
    ),
    Clock(
        "checkpoint", "Seconds that a training stands still for a checkpoint", "figures.blocked_s", "seconds", True,
        {"of a plain copy": "figures.blocked_over_copy", "MiB more": "figures.added_mib"},
        "python -m benchmarks.checkpoint --json docs/results/checkpoint.json",
    ),
)  # fmt: skip


def enter(folder: Path) -> list[dict[str, Any]]:
    """Take every clock's present result into the entries of a folder, and write them; a result that is there already is not
    entered twice, and one of the same commit, day and machine takes the place of the one before.

    Raises:
        SiteError: a result has not the figure of its clock.
    """
    path = folder / ENTRIES
    entries: list[dict[str, Any]] = read(path)["entries"] if path.is_file() else []
    for clock in CLOCKS:
        file = folder / f"{clock.name}.json"
        if not file.is_file():
            continue
        entry = _entry(clock, file)
        # A result that does not tell its commit gets another when its file is committed again.
        if any(all(old[name] == entry[name] for name in entry.keys() - {"date", "commit"}) for old in entries):
            continue
        entries = [old for old in entries if any(old[name] != entry[name] for name in SAME)] + [entry]
    entries.sort(key=lambda entry: ([clock.name for clock in CLOCKS].index(entry["clock"]), entry["date"], entry["commit"]))
    path.write_text(json.dumps({"entries": entries}, indent=1) + "\n", encoding="utf-8")
    return entries


def _entry(clock: Clock, file: Path) -> dict[str, Any]:
    told = read(file)
    value = _at(told, clock.figure)
    if not isinstance(value, int | float):
        raise SiteError(f"{file.name}: no figure {clock.figure}; write it with `{clock.command}`")
    date, commit = _measured(file)
    return {
        "clock": clock.name,
        "value": value,
        "beside": {word: found for word, name in clock.beside.items() if (found := _at(told, name)) is not None},
        "date": told.get("date") or date,
        "commit": str(_at(told, "details.commit") or told.get("commit") or commit)[:12],
        "machine": machine_class(told),
        "command": told.get("command") or clock.command,
    }


def _at(told: Mapping[str, Any], name: str) -> Any:
    found: Any = told
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _measured(file: Path) -> tuple[str, str]:
    """Day and commit of a result that does not tell: the commit that wrote it last; HEAD where it has been written since then."""
    git = ["git", "-C", str(file.parent)]
    told = subprocess.run([*git, "status", "--porcelain", "--", file.name], capture_output=True, text=True, check=False)
    which = [] if told.stdout else ["--", file.name]
    log = subprocess.run([*git, "log", "-1", "--format=%cs %H", *which], capture_output=True, text=True, check=False)
    day, _, commit = log.stdout.strip().partition(" ")
    return day, commit


def machine_class(told: Mapping[str, Any]) -> str:
    """What decides how fast a machine is, without what differs from day to day: cores, processor, memory, GPU."""
    found = re.match(r"(\d+ cores) \((.*?)\), (\d+ GiB) memory, (.*?), Linux", str(told.get("machine", "")))
    if found is None:
        return f"{told['cores']} cores, {told.get('device', 'cpu')}" if "cores" in told else str(told.get("machine", ""))
    cores, processor, memory, gpu = found.groups()
    return f"{cores} ({processor.replace('(R)', '')}), {memory}, {'no GPU' if gpu == 'no GPU used' else gpu}"


HEAD = """# Leaderboard

Public clocks: figures that anyone can measure again, and beat. `python -m website leaderboard` makes this page from the
results in `docs/results`, so nobody writes it by hand. Entries of a clock compare on one class of machine only.

## Enter a new one

1. Commit what you have changed, so that the entry names a commit.
2. Measure on a quiet machine, with the command of the clock. It writes the clock's result in `docs/results`.
3. Run `make leaderboard`. The entries before yours stay.
4. Send the change with the result, `leaderboard.json` and this page.

An entry counts only where `make test` passes. The figures beside a clock are shown, and are no rule. An entry that is better by
the clock may be worse by them.
"""


def page(entries: list[dict[str, Any]]) -> str:
    """The page: a table for each clock, best first on each class of machine."""
    parts = [HEAD]
    for clock in CLOCKS:
        parts += [f"## {clock.name.capitalize()}", f"{clock.what}. {'Less' if clock.less else 'More'} is better."]
        parts.append(f"Measured by `{clock.command}`.")
        rows = [entry for entry in entries if entry["clock"] == clock.name]
        rows.sort(key=lambda entry: (entry["machine"], entry["value"] if clock.less else -entry["value"]))
        if not rows:
            parts.append("No entry yet.")
            continue
        lines = [f"| {clock.unit} | beside | date | commit | machine | command |", "|---|---|---|---|---|---|"]
        for entry in rows:
            beside = ", ".join(f"{word} {_short(value)}" for word, value in entry["beside"].items())
            where = f"`{entry['commit'][:7]}` | {entry['machine']} | `{entry['command']}`"
            lines.append(f"| **{_short(entry['value'])}** | {beside} | {entry['date']} | {where} |")
        parts.append("\n".join(lines))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
