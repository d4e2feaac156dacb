"""The named graphs that stay as they are: one function on the integers 0..n-1 and one line in `GENERATORS` each.

A pure function of (n, section, random); names are put on afterwards. In a directed graph the edge (a, b) is the way
that a's vector travels. BadInput where there is no such graph of n nodes, with a number that works.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import networkx as nx
import numpy as np

from p2pfl.config import TopologySection
from p2pfl.messages import BadInput


def _graph(n: int, edges: Iterable[tuple[int, int]]) -> nx.Graph:
    """Self loops are dropped and double edges merged, so that a generator's formula also holds for tiny n."""
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((i, j) for i, j in edges if i != j)
    return graph


def _complete(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    return _graph(n, itertools.combinations(range(n), 2))


def _ring(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    return _graph(n, ((i, (i + 1) % n) for i in range(n)))


def _path(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    return _graph(n, itertools.pairwise(range(n)))


def _star(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """The first node is the hub."""
    return _graph(n, ((0, i) for i in range(1, n)))


def _torus(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """As square as n allows. Degree 4, or 3 with two rows, where up and down lead to the same node."""
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    columns = n // rows
    if rows == 1 and n > 2:
        raise BadInput(f"topology: {n} nodes fill no rows and columns of a torus: use {n - 1} or {n + 1} nodes")
    right = ((r * columns + c, r * columns + (c + 1) % columns) for r in range(rows) for c in range(columns))
    down = ((r * columns + c, (r + 1) % rows * columns + c) for r in range(rows) for c in range(columns))
    return _graph(n, itertools.chain(right, down))


def _random_regular(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Drawn uniformly among the connected graphs in which every node has `degree` neighbours."""
    degree = section.degree
    if degree >= n:
        raise BadInput(f"topology: {n} nodes cannot have {degree} neighbours each: use more nodes, or a smaller degree")
    if n * degree % 2:
        raise BadInput(
            f"topology: no graph gives each of {n} nodes {degree} neighbours, since {n} * {degree} is odd: "
            f"use {n + 1} nodes, or degree = {degree - 1 or degree + 1}"
        )
    if degree == 1 and n > 2:
        raise BadInput(f"topology: with degree = 1 the {n} nodes fall into pairs: use degree = 2 or more")
    sparse_degree = min(degree, n - 1 - degree)  # a dense graph is drawn by its missing edges: networkx stalls on it
    while True:  # degree 2 needs about sqrt(n) draws, a higher degree hardly ever a second one
        drawn = nx.random_regular_graph(sparse_degree, n, seed=int(random.integers(2**32)))
        graph = _graph(n, drawn.edges if sparse_degree == degree else nx.complement(drawn).edges)
        if nx.is_connected(graph):
            return graph


def _empty(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Everybody trains alone: the baseline that averaging has to beat."""
    return _graph(n, ())


GENERATORS: dict[str, Callable[[int, TopologySection, np.random.Generator], nx.Graph]] = {
    "complete": _complete,
    "ring": _ring,
    "path": _path,
    "star": _star,
    "torus": _torus,
    "random-regular": _random_regular,
    "empty": _empty,
}
