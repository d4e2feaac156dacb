"""The graph over the nodes: who averages with whom, in every round, and with which weights.

    graphs      named graphs that stay as they are      schedules   named graphs that change from round to round
    files       graphs in files                         matrix      the mixing matrix of a graph
    fastest     the best symmetric weights              implied     what graph and weights imply
    fit         whether a graph is one for the rule     plan        which graph to take
    exposure    who gets to know how much of whom

A graph comes from a generator's name, from a file, or edge by edge. All members compute the same one from the same
section and seed, without talking. Nothing here trains or sends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

import networkx as nx

from p2pfl.config import GRAPHS, PEERS, TopologySection, did_you_mean
from p2pfl.messages import BadInput
from p2pfl.rng import stream
from p2pfl.topology.files import read
from p2pfl.topology.graphs import GENERATORS
from p2pfl.topology.matrix import check_weights, fixed_weights, hears, mixing_matrix, tells
from p2pfl.topology.schedules import SCHEDULES
from p2pfl.weights import Neighbourhood, Wiring

DRAWN_ROUNDS_COMPARED = 4  # of a graph that is drawn anew for every round
ROUNDS_KEPT = 64  # graphs of a schedule that are kept: the period of all that have one, up to 2^64 nodes


@dataclass(frozen=True)
class Topology:
    """Who averages with whom in every round. The edges of a directed graph are the way that vectors travel."""

    name: str
    names: tuple[str, ...]
    period: int | None  # rounds after which it repeats; 1: it stays as it is; None: drawn anew for every round
    at: Callable[[int], nx.Graph] = field(compare=False)  # round → graph over all names, in their order; not to change
    _solved: dict[tuple[int, str], dict[tuple[str, str], float]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @property
    def directed(self) -> bool:
        return bool(self.at(0).is_directed())

    @property
    def varies(self) -> bool:
        return self.period != 1

    def fixed_weights(self, round: int, weights: str) -> dict[tuple[str, str], float]:
        """(receiver, sender) → weight in this round, as `matrix.fixed_weights`; solved once for each round of a period.

        BadInput where such weights cannot hold on this graph.
        """
        if self.period is None:
            check_weights(self.at(round), weights)
            return fixed_weights(self.at(round), weights)
        key = (round % self.period, weights)
        if key not in self._solved:
            self._solved[key] = fixed_weights(self.at(round), weights)
        return self._solved[key]

    def union(self) -> nx.Graph:
        """Undirected: everybody who ever hears of whom. Complete for a schedule that is drawn anew."""
        if self.period is None:
            union = nx.complete_graph(self.names)
        else:
            union = nx.Graph()
            union.add_nodes_from(self.at(0).nodes(data=True))
            for round in range(self.period):
                union.add_edges_from(self.at(round).edges)
        union.name = self.name
        return union


def build(section: TopologySection, seed: int) -> Topology:
    """The topology over `section.names`, in their order.

    BadInput where the section describes no graph: a size that the generator cannot do, a file that cannot be read,
    an edge to an unknown name or from a node to itself.
    """
    if section.graph in SCHEDULES:
        schedule = SCHEDULES[section.graph](len(section.names), section, seed)

        @lru_cache(maxsize=ROUNDS_KEPT)
        def at(round: int) -> nx.Graph:
            return _with_names(schedule.at(round), section)

        period = schedule.period
        return Topology(section.graph, section.names, period, lambda round: at(round % period if period else round))
    graph = _static(section, seed)
    return Topology(graph.name, section.names, 1, lambda round: graph)


def _static(section: TopologySection, seed: int) -> nx.Graph:
    if section.file is not None:
        return _in_one_piece(_checked_names(read(section.file), section), str(section.file))
    if section.edges:
        pairs = (("topology.edges", a, b) for a, b in section.edges)
        return _in_one_piece(_named_graph("edges", section.names, pairs), "topology.edges")
    if section.graph == PEERS:
        raise BadInput(f"topology: no graph is given: set graph to one of {', '.join(GRAPHS)}, or give a file or edges")
    return _with_names(GENERATORS[section.graph](len(section.names), section, stream(seed, "topology")), section)


def _with_names(numbered: nx.Graph, section: TopologySection) -> nx.Graph:
    graph = nx.relabel_nodes(numbered, dict(enumerate(section.names)))
    graph.name = section.graph
    return graph


def _checked_names(found: nx.Graph, section: TopologySection) -> nx.Graph:
    """The graph of a file, over all `section.names` and in their order."""
    assert section.file is not None
    names = dict.fromkeys(section.names)  # in their order, and quick to look up
    for name in found:
        if name not in names:
            mend = did_you_mean(name, section.names)
            raise BadInput(f"{section.file}: {name!r} is not one of topology.nodes{mend}")
    graph = found.__class__(name=section.file.name)
    graph.add_nodes_from((name, found.nodes.get(name, {})) for name in names)
    graph.add_edges_from(found.edges(data=True))
    return graph


def _named_graph(title: str, names: tuple[str, ...], edges: Iterable[tuple[str, str, str]]) -> nx.Graph:
    """`edges` are (where it stands, name, name); an edge that is listed twice counts once."""
    graph = nx.Graph(name=title)
    graph.add_nodes_from(names)
    for where, a, b in edges:
        for name in (a, b):
            if name not in graph:
                raise BadInput(f"{where}: {name!r} is not one of topology.nodes{did_you_mean(name, names)}")
        if a == b:
            raise BadInput(f"{where}: {a!r} is joined to itself: remove that edge")
        graph.add_edge(a, b)
    return graph


def _in_one_piece(graph: nx.Graph, where: str) -> nx.Graph:
    """The graph, if news of every node can reach every other; BadInput, with the nodes to join, if not."""
    parts = nx.strongly_connected_components(graph) if graph.is_directed() else nx.connected_components(graph)
    first, *others = sorted(sorted(part) for part in parts)
    if others:
        way = " both ways" if graph.is_directed() else ""
        mend = f"join {first[0]} and {others[0][0]}{way}, for example"
        raise BadInput(
            f"{where}: the graph is in {1 + len(others)} parts that never agree ({_some(first)} · {_some(others[0])}"
            f"{' · …' if len(others) > 1 else ''}): {mend}"
        )
    return graph


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


# -- The graph over those who live -------------------------------------------------------------------------------------


def among(section: TopologySection, seed: int, whole: Topology, living: tuple[str, ...]) -> Topology:
    """The topology over these of all names, sorted: what survivors of `whole` go on with, each computing the same.

    A generator draws its graph anew over the living. Where it cannot, at their number, and in a graph drawn by hand,
    the neighbours of a dead node are joined instead; where a schedule cannot, Base-2 takes its place.
    """
    gone = [name for name in whole.names if name not in set(living)]
    if not gone:
        return whole
    if section.graph != PEERS:
        try:
            return build(section.model_copy(update={"nodes": tuple(sorted(living))}), seed)
        except BadInput:  # no hypercube of 7, no 3-regular graph of 9
            pass
    if whole.varies:  # Base-2 is there for every number, with one neighbour a round
        return build(section.model_copy(update={"graph": "base-k", "k": 1, "nodes": tuple(sorted(living))}), seed)
    healed = _healed(whole.at(0), gone)
    return Topology(whole.name, living, 1, lambda round: healed)


def _healed(graph: nx.Graph, gone: Iterable[str]) -> nx.Graph:
    """The graph without these nodes, the neighbours of each joined to a ring: it stays in one piece.

    In a directed graph everybody who sent to the dead node sends to all that it sent to. A new edge has half the
    smaller of the two weights that it replaces, so that no row grows.
    """
    healed = graph.copy()
    for name in sorted(gone):
        if healed.is_directed():
            pairs = [(a, b) for a in sorted(healed.predecessors(name)) for b in sorted(healed[name]) if a != b]
            through = [(a, b, (healed.edges[a, name], healed.edges[name, b])) for a, b in pairs]
        else:
            around = sorted(healed[name])
            pairs = [(a, b) for a, b in zip(around, [*around[1:], *around[:1]], strict=True) if a != b]
            through = [(a, b, (healed.edges[a, name], healed.edges[name, b])) for a, b in pairs]
        for a, b, edges in through:
            if not healed.has_edge(a, b):
                weights = [edge["weight"] for edge in edges if "weight" in edge]
                healed.add_edge(a, b, **({"weight": min(weights) / 2} if weights else {}))
        healed.remove_node(name)
    return healed


def over(section: TopologySection, seed: int, whole: Topology, living: tuple[str, ...]) -> Topology:
    """What these survivors of `whole`, sorted, go on with: `among`, or the whole one where no weights hold on that."""
    topology = among(section, seed, whole, living)
    try:
        check_weights(topology.at(0), section.weighting)
    except BadInput:  # given weights of one-way edges: nobody could say what new edges weigh
        return whole
    return topology


def wiring(section: TopologySection, seed: int, whole: Topology, name: str) -> Callable[[tuple[str, ...]], Wiring]:
    """Who lives → this node's part of the graph over them; of the whole one, where the weights hold on no other.

    BadInput, before anybody dies, where they do not hold on the whole graph either.
    """

    def of(living: tuple[str, ...]) -> Wiring:
        topology = over(section, seed, whole, living)
        return Wiring(tuple(sorted(topology.union()[name])), neighbourhoods(topology, name, section.weighting))

    return of


def neighbours_among(
    section: TopologySection, seed: int, whole: Topology
) -> Callable[[tuple[str, ...], str], Sequence[str]]:
    """(who lives, a node) → its neighbours in the graph over them; in the whole one, where survivors get no other."""
    drawn: dict[tuple[str, ...], nx.Graph] = {}

    def of(living: tuple[str, ...], name: str) -> Sequence[str]:
        if living not in drawn:
            drawn.clear()  # the members before are not asked about again
            drawn[living] = over(section, seed, whole, living).union() if living else whole.union()
        return tuple(drawn[living][name]) if name in drawn[living] else ()

    return of


# -- What one node sees of it ----------------------------------------------------------------------------------------


def neighbourhoods(topology: Topology, name: str, weights: str) -> Callable[[int], Neighbourhood]:
    """round → whom this node hears and tells. BadInput where such weights cannot hold on the graph of a round."""

    @lru_cache(maxsize=ROUNDS_KEPT)
    def of(round: int) -> Neighbourhood:
        graph, fixed = topology.at(round), topology.fixed_weights(round, weights)
        heard = {other: fixed.get((name, other)) for other in hears(graph, name)}
        return Neighbourhood(heard, tuple(tells(graph, name)))

    for round in range(topology.period or 1):
        check_weights(topology.at(round), weights)
    return lambda round: of(round % topology.period if topology.period else round)


def partners(schedule: str, seed: int, name: str) -> Callable[[int, tuple[str, ...]], tuple[str, ...]] | None:
    """(round, linked neighbours, sorted) → who gets this node's update; None: all of them do.

    With "gossip" one of them, drawn anew for every round. With "pairwise" in every other round on average: in the
    others it waits to be asked, or all would ask at once, and nobody could answer.
    """
    if schedule not in ("pairwise", "gossip"):
        return None

    def of(round: int, linked: tuple[str, ...]) -> tuple[str, ...]:
        random = stream(seed, "partner", name, round)
        if not linked or (schedule == "pairwise" and random.integers(2)):
            return ()
        return (linked[int(random.integers(len(linked)))],)

    return of


def describe(topology: Topology) -> str:
    """The graph in a few words, which differ where it does: members compare them, as libraries may draw differently."""
    digest, edges = sha256(), 0
    for round in range(min(topology.period or DRAWN_ROUNDS_COMPARED, ROUNDS_KEPT)):
        graph = topology.at(round)
        pairs = graph.edges if graph.is_directed() else (sorted(pair) for pair in graph.edges)
        found = sorted((a, b) for a, b in pairs)
        edges += len(found)
        digest.update(repr(found).encode())
    return f"{edges} edges ({digest.hexdigest()[:8]})"


def with_weights(topology: Topology, weights: str, masses: Mapping[str, float], wanted: bool) -> nx.Graph:
    """The graph as it goes into a file, each edge with its mixing weight if that is `wanted`.

    BadInput if the graph changes from round to round, or if the two ends of an edge give each other different weights.
    """
    if topology.varies:
        raise BadInput(
            f"{topology.name} changes from round to round, and a file holds one graph: choose one that stays"
        )
    graph = topology.at(0).copy()
    if wanted:
        matrix, index = mixing_matrix(graph, weights, masses).todok(), {name: i for i, name in enumerate(graph)}
        for a, b, edge in graph.edges(data=True):
            edge["weight"] = float(matrix[index[b], index[a]])
            if not graph.is_directed() and not math.isclose(edge["weight"], matrix[index[a], index[b]], rel_tol=1e-9):
                raise BadInput(
                    f"with weights = {weights!r} {a} and {b} give each other different weights: leave it away"
                )
    return graph


def node_link(topology: Topology, weights: str, masses: Mapping[str, float]) -> dict[str, object]:
    """The graph as networkx node-link JSON (its edges under "edges"): what stands in a run folder.

    A node carries its `mass`, and its `self_weight` w_ii where the graph stays as it is. An undirected edge carries
    `weight`, what its source gives to its target's vector, and `weight_back`, what the target gives to the source's; an
    edge of a directed graph carries `weight`, what its target gives to its source's vector. Of a graph that changes
    from round to round it is the union, without weights; "period" says how many rounds there are.
    """
    union = topology.union() if topology.varies else topology.at(0).copy()
    nx.set_node_attributes(union, dict(masses), "mass")
    if not topology.varies:
        matrix, index = mixing_matrix(union, weights, masses).todok(), {name: i for i, name in enumerate(union)}
        for name, i in index.items():
            union.nodes[name]["self_weight"] = float(matrix[i, i])
        for a, b, edge in union.edges(data=True):
            i, j = index[a], index[b]
            edge["weight"] = float(matrix[j, i] if union.is_directed() else matrix[i, j])
            if not union.is_directed():
                edge["weight_back"] = float(matrix[j, i])
    union.graph["period"] = topology.period
    data: dict[str, object] = nx.node_link_data(union, edges="edges")
    return data
