"""What graph and weights imply: how fast the nodes agree, what a round costs, how many deaths it survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import networkx as nx
import numpy as np

from p2pfl.topology import Topology
from p2pfl.topology.matrix import mixing_matrix

TOLERANCE = 1e-6  # what is left of a disagreement when it counts as gone
DENSE_NODES = 1000  # up to here all eigenvalues at once (0.05 s); above, only the three that are needed
CONNECTIVITY_NODES, CONNECTIVITY_EDGES = 256, 2000  # above either, node connectivity would take more than about 5 s


class Degrees(TypedDict):
    min: int
    mean: float
    max: int


Implied = TypedDict(
    "Implied",
    {
        "name": str,
        "nodes": int,
        "edges": int,
        "degree": Degrees,
        "connected": bool,
        "diameter": int | None,  # None: not connected
        "node_connectivity": int | None,  # None: too large a graph
        "weights": str,
        "lambda2": float,
        "spectral_gap": float,
        "rounds_to_1e-6": int | None,  # None: never, the graph is not connected
        "exact_after": int | None,  # rounds; None: never exactly
        "period": int,
    },
)


def implied(
    topology: Topology, weights_name: str, masses: Mapping[str, float], parameters: int | None = None
) -> Implied:
    """What `p2pfl topology --json` prints; the fields are those of the contract.

    `lambda2` is the second largest |eigenvalue| of W: every round shrinks the distance to the mean at least by this
    factor. `rounds_to_1e-6` is the least t with lambda2^t <= 1e-6, which is ||W^t - J||_2 <= 1e-6, J = ones / n: the
    worst case over all starts. (Where masses differ, both hold for the mean and the norm that they weight.) A single
    node agrees with itself after 0 rounds; complete graphs agree after 1. `node_connectivity` is the number of deaths
    that can cut the graph in two; None above CONNECTIVITY_NODES or CONNECTIVITY_EDGES, unless the graph is complete or
    not connected.
    """
    graph = topology.at(0)
    n, degrees = len(graph), [degree for _, degree in graph.degree]
    connected = nx.is_connected(graph)
    lambda2 = second_eigenvalue(graph, weights_name, masses)
    return {
        "name": graph.name,
        "nodes": n,
        "edges": graph.number_of_edges(),
        "degree": {"min": min(degrees), "mean": sum(degrees) / n, "max": max(degrees)},
        "connected": connected,
        "diameter": nx.diameter(graph) if connected else None,
        "node_connectivity": _node_connectivity(graph, connected),
        "weights": weights_name,
        "lambda2": lambda2,
        "spectral_gap": 1.0 - lambda2,
        "rounds_to_1e-6": _rounds(n, lambda2),
        "exact_after": _rounds(n, lambda2) if lambda2 == 0.0 else None,
        "period": 1,
    }


def second_eigenvalue(graph: nx.Graph, weights: str, masses: Mapping[str, float]) -> float:
    """Second largest |eigenvalue| of W: 1.0 for a graph that is not connected, 0.0 where one round is enough.

    W is similar to the symmetric D^1/2 W D^-1/2, D = diag(masses), since m_i w_ij = m_j w_ji.
    """
    if not nx.is_connected(graph):
        return 1.0
    if _is_complete(graph):
        return 0.0  # all reaches are equal, so that W is m / sum(m) in every row: one eigenvalue 1, the others 0
    roots = np.sqrt([masses[name] for name in graph])
    eigenvalues = np.linalg.eigvalsh(roots[:, None] * mixing_matrix(graph, weights, masses).toarray() / roots)
    return max(-float(eigenvalues[0]), float(eigenvalues[-2]))


def _is_complete(graph: nx.Graph) -> bool:
    return bool(graph.number_of_edges() == len(graph) * (len(graph) - 1) // 2)


def _rounds(n: int, lambda2: float) -> int | None:
    """The least t with lambda2^t <= TOLERANCE."""
    if n == 1:
        return 0
    if lambda2 == 0.0:
        return 1
    if lambda2 >= 1.0:
        return None
    return max(1, math.ceil(math.log(TOLERANCE) / math.log(lambda2)))


def _node_connectivity(graph: nx.Graph, connected: bool) -> int | None:
    if not connected:
        return 0
    if _is_complete(graph):
        return len(graph) - 1
    if len(graph) > CONNECTIVITY_NODES or graph.number_of_edges() > CONNECTIVITY_EDGES:
        return None
    return int(nx.node_connectivity(graph))
