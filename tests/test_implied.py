"""What graph and weights imply: closed forms, published values, and theorems checked by dense algebra and networkx."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networkx.algorithms.connectivity import local_node_connectivity

from p2pfl.config import TopologySection
from p2pfl.topology import Topology, build
from p2pfl.topology import implied as module
from p2pfl.topology.graphs import VERTEX_TRANSITIVE
from p2pfl.topology.implied import Floats, Implied, errors, implied
from p2pfl.topology.matrix import mixing_matrix

SIZES = (8, 16, 32, 64, 128)


def named(graph: str, nodes: int, **keys: object) -> Topology:
    return build(TopologySection.model_validate({"graph": graph, "nodes": nodes} | keys), seed=0)


def still(graph: nx.Graph) -> Topology:
    """The topology that is always this graph."""
    graph = nx.relabel_nodes(graph, str)
    return Topology("drawn by hand", tuple(graph), 1, lambda round: graph)


def of(topology: Topology, weights: str = "metropolis", masses: Floats | None = None) -> Implied:
    counts = np.ones(len(topology.names)) if masses is None else masses
    return implied(topology, weights, dict(zip(topology.names, counts.tolist(), strict=True)))


def matrix_of(topology: Topology, weights: str, masses: Floats, round: int = 0) -> Floats:
    by_name = dict(zip(topology.names, masses.tolist(), strict=True))
    return np.asarray(mixing_matrix(topology.at(round), weights, by_name).toarray())


@st.composite
def connected_graphs(draw: st.DrawFn, most: int = 10) -> nx.Graph:
    """A random tree and a few edges more."""
    n = draw(st.integers(2, most))
    graph = nx.Graph([(i, draw(st.integers(0, i - 1))) for i in range(1, n)])
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] != pair[1])
    graph.add_edges_from(draw(st.lists(pairs, max_size=2 * n)))
    return graph


@st.composite
def directed_graphs(draw: st.DrawFn, most: int = 8) -> nx.DiGraph:
    """Strongly connected: a ring one way round, and a few edges more."""
    n = draw(st.integers(2, most))
    graph = nx.DiGraph([(i, (i + 1) % n) for i in range(n)])
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] != pair[1])
    graph.add_edges_from(draw(st.lists(pairs, max_size=2 * n)))
    return graph


def masses_of(draw: st.DataObject, n: int) -> Floats:
    return np.array(draw.draw(st.lists(st.floats(0.1, 10.0), min_size=n, max_size=n)))


# -- Closed forms and published values -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 8, 13, 16, 32, 64, 128])
def test_gaps_in_closed_form(n: int) -> None:
    assert of(named("ring", n))["spectral_gap"] == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / n)), abs=1e-9)
    assert of(named("path", n))["spectral_gap"] == pytest.approx(2 / 3 * (1 - math.cos(math.pi / n)), abs=1e-9)
    assert of(named("star", n))["spectral_gap"] == pytest.approx(1 / n, abs=1e-9)
    assert of(named("complete", n))["spectral_gap"] == 1.0
    assert of(named("empty", n))["spectral_gap"] == 0.0
    if n % 2 == 0:
        links = (n - 1).bit_length()
        assert of(named("exponential-directed", n))["spectral_gap"] == pytest.approx(2 / (1 + links), abs=1e-9)


@pytest.mark.parametrize("n", SIZES)
def test_gaps_in_closed_form_of_powers_of_two(n: int) -> None:
    bits = n.bit_length() - 1
    assert of(named("hypercube", n))["spectral_gap"] == pytest.approx(2 / (1 + bits), abs=1e-9)
    assert of(named("exponential", n))["spectral_gap"] == pytest.approx(2 / bits, abs=1e-9)


@pytest.mark.parametrize(("n", "longer_side"), [(16, 4), (30, 6), (32, 8), (64, 8), (128, 16)])
def test_gap_of_a_torus(n: int, longer_side: int) -> None:
    """On 4 x 4 the smallest eigenvalue, -0.6, is as far out as the second largest, 0.6."""
    expected = 2 / 5 * (1 - math.cos(2 * math.pi / longer_side))
    assert of(named("torus", n))["spectral_gap"] == pytest.approx(expected, abs=1e-9)


ROUNDS = {
    "path": (266, 1072, 4297, 17198, 68800),
    "ring": (64, 266, 1072, 4297, 17198),
    "grid": (88, 99, 397, 421, 1686),
    "torus": (20, 28, 111, 111, 447),
    "hypercube": (20, 28, 35, 42, 49),
    "star": (104, 215, 436, 878, 1762),
    "complete": (1, 1, 1, 1, 1),
    "exponential-directed": (20, 28, 35, 42, 49),
    "exponential": (13, 20, 28, 35, 42),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_to_a_millionth(name: str) -> None:
    assert tuple(of(named(name, n))["rounds_to_1e-6"] for n in SIZES) == ROUNDS[name]


def erdos_renyi(n: int) -> nx.Graph:
    return nx.erdos_renyi_graph(n, 2 * math.log(n) / n, seed=0)


RANDOM: dict[str, tuple[Callable[[int], nx.Graph], tuple[float, ...], tuple[int, ...]]] = {
    "3-regular": (
        lambda n: nx.random_regular_graph(3, n, seed=0),
        (0.316987, 0.150997, 0.083179, 0.059326, 0.063868),
        (37, 85, 160, 226, 210),
    ),
    "4-regular": (
        lambda n: nx.random_regular_graph(4, n, seed=0),
        (0.487689, 0.224323, 0.178746, 0.102908, 0.124251),
        (21, 55, 71, 128, 105),
    ),
    "6-regular": (
        lambda n: nx.random_regular_graph(6, n, seed=0),
        (0.857143, 0.393610, 0.353054, 0.280512, 0.232233),
        (8, 28, 32, 42, 53),
    ),
    "erdos-renyi": (
        erdos_renyi,
        (0.296293, 0.188228, 0.082779, 0.154441, 0.226441),
        (40, 67, 160, 83, 54),
    ),
    "watts-strogatz": (
        lambda n: nx.watts_strogatz_graph(n, 4, 0.3, seed=0),
        (0.388415, 0.149850, 0.085907, 0.053661, 0.040671),
        (29, 86, 154, 251, 333),
    ),
    "barabasi-albert": (
        lambda n: nx.barabasi_albert_graph(n, 2, seed=0),
        (0.146111, 0.095769, 0.065605, 0.053085, 0.043907),
        (88, 138, 204, 254, 308),
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_published_random_graphs(name: str) -> None:
    """networkx's own graphs with its seed 0; six decimals of the gap are known."""
    draw, gaps, rounds = RANDOM[name]
    for n, gap, count in zip(SIZES, gaps, rounds, strict=True):
        found = of(still(draw(n)))
        assert (found["spectral_gap"], found["rounds_to_1e-6"]) == (pytest.approx(gap, abs=1e-6), count)


