"""Shares of subsets: exact in every global batch, each with its epochs and losses, the same for any workers and restarts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.synthetic import KeepIn, config, history, write_shards
from tests.training.test_order import _gather
from training.begin import Growth
from training.job import TrainJob
from training.loader import Loader
from training.loop import run
from training.mixture import pattern_of
from training.order import Order

CPU = torch.device("cpu")
SHARES: dict[str, Any] = {"web": 3, "art": 1}


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [5, 2, 1], [7, 7, 1, 3], [100, 1, 55, 20, 24], [1, 999]])
def test_every_stretch_has_its_shares_to_within_a_sample(weights: list[int]) -> None:
    pattern = np.array(pattern_of(weights))
    total = sum(weights)
    assert len(pattern) == total
    for subset, weight in enumerate(weights):
        seen = np.cumsum(pattern == subset)
        assert seen[-1] == weight
        assert np.abs(seen - np.arange(1, total + 1) * weight / total).max() < 1


def _mixed(tmp_path: Path) -> tuple[tuple[str, ...], list[str]]:
    """Three shards of `web` and two of `art`, one behind the other, whose keys say which they are."""
    shards = write_shards(tmp_path, files=5, rows=40)
    return shards, ["web", "art", "web", "art", "web"]


def _settings(**changes: Any) -> Any:
    return config(**{"data": {"shuffle_window": 3, "weights": SHARES}, "validation": {"fraction": 0.1, "every": 3}, **changes})


def test_a_batch_has_its_shares_and_each_subset_the_order_that_it_has_alone(tmp_path: Path) -> None:
    shards, names = _mixed(tmp_path)
    loader = Loader(_settings(), shards, subsets=names)
    subset = {f"{number:04d}": name for number, name in enumerate(names)}
    keys = [loader.keys(step) for step in range(60)]
    for step, batch in enumerate(keys):
        assert Counter(subset[key[:4]] for key in batch) == {"web": 6, "art": 2}
        told = [loader.subsets[number] for number in loader.batch(step).subset.tolist()]
        assert told == [subset[key[:4]] for key in batch]
    for name, share in (("web", 6), ("art", 2)):
        alone = config(global_batch=share, data={"shuffle_window": 3}, validation={"fraction": 0.1})
        only = Loader(alone, [shard for shard, of in zip(shards, names, strict=True) if of == name])
        window, lanes = _settings().lanes_of(share)
        only.order.orders = [Order(only.index.train, alone.seed, window, lanes, share)]
        mine = [key for batch in keys for key in batch if subset[key[:4]] == name]
        assert mine == [key for step in range(60) for key in only.keys(step)]
        # Every row of it once an epoch of its own.
        assert sorted(mine[: only.rows]) == sorted(set(mine[: only.rows])) and len(mine) > only.rows
        assert loader.epochs(60)[f"epoch_data.{name}"] == pytest.approx(60 * share / only.rows)
    assert loader.epochs(60)["epoch"] == min(loader.epochs(60).values())


def test_a_mixture_is_the_same_for_any_workers_and_from_any_step(tmp_path: Path) -> None:
    shards, names = _mixed(tmp_path)
    run = _settings()
    alone = Loader(run, shards, subsets=names)
    expected = [alone.keys(step) for step in range(20)]
    for world in (2, 4, 8):
        gather = _gather(config(validation={"fraction": 0.1}), shards, world)
        gang = [Loader(run, shards, rank, world, gather, subsets=names) for rank in range(world)]
        assert [sum((loader.keys(step) for loader in gang), []) for step in range(20)] == expected
    for step, batch in enumerate(Loader(run, shards, subsets=names).batches(13, 17), start=13):
        assert torch.equal(batch.clean["text"], alone.batch(step).clean["text"])


def test_a_subset_that_grows_ends_its_own_epoch_first(tmp_path: Path) -> None:
    shards, names = _mixed(tmp_path)
    settings = _settings(validation={"fraction": 0.0})
    before = Loader(settings, shards[:3], subsets=names[:3])
    grown = Loader(settings, shards, subsets=names, growth=[Growth(0, 3), Growth(15 * 8, 5)])
    until = [before.keys(step) for step in range(20)]
    # art: 40 rows, 2 a step, so its first epoch ends at step 20; web: 80 rows, 6 a step, so its second one does at 26 2/3.
    assert [grown.keys(step) for step in range(20)] == until
    seen: dict[str, list[str]] = {"web": [], "art": []}
    for step in range(70):
        for key in grown.keys(step):
            seen[names[int(key[:4])]].append(key)
    assert sorted(seen["art"][40:120]) == sorted(f"{file:04d}{row:04d}" for file in (1, 3) for row in range(40))
    assert {key[:4] for key in seen["web"][:160]} == {"0000", "0002"}
    assert sorted(seen["web"][160:280]) == sorted(f"{file:04d}{row:04d}" for file in (0, 2, 4) for row in range(40))


def test_losses_of_subsets_are_in_the_history_and_a_restart_goes_on_with_them(tmp_path: Path, alone: None) -> None:
    shards, names = _mixed(tmp_path / "shards")

    def trained(steps: int, place: str, **more: Any) -> list[dict[str, Any]]:
        settings = _settings(steps=steps, checkpoint_every=4, log_every=3)
        job = TrainJob(settings, shards, str(tmp_path / "work"), KeepIn(str(tmp_path / place)), subsets=tuple(names), **more)
        run(job, CPU)
        return [row for row in history(tmp_path / place / str(steps)) if row["kind"] == "train"]

    whole = trained(9, "whole")
    for row in whole:
        assert row["loss"] == pytest.approx(0.75 * row["loss_data.web"] + 0.25 * row["loss_data.art"], rel=1e-6)
        assert row["loss_data.web"] != row["loss_data.art"]
        assert row["epoch"] == min(row["epoch_data.web"], row["epoch_data.art"])
    trained(4, "part")
    assert trained(9, "again", resume=str(tmp_path / "part" / "4")) == whole


def test_shares_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="global_batch 8 is not divisible by 3, the sum of data.weights: write how many samples"):
        config(data={"weights": {"a": 2, "b": 1}})
    with pytest.raises(ValueError, match="the 2 samples of a subset in a global batch are not divisible by data.lanes 4"):
        config(data={"weights": SHARES, "lanes": 4})
    assert config(data={"weights": {"a": 300, "b": 100}}).shares == (3, 1)
    assert config(data={"weights": {"a": 300, "b": 100}, "lanes": 2}).lanes == (2, 2)
    shards = write_shards(tmp_path, files=2)
    with pytest.raises(ValueError, match="no row of art is left to train on"):
        Loader(_settings(), shards, subsets=["web", "web"])
