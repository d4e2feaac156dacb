"""The topology of an experiment: the graph of every round over the names, and what one node sees of it."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.config import STATIC_GRAPHS, VARYING_GRAPHS, TopologySection, find_experiment
from p2pfl.messages import BadInput
from p2pfl.topology import among, build, describe, neighbourhoods, node_link, with_weights
from p2pfl.topology.files import read
from p2pfl.topology.matrix import mixing_matrix

NAMES = ("zoe", "amy", "kim", "bob", "eve", "dan", "ivy", "lou")


def section(graph: str, **keys: object) -> TopologySection:
    return TopologySection.model_validate({"graph": graph, "nodes": NAMES, **keys})


@pytest.mark.parametrize("graph", [*STATIC_GRAPHS, *VARYING_GRAPHS])
def test_it_is_over_the_names_in_their_order_in_every_round(graph: str) -> None:
    topology = build(section(graph), seed=3)
    assert topology.names == NAMES and topology.name == graph
    assert topology.varies is (graph in VARYING_GRAPHS)
    for round in (0, 1, 5, 1000):
        assert tuple(topology.at(round)) == NAMES
        assert set(map(frozenset, topology.at(round).edges)) <= set(map(frozenset, topology.union().edges))


@pytest.mark.parametrize("graph", [*STATIC_GRAPHS, *VARYING_GRAPHS])
@given(rounds=st.lists(st.integers(0, 300), max_size=6))
def test_the_graph_of_a_round_is_a_pure_function(graph: str, rounds: list[int]) -> None:
    """Of the section, the seed and the round: whoever asks, and for whatever else before."""
    one, other = build(section(graph), seed=3), build(section(graph), seed=3)
    for round in rounds:
        one.at(round)
    for round in (7, 2):
        assert sorted(one.at(round).edges(data=True)) == sorted(other.at(round).edges(data=True))
    assert describe(one) == describe(other)


def test_another_seed_draws_another_graph_and_members_notice() -> None:
    for graph in ("random-regular", "erdos-renyi", "random-matching", "epidemic", "equi-static"):
        assert len({describe(build(section(graph, p=0.5), seed)) for seed in range(6)}) > 1, graph
    assert describe(build(section("ring"), 0)) == describe(build(section("ring"), 1))
    assert describe(build(section("ring"), 0)) != describe(build(section("path"), 0))


@pytest.mark.parametrize("weights", ["metropolis", "lazy", "max-degree", "best-constant", "fastest", "samples"])
def test_what_a_node_sees_are_the_rows_of_the_mixing_matrix(weights: str) -> None:
    topology = build(section("barabasi-albert"), seed=1)
    masses = dict.fromkeys(NAMES, 1.0)
    matrix = mixing_matrix(topology.at(0), weights, masses).toarray()
    for i, name in enumerate(NAMES):
        part = neighbourhoods(topology, name, weights)(17)
        assert list(part.hears) == list(part.tells) == sorted(topology.at(0)[name])
        for other, weight in part.hears.items():
            assert weight is None or weight == matrix[i, NAMES.index(other)]
        assert all(weight is None for weight in part.hears.values()) is (weights in ("metropolis", "lazy", "samples"))


def test_one_way_edges_are_heard_at_one_end_and_told_at_the_other() -> None:
    topology = build(section("one-peer-exponential"), seed=0)
    for round in range(6):
        parts = {name: neighbourhoods(topology, name, "push-sum")(round) for name in NAMES}
        for name, part in parts.items():
            assert all(name in parts[other].hears for other in part.tells)
            assert all(name in parts[other].tells for other in part.hears)
            assert len(part.hears) == len(part.tells) == 1


def test_weights_that_cannot_hold_in_some_round_are_refused_before_the_first() -> None:
    with pytest.raises(BadInput, match="push-sum"):
        neighbourhoods(build(section("epidemic"), 0), "amy", "metropolis")
    with pytest.raises(BadInput, match="metropolis"):
        neighbourhoods(build(section("one-peer-hypercube"), 0), "amy", "fastest")


# -- Drawn by hand ---------------------------------------------------------------------------------------------------


def by_hand(*edges: str, nodes: str = "abcde") -> TopologySection:
    return TopologySection.model_validate({"nodes": list(nodes), "edges": [list(edge) for edge in edges]})


def test_edges_in_the_experiment() -> None:
    topology = build(by_hand("ab", "bc", "ca", "cd", "de", "ba"), seed=0)
    assert (topology.name, topology.period, topology.at(3).number_of_edges()) == ("edges", 1, 5)


@pytest.mark.parametrize(
    ("edges", "why"),
    [
        (("ab", "bc", "de"), r"2 parts that never agree \(a, b, c · d, e\): join a and d"),
        (("ab",), r"4 parts .*a, b · c · …"),
        (("ab", "bx"), "'x' is not one of topology.nodes"),
        (("ab", "bb"), "'b' is joined to itself"),
    ],
)
def test_a_graph_that_cannot_work_is_refused_with_the_mend(edges: tuple[str, ...], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        build(by_hand(*edges), seed=0)


BAD_FILES = {  # name → (content, what is said)
    "parts.edgelist": ("a b\nc d\n", "2 parts that never agree"),
    "one-way.edgelist": ("a -> b\nb -> c\n", "both ways"),
    "one.csv": (",a\na,0\n", "one node|1 node"),
    "twice.csv": (",a,a\na,0,1\na,1,0\n", "two nodes 'a'"),
    "negative.edgelist": ("a b -0.5\n", "-0.5"),
    "graph.dot": ("graph { a -- b }", ".graphml"),
    "empty.json": ("{}", "nodes"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    content, why = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=why) as caught:
        file = tmp_path / name
        build(TopologySection.model_validate({"file": file, "nodes": sorted(read(file))}), seed=0)
    assert "\n" not in str(caught.value)


def test_a_file_gives_the_graph_addresses_and_parts_and_an_unknown_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.edgelist").write_text("a b\nb c\na 10.0.0.1:7000\n")
    topology = build(TopologySection.model_validate({"file": tmp_path / "m.edgelist", "nodes": ["c", "b", "a"]}), 0)
    assert topology.names == ("c", "b", "a") == tuple(topology.at(0))
    assert topology.union().nodes["a"]["address"] == "tcp://10.0.0.1:7000"
    with pytest.raises(BadInput, match=r"'c' is not one of topology\.nodes"):
        build(TopologySection.model_validate({"file": tmp_path / "m.edgelist", "nodes": ["a", "b"]}), 0)


# -- Written down ----------------------------------------------------------------------------------------------------


def test_node_link_form_holds_the_whole_mixing_matrix() -> None:
    masses = {name: float(i + 1) for i, name in enumerate(NAMES)}
    topology = build(section("watts-strogatz"), seed=2)
    data = json.loads(json.dumps(node_link(topology, "samples", masses)))
    matrix = np.zeros((8, 8))
    for node in data["nodes"]:
        i = NAMES.index(node["id"])
        matrix[i, i] = node["self_weight"]
        assert node["mass"] == masses[node["id"]]
    for edge in data["edges"]:
        i, j = NAMES.index(edge["source"]), NAMES.index(edge["target"])
        matrix[i, j], matrix[j, i] = edge["weight"], edge["weight_back"]
    np.testing.assert_array_equal(matrix, mixing_matrix(topology.at(0), "samples", masses).toarray())
    assert data["graph"]["period"] == 1


def test_of_a_graph_that_changes_the_union_is_written_down() -> None:
    data = node_link(build(section("one-peer-exponential"), 0), "metropolis", dict.fromkeys(NAMES, 1.0))
    assert data["graph"] == {"name": "one-peer-exponential", "period": 3}
    assert nx.node_link_graph(data, edges="edges").number_of_edges() == 8 * 5 // 2


def test_a_file_can_hold_weights_that_both_ends_share() -> None:
    masses = dict.fromkeys(NAMES, 1.0)
    ring = build(section("ring"), 0)
    assert not nx.get_edge_attributes(with_weights(ring, "metropolis", masses, False), "weight")
    weights = nx.get_edge_attributes(with_weights(ring, "metropolis", masses, True), "weight")
    assert list(weights.values()) == pytest.approx([1 / 3] * 8)
    assert not nx.get_edge_attributes(ring.at(0), "weight")  # the topology itself is left as it was
    with pytest.raises(BadInput, match="give each other different weights"):
        with_weights(build(section("star"), 0), "uniform-neighbours", masses, True)
    with pytest.raises(BadInput, match="changes from round to round"):
        with_weights(build(section("random-matching"), 0), "metropolis", masses, True)


# -- The graph over those who live -------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [*STATIC_GRAPHS, *VARYING_GRAPHS])
@given(dead=st.sets(st.sampled_from(NAMES), max_size=6))
def test_survivors_agree_on_a_graph_in_one_piece_without_the_dead(graph: str, dead: set[str]) -> None:
    drawn = section(graph, k=1 if graph == "base-k" else None, p=0.6)
    whole = build(drawn, seed=3)
    living = tuple(sorted(set(NAMES) - dead))
    topology = among(drawn, 3, whole, living)
    assert sorted(topology.names) == list(living)
    assert describe(topology) == describe(among(drawn, 3, build(drawn, seed=3), living))
    for round in range(topology.period or 3):
        assert set(topology.at(round)) == set(living)
    if graph != "empty":
        assert nx.is_connected(topology.union())
    if not dead:
        assert topology is whole


def test_in_a_graph_drawn_by_hand_the_neighbours_of_the_dead_are_joined() -> None:
    star = by_hand("ab", "ac", "ad", "ae")
    healed = among(star, 0, build(star, 0), ("b", "c", "d", "e")).at(0)
    assert {frozenset(edge) for edge in healed.edges} == {frozenset(edge) for edge in ("bc", "cd", "de", "be")}


@given(dead=st.sets(st.integers(1, 7), max_size=6))
def test_one_way_links_are_led_past_the_dead(dead: set[int]) -> None:
    names = [f"line-{i}" for i in range(1, 8)]
    path = find_experiment("factory-line").with_name("factory-line.csv")
    line = TopologySection.model_validate({"file": path, "nodes": names, "weights": "push-sum"})
    living = tuple(name for i, name in enumerate(names, start=1) if i not in dead)
    healed = among(line, 0, build(line, 0), living).at(0)
    assert healed.is_directed() and set(healed) == set(living)
    assert nx.is_strongly_connected(healed)


def test_no_row_of_given_weights_grows_when_a_neighbour_dies() -> None:
    path = find_experiment("roads").with_name("roads.json")
    names = sorted(read(path))
    roads = TopologySection.model_validate({"file": path, "nodes": names, "weights": "given"})
    whole = build(roads, 0)
    nx.set_edge_attributes(whole.at(0), 0.24, "weight")
    for dead in names:
        healed = among(roads, 0, whole, tuple(name for name in names if name != dead)).at(0)
        matrix = mixing_matrix(healed, "given", dict.fromkeys(healed, 1.0)).toarray()
        assert matrix.diagonal().min() >= 0 and np.allclose(matrix, matrix.T)
