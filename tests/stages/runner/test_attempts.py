"""What the pool decides, without Ray: which unit is next, when it is tried again, set aside, too slow; what fits a cluster."""

from __future__ import annotations

import pytest

from stages.runner.attempts import (
    ASIDE,
    ATTEMPTS,
    KNOWN_FROM,
    LEAST_LIMIT,
    LEAST_SLOW,
    LONGEST_PAUSE,
    OVERTIME,
    PAUSES,
    SLOW,
    Attempts,
)
from stages.runner.cluster import Cluster
from stages.runner.contract import Resources, Unit


def attempts(count: int, alive: set[str] | None = None, rows: int = 10) -> Attempts:
    units = [(Unit(f"n{number}", (), rows=rows), f"key-{number}") for number in range(count)]
    return Attempts(iter(units), count, lambda: alive if alive is not None else {"here"})


def taken(units: Attempts, now: float = 0.0) -> str | None:
    attempt = units.next(now)
    return attempt and attempt.unit.name


def test_units_come_in_their_order_and_what_is_to_be_tried_again_comes_first_once_its_pause_is_over():
    units = attempts(3)
    first = units.next(0.0)
    assert first is not None and first.unit.name == "n0"
    assert units.failed(first, 100.0, "503") == PAUSES[0]
    assert taken(units, 100.0) == "n1" and units.waiting == 2
    assert units.next(100.0 + PAUSES[0]) is first
    assert taken(units, 200.0) == "n2" and taken(units, 200.0) is None and units.waiting == 0 and not units.over


def test_a_unit_that_fails_every_time_is_set_aside_and_the_others_are_done():
    units, now, tries, done = attempts(3), 0.0, 0, []
    while not units.over:
        now += 1.0
        attempt = units.next(now)
        if attempt is None:
            continue
        if attempt.unit.name == "n1":
            tries += 1
            units.failed(attempt, now, f"try {tries}")
        else:
            units.done(attempt, 1.0)
            done.append(attempt.unit.name)
    assert (tries, done) == (ATTEMPTS, ["n0", "n2"])
    (aside,) = units.aside
    assert (aside.unit.name, aside.reason) == ("n1", f"try {ATTEMPTS}")
    assert sum(PAUSES) > 30 and now > sum(PAUSES), "a store that is away for half a minute costs no unit"


def test_the_death_of_a_node_never_counts_and_that_of_a_worker_does():
    alive = {"here"}
    for node, ends in (("gone", False), ("here", True)):
        units, now = attempts(1, alive), 0.0
        tries = 0
        while not units.over and tries < 50:
            tries += 1
            attempt = units.next(now)
            assert attempt is not None
            pause = units.died(attempt, now, node, "it died", RuntimeError())
            assert pause is not None and pause <= LONGEST_PAUSE and taken(units, now + pause - 0.1) is None
            now += pause
            units.judge(now - 0.1)
            assert not units.aside, "its node may yet be found dead"
            units.judge(now)
        assert (tries, len(units.aside)) == ((ATTEMPTS, 1) if ends else (50, 0))


def test_a_node_that_is_only_found_dead_after_its_worker_does_not_count():
    alive = {"here", "there"}
    units, now = attempts(1, alive), 0.0
    for _ in range(ATTEMPTS):
        attempt = units.next(now)
        assert attempt is not None
        now += units.died(attempt, now, "there", "it died", RuntimeError()) or 0.0
    alive.remove("there")
    units.judge(now)
    assert units.next(now) is attempt and not units.aside


def test_the_cluster_is_asked_which_nodes_live_only_where_that_decides():
    asked: list[float] = []
    units, now = attempts(50), 0.0
    units._alive = lambda: asked.append(now) or {"here"}
    for number in range(50):
        attempt = units.next(now)
        assert attempt is not None
        units.failed(attempt, now, "503") if number % 2 else units.died(attempt, now, "here", "it died", RuntimeError())
    now = 100.0
    units.judge(now)
    assert not asked
    while not units.aside:
        attempt = units.next(now)
        assert attempt is not None
        units.failed(attempt, now, "503")
        now += 100.0
    assert len(asked) == 1


def test_lost_contact_never_counts():
    units, now = attempts(1), 0.0
    for _ in range(20):
        attempt = units.next(now)
        assert attempt is not None
        now += units.contact_lost(attempt, now) or 0.0
    assert now < 20 * LONGEST_PAUSE and not units.aside


def test_when_so_many_fail_that_it_is_not_the_units_the_rest_is_not_tried():
    units, now = attempts(200), 0.0
    while not units.hopeless:
        now += 1000.0
        attempt = units.next(now)
        assert attempt is not None
        units.failed(attempt, now, "no such bucket")
    assert len(units.aside) == ASIDE + 1 and units.waiting == 200 - len(units.aside)


def known(units: Attempts, seconds: float, count: int = KNOWN_FROM) -> None:
    for _ in range(count):
        attempt = units.next(0.0)
        assert attempt is not None
        units.done(attempt, seconds)


