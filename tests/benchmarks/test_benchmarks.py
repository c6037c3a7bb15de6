"""The benchmarks at tiny sizes: they end with their line, write what they promise, and count what they say they count."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import efficiency, samplers, samplers_page, shapes, shapes_changes, sweeps, training
from benchmarks.frame import interleaved
from benchmarks.matmuls import Product, replay
from stages.measuring.damage import CAPTIONS, PICTURES
from stages.runner.recipe import load_recipe
from training.config import ModelConfig, TrainConfig
from unidiffuser.modalities import paper_modalities

CPU = torch.device("cpu")


def run(name: str, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as its users start it; a process group that it makes ends with it."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--device", "cpu", "--json", str(file)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)


def figures(line: str, name: str) -> dict[str, str]:
    assert re.fullmatch(rf"{name}( [a-z0-9_]+=\S+)+", line)
    return dict(pair.split("=") for pair in line.split()[1:])


@pytest.mark.slow
def test_sampling_compares_both_tasks_with_diffusers(tmp_path):
    file = tmp_path / "sampling.json"
    tiny = ["--width", "64", "--depth", "2", "--pixels", "16", "--autoencoder", "32", "--decoder", "64"]
    result = run("sampling", file, *tiny, "--count", "2", "--steps", "3", "--rounds", "1", "--no-compile", "--no-memory")
    shown = figures(result.stdout.splitlines()[-1], "sampling")
    found = json.loads(file.read_text())
    assert shown["peer"] == "diffusers" and float(shown["ratio"]) == pytest.approx(found["ratio"], rel=1e-2)
    assert {"command", "machine", "date", "details"} <= found.keys()
    assert max(found["details"]["differences"].values()) < 1e-4
    for task in ("t2i", "i2t"):
        measured = found["details"]["tasks"][task]
        assert shown[f"{task}_calls"] == "3/6"  # both halves of guidance in one call here, in two there
        assert measured["ratio"] == pytest.approx(measured["median"]["diffusers"] / measured["median"]["ours"])
        for phases in measured["phases"].values():
            assert sum(phases.values()) - phases["all"] <= phases["all"]
    assert found["ratio"] == min(found["details"]["tasks"][task]["ratio"] for task in ("t2i", "i2t"))
    assert file.with_suffix(".md").read_text() == efficiency.page(found)


def test_the_efficiency_table_shows_what_was_measured():
    kept = Path("docs/results/sampling.json")
    found = json.loads(kept.read_text())
    page = kept.with_suffix(".md").read_text()
    assert page == efficiency.page(found)
    for task, name in (("t2i", "text to image"), ("i2t", "image to text")):
        measured = found["details"]["tasks"][task]
        seconds, gigabytes = measured["median"]["ours"], measured["memory_mib"]["ours"] * 1.048576e-3
        assert f"| {name} | this project | {seconds:.2f} | {gigabytes:.2f} |" in page


def test_the_distance_of_normal_distributions_and_noise_without_chance():
    noise = samplers.exact_noise(200, 3, 4)
    flat = noise.flatten(1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(12).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(flat.T.cov(correction=0), torch.eye(12).double(), atol=1e-12, rtol=0)
    # Of covariances with the same axes: the root of the squared differences of means and of standard deviations.
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    stds = torch.tensor([[1.0, 2.0, 0.5], [1.5, 2.0, 0.1]]).double()
    one, two = (turn @ torch.diag(std**2) @ turn.T for std in stds)
    expected = (0.25 + 0.16 + 9 + 16) ** 0.5
    found = samplers.distance(torch.zeros(3).double(), one, torch.tensor([3.0, 0.0, 4.0]).double(), two)
    assert found == pytest.approx(expected)


def test_a_last_step_of_first_order_ends_nearer_to_the_truth():
    mean, covariance = samplers.GaussianWorld.random(samplers.IMAGE_AND_TEXT).marginal("image", "text")
    makers, schedule = samplers.variants(), samplers.SCHEDULES["Stable Diffusion's"]
    for name in ("dpm++2m", "dpm++2m-sde"):
        own, first, zero = (
            samplers.error(makers[name, last], name in samplers.STOCHASTIC, 20, schedule, mean, covariance)
            for last in ("own order", "first order", "to zero")
        )
        assert first < 0.95 * zero < 0.8 * own


def test_the_pages_of_sweeps_show_what_was_found(tmp_path):
    file = tmp_path / "guidance.json"
    points = [{"guidance": float(scale), "values": {"fid_clip": 2.5 - scale, "clip_score_t2i": 20.0}} for scale in (0, 1)]
    found = {
        "about": "About.",
        "points": points,
        "figures": ["fid_clip", "clip_score_t2i"],
        "checkpoint": "a" * 24,
        "node": "train-x",
    }
    told = {"date": "2026-01-02", "command": "python -m benchmarks.sweeps x", "machine": "m"}
    sweeps.keep(file, {"one": found | told})
    sweeps.keep(file, sweeps.kept(file) | {"two": found | told})
    page = file.with_suffix(".md").read_text()
    assert page.index("## one") < page.index("## two") and page.count("| 1 | 1.5 | 20 |") == 2
    for kind in sweeps.CURVES:
        kept = sweeps.RESULTS / f"{kind}.json"
        if kept.is_file():
            assert kept.with_suffix(".md").read_text() == sweeps.page(kind, json.loads(kept.read_text()))


def test_the_page_of_robustness_tells_every_kind_of_damage():
    text = sweeps.page("robustness", {"trained": {}})
    for name in (*CAPTIONS, *PICTURES):
        assert f"\n- `{name}`: " in text


def test_curves_of_samplers_have_a_scale_where_all_figures_are_within_a_decade(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"sampler": "ddim", "last step": "first order", "error": {"5": 0.43, "50": 0.023}}
    samplers_page.curves(tmp_path / "samplers.png", {"details": {"gaussian": {"one": [row], "two": [row]}}})
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


@pytest.mark.slow
def test_encode_does_the_work_of_the_bare_encoders(tmp_path):
    file = tmp_path / "encode.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.encode",
        "--pictures",
        "256",
        "--size",
        "64",
        "--rounds",
        "1",
        "--json",
        str(file),
    ]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    shown, found = figures(result.stdout.splitlines()[-1], "encode"), json.loads(file.read_text())
    assert shown["peer"] == "bare_encoders" and found["details"]["rows"] == 256
    assert found["figures"]["largest_difference"] < 0.05  # moments of both are fp16
    standin = found["details"]["runs"]["ours"][0]["standin"]
    assert 0.008 * standin["rows"] < standin["seconds"]
    assert found["figures"]["standin_ratio"] == pytest.approx(0.008 * standin["rows"] / standin["seconds"], abs=1e-3)


def flop_of(width: int, depth: int, batch: int, latent: int, text: int) -> int:
    """Multiplications and additions of a training step of the paper's model, by hand."""
    patches = (latent // 2) ** 2
    tokens = 2 + text + 1 + patches
    linear = (depth + 1) * 12 * width**2 + depth // 2 * 2 * width**2
    inputs = (patches * 16 + 512 + text * 64) * width
    outputs = inputs
    attention = (depth + 1) * tokens**2 * width
    # A linear layer's backward pass costs two forward passes, but the inputs get no gradient; attention has two products
    # forward, and five backward.
    return 2 * batch * (3 * (tokens * linear + outputs) + 2 * inputs + 7 * attention)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_of_a_step_are_those_of_the_formula(checkpointing):
    model = ModelConfig(width=64, depth=4, heads=2, activation_checkpointing=checkpointing)
    config = TrainConfig(steps=1, global_batch=3, model=model)
    products = training.Step(config, paper_modalities((4, 12, 12), text=(5, 64)), CPU).products()
    expected = flop_of(width=64, depth=4, batch=3, latent=12, text=5)
    found = sum(product.flop for product in products)
    assert found > expected if checkpointing else found == expected


def test_products_are_run_with_their_shapes_and_layouts():
    with torch.profiler.profile(record_shapes=True) as profile:
        replay([Product(1, 3, 5, 7, a_transposed=True), Product(2, 3, 5, 7)], torch.float32, CPU)()
    shapes = [event.input_shapes[:2] for event in profile.events() if event.name in ("aten::mm", "aten::bmm")]
    assert [[3, 5], [5, 7]] in shapes and [[2, 3, 5], [2, 5, 7]] in shapes


@pytest.mark.slow
def test_training_compares_a_step_with_its_products(tmp_path):
    file = tmp_path / "training.json"
    result = run("training", file, "--width", "64", "--pixels", "16", "--batch", "2", "--rounds", "1", "--eager", "--no-memory")
    shown, found = figures(result.stdout.splitlines()[-1], "training"), json.loads(file.read_text())
    assert shown["peer"] == "matmul" and 0 < float(shown["ratio"])
    assert found["details"]["flop"] == flop_of(width=64, depth=2, batch=2, latent=2, text=77)
    assert found["details"]["phases"].keys() == {"forward", "backward", "optimizer"}


def test_sides_take_turns_in_changing_order():
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU)
    assert order == list("abbaab") and all(len(values) == 3 for values in seconds.values())


