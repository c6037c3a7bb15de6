"""How near written captions are to those of people: BLEU-4 and CIDEr."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.measuring.measure import DIGITS, Figure, Measure, Result
from stages.measuring.samples import Asked, Need
from stages.runner.contract import StageError

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

# CIDEr-D (arXiv 1411.5726): n-grams up to this length, the width of the penalty for another length, and its scale.
LONGEST, SIGMA, SCALE = 4, 6.0, 10.0
WORD = re.compile(r"\w+(?:['’]\w+)*")
Grams = Counter[tuple[str, ...]]


class Captions(Measure):
    """BLEU-4 by sacrebleu, 0 to 100, and CIDEr-D as the evaluation of MS-COCO's captions computes it, 0 to 10.

    Of captions written for held-out pictures, against all that people have written of each.
    """

    kind: Literal["captions"] = Field("captions", description="BLEU-4 and CIDEr of captions written for real pictures")
    count: int | None = Field(None, ge=2, description="captions; as many as the evaluation has when not given")

    def needs(self, asked: Asked) -> list[Need]:
        if not asked.pictures:
            raise StageError("measures: captions are written for real pictures, and prompts has no column image; leave it out")
        return [Need(asked.samples("i2t"), min(self.count or asked.count, asked.count))]

    def result(self, view: View, out: Output) -> Result:
        (need,) = self.needs(view.asked)
        written, references = view.captions(need.samples, need.count), view.references(need.count)
        score, signature = bleu4(written, references)
        figures = [
            Figure("bleu4", round(score, DIGITS), "higher", need.count, "sacrebleu"),
            Figure("cider", round(cider(written, references), DIGITS), "higher", need.count),
        ]
        return Result(figures, {"sacrebleu": signature})


def bleu4(written: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """The score, and what sacrebleu says of how it was computed."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    # It wants the first reference of all, then the second of all; None where a caption has fewer.
    score = metric.corpus_score(list(written), [list(each) for each in zip_longest(*references)])
    return float(score.score), str(metric.get_signature())


def cider(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, with the document frequencies of these references.

    Words are runs of letters and digits in lower case.
    """
    found = [_grams(text) for text in written]
    wanted = [[_grams(text) for text in texts] for texts in references]
    seen = Counter(gram for texts in wanted for gram in set().union(*texts))
    documents = math.log(len(wanted))

    def weighed(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        """Counts times the inverse document frequency, by length of the n-gram."""
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            found[len(gram) - 1][gram] = count * (documents - math.log(max(1, seen[gram])))
        return found

    def alike(own: Grams, other: Grams) -> float:
        penalty = math.exp(-((_length(own) - _length(other)) ** 2) / (2 * SIGMA**2))
        return penalty * sum(map(_cosine, weighed(own), weighed(other))) / LONGEST

    scores = [sum(alike(own, other) for other in others) / len(others) for own, others in zip(found, wanted, strict=True)]
    return SCALE * sum(scores) / len(scores)


def _grams(text: str) -> Grams:
    words = WORD.findall(text.lower())
    return Counter(tuple(words[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(words) - n + 1))


def _length(grams: Grams) -> int:
    """In bigrams, as the authors count it."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _cosine(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """What is said more often than in the reference counts only as often as there."""
    norms = math.sqrt(sum(value**2 for value in own.values())) * math.sqrt(sum(value**2 for value in other.values()))
    shared = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
    return shared / norms if norms else 0.0
