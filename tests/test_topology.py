"""Graphs, mixing matrices, and the theorems about them."""

import json
import math
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl import topology
from p2pfl.config import GRAPHS, WEIGHTS, TopologySection
from p2pfl.messages import BadInput
from p2pfl.topology import GENERATORS, build, implied, mixing_matrix, names_in, node_link, second_eigenvalue
from p2pfl.weights import mass, reach


def make(graph: str, nodes: int, degree: int = 4, seed: int = 0) -> nx.Graph:
    return build(TopologySection(graph=graph, nodes=nodes, degree=degree), seed)


def ones(graph: nx.Graph) -> dict[str, float]:
    return dict.fromkeys(graph, 1.0)


def gap(graph: nx.Graph) -> float:
    return 1 - second_eigenvalue(graph, ones(graph))


@st.composite
def connected_graphs_with_masses(draw: st.DrawFn) -> tuple[nx.Graph, dict[str, float]]:
    n = draw(st.integers(2, 12))
    graph = nx.Graph()
    graph.add_nodes_from(f"n{i}" for i in range(n))
    for i in range(1, n):  # a random tree, so that it is connected …
        graph.add_edge(f"n{i}", f"n{draw(st.integers(0, i - 1))}")
    for i, j in draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=n)):
        if i != j:  # … and a few edges more
            graph.add_edge(f"n{i}", f"n{j}")
    return graph, {name: draw(st.floats(0.1, 10.0)) for name in graph}


# -- Generators ------------------------------------------------------------------------------------------------------


def test_the_config_knows_exactly_the_generators() -> None:
    assert tuple(GENERATORS) == GRAPHS


EDGES = {  # name -> (of 1 node, of 2, of 6): the number of edges; None where such a graph makes no sense
    "complete": (0, 1, 15),
    "ring": (0, 1, 6),
    "path": (0, 1, 5),
    "star": (0, 1, 5),
    "torus": (0, 1, 9),
    "random-regular": (None, None, 12),
    "empty": (0, 0, 0),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("column", "nodes"), [(0, 1), (1, 2), (2, 6)])
def test_number_of_edges(name: str, column: int, nodes: int) -> None:
    expected = EDGES[name][column]
    if expected is None:
        with pytest.raises(BadInput):
            make(name, nodes)
    else:
        graph = make(name, nodes)
        assert graph.number_of_edges() == expected
        assert nx.number_of_selfloops(graph) == 0


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_keep_the_order_of_the_names(name: str) -> None:
    names = ("zoe", "amy", "kim", "bob", "eve", "dan")
    graph = build(TopologySection(graph=name, nodes=names), seed=3)
    assert tuple(graph) == names
    assert graph.name == name


def test_the_first_node_is_the_hub_of_a_star() -> None:
    assert dict(make("star", 5).degree) == {"node-0": 4, "node-1": 1, "node-2": 1, "node-3": 1, "node-4": 1}


@pytest.mark.parametrize(("nodes", "rows", "columns"), [(9, 3, 3), (12, 3, 4), (16, 4, 4), (20, 4, 5), (35, 5, 7)])
def test_a_torus_is_a_product_of_two_rings(nodes: int, rows: int, columns: int) -> None:
    product = nx.cartesian_product(nx.cycle_graph(rows), nx.cycle_graph(columns))
    assert nx.is_isomorphic(make("torus", nodes), product)


def test_a_torus_of_two_by_four_is_the_cube() -> None:
    assert nx.is_isomorphic(make("torus", 8), nx.hypercube_graph(3))


@pytest.mark.parametrize("nodes", [3, 5, 7, 31])
def test_a_torus_of_a_prime_number_is_refused_with_a_number_that_works(nodes: int) -> None:
    with pytest.raises(BadInput, match=f"use {nodes - 1} or {nodes + 1} nodes"):
        make("torus", nodes)
    assert make("torus", nodes - 1).number_of_nodes() == nodes - 1
    assert make("torus", nodes + 1).number_of_nodes() == nodes + 1


