"""img2dataset's downloader, imported without torch."""

from __future__ import annotations

import os
import sys

# img2dataset imports albumentations, which asks its server for a newer version, and takes torch (0.5 GB, 2 s of a core) where it
# finds it, for conversions that are never made.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
_torch = sys.modules.get("torch")
sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from img2dataset.downloader import Downloader as Downloader
finally:
    del sys.modules["torch"]
    if _torch is not None:
        sys.modules["torch"] = _torch
