"""Averaging without common rounds: what one node must remember so that the mean stays, or comes, right.

    pairwise   two nodes go to the middle between an update of the one and an update of the other
    gossip     whoever hears of a model goes towards it, the further the longer that one has learnt
    push-sum   each node adds up all that it ever handed out; what is lost today is in tomorrow's sum

Numbers and opaque vectors in, contributions out; nothing here knows of time or of a network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pfl.messages import LAST, Contribution, Update

OUTSTANDING = (
    8  # own rounds for which an exchange may be under way, and its vector is kept; an answer takes one way back
)


# -- Pairwise --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """One of the peer's updates for one of ours."""

    peer: str
    update: Update
    own_round: int


@dataclass(slots=True)
class Exchanges:
    """Which of one's updates goes to whom, in exchange for which.

    Each own update is exchanged at most once, so that both ends go to the middle of the same two vectors, whatever
    they have learnt since: x ← x + ½ (b - a) here, x ← x + ½ (a - b) there, and the mean stays where it is.
    AD-PSGD: Lian, Zhang, Zhang and Liu, Asynchronous Decentralized Parallel SGD, 2018.
    """

    _partners: dict[int, str] = field(default_factory=dict)  # own round → who was sent it; empty: that is settled
    _complete: list[Exchange] = field(default_factory=list)  # and not yet folded

    def sent(self, own_round: int, peer: str) -> None:
        """Our update of this round went to `peer`, which is to answer with one of its own."""
        self._partners[own_round] = peer

    def came(self, peer: str, update: Update, newest: int) -> bool:
        """Take in an update of `peer`; True if our `newest` (a round, -1: none yet) is to be sent as the answer."""
        asked = [round for round, partner in self._partners.items() if partner == peer]
        if not asked and (newest < 0 or newest in self._partners):
            return False  # ours is with another already: the peer will ask somebody for its next one
        own_round = max(asked, default=newest)
        self._partners[own_round] = ""
        self._complete.append(Exchange(peer, update, own_round))
        return not asked

    def fold(self, round: int) -> tuple[Contribution, ...]:
        """What is to be folded at the end of this round: at most one of each peer, sorted; the rest when it is next.

        Exchanges with an update that is no longer kept are dropped.
        """
        oldest = round - OUTSTANDING + 1
        self._partners = {own: partner for own, partner in self._partners.items() if own >= oldest}
        now: dict[str, Exchange] = {}
        later: list[Exchange] = []
        for exchange in self._complete:
            if exchange.own_round >= oldest and exchange.peer in now:
                later.append(exchange)
            elif exchange.own_round >= oldest:
                now[exchange.peer] = exchange
        self._complete = later
        return tuple(
            Contribution(peer, e.update.round, 1 / 2, e.update.vector, e.own_round) for peer, e in sorted(now.items())
        )


# -- Gossip ----------------------------------------------------------------------------------------------------------


def merge_by_age(own: float, heard: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """The weight of each model heard, and the age of the outcome, from ages (rounds for which a model has learnt, ≥ 1).

    One after the other, x ← (t x + t_j x_j) / (t + t_j) and t ← max(t, t_j). Gossip learning: Ormandi, Hegedus and
    Jelasity, 2013. The mean of the network is not kept; nothing is waited for, and no answer is needed.
    """
    weights: dict[str, float] = {}
    for name, age in heard.items():
        share = age / (own + age)
        weights = {other: weight * (1 - share) for other, weight in weights.items()} | {name: share}
        own = max(own, age)
    return weights, own


# -- Push-sum with running sums --------------------------------------------------------------------------------------


@dataclass(slots=True)
class RunningSums:
    """The mass of one node, what it has handed out in all, and how much of each neighbour's sum it has taken.

    Spiridonoff, Olshevsky and Paschalidis, Robust Asynchronous Stochastic Gradient-Push, 2020: exact whatever is lost
    or late, as long as some later sum arrives.
    """

    mass: float
    handed_out: float = 0.0  # to each of those who are told
    _taken: dict[str, float] = field(default_factory=dict)

    def hand_out(self, listeners: int) -> float:
        """Give to each listener as much as one keeps; the portion."""
        portion = self.mass / (listeners + 1)
        if listeners:
            self.mass = portion
            self.handed_out += portion
        return portion if listeners else 0.0

    def grows(self, peer: str, total: float) -> bool:
        """Whether a sum of `total` is not smaller than the one that came before, as no honest one is."""
        return total >= self._taken.get(peer, 0.0)

    def forget(self, peer: str) -> None:
        """It has started again, and its sum with it."""
        self._taken.pop(peer, None)

    def restart(self) -> None:
        """All sums begin again, since those who are told have changed; what one holds, one keeps."""
        self.handed_out = 0.0
        self._taken.clear()

    def take(self, updates: Mapping[str, Update], from_now_on: bool) -> tuple[tuple[Contribution, ...], float]:
        """What these sums, by peer, have grown by, as contributions; and what part of the new mass was here before.

        `from_now_on`: of a sum that one meets for the first time, one cannot say what one has had of it already.
        """
        before, gains, references = self.mass, dict[str, float](), dict[str, int | None]()
        for peer, update in updates.items():
            known = peer in self._taken or not from_now_on
            gains[peer] = update.mass - self._taken.get(peer, 0.0) if known else 0.0
            references[peer] = LAST if peer in self._taken else None
            self._taken[peer] = update.mass
        self.mass = math.fsum([before, *gains.values()])
        contributions = tuple(
            Contribution(peer, u.round, 1 / self.mass if gains[peer] else 0.0, u.vector, references[peer])
            for peer, u in updates.items()
        )
        return contributions, before / self.mass
