"""Recipes: every mistake is one line with the path of the field; fingerprints follow what decides a result and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.dataset import InputRef, commit, point
from infra.store import Store
from stages.catalog import stage_class
from stages.evaluate.stage import EvaluateConfig
from stages.runner.contract import result_fields
from stages.runner.graph import plan
from stages.runner.recipe import RecipeError, load_recipe
from tests.stages.committed import dataset_of

GOOD = """
name: good
subsets:
  a: {select: {metadata: [m/*.parquet]}, download: {}, filter: {}, encode: {size: 256}}
  b: {from: a-download, filter: {min_side: 512}, encode: {}}
text-codec: {captions: a}
train:
  small: {data: [a], steps: 10, global_batch: 4}
  large: {from: small, data: [a, b], steps: 10, global_batch: 4}
evaluate: {prompts: prompts.parquet}
export: {}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    pq.write_table(pa.table({"URL": ["http://x.example/1.png"], "TEXT": ["a"]}), tmp_path / "m" / "0.parquet")
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "prompts.parquet")
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def fingerprints(recipe: Path, *overrides: str) -> dict[str, str]:
    store = Store(str(recipe.parent / "store"))
    return {name: node.fingerprint for name, node in plan(load_recipe(recipe, overrides), store).items()}


def changed(recipe: Path, *overrides: str) -> set[str]:
    before, after = fingerprints(recipe), fingerprints(recipe, *overrides)
    return {name for name in before if before[name] != after[name]}


def test_nodes_and_their_inputs(recipe: Path) -> None:
    nodes = load_recipe(recipe).nodes
    assert {name: sorted(node.inputs.values()) for name, node in nodes.items()} == {
        "a-select": [],
        "a-download": ["a-select"],
        "a-filter": ["a-download"],
        "text-codec": ["a-select"],
        "a-encode": ["a-filter", "text-codec"],
        "b-filter": ["a-download"],
        "b-encode": ["b-filter", "text-codec"],
        "train-small": ["a-encode"],
        "train-large": ["a-encode", "b-encode", "train-small"],
        "evaluate": ["text-codec", "train-large", "train-large", "train-small"],
        "export": ["evaluate", "text-codec", "train-large"],
    }
    done: set[str] = set()
    for node in nodes.values():
        assert set(node.inputs.values()) <= done, f"{node.name} comes before its input"
        done.add(node.name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("subsets.a.filter.min_sid=3", "subsets.a.filter.min_sid: unknown field"),
        ("subsets.a.encode.size=big", "subsets.a.encode.size: input should be a valid integer.*got 'big'"),
        ("subsets.a.encode.size=1", "subsets.a.encode.size: input should be greater than or equal to 32 .got 1."),
        ("subsets.a.crop={}", "subsets.a.crop: unknown; expected select, download, filter, encode or from"),
        ("subsets.b.from=a-crop", "subsets.b.from: no node a-crop before it"),
        ("subsets.b.select={metadata: [x]}", "subsets.b.select: a-download already stands after it"),
        ("subsets.A={}", "subsets.A: 'A' is no name"),
        ("train.small.data=[c]", "train.small.data: the subset c has no encode"),
        ("train.small.data=a", "train.small.data: expected a list of subsets"),
        ("train.small.data=[a, a]", "train.small.data: the subset a is there twice"),
        ("train.small.data={where: [width >= 3]}", "train.small.data: expected a list of subsets, or {subsets:"),
        ("train.small.data={subsets: [a], where: [beauty > 3]}", "train.small.data: where names beauty; latents have clip_sim"),
        (
            "train.small.data={subsets: [a], weights: {b: 1, a: 1}}",
            "train.small.data.weights: b is not in data.subsets .a.; give",
        ),
        (
            "train.large.data={subsets: [a, b], weights: {a: 1}}",
            "train.large.data.weights: b has no share; give every subset one",
        ),
        ("train.large.data={subsets: [a, b], weights: {a: 1, b: 0}}", "train.large.data.weights.b: input should be greater than"),
        (
            "train.large.data={subsets: [a, b], weights: {a: 1, b: 6}}",
            "train.large: global_batch .* is not divisible by 7, the sum",
        ),
        ("train.small.data={subsets: [a], were: []}", "train.small.data.were: unknown field"),
        ("train.small.model.depth=3", "train.small.model: depth is 3; it must be even"),
        ("train.small.optimizer.lr=fast", "train.small.optimizer.lr: input should be a valid number"),
        ("train.large.from=none", "train.large.from: no training stage none before it"),
        ("train.large.from=smal", "train.large.from: no training stage smal before it, nor a dataset or a folder"),
        (
            "train.large.from={run: small, step: 0}",
            "train.large.from.step: a step that is kept is 1 at least .got 0.",
        ),
        ("train.large.from={run: small, keep: [order]}", "train.large.from.keep: without the weights nothing else fits"),
        ("train.large.from={run: small, keep: [weights, moments]}", "train.large.from.keep.1: input should be 'weights'"),
        ("text-codec.captions=c", "text-codec.captions: expected a subset that has a select"),
        ("encoders.vea=embedded", "encoders.vea: unknown field"),
        ("machines={donwload: cpu-machine}", "machines.donwload: no such stage or node; nearest are download"),
        ("trian={}", "trian: unknown field"),
    ],
)
def test_a_mistake_is_one_line_with_the_path_of_the_field(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(recipe, [override])
    assert "\n" not in str(raised.value)


def test_a_training_begins_from_a_node_itself_a_dataset_or_a_folder(recipe: Path, tmp_path: Path) -> None:
    def node(value: str) -> Any:
        return load_recipe(recipe, [f"train.large.from={value}"]).nodes["train-large"]

    for value in ("small", "train-small", "{run: small}"):
        assert node(value) == node("small") and node(value).inputs["init"] == "train-small"
    itself = node("{run: large, keep: [order, weights]}")
    assert "init" not in itself.inputs and itself.forks_itself
    assert (itself.config.origin.run, itself.config.origin.keep) == ("train-large", ("weights", "order"))
    assert node("0123456789ab").config.origin.dataset == node("train/0123456789ab").config.origin.dataset.removeprefix("train/")
    assert node("checkpoints/x").config.origin.folder == str(tmp_path / "checkpoints" / "x")
    assert node("s3://bucket/x").config.origin.folder == "s3://bucket/x"


def test_what_a_training_begins_from_must_be_there(recipe: Path, tmp_path: Path, store: Store) -> None:
    def planned(value: str) -> Any:
        return plan(load_recipe(recipe, [f"train.large.from={value}"]), store)["train-large"]

    (tmp_path / "x").mkdir()
    with pytest.raises(RecipeError, match="train.large.*x/.*: "):
        planned("./x")
    (tmp_path / "x" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"train-large: from: .*/x has no history.jsonl; name the folder of a checkpoint"):
        planned("./x")
    store.write("note", b"")
    with pytest.raises(RecipeError, match="train.large.from: 0123456789ab: no dataset in .* has this fingerprint"):
        planned("0123456789ab")
    # A fork of itself belongs to the recipe that it is written in.
    prints = set()
    for name in ("good", "better"):
        recipe.write_text(recipe.read_text().replace(recipe.read_text().split("\n")[1], f"name: {name}"))
        prints.add(planned("{run: large}").fingerprint)
    assert len(prints) == 2


def test_captions_that_no_subset_has_are_refused_before_anything_runs(recipe: Path, store: Store) -> None:
    wanted = "train.small.data={subsets: [a], captions: {alt: 0.5, long: 0.2}}"
    metadata = recipe.parent / "m" / "0.parquet"
    pq.write_table(pq.read_table(metadata).append_column("alt", [["b"]]), metadata)
    for given, lost, have in ("[]", "alt", "none"), ("[alt]", "long", "alt"):
        line = f"^train-small: data.captions names {lost}, which no subset's select or folder has among its captions; .*: {have}$"
        with pytest.raises(RecipeError, match=line):
            plan(load_recipe(recipe, [wanted, f"subsets.a.select.captions={given}"]), store)
    plan(load_recipe(recipe, [wanted.replace(", long: 0.2", ""), "subsets.a.select.captions=[alt]"]), store)
    with pytest.raises(RecipeError, match="subsets.a.select.captions: alt is there twice"):
        load_recipe(recipe, ["subsets.a.select.captions=[alt, alt]"])


def test_training_data_is_a_list_of_subsets_or_a_section(recipe: Path) -> None:
    where = "train.large.data={subsets: [a, b], where: [AESTHETIC_SCORE >= 5], shuffle_window: 4}"
    node = load_recipe(recipe, [where]).nodes["train-large"]
    assert node.config.data.where == ("AESTHETIC_SCORE >= 5",) and node.config.data.shuffle_window == 4
    assert node.inputs == load_recipe(recipe).nodes["train-large"].inputs
    assert changed(recipe, where) == {"train-large", "evaluate", "export"}


def test_missing_files_are_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere.yaml: no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="subsets.a.select.metadata: .*nothing-here.parquet: no such file"):
        fingerprints(recipe, "subsets.a.select.metadata=[nothing-here.parquet]")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [")
    with pytest.raises(RecipeError, match="bad.yaml: not YAML"):
        load_recipe(bad)


@pytest.mark.parametrize(
    "override",
    [
        "subsets.a.download.threads=3",
        "subsets.a.download.hosts={x.example: '127.0.0.1:1'}",
        "subsets.a.filter.batch=3",
        "subsets.a.encode.workers=3",
        "train.small.workers=2",
        "train.small.micro_batch=2",
        "train.small.zero_stage=2",
        "train.small.model.activation_checkpointing=true",
        "description=other words",
    ],
)
def test_operational_fields_change_no_fingerprint(recipe: Path, override: str) -> None:
    assert changed(recipe, override) == set()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("subsets.b.filter.min_side=600", {"b-filter", "b-encode", "train-large", "evaluate", "export"}),
        ("train.large.optimizer.lr=0.1", {"train-large", "evaluate", "export"}),
        ("train.small.global_batch=8", {"train-small", "train-large", "evaluate", "export"}),
        ("evaluate.guidance=1", {"evaluate", "export"}),
        ("text-codec.seed=1", {"text-codec", "a-encode", "b-encode", "train-small", "train-large", "evaluate", "export"}),
    ],
)
def test_a_field_that_decides_a_result_changes_its_node_and_what_follows(recipe: Path, override: Any, expected: set[str]) -> None:
    assert changed(recipe, override) == expected


@pytest.mark.parametrize(
    "field",
    ["evaluate.guidance", "train.small.optimizer.lr", "train.small.preview.guidance", "subsets.a.filter.min_clip_similarity"],
)
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_number_that_is_none_is_refused(recipe: Path, field: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"{field}: "):
        load_recipe(recipe, [f"{field}={value}"])


def test_evaluate_knows_every_sampler() -> None:
    from unidiffuser.solver import SAMPLERS

    assert get_args(EvaluateConfig.model_fields["sampler"].annotation) == tuple(SAMPLERS)


def test_files_count_by_content_and_not_by_place(recipe: Path, tmp_path: Path) -> None:
    before = fingerprints(recipe)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("m", "prompts.parquet", "good.yaml"):
        source = tmp_path / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, other / name)
    assert fingerprints(other / "good.yaml") == before
    pq.write_table(pa.table({"caption": ["a", "c"]}), other / "prompts.parquet")
    after = fingerprints(other / "good.yaml")
    assert {name for name in before if before[name] != after[name]} == {"evaluate", "export"}


