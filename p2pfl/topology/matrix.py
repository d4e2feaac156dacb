"""The mixing matrix W of a graph: one round of averaging is X <- W X. And which weights a graph can have.

Sparse, float64 (n, n), in the graph's order of nodes; row i is what node i gives to each vector. Every row sums to 1.
With push-sum it is the matrix A of the portions, whose columns sum to 1. The edge (a, b) of a directed graph is the
way that a's vector travels: an entry in row b and column a.

What follows from a node's own neighbourhood stands in `weights`. From the whole graph follow

    max-degree       1 / (1 + d_max) on every edge
    best-constant    2 / (l_2 + l_n) on every edge, l_1 = 0 < l_2 <= … <= l_n being the eigenvalues of the Laplacian L:
                     of all I - c L it leaves the least of a disagreement, (l_n - l_2) / (l_n + l_2) (Xiao & Boyd 2004).
                     A self weight may be negative, as that of a star's hub
    fastest          on each edge its own, the best of all: see `topology.fastest`
    given            on each edge its own, from the graph: the attribute "weight"
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat

import networkx as nx
import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from p2pfl.messages import BadInput
from p2pfl.rng import stream
from p2pfl.topology.fastest import MAX_EDGES, MAX_NODES, fastest_weights, is_small_enough
from p2pfl.weights import FROM_WHOLE_GRAPH, PUSH_SUM, Stake, reach, weights_of

ROUNDING = 1e-9  # by which a sum may miss 1 since it was rounded
BALANCE = 1e-6  # by which a column of given weights may miss 1: files round to 7 digits or so
DENSE_NODES = 1000  # up to here all eigenvalues of a Laplacian at once: 0.2 s
LANCZOS_TOLERANCE = 1e-4  # above, as a part of l_n: less than 0.1 % of the gap, in 0.3 s for 10,000 nodes


def hears(graph: nx.Graph, name: str) -> list[str]:
    """Whose vectors this node gets, sorted."""
    return sorted(graph.predecessors(name) if graph.is_directed() else graph[name])


def tells(graph: nx.Graph, name: str) -> list[str]:
    """Who gets this node's vector, sorted."""
    return sorted(graph[name])


# -- What can hold on which graph ------------------------------------------------------------------------------------


def check_weights(graph: nx.Graph, weights: str) -> None:
    """BadInput, with what works instead, where such weights cannot do on this graph what they promise.

    That is to keep the mean (by mass) in every round, which takes columns that sum to 1, and for best-constant and
    fastest to be the best. uniform-neighbours promise nothing; push-sum needs no more than that every node can reach
    every other over all rounds.
    """
    if weights == "given":
        _check_given(graph)
    elif graph.is_directed():
        _check_directed(graph, weights)
    elif weights in ("best-constant", "fastest") and not nx.is_connected(graph):
        raise BadInput(
            f'topology: weights = "{weights}" need a graph that is connected in every round: use weights = "metropolis"'
        )
    elif weights == "fastest" and not is_small_enough(graph):
        raise BadInput(
            f'topology: weights = "fastest" are found for up to {MAX_NODES} nodes and {MAX_EDGES} edges, and there are '
            f'{len(graph)} and {graph.number_of_edges()}: use weights = "best-constant"'
        )


def _check_directed(graph: nx.DiGraph, weights: str) -> None:
    what = f'topology: weights = "{weights}" on a directed graph'
    match weights:
        case "metropolis" | "lazy" | "max-degree":
            usual = graph.number_of_edges() / len(graph)
            for name in graph:
                heard, told = graph.in_degree(name), graph.out_degree(name)
                if heard != told or (told != usual and weights != "max-degree"):
                    alike = "hear as many as it tells" if weights == "max-degree" else f"hear and tell {usual:g} others"
                    raise BadInput(
                        f"{what} keep the mean only if every node {alike}, and {name} hears {heard} and tells {told}: "
                        'use weights = "push-sum"'
                    )
        case "best-constant" | "fastest":
            raise BadInput(f'{what} are not defined: use weights = "push-sum"')
        case "samples":
            raise BadInput(f'{what} do not end at the mean by samples: use weights = "push-sum-samples"')
        case "inverse" | "sqrt":
            raise BadInput(f"{what} do not exist, as push-sum or otherwise: use a graph whose edges go both ways")


def _check_given(graph: nx.Graph) -> None:
    for a, b, weight in graph.edges(data="weight"):
        if not isinstance(weight, (int, float)) or not 0.0 <= weight <= 1.0:
            has = "no weight" if weight is None else f"the weight {weight!r}"
            raise BadInput(
                f'topology: weights = "given", and the edge {a} - {b} has {has}: give it one from 0 to 1, '
                'or use weights = "metropolis"'
            )
    for name in graph:
        heard = math.fsum(graph[other][name]["weight"] for other in hears(graph, name))
        told = math.fsum(graph[name][other]["weight"] for other in graph[name])
        if heard > 1.0 + ROUNDING:
            raise BadInput(
                f'topology: weights = "given", and {name} gives others {heard:.10g} altogether: make it at most 1, '
                'or use weights = "metropolis"'
            )
        if abs(heard - told) > BALANCE:  # its self weight is 1 - heard, and its column sums to that plus told
            raise BadInput(
                f'topology: weights = "given" keep the mean only if a node gives others as much as it gets, and {name} '
                f'gives {heard:.7g} and gets {told:.7g}: make both alike, or use weights = "push-sum"'
            )


