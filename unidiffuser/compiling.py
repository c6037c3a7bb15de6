"""Whether torch.compile can work here: it calls a compiler that it does not bring along."""

from __future__ import annotations

import os
import shutil

import torch


def find_compiler(device: torch.device) -> str | None:
    """The program that torch.compile calls for code on this device, a C++ compiler for a CPU and a C compiler for a GPU; None
    where there is none."""
    names = [os.environ.get("CXX", "g++"), "clang++"] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    return next((name for name in names if shutil.which(name)), None)
