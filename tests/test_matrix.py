"""The mixing matrix of a graph: what each kind of weights promises, and what no graph can have."""

import itertools
import math
import tracemalloc

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.config import WEIGHTS
from p2pfl.messages import BadInput
from p2pfl.topology import matrix as matrix_module
from p2pfl.topology.matrix import check_weights, fixed_weights, mixing_matrix
from p2pfl.weights import FROM_WHOLE_GRAPH, PUSH_SUM, mass, reach

BY_MASS = ("metropolis", "lazy", "samples", "inverse", "sqrt")  # reversible, with the masses as the limit
POSITIVE = (*BY_MASS, "uniform-neighbours", "max-degree")  # … or at least never negative
EVERY_GRAPH_HAS = tuple(kind for kind in WEIGHTS if kind != "given")


def dense(graph: nx.Graph, kind: str, masses: dict[str, float] | None = None) -> np.ndarray:
    return mixing_matrix(graph, kind, masses or dict.fromkeys(graph, 1.0)).toarray()


def named(graph: nx.Graph) -> nx.Graph:
    """a, b, c … for 0, 1, 2 …"""
    return nx.relabel_nodes(graph, {i: chr(ord("a") + i) for i in range(len(graph))})


def limit(matrix: np.ndarray) -> np.ndarray:
    """What each node counts in the end: the left eigenvector of 1, of which there must be only one."""
    n = len(matrix)
    equations = np.vstack([matrix.T - np.eye(n), np.ones(n)])
    found, _, rank, _ = np.linalg.lstsq(equations, np.r_[np.zeros(n), 1.0])
    assert rank == n
    return found


@st.composite
def connected_graphs(draw: st.DrawFn) -> tuple[nx.Graph, dict[str, float]]:
    """A tree and some edges more, and the nodes' masses."""
    n = draw(st.integers(2, 12))
    graph = nx.empty_graph(n)
    graph.add_edges_from((i, draw(st.integers(0, i - 1))) for i in range(1, n))
    graph.add_edges_from((i, j) for i, j in draw(pairs(n)) if i != j)
    graph = named(graph)
    return graph, {name: draw(st.floats(0.1, 10.0)) for name in graph}


@st.composite
def strongly_connected_graphs(draw: st.DrawFn) -> tuple[nx.DiGraph, dict[str, float]]:
    """A ring all one way and some edges more, and the nodes' masses."""
    n = draw(st.integers(2, 8))
    graph = nx.cycle_graph(n, create_using=nx.DiGraph)
    graph.add_edges_from((i, j) for i, j in draw(pairs(n)) if i != j)
    graph = named(graph)
    return graph, {name: draw(st.floats(0.1, 10.0)) for name in graph}


def pairs(n: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=2 * n)


def lopsided() -> nx.DiGraph:
    """Strongly connected, and hub tells more than it hears."""
    return nx.DiGraph([("hub", "a"), ("hub", "b"), ("a", "b"), ("b", "hub")])


def two_rings() -> nx.DiGraph:
    """They meet in hub, which hears two and tells two; the others one."""
    return nx.DiGraph([("hub", "a"), ("a", "b"), ("b", "hub"), ("hub", "c"), ("c", "hub")])


