"""The recipes that we ship: their trainings, at a reduced width, take their first steps one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.runner.recipe import Node, load_recipe
from tests.training.synthetic import KeepIn, history, write_shards
from training.config import TrainConfig
from training.job import TrainJob
from training.loop import run

CONFIGS = Path(__file__).parent.parent.parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "train" in path.read_text(encoding="utf-8"))
# Pixels that stand for a number of the reduced latents.
REDUCED = 64
STEPS = 2


def reduced(config: Any, shrinks: int) -> TrainConfig:
    """The same training, as small as it gets: one worker, and a look at the validation loss after every step.

    `shrinks` is the pixels that stand for a number of the latents whose positions the recipe counts.
    """
    told = {name: value for name, value in config.model_dump().items() if name in TrainConfig.model_fields}
    side = config.model.position_side
    told["model"] |= {"width": 16, "depth": 2, "heads": 2, "position_side": side and side * shrinks // REDUCED}
    if config.schedule.decay == "plateau":
        told["schedule"] |= {"look_every": 1, "look_samples": 4}
    if told["validation"]["fraction"]:
        told["validation"] = {"fraction": 0.2, "every": STEPS, "samples": 4}
    told |= {"steps": STEPS, "global_batch": 8, "workers": 1, "checkpoint_every": STEPS, "log_every": 1, "compile": False}
    told |= {"micro_batch": config.micro_batch and 4, "precision": "fp32"}
    # Adapters are for weights that are there, which `weights` tests.
    return TrainConfig.model_validate(told | {"lora": None})


def shards_of(nodes: Mapping[str, Node], training: Node, folder: Path) -> tuple[str, ...]:
    """Latents as the nodes before would make them, with less of everything."""
    found: tuple[str, ...] = ()
    for name in (name for input, name in training.inputs.items() if input.startswith("data.")):
        made = nodes[name].stage == "world"
        found += write_shards(folder / name, side=4 if made else nodes[name].config.size // REDUCED, clip=not made)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_trainings_of_a_recipe_take_their_first_steps(recipe: str, alone: None, tmp_path: Path) -> None:
    nodes = load_recipe(CONFIGS / f"{recipe}.yaml").nodes
    trainings = [node for node in nodes.values() if node.stage == "train"]
    shrinks = 64 if any(getattr(node.config, "vae", "") == "embedded" for node in nodes.values()) else 8
    for node in trainings:
        before = node.inputs.get("init")
        job = TrainJob(
            reduced(node.config, shrinks),
            shards_of(nodes, node, tmp_path / "latents" / node.name),
            str(tmp_path / "work"),
            KeepIn(str(tmp_path / node.name)),
            init_from=str(tmp_path / before / str(STEPS)) if before else None,
            keep=node.config.origin.keep if before else (),
        )
        (tmp_path / node.name).mkdir()
        outcome = run(job, torch.device("cpu"))
        assert (
            outcome.step == STEPS
            and len([row for row in history(tmp_path / node.name / str(STEPS)) if row["kind"] == "train"]) == STEPS
        )


def test_the_papers_recipes_are_the_papers() -> None:
    for version in (0, 1):
        nodes = load_recipe(CONFIGS / f"paper-v{version}.yaml").nodes
        trainings = [node.config for node in nodes.values() if node.stage == "train"]
        assert [(each.steps, each.global_batch, each.workers) for each in trainings] == [
            (250_000, 11264, 88), (200_000, 2112, 88), (220_000, 2112, 88),
        ]  # fmt: skip
        for each in trainings:
            assert (each.model.width, each.model.depth, each.model.heads, each.model.patch) == (1536, 30, 24, 2)
            # 1104 rows: two timesteps, 77 tokens of text, one of CLIP, and the patches of 512 px; the type of data is one more.
            assert each.model.position_side == 64 and each.model.data_type_token == (version == 1)
            assert (each.optimizer.kind, each.optimizer.lr, each.optimizer.weight_decay) == ("adamw", 2e-4, 0.03)
            assert each.optimizer.betas == (0.9, 0.9) and each.ema.decay == 0.9999 and each.schedule.decay == "plateau"
            assert each.objective.min_snr_gamma is None and (each.noise.beta_start, each.noise.beta_end) == (0.00085, 0.012)
        assert [node.config.size for node in nodes.values() if node.stage == "encode"] == [256, 512, 512]
        assert trainings[2].origin.keep == ("weights", "optimizer", "ema")
