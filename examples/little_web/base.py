"""`python -m examples.little_web.base`: train the base that the demo starts from, or go on with it, and ship it.

A larger little web is served, of other pictures than the demo's and without the held-out scenes too, and `unidiffuser run
configs/base.yaml` does the rest. What is shipped, in half precision, is the network (the moving average) and its text codec, with
a model card. With `--ship` an export that is there is written out again, and nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from examples.little_web.build import HOST, build
from examples.little_web.server import LittleWeb
from infra.dataset import Dataset, pointed
from infra.store import Store
from unidiffuser.references import EMBEDDED

RECIPE = Path(__file__).parent.parent.parent / "configs" / "base.yaml"
BASE = EMBEDDED / "base"
ROWS, SEED = 12_000, 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.little_web.base", description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="runs", help="where datasets lie")
    parser.add_argument("--web", type=Path, default=Path("runs/base-web"), help="where the little web lies, or is built")
    parser.add_argument("--rows", type=int, default=ROWS, help="links of a web that is built")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as of `unidiffuser run`")
    parser.add_argument("--ship", action="store_true", help="only write out what is trained already")
    arguments = parser.parse_args()
    if not arguments.ship:
        train(arguments.web.absolute(), arguments.rows, arguments.store, arguments.set)
    export = pointed(Store(arguments.store), "base", "export")
    if export is None:
        raise SystemExit(f"{arguments.store}: holds no export of the recipe base; leave out --ship to train one")
    ship(export, BASE)
    print(f"shipped {export.manifest.fingerprint} in {BASE}: {_megabytes(BASE):.1f} MB")


def train(web: Path, rows: int, store: str, overrides: list[str]) -> None:
    """Build the web if it is not there, serve it, and run the recipe; raises CalledProcessError where the run fails."""
    if not (web / "held_out.parquet").is_file():
        build(web, rows=rows, seed=SEED)
    with LittleWeb(web) as server:
        settings = [
            f"subsets.little.select.metadata=['{web}/metadata/part-*.parquet']",
            f"subsets.little.download.hosts={{'{HOST.removeprefix('http://')}': '{server.address}'}}",
        ]
        sets = [word for setting in (*settings, *overrides) for word in ("--set", setting)]
        command = [str(Path(sys.executable).parent / "unidiffuser"), "run", str(RECIPE), "--store", store, *sets]
        subprocess.run(command, check=True)


def ship(export: Dataset, folder: Path) -> None:
    """Write network and text codec of an export into a folder, in half precision, with a model card."""
    from unidiffuser.text_decoder import TextCodec

    with tempfile.TemporaryDirectory() as scratch:
        whole = export.fetch(Path(scratch, "export"))
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "uvit").mkdir(parents=True)
        shutil.copyfile(whole / "uvit" / "config.json", folder / "uvit" / "config.json")
        _halve(whole / "uvit" / "model.safetensors", folder / "uvit" / "model.safetensors")
        codec = TextCodec.load(whole / "text_codec")
        codec.half().save(folder / "text_codec")
        card(whole, folder)


def _halve(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value.half().contiguous() for name, value in load_file(source).items()}, target)


def card(export: Path, folder: Path) -> None:
    """Write MODEL_CARD.md from what an export tells of its lineage."""
    settings = json.loads((folder / "uvit" / "config.json").read_text(encoding="utf-8"))
    lineage: dict[str, Any] = json.loads((export / "provenance.json").read_text(encoding="utf-8"))
    config = lineage["config"]
    rows = [f"| {each['node']} | {each['rows_in']:,} | {each['rows_out']:,} |" for each in lineage["datasets"]]
    text = f"""# Model card: the base of the demo

A U-ViT (width {settings["width"]}, depth {settings["depth"]}) and its text codec, which `unidiffuser demo` starts from:
{_megabytes(folder):.1f} MB, safetensors in half precision. It knows the little web of `examples/little_web` and nothing else.

- **Data.** A little web of OpenMoji drawings on plain backgrounds with composed captions, downloaded, filtered and encoded as any
  other data (`configs/base.yaml`). The combinations that `Scene.held_out` names are in none of its pictures and captions. No
  picture or text from the web or of a person.
- **Licence.** The drawings are by OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0; so are these weights, which are
  made from them. The code is Apache-2.0.
- **How made.** `make base`, on 2 CPU cores, resumable. Its last training, {lineage["node"]}, took {config["steps"]:,} steps of
  {config["global_batch"]} samples. How well it draws is in the report of every demo, and in `docs/results/demo.json`.

What it was made from:

| dataset | rows in | rows out |
|---|---|---|
{chr(10).join(rows)}
"""
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


if __name__ == "__main__":
    main()
