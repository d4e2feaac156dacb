"""How much of what a node releases one other, curious node gets to know, by their distance in the graph.

Every node adds noise to its vector once, of standard deviation σ over the norm to which that was clipped, and then the
graph mixes for T rounds, X <- W X: Muffliato (Cyffers, Even, Bellet and Massoulié, Muffliato: Peer-to-Peer Privacy
Amplification, 2022). The mean ends with the variance σ²/n. A curious node v keeps what it is sent: in the rounds
t = 0 … T - 1

    each neighbour's vector           the rows e_w W^t of the noised vectors, w in N(v)
    or, with masks, only their sum    the row (e_v W - W_vv e_v) W^t

It knows its own vector and noise, e_v, and counts here as knowing the mean of all as well, at which everybody arrives.
All of this is linear in vectors with the same white noise. So v knows of them just what P leaves, the orthogonal
projector onto the span of these rows, and its view differs by whether u took part as a Gaussian mechanism does:

    share of u = P_uu        Rényi divergence of order α = α P_uu / (2 σ²)

exactly, in every order. The share is 1 for what u has released itself (what local privacy costs against anybody), and
1 / (n - 1) for the mean of n nodes alone (as if a trusted server had given it out). Bellet et al., Unified Privacy
Guarantees for Decentralized Learning via Matrix Factorization, 2025, account like this, for more mechanisms.

It is not what the paper of 2022 gives, the sum over all messages of α (W^t)_wu² / (2 σ² ||(W^t)_w||²). That takes each
message for noised on its own, but they carry the same noise, which cancels between them: in a ring, what a neighbour
sends after one round is a third of v's vector, of its own, and of the next one's, so that v has this as it was
released. Reconstruction from such views is practical (El Mrini, Cyffers and Bellet, Privacy Attacks in Decentralized
Learning, 2024). What amplifies are sums: of many in the middle of a star, or of the neighbours behind masks.

It holds for one curious node; several that put together what they saw know more. It holds while all vectors arrive: a
sum without one of them is another row. It holds for one training; of more it is a multiple as far as the nodes agree
before each next, for what is left then travels on beside the next noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import networkx as nx
import numpy as np
import numpy.typing as npt

from p2pfl.composition import LEAST_SENDERS, SUM_KEEPING
from p2pfl.messages import BadInput
from p2pfl.topology import Topology
from p2pfl.topology.graphs import VERTEX_TRANSITIVE
from p2pfl.topology.matrix import mixing_matrix

MAX_NODES = 300  # a projector for each node: seconds
MAX_ALIKE = 1000  # one for all of them, from a dense matrix
NEW = 1e-9  # of a row, what the others before do not say: less is rounding
# Of Rényi divergence: those of Opacus, and larger ones for what is hardly seen at all.
ORDERS = np.concatenate([1 + np.arange(1, 100) / 10, np.arange(12.0, 64.0), 2.0 ** np.arange(6, 31)])

Floats = npt.NDArray[np.float64]


class AtDistance(TypedDict):
    """ε between the pairs of nodes so many links apart: at worst, and on average over them."""

    distance: int
    pairs: int  # ordered: who releases, who is curious
    max: float
    mean: float
    masked_max: float | None  # with privacy.sums = "masked"; None where some node has too few neighbours for them
    masked_mean: float | None


class Exposure(TypedDict):
    """Against one curious node, at this δ, if every node adds the noise so many times."""

    noise: float
    mixings: int
    trainings: int
    delta: float
    local: float  # ε against who sees the release itself: no distance makes it more
    by_the_mean: float  # ε against who sees only the mean of all: no distance makes it less
    left: float  # of a disagreement, when the next training begins
    distances: list[AtDistance]


def exposure(
    topology: Topology,
    weights: str,
    masses: Mapping[str, float],
    noise: float,
    mixings: int,
    delta: float,
    trainings: int = 1,
) -> Exposure:
    """What one training, or several, tell one curious node of each other one that it is connected to.

    BadInput where `not_computed` has something to say.
    """
    if (why := not_computed(topology, weights)) is not None:
        raise BadInput(why)
    n, alike = len(topology.names), _all_alike(topology, weights)
    graph = topology.at(0)
    matrix = np.asarray(mixing_matrix(graph, weights, masses).toarray())
    masked = min(degree for _, degree in graph.degree) >= LEAST_SENDERS
    index = {name: i for i, name in enumerate(topology.names)}
    found: dict[int, list[tuple[float, float]]] = {}  # distance → (share, share behind masks) of each pair
    for name in topology.names[: 1 if alike else n]:
        v = index[name]
        singly = shares(matrix, v, mixings)
        summed = shares(matrix, v, mixings, masked=True) if masked else singly
        for other, distance in nx.single_source_shortest_path_length(graph, name).items():
            if other != name:
                found.setdefault(distance, []).append((singly[index[other]], summed[index[other]]))
    divergence = trainings / (2.0 * noise**2)  # over α, of a share of 1
    distances: list[AtDistance] = []
    for distance, pairs in sorted(found.items()):
        epsilons = epsilon(divergence * np.array(pairs), delta)
        (most, masked_most), (mean, masked_mean) = epsilons.max(axis=0).tolist(), epsilons.mean(axis=0).tolist()
        distances.append(
            {
                "distance": distance,
                "pairs": len(pairs) * (n if alike else 1),
                "max": most,
                "mean": mean,
                "masked_max": masked_most if masked else None,
                "masked_mean": masked_mean if masked else None,
            }
        )
    local, by_the_mean = epsilon(divergence * np.array([1.0, 1.0 / max(n - 1, 1)]), delta).tolist()
    lambda2 = float(np.sort(np.abs(np.linalg.eigvalsh(matrix)))[-2]) if n > 1 else 0.0
    return {
        "noise": noise,
        "mixings": mixings,
        "trainings": trainings,
        "delta": delta,
        "local": local,
        "by_the_mean": by_the_mean,
        "left": lambda2**mixings,
        "distances": distances,
    }


def not_computed(topology: Topology, weights: str) -> str | None:
    """Why it cannot be said on this graph with these weights who gets to know how much, and what to use instead."""
    if topology.varies or topology.directed or weights not in SUM_KEEPING:
        return (
            "who gets to know how much is computed where edges go both ways and stay, with weights that keep the mean, "
            f"and this is {topology.name} with {weights!r}: use topology.graph = 'random-regular' with "
            "topology.weights = 'metropolis'"
        )
    most = MAX_ALIKE if _all_alike(topology, weights) else MAX_NODES
    if len(topology.names) > most:
        return f"who gets to know how much is computed for up to {most} nodes, and there are {len(topology.names)}"
    return None


def _all_alike(topology: Topology, weights: str) -> bool:
    """Whether all nodes see the same, so that one is enough to look at."""
    return topology.name in VERTEX_TRANSITIVE and weights in ("metropolis", "lazy", "max-degree", "best-constant")


def shares(matrix: Floats, observer: int, rounds: int, *, masked: bool = False) -> Floats:
    """(n,): P_uu of every node u, what `observer` gets to know of u's vector in so many rounds X <- W X; its own: 1.

    `matrix` is W (n, n) with columns that sum to 1. It sees each vector that it gives weight to, or with `masked` only
    their sum. Rows are orthogonalised as they come, a block a round, so that what is hard to read in float32, being
    small, counts as read.
    """
    n = len(matrix)
    own, mean = np.eye(n)[observer], np.full(n, 1.0 / np.sqrt(n))
    heard = np.flatnonzero((matrix[observer] != 0.0) & (own == 0.0))
    known = _orthonormal(np.stack([own, mean]), np.empty((0, n)))
    block = (matrix[observer] * (own == 0.0))[None] if masked else np.eye(n)[heard]
    # Only what was new can lead to something new: the mean stays, and `own` W is what is seen in the first round.
    for _ in range(rounds):
        new = _orthonormal(block, known)
        if not len(new):
            break
        known = np.concatenate([known, new])
        block = new @ matrix
    return np.asarray(np.minimum((known**2).sum(axis=0), 1.0))


def _orthonormal(rows: Floats, known: Floats) -> Floats:
    """An orthonormal basis of what these rows say beyond the orthonormal rows `known`."""
    for _ in range(2):  # once more, for what rounding has left
        rows = rows - (rows @ known.T) @ known
    _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(basis[sizes > NEW])


def epsilon(divergences: Floats, delta: float) -> Floats:
    """The ε at this δ of Rényi divergences α · `divergences`, of any shape; 0 where that is 0.

    The least over the orders α of RDP(α) - (ln δ + ln α) / (α - 1) + ln((α - 1) / α), with which Opacus converts as
    well (Balle et al., Hypothesis Testing Interpretations and Rényi Differential Privacy, 2020, theorem 21).
    """
    extra = np.log1p(-1.0 / ORDERS) - (np.log(delta) + np.log(ORDERS)) / (ORDERS - 1.0)
    least = (divergences[..., None] * ORDERS + extra).min(axis=-1)
    return np.where(divergences > 0.0, np.maximum(least, 0.0), 0.0)


def noise_of(spent: float, delta: float, trainings: int) -> float:
    """The noise with which so many trainings cost this much: the ε > 0 that `epsilon` gives, to rounding."""
    low, high = 0.0, 1.0
    while float(epsilon(np.array(high), delta)) < spent:
        high *= 2.0
    while low < (middle := (low + high) / 2.0) < high:
        low, high = (middle, high) if float(epsilon(np.array(middle), delta)) < spent else (low, middle)
    return math.sqrt(trainings / (2.0 * high))


def in_words(found: Exposure) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """What it says, in a few sentences, and as a table: its head and its rows."""
    times = "once" if found["trainings"] == 1 else f"{found['trainings']} times"
    mixed = "1 round" if found["mixings"] == 1 else f"{found['mixings']} rounds"
    lead = (
        f"What one curious node gets to know of another, as ε at δ = {found['delta']:g}, where each {times} adds noise "
        f"of {found['noise']:g} clipping norms and then mixes for {mixed}: {found['local']:.3g} where it has what was "
        f"released, {found['by_the_mean']:.3g} from the mean of all alone. It holds for one node that keeps what its "
        "neighbours send it, not for several that put together what they saw, nor for who sees one of the models later."
    )
    if found["trainings"] > 1:
        lead += (
            f" It takes the nodes for agreed before each next training; {found['left']:.2g} is left of a difference."
        )
    head = ("links apart", "pairs", "ε at most", "ε on average", "masked, at most", "masked, on average")
    rows = []
    for row in found["distances"]:
        epsilons = (row["max"], row["mean"], row["masked_max"], row["masked_mean"])
        shown = [f"{value:.3g}" for value in epsilons if value is not None]
        rows.append([str(row["distance"]), str(row["pairs"]), *shown])
    return lead, head[: max(map(len, rows), default=0)], rows
