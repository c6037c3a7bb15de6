"""The parts of the mutants' count that decide by themselves: places, lines, tests within a time, and who killed."""

import textwrap
from pathlib import Path

import pytest
from cosmic_ray.work_item import TestOutcome as Outcome
from cosmic_ray.work_item import WorkerOutcome, WorkResult

from tests.mutants.cover import Covered
from tests.mutants.sample import mutated, sample
from tests.mutants.session import killer

SOURCE = textwrap.dedent(
    """
    from __future__ import annotations

    LIMIT = 3


    def over(value: int | None, limit: int = LIMIT) -> bool | None:
        if value is None:
            return None
        return bool(
            value
            > limit
        )
    """
).lstrip()


@pytest.fixture
def covered() -> Covered:
    found = Covered(Path("nothing was collected"))
    found.lines["room/file.py"] = {3: {"imports"}, 6: {"imports"}, 7: {"a", "b"}, 8: {"a"}, 9: {"b"}, 11: {"b"}}
    return found


def test_a_sample_has_no_annotations_and_is_the_same_for_a_seed(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "file.py").write_text(SOURCE)
    places = {mutation.start_pos for mutation in sample(tmp_path, ("room",), 100, seed=0)}
    assert places == {(3, 8), (7, 7), (7, 13), (9, 4), (11, 8)} & places
    assert (3, 8) in places and not any(line == 6 for line, _ in places)

    few = [sample(tmp_path, ("room",), 2, seed) for seed in (1, 1, 2, 3, 4)]
    assert few[0] == few[1] and any(other != few[0] for other in few[2:])
    for mutation in few[0]:
        assert mutated(mutation, SOURCE) != SOURCE


def test_tests_of_a_line(covered: Covered) -> None:
    assert covered.at("room/file.py", 7, 7, SOURCE) == {"a", "b"}
    assert covered.at("room/file.py", 8, 8, SOURCE) == {"a"}
    # A line of a longer statement, of which only another line was seen.
    assert covered.at("room/file.py", 10, 10, SOURCE) == {"b"}
    # What runs at import decides for all that use the file.
    assert covered.at("room/file.py", 3, 3, SOURCE) == covered.at("room/file.py", 6, 6, SOURCE) == {"imports", "a", "b"}
    assert covered.at("room/other.py", 7, 7, SOURCE) == set()


def test_a_shared_fixture_is_paid_once(covered: Covered) -> None:
    covered.seconds = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 20.0}
    covered.fixtures = {"a": {"server": 30.0}, "b": {"server": 30.0}, "c": {}, "d": {}}
    assert covered.within(["a", "b", "c", "d"], 33.5) == ["a", "b", "c"]
    assert covered.within(["a", "b", "c", "d"], 30.5) == ["c", "d"]
    assert covered.within(["a", "d"], 10.0) == ["d"] and covered.within([], 10.0) == []


def test_who_killed() -> None:
    def result(output: str, outcome: Outcome = Outcome.KILLED) -> WorkResult:
        return WorkResult(WorkerOutcome.NORMAL, output, outcome)

    failed = "....F\n=== short test summary info ===\nFAILED tests/a.py::test_it[one two] - AssertionError: x\n1 failed"
    assert killer(result(failed)) == "tests/a.py::test_it[one two]"
    assert killer(result("ERROR tests/a.py\n1 error")) == "tests/a.py"
    assert killer(result("timeout")) is None
    assert killer(result(failed, Outcome.SURVIVED)) is None