@pytest.mark.parametrize(("nodes", "degree"), [(2, 1), (5, 4), (8, 3), (9, 2), (30, 2), (32, 4), (20, 19), (40, 33)])
@pytest.mark.parametrize("seed", range(3))
def test_random_regular_graphs_are_regular_and_connected(nodes: int, degree: int, seed: int) -> None:
    graph = make("random-regular", nodes, degree, seed)
    assert {d for _, d in graph.degree} == {degree}
    assert nx.is_connected(graph)
    assert sorted(graph.edges) == sorted(make("random-regular", nodes, degree, seed).edges)


def test_seeds_draw_different_random_graphs() -> None:
    drawn = {frozenset(frozenset(edge) for edge in make("random-regular", 12, 3, seed).edges) for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize(
    ("nodes", "degree", "mend"),
    [
        (4, 4, "use more nodes, or a smaller degree"),
        (1, 1, "use more nodes, or a smaller degree"),
        (7, 3, "use 8 nodes, or degree = 2"),
        (5, 1, "use 6 nodes, or degree = 2"),
        (6, 1, "use degree = 2 or more"),
    ],
)
def test_impossible_regular_graphs_are_refused(nodes: int, degree: int, mend: str) -> None:
    with pytest.raises(BadInput, match=mend):
        make("random-regular", nodes, degree)


def test_a_section_without_a_graph_is_refused() -> None:
    with pytest.raises(BadInput, match="set graph to one of complete, ring"):
        build(TopologySection(nodes=3), seed=0)


# -- Hand-drawn graphs -----------------------------------------------------------------------------------------------

TOWNS = ("ulm", "bonn", "graz", "linz")


def edgelist(folder: Path, text: str) -> Path:
    path = folder / "towns.edgelist"
    path.write_text(text, "utf-8")
    return path


def test_an_edge_list(tmp_path: Path) -> None:
    path = edgelist(tmp_path, "# who talks to whom\nulm bonn\n\nbonn\tgraz  # by night only\n  graz ulm\nbonn ulm\n")
    graph = build(TopologySection(file=path, nodes=TOWNS), seed=0)
    assert tuple(graph) == TOWNS
    assert {frozenset(edge) for edge in graph.edges} == {
        frozenset(("ulm", "bonn")),
        frozenset(("bonn", "graz")),
        frozenset(("graz", "ulm")),
    }
    assert graph.name == "towns.edgelist"
    assert names_in(path) == ("bonn", "graz", "ulm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ulm bonn\nulm gras\n", r"line 2: 'gras' is not one of topology.nodes; did you mean 'graz'\?"),
        ("# x\n\nulm ulm\n", "line 3: 'ulm' is joined to itself"),
        ("ulm bonn 0.5\n", "line 1: an edge is two names"),
        ("ulm\n", "line 1: an edge is two names"),
    ],
)
def test_a_mistake_in_an_edge_list_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    section = TopologySection(file=edgelist(tmp_path, text), nodes=TOWNS)
    with pytest.raises(BadInput, match=message):
        build(section, seed=0)


@pytest.mark.parametrize("name", ["towns.gexf", "towns"])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"read from an \.edgelist"):
        build(TopologySection(file=tmp_path / name, nodes=TOWNS), seed=0)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        build(TopologySection(file=tmp_path / "absent.edgelist", nodes=TOWNS), seed=0)
    binary = tmp_path / "binary.edgelist"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read"):
        build(TopologySection(file=binary, nodes=TOWNS), seed=0)


def test_edges_in_the_experiment_file() -> None:
    section = TopologySection(edges=(("ulm", "bonn"), ("bonn", "ulm"), ("bonn", "linz")), nodes=TOWNS)
    assert sorted(build(section, seed=0).edges) == [("bonn", "linz"), ("ulm", "bonn")]


