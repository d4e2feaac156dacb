"""The planner: what it proposes holds, checked from outside; what it says is what it found."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.connectivity import local_node_connectivity

from p2pfl.config import GRAPHS, TopologySection
from p2pfl.messages import BadInput
from p2pfl.topology import Topology, build
from p2pfl.topology.implied import errors
from p2pfl.topology.plan import Proposal, plan


def drawn(proposal: Proposal, nodes: int) -> Topology:
    section = TopologySection.model_validate(proposal["topology"] | {"nodes": nodes})
    return build(section, seed=0)


def weights_of(proposal: Proposal) -> str:
    return TopologySection.model_validate(proposal["topology"]).weighting


def over_time(topology: Topology) -> nx.DiGraph:
    """Every way that a vector takes in some round; of a graph that is drawn anew, in the first 200."""
    union = nx.DiGraph()
    for round in range(topology.period or 200):
        union.add_edges_from(topology.at(round).to_directed().edges)
    return union


def deaths_that_cut(graph: nx.DiGraph) -> int:
    """By disjoint paths between all that are not joined."""
    apart = [(a, b) for a, b in itertools.permutations(graph, 2) if not graph.has_edge(a, b)]
    return min([len(graph) - 1, *(local_node_connectivity(graph, a, b) for a, b in apart)])


WISHES = [
    (6, 1, 0),
    (8, 3, 2),
    (9, 2, 1),
    (12, 4, 3),
    (7, 2, 4),
    (10, 9, 0),
    (15, 4, 3),
]  # of 15, a graph that varies is as fast as the best that does not


@pytest.mark.parametrize(("nodes", "max_degree", "survive"), WISHES)
def test_every_proposal_keeps_its_promises(nodes: int, max_degree: int, survive: int) -> None:
    for proposal in plan(nodes, max_degree, survive):
        topology = drawn(proposal, nodes)
        for round in range(topology.period or 50):
            graph = topology.at(round)
            ways = [graph.in_degree, graph.out_degree] if graph.is_directed() else [graph.degree]
            assert max(degree for way in ways for _, degree in way) <= proposal["degree"] <= max_degree
        union = over_time(topology)
        assert max(degree for _, degree in union.to_undirected().degree) == proposal["links"]
        assert deaths_that_cut(union) == proposal["node_connectivity"] > survive


@pytest.mark.parametrize(("nodes", "max_degree", "survive"), WISHES)
def test_after_so_many_rounds_they_agree(nodes: int, max_degree: int, survive: int) -> None:
    for proposal in plan(nodes, max_degree, survive):
        topology, rounds = drawn(proposal, nodes), proposal["rounds_to_1e-6"]
        left = errors(topology, weights_of(proposal), dict.fromkeys(topology.names, 1.0), rounds)
        assert left[-1] <= (1e-6 if topology.period else 1e-4)  # the rounds of one that is drawn are an average
        assert proposal["exact_after"] is None or left[proposal["exact_after"]] < 1e-12


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 10), st.integers(1, 5), st.data())
def test_a_looser_limit_only_adds(nodes: int, max_degree: int, data: st.DataObject) -> None:
    """So a bigger max_degree, or fewer deaths, never make the best worse."""
    survive = data.draw(st.integers(0, nodes - 2))
    tight = plan(nodes, max_degree, survive)
    for loose in (plan(nodes, max_degree + 1, survive), plan(nodes, max_degree, max(0, survive - 1))):
        names = [one["topology"] for one in loose]
        assert all(one["topology"] in names for one in tight)
        assert loose[0]["rounds_to_1e-6"] <= tight[0]["rounds_to_1e-6"]


def test_the_best_comes_first() -> None:
    found = plan(16, 6, 1)
    order = [(one["rounds_to_1e-6"], one["messages"]) for one in found]
    assert order == sorted(order)
    assert len({str(one["topology"]) for one in found}) == len(found) > 10


def test_the_same_graph_comes_once() -> None:
    """Of five nodes the exponential graph and others are complete, too."""
    edges = [frozenset(drawn(one, 5).at(0).to_directed().edges) for one in plan(5, 4, 0) if not drawn(one, 5).varies]
    assert len(edges) == len(set(edges))


def test_all_graphs_are_looked_at() -> None:
    """With all limits off; `empty` never agrees, and to a node of `epidemic` any number may send at a time."""
    found = {one["topology"]["graph"] for one in plan(16, 15, 0)}
    assert found == set(GRAPHS) - {"empty", "epidemic"}


@pytest.mark.parametrize(("nodes", "max_degree", "survive"), WISHES)
def test_the_reasons_quote_the_numbers(nodes: int, max_degree: int, survive: int) -> None:
    found = plan(nodes, max_degree, survive)
    still = [one["rounds_to_1e-6"] for one in found if drawn(one, nodes).period == 1]
    for one in found:
        why, varies = one["why"], drawn(one, nodes).varies
        rounds = one["exact_after"] or one["rounds_to_1e-6"]
        assert why.startswith(f"{'exact after' if one['exact_after'] else 'agrees in'} {rounds} round")
        assert f"{one['degree']} neighbour" in why
        assert ("any lost message spoils that" in why) == bool(varies and one["exact_after"])
        assert (f"over time it needs links to {one['links']} other" in why) == (varies and one["links"] > one["degree"])
        assert ("the fewest of all that stay as they are" in why) == (not varies and rounds == min(still))
        deaths = one["node_connectivity"] - 1
        assert (f"survives any {deaths} death" if deaths else "a single death can cut it in two") in why


def test_three_reasons() -> None:
    why = {str(one["topology"]["graph"]): one["why"] for one in plan(32, 5, 3)}
    assert why["one-peer-hypercube"] == (
        "exact after 5 rounds with 1 neighbour a round, but any lost message spoils that, and over time it needs links "
        "to 5 others; survives any 4 deaths"
    )
    assert why["hypercube"] == (
        "agrees in 35 rounds, the fewest of all that stay as they are, with 5 neighbours; survives any 4 deaths"
    )
    assert why["exponential-directed"] == (
        "agrees in 35 rounds, the fewest of all that stay as they are, with 5 neighbours each way, but it needs links "
        "to 9 others; survives any 4 deaths"
    )


def test_more_deaths_than_neighbours_take_a_graph_that_varies() -> None:
    """One neighbour at a time, but another one in every round: whoever is left meets sooner or later."""
    found = plan(20, 1, 10)
    assert [one["topology"] for one in found] == [{"graph": "random-matching"}]
    assert found[0]["why"].endswith(
        "survives any 18 deaths; a graph that stays as it is takes 11 neighbours or more for what is asked"
    )


@pytest.mark.parametrize(
    ("nodes", "survive", "enough"), [(20, 0, 2), (2, 0, 1), (8, 2, 3), (9, 2, 4), (9, 3, 4), (7, 4, 6)]
)
def test_how_many_neighbours_a_graph_that_stays_takes(nodes: int, survive: int, enough: int) -> None:
    """One more than deaths; yet another one, if nodes and neighbours are both odd; and two, to join more than two."""
    for max_degree in (enough - 1, enough):
        found = plan(nodes, max_degree, survive) if max_degree else []
        assert any(not drawn(one, nodes).varies for one in found) == (max_degree == enough)
        told = f"a graph that stays as it is takes {enough} neighbour"
        assert all((told in one["why"]) == (max_degree < enough) for one in found)


def test_bytes_are_those_of_all_messages() -> None:
    for one in plan(9, 4, 1, parameters=250):
        assert one["bytes"] == one["messages"] * 1000
    ring = next(one for one in plan(8, 2, 1) if one["topology"] == {"graph": "ring"})
    assert (ring["messages"], ring["bytes"]) == (64 * 16, None)


def test_random_graphs_are_those_of_the_seed() -> None:
    found = {seed: plan(18, 3, 2, seed=seed) for seed in (0, 1)}
    assert found[0] == plan(18, 3, 2, seed=0)
    gaps = {seed: {str(one["topology"]): one["lambda2"] for one in plans} for seed, plans in found.items()}
    regular = str({"graph": "random-regular", "degree": 3})
    assert abs(gaps[0][regular] - gaps[1][regular]) > 1e-3
    section = TopologySection(graph="random-regular", degree=3, nodes=18)
    adjacency = nx.to_numpy_array(build(section, seed=1).at(0))
    eigenvalues = np.linalg.eigvalsh((np.eye(18) + adjacency) / 4)
    assert gaps[1][regular] == pytest.approx(max(-eigenvalues[0], eigenvalues[-2]))


@pytest.mark.parametrize(
    ("wish", "message", "mended"),
    [
        ((4, 0, 0), "max_degree = 0 leaves no neighbour to average with: use 1 or more", (4, 1, 0)),
        ((4, 2, -1), "survive = -1 is no number of deaths: use 0 or more", (4, 2, 0)),
        (
            (5, 4, 4),
            "of 5 nodes no two are left to agree after 4 deaths: use survive = 3, or at least 6 nodes",
            (5, 4, 3),
        ),
        ((5, 4, 4), "at least 6 nodes", (6, 4, 4)),
        ((1, 4, 0), "of 1 node no two are left to agree after 0 deaths: use at least 2 nodes", (2, 4, 0)),
    ],
)
def test_what_cannot_be_is_refused_with_a_number_that_works(
    wish: tuple[int, int, int], message: str, mended: tuple[int, int, int]
) -> None:
    with pytest.raises(BadInput) as refusal:
        plan(*wish)
    assert message in str(refusal.value)
    assert plan(*mended)
