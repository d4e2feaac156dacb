"""Numbers about a run."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl import analysis
from p2pfl.analysis import (
    compare_contraction,
    consensus_distance,
    contraction,
    contraction_rate,
    disagreement,
    summary_of,
    verdict,
)
from p2pfl.records import Json, Line
from p2pfl.weights import neighbour_weight


def test_summary() -> None:
    assert summary_of([3.0, 1.0, 8.0]) == {"mean": 4.0, "min": 1.0, "max": 8.0}
    assert summary_of(iter([2.0])) == {"mean": 2.0, "min": 2.0, "max": 2.0}


def test_the_mean_does_not_depend_on_the_order() -> None:
    values = [1e16, 1.0, -1e16, 1.0]
    assert summary_of(values)["mean"] == summary_of(sorted(values))["mean"] == 0.5


def test_nothing_has_no_summary() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summary_of([])


# -- consensus_distance ----------------------------------------------------------------------------------------------


def test_distance_of_two_nodes_is_half_of_what_lies_between() -> None:
    assert consensus_distance(np.array([[0.0, 0.0], [6.0, 8.0]])) == 5.0


def test_equal_vectors_and_a_single_one_agree() -> None:
    assert consensus_distance(np.full((3, 50), 0.125)) == 0.0
    assert consensus_distance(np.arange(5.0)[None, :]) == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block_elements", [1, 7, 64, 2**20])
def test_distance_is_the_formula_whatever_the_block(
    dtype: type[np.float32 | np.float64], block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "BLOCK_ELEMENTS", block_elements)
    vectors = np.random.default_rng(0).normal(size=(5, 33)).astype(dtype)
    exact = vectors.astype(np.float64)
    expected = math.sqrt((np.linalg.norm(exact - exact.mean(axis=0), axis=1) ** 2).mean())
    assert consensus_distance(vectors) == pytest.approx(expected, rel=1e-12)


def test_small_distances_of_long_vectors_are_seen() -> None:
    vectors = np.full((2, 3), 1000.0, np.float32)
    vectors[1] += np.float32(2**-13)
    assert consensus_distance(vectors) == pytest.approx(2**-14 * math.sqrt(3), rel=1e-12)


def test_the_given_array_is_left_alone() -> None:
    vectors = np.arange(6.0).reshape(2, 3)
    consensus_distance(vectors)
    np.testing.assert_array_equal(vectors, np.arange(6.0).reshape(2, 3))


def test_no_vectors() -> None:
    with pytest.raises(ValueError, match="no vectors"):
        consensus_distance(np.zeros((0, 3)))


# -- contraction_rate ------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 0.999), st.floats(1e-6, 1e6), st.integers(2, 6))
def test_a_geometric_series_has_its_own_factor(factor: float, first: float, length: int) -> None:
    series = [first * factor**t for t in range(length)]
    assert contraction_rate(series) == pytest.approx(factor, rel=1e-9)


def test_the_rate_is_the_geometric_mean() -> None:
    assert contraction_rate([8.0, 1.0, 2.0]) == pytest.approx(0.5)


def test_a_growing_series_has_a_factor_above_one() -> None:
    assert contraction_rate([1.0, 3.0]) == pytest.approx(3.0)


@pytest.mark.parametrize("end", [0.0, 1e-20, math.nan, math.inf])
def test_the_series_counts_up_to_what_is_no_distance(end: float) -> None:
    assert contraction_rate([8.0, 4.0, 2.0, end, 5.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("end", [0.0, 1e-20])
def test_agreement_at_once(end: float) -> None:
    assert contraction_rate([8.0, end, end]) == 0.0


@pytest.mark.parametrize("series", [[], [1.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [1.0, math.nan]])
def test_no_rate_without_two_distances(series: list[float]) -> None:
    assert contraction_rate(series) is None


def test_a_ring_contracts_as_its_eigenvalue_says() -> None:
    """The slowest start on a ring of 8, Metropolis weights: lambda2 = 1/3 + 2/3 cos(2 pi / 8)."""
    x = np.cos(2 * np.pi * np.arange(8) / 8)[:, None]
    series = []
    for _ in range(20):
        series.append(consensus_distance(x))
        x = (np.roll(x, 1, axis=0) + x + np.roll(x, -1, axis=0)) / 3
    assert contraction_rate(series) == pytest.approx(1 / 3 + 2 / 3 * math.cos(math.pi / 4), rel=1e-9)


# -- contraction -----------------------------------------------------------------------------------------------------

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def mixing(adjacent: Floats, masses: Floats) -> Floats:
    """W of Metropolis weights for these masses, written down a second time."""
    reaches = (adjacent + np.eye(len(masses))) @ masses
    pairs = [[neighbour_weight(m, r, s) for m, s in zip(masses, reaches, strict=True)] for r in reaches]
    weights = np.array(pairs) * adjacent
    return np.asarray(weights + np.diag(1 - weights.sum(axis=1)))


def ring(n: int) -> Floats:
    return np.roll(np.eye(n), 1, axis=0) + np.roll(np.eye(n), -1, axis=0)


def second_eigenvalue(matrix: Floats) -> float:
    return float(np.sort(np.abs(np.linalg.eigvals(matrix)))[-2])


@st.composite
def graphs_with_masses(draw: st.DrawFn) -> tuple[Floats, Floats]:
    n = draw(st.integers(2, 7))
    edges = np.array(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n)), float).reshape(n, n)
    adjacent = np.triu(edges, 1) + np.eye(n, k=1)  # a path at least
    masses = draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n))
    return np.minimum(adjacent + adjacent.T, 1), np.array(masses, float)


@given(graphs_with_masses(), st.integers(0, 2**32))
def test_no_round_contracts_less_than_the_second_eigenvalue_says(graph: tuple[Floats, Floats], seed: int) -> None:
    adjacent, masses = graph
    matrix, random = mixing(adjacent, masses), np.random.default_rng(seed)
    rounds = [(x, matrix @ x, masses) for x in random.normal(size=(3, len(masses), 32))]
    measured = contraction(rounds)["measured"]
    assert measured is not None
    assert measured <= second_eigenvalue(matrix) + 1e-9


def test_training_in_between_changes_nothing_and_mixing_alone_ends_at_the_second_eigenvalue() -> None:
    random, matrix = np.random.default_rng(0), mixing(ring(8), np.ones(8))
    alone, trained = [], []
    x = y = random.normal(size=(8, 32))
    for _ in range(40):
        alone.append((x, matrix @ x, np.ones(8)))
        trained.append((y, matrix @ y, np.ones(8)))
        x, y = matrix @ x, matrix @ y + random.normal(size=(8, 32))
    assert contraction(alone[20:])["measured"] == pytest.approx(second_eigenvalue(matrix), rel=1e-3)
    for before, after, masses in trained:
        assert disagreement(after, masses) <= second_eigenvalue(matrix) * disagreement(before, masses)


def test_a_disagreement_without_direction_shrinks_by_the_typical_factor() -> None:
    matrix = mixing(ring(12), np.ones(12))
    typical = math.sqrt((np.square(matrix).sum() - 1) / 11)
    x = np.random.default_rng(0).normal(size=(12, 20_000))
    assert contraction([(x, matrix @ x, np.ones(12))])["measured"] == pytest.approx(typical, rel=0.01)


def test_the_disagreement_is_around_the_mean_that_the_masses_weigh() -> None:
    probes, masses = np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([3.0, 1.0])
    assert disagreement(probes, masses) == pytest.approx(math.sqrt((3 * 1 + 1 * 9) / 4))


def test_a_complete_graph_is_exact_even_in_float32() -> None:
    masses = np.array([10.0, 20.0, 3.0])
    matrix = mixing(np.ones((3, 3)) - np.eye(3), masses)
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    after = (matrix @ x).astype(np.float32) * np.float32([[1], [1 + 1e-7], [1 - 1e-7]])  # each in its order of adding
    assert contraction([(x.astype(float), after.astype(float), masses)]) == {"measured": 0.0, "rounds": 1, "exact": 1}


def test_the_geometric_mean_is_over_the_rounds_that_tell() -> None:
    ones, x = np.ones(2), np.array([[1.0, 0.0], [-1.0, 0.0]])
    agreed = 1000.0 + 1e-3 * x  # there, float32 would hide most of a contraction
    broken = np.full((2, 2), math.nan)
    rounds = [(x, 0.5 * x, ones), (x, 0.125 * x, ones), (x, 0 * x, ones), (agreed, agreed, ones), (0 * x, x, ones)]
    rounds += [(broken, x, ones), (x, broken, ones), (1e200 * x, x, ones)]
    assert contraction(rounds) == {"measured": pytest.approx(0.25), "rounds": 3, "exact": 1}
    assert contraction([]) == {"measured": None, "rounds": 0, "exact": 0}


def line(round: int, before: Sequence[Json], after: Sequence[Json], *merged: str, missing: Sequence[str] = ()) -> Line:
    return {"round": round, "probe": {"before": before, "after": after}, "merged": merged, "missing": missing}


TWO: dict[str, list[Line]] = {"a": [line(0, [0.0], [1.0], "b")], "b": [line(0, [4.0], [3.0], "a")]}  # a weighs 3, b 1
PAIR: Line = {"lambda2": 0.5, "lambda_min": -0.5, "typical_contraction": 0.5, "period": 1}


def compared(lines: Mapping[str, Sequence[Line]]) -> float | None:
    return compare_contraction(lines, {"a": 3.0, "b": 1.0}, PAIR)["measured"]


def test_a_run_is_compared_with_its_graph() -> None:
    lines: dict[str, list[Line]] = {
        "a": [line(0, [0.0], [1.0], "b"), line(1, [1.0], [1.0], missing=["b"])],
        "b": [line(0, [4.0], [3.0], "a"), line(1, [3.0], [2.0], "a")],
    }
    says = compare_contraction(lines, {"a": 3.0, "b": 1.0}, PAIR)
    assert says == {
        "measured": pytest.approx(0.5),
        "predicted": 0.5,
        "typical": 0.5,
        "says": "As predicted: one mixing multiplied the disagreement by 0.5; 0.5 is typical of this graph, "
        "0.5 its worst case.",
    }
    lines["b"][1] = line(1, [3.0], [3.0], missing=["a"])
    says = compare_contraction(lines, {"a": 3.0, "b": 1.0}, PAIR)
    assert says["measured"] == pytest.approx(math.sqrt(0.5))
    assert says["says"].endswith("; 50 % of the updates were missing.")


def test_a_node_counts_by_its_mass() -> None:
    steps = {"a": (0.0, 1.0), "b": (4.0, 3.0), "c": (8.0, 8.0)}
    lines = {name: [line(0, [before], [after], *(steps.keys() - name))] for name, (before, after) in steps.items()}
    measured = compare_contraction(lines, {"a": 1.0, "b": 1.0, "c": 2.0}, PAIR)["measured"]
    assert measured == pytest.approx(math.sqrt((16 + 4 + 2 * 9) / (25 + 1 + 2 * 9)))


def test_rounds_that_cannot_be_compared_are_left_out() -> None:
    assert compared(TWO) == pytest.approx(0.5)
    assert compared({"a": TWO["a"]}) is None  # b died, or nobody kept its records
    assert compared(TWO | {"c": [line(0, [1.0, 1.0], [1.0, 1.0])]}) is None  # other projections
    assert compared(TWO | {"c": [{"round": 0, "probe": {"before": [1.0], "after": [None]}}]}) is None  # diverged
    assert compared(TWO | {"c": [{"round": 0}, {"probe": 7}]}) is None  # of an older version
    assert compared({"a": TWO["a"], "b": [line(0, [4.0], [3.0], "a", "c")]}) is None  # c died in that round
    assert compared({"a": TWO["a"] * 2, "b": TWO["b"]}) is None  # a came back and did it again
    assert compared({"a": [line(1, [0.0], [1.0])], "b": TWO["b"]}) is None


def test_without_facts_the_measure_stands_alone() -> None:
    found = compare_contraction(TWO, {}, {})
    assert found["predicted"] is found["typical"] is None
    assert found["says"] == "One mixing multiplied the disagreement by 0.5; what the graph promises is not known."


@pytest.mark.parametrize(
    ("measured", "lambda2", "typical", "missing", "period", "symmetric", "says"),
    [
        (None, 0.8, 0.6, 0.0, 1, True, "No round tells"),
        (0.7, None, None, 0.0, 1, True, "not known"),
        # a graph that stays as it is
        (0.0, 0.0, 0.0, 0.0, 1, True, "As predicted for this graph, one mixing left nothing"),
        (0.7, 0.8, 0.6, 0.0, 1, True, "As predicted: .* by 0.7; 0.6 is typical of this graph, 0.8 its worst case"),
        (0.8001, 0.8, 0.6, 0.0, 1, True, "As predicted"),  # rounding
        (0.55, 0.8, 0.6, 0.0, 1, True, "As predicted"),  # chance
        (0.7, 0.8, 0.6, 0.2, 1, True, "As predicted"),  # missing updates that did no harm
        (0.9, 0.8, 0.6, 0.125, 1, True, "Slower than predicted: .*; 12.5 % of the updates were missing"),
        (0.9, 0.8, 0.6, 0.0, 1, True, "Slower .* some node sends another vector than its own model"),
        (1.3, 0.8, 0.6, 0.0, 1, True, "Slower .* some node sends another vector than its own model"),
        (0.001, 0.0, 0.0, 0.0, 1, True, "Slower .* some node sends another vector"),
        (0.3, 0.8, 0.6, 0.0, 1, True, "Faster than typical: .* directions that mix fast"),
        (0.0, 0.8, 0.6, 0.0, 1, True, "Faster than typical"),
        (1.0, 1.0, 1.0, 0.0, 1, True, "As predicted"),  # nobody hears of anybody
        # a graph that changes: a round does not know lambda2
        (0.6, 0.0, 0.65, 0.0, 3, True, "As predicted: .* and a whole period of 3 rounds leaves nothing"),
        (0.6, 0.4, 0.65, 0.0, 7, True, "As predicted: .* 0.4 a round holds only over a whole period of 7 rounds"),
        (0.6, 0.6, 0.65, 0.0, None, True, "As predicted: .* holds only in the long run"),
        (0.95, 0.4, 0.65, 0.01, 7, True, "Slower .* 1 % of the updates were missing"),
        (0.95, 0.4, 0.65, 0.0, 7, True, "Slower .* directions that these rounds mix slowly"),
        (1.05, 0.4, 0.9, 0.0, 7, True, "Slower .* some node sends another vector"),
        (0.3, 0.2, 0.65, 0.0, 7, True, "Faster than typical"),
        # weights that keep the mean, but are not symmetric
        (0.7, 0.8, 0.6, 0.0, 1, False, "As predicted: .* lambda2 = 0.8 a round holds only in the long run"),
        (0.95, 0.97, 0.6, 0.0, 1, False, "As predicted: .* lambda2 = 0.97"),
        (0.9, 0.6, 0.6, 0.0, 1, False, "Slower .* directions that these rounds mix slowly"),
        (1.2, 0.8, 0.6, 0.0, 1, False, "Slower .* some node sends another vector"),
        (1.2, 0.8, 0.6, 0.3, 1, False, "Slower .* 30 % of the updates were missing"),
        # push-sum and its kind
        (1.2, 0.8, None, 0.0, 1, False, "One mixing .* promises nothing: lambda2 = 0.8 .* only in the long run"),
        (0.5, 0.8, None, 0.0, None, True, "One mixing .* promises nothing: lambda2 = 0.8 .* only in the long run"),
    ],
)
def test_what_is_said_of_measured_and_predicted(
    measured: float | None,
    lambda2: float | None,
    typical: float | None,
    missing: float,
    period: int | None,
    symmetric: bool,
    says: str,
) -> None:
    sentence = verdict(measured, lambda2, typical, missing, period, symmetric)
    assert re.match(says if says[0].isupper() else f".*{says}", sentence), sentence
    assert sentence.endswith(".")


def test_lambda2_bounds_each_round_only_of_a_symmetric_matrix() -> None:
    assert "its worst case" in compare_contraction(TWO, {}, PAIR)["says"]
    assert "only in the long run" in compare_contraction(TWO, {}, PAIR | {"lambda_min": None})["says"]
    assert "promises nothing" in compare_contraction(TWO, {}, PAIR | {"typical_contraction": None})["says"]
    changing = PAIR | {"lambda_min": None, "period": 3}
    assert "over a whole period of 3 rounds" in compare_contraction(TWO, {}, changing)["says"]
