"""Numbers about a run."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl import analysis
from p2pfl.analysis import consensus_distance, contraction_rate, summary_of


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
