#!/usr/bin/env bash
# imagehash 4.3.2, Pillow 13.0.0 (numpy 2.4.6, scipy 1.17.1)
# Behaviour: the perceptual hash (phash, 16 x 16 bits) of a picture made of bands differs in up to half of its bits between the
#   PNG and a WebP of quality 80. The cosine transform of such a picture is zero nearly everywhere; whether a coefficient lies
#   above the median is then noise of the encoding. The difference hash (dhash) of the same pictures hardly moves.
# Why it matters: near duplicates are looked for by such hashes, with tolerances of some bits that were measured on photographs.
#   Flags, signs and diagrams then stay in a training set once for every encoding that the web has of them.
# Seen: three bands 121 and 7 bits of 256, cross 84 and 3, two halves 119 and 7, photograph-like noise 2 and 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check imagehash==4.3.2 pillow==13.0.0 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import imagehash
import numpy as np
from PIL import Image, ImageDraw

three = Image.new("RGB", (256, 192), "white")
draw = ImageDraw.Draw(three)
draw.rectangle((0, 0, 255, 63), fill="#ae1c28")
draw.rectangle((0, 128, 255, 191), fill="#21468b")
cross = Image.new("RGB", (256, 192), "#006aa7")
draw = ImageDraw.Draw(cross)
draw.rectangle((80, 0, 111, 191), fill="#fecc02")
draw.rectangle((0, 80, 255, 111), fill="#fecc02")
halves = Image.new("RGB", (256, 192), "white")
ImageDraw.Draw(halves).rectangle((0, 96, 255, 191), fill="#dc143c")
blurred = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((256, 192))

found = {}
for name, picture in {"three bands": three, "cross": cross, "two halves": halves, "noise": blurred}.items():
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    copy = Image.open(file)
    found[name] = [int(kind(picture, 16) - kind(copy, 16)) for kind in (imagehash.phash, imagehash.dhash)]
    print(f"{name}: phash differs in {found[name][0]} bits of 256, dhash in {found[name][1]}")
flags = [found[name] for name in ("three bands", "cross", "two halves")]
same = all(phash >= 60 and dhash <= 12 for phash, dhash in flags) and max(found["noise"]) <= 16
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON
