"""What a JPEG that EXIF turns costs over a plain one, for `benchmarks.download`: prints it, and the sha256 of what is stored.

It imports no other benchmark, so that it can be run with the code of another commit.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from statistics import median

import numpy as np
from PIL import Image

from stages.shards.images import ImageConfig
from stages.shards.picture import ImageResizer

PIXELS = (1600, 1200)


def jpegs() -> dict[str, bytes]:
    """The same picture plain and turned, of some 400 kB."""
    coarse = np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(PIXELS, Image.Resampling.BICUBIC)
    turn = Image.Exif()
    turn[0x0112] = 6
    stored = {}
    for name, exif in (("plain", b""), ("turned", turn.tobytes())):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85, exif=exif)
        stored[name] = buffer.getvalue()
    return stored


def main(rounds: int) -> None:
    resizer = ImageResizer(ImageConfig(image_size=256))
    pictures = jpegs()
    seconds: dict[str, list[float]] = {name: [] for name in pictures}
    for _ in range(rounds):
        for name, data in pictures.items():
            # On the clock: the work is done in another process.
            start = time.perf_counter()
            stored = resizer(io.BytesIO(data))
            seconds[name].append(time.perf_counter() - start)
            assert stored[5] is None
    typical = {name: median(found) for name, found in seconds.items()}
    ratio, digest = typical["turned"] / typical["plain"], hashlib.sha256(stored[0]).hexdigest()
    print(json.dumps({"ratio": ratio, "milliseconds": {name: 1e3 * s for name, s in typical.items()}, "sha256": digest}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