@pytest.mark.parametrize(("edge", "message"), [(("ulm", "wien"), "'wien' is not one of"), (("ulm", "ulm"), "itself")])
def test_a_mistake_in_the_edges(edge: tuple[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=f"topology.edges: .*{message}"):
        build(TopologySection(edges=(edge,), nodes=TOWNS), seed=0)


# -- Theorems on the weights -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(connected_graphs_with_masses())
def test_averaging_ends_at_the_mean_weighted_by_the_masses(drawn: tuple[nx.Graph, dict[str, float]]) -> None:
    graph, masses = drawn
    matrix, m = mixing_matrix(graph, masses), np.array(list(masses.values()))
    target = m / m.sum()
    flow = m[:, None] * matrix
    assert (matrix >= 0).all()
    assert (np.diag(matrix) > 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(flow, flow.T, rtol=1e-12)
    np.testing.assert_allclose(target @ matrix, target, atol=1e-12)
    equations = np.vstack([matrix.T - np.eye(len(graph)), np.ones(len(graph))])
    stationary, _, rank, _ = np.linalg.lstsq(equations, np.r_[np.zeros(len(graph)), 1.0])
    assert rank == len(graph)  # there is only one
    np.testing.assert_allclose(stationary, target, atol=1e-9)


@settings(deadline=None)
@given(connected_graphs_with_masses())
def test_with_equal_masses_it_is_the_metropolis_matrix(drawn: tuple[nx.Graph, dict[str, float]]) -> None:
    graph, _ = drawn
    matrix, names = mixing_matrix(graph, ones(graph)), list(graph)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i != j:
                expected = 1 / (1 + max(graph.degree[a], graph.degree[b])) if graph.has_edge(a, b) else 0.0
                assert matrix[i, j] == expected
    np.testing.assert_array_equal(matrix, matrix.T)


def test_samples_on_a_complete_graph_are_fedavg_in_one_step() -> None:
    graph = make("complete", 6)
    samples = [120, 3, 45, 45, 1, 900]
    masses = {name: mass("samples", n) for name, n in zip(graph, samples, strict=True)}
    x = np.random.default_rng(0).normal(size=(6, 4))
    fedavg = sum(n * row for n, row in zip(samples, x, strict=True)) / sum(samples)
    np.testing.assert_allclose(mixing_matrix(graph, masses) @ x, np.tile(fedavg, (6, 1)), atol=1e-12)
    assert implied(graph, "samples", masses)["exact_after"] == 1


def test_a_star_ends_at_the_sample_weighted_mean_and_the_naive_rule_elsewhere() -> None:
    """Naive: FedAvg over whoever is near, n_j / S_i. It ends at sum n_i S_i x_i / sum n_i S_i."""
    graph, samples, x = make("star", 5), np.array([10.0, 1, 1, 1, 1]), np.arange(1.0, 6.0)
    masses = dict(zip(graph, samples, strict=True))
    reaches = np.array([reach([masses[a], *(masses[b] for b in graph[a])]) for a in graph])
    near = nx.to_numpy_array(graph) + np.eye(5)
    naive = near * samples / reaches[:, None]

    ours = np.linalg.matrix_power(mixing_matrix(graph, masses), 2**12) @ x
    theirs = np.linalg.matrix_power(naive, 2**12) @ x

    np.testing.assert_allclose(ours, 24 / 14, atol=1e-9)
    np.testing.assert_allclose(theirs, (samples * reaches * x).sum() / (samples * reaches).sum(), atol=1e-9)
    assert abs(theirs[0] - 24 / 14) > 0.05


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_weighting_mixes_on_a_connected_graph(weights: str) -> None:
    graph = make("ring", 8)
    masses = {name: mass(weights, 10 + 7 * i) for i, name in enumerate(graph)}
    found = implied(graph, weights, masses)
    assert found["weights"] == weights
    assert 0.0 < found["spectral_gap"] < 0.3


# -- Closed forms of the spectral gap (Metropolis) -------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 8, 13, 16, 32, 64, 128])
def test_gaps_in_closed_form(n: int) -> None:
    assert gap(make("ring", n)) == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / n)), abs=1e-9)
    assert gap(make("path", n)) == pytest.approx(2 / 3 * (1 - math.cos(math.pi / n)), abs=1e-9)
    assert gap(make("star", n)) == pytest.approx(1 / n, abs=1e-9)
    assert gap(make("complete", n)) == 1.0
    assert gap(make("empty", n)) == 0.0


