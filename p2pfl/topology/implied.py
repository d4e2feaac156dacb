"""What graph and weights imply: how fast the nodes agree, what a round costs, how many deaths it survives.

Exact wherever that takes seconds: eigenvalues, norms of products, breadth first search, maximum flows. What would take
longer is null. Matrices are sparse: above DENSE_NODES nodes, nothing holds a number for each pair of nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, reduce
from itertools import combinations, product
from typing import NamedTuple, TypedDict

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy import sparse  # type: ignore[import-untyped]
from scipy.sparse import csgraph  # type: ignore[import-untyped]

from p2pfl.rng import stream
from p2pfl.topology import ROUNDS_KEPT, Topology
from p2pfl.topology.graphs import VERTEX_TRANSITIVE
from p2pfl.topology.matrix import BALANCE, mixing_matrix
from p2pfl.weights import PUSH_SUM

TOLERANCE = 1e-6  # what is left of a disagreement when it counts as gone
EXACT = 1e-12  # what is left of it when only rounding errors are
STARTS = 16  # random starts at once, over which an error is averaged
BYTES_OF_A_PARAMETER = 4  # float32

DENSE_NODES = 1000  # up to here all eigenvalues of a symmetric matrix at once: 0.2 s
DENSE_PRODUCT_NODES = 300  # up to here products of matrices as they are: 20 ms for the norm of one
LONGEST_PRODUCT = 10_000  # rounds that are applied one by one, above so many nodes
FOREVER = 2**40  # periods: 40 products; rounding errors grow to 1e-4 in size, which is scaled away, not in proportion
PERIODS_TO_LIMIT = 200  # until what each node counts has settled: a period of any schedule leaves less than half
NORM_TOLERANCE = 1e-4  # of a singular vector, and its square of the norm
LANCZOS_VECTORS, LANCZOS_RESTARTS = 40, 50  # 2000 products at most: 0.5 s for 10,000 nodes
SHIFT = 1e-5  # beside the spectrum: the closer the faster, the further the more digits of the result are right
DRAWN_ROUNDS, DRAWN_NODES = 200, 200_000  # from which a factor is estimated: 200 rounds of up to 1000 nodes

BOUNDING_SEARCHES = 64  # breadth first searches that bound the diameter: they settle trees, paths and grids
SOURCES = 256  # of a breadth first search at once: 4 words of 64 bits a node
LONG_WAY = 500  # links; above, single searches are faster than many at once
FLOW_WORK = 50_000_000  # (arcs + 1000) over all maximum flows: 5 s

ALIKE = VERTEX_TRANSITIVE | {"one-peer-exponential", "one-peer-hypercube"}  # all rounds together look so too
HALVES = ("metropolis", "samples", "inverse", "sqrt", "uniform-neighbours")  # 1/2 and 1/2 between two of one mass

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


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
        "directed": bool,
        "degree": Degrees,
        "connected": bool,
        "diameter": int | None,  # None: not connected
        "node_connectivity": int | None,  # None: it would take too long
        "edge_connectivity": int | None,  # None: it would take too long
        "messages": float,
        "parameters": int | None,
        "bytes": float | None,  # None: parameters are not given
        "weights": str,
        "lambda2": float,
        "lambda_min": float | None,  # None: W is not similar to a symmetric matrix, or there is more than one W
        "spectral_gap": float,
        "typical_contraction": float | None,  # None: a round does not keep the mean, or it is push-sum
        "rounds_to_1e-6": int | None,  # None: never
        "exact_after": int | None,  # rounds; None: never exactly
        "period": int | None,  # None: drawn anew for every round
        "warnings": list[str],
    },
)


def implied(
    topology: Topology, weights_name: str, masses: Mapping[str, float], parameters: int | None = None
) -> Implied:
    """What `p2pfl topology --json` prints. BadInput where such weights cannot hold on this graph.

    Of a graph that changes from round to round, `edges`, `connected`, `diameter` and the connectivities are those of
    all rounds together, and of the complete graph where it is drawn anew. `degree` is to how many nodes one sends in a
    round, over all nodes and rounds. `connected` is strongly connected where edges have a direction.
    `node_connectivity` and `edge_connectivity` are the numbers of deaths and of broken links that can cut the graph.
    `messages` are the vectors sent in a round over the whole network, on average over a period; `bytes` is their size
    with so many float32 `parameters`.

    Every round shrinks the distance to the mean by `lambda2`, in the long run and at worst. `rounds_to_1e-6` are those
    until a millionth of it is left, at worst. The mean is that by mass, in the norm that a node enters by its mass:
    J = 1 m^T / sum m, S = M^1/2 W M^-1/2, M = diag(m); or what W^t tends to, if that is not J.

    - A graph that stays as it is: lambda2 is the second largest |eigenvalue| of W (with push-sum of A), and 1 where it
      is not connected. If S is symmetric, lambda2^t is the norm of W^t - J, and the rounds follow. Otherwise they are
      the least t with ||W^t - J||_2 <= 1e-6, or above DENSE_PRODUCT_NODES nodes with lambda2^t <= 1e-6.
    - A periodic one: lambda2 = ||P - J||_2^(1 / period), P being the product of all its matrices, and 0 if P = J. The
      rounds are the least t for which the product of the first t matrices is that close to J.
    - One that is drawn anew: lambda2 = sqrt(f), f being E ||X - mean||² after a round over before, for which the
      docstring of its schedule has a formula; with other weights it is estimated, and `warnings` say so. The rounds are
      the least t with f^t <= 1e-12.

    `exact_after` are the rounds, at most four periods, of which the last one leaves only rounding errors. `lambda_min`
    is the smallest eigenvalue. `typical_contraction` is the root mean square factor by which one round shrinks a
    disagreement that points in no particular direction: sqrt((||S||_F² - 1) / (n - 1)), over a period the geometric
    mean, and sqrt(f). A single node agrees with itself after 0 rounds.
    """
    n, period, directed = len(topology.names), topology.period, topology.directed
    mass = np.array([masses[name] for name in topology.names])
    rounds = [_adjacency(topology.at(round)) for round in range(period or 1)]
    degrees = np.concatenate([np.diff(graph.indptr) for graph in rounds])
    sent = sum(graph.nnz for graph in rounds)
    messages = sent / len(rounds) if sent % len(rounds) else sent // len(rounds)
    shape = _shape_of_all_pairs(n, directed) if period is None else _shape(rounds, directed, topology.name in ALIKE)
    connected = shape.parts == 1
    agreement = _agreement(topology, weights_name, _matrices(topology, weights_name, masses), mass, connected)
    return {
        "name": topology.name,
        "nodes": n,
        "edges": shape.edges,
        "directed": directed,
        "degree": {"min": int(degrees.min()), "mean": float(degrees.mean()), "max": int(degrees.max())},
        "connected": connected,
        "diameter": shape.diameter,
        "node_connectivity": shape.node_connectivity,
        "edge_connectivity": shape.edge_connectivity,
        "messages": messages,
        "parameters": parameters,
        "bytes": None if parameters is None else messages * BYTES_OF_A_PARAMETER * parameters,
        "weights": weights_name,
        "lambda2": agreement.lambda2,
        "lambda_min": agreement.lambda_min,
        "spectral_gap": 1.0 - agreement.lambda2,
        "typical_contraction": agreement.typical,
        "rounds_to_1e-6": agreement.rounds,
        "exact_after": agreement.exact_after,
        "period": period,
        "warnings": _warnings(topology, weights_name, mass, shape.parts, agreement),
    }


def _warnings(topology: Topology, weights: str, mass: Floats, parts: int, agreement: Agreement) -> list[str]:
    """What the numbers do not say."""
    found = []
    if parts > 1:
        strongly = "strongly connected " if topology.directed else ""
        found.append(f"the graph is not connected: its {parts} {strongly}parts never agree")
    if topology.period is None and topology.directed and weights not in PUSH_SUM:
        found.append('the mean is kept only in expectation: weights = "push-sum" keeps it exactly')
    elif not agreement.keeps_mean and parts == 1:
        as_degrees = weights == "uniform-neighbours" and not topology.varies and not topology.directed
        counts = "counts a node as its degree + 1" if as_degrees else "does not count all nodes alike"
        counted = np.ones(1) if agreement.limit is None else agreement.limit / mass
        extent = f"the best connected counts {counted.max() / counted.min():.3g} times as much as the least"
        found.append(f"the limit {counts}" + (f": {extent}" if agreement.limit is not None else ""))
    if topology.varies and agreement.exact_after:
        found.append(f"exact after {agreement.exact_after} rounds only while no message is lost")
    if agreement.least_self_weight < -BALANCE:
        found.append(
            f"a node gives its own vector the weight {agreement.least_self_weight:.3g}: "
            "robust rules do not go with negative weights"
        )
    if agreement.drawn_rounds:
        found.append(f"lambda2 and the rounds are estimated from {agreement.drawn_rounds} drawn rounds")
    return found


# -- What is left after some rounds ----------------------------------------------------------------------------------


def errors(topology: Topology, weights: str, masses: Mapping[str, float], rounds: int) -> Floats:
    """What is left of a random start after 0, 1, …, `rounds` rounds: float64 (rounds + 1,), from 1 on.

    The root mean square distance to the mean, both by mass, over STARTS starts of independent standard normal values,
    the same at every call; with push-sum, of the ratios. 0 throughout for a single node. BadInput where such weights
    cannot hold on this graph.
    """
    mass = np.array([masses[name] for name in topology.names])
    return _errors(_matrices(topology, weights, masses), weights in PUSH_SUM, mass, rounds)


def _errors(matrix: Callable[[int], sparse.csr_array], pushes: bool, mass: Floats, rounds: int) -> Floats:
    values, held = _start(mass), mass
    squares = [_squares(values, mass).sum()]
    for round in range(rounds):
        values, held = _mixed(matrix(round), pushes, values, held)
        squares.append(_squares(values, mass).sum())
    return np.sqrt(np.array(squares) / (squares[0] or 1.0))


def _matrices(topology: Topology, weights: str, masses: Mapping[str, float]) -> Callable[[int], sparse.csr_array]:
    """round → its mixing matrix."""

    @lru_cache(maxsize=ROUNDS_KEPT)
    def matrix(round: int) -> sparse.csr_array:
        return mixing_matrix(topology.at(round), weights, masses)

    return lambda round: matrix(round % topology.period if topology.period else round)


def _start(mass: Floats, number: int = 0) -> Floats:
    """Standard normal values (n, STARTS), moved so that their mean by mass is 0."""
    return _centred(stream(0, "start of averaging", number).standard_normal((len(mass), STARTS)), mass)


def _centred(values: Floats, mass: Floats) -> Floats:
    return np.asarray(values - mass @ values / mass.sum())


def _squares(values: Floats, mass: Floats) -> Floats:
    """The sum of the squares of each column, by mass."""
    return np.asarray(mass @ values**2)


def _mixed(matrix: sparse.csr_array, pushes: bool, values: Floats, held: Floats) -> tuple[Floats, Floats]:
    """Values and masses after a round. Only push-sum moves masses."""
    if not pushes:
        return matrix @ values, held
    after = matrix @ held
    return (matrix @ (held[:, None] * values)) / after[:, None], after


# -- How fast they agree ---------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    lambda2: float
    rounds: int | None
    exact_after: int | None
    lambda_min: float | None = None
    typical: float | None = None
    keeps_mean: bool = True
    limit: Floats | None = None  # how much each node counts in the end, where the mean is not kept; None: not known
    least_self_weight: float = 1.0
    drawn_rounds: int = 0  # from which lambda2 is estimated


def _agreement(
    topology: Topology, weights: str, matrix: Callable[[int], sparse.csr_array], mass: Floats, connected: bool
) -> Agreement:
    if len(mass) == 1:
        return Agreement(0.0, rounds=0, exact_after=0, lambda_min=1.0, typical=0.0)
    if topology.period is None:
        return _agreement_of_drawn(topology, weights, matrix, mass)
    pushes, steps = weights in PUSH_SUM, [matrix(round) for round in range(topology.period)]
    keeps_mean = pushes or all(np.allclose(step.T @ mass, mass, rtol=BALANCE, atol=0.0) for step in steps)
    left = _errors(matrix, pushes, mass, 4 * topology.period)
    exact_after = next((t for t in range(1, len(left)) if left[t - 1] > TOLERANCE and left[t] <= EXACT), None)
    balance = _balance(steps[0], pushes, mass) if topology.period == 1 else None
    limit = None
    if balance is not None:
        found, limit = _agreement_of_symmetric(_scaled(steps[0], balance, pushes), balance, connected), balance
    elif not connected:
        found = Agreement(1.0, rounds=None, exact_after=None)
    elif keeps_mean and not pushes:
        root = np.sqrt(mass / mass.sum())
        found = _agreement_by_products([_scaled(step, mass) for step in steps], root, root, exact_after)
    elif topology.period > 1 or len(mass) <= DENSE_PRODUCT_NODES:
        ones, limit = np.ones(len(mass)), _limit(steps, pushes)
        right, left = (limit, ones) if pushes else (ones, limit)
        found = _agreement_by_products(steps, right, left, exact_after)
    else:
        lambda2 = _second_of_large(steps[0])
        found = Agreement(lambda2, _rounds(lambda2), exact_after)
    return found._replace(
        typical=_typical([_scaled(step, mass) for step in steps]) if keeps_mean and not pushes else None,
        keeps_mean=keeps_mean,
        limit=limit,
        least_self_weight=min(float(step.diagonal().min()) for step in steps),
    )


def _scaled(matrix: sparse.csr_array, target: Floats, pushes: bool = False) -> sparse.csr_array:
    """D^1/2 W D^-1/2, D = diag(target); of push-sum, whose columns sum to 1, W is the transpose."""
    root = sparse.diags_array(np.sqrt(target))
    return (root @ (matrix.T if pushes else matrix) @ sparse.diags_array(1.0 / root.diagonal())).tocsr()


def _balance(matrix: sparse.csr_array, pushes: bool, mass: Floats) -> Floats | None:
    """pi with sum 1 and pi_i w_ij = pi_j w_ji, so that D^1/2 W D^-1/2 is symmetric, D = diag(pi); or None.

    It is the mass where m_i w_ij = m_j w_ji. On an undirected graph it is S_i = 1 / w_ii with `uniform-neighbours`, and
    with the portions of push-sum, transposed.
    """
    own = matrix.diagonal()
    for target in (mass, 1.0 / np.where(own > 0.0, own, 1.0)):
        scaled = _scaled(matrix, target, pushes)
        if abs(scaled - scaled.T).max() <= EXACT:
            return np.asarray(target / target.sum())
    return None


def _rounds(lambda2: float, tolerance: float = TOLERANCE) -> int | None:
    """The least t >= 1 with lambda2^t <= tolerance."""
    if lambda2 >= 1.0 - EXACT:
        return None
    return max(1, math.ceil(math.log(tolerance) / math.log(lambda2))) if lambda2 > 0.0 else 1


def _typical(scaled: Sequence[sparse.csr_array]) -> float:
    n = scaled[0].shape[0]
    factors = [((step.data**2).sum() - 1.0) / (n - 1) for step in scaled]
    return math.prod(math.sqrt(factor) if factor > EXACT else 0.0 for factor in factors) ** (1 / len(factors))


# A graph that stays as it is, with real eigenvalues


def _agreement_of_symmetric(matrix: sparse.csr_array, balance: Floats, connected: bool) -> Agreement:
    """`matrix` is symmetric, and the root of `balance` its unit eigenvector for the eigenvalue 1."""
    if len(balance) <= DENSE_NODES:
        eigenvalues = np.linalg.eigvalsh(matrix.toarray())
        second, least = float(eigenvalues[-2]), float(eigenvalues[0])
    else:
        second, least = _ends_of_large(matrix, np.sqrt(balance))
    if not connected:
        return Agreement(1.0, rounds=None, exact_after=None, lambda_min=least)
    lambda2 = max(second, -least)
    if lambda2 <= EXACT:
        return Agreement(0.0, rounds=1, exact_after=1, lambda_min=0.0)
    return Agreement(lambda2, _rounds(lambda2), exact_after=None, lambda_min=least)


def _ends_of_large(matrix: sparse.csr_array, root: Floats) -> tuple[float, float]:
    """The second largest and the smallest eigenvalue.

    Lanczos finds them where they stand apart from the others, on expanders. Where they crowd (a ring of 2000: 3e-6
    below 1), only shift and invert tells them apart. It factorises the matrix, which on expanders would fill up, but
    stays thin on the graphs that mix slowly: rings, grids, trees. Both shifts lie outside of the spectrum.
    """
    # Imported here since only graphs of thousands of nodes need it, and it takes a tenth of a second.
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # type: ignore[import-untyped]

    start = _start(np.ones(len(root)))[:, 0]
    own = matrix.diagonal()
    lowest = float((own - (abs(matrix).sum(axis=1) - abs(own))).min())  # Gershgorin

    def end(operator: LinearOperator, which: str, shift: float, count: int) -> float:
        try:
            found = eigsh(operator, 1, which=which, v0=start, ncv=LANCZOS_VECTORS, maxiter=LANCZOS_RESTARTS, tol=EXACT)
        except ArpackNoConvergence:
            found = eigsh(matrix.tocsc(), count, sigma=shift, v0=start)
        return float(found[0].min())

    without_mean = LinearOperator(matrix.shape, lambda x: matrix @ x - root * (root @ x), dtype=np.float64)
    return end(without_mean, "LA", 1.0 + SHIFT, count=2), end(matrix, "SA", lowest - SHIFT, count=1)


# A product of matrices


def _agreement_by_products(
    steps: Sequence[sparse.csr_array], right: Floats, left: Floats, exact_after: int | None
) -> Agreement:
    """Of a connected graph. Products P of many steps tend to `right left^T`, where left^T right = 1."""
    period, n = len(steps), len(right)
    distance = _distance(steps, right, left)
    if exact_after is not None and (period == 1 or exact_after <= period):
        lambda2 = 0.0
    elif period > 1:
        lambda2 = distance(period) ** (1 / period)
    elif n <= DENSE_PRODUCT_NODES:
        lambda2 = float(np.sort(abs(np.linalg.eigvals(steps[0].toarray())))[-2])
    else:
        lambda2 = _second_of_large(steps[0])
    rounds = _rounds(lambda2)
    if rounds is not None and (n <= DENSE_PRODUCT_NODES or (period > 1 and rounds <= LONGEST_PRODUCT)):
        rounds = _first(distance, exact_after)
    return Agreement(lambda2, rounds, exact_after)


def _first(distance: Callable[[int], float], exact_after: int | None) -> int:
    """The least t with distance(t) <= TOLERANCE, for a distance that falls."""
    most = exact_after or 1
    while exact_after is None and distance(most) > TOLERANCE:
        most *= 2
    least = 1 if exact_after else most // 2 + 1
    return least + bisect_left(range(least, most), True, key=lambda t: distance(t) <= TOLERANCE)


def _distance(steps: Sequence[sparse.csr_array], right: Floats, left: Floats) -> Callable[[int], float]:
    """t → ||(product of the first t matrices) - what it tends to||_2."""
    period, n = len(steps), len(right)
    if n <= DENSE_PRODUCT_NODES:
        products = [np.eye(n) - np.outer(right, left)]
        for step in steps:
            products.append(step @ products[-1])

        def distance(t: int) -> float:
            periods, rest = divmod(t, period)
            return float(np.linalg.norm(products[rest] @ np.linalg.matrix_power(products[period], periods), 2))

        return distance

    from scipy.sparse.linalg import LinearOperator, eigsh  # as above

    back = [step.T.tocsr() for step in steps]

    def distance_of_large(t: int) -> float:
        def there_and_back(x: Floats) -> Floats:
            x = x - right * (left @ x)
            for round in range(t):
                x = steps[round % period] @ x
            for round in reversed(range(t)):
                x = back[round % period] @ x
            return np.asarray(x - left * (right @ x))

        squared = LinearOperator((n, n), there_and_back, dtype=np.float64)
        found = eigsh(squared, 1, v0=_start(np.ones(n))[:, 0], tol=NORM_TOLERANCE, return_eigenvectors=False)
        return math.sqrt(max(0.0, float(found[0])))

    return distance_of_large


def _limit(steps: Sequence[sparse.csr_array], pushes: bool) -> Floats:
    """The fixed vector of a whole period, with sum 1: of rows that sum to 1 on the left, of columns on the right.

    With rows that sum to 1 it is how much each node counts in what all agree on.
    """
    n = steps[0].shape[0]
    around = steps if pushes else [step.T.tocsr() for step in reversed(steps)]
    if n <= DENSE_PRODUCT_NODES:
        whole = reduce(lambda product, step: step @ product, around, np.eye(n))
        counts = np.linalg.matrix_power(whole, FOREVER)[:, 0]
    else:
        counts = np.full(n, 1.0 / n)
        for _ in range(PERIODS_TO_LIMIT):
            counts = reduce(lambda vector, step: step @ vector, around, counts)
    return np.asarray(counts / counts.sum())


def _second_of_large(matrix: sparse.csr_array) -> float:
    """The second largest |eigenvalue| of a matrix that is not similar to a symmetric one.

    Where it is close to 1, so is the eigenvalue: own weights are positive, and all |lambda - w_ii| <= 1 - w_ii.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, eigs  # as above

    start = stream(0, "start of averaging").standard_normal(matrix.shape[0])
    try:
        found = eigs(matrix, 2, v0=start, ncv=LANCZOS_VECTORS, maxiter=LANCZOS_RESTARTS, return_eigenvectors=False)
    except ArpackNoConvergence:
        found = eigs(matrix.tocsc(), 4, sigma=1.0 + SHIFT, v0=start, return_eigenvectors=False)
    others = np.delete(found, np.argmin(abs(found - 1.0)))
    return float(abs(others).max())