# -- What each kind promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BY_MASS)
@settings(deadline=None, max_examples=30)
@given(drawn=connected_graphs())
def test_averaging_ends_at_the_mean_weighted_by_the_masses(kind: str, drawn: tuple[nx.Graph, dict[str, float]]) -> None:
    graph, masses = drawn
    matrix, m = dense(graph, kind, masses), np.array(list(masses.values()))
    flow = m[:, None] * matrix
    assert (matrix >= 0).all()
    assert (np.diag(matrix) > 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(flow, flow.T, rtol=1e-12)
    np.testing.assert_allclose(limit(matrix), m / m.sum(), atol=1e-9)


@pytest.mark.parametrize("kind", ["metropolis", "lazy", "max-degree", "best-constant", "fastest"])
@settings(deadline=None, max_examples=30)
@given(drawn=connected_graphs())
def test_without_masses_it_is_symmetric_and_ends_at_the_mean(
    kind: str, drawn: tuple[nx.Graph, dict[str, float]]
) -> None:
    graph, _ = drawn
    matrix = dense(graph, kind)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(limit(matrix), 1 / len(graph), atol=1e-9)
    assert np.abs(np.linalg.eigvalsh(matrix - 1 / len(graph))).max() < 1
    assert kind == "best-constant" or (matrix >= 0).all()


@settings(deadline=None)
@given(connected_graphs())
def test_metropolis_is_lazy_twice_and_max_degree_on_regular_graphs(drawn: tuple[nx.Graph, dict[str, float]]) -> None:
    graph, _ = drawn
    matrix, degrees = dense(graph, "metropolis"), dict(graph.degree)
    for (i, a), (j, b) in itertools.permutations(enumerate(graph), 2):
        assert matrix[i, j] == (1 / (1 + max(degrees[a], degrees[b])) if graph.has_edge(a, b) else 0.0)
    lazy = dense(graph, "lazy")
    np.testing.assert_allclose(lazy, (np.eye(len(graph)) + matrix) / 2, atol=1e-15)
    assert np.linalg.eigvalsh(lazy)[0] > -1e-12


@settings(deadline=None)
@given(connected_graphs())
def test_uniform_neighbours_count_a_node_as_its_degree_and_one(drawn: tuple[nx.Graph, dict[str, float]]) -> None:
    graph, _ = drawn
    matrix, sizes = dense(graph, "uniform-neighbours"), 1 + np.array([degree for _, degree in graph.degree])
    np.testing.assert_allclose(matrix, (nx.to_numpy_array(graph) + np.eye(len(graph))) / sizes[:, None], atol=1e-15)
    np.testing.assert_allclose(limit(matrix), sizes / sizes.sum(), atol=1e-9)


@settings(deadline=None)
@given(connected_graphs())
def test_best_constant_is_the_best_constant(drawn: tuple[nx.Graph, dict[str, float]]) -> None:
    graph, _ = drawn
    laplacian, n = nx.laplacian_matrix(graph).toarray(), len(graph)
    [constant] = set(fixed_weights(graph, "best-constant").values())

    def left(c: float) -> float:
        return float(np.abs(np.linalg.eigvalsh(np.eye(n) - c * laplacian - 1 / n)).max())

    np.testing.assert_allclose(dense(graph, "best-constant"), np.eye(n) - constant * laplacian, atol=1e-12)
    assert left(constant) <= min(left(0.999 * constant), left(1.001 * constant)) + 1e-12


def test_best_constant_may_give_a_hub_a_negative_weight() -> None:
    """The Laplacian of a star of n has the eigenvalues 0, 1 and n."""
    matrix = dense(nx.star_graph(5), "best-constant")
    assert matrix[0, 1] == pytest.approx(2 / 7)
    assert matrix[0, 0] == pytest.approx(1 - 5 * 2 / 7)


@pytest.mark.parametrize("kind", EVERY_GRAPH_HAS)
def test_one_node_and_two(kind: str) -> None:
    assert dense(nx.empty_graph(1), kind).tolist() == [[1.0]]
    other = 0.25 if kind == "lazy" else 0.5
    np.testing.assert_allclose(dense(nx.path_graph(2), kind), [[1 - other, other], [other, 1 - other]], atol=1e-12)


@pytest.mark.parametrize("kind", [*POSITIVE, *PUSH_SUM])
def test_who_has_no_neighbour_in_a_round_keeps_its_vector(kind: str) -> None:
    graph = nx.Graph([("a", "b"), ("c", "d")])
    graph.add_node("lonely")
    matrix = dense(graph, kind)
    assert matrix[4].tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)


# -- Samples ---------------------------------------------------------------------------------------------------------


def test_samples_on_a_complete_graph_are_fedavg_in_one_step() -> None:
    samples = [120, 3, 45, 45, 1, 900]
    x = np.random.default_rng(0).normal(size=(6, 4))
    fedavg = sum(n * row for n, row in zip(samples, x, strict=True)) / sum(samples)
    matrix = dense(nx.complete_graph(6), "samples", {i: mass("samples", n) for i, n in enumerate(samples)})
    np.testing.assert_allclose(matrix @ x, np.tile(fedavg, (6, 1)), atol=1e-12)


