"""Which graph to take: those that fit a limit on neighbours and survive so many deaths, best first.

Best is what agrees in the fewest rounds; of equals, what sends the fewest messages until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import networkx as nx

from p2pfl.config import TopologySection
from p2pfl.messages import BadInput
from p2pfl.topology import Topology, build
from p2pfl.topology.graphs import GENERATORS
from p2pfl.topology.implied import BYTES_OF_A_PARAMETER, Implied, implied
from p2pfl.topology.schedules import SCHEDULES

SWEPT = {  # graph → the key that goes with its number of neighbours, and the least value that gives another graph
    "random-regular": ("degree", 3),
    "watts-strogatz": ("k", 4),
    "barabasi-albert": ("m", 1),
    "equi-static": ("m", 1),
    "tree": ("k", 2),
    "caveman": ("cliques", 2),
    "base-k": ("k", 1),
}
EACH_UP_TO = 16  # of the swept values; beyond, each power of two: it takes twice the neighbours to make a difference
LEFT_OUT = ("empty", "epidemic")  # the one never agrees; in the other, any number may send to the same node at a time

Proposal = TypedDict(
    "Proposal",
    {
        "topology": dict[str, str | int],  # as it can stand in the section of that name
        "degree": int,  # the most that a node sends to, or hears from, in a round
        "links": int,  # the most others that a node has to do with over time
        "node_connectivity": int,
        "lambda2": float,
        "rounds_to_1e-6": int,
        "exact_after": int | None,
        "messages": float,  # over the whole network, until a millionth is left
        "bytes": float | None,  # of these messages; None: parameters are not given
        "why": str,
    },
)


def plan(nodes: int, max_degree: int, survive: int, parameters: int | None = None, seed: int = 0) -> list[Proposal]:
    """The graphs by name in which a node has at most `max_degree` neighbours at a time, and that stay connected
    whichever `survive` nodes die; best first. There is always one.

    A graph that changes from round to round is measured by its neighbours in one round, and by the connectivity of all
    its rounds together. One that is exact after some rounds is so only without loss: `why` says that, and what else
    speaks for a graph or against it. Random graphs are those of this seed. `bytes` are those of messages of
    `parameters` float32 numbers. A graph whose connectivity would take too long to compute is left out.

    BadInput where no graph can do it, with a number that works.
    """
    if max_degree < 1:
        raise BadInput(f"max_degree = {max_degree} leaves no neighbour to average with: use 1 or more")
    if survive < 0:
        raise BadInput(f"survive = {survive} is no number of deaths: use 0 or more")
    if nodes < survive + 2:
        fewer = f"survive = {nodes - 2}, or " if nodes > 2 else ""
        raise BadInput(
            f"of {_count(nodes, 'node')} no two are left to agree after {_count(survive, 'death')}: "
            f"use {fewer}at least {survive + 2} nodes"
        )
    found = sorted(_fitting(nodes, max_degree, survive, seed), key=lambda one: (one.rounds, one.messages))
    fewest = min((one.rounds for one in found if not one.topology.varies), default=None)
    return [
        {
            "topology": one.keys,
            "degree": one.degree,
            "links": one.links,
            "node_connectivity": one.deaths + 1,
            "lambda2": one.facts["lambda2"],
            "rounds_to_1e-6": one.rounds,
            "exact_after": one.facts["exact_after"],
            "messages": one.messages,
            "bytes": None if parameters is None else one.messages * BYTES_OF_A_PARAMETER * parameters,
            "why": _why(one, fewest, max_degree, _enough(nodes, survive)),
        }
        for one in found
    ]


class _Fitting(NamedTuple):
    keys: dict[str, str | int]
    topology: Topology
    facts: Implied
    degree: int
    links: int
    deaths: int  # that it survives
    rounds: int
    messages: float


def _fitting(nodes: int, max_degree: int, survive: int, seed: int) -> Iterator[_Fitting]:
    seen = set()
    for keys in _candidates(nodes, max_degree):
        section = TopologySection.model_validate(keys | {"nodes": nodes})
        try:
            topology = build(section, seed)
        except BadInput:
            continue  # there is no such graph of so many nodes
        graphs = [topology.at(round) for round in range(topology.period or 1)]
        degree = max(map(_degree, graphs))
        edges = tuple(frozenset(graph.to_directed(as_view=True).edges) for graph in graphs)
        if degree > max_degree or (topology.period and edges in seen):
            continue  # of few nodes, several names mean the same graph
        seen.add(edges)
        facts = implied(topology, section.weighting, dict.fromkeys(topology.names, 1.0))
        rounds, connectivity = facts["rounds_to_1e-6"], facts["node_connectivity"]
        if rounds is None or connectivity is None or connectivity < survive + 1:
            continue
        links = nodes - 1 if topology.period is None else _degree(topology.union())
        yield _Fitting(keys, topology, facts, degree, links, connectivity - 1, rounds, rounds * facts["messages"])


def _candidates(nodes: int, max_degree: int) -> Iterator[dict[str, str | int]]:
    """Keys of the section. A looser limit only adds to them, so that it never makes the best worse."""
    powers = {2**bit for bit in range(nodes.bit_length())}
    for graph in (*GENERATORS, *SCHEDULES):
        if graph in SWEPT:
            key, least = SWEPT[graph]
            most = nodes if key == "cliques" else min(nodes, max_degree + 1)
            yield from ({"graph": graph, key: k} for k in {*range(EACH_UP_TO + 1), *powers} if least <= k < most)
        elif graph not in LEFT_OUT:
            yield {"graph": graph}


def _degree(graph: nx.Graph) -> int:
    """The most that a node sends to, or hears from."""
    ways = (graph.in_degree, graph.out_degree) if graph.is_directed() else (graph.degree,)
    return int(max(degree for way in ways for _, degree in way))


def _why(one: _Fitting, fewest: int | None, max_degree: int, enough: int) -> str:
    """What speaks for it and against it."""
    exact, varies, least = one.facts["exact_after"], one.topology.varies, one.facts["degree"]["min"]
    speed = f"exact after {_count(exact, 'round')}" if exact else f"agrees in {_count(one.rounds, 'round')}"
    if one.rounds == fewest and not varies:
        speed += ", the fewest of all that stay as they are,"
    company = ("" if least == one.degree else "up to " if varies else f"{least} to ") + _count(one.degree, "neighbour")
    company += (" each way" if one.facts["directed"] else "") + (" a round" if varies else "")
    but = [
        *(["any lost message spoils that"] if exact and varies else []),
        *([f"{'over time ' if varies else ''}it needs links to {one.links} others"] if one.links > one.degree else []),
    ]
    deaths = f"survives any {_count(one.deaths, 'death')}" if one.deaths else "a single death can cut it in two"
    why = f"{speed} with {company}{', but ' if but else ''}{', and '.join(but)}; {deaths}"
    if max_degree < enough:
        why += f"; a graph that stays as it is takes {_count(enough, 'neighbour')} or more for what is asked"
    return why


def _enough(nodes: int, survive: int) -> int:
    """The neighbours that some node needs in a graph that stays as it is, and survives so many deaths (Harary 1962)."""
    each = survive + 1
    return (
        2 if each == 1 and nodes > 2 else each + nodes * each % 2
    )  # an odd number of nodes cannot all have an odd one


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
