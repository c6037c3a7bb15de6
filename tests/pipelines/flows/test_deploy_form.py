"""What a deployment asks and what the answers make of a recipe; the `deploy` section of recipes. No server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.utilities.schema_tools.validation import validate

from infra.store import Store
from pipelines.commands.deployment import describe_schedule
from pipelines.flows.forms import node_fields, node_form, recipe_form
from pipelines.flows.parameters import changed, choice, values_of
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


def tabs(form: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields that a form shows by node, from the tabs and the tabs in them."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(form["properties"]["config"]["anyOf"])
    while waiting:
        tab = waiting.pop()
        waiting += tab.get("anyOf", [])
        if "anyOf" not in tab:
            found |= {node: fields["properties"] for node, fields in tab.get("properties", {}).items()}
    return found


def defaults(fields: dict[str, Any]) -> Any:
    return {name: defaults(f["properties"]) if "properties" in f else f["default"] for name, f in fields.items()}


def within(part: Any, whole: Any) -> bool:
    return part == whole or (isinstance(part, dict) and all(within(part[name], whole[name]) for name in part))


def test_the_form_shows_the_fields_that_the_file_sets_with_its_values_and_what_is_sent_as_shown_changes_nothing(
    demo: Recipe,
) -> None:
    form = recipe_form(demo)
    values = {name: defaults(fields) for name, fields in tabs(form).items()}
    for name in demo.nodes:
        assert within(values[name], values_of(demo, [name])[name]), name
    document = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    for subset, stages in document["subsets"].items():
        for stage, fields in stages.items():
            if stage != "from":
                assert set(values[f"{subset}-{stage}"]) == set(fields), f"{subset}-{stage}"
    for name, fields in document["train"].items():
        assert set(values[f"train-{name}"]) == set(fields) - {"data", "from"}
        assert set(values[f"train-{name}"]["model"]) == set(fields["model"])
    for config in (values, values_of(demo, demo.nodes), None):
        jsonschema.validate({"recipe": "x", "config": config}, form, jsonschema.Draft202012Validator)
        assert changed(demo, config or {}) is demo
    assert set(form["properties"]) == {"nodes", "config", "overrides", "jobs"}, "what nobody changes takes room"


def test_every_field_of_every_form_has_a_title_and_a_description(demo: Recipe) -> None:
    def check(place: str, field: dict[str, Any]) -> None:
        assert field.get("title") and field.get("description"), place
        for name, below in field.get("properties", {}).items():
            check(f"{place}.{name}", below)

    for node in demo.nodes.values():
        check(node.name, node_fields(node))
        for name, field in node_form(demo, node)["properties"].items():
            check(f"{node.name}: {name}", field)
    own = parse_recipe({"name": "own", "subsets": {"mine": {"folder": {"images": ["*.png"]}}}}, ROOT)
    check("mine-folder", node_fields(own.nodes["mine-folder"]))
    for name, field in recipe_form(demo)["properties"].items():
        check(name, field)


@pytest.mark.parametrize(
    ("parameters", "field", "reason"),
    [
        ({"config": {"little-select": {"min_side": 0}}}, "config.little-select.min_side", "0 is not valid"),
        ({"config": {"little-select": {"max_side": "wide"}}}, "config.little-select.max_side", "'wide' is not valid"),
        ({"config": {"little-select": {"min_sid": 3}}}, "config.little-select", "'min_sid' was unexpected"),
        ({"config": {"best-select": {}}}, "config", "'best-select' was unexpected"),
        ({"jobs": 0}, "jobs", "0 is less than the minimum of 1"),
        ({"node": "little-select"}, "", "'node' does not match any"),
    ],
)
def test_prefect_refuses_a_wrong_value_by_the_name_of_its_field(
    demo: Recipe, parameters: dict[str, Any], field: str, reason: str
) -> None:
    errors = validate({"recipe": "x", **parameters}, recipe_form(demo))
    assert [(".".join(map(str, error.path)), reason in error.message) for error in errors] == [(field, True)]


def test_bounds_descriptions_choices_and_pairs_reach_the_form(demo: Recipe) -> None:
    fields = node_fields(demo.nodes["train-256"])["properties"]
    assert fields["steps"]["minimum"] == 0 and "Optimizer steps" in fields["steps"]["description"]
    assert fields["precision"]["enum"] == ["fp32", "bf16", "auto"]
    betas = fields["optimizer"]["properties"]["rest"]["properties"]["betas"]
    assert betas["items"] == {"type": "number"} and (betas["minItems"], betas["maxItems"]) == (2, 2)
    assert recipe_form(demo)["properties"]["nodes"]["properties"]["from"]["enum"] == list(demo.nodes)


def test_the_form_of_a_node_shows_the_fields_that_the_file_sets_for_it_and_accepts_all_others(demo: Recipe) -> None:
    form = node_form(demo, demo.nodes["large-filter"])
    shown = form["properties"]["config"]["anyOf"][1]["properties"]
    assert {name: field["default"] for name, field in shown.items()} == {
        "min_side": 512, "min_clip_similarity": 0.1, "min_aesthetic": 5.0,
    }  # fmt: skip
    assert shown["min_aesthetic"]["type"] == "number" and "anyOf" not in shown["min_aesthetic"]
    assert set(form["properties"]) == {"config", "follow", "force", "overrides"}
    sent = {"recipe": "x", "store": "y", "node": "large-filter", "config": {"min_aesthetic": None}, "follow": True}
    assert not validate(sent, form)
    assert validate({**sent, "config": {"min_side": 0}}, form) and validate({**sent, "node": "little-filter"}, form)


def test_a_changed_field_changes_that_node_alone_in_whatever_place_the_recipe_writes_it(demo: Recipe) -> None:
    wanted = {"little-filter": {"min_side": 300}, "train-256": {"model": {"width": 80}}, "text-codec": {"steps": 7}, "export": {}}
    after = values_of(changed(demo, wanted), demo.nodes)
    expected = values_of(demo, demo.nodes)
    expected["little-filter"]["min_side"] = 300
    # The demo writes this model once, with a YAML anchor, for both training stages.
    expected["train-256"]["model"]["width"] = 80
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
        (
            {"best-filter": {}},
            r"^config\.best-filter: the recipe demo has no such node; nearest are large-filter, little-filter, ",
        ),
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
