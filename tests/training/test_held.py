"""Which held-out rows a validation looks at."""

from __future__ import annotations

import numpy as np
import pytest

from training.held import shared_out, spread


def looked_at(held: list[int], file: list[int], inputs: list[int], wanted: int) -> list[list[int]]:
    """Numbers of the rows of each shard, from 0 in the shard."""
    chosen = spread(*(np.array(numbers, dtype=np.int64) for numbers in (held, file, inputs)), wanted)
    shard = np.repeat(np.array(file), held)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    first = {number: np.flatnonzero(shard == number)[0] for number in set(shard.tolist())}
    return [[int(row - first[number]) for row in chosen if shard[row] == number] for number in range(len(inputs))]


def test_every_shard_gives_its_first_rows() -> None:
    assert looked_at([3, 2, 4, 1, 0, 9], [0, 0, 1, 2, 3, 4], [0] * 5, 10) == [[0, 1, 2], [0, 1, 2], [0], [], [0, 1, 2]]
    assert looked_at([2, 1], [0, 1], [0, 0], 100) == [[0, 1], [0]]
    assert looked_at([], [], [0, 0], 7) == [[], []]


def test_a_small_input_is_looked_at_as_much_as_a_large_one() -> None:
    found = looked_at([5] * 22, list(range(22)), [0] * 20 + [1] * 2, 8)
    assert [number for number, rows in enumerate(found) if rows] == [0, 5, 10, 15, 20, 21]
    assert [len(rows) for rows in found if rows] == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("wanted", [0, 1, 3, 17, 40, 10**6])
def test_all_give_alike_or_all_that_they_have(wanted: int) -> None:
    have = np.random.default_rng(wanted).integers(0, 9, 12)
    taken = shared_out(have, wanted)
    assert taken.sum() == min(wanted, have.sum()) and (taken <= have).all()
    generous = taken[taken < have]
    assert taken.max() <= min(generous, default=taken.max()) + 1
