"""Runs what the pages say, in their order, as a reader does: in a clone of its own, with a store that goes when it is done.

Words in capitals stand for what the reader fills in: EXPORT, FILTER and so on for the newest dataset of that stage.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from website.blocks import Block, to_run
from website.pages import ROOT, Page, SiteError, in_order, written

# The longest of a page's commands trains for ten minutes.
LIMIT = 45 * 60
STAGES = ("export", "download", "filter", "encode", "train", "evaluate")
SHOWN = 4000
NOTEBOOK = "docs/notebook.ipynb"
# A picture that the reader has.
PICTURE = "photo.jpg"
# None when it ended well, else what it said.
Step = Callable[[], str | None]


def walk(names: Sequence[str], fresh: bool, file: Path | None) -> int:
    """Run the commands of pages, print a line for each, and stop at the first that fails. Gives the exit code.

    Args:
        names: pages, or parts of them such as README.md#on-your-own-data; all pages if empty.
        fresh: let the clone have an environment of its own, instead of this one's.
        file: where the seconds are kept, as JSON.
    """
    pages = {page.source: page for those in in_order(written()).values() for page in those}
    chosen = list(names) or [*pages]
    if not names:
        chosen.insert(chosen.index("docs/tutorial.md") + 1, NOTEBOOK)
    if unknown := [name for name in chosen if name.partition("#")[0] not in (*pages, NOTEBOOK)]:
        raise SiteError(f"no page {unknown[0]}; there are {', '.join([*pages, NOTEBOOK])}")
    steps: list[dict[str, Any]] = []
    words = _machine() if file is not None else ""
    with tempfile.TemporaryDirectory(prefix="unidiffuser-walk-") as scratch:
        folder = Path(scratch, "unidiffuser")
        prepare(folder, fresh)
        for place, what, run in _steps(chosen, pages, folder):
            steps.append(_timed(place, what, run))
            if steps[-1]["said"] is not None:
                print(steps[-1]["said"])
                return 1
    if file is not None:
        _keep(file, steps, words)
    return 0


def _steps(chosen: Sequence[str], pages: Mapping[str, Page], folder: Path) -> Iterator[tuple[str, str, Step]]:
    """Where each step stands, what it is, and what runs it."""
    for name in chosen:
        source, _, section = name.partition("#")
        if source == NOTEBOOK:
            yield name, "every cell", partial(run_notebook, folder)
            continue
        for block in to_run(pages[source]):
            if section in ("", block.section):
                yield f"{source}:{block.line}", block.code.split("\n")[0], partial(run_block, block, folder)


def _timed(place: str, what: str, run: Step) -> dict[str, Any]:
    start = time.monotonic()
    said = run()
    seconds = round(time.monotonic() - start, 1)
    print(f"{seconds:7.1f} s  {'ok    ' if said is None else 'FAILED'}  {place}  {what}", flush=True)
    return {"place": place, "command": what, "seconds": seconds, "said": said}


def prepare(folder: Path, fresh: bool) -> None:
    """A clone of this repository's HEAD, with what a reader has: the picture `PICTURE`, and an environment if not `fresh`."""
    from PIL import Image

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    Image.open(ROOT / "docs" / "images" / "demo.png").convert("RGB").resize((320, 320)).save(folder / PICTURE)
    if fresh:
        return
    ready = (ROOT / ".venv" / ".ready").stat().st_mtime
    for name in (".venv", ".uv"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    # Else make would install into the environment that is linked here.
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (ready - 1, ready - 1))


def run_block(block: Block, folder: Path) -> str | None:
    """Run a block in a clone; None when it ended well, else the end of what it said."""
    code = filled_in(block.code, folder)
    command = ["bash", "-euo", "pipefail", "-c", code]
    if block.language == "python":
        command = [str(folder / ".venv" / "bin" / "python"), "-c", code]
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UNIDIFFUSER_STORE")}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code_ = process.wait(LIMIT)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
            raise
        printed.seek(0)
        said = printed.read()
    return None if code_ == 0 else f"{shlex.join(command)}\nended with {code_}:\n{said[-SHOWN:]}"


def filled_in(code: str, folder: Path) -> str:
    """The code with EXPORT, FILTER, ... replaced by the fingerprint of the newest dataset of that stage in the clone's store.

    Raises:
        SiteError: there is none yet.
    """

    def newest(found: re.Match[str]) -> str:
        stage = found[1].lower()
        manifests = [json.loads(path.read_text()) for path in (folder / "runs" / stage).glob("*/manifest.json")]
        if not manifests:
            raise SiteError(f"{found[1]} stands for a dataset of {stage}, and no command before has made one")
        return str(max(manifests, key=lambda manifest: manifest["created"])["fingerprint"])

    return re.sub(rf"\b({'|'.join(stage.upper() for stage in STAGES)})\b", newest, code)


def run_notebook(folder: Path) -> str | None:
    """Run the notebook in a clone; None when every cell ended well, else the traceback of the one that did not."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.read(folder / "docs" / "notebook.ipynb", as_version=4)
    try:
        NotebookClient(book, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    except CellExecutionError as error:
        return str(error)[-SHOWN:]
    return None


def _machine() -> str:
    import torch

    from benchmarks.frame import machine

    return machine(torch.device("cpu"))


def _keep(file: Path, steps: Sequence[Mapping[str, Any]], words: str) -> None:
    shown = [{name: value for name, value in step.items() if name != "said"} for step in steps]
    told = {
        "minutes": round(sum(step["seconds"] for step in steps) / 60, 1),
        "commands": len(steps),
        "steps": shown,
        "machine": words,
        "command": " ".join(["python -m website", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
