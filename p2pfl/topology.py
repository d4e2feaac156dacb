"""The graph over the nodes, the mixing weights on it, and what follows from both.

A graph comes from a generator's name, from a file, or edge by edge. A generator is one function on the integers
0..n-1 and one line in `GENERATORS`; names are put on afterwards. All members compute the same graph from the same
section and seed. Nothing here trains or sends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import networkx as nx
import numpy as np
import numpy.typing as npt

from p2pfl.config import GRAPHS, PEERS, TopologySection, did_you_mean
from p2pfl.messages import BadInput, check_name
from p2pfl.rng import stream
from p2pfl.weights import neighbour_weight, reach

TOLERANCE = 1e-6  # what is left of a disagreement when it counts as gone
DENSE_NODES = 1000  # up to here all eigenvalues at once (0.05 s); above, only the three that are needed
CONNECTIVITY_NODES, CONNECTIVITY_EDGES = 256, 2000  # above either, node connectivity would take more than about 5 s


# -- Graphs on the integers 0..n-1 -----------------------------------------------------------------------------------


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


# -- Graphs over names -----------------------------------------------------------------------------------------------


def build(section: TopologySection, seed: int) -> nx.Graph:
    """The undirected graph over `section.names`, in their order; `graph.name` says where it came from.

    BadInput where the section describes no graph: a size that the generator cannot do, a file that cannot be read,
    an edge to an unknown name or from a node to itself.
    """
    if section.file is not None:
        pairs = ((f"{section.file} line {line}", a, b) for line, a, b in _read_edgelist(section.file))
        return _named_graph(section.file.name, section.names, pairs)
    if section.edges:
        return _named_graph("edges", section.names, (("topology.edges", a, b) for a, b in section.edges))
    if section.graph == PEERS:
        raise BadInput(f"topology: no graph is given: set graph to one of {', '.join(GRAPHS)}, or give a file or edges")
    numbered = GENERATORS[section.graph](len(section.names), section, stream(seed, "topology"))
    graph = nx.relabel_nodes(numbered, dict(enumerate(section.names)))
    graph.name = section.graph
    return graph


def names_in(path: Path) -> tuple[str, ...]:
    """The names in an edge list, sorted: for a file that stands alone, without an experiment that names the nodes."""
    return tuple(sorted({check_name(name) for _, *pair in _read_edgelist(path) for name in pair}))


def _read_edgelist(path: Path) -> list[tuple[int, str, str]]:
    """(line number, name, name) of each edge: two names a line, `#` starts a comment."""
    if path.suffix != ".edgelist":
        raise BadInput(f"{path}: a graph is read from an .edgelist (two names a line), not from {path.suffix or path}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    edges = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if len(words) == 2:
            edges.append((number, words[0], words[1]))
        elif words:
            raise BadInput(f"{path} line {number}: an edge is two names with a space between, not {line.strip()!r}")
    return edges


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


# -- Weights ---------------------------------------------------------------------------------------------------------


def _weights(graph: nx.Graph, masses: Mapping[str, float]) -> Iterator[tuple[int, int, float]]:
    """(i, j, w_ij) for every neighbour j of every node i; nodes are counted in the graph's order."""
    index = {name: i for i, name in enumerate(graph)}
    reaches = {name: reach([masses[name], *(masses[other] for other in graph[name])]) for name in graph}
    for name in graph:
        for other in graph[name]:
            yield index[name], index[other], neighbour_weight(masses[other], reaches[name], reaches[other])