# A graph that is drawn anew


def _agreement_of_drawn(
    topology: Topology, weights: str, matrix: Callable[[int], sparse.csr_array], mass: Floats
) -> Agreement:
    n, alike, drawn = len(mass), bool(np.ptp(mass) == 0.0), 0
    if topology.name == "random-matching" and alike and weights in HALVES:
        factor = (n - 2) / (2 * (n - 1)) if n % 2 == 0 else 0.5  # two nodes meet with probability 1/(n - 1), or 1/n
    elif topology.name == "epidemic" and alike and weights == "uniform-neighbours":
        s = max(degree for _, degree in topology.at(0).out_degree)
        factor = (1.0 - (1.0 - s / (n - 1)) ** n) / s - 1.0 / (n - 1)
    else:
        drawn = max(1, min(DRAWN_ROUNDS, DRAWN_NODES // n))
        factor = _factor_of_drawn(matrix, weights in PUSH_SUM, mass, drawn)
    exact = factor <= EXACT**2
    return Agreement(
        lambda2=0.0 if exact else math.sqrt(factor),
        rounds=1 if exact else _rounds(factor, TOLERANCE**2),
        exact_after=1 if exact else None,
        typical=None if weights in PUSH_SUM else 0.0 if exact else math.sqrt(factor),
        keeps_mean=not topology.directed or weights in PUSH_SUM,
        drawn_rounds=drawn,
    )


def _factor_of_drawn(matrix: Callable[[int], sparse.csr_array], pushes: bool, mass: Floats, rounds: int) -> float:
    """E ||X - mean||² after a round over before, on average over rounds and starts. One that agrees starts again."""
    values, held, factors = _start(mass), mass, []
    for round in range(rounds):
        before = _squares(values, mass)
        values, held = _mixed(matrix(round), pushes, values, held)
        factors.append(_squares(values, mass) / before)
        values = _centred(values, held)
        left = _squares(values, mass)
        values = values / np.sqrt(left) if left.min() > EXACT**2 * before.max() else _start(mass, round + 1)
    return float(np.mean(factors))


# -- What holds together ---------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    edges: int
    parts: int  # strongly connected, where edges have a direction
    diameter: int | None
    node_connectivity: int | None
    edge_connectivity: int | None


def _shape_of_all_pairs(n: int, directed: bool) -> Shape:
    return Shape(n * (n - 1) // (1 if directed else 2), 1, min(1, n - 1), n - 1, n - 1)


def _shape(rounds: Sequence[sparse.csr_array], directed: bool, alike: bool) -> Shape:
    """Of all rounds together. `alike`: it looks the same from every node."""
    union = _adjacency_of(sum(rounds[1:], start=rounds[0]))
    edges = union.nnz // (1 if directed else 2)
    parts = int(csgraph.connected_components(union, connection="strong")[0])
    if parts > 1:
        return Shape(edges, parts, None, 0, 0)
    nodes = _node_connectivity(union, directed, alike)
    return Shape(
        edges, parts, _diameter(union, directed, alike), nodes, _edge_connectivity(union, directed, alike, nodes)
    )


def _adjacency(graph: nx.Graph) -> sparse.csr_array:
    """int32 (n, n), 1 where the row's vector goes to the column: both ways along an edge without direction."""
    return nx.to_scipy_sparse_array(graph, dtype=np.int32, weight=None, format="csr")


def _adjacency_of(counts: sparse.csr_array) -> sparse.csr_array:
    """The same for a matrix of counts, with the 32-bit indices that maximum flows ask for."""
    indices, starts = counts.indices.astype(np.int32), counts.indptr.astype(np.int32)
    return sparse.csr_array((np.ones(counts.nnz, np.int32), indices, starts), shape=counts.shape)


def _diameter(union: sparse.csr_array, directed: bool, alike: bool) -> int:
    """The longest shortest path, in links, of a connected graph.

    Without directions, the node farthest from v is max(d(v, w), far(w) - d(v, w)) to far(w) + d(v, w) links away, as is
    known after a search from w. Searches start where these bounds are loosest (Takes, Kosters 2011, "Determining
    the diameter of small world networks"), until they settle it, or too many would be needed.
    """
    n = int(union.shape[0])
    if alike:
        return int(_hops(union, 0).max())
    if n > 2 and not directed and bool((np.diff(union.indptr) == 2).all()):
        return n // 2  # a ring
    found, searches = 0, 0
    least, most = np.zeros(n, np.int64), np.full(n, n - 1)
    while searches < (1 if directed else BOUNDING_SEARCHES) or found > LONG_WAY:
        unsettled = np.flatnonzero(most > found)
        if len(unsettled) == 0:
            return found
        node = int(unsettled[np.argmax(most[unsettled]) if searches % 2 else np.argmin(least[unsettled])])
        hops = _hops(union, node)
        far = int(hops.max())
        if not directed:
            least, most = np.maximum(least, np.maximum(hops, far - hops)), np.minimum(most, far + hops)
        least[node] = most[node] = far
        found, searches = max(found, far), searches + 1
    return max(found, _farthest(union, _without_twins(union, np.flatnonzero(most > found))))


def _without_twins(union: sparse.csr_array, nodes: Integers) -> Integers:
    """One for all of these nodes that send to each other and otherwise to the same: all is as far from one as another.

    What a node sends to, itself included, is told apart by the sum of 64-bit random numbers.
    """
    number = stream(0, "twins").integers(2**64, size=union.shape[0], dtype=np.uint64)
    sums = union.astype(np.uint64) @ number + number
    return nodes[np.unique(sums[nodes], return_index=True)[1]]


def _hops(union: sparse.csr_array, node: int) -> Integers:
    return np.asarray(csgraph.shortest_path(union, method="D", unweighted=True, indices=node), dtype=np.int64)


def _farthest(union: sparse.csr_array, sources: Integers) -> int:
    """The longest of the shortest paths from these nodes, in a connected graph: many searches at once, a bit each."""
    heard = union.T.tocsr()
    farthest = 0
    for start in range(0, len(sources), SOURCES):
        block = sources[start : start + SOURCES]
        bit = np.arange(len(block), dtype=np.uint64)
        reached = np.zeros((union.shape[0], -(-len(block) // 64)), np.uint64)
        reached[block, bit // 64] = np.uint64(1) << bit % 64
        everything, links = np.bitwise_or.reduce(reached), 0
        while not (reached == everything).all():
            reached |= np.bitwise_or.reduceat(reached[heard.indices], heard.indptr[:-1])
            links += 1
        farthest = max(farthest, links)
    return farthest


def _node_connectivity(union: sparse.csr_array, directed: bool, alike: bool) -> int | None:
    """How many nodes must go until those left, of a connected graph, do not all reach each other, or only one is left.

    Two nodes that are not joined are cut by as few nodes as there are disjoint paths between them (Menger). Any node v
    is either not among the fewest that cut, and then cut off from some other node; or it is, and then they cut a node
    that sends to v from one that v sends to, as v could stay otherwise (Esfahanian, Hakimi 1984). Where all nodes are
    alike, v may be any, also one that is not cut and sends to what is cut off; and without directions no fewer than
    2 (degree + 1) / 3 nodes cut (Watkins 1970), which is more than degree - 1 up to degree 4.
    """
    n, least = union.shape[0], _least_degree(union)
    if union.nnz == n * (n - 1) or least == 1 or (alike and not directed and least <= 4):
        return least
    if not directed:
        if not nx.is_biconnected(nx.from_scipy_sparse_array(union)):
            return 1
        if least == 2:
            return 2
    back = union.T.tocsr()
    v = int(np.argmin(np.diff(union.indptr) + np.diff(back.indptr)))
    told, heard = set(_row(union, v)), set(_row(back, v))
    pairs = [(v, t) for t in range(n) if t not in {v} | told]
    if directed and not alike:
        pairs += [(s, v) for s in range(n) if s not in {v} | heard]
    if not alike:
        across = product(heard, told) if directed else combinations(told, 2)
        joined = {s: set(_row(union, s)) for s in heard | told}
        pairs += [(s, t) for s, t in across if s != t and t not in joined[s]]
    # Each node becomes two: arcs lead into i, from there one to n + i, and out of n + i. A path through i takes it up.
    arcs, nodes = union.tocoo(), np.arange(n)
    ends = np.append(nodes, n + arcs.row), np.append(n + nodes, arcs.col)
    network = _adjacency_of(sparse.csr_array((np.ones(len(ends[0])), ends), shape=(2 * n, 2 * n)))
    return _least_flow(network, [(n + s, t) for s, t in pairs], least)


def _edge_connectivity(union: sparse.csr_array, directed: bool, alike: bool, nodes: int | None) -> int | None:
    """How many links must break until a connected graph falls apart: not fewer than nodes (Whitney 1932), not more than
    the least degree, and exactly that where all nodes are alike (Mader 1971).

    Somewhere on the way round all nodes, one that is cut off from others is followed by one of those.
    """
    n, least = union.shape[0], _least_degree(union)
    if alike or nodes == least:
        return least
    if not directed and nx.has_bridges(nx.from_scipy_sparse_array(union)):
        return 1
    return _least_flow(union, [(s, (s + 1) % n) for s in range(n)], least)


def _least_degree(union: sparse.csr_array) -> int:
    """The fewest that a node sends to, or hears from."""
    return int(min(np.diff(union.indptr).min(), np.bincount(union.indices, minlength=union.shape[0]).min()))


def _least_flow(network: sparse.csr_array, pairs: Sequence[tuple[int, int]], most: int) -> int | None:
    """The least of `most` and the maximum flows between these pairs; None if they would take longer than FLOW_WORK."""
    if len(pairs) * (network.nnz + 1000) > FLOW_WORK:
        return None
    return min([most, *(int(csgraph.maximum_flow(network, s, t).flow_value) for s, t in pairs)])


def _row(matrix: sparse.csr_array, i: int) -> list[int]:
    """The columns of the entries in row i."""
    return [int(j) for j in matrix.indices[matrix.indptr[i] : matrix.indptr[i + 1]]]
