"""What a sample of mutants says: figures, the survivors with what was altered, and those that no test can tell from the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkResult

from benchmarks.frame import machine
from tests.mutants.session import Session

# Mutants that behave as the code does, by name, each with its reason.
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")


def name(mutation: MutationSpec) -> str:
    """Where and what, so that a person finds it: file, line, column, operator."""
    line, column = mutation.start_pos
    return f"{mutation.module_path}:{line}:{column} {mutation.operator_name.removeprefix('core/')}"


def _altered(result: WorkResult) -> list[str]:
    """The lines that went and that came."""
    lines = (result.diff or "").splitlines()
    return [line.rstrip() for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip()]


def _results(session: Session) -> dict[str, WorkResult]:
    with session.open() as db:
        return {name(item.mutations[0]): result for item, result in db.completed_work_items}


def summary(before: Session, after: Session, seed: int) -> dict[str, Any]:
    """The result: `killed_*` count mutants that are no equivalents; `share_after` is of those."""
    reasons = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or {}
    first, last = _results(before), _results(after)
    unknown = reasons.keys() - first.keys()
    if unknown:
        raise SystemExit(f"{EQUIVALENT}: the sample has no {min(unknown)}; correct the name or remove it")
    killed = {
        key: {mutant for mutant, result in results.items() if result.test_outcome == TestOutcome.KILLED}
        for key, results in (("before", first), ("after", last))
    }
    wrong = killed["after"] & reasons.keys()
    if wrong:
        raise SystemExit(f"{EQUIVALENT}: {min(wrong)} was killed, so it is no equivalent; remove it")
    others = len(first) - len(reasons)
    return {
        "command": "python -m tests.mutants FOLDER" + (" --tests REV" if after is not before else ""),
        "machine": machine(torch.device("cpu")),
        "sample": len(first),
        "seed": seed,
        "commit": before.commit,
        "tests_of": after.tests_of or before.commit,
        "killed_before": len(killed["before"]),
        "killed_after": len(killed["after"]),
        "share_before": round(len(killed["before"]) / others, 4),
        "share_after": round(len(killed["after"]) / others, 4),
        "by_timeout": sum(last[mutant].output == "timeout" for mutant in killed["after"]),
        "equivalent": [{"mutant": mutant, "reason": reason} for mutant, reason in sorted(reasons.items())],
        "survived": [
            {"mutant": mutant, "altered": _altered(result)}
            for mutant, result in sorted(last.items())
            if mutant not in killed["after"] and mutant not in reasons
        ],
    }


def write_report(before: Session, after: Session, seed: int, file: Path | None) -> None:
    """Print the figures, and keep all of it in a file where one is given."""
    found = summary(before, after, seed)
    for survivor in found["survived"]:
        print(survivor["mutant"], *survivor["altered"], sep="\n    ")
    print(
        f"{found['killed_before']} of {found['sample']} killed at first, {found['killed_after']} now, "
        f"{len(found['equivalent'])} equivalent: {found['share_after']:.3f} of the others"
    )
    if file is not None:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