def mixing_matrix(graph: nx.Graph, masses: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """W, float64 (n, n) in the graph's node order: one round of averaging is X <- W X. Formula: see `weights`.

    Rows sum to 1, every entry is >= 0, the diagonal is positive, and m_i w_ij = m_j w_ji.
    """
    matrix = np.zeros((len(graph), len(graph)))
    for i, j, weight in _weights(graph, masses):
        matrix[i, j] = weight
    for i, row in enumerate(matrix):
        row[i] = 1.0 - math.fsum(row)  # exactly rounded, as in `mixing.fold`, so that both give the same number
    return matrix


def node_link(graph: nx.Graph, masses: Mapping[str, float]) -> dict[str, object]:
    """The graph as networkx node-link JSON (its edges under "edges").

    A node carries its `mass` and `self_weight` w_ii; an edge carries `weight`, what its source gives to its target's
    vector, and `weight_back`, what the target gives to the source's. The two are equal where all masses are.
    """
    matrix, index = mixing_matrix(graph, masses), {name: i for i, name in enumerate(graph)}
    weighted = nx.Graph(name=graph.name)
    for name, i in index.items():
        weighted.add_node(name, mass=masses[name], self_weight=float(matrix[i, i]))
    for a, b in graph.edges:
        i, j = index[a], index[b]
        weighted.add_edge(a, b, weight=float(matrix[i, j]), weight_back=float(matrix[j, i]))
    data: dict[str, object] = nx.node_link_data(weighted, edges="edges")
    return data


# -- What graph and weights imply ------------------------------------------------------------------------------------


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


def implied(graph: nx.Graph, weights_name: str, masses: Mapping[str, float]) -> Implied:
    """What `p2pfl topology --json` prints; the fields are those of the contract.

    `lambda2` is the second largest |eigenvalue| of W: every round shrinks the distance to the mean at least by this
    factor. `rounds_to_1e-6` is the least t with lambda2^t <= 1e-6, which is ||W^t - J||_2 <= 1e-6, J = ones / n: the
    worst case over all starts. (Where masses differ, both hold for the mean and the norm that they weight.) A single
    node agrees with itself after 0 rounds; complete graphs agree after 1. `node_connectivity` is the number of deaths
    that can cut the graph in two; None above CONNECTIVITY_NODES or CONNECTIVITY_EDGES, unless the graph is complete or
    not connected.
    """
    n, degrees = len(graph), [degree for _, degree in graph.degree]
    connected = nx.is_connected(graph)
    lambda2 = second_eigenvalue(graph, masses)
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


def second_eigenvalue(graph: nx.Graph, masses: Mapping[str, float]) -> float:
    """Second largest |eigenvalue| of W: 1.0 for a graph that is not connected, 0.0 where one round is enough.

    W is similar to the symmetric D^1/2 W D^-1/2, D = diag(masses), since m_i w_ij = m_j w_ji.
    """
    if not nx.is_connected(graph):
        return 1.0
    if _is_complete(graph):
        return 0.0  # all reaches are equal, so that W is m / sum(m) in every row: one eigenvalue 1, the others 0
    roots = np.sqrt([masses[name] for name in graph])
    if len(graph) <= DENSE_NODES:
        eigenvalues = np.linalg.eigvalsh(roots[:, None] * mixing_matrix(graph, masses) / roots)
        return max(-float(eigenvalues[0]), float(eigenvalues[-2]))
    return _second_eigenvalue_of_large(graph, masses, roots)


def _is_complete(graph: nx.Graph) -> bool:
    return bool(graph.number_of_edges() == len(graph) * (len(graph) - 1) // 2)


def _second_eigenvalue_of_large(graph: nx.Graph, masses: Mapping[str, float], roots: npt.NDArray[np.float64]) -> float:
    # Imported here since only graphs of thousands of nodes need it; scikit-learn brings it.
    from scipy import sparse  # type: ignore[import-untyped]
    from scipy.sparse.linalg import eigsh  # type: ignore[import-untyped]

    n = len(graph)
    rows, columns, values = (np.array(part) for part in zip(*_weights(graph, masses), strict=True))
    own = 1.0 - np.bincount(rows, values, minlength=n)
    matrix = sparse.csc_array((values * roots[rows] / roots[columns], (rows, columns)), shape=(n, n))
    matrix = matrix + sparse.dia_array((own[None, :], [0]), shape=(n, n))
    start = stream(0, "lanczos").standard_normal(n)  # the same numbers at every call
    # The largest eigenvalues crowd just below 1 (a ring of 2000: 1 - 3e-6), where only shift and invert tells them
    # apart. The shift stays off 1, which is an eigenvalue itself: the further, the more digits of the result are right.
    largest = eigsh(matrix, k=2, sigma=1.0 + 1e-5, v0=start, return_eigenvectors=False)
    smallest = eigsh(matrix, k=1, which="SA", v0=start, return_eigenvectors=False)
    return max(-float(smallest[0]), float(min(largest)))


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
