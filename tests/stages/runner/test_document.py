"""YAML as recipes have it, against PyYAML where both agree."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
import yaml

from pipelines.flows.run import snapshot
from stages.runner.document import DocumentError, parse
from stages.runner.recipe import RecipeError, load_recipe

CONFIGS = Path(__file__).parent.parent.parent.parent / "configs"
SHARED = """
usual: &usual {size: 256, batch: 8}
large: {<<: *usual, size: 512}
both: {<<: [*usual, {batch: 1, workers: 2}], more: [*usual, ~, 0x10, 1.5, .5, -.inf, "yes", 'a: b']}
text: |
  two
  lines
"""
RECIPE = "name: plain\nsubsets:\n  a: {select: {metadata: [a.parquet], languages: [no, caf\u00e9]}}\n"


def test_anchors_merges_and_all_usual_values_are_pyyamls():
    found = parse(SHARED)
    assert found == yaml.safe_load(SHARED)
    found["usual"]["size"] = 1
    assert found["large"]["size"] == 512 and found["both"]["more"][0]["size"] == 256, "each place has its own"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent.parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_our_recipes_read_as_ever(path):
    assert parse(path.read_text()) == yaml.safe_load(path.read_text())


def test_values_mean_what_a_person_means():
    assert parse("[no, yes, on, true, False, 1e-4, 1E6, +2e3, 1.e1, 12, 1e, e5]") == [
        "no", "yes", "on", True, False, 0.0001, 1e6, 2e3, 10.0, 12, "1e", "e5",
    ]  # fmt: skip
    assert parse("[0512, -007, 0o17, 0x1F, 0, 08, 1:30, 1:30:00.5, 2026-11-28, 2026-13-45, 2026-11-28 10:00:00]") == [
        512, -7, 15, 31, 0, 8, "1:30", "1:30:00.5", "2026-11-28", "2026-13-45", "2026-11-28 10:00:00",
    ]  # fmt: skip
    assert parse("256: a\nno: b\n'~': c") == {"256": "a", "no": "b", "~": "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key a was in line 1 already; remove or rename one"),
        ("a: {b: {c: 1, c: 1}}", "line 1: the key c was in line 1"),
        ("- &x {a: 1}\n- {<<: *x, b: 1, b: 2}", "line 2: the key b"),
        ("256: 1\n'256': 2", "line 2: the key 256"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "line 1: the key << was"),
        ("[a]: 1", "line 1: a key is a list or a mapping"),
        ("a:\n  - &x [*x]", "it holds itself, by an alias"),
        ("a: [", "line 1: expected the node content"),
        ("a: !!int x", "invalid literal"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(text, message):
    with pytest.raises(DocumentError) as error:
        parse(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        RECIPE.encode(),
        RECIPE.replace("\n", "\r\n").encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + RECIPE.encode("utf-16-le"),
    ],
)
def test_however_a_recipe_is_encoded(tmp_path, data):
    (tmp_path / "plain.yaml").write_bytes(data)
    assert load_recipe(tmp_path / "plain.yaml").nodes["a-select"].config.languages == ["no", "caf\u00e9"]


def test_a_recipe_that_is_no_text_or_has_a_key_twice_is_named_with_its_line(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_bytes(RECIPE.encode("latin-1"))
    with pytest.raises(RecipeError, match="plain.yaml: line 3 is not UTF-8; save the file as UTF-8"):
        load_recipe(path)
    path.write_text(RECIPE + "  b: {}\n  a: {}\n")
    with pytest.raises(RecipeError, match="plain.yaml: not YAML: line 5: the key a was in line 3 already"):
        load_recipe(path)
    path.write_text(RECIPE)
    with pytest.raises(RecipeError, match="--set subsets.a.select={seed: 1, seed: 2}: .*the key seed"):
        load_recipe(path, ["subsets.a.select={seed: 1, seed: 2}"])
    once, twice = (load_recipe(path, [f"subsets.a.select.seed={seed}" for seed in seeds]) for seeds in ([2], [1, 2]))
    assert once.document == twice.document, "the last one counts"


def test_a_copy_of_a_recipe_reads_as_the_recipe(tmp_path, store):
    (tmp_path / "plain.yaml").write_text(RECIPE + "description: \U0001f600 caf\u00e9\ntrain: {}\n", encoding="utf-8")
    recipe = load_recipe(tmp_path / "plain.yaml")
    assert load_recipe(snapshot(recipe, store)).description == "\U0001f600 caf\u00e9"
