"""How much a node's vector counts for its neighbour: one formula for every weighting. Numbers in, numbers out.

Node i has a mass m_i > 0 (how much it shall count in the network's mean) and a reach S_i (the sum of the masses of
itself and its neighbours). The weight that i gives to its neighbour j is

    w_ij = m_j / max(S_i, S_j)          and the rest, w_ii = 1 - sum_j w_ij >= m_i / S_i > 0, stays with i.

Derivation: Metropolis-Hastings (Hastings 1970) with the target pi_i = m_i / sum m. Propose j from i's closed
neighbourhood with probability q_ij = m_j / S_i; accept with probability

    min(1, pi_j q_ji / (pi_i q_ij)) = min(1, (m_j m_i / S_j) / (m_i m_j / S_i)) = min(1, S_i / S_j),

which makes w_ij = m_j / S_i * min(1, S_i / S_j) = m_j / max(S_i, S_j). Hence m_i w_ij = m_j w_ji: repeated averaging
converges to sum m_i x_i / sum m on any connected graph, and each node needs only its neighbours' masses and reaches.
With m = 1 it is the Metropolis rule 1 / (1 + max degree); with m = samples it ends at the FedAvg average, on a complete
graph in one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from p2pfl.messages import BadInput


def mass(weights: str, samples: int) -> float:
    """m_i of a node that trains on `samples` rows; `weights` is one of config.WEIGHTS, anything else a ValueError.

    BadInput for a node without a row.
    """
    if samples < 1:
        raise BadInput(f"a node needs at least one row to train on, not {samples}: give it data, or use fewer nodes")
    match weights:
        case "metropolis":
            return 1.0
        case "samples":
            return float(samples)
        case "inverse":
            return 1.0 / samples
        case "sqrt":
            return math.sqrt(samples)
        case _:
            raise ValueError(f"unknown weights {weights!r}")


def reach(masses: Iterable[float]) -> float:
    """S_i from the masses of a node and its neighbours, in any order: the sum is exactly rounded."""
    return math.fsum(masses)


def neighbour_weight(mass_of_neighbour: float, own_reach: float, neighbours_reach: float) -> float:
    """w_ij: what a node gives to a neighbour's vector. In (0, 1)."""
    return mass_of_neighbour / max(own_reach, neighbours_reach)