def test_force_begins_a_generation_that_stays(recipe: Path) -> None:
    store = Store(str(recipe.parent / "store"))
    loaded = load_recipe(recipe)
    before = plan(loaded, store)
    (recipe.parent / "nothing").mkdir()
    point(store, "good", "a-filter", dataset_of(store, "filter", recipe.parent / "nothing", {}).manifest.reference())
    forced = plan(loaded, store, force=frozenset({"a-filter"}))
    assert forced["a-filter"].reasons[-1] == "forced (generation 1)" and forced["b-filter"].reasons == ["never made"]
    assert forced["a-filter"].generation == 1 and forced["a-filter"].fingerprint != before["a-filter"].fingerprint
    assert forced["a-encode"].fingerprint != before["a-encode"].fingerprint
    assert forced["b-filter"].fingerprint == before["b-filter"].fingerprint
    assert {n: p.fingerprint for n, p in plan(loaded, store).items()} == {n: p.fingerprint for n, p in forced.items()}


OTHER = InputRef(stage="download", fingerprint="0" * 24)


@pytest.mark.parametrize(
    ("node", "before", "reasons"),
    [
        ("a-select", lambda known: {"code": {"stage_version": 2}}, ["stage version 2 -> {version}"]),
        ("a-select", lambda known: {"config": {**known["config"], "min_width": 17}}, ["min_width: 17 -> None"]),
        ("a-select", lambda known: {"sources": {"there/old.parquet": "d"}}, ["new file 0.parquet", "file old.parquet is gone"]),
        ("a-select", lambda known: {"sources": {"there/0.parquet": "d"}}, ["0.parquet has other content"]),
        ("a-filter", lambda known: {"sources": {"clip": "d"}}, ["clip has other content"]),
        ("a-filter", lambda known: {"inputs": {"rows": OTHER}}, ["input rows (a-download) is another dataset"]),
        (
            "a-filter",
            lambda known: {"inputs": {**known["inputs"], "heads": OTHER}},
            ["input heads (gone) is another dataset"],
        ),
        # It lies elsewhere by now, and is the same.
        (
            "a-select",
            lambda known: {"sources": {f"there/{name.rsplit('/', 1)[-1]}": digest for name, digest in known["sources"].items()}},
            ["its dataset was removed"],
        ),
    ],
)
def test_a_plan_says_what_differs_from_the_dataset_that_a_node_gave_last(
    recipe: Path, node: str, before: Callable[[dict[str, Any]], dict[str, Any]], reasons: list[str]
) -> None:
    store, loaded = Store(str(recipe.parent / "store")), load_recipe(recipe)
    planned, version = plan(loaded, store)[node], stage_class(node.removeprefix("a-")).version
    assert (planned.state, planned.reasons) == ("miss", ["never made"])
    known: dict[str, Any] = {
        "config": result_fields(planned.config), "inputs": dict(planned.inputs), "generation": planned.generation,
        "sources": {**planned.all_sources, **planned.weights}, "code": {"stage_version": version},
    }  # fmt: skip
    (recipe.parent / "nothing").mkdir()
    dataset = dataset_of(store, planned.stage, recipe.parent / "nothing", {})
    last = commit(store, dataset.manifest.model_copy(update=known | before(known)))
    point(store, loaded.name, node, last.manifest.reference())
    found = plan(loaded, store)[node]
    assert (found.state, found.reasons) == ("stale", [reason.format(version=version) for reason in reasons])


