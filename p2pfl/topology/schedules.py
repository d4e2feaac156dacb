"""The named graphs that change from round to round.

Each is a pure function of (n, section, seed, round) on the integers 0..n-1, so that nodes agree on it without talking.
In a directed graph the edge (a, b) is the way that a's vector travels: b hears a. BadInput where n nodes have no such
schedule, with a number that works.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import networkx as nx

from p2pfl.config import TopologySection
from p2pfl.messages import BadInput
from p2pfl.rng import stream
from p2pfl.topology.graphs import check_size, dimension

Edges = list[tuple[int, int, float]]  # (node, node, weight that each gives to the other's vector)


@dataclass(frozen=True)
class Schedule:
    """The graph of every round."""

    period: int | None  # rounds after which it repeats; None: drawn anew for every round
    at: Callable[[int], nx.Graph]  # round → graph on 0..n-1; "weight" of an edge, where the schedule has its own


def _graph(n: int, edges: Iterable[tuple[int, int]], kind: type[nx.Graph] = nx.Graph) -> nx.Graph:
    graph = kind()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges)
    return graph


# -- One peer a round ------------------------------------------------------------------------------------------------


def _one_peer_exponential(n: int, section: TopologySection, seed: int) -> Schedule:
    """In round t everybody sends to the node 2^t further on: exact after log2 n rounds if n is a power of two."""
    period = max(1, (n - 1).bit_length())

    def at(round: int) -> nx.DiGraph:
        shift = 2 ** (round % period)
        return _graph(n, ((i, (i + shift) % n) for i in range(n) if n > 1), nx.DiGraph)

    return Schedule(period, at)


def _one_peer_hypercube(n: int, section: TopologySection, seed: int) -> Schedule:
    """In round t everybody exchanges with i XOR 2^t: exact after log2 n rounds."""
    period = max(1, dimension(n))

    def at(round: int) -> nx.Graph:
        bit = 2 ** (round % period)
        return _graph(n, ((i, i ^ bit) for i in range(n) if i < i ^ bit < n))

    return Schedule(period, at)


# -- Drawn anew for every round --------------------------------------------------------------------------------------


def _random_matching(n: int, section: TopologySection, seed: int) -> Schedule:
    """In each round the nodes fall into pairs, every matching as likely as any other; of an odd number one is idle.

    With weights 1/2 a round leaves (n - 2) / (2 (n - 1)) of the squared distance to the mean on average, for even n.
    """

    def at(round: int) -> nx.Graph:
        order = stream(seed, "random-matching", round).permutation(n).tolist()
        return _graph(n, zip(order[0::2], order[1::2], strict=False))  # of an odd number the last has no partner

    return Schedule(None, at)


def _epidemic(n: int, section: TopologySection, seed: int) -> Schedule:
    """In each round everybody sends to `s` others, drawn uniformly: the EL-Local of de Vos et al. 2023, "Epidemic
    learning: boosting decentralized learning with randomized communication".

    With the weights 1 / (in-degree + 1) a round leaves (1 - (1 - s / (n - 1))^n) / s - 1 / (n - 1) of the squared
    distance to the mean on average.
    """
    s = section.s
    if s >= n:
        raise BadInput(
            f"topology: of {n} nodes none can send to s = {s} others: "
            f"use {f's = {n - 1}, or ' if n > 1 else ''}at least {s + 1} nodes"
        )
    check_size(section, n, n * s)

    def at(round: int) -> nx.DiGraph:
        random = stream(seed, "epidemic", round)
        drawn = ((i, j) for i in range(n) for j in random.choice(n - 1, size=s, replace=False).tolist())
        return _graph(n, ((i, j + (j >= i)) for i, j in drawn), nx.DiGraph)  # + 1: nobody draws itself

    return Schedule(None, at)


# -- Base-(k+1): exact for every number of nodes -----------------------------------------------------------------------


def _base_k(n: int, section: TopologySection, seed: int) -> Schedule:
    """After one period all nodes hold the exact mean, for every n, with at most `k` neighbours in every round.

    Takezawa et al. 2023, "Beyond exponential graph: communication-efficient topologies for decentralized learning via
    finite-time convergence" (arXiv 2305.11420). Three rules make a sequence of at most 2 log_{k+1} n + 2 graphs:

    1.  n <= k + 1 nodes: one round, all with all, with weights 1 / n.
    2.  n = m m' nodes stand in m rows of m'. First every column agrees, by the sequence for m nodes. Then all rows hold
        the same values, so that the mean over a row is the mean over all, and every row agrees by the sequence for m'.
    3.  n is a sum: its digits in base k + 1, each times its power, are blocks. See `_sum`.

    Of the rules that do for n, the one with the fewest rounds is taken. The paper's Simple Base graph takes rule 3
    wherever n has a prime factor above k + 1, and its Base graph first divides n by all smaller ones, by rule 2. Here
    rule 2 is tried with every m, at every step, so that the sequence is as short as either, and sometimes shorter.
    """
    k = section.k or 1
    check_size(section, n, _plan(n, k)[0] * n * min(k, n - 1) // 2)  # all rounds together: they are all kept
    sequence = _sequence(n, k) or [[]]

    def at(round: int) -> nx.Graph:
        graph = _graph(n, ())
        graph.add_weighted_edges_from(sequence[round % len(sequence)])
        return graph

    return Schedule(len(sequence), at)


def _sequence(n: int, k: int) -> list[Edges]:
    """The edges of each round among 0..n-1."""
    rounds, rows = _plan(n, k)
    if n <= k + 1:
        return [[(i, j, 1 / n) for i, j in itertools.combinations(range(n), 2)]] * rounds
    if rows > 1:
        return _product(rows, n // rows, k)
    return _sum(n, k)


@cache
def _plan(n: int, k: int) -> tuple[int, int]:
    """(fewest rounds, m): these are reached by rule 2 on m rows if m > 1, and otherwise by rule 1 or 3."""
    if n <= k + 1:
        return min(1, n - 1), 1
    plans = [(_plan(m, k)[0] + _plan(n // m, k)[0], m) for m in range(2, math.isqrt(n) + 1) if n % m == 0]
    copies, size = _digits(n, k + 1)[0]
    if copies * size < n:
        plans.append((_plan(copies * size, k)[0] + 1 + _plan(size, k)[0], 1))
    return min(plans)


def _product(rows: int, columns: int, k: int) -> list[Edges]:
    """Rule 2; row r are the nodes from r * columns on."""
    in_columns = [
        [(i * columns + c, j * columns + c, weight) for c in range(columns) for i, j, weight in edges]
        for edges in _sequence(rows, k)
    ]
    return in_columns + [_copies(edges, range(0, rows * columns, columns)) for edges in _sequence(columns, k)]


def _sum(n: int, k: int) -> list[Edges]:
    """Rule 3, for n with at least two digits that are not 0.

    In base k + 1, n = a_1 s_1 + a_2 s_2 + … with digits 1 <= a_j <= k and powers s_1 > s_2 > … of k + 1. Block V_j has
    a_j parts of s_j nodes each; A_j = V_j ∪ V_{j+1} ∪ … is this block with all smaller ones.

    First each block agrees on its own mean, which all its nodes then hold: c_j. After that, for j = 1, 2, … to the last
    block but one, V_j is finished. The mean over A_j is the mean µ over all nodes (A_1 are all nodes). The smaller
    blocks A_{j+1} have fewer than s_j nodes altogether, so that each of these, v, can exchange with an own node u of
    every part of V_j: in a star of a_j <= k edges with weight w = s_j / |A_j|,

        v:  x_v ← (1 - a_j w) x_v + a_j w c_j           u:  x_u ← (1 - w) c_j + w x_v

    A part's mean becomes c_j + (w / s_j) sum_v (x_v - c_j) = c_j + (1 / |A_j|) sum_v (x_v - c_j): the mean over A_j,
    which is µ. From here on each part of V_j only agrees by itself, by the sequence for s_j nodes. As an exchange keeps
    the sum, A_{j+1} now has the mean µ as well, and the nodes of each of its blocks still hold the same value; so it
    goes on with j + 1. The last block is left with the mean µ and one value: it holds µ.

    V_j starts to finish j - 1 rounds after V_1, and its parts need at least j - 1 rounds less: V_1 is ready last.
    """
    sequence: list[Edges] = [[] for _ in range(_plan(n, k)[0])]
    digits, start = _digits(n, k + 1), 0
    exchange = _plan(math.prod(digits[0]), k)[0]  # the round in which the first block meets the others
    for copies, size in digits:
        end = start + copies * size
        for round, edges in enumerate(_sequence(end - start, k)):
            sequence[round] += _copies(edges, [start])
        if end < n:
            parts, weight = range(start, end, size), size / (n - start)
            sequence[exchange] += [(part + i, v, weight) for i, v in enumerate(range(end, n)) for part in parts]
            for round, edges in enumerate(_sequence(size, k), start=exchange + 1):
                sequence[round] += _copies(edges, parts)
        start, exchange = end, exchange + 1
    return sequence


def _digits(n: int, base: int) -> list[tuple[int, int]]:
    """(digit, power of the base) for the digits of n that are not 0, from the largest power on."""
    digits, power = [], 1
    while n:
        n, digit = divmod(n, base)
        if digit:
            digits.append((digit, power))
        power *= base
    return digits[::-1]


def _copies(edges: Edges, starts: Iterable[int]) -> Edges:
    """These edges among the nodes from each start on."""
    return [(start + i, start + j, weight) for start in starts for i, j, weight in edges]


SCHEDULES: dict[str, Callable[[int, TopologySection, int], Schedule]] = {
    "one-peer-exponential": _one_peer_exponential,
    "one-peer-hypercube": _one_peer_hypercube,
    "base-k": _base_k,
    "random-matching": _random_matching,
    "epidemic": _epidemic,
}
