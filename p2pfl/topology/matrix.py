"""The mixing matrix W of a graph: one round of averaging is X <- W X.

Sparse, float64 (n, n), in the graph's order of nodes; row i is what node i gives to each vector. Every row sums to 1.
With push-sum it is the matrix A of the portions, whose columns sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import networkx as nx
import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from p2pfl.messages import BadInput
from p2pfl.weights import FROM_WHOLE_GRAPH, PUSH_SUM, Stake, reach, weights_of


def hears(graph: nx.Graph, name: str) -> list[str]:
    """Whose vectors this node gets, sorted."""
    return sorted(graph.predecessors(name) if graph.is_directed() else graph[name])


def tells(graph: nx.Graph, name: str) -> list[str]:
    """Who gets this node's vector, sorted."""
    return sorted(graph[name])


def check_weights(graph: nx.Graph, weights: str) -> None:
    """BadInput, with what works instead, where such weights cannot do on this graph what they promise."""


def fixed_weights(graph: nx.Graph, weights: str) -> dict[tuple[str, str], float]:
    """(receiver, sender) → weight, for the weights that follow from the whole graph; empty for the others."""
    if weights not in FROM_WHOLE_GRAPH:
        return {}
    raise BadInput(f"weights = {weights!r} is not in this version")


def mixing_matrix(graph: nx.Graph, weights: str, masses: Mapping[str, float]) -> sparse.csr_array:
    """W of this graph, whose nodes have these masses. BadInput as `check_weights`.

    With metropolis, lazy, samples, inverse and sqrt no entry is negative, the diagonal is positive, and
    m_i w_ij = m_j w_ji.
    """
    check_weights(graph, weights)
    fixed = fixed_weights(graph, weights)
    index = {name: i for i, name in enumerate(graph)}
    around = tells if weights in PUSH_SUM else hears
    stakes = {
        name: Stake(masses[name], 1.0 + len(graph[name]))
        if weights in PUSH_SUM
        else Stake(masses[name], reach([masses[name], *(masses[other] for other in around(graph, name))]))
        for name in graph
    }
    rows, columns, values = [], [], []
    for name, i in index.items():
        if weights in PUSH_SUM:
            row = {other: 1.0 / stakes[other].reach for other in hears(graph, name)}
            own = 1.0 / stakes[name].reach
        else:
            heard = {other: stakes[other] for other in hears(graph, name)}
            own_fixed = {other: fixed[name, other] for other in heard} if fixed else {}
            row = weights_of(weights, stakes[name], heard, own_fixed)
            own = 1.0 - math.fsum(row.values())  # exactly rounded, as in `mixing.fold`, so that both give the same
        for other, weight in [(name, own), *row.items()]:
            rows.append(i)
            columns.append(index[other])
            values.append(weight)
    return sparse.csr_array((np.array(values), (rows, columns)), shape=(len(graph), len(graph)))
