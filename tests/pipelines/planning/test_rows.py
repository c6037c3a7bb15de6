"""Rows through the funnel: LAION's where nothing is known, counted and measured where something is."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.dataset import Stats, point
from infra.store import Store
from pipelines.planning.rows import flows
from pipelines.planning.training import trainings
from pipelines.planning.work import works
from stages.runner.recipe import Recipe, load_recipe
from tests.pipelines.commands.test_comparison import put


def paper(tmp_path: Path, *more: str) -> Recipe:
    return load_recipe("configs/paper-v0.yaml", [f"subsets.web.select.metadata=['{tmp_path}/part-*.parquet']", *more])


def test_laions_rates_multiply(tmp_path: Path) -> None:
    found = flows(load_recipe("configs/paper-v0.yaml"), Store(str(tmp_path / "none")))
    web = found["web-select"]
    assert web.rows_in == 2.32e9 and web.rows_out == pytest.approx(2.32e9 * 0.571 * 0.971 * 0.939)
    assert "laion2B-en" in web.source and "57.1%" in web.source
    assert found["web-download"].rows_out == pytest.approx(web.rows_out * 2 / 3)
    # Pictures of 1,024 px or more lose none to a bound of 512.
    assert found["high-resolution-filter"].rows_out == found["high-resolution-download"].rows_out


def test_rows_of_files_that_are_here_are_counted(tmp_path: Path) -> None:
    for number, rows in enumerate((30, 12)):
        pq.write_table(pa.table({"URL": ["https://a.example"] * rows}), tmp_path / f"part-{number}.parquet")
    found = flows(paper(tmp_path), Store(str(tmp_path / "none")))
    assert found["web-select"].rows_in == 42 and "counted in 2 files" in found["web-select"].source


def test_what_the_store_has_is_measured_and_a_sample_is_no_loss(tmp_path: Path) -> None:
    """A pilot on a tenth: 100 rows, of which 90 were left out by sampling, and of the others 8 stayed and 6 came."""
    store, recipe = Store(str(tmp_path / "runs")), paper(tmp_path)
    select = put(
        store, "select", "web-select", "a", {}, {"a": "x" * 800}, stats=Stats(100, 8, {"not_sampled": 90, "min_side": 2})
    )
    download = put(
        store, "download", "web-download", "b", {"rows": select}, {"a": "x" * 6000}, stats=Stats(8, 6, {"http_404": 2})
    )
    for made in (select, download):
        point(store, recipe.name, made.manifest.node, made.manifest.reference())
    found = flows(recipe, store)
    assert found["web-select"].rows_out == pytest.approx(100 * 0.8)
    assert found["web-download"].rows_out == pytest.approx(80 * 0.75)
    assert found["web-select"].source.startswith("measured: 8 of 10") and "preset" not in found["web-select"].source
    work = {each.node: each for each in works(recipe, found, trainings(recipe))}
    assert work["web-download"].stored == pytest.approx(60 * 1000)
    sampled = flows(paper(tmp_path, "subsets.web.select.sample=0.5"), store)
    assert sampled["web-select"].rows_out == pytest.approx(100 * 0.8 * 0.5)


def test_rows_that_nobody_knows_are_said_to_be_unknown(tmp_path: Path) -> None:
    found = flows(load_recipe("configs/1-gpu.yaml"), Store(str(tmp_path / "none")))
    assert found["mine-folder"].rows_in == 0 and found["mine-folder"].source.startswith("unknown")


def test_filters_of_the_same_rows_score_them_once(tmp_path: Path) -> None:
    recipe = load_recipe("configs/demo.yaml")
    work = {each.node: each for each in works(recipe, flows(recipe, Store(str(tmp_path / "none"))), trainings(recipe))}
    assert work["little-filter"].flop > 0 and work["large-filter"].flop == 0
    assert work["little-filter"].puts > work["large-filter"].puts


def test_a_shard_of_250_mb_takes_the_requests_that_were_counted(tmp_path: Path) -> None:
    """About 11 PUT and 12 GET or HEAD, as counted against an S3 server."""
    recipe = load_recipe("configs/paper-v0.yaml", ["subsets.web.download.image_size=256"])
    found = flows(recipe, Store(str(tmp_path / "none")))
    download = next(each for each in works(recipe, found, trainings(recipe)) if each.node == "web-download")
    assert download.stored / download.units == pytest.approx(170e6, rel=0.1)
    assert 8 <= download.puts / download.units <= 13
