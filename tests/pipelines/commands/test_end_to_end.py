"""From metadata to samples with two subsets, on real Ray, Prefect, img2dataset and DeepSpeed; then again, changed and grown."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from typer.main import get_command

from benchmarks.overhead import nodes_of
from examples.little_web.build import add_part, build
from examples.little_web.server import LittleWeb
from infra.dataset import Dataset, all_datasets, find, verify
from infra.processes import recorded
from infra.store import Store
from pipelines.command import app
from pipelines.commands import evaluation
from pipelines.commands.checkpoints import Named, opened
from stages.runner.graph import Planned, plan
from stages.runner.ledger import chain_of
from stages.runner.recipe import Recipe, load_recipe
from stages.runner.run import make_job
from stages.train.stage import Train
from tests.pipelines.conftest import CHROMIUM, ask, picture, sign_in, start, survivors
from tests.stages import killed

# The whole recipe counts for the first test, and three jobs at a time on a machine that others use take their time.
pytestmark = pytest.mark.timeout(1800)
NODES = [
    "little-select", "little-download", "little-filter", "text-codec", "little-encode", "large-filter", "large-encode",
    "train-256", "train-512", "evaluate", "export",
]  # fmt: skip
ROWS = 110


@dataclass
class World:
    """A recipe, a web, and a store in which the recipe ran once."""

    recipe: Path
    store: Store
    hosts: str
    printed: str

    def load(self, *overrides: str) -> Recipe:
        return load_recipe(self.recipe, [self.hosts, *overrides])

    def planned(self, *overrides: str) -> dict[str, Planned]:
        return plan(self.load(*overrides), self.store)

    def dataset(self, node: str) -> Dataset:
        planned = self.planned()[node]
        found = find(self.store, planned.stage, planned.fingerprint)
        assert found is not None, f"{node} is not committed"
        return found

    def run(self, *arguments: str) -> tuple[int, str]:
        return start("run", self.recipe, "--store", self.store.root, "--set", self.hosts, *arguments).finish()

    def file_times(self) -> dict[Path, int]:
        """When each file of the store was written; the servers' own state is none of the store's."""
        root = Path(self.store.root)
        files = [path for path in root.rglob("*") if path.is_file() and ".state" not in path.relative_to(root).parts]
        return {path: path.stat().st_mtime_ns for path in files}

    def unit_times(self, stage: str) -> dict[str, int]:
        folder = Path(self.store.root, stage, "units")
        return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/*/unit.json")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    build(folder / "web", rows=ROWS, seed=0)
    recipe = Path(shutil.copy(Path(__file__).parent.parent / "recipe.yaml", folder))
    with LittleWeb(folder / "web") as web:
        hosts = f"subsets.little.download.hosts={{little-web.example: '{web.address}'}}"
        world = World(recipe, Store(str(folder / "store")), hosts, "")
        code, world.printed = world.run()
        assert code == 0, world.printed
        yield world
    assert survivors(Path(world.store.root)) == []


def test_every_node_is_committed_whole_and_every_row_accounted_for(world: World) -> None:
    datasets = {node: world.dataset(node) for node in world.load().nodes}
    assert list(datasets) == NODES
    for node, dataset in datasets.items():
        assert verify(dataset) == [], node
        assert dataset.manifest.stats.adds_up(), node
        assert dataset.manifest.stats.rows_out > 0, node
    rows = {node: dataset.manifest.stats for node, dataset in datasets.items()}
    assert rows["little-select"].rows_in == ROWS
    for before, after in pairwise(f"little-{stage}" for stage in ("select", "download", "filter", "encode")):
        assert rows[before].rows_out == rows[after].rows_in
    assert rows["little-download"].dropped, "a tenth of the little web's links misbehave"


def test_the_closing_table_names_every_node_and_its_rows(world: World) -> None:
    for node in NODES:
        manifest = world.dataset(node).manifest
        line = next(line for line in world.printed.splitlines() if node in line and manifest.fingerprint[:8] in line)
        assert f" {manifest.stats.rows_out} " in line


def test_the_overhead_benchmark_finds_each_nodes_work_and_process(world: World) -> None:
    nodes = nodes_of(world.printed, world.store)
    assert {node.name for node in nodes} == set(NODES)
    for node in nodes:
        # The job ends after its manifest is written, and begins with the imports of the stage.
        assert node.work == world.dataset(node.name).manifest.seconds and 0.5 < node.process < 60


def test_latents_have_the_shapes_that_they_declare(world: World) -> None:
    for node, side in (("little-encode", 4), ("large-encode", 8)):
        dataset = world.dataset(node)
        table = pq.read_table(dataset.url(dataset.files[0]))
        facts = json.loads(table.schema.metadata[b"unidiffuser"])
        assert facts["moments"][1:] == [side, side] and facts["text"][1] == 16
        for part in ("moments", "clip", "text"):
            width = 2
            for length in facts[part]:
                width *= length
            assert table.schema.field(part).type.byte_width == width


def test_the_second_training_stage_starts_from_the_first(world: World) -> None:
    first, second = world.dataset("train-256"), world.dataset("train-512")
    assert second.manifest.inputs["init"].fingerprint == first.manifest.fingerprint
    history = [json.loads(line) for line in world.store.read(second.file("history.jsonl").path).decode().splitlines()]
    assert [row["step"] for row in history if row["kind"] == "validation"][-1] == 3


def test_any_checkpoint_is_measured_on_any_held_out_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.runner.pool.run_pool", killed.in_process)
    monkeypatch.setattr("stages.__main__.connect_ray", lambda: None)
    rows = world.dataset("little-filter").manifest.fingerprint
    asked = [f"data=filter/{rows}", "count=2", "steps=1", "beams=1", "measures=[{kind: clip-score}]"]
    for node, inputs in (("train-256", {"codec", "history.train-256"}), ("export", set())):
        dataset = world.dataset(node)
        request = evaluation.Request(dataset.manifest.fingerprint, settings=asked)
        code, made = evaluation.run(request, world.store, Named(), Console(file=io.StringIO()))
        assert code == 0 and made is not None
        assert made.manifest.inputs.keys() == {"checkpoint", "held-out"} | inputs
        assert made.manifest.summary["checkpoint"] == dataset.manifest.fingerprint
        names = [figure["name"] for figure in made.manifest.summary["figures"]]
        assert names == ["clip_score_t2i", "clip_score_i2t", "clip_score_real"]


def test_pictures_are_pictures_and_the_export_samples(world: World, tmp_path: Path) -> None:
    evaluation = world.dataset("evaluate")
    for name in ("sample-sheet.png", "loss-curve.png"):
        with evaluation.open(evaluation.file(name)) as file:
            assert min(Image.open(file).size) > 300
    report = json.loads(world.store.read(evaluation.file("report.json").path))
    found = {figure["name"]: figure["value"] for figure in report["figures"]}
    assert {f"preference_{name}" for name in ("t2i", "untrained", "real", "i2t")} | {"fid_clip", "clip_score_i2t"} <= found.keys()
    assert all(0 <= value <= 1 for name, value in found.items() if name.startswith("preference"))
    assert evaluation.manifest.summary["figures"] == report["figures"]

    from unidiffuser.generation import UniDiffuser

    folder = world.dataset("export").fetch(tmp_path / "export")
    model = UniDiffuser.load(folder)
    (result,) = model.generate("joint", steps=2)
    assert result.image is not None and result.image.size == (512, 512) and isinstance(result.caption, str)

    told, made = model.provenance, world.dataset("train-512").manifest
    assert (told["recipe"], told["node"], told["step"]) == (load_recipe(world.recipe).name, "train-512", 3)
    assert (told["fingerprint"], told["commit"]) == (made.fingerprint, made.code["git"]) and made.code["git"]
    counted = {each["node"]: (each["rows_in"], each["rows_out"]) for each in told["datasets"]}
    stats = world.dataset("large-filter").manifest.stats
    assert counted["large-filter"] == (stats.rows_in, stats.rows_out) and list(counted)[0] == "little-select"

    # The checkpoint behind the export is found to be the same model, from its lineage alone.
    with opened(world.dataset("train-512").manifest.fingerprint[:10], world.store, Named()) as assembled:
        for part in ("uvit/model.safetensors", "text_codec/codec.safetensors", "vae/config.json"):
            assert (assembled / part).read_bytes() == (folder / part).read_bytes()

    from diffusers import UniDiffuserPipeline

    pipeline = UniDiffuserPipeline.from_pretrained(folder / "diffusers")
    drawn = pipeline(prompt="a large red apple", num_inference_steps=2, guidance_scale=1.0)
    assert drawn.images[0].size == (512, 512)


def test_again_reuses_everything_without_ray(world: World) -> None:
    before = world.file_times()
    log = Path(world.store.root, ".state", "logs", "ray.log")
    log.unlink()
    code, printed = world.run()
    assert code == 0, printed
    assert before == world.file_times()
    assert printed.count("reused") >= len(NODES)
    assert not log.exists(), "Ray was started for nothing"


def test_a_changed_threshold_makes_filter_and_what_follows_stale_and_only_that(world: World) -> None:
    planned = world.planned("subsets.large.filter.min_side=600")
    states = {node: planned[node].state for node in NODES}
    stale = {"large-filter", "large-encode", "train-512", "evaluate", "export"}
    assert {node for node, state in states.items() if state == "stale"} == stale
    assert {node for node, state in states.items() if state == "hit"} == set(NODES) - stale
    assert planned["large-filter"].reasons == ["min_side: 512 -> 600"]
    assert planned["train-512"].reasons == ["input data.large (large-encode) is another dataset"]


def test_a_hit_imports_neither_torch_nor_ray(world: World) -> None:
    """The job's own command on a committed node."""
    import subprocess

    code = (
        "import sys; from stages.__main__ import main; "
        f"assert main([{str(world.recipe)!r}, 'evaluate', '--store', {world.store.root!r}, '--set', {world.hosts!r}]) == 0; "
        "sys.exit(bool({'torch', 'ray', 'prefect', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent.parent
    )
    assert result.returncode == 0, result.stdout + result.stderr


