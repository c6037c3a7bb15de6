"""A method of invisible-watermark, in an environment of its own: `watermark_side.py METHOD FOLDER embed|read`.

`embed` marks NNNN.png of the folder with its line of bits.json, as METHOD-NNNN.png. `read` reads METHOD-NNNN-CHANGE.png, and
tells for each change the share of pictures with all bits right and the mean share of right bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
from imwatermark import WatermarkDecoder, WatermarkEncoder  # type: ignore[import-not-found]

# What the decoder refuses is counted as chance.
CHANCE = 0.5


def embed(method: str, folder: Path, bits: list[list[int]]) -> None:
    for number, each in enumerate(bits):
        encoder = WatermarkEncoder()
        encoder.set_watermark("bits", each)
        marked = encoder.encode(cv2.imread(str(folder / f"{number:04d}.png")), method)
        cv2.imwrite(str(folder / f"{method}-{number:04d}.png"), marked)


def read(method: str, folder: Path, bits: list[list[int]]) -> dict[str, dict[str, float]]:
    right: dict[str, list[float]] = {}
    for number, each in enumerate(bits):
        for path in sorted(folder.glob(f"{method}-{number:04d}-*.png")):
            try:
                found = np.asarray(WatermarkDecoder("bits", len(each)).decode(cv2.imread(str(path)), method), int)
                share = float((found == np.array(each)).mean())
            except RuntimeError:
                share = CHANCE
            right.setdefault(path.stem.split("-", 2)[2], []).append(share)
    survived = {name: sum(share == 1 for share in shares) / len(shares) for name, shares in right.items()}
    return {"survived": survived, "bits_right": {name: sum(shares) / len(shares) for name, shares in right.items()}}


if __name__ == "__main__":
    method, folder, task = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    bits = json.loads((folder / "bits.json").read_text())
    if task == "embed":
        embed(method, folder, bits)
    else:
        print(json.dumps(read(method, folder, bits)))
