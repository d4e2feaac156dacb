"""The symmetric weights that mix fastest on an undirected graph (Xiao & Boyd 2004; Boyd, Diaconis & Xiao 2004).

With J = ones / n, one weight w_e an edge, and a_e = e_i - e_j of the edge e = (i, j):

    minimise    ||W - J||, its largest |eigenvalue|, where W = I - sum_e w_e a_e a_e^T
    subject to  w_e >= 0 and W_ii >= 0

It is a semidefinite program, solved here by a primal-dual interior point method (the direction of Helmberg, Rendl,
Vanderbei & Wolkowicz 1996; predictor and corrector of Mehrotra 1992) on numpy and scipy. A general solver sees dense
cones of n^2 / 2 numbers where there is one number an edge: for 100 nodes and 200 edges scs takes 40 s or more, to five
or six digits, and clarabel 90 s. Here it is 0.1 s to seven, since a_e a_e^T has rank one: the Newton matrix is a sum
of elementwise products of m x m matrices.

`lower_bound` proves every result: no allowed weights reach a norm that is smaller by more than TOLERANCE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse  # type: ignore[import-untyped]

from p2pfl.messages import BadInput

Array = npt.NDArray[np.float64]
Ends = npt.NDArray[np.intp]  # (2, m): the two ends of every edge

TOLERANCE = 1e-7  # of the norm, which is below 1; float64 is good for about one digit more
STEPS = 40  # of 1500 random graphs none took more than 22
MAX_NODES, MAX_EDGES = 500, 2000  # a step costs their cubes: 10 s in all, 2 s for 300 nodes of degree 4
MARGIN = 0.9  # of the way to the boundary: further than this no step goes
SHORTEST_STRIDE = 1e-3  # a shorter one gets nowhere


def is_small_enough(graph: nx.Graph) -> bool:
    """Whether `fastest_weights` takes seconds and not hours."""
    return _is_complete(graph) or (len(graph) <= MAX_NODES and graph.number_of_edges() <= MAX_EDGES)


def fastest_weights(graph: nx.Graph) -> Array:
    """The weight of every edge, float64 (m,), in the order of `graph.edges`; no weight or self weight is negative.

    `graph` is undirected, connected and small enough. The same graph gives the same weights at every call. BadInput
    where rounding errors keep the norm from TOLERANCE (no such graph is known).
    """
    n, m = len(graph), graph.number_of_edges()
    if _is_complete(graph):
        return np.full(m, 1.0 / n)  # W = J
    index = {name: i for i, name in enumerate(graph)}
    weights = _solve(np.array([(index[a], index[b]) for a, b in graph.edges]).T, n)
    if weights is None:
        raise BadInput(
            f'topology: weights = "fastest" of this graph cannot be found to {TOLERANCE:g}: '
            'use weights = "best-constant"'
        )
    return weights


def _is_complete(graph: nx.Graph) -> bool:
    return bool(graph.number_of_edges() == len(graph) * (len(graph) - 1) // 2)


def lower_bound(witness: Array, prices: Array, ends: Ends) -> float:
    """What ||W - J|| is at least, whatever the weights. Any symmetric `witness` D (n, n) and `prices` p >= 0 (n,) do.

    Weak duality: if a_e^T D a_e <= p_i + p_j on every edge, and |D|_1 is the sum of D's |eigenvalues|,

        |D|_1 ||W - J||  >=  <D, W - J>  =  <D, I - J> - sum_e w_e a_e^T D a_e  >=  <D, I - J> - sum_i p_i,

    since the weights around a node sum to at most 1. Prices that are too low for an edge are first raised everywhere.
    """
    i, j = ends
    lacking = max(0.0, float((_along(witness, ends) - prices[i] - prices[j]).max()))
    centred = np.trace(witness) - witness.sum() / len(prices)
    size = np.abs(np.linalg.eigvalsh(witness)).sum()
    return float((centred - (prices + lacking / 2).sum()) / size) if size else 0.0


# -- The interior point method ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """Where the method stands, or a move. With s the bound on the norm that is being lowered, and M = W - J:"""

    weights: Array  # (m,)
    matrices: Array  # (2, n, n): s I - M and s I + M, neither of which may get a negative eigenvalue
    slacks: Array  # (m + n,): the weights and the self weights, which may not become negative
    multipliers: Array  # (2, n, n): P and Q, the dual's variables for `matrices`, positive semidefinite like these
    prices: Array  # (m + n,): the dual's variables for `slacks`, not negative either

    def moved(self, move: _Point) -> _Point:
        """As far along `move` as everything stays inside: the dual's variables by another fraction than the others."""
        a = _stride(self.matrices, move.matrices, self.slacks, move.slacks)
        b = _stride(self.multipliers, move.multipliers, self.prices, move.prices)
        return _Point(
            self.weights + a * move.weights,
            self.matrices + a * move.matrices,
            self.slacks + a * move.slacks,
            self.multipliers + b * move.multipliers,
            self.prices + b * move.prices,
        )

    def gap(self) -> float:
        """Between s and what the dual proves, once the dual's equations hold."""
        return float((self.matrices * self.multipliers).sum() + self.slacks @ self.prices)


