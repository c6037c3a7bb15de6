"""What a run is called."""

from __future__ import annotations

import re
from pathlib import Path

import prefect
import pytest
from prefect.utilities.names import generate_slug

from pipelines.flows.names import LENGTH, PREFECT_ADJECTIVES, is_made_up, name_of_changes
from stages.runner.recipe import load_recipe

ROOT = Path(__file__).parent.parent.parent.parent


def test_names_that_prefect_makes_up_are_told_from_those_that_a_person_types() -> None:
    assert all(is_made_up(generate_slug(2)) for _ in range(300))
    assert is_made_up("Incredible-Monkey") and is_made_up("Sleek-Saki’s")
    for typed in ("monday", "min_aesthetic 5.5", "night-shift", "Incredible results", "Nice-Monkey", "big-big-cat", "demo", ""):
        assert not is_made_up(typed), typed


def test_the_words_of_prefects_form_are_those_of_its_page() -> None:
    pages = Path(prefect.__file__).parent.glob("server/ui-v2/assets/deployment_._id.run-*.js")
    lists = [found for page in pages for found in re.findall(r"\[((?:`[A-Z][a-z]+`,){10,}`[A-Z][a-z]+`)\]", page.read_text())]
    assert any(set(PREFECT_ADJECTIVES) == set(found.replace("`", "").split(",")) for found in lists)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], ""),
        (["subsets.large.filter.min_aesthetic=5.0"], ""),
        (["subsets.large.filter.min_aesthetic=5.5"], "min_aesthetic 5.5"),
        (["train.256.steps=20", "train.256.optimizer.lr=0.5"], "steps 20, lr 0.5"),
        (["train.256.workers=4", "train.512.workers=4"], "workers 4"),
        (["subsets.large.filter.min_aesthetic=null"], "min_aesthetic none"),
        (["train.256.optimizer.rest.betas=[0.5, 0.75]"], "betas [0.5, 0.75]"),
        # Where files lie is no name, and neither is a mapping.
        (["evaluate.prompts=/tmp/x.parquet", "subsets.little.download.hosts={a.example: b}"], ""),
        (
            ["evaluate.guidance=2.5", "evaluate.steps=13", "evaluate.beams=2", "evaluate.count=300", "train.512.steps=9",
             "train.512.schedule.decay_steps=99", "train.512.log_every=3"],
            "steps 9, decay_steps 99, log_every 3, count 300 and 3 more",
        ),
    ],
)  # fmt: skip
def test_a_run_is_named_by_what_was_changed(overrides: list[str], name: str) -> None:
    before, after = (load_recipe(ROOT / "configs" / "demo.yaml", more) for more in ([], overrides))
    assert name_of_changes(before, after, after.nodes) == name and len(name) <= LENGTH
    assert name_of_changes(before, after, ["little-encode"]) == ""


def test_one_long_value_is_cut() -> None:
    before = load_recipe(ROOT / "configs" / "demo.yaml")
    where = ["train.256.data={subsets: [little], where: [" + "width > 1, " * 9 + "]}"]
    after = load_recipe(ROOT / "configs" / "demo.yaml", where)
    name = name_of_changes(before, after, after.nodes)
    assert len(name) == LENGTH and name.startswith("where ['width > 1") and name.endswith("…")