def test_a_star_ends_at_the_mean_by_samples_and_the_naive_rule_elsewhere() -> None:
    """Naive: FedAvg over whoever is near, n_j / S_i. It ends at sum n_i S_i x_i / sum n_i S_i."""
    graph, samples, x = nx.star_graph(4), np.array([10.0, 1, 1, 1, 1]), np.arange(1.0, 6.0)
    reaches = np.array([reach([samples[i], *(samples[j] for j in graph[i])]) for i in graph])
    naive = (nx.to_numpy_array(graph) + np.eye(5)) * samples / reaches[:, None]

    ours = np.linalg.matrix_power(dense(graph, "samples", dict(enumerate(samples))), 2**12) @ x
    theirs = np.linalg.matrix_power(naive, 2**12) @ x

    np.testing.assert_allclose(ours, 24 / 14, atol=1e-9)
    np.testing.assert_allclose(theirs, (samples * reaches * x).sum() / (samples * reaches).sum(), atol=1e-9)
    assert abs(theirs[0] - 24 / 14) > 0.05


# -- Directed graphs -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(strongly_connected_graphs())
def test_push_sum_ends_at_the_mean_by_mass(drawn: tuple[nx.DiGraph, dict[str, float]]) -> None:
    graph, masses = drawn
    matrix, m = dense(graph, "push-sum", masses), np.array(list(masses.values()))
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-12)
    assert (np.diag(matrix) > 0).all()
    for i, name in enumerate(graph):
        assert set(matrix[:, i]) - {0.0} == {1 / (1 + graph.out_degree(name))}
    x = np.arange(len(graph)) ** 2.0
    power = np.linalg.matrix_power(matrix, 2**14)
    np.testing.assert_allclose((power @ (m * x)) / (power @ m), (m * x).sum() / m.sum(), rtol=1e-9)


def test_push_sum_on_a_ring_with_a_chord() -> None:
    """Who forgets the mass, or averages over whom it hears, ends elsewhere."""
    graph = nx.cycle_graph(5, create_using=nx.DiGraph)
    graph.add_edge(0, 2)
    matrix, x = np.linalg.matrix_power(dense(graph, "push-sum"), 2**12), np.arange(1.0, 6.0)
    samples = x
    np.testing.assert_allclose((matrix @ x) / (matrix @ np.ones(5)), 3.0, atol=1e-9)
    np.testing.assert_allclose(matrix @ x, 15 * np.array([3, 2, 4, 4, 4]) / 17, atol=1e-9)
    np.testing.assert_allclose((matrix @ (samples * x)) / (matrix @ samples), 55 / 15, atol=1e-9)
    naive = np.linalg.matrix_power(dense(graph, "uniform-neighbours"), 2**12) @ x
    assert abs(naive[0] - 3) > 0.1


@pytest.mark.parametrize("kind", ["metropolis", "lazy", "max-degree", "uniform-neighbours"])
def test_a_directed_graph_in_which_all_are_alike_keeps_the_mean(kind: str) -> None:
    """Everybody tells those 1, 2 and 4 further on, and so hears three."""
    graph = nx.empty_graph(7, create_using=nx.DiGraph)
    graph.add_edges_from((i, (i + step) % 7) for i in range(7) for step in (1, 2, 4))
    matrix = dense(graph, kind)
    weight = 1 / 8 if kind == "lazy" else 1 / 4
    assert set(np.round(matrix[~np.eye(7, dtype=bool)], 12)) == {0.0, weight}
    assert all(matrix[j, i] == weight for i, j in graph.edges)  # a row is who hears
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)


def test_max_degree_on_a_balanced_directed_graph_keeps_the_mean() -> None:
    expected = np.array([[1, 0, 1, 1], [1, 2, 0, 0], [0, 1, 2, 0], [1, 0, 0, 2]]) / 3
    np.testing.assert_allclose(dense(two_rings(), "max-degree"), expected, atol=1e-15)


# -- Given weights ---------------------------------------------------------------------------------------------------


def test_given_weights_are_taken_as_they_are() -> None:
    graph = nx.Graph()
    graph.add_weighted_edges_from([("a", "b", 0.5), ("b", "c", 0.25), ("c", "d", 1e-3)])
    expected = [[0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0], [0, 0.25, 0.749, 0.001], [0, 0, 0.001, 0.999]]
    np.testing.assert_allclose(dense(graph, "given"), expected, atol=1e-15)


