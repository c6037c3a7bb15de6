"""How far drawn pictures are from real ones, as distributions of features: FID, KID, CMMD, precision and recall."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from stages.measuring.measure import DIGITS, Figure, Measure, Result
from stages.measuring.networks import judge_of
from stages.measuring.samples import Asked, Need, Network
from stages.runner.contract import StageError

if TYPE_CHECKING:
    from stages.measuring.view import View
    from stages.runner.contract import Output

# As many samples as Inception's features have dimensions: with fewer the covariance is not of full rank.
FID_SAMPLES = 2048
# The kernel of arXiv 2401.09603, its scale, and the CLIP that its figures are of.
CMMD_SIGMA, CMMD_SCALE, CMMD_CLIP = 10.0, 1000.0, "ViT-L-14-336/openai"
ROWS_AT_ONCE = 1024
FEATURES = "what sees the pictures: clip, which judges, or inception, over which the usual figures are"


class _OfPictures(Measure):
    """Compares drawn pictures with the held-out ones by a network's features."""

    features: Literal["clip", "inception"] = Field("clip", description=FEATURES)
    count: int | None = Field(None, ge=2, description="pictures; as many as the evaluation has captions when not given")

    @property
    def network(self) -> Network:
        return "inception" if self.features == "inception" else "clip-image"

    def needs(self, asked: Asked) -> list[Need]:
        if not asked.pictures:
            raise StageError(f"measures: {self.kind} compares with real pictures, and prompts has no column image; leave it out")
        count = min(self.count or asked.count, asked.count)
        return [Need(asked.samples("t2i"), count, self.network), Need(None, count, self.network)]

    def both(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) of drawn and of real pictures."""
        drawn, real = self.needs(view.asked)
        return view.features(drawn), view.features(real)

    def figure(self, view: View, name: str, value: float, better: Any, samples: int, note: str = "") -> Figure:
        over_clip = self.features == "clip"
        by = f"clip {judge_of(view.job.config)}" if over_clip else "inception-v3 of torch-fidelity"
        return Figure(name + "_clip" * over_clip, round(value, DIGITS), better, samples, by, note)


class Fid(_OfPictures):
    """The Fréchet distance of two normal distributions with the features' means and covariances (arXiv 1706.08500)."""

    kind: Literal["fid"] = Field("fid", description="Fréchet distance of features of drawn and of real pictures")

    def result(self, view: View, out: Output) -> Result:
        drawn, real = self.both(view)
        return Result([self.figure(view, "fid", fid(drawn, real), "lower", len(drawn), fid_note(len(drawn)))])


class Kid(_OfPictures):
    """The squared maximum mean discrepancy under a cubic kernel, without bias (arXiv 1801.01401): mean over random subsets."""

    kind: Literal["kid"] = Field("kid", description="kernel distance of features of drawn and of real pictures")
    subsets: int = Field(100, ge=1, description="random subsets, over which it is the mean")
    subset: int = Field(1000, ge=2, description="pictures of a subset")

    def result(self, view: View, out: Output) -> Result:
        drawn, real = self.both(view)
        few = len(drawn) < self.subset
        note = f"of fewer than the {self.subset:,} samples of a subset: of all of them, once" if few else ""
        mean, deviation = kid(drawn, real, 1 if few else self.subsets, min(self.subset, len(drawn)), view.job.config.seed)
        figure = self.figure(view, "kid", mean, "lower", len(drawn), note)
        return Result([figure], {f"{figure.name}_deviation": round(deviation, DIGITS)})


class Cmmd(_OfPictures):
    """The squared maximum mean discrepancy of normalised CLIP embeddings under a Gaussian kernel (arXiv 2401.09603)."""

    kind: Literal["cmmd"] = Field("cmmd", description="kernel distance of normalised CLIP embeddings of both")
    features: Literal["clip"] = Field("clip", description="it is defined over CLIP")

    def result(self, view: View, out: Output) -> Result:
        drawn, real = self.both(view)
        judge = judge_of(view.job.config)
        note = "" if judge == CMMD_CLIP else f"the published figures are of {CMMD_CLIP}"
        return Result([Figure("cmmd", round(cmmd(drawn, real), DIGITS), "lower", len(drawn), f"clip {judge}", note)])


class PrecisionRecall(_OfPictures):
    """Improved precision and recall (arXiv 1904.06991): how much of what is drawn lies among the real, and the other way."""

    kind: Literal["precision-recall"] = Field(
        "precision-recall", description="share of drawn pictures among the real ones, and of real ones among the drawn"
    )
    neighbours: int = Field(3, ge=1, description="the k-th nearest of its own kind bounds what is near a picture")

    def result(self, view: View, out: Output) -> Result:
        drawn, real = self.both(view)
        if len(drawn) <= self.neighbours:
            fix = "raise count, or lower it"
            raise StageError(f"measures: precision-recall has {self.neighbours} neighbours and {len(drawn)} pictures; {fix}")
        precision, recall = precision_recall(drawn, real, self.neighbours)
        return Result(
            [
                self.figure(view, name, value, "higher", len(drawn))
                for name, value in (("precision", precision), ("recall", recall))
            ]
        )


def fid_note(samples: int) -> str:
    """What is to be said beside an FID of so many samples."""
    return f"of fewer than {FID_SAMPLES:,} samples: not comparable with others" if samples < FID_SAMPLES else ""


def fid(drawn: np.ndarray, real: np.ndarray) -> float:
    """Of features (n, D) and (m, D)."""
    import torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    both = (fid_features_to_statistics(torch.from_numpy(values).double()) for values in (drawn, real))
    # Rounding makes of 0 a little less.
    return max(0.0, float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID]))


def kid(drawn: np.ndarray, real: np.ndarray, subsets: int, subset: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over subsets drawn by a seed."""
    import torch
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(drawn).double(), torch.from_numpy(real).double(), kid_subsets=subsets, kid_subset_size=subset,
        rng_seed=seed, verbose=False,
    )  # fmt: skip
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


def cmmd(drawn: np.ndarray, real: np.ndarray) -> float:
    """As the authors' code: means over all pairs, those of a picture with itself included, times a thousand."""
    first, second = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (drawn, real))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for rows in _in_parts(a):
            # Of unit vectors: |x - y|^2 = 2 - 2 x.y
            total += float(np.exp((rows @ b.T - 1.0) / CMMD_SIGMA**2).sum(dtype=np.float64))
        return total / (len(a) * len(b))

    first, second = first.astype(np.float64), second.astype(np.float64)
    return CMMD_SCALE * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))


def _in_parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[at : at + ROWS_AT_ONCE] for at in range(0, len(rows), ROWS_AT_ONCE))


def precision_recall(drawn: np.ndarray, real: np.ndarray, neighbours: int) -> tuple[float, float]:
    import torch
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        torch.from_numpy(drawn), torch.from_numpy(real), prc_neighborhood=neighbours, prc_batch_size=ROWS_AT_ONCE,
        save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])
