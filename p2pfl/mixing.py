"""How the neighbours' vectors and the own one become one, and whether a received vector may take part at all.

A model is one flat float32 tensor of P elements. The functions walk over it in blocks: while a block is summed up it
stays in the processor's cache, and nothing of size P is allocated but a result. All tensors of a call are on one
device.

`fold` is the weighted mean of what came. The rules in `RULES` have one form, rule(vectors, weights, tolerate):

    vectors    (k, P), float32 or float64, all finite (see `check_vector`): row 0 is the own one, the others by name
    weights    (k,), floating, of sum 1: only mean and clip look at them; what is missing stays with the own vector
    tolerate   b: so many of the k - 1 others may be anything. ValueError where k < `least_vectors`

and give one vector (P,) of the same dtype, newly made. With symmetric weights, mean keeps the network's mean, and so
does clip with one radius for all. The other rules move it a little even where nobody lies, and for b >= 1 never mix
two cliques that agree in themselves and are joined by one edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from p2pfl.messages import BadMessage

Rule = Callable[[Tensor, Tensor, int], Tensor]
Comparison = Callable[[Tensor, Tensor], Tensor]  # of two tensors, the larger or the smaller elements

BLOCK = 2**20  # elements (4 MiB): measured fastest of 2^14 .. 2^20 for 100 MB vectors, twice as fast as whole passes
MAX_VALUE = 1e30  # no trained parameter comes near; up to here a weighted sum and a step stay below 3.4e38, the largest
PROBED, PROJECTIONS = 2**16, 32  # elements looked at, numbers that come of them
COLUMNS = 2**15  # elements of each vector, where k of them are compared: measured fastest of 2^13 .. 2^18 for 9 vectors
WEISZFELD_STEPS = 8  # measured: within 3e-4 of the least sum of distances in a plane, 1e-8 from 30 dimensions on
SMOOTHING = 1e-6  # of the usual distance: a vector nearer than that pulls no harder
NORM_FACTOR = 100.0  # a vector this many times longer than usual would drag the mean away: a fault, or an attack


def fold(own: Tensor, contributions: Sequence[tuple[str, float, Tensor]], name: str, out: Tensor) -> None:
    """out = w_own * own + sum_j w_j * vector_j, with w_own = 1 - sum_j w_j: what is missing stays with oneself.

    `contributions` are (peer, w_j, vector_j); `name` is the own node's. All vectors are flat float32 of one size. The
    terms are added in the order of all names, the own included, so that the result is the same bit for bit whatever the
    order of arrival. `out` may be `own` or any of the vectors themselves (not one that overlaps them elsewhere): a
    block is written after all of it was read. ValueError for two terms of one name and for vectors that differ in
    form.
    """
    own_weight = 1.0 - math.fsum(weight for _, weight, _ in contributions)
    terms = sorted([(name, own_weight, own), *contributions], key=lambda term: term[0])
    if len({term[0] for term in terms}) != len(terms):
        raise ValueError(f"two contributions of one name: {[term[0] for term in terms]}")
    for vector in (out, *(vector for _, _, vector in terms)):
        if vector.dtype != torch.float32 or vector.ndim != 1 or vector.shape != own.shape:
            raise ValueError(f"flat float32 of {own.numel()} elements expected, not {vector.dtype} {vector.shape}")

    _weighted_sum([weight for _, weight, _ in terms], [vector for *_, vector in terms], out)


def _weighted_sum(weights: Sequence[float], vectors: Sequence[Tensor], out: Tensor) -> Tensor:
    """out = sum_j w_j * vector_j, added in this order. A block of `out` is written after all of it was read."""
    scratch = out.new_empty(min(BLOCK, out.numel()))
    for start in range(0, out.numel(), BLOCK):
        target = out[start : start + BLOCK]
        total = scratch[: target.numel()]
        torch.mul(vectors[0][start : start + BLOCK], weights[0], out=total)
        for weight, vector in zip(weights[1:], vectors[1:], strict=True):
            total.add_(vector[start : start + BLOCK], alpha=weight)
        target.copy_(total)
    return out


# -- The rules -------------------------------------------------------------------------------------------------------


def least_vectors(rule: str, tolerate: int) -> int:
    """How many vectors, the own one included, `rule` needs for its result to mean anything with b = `tolerate`.

    Krum: 2b + 3 (Blanchard 2017). Clip: b + 2, one neighbour to measure by. The others: more than 2b + 1. A node that
    has fewer keeps its own vector.
    """
    match rule:
        case "mean":
            return 1
        case "clip":
            return tolerate + 2
        case "krum" | "multi-krum":
            return 2 * tolerate + 3
        case "trimmed-mean" | "median" | "geometric-median":
            return 2 * tolerate + 2
    raise ValueError(f"no rule is called {rule!r}")


def mean(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
    """sum_j w_j y_j, as `fold`, added in the order of the rows. A single lie moves it anywhere, whatever `tolerate`."""
    return _weighted_sum(weights.tolist(), vectors.unbind(), torch.empty_like(vectors[0]))


def clip(vectors: Tensor, weights: Tensor, tolerate: int, radius: float | None = None) -> Tensor:
    """Self-centred clipping: sum_j w_j (y_0 + d_j min(1, radius / ||d_j||)), d_j = y_j - y_0.

    ClippedGossip of He, Karimireddy & Jaggi (2022). Nobody moves the own vector by more than w_j * radius. If all nodes
    have the same `radius` and symmetric weights, their mean is kept, and a bottleneck is crossed. Without one, it is
    the distance to the (k - 1 - b)-th nearest neighbour, so that at most b are clipped. That fits as nodes come
    together, but it is 0 where that many neighbours agree with oneself: an end of a bridge between two cliques then
    never hears the other end. Give a `radius` there; `tolerate` is not looked at then.
    """
    distances = _distances(vectors[1:], vectors[0]).tolist()
    if radius is None:
        _check_count("clip", vectors, tolerate)
        radius = sorted(distances)[len(distances) - tolerate - 1]
    shares = [
        weight if distance <= radius else weight * radius / distance
        for weight, distance in zip(weights[1:].tolist(), distances, strict=True)
    ]
    return _weighted_sum([1.0 - math.fsum(shares), *shares], vectors.unbind(), torch.empty_like(vectors[0]))


def trimmed_mean(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
    """Of each element the mean of what remains without its b largest and b smallest values (Yin 2018)."""
    _check_count("trimmed-mean", vectors, tolerate)
    return _mean_of_middle(vectors, tolerate)


def median(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
    """Of each element the value in the middle; for even k the mean of the two in the middle (Yin 2018)."""
    _check_count("median", vectors, tolerate)
    return _mean_of_middle(vectors, (len(vectors) - 1) // 2)


def geometric_median(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
    """Nearly the z with the least sum_j ||y_j - z||_2: WEISZFELD_STEPS of smoothed Weiszfeld from the median.

    z <- sum_j c_j y_j / sum_j c_j, c_j = 1 / max(||y_j - z||, nu), nu = SMOOTHING * the median of the distances
    (Pillutla, Kakade & Harchaoui 2022). From the mean, which a lie may have moved anywhere, as many steps would not be
    enough.
    """
    _check_count("geometric-median", vectors, tolerate)
    point = _mean_of_middle(vectors, (len(vectors) - 1) // 2)
    for _ in range(WEISZFELD_STEPS):
        distances = _distances(vectors, point)
        usual = distances.median()
        if usual == 0:  # half of the vectors lie there: no other point is better
            break
        closeness = 1 / distances.clamp(min=SMOOTHING * usual)
        _weighted_sum((closeness / closeness.sum()).tolist(), vectors.unbind(), point)
    return point


def krum(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
    """The vector y_i with the least score: the sum of the k - b - 2 smallest ||y_i - y_j||^2, j != i (Blanchard 2017).

    Of equally good ones the first.
    """
    _check_count("krum", vectors, tolerate)
    return vectors[_krum_scores(vectors, tolerate).argmin()].clone()


def multi_krum(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
    """The mean of the k - b vectors with the least scores of Krum (Blanchard 2017)."""
    _check_count("multi-krum", vectors, tolerate)
    kept = len(vectors) - tolerate
    best = _krum_scores(vectors, tolerate).argsort(stable=True)[:kept].tolist()
    return _weighted_sum([1 / kept] * kept, [vectors[row] for row in sorted(best)], torch.empty_like(vectors[0]))


RULES: Mapping[str, Rule] = {
    "mean": mean,
    "clip": clip,
    "trimmed-mean": trimmed_mean,
    "median": median,
    "geometric-median": geometric_median,
    "krum": krum,
    "multi-krum": multi_krum,
}


def nearest_neighbour_mixing(vectors: Tensor, tolerate: int) -> Tensor:
    """Each of the vectors (k, P) replaced by the mean of its k - b nearest, itself among them; (k, P), newly made.

    Before any rule it draws the honest ones together, so that what the rule then cuts off is mostly lies, at any skew
    of the data (Allouah 2023). ValueError where k <= b.
    """
    kept = len(vectors) - tolerate
    if kept < 1:
        raise ValueError(f"of {len(vectors)} vectors, {tolerate} cannot be left out")
    squares = _squared_distances(vectors)
    nearest = squares.argsort(dim=1, stable=True)[:, :kept]
    shares = torch.zeros_like(squares).scatter_(1, nearest, 1 / kept)
    return shares.to(vectors) @ vectors


def _check_count(rule: str, vectors: Tensor, tolerate: int) -> None:
    least = least_vectors(rule, tolerate)
    if len(vectors) < least:
        raise ValueError(f"{rule} takes {least} vectors or more to tolerate {tolerate}, not {len(vectors)}")


def _mean_of_middle(vectors: Tensor, cut: int) -> Tensor:
    """Of each element the mean without its `cut` largest and `cut` smallest values; (P,).

    Whole rows are compared instead of sorting each column: 5 times as fast for 9 vectors.
    """
    out = torch.empty_like(vectors[0])
    for start in range(0, vectors.shape[1], COLUMNS):
        rows = vectors[:, start : start + COLUMNS].unbind()
        for _ in range(cut):
            rows = _without_outermost(rows, torch.maximum, torch.minimum)
            rows = _without_outermost(rows, torch.minimum, torch.maximum)
        torch.mean(torch.stack(rows), dim=0, out=out[start : start + COLUMNS])
    return out


def _without_outermost(rows: Sequence[Tensor], outer: Comparison, inner: Comparison) -> tuple[Tensor, ...]:
    """One row less: of each element the outermost value is left out."""
    outermost, *others = rows
    kept = []
    for row in others:
        kept.append(inner(outermost, row))
        outermost = outer(outermost, row)
    return tuple(kept)


def _krum_scores(vectors: Tensor, tolerate: int) -> Tensor:
    to_others = _squared_distances(vectors).fill_diagonal_(math.inf)
    return to_others.sort(dim=1).values[:, : len(vectors) - tolerate - 2].sum(dim=1)


def _distances(vectors: Tensor, point: Tensor) -> Tensor:
    """||vector_j - point||_2, (k,), float64 on the processor."""
    squares = torch.zeros(len(vectors), dtype=torch.float64)
    for start in range(0, point.numel(), COLUMNS):
        gaps = vectors[:, start : start + COLUMNS] - point[start : start + COLUMNS]
        squares += _wide(gaps).square().sum(dim=1).cpu()
    return squares.sqrt()


def _squared_distances(vectors: Tensor) -> Tensor:
    """||vector_i - vector_j||^2, (k, k), float64 on the processor; from differences.

    ||a||^2 + ||b||^2 - 2ab would lose all digits near consensus; squares of float32 overflow from 1.8e19 on.
    """
    count = len(vectors)
    condensed = torch.zeros(count * (count - 1) // 2, dtype=torch.float64)
    for start in range(0, vectors.shape[1], COLUMNS):
        condensed += torch.pdist(_wide(vectors[:, start : start + COLUMNS])).square().cpu()
    squares = torch.zeros(count, count, dtype=torch.float64)
    first, second = torch.triu_indices(count, count, offset=1)
    squares[first, second] = squares[second, first] = condensed
    return squares


def _wide(block: Tensor) -> Tensor:
    """In float64; on the processor where the device is Apple's GPU, which has none (not tested on one)."""
    return (block.cpu() if block.device.type == "mps" else block).double()


