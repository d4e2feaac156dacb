"""Graphs that change from round to round: which of them agree exactly and when, and how fast the others do."""

import itertools
import math
from functools import reduce

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from p2pfl.config import VARYING_GRAPHS, TopologySection
from p2pfl.messages import BadInput
from p2pfl.topology.matrix import mixing_matrix
from p2pfl.topology.schedules import SCHEDULES, Schedule

ERRORS = 5  # standard errors that a mean may be off: one test in two million is then wrong


def make(name: str, n: int, seed: int = 0, **keys: int) -> Schedule:
    return SCHEDULES[name](n, TopologySection(graph=name, **keys), seed)


def mixing(graph: nx.Graph, weights: str = "metropolis") -> sparse.csr_array:
    return mixing_matrix(graph, weights, dict.fromkeys(graph, 1.0))


def given_weights(graph: nx.Graph) -> sparse.csr_array:
    """W from the weights on the edges; the rest stays with the node."""
    off_diagonal = nx.to_scipy_sparse_array(graph, nodelist=range(len(graph)), weight="weight")
    return off_diagonal + sparse.diags_array(1 - off_diagonal.sum(axis=1))


def left_over(n: int, matrices: list[sparse.csr_array]) -> float:
    """How far these rounds are from giving everybody the mean: the largest entry of |their product - J|."""
    return float(abs(reduce(lambda product, matrix: matrix @ product, matrices, np.eye(n)) - 1 / n).max())


def one_period(schedule: Schedule) -> list[nx.Graph]:
    assert schedule.period is not None
    return [schedule.at(round) for round in range(schedule.period)]


# -- What holds for all ----------------------------------------------------------------------------------------------


def test_the_config_knows_exactly_the_schedules() -> None:
    assert tuple(SCHEDULES) == VARYING_GRAPHS


@pytest.mark.parametrize("name", VARYING_GRAPHS)
def test_every_round_is_a_simple_graph_over_all_nodes_in_their_order(name: str) -> None:
    possible = 0
    for n in range(1, 20):
        try:
            schedule = make(name, n)
        except BadInput:
            continue
        possible += 1
        for round in (0, 1, 2, 7, 1000):
            graph = schedule.at(round)
            assert list(graph) == list(range(n))
            assert {type(node) for edge in graph.edges for node in edge} <= {int}  # and not numpy's
            assert nx.number_of_selfloops(graph) == 0
            assert not graph.is_multigraph()
    assert possible >= 5


@pytest.mark.parametrize("name", VARYING_GRAPHS)
def test_a_round_is_the_same_in_whatever_order_rounds_are_asked_for(name: str) -> None:
    there, back = make(name, 16, seed=7), make(name, 16, seed=7)
    forwards = [dict(there.at(round).edges) for round in range(10)]
    backwards = [dict(back.at(round).edges) for round in reversed(range(10))]
    assert forwards == backwards[::-1]
    assert forwards != [forwards[0]] * 10


@pytest.mark.parametrize("name", VARYING_GRAPHS)
def test_only_a_drawn_schedule_depends_on_the_seed_and_never_repeats(name: str) -> None:
    one, other = make(name, 16, seed=1), make(name, 16, seed=2)
    drawn = name in ("random-matching", "epidemic")
    assert (one.period is None) == drawn
    assert (set(one.at(3).edges) != set(other.at(3).edges)) == drawn
    if one.period is None:
        assert len({frozenset(one.at(round).edges) for round in range(50)}) == 50
    else:
        assert all(dict(one.at(round).edges) == dict(one.at(round + one.period).edges) for round in range(10))


