"""The site as it is built: every link leads somewhere, nothing is asked of the network, and what is put in is the source's."""

from __future__ import annotations

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from website import made
from website.blocks import REASONS, blocks, to_run
from website.build import build, gathered, placed
from website.expand import CODE_LINE, expanded, outside_code, source_of
from website.links import broken
from website.llms import listing
from website.pages import DOCS, ROOT, Page, SiteError, in_order, written


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("site") / "built")


class _Text(HTMLParser):
    """What a page shows."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = ""

    def handle_data(self, data: str) -> None:
        self.shown += data


def shown(path: Path) -> str:
    reader = _Text()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.shown


def test_no_link_of_the_site_is_broken_and_nothing_is_fetched_from_the_network(site: Path) -> None:
    assert broken(site) == []
    script = (site / "iframe-worker.js").read_text()
    assert "http" not in script.partition("*/")[2]


def test_every_page_is_in_the_navigation_and_is_there_for_machines_too(site: Path) -> None:
    pages = [page.path for those in in_order(gathered()).values() for page in those]
    assert len(pages) == len(set(pages))
    for path in DOCS.rglob("*.md"):
        assert path.relative_to(DOCS).as_posix() in pages
    for path in DOCS.glob("results/*.json"):
        own = path.with_suffix(".md").is_file()
        assert (site / ("results" if own else "measurements") / f"{path.stem}.html").is_file()
    index = (site / "llms.txt").read_text()
    for name in re.findall(r"\]\(([^)]+)\)", index):
        assert (site / name).is_file() and (site / name.replace(".md", ".html")).is_file()


def test_a_link_to_a_result_leads_to_its_page(site: Path) -> None:
    for name, place in (("shapes", "results/shapes.md"), ("loader", "measurements/loader.md")):
        assert placed(gathered())[f"docs/results/{name}.json"] == place and (site / place).is_file()


def test_the_list_for_machines_in_the_repository_is_of_its_pages() -> None:
    assert (ROOT / "llms.txt").read_text(encoding="utf-8") == listing(gathered(), repository=True), "run: python -m website llms"
    for name in re.findall(r"\]\(([^)]+)\)", (ROOT / "llms.txt").read_text()):
        assert (ROOT / name).exists()


def test_code_on_the_page_of_mathematics_is_the_source_as_it_stands(site: Path) -> None:
    page = shown(site / "mathematics.html")
    lines = [found.groups() for line in (DOCS / "mathematics.md").read_text().split("\n") if (found := CODE_LINE.match(line))]
    assert len(lines) > 15
    for name, target in lines:
        node: ast.AST = ast.parse((DOCS / target).resolve().read_text())
        for part in name.split("."):
            named = [each for each in ast.walk(node) if getattr(each, "name", None) == part]
            node = named[0] if named else node
        if isinstance(node, ast.FunctionDef):
            # The body's last line, which no heading or link would show.
            last = (DOCS / target).resolve().read_text().split("\n")[(node.end_lineno or 0) - 1].strip()
            assert last in page, name


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "mathematics.html").read_text()
    formulas = (DOCS / "mathematics.md").read_text().count("\n$$\n") // 2
    assert formulas > 8 and page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == formulas
    assert "$$" not in shown(site / "mathematics.html") and "mathjax" not in page.lower()


def page_of(text: str) -> Page:
    return Page("how-to/some.md", "docs/how-to/some.md", text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[there](none.md)", "docs/how-to/some.md: the link none.md leads to no file of the repository"),
        ("[NoiseSchedule.gone](../../unidiffuser/schedule.py)", "docs/how-to/some.md: unidiffuser/schedule.py has no"),
        ("[NoiseSchedule](../../unidiffuser/gone.py)", "docs/how-to/some.md: no file unidiffuser/gone.py"),
    ],
)  # fmt: skip
def test_a_link_to_nothing_is_refused_and_named(text: str, said: str) -> None:
    with pytest.raises(SiteError) as error:
        expanded(page_of(text), {})
    assert str(error.value).startswith(said)


def test_links_lead_from_where_the_page_stands_and_code_is_left_alone() -> None:
    text = "[a](../formats.md#x) and `[b](c.md)` and [d](https://example.com)\n\n```\n[e](f.md) $x$\n```\n"
    places = {"docs/formats.md": "formats.md"}
    assert expanded(page_of(text), places) == text.replace("../formats.md", "../formats.md")
    moved = Page("source/CONTRIBUTING.md", "CONTRIBUTING.md", "[a](docs/formats.md)")
    assert expanded(moved, places) == "[a](../formats.md)"
    assert (
        outside_code("a `b` c\n~~~\na\n~~~\na", lambda part: part.replace("a", "x").replace("b", "y"))
        == "x `b` c\n~~~\na\n~~~\nx"
    )


def test_the_source_of_a_method_is_cut_out_with_its_decorators(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("X = 1\n\n\nclass A:\n    @property\n    def b(self):\n        return 1\n\n    c: int = 2\n")
    assert source_of(file, "A.b", "page") == ("@property\ndef b(self):\n    return 1", 5)
    assert source_of(file, "A.c", "page") == ("c: int = 2", 9) and source_of(file, "X", "page") == ("X = 1", 1)


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<a href="gone.html">', "gone.html: no such file"),
        ('<a href="#there"><h2 id="here">', "#there: no such anchor"),
        ('<a href="other.html#there">', "other.html#there: no such anchor"),
        ('<img src="gone.png">', "gone.png: no such file"),
        ('<script src="https://example.com/x.js">', "https://example.com/x.js: is fetched from the network"),
        ('<link rel="stylesheet" href="https://example.com/x.css">', "https://example.com/x.css: is fetched from the network"),
        ('<a href="#here"><h2 id="here"><a href="https://example.com"><a href="other.html#below">', None),
    ],
)
def test_a_broken_link_is_found(html: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "other.html").write_text('<p id="below">')
    assert broken(tmp_path) == ([f"page.html: {said}"] if said else [])


def test_every_block_that_is_not_run_says_why_and_the_rest_can_be() -> None:
    run, left = [], []
    for page in written():
        run += to_run(page)
        left += [block for block in blocks(page) if block.reason]
    assert len(run) > 20 and len(run) > len(left)
    # Only what runs elsewhere, serves, or takes hours is left out.
    assert all(block.reason.startswith(REASONS) for block in left)
    servers = ("unidiffuser up", "--keep", "unidiffuser deploy", "unidiffuser ui")
    for block in run:
        lines = [line for line in block.code.split("\n") if any(word in line for word in servers)]
        assert all("--systemd" in line for line in lines), f"{block.page}:{block.line} would start a server"


@pytest.mark.parametrize("text", ["<!-- not run: it is long -->\n```bash\nls\n```", "<!-- not run: cluster -->\n\nSome text.\n"])
def test_a_mark_without_a_reason_or_a_block_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match="docs/how-to/some.md:"):
        list(blocks(page_of(text)))


def test_figures_of_a_result_are_those_of_the_frame_and_of_its_top() -> None:
    told = {
        "ratio": 1.23456,
        "peer": "bare_loop",
        "figures": {"rows_per_s": 18220, "calls": "25/50"},
        "name": "x",
        "minutes": 2.5,
    }
    assert made.figures(told) == {"times bare loop": "1.235", "rows per s": "18220", "calls": "25/50", "minutes": "2.5"}


def test_the_notebook_is_a_notebook_without_output() -> None:
    import nbformat

    book = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    from unidiffuser.tasks import TASK_NAMES

    source = "\n".join(cell.source for cell in code)
    assert all(f'"{task}"' in source for task in TASK_NAMES)
    for cell in code:
        ast.parse(cell.source.rstrip(";"))


def test_recipes_on_pages_can_be_read_as_recipes(tmp_path: Path) -> None:
    from stages.runner.recipe import load_recipe

    whole = [
        block for page in written() for block in blocks(page) if block.language == "yaml" and block.code.startswith("name: ")
    ]
    assert whole
    for number, block in enumerate(whole):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block.code)
        assert load_recipe(file, []).nodes


def test_results_without_a_page_of_their_own_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.json").write_text(
        json.dumps({"minutes": 1.5, "command": "python -m benchmarks.loader", "date": "2026-01-01"})
    )
    (tmp_path / "two.json").write_text("{}")
    (tmp_path / "two.md").write_text("# Two\n")
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    index, page = made.results()
    assert page.path == "measurements/one.md" and "| minutes | 1.5 |" in page.text and "litdata" in page.text
    assert "[Two](results/two.md)" in index.text and "results/one.json" in index.text
