"""Harmless stand-ins for decoders that crash or stall and for CLIP's preprocessing, and a box of a test's own."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from stages.shards import box
from stages.shards.stored import Stored, Storing

FATAL, SLOW = b"fatal", b"slow"


def does(data: bytes) -> bytes:
    """As the bytes say."""
    if FATAL in data:
        os._exit(3)
    while SLOW in data:
        pass
    return data[::-1]


def waits(data: bytes) -> int:
    time.sleep(float(data))
    return os.getpid()


def takes_memory(data: bytes) -> int:
    """Fills eight arrays of a megabyte, as a picture's may be; the pages that the process has asked the kernel for so far."""
    arrays = [np.ones(1_000_000, np.uint8) for _ in range(8)]
    del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Fragile(Storing):
    """A decoder that some pictures end, and others keep busy."""

    def __call__(self, data: bytes) -> Stored:
        does(data)
        return super().__call__(data)


class MeanColour:
    """Shows a picture as one pixel; children of the box need no torch for it."""

    def seen(self, image: Image.Image) -> np.ndarray:
        return (np.asarray(image).reshape(-1, 3).mean(0) / 255 + 0.01)[None, None]


@contextmanager
def own_children(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    """Children that may compute for so many seconds; they are gone afterwards."""
    with monkeypatch.context() as patch:
        patch.setattr(box, "CPU_SECONDS", seconds)
        patch.setattr(box, "_idle", idle := [])
        yield
    while idle:
        idle.pop().ended()