SHAPES = Path(__file__).parent.parent.parent.parent / "configs" / "shapes.yaml"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("export={}", "export: shapes-world has no text codec; leave it out"),
        ("train.shapes.preview={count: 2}", "train.shapes.preview: shapes-world has no text codec to draw with; remove it"),
        ("subsets.shapes.encode={}", "subsets.shapes.encode: unknown; expected world or from"),
    ],
)
def test_what_a_world_of_its_own_has_not_is_refused(change: str, line: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(SHAPES, [change])
    assert str(refused.value).startswith(line)


def test_the_measure_of_a_world_is_for_that_world_alone_and_so_is_its_held_out_data(recipe: Path, store: Store) -> None:
    def refused(path: Path, *changes: str) -> str:
        with pytest.raises(RecipeError) as error:
            plan(load_recipe(path, changes), store)
        return str(error.value)

    shapes = "evaluate.measures=[{kind: shapes}]"
    assert (
        refused(recipe, shapes) == "evaluate: measures: shapes knows no pictures but those of the world of shapes; leave it out"
    )
    assert refused(recipe, "evaluate.prompts=null") == (
        "evaluate: prompts: field required; name a file of held-out captions, or rows of the store as `data`"
    )
    (recipe.parent / "x.txt").write_text("one\ntwo\n")
    with_prompts = refused(SHAPES, f"evaluate.prompts={recipe.parent / 'x.txt'}")
    assert with_prompts == "evaluate: prompts: a world of its own has them itself; leave it out"


def test_held_out_rows_are_those_of_a_subset_or_of_a_dataset(recipe: Path, store: Store) -> None:
    Path(store.root).mkdir()
    held_out = ["evaluate.prompts=null", "evaluate.data=b"]
    loaded = load_recipe(recipe, held_out)
    assert loaded.nodes["evaluate"].inputs["held-out"] == "b-filter"
    planned = plan(loaded, store)
    assert planned["evaluate"].inputs["held-out"].fingerprint == planned["b-filter"].fingerprint
    for change, line in (
        ("evaluate.data=c", r"^evaluate.data: no subset c; expected one that has a filter, or a dataset as filter/FINGERPRINT"),
        ("evaluate.prompts=x.txt", "^evaluate: data: there are prompts already; leave out one of the two$"),
        ("evaluate.data=filter/0123456789ab", "^evaluate.data: filter/0123456789ab: no dataset"),
    ):
        with pytest.raises(RecipeError, match=line):
            plan(load_recipe(recipe, [*held_out, change]), store)


def test_the_networks_of_a_measure_are_named_where_they_are_missing(recipe: Path, store: Store, tmp_path: Path) -> None:
    over_inception = "evaluate.measures=[{kind: fid, features: inception}]"
    wanted = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(RecipeError, match=f"^evaluate: inception: field required; it is the path of {wanted}, from https://"):
        load_recipe(recipe, [over_inception])
    there = f"evaluate.inception={tmp_path}/nowhere.pth"
    with pytest.raises(RecipeError, match=f"^evaluate: inception: {tmp_path}/nowhere.pth: no such file; .*{wanted}"):
        plan(load_recipe(recipe, [over_inception, there]), store)


def test_a_recipe_names_the_machines_of_stages_and_nodes_and_they_decide_nothing(recipe: Path, store: Store) -> None:
    kinds = "machines={download: cpu-machine, filter: cpu-machine, b-filter: other, train: gpu-machine, evaluate: gpu-machine}"
    own = "subsets.a.encode={size: 256, machines: mine}"
    named = load_recipe(recipe, [kinds, own])
    assert {name: node.config.machines for name, node in named.nodes.items()} == {  # type: ignore[attr-defined]
        "a-select": None, "a-download": "cpu-machine", "a-filter": "cpu-machine", "text-codec": None, "a-encode": "mine",
        "b-filter": "other", "b-encode": None, "train-small": "gpu-machine", "train-large": "gpu-machine",
        "evaluate": "gpu-machine", "export": None,
    }  # fmt: skip
    anywhere = plan(load_recipe(recipe), store)
    assert {n: p.fingerprint for n, p in plan(named, store).items()} == {n: p.fingerprint for n, p in anywhere.items()}


def test_the_recipes_that_we_ship_are_good() -> None:
    for path in (Path(__file__).parent.parent.parent.parent / "configs").glob("*.yaml"):
        assert load_recipe(path).nodes
    demo = load_recipe(Path(__file__).parent.parent.parent.parent / "configs" / "demo.yaml")
    assert demo.nodes["export"].config.layouts == ["diffusers"]
    assert demo.nodes["export"].inputs == {"checkpoint": "train-512", "codec": "text-codec", "evaluation": "evaluate"}
