"""What a program takes in all: memory and processor time of its whole process tree, watched from outside."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.before import ROOT

EVERY = 0.25


@dataclass
class Watch:
    """Runs a command and looks at its processes several times a second.

    Attributes:
        group: a process -> the name of the group that it counts to.
        peak: group -> greatest memory at one moment in MiB, memory that several processes share counted once (PSS).
        cpu: group -> processor seconds of its processes.
    """

    group: Callable[[psutil.Process], str]
    peak: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    def run(self, command: list[str], root: Path = ROOT) -> str:
        """What the command prints, which runs with the code of `root`: so do its processes, and Ray's workers.

        Raises:
            RuntimeError: it failed; the message is its last words.
        """
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root, env=environment
        )
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(psutil.Process(process.pid), ended))
        watcher.start()
        printed, _ = process.communicate()
        ended.set()
        watcher.join()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {printed[-2000:]}")
        return printed

    def _watch(self, root: psutil.Process, ended: threading.Event) -> None:
        used: dict[tuple[int, float], tuple[str, float]] = {}
        while not ended.wait(EVERY):
            now: dict[str, float] = {}
            with suppress(psutil.Error):
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        times, name = process.cpu_times(), self.group(process)
                        used[process.pid, process.create_time()] = (name, times.user + times.system)
                        now[name] = now.get(name, 0.0) + process.memory_full_info().pss / 2**20
            self.peak = {name: max(self.peak.get(name, 0.0), now.get(name, 0.0)) for name in {*self.peak, *now}}
        for name, seconds in used.values():
            self.cpu[name] = self.cpu.get(name, 0.0) + seconds
