"""The benchmarks at tiny sizes: they end with their line, write what they promise, and count what they say they count."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import shapes, training
from benchmarks.frame import interleaved
from benchmarks.matmuls import Product, replay
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


@pytest.mark.slow
def test_encode_does_the_work_of_a_bare_loop(tmp_path):
    file = tmp_path / "encode.json"
    result = run("encode", file, "--pictures", "512", "--size", "64", "--rounds", "1")
    shown, found = figures(result.stdout.splitlines()[-1], "encode"), json.loads(file.read_text())
    assert shown["peer"] == "bare_loop" and found["details"]["rows"] == 512
    assert found["figures"]["largest_difference"] < 0.05  # moments of both are fp16
    assert found["figures"]["rows_per_s"] == pytest.approx(496 / found["details"]["seconds"]["ours"][0], rel=1e-2)


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
    for name, change in shapes.CHANGES.items():
        nodes = load_recipe(shapes.RECIPE, [f"name=shapes-{name}", *change.fields]).nodes
        changed = [node for node in plain if nodes[node].config != plain[node].config]
        assert len(changed) == bool(change.fields), name
        assert change.fields or change.share != 1 or name == "none"


def test_shapes_meets_its_bars_only_with_all_of_them():
    good = {**shapes.AT_LEAST, **shapes.AT_MOST}
    assert shapes.met(good)
    assert not any(shapes.met({**good, name: bar - 0.01}) for name, bar in shapes.AT_LEAST.items())
    assert not any(shapes.met({**good, name: bar + 0.01}) for name, bar in shapes.AT_MOST.items())