def test_every_change_of_shapes_changes_what_it_names():
    plain = load_recipe(shapes.RECIPE).nodes
    for name, change in shapes_changes.CHANGES.items():
        nodes = load_recipe(shapes.RECIPE, [f"name=shapes-{name}", *change.fields]).nodes
        changed = [node for node in plain if nodes[node].config != plain[node].config]
        assert len(changed) == bool(change.fields), name
        assert change.fields or change.share != 1 or name == "none"


def test_the_table_of_changes_has_the_best_first_and_names_what_is_missing():
    figures = dict.fromkeys(shapes_changes.FIGURES, 0.5) | {"tv_floor": 0.1}
    table = {
        name: {"told": shapes_changes.CHANGES[name].told, **figures, "joint_consistency": joint}
        for name, joint in (("none", 0.6), ("adamw", 0.1), ("twice-the-steps", 0.9))
    }
    details = {"steps": 1000, "recipe_steps": 20_000, "samples": 7, "draw_steps": 25, "table": table}
    text = shapes_changes.page({"details": details, "date": "today", "command": "this", "machine": "a machine"})
    rows = [line.split(" | ")[0].strip("| *") for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == ["twice the steps", "the recipe", shapes_changes.CHANGES["adamw"].told]
    (missing,) = (line for line in text.splitlines() if line.startswith("Not measured: "))
    assert missing.count("; ") == len(shapes_changes.CHANGES) - len(table) - 1 and "AdamW" not in missing


def test_the_committed_table_of_changes_is_the_page_of_its_result():
    file = Path(shapes.ROOT, "docs", "results", "shapes-changes.json")
    assert file.with_suffix(".md").read_text() == shapes_changes.page(json.loads(file.read_text()))


def test_shapes_meets_its_bars_only_with_all_of_them():
    good = {**shapes.AT_LEAST, **shapes.AT_MOST}
    assert shapes.met(good)
    assert not any(shapes.met({**good, name: bar - 0.01}) for name, bar in shapes.AT_LEAST.items())
    assert not any(shapes.met({**good, name: bar + 0.01}) for name, bar in shapes.AT_MOST.items())
