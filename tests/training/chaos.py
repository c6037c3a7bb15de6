"""SIGKILL in the middle of writing checkpoints: `python -m tests.training.chaos FOLDER --kills 20 --json FILE`.

Two workers train with AdamW and with Muon, on ZeRO 1 and 3 in turns. One of them dies at a random byte of its share of a random
checkpoint; the run is started again from the newest checkpoint that counts, and dies again, until its kills are done. At the end
its history and every number of its last checkpoint must be those of the run that was not disturbed, and a checkpoint that counts
must have been the newest one before the kill.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.training.gang import run_gang
from tests.training.synthetic import KeepIn, config, history, write_shards
from training.job import TrainJob
from training.shares import share_name

EVERY, STEPS, WORKERS = 3, 12, 2
SCENES: list[dict[str, Any]] = [
    {"zero_stage": zero_stage, "optimizer": optimizer}
    for zero_stage in (1, 3)
    for optimizer in ({"lr": 5e-3}, {"kind": "muon", "lr": 5e-3, "rest": {"lr": 5e-3}})
]


def job(folder: Path, shards: tuple[str, ...], scene: dict[str, Any], kill: tuple[int, int, int] | None = None) -> TrainJob:
    """Of a run that goes on from what is in the folder."""
    settings = config(steps=STEPS, checkpoint_every=EVERY, workers=WORKERS, **scene)
    steps = KeepIn(str(folder)).steps()
    resume = str(folder / str(steps[-1])) if steps else None
    return TrainJob(settings, shards, str(folder / "work"), KeepIn(str(folder), kill), resume=resume)


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same history and the same numbers."""
    shares = [share_name(rank, WORKERS) for rank in range(WORKERS)]
    last = str(STEPS)
    alike = all((one / last / share).read_bytes() == (other / last / share).read_bytes() for share in shares)
    return alike and history(one / last) == history(other / last)


def story(folder: Path, shards: tuple[str, ...], scene: dict[str, Any], kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """A row a kill, and what has come of the run that they met."""
    calm, killed = folder / "calm", folder / "killed"
    rows: list[dict[str, Any]] = []
    assert run_gang(folder / "gang-calm", [job(calm, shards, scene)]) == [0] * WORKERS
    while len(rows) < kills:
        newest = max(KeepIn(str(killed)).steps(), default=0)
        # The next checkpoint or the one after it, so that the last one is not reached at once.
        step, rank = min(newest + rng.choice((EVERY, 2 * EVERY)), STEPS), rng.randrange(WORKERS)
        place = rng.randrange((calm / str(step) / share_name(rank, WORKERS)).stat().st_size)
        statuses = run_gang(folder / f"gang-{len(rows)}", [job(killed, shards, scene, (step, rank, place))])
        left = KeepIn(str(killed)).steps()
        rows.append({**scene, "step": step, "rank": rank, "byte": place, "left": left})
        assert statuses[rank] == -signal.SIGKILL and left == list(range(EVERY, step, EVERY)), rows[-1]
    assert run_gang(folder / "gang-last", [job(killed, shards, scene)]) == [0] * WORKERS
    rows[-1]["same"] = same(killed, calm)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    rng, rows, began = random.Random(arguments.seed), [], time.monotonic()
    shards = write_shards(arguments.folder / "shards")
    for number, scene in enumerate(SCENES):
        kills = len(range(number, arguments.kills, len(SCENES)))
        rows += story(arguments.folder / str(number), shards, scene, kills, rng)
        print(json.dumps(rows[-1]), flush=True)
    differ = sum(not row.get("same", True) for row in rows)
    told = {"kills": len(rows), "runs_that_differ": differ, "minutes": round((time.monotonic() - began) / 60, 1)}
    print(json.dumps(told))
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
