"""What there is in a simulated world: time, machines with disks, processes that live on them, links between those.

Only state, the order of time, and the rules of a disk. `engine` and `links` say what happens, `invariants` what holds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from p2pfl.asynchronous import OUTSTANDING
from p2pfl.messages import (
    LAST,
    Accusation,
    Compute,
    Computed,
    Contribution,
    Folded,
    Gathering,
    Goodbye,
    Gossip,
    Heartbeat,
    Leave,
    MaskKey,
    MemberRecord,
    Message,
    Receipt,
    Scores,
    Trained,
    Update,
)
from p2pfl.node import Node
from p2pfl.sim.faults import CrashAtDeed, Lied
from p2pfl.weights import Neighbourhood, Stake

NO_SCORES = Scores({})
TOLD_SHOWN = 16  # members in a line of the trace

Action = Callable[[], None]


class Clock:
    """Virtual time: what shall happen when. Equal times come in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Action]] = []
        self._serial = itertools.count()

    def at(self, when: float, action: Action) -> None:
        heapq.heappush(self._queue, (when, next(self._serial), action))

    def after(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._serial), action))

    def run(self, until: float) -> None:
        """Let everything happen that shall happen by then."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= until:
            self.now, _, action = pop(queue)
            action()


# -- What a node works on --------------------------------------------------------------------------------------------


class Worker(Protocol):
    """One node's model, as far as the engine knows it: anything that can be mixed by weights."""

    @property
    def reading(self) -> float:
        """A fixed linear function of the vector, the same at every node: what the ledger of the mean adds up."""

    @property
    def rounding(self) -> float:
        """By how much a fold may err in the reading, relative to the largest one in it (or to 1)."""

    @property
    def averages(self) -> bool:
        """Whether a fold is the weighted mean of what came and the own vector, as it was sent."""

    def fold(self, job: Compute) -> Folded:
        """Mix the contributions of this job into the own vector."""

    def check(self, vector: object, mass: float) -> None:
        """BadMessage if a vector that came must not be averaged."""

    def train(self, job: Compute) -> tuple[Trained, object]:
        """One round of training; and the vector as it is sent, which later calls must not change.

        TrainingFailed if there is none that others would take.
        """

    def state(self) -> object:
        """A copy of all that one needs to go on from here."""

    def restore(self, state: object) -> None:
        """Go on from what `state` gave."""


class Number:
    """A model of one number, which training draws `rate` of the way to a `target` of its own."""

    rounding = 1e-9  # far above that of float64, far below what matters

    def __init__(self, value: float, target: float, rate: float, schedule: str = "sync") -> None:
        self.value, self._target, self._rate = value, target, rate
        self._sums = schedule == "push-sum"
        self._running = 0.0  # of all that was handed out to one neighbour
        self._taken: dict[str, float] = {}  # peer → its running sum as it came last
        self._sent: dict[int, float] = {}  # the newest ones, by round

    @property
    def averages(self) -> bool:
        """See `Worker.averages`."""
        return not self._sums

    @property
    def reading(self) -> float:
        return self.value

    def fold(self, job: Compute) -> Folded:
        own = 1.0 - math.fsum(c.weight for c in job.contributions) if job.kept is None else job.kept
        terms = [own * self.value]
        for contribution in job.contributions:
            assert isinstance(contribution.vector, float)
            terms.append(contribution.weight * (contribution.vector - self._reference(contribution)))
            if self._sums:
                self._taken[contribution.peer] = contribution.vector
        self.value = math.fsum(terms)
        if job.restart:
            self._running = 0.0
        return Folded(NO_SCORES, 0.0, 0.0, 0.0)

    def _reference(self, contribution: Contribution) -> float:
        if contribution.reference is None:
            return 0.0
        if contribution.reference == LAST:
            return self._taken[contribution.peer]
        return self._sent[contribution.reference]

    def check(self, vector: object, mass: float) -> None:
        """A number is always good."""

    def train(self, job: Compute) -> tuple[Trained, object]:
        self.value += job.step * self._rate * (self._target - self.value)
        self._running += job.portion * self.value
        self._sent[job.round] = self.value
        self._sent.pop(job.round - OUTSTANDING, None)
        return Trained(0.0, NO_SCORES, 0.0, 0.0), self._running if self._sums else self.value

    def state(self) -> object:
        return self.value

    def restore(self, state: object) -> None:
        assert isinstance(state, float)
        self.value = state


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """The truth about one vector that somebody made. The books are full of them, and so do not hold the vectors."""

    sender: str
    epoch: int
    round: int
    members: tuple[str, ...]  # over whom its maker's graph was
    reading: float