class Probe:
    """A few random projections of a vector, the same ones at every node: enough to see how far nodes are apart.

    Each is a sum of some of the elements with random signs. Mixing is linear, so it does to the projections of all
    nodes what it does to their vectors. At most PROBED elements are looked at, however long the vector; no element can
    be read off.
    """

    def __init__(self, size: int, random: np.random.Generator) -> None:
        """`size` of the vectors that will be probed; `random` from a seed that all nodes share."""
        kept = min(size, PROBED)
        self._elements = torch.from_numpy(np.sort(random.choice(size, kept, replace=False)))
        self._signs = torch.from_numpy(random.choice(np.array([-1.0, 1.0]), kept))
        self._group = torch.from_numpy(random.integers(PROJECTIONS, size=kept))
        self._matrix: Tensor | None = None  # (kept, PROJECTIONS), made when many vectors are probed at once

    def __call__(self, vector: Tensor) -> tuple[float, ...]:
        """PROJECTIONS numbers, summed in float64, of a flat float32 vector."""
        picked = vector.detach()[self._elements.to(vector.device)].cpu().double()
        sums = torch.zeros(PROJECTIONS, dtype=torch.float64).index_add_(0, self._group, picked * self._signs)
        return tuple(sums.tolist())

    def of_rows(self, vectors: Tensor) -> Tensor:
        """The same numbers of each row of (n, P): (n, PROJECTIONS), float64."""
        if self._matrix is None:
            self._matrix = torch.zeros(len(self._elements), PROJECTIONS, dtype=torch.float64)
            self._matrix[torch.arange(len(self._elements)), self._group] = self._signs
        whole = len(self._elements) == vectors.shape[1]
        sums = []
        for rows in torch.split(vectors.detach(), max(1, BLOCK // len(self._elements))):
            picked = rows if whole else rows[:, self._elements.to(rows.device)]
            sums.append(picked.cpu().double() @ self._matrix)
        return torch.cat(sums)


def distance_to_mean(own: Tensor, vectors: Sequence[Tensor]) -> float:
    """||own - mean(vectors)||_2, in float64 since near consensus it is far below the vectors' length; 0.0 for none."""
    if not vectors:
        return 0.0
    scratch = _wide_block(own)
    squares = []
    for start in range(0, own.numel(), BLOCK):
        block = own[start : start + BLOCK]
        gap = scratch[: block.numel()].copy_(block)
        for vector in vectors:
            gap.sub_(vector[start : start + BLOCK], alpha=1 / len(vectors))
        squares.append(torch.dot(gap, gap).item())
    return math.sqrt(math.fsum(squares))


def check_vector(vector: Tensor, typical_norm: float | None, mass: float = 1.0) -> float:
    """The L2 norm of a received vector (flat float32, at least one element), if it may be averaged.

    `mass`, > 0: the vector is a sum of models with weights that come to this, and it is their mean that counts.

    BadMessage "bad_value" for NaN, infinity, |value| > MAX_VALUE, and a norm above NORM_FACTOR * `typical_norm`.
    Without a typical norm (None, or 0.0) there is nothing to compare with. Zeros and denormals are numbers like others.
    """
    low, high = torch.aminmax(vector)  # NaN if there is any; 30 times cheaper than isfinite().all()
    largest = max(-low.item(), high.item())
    if not math.isfinite(low.item() + high.item()):
        raise BadMessage("bad_value", "the vector holds NaN or infinity")
    if largest > MAX_VALUE:
        raise BadMessage("bad_value", f"a value of size {largest:.1e}, above {MAX_VALUE:.0e}")
    norm = _norm(vector) / mass
    if typical_norm and norm > NORM_FACTOR * typical_norm:
        raise BadMessage("bad_value", f"norm {norm:.3g}, more than {NORM_FACTOR:g} times the usual {typical_norm:.3g}")
    return norm


def _norm(vector: Tensor) -> float:
    """In float64: squares of float32 overflow from 1.8e19 on, and summing millions of them loses three digits."""
    scratch = _wide_block(vector)
    squares = []
    for start in range(0, vector.numel(), BLOCK):
        block = vector[start : start + BLOCK]
        part = scratch[: block.numel()].copy_(block)
        squares.append(torch.dot(part, part).item())
    return math.sqrt(math.fsum(squares))


def _wide_block(vector: Tensor) -> Tensor:
    """Room for one block in float64; in float32 on Apple's GPUs, which have no float64 (not tested on one)."""
    dtype = torch.float32 if vector.device.type == "mps" else torch.float64
    return vector.new_empty(min(BLOCK, vector.numel()), dtype=dtype)
