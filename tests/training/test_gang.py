"""Two workers over gloo: as one worker, with every ZeRO stage, and after a SIGKILL."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.gang import run_gang
from tests.training.synthetic import KeepIn, config, history, losses, write_shards
from training.job import TrainJob
from training.loop import run


@pytest.fixture(scope="module")
def place(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of finished runs: `one` (one worker), `zero1`, `zero2`, `zero3` (two workers), and `killed` at step 3."""
    folder = tmp_path_factory.mktemp("gang")
    shards = write_shards(folder / "shards")

    def job(name: str, kill_at: int | None = None, **changes) -> TrainJob:
        return TrainJob(config(**changes), shards, str(folder / "work"), KeepIn(str(folder / name), kill_at))

    run(job("one"), torch.device("cpu"))
    # ZeRO 3 comes last: DeepSpeed then replaces torch's linear in the process for good, which changes the last bit.
    jobs = [
        job("zero1", workers=2),
        job("zero2", workers=2, zero_stage=2, micro_batch=2),
        job("zero3", workers=2, zero_stage=3),
        job("killed", 3, workers=2, zero_stage=3),
    ]
    statuses = run_gang(folder / "first", jobs)
    assert statuses[0] == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_two_workers_agree_with_one(place: Path, name: str) -> None:
    assert losses(place / name / "6") == pytest.approx(losses(place / "one/6"), abs=1e-5)
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = (load_file(place / run / "6" / f"{kind}.safetensors") for run in (name, "one"))
        for tensor in theirs:
            torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-4, atol=1e-5)


def test_after_sigkill_the_resumed_run_is_the_uninterrupted_one(place: Path) -> None:
    """With the same number of workers to the last bit; with another number, and another ZeRO stage, up to rounding."""
    shards = tuple(str(path) for path in sorted((place / "shards").glob("*.parquet")))

    def resumed(name: str, source: str, **changes) -> TrainJob:
        return TrainJob(config(**changes), shards, str(place / "work"), KeepIn(str(place / name)), resume=str(place / source))

    assert not (place / "killed/6").exists()
    jobs = [
        resumed("after1", "zero1/3", workers=2),
        resumed("after3", "killed/3", workers=2, zero_stage=3),
        resumed("spread", "one/3", workers=2, zero_stage=3),
    ]
    assert run_gang(place / "second", jobs) == [0, 0]
    run(resumed("merged", "zero3/3"), torch.device("cpu"))

    for name, whole in (("after1", "zero1"), ("after3", "zero3")):
        assert history(place / name / "6") == history(place / whole / "6")
        for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
            files = [(place / run / "6" / f"{kind}.safetensors").read_bytes() for run in (name, whole)]
            assert files[0] == files[1]
    for name in ("spread", "merged"):
        assert losses(place / name / "6") == pytest.approx(losses(place / "one/6"), abs=1e-5)