def example_of(command: str) -> list[str]:
    """The words of the example in a command's help."""
    (found,) = [each for each in get_command(app).commands.values() if each.name == command]  # type: ignore[attr-defined]
    words = shlex.split(found.epilog.removeprefix("Example: "))
    assert words[:2] == ["unidiffuser", command]
    return words[1:]


def run_example(world: World, command: str, folder: Path) -> str:
    """Run the example in a command's help on this world: its recipe, its datasets, its store, and a folder for results."""

    def here(word: str) -> str:
        if word.startswith("configs/"):
            return str(world.recipe)
        if word in ("out", "my-pipeline"):
            return str(folder / word)
        if word == "runs":
            return world.store.root
        if not word.endswith("3f9a2c"):
            return word
        stage = word.split("/")[-2] if "/" in word else "export"
        made = [each for each in all_datasets(world.store) if each.manifest.stage == stage]
        dataset = max(made, key=lambda each: each.manifest.created)
        place = word.replace("3f9a2c", dataset.manifest.fingerprint[: None if "runs/" in word else 6])
        return place.replace("runs/", f"{world.store.root}/", 1)

    words = [here(word) for word in example_of(command)]
    if command in ("run", "deploy"):
        words += ["--set", world.hosts]
    if "--store" not in words and command != "fields":
        words += ["--store", world.store.root]
    code, printed = start(*words).finish()
    assert code == 0, printed
    return printed


