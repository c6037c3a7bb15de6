"""Two workers over gloo: as one worker, with every ZeRO stage, and after a SIGKILL in the middle of writing a checkpoint."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.stages.committed import damage_moments
from tests.training.gang import run_gang
from tests.training.plain import is_muons, start
from tests.training.synthetic import KeepIn, config, history, losses, write_shards
from training.history import read_history
from training.job import TrainJob
from training.loader import Loader
from training.loop import run

STATES = ("exp_avg", "exp_avg_sq")
# Its checkpoint after the first step shows what was orthogonalised.
MUON = {"optimizer": {"kind": "muon", "lr": 5e-3, "iteration": "fp32", "rest": {"lr": 5e-3}}, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def place(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of finished runs: `one` (one worker), `zero0`, `zero1`, `zero2`, `zero3` (two workers), `killed` while a worker
    writes its share of step 6; those of Muon begin with `muon-`."""
    folder = tmp_path_factory.mktemp("gang")
    shards = write_shards(folder / "shards")

    def job(name: str, kill: tuple[int, int, int] | None = None, **changes) -> TrainJob:
        return TrainJob(config(**changes), shards, str(folder / "work"), KeepIn(str(folder / name), kill))

    run(job("one"), torch.device("cpu"))
    run(job("muon-one", **MUON), torch.device("cpu"))
    # ZeRO 3 comes last: DeepSpeed then replaces torch's linear in the process for good, which changes the last bit.
    broken = write_shards(folder / "broken")
    damage_moments(broken[0], 3)
    damaged = job("damaged", workers=2, steps=16, log_every=8, damage={"skip_damaged": 1}, validation={"fraction": 0})
    jobs = [
        replace(damaged, shards=broken),
        job("zero0", workers=2, zero_stage=0),
        job("zero1", workers=2),
        job("zero2", workers=2, zero_stage=2, micro_batch=2),
        job("muon-zero1", workers=2, **MUON),
        job("zero3", workers=2, zero_stage=3),
        job("muon-zero3", workers=2, zero_stage=3, **MUON),
        job("killed", (6, 1, 20_000), workers=2, zero_stage=3),
    ]
    statuses = run_gang(folder / "first", jobs)
    assert statuses[1] == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_two_workers_agree_with_one(place: Path, name: str) -> None:
    assert losses(place / name / "6") == pytest.approx(losses(place / "one/6"), abs=1e-5)
    for kind in ("model", "ema", *STATES):
        ours, theirs = (load_file(place / run / "6" / f"{kind}.safetensors") for run in (name, "one"))
        for tensor in theirs:
            torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["muon-zero1", "muon-zero3"])
def test_two_workers_agree_with_one_on_muon(place: Path, name: str) -> None:
    assert losses(place / name / "6") == pytest.approx(losses(place / "muon-one/6"), abs=1e-5)
    for kind in ("model", "ema", *STATES, "momentum_buffer"):
        ours, theirs = (load_file(place / run / "6" / f"{kind}.safetensors") for run in (name, "muon-one"))
        assert ours.keys() == theirs.keys()
        for tensor in theirs:
            torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["muon-one", "muon-zero1", "muon-zero3"])
def test_every_matrix_of_a_block_is_orthogonalised(place: Path, name: str) -> None:
    """Its first update has the gradient's singular vectors and values near 1: the iteration is a polynomial of each value."""
    shards = tuple(str(path) for path in sorted((place / "shards").glob("*.parquet")))
    before, after = start(shards, config()).state_dict(), load_file(place / name / "1/model.safetensors")
    gradients, lr, found = load_file(place / name / "1/momentum_buffer.safetensors"), 5e-3 / 2, []
    for tensor, gradient in gradients.items():
        u, values, v = torch.linalg.svd(gradient.double(), full_matrices=False)
        values /= values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        update = (before[tensor] * (1 - lr * 0.03) - after[tensor]) / (lr * 0.2 * max(gradient.shape) ** 0.5)
        if torch.dist(update.double(), u @ values.diag() @ v) < 1e-3 * values.norm() and 0.7 < values.max() < 1.3:
            found.append(tensor)
    assert sorted(found) == sorted(tensor for tensor, old in before.items() if is_muons(tensor, old)) and len(found) == 13


def test_a_damaged_row_group_counts_once_however_many_workers_meet_it(place: Path) -> None:
    """In two epochs, its rows come in the batches of both."""
    shards = tuple(str(path) for path in sorted((place / "shards").glob("*.parquet")))
    hit = {f"0000{row:04d}" for row in range(24, 32)}
    loader = Loader(config(validation={"fraction": 0}), shards)
    for half in (slice(4), slice(4, 8)):
        assert hit & {key for step in range(16) for key in loader.keys(step)[half]}
    told = [row.get("damaged_groups") for row in read_history(place / "damaged/16/history.jsonl")]
    assert told[-1] == 1 and set(told) <= {None, 1}


def test_after_sigkill_the_resumed_run_is_the_uninterrupted_one(place: Path) -> None:
    """With the same number of workers to the last bit; with another number, and another ZeRO stage, up to rounding."""
    shards = tuple(str(path) for path in sorted((place / "shards").glob("*.parquet")))

    def resumed(name: str, source: str, **changes) -> TrainJob:
        return TrainJob(config(**changes), shards, str(place / "work"), KeepIn(str(place / name)), resume=str(place / source))

    assert KeepIn(str(place / "killed")).steps() == [3]
    jobs = [
        resumed("after1", "zero1/3", workers=2),
        resumed("after3", "killed/3", workers=2, zero_stage=3),
        resumed("spread", "one/3", workers=2, zero_stage=3),
        resumed("muon-after3", "muon-zero3/3", workers=2, zero_stage=3, **MUON),
        resumed("muon-spread", "muon-one/3", workers=2, zero_stage=3, **MUON),
    ]
    assert run_gang(place / "second", jobs) == [0, 0]
    run(resumed("merged", "zero3/3"), torch.device("cpu"))
    run(resumed("muon-merged", "muon-zero3/3", **MUON), torch.device("cpu"))

    for name, whole in (("after1", "zero1"), ("after3", "zero3"), ("muon-after3", "muon-zero3")):
        assert history(place / name / "6") == history(place / whole / "6")
        for kind in ("model", "ema", *STATES, *(["momentum_buffer"] if "muon" in name else [])):
            files = [(place / run / "6" / f"{kind}.safetensors").read_bytes() for run in (name, whole)]
            assert files[0] == files[1]
    for name in ("spread", "merged", "muon-spread", "muon-merged"):
        whole = "muon-one/6" if "muon" in name else "one/6"
        assert losses(place / name / "6") == pytest.approx(losses(place / whole), abs=1e-5)