@dataclass(frozen=True, slots=True, eq=False)
class Cargo:
    """What an update brings."""

    parcel: Parcel
    vector: object
    # For which sum it was made. The masks are left out here: they vanish, or what is left is noise and must not count.
    gathering: Gathering | None = None


# -- A disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saved:
    """A resume point, as `checkpoint.Checkpoint`."""

    number: int  # counts those of this machine
    round: int
    mass: float
    state: object


@dataclass(slots=True, eq=False)
class File:
    content: Saved | None  # None: torn
    synced: bool = False


DRAFT, NEWEST, PREVIOUS = "draft", "newest", "previous"


class Disk:
    """Files of one folder. Without power, what was not synced is torn, and names are as they were at some moment since.

    As a journalling file system does it: names change in order, and all of them are safe once the folder is synced.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.full = 0  # reasons why nothing can be written
        self.files: dict[str, File] = {}
        self._safe: dict[str, File] = {}
        self._unsafe: list[dict[str, File]] = []  # how the folder looked after each change since it was synced

    def write(self, name: str, content: Saved) -> None:
        """OSError if the disk is full."""
        if self.full:
            raise OSError("No space left on device")
        self.files[name] = File(content)
        self._unsafe.append(dict(self.files))

    def sync(self, name: str) -> None:
        self.files[name].synced = True

    def rename(self, name: str, to: str) -> None:
        if name in self.files:
            self.files[to] = self.files.pop(name)
            self._unsafe.append(dict(self.files))

    def sync_folder(self) -> None:
        self._safe, self._unsafe = dict(self.files), []

    def lose_power(self, random: np.random.Generator) -> None:
        """Come to some state that the rules allow."""
        folders = [self._safe, *self._unsafe]
        self.files = dict(folders[int(random.integers(len(folders)))])
        for file in self.files.values():
            if not file.synced:
                file.content = None
        self.sync_folder()

    def read(self) -> Saved | None:
        """The newest whole generation, as `checkpoint.read`."""
        for name in (NEWEST, PREVIOUS):
            if name in self.files and self.files[name].content is not None:
                return self.files[name].content
        return None


# The steps of `checkpoint.write`, in order.
CHECKPOINT_STEPS: tuple[tuple[str, ...], ...] = (
    ("write", DRAFT),
    ("sync", DRAFT),
    ("rename", NEWEST, PREVIOUS),
    ("rename", DRAFT, NEWEST),
    ("sync folder",),
)


# -- Machines, processes, links --------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Machine:
    """Where one node lives. It outlasts its processes."""

    name: str
    mass: float
    compute_seconds: float
    disk: Disk = field(default_factory=Disk)
    life: Life | None = None
    left: bool = False  # its node has finished, or was asked to leave: it is not started again
    finished: bool = False
    slowness: float = 1.0
    wall_clock: float = 0.0  # seconds by which it is wrong; nobody reads it
    lies: list[Lied] = field(default_factory=list)
    lied: bool = False  # ever
    deeds: int = 0  # done so far, by all its processes
    doom: dict[int, CrashAtDeed] = field(default_factory=dict)  # deed before which it ends
    checkpoints: int = 0  # begun
    saved: int = 0  # the newest of them that was said to be written
    round: int = 0  # that its newest process works on, or did
    reading: float = 0.0  # of its newest vector
    sent: int = 0  # updates, by all its processes
    received: int = 0
    deserted: list[Way] = field(default_factory=list)  # a loss of power left them standing at the other end


@dataclass(slots=True, eq=False)
class Seen:
    """What a process has got of another one, as `link` remembers it."""

    epoch: int
    round: int = -1  # the newest round whose update came whole
    parcels: OrderedDict[int, Parcel] = field(default_factory=OrderedDict)  # the newest ones, by the round told


@dataclass(slots=True, eq=False)
class Life:
    """One process of a node, from its start to its end."""

    machine: Machine
    name: str
    epoch: int
    node: Node
    worker: Worker
    began: float
    alive: bool = True
    ways: dict[str, Way] = field(default_factory=dict)  # to each peer whose link is up
    ends: dict[Way, None] = field(default_factory=dict)  # those, and the ones that are being made
    dials: dict[str, float] = field(default_factory=dict)  # peer with whom it tries to keep a link → since when
    broken: dict[str, float] = field(default_factory=dict)  # peer → when a link broke that may be wanted again
    gone: set[str] = field(default_factory=set)  # peers that said goodbye
    barred: dict[str, float] = field(default_factory=dict)  # peer → until when it is kept out
    seen: dict[str, Seen] = field(default_factory=dict)
    said_round: int = 0  # in a hello
    save: bool = False  # with the next job
    job: Compute | None = None
    outcome: Computed | Leave | None = None  # of the job
    job_due: float = 0.0
    worked_since: float = math.inf  # when its first job began
    alarm: float = math.inf  # when it is woken next
    pauses: int = 0  # reasons for which it stands still
    paused_at: float = 0.0
    inbox: deque[tuple[Way, Parcelled]] = field(default_factory=deque)  # what came while it stood still
    done_at: float = 0.0
    # What the invariants look at.
    deadline: float | None = None  # of the node, after the event in hand
    round: int = 0
    known: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # peer → epoch, heard, confirmed
    own: Parcel | None = None  # of the round in progress
    cargo: Cargo | None = None  # that brings it
    parts_due: float = 0.0  # when the last part of a sum is made that is under way
    asked: dict[int, Gathering] = field(default_factory=dict)  # for whose sum, in the newest rounds
    made: dict[int, Parcel] = field(default_factory=dict)  # the newest ones, by round
    epochs: dict[str, int] = field(default_factory=dict)  # peer → the newest of its processes that said hello
    stake: Stake | None = None  # of the round in progress
    greeted: dict[str, float] = field(default_factory=dict)  # peer → the mass that its hello said
    counted: dict[str, float] = field(default_factory=dict)  # the same, when the round began
    receipts: dict[str, set[int]] = field(default_factory=dict)  # peer → rounds that it confirmed
    members: tuple[str, ...] = ()  # over whom its graph is
    part: Callable[[int], Neighbourhood] = field(init=False)  # of that graph
    records: dict[str, MemberRecord] = field(default_factory=dict)  # member → the newest that was known of it
    came: dict[tuple[Parcel, int], Stake] = field(default_factory=dict)  # with the round told: what the node took
    folded: set[tuple[Parcel, int]] = field(default_factory=set)
    heard: dict[str, float] = field(default_factory=dict)  # peer → when anything came of it
    down: dict[str, float] = field(default_factory=dict)  # peer → when its link broke
    alone_since: float = 0.0  # when the last link broke that it had

    @property
    def runs(self) -> bool:
        return self.alive and not self.pauses


@dataclass(frozen=True, slots=True)
class Hello:
    """What a `LinkUp` is made of."""

    epoch: int
    round: int
    mass: float
    seen: int
    answer: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """The head of an update, whose transfer takes time."""

    update: Update


@dataclass(frozen=True, slots=True)
class End:
    """The other end was closed, by its process or by its system."""

    why: str


Parcelled = Message | Hello | Offer | End


@dataclass(slots=True, eq=False)
class Way:
    """One direction of a link: two pipes that keep their order, one for updates and one for all else."""

    sender: Life
    receiver: Life
    since: float
    delay: float = 0.0  # seconds
    jitter: float = 0.0  # seconds on top, at most
    open: bool = True  # whether the receiver's end still takes what comes
    closed_at: float = math.inf  # when the sender's end went
    control_at: float = 0.0  # when the last control message arrives
    bulk_at: float = 0.0  # when the last update has arrived
    sending: Update | None = None
    waiting: Update | None = None
    free_at: float = 0.0  # when the sender knows that its last update has come
    cuts: int = 0  # reasons why nothing gets through
    held: deque[Parcelled] = field(default_factory=deque)  # what a cut holds back
    mute: int = 0  # reasons why the receiver hears nothing
    silence: int = 0  # counts the beginnings and ends of that
    last: Message | None = None  # that came, updates apart
    sent: set[Parcel] = field(default_factory=set)  # for the invariants
    back: Way = field(init=False)  # the other direction


def short(message: Parcelled) -> str:
    """A few words for the trace."""
    match message:
        case Heartbeat(round, view):
            return f"heartbeat {round} {view}"
        case Update(round, mass, reach, _):
            return f"update {round} {mass!r} {reach!r}"
        case Receipt(round):
            return f"receipt {round}"
        case Goodbye(round, reason):
            return f"goodbye {round} {reason}"
        case Gossip(records, hints):
            told = [f"{r.name}:{r.epoch}:{r.incarnation}{'-' if r.leaving else '+'}" for r in records[:TOLD_SHOWN]]
            told += [f"{h.name}:{h.epoch}:{h.incarnation}?" for h in hints[:TOLD_SHOWN]]
            return f"gossip of {len(records)} and {len(hints)}: {' '.join(told)}"
        case Accusation(name, code):
            return f"accusation {name} {code}"
        case MaskKey(name, epoch):
            return f"mask key {name} {epoch}"
        case Gathering(round, mass, reach, gives):
            return f"gathering {round} {mass!r} {reach!r} {gives} of {' '.join(message.names)}"
        case Offer(update):
            return f"offer {update.round}"
        case _:
            return type(message).__name__.lower()
