"""download against the img2dataset command: the same server on loopback, the same settings, the same rows.

First a healthy web: images per second of CPU time and peak memory, of one worker each. Then a web in which a tenth of the hosts
take connections and never answer: images per second on the clock. The sides take turns. Start-up counts for both, except that of
Ray's own servers, whose work counts but not their memory; img2dataset is spared torch, which it imports where it finds one. With
`--before REV` the stage of that commit takes its turns on the healthy web.

Then the stages without the peer: what a picture that EXIF turns costs over a plain one, and how busy a worker stays when each row
has a host of its own and 3% of these hang: its images per second on the clock over those of a web in which none does. A host that
hangs holds its row for two timeouts and a pause.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.before import ROOT, commit_of, worktree
from benchmarks.frame import Result, machine, progress
from tests.stages import hostile_web

SIZE = 256
PICTURES = 64
PATIENCE = 5.0
SETTINGS: dict[str, Any] = {"image_size": SIZE, "timeout": PATIENCE, "retries": 0, "threads": 64}
SHARD = 1000
# How busy a worker stays is measured with a second try, as recipes have it by default.
AGAIN = {**SETTINGS, "retries": 1}
HANGING = (7, 41, 78)
RAY_SERVERS = ("gcs_server", "raylet", "ray::IDLE", "ray/dashboard", "ray::DashboardAgent", "log_monitor.py", "runtime_env")


@dataclass(frozen=True)
class Spent:
    """What a run took: seconds of CPU and on the clock, MiB at its greatest, and the images that it brought."""

    cpu: float
    wall: float
    memory: float
    images: int


class Handler(hostile_web.Handler):
    """The tests' hostile web with pictures of photographs' size, on all of loopback; 127.0.2.x and 127.2.x.x never answer."""

    pictures: list[bytes] = []

    def do_GET(self) -> None:
        if self.connection.getsockname()[0].startswith(("127.0.2.", "127.2.")):
            time.sleep(60)
            return
        super().do_GET()

    def act(self, name: str) -> None:
        self.reply(200, self.pictures[int(name) % PICTURES], [("Content-Type", "image/jpeg")])


class Server(hostile_web.Server):
    request_queue_size = 512

    def verify_request(self, request: Any, client_address: Any) -> bool:
        # It listens on every interface, since no socket takes all of 127.0.0.0/8 alone.
        return client_address[0].startswith("127.")


def _serve(pipe: Any) -> None:
    Handler.pictures = [_picture(seed) for seed in range(PICTURES)]
    server = Server(("0.0.0.0", 0), Handler)
    pipe.send(server.server_port)
    server.serve_forever()


def _picture(seed: int) -> bytes:
    """A JPEG of 640 x 480 pixels and some 60 kB, as web photographs are."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC), [cv2.IMWRITE_JPEG_QUALITY, 85])[
        1
    ].tobytes()