@pytest.mark.parametrize(
    ("name", "n", "smallest"),
    [("ring", 8, -1 / 3), ("ring", 64, -1 / 3), ("torus", 16, -0.6), ("star", 9, 0.0)]
    + [("hypercube", 2**d, (1 - d) / (1 + d)) for d in (2, 3, 5)],
)
def test_smallest_eigenvalues(name: str, n: int, smallest: float) -> None:
    assert of(named(name, n))["lambda_min"] == pytest.approx(smallest, abs=1e-9)


def test_a_negative_eigenvalue_counts_by_its_size() -> None:
    """Complete bipartite 5 + 5: eigenvalues 1, 1/6 (eight times) and -2/3."""
    found = of(still(nx.complete_bipartite_graph(5, 5)))
    assert (found["lambda2"], found["lambda_min"]) == (pytest.approx(2 / 3), pytest.approx(-2 / 3))


FINITE_TIME: dict[tuple[str, int], dict[int, int | None]] = {  # (name, k) → n → exact after; None: never
    ("one-peer-exponential", 1): {5: None, 6: None, 7: None, 8: 3, 12: None, 16: 4, 32: 5, 64: 6, 100: None, 128: 7},
    ("one-peer-hypercube", 1): {8: 3, 16: 4, 32: 5, 64: 6, 128: 7},
    ("base-k", 1): {6: 4, 7: 5, 8: 3, 16: 4, 32: 5, 64: 6, 100: 11, 128: 7},
}


@pytest.mark.parametrize(("name", "k"), FINITE_TIME)
def test_finite_time(name: str, k: int) -> None:
    for n, rounds in FINITE_TIME[name, k].items():
        topology = named(name, n, k=k)
        found = of(topology, "given" if name == "base-k" else "metropolis")
        assert found["exact_after"] == rounds, n
        assert found["lambda2"] == 0.0 if rounds else 0.3 < found["lambda2"] < 0.8
        assert not rounds or found["period"] == rounds == found["rounds_to_1e-6"]


ONE_PEER_ROUNDS = {5: 26, 6: 28, 7: 21, 8: 3, 12: 36, 16: 4, 20: 44, 24: 45, 32: 5, 48: 54, 64: 6, 100: 62, 128: 7}


def test_one_peer_exponential_to_a_millionth() -> None:
    assert {n: of(named("one-peer-exponential", n))["rounds_to_1e-6"] for n in ONE_PEER_ROUNDS} == ONE_PEER_ROUNDS


def test_one_peer_exponential_of_six_misses_by_a_twelfth() -> None:
    """The largest entry of what is left after a period; the norm is what lambda2 is made of."""
    topology = named("one-peer-exponential", 6)
    product = np.linalg.multi_dot([matrix_of(topology, "metropolis", np.ones(6), t) for t in (2, 1, 0)])
    assert abs(product - 1 / 6).max() == pytest.approx(1 / 12)
    assert of(topology)["lambda2"] ** 3 == pytest.approx(np.linalg.norm(product - 1 / 6, 2))