def _solve(ends: Ends, n: int) -> Array | None:
    """The weights; None if STEPS do not reach TOLERANCE.

    With P, Q = `multipliers`, the dual's equations (one an edge, and one for s) are

        a_e^T (P - Q) a_e + (slope^T prices)_e = 0    and    trace(P + Q) = 1.

    A step solves them together with the linearised aim that every matrix times its multiplier is `target` I and every
    slack times its price is `target`: first with 0, to see how far down that leads, then with what is within reach.
    """
    m, identity = ends.shape[1], np.eye(n)
    around = sparse.csr_array((np.ones(2 * m), (ends.ravel(), np.tile(np.arange(m), 2))), shape=(n, m))
    slope = sparse.vstack([sparse.eye_array(m), -around]).tocsr()  # how the slacks follow the weights
    at = _start(ends, n, slope)
    for _ in range(STEPS):
        norm = _norm(identity - 1.0 / n - _laplacian(at.weights, ends, n))
        if norm - lower_bound(at.multipliers[0] - at.multipliers[1], at.prices[m:], ends) <= TOLERANCE:
            return at.weights
        inverses = np.linalg.inv(at.matrices).astype(np.float64, copy=False)
        factors = linalg.lu_factor(_newton_matrix(at, inverses, slope, ends))  # rounding can make it indefinite

        predicted = _move(at, 0.0 * inverses, 0.0 * at.slacks, inverses, factors, slope, ends)
        target = at.gap() / (m + 3 * n) * (at.moved(predicted).gap() / at.gap()) ** 2
        matrix_aims = target * inverses - _symmetric(predicted.multipliers @ predicted.matrices @ inverses)
        aims = (target - predicted.prices * predicted.slacks) / at.slacks
        at = at.moved(_move(at, matrix_aims, aims, inverses, factors, slope, ends))
    return None


def _start(ends: Ends, n: int, slope: sparse.csr_array) -> _Point:
    """The Metropolis weights, which are well inside, and multipliers and prices that satisfy the dual's equations."""
    m, identity = ends.shape[1], np.eye(n)
    weights = 1.0 / (1.0 + np.bincount(ends.ravel())[ends].max(axis=0))
    disagreement = identity - 1.0 / n - _laplacian(weights, ends, n)
    return _Point(
        weights=weights,
        matrices=(_norm(disagreement) + 0.1) * identity + np.stack([-disagreement, disagreement]),
        slacks=np.r_[np.zeros(m), np.ones(n)] + slope @ weights,
        multipliers=np.stack([identity, identity]) / (2 * n),
        prices=np.r_[np.full(m, 2.0), np.ones(n)] / n,
    )


