"""img2dataset's downloader, imported without torch and wandb."""

from __future__ import annotations

import os
from types import ModuleType

from unidiffuser.imports import hidden

# img2dataset imports albumentations, which asks its server for a newer version, and takes torch (0.5 GB, 2 s of a core) where it
# finds it, for conversions that are never made. And it imports wandb, which it is not asked to use: that makes folders in /tmp,
# which stay when a worker is killed, as all are in the end.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
with hidden({"torch": None, "wandb": ModuleType("wandb")}):
    from img2dataset.downloader import Downloader as Downloader