@contextmanager
def web() -> Iterator[int]:
    """A server in a process of its own, so that its work is nobody's; gives its port."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def write_metadata(path: Path, port: int, rows: int, hanging: bool) -> None:
    """Rows over 100 hosts; every tenth of them hangs if `hanging`."""
    hosts = [f"127.0.{2 if hanging and n % 10 == 9 else 1}.{n + 1}:{port}" for n in range(100)]
    order = np.random.default_rng(0).permutation(rows)
    urls = [f"http://{hosts[n % 100]}/{n}" for n in order]
    pq.write_table(pa.table({"URL": urls, "TEXT": [f"picture {n}" for n in order]}), path)


def write_scattered(path: Path, port: int, rows: int, hanging: bool) -> int:
    """Rows with a host each, of which three in a hundred hang if `hanging`; gives how many do not."""
    silent = [hanging and n % 100 in HANGING for n in range(rows)]
    urls = [f"http://127.{2 if silent[n] else 1}.{n // 250}.{n % 250 + 1}:{port}/{n}" for n in range(rows)]
    pq.write_table(pa.table({"URL": urls, "TEXT": [f"picture {n}" for n in range(rows)]}), path)
    return rows - sum(silent)


def peer(metadata: Path, folder: Path) -> Spent:
    """One run of the command."""
    hidden = folder / "hidden" / "torch"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('hidden', name='torch')")
    options = {
        "url_list": metadata, "input_format": "parquet", "url_col": "URL", "caption_col": "TEXT", "output_format": "webdataset",
        "output_folder": folder / "out", "processes_count": 1, "thread_count": SETTINGS["threads"], "image_size": SIZE,
        "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "skip_reencode": True, "number_sample_per_shard": SHARD,
        "timeout": int(PATIENCE), "retries": SETTINGS["retries"], "enable_wandb": False,
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("img2dataset")), *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "PYTHONPATH": str(hidden.parent), "NO_ALBUMENTATIONS_UPDATE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watch = Watch(process.pid)
    process.wait()
    wall = time.perf_counter() - start
    watch.end()
    images = sum(json.loads(path.read_text())["successes"] for path in (folder / "out").glob("*_stats.json"))
    return Spent(watch.cpu(), wall, watch.memory, images)


def ours(metadata: Path, folder: Path, settings: dict[str, Any] = SETTINGS, root: Path = ROOT) -> Spent:
    """One run of the stage, of the code in `root`, on a Ray of its own, which is up before the clock starts."""
    command = [sys.executable, "-m", "benchmarks.download_side", str(metadata), str(folder), json.dumps(settings)]
    log, environment = folder / "log", {**os.environ, "PYTHONPATH": str(root)}
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root, env=environment)
        watch = Watch(process.pid, servers=RAY_SERVERS)
        assert process.stdout is not None
        found = {}
        for line in process.stdout:
            if line.startswith("ready"):
                watch.start_counting()
            elif line.startswith("{"):
                found = json.loads(line)
                watch.end()
    if process.wait() or not found:
        raise SystemExit(f"the stage failed:\n{log.read_text()[-2000:]}")
    return Spent(watch.cpu(), found["wall"], watch.memory, found["images"])


class Watch:
    """Looks at a process and all below it ten times a second.

    Attributes:
        memory: the greatest sum of their proportional set sizes in MiB, without those whose command line names one of `servers`.
    """

    def __init__(self, pid: int, servers: tuple[str, ...] = ()):
        self.root, self.servers = psutil.Process(pid), servers
        self.memory = 0.0
        self.seconds: dict[int, float] = {}
        self.before: dict[int, float] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def start_counting(self) -> None:
        """What was spent so far does not count."""
        self._look()
        self.before, self.memory = dict(self.seconds), 0.0

    def cpu(self) -> float:
        """Seconds of user and system time of all processes that were there."""
        return sum(seconds - self.before.get(pid, 0.0) for pid, seconds in self.seconds.items())

    def end(self) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            self._look()

    def _look(self) -> None:
        memory = 0.0
        with suppress(psutil.Error):
            for process in [self.root, *self.root.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self.seconds[process.pid] = times.user + times.system
                    if not any(name in " ".join(process.cmdline()) for name in self.servers):
                        memory += process.memory_full_info().pss / 2**20
        self.memory = max(self.memory, memory)


def compare(rows: int, hanging: bool, rounds: int, roots: dict[str, Path]) -> dict[str, list[Spent]]:
    """Each commit's stage and the peer `rounds` times, every other round in reverse order."""
    found: dict[str, list[Spent]] = {name: [] for name in (*roots, "img2dataset")}
    expected = rows - (rows // 10 if hanging else 0)
    with web() as port, tempfile.TemporaryDirectory() as scratch:
        metadata = Path(scratch, "metadata.parquet")
        write_metadata(metadata, port, rows, hanging)
        for number in range(rounds):
            for name in list(found) if number % 2 == 0 else list(reversed(found)):
                with tempfile.TemporaryDirectory() as folder:
                    spent = ours(metadata, Path(folder), root=roots[name]) if name in roots else peer(metadata, Path(folder))
                if spent.images != expected:
                    raise SystemExit(f"{name} brought {spent.images} of {expected} images; is the machine too busy?")
                found[name].append(spent)
                progress(f"round {number + 1} of {rounds}, {'hanging' if hanging else 'healthy'}: {name} {spent}")
    return found


def busy(rows: int, rounds: int, roots: dict[str, Path]) -> dict[str, dict[str, list[Spent]]]:
    """Of each commit the runs without and with hosts that hang, in turns."""
    found: dict[str, dict[str, list[Spent]]] = {name: {"healthy": [], "hanging": []} for name in roots}
    with web() as port, tempfile.TemporaryDirectory() as scratch:
        metadata = Path(scratch, "metadata.parquet")
        for number in range(rounds):
            for name in list(roots) if number % 2 == 0 else list(reversed(roots)):
                for kind, runs in found[name].items():
                    expected = write_scattered(metadata, port, rows, kind == "hanging")
                    with tempfile.TemporaryDirectory() as folder:
                        spent = ours(metadata, Path(folder), AGAIN, roots[name])
                    if spent.images != expected:
                        raise SystemExit(f"{name} brought {spent.images} of {expected} images; is the machine too busy?")
                    runs.append(spent)
                    progress(f"round {number + 1} of {rounds}, a host a row, {kind}: {name} {spent}")
    return found


def how_busy(runs: dict[str, list[Spent]]) -> float:
    rates = {kind: median(spent.images / spent.wall for spent in spents) for kind, spents in runs.items()}
    return rates["hanging"] / rates["healthy"]


def turned(root: Path) -> dict[str, Any]:
    """What `benchmarks.download_turned` finds in the code of a commit."""
    # Not by its path, beside which `select` is another module than Python's.
    command = [sys.executable, "-c", (ROOT / "benchmarks" / "download_turned.py").read_text(), "20"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    return json.loads(found.stdout)


def main(
    rows: Annotated[int, typer.Option(min=100, help="Rows of the healthy web.")] = 4000,
    hanging_rows: Annotated[int, typer.Option(min=100, help="Rows of the web in which hosts hang.")] = 4000,
    scattered_rows: Annotated[int, typer.Option(min=SHARD, max=60_000, help="Rows of the web with a host a row.")] = 16_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often the sides take turns.")] = 3,
    before: Annotated[str, typer.Option(help="Measure the stage of this commit too.", metavar="REV")] = "",
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Images per CPU-second and memory on a healthy web, images per second where a tenth of the hosts hang."""
    words = machine(torch.device("cpu"))
    with ExitStack() as stack:
        roots = {"ours": ROOT} | ({"before": stack.enter_context(worktree(before))} if before else {})
        healthy, hanging = compare(rows, False, rounds, roots), compare(hanging_rows, True, rounds, {"ours": ROOT})
        scattered = busy(scattered_rows, max(1, rounds // 2), roots)
        turns = {name: turned(root) for name, root in roots.items()}
    rates = {name: median(spent.images / spent.cpu for spent in runs) for name, runs in healthy.items()}
    clock = {name: median(spent.images / spent.wall for spent in runs) for name, runs in hanging.items()}
    memory = {name: max(spent.memory for spent in runs) for name, runs in healthy.items()}
    if len({found["sha256"] for found in turns.values()}) != 1:
        raise SystemExit("the commits store other bytes of a turned picture")
    figures: dict[str, float | int | str] = {
        "images_per_cpu_second": rates["ours"],
        "peer_images_per_cpu_second": rates["img2dataset"],
        "memory_mib": memory["ours"],
        "peer_memory_mib": memory["img2dataset"],
        "hanging_ratio": clock["ours"] / clock["img2dataset"],
    }
    if before:
        figures["before_images_per_cpu_second"] = rates["before"]
        figures["before_memory_mib"] = memory["before"]
    for name in roots:
        prefix = "" if name == "ours" else "before_"
        figures[f"{prefix}turned_over_plain"] = turns[name]["ratio"]
        figures[f"{prefix}busy_with_hanging"] = how_busy(scattered[name])
    details = {
        kind: {name: [asdict(spent) for spent in runs] for name, runs in found.items()}
        for kind, found in (("healthy", healthy), ("hanging", hanging))
    }
    details |= {
        f"scattered_{name}": {kind: [asdict(spent) for spent in spents] for kind, spents in runs.items()}
        for name, runs in scattered.items()
    }
    commits = {"commit": commit_of()} | ({"before": commit_of(before)} if before else {})
    settings = {"settings": SETTINGS, "scattered_settings": AGAIN}
    ratio = rates["ours"] / rates["img2dataset"]
    Result("download", ratio, "img2dataset", figures, words, {**commits, **settings, "turned": turns, **details}).finish(file)


if __name__ == "__main__":
    typer.run(main)
