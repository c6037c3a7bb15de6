"""The world of shapes in its smallest form: a few pairs, and the checkpoint of a network that has learned nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from infra.dataset import Dataset, commit
from infra.store import Store
from stages.world import stage as world
from stages.world.stage import World
from tests.stages.committed import dataset_of
from training.config import TrainConfig
from training.loader import Loader
from training.loop import uvit_config
from training.shares import key_of, share_name
from unidiffuser.uvit import UViT

RECIPE = {"width": 16, "depth": 2, "heads": 2}


def config(**changes: object) -> TrainConfig:
    """A training that reads the rows as they were written."""
    fields = {
        "steps": 4, "global_batch": 64, "precision": "fp32", "timesteps": "sobol", "model": RECIPE, "log_every": 1,
        "data": {"order": "written", "lanes": 1, "shuffle_window": 2}, "validation": {"fraction": 0.0},
    }  # fmt: skip
    return TrainConfig.model_validate({**fields, **changes})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ROW_GROUP", 64)
    monkeypatch.setattr(world, "SHARD_ROWS", 128)
    monkeypatch.setattr("stages.measuring.painters.World.at_once", 4)
    monkeypatch.setattr("examples.shapes.measure.CODEC_PICTURES", 1)
    monkeypatch.setattr("examples.shapes.measure.FLOOR_ROUNDS", 20)
    monkeypatch.setattr("examples.shapes.sheets.COLUMNS", 2)


@pytest.fixture
def made(small: None, store: Store, make: Callable[..., Dataset], in_process: None) -> Dataset:
    """320 pairs; the codec has hardly learned anything."""
    return make(World, store, rows=320, codec_steps=2)


@pytest.fixture
def checkpoint(made: Dataset, store: Store, tmp_path: Path) -> Dataset:
    """An untrained network, with the history of a training."""
    folder, settings = tmp_path / "checkpoint", config(objective={"min_snr_gamma": 0.5})
    folder.mkdir()
    loader = Loader(settings, [made.url(entry) for entry in made.files[1:]])
    sizes = uvit_config(settings, loader.modalities)
    (folder / "config.json").write_text(sizes.model_dump_json())
    weights = UViT(sizes).state_dict()
    pieces = {key_of("ema", name, 0): tensor.flatten() for name, tensor in weights.items()}
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    save_file(pieces, folder / share_name(0, 1), {"shapes": json.dumps(shapes)})
    rows = [
        {"kind": "train", "step": 4, "loss": 1.5, "loss_latent": 1.0, "loss_text": 0.5, "seconds": 90.0, "core_seconds": 150.0}
    ] * 2
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = dataset_of(store, "train", folder, {})
    dataset.manifest.config = settings.model_dump(mode="json")
    return commit(store, dataset.manifest)
