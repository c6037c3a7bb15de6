"""What a deployment asks and what the answers make of a recipe; the `deploy` section of recipes. No server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from infra.store import Store
from pipelines.commands.conduct import describe_schedule
from pipelines.flows.parameters import changed, choice, node_form, recipe_form, values_of
from pipelines.flows.run import snapshot
from pipelines.pages.progress import describe_progress, read_progress
from stages.runner.deployment import Schedule
from stages.runner.graph import plan
from stages.runner.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from stages.runner.run import time_left
from tests.pipelines.conftest import write_metadata

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture
def demo() -> Recipe:
    return load_recipe(ROOT / "configs" / "demo.yaml")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_metadata(tmp_path / "metadata" / "part-0.parquet")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("name: tiny\nsubsets:\n  good: {select: {metadata: [metadata/*.parquet], min_width: 256}}\n")
    return recipe


def test_the_form_shows_every_field_with_the_recipes_value_and_accepts_what_it_shows(demo: Recipe) -> None:
    form = recipe_form(demo)
    shown = form["properties"]["config"]["properties"]
    for name, node in demo.nodes.items():
        assert set(shown[name]["properties"]) == set(type(node.config).model_fields), name

    def defaults(schema: dict[str, Any]) -> Any:
        below = schema.get("properties")
        return schema["default"] if below is None else {name: defaults(field) for name, field in below.items()}

    values = {name: defaults(schema) for name, schema in shown.items()}
    assert values == values_of(demo, demo.nodes)
    jsonschema.validate({"recipe": "x", "config": values}, form, jsonschema.Draft202012Validator)
    assert changed(demo, values) is demo, "a form that is sent off as it was shown changes nothing"


def test_bounds_descriptions_choices_and_pairs_reach_the_form(demo: Recipe) -> None:
    fields = node_form(demo.nodes["train-256"])["properties"]["config"]["properties"]
    assert fields["steps"]["minimum"] == 1 and "Optimizer steps" in fields["steps"]["description"]
    assert fields["precision"]["enum"] == ["fp32", "bf16", "auto"]
    betas = fields["optimizer"]["properties"]["betas"]
    assert betas["items"] == {"type": "number"} and (betas["minItems"], betas["maxItems"]) == (2, 2)
    assert recipe_form(demo)["properties"]["nodes"]["properties"]["from"]["enum"] == list(demo.nodes)


def test_a_changed_field_changes_that_node_alone_in_whatever_place_the_recipe_writes_it(demo: Recipe) -> None:
    wanted = {"little-filter": {"min_side": 300}, "train-256": {"model": {"width": 64}}, "text-codec": {"steps": 7}, "export": {}}
    after = values_of(changed(demo, wanted), demo.nodes)
    expected = values_of(demo, demo.nodes)
    expected["little-filter"]["min_side"] = 300
    # The demo writes this model once, with a YAML anchor, for both training stages.
    expected["train-256"]["model"]["width"] = 64
    expected["text-codec"]["steps"] = 7
    assert after == expected


def test_text_codec_may_be_written_with_an_underscore(demo: Recipe) -> None:
    document = {("text_codec" if name == "text-codec" else name): value for name, value in demo.document.items()}
    written = parse_recipe(document, demo.folder)
    assert changed(written, {"text-codec": {"steps": 7}}).nodes["text-codec"].config.steps == 7


def test_a_mapping_that_is_a_value_is_replaced_and_keeps_none_of_its_old_keys(path: Path) -> None:
    recipe = load_recipe(path, ["subsets.good.select.columns={url: link, caption: words}"])
    after = changed(recipe, {"good-select": {"columns": {"url": "address"}}})
    assert after.nodes["good-select"].config.columns == {"url": "address"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"best-filter": {}}, r"^config\.best-filter: the recipe demo has no such node; nearest are little-filter, "),
        ({"little-filter": 3}, r"^config\.little-filter: expected a mapping of fields, got 3$"),
        ({"little-filter": {"min_side": "wide"}}, r"^subsets\.little\.filter\.min_side: input should be a valid integer"),
        ({"train-256": {"model": {"depth": 3}}}, r"^train\.256\.model: depth is 3; it must be even"),
    ],
)
def test_a_wrong_answer_names_its_field(demo: Recipe, config: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed(demo, config)


def test_a_wrong_choice_names_its_field() -> None:
    with pytest.raises(RecipeError, match=r"^nodes\.onyl: unknown field$"):
        choice({"onyl": ["a"]})


def test_an_override_of_one_place_of_a_yaml_anchor_leaves_the_others(demo: Recipe) -> None:
    other = load_recipe(ROOT / "configs" / "demo.yaml", ["train.256.optimizer.lr=0.5"])
    assert other.nodes["train-256"].config.optimizer.lr == 0.5
    assert other.nodes["train-512"].config == demo.nodes["train-512"].config


def test_the_deploy_section_changes_no_fingerprint(path: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    section = ["deploy={schedules: [{cron: '0 2 * * *', until: good-select}], gpus: 8, pool: {name: big, type: kubernetes}}"]
    plain, deployed = (plan(load_recipe(path, more), store)["good-select"].fingerprint for more in ([], section))
    assert plain == deployed


def test_a_recipes_copy_in_the_store_is_the_same_recipe_wherever_it_is_read(path: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    recipe = load_recipe(path, ["subsets.good.select.min_width=300"])
    copy = load_recipe(snapshot(recipe, store))
    assert (copy.nodes, copy.folder) == (recipe.nodes, recipe.folder)
    assert snapshot(copy, store) == snapshot(recipe, store)


def test_a_recipe_is_read_from_an_object_store(path: Path) -> None:
    import fsspec

    recipe = load_recipe(path)
    store = Store("memory://recipes")
    assert load_recipe(snapshot(recipe, store)).nodes == recipe.nodes
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{schedules: [{cron: '0 2 * * *', interval: 60}]}",
            r"^deploy\.schedules\.0: expected exactly one of cron, interval and rrule",
        ),
        ("{schedules: [{timezone: UTC}]}", r"^deploy\.schedules\.0: expected exactly one of cron, interval and rrule"),
        ("{schedules: [{interval: 0}]}", r"^deploy\.schedules\.0\.interval: input should be greater than 0"),
        ("{schedules: [{cron: '0 2 * * *', timezone: Atlantis}]}", r"^deploy\.schedules\.0\.timezone: no such time zone"),
        ("{pool: {type: slurm}}", r"^deploy\.pool\.type: input should be 'process', 'docker' or 'kubernetes'"),
        ("{every: day}", r"^deploy\.every: unknown field"),
    ],
)
def test_a_mistake_in_the_deploy_section_is_one_line(path: Path, section: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [f"deploy={section}"])


def test_a_schedule_in_words() -> None:
    schedule = Schedule.model_validate(
        {"rrule": "FREQ=WEEKLY", "timezone": "Europe/Berlin", "from": "train-256", "active": False}
    )
    assert describe_schedule(schedule) == "rrule FREQ=WEEKLY (Europe/Berlin), from train-256, switched off"


@pytest.mark.parametrize(
    "fields",
    [
        {"phase": "write", "done": 3, "total": 10, "unit": "units", "rows": 1200, "rows_per_s": 340.5},
        {"phase": "train", "done": 1, "total": 2, "unit": "steps", "loss": 1e-05, **time_left(200, 1.0)},
        {"phase": "pick", "done": 0, "total": 1, "unit": "units"},
    ],
)
def test_progress_is_read_back_from_its_words(fields: dict[str, Any]) -> None:
    assert read_progress(f"good-select {describe_progress(fields)}") == ("good-select", fields)
    assert read_progress("nothing of ours") == ("", {})


def test_a_condition_of_a_training_stage_can_be_given_in_the_form(demo: Recipe) -> None:
    answers = {"train-256": {"data": {"where": ["AESTHETIC_SCORE >= 5"]}}}
    node = changed(demo, answers).nodes["train-256"]
    assert node.config.data.where == ("AESTHETIC_SCORE >= 5",) and node.inputs == demo.nodes["train-256"].inputs