@pytest.mark.parametrize(("n", "longer_side"), [(16, 4), (30, 6), (32, 8), (64, 8), (128, 16)])
def test_gap_of_a_torus(n: int, longer_side: int) -> None:
    """On 4x4 the smallest eigenvalue, -0.6, is as far out as the second largest, 0.6."""
    assert gap(make("torus", n)) == pytest.approx(2 / 5 * (1 - math.cos(2 * math.pi / longer_side)), abs=1e-9)


def test_gap_of_a_cube() -> None:
    assert gap(make("torus", 8)) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("degree", "expected"), [(3, 0.316987), (4, 0.487689), (6, 0.857143)])
def test_gap_of_published_random_graphs(degree: int, expected: float) -> None:
    """networkx's own random regular graphs of 8 nodes with its seed 0; 6 decimals known."""
    graph = nx.random_regular_graph(degree, 8, seed=0)
    assert gap(graph) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_smallest_eigenvalue_of_an_even_ring(n: int) -> None:
    graph = make("ring", n)
    assert np.linalg.eigvalsh(mixing_matrix(graph, ones(graph)))[0] == pytest.approx(-1 / 3, abs=1e-9)


@pytest.mark.parametrize("dense_nodes", [1000, 5])
def test_a_negative_eigenvalue_counts_by_its_size(dense_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete bipartite 5 + 5: eigenvalues 1, 1/6 (eight times) and -2/3."""
    monkeypatch.setattr(topology, "DENSE_NODES", dense_nodes)
    graph = nx.complete_bipartite_graph(5, 5)
    assert second_eigenvalue(graph, ones(graph)) == pytest.approx(2 / 3, abs=1e-9)


@pytest.mark.parametrize("name", ["ring", "torus", "star"])
@pytest.mark.parametrize("weights", ["metropolis", "samples"])
def test_large_graphs_take_another_way_to_the_same_number(
    name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make(name, 100)
    masses = {name: mass(weights, 1 + i % 7) for i, name in enumerate(graph)}
    small_way = second_eigenvalue(graph, masses)
    monkeypatch.setattr(topology, "DENSE_NODES", 50)
    assert second_eigenvalue(graph, masses) == pytest.approx(small_way, abs=1e-10)


def test_gap_of_a_ring_of_two_thousand() -> None:
    expected = 2 / 3 * (1 - math.cos(2 * math.pi / 2000))
    assert gap(make("ring", 2000)) == pytest.approx(expected, abs=1e-11)


# -- What is printed -------------------------------------------------------------------------------------------------


ROUNDS = {
    "path": {8: 266, 16: 1072, 32: 4297, 64: 17198, 128: 68800},
    "ring": {8: 64, 16: 266, 32: 1072, 64: 4297, 128: 17198},
    "torus": {8: 20, 16: 28, 32: 111, 64: 111, 128: 447},
    "star": {8: 104, 16: 215, 32: 436, 64: 878, 128: 1762},
    "complete": {8: 1, 128: 1},
}


@pytest.mark.parametrize(("name", "n", "rounds"), [(g, n, r) for g, row in ROUNDS.items() for n, r in row.items()])
def test_rounds_to_a_millionth(name: str, n: int, rounds: int) -> None:
    graph = make(name, n)
    assert implied(graph, "metropolis", ones(graph))["rounds_to_1e-6"] == rounds


@pytest.mark.parametrize(("name", "n"), [("ring", 8), ("path", 5), ("star", 6), ("torus", 16), ("complete", 4)])
def test_the_rounds_are_the_worst_case_and_reached(name: str, n: int) -> None:
    graph = make(name, n)
    rounds = implied(graph, "metropolis", ones(graph))["rounds_to_1e-6"]
    assert rounds is not None
    matrix = mixing_matrix(graph, ones(graph))

    def left(t: int) -> float:
        return float(np.linalg.norm(np.linalg.matrix_power(matrix, t) - 1 / n, 2))

    assert left(rounds) <= 1e-6 < left(rounds - 1)


def test_what_a_ring_implies() -> None:
    graph = make("ring", 8)
    found = implied(graph, "metropolis", ones(graph))
    lambda2 = 1 / 3 + 2 / 3 * math.cos(math.pi / 4)
    assert found == {
        "name": "ring",
        "nodes": 8,
        "edges": 8,
        "degree": {"min": 2, "mean": 2.0, "max": 2},
        "connected": True,
        "diameter": 4,
        "node_connectivity": 2,
        "weights": "metropolis",
        "lambda2": pytest.approx(lambda2, abs=1e-9),
        "spectral_gap": pytest.approx(1 - lambda2, abs=1e-9),
        "rounds_to_1e-6": 64,
        "exact_after": None,
        "period": 1,
    }
    assert json.loads(json.dumps(found)) == found


def test_a_graph_in_pieces_never_agrees() -> None:
    graph = build(TopologySection(edges=(("ulm", "bonn"), ("graz", "linz")), nodes=TOWNS), seed=0)
    found = implied(graph, "metropolis", ones(graph))
    assert (found["connected"], found["diameter"], found["node_connectivity"]) == (False, None, 0)
    assert (found["lambda2"], found["spectral_gap"], found["rounds_to_1e-6"]) == (1.0, 0.0, None)
    assert found["exact_after"] is None


@pytest.mark.parametrize("name", ["complete", "ring", "path", "star", "torus", "empty"])
def test_one_node_agrees_with_itself_at_once(name: str) -> None:
    graph = make(name, 1)
    found = implied(graph, "metropolis", ones(graph))
    assert (found["edges"], found["connected"], found["diameter"], found["node_connectivity"]) == (0, True, 0, 0)
    assert (found["lambda2"], found["rounds_to_1e-6"], found["exact_after"]) == (0.0, 0, 0)


@pytest.mark.parametrize("name", ["complete", "ring", "path", "star", "torus"])
def test_two_nodes_agree_after_one_round(name: str) -> None:
    graph = make(name, 2)
    found = implied(graph, "metropolis", ones(graph))
    assert (found["lambda2"], found["rounds_to_1e-6"], found["exact_after"]) == (0.0, 1, 1)


@pytest.mark.parametrize(("name", "deaths"), [("complete", 6), ("ring", 2), ("path", 1), ("star", 1)])
def test_how_many_deaths_cut_a_graph(name: str, deaths: int) -> None:
    graph = make(name, 7)
    assert implied(graph, "metropolis", ones(graph))["node_connectivity"] == deaths


@pytest.mark.parametrize(
    ("name", "n", "expected"), [("ring", 300, None), ("random-regular", 210, None), ("complete", 300, 299)]
)
def test_connectivity_of_a_large_graph_is_left_out(name: str, n: int, expected: int | None) -> None:
    graph = make(name, n, degree=20)
    assert implied(graph, "metropolis", ones(graph))["node_connectivity"] == expected


def test_node_link_form_holds_the_whole_mixing_matrix() -> None:
    graph = make("path", 4)
    masses = dict(zip(graph, (5.0, 1.0, 2.0, 8.0), strict=True))
    data = json.loads(json.dumps(node_link(graph, masses)))
    read = nx.node_link_graph(data, edges="edges")
    assert (tuple(read), sorted(read.edges), read.name) == (tuple(graph), sorted(graph.edges), "path")
    assert {name: read.nodes[name]["mass"] for name in read} == masses

    index, matrix = {name: i for i, name in enumerate(read)}, np.zeros((4, 4))
    for edge in data["edges"]:
        matrix[index[edge["source"]], index[edge["target"]]] = edge["weight"]
        matrix[index[edge["target"]], index[edge["source"]]] = edge["weight_back"]
    for name, i in index.items():
        matrix[i, i] = read.nodes[name]["self_weight"]
    np.testing.assert_array_equal(matrix, mixing_matrix(graph, masses))