@pytest.mark.parametrize(
    ("name", "n", "keys", "message", "mended"),
    [
        ("one-peer-hypercube", 12, {}, "use 8 or 16 nodes", [(8, {}), (16, {})]),
        ("epidemic", 2, {}, "use s = 1, or at least 3 nodes", [(2, {"s": 1}), (3, {})]),
        ("epidemic", 1, {"s": 1}, "use at least 2 nodes", [(2, {"s": 1})]),
        ("epidemic", 10_000, {"s": 9000}, "has 90000000 edges", []),
        ("base-k", 10_000, {"k": 9999}, "has 49995000 edges", []),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    name: str, n: int, keys: dict[str, int], message: str, mended: list[tuple[int, dict[str, int]]]
) -> None:
    with pytest.raises(BadInput, match=message):
        make(name, n, **keys)
    for nodes, better in mended:
        assert len(make(name, nodes, **better).at(0)) == nodes


# -- One peer a round ------------------------------------------------------------------------------------------------


def test_one_peer_exponential_shifts_by_the_next_power_of_two() -> None:
    schedule = make("one-peer-exponential", 6)
    assert schedule.period == 3
    for round, shift in enumerate((1, 2, 4, 1)):
        assert set(schedule.at(round).edges) == {(i, (i + shift) % 6) for i in range(6)}


def test_one_peer_hypercube_flips_the_next_bit() -> None:
    schedule = make("one-peer-hypercube", 8)
    assert schedule.period == 3
    for round, bit in enumerate((1, 2, 4, 1)):
        assert {frozenset(edge) for edge in schedule.at(round).edges} == {frozenset((i, i ^ bit)) for i in range(8)}


@pytest.mark.parametrize("name", ["one-peer-exponential", "one-peer-hypercube"])
@pytest.mark.parametrize("log_n", range(1, 8))
def test_one_peer_is_enough_for_a_power_of_two(name: str, log_n: int) -> None:
    n = 2**log_n
    matrices = [mixing(graph) for graph in one_period(make(name, n))]
    assert len(matrices) == log_n
    assert left_over(n, matrices) < 1e-15
    assert left_over(n, matrices[:-1]) == pytest.approx(1 / n)  # and no round less


def test_one_peer_exponential_on_six_nodes_leaves_a_twelfth() -> None:
    matrices = [mixing(graph) for graph in one_period(make("one-peer-exponential", 6))]
    assert left_over(6, matrices) == pytest.approx(1 / 12)


# -- Base-(k+1) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_base_k_is_exact_for_every_number_of_nodes(k: int) -> None:
    for n in range(2, 101):
        sequence = one_period(make("base-k", n, k=k))
        matrices = [given_weights(graph) for graph in sequence]
        assert left_over(n, matrices) < 1e-12, n
        assert len(sequence) <= 2 * math.log(n, k + 1) + 2, n
        assert max(degree for graph in sequence for _, degree in graph.degree) <= k, n
        assert min(matrix.diagonal().min() for matrix in matrices) > 0, n  # symmetric, so that columns sum to 1 too
        assert min(weight for graph in sequence for _, _, weight in graph.edges(data="weight")) > 0, n


@settings(deadline=None, max_examples=25)
@given(n=st.integers(101, 600), k=st.integers(1, 40))
def test_base_k_is_exact_for_larger_numbers_too(n: int, k: int) -> None:
    sequence = one_period(make("base-k", n, k=k))
    x = np.arange(n) % 7 == 3  # as good as the whole product, and fast: the mean must reach everybody
    values = reduce(lambda values, graph: given_weights(graph) @ values, sequence, x.astype(float))
    np.testing.assert_allclose(values, x.mean(), atol=1e-12)
    assert max(degree for graph in sequence for _, degree in graph.degree) <= k
    assert len(sequence) <= 2 * math.log(n, k + 1) + 2


def test_base_k_without_k_meets_one_peer_a_round() -> None:
    assert [dict(g.edges) for g in one_period(make("base-k", 21))] == [
        dict(g.edges) for g in one_period(make("base-k", 21, k=1))
    ]
    assert make("base-k", 1).period == 1


SIZES = (5, 6, 7, 8, 12, 16, 20, 24, 32, 48, 64, 100, 128)
SIMPLE = {  # k → rounds of the paper's Simple Base-(k+1) graph
    1: (5, 5, 5, 3, 7, 4, 9, 9, 5, 11, 6, 13, 7),
    2: (3, 2, 4, 3, 3, 4, 6, 4, 5, 5, 6, 9, 7),
    4: (1, 2, 3, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4),
}
SHORTER = {  # (n, k) → rounds where n = m m' needs fewer: 6 = 2 * 3, 1 + 3 rounds; 100 = 4 * 25 = 2 * 2 * 5 * 5
    **{(6, 1): 4, (12, 1): 5, (20, 1): 7, (24, 1): 6, (48, 1): 7, (100, 1): 11},
    **{(20, 2): 5, (100, 2): 8},
}


@pytest.mark.parametrize("k", SIMPLE)
def test_base_k_is_as_short_as_published_or_shorter(k: int) -> None:
    expected = [SHORTER.get((n, k), published) for n, published in zip(SIZES, SIMPLE[k], strict=True)]
    assert [make("base-k", n, k=k).period for n in SIZES] == expected
    assert all(ours <= published for ours, published in zip(expected, SIMPLE[k], strict=True))


def test_a_product_may_be_shorter_although_neither_factor_is_small() -> None:
    """49 = 32 + 16 + 1 needs 5 + 1 + 5 rounds as a sum, and 7 * 7 only 5 + 5."""
    assert make("base-k", 49).period == 10


def test_the_exchange_of_base_2_on_five_nodes() -> None:
    """5 = 4 + 1: the fifth node takes 4/5 of one of the four, whose mean is then the mean of all."""
    four, five = [(0, 2), (1, 3)], [(0, 1), (2, 3)]
    edges = [
        {(*sorted(edge), weight) for *edge, weight in g.edges(data="weight")} for g in one_period(make("base-k", 5))
    ]
    assert edges == [
        {(*edge, 0.5) for edge in four},
        {(*edge, 0.5) for edge in five},
        {(0, 4, 0.8)},
        {(*edge, 0.5) for edge in four},
        {(*edge, 0.5) for edge in five},
    ]


# -- Drawn anew for every round --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**32), round=st.integers(0, 10**6))
def test_in_a_random_matching_at_most_one_is_idle(n: int, seed: int, round: int) -> None:
    degrees = sorted(degree for _, degree in make("random-matching", n, seed).at(round).degree)
    assert degrees == [0] * (n % 2) + [1] * (n - n % 2)


@settings(deadline=None)
@given(n=st.integers(2, 30), data=st.data(), seed=st.integers(0, 2**32), round=st.integers(0, 10**6))
def test_in_an_epidemic_everybody_tells_s_others(n: int, data: st.DataObject, seed: int, round: int) -> None:
    s = data.draw(st.integers(1, n - 1))
    graph = make("epidemic", n, seed, s=s).at(round)
    assert graph.is_directed()
    assert {degree for _, degree in graph.out_degree} == {s}


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(("n", "chance"), [(6, 1 / 5), (7, 1 / 7)])
def test_any_two_are_matched_as_often(n: int, chance: float, seed: int) -> None:
    rounds, schedule = 3000, make("random-matching", n, seed)
    met = [frozenset(edge) for round in range(rounds) for edge in schedule.at(round).edges]
    for pair in itertools.combinations(range(n), 2):
        assert abs(met.count(frozenset(pair)) - rounds * chance) < ERRORS * math.sqrt(rounds * chance * (1 - chance))


@pytest.mark.parametrize("seed", [0])
def test_an_epidemic_reaches_all_others_as_often(seed: int) -> None:
    rounds, n, s = 3000, 6, 2
    schedule, chance = make("epidemic", n, seed, s=s), s / (n - 1)
    told = np.sum([nx.to_numpy_array(schedule.at(round), nodelist=range(n)) for round in range(rounds)], axis=0)
    off_diagonal = told[~np.eye(n, dtype=bool)]
    assert np.all(abs(off_diagonal - rounds * chance) < ERRORS * math.sqrt(rounds * chance * (1 - chance)))


def left_per_round(schedule: Schedule, weights: str, n: int, rounds: int) -> tuple[float, float]:
    """(mean over many rounds, its standard error) of |W x|^2 / |x|^2, for columns x that sum to 0."""
    x = np.random.default_rng(1).normal(size=(n, 4))
    x -= x.mean(axis=0)
    left = [np.square(mixing(schedule.at(round), weights) @ x).sum() for round in range(rounds)] / np.square(x).sum()
    return float(left.mean()), float(left.std(ddof=1)) / math.sqrt(rounds)


@pytest.mark.parametrize("seed", [2])
@pytest.mark.parametrize(("n", "published"), [(8, 6 / 14), (32, 0.483871), (31, 1 / 2)])
def test_what_random_pairs_leave_of_the_squared_distance_to_the_mean(n: int, published: float, seed: int) -> None:
    """E|Wx|^2 = x'E[W]x, as W is a projection, and two nodes meet once in n - 1 rounds; in n rounds if n is odd."""
    found, error = left_per_round(make("random-matching", n, seed), "metropolis", n, rounds=600)
    expected = (n - 2) / (2 * (n - 1)) if n % 2 == 0 else 1 / 2
    assert published == pytest.approx(expected, abs=5.1e-7)
    assert error < 0.02 * expected
    assert abs(found - expected) < ERRORS * error


@pytest.mark.parametrize("seed", [3])
@pytest.mark.parametrize(
    ("n", "s", "published"), [(32, 1, 0.617550), (32, 2, 0.408568), (32, 7, 0.110559), (128, 4, 0.237968)]
)
def test_what_an_epidemic_leaves_of_the_squared_distance_to_the_mean(
    n: int, s: int, published: float, seed: int
) -> None:
    """E|Wx|^2 / |x|^2 is the mean of (1 - D / (n - 1)) / (1 + D) over the in-degree D, Binomial(n - 1, s / (n - 1))."""
    found, error = left_per_round(make("epidemic", n, seed, s=s), "uniform-neighbours", n, rounds=300)
    expected = (1 - (1 - s / (n - 1)) ** n) / s - 1 / (n - 1)
    assert published == pytest.approx(expected, abs=5.1e-7)
    assert error < 0.02 * expected
    assert abs(found - expected) < ERRORS * error
