"""A model that tells types of data apart: which rows are of which type, against Parquet's own reader and plain torch."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.training.synthetic import KeepIn, config, history, write_shards
from training.config import TrainConfig
from training.job import TrainJob
from training.loader import Loader
from training.loop import run, uvit_config
from unidiffuser.objective import JointObjective
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.uvit import UViT

CPU = torch.device("cpu")


def with_token(kind: int | str, **changes) -> TrainConfig:
    model = {"width": 16, "depth": 2, "heads": 2, "data_type_token": True}
    return config(model=model, data={"shuffle_window": 3, "data_type": kind}, **changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_a_condition_or_a_constant_says_the_type_of_every_row(shards: tuple[str, ...]) -> None:
    scores = {}
    for path in shards:
        table = pq.read_table(path, columns=["key", "aesthetic"])
        scores |= dict(zip(table["key"].to_pylist(), table["aesthetic"].to_pylist(), strict=True))
    # A null is of no known worth: type 0.
    for kind, of in (("AESTHETIC_SCORE >= 5", lambda score: int(score is not None and score >= 5)), (1, lambda score: 1)):
        loader = Loader(with_token(kind), shards)
        for step in range(3):
            batch = loader.batch(step)
            assert batch.data_type.tolist() == [of(scores[key]) for key in loader.keys(step)]
            assert [piece.data_type.tolist() for piece in batch.split(3)] == [
                batch.data_type[start : start + 3].tolist() for start in (0, 3, 6)
            ]
    plain, typed = Loader(config(), shards).batch(0), Loader(with_token(1), shards).batch(0)
    assert all(torch.equal(plain.noise[part], typed.noise[part]) for part in plain.noise)


def test_it_trains_on_the_types_and_goes_on_bit_identically(alone: None, shards: tuple[str, ...], tmp_path: Path) -> None:
    settings = with_token("aesthetic >= 5", gradient_clip=0.0)
    run(TrainJob(settings, shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "whole"))), CPU)
    resumed = TrainJob(settings, shards, str(tmp_path / "work"), KeepIn(str(tmp_path / "part")), resume=str(tmp_path / "whole/3"))
    run(resumed, CPU)
    assert history(tmp_path / "part/6") == history(tmp_path / "whole/6")
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        name = f"6/{kind}.safetensors"
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    loader = Loader(settings, shards)
    torch.manual_seed(settings.seed)
    model = UViT(uvit_config(settings, loader.modalities))
    objective = JointObjective(loader.modalities, NoiseSchedule())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.9), weight_decay=0.03)
    told = [row["loss"] for row in history(tmp_path / "whole/6") if row["kind"] == "train"]
    for step in range(3):
        optimizer.param_groups[0]["lr"] = min(1.0, (step + 1) / 2) * 5e-3
        batch = loader.batch(step)
        loss, _ = objective.loss(model, batch.clean, batch.timesteps, batch.noise, batch.data_type)
        other, _ = objective.loss(model, batch.clean, batch.timesteps, batch.noise, 1 - batch.data_type)
        assert told[step] == pytest.approx(loss.item(), abs=2e-6)
        assert told[step] != pytest.approx(other.item(), abs=2e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_token_and_type_go_together_and_a_condition_is_on_numbers() -> None:
    model = {"width": 16, "depth": 2, "heads": 2}
    for changes, message in (
        (
            {"model": {**model, "data_type_token": True}},
            "needs data.data_type: 0, 1, or a condition that the rows of type 1 meet",
        ),
        ({"data": {"data_type": 0}}, "data.data_type is 0, which only model.data_type_token: true reads"),
        ({"data": {"data_type": "LICENSE == free"}}, "latent shards have numbers to compare"),
        ({"data": {"data_type": "internal"}}, "is no condition; write COLUMN OP VALUE"),
        ({"data": {"data_type": 2}}, "Input should be 0 or 1"),
        ({"model": {**model, "position_side": 5}}, "position_side 5 is not divisible by patch 2"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)
