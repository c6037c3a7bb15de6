"""Keeps stage versions honest: code that changed must come with a new version, or with a recorded reason why it need not.

`versions.json` holds, for every stage, its version and a digest of the code that makes its result: the stage's own file and
what that imports from this project, without comments, docstrings and layout. Where the files lie, and under what names they
import each other, is no part of the digest: code may move. A test compares. After a change, either raise the stage's `version`
(old datasets become stale) and run ``python -m stages.runner.versions``, or, where the result is the same, run
``python -m stages.runner.versions --waive STAGE "why the result is the same"``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from functools import cache
from pathlib import Path

from stages.catalog import STAGES, stage_class

ROOT = Path(__file__).parent.parent.parent
RECORD = Path(__file__).with_name("versions.json")
# How a stage is run, planned, watched and stored does not decide what it makes.
MACHINERY = (
    "stages/__init__.py",
    "stages/__main__.py",
    "stages/catalog.py",
    "stages/runner/",
    "stages/train/beside.py",
    "stages/train/evaluation.py",
    "stages/train/preview.py",
    "stages/train/track",
)
ROOMS = ("stages", "training", "unidiffuser", "examples")


def sources(stage: str) -> list[Path]:
    """Files of this project that decide a stage's result, sorted."""
    module = STAGES[stage].split(":")[0]
    found: set[Path] = set()
    waiting = [ROOT / f"{module.replace('.', '/')}.py"]
    while waiting:
        path = waiting.pop()
        if path in found or str(path.relative_to(ROOT)).startswith(MACHINERY):
            continue
        found.add(path)
        waiting += _imports(path)
    return sorted(found)


def _imports(path: Path) -> list[Path]:
    """Project files that a file imports, at its top or inside a function."""
    modules = _modules(path.read_text(encoding="utf-8"))
    files = [ROOT / f"{module.replace('.', '/')}.py" for module in modules if module.split(".")[0] in ROOMS]
    return [file for file in files if file.is_file()]


# Stages share most of their sources.
@cache
def _modules(text: str) -> list[str]:
    modules: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def code_digest(stage: str) -> str:
    """sha256 over what a stage's sources compute, in an order that no path decides, as 24 hex digits."""
    files = sorted(hashlib.sha256(_computes(path.read_text(encoding="utf-8")).encode()).digest() for path in sources(stage))
    return hashlib.sha256(b"".join(files)).hexdigest()[:24]


class _Bare(ast.NodeTransformer):
    """Leaves out docstrings, and imports of this project's own rooms."""

    def visit_Import(self, node: ast.Import) -> ast.Import | None:
        node.names = [alias for alias in node.names if not _own(alias.name)]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module and _own(node.module) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        return super().generic_visit(node)


def _own(module: str) -> bool:
    return module.split(".")[0] in (*ROOMS, "infra")


@cache
def _computes(text: str) -> str:
    return ast.unparse(_Bare().visit(ast.parse(text)))


def problems() -> list[str]:
    """A line for every stage whose code is not the recorded one."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = []
    for stage in STAGES:
        version, known = stage_class(stage).version, recorded.get(stage, {})
        if known.get("version") == version and known.get("digest") != code_digest(stage):
            lines.append(
                f"{stage}: its code changed but its version is still {version}: raise it in the stage's file, or run "
                f'`python -m stages.runner.versions --waive {stage} "why the result is the same"`'
            )
        elif known.get("version") != version:
            lines.append(f"{stage}: version {version} is not recorded yet: run `python -m stages.runner.versions`")
    return lines


def record(waive: str | None = None, reason: str = "") -> None:
    """Write down new versions, and for the waived stage its new code under the old version, with the reason."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for stage in STAGES:
        version = stage_class(stage).version
        if recorded.get(stage, {}).get("version") != version:
            recorded[stage] = {"version": version, "digest": code_digest(stage), "waivers": []}
        elif stage == waive:
            recorded[stage]["digest"] = code_digest(stage)
            recorded[stage]["waivers"].append(reason)
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.runner.versions", description="Records the versions of the stages' code."
    )
    parser.add_argument("--waive", nargs=2, metavar=("STAGE", "REASON"), help="the code changed, the result did not")
    options = parser.parse_args()
    record(*(options.waive or ()))
    found = problems()
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
