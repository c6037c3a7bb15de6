"""`python -m examples.little_web.folder FOLDER`: pictures with their captions beside them, as people keep their own."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from examples.little_web.compose import all_scenes, caption, render

# Endings as cameras, phones and websites write them.
ENDINGS = (".jpg", ".png", ".webp")


def write_folder(folder: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` pictures of the little web's scenes, none of them held out, as NAME.jpg with NAME.txt in folders by year.

    Raises:
        ValueError: there are not that many scenes.
    """
    rng = random.Random(seed)
    scenes = [scene for scene in all_scenes() if not scene.held_out]
    if not 1 <= count <= len(scenes):
        raise ValueError(f"count must be in 1 .. {len(scenes)}, not {count}")
    for number, scene in enumerate(rng.sample(scenes, count)):
        place = folder / str(2023 + number % 3)
        place.mkdir(parents=True, exist_ok=True)
        picture = render(scene, rng.randint(320, 480), rng.randint(320, 480))
        picture.save(place / f"IMG_{number:04}{ENDINGS[number % len(ENDINGS)]}")
        (place / f"IMG_{number:04}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.little_web.folder", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="pictures to write")
    arguments = parser.parse_args()
    try:
        write_folder(arguments.folder, arguments.count)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.count} pictures and their captions are in {arguments.folder}")


if __name__ == "__main__":
    main()
