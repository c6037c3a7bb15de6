"""Fifty pictures for a namer, who sees them and the world's words and nothing else, and the score of what was named.

`python -m examples.little_web.naming draw CHECKPOINT FOLDER` draws a picture for each of 50 held-out captions. They are chosen
and numbered by a fixed seed, there is one of each, and none is drawn again.

    FOLDER/pictures/NN.png, sheet.png   what the namer sees
    FOLDER/words.md                     the words to choose from, and how to write them down
    FOLDER/captions.csv                 the truth, which nobody opens before the names are written

`python -m examples.little_web.naming score FOLDER NAMES.csv...` compares the names of one namer or more with the truth.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from examples.little_web.compose import Scene, all_scenes, caption
from examples.little_web.judge import PARTS, agreement

COUNT = 50
SEED = 20260
COLUMNS = ("number", *PARTS)
_ACROSS, _CELL = 10, 160


class NamesError(Exception):
    """A table of names that cannot be scored; one line."""


def chosen() -> list[tuple[Scene, str]]:
    """The scenes and their captions, in the order of their numbers, 1 to `COUNT`."""
    rng = random.Random(SEED)
    picked = rng.sample([scene for scene in all_scenes() if scene.held_out], COUNT)
    return [(scene, caption(scene, rng)) for scene in picked]


def draw(checkpoint: str, folder: Path, **sampling: Any) -> None:
    """Draw all pictures with one checkpoint and write the folder.

    Args:
        checkpoint, sampling: as `UniDiffuser.load` and `UniDiffuser.generate` take them.

    Raises:
        FileExistsError: the folder has pictures, which stay as they were drawn first.
    """
    from unidiffuser import UniDiffuser

    if (folder / "pictures").exists():
        raise FileExistsError(f"{folder}: has pictures; none is drawn again, so name another folder")
    scenes = chosen()
    prompts, seeds = [text for _, text in scenes], [SEED + number for number in range(COUNT)]
    results = UniDiffuser.load(checkpoint).generate("t2i", prompts=prompts, seeds=seeds, **sampling)
    pictures = [result.image for result in results if result.image is not None]
    (folder / "pictures").mkdir(parents=True)
    for number, picture in enumerate(pictures, 1):
        picture.save(folder / "pictures" / f"{number:02d}.png")
    sheet(pictures).save(folder / "sheet.png")
    (folder / "words.md").write_text(_words(), encoding="utf-8")
    rows = [{"number": n, **{part: getattr(s, part) for part in PARTS}, "caption": c} for n, (s, c) in enumerate(scenes, 1)]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "caption"])
        writer.writeheader()
        writer.writerows(rows)


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures in one, each with its number above it."""
    rows = -(-len(pictures) // _ACROSS)
    whole = Image.new("RGB", (_ACROSS * (_CELL + 8), rows * (_CELL + 24)), "white")
    pen = ImageDraw.Draw(whole)
    for index, picture in enumerate(pictures):
        left, top = index % _ACROSS * (_CELL + 8) + 4, index // _ACROSS * (_CELL + 24) + 20
        pen.text((left, top - 16), str(index + 1), fill="black")
        whole.paste(picture.resize((_CELL, _CELL), Image.Resampling.LANCZOS), (left, top))
    return whole


def _words() -> str:
    lists = "".join(f"- **{part}**: {', '.join(words)}\n" for part, words in PARTS.items())
    example = ",".join(["1", *(words[0] for words in PARTS.values())])
    return (
        f"# Name {COUNT} pictures\n\nEach picture shows one drawing on a plain background. Write a row of each in a CSV file:\n\n"
        f"    {','.join(COLUMNS)}\n    {example}\n\nOnly these words count:\n\n{lists}"
    )


def read_names(file: Path) -> list[Scene]:
    """What a namer wrote, in the order of the numbers.

    Raises:
        NamesError: a row is missing or has a word that is not in the lists.
    """
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    found: dict[int, Scene] = {}
    for line, row in enumerate(rows, 2):
        for part, words in PARTS.items():
            if row.get(part) not in words:
                raise NamesError(f"{file}: line {line}, column {part}: {row.get(part)!r} is not one of {', '.join(words)}")
        found[int(row["number"])] = Scene(row["drawing"], row["size"], row["place"], row["background"])
    if missing := [number for number in range(1, COUNT + 1) if number not in found]:
        raise NamesError(f"{file}: no row with number {missing[0]}; {COUNT} pictures were shown")
    return [found[number] for number in range(1, COUNT + 1)]


def score(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    """How many of the pictures each namer named right, all four parts of it, and the lowest of these counts.

    Raises:
        NamesError: see `read_names`.
    """
    truth = read_names(folder / "captions.csv")
    namers = {}
    for file in files:
        shares = agreement(read_names(file), truth)
        namers[file.stem] = {name: round(COUNT * share) for name, share in shares.items()}
    return {"named_of_50": min(counts["all_four"] for counts in namers.values()), "namers": namers}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.little_web.naming", description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    drawing = what.add_parser("draw", help="draw the pictures")
    drawing.add_argument("checkpoint")
    drawing.add_argument("folder", type=Path)
    drawing.add_argument("--steps", type=int, default=25)
    drawing.add_argument("--guidance", type=float, default=3.0)
    drawing.add_argument("--sampler", default="dpm++2m-sde")
    scoring = what.add_parser("score", help="compare names with the truth")
    scoring.add_argument("folder", type=Path)
    scoring.add_argument("names", type=Path, nargs="+")
    arguments = vars(parser.parse_args())
    try:
        if arguments.pop("what") == "draw":
            draw(arguments.pop("checkpoint"), **arguments)
        else:
            print(json.dumps(score(arguments["folder"], arguments["names"]), indent=1))
    except (NamesError, FileExistsError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
