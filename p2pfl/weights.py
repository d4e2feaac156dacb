"""How much a node's vector counts for its neighbour: every weighting in one place. Numbers in, numbers out.

Node i has a mass m_i > 0 (how much it shall count in the network's mean) and a reach S_i (the sum of the masses of
itself and its neighbours). The weight that i gives to its neighbour j is

    w_ij = m_j / max(S_i, S_j)          and the rest, w_ii = 1 - sum_j w_ij >= m_i / S_i > 0, stays with i.

Derivation: Metropolis-Hastings (Hastings 1970) with the target pi_i = m_i / sum m. Propose j from i's closed
neighbourhood with probability q_ij = m_j / S_i; accept with probability

    min(1, pi_j q_ji / (pi_i q_ij)) = min(1, (m_j m_i / S_j) / (m_i m_j / S_i)) = min(1, S_i / S_j),

which makes w_ij = m_j / S_i * min(1, S_i / S_j) = m_j / max(S_i, S_j). Hence m_i w_ij = m_j w_ji: repeated averaging
converges to sum m_i x_i / sum m on any connected graph, and each node needs only its neighbours' masses and reaches.
With m = 1 it is the Metropolis rule 1 / (1 + max degree); with m = samples it ends at the FedAvg average, on a complete
graph in one step. `lazy` is (I + W) / 2 of the Metropolis W: slower, but without negative eigenvalues.

`uniform-neighbours` is 1 / S_i with m = 1. Its limit is biased: node i counts as d_i + 1.

`push-sum` (Kempe, Dobra, Gehrke 2003) needs no symmetry. The mass of a node is no longer constant: in each round i
keeps the portion m_i / S_i of it and gives as much to each that it sends to, where its reach S_i is their number plus
one. The new vector is the mean of the arrived ones weighted by their portions, the new mass the sum of the portions:
the vectors converge to sum m_i(0) x_i / sum m(0) on any strongly connected graph.

The others (`max-degree`, `best-constant`, `fastest`, `given`) follow from the whole graph: see `topology.matrix`. Both
ends must mean the same graph, or one would give more than the other: here the reach says which graph it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from p2pfl.config import FROM_WHOLE_GRAPH as FROM_WHOLE_GRAPH
from p2pfl.config import PUSH_SUM as PUSH_SUM
from p2pfl.messages import BadInput

LEAST_MASS = 2.0**-53  # of push-sum: beside the 1 that a node, or a row, begins with it is nothing


@dataclass(frozen=True, slots=True)
class Stake:
    """What a node says of itself in a round, in its signed manifest."""

    mass: float
    reach: float


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """One node's part of the graph of a round."""

    hears: Mapping[str, float | None]  # who sends to it → the weight that it gets, if that follows from the whole graph
    tells: tuple[str, ...]  # whom it sends to, sorted


@dataclass(frozen=True, slots=True)
class Wiring:
    """One node's part of the graph over those who live."""

    neighbours: tuple[str, ...]  # whom it hears or tells in any round, sorted
    part: Callable[[int], Neighbourhood]  # of a round


def mass(weights: str, samples: int) -> float:
    """m_i of a node that trains on `samples` rows, at its start; `weights` is one of config.WEIGHTS.

    BadInput for a node without a row.
    """
    if samples < 1:
        raise BadInput(f"a node needs at least one row to train on, not {samples}: give it data, or use fewer nodes")
    match weights:
        case "samples" | "push-sum-samples":
            return float(samples)
        case "inverse":
            return 1.0 / samples
        case "sqrt":
            return math.sqrt(samples)
        case _:
            return 1.0


def reach(masses: Iterable[float]) -> float:
    """S_i from the masses of a node and its neighbours, in any order: the sum is exactly rounded."""
    return math.fsum(masses)


def graph_reach(view: int) -> float:
    """What a node says as its reach where weights follow from the whole graph: a number for the members it is over.

    `view` is a digest of them, 0 to 2^32 - 1.
    """
    return 1.0 + view


def staleness_weight(late: float) -> float:
    """By how much the weight of a vector is multiplied that comes `late` rounds after it was needed, in (0, 1].

    1 / (1 + late): the polynomial one of Xie, Koyejo and Gupta, Asynchronous Federated Optimization, 2019, with a = 1.
    """
    return 1.0 / (1.0 + late)


def neighbour_weight(mass_of_neighbour: float, own_reach: float, neighbours_reach: float) -> float:
    """w_ij: what a node gives to a neighbour's vector. In (0, 1)."""
    return mass_of_neighbour / max(own_reach, neighbours_reach)


def weights_of(weights: str, own: Stake, heard: Mapping[str, Stake], fixed: Mapping[str, float]) -> dict[str, float]:
    """The weight that a node gives to each vector that it heard; what is left of 1 stays with its own.

    `heard` are the stakes of those whose vector came, `fixed` the weights that follow from the whole graph. Nobody's
    degree is derived again here: what a missing neighbour would have had stays with the node itself. Only push-sum
    takes the mean of what came: the mass of a portion that is lost is gone.
    """
    match weights:
        case "max-degree" | "best-constant" | "fastest" | "given":
            return {name: fixed[name] for name in heard}
        case "uniform-neighbours":
            return {name: stake.mass / own.reach for name, stake in heard.items()}
        case "push-sum" | "push-sum-samples":
            total = mass_after(own, heard)
            return {name: stake.mass / stake.reach / total for name, stake in heard.items()}
        case _:
            half = 0.5 if weights == "lazy" else 1.0
            return {name: half * neighbour_weight(s.mass, own.reach, s.reach) for name, s in heard.items()}


def mass_after(own: Stake, heard: Mapping[str, Stake]) -> float:
    """The push-sum mass that a node holds after a round: the portion that it kept, and those that came.

    Never below LEAST_MASS: whom nobody hands anything, round after round, would be divided by zero in the end.
    """
    return max(math.fsum(stake.mass / stake.reach for stake in (own, *heard.values())), LEAST_MASS)
