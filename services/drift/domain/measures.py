"""The measures of drift and of decay, each NaN where it is undefined."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from causemesh.errors import Misdeclared
from services.drift.domain.histograms import Floats, Ints

Bools = npt.NDArray[np.bool_]


def psi(reference_counts: Ints, current_counts: Ints) -> float:
    """The population stability index of two histograms over the same bins.

    sum over bins of (p - q) ln(p / q), from 0 up (Siddiqi, Credit Risk Scorecards, 2006; the
    symmetric divergence of Jeffreys, 1946). A share is smoothed as p = (c / C + a) / (1 + k a)
    for k bins: Laplace's add-one (Manning et al., Introduction to Information Retrieval, eq. 13.7)
    with one pseudo-record a bin in the smaller sample and the same share, a = 1 / min(C, R), in
    the larger, so that proportional counts measure 0 whatever their totals.
    Raises Misdeclared when the numbers of bins differ.
    """
    if len(reference_counts) != len(current_counts):
        raise Misdeclared(
            f"{len(current_counts)} bins cannot be compared with {len(reference_counts)}: count "
            "with the edges of the version's own reference"
        )
    reference, current = int(reference_counts.sum()), int(current_counts.sum())
    if not reference or not current:
        return math.nan
    pseudo = 1 / min(reference, current)
    scale = 1 + len(reference_counts) * pseudo
    p = (current_counts / current + pseudo) / scale
    q = (reference_counts / reference + pseudo) / scale
    return float(np.sum((p - q) * np.log(p / q)))


def auc(scores: Floats, labels: Bools) -> float:
    """The share of (positive, negative) pairs that the scores order rightly, a tie being half.

    The area under the ROC curve as Mann and Whitney's U / (P N), from ranks in which equal scores
    share their mean rank. NaN when there is only one class.
    """
    positives = int(np.count_nonzero(labels))
    negatives = len(labels) - positives
    if not positives or not negatives:
        return math.nan
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    # twice the mean rank of each distinct score: whole numbers, so no sum is rounded
    twice_ranks = 2 * np.cumsum(ties) - ties + 1
    twice_u = int(twice_ranks[place][labels].sum()) - positives * (positives + 1)
    return twice_u / (2 * positives * negatives)


def accuracy(scores: Floats, labels: Bools, threshold: float = 0.5) -> float:
    """The share of labels equal to `score >= threshold`."""
    return float(np.mean((scores >= threshold) == labels)) if len(labels) else math.nan


def label_coverage(labelled: int, predicted: int) -> float:
    """The share of predictions whose label has arrived."""
    return labelled / predicted if predicted else math.nan
