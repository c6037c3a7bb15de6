"""BLEU-4 and CIDEr: equal to what the usual code gives, and to what one computes by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu

from stages.measuring.captions import Captions, bleu4, cider
from stages.measuring.samples import Asked, Samples
from stages.runner.contract import StageError

WRITTEN = ["a red apple on a table", "a dog runs over the green grass", "two birds", "the the the cat"]
PEOPLE = [
    ["a red apple lies on a wooden table", "an apple on a table"],
    ["a dog runs on grass", "a brown dog is running over the green grass", "dog"],
    ["two small birds on a wire"],
    ["the cat sits", "a cat on the mat"],
]


def test_bleu_is_that_of_sacrebleu_with_all_references() -> None:
    streams = [[texts[n] if n < len(texts) else None for texts in PEOPLE] for n in range(3)]
    score, signature = bleu4(WRITTEN, PEOPLE)
    assert score == pytest.approx(sacrebleu.corpus_bleu(WRITTEN, streams).score) and "nrefs:var" in signature  # type: ignore[arg-type]
    assert bleu4(WRITTEN, [[text] for text in WRITTEN])[0] == pytest.approx(100)


def test_cider_is_that_of_the_evaluation_of_ms_cocos_captions() -> None:
    # By pycocoevalcap 1.2's Cider().compute_score, on these words.
    assert cider(WRITTEN, PEOPLE) == pytest.approx(2.5138354837776045, abs=1e-12)
    assert cider(["A red, apple on a table!", *WRITTEN[1:]], PEOPLE) == pytest.approx(cider(WRITTEN, PEOPLE))


def test_cider_is_what_one_computes_by_hand() -> None:
    """Two pictures with a reference of two words each: every n-gram is of one of them alone, and weighs log 2."""
    # "a b" for "a b": both words and their bigram are as there, so 1 + 1 of four lengths; "c e" for "c d": one word of two.
    half = (math.log(2) ** 2) / (math.sqrt(math.log(2) ** 2 + math.log(2) ** 2) ** 2)
    assert cider(["a b", "c e"], [["a b"], ["c d"]]) == pytest.approx(10 * ((1 + 1) / 4 + half / 4) / 2)
    # Four words too many: two bigrams of the reference's one, and a Gaussian of the difference.
    longer = cider(["a b x y z w", "c d"], [["a b"], ["c d"]])
    words = 2 * math.log(2) ** 2 / (math.sqrt(6) * math.log(2) * math.sqrt(2) * math.log(2))
    pair = math.log(2) ** 2 / (math.sqrt(5) * math.log(2) * math.log(2))
    assert longer == pytest.approx(10 * (math.exp(-(4**2) / (2 * 6**2)) * (words + pair) / 4 + (1 + 1) / 4) / 2)


def test_captions_need_pictures() -> None:
    way = Samples("t2i", 20, 3.0, "dpm++2m", beams=5)
    (need,) = Captions(count=9).needs(Asked(20, True, way))
    assert need.samples is not None and (need.samples.task, need.samples.beams, need.count, need.network) == ("i2t", 5, 9, None)
    with pytest.raises(StageError, match="captions are written for real pictures, and prompts has no column image; leave it out"):
        Captions().needs(Asked(20, False, way))
