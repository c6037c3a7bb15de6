"""Both optimizers on every ZeRO stage, with one and two workers, against plain torch: `make test-trainer`.

    python -m tests.training.equal --json docs/results/trainer-equal.json

50 steps in fp32 on shards of known content. Of AdamW the losses must agree to 1e-5. Of Muon the first update must agree with that
of torch.optim.Muon to 1e-3 of its norm and the losses to 1e-2; with its iteration in fp32, to 1e-5 with one written out in fp32.

The first update is one of a gradient that is not clipped. Clipping changes its last bit from stage to stage; where that makes a
number round to another one of bf16, the iteration multiplies the difference in the directions in which the gradient is small by
up to 480, and a matrix moves by some hundredths of its update. In fp32 nothing of this is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.training.gang import run_gang
from tests.training.plain import start, train_plain
from tests.training.synthetic import KeepIn, config, history, write_shards
from training.config import TrainConfig
from training.job import TrainJob
from training.loop import run

STEPS = 50
REST = {"lr": 2e-3}
# What is compared: the trainer's optimizer, the plain one, and the greatest difference of a loss and of the first update.
CASES: dict[str, tuple[dict[str, Any], str, float, float]] = {
    "adamw": ({"kind": "adamw", "lr": 2e-3}, "adamw", 1e-5, 1e-3),
    # As torch's Muon, also on a processor without bf16, where `auto` is fp32.
    "muon": ({"kind": "muon", "lr": 2e-3, "iteration": "bf16", "rest": REST}, "muon", 1e-2, 1e-3),
    "muon-fp32": ({"kind": "muon", "lr": 2e-3, "iteration": "fp32", "rest": REST}, "muon-fp32", 1e-5, 1e-3),
}
STAGES = (0, 1, 2, 3)


def settings(optimizer: dict[str, Any], steps: int, **more: Any) -> TrainConfig:
    validation = {"fraction": 0.2, "every": 10**6}
    return config(steps=steps, checkpoint_every=steps, optimizer=optimizer, validation=validation, **more)


def jobs(folder: Path, shards: tuple[str, ...], workers: int) -> Iterator[TrainJob]:
    """A whole run and one of a step, for each case and stage; ZeRO 3 comes last, since it replaces torch's linear for good."""
    for stage in STAGES:
        for case, (optimizer, *_) in CASES.items():
            for run_ in (settings(optimizer, STEPS), settings(optimizer, 1, gradient_clip=0.0)):
                placed = run_.model_copy(update={"zero_stage": stage, "workers": workers})
                yield TrainJob(placed, shards, str(folder / "work"), KeepIn(str(folder / f"{case}-{stage}-{workers}")))


def measured(folder: Path, shards: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The greatest differences from plain torch by run, `CASE-ZERO-WORKERS`."""
    found = {}
    before = start(shards, config()).state_dict()
    for case, (optimizer, kind, *_) in CASES.items():
        losses, _ = train_plain(shards, settings(optimizer, STEPS), kind)
        _, update = train_plain(shards, settings(optimizer, 1, gradient_clip=0.0), kind)
        for stage in STAGES:
            for workers in (1, 2):
                name = f"{case}-{stage}-{workers}"
                ours = [row["loss"] for row in history(folder / name / str(STEPS)) if row["kind"] == "train"]
                after = load_file(folder / name / "1/model.safetensors")
                found[name] = {
                    "losses": max(abs(one - other) for one, other in zip(ours, losses, strict=True)),
                    "first_update": max(_apart(after[name] - before[name], change) for name, change in update.items()),
                }
    return found


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Distance by the norm; a parameter without a gradient hardly moves, and rounds differently."""
    return float(torch.dist(ours, theirs) / theirs.norm().clamp(min=1e-6))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="unidiffuser-equal-") as scratch:
        folder = Path(scratch)
        shards = write_shards(folder / "shards")
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
        for job in jobs(folder, shards, 1):
            run(job, torch.device("cpu"))
        dist.destroy_process_group()
        if any(run_gang(folder / "gang", list(jobs(folder, shards, 2)), timeout=3000)):
            sys.exit("a run of two workers failed")
        found = measured(folder, shards)
    failed = []
    for name, differences in found.items():
        _, _, most_loss, most_update = CASES[name.rsplit("-", 2)[0]]
        good = differences["losses"] <= most_loss and differences["first_update"] <= most_update
        failed += [] if good else [name]
        told = "  ".join(f"{what} {value:.1e}" for what, value in differences.items())
        print(f"{name:16} {told}  {'' if good else 'NO'}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"steps": STEPS, "runs": found, "failed": failed}, indent=1) + "\n", encoding="utf-8"
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
