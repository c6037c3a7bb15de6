"""How much memory this machine has, and its GPUs; asked without importing what would use it."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

# What a container may use: of cgroups' second version, and of the first.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SECONDS = 5.0


def machine_bytes() -> int:
    """Memory of this machine, or what a container may have of it."""
    limits = [psutil.virtual_memory().total]
    for file in LIMITS:
        with suppress(OSError, ValueError):
            limits.append(int(file.read_text()))
    return min(limits)


def gpu_bytes() -> list[int]:
    """Memory of each GPU of this machine that `nvidia-smi` knows; none where there is no such program."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
        return [int(line) * 2**20 for line in said.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
