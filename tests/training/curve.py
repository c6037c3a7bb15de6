"""The stored loss curves of both optimizers: `make loss-curve` rewrites them and prints how far they have moved.

100 steps in fp32 on shards of known content. A change that should not touch the numerics leaves them where they are; one that
should is made together with new curves, and its reader sees by how much they moved.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

STORED = Path(__file__).parents[2] / "docs" / "results" / "loss-curve.json"
STEPS = 100
# Relative, on another processor.
TOLERANCES = {"adamw": 1e-4, "muon": 1e-2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "lr": 2e-3},
    "muon": {"kind": "muon", "lr": 2e-3, "iteration": "fp32", "rest": {"lr": 2e-3}},
}


def curve(kind: str, folder: Path) -> list[float]:
    """The losses of all steps; torch.distributed must be initialised."""
    import torch

    from tests.training.synthetic import KeepIn, config, history, write_shards
    from training.job import TrainJob
    from training.loop import run

    settings = config(
        steps=STEPS, checkpoint_every=STEPS, optimizer=OPTIMIZERS[kind], schedule={"warmup_steps": 10},
        validation={"fraction": 0.2, "every": STEPS},
    )  # fmt: skip
    run(
        TrainJob(settings, write_shards(folder / "shards"), str(folder / "work"), KeepIn(str(folder / kind))), torch.device("cpu")
    )
    return [row["loss"] for row in history(folder / kind / str(STEPS)) if row["kind"] == "train"]


def moved(kind: str, losses: list[float]) -> tuple[int, float]:
    """The step, from 1, whose loss is furthest from the stored one, and its relative difference."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))[kind]
    apart = [abs(ours - theirs) / theirs for ours, theirs in zip(losses, stored, strict=True)]
    return apart.index(max(apart)) + 1, max(apart)


def main() -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="unidiffuser-curve-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        found = {kind: curve(kind, Path(folder)) for kind in OPTIMIZERS}
        dist.destroy_process_group()
    for kind, losses in found.items():
        if STORED.exists():
            step, apart = moved(kind, losses)
            print(f"{kind}: the loss of step {step} moved by {apart:.1e} of itself, that of no step by more")
        print(f"{kind}: {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {STEPS}")
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
