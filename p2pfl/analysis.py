"""Numbers about a run: how far apart the nodes are, how fast they agree, and whether that is what the graph promises.

Arrays, or a run's lines as they were recorded, in; numbers, and one sentence, out. Nothing here reads a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from p2pfl.records import Json, inside, is_number, number, words

Floats = npt.NDArray[np.float64]

BLOCK_ELEMENTS = 2**20  # of one float64 working block (8 MiB), so that memory does not grow with n * P
ROUNDOFF = 1e-12  # of the first distance: below, rounding is measured and not mixing
EQUAL = 1e-6  # of the length of the probes: float32 vectors that are not further apart are equal
TELLING = 100 * EQUAL  # a disagreement from here on shows a hundredfold contraction before rounding hides it
ABOVE = 1.02  # times lambda2: what rounding may add to a bound
AROUND = 4 / 3  # times or through the typical contraction: what a few rounds and 32 projections scatter


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


# -- Predicted beside measured ---------------------------------------------------------------------------------------


class Contraction(TypedDict):
    """By how much one mixing shrank the disagreement of a run."""

    measured: float | None  # geometric mean of after / before; 0.0: nothing was ever left; None: no round tells
    rounds: int  # that told
    exact: int  # those of them that left nothing; they have no part in a `measured` above 0.0


class Comparison(TypedDict):
    """What summary.json holds under "contraction"."""

    measured: float | None
    predicted: float | None  # lambda2
    typical: float | None
    says: str


def compare_contraction(
    lines: Mapping[str, Sequence[Mapping[str, Json]]], masses: Mapping[str, float], facts: Mapping[str, Json]
) -> Comparison:
    """The contraction that a run shows, beside the one that its graph implies.

    `lines` are each node's lines of metrics.jsonl, `facts` what `p2pfl topology --json` prints. A node of unknown mass
    counts as 1. Lines of another shape, and of a run that recorded no probes, say nothing.
    """
    measured = contraction(_probed_rounds(lines, masses))["measured"]
    lambda2, typical, period = (number(facts, key) for key in ("lambda2", "typical_contraction", "period"))
    every = [line for own in lines.values() for line in own]
    missing, merged = (sum(len(words(line, key)) for line in every) for key in ("missing", "merged"))
    says = verdict(
        measured,
        lambda2,
        typical,
        missing / max(1, missing + merged),
        None if period is None else int(period),
        symmetric=number(facts, "lambda_min") is not None,
    )
    return {"measured": measured, "predicted": lambda2, "typical": typical, "says": says}


def _probed_rounds(
    lines: Mapping[str, Sequence[Mapping[str, Json]]], masses: Mapping[str, float]
) -> list[tuple[Floats, Floats, Floats]]:
    """(before, after, masses) of each round in which all who mixed recorded it.

    A round is left out if a node did it twice, after a restart, or if somebody whose update was mixed has no line of
    it, since it died then: the mixing was not one of the vectors that are known.
    """
    found: dict[float, dict[str, Mapping[str, Json]]] = {}
    unclear: set[float] = set()
    for name, own in lines.items():
        for line in own:
            round = number(line, "round")
            if round is None:
                continue
            if name in found.setdefault(round, {}):
                unclear.add(round)
            found[round][name] = line
    rounds = []
    for round, by_name in sorted(found.items()):
        probes = {name: (_probe(line, "before"), _probe(line, "after")) for name, line in by_name.items()}
        size = max(len(probe) for pair in probes.values() for probe in pair)
        whole = all(len(probe) == size for pair in probes.values() for probe in pair)
        heard = {other for line in by_name.values() for other in words(line, "merged")}
        if round not in unclear and whole and heard <= probes.keys():
            before, after = (np.array(side) for side in zip(*probes.values(), strict=True))
            rounds.append((before, after, np.array([masses.get(name, 1.0) for name in probes])))
    return rounds


def _probe(line: Mapping[str, Json], when: str) -> list[float]:
    """The projections of a line; empty where it has none, or where they are no longer finite."""
    values = inside(line, "probe", when)
    numbers = values if isinstance(values, list | tuple) else []
    return [float(value) for value in numbers if is_number(value)]


def contraction(rounds: Iterable[tuple[Floats, Floats, Floats]]) -> Contraction:
    """How much one mixing contracts, from the (before (n, k), after (n, k), masses (n,)) of each round.

    The rows are projections of the nodes' vectors. Mixing, X <- W X, does to them what it does to the vectors, so that
    the disagreements before and after it compare, whatever training does in between. A round tells if before it the
    disagreement is above TELLING of the probes' own length; what is below EQUAL of it counts as nothing.
    """
    exact = 0
    logarithms = []
    for before, after, masses in rounds:
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverged: what it gives is told apart below
            length = math.sqrt(np.average(np.square(before).sum(axis=1), weights=masses))
            first, second = disagreement(before, masses), disagreement(after, masses)
        if not (first > TELLING * length and math.isfinite(second)):
            continue
        if second <= EQUAL * length:
            exact += 1
        else:
            logarithms.append(math.log(second / first))
    measured = 0.0 if exact else None
    if logarithms:
        measured = math.exp(math.fsum(logarithms) / len(logarithms))
    return {"measured": measured, "rounds": exact + len(logarithms), "exact": exact}


def disagreement(probes: Floats, masses: Floats) -> float:
    """sqrt(sum_i m_i ||p_i - p||^2 / sum m) of `probes` (n, k), where p is their mean weighted with `masses` (n,)."""
    gaps = probes - np.average(probes, axis=0, weights=masses)
    return math.sqrt(np.average(np.square(gaps).sum(axis=1), weights=masses))


def verdict(
    measured: float | None,
    lambda2: float | None,
    typical: float | None,
    missing_share: float,
    period: int | None,
    symmetric: bool = True,
) -> str:
    """One sentence: is the contraction of a run what its graph promises, and if not, what does that mean?

    `lambda2` is the worst case of every single round where the graph stays as it is (`period` 1) and W is `symmetric`:
    m_i w_ij = m_j w_ji. Else it is the worst case a round in the long run. `typical` is what one round leaves of a
    disagreement without direction; None where a round need not keep the mean, and so promises nothing.
    `missing_share` of the updates, from 0 to 1, did not come in time.
    """
    if measured is None:
        return "No round tells how fast this graph mixes: fewer than two nodes recorded it, or they agreed before."
    if measured == 0 == lambda2:
        return "As predicted for this graph, one mixing left nothing of the disagreement."
    what = f"one mixing multiplied the disagreement by {measured:.3g}"
    if lambda2 is None:
        return f"{what.capitalize()}; what the graph promises is not known."
    if typical is None:
        return f"{what.capitalize()}; with these weights a single round promises nothing: {_long_run(lambda2, period)}."
    every_round = period == 1 and symmetric
    if every_round:
        highest, promise = lambda2 * ABOVE, f"{typical:.3g} is typical of this graph, {lambda2:.3g} its worst case"
    else:
        highest = max(typical * AROUND, lambda2) if period == 1 else typical * AROUND
        promise = f"{typical:.3g} is typical of one round, {_long_run(lambda2, period)}"
    if measured < typical / AROUND:
        return f"Faster than typical: {what}, {promise}: the disagreement lies in directions that mix fast here."
    if measured <= min(highest, ABOVE):
        return f"As predicted: {what}; {promise}."
    if missing_share > 0:
        why = f"{100 * missing_share:.3g} % of the updates were missing"
    elif every_round or measured > ABOVE:  # a round that keeps the mean cannot drive the nodes apart
        why = "no update was missing, so some node sends another vector than its own model, or an old one"
    else:
        why = "no update was missing: the disagreement lies in directions that these rounds mix slowly"
    return f"Slower than predicted: {what}, {promise}; {why}."


def _long_run(lambda2: float, period: int | None) -> str:
    if period is None or period == 1:
        return f"lambda2 = {lambda2:.3g} a round holds only in the long run"
    if lambda2 == 0:
        return f"and a whole period of {period} rounds leaves nothing"
    return f"lambda2 = {lambda2:.3g} a round holds only over a whole period of {period} rounds"