def test_the_limit_of_a_unit_is_chosen_from_the_median_and_from_its_rows():
    units = attempts(100)
    known(units, 100.0, KNOWN_FROM - 1)
    assert units.limit(Unit("x", (), rows=10)) is None
    known(units, 7000.0, 1)
    assert units.limit(Unit("x", (), rows=10)) == OVERTIME * 100.0
    assert units.limit(Unit("x", (), rows=30)) == OVERTIME * 300.0
    assert units.limit(Unit("x", (), rows=1)) == OVERTIME * 100.0
    known(units, 0.01, 50)
    assert units.limit(Unit("x", (), rows=10)) == LEAST_LIMIT


def test_the_slowest_unit_gets_one_copy_and_the_first_to_end_decides():
    units = attempts(KNOWN_FROM + 3)
    known(units, 100.0)
    quick, slow, slower = (units.next(0.0) for _ in range(3))
    assert quick and slow and slower
    late = SLOW * 100.0 + 1
    since = {quick: late, slow: 10.0, slower: 0.0}
    assert units.slow(since, SLOW * 100.0) is None
    assert units.slow(since, late + 20) is slower
    units.copy(slower)
    assert units.slow(since, late + 20) is slow, "it has a copy already"
    assert units.failed(slower, late, "503") is None and slower.failed == 0, "the other is still at it"
    units.done(slower, 300.0)
    assert not units.waiting and not units.over
    fast = attempts(KNOWN_FROM + 1)
    known(fast, 0.01)
    begun = fast.next(0.0)
    assert begun and fast.slow({begun: 0.0}, LEAST_SLOW - 1) is None and fast.slow({begun: 0.0}, LEAST_SLOW + 1) is begun


HEAD, SMALL, LARGE, GPUS = {"memory": 1e9}, {"CPU": 2.0}, {"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "asked", "fits"),
    [
        ([HEAD], Resources(), 0),
        ([SMALL, SMALL, SMALL], Resources(4.0), 0),
        ([SMALL, LARGE], Resources(1.5), 6),
        ([SMALL, GPUS, GPUS], Resources(1.0, 1.0), 4),
        ([LARGE, GPUS], Resources(3.0, 1.0), 1),
        ([SMALL], Resources(0.1), 20),
        ([LARGE | {"memory": 5e9}], Resources(1.0, memory=2e9), 2),
    ],
)
def test_a_worker_fits_whole_on_one_node(nodes, asked, fits):
    assert Cluster(dict(enumerate(nodes)), {}).fits(asked) == fits


def test_a_worker_asks_for_no_more_than_the_largest_node_has():
    def capped(*nodes, asked):
        return Cluster(dict(enumerate(nodes)), {}).capped(asked)

    assert capped(HEAD, SMALL, SMALL, asked=Resources(4.0)) == Resources(2.0)
    assert capped(SMALL, LARGE, asked=Resources(4.0)) == Resources(4.0)
    assert capped(LARGE, GPUS, asked=Resources(6.0, 1.0)) == Resources(4.0, 1.0), "of those that have its GPU"
    assert capped(HEAD, asked=Resources(4.0)) == Resources(4.0), "nobody knows what will come"
    assert capped(SMALL | {"memory": 1e9}, asked=Resources(memory=2e9)) == Resources(memory=1e9)
    assert capped(HEAD, SMALL | {"memory": 5e8}, asked=Resources(memory=1e9)) == Resources(memory=5e8), "a head takes no work"
    roomy, busy = SMALL | {"memory": 8e9}, LARGE | {"memory": 1e9}
    assert capped(roomy, busy, asked=Resources(4.0, memory=2e9)) == Resources(2.0, memory=2e9), "all of it on one node"


@pytest.mark.parametrize(
    ("nodes", "free", "asked", "why"),
    [
        ([HEAD], {}, Resources(), "a worker takes 1 CPUs, and no node of the cluster takes work; add one"),
        ([], {}, Resources(), "a worker takes 1 CPUs, and no node of the cluster takes work; add one"),
        ([SMALL, LARGE], {"CPU": 0.5}, Resources(), "a worker takes 1 CPUs, and of 10 CPUs only 0.5 CPUs are free"),
        (
            [LARGE, GPUS], {"CPU": 8.0}, Resources(1.0, 1.0),
            "a worker takes 1 CPUs and 1 GPUs, and of 12 CPUs and 2 GPUs only 8 CPUs are free",
        ),
        ([LARGE], {}, Resources(1.0, 1.0), "a worker takes 1 CPUs and 1 GPUs, and the largest node has 8 CPUs; add a larger one"),
    ],
)  # fmt: skip
def test_why_a_worker_has_no_place_is_said(nodes, free, asked, why):
    assert Cluster(dict(enumerate(nodes)), free).why_not(asked) == why


def test_a_worker_that_names_its_machines_is_on_those_alone():
    cpu, gpu = LARGE | {"cpu-machine": 1.0}, GPUS | {"gpu-machine": 1.0}
    cluster = Cluster({"head": HEAD, "a": cpu, "b": gpu}, {})
    assert cluster.fits(Resources(1.0)) == 12 and cluster.fits(Resources(1.0, machines="cpu-machine")) == 8
    assert cluster.fits(Resources(1.0, 1.0, machines="cpu-machine")) == 0
    assert cluster.capped(Resources(6.0, machines="gpu-machine")).cpus == 4.0, "the larger machine is of the other kind"
    lonely = Cluster({"head": HEAD, "a": cpu}, {}).why_not(Resources(machines="gpu-machine"))
    assert lonely == "a worker takes 1 CPUs, and no node with the resource gpu-machine takes work; add one"
