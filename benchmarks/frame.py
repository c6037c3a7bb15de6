"""What all benchmarks share: sides that take turns, peak memory in a process of its own, the machine in words, one last line."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Figure = float | int | str


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        ratio: how many times the peer's rate, the one number to look at.
        figures: what is shown beside it on the last line.
        details: everything else that is worth keeping.
    """

    name: str
    ratio: float
    peer: str
    figures: Mapping[str, Figure]
    machine: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """``NAME ratio=1.42 peer=NAME figure=value ...``, without spaces in values."""
        shown = {"ratio": self.ratio, "peer": self.peer, **self.figures}
        return " ".join([self.name, *(f"{name}={_short(value)}" for name, value in shown.items())])

    def finish(self, file: Path | None) -> None:
        """Write the result as JSON if there is a file, with the command and the day, and print the last line."""
        if file is not None:
            command = " ".join(["python -m", f"benchmarks.{self.name}", *sys.argv[1:]])
            record = {**asdict(self), "command": command, "date": datetime.date.today().isoformat()}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record, indent=2) + "\n")
        print(self.line())


def _short(value: Figure) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "_")


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds that each side took in each round.

    In a round all sides run once; every other round in reverse order, so that a machine that slows down slows all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            seconds[name].append(timed(sides[name], device))
            progress(f"round {number + 1} of {rounds}: {name} {seconds[name][-1]:.2f} s")
    return seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall time."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def peak_in_child(prepare: Callable[..., Callable[[], object]], *args: Any) -> float:
    """Peak memory in MiB of a piece of work in a process of its own.

    Args:
        prepare: called with ``args`` in the new process; it gives the work, and what it holds by then counts. A function of a
            module, so that the new process finds it; the last of ``args`` is the device.

    Returns:
        Resident memory on a CPU (Linux), allocated memory on a GPU.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, torch.get_num_threads(), prepare, args).result()


def _peak(threads: int, prepare: Callable[..., Callable[[], object]], args: tuple) -> float:
    torch.set_num_threads(threads)
    device: torch.device = args[-1]
    work = prepare(*args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: loading is not what is measured
    work()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where it is found."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def machine(device: torch.device) -> str:
    """The machine in words: cores, memory, accelerator, versions, threads, and how busy it was before."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    return (
        f"{os.cpu_count()} cores ({_processor()}), {math.ceil(memory)} GiB memory, {gpu}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
