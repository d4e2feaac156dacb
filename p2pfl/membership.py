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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from p2pfl.messages import Hint, MemberRecord

OTHERS = "others have lost it"
MAX_STRETCH = 8.0  # how many times longer one waits at most before one condemns others
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
class Entry:
    """What is known of one member."""

    record: MemberRecord
    standing: Standing = Standing.ALIVE
    until: float = 0.0  # when a suspicion becomes death


def newer(record: MemberRecord | Hint, than: MemberRecord | Hint) -> bool:
    """Whether this is of a later start of the member, or of a later refutation within the same one."""
    return (record.epoch, record.incarnation) > (than.epoch, than.incarnation)


def suspicion_timeout(base: float, members: int, stretch: float) -> float:
    """Seconds from suspicion to death: time for a rumour to reach the accused and its answer to come back.

    A rumour needs about log2 n hops where the graph is a good one; `base` covers what eight members need.
    """
    return base * max(1.0, (max(members, 2) - 1).bit_length() / 3) * stretch


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
        self._entries = {other: Entry(MemberRecord(other, 0, 0)) for other in sorted({*names, name})}
        self._entries[name].record = MemberRecord(name, epoch, 0, address=address)

    # -- What is known -----------------------------------------------------------------------------------------------

    @property
    def own(self) -> MemberRecord:
        """The record of this node itself, as it stands (not signed: that is done where it is sent)."""
        return self._entries[self.name].record

    @property
    def live(self) -> tuple[str, ...]:
        """The names of all who are neither dead nor gone, sorted; this node always is one of them."""
        return tuple(n for n, e in self._entries.items() if e.standing in (Standing.ALIVE, Standing.SUSPECT))

    @property
    def deadline(self) -> float:
        """When the next suspicion becomes death; infinity if there is none."""
        due = (entry.until for entry in self._entries.values() if entry.standing is Standing.SUSPECT)
        return min(due, default=float("inf"))

    def standing(self, name: str) -> Standing:
        return self._entries[name].standing

    def address(self, name: str) -> str:
        """Where this member said that it listens; empty if it never did."""
        return self._entries[name].record.address

    def records(self) -> tuple[MemberRecord, ...]:
        """The newest record of everybody who ever made one, for those who may have missed it."""
        return tuple(entry.record for entry in self._entries.values() if entry.record.epoch > 0)

    def hints(self) -> tuple[Hint, ...]:
        """Whom this node believes to be gone, or about to be."""
        doubted = (e.record for e in self._entries.values() if e.standing in (Standing.SUSPECT, Standing.DEAD))
        return tuple(Hint(record.name, record.epoch, record.incarnation) for record in doubted)

    # -- What comes in -----------------------------------------------------------------------------------------------

    def heard(self, records: Sequence[MemberRecord], hints: Sequence[Hint], fresh: Iterable[str], now: float) -> Heard:
        """Take in what a neighbour passed on; the records were verified before, each is its owner's.

        `fresh` are those of whom this node itself has a recent sign of life: a hint at them is not believed, but told
        to them, so that they refute it also where nobody hears from them directly.
        """
        changes: list[Change] = []
        news: list[MemberRecord] = []
        for record in records:
            entry = self._entries.get(record.name)
            if entry is None or not newer(record, entry.record):
                continue
            if record.name == self.name:  # a former life of ours is still spoken of: the present one goes on above it
                self._refute(record.epoch, record.incarnation)
                news.append(self.own)
                continue
            entry.record = record
            news.append(record)
            changes += self._become(record.name, Standing.LEFT if record.leaving else Standing.ALIVE, "")
        seen = set(fresh)
        believed: list[Hint] = []
        doubted: list[Hint] = []
        for hint in hints:
            entry = self._entries.get(hint.name)
            if entry is None or newer(entry.record, hint):
                continue
            if hint.name == self.name:
                self._refute(hint.epoch, hint.incarnation)
                news.append(self.own)
            elif hint.name in seen:
                doubted.append(hint)
            elif entry.standing is Standing.ALIVE:
                changes += self.suspect(hint.name, OTHERS, now)
                believed.append(hint)
        return Heard(tuple(changes), tuple(news), tuple(believed), tuple(doubted))

    def sign_of_life(self, name: str) -> list[Change]:
        """This node itself heard from the member."""
        entry = self._entries.get(name)
        return [] if entry is None or entry.standing is Standing.ALIVE else self._become(name, Standing.ALIVE, "")

    def suspect(self, name: str, why: str, now: float) -> list[Change]:
        """This node itself lost the member, or believes those who did."""
        entry = self._entries.get(name)
        if entry is None or entry.standing is not Standing.ALIVE or name == self.name:
            return []
        entry.until = now + suspicion_timeout(self._suspicion, len(self._entries), self.stretch)
        return self._become(name, Standing.SUSPECT, why)

    def left(self, name: str) -> list[Change]:
        """The member said goodbye to this node itself."""
        entry = self._entries.get(name)
        return [] if entry is None or entry.standing is Standing.LEFT else self._become(name, Standing.LEFT, "")

    def leave(self) -> MemberRecord:
        """The record that tells the others that this node leaves."""
        record = self.own
        self._entries[self.name].record = MemberRecord(
            record.name, record.epoch, record.incarnation + 1, leaving=True, address=record.address
        )
        return self.own

    # -- What time brings --------------------------------------------------------------------------------------------

    def pass_time(self, now: float) -> list[Change]:
        """Suspicions that were not refuted in time become deaths."""
        if self.stretch > 1.0 and now >= self._calm_since + CALM:
            self.stretch, self._calm_since = self.stretch / 2, now
        changes: list[Change] = []
        for name, entry in self._entries.items():
            if entry.standing is Standing.SUSPECT and now >= entry.until:
                changes += self._become(name, Standing.DEAD, "nobody heard from it")
        return changes

    def stalled(self, now: float, pause: float = 0.0) -> None:
        """This node itself stood still, for `pause` seconds: it waits longer before it condemns anybody."""
        self.stretch, self._calm_since = min(2 * self.stretch, MAX_STRETCH), now
        for entry in self._entries.values():
            entry.until += pause

    def _refute(self, epoch: int, incarnation: int) -> None:
        own = self.own
        if (epoch, incarnation) >= (own.epoch, own.incarnation):
            above = incarnation + 1 if epoch == own.epoch else own.incarnation
            self._entries[self.name].record = MemberRecord(
                own.name, own.epoch, above, leaving=own.leaving, address=own.address
            )

    def _become(self, name: str, standing: Standing, why: str) -> list[Change]:
        entry = self._entries[name]
        before, entry.standing = entry.standing, standing
        return [] if before is standing else [Change(name, before, standing, why)]


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of what was heard."""

    changes: tuple[Change, ...]
    news: tuple[MemberRecord, ...]  # to pass on: they were new here
    believed: tuple[Hint, ...]  # to pass on: they were new here
    doubted: tuple[Hint, ...]  # to tell those at whom they hint, who live