# -- Rounds, eigenvalues and contraction are what they claim to be ---------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(connected_graphs(), st.sampled_from(["metropolis", "lazy", "samples"]), st.data())
def test_the_rounds_are_the_worst_case_and_reached(graph: nx.Graph, weights: str, data: st.DataObject) -> None:
    """Where m_i w_ij = m_j w_ji: the norm by mass of W^t - J falls below a millionth in that round."""
    topology = still(graph)
    masses = masses_of(data, len(graph)) if weights == "samples" else np.ones(len(graph))
    found = of(topology, weights, masses)
    root = np.sqrt(masses / masses.sum())
    rest = root[:, None] * matrix_of(topology, weights, masses) / root - np.outer(root, root)

    def left(t: int) -> float:
        return float(np.linalg.norm(np.linalg.matrix_power(rest, t), 2)) if t else 1.0

    rounds = found["rounds_to_1e-6"]
    assert rounds is not None
    assert left(rounds) <= 1.001e-6
    assert left(rounds - 1) > 0.999e-6
    assert found["lambda2"] == pytest.approx(left(1), abs=1e-9)
    assert found["warnings"] == []


@settings(deadline=None, max_examples=30)
@given(directed_graphs(), st.sampled_from(["push-sum", "uniform-neighbours"]))
def test_the_rounds_on_directed_graphs_too(graph: nx.DiGraph, weights: str) -> None:
    topology, ones = still(graph), np.ones(len(graph))
    found, matrix = of(topology, weights), matrix_of(topology, weights, ones)
    rounds, forever = found["rounds_to_1e-6"], np.linalg.matrix_power(matrix, 2**20)
    reversible = found["lambda_min"] is not None  # then the norm that counts is another one: see above
    assume(not reversible)
    left = [float(np.linalg.norm(np.linalg.matrix_power(matrix, t) - forever, 2)) for t in range((rounds or 0) + 1)]
    assert left[-1] <= 1e-6
    assert all(norm > 1e-6 for norm in left[:-1])
    assert found["lambda2"] == pytest.approx(np.sort(abs(np.linalg.eigvals(matrix)))[-2], abs=1e-5)
    assert found["edges"] == found["messages"] == graph.number_of_edges()
    assert found["directed"]


@settings(deadline=None, max_examples=30)
@given(connected_graphs(), st.sampled_from(["push-sum", "uniform-neighbours"]))
def test_averaging_over_the_neighbourhood_has_the_eigenvalues_of_its_matrix(graph: nx.Graph, weights: str) -> None:
    topology = still(graph)
    found = of(topology, weights)
    eigenvalues = np.sort(np.linalg.eigvals(matrix_of(topology, weights, np.ones(len(graph)))).real)
    assert found["lambda2"] == pytest.approx(max(-eigenvalues[0], eigenvalues[-2], 0.0), abs=1e-7)
    assert found["lambda_min"] == pytest.approx(eigenvalues[0], abs=1e-7)


@settings(deadline=None, max_examples=30)
@given(connected_graphs(), st.data())
def test_typical_contraction_is_the_mean_over_all_directions(graph: nx.Graph, data: st.DataObject) -> None:
    """Over any orthonormal basis of the disagreements, which are the vectors of mean 0."""
    n, topology = len(graph), still(graph)
    masses = masses_of(data, n)
    root = np.sqrt(masses / masses.sum())
    basis = np.linalg.qr(np.column_stack([root, np.eye(n)]))[0][:, 1:n]
    shrunk = root[:, None] * matrix_of(topology, "samples", masses) / root @ basis
    found = of(topology, "samples", masses)["typical_contraction"]
    assert found == pytest.approx(np.sqrt(np.mean((shrunk**2).sum(axis=0))), abs=1e-6)


def test_typical_contraction_over_a_period_is_a_geometric_mean() -> None:
    """Pairs: a round removes one of two of n / 2 pairs' dimensions, and n / 2 - 1 of n - 1 are left."""
    assert of(named("one-peer-hypercube", 16))["typical_contraction"] == pytest.approx(math.sqrt(7 / 15))
    ring, pairs = nx.cycle_graph(4), nx.Graph([(0, 1), (2, 3)])
    by_turns = Topology("by turns", tuple("0123"), 2, lambda t: nx.relabel_nodes(ring if t == 0 else pairs, str))
    apart = [math.sqrt((4 * 3 / 9 - 1) / 3), math.sqrt((4 * 2 / 4 - 1) / 3)]
    assert of(by_turns)["typical_contraction"] == pytest.approx(math.sqrt(math.prod(apart)))


