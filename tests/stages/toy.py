"""Two small stages that show what the runner does: one with two phases of independent units, one that is a chain."""

import os
import time
from pathlib import Path

from pydantic import Field

from stages.runner.chain import Gang
from stages.runner.contract import NodeConfig, Phase, Resources, SetAside, Stage, StageError, Unit, operational, scratch_output
from stages.runner.graph import Planned
from stages.runner.ledger import Start


class SquaresConfig(NodeConfig):
    numbers: list[int] = [1, 2, 3]
    limit: int = Field(1000, ge=0)
    trap: str = operational("", "folder whose files make units die or fail")
    speed: int = operational(1, "changes nothing but the time")


class Square:
    def __init__(self, job):
        self.job = job
        trap = Path(job.config.trap, "built") if job.config.trap else None
        if trap and trap.exists():
            with trap.with_name("count").open("a") as file:
                file.write(".")
            raise {"stage": StageError, "bug": KeyError}[trap.read_text()]("no encoder")

    def run(self, unit, out):
        number = unit.payload["number"]
        trap = Path(self.job.config.trap, unit.name) if self.job.config.trap else None
        if trap and trap.exists():
            if trap.read_text() == "once":
                trap.unlink()
                raise OSError("503")
            if trap.read_text() == "aside":
                raise SetAside("nobody answers")
            left = int(trap.read_text())
            trap.write_text(str(left - 1))
            if left > 0:
                os._exit(1)
            if left < -99:
                raise MemoryError
            if left < 0:
                raise ValueError("number is cursed")
        out.path("square.txt", rows=1).write_text(f"{number * number}\n")
        out.path("again.txt", rows=0).write_text(f"{number}\n" * 3)
        out.stats.rows_in = out.stats.rows_out = 1
        out.notes["square"] = number * number


class Keep:
    def __init__(self, job):
        self.job = job

    def run(self, unit, out):
        out.stats.rows_in = 1
        if unit.payload["square"] > self.job.config.limit:
            out.stats.drop("over_limit")
            return
        out.path(f"{unit.name}.txt", rows=1).write_text(f"{unit.payload['square']}\n")
        out.stats.rows_out = 1


class Squares(Stage):
    name = "squares"
    version = 1
    Config = SquaresConfig
    phases = (
        Phase("square", lambda job, _: _units(job), worker=Square, fields=frozenset(), memory=("speed",)),
        Phase("keep", lambda job, records: _kept(records["square"]), worker=Keep, fields=frozenset({"limit"})),
    )


class Chained(Square):
    """Gives room when it has begun, and ends when the next unit has begun too; `early` appears if that was before.

    A second try waits for none: it is alone.
    """

    def run(self, unit, out):
        folder, last = Path(self.job.config.trap), unit.payload["number"] == self.job.config.numbers[-1]
        begun, following = folder / f"begun-{unit.name}", folder / f"begun-n{unit.payload['number'] + 1}"
        if not begun.exists():
            begun.touch()
            time.sleep(0.1)
            if following.exists():
                (folder / "early").touch()
            out.give_room()
            while not last and not following.exists():
                time.sleep(0.02)
        super().run(unit, out)


class Together(Squares):
    """Several units at once in one worker."""

    name = "together"
    phases = (
        Phase(
            "square", lambda job, _: _units(job), Chained, fields=frozenset(), resources=lambda _: Resources(workers=1), at_once=3
        ),
    )


def _units(job):
    return [Unit(f"n{number}", (str(number),), {"number": number}, rows=1) for number in job.config.numbers]


def _kept(records):
    return [Unit(r.name, tuple(f.sha256 for f in r.files), {"square": r.notes["square"]}) for r in records]


class CountConfig(NodeConfig):
    steps: int = 3
    die_at: int = operational(0, "step at which the gang dies, once")


def _count(chain):
    """Each unit holds one more than the one before it; goes on from the greatest that is there."""
    job = chain.job
    for value in range(chain.start(chain.done()) + 1, chain.end + 1):
        if value == job.config.die_at:
            raise RuntimeError("the gang died")
        with scratch_output(job.store) as out:
            out.path("value.txt", rows=1).write_text(f"{value}\n")
            out.stats.rows_in = out.stats.rows_out = 1
            out.notes["value"] = value
            out.publish(job, chain.key_of(value), f"step-{value}", time.process_time())


def _end(config, parent):
    return config.steps


def _even(_, steps):
    return [step for step in steps if step % 2 == 0]


class Count(Stage):
    name = "count"
    version = 1
    Config = CountConfig
    phases = (Phase("count", gang=Gang(_count, _end, lambda *_: Start(), _even), fields=frozenset()),)


def planned(stage, fingerprint="f" * 24, **fields):
    """A planned node of a toy stage, without a recipe around it."""
    config = stage.Config(**fields)
    return Planned("toys", f"toy-{stage.name}", stage.name, config, {}, {}, {}, {}, 0, fingerprint)
