"""The named graphs that stay as they are: one function on the integers 0..n-1 and one line in `GENERATORS` each.

A pure function of (n, section, random); names are put on afterwards. In a directed graph the edge (a, b) is the way
that a's vector travels. No node is joined to itself, no two nodes twice. BadInput where there is no such graph of n
nodes, with a number that works, and where it would have more than `MAX_EDGES` edges, before the first of them is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import networkx as nx
import numpy as np

from p2pfl.config import TopologySection
from p2pfl.messages import BadInput

MAX_EDGES = 5_000_000  # networkx takes 0.25 kB for each, and twice that while names are put on: 2.5 GB
DRAWS = 100  # of a random graph until it is connected; one that is connected every tenth time fails once in 40,000


def check_size(section: TopologySection, n: int, edges: int) -> None:
    """BadInput for a graph of so many edges that one would wait for minutes, or run out of memory."""
    if edges > MAX_EDGES:
        raise BadInput(
            f"topology: {section.graph} over {n} nodes has {edges} edges, more than {MAX_EDGES}: use a sparser graph "
            "(random-regular with degree = 4 mixes well at any size), or fewer nodes"
        )


def dimension(n: int) -> int:
    """log2 n, the dimension of the hypercube of n nodes; BadInput where there is none."""
    bits = n.bit_length() - 1
    if n != 2**bits:
        raise BadInput(
            f"topology: {n} nodes are no hypercube, which has a power of two: use {2**bits} or {2 ** (bits + 1)} nodes"
        )
    return bits


def _graph(
    n: int, section: TopologySection, count: int, edges: Iterable[tuple[int, int]], kind: type[nx.Graph] = nx.Graph
) -> nx.Graph:
    """The graph of at most `count` edges. Self loops are dropped and double edges merged, so that a generator's
    formula also holds for tiny n."""
    check_size(section, n, count)
    graph = kind()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((i, j) for i, j in edges if i != j)
    return graph


# -- The same from every node ----------------------------------------------------------------------------------------


def _circulant(n: int, section: TopologySection, shifts: Iterable[int]) -> nx.Graph:
    """i ~ i + u and i ~ i - u mod n for each of the shifts u in 0..n-1."""
    steps = sorted({min(u, n - u) for u in shifts} - {0})  # u and n - u lead to the same edges
    count = sum(n // 2 if 2 * u == n else n for u in steps)
    return _graph(n, section, count, ((i, (i + u) % n) for u in steps for i in range(n)))


def _powers(n: int) -> list[int]:
    """1, 2, 4, … below n: ceil(log2 n) of them."""
    return [2**t for t in range((n - 1).bit_length())]


def _complete(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    return _graph(n, section, n * (n - 1) // 2, ((i, j) for i in range(n) for j in range(i)))


def _ring(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    return _circulant(n, section, [1])


def _torus(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """A grid that is closed both ways. Degree 4, or 3 with two rows, where up and down lead to the same node."""
    rows, columns = _sides(n, section)
    right = ((r * columns + c, r * columns + (c + 1) % columns) for r in range(rows) for c in range(columns))
    down = ((r * columns + c, (r + 1) % rows * columns + c) for r in range(rows) for c in range(columns))
    return _graph(n, section, 2 * n, itertools.chain(right, down))


def _hypercube(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """i ~ i XOR 2^t: the nodes are the corners, and the bits of their numbers the coordinates."""
    bits = dimension(n)
    return _graph(n, section, n * bits // 2, ((i, i | 2**t) for t in range(bits) for i in range(n)))


def _exponential(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """i ~ i ± 2^t mod n."""
    return _circulant(n, section, _powers(n))


def _exponential_directed(n: int, section: TopologySection, random: np.random.Generator) -> nx.DiGraph:
    """i → i + 2^t mod n, as in Ying et al. 2021, "Exponential graph is provably efficient for decentralized deep
    training"."""
    powers = _powers(n)
    return _graph(n, section, n * len(powers), ((i, (i + u) % n) for u in powers for i in range(n)), nx.DiGraph)


