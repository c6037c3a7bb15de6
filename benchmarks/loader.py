"""The trainer's loader against litdata, a file a sample, and webdataset: latents of 256 px, read, mixed and drawn in one process.

All sides give batches of 64 rows with drawn latents, noise and timesteps, and mix about the same number of rows. Each runs in a
process of its own with one torch thread, and they take turns. litdata comes in an environment of its own. CPU time counts all
threads; memory is what a side takes beyond its imports, of which torch's libraries are most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
import webdataset

from benchmarks.before import ROOT, commit_of, worktree
from benchmarks.frame import Result, machine, progress
from benchmarks.loader_side import GROUP, SCALE, SHAPES, parted

LITDATA = "litdata==0.2.76"
PEERS = ("litdata", "npy", "webdataset")
SHARD = 2048

WRITE_LITDATA = """
import sys
import numpy as np
from pathlib import Path
from litdata.streaming.writer import BinaryWriter

sys.path[0] = sys.argv[1]
from benchmarks.loader_side import parted

writer = BinaryWriter(sys.argv[3], chunk_bytes="64MB")
for number, path in enumerate(sorted(Path(sys.argv[2]).glob("*.npy"))):
    writer[number] = parted(np.load(path))
writer.done()
writer.merge()
"""


def write(data: Path, rows: int, peer: Path) -> None:
    """The same random rows in the form of each side."""
    for name in ("parquet", *PEERS):
        (data / name).mkdir()
    facts = {"size": 256, "scaling_factor": SCALE, **SHAPES}
    for number, first in enumerate(range(0, rows, SHARD)):
        width = sum(int(np.prod(shape)) for shape in SHAPES.values())
        values = np.random.default_rng(number).standard_normal((min(SHARD, rows - first), width), np.float32).astype(np.float16)
        keys = [f"{row:09d}" for row in range(first, first + len(values))]
        with webdataset.TarWriter(str(data / "webdataset" / f"{number:05d}.tar")) as tar:
            for key, row in zip(keys, values, strict=True):
                file = BytesIO()
                np.save(file, row)
                (data / "npy" / f"{key}.npy").write_bytes(file.getvalue())
                tar.write({"__key__": key, "npy": file.getvalue()})
        columns = {part: [parted(row)[part].tobytes() for row in values] for part in SHAPES}
        table = pa.table({"key": keys} | {part: pa.array(cells, pa.binary(len(cells[0]))) for part, cells in columns.items()})
        pq.write_table(
            table.replace_schema_metadata({"unidiffuser": json.dumps(facts)}), data / "parquet" / f"{number:05d}.parquet",
            row_group_size=GROUP, compression="none", use_dictionary=False, write_page_checksum=True,
        )  # fmt: skip
        progress(f"{first + len(values)} of {rows} rows written")
    command = [str(peer), "-c", WRITE_LITDATA, str(ROOT), str(data / "npy"), str(data / "litdata")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def install_litdata(folder: Path) -> Path:
    """An environment with litdata that shares our torch and all else that it finds; gives its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(packages, "shared.pth").write_text(sysconfig.get_path("purelib"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITDATA]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    return python


@contextmanager
def side(name: str, python: str, data: Path, root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reads batches when it is told to."""
    command = [python, "-P", str(ROOT / "benchmarks" / "loader_side.py"), name, str(data), str(root)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure(process: subprocess.Popen[str], batches: int) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{batches}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side ended; what it said stands above")
    return json.loads(line)


def main(
    rows: Annotated[int, typer.Option(min=2048, help="Rows of each side's data; 27 kB a row and side.")] = 16384,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 64 rows that a side makes in its turn.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="How often the sides take turns.")] = 7,
    before: Annotated[str, typer.Option(help="Measure the loader of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Rows a second, CPU time a row, and memory of loading latents."""
    words = machine(torch.device("cpu"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer = install_litdata(folder / "peer")
        write(folder, rows, peer)
        roots = {"ours": ROOT, **dict.fromkeys(PEERS, ROOT)}
        if before:
            roots["before"] = stack.enter_context(worktree(before))
        pythons = {name: str(peer) if name == "litdata" else sys.executable for name in roots}
        sides = {name: stack.enter_context(side(name, pythons[name], folder, root)) for name, root in roots.items()}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                runs[name].append(measure(sides[name], batches))
                progress(f"round {number + 1} of {rounds}: {name} {runs[name][-1]}")
    typical = {name: {figure: median(run[figure] for run in found) for figure in found[0]} for name, found in runs.items()}
    best = max(PEERS, key=lambda name: typical[name]["rows_per_s"])
    figures: dict[str, Any] = {}
    if before:
        figures["over_before"] = round(typical["ours"]["rows_per_s"] / typical["before"]["rows_per_s"], 3)
    for name in ("ours", best):
        prefix = "" if name == "ours" else "peer_"
        figures |= {f"{prefix}rows_per_s": round(typical[name]["rows_per_s"]), f"{prefix}cpu_us": round(typical[name]["cpu_us"])}
        figures[f"{prefix}memory_mib"] = round(max(run["mib"] for run in runs[name]))
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    details = {**commits, "litdata": LITDATA, "sizes": {"rows": rows, "batches": batches}, "medians": typical, "runs": runs}
    ratio = round(typical["ours"]["rows_per_s"] / typical[best]["rows_per_s"], 3)
    Result("loader", ratio, best, figures, words, details).finish(file)


if __name__ == "__main__":
    typer.run(main)
