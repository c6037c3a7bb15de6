"""A recipe that real Ray and Prefect run in seconds: two selects on Parquet files of our own, one of which must fail; a browser.

Set SCREENSHOTS to a folder to renew the pictures of the documentation there.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

from infra.prefect_server import credential
from infra.processes import MARK, recorded

ROWS = 60
# A secret that is nobody's, in the environment of a run: it must stand in nothing that the run writes.
PLANTED = "pl4nted-and-nobodys"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 90_000  # milliseconds


def write_metadata(path: Path, first: int = 0) -> None:
    """`ROWS` rows of LAION's schema, 100 to 690 pixels wide in steps of 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + ROWS)
    table = {
        "URL": [f"http://pictures.example/{n}.png" for n in numbers],
        "TEXT": [f"picture number {n}" for n in numbers],
        "WIDTH": [100 + 10 * (n - first) for n in numbers],
        "HEIGHT": [640] * ROWS,
        "similarity": [0.3] * ROWS,
    }
    pq.write_table(pa.table(table), path)


def write_recipe(folder: Path) -> Path:
    """The recipe `tiny`: `good-select` keeps the 44 of 60 rows that are at least 256 wide; `bad-select` has no URL column."""
    write_metadata(folder / "metadata" / "part-0.parquet")
    pq.write_table(pa.table({"link": ["x"], "TEXT": ["y"]}), folder / "no-url.parquet")
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        "name: tiny\n"
        "subsets:\n"
        "  good: {select: {metadata: [metadata/*.parquet], min_width: 256}}\n"
        "  bad: {select: {metadata: [no-url.parquet]}, download: {}}\n"
    )
    return recipe


@dataclass
class Command:
    """A running `unidiffuser`, with what it has printed so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read_until(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"the command ended without saying {text!r}:\n{''.join(self.lines)}")

    def finish(self, signal_number: int | None = None) -> tuple[int, str]:
        if signal_number is not None:
            # To the command's whole process group, as a terminal does.
            os.killpg(self.process.pid, signal_number)
        rest, _ = self.process.communicate(timeout=1800)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode, "".join(self.lines)


def start(*arguments: str | Path, **more: str) -> Command:
    """`unidiffuser` in an environment without Prefect's and Ray's variables, and with `more`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    # Nothing of a test opens on the desktop of whoever runs it.
    environment["BROWSER"] = "true"
    command = [sys.executable, "-m", "pipelines.command", *map(str, arguments)]
    return Command(
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **more},
            cwd="/",
            start_new_session=True,
        )  # fmt: skip
    )


def ask(store: Path | str, method: str, path: str, body: Any = None) -> Any:
    """What the Prefect API of a store's servers answers to one who is let in."""
    server = recorded("prefect", Path(store, ".state"))
    assert server is not None and server.token is not None, "no Prefect server is up"
    headers = {"Authorization": f"Basic {base64.b64encode(server.token.encode()).decode()}", "Content-Type": "application/json"}

    def send(method: str, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(f"{server.address}/api/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read() or b"null")

    if method != "GET":
        headers |= {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": send("GET", "csrf-token?client=tests", None)["token"]}
    return send(method, path, None if body is None else json.dumps(body).encode())


def sign_in(page: Any, store: Path | str) -> None:
    """Open the link of `unidiffuser ui` in the browser."""
    code, printed = start("ui", "--store", store).finish()
    assert code == 0, printed
    page.goto(printed.splitlines()[0])
    see_dashboard(page)


def see_dashboard(page: Any) -> None:
    """Wait for what only one who is signed in is shown; the browser needs that moment to keep the sign-in for the next page."""
    page.locator("main").get_by_text("Dashboard").first.wait_for()


def survivors(store: Path) -> list[psutil.Process]:
    """Processes that the servers of a store's commands left."""
    mark, found = str((store / ".state").resolve()), []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Kept:
    """The first run of `tiny`, whose servers were kept up; `of_it` filters what the server has of other tests' runs."""

    store: Path
    recipe: Path
    command: Command
    address: str
    of_it: dict[str, Any]

    def settings(self) -> dict[Any, Any]:
        """For Prefect's client in this process."""
        return {PREFECT_API_URL: f"{self.address}/api", PREFECT_API_AUTH_STRING: credential(self.store / ".state")}

    def close(self) -> tuple[int, str]:
        return self.command.finish(signal.SIGINT)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("tiny")
    recipe, store = write_recipe(folder), folder / "store"
    # Nothing listens there: its own servers are asked without a proxy.
    proxies = dict.fromkeys(["http_proxy", "https_proxy", "ALL_PROXY"], f"http://me:{PLANTED}@127.0.0.1:9")
    secrets = dict.fromkeys(["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY"], PLANTED)
    command = start("run", recipe, "--store", store, "--keep", **proxies, **secrets)
    try:
        line = command.read_until("This run in the Prefect UI: ")
        command.read_until("Ctrl-C stops the servers.")
        address, _, run = line.split(": ", 1)[1].strip().partition("/v2/runs/flow-run/")
        yield Kept(store, recipe, command, address, {"flow_runs": {"id": {"any_": [run]}}})
    finally:
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGINT)
            command.process.wait(timeout=60)
        deadline = time.monotonic() + 10
        while (left := survivors(store)) and time.monotonic() < deadline:
            for process in left:
                process.kill()


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of a browser; only where `CHROMIUM` is one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def picture(page: Any, name: str, height: int = 1000) -> None:
    """Renew a picture of the documentation, if asked to; `height` leaves out what is below."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(2000)
        page.screenshot(path=Path(folder, f"{name}.png"), clip={"x": 0, "y": 0, "width": 1400, "height": height})
