"""Sums of neighbours, the bookkeeping: whom a node has asked in a round, and who has asked it. Pure; `masks` computes.

When a node begins a round it fixes who shall be in its sum, and says so to each of them (phase one). Each of those
trains, and then sends its vector under masks that vanish in the sum of exactly these members (phase two). If one of
them does not come, what the others sent is noise: the round is given up, and the next one begins without it. Nobody is
asked again in the same round, and nobody answers twice: the difference of two sums would be somebody's vector.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from p2pfl.composition import LEAST_SENDERS
from p2pfl.messages import BadMessage, Gathering, MaskKey, Update

MAX_MISSED = 3  # rounds in which nobody could be asked, until one gives again although one's vector is older
NOTHING = Gathering(-1, 1.0, 1.0, False, ())


class Gatherings:
    """What one node knows of its own sums and of those that it gives to."""

    def __init__(self, own: MaskKey) -> None:
        self.own = own
        self.keys: dict[str, MaskKey] = {}  # peer → that of its present process
        self.asked = NOTHING  # what this node asked for last
        self.gives = True  # whether it can be asked: not while its vector is older than the others'
        self.stale_share = 0.0  # and then: what its own vector counts beside the first mean that it gets
        self.under_way = 0  # parts that are being made
        self._missed = 0  # rounds in a row with nobody to ask, while this node could not be asked, either
        self._share_before = -1.0  # with its last sum it came back, and this is what `stale_share` was; -1: it did not
        self._asks: dict[str, Gathering] = {}  # peer → what it asked for last, and was not given yet
        self._answered: dict[str, int] = {}  # peer → the newest round of which it was given something
        self._sent: dict[str, Update] = {}  # peer → that

    def introduced(self, peer: str, key: MaskKey, epoch: int) -> None:
        """This is the peer's key; `epoch` that of its process. BadMessage if it is another's."""
        if key.name != peer:
            raise BadMessage("bad_record", f"the mask key of {key.name}, sent by {peer}")
        if key.epoch == epoch:  # or else it was under way when the process ended
            self.keys[peer] = key

    def ask(self, round: int, mass: float, reach: float, names: Iterable[str]) -> Gathering:
        """Fix who is in the sum of this round: these, or nobody if they are too few to hide among."""
        keys = tuple(self.keys[name] for name in sorted(names))
        enough = len(keys) >= LEAST_SENDERS
        self._missed = 0 if enough or self.gives else self._missed + 1
        if self._missed >= MAX_MISSED:
            self.is_back()  # or two that are behind, and need each other, would wait for each other for ever
        self.asked = Gathering(round, mass, reach, self.gives, keys if enough else ())
        return self.asked

    def came(self, peer: str, asks: Gathering) -> None:
        """A peer asks. BadMessage if nobody may answer that."""
        names = asks.names
        if not names:
            self._asks.pop(peer, None)
            return
        if len(names) < LEAST_SENDERS or peer in names:
            why = f"it takes {LEAST_SENDERS} senders or more, {peer} not among them"
            raise BadMessage("bad_gathering", f"a sum of {', '.join(names)}: {why}")
        if self.own in asks.keys:  # or it speaks of a process of ours that has ended, or of others only
            self._asks[peer] = asks

    def drop(self, peer: str) -> None:
        """What the peer asks is not to be answered."""
        self._asks.pop(peer, None)

    def due(self, round: int, linked: Container[str]) -> list[tuple[str, Gathering]]:
        """Who of those `linked` is to be given what it asked for of this round, sorted; from now on it counts as given.

        Not even a peer that has started again is given a second sum of one round. What is asked of later rounds stays
        to be answered.
        """
        due = []
        for peer, asks in sorted(self._asks.items()):
            if asks.round > round or (asks.round == round and peer not in linked):
                continue
            del self._asks[peer]
            if asks.round == round and self._answered.get(peer, -1) < round:
                self._answered[peer] = round
                due.append((peer, asks))
        self.under_way += len(due)
        return due

    def made(self, peer: str, update: Update | None) -> None:
        """The peer's part is made, and given; None: nothing came of it."""
        self.under_way -= 1
        if update is not None:
            self._sent[peer] = update

    def newest(self, peer: str) -> Update | None:
        """What was given to the peer last: a broken link may have lost it."""
        return self._sent.get(peer)

    def forget(self, peer: str) -> None:
        """The peer has another process now: the old one's key and requests no longer count."""
        self.keys.pop(peer, None)
        self._asks.pop(peer, None)
        self._sent.pop(peer, None)

    def is_behind(self, share: float) -> None:
        """The own vector is older than the others'. Beside the first mean that it gets it shall count `share` of 1."""
        self.gives, self.stale_share = False, share

    def is_back(self) -> None:
        """The own vector has come to where the others' are, as far as one can know."""
        self._share_before = -1.0 if self.gives else self.stale_share
        self.gives, self.stale_share, self._missed = True, 0.0, 0

    def was_not_mixed(self) -> None:
        """The last sum was no use: who came back with it is not back."""
        if self._share_before >= 0:
            self.is_behind(self._share_before)
