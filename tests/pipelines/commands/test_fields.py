"""The reference of a recipe's fields says what the models that check a recipe say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.command import app
from pipelines.commands.checkpoints import Misuse
from pipelines.commands.fields import PLACES, fields, page, sections_of
from stages.catalog import STAGES, stage_class
from stages.runner.recipe import load_recipe

ROOT = Path(__file__).parent.parent.parent.parent


def test_the_page_is_that_of_the_models() -> None:
    assert (ROOT / "docs" / "fields.md").read_text(encoding="utf-8") == page(), "run: unidiffuser fields --page > docs/fields.md"


def test_every_stage_is_there_and_every_field_says_what_it_is() -> None:
    assert set(PLACES) == {"recipe", *STAGES}
    for section in PLACES:
        assert [row.name for row in fields(section) if not row.description] == []
    for stage in STAGES:
        names = {info.alias or name for name, info in stage_class(stage).Config.model_fields.items()}
        missing = names - {row.name for row in fields(stage)}
        assert not missing, f"{stage}: {missing}"


def test_bounds_defaults_and_nested_fields_are_told() -> None:
    rows = {row.name: row for row in fields("filter")}
    assert (rows["min_side"].type, rows["min_side"].default) == ("whole number, at least 1 or null", "200")
    assert rows["clip"].default == "encoders.clip"
    assert rows["heads.aesthetic.weights"].default is None
    measures = {(row.name, row.description.partition(":")[0]): row for row in fields("evaluate")}
    assert measures["measures[].subset", "Of kind kid"].default == "1000"
    (kind,) = (row for row in fields("evaluate") if row.name == "measures[].kind")
    assert kind.default is None and "precision-recall" in kind.type
    assert {row.name for row in fields("recipe")} >= {"encoders.vae", "deploy.schedules[].cron", "subsets.SUBSET.from"}


@pytest.mark.parametrize(
    ("node", "section"),
    [("filter", "filter"), ("aesthetic-filter", "filter"), ("train-512", "train"), ("text-codec", "text-codec")],
)
def test_a_node_is_its_stage(node: str, section: str) -> None:
    assert sections_of(node) == [section]


def test_every_node_that_we_ship_has_its_fields() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        for node in load_recipe(path).nodes.values():
            assert sections_of(node.name) == [node.stage]


def test_an_unknown_stage_is_one_line_with_the_nearest() -> None:
    with pytest.raises(Misuse, match="^flter: no stage or node of a recipe; nearest are filter"):
        sections_of("flter")


def test_the_command_prints_words_and_json() -> None:
    shown = CliRunner().invoke(app, ["fields", "export"]).output
    assert "layouts" in shown
    rows = json.loads(CliRunner().invoke(app, ["fields", "export", "--json"]).output)
    assert {"section": "export", "name": "layouts"}.items() <= next(row for row in rows if row["name"] == "layouts").items()
