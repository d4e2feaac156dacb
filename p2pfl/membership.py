"""Who takes part, as one node knows it: suspicion and its refutation, death, leaving, return. It touches nothing.

Everybody speaks for itself only. A `MemberRecord` says "I live", and is signed by its owner; of two records of one
member the one with the higher (epoch, incarnation) holds, the epoch counting the starts of its process and the
incarnation its refutations. What one member says of another is a `Hint`: it may start a suspicion, never end a life by
itself, for the accused hears of it and refutes it with a record of a higher incarnation (SWIM, Das et al. 2002).

    ALIVE --the own link is lost, or a hint--> SUSPECT --nothing newer within the timeout--> DEAD
    SUSPECT, DEAD, LEFT --a newer record, or a sign of life--> ALIVE            any --a record that says so--> LEFT

Whoever stalls itself (SIGSTOP, a busy machine) is a bad judge of others: its timeouts are stretched for a while, as in
Lifeguard (Dadgar et al. 2017). Time is an argument, in seconds; all members are known by name from the start, so no
table can grow.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from p2pfl.messages import Hint, MemberRecord

OTHERS = "others have lost it"
MAX_STRETCH = 8.0  # how many times longer one waits at most before one condemns others
SEEKERS = 2  # of the living who keep looking for one of the dead: one of them may be cut off from it, too
CALM = 30.0  # seconds without a stall of one's own after which the stretch is halved


class Standing(Enum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Change:
    """What is now known of a member, and was not before."""

    name: str
    before: Standing
    after: Standing
    why: str = ""


@dataclass(slots=True)
class Doubt:
    """Why a member is not simply alive."""

    standing: Standing  # SUSPECT, DEAD or LEFT
    until: float = 0.0  # when a suspicion becomes death


def newer(record: MemberRecord | Hint, than: MemberRecord | Hint) -> bool:
    """Whether this is of a later start of the member, or of a later refutation within the same one."""
    return (record.epoch, record.incarnation) > (than.epoch, than.incarnation)


def suspicion_timeout(base: float, members: int, stretch: float) -> float:
    """Seconds from suspicion to death: time for a rumour to reach the accused and its answer to come back.

    A rumour needs about log2 n hops where the graph is a good one; `base` covers what eight members need.
    """
    return base * max(1.0, (max(members, 2) - 1).bit_length() / 3) * stretch


def followers(name: str, living: Sequence[str]) -> tuple[str, ...]:
    """The SEEKERS of the `living` (sorted) that come next after this name, from the last on to the first again."""
    start = bisect.bisect_right(living, name)
    return tuple(living[(start + step) % len(living)] for step in range(min(SEEKERS, len(living))))


def _is_sorted_with(names: tuple[str, ...], name: str) -> bool:
    """Whether these are sorted, without doubles, and this one is among them."""
    return name in names and all(a < b for a, b in pairwise(names))


class Membership:
    """The table of all members, kept by one of them."""

    def __init__(self, name: str, names: Iterable[str], epoch: int, address: str, suspicion: float) -> None:
        """Everybody is taken to live until the contrary shows: the graph of the start is the one over all names.

        `suspicion`: seconds from the first suspicion to death, among eight members or fewer.
        """
        self.name = name
        self.stretch = 1.0
        self._suspicion = suspicion
        self._calm_since = 0.0
        self._names = (
            names if isinstance(names, tuple) and _is_sorted_with(names, name) else tuple(sorted({*names, name}))
        )
        # Only what is not so from the start: a network of thousands knows little of most, and has many tables.
        self._records = {name: MemberRecord(name, epoch, 0, address=address)}
        self._doubts: dict[str, Doubt] = {}
        self._live: tuple[str, ...] | None = self._names  # None: not known since somebody came or went

    # -- What is known -----------------------------------------------------------------------------------------------

    @property
    def own(self) -> MemberRecord:
        """The record of this node itself, as it stands (not signed: that is done where it is sent)."""
        return self._records[self.name]

    @property
    def live(self) -> tuple[str, ...]:
        """The names of all who are neither dead nor gone, sorted; this node always is one of them."""
        if self._live is None:
            gone = {name for name, doubt in self._doubts.items() if doubt.standing is not Standing.SUSPECT}
            self._live = tuple(name for name in self._names if name not in gone) if gone else self._names
        return self._live

    @property
    def deadline(self) -> float:
        """When the next suspicion becomes death; infinity if there is none."""
        due = (doubt.until for doubt in self._doubts.values() if doubt.standing is Standing.SUSPECT)
        return min(due, default=float("inf"))

    def standing(self, name: str) -> Standing:
        return self._doubts[name].standing if name in self._doubts else Standing.ALIVE

    def record(self, name: str) -> MemberRecord:
        """The newest record of this member; of epoch 0 if it never made one."""
        return self._records.get(name) or MemberRecord(name, 0, 0)

    def address(self, name: str) -> str:
        """Where this member said that it listens; empty if it never did."""
        return self.record(name).address

    def sought(self) -> tuple[str, ...]:
        """The dead to whom this node keeps trying to make a link, so that the two sides of a cut meet when it heals.

        Each of the dead is sought by those two of the living that follow it in the circle of all names.
        """
        dead = [name for name, doubt in sorted(self._doubts.items()) if doubt.standing is Standing.DEAD]
        living = self.live
        return tuple(name for name in dead if self.name in followers(name, living))

    def records(self) -> tuple[MemberRecord, ...]:
        """The newest record of everybody who ever made one, for those who may have missed it."""
        return tuple(record for _, record in sorted(self._records.items()))

    def hints(self) -> tuple[Hint, ...]:
        """Whom this node believes to be gone, or about to be."""
        doubted = [name for name, doubt in sorted(self._doubts.items()) if doubt.standing is not Standing.LEFT]
        records = [self.record(name) for name in doubted]
        return tuple(Hint(record.name, record.epoch, record.incarnation) for record in records)

    # -- What comes in -----------------------------------------------------------------------------------------------

    def heard(self, records: Sequence[MemberRecord], hints: Sequence[Hint], fresh: Iterable[str], now: float) -> Heard:
        """Take in what a neighbour passed on; the records were verified before, each is its owner's.

        `fresh` are those of whom this node itself has a recent sign of life: a hint at them is not believed, but told
        to them, so that they refute it also where nobody hears from them directly.
        """
        changes: list[Change] = []
        news: list[MemberRecord] = []
        for record in records:
            known = self._records.get(record.name)
            if known is record or (not self._knows(record.name) if known is None else not newer(record, known)):
                continue
            if record.name == self.name:  # a former life of ours is still spoken of: the present one goes on above it
                self._refute(record.epoch, record.incarnation)
                news.append(self.own)
                continue
            self._records[record.name] = record
            news.append(record)
            changes += self._become(record.name, Standing.LEFT if record.leaving else Standing.ALIVE, "")
        seen = set(fresh)
        believed: list[Hint] = []
        doubted: list[Hint] = []
        for hint in hints:
            if not self._knows(hint.name) or newer(self.record(hint.name), hint):
                continue
            if hint.name == self.name:
                self._refute(hint.epoch, hint.incarnation)
                news.append(self.own)
            elif hint.name in seen:
                doubted.append(hint)
            elif hint.name not in self._doubts:
                changes += self.suspect(hint.name, OTHERS, now)
                believed.append(hint)
        return Heard(tuple(changes), tuple(news), tuple(believed), tuple(doubted))

    def sign_of_life(self, name: str) -> list[Change]:
        """This node itself heard from the member."""
        return self._become(name, Standing.ALIVE, "") if name in self._doubts else []

    def suspect(self, name: str, why: str, now: float) -> list[Change]:
        """This node itself lost the member, or believes those who did."""
        if name in self._doubts or name == self.name or not self._knows(name):
            return []
        until = now + suspicion_timeout(self._suspicion, len(self._names), self.stretch)
        return self._become(name, Standing.SUSPECT, why, until)

    def left(self, name: str) -> list[Change]:
        """The member said goodbye to this node itself."""
        return self._become(name, Standing.LEFT, "") if self._knows(name) else []

    def leave(self) -> MemberRecord:
        """The record that tells the others that this node leaves."""
        record = self.own
        self._records[self.name] = MemberRecord(
            record.name, record.epoch, record.incarnation + 1, leaving=True, address=record.address
        )
        return self.own

    # -- What time brings --------------------------------------------------------------------------------------------

    def pass_time(self, now: float) -> list[Change]:
        """Suspicions that were not refuted in time become deaths."""
        if self.stretch > 1.0 and now >= self._calm_since + CALM:
            self.stretch, self._calm_since = self.stretch / 2, now
        changes: list[Change] = []
        for name, doubt in sorted(self._doubts.items()) if self._doubts else ():
            if doubt.standing is Standing.SUSPECT and now >= doubt.until:
                changes += self._become(name, Standing.DEAD, "nobody heard from it")
        return changes

    def stalled(self, now: float, pause: float = 0.0) -> None:
        """This node itself stood still, for `pause` seconds: it waits longer before it condemns anybody."""
        self.stretch, self._calm_since = min(2 * self.stretch, MAX_STRETCH), now
        for doubt in self._doubts.values():
            doubt.until += pause

    def _refute(self, epoch: int, incarnation: int) -> None:
        own = self.own
        if (epoch, incarnation) >= (own.epoch, own.incarnation):
            above = incarnation + 1 if epoch == own.epoch else own.incarnation
            self._records[self.name] = MemberRecord(
                own.name, own.epoch, above, leaving=own.leaving, address=own.address
            )

    def _become(self, name: str, standing: Standing, why: str, until: float = 0.0) -> list[Change]:
        before = self.standing(name)
        if before is standing:
            return []
        self._live = None
        if standing is Standing.ALIVE:
            del self._doubts[name]
        else:
            self._doubts[name] = Doubt(standing, until)
        return [Change(name, before, standing, why)]

    def _knows(self, name: str) -> bool:
        place = bisect.bisect_left(self._names, name)
        return place < len(self._names) and self._names[place] == name


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of what was heard."""

    changes: tuple[Change, ...]
    news: tuple[MemberRecord, ...]  # to pass on: they were new here
    believed: tuple[Hint, ...]  # to pass on: they were new here
    doubted: tuple[Hint, ...]  # to tell those at whom they hint, who live
