"""Numbers about a run: how far apart the nodes are, how fast they agree. Arrays in, numbers out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

BLOCK_ELEMENTS = 2**20  # of one float64 working block (8 MiB), so that memory does not grow with n * P
ROUNDOFF = 1e-12  # of the first distance: below, rounding is measured and not mixing


class Summary(TypedDict):
    mean: float
    min: float
    max: float


def summary_of(values: Iterable[float]) -> Summary:
    """Mean (exactly rounded, so independent of the order), least and greatest; ValueError for no values."""
    numbers = list(values)
    if not numbers:
        raise ValueError("there is nothing to sum up")
    return {"mean": math.fsum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}


def consensus_distance(vectors: npt.NDArray[np.float32 | np.float64]) -> float:
    """sqrt(1/n sum_i ||x_i - mean||^2) of `vectors` (n, P), float32 or float64: 0 where all nodes agree.

    Computed in float64, in blocks of columns; `vectors` may be memory-mapped. ValueError for no vectors.
    """
    n, size = vectors.shape
    if n == 0:
        raise ValueError("there are no vectors to compare")
    step = max(1, BLOCK_ELEMENTS // n)
    total = 0.0
    for start in range(0, size, step):
        block = vectors[:, start : start + step].astype(np.float64)
        block -= block.mean(axis=0)
        total += float(np.vdot(block, block))
    return math.sqrt(total / n)


def contraction_rate(distances: Sequence[float]) -> float | None:
    """The factor by which a series of distances shrinks per round, as geometric mean: (d_t / d_0)^(1/t).

    Compare it with lambda2 of the graph, which bounds it where nothing but averaging happens. The series counts up to
    its first value that is zero, not finite, or only rounding (ROUNDOFF of the first). 0.0 if it falls there at once,
    None if there are not two distances to compare.
    """
    if len(distances) < 2 or not (math.isfinite(distances[0]) and distances[0] > 0):
        return None
    floor = ROUNDOFF * distances[0]
    counted = list(itertools.takewhile(lambda d: math.isfinite(d) and d > floor, distances))
    rounds = len(counted) - 1
    if rounds == 0:
        return 0.0 if math.isfinite(distances[1]) else None
    return math.exp(math.log(counted[-1] / counted[0]) / rounds)