@pytest.mark.parametrize("name", ["one-peer-hypercube", "random-matching"])
def test_with_unequal_masses_rounds_are_counted_by_mass(name: str) -> None:
    """The mean by mass is kept by every pair, so that all agree on it, though no longer in finite time."""
    topology, masses = named(name, 8), np.arange(1.0, 9.0)
    found = of(topology, "samples", masses)
    assert found["exact_after"] is None
    left = errors(topology, "samples", dict(zip(topology.names, masses, strict=True)), 60)
    rounds = found["rounds_to_1e-6"]
    assert rounds is not None
    assert left[rounds] < 1e-6 if name == "one-peer-hypercube" else left[rounds] < 1e-4
    assert left[rounds // 2] > 1e-6


def test_the_rounds_of_a_schedule_are_those_of_its_product() -> None:
    topology, masses = named("one-peer-hypercube", 8), np.arange(1.0, 9.0)
    root = np.sqrt(masses / masses.sum())
    left, norms = np.eye(8) - np.outer(root, root), [1.0]
    while norms[-1] > 1e-6:
        step = matrix_of(topology, "samples", masses, (len(norms) - 1) % 3)
        left = root[:, None] * step / root @ left
        norms.append(float(np.linalg.norm(left, 2)))
    found = of(topology, "samples", masses)
    assert found["rounds_to_1e-6"] == len(norms) - 1
    assert found["lambda2"] == pytest.approx(norms[3] ** (1 / 3))


# -- Graphs that are drawn anew --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "factor"), [(32, 0.483871), (128, 0.496063)])
def test_random_matching(n: int, factor: float) -> None:
    found = of(named("random-matching", n))
    assert found["lambda2"] ** 2 == pytest.approx(factor, abs=1e-6)
    assert found["rounds_to_1e-6"] == math.ceil(math.log(1e-12) / math.log(factor))
    assert (found["period"], found["exact_after"], found["messages"], found["warnings"]) == (None, None, n, [])
    assert (found["diameter"], found["node_connectivity"], found["edges"]) == (1, n - 1, n * (n - 1) // 2)


def matchings(nodes: list[int]) -> Iterator[list[tuple[int, int]]]:
    """All that leave nobody idle of an even number, and one of an odd number."""
    if len(nodes) < 2:
        yield []
        return
    first, rest = nodes[0], nodes[1:]
    for other in rest:
        for matching in matchings([node for node in rest if node != other]):
            yield [(first, other), *matching]
    if len(nodes) % 2:
        yield from matchings(rest)


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7])
def test_random_matching_on_average_over_all_matchings(n: int) -> None:
    start = np.random.default_rng(n).normal(size=n)
    start -= start.mean()
    left = []
    for matching in matchings(list(range(n))):
        values = start.copy()
        for a, b in matching:
            values[[a, b]] = (start[a] + start[b]) / 2
        left.append(values @ values / (start @ start))
    assert of(named("random-matching", n))["lambda2"] ** 2 == pytest.approx(np.mean(left))


EPIDEMIC = {
    (32, 1): 0.617550,
    (32, 2): 0.408568,
    (32, 4): 0.214736,
    (32, 7): 0.110559,
    (128, 1): 0.628585,
    (128, 2): 0.426576,
    (128, 4): 0.237968,
    (128, 7): 0.134882,
}


@pytest.mark.parametrize(("n", "s"), EPIDEMIC)
def test_epidemic(n: int, s: int) -> None:
    found = of(named("epidemic", n, s=s), "uniform-neighbours")
    assert found["lambda2"] ** 2 == pytest.approx(EPIDEMIC[n, s], abs=1e-6)
    assert (found["messages"], found["edges"]) == (n * s, n * (n - 1))
    assert found["warnings"] == [
        'the mean is kept only in expectation: weights = "push-sum" keeps it exactly',
    ]


@pytest.mark.parametrize(("name", "weights"), [("random-matching", "metropolis"), ("epidemic", "uniform-neighbours")])
def test_without_a_formula_the_factor_is_estimated(name: str, weights: str) -> None:
    """Under another name, so that no formula is known; what drawn rounds say is the same within a few per cent."""
    known = named(name, 32)
    estimated = of(Topology("nameless", known.names, None, known.at), weights)
    assert estimated["lambda2"] == pytest.approx(of(known, weights)["lambda2"], rel=0.03)
    assert estimated["warnings"][-1] == "lambda2 and the rounds are estimated from 200 drawn rounds"
    assert estimated == of(Topology("nameless", known.names, None, known.at), weights)


def test_epidemic_with_push_sum_agrees_as_fast_as_estimated() -> None:
    topology = named("epidemic", 64)
    found = of(topology, "push-sum")
    rounds = found["rounds_to_1e-6"]
    assert rounds is not None
    left = errors(topology, "push-sum", dict.fromkeys(topology.names, 1.0), rounds + 3)
    assert left[-1] < 1e-6 < left[rounds - 4]
    assert found["typical_contraction"] is None


@pytest.mark.parametrize(("name", "keys"), [("random-matching", {}), ("epidemic", {"s": 1})])
def test_two_nodes_that_always_meet_agree_at_once(name: str, keys: dict[str, int]) -> None:
    for weights in ("metropolis", "uniform-neighbours", "push-sum"):
        found = of(named(name, 2, **keys), weights)
        assert (found["lambda2"], found["rounds_to_1e-6"], found["exact_after"]) == (0.0, 1, 1)


