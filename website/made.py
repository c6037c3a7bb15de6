"""The pages that nobody writes: a page for each result, the commands' arguments, and the files that other pages link to."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from website.pages import DOCS, ROOT, Page, SiteError

RESULTS = DOCS / "results"
# How a file is coloured, by its ending.
LANGUAGES = {".yaml": "yaml", ".py": "python", ".json": "json", ".toml": "toml", ".sh": "bash", "": "make"}
# What an entry of a list or a table shows of a figure.
DIGITS = 4
# Details of more lines than this are left to the file itself.
LONGEST = 400


def results() -> list[Page]:
    """A page for every JSON file of ``docs/results`` that has no page of its own, and one that lists all pages of results."""
    pages = [_result(path) for path in sorted(RESULTS.glob("*.json")) if not path.with_suffix(".md").is_file()]
    written = sorted(RESULTS.glob("*.md"))
    rows = [_row(path.with_suffix(".json")) for path in sorted(RESULTS.glob("*.json")) if path.name != "leaderboard.json"]
    others = [f"- [{_heading(path)}](results/{path.name})" for path in written]
    text = (
        "# Results\n\nEvery figure that this project states was measured, by a command that stands beside it. The files lie in "
        "`docs/results`.\n\n## Pages\n\n" + "\n".join(others) + "\n\n## Measurements\n\n"
        "| what | figures | measured |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    return [Page("results/overview.md", "docs/results", text), *pages]


def _heading(path: Path) -> str:
    return Page(path.name, path.name, path.read_text(encoding="utf-8")).title


def _row(path: Path) -> str:
    told = read(path)
    shown = ", ".join(f"{name} {value}" for name, value in list(figures(told).items())[:4])
    about = f": {said}" if (said := _about(told)) else ""
    return f"| [{path.stem}](results/{path.name}){about} | {shown} | {told.get('date', '')} |"


def _result(path: Path) -> Page:
    told = read(path)
    lines = [f"# {path.stem.replace('-', ' ').capitalize()}", "", _about(told), ""]
    for name in ("machine", "command", "date"):
        if told.get(name):
            value = f"`{told[name]}`" if name == "command" else str(told[name])
            lines.append(f"- {name}: {value}")
    lines += ["", "| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures(told).items()), ""]
    whole = json.dumps(told, indent=1).split("\n")
    if len(whole) <= LONGEST:
        lines += ['??? note "All of it"', "", "    ```json", *(f"    {line}" for line in whole), "    ```", ""]
    lines.append(f'The file: <a href="../results/{path.name}" download>{path.name}</a>')
    return Page(f"measurements/{path.stem}.md", f"docs/results/{path.name}", "\n".join(lines) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        SiteError: the file is no JSON object.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SiteError(f"{path.relative_to(ROOT)}: {error}") from None
    if not isinstance(told, dict):
        raise SiteError(f"{path.relative_to(ROOT)}: a result is a JSON object, with a name for each figure")
    return told


def figures(told: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a result as text: those of the benchmarks' frame, and every number that stands at the top."""
    shown = {"ratio" if not told.get("peer") else f"times {str(told['peer']).replace('_', ' ')}": told.get("ratio")}
    shown |= told.get("figures", {}) | {name: value for name, value in told.items() if name != "ratio"}
    return {
        name.replace("_", " "): f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
        for name, value in shown.items()
        if isinstance(value, int | float) or (name in told.get("figures", {}) and isinstance(value, str))
    }


def _about(told: Mapping[str, Any]) -> str:
    """What a result is: the first line of the module that measured it."""
    found = re.search(r"python -m ([\w.]+)", str(told.get("command", "")))
    name = found[1] if found else f"benchmarks.{told.get('name', '')}"
    for path in (ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__main__.py"):
        if path.is_file():
            said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            return re.sub(r"^`[^`]+`: ", "", " ".join(said.replace("``", "`").split())).rstrip(".")
    return ""


def notebook() -> Page:
    """The notebook as a page: its text, and its code as blocks."""
    path = DOCS / "notebook.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    parts.insert(1, f'The notebook itself: <a href="{path.name}" download>{path.name}</a>. `make site-test` runs it.')
    return Page("notebook.md", "docs/notebook.ipynb", "\n\n".join(parts) + "\n")


def commands() -> Page:
    """Every subcommand with its arguments, from the help that it prints."""
    import typer
    from typer.cli import get_docs_for_click

    from pipelines.command import app

    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="unidiffuser")
    text = get_docs_for_click(obj=group, ctx=context, name="unidiffuser", title="The `unidiffuser` command")
    text = re.sub(r"^(#+) `unidiffuser (\S+)`$", r"\1 \2", text, flags=re.MULTILINE)
    # The list of commands, whose words are cut; the headings are that list.
    text = re.sub(r"^\*\*Commands\*\*:\n\n(\* .*\n)+", "", text, flags=re.MULTILINE)
    return Page("reference/commands.md", "pipelines/command.py", text)


def files(wanted: Iterable[str]) -> list[Page]:
    """Pages of files outside `docs` that pages link to: Markdown as it is, anything else as code."""
    pages = []
    for name in sorted(wanted):
        path = ROOT / name
        if not path.is_file():
            raise SiteError(f"{name}: a page links to it, and there is no such file")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            text = f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"
        pages.append(Page(f"source/{name.removesuffix('.md')}.md", name, text))
    return pages