# What each example must have said. `retry-failed` has a test of its own, since it changes the world.
SAID = {
    "run": "nothing new: all 11 nodes reused",
    "status": '"node": "train-512"',
    "plan": "At 45% MFU: ",
    "fields": "train.NAME",
    "logs": "step 3 validation loss",
    "lineage": "little-select",
    "inspect": "schema",
    "verify": "files are as the manifest says",
    "list": "little-filter",
    "keep": "stays, with all that it was made from",
    "gc": "nothing to remove",
    "sample": "a large red apple on a blue background",
    "convert": "diffusers: ",
    "up": "started",
    "deploy": "small-train-512",
    "undeploy": "small-train-512: removed",
    "ui": "/sign-in#unidiffuser:",
    "down": "stopped",
}


def test_every_command_has_an_example(world: World) -> None:
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    # These take minutes, or have tests of their own: that their examples are understood must do.
    parsed = ("compare", "demo", "detect", "evaluate")
    assert names == {*SAID, *parsed, "retry-failed"}
    for name in parsed:
        get_command(app).commands[name].make_context(name, example_of(name)[1:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", SAID)
def test_the_example_in_a_commands_help_does_what_it_says(
    world: World, command: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert SAID[command] in run_example(world, command, tmp_path)
    if command == "sample":
        assert len(list((tmp_path / "out").glob("*.png"))) == 1
    if command == "convert":
        assert (tmp_path / "my-pipeline" / "model_index.json").is_file()
    if command == "up":
        check_page_of_training(world)
        if CHROMIUM:
            check_graphs(world, request.getfixturevalue("page"))


def api(world: World, method: str, path: str, body: Any = None) -> Any:
    return ask(world.store.root, method, path, body)


def check_page_of_training(world: World) -> None:
    """The first training's page was left in the Prefect UI, with its losses to the end and the sheet of its first checkpoint."""
    (artifact,) = api(world, "POST", "artifacts/filter", {"artifacts": {"key": {"any_": ["small-train-256-training"]}}})
    assert "Step 6: validation loss " in artifact["data"] and "## Samples at step 3" in artifact["data"]
    curve, sheet = (base64.b64decode(data) for data in re.findall(r"data:image/\w+;base64,([^)]+)", artifact["data"]))
    assert min(Image.open(io.BytesIO(curve)).size) > 300 and Image.open(io.BytesIO(sheet)).size == (210, 964)


def check_graphs(world: World, page: Any) -> None:
    """The first run's page has a graph of its nodes, which is drawn on a canvas, and its artifact one of its datasets."""
    run, *_ = api(world, "POST", "flow_runs/filter", {"sort": "START_TIME_ASC"})
    server = recorded("prefect", Path(world.store.root, ".state"))
    assert server is not None
    sign_in(page, world.store.root)
    page.goto(f"{server.address}/v2/runs/flow-run/{run['id']}?tab=TaskRuns")
    page.locator("main canvas").first.wait_for()
    page.get_by_role("link", name="train-512").first.wait_for()
    picture(page, "prefect-run", height=508)
    page.goto(f"{server.address}/v2/artifacts/key/small-lineage")
    # The oldest: that run's, in which everything was made.
    page.locator("main a[href*='/artifacts/artifact/']").last.click()
    for node in NODES:
        page.locator("main svg").get_by_text(node).first.wait_for()
    picture(page, "prefect-lineage")


@pytest.mark.slow
def test_a_cancelled_training_goes_on_from_its_step(world: World, tmp_path: Path) -> None:
    """Cancel in the UI leaves a checkpoint of the step that was reached, though the recipe's first is far away."""
    for command in ("up", "deploy"):
        run_example(world, command, tmp_path)

    def begin(**config: Any) -> str:
        deployment = api(world, "GET", "deployments/name/node/small-train-256")["id"]
        return str(api(world, "POST", f"deployments/{deployment}/create_flow_run", {"parameters": {"config": config}})["id"])

    def lines(run: str) -> str:
        found = api(world, "POST", "logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}})
        return "\n".join(line["message"] for line in found)

    def wait(question: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 300
        while not (answer := question()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.3)
        return answer

    def state(run: str) -> Any:
        return api(world, "GET", f"flow_runs/{run}")["state"]

    far = {"steps": 50_000, "checkpoint_every": 50_000}
    run = begin(**far)
    # It validates every third step.
    wait(lambda: "step 9 validation loss" in lines(run))
    api(world, "POST", f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    wait(lambda: state(run)["type"] == "CANCELLED")
    planned = world.planned(*(f"train.256.{name}={value}" for name, value in far.items()))["train-256"]
    job = make_job(planned, world.store)
    (phase,) = Train.phases
    assert phase.gang is not None
    *_, left = chain_of(Train, phase, phase.gang, job, planned).done().values()
    assert left.notes["step"] >= 9 and "share-00000-of-00001.safetensors" in {file.name for file in left.files}
    again = begin(steps=left.notes["step"] + 3, checkpoint_every=50_000)
    wait(lambda: state(again)["type"] in ("COMPLETED", "FAILED"))
    assert state(again)["type"] == "COMPLETED", state(again)
    validated = {int(step) for step in re.findall(r"step (\d+) validation loss", lines(again))}
    assert validated and min(validated) > left.notes["step"], "it began anew"
    assert job.unit_done(left.key) is None, "the checkpoint of the end takes its place"
    run_example(world, "down", tmp_path)


@pytest.mark.slow
def test_an_appended_metadata_file_does_only_its_own_work(world: World) -> None:
    """After those that need the world as it was: it grows the world's metadata."""
    stages = ("select", "download", "filter", "encode")
    before = {stage: world.unit_times(stage) for stage in stages}
    rows = {node: world.dataset(node).manifest.stats.rows_out for node in NODES[:3]}
    add_part(world.recipe.parent / "web", part=2, rows=30)
    code, printed = world.run("--until", "little-encode")
    assert code == 0, printed
    after = {stage: world.unit_times(stage) for stage in stages}
    for stage in stages:
        assert before[stage].items() <= after[stage].items(), f"{stage} did a finished unit again"
        assert len(after[stage]) > len(before[stage]), f"{stage} did nothing for the new file"
    assert world.dataset("little-select").manifest.stats.rows_in == ROWS + 30
    assert world.dataset("little-filter").manifest.stats.rows_out > rows["little-filter"]


def test_the_example_of_retry_failed_fetches_again_what_can_heal(world: World, tmp_path: Path) -> None:
    """Last in this file: the recipe goes on from the new dataset."""
    assert "rows healed" in run_example(world, "retry-failed", tmp_path)
