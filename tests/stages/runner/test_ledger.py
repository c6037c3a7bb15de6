"""The ledger of a node's chains: who writes first decides, and the newest step is found."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from infra.entries import stages_in
from infra.store import Store, StoreError
from stages.runner.chain import unit_key
from stages.runner.contract import Job, scratch_output
from stages.runner.ledger import Entry, Head, Ledger, Parent


def entry(base: str, created: str = "1", parent: Parent | None = None) -> Entry:
    key = (base * 24)[:24]
    return Entry(base=base, key=key, root="", version=1, config={}, inputs={}, created=created, parent=parent)


def grow(store: Store, chain: Entry, *steps: int) -> Job:
    job = Job(store, "count", "toy", None, {}, {}, {})
    for step in steps:
        with scratch_output(store) as out:
            out.path("value").write_text("v")
            out.publish(job, unit_key(chain.key, step), "step", 0.0)
    return job


@pytest.mark.parametrize("kind", ["local", "object"])
def test_who_enters_a_chain_first_decides_where_it_began(tmp_path: Path, kind: str) -> None:
    store = Store(str(tmp_path) if kind == "local" else f"memory://{uuid4().hex}")
    ledger = Ledger(store, "count", "r", "toy")
    assert ledger.entries() == [] and ledger.entry("a") is None
    parent = Parent(node="toy", chain="b" * 24, step=3, begins=3, keep=("weights",))
    first = ledger.enter(entry("a", "1", parent))
    assert first.parent == parent and ledger.enter(entry("a", "2")) == first == ledger.entry("a")
    # Another node or recipe has a line of its own, and a line is no stage.
    assert Ledger(store, "count", "other", "toy").entries() == [] == Ledger(store, "count", "r", "other").entries()
    assert stages_in(store) == []
    store.write(f"{ledger.folder}/a.json", b"{}")
    with pytest.raises(StoreError, match="chains/count/r/toy/a.json: no record of a chain; delete the file and run again"):
        ledger.entries()


def test_the_newest_step_is_that_of_the_chain_that_grew_last(store: Store) -> None:
    ledger = Ledger(store, "count", "r", "toy")
    old, fork, empty = entry("a"), entry("b", "2"), entry("c", "3")
    job = grow(store, old, 5, 9)
    assert ledger.head(job) is None
    for each in (old, fork, empty):
        ledger.enter(each)
    grow(store, fork, 7)

    def head() -> tuple[str, int]:
        found = ledger.head(job)
        assert isinstance(found, Head)
        return found.entry.base, found.step

    assert head() == ("a", 9), "the furthest, while nobody has said which grew last"
    ledger.grows("b")
    assert head() == ("b", 7)
    ledger.grows("c")
    assert head() == ("a", 9), "it has no step yet"
    found = ledger.head(job)
    assert found is not None and ledger.at(job, 7, found).entry == fork  # type: ignore[union-attr]
    assert ledger.at(job, 6, found) is None


def test_a_step_is_looked_for_in_the_line_of_the_newest_first(store: Store) -> None:
    ledger = Ledger(store, "count", "r", "toy")
    root = entry("a", "1")
    fork = entry("b", "2", Parent(node="toy", chain=root.key, step=5, begins=5, keep=()))
    aside = entry("c", "3")
    for each in (root, fork, aside):
        ledger.enter(each)
    job = grow(store, root, 5)
    grow(store, fork, 8)
    grow(store, aside, 5)
    ledger.grows("b")
    head = ledger.head(job)
    assert head is not None and ledger.at(job, 5, head).entry == root  # type: ignore[union-attr]
