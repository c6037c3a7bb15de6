"""`python -m examples.shapes`: keep the report of the newest run of configs/shapes.yaml in docs/results."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from infra.dataset import pointed
from infra.store import Store

FILES = ("shapes.json", "shapes.md", "shapes-curve.png", "shapes-samples.png")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes", description=__doc__)
    parser.add_argument("--store", default="runs", help="where the run put its datasets")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where the report goes")
    arguments = parser.parse_args(given)
    dataset = pointed(Store(arguments.store), "shapes", "evaluate")
    if dataset is None:
        raise SystemExit(f"{arguments.store} has no evaluation of shapes; run `unidiffuser run configs/shapes.yaml` first")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = dataset.fetch(Path(scratch))
        for name in FILES:
            shutil.copyfile(folder / name, arguments.out / name)
    values = json.loads((arguments.out / "shapes.json").read_text(encoding="utf-8"))
    print(" ".join(f"{name}={value}" for name, value in values.items() if isinstance(value, float | int)))


if __name__ == "__main__":
    main()
