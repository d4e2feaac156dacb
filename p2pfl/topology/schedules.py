"""The named graphs that change from round to round.

Each is a pure function of (n, section, seed, round) on the integers 0..n-1, so that nodes agree on it without talking.
In a directed graph the edge (a, b) is the way that a's vector travels: b hears a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx

from p2pfl.config import TopologySection


@dataclass(frozen=True)
class Schedule:
    """The graph of every round."""

    period: int | None  # rounds after which it repeats; None: drawn anew for every round
    at: Callable[[int], nx.Graph]  # round → graph on 0..n-1; "weight" of an edge, where the schedule has its own


def _one_peer_exponential(n: int, section: TopologySection, seed: int) -> Schedule:
    """In round t everybody sends to the node 2^t further on: exact after log2 n rounds if n is a power of two."""
    period = max(1, (n - 1).bit_length())

    def at(round: int) -> nx.DiGraph:
        graph = nx.DiGraph()
        graph.add_nodes_from(range(n))
        if n > 1:
            graph.add_edges_from((i, (i + 2 ** (round % period)) % n) for i in range(n))
        return graph

    return Schedule(period, at)


SCHEDULES: dict[str, Callable[[int, TopologySection, int], Schedule]] = {
    "one-peer-exponential": _one_peer_exponential,
}
