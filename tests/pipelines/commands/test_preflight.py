"""What is said before a run starts: the store, encoders, memory, space, metadata; one line each, and soon."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from infra.places import elsewhere
from infra.ray_jobs import RayJobs
from infra.store import Store
from pipelines.commands import preflight
from pipelines.commands.demo import RECIPE
from pipelines.commands.unseen import local_files
from stages.runner.graph import plan
from stages.runner.recipe import load_recipe
from tests.pipelines.commands.test_plain import run_main
from tests.pipelines.conftest import write_metadata, write_recipe
from tests.stages.committed import trained
from training.config import ModelConfig
from training.footprint import parameters
from unidiffuser.references import EMBEDDED
from unidiffuser.uvit import UViT, UViTConfig

SHAPES = Path(__file__).parents[3] / "configs" / "shapes.yaml"
COMMIT = "c" * 40
FILE = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; returns its exit code and stderr's lines but for the one that there is no store yet."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = run_main(monkeypatch, *(str(argument) for argument in arguments))
        return code, [line for line in capsys.readouterr().err.splitlines() if not line.endswith("a run makes it")]

    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub on loopback that has the model someone/vae and nothing else; the requests that it got."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            there = self.path.startswith("/someone/vae/")
            self.send_response(200 if there else 404)
            for name, value in (
                {"X-Repo-Commit": "c" * 40, "ETag": '"1"'}.items() if there else {"X-Error-Code": "RepoNotFound"}.items()
            ):
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked
    server.shutdown()
    server.server_close()


def with_encoder(folder: Path, encoders: str = "") -> Path:
    write_recipe(folder)
    recipe = folder / "encoded.yaml"
    recipe.write_text(
        f"name: encoded\n{encoders}\n"
        "text-codec: {captions: good}\n"
        "subsets: {good: {select: {metadata: [metadata/*.parquet]}, download: {}, filter: {}, encode: {}}}\n"
    )
    return recipe


def test_an_encoder_that_the_hub_has_takes_one_request_and_one_that_it_lacks_is_named_by_its_field(
    tmp_path: Path, hub: list[str], say
) -> None:
    recipe = with_encoder(tmp_path, f"encoders: {{vae: someone/vae@{COMMIT}}}")
    assert say("run", recipe, "--dry-run", "--store", tmp_path / "store") == (0, [])
    assert hub == [f"/someone/vae/resolve/{COMMIT}/config.json"]
    recipe = with_encoder(tmp_path, f"encoders: {{vae: someone/other@{COMMIT}}}")
    code, lines = say("run", recipe, "--store", tmp_path / "store", "--set", f"subsets.good.encode.vae=no/where@{COMMIT}")
    assert code == 2 and not (tmp_path / "store" / ".state" / "prefect").exists()
    (line,) = lines
    assert line.startswith(f"error: subsets.good.encode.vae: no/where@{COMMIT} is no public model of http://127.0.0.1:")
    (line,) = say("run", recipe, "--dry-run", "--store", tmp_path / "store")[1]
    assert line.startswith(f"error: encoders.vae: someone/other@{COMMIT} is no public model")


def test_an_encoder_in_the_cache_asks_nobody_and_offline_says_what_is_not_there(
    tmp_path: Path, hub: list[str], say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = (
        "run",
        with_encoder(tmp_path, f"encoders: {{vae: someone/vae@{COMMIT}}}"),
        "--dry-run",
        "--store",
        tmp_path / "store",
    )
    code, (line,) = say(*arguments)
    assert code == 2 and line.startswith(
        f"error: encoders.vae: someone/vae@{COMMIT} is not in the cache, and HF_HUB_OFFLINE is set"
    )
    folder = tmp_path / "cache" / "models--someone--vae"
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("c" * 40) / "diffusion_pytorch_model.safetensors").touch()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    assert say(*arguments) == (0, []) and hub == []


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch, hub: list[str]) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    recipe = with_encoder(tmp_path, f"encoders: {{gpt2: someone/gpt@{COMMIT}}}")
    code, (line,) = say("run", recipe, "--dry-run", "--store", tmp_path / "store")
    assert code == 2 and line.startswith(f"error: encoders.gpt2: someone/gpt@{COMMIT} is not in the cache, and ")
    assert line.endswith("mend the network, or name a local folder or `embedded`")


def test_a_training_that_would_throw_steps_away_is_refused_before_anything_begins(
    tmp_path: Path, say, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = with_encoder(tmp_path), tmp_path / "store"
    recipe.write_text(
        recipe.read_text() + "train: {x: {data: [good], steps: 1000, global_batch: 8, model: {width: 16, heads: 2}}}\n"
    )
    trained(Store(str(store)), plan(load_recipe(recipe), Store(str(store)))["train-x"], 900, 950)
    assert say("run", recipe, "--dry-run", "--store", store) == (0, [])
    slower = ("--set", "train.x.optimizer.lr=1e-5", "--store", store)
    expected = (
        "error: train-x: would begin at step 0; 950 steps are there (optimizer.lr: 0.0002 -> 1e-05): fork with `from: {run: "
        "train-x, step: newest, keep: [weights, optimizer, ema, schedule, order]}`, or begin anew with --force train-x"
    )
    for words in (("run", recipe, "--dry-run"), ("run", recipe)):
        assert say(*words, *slower) == (1, [expected])
    assert not (store / ".state" / "prefect").exists()
    assert say("run", recipe, "--dry-run", *slower, "--force", "train-x") == (0, [])
    # What is told is what can be written.
    fork = expected.split("`")[1].removeprefix("from: ")
    run_main(monkeypatch, "run", str(recipe), "--dry-run", *map(str, slower), "--set", f"train.x.from={fork}")
    printed = capsys.readouterr().out
    assert "train-x: where it begins is known once its input data.good is made" in printed


def test_the_numbers_of_a_model_are_those_of_the_network() -> None:
    with torch.device("meta"):
        network = UViT(UViTConfig())
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert 0.99 * counted < parameters(ModelConfig()) < counted


def test_a_model_that_no_worker_can_hold_is_refused(tmp_path: Path, say) -> None:
    recipe = with_encoder(tmp_path)
    model = "{width: 24000, depth: 100, heads: 8}"
    recipe.write_text(f"{recipe.read_text()}train: {{huge: {{data: [good], steps: 1, global_batch: 1, model: {model}}}}}\n")
    code, (space, memory) = say("run", recipe, "--store", tmp_path / "store")
    model = (12 * 101 + 2 * 50) * 24000**2 * (4 + 4 + 16 + 4) / 2**30
    # 336 tokens at 256 px.
    activations = 336 * 24000 * 4 * (51 * 16 + 50 * 19 + 13) / 2**30
    assert code == 1 and space.startswith("error: train-huge: needs about ")
    assert memory.startswith(
        f"error: train-huge: it takes {model + activations + 4 * 5e8 / 2**30:.1f} GiB (weights, gradients and optimizer "
        f"{model:.1f}, buckets 1.9, activations of 1 samples at once {activations:.1f}), the machine here has "
    )
    assert memory.endswith("; raise zero_stage and workers, set zero.offload_optimizer, or lower model.width or model.depth")


def test_a_batch_that_no_worker_can_hold_at_once_is_refused_with_what_to_lower(
    tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_workers", lambda: ("here", 2**37, [80 * 2**30]))
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    recipe = with_encoder(tmp_path)
    recipe.write_text(f"{recipe.read_text()}train: {{large: {{data: [good], steps: 1, global_batch: 512}}}}\n")
    arguments = ("run", recipe, "--dry-run", "--store", tmp_path / "store", "--set")
    code, (line,) = say(*arguments, "train.large.workers=2")
    assert code == 1 and "activations of 256 samples at once 13" in line
    assert line.endswith("a GPU here has 80.0; lower micro_batch (now all), or set model.activation_checkpointing: 1")
    for fits in ("train.large.micro_batch=32", "train.large.micro_batch=auto", "train.large.model.activation_checkpointing=1"):
        assert say(*arguments, "train.large.workers=2", "--set", fits) == (0, [])


def test_the_memory_of_a_training_on_the_shapes_is_known_too(tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    arguments = ("run", SHAPES, "--dry-run", "--store", tmp_path / "store")
    assert say(*arguments) == (0, [])
    code, (line,) = say(*arguments, "--set", "train.shapes.model.width=24000")
    # 4 x 4 patches, 7 words and two timesteps; there is no embedding.
    activations = 64 * (16 + 7 + 2) * 24000 * 4 * (4 * 16 + 3 * 19 + 13) / 2**30
    assert code == 1 and f"activations of 64 samples at once {activations:.1f})" in line


def test_what_takes_memory_off_a_gpu_is_refused_where_there_is_none(tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_workers", lambda: ("here", 2**37, []))
    recipe = with_encoder(tmp_path)
    model = "{width: 16, depth: 2, heads: 2}"
    recipe.write_text(f"{recipe.read_text()}train: {{x: {{data: [good], steps: 1, global_batch: 8, model: {model}}}}}\n")
    arguments = ("run", recipe, "--dry-run", "--store", tmp_path / "store")
    assert say(*arguments) == (0, [])
    line = "error: train-x: zero.offload_optimizer moves memory from a GPU to its machine, and here is no GPU; leave it out"
    assert say(*arguments, "--set", "train.x.zero.offload_optimizer=true") == (1, [line])


def test_too_little_space_is_said_before_anything_starts(tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    code, lines = say("run", write_recipe(tmp_path), "--only", "good-select", "--store", tmp_path / "store")
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: good-select: needs about 0.5 GiB")


def test_a_cluster_elsewhere_and_a_store_here_is_refused(tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://head.example:8265")
    for command in (("run", recipe), ("run", recipe, "--dry-run"), ("deploy", recipe)):
        code, (line,) = say(*command, "--store", tmp_path / "store")
        assert code == 1 and line.startswith("error: RAY_ADDRESS=http://head.example:8265 is other machines")
        assert "s3://BUCKET/runs" in line and "UNIDIFFUSER_SHARED" in line


def test_a_cluster_that_does_not_answer_is_said_before_anything_starts_unless_nothing_is_to_be_done(
    tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", write_recipe(tmp_path), "--dry-run", "--only", "good-select", "--store", tmp_path / "store")
    monkeypatch.setattr(preflight, "SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        line = f"error: no Ray Jobs API answers at {address} in 1 s; start the cluster, or unset RAY_ADDRESS"
        assert say(*arguments) == (1, [line])
    code, (line,) = say(*arguments)
    assert code == 1 and line.startswith(f"error: no Ray Jobs API answers at {address} (") and line.endswith("unset RAY_ADDRESS")


def test_more_workers_than_there_are_processors_are_said_before_anything_starts(
    tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_encoder(tmp_path)
    train = "{x: {data: [good], steps: 1, global_batch: 512, workers: 512, model: {width: 16, depth: 2, heads: 2}}}"
    recipe.write_text(f"{recipe.read_text()}train: {train}\n")
    arguments = ("run", recipe, "--dry-run", "--store", tmp_path / "store")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    line = "error: train-x: workers is 512, but this machine has 2 CPUs; lower workers"
    assert say(*arguments) == (1, [line])
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setattr(preflight.RayJobs, "check", lambda _: None)
    monkeypatch.setattr(preflight.RayJobs, "processors", lambda _: (4, 0))
    line = "warning: train-x: workers is 512, but the cluster at http://127.0.0.1:1 has 4 CPUs; lower workers, or add machines"
    assert say(*arguments) == (0, [line])


def test_machines_of_a_kind_that_nobody_has_are_said_before_anything_starts(
    tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", write_recipe(tmp_path), "--dry-run", "--only", "good-select", "--store", "memory://kinds/runs")
    arguments += ("--set", "machines={select: cpu-machine}")
    line = "error: good-select: machines: this machine is no cpu-machine; leave it out, or name the cluster by RAY_ADDRESS"
    assert say(*arguments) == (1, [line])
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("UNIDIFFUSER_SHARED", str(tmp_path))
    monkeypatch.setattr(RayJobs, "check", lambda _: None)
    nodes: list[dict[str, Any]] = [
        {"state": "ALIVE", "resources_total": {"CPU": 4.0, "memory": 9e9, "node:10.0.0.1": 1.0, "big-machine": 1.0}},
        {"state": "DEAD", "resources_total": {"CPU": 4.0, "cpu-machine": 1.0}},
    ]
    monkeypatch.setattr(RayJobs, "_call", lambda *_, **__: {"data": {"result": {"result": nodes}}})
    why = "no machine of the Ray cluster has the resource cpu-machine; start one with --resources='{\"cpu-machine\": 1}'"
    assert say(*arguments) == (1, [f"error: good-select: machines: {why}, or name one of big-machine"])
    nodes[0]["resources_total"]["brings/cpu-machine/CPU"] = 8.0
    assert say(*arguments) == (0, [])


def test_files_here_of_a_run_elsewhere_are_refused_with_the_field_unless_every_machine_has_them(
    tmp_path: Path, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = with_encoder(tmp_path), "memory://elsewhere/runs"
    shutil.copytree(EMBEDDED / "clip", tmp_path / "weights")
    arguments = ("run", recipe, "--dry-run", "--store", store, "--only", "good-select", "--only", "good-filter")
    arguments += ("--set", f"subsets.good.filter.clip={tmp_path}/weights")
    assert say(*arguments) == (0, [])
    monkeypatch.setenv("RAY_ADDRESS", "http://head.example:8265")
    monkeypatch.setattr(RayJobs, "check", lambda _: None)
    code, lines = say(*arguments)
    told = f"RAY_ADDRESS=http://head.example:8265 is other machines, which cannot see {tmp_path}"
    assert code == 2 and [line.partition(": ")[2].split(": name an address")[0] for line in lines] == [
        f"subsets.good.select.metadata: {told}/metadata/*.parquet", f"subsets.good.filter.clip: {told}/weights"
    ]  # fmt: skip
    monkeypatch.setenv("UNIDIFFUSER_SHARED", f"/elsewhere:{tmp_path}")
    assert say(*arguments) == (0, [])


def test_the_demo_names_no_file_here_but_its_web() -> None:
    named = [field for node in load_recipe(RECIPE).nodes.values() for field, _ in local_files(node.config, node.place)]
    assert {*named} <= {"subsets.little.select.metadata", "evaluate.prompts"}


def test_a_forwarded_port_and_the_head_of_a_cluster_are_no_reason_to_take_files_here_for_everyones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    here, other = socket.gethostname(), "another"

    def node(host: str, cpus: float) -> dict[str, Any]:
        return {"hostname": host, "raylet": {"state": "ALIVE", "resourcesTotal": {"CPU": cpus} if cpus else {"memory": 1.0}}}

    for nodes, local in (
        ([node(here, 2)], True),
        ([node(other, 2)], False),
        ([node(here, 0)], False),
        ([node(here, 4), node(other, 4)], False),
    ):
        monkeypatch.setattr(RayJobs, "_call", lambda *_, nodes=nodes, **__: {"data": {"summary": nodes}})
        assert elsewhere() == (None if local else "http://127.0.0.1:8265")


def test_metadata_that_cannot_be_used_is_a_warning_at_once_of_the_first_files_of_every_pattern(tmp_path: Path, say) -> None:
    recipe = write_recipe(tmp_path)
    arguments = ("run", recipe, "--dry-run", "--store", tmp_path / "store")
    code, (line,) = say(*arguments)
    assert code == 0 and line.startswith(f"warning: bad-select: {tmp_path}/no-url.parquet: ")
    for number in range(1, 6):
        write_metadata(tmp_path / "metadata" / f"part-{number}.parquet", 100 * number)
    (tmp_path / "metadata" / "part-5.parquet").write_text("too late to be looked at")
    assert len(say(*arguments)[1]) == 1
    (tmp_path / "metadata" / "part-3.parquet").write_text("no Parquet")
    assert [line.split(": ")[1] for line in say(*arguments)[1]] == ["good-select", "bad-select"]


def test_what_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SECONDS", 0.05)
    answer, late = threading.Event(), preflight.Doubt("late")

    def silent() -> list[preflight.Problem]:
        answer.wait(30)
        return []

    assert list(preflight._at_once({"a": silent, "b": lambda: [preflight.Doubt("b")]}, {"a": late, "b": late}))[0] is late
    answer.set()


def test_a_quick_look_imports_nothing_heavy_and_looks_into_encoders_of_sections(tmp_path: Path) -> None:
    recipe = load_recipe(
        with_encoder(tmp_path, "encoders: {clip: ViT-B-32/openai}"), ["subsets.good.filter.clip=ViT-L-14/openai"]
    )
    found = preflight._encoders(recipe, recipe.nodes.values())
    assert found == {
        ("ViT-L-14/openai", "clip"): ["subsets.good.filter.clip"],
        ("ViT-B-32/openai", "clip"): ["encoders.clip"],
    }