def _newton_matrix(at: _Point, inverses: Array, slope: sparse.csr_array, ends: Ends) -> Array:
    """How the dual's equations, (m + 1,), follow the weights and s; symmetric."""
    m = ends.shape[1]
    newton = np.empty((m + 1, m + 1))
    newton[:m, :m] = (slope.T @ sparse.diags_array(at.prices / at.slacks) @ slope).toarray()
    for multiplier, inverse in zip(at.multipliers, inverses, strict=True):
        newton[:m, :m] += _between(multiplier, ends) * _between(inverse, ends)
    products = at.multipliers @ inverses
    newton[m, :m] = newton[:m, m] = _along(products[0] - products[1], ends)
    newton[m, m] = np.trace(products, axis1=1, axis2=2).sum()
    return newton


def _move(
    at: _Point,
    matrix_aims: Array,
    aims: Array,
    inverses: Array,
    factors: tuple[Array, Array],
    slope: sparse.csr_array,
    ends: Ends,
) -> _Point:
    """Multipliers and prices to these aims, less what the change of matrices and slacks takes off them.

    The change is the one for which the dual's equations hold. Solved twice, the second time for what rounding left of
    them: without that, the proof stays two digits worse.
    """
    n, m = at.matrices.shape[-1], len(at.weights)

    def after(change: Array) -> _Point:
        laplacian = _laplacian(change[:m], ends, n)
        matrices = change[m] * np.eye(n) + np.stack([laplacian, -laplacian])
        slacks = slope @ change[:m]
        multipliers = matrix_aims - _symmetric(at.multipliers @ matrices @ inverses)
        return _Point(change[:m], matrices, slacks, multipliers, prices=aims - at.prices * slacks / at.slacks)

    change = np.zeros(m + 1)  # of the weights, and of s
    for _ in range(2):
        new = after(change)
        left_on_edges = _along(new.multipliers[0] - new.multipliers[1], ends) + slope.T @ new.prices
        left_of_trace = np.trace(new.multipliers, axis1=1, axis2=2).sum() - 1.0
        change += linalg.lu_solve(factors, np.r_[left_on_edges, left_of_trace])
    new = after(change)
    return replace(new, multipliers=new.multipliers - at.multipliers, prices=new.prices - at.prices)


def _stride(matrices: Array, matrix_moves: Array, numbers: Array, moves: Array) -> float:
    """The largest power of MARGIN, at most 1, after which there is still room for the same move 1 / MARGIN as long."""
    stride = 1.0
    while stride > SHORTEST_STRIDE:
        further = stride / MARGIN
        if (numbers + further * moves > 0).all() and _positive_definite(matrices + further * matrix_moves):
            return stride
        stride *= MARGIN
    return 0.0


def _positive_definite(matrices: Array) -> bool:
    try:
        np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        return False
    return True


# -- Matrices and edges: a_e = e_i - e_j -----------------------------------------------------------------------------


def _laplacian(weights: Array, ends: Ends, n: int) -> Array:
    """sum_e w_e a_e a_e^T."""
    i, j = ends
    laplacian = np.zeros((n, n))
    laplacian[i, j] = laplacian[j, i] = -weights
    np.fill_diagonal(laplacian, -laplacian.sum(axis=0))
    return laplacian


def _between(matrix: Array, ends: Ends) -> Array:
    """a_e^T X a_f of all pairs of edges, (m, m)."""
    i, j = ends
    rows = matrix[i] - matrix[j]
    between: Array = rows[:, i] - rows[:, j]
    return between


def _along(matrix: Array, ends: Ends) -> Array:
    """a_e^T X a_e of every edge, (m,)."""
    i, j = ends
    along: Array = matrix[i, i] - matrix[i, j] - matrix[j, i] + matrix[j, j]
    return along


def _norm(matrix: Array) -> float:
    return float(np.abs(np.linalg.eigvalsh(matrix)).max())


def _symmetric(matrices: Array) -> Array:
    symmetric: Array = (matrices + matrices.swapaxes(-1, -2)) / 2
    return symmetric