def test_given_weights_on_a_directed_graph_belong_to_the_hearer() -> None:
    graph = nx.DiGraph()
    graph.add_weighted_edges_from([("a", "b", 0.5), ("b", "c", 0.25), ("c", "a", 0.25), ("b", "a", 0.25)])
    expected = [[0.5, 0.25, 0.25], [0.5, 0.5, 0], [0, 0.25, 0.75]]
    np.testing.assert_allclose(dense(graph, "given"), expected, atol=1e-15)


@pytest.mark.parametrize("kind", EVERY_GRAPH_HAS)
def test_the_other_kinds_do_not_look_at_given_weights(kind: str) -> None:
    graph = named(nx.random_regular_graph(3, 8, seed=0))
    graph.remove_edge(*next(iter(graph.edges)))
    plain = dense(graph, kind)
    nx.set_edge_attributes(graph, 7.5, "weight")
    np.testing.assert_array_equal(dense(graph, kind), plain)


# -- Weights from the whole graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FROM_WHOLE_GRAPH)
def test_fixed_weights_are_the_matrix_off_its_diagonal(kind: str) -> None:
    graph = named(nx.path_graph(4))
    nx.set_edge_attributes(graph, {("a", "b"): 0.25, ("b", "c"): 0.125, ("c", "d"): 0.5}, "weight")
    fixed, index = fixed_weights(graph, kind), {name: i for i, name in enumerate(graph)}
    assert fixed.keys() == {*graph.edges, *((b, a) for a, b in graph.edges)}
    matrix = dense(graph, kind)
    assert all(matrix[index[hearer], index[sender]] == weight for (hearer, sender), weight in fixed.items())
    assert fixed == fixed_weights(graph.copy(), kind)


@pytest.mark.parametrize("kind", ["max-degree", "given"])
def test_fixed_weights_of_a_directed_graph_go_to_the_hearer(kind: str) -> None:
    graph = named(nx.cycle_graph(3, create_using=nx.DiGraph))
    nx.set_edge_attributes(graph, 0.5, "weight")
    assert fixed_weights(graph, kind) == {("b", "a"): 0.5, ("c", "b"): 0.5, ("a", "c"): 0.5}


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind not in FROM_WHOLE_GRAPH])
def test_what_a_neighbourhood_is_enough_for_is_not_fixed(kind: str) -> None:
    assert fixed_weights(nx.path_graph(3), kind) == {}


LARGE = {
    "ring": nx.cycle_graph(300),
    "path": nx.path_graph(300),
    "star": nx.star_graph(299),
    "random-regular": nx.random_regular_graph(4, 300, seed=0),
    "barabasi-albert": nx.barabasi_albert_graph(300, 2, seed=0),
    "cliques": nx.barbell_graph(50, 200),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_graphs_take_another_way_to_the_best_constant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = LARGE[name]
    eigenvalues = np.linalg.eigvalsh(nx.laplacian_matrix(graph).toarray())
    best = 2 * eigenvalues[1] / (eigenvalues[1] + eigenvalues[-1])
    monkeypatch.setattr(matrix_module, "DENSE_NODES", 100)
    matrix = dense(graph, "best-constant")
    gap = 1 - np.abs(np.linalg.eigvalsh(matrix - 1 / len(graph))).max()
    assert best * (1 - 1e-3) <= gap <= best + 1e-12
    np.testing.assert_array_equal(matrix, dense(graph, "best-constant"))


@pytest.mark.parametrize("kind", ["samples", "best-constant", "given", "push-sum"])
def test_ten_thousand_nodes_need_no_number_for_every_pair(kind: str) -> None:
    graph = nx.cycle_graph(10_000)
    nx.set_edge_attributes(graph, 1 / 3, "weight")
    tracemalloc.start()
    matrix = mixing_matrix(graph, kind, dict.fromkeys(graph, 1.0))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert matrix.nnz == 30_000
    assert most < 10_000**2  # bytes: an eighth of a dense matrix


# -- What cannot hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "graph", "words"),
    [
        ("metropolis", lopsided(), 'hear and tell 1.33.*hub hears 1 and tells 2: use weights = "push-sum"$'),
        ("lazy", lopsided(), 'hub hears 1 and tells 2: use weights = "push-sum"$'),
        ("metropolis", two_rings(), 'hub hears 2 and tells 2: use weights = "push-sum"$'),
        ("max-degree", lopsided(), 'as many as it tells, and hub hears 1 and tells 2: use weights = "push-sum"$'),
        ("samples", nx.DiGraph([(0, 1), (1, 0)]), 'use weights = "push-sum-samples"$'),
        ("inverse", lopsided(), "use a graph whose edges go both ways$"),
        ("sqrt", lopsided(), "use a graph whose edges go both ways$"),
        ("best-constant", two_rings(), 'use weights = "push-sum"$'),
        ("fastest", two_rings(), 'use weights = "push-sum"$'),
        ("best-constant", nx.Graph([(0, 1), (2, 3)]), 'connected in every round: use weights = "metropolis"$'),
        ("fastest", nx.empty_graph(3), 'connected in every round: use weights = "metropolis"$'),
        ("fastest", nx.path_graph(501), '501 and 500: use weights = "best-constant"$'),
        ("fastest", nx.circulant_graph(402, range(1, 6)), '402 and 2010: use weights = "best-constant"$'),
    ],
)
def test_what_a_graph_cannot_have_is_refused_with_what_it_can(kind: str, graph: nx.Graph, words: str) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        check_weights(graph, kind)
    assert "\n" not in str(refused.value)
    assert f'weights = "{kind}"' in str(refused.value)
    with pytest.raises(BadInput, match=words):
        dense(graph, kind)
    _, named_alternative, alternative = str(refused.value).rpartition("use weights = ")
    if named_alternative:
        check_weights(graph, alternative.strip('"'))