# -- What is left after some rounds ----------------------------------------------------------------------------------


def test_errors_start_like_the_typical_and_end_like_the_worst() -> None:
    topology = named("torus", 36)
    found, left = of(topology), errors(topology, "metropolis", dict.fromkeys(topology.names, 1.0), 100)
    assert left.shape == (101,)
    assert left[0] == 1.0
    assert left[1] == pytest.approx(found["typical_contraction"], rel=0.1)
    assert left[100] / left[99] == pytest.approx(found["lambda2"], rel=1e-6)
    assert (np.diff(left) < 0).all()


def test_push_sum_ends_at_the_mean_where_the_neighbourhood_mean_does_not() -> None:
    """A ring of five, one way, with a chord from 0 to 2."""
    topology = still(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2)]))
    masses = dict(zip(topology.names, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    for weights in ("push-sum", "push-sum-samples"):
        assert errors(topology, weights, masses, 200)[-1] < 1e-12
    assert errors(topology, "uniform-neighbours", dict.fromkeys(topology.names, 1.0), 200)[-1] > 0.1


def test_errors_of_a_schedule_vanish_when_it_is_exact() -> None:
    topology = named("one-peer-exponential", 16)
    left = errors(topology, "metropolis", dict.fromkeys(topology.names, 1.0), 6)
    assert left[3] > 0.1
    assert (left[4:] < 1e-15).all()


def test_a_single_node_has_no_error() -> None:
    assert errors(named("ring", 1), "metropolis", {"node-0": 1.0}, 3).tolist() == [0.0] * 4


# -- Large graphs ----------------------------------------------------------------------------------------------------

LARGE = [
    ("ring", "metropolis"),
    ("path", "lazy"),
    ("star", "samples"),
    ("torus", "samples"),
    ("tree", "push-sum"),
    ("grid", "uniform-neighbours"),
    ("random-regular", "metropolis"),
    ("exponential-directed", "metropolis"),
    ("one-peer-exponential", "metropolis"),
    ("one-peer-exponential", "push-sum"),
    ("one-peer-hypercube", "samples"),
    ("base-k", "push-sum"),
    ("base-k", "uniform-neighbours"),
]


@pytest.mark.parametrize(("name", "weights"), LARGE)
@pytest.mark.parametrize("restarts", [module.LANCZOS_RESTARTS, 1])
def test_large_graphs_take_another_way_to_the_same_numbers(
    name: str, weights: str, restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanczos, or with too few restarts for it shift and invert; products applied and not multiplied."""
    topology = named(name, 50, k=3) if name == "base-k" else named(name, 64)  # 50: degrees are different in some rounds
    n = len(topology.names)
    masses = np.array([1.0 + i % 7 for i in range(n)]) if weights == "samples" else np.ones(n)
    small_way = of(topology, weights, masses)
    monkeypatch.setattr(module, "DENSE_NODES", 40)
    monkeypatch.setattr(module, "DENSE_PRODUCT_NODES", 40)
    monkeypatch.setattr(module, "LANCZOS_RESTARTS", restarts)
    large_way = of(topology, weights, masses)
    for key in ("lambda2", "lambda_min", "typical_contraction"):
        assert large_way[key] == pytest.approx(small_way[key], abs=1e-8)  # type: ignore[literal-required]
    assert large_way["rounds_to_1e-6"] == small_way["rounds_to_1e-6"]
    assert large_way["warnings"] == small_way["warnings"]


def test_a_large_graph_with_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the dense products its rounds follow from lambda2: how a long product behaves, but for a factor."""
    graph = nx.gnp_random_graph(60, 0.1, seed=1, directed=True)
    assert nx.is_strongly_connected(graph)
    topology = still(graph)
    small_way = {weights: of(topology, weights) for weights in ("push-sum", "uniform-neighbours")}
    monkeypatch.setattr(module, "DENSE_PRODUCT_NODES", 50)
    for weights, expected in small_way.items():
        found = of(topology, weights)
        assert found["lambda2"] == pytest.approx(expected["lambda2"], abs=1e-8)
        assert found["rounds_to_1e-6"] == pytest.approx(expected["rounds_to_1e-6"], abs=3)
    assert of(topology, "uniform-neighbours")["warnings"] == ["the limit does not count all nodes alike"]


def test_ring_of_two_thousand() -> None:
    expected = 2 / 3 * (1 - math.cos(2 * math.pi / 2000))
    found = of(named("ring", 2000))
    assert found["spectral_gap"] == pytest.approx(expected, abs=1e-11)
    assert found["lambda_min"] == pytest.approx(-1 / 3, abs=1e-9)
    assert (found["diameter"], found["node_connectivity"]) == (1000, 2)


@pytest.mark.parametrize("name", ["ring", "random-regular", "one-peer-exponential"])
def test_no_number_is_held_for_each_pair_of_nodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of float64 takes four times as much."""
    n = 2000
    topology = named(name, n)
    for round in range(topology.period or 1):
        topology.at(round)
    monkeypatch.setattr(module, "FLOW_WORK", 0)  # which takes time, and next to no memory
    tracemalloc.start()
    try:
        of(topology)
        assert tracemalloc.get_traced_memory()[1] < 2 * n * n
    finally:
        tracemalloc.stop()


# -- What holds together ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(connected_graphs(), st.booleans())
def test_shape_of_graphs_as_networkx_sees_it(graph: nx.Graph, many_searches_at_once: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if many_searches_at_once:
            patch.setattr(module, "BOUNDING_SEARCHES", 0)
        found = of(still(graph))
    assert (found["diameter"], found["connected"]) == (nx.diameter(graph), True)
    assert found["node_connectivity"] == nx.node_connectivity(graph)
    assert found["edge_connectivity"] == nx.edge_connectivity(graph)
    degrees = [degree for _, degree in graph.degree]
    assert found["degree"] == {"min": min(degrees), "mean": pytest.approx(np.mean(degrees)), "max": max(degrees)}
    assert found["messages"] == 2 * found["edges"] == 2 * graph.number_of_edges()


def deaths_that_cut(graph: nx.DiGraph) -> int:
    """By trying all. (networkx looks only from a node to others, not back, and finds too many.)"""
    for deaths in range(len(graph)):
        for dead in itertools.combinations(graph, deaths):
            left = nx.restricted_view(graph, dead, [])
            if len(left) == 1 or not nx.is_strongly_connected(left):
                return deaths
    raise AssertionError("even a single node is connected")


@settings(deadline=None, max_examples=30)
@given(directed_graphs(), st.booleans())
def test_shape_of_directed_graphs(graph: nx.DiGraph, one_search_after_another: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if one_search_after_another:
            patch.setattr(module, "LONG_WAY", 0)
        found = of(still(graph), "push-sum")
    assert (found["diameter"], found["connected"]) == (nx.diameter(graph), True)
    assert found["node_connectivity"] == deaths_that_cut(graph)
    assert found["edge_connectivity"] == nx.edge_connectivity(graph)


def joined(*groups: Iterable[int]) -> nx.DiGraph:
    """In each group everybody sends to everybody."""
    return nx.compose_all([nx.complete_graph(group, nx.DiGraph) for group in groups])


def every(senders: Iterable[int], receivers: Iterable[int]) -> nx.DiGraph:
    return nx.DiGraph(itertools.product(senders, receivers))


LEFT, RIGHT, MIDDLE = range(8), range(8, 16), range(16, 19)
THROUGH_THE_MIDDLE = [every(LEFT[:4], MIDDLE), every(MIDDLE, RIGHT[:4])]
NARROW: dict[str, tuple[nx.Graph, int, int]] = {  # name → graph, node connectivity, edge connectivity
    "two triangles share a node": (joined((0, 1, 2), (2, 3, 4)).to_undirected(), 1, 2),
    "all ways lead through three nodes of a low degree": (
        nx.compose_all([joined(LEFT, RIGHT), *THROUGH_THE_MIDDLE]).to_undirected(),
        3,
        8 - 1,
    ),
    "all ways there, but not back": (
        nx.compose_all([joined(LEFT, RIGHT), *THROUGH_THE_MIDDLE, every(RIGHT, LEFT)]),
        3,
        4,
    ),
    "a way in through one node": (nx.compose_all([joined((0, 1, 2), (2, 3, 4)), every((0, 1), (3, 4))]), 1, 2),
    "a way out through one node": (nx.compose_all([joined((0, 1, 2), (2, 3, 4)), every((3, 4), (0, 1))]), 1, 2),
    "two links there, and many back": (
        nx.compose_all([joined(LEFT, RIGHT), every((0,), (8, 9)), every(RIGHT, LEFT)]),
        1,
        2,
    ),
    "many links there, and two back": (
        nx.compose_all([joined(LEFT, RIGHT), every((8,), (0, 1)), every(LEFT, RIGHT)]),
        1,
        2,
    ),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_places(name: str) -> None:
    graph, nodes, links = NARROW[name]
    found = of(still(graph), "push-sum")
    assert (found["node_connectivity"], found["edge_connectivity"]) == (nodes, links)


def test_narrow_places_where_all_nodes_are_alike() -> None:
    """A ring of five pairs: its nodes have five neighbours, and four of them cut it. One way round: three, and two."""
    both_ways = still(nx.lexicographic_product(nx.cycle_graph(5), nx.complete_graph(2)))
    found = of(Topology("equi-static", both_ways.names, 1, both_ways.at))
    assert (found["node_connectivity"], found["edge_connectivity"]) == (4, 5)
    one_way = still(nx.lexicographic_product(nx.cycle_graph(5, nx.DiGraph), nx.complete_graph(2, nx.DiGraph)))
    found = of(Topology("exponential-directed", one_way.names, 1, one_way.at))
    assert (found["node_connectivity"], found["edge_connectivity"]) == (2, 3)


def test_searches_follow_the_directions() -> None:
    """1 and 4 send to the same nodes and to each other, so that one search does for both, but not backwards."""
    found = of(still(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 0), (1, 4), (4, 1), (4, 2)])), "push-sum")
    assert found["diameter"] == 4


@pytest.mark.parametrize("seed", range(4))
def test_shape_of_graphs_of_some_size(seed: int) -> None:
    """Where neither bounds nor a least degree of one or two settle it."""
    graph = nx.gnp_random_graph(70, 0.12, seed=seed)
    found = of(still(graph))
    assert found["diameter"] == nx.diameter(graph)
    assert found["node_connectivity"] == nx.node_connectivity(graph) >= 2
    assert found["edge_connectivity"] == nx.edge_connectivity(graph)


@pytest.mark.parametrize("seed", range(3))
def test_shape_of_directed_graphs_of_some_size(seed: int) -> None:
    """By the disjoint paths between all that are not joined."""
    graph = nx.gnp_random_graph(15, 0.4, seed=seed, directed=True)
    found = of(still(graph), "push-sum")
    apart = [pair for pair in itertools.permutations(graph, 2) if not graph.has_edge(*pair)]
    assert found["diameter"] == nx.diameter(graph)
    assert found["node_connectivity"] == min(local_node_connectivity(graph, a, b) for a, b in apart)
    assert found["edge_connectivity"] == nx.edge_connectivity(graph)


@pytest.mark.parametrize("name", sorted(VERTEX_TRANSITIVE - {"empty"}))
@pytest.mark.parametrize("n", [4, 8, 16, 32])
def test_shortcuts_where_all_nodes_are_alike(name: str, n: int) -> None:
    """The same graph under another name goes the long way."""
    topology = named(name, n)
    short, long = of(topology), of(Topology("nameless", topology.names, 1, topology.at))
    assert {**short, "name": ""} == {**long, "name": ""}


@pytest.mark.parametrize("name", ["one-peer-exponential", "one-peer-hypercube"])
def test_shape_of_all_rounds_together(name: str) -> None:
    together = named("exponential-directed" if name == "one-peer-exponential" else "hypercube", 16).at(0)
    found = of(named(name, 16))
    assert (found["edges"], found["diameter"]) == (together.number_of_edges(), nx.diameter(together))
    assert found["node_connectivity"] == found["edge_connectivity"] == nx.node_connectivity(together)
    assert found["degree"] == {"min": 1, "mean": 1.0, "max": 1}


def test_flows_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLOW_WORK", 0)
    found = {name: of(named(name, 12)) for name in ("random-regular", "grid", "tree", "complete", "torus", "caveman")}
    assert {name: shape["node_connectivity"] for name, shape in found.items()} == {
        "random-regular": None,
        "grid": 2,
        "tree": 1,
        "complete": 11,
        "torus": 4,
        "caveman": None,
    }
    assert {name: shape["edge_connectivity"] for name, shape in found.items()} == {
        "random-regular": None,
        "grid": 2,
        "tree": 1,
        "complete": 11,
        "torus": 4,
        "caveman": None,
    }
    assert of(named("dumbbell", 12))["edge_connectivity"] == 1


# -- What is printed -------------------------------------------------------------------------------------------------


def test_what_a_ring_implies() -> None:
    topology = named("ring", 8)
    found = implied(topology, "metropolis", dict.fromkeys(topology.names, 1.0), parameters=1000)
    lambda2 = 1 / 3 + 2 / 3 * math.cos(math.pi / 4)
    assert found == {
        "name": "ring",
        "nodes": 8,
        "edges": 8,
        "directed": False,
        "degree": {"min": 2, "mean": 2.0, "max": 2},
        "connected": True,
        "diameter": 4,
        "node_connectivity": 2,
        "edge_connectivity": 2,
        "messages": 16,
        "parameters": 1000,
        "bytes": 64_000,
        "weights": "metropolis",
        "lambda2": pytest.approx(lambda2, abs=1e-9),
        "lambda_min": pytest.approx(-1 / 3, abs=1e-9),
        "spectral_gap": pytest.approx(1 - lambda2, abs=1e-9),
        "typical_contraction": pytest.approx(math.sqrt((8 / 3 - 1) / 7)),
        "rounds_to_1e-6": 64,
        "exact_after": None,
        "period": 1,
        "warnings": [],
    }
    assert json.loads(json.dumps(found)) == found
    assert of(topology)["bytes"] is None


def test_a_graph_in_pieces_never_agrees() -> None:
    found = of(still(nx.Graph([(0, 1), (2, 3), (3, 4)])))
    assert (found["connected"], found["diameter"]) == (False, None)
    assert (found["node_connectivity"], found["edge_connectivity"]) == (0, 0)
    assert (found["lambda2"], found["spectral_gap"], found["rounds_to_1e-6"]) == (1.0, 0.0, None)
    assert found["exact_after"] is None
    assert found["lambda_min"] == pytest.approx(0.0, abs=1e-9)
    assert found["warnings"] == ["the graph is not connected: its 2 parts never agree"]


def test_a_graph_without_a_way_back_never_agrees() -> None:
    found = of(still(nx.DiGraph([(0, 1), (1, 2), (2, 1)])), "push-sum")
    assert (found["connected"], found["lambda2"], found["rounds_to_1e-6"]) == (False, 1.0, None)
    assert found["warnings"] == ["the graph is not connected: its 2 strongly connected parts never agree"]


@pytest.mark.parametrize("name", ["complete", "ring", "path", "star", "empty", "random-matching", "base-k"])
def test_one_node_agrees_with_itself_at_once(name: str) -> None:
    found = of(named(name, 1))
    assert (found["edges"], found["connected"], found["diameter"], found["node_connectivity"]) == (0, True, 0, 0)
    assert (found["lambda2"], found["rounds_to_1e-6"], found["exact_after"]) == (0.0, 0, 0)
    assert found["warnings"] == []


@pytest.mark.parametrize("name", ["complete", "ring", "path", "star", "hypercube", "exponential-directed"])
def test_two_nodes_agree_after_one_round(name: str) -> None:
    found = of(named(name, 2))
    assert (found["lambda2"], found["rounds_to_1e-6"], found["exact_after"]) == (0.0, 1, 1)


def test_all_with_all_agree_in_one_round_by_samples_too() -> None:
    found = of(named("complete", 6), "samples", np.array([120.0, 3, 45, 45, 1, 900]))
    assert (found["exact_after"], found["lambda2"], found["typical_contraction"]) == (1, 0.0, 0.0)


def test_a_bias_is_told_with_its_size() -> None:
    """A star of 6: its hub has five neighbours, the others one."""
    assert of(named("star", 6), "uniform-neighbours")["warnings"] == [
        "the limit counts a node as its degree + 1: the best connected counts 3 times as much as the least"
    ]
    assert of(named("star", 6), "uniform-neighbours")["typical_contraction"] is None
    assert of(named("torus", 16), "uniform-neighbours")["warnings"] == []
    one_way = still(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2)]))
    (warning,) = of(one_way, "uniform-neighbours")["warnings"]
    assert warning.startswith("the limit does not count all nodes alike: the best connected counts ")


def test_weights_that_were_rounded_in_a_file_still_keep_the_mean() -> None:
    thirds = [(0, 1, 0.3333333), (1, 2, 0.3333334), (2, 0, 0.3333333)]
    graph = nx.DiGraph()
    graph.add_weighted_edges_from(thirds)
    found = of(still(graph), "given")
    assert (found["warnings"], found["rounds_to_1e-6"]) == ([], 26)


@pytest.mark.parametrize("weights", [(0.5, 0.0, 0.5), (0.4, 0.0, 0.4)])
def test_an_edge_without_weight_joins_nothing(weights: tuple[float, ...]) -> None:
    graph = nx.Graph()
    graph.add_weighted_edges_from((i, i + 1, weight) for i, weight in enumerate(weights))
    found = of(still(graph), "given")
    assert (found["lambda2"], found["rounds_to_1e-6"]) == (pytest.approx(1.0), None)


def test_fast_is_not_exact() -> None:
    """All but equal weights, one way round: after four rounds as little is left as of rounding errors."""
    graph = nx.DiGraph()
    more = {1: 5e-4, 2: -5e-4}
    graph.add_weighted_edges_from((i, (i + u) % 5, 0.2 + more.get(u, 0.0)) for u in range(1, 5) for i in range(5))
    found = of(still(graph), "given")
    turn = np.exp(2j * np.pi * np.arange(1, 5) / 5)
    assert found["lambda2"] == pytest.approx(5e-4 * abs(turn - turn**2).max(), rel=1e-6)
    assert (found["exact_after"], found["rounds_to_1e-6"]) == (None, 2)


def test_who_only_hands_on_never_agrees() -> None:
    graph = nx.DiGraph()
    graph.add_weighted_edges_from((i, (i + 1) % 5, 1.0) for i in range(5))
    found = of(still(graph), "given")
    assert (found["lambda2"], found["rounds_to_1e-6"]) == (pytest.approx(1.0), None)


def test_exactness_is_told_with_its_condition() -> None:
    assert of(named("one-peer-exponential", 8))["warnings"] == ["exact after 3 rounds only while no message is lost"]
    assert of(named("one-peer-exponential", 6))["warnings"] == []


def test_negative_weights_are_told() -> None:
    """Best constant on a star of 6: 1 - 2 / 7 * 5 for its hub."""
    assert of(named("star", 6), "best-constant")["warnings"] == [
        "a node gives its own vector the weight -0.429: robust rules do not go with negative weights"
    ]
