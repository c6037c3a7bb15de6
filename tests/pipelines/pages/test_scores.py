"""What a person reads to choose a threshold: the histograms of a filter's page, and the funnel of `unidiffuser status`."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from PIL import Image

from infra.dataset import Manifest, Stats, commit
from infra.store import Store
from pipelines.commands.inspection import status_rows
from pipelines.commands.terminal import Words, funnel_table
from pipelines.flows.run import plan_run
from pipelines.pages.scores import draw, scores_section
from stages.filter.histogram import BINS, count, histogram_of
from stages.runner.recipe import load_recipe
from tests.pipelines.conftest import write_recipe


def test_a_filters_page_has_a_picture_and_the_rows_that_each_threshold_keeps(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    values = {"aesthetic": chance.normal(5, 1, 400).astype(np.float32), "punsafe": chance.beta(1, 5, 300).astype(np.float32)}
    columns = {name: pa.chunked_array([pa.array([*numbers, None])]) for name, numbers in values.items()}
    scores = {name: histogram_of(name, count(name, column)) for name, column in columns.items()}
    head, picture, table = scores_section(scores, {"min_aesthetic": 5.0, "max_punsafe": None}, tmp_path / "drawings")
    found = re.fullmatch(r"!\[histograms of aesthetic, punsafe\]\(data:image/png;base64,(.*)\)", picture)
    assert head == "## Scores" and found is not None
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))
    # The threshold of one of the two is marked, by a dashed line in a colour that nothing else has.
    marked = (np.abs(drawn.astype(int) - [196, 87, 42]).max(2) < 40).nonzero()
    assert 0 < len(marked[0]) and np.ptp(marked[1]) < 6 and marked[1].max() < drawn.shape[1] / 2
    lines = re.findall(r"\| (\w+) (>=|<) ([\d.]+) \| (\d+) \| ([\d.]+)% \|", table)
    assert {line[:2] for line in lines} == {("aesthetic", ">="), ("punsafe", "<")} and len(lines) >= 10
    for name, sign, threshold, rows, share in lines:
        kept = (values[name] < float(threshold) if sign == "<" else values[name] >= float(threshold)).sum()
        assert int(rows) == kept and float(share) == round(100 * kept / len(values[name]), 1)
    assert "**aesthetic** (asked for: 5) | 400 rows; 1 rows without it" in table and "**punsafe** (not asked for)" in table
    assert scores_section({}, {}, tmp_path) == []


def test_the_curve_says_which_share_of_the_rows_each_threshold_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *place, **how: (figures.append(figure), save(figure, *place, **how)))
    chance = np.random.default_rng(0)
    values = {name: chance.beta(2, 5, 400) for name in ("punsafe", "pwatermark", "similarity")}
    scores = {name: histogram_of(name, count(name, pa.chunked_array([pa.array(found)]))) for name, found in values.items()}
    draw(scores, {"max_punsafe": 0.3, "min_similarity": 0.1, "max_pwatermark": None})
    (figure,) = figures
    shown = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_ylabel() == "rows"}
    curves = [axes for axes in figure.axes if axes.get_ylabel() == "share kept"]
    assert list(shown) == ["punsafe, at most 0.3", "pwatermark", "similarity, at least 0.1"] and len(curves) == 3
    for (title, rows), curve, (name, found) in zip(shown.items(), curves, values.items(), strict=True):
        assert rows.bbox.bounds == curve.bbox.bounds
        thresholds, shares = curve.lines[0].get_xydata().T
        assert len(thresholds) == BINS + 1
        for threshold, share in zip(thresholds, shares, strict=True):
            # A hair below: an edge belongs to the bin above it.
            below = (found < threshold - 1e-12).mean()
            assert share == pytest.approx(1 - below if name == "similarity" else below)
        assert sum(bar.get_height() for bar in rows.patches) == 400
        chosen = [line.get_xdata()[0] for line in rows.lines]
        assert chosen == [float(number) for number in re.findall(r"[\d.]+", title)]


def test_a_picture_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"aesthetic": histogram_of("aesthetic", count("aesthetic", pa.chunked_array([pa.array([5.0, 6.0])])))}
    first = scores_section(scores, {"min_aesthetic": 5.0}, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert scores_section(scores, {"min_aesthetic": 5.0}, tmp_path) == first
    with pytest.raises(ImportError):
        scores_section(scores, {"min_aesthetic": 5.5}, tmp_path)


def test_status_shows_what_became_of_every_subsets_rows(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    document = tmp_path / "two.yaml"
    document.write_text(
        "name: two\n"
        "subsets:\n"
        "  a: {select: {metadata: [metadata/*.parquet]}, download: {}, filter: {}}\n"
        "  b: {from: a-download, filter: {min_side: 300}}\n"
    )
    recipe, store = load_recipe(document), Store(str(tmp_path / "store"))
    made = {"a-select": (60, {"min_width": 20}), "a-download": (40, {"http_404": 3, "timeout": 7}), "b-filter": (30, {})}
    for node, (rows_in, dropped) in made.items():
        planned = plan_run(recipe, store)[node]
        stats = Stats(rows_in=rows_in, rows_out=rows_in - sum(dropped.values()), dropped=dropped)
        commit(store, Manifest(
            stage=planned.stage, node=node, fingerprint=planned.fingerprint, generation=0, inputs={}, config={}, sources={},
            code={}, columns={}, stats=stats, summary={}, seconds=1.0, created="2026-01-01T00:00:00+00:00", files=[],
        ))  # fmt: skip
    rows = [row for row in status_rows(recipe, store) if row["created"]]
    counted = {row["node"]: Stats(row["rows_in"], row["rows_out"], row["dropped"]) for row in rows}
    columns = funnel_table(recipe, counted).columns
    cells = [[cell.text.plain for cell in column.cells if isinstance(cell, Words)] for column in columns]
    assert list(zip(*cells, strict=True)) == [
        ("a-select", "60", "40", "66.7%", "20 min_width"),
        ("a-download", "40", "30", "50.0%", "7 timeout, 3 http_404"),
        ("b-filter", "30", "30", "50.0%", ""),
    ]