@pytest.mark.parametrize("kind", ["uniform-neighbours", "push-sum", "push-sum-samples"])
@pytest.mark.parametrize("graph", [lopsided(), two_rings(), nx.Graph([(0, 1), (2, 3)]), nx.empty_graph(1)])
def test_some_kinds_suit_every_graph(kind: str, graph: nx.Graph) -> None:
    check_weights(graph, kind)


@pytest.mark.parametrize("graph_class", [nx.Graph, nx.DiGraph])
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (None, "no weight"),
        (-0.1, "the weight -0.1"),
        (1.5, "the weight 1.5"),
        (math.nan, "the weight nan"),
        ("0.5", "the weight '0.5'"),
    ],
)
def test_a_given_weight_that_is_none_is_named(graph_class: type[nx.Graph], weight: object, words: str) -> None:
    graph = graph_class([("a", "b", {"weight": 0.5}), ("b", "c", {} if weight is None else {"weight": weight})])
    mend = 'give it one from 0 to 1, or use weights = "metropolis"'
    with pytest.raises(BadInput, match=f'^topology: weights = "given", and the edge b - c has {words}: {mend}$'):
        check_weights(graph, "given")


@pytest.mark.parametrize("graph_class", [nx.Graph, nx.DiGraph])
@pytest.mark.parametrize(("one", "other", "total"), [(0.6, 0.5, "1.1"), (0.5, 0.5 + 2e-9, "1.000000002")])
def test_given_weights_above_one_altogether_are_named(
    graph_class: type[nx.Graph], one: float, other: float, total: str
) -> None:
    graph = graph_class([("a", "b"), ("b", "a"), ("c", "b"), ("b", "c")])
    nx.set_edge_attributes(graph, {(a, b): one if "a" in (a, b) else other for a, b in graph.edges}, "weight")
    words = f'b gives others {total} altogether: make it at most 1, or use weights = "metropolis"$'
    with pytest.raises(BadInput, match=words):
        check_weights(graph, "given")


def test_given_weights_may_take_all_but_for_rounding() -> None:
    graph = nx.star_graph(10)
    nx.set_edge_attributes(graph, 0.1 + 1e-11, "weight")
    assert dense(graph, "given")[0, 0] == pytest.approx(0.0, abs=1e-9)


def test_given_weights_that_do_not_keep_the_mean_are_refused() -> None:
    graph = nx.DiGraph()
    graph.add_weighted_edges_from([("a", "b", 0.5), ("b", "a", 0.5 + 9e-7)])
    check_weights(graph, "given")
    graph["b"]["a"]["weight"] = 0.4
    with pytest.raises(BadInput, match=r'a gives 0\.4 and gets 0\.5: make both alike, or use weights = "push-sum"$'):
        check_weights(graph, "given")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_mass_that_is_no_number_is_our_own_defect(broken: float) -> None:
    with pytest.raises(ValueError, match="the samples weights around a node sum to between"):
        dense(nx.path_graph(3), "samples", {0: 1.0, 1: broken, 2: 1.0})
