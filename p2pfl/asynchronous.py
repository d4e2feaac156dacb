"""Averaging without common rounds: what one node must remember so that the mean stays, or comes, right.

    pairwise   two nodes go to the middle between an update of the one and an update of the other
    gossip     whoever hears of a model goes towards it, the further the longer that one has learnt
    push-sum   each node adds up all that it ever handed out; what is lost today is in tomorrow's sum

Numbers and opaque vectors in, contributions out; nothing here knows of time or of a network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from p2pfl.messages import LAST, Contribution, Update

OUTSTANDING = (
    8  # own rounds for which an exchange may be under way, and its vector is kept; an answer takes one way back
)
ASKS_NOBODY = 1.0  # as the reach of an update in pairwise exchange: it may be sent in answer
ASKS = 3.0  # … and plus the newest round that one had heard of whom one asks: it asks for one of theirs
LEAST_SHARE = 2.0**-10  # of the mass that a node began with: who holds less waits for what others hand to it


# -- Pairwise --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """One of the peer's updates for one of ours."""

    peer: str
    update: Update
    own_round: int


class Answer(Enum):
    """What becomes of an update that has come."""

    NONE = "none"  # it was the answer, or nobody waits for one
    NEWEST = "newest"  # ours goes back in exchange
    DECLINED = "declined"  # ours is with another already: both keep what they have


@dataclass(slots=True)
class Exchanges:
    """Which of one's updates goes to whom, in exchange for which.

    Each own update is exchanged at most once, so that both ends go to the middle of the same two vectors, whatever
    they have learnt since: x ← x + ½ (b - a) here, x ← x + ½ (a - b) there, and the mean stays where it is.
    AD-PSGD: Lian, Zhang, Zhang and Liu, Asynchronous Decentralized Parallel SGD, 2018.

    Who asks sends an update; the other one answers at once with its own, or declines. Of each peer at most one answer
    is awaited, and two questions that cross on the way are one exchange. Both ends know that they do: an update that
    asks says what its maker had heard of the other one before, and so whether it knew of the other's question.
    """

    _partners: dict[int, str] = field(default_factory=dict)  # own round → whom it asks; empty: that is settled
    _complete: list[Exchange] = field(default_factory=list)  # and not yet folded

    def awaits(self, peer: str) -> bool:
        """Whether this peer has still to answer."""
        return peer in self._partners.values()

    def ask(self, own_round: int, peer: str, heard: int) -> float:
        """Our update of this round, which is to be made, asks `peer`, of which round `heard` came last; its reach."""
        self._partners[own_round] = peer
        return ASKS + heard

    def came(self, peer: str, update: Update, newest: int) -> Answer:
        """Take in an update of `peer`. `newest`: round of the newest own one that is made; -1 if none may be exchanged.

        Who declines withdraws the question that it has in the making for this peer, for that would look as if it
        crossed.
        """
        knew, asks = update.reach - ASKS, [own for own, partner in self._partners.items() if partner == peer]
        asked = [own for own in asks if knew < own <= newest]
        if asked:
            own_round, answer = asked[0], Answer.NONE
        elif update.reach == ASKS_NOBODY:
            return Answer.NONE  # it answers what we no longer ask
        elif newest < 0 or newest in self._partners:
            self._partners.update((own, "") for own in asks if own > newest)
            return Answer.DECLINED
        else:
            own_round, answer = newest, Answer.NEWEST
        self._partners[own_round] = ""
        self._complete.append(Exchange(peer, update, own_round))
        return answer

    def declined(self, peer: str, own_round: int) -> None:
        """`peer` does not want our update of this round."""
        if self._partners.get(own_round) == peer:
            self._partners[own_round] = ""

    def forget(self, peer: str) -> None:
        """What it said no longer counts: it has started again, or is shut out."""
        self._complete = [exchange for exchange in self._complete if exchange.peer != peer]

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

    A sum is for those who were told all of it. When they are others, or one has started again, it begins anew, and says
    so: what somebody had not yet taken of the old one is lost with it, and nothing is taken twice.
    """

    mass: float
    least: float = 0.0  # with less than this nothing is handed out: nothing would be left to be divided by
    most: float = math.inf  # that anybody may hold, or say that it has handed out: more is a lie, which goes no further
    handed_out: float = 0.0  # to each of those who are told
    beginnings: int = 0  # how often that began anew
    _listeners: tuple[tuple[str, int], ...] = ()
    _taken: dict[str, tuple[float, float]] = field(default_factory=dict)  # peer → reach and mass of its newest sum

    @property
    def reach(self) -> float:
        """What an update says as its reach: which of one's sums it is, counted from 1."""
        return 1.0 + self.beginnings

    def tell(self, listeners: tuple[tuple[str, int], ...]) -> bool:
        """From now on these, by name and epoch, are told; True if the sum begins anew: for it, or before `most`."""
        anew = self.handed_out > 0 and (listeners != self._listeners or self.handed_out + self.mass > self.most)
        self._listeners = listeners
        if anew:
            self.handed_out, self.beginnings = 0.0, self.beginnings + 1
        return anew

    def hand_out(self) -> float:
        """Give to each who is told as much as one keeps; that portion, 0 if nothing is given."""
        if not self._listeners or self.mass < self.least:
            return 0.0
        self.mass /= len(self._listeners) + 1
        self.handed_out += self.mass
        return self.mass

    def grows(self, peer: str, update: Update) -> bool:
        """Whether this sum is not smaller, and no earlier one, than what was taken: as no honest one is."""
        return (update.reach, update.mass) >= self._taken.get(peer, (0.0, 0.0))

    def forget(self, peer: str) -> None:
        """It has started again, and its sum with it."""
        self._taken.pop(peer, None)

    def take(self, sums: Sequence[tuple[str, Update]]) -> tuple[tuple[Contribution, ...], float]:
        """What these sums have grown by, in this order, as contributions; and the share of the new mass that was here.

        A contribution's reference is LAST where its sum goes on from the one that was taken last of that peer.
        """
        before, gains, references = self.mass, list[float](), list[int | None]()
        for peer, update in sums:
            reach, mass = self._taken.get(peer, (0.0, 0.0))
            goes_on = update.reach == reach
            gains.append(update.mass - mass if goes_on else update.mass)
            references.append(LAST if goes_on else None)
            self._taken[peer] = (update.reach, update.mass)
        total = math.fsum([before, *gains])
        self.mass = min(total, self.most)
        contributions = tuple(
            Contribution(peer, u.round, 1 / total if gain else 0.0, u.vector, reference, gain)
            for (peer, u), gain, reference in zip(sums, gains, references, strict=True)
        )
        return contributions, before / total
