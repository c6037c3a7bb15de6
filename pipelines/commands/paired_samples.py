"""What two checkpoints draw of the same prompts with the same seeds, and without a watermark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from rich.console import Console

from pipelines.commands.checkpoints import Misuse, Named, opened, quiet_libraries, said_in_a_line
from pipelines.commands.sides import Side
from stages.runner.contract import StageError

if TYPE_CHECKING:
    from PIL.Image import Image

Cell = tuple["Image | None", str]


@dataclass(frozen=True)
class Wanted:
    """What is drawn: `count` results of each task, with the seeds from `seed` on; fields as of `sample`."""

    prompts: Sequence[str] = ()
    count: int = 4
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0


def draw(sides: Sequence[Side], wanted: Wanted, named: Named, console: Console) -> dict[str, list[list[Cell]]]:
    """For every task a row of (picture or None, caption) for each side; nothing if `count` is 0.

    Raises:
        Misuse, StageError: a side has no checkpoint, or one that cannot be loaded, or a network overflows.
    """
    if wanted.count == 0:
        return {}
    for side in sides:
        if side.checkpoint is None:
            raise Misuse(f"{side.name} has no checkpoint")
    quiet_libraries()
    prompts = list(wanted.prompts or _captions(sides))[: wanted.count]
    drawn = [_drawn(side, prompts, wanted, named, console) for side in sides]
    return {task: [rows[task] for rows in drawn] for task in drawn[0]}


def _captions(sides: Sequence[Side]) -> list[str]:
    """The first captions of the data of A, or of B; they may be among what the checkpoint has learned."""
    for side in sides:
        for made in reversed(side.made.values()):
            if made.dataset is not None and made.stage == "encode":
                for entry in (entry for entry in made.dataset.files if entry.name.endswith(".parquet")):
                    with made.dataset.open(entry) as file:
                        rows = next(pq.ParquetFile(file, page_checksum_verification=True).iter_batches(32, columns=["caption"]))
                    return list(dict.fromkeys(rows.column(0).to_pylist()))
    return []


def _drawn(side: Side, prompts: list[str], wanted: Wanted, named: Named, console: Console) -> dict[str, list[Cell]]:
    import torch

    from unidiffuser.generation import UniDiffuser
    from unidiffuser.tensors import NotFinite

    assert side.checkpoint is not None
    with said_in_a_line(), console.status(f"drawing with {side.name}"), opened(side.checkpoint, side.store, named) as folder:
        model = UniDiffuser.load(folder, "cuda" if torch.cuda.is_available() else "cpu")
        how: dict[str, Any] = {"steps": wanted.steps, "guidance": wanted.guidance, "batch": wanted.count}
        how |= {"beams": 1, "mark": False}
        try:
            rows: dict[str, list[Cell]] = {}
            if prompts:
                seeds = range(wanted.seed, wanted.seed + len(prompts))
                drawn = model.generate("t2i", prompts, seeds=seeds, **how)
                rows["Text to image"] = [(each.image, prompt) for each, prompt in zip(drawn, prompts, strict=True)]
            seeds = range(wanted.seed, wanted.seed + wanted.count)
            joint = model.generate("joint", count=wanted.count, seeds=seeds, **how)
            rows["Image and text together"] = [(each.image, each.caption or "") for each in joint]
        except NotFinite as error:
            raise StageError(f"{side.name}: {error}") from None
    return rows