# -- Weights from the whole graph ------------------------------------------------------------------------------------


def fixed_weights(graph: nx.Graph, weights: str) -> dict[tuple[str, str], float]:
    """(receiver, sender) → weight, for the weights that follow from the whole graph; empty for the others.

    For a graph that `check_weights` accepts. The same graph gives the same numbers at every call.
    """
    if weights not in FROM_WHOLE_GRAPH:
        return {}
    of_edges: Iterable[float]
    match weights:
        case "given":
            of_edges = (float(weight) for _, _, weight in graph.edges(data="weight"))
        case "fastest":
            of_edges = fastest_weights(graph).tolist()
        case "best-constant":
            of_edges = repeat(_best_constant(graph))
        case _:
            degrees = graph.in_degree if graph.is_directed() else graph.degree
            of_edges = repeat(1.0 / (1.0 + max(degree for _, degree in degrees)))
    found = {(b, a): weight for (a, b), weight in zip(graph.edges, of_edges, strict=False)}
    if not graph.is_directed():
        found |= {(a, b): weight for (b, a), weight in found.items()}
    return found


def _best_constant(graph: nx.Graph) -> float:
    """2 / (l_2 + l_n) of a connected graph; 1.0, which is not used, for a single node.

    Above DENSE_NODES what is taken for l_2 and l_n is too large by about LANCZOS_TOLERANCE of l_n. It must not be too
    small, or W could have an eigenvalue below -1. This way the gap stays what it is, but for a slightly larger sum.
    """
    n = len(graph)
    if n == 1:
        return 1.0
    laplacian = nx.laplacian_matrix(graph, weight=None).astype(float)
    if n <= DENSE_NODES:
        eigenvalues = np.linalg.eigvalsh(laplacian.toarray())
        return float(2.0 / (eigenvalues[1] + eigenvalues[-1]))
    # Imported here since only graphs of thousands of nodes need it.
    from scipy.sparse.linalg import LinearOperator, eigsh  # type: ignore[import-untyped]

    start = stream(0, "lanczos").standard_normal(n)  # the same numbers at every call

    def largest(matrix: LinearOperator) -> float:
        return float(eigsh(matrix, 1, which="LA", v0=start, tol=LANCZOS_TOLERANCE, return_eigenvectors=False)[0])

    top = largest(laplacian) * (1.0 + LANCZOS_TOLERANCE)
    # top I - L has the largest eigenvalue top - l_2, once the mean is taken out, whose eigenvalue would be top.
    flipped = LinearOperator((n, n), matvec=lambda x: top * (x - x.mean()) - laplacian @ x, dtype=np.float64)
    return 2.0 / (top - largest(flipped) + top)


# -- The matrix ------------------------------------------------------------------------------------------------------


def mixing_matrix(graph: nx.Graph, weights: str, masses: Mapping[str, float]) -> sparse.csr_array:
    """W of this graph, whose nodes have these masses (see `weights.mass`). BadInput as `check_weights`.

    It keeps the mean by mass, sum_i m_i w_ij = m_j, except with uniform-neighbours. With metropolis, lazy, samples,
    inverse and sqrt on an undirected graph no entry is negative, the diagonal is positive, and m_i w_ij = m_j w_ji.
    """
    check_weights(graph, weights)
    index = {name: i for i, name in enumerate(graph)}
    rows, columns, values = [], [], []
    for (name, i), (own, others) in zip(index.items(), _rows(graph, weights, masses), strict=True):
        for other, weight in [(name, own), *others.items()]:
            rows.append(i)
            columns.append(index[other])
            values.append(weight)
    matrix = sparse.csr_array((np.array(values), (rows, columns)), shape=(len(graph), len(graph)))
    sums = matrix.sum(axis=0 if weights in PUSH_SUM else 1)
    if not (np.abs(sums - 1.0) <= ROUNDING).all():  # put so that NaN does not pass
        raise ValueError(f"the {weights} weights around a node sum to between {sums.min()} and {sums.max()}, not to 1")
    return matrix


def _rows(graph: nx.Graph, weights: str, masses: Mapping[str, float]) -> Iterator[tuple[float, dict[str, float]]]:
    """What each node gives to its own vector, and to those that it hears."""
    if weights in PUSH_SUM:
        portions = {name: 1.0 / (1.0 + len(graph[name])) for name in graph}
        for name in graph:
            yield portions[name], {other: portions[other] for other in hears(graph, name)}
        return
    fixed = fixed_weights(graph, weights)
    around = {name: hears(graph, name) for name in graph}
    stakes = {
        name: Stake(masses[name], reach([masses[name], *(masses[other] for other in around[name])])) for name in graph
    }
    for name in graph:
        heard = {other: stakes[other] for other in around[name]}
        own_fixed = {other: fixed[name, other] for other in heard} if fixed else {}
        others = weights_of(weights, stakes[name], heard, own_fixed)
        yield 1.0 - math.fsum(others.values()), others  # exactly rounded, as in `mixing.fold`: both give the same
