"""The random numbers of the samples: against numpy's own generator, against the distributions, and against themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from training import draws


def test_words_are_those_of_numpys_philox_at_the_same_counters() -> None:
    seed, stream, each = 11, draws.TRAIN, 21  # 21 words of 32 bits: three counters of 256
    ours = draws.random_words(seed, stream, 5, 4, each)
    assert ours.shape == (4, 24)
    for row, place in zip(ours, range(5, 9), strict=True):
        numpys = np.random.Philox(key=[seed, 0], counter=[3 * place, stream, 0, 0]).random_raw(12)
        assert row.tobytes() == numpys.tobytes()


def test_a_counter_gives_what_philox_says() -> None:
    """Ten rounds written out with Python's integers; numpy counts up before it draws."""
    place, seed = 2**40 + 1, 2**62 + 3
    counter, key = [place + 1, draws.VALIDATION, 0, 0], [seed, 0]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            right >> 64 ^ counter[1] ^ key[0], right % 2**64, left >> 64 ^ counter[3] ^ key[1], left % 2**64,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    assert draws.random_words(seed, draws.VALIDATION, place, 1, 8).view(np.uint64)[0].tolist() == counter


def drawn(first: int, count: int, sizes: tuple[int, ...], seed: int = 3, stream: int = draws.TRAIN) -> list[np.ndarray]:
    outs = [np.full((count, size), np.nan, np.float32) for size in sizes]
    draws.fill_normal(seed, stream, first, outs)
    return outs


def test_normal_numbers_are_box_and_mullers_of_the_words() -> None:
    sizes = (6, 5, 1)
    words = draws.random_words(3, draws.TRAIN, 8, 2, 14).astype(np.float64)
    outs = drawn(8, 2, sizes)
    column = 0
    for size, out in zip(sizes, outs, strict=True):
        half = -(-size // 2)
        lengths, angles = words[:, column : column + half], words[:, column + half : column + 2 * half]
        radius = np.sqrt(-2 * np.log((lengths % 2**31 + 0.5) / 2**31))
        expected = np.concatenate([radius * np.cos(angles * math.pi / 2**31), radius * np.sin(angles * math.pi / 2**31)], 1)
        assert out == pytest.approx(expected[:, :size], abs=2e-6)
        column += 2 * half


def test_a_place_has_its_numbers_whatever_is_drawn_with_it() -> None:
    sizes = (4096, 4096, 512, 4929)
    whole = drawn(100, 40, sizes)  # several pieces of the size that is drawn at once
    for first, count in ((100, 1), (117, 3), (121, 19)):
        for part, out in zip(whole, drawn(first, count, sizes), strict=True):
            assert np.array_equal(part[first - 100 : first - 100 + count], out)
    others = (drawn(100, 40, sizes, seed=4), drawn(100, 40, sizes, stream=draws.VALIDATION), drawn(141, 40, sizes))
    for other in others:
        assert abs(np.corrcoef(whole[0].ravel(), other[0].ravel())[0, 1]) < 0.01


def test_normal_numbers_are_normal_and_independent() -> None:
    left, right = drawn(0, 400, (1000, 1000))
    numbers = np.concatenate([left, right]).ravel()
    assert stats.kstest(numbers, "norm").pvalue > 0.001
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(stats.norm.moment(2 * power) - moment**2)
        assert abs((numbers.astype(np.float64) ** power).mean() - moment) < 4 * spread / math.sqrt(numbers.size)
    assert np.abs(numbers).max() > 4.5
    # What comes from the same word, from neighbours in a row, and from neighbouring places.
    for a, b in ((left[:, :500], left[:, 500:]), (left[:, 1:], left[:, :-1]), (left[1:], left[:-1]), (left, right)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)
        assert abs(np.corrcoef(a.ravel() ** 2, b.ravel() ** 2)[0, 1]) < 4 / math.sqrt(a.size)