def _equi_static(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """i ~ i ± u mod n for `m` random u, drawn until that is connected: the U-EquiStatic of Song et al. 2022,
    "Communication-efficient topologies for decentralized learning with O(1) consensus rate"."""
    shifts = section.m or (n - 1).bit_length()
    if shifts > n - 1:
        raise BadInput(
            f"topology: among {n} nodes there are {n - 1} ways to shift, not m = {shifts}: "
            f"use {f'm = {n - 1}, or ' if n > 1 else ''}at least {shifts + 1} nodes"
        )
    while True:  # a single shift connects the nodes if it has no divisor with n in common; several do more often
        drawn = (1 + random.choice(max(1, n - 1), size=shifts, replace=False)).tolist()
        if math.gcd(n, *drawn) == 1:
            return _circulant(n, section, drawn)


def _empty(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Everybody trains alone: the baseline that averaging has to beat."""
    return _graph(n, section, 0, ())


# -- Of a fixed shape ------------------------------------------------------------------------------------------------


def _path(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    return _graph(n, section, n - 1, itertools.pairwise(range(n)))


def _star(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """The first node is the hub."""
    return _graph(n, section, n - 1, ((0, i) for i in range(1, n)))


def _tree(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """The first node is the root, and each has `k` children until all nodes are there: filled level by level."""
    children = section.k or 2
    return _graph(n, section, n - 1, (((i - 1) // children, i) for i in range(1, n)))


def _grid(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Row by row; everybody is joined to the nodes on its left and right, above and below."""
    rows, columns = _sides(n, section)
    right = ((r * columns + c - 1, r * columns + c) for r in range(rows) for c in range(1, columns))
    down = ((i - columns, i) for i in range(columns, n))
    return _graph(n, section, 2 * n - rows - columns, itertools.chain(right, down))


def _sides(n: int, section: TopologySection) -> tuple[int, int]:
    """(rows, columns) of a grid or torus: `rows` if given, and otherwise as square as n allows."""
    rows = section.rows or next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    columns = n // rows
    if rows * columns != n:
        fewer = max(2, columns)
        raise BadInput(
            f"topology: {n} nodes do not fill {rows} rows: "
            f"use {rows * fewer} or {rows * (fewer + 1)} nodes, or leave rows out"
        )
    if n > 2 and min(rows, columns) == 1:
        mend = "leave rows out, or use graph = 'path' or 'ring'" if section.rows else f"use {n - 1} or {n + 1} nodes"
        raise BadInput(f"topology: {n} nodes in {rows} rows are only a line: {mend}")
    return rows, columns


def _caveman(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Cliques on a ring: the last node of each is joined to the first node of the next."""
    if section.cliques > n:
        raise BadInput(f"topology: {n} nodes cannot form {section.cliques} cliques: use {section.cliques} or more")
    groups = _shares(n, section.cliques)
    ring = zip(groups, groups[1:] + groups[:1], strict=True)
    return _cliques(n, section, groups, [(group[-1], following[0]) for group, following in ring])


def _dumbbell(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Two cliques, joined by one edge: the narrowest bottleneck."""
    left, right = _shares(n, 2)
    return _cliques(n, section, [left, right], [(left[-1], right[0])] if right else [])


def _shares(n: int, parts: int) -> list[range]:
    """0..n-1 in order, in parts whose sizes differ by one at most."""
    ends = [-(-n * i // parts) for i in range(parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def _cliques(n: int, section: TopologySection, groups: Sequence[range], between: list[tuple[int, int]]) -> nx.Graph:
    """In each group everybody is joined to everybody; the attribute `part` of a node is the number of its group."""
    inside = (pair for group in groups for pair in itertools.combinations(group, 2))
    count = sum(len(group) * (len(group) - 1) // 2 for group in groups) + len(between)
    graph = _graph(n, section, count, itertools.chain(inside, between))
    nx.set_node_attributes(graph, {node: part for part, group in enumerate(groups) for node in group}, "part")
    return graph


# -- Drawn at random, and always connected ---------------------------------------------------------------------------


def _random_regular(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Among the connected graphs in which every node has `degree` neighbours, each is about as likely as any other."""
    degree = section.degree
    if degree >= n:
        raise BadInput(
            f"topology: {n} nodes cannot have {degree} neighbours each: "
            f"use {f'degree = {n - 1}, or ' if n > 1 else ''}at least {degree + 1} nodes"
        )
    if n * degree % 2:
        raise BadInput(
            f"topology: no graph gives each of {n} nodes {degree} neighbours, since {n} * {degree} is odd: "
            f"use {n + 1} nodes, or degree = {degree - 1 or degree + 1}"
        )
    if degree == 1 and n > 2:
        raise BadInput(f"topology: with degree = 1 the {n} nodes fall into pairs: use degree = 2 or more")
    count = n * degree // 2
    check_size(section, n, count)
    if degree == 2:  # a ring in random order; by drawing until it is connected, one would draw sqrt(n) times
        around = random.permutation(n).tolist()
        return _graph(n, section, count, zip(around, around[1:] + around[:1], strict=True))
    sparse_degree = min(degree, n - 1 - degree)  # a dense graph is drawn by its missing edges: networkx stalls on it
    while True:  # hardly ever a second time
        drawn = nx.random_regular_graph(sparse_degree, n, seed=_networkx_seed(random))
        graph = _graph(n, section, count, drawn.edges if sparse_degree == degree else nx.complement(drawn).edges)
        if nx.is_connected(graph):
            return graph


def _erdos_renyi(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Each edge is there with probability `p`. From p = ln n / n on such graphs are mostly connected."""
    enough = min(1.0, 2 * math.log(n) / n)
    p = section.p or enough
    check_size(section, n, round(p * n * (n - 1) / 2))
    for _ in range(DRAWS):
        drawn = nx.fast_gnp_random_graph(n, p, seed=_networkx_seed(random))
        if nx.is_connected(drawn):
            return _graph(n, section, drawn.number_of_edges(), drawn.edges)
    raise BadInput(
        f"topology: none of {DRAWS} random graphs of {n} nodes with p = {p:.3g} is connected: use p = {enough:.3g}"
    )


def _watts_strogatz(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """A ring with edges to the `k` nearest, each of them rewired to a random node with probability `p`."""
    k = section.k or 4
    if k % 2:
        raise BadInput(f"topology: on a ring k = {k} neighbours cannot be half on each side: use k = {k + 1}")
    if k >= n:
        fewer = (n - 1) // 2 * 2
        raise BadInput(
            f"topology: {n} nodes cannot have k = {k} neighbours each: "
            f"use {f'k = {fewer}, or ' if fewer else ''}at least {k + 1} nodes"
        )
    check_size(section, n, n * k // 2)
    p = section.p or 0.3
    for _ in range(DRAWS):
        drawn = nx.watts_strogatz_graph(n, k, p, seed=_networkx_seed(random))
        if nx.is_connected(drawn):
            return _graph(n, section, drawn.number_of_edges(), drawn.edges)
    raise BadInput(  # with k = 4 each node keeps an end of two edges
        f"topology: none of {DRAWS} random graphs of {n} nodes with k = {k}, p = {p} is connected: use k = 4"
    )


def _barabasi_albert(n: int, section: TopologySection, random: np.random.Generator) -> nx.Graph:
    """Node after node comes and is joined to `m` others, the sooner to those that have many neighbours."""
    m = section.m or 2
    if m >= n:
        raise BadInput(
            f"topology: no newcomer can be joined to m = {m} of {n - 1} other nodes: "
            f"use {f'm = {n - 1}, or ' if n > 1 else ''}at least {m + 1} nodes"
        )
    check_size(section, n, m * (n - m))
    drawn = nx.barabasi_albert_graph(n, m, seed=_networkx_seed(random))
    return _graph(n, section, drawn.number_of_edges(), drawn.edges)


def _networkx_seed(random: np.random.Generator) -> int:
    return int(random.integers(2**32))


# -- By name ---------------------------------------------------------------------------------------------------------


GENERATORS: dict[str, Callable[[int, TopologySection, np.random.Generator], nx.Graph]] = {
    "complete": _complete,
    "ring": _ring,
    "path": _path,
    "star": _star,
    "grid": _grid,
    "torus": _torus,
    "hypercube": _hypercube,
    "exponential": _exponential,
    "exponential-directed": _exponential_directed,
    "random-regular": _random_regular,
    "erdos-renyi": _erdos_renyi,
    "watts-strogatz": _watts_strogatz,
    "barabasi-albert": _barabasi_albert,
    "equi-static": _equi_static,
    "tree": _tree,
    "caveman": _caveman,
    "dumbbell": _dumbbell,
    "empty": _empty,
}
# Graphs that look the same from every node, since i → i + 1 mod n keeps their edges; of a torus, such a turn of all its
# rows or columns; of a hypercube, i → i XOR a.
VERTEX_TRANSITIVE = frozenset(
    ("complete", "ring", "torus", "hypercube", "exponential", "exponential-directed", "equi-static", "empty")
)
