"""The state machine of one peer: when a round begins and ends, whom to wait for, and for how long.

It decides and touches nothing: no clock, socket, thread, file, tensor or random number. Time is an argument (seconds,
monotonic), parameters are opaque, and what is to be done comes back as a list of effects for the driver to perform.

    JOINING --all peers linked, or join_timeout--> COMPUTING --Computed--> COLLECTING
    COLLECTING --every live neighbour heard, or deadline--> COMPUTING | DONE

A round: fold what was collected, train, send, collect. A neighbour that is dead costs one `grace`, once; one that is
alive but slow is given a patience that grows with what was observed of it.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from p2pfl.asynchronous import ASKS_NOBODY, LEAST_SHARE, Answer, Exchanges, RunningSums, merge_by_age
from p2pfl.composition import LEAST_SENDERS
from p2pfl.conduct import Conduct
from p2pfl.gathering import Gatherings
from p2pfl.membership import OTHERS, Change, Membership, Standing
from p2pfl.messages import (
    OFFENCES,
    Accusation,
    Awaited,
    BadMessage,
    Compute,
    Computed,
    Conceal,
    Concealed,
    Connect,
    Contribution,
    Disconnect,
    Done,
    Effect,
    Event,
    Gathering,
    Goodbye,
    Gossip,
    Happened,
    Heartbeat,
    Hint,
    Leave,
    LinkDown,
    LinkUp,
    MaskKey,
    MemberRecord,
    Message,
    NeighbourStatus,
    Receipt,
    Received,
    Record,
    Rejected,
    RoundEnded,
    Save,
    Send,
    Status,
    Tick,
    Trained,
    Update,
    Value,
)
from p2pfl.weights import (
    FROM_WHOLE_GRAPH,
    LEAST_MASS,
    PUSH_SUM,
    Neighbourhood,
    Stake,
    Wiring,
    graph_reach,
    mass_after,
    reach,
    staleness_weight,
    weights_of,
)

WAITING_LINE = 5.0  # seconds of waiting before one says for whom, and between two such lines
OBSERVED_ROUNDS = 16  # how many lateness observations of a neighbour its patience is derived from
PATIENCE_FACTOR = 3.0  # times the median lateness: three times slower than usual is no longer "slow as usual"
MAX_PATIENCE = 3600.0  # seconds: who is late on purpose can delay a round by an hour, not for ever
ANTI_ENTROPY = 10  # heartbeats between two full accounts of all members, each to one neighbour by turns
MAX_TOLD = 128  # members in one message
MAX_MASS = 2.0**53  # no data set has more rows, nor have all together; and the sum of all masses stays finite
MAX_MISSED = 3  # rounds in a row that a neighbour is waited for in vain, and as many in step until it is again
MAX_STEP = 10.0  # times the learning rate: where lost messages have eaten the mass of push-sum, training stays stable


Partners = Callable[[int, tuple[str, ...]], tuple[str, ...]]


class Phase(Enum):
    JOINING = "joining"
    COMPUTING = "computing"
    COLLECTING = "collecting"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a node knows before anything happens. Times in seconds."""

    name: str
    rounds: int
    neighbours: tuple[str, ...] = ()  # those that are known by name at the start
    unnamed: int = 0  # peers that are only known by address until they say who they are
    open: bool = False  # whether whoever links is a neighbour, or only those in `neighbours`
    neighbourhood: Callable[[int], Neighbourhood] | None = None  # of a round, whoever lives; None: every neighbour
    members: tuple[str, ...] = ()  # all who may live, if there is a graph over them; else there are only neighbours
    wiring: Callable[[tuple[str, ...]], Wiring] | None = None  # the graph over those who live; None: no such graph
    address: str = ""  # where this node listens, for those who become its neighbours later
    epoch: int = 1
    suspicion: float = 10.0  # from the first suspicion to death and a new graph, if nothing newer is heard
    drift: int = 1  # rounds that the graph lets two neighbours come apart: more than 1 if it changes between rounds
    weights: str = "metropolis"
    two_way: bool = False  # fold an update only once its sender confirmed ours of the same round
    least: int = 1  # vectors, the own one included, below which there is nothing to be mixed
    mass: float = 1.0  # own weight in the mean
    held_mass: float | None = None  # after a resume: what push-sum had made of it
    equal_masses: bool = True  # whether everybody's mass must be 1
    checkpoint_every: int = 25  # rounds
    staleness: float = 0  # rounds that a neighbour may be behind without being waited for; inf: nobody is waited for
    schedule: str = "sync"  # of the others, "pairwise", "gossip" and "push-sum", none has rounds in common
    partners: Partners | None = None  # (round, linked) → who gets its update
    mask_key: MaskKey | None = None  # of this process, where nodes learn only sums of their neighbours' vectors …
    # … and who may be in a sum: (those who live, receiver) → its neighbours. None: any member, where no graph is known.
    senders: Callable[[tuple[str, ...], str], Sequence[str]] | None = None
    stale: bool = False  # after a resume: its vector is no model of any round
    join_timeout: float = 60.0
    heartbeat: float = 1.0
    silence: float = 6.0
    grace: float = 1.0
    patience: float = 5.0
    first_round: int = 0  # after a resume
    needs_state: bool = False  # what it had saved is damaged: it goes on from its neighbours' state, or not at all


@dataclass(slots=True)
class Neighbour:
    """What is known of one neighbour."""

    name: str
    linked: bool = False
    alive: bool = False  # it was linked once, and was neither silent nor away for too long since
    epoch: int = 0
    mass: float | None = None  # None until its first hello
    round: int = 0  # the newest that it claims to work on
    ahead_since: float | None = None  # since when that is later than the round that we work on
    offered: int = -1  # the newest round of which it began to send its update
    view: int = 0  # on which graph: a digest of those who live, as it sees it
    heard: int = -1  # the newest round of which its verified update came
    confirmed: int = -1  # the newest round of which it said that our update came …
    confirmed_view: int = 0  # … and on which graph it folds that
    updates: dict[int, Update] = field(default_factory=dict)  # verified, not yet folded
    last_sign: float = 0.0  # when anything valid came
    down_since: float = 0.0  # when its link broke
    sought_since: float | None = None  # when a link was asked for that never stood since
    updated_at: float = -math.inf  # when its last update came
    gone_after: int | None = None  # it said goodbye: its updates of rounds below this one were sent
    missed: int = 0  # rounds in a row that it was waited for in vain, and did not come nearer
    unconfirmed: int = 0  # rounds in a row that its receipt was waited for in vain
    behind: int = 0  # how many rounds it was behind at the last of them
    in_step: int = 0  # updates in a row that came in time
    gives: bool = True  # whether it can be asked for its part of a sum
    degraded: bool = False  # too slow to be waited for; what comes of it still counts, less the later it is
    lateness: deque[float] = field(default_factory=lambda: deque(maxlen=OBSERVED_ROUNDS))


@dataclass(slots=True)
class OwnUpdate:
    """What was sent, and to whom."""

    update: Update
    told: tuple[str, ...] | None  # None: every neighbour
    unsent: set[str]  # for whom it was meant, who had no link yet

    def is_for(self, peer: str) -> bool:
        return self.told is None or peer in self.told


def patience(observed: Sequence[Sequence[float]], floor: float) -> float:
    """How long to wait for living neighbours, from the lateness (s) seen of each: never below `floor` seconds."""
    usual = [statistics.median(lateness) for lateness in observed if lateness]
    return max(floor, min(PATIENCE_FACTOR * max(usual, default=0.0), MAX_PATIENCE))


def catch_up_round(own: int, claims: Sequence[int], ahead: float = 1) -> int:
    """The round to jump to, given the rounds of the live neighbours' verified updates; `own` if one is not behind.

    The lower median: no minority of neighbours, and no single lie, can move it. Up to `ahead` rounds it is no reason.
    """
    if not claims:
        return own
    median = sorted(claims)[(len(claims) - 1) // 2]
    return median if median > own + ahead else own


def view_of(members: Sequence[str], all_members: Sequence[str]) -> int:
    """A digest of who lives, 32 bits: 0 for all members."""
    if len(members) == len(all_members):
        return 0
    return zlib.crc32("\n".join(members).encode()) or 1


class Node:
    """One peer. Feed it events with `handle`, perform what it returns, wake it at `deadline`."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        self.phase = Phase.JOINING
        self.round = settings.first_round  # the one that is trained, or whose updates are collected
        self.conduct = Conduct()
        self.neighbours = {name: Neighbour(name) for name in sorted(settings.neighbours)}
        # A neighbour has our update of the round that we collect, and may go `staleness` rounds on without the next.
        self._ahead = max(settings.staleness + 1, settings.drift)
        self._push_sum = settings.weights in PUSH_SUM
        self._ages = settings.schedule == "gossip"  # the mass of an update is for how many rounds its model has learnt
        self._whole_graph = settings.weights in FROM_WHOLE_GRAPH
        self._now = now  # time of the event in hand, or of the last one
        self._effects: list[Effect] = []  # of the event in hand
        self._waiting_since = self._computing_since = now
        self._collected_since: dict[int, float] = {}  # newest rounds → when their collecting began
        self._waited_from = settings.first_round  # since it started, or caught up: for earlier rounds it did not wait
        self._lacks_state = settings.needs_state
        self._first_state_at = math.inf  # when a neighbour gave its own, while this node lacks one
        self._next_heartbeat = now + settings.heartbeat
        self._next_waiting_line = now + WAITING_LINE
        self._mass = settings.mass if settings.held_mass is None else settings.held_mass  # only push-sum changes it
        self._reach = self._mass  # of the round in progress
        least = LEAST_SHARE * settings.mass
        self._sums = RunningSums(self._mass, least, MAX_MASS) if settings.schedule == "push-sum" else None
        self._counted: dict[str, float] = {}  # whose mass is in the reach, and which
        self.membership: Membership | None = None
        self._wiring: Wiring | None = None
        if settings.neighbourhood is not None:
            self._wiring = Wiring(settings.neighbours, settings.neighbourhood)
        self._view, self._old_view = 0, 0  # digest of the members of the present graph, and of the one before
        self._old_wiring: Wiring | None = None
        self._members = settings.members
        if settings.wiring is not None:
            self._wiring = settings.wiring(settings.members)
            self.membership = Membership(
                settings.name, settings.members, settings.epoch, settings.address, settings.suspicion
            )
        self._beats = 0
        self._news: dict[str, MemberRecord] = {}  # by member, to pass on with the next heartbeat: nobody waits for it
        self._told: tuple[str, ...] | None = None  # who gets the update of the round in progress; None: everybody
        # The newest two: a neighbour may still need the one before, if it was lost when we already went on.
        self._own_updates: list[OwnUpdate] = []
        self._exchanges = Exchanges() if settings.schedule == "pairwise" else None
        self._gatherings = None if settings.mask_key is None else Gatherings(settings.mask_key)
        if self._gatherings is not None and settings.stale:
            self._gatherings.is_behind(0.0)
        self._trained: Trained | None = None
        self._took_part = settings.first_round > 0  # its vector holds something of others'
        self._folds_late = settings.drift <= 1 and not (settings.two_way or self._push_sum)
        self._alone = False
        self._merged: tuple[str, ...] = ()
        self._missing: tuple[str, ...] = ()
        self._waited = 0.0
        self._leaving = False
        self._goodbye_message = Goodbye(0, "leaving")
        self._here = self._part(self.round)
        self._deadline = self._next_deadline()

    # -- What the driver asks ----------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """When to send a Tick if nothing happens before; None when done. As of the last event."""
        return self._deadline

    def _next_deadline(self) -> float | None:
        match self.phase:
            case Phase.DONE:
                return None
            case Phase.COMPUTING:
                return self._next_heartbeat
            case Phase.COLLECTING if self._gives_still():
                return self._next_heartbeat
            case Phase.JOINING | Phase.COLLECTING:
                awaited = self._awaited()
                returns = [n.down_since + self.settings.grace for n in awaited if n.alive and not n.linked]
                passed = [self._passed_us_by(n) for n in awaited if self.phase is Phase.COLLECTING]
                return min(self._next_heartbeat, self._next_waiting_line, self._waits_until(awaited), *returns, *passed)

    def status(self, now: float) -> Status:
        """What there is to say at time `now` to whoever asks: it changes nothing."""
        everybody = self.neighbours.values()
        membership = self.membership
        since = {Phase.COMPUTING: self._computing_since, Phase.DONE: self._now}.get(self.phase, self._waiting_since)
        return Status(
            name=self.settings.name,
            epoch=self.settings.epoch,
            phase=self.phase.value,
            round=self.round,
            rounds=self.settings.rounds,
            seconds=now - since,
            awaited=self._why_waiting(now),
            neighbours=tuple(self._status_of(n, now) for n in everybody),
            living=1 + sum(n.alive for n in everybody) if membership is None else len(membership.live),
            members=1 + len(everybody) if membership is None else len(self.settings.members),
            alone=not any(n.linked and n.alive and n.gone_after is None for n in everybody),
            address=self.settings.address,
            rejected=dict(self.conduct.counts),
        )

    def _why_waiting(self, now: float) -> tuple[Awaited, ...]:
        if self.phase not in (Phase.JOINING, Phase.COLLECTING):
            return ()
        since, until = now - self._waiting_since, self._waits_until()
        left = max(0.0, until - now)
        if self.phase is Phase.COLLECTING:
            return tuple(
                Awaited(n.name, self._missing_of(n), since, left, max(0.0, min(until, self._given_up_at(n)) - now))
                for n in self._awaited()
            )
        others = sum(n.linked and n.name not in self.settings.neighbours for n in self.neighbours.values())
        names = [*self.awaited(), *[""] * (self.settings.unnamed - others)]
        return tuple(Awaited(name, "its link", since, left, left) for name in names)

    def _missing_of(self, neighbour: Neighbour) -> str:
        """What is awaited of it, in words."""
        if self._only_hears_us(neighbour.name):
            what = f"word that it has come to round {self.round}"
        elif neighbour.heard >= self._needed:
            what = f"word that our update of round {self.round} came"
        else:
            what = f"its update of round {self._needed:.0f}"
        return what if neighbour.linked else f"its link, and {what}"

    def _given_up_at(self, neighbour: Neighbour) -> float:
        """When it is no longer waited for, if nothing is heard from it."""
        settings = self.settings
        last = neighbour.last_sign + settings.silence if neighbour.linked else neighbour.down_since + settings.grace
        return min(last, self._passed_us_by(neighbour))

    def _status_of(self, neighbour: Neighbour, now: float) -> NeighbourStatus:
        if neighbour.gone_after is not None:
            standing = "finished" if neighbour.gone_after >= self.settings.rounds else "left"
        elif self.membership is not None:
            standing = self.membership.standing(neighbour.name).value
        elif neighbour.epoch == 0:
            standing = "absent"
        else:
            doubt = Standing.ALIVE if neighbour.linked else Standing.SUSPECT
            standing = (doubt if neighbour.alive else Standing.DEAD).value
        return NeighbourStatus(
            name=neighbour.name,
            linked=neighbour.linked,
            alive=neighbour.alive,
            standing=standing,
            round=neighbour.round,
            last_sign=now - neighbour.last_sign if neighbour.epoch > 0 else None,
            lateness=statistics.median(neighbour.lateness) if neighbour.lateness else None,
        )

    def check_offer(self, peer: str, round: int) -> None:
        """BadMessage if an update of this round is not wanted from this peer; asked before anything is allocated.

        If it is wanted, the peer is taken to have begun with it.
        """
        neighbour = self.neighbours.get(peer)
        if neighbour is None:
            raise BadMessage("not_a_neighbour", f"{peer} is in the roster, but no neighbour of {self.settings.name}")
        if round <= neighbour.heard:
            raise BadMessage("stale", f"round {round}, when round {neighbour.heard} has already come")
        if round >= self.settings.rounds:
            raise BadMessage("future", f"round {round} of an experiment with {self.settings.rounds}")
        if round > self._horizon():
            raise BadMessage("future", f"round {round}, when {self.settings.name} and most others are at {self.round}")
        if peer not in self._part(round).hears and neighbour.view == self._view:  # else it sees other members living
            raise BadMessage("not_a_neighbour", f"the graph of round {round} has no edge from {peer} to here")
        if len(neighbour.updates) >= 2 and self.settings.staleness == 0:  # or else they make room for what is newer
            raise BadMessage("busy", f"{len(neighbour.updates)} updates of {peer} wait to be folded")
        neighbour.offered = max(neighbour.offered, round)

    @property
    def gathering(self) -> Gathering | None:
        """The sum that this node asked for last; None where vectors come alone."""
        return None if self._gatherings is None else self._gatherings.asked

    def awaited(self) -> tuple[str, ...]:
        """Whom this node waits for at the moment."""
        return tuple(n.name for n in self._awaited())

    # -- What happens ------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at time `now` and return what is to be done, in order."""
        if self.phase is not Phase.DONE:
            self._forgive_own_pause(now)
            self._now = now
            self._take_in(event)
            self._let_time_pass()
        elif isinstance(event, LinkUp) and event.peer in self.neighbours:  # it still needs what we sent last
            self._send_again(event, 2)
            if self._gatherings is not None:
                self._give_again(self._gatherings, event)
            self._send((event.peer,), self._goodbye_message)
        self._deadline = self._next_deadline()
        effects, self._effects = self._effects, []
        return effects

    def _take_in(self, event: Event) -> None:
        match event:
            case LinkUp():
                self._link_up(event)
            case LinkDown(peer, why):
                self._link_down(peer, why)
            case Received(peer, message):
                self._sign_of_life(peer)
                match message:
                    case Update():
                        self._update(peer, message)
                    case Heartbeat(round, view):
                        self._claim(peer, round)
                        if peer in self.neighbours:
                            self.neighbours[peer].view = view
                    case Gossip(records, hints):
                        self._gossip(peer, records, hints)
                    case Receipt(round, view):
                        self._receipt(peer, round, view)
                    case Accusation():
                        self._accused(peer, message)
                    case MaskKey() | Gathering():
                        self._about_sums(peer, message)
                    case Goodbye(round, reason):
                        self._goodbye(peer, round, reason)
            case Rejected():
                self._rejected(event)
            case Computed():
                self._computed(event)
            case Concealed(job, sealed, why):
                self._concealed(job, sealed, why)
            case Leave(at_once):
                self._leave(at_once)
            case Tick():
                pass

    def _let_time_pass(self) -> None:
        if self.phase is Phase.DONE:
            return
        self._heartbeat()
        self._listen_for_silence()
        self._advance()
        self._say_whether_alone()
        self._say_why_waiting()

    def _forgive_own_pause(self, now: float) -> None:
        """Whoever was itself suspended (SIGSTOP, a laptop's lid) must not hold that time against the others."""
        deadline = self.deadline
        if deadline is None or now - deadline <= self.settings.silence / 2:
            return
        pause = now - self._now
        if self.membership is not None:
            self.membership.stalled(now, pause)
        self._waiting_since += pause
        self._first_state_at += pause
        for neighbour in self.neighbours.values():
            neighbour.last_sign += pause
            neighbour.down_since += pause
            if neighbour.ahead_since is not None:
                neighbour.ahead_since += pause
            if neighbour.sought_since is not None:
                neighbour.sought_since += pause

    def _link_up(self, event: LinkUp) -> None:
        if event.mass != 1.0 if self.settings.equal_masses else not 0 < event.mass <= MAX_MASS:
            allowed = "1" if self.settings.equal_masses else f"above 0, up to {MAX_MASS:.0e}"
            self._rejected(Rejected(event.peer, "bad_mass", f"it weighs {event.mass}; allowed is {allowed}"))
            return
        if event.peer not in self.neighbours:
            # A member may see a new graph, in which it is a neighbour, before this node does.
            if not self.settings.open and event.peer not in self.settings.members:
                return
            self.neighbours[event.peer] = Neighbour(event.peer)
            self.neighbours = dict(sorted(self.neighbours.items()))
            self._here = self._part(self.round)
        neighbour = self.neighbours[event.peer]
        back, same_process = neighbour.epoch > 0, neighbour.epoch == event.epoch
        if event.epoch > neighbour.epoch:  # a new start of its process: what the old one said no longer counts
            neighbour.round, neighbour.heard, neighbour.confirmed, neighbour.gone_after = 0, -1, -1, None
            neighbour.offered, neighbour.ahead_since = -1, None
            neighbour.missed, neighbour.unconfirmed, neighbour.in_step, neighbour.degraded = 0, 0, 0, False
            neighbour.updates.clear()
            if self._sums is not None:
                self._sums.forget(event.peer)
                if back:  # what is being made adds to a sum of which the process before it has taken a part
                    self._told = tuple(name for name in self._told or () if name != event.peer)
            neighbour.gives = True
            if self._exchanges is not None:
                self._exchanges.forget(event.peer)
            if self._gatherings is not None:
                self._gatherings.forget(event.peer)
        neighbour.linked, neighbour.alive, neighbour.sought_since = True, True, None
        neighbour.epoch, neighbour.mass, neighbour.last_sign = event.epoch, event.mass, self._now
        if neighbour.ahead_since is not None:  # it may have to send again what it had begun with
            neighbour.ahead_since, neighbour.offered = self._now, min(neighbour.offered, self.round - 1)
        self._claim(event.peer, event.round)
        self._note("returned" if back else "joined", peer=event.peer, epoch=event.epoch)
        if self.membership is not None:
            self._changed(self.membership.sign_of_life(event.peer))
            self._send((event.peer,), Heartbeat(self.round, self._view))
            self._tell_all((event.peer,))
        if self._gatherings is not None:
            self._ask_again(self._gatherings, event)
        elif self._sums is None or same_process or not back:  # or else the process before it has taken some of the sum
            self._send_again(event, 2 if same_process else 1)

    def _send_again(self, event: LinkUp, newest: int) -> None:
        """Send what the peer lacks: so many of the newest updates, which a broken link may have lost, and all for which
        it had no link yet: where the graph changes, one can be rounds ahead of a neighbour that starts late."""
        recent = self._own_updates[-newest:]
        for own in self._own_updates:
            never_sent = event.peer in own.unsent
            own.unsent.discard(event.peer)
            if event.seen < own.update.round and own.is_for(event.peer) and (never_sent or own in recent):
                self._send((event.peer,), own.update)
        if self.settings.two_way and self.round in self.neighbours[event.peer].updates:
            self._send((event.peer,), Receipt(self.round, self._view))  # which may have been under way, too

    def _link_down(self, peer: str, why: str) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is None or not neighbour.linked:
            return
        neighbour.linked = False
        neighbour.down_since = self._now
        if neighbour.alive and neighbour.gone_after is None:
            self._note("suspected", peer=peer, why=why)

    def _sign_of_life(self, peer: str) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is None or not neighbour.linked:
            return
        neighbour.last_sign = self._now
        if not neighbour.alive:
            neighbour.alive = True
            self._note("returned", peer=peer, epoch=neighbour.epoch)
            if self.membership is not None:
                self._changed(self.membership.sign_of_life(peer))

    def _update(self, peer: str, update: Update) -> None:
        try:
            self.check_offer(peer, update.round)
            if not self.neighbours[peer].linked:
                raise BadMessage("shut_out", f"round {update.round} was under way when {peer} was shut out")
        except BadMessage as error:
            self._rejected(Rejected(peer, error.code, error.why))
            return
        neighbour = self.neighbours[peer]
        neighbour.heard = update.round
        self._claim(peer, update.round)
        if update.round >= self._waited_from:
            neighbour.lateness.append(self._lateness(neighbour, update.round))
        neighbour.updated_at = self._now
        if self._push_sum and not (LEAST_MASS <= update.mass <= MAX_MASS and update.reach >= 1):
            why = f"round {update.round} is cut into {update.reach} portions of a mass of {update.mass}"
            self._rejected(Rejected(peer, "bad_mass", why, update.evidence))
        elif self._ages and not 1 <= update.mass <= MAX_MASS:
            why = f"round {update.round} claims to have learnt for {update.mass} rounds"
            self._rejected(Rejected(peer, "bad_mass", why, update.evidence))
        elif self._sums is not None and not self._sums.grows(peer, update):
            why = f"round {update.round} has handed out {update.mass} in all, and more before"
            self._rejected(Rejected(peer, "bad_mass", why, update.evidence))
        elif not (self._push_sum or self._ages) and update.mass != neighbour.mass:
            why = f"round {update.round} weighs {update.mass}, its hello said {neighbour.mass}"
            self._rejected(Rejected(peer, "bad_mass", why, update.evidence))
        else:
            self._count_if_in_step(neighbour, update.round)
            if self._exchanges is not None:
                self._exchange(self._exchanges, peer, update)
                if not self._lacks_state:
                    return
            if update.round < self._needed and not self._folds_late:
                return
            if self._sums is not None:  # of a sum only the newest counts; if it began anew, the end of the last as well
                ended = [(r, u) for r, u in neighbour.updates.items() if u.reach != update.reach]
                neighbour.updates = dict(ended[-1:])
            elif self.settings.staleness > 0 or self._lacks_state:
                neighbour.updates.clear()  # rounds are not kept in step, so only its newest model counts
            for late in [r for r in neighbour.updates if r < self._needed]:
                del neighbour.updates[late]  # what is newer stands in its place
            if self._lacks_state:
                self._first_state_at = min(self._first_state_at, self._now)
            neighbour.updates[update.round] = update
            if self.settings.two_way and update.round == self.round:
                self._send((peer,), Receipt(update.round, self._view))  # of a later one when it is its turn

    def _exchange(self, exchanges: Exchanges, peer: str, update: Update) -> None:
        """Take in an update in exchange for one of ours, if there is one that nobody has, and that is still folded."""
        newest = self._own_updates[-1].update.round if self._own_updates and self.round < self.settings.rounds else -1
        match exchanges.came(peer, update, newest):
            case Answer.NEWEST:
                self._own_updates[-1].told = (peer,)
                self._send((peer,), self._own_updates[-1].update)
            case Answer.DECLINED:
                self._send((peer,), Receipt(update.round, self._view))
                if self._told == (peer,):  # what is being made asks the same peer
                    self._told = ()

    def _count_if_in_step(self, neighbour: Neighbour, round: int) -> None:
        """Count how often it is in time, and restore who was too slow to be waited for."""
        if round < self._needed:
            neighbour.in_step = 0
            self._note("late", peer=neighbour.name, round=round)
            return
        neighbour.in_step, neighbour.missed = neighbour.in_step + 1, 0
        if neighbour.degraded and neighbour.in_step >= MAX_MISSED and neighbour.unconfirmed < MAX_MISSED:
            neighbour.degraded = False
            self._note("restored", peer=neighbour.name, round=round)

    def _miss(self, neighbour: Neighbour) -> None:
        """It was waited for in vain. If it comes no nearer in three such rounds, waiting does not help."""
        behind = self.round - neighbour.round
        nearer = neighbour.missed > 0 and behind < neighbour.behind
        neighbour.missed, neighbour.behind, neighbour.in_step = 1 if nearer else neighbour.missed + 1, behind, 0
        if neighbour.missed >= MAX_MISSED and not neighbour.degraded:
            neighbour.degraded = True
            self._note("degraded", peer=neighbour.name, round=self.round, behind=behind)

    def _miss_receipt(self, neighbour: Neighbour) -> None:
        """Its update came, but not the word that ours did. Who withholds that is not waited for without end, either."""
        neighbour.unconfirmed += 1
        if neighbour.unconfirmed >= MAX_MISSED and not neighbour.degraded:
            neighbour.degraded = True
            self._note("degraded", peer=neighbour.name, round=self.round, behind=0)

    def _lateness(self, neighbour: Neighbour, round: int) -> float:
        """How long its update of this round was waited for, or should have been; 0 if it came at once."""
        if round < self._needed:  # it missed a deadline; one round takes it no longer than the time since its last one
            since = max(self._collected_since.get(round, -math.inf), neighbour.updated_at)
            return min(self._now - since, MAX_PATIENCE)
        waited_for = self.phase is Phase.COLLECTING and round <= self.round
        return self._now - self._waiting_since if waited_for else 0.0

    def _claim(self, peer: str, round: int) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is not None and neighbour.round < round <= self.settings.rounds:
            if neighbour.round < self.round <= round and self._only_hears_us(peer):
                waited = self.phase is Phase.COLLECTING
                neighbour.lateness.append(self._now - self._waiting_since if waited else 0.0)
            neighbour.round = round
            if round > self.round and neighbour.ahead_since is None:
                neighbour.ahead_since = self._now

    def _receipt(self, peer: str, round: int, view: int) -> None:
        neighbour = self.neighbours.get(peer)
        if self._exchanges is not None:
            self._exchanges.declined(peer, round)
        elif neighbour is not None and neighbour.confirmed <= round <= self.round:
            neighbour.confirmed, neighbour.confirmed_view = round, view
            neighbour.unconfirmed = 0

    def _goodbye(self, peer: str, round: int, reason: str) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is not None and neighbour.gone_after is None:
            neighbour.gone_after = round
            self._note("left", peer=peer, reason=reason, round=round)
            if self.membership is not None and reason == "leaving":
                self._changed(self.membership.left(peer))

    def _rejected(self, event: Rejected) -> None:
        """Count a mistake. If it shuts its maker out, the neighbours are told, as far as there is something to show."""
        if self._judge(event) and event.evidence and event.code in OFFENCES:
            self._send(self._listeners(), Accusation(event.peer, event.code, event.evidence))

    def _accused(self, by: str, accusation: Accusation) -> None:
        """A neighbour has shut somebody out. On hearsay nobody is; but two updates for one round prove themselves.

        Not even then is it passed on: it is told by those who found it themselves, each once, and so floods nothing.
        """
        name, code, evidence = accusation.name, accusation.code, accusation.evidence
        if not self.conduct.accused(by, name, code):
            return
        self._note("accused", peer=name, by=by, code=code, evidence=tuple(item.hex() for item in evidence))
        # An old proof shown once more is no second offence.
        if code == "equivocation" and name != self.settings.name and not self.conduct.was_quarantined(name):
            self._judge(Rejected(name, code, f"{by} has two different updates that it signed for one round", evidence))

    def _judge(self, event: Rejected) -> bool:
        """Count a mistake; True if its maker is shut out for it."""
        verdict = self.conduct.rejected(event.peer, event.code, self._now)
        neighbour = self.neighbours.get(event.peer)
        if neighbour is not None:
            neighbour.heard = max(neighbour.heard, event.round)
        evidence: dict[str, Value] = {}
        if event.evidence:
            evidence["evidence"] = tuple(item.hex() for item in event.evidence)
        if verdict.log:
            fields: dict[str, Value] = {"peer": event.peer, "code": event.code, "why": event.why}
            if verdict.suppressed:
                fields["suppressed"] = verdict.suppressed
            self._note("rejected", **fields, **evidence)
        if verdict.quarantine:
            if neighbour is not None:
                neighbour.linked = neighbour.alive = False
                neighbour.updates.clear()
            if self._exchanges is not None:
                self._exchanges.forget(event.peer)
            self._effects.append(Disconnect(event.peer, verdict.quarantine))
            self._note("quarantined", peer=event.peer, code=event.code, seconds=verdict.quarantine, **evidence)
        return verdict.quarantine > 0

    def _computed(self, event: Computed) -> None:
        if event.folded is not None and self._trained is not None:
            if event.no_sum:
                self._note("no_sum", round=event.round - 1, why=event.no_sum)
                self._missing, self._merged = tuple(sorted((*self._missing, *self._merged))), ()
                if self._gatherings is not None:
                    self._gatherings.was_not_mixed()
            ended = RoundEnded(event.round - 1, self._trained, event.folded, self._merged, self._missing, self._waited)
            self._effects.append(Record(ended))
        if event.trained is None or event.update is None:
            self._finish(event.round == self.settings.rounds)  # earlier, where its owner lets no further one be sent
            return
        self._trained = event.trained
        listeners = self._listeners()
        own = OwnUpdate(
            Update(event.round, self._mass, self._reach, event.update),
            self._told,
            set(self._told or ()) - set(listeners),
        )
        older = [kept for kept in self._own_updates if kept.unsent and kept.update.round >= event.round - self._ahead]
        self._own_updates = [*older, *(kept for kept in self._own_updates[-1:] if kept not in older), own]
        self.phase = Phase.COLLECTING
        self._waiting_since = self._collected_since[event.round] = self._now
        self._collected_since.pop(event.round - OBSERVED_ROUNDS, None)
        self._next_waiting_line = self._now + WAITING_LINE
        self._send(tuple(name for name in listeners if own.is_for(name)), own.update)
        if self._gatherings is not None:
            self._give(self._gatherings)
        if self._leaving:
            self._finish(False)

    def _leave(self, at_once: bool) -> None:
        if self.phase is Phase.COMPUTING and not at_once:
            self._leaving = True  # what is being computed is still worth sending
        else:
            self._finish(False)

    def _finish(self, finished: bool) -> None:
        self.phase = Phase.DONE
        sent = self._own_updates[-1].update.round + 1 if self._own_updates else 0
        if self._gives_still():
            sent = self.round  # what is still being made is no longer sent
        self._goodbye_message = Goodbye(sent, "finished" if finished else "leaving")
        if self.membership is not None and not finished:
            self._send(self._listeners(), Gossip((self.membership.leave(),), ()))
        self._send(self._listeners(), self._goodbye_message)
        self._note("finished" if finished else "left", round=sent)
        self._effects.append(Done(finished))

    # -- What time brings --------------------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        if self._now >= self._next_heartbeat:
            self._next_heartbeat = self._now + self.settings.heartbeat
            listeners = self._listeners()
            self._send(listeners, Heartbeat(self.round, self._view))
            self._beats += 1
            news, self._news = tuple(self._news.values()), {}
            for start in range(0, len(news), MAX_TOLD):
                self._send(listeners, Gossip(news[start : start + MAX_TOLD], ()))
            if self.membership is not None and listeners and self._beats % ANTI_ENTROPY == 0:
                turn = self._beats // ANTI_ENTROPY % len(listeners)
                self._tell_all(listeners[turn : turn + 1])

    def _listen_for_silence(self) -> None:
        silence, grace = self.settings.silence, self.settings.grace
        for neighbour in self.neighbours.values():
            if not neighbour.alive:
                continue
            if neighbour.linked and self._now >= neighbour.last_sign + silence:
                why = f"no sign of life for {silence:g} s"
            elif not neighbour.linked and self._now >= neighbour.down_since + grace:
                why = f"its link did not come back within {grace:g} s"
            else:
                continue
            neighbour.alive = False
            if neighbour.gone_after is None:
                self._note("died", peer=neighbour.name, why=why)
                self._doubt(neighbour.name, why)
        if self.membership is None:
            return
        for neighbour in self.neighbours.values():
            if neighbour.sought_since is not None and self._now >= neighbour.sought_since + silence:
                neighbour.sought_since = None
                self._doubt(neighbour.name, f"no link to it within {silence:g} s")
        self._changed(self.membership.pass_time(self._now))

    def _say_whether_alone(self) -> None:
        """Without anybody to average with one trains on, and says so. Who finished leaves nobody alone."""
        if self.phase not in (Phase.COMPUTING, Phase.COLLECTING) or self.round >= self.settings.rounds:
            return
        everybody = self.neighbours.values()
        finished = bool(everybody) and all(n.gone_after is not None for n in everybody)
        alone = not finished and not any(n.alive for n in everybody)
        if alone and not self._alone:
            self._note("alone", round=self.round)
        self._alone = alone

    def _say_why_waiting(self) -> None:
        if self.phase not in (Phase.JOINING, Phase.COLLECTING) or self._now < self._next_waiting_line:
            return
        self._next_waiting_line = self._now + WAITING_LINE
        names = self.awaited() or ("peers that have not said who they are",)
        since, left = self._now - self._waiting_since, self._waits_until() - self._now
        self._note("waiting", peers=names, round=self.round, since=round(since, 1), left=round(left, 1))

    # -- Whom to wait for --------------------------------------------------------------------------------------------

    @property
    def _needed(self) -> float:
        """The oldest round whose updates still count."""
        return self.round - self.settings.staleness

    def _horizon(self) -> float:
        """The newest round whose updates are taken: a little ahead of us, or of most others if those are far ahead."""
        if self._lacks_state:
            return math.inf  # the updates themselves will show where most others are
        claims = [n.round for n in self.neighbours.values() if n.linked]
        return catch_up_round(self.round, claims, self._ahead) + self._ahead

    def _awaited(self) -> list[Neighbour]:
        match self.phase:
            case Phase.JOINING:
                return [n for n in self.neighbours.values() if not self._is_met(n) or self._may_give_its_state(n)]
            case Phase.COLLECTING:
                lost = () if self._gatherings is None else self._lost(self._gatherings)
                awaited = [n for n in self.neighbours.values() if self._is_awaited(n, lost)]
                company = any(
                    n.alive and not n.degraded and n.gone_after is None and n.name in self._here.hears
                    for n in self.neighbours.values()
                )
                return [n for n in awaited if not n.degraded] if company else awaited  # or one would run on alone
            case _:
                return []

    def _is_met(self, neighbour: Neighbour) -> bool:
        """Whether it is there, and has said all that one needs to begin."""
        return neighbour.linked and (self._gatherings is None or neighbour.name in self._gatherings.keys)

    def _may_give_its_state(self, neighbour: Neighbour) -> bool:
        return self._lacks_state and self._gatherings is None and not neighbour.updates

    def _part(self, round: int) -> Neighbourhood:
        """Whom this node hears and tells in a round."""
        if self._wiring is not None:
            return self._wiring.part(round)
        names = tuple(self.neighbours)
        return Neighbourhood(dict.fromkeys(names), names)

    def _only_hears_us(self, peer: str) -> bool:
        return peer in self._here.tells and peer not in self._here.hears

    def _is_awaited(self, neighbour: Neighbour, lost: Sequence[str] = ()) -> bool:
        """Whether something is missing that may still come: an update, or the word that it can go on.

        `lost`: whose part of a sum will not come.
        """
        if not neighbour.alive:
            return False
        if self._gatherings is not None:
            return self._is_awaited_for_a_sum(neighbour, self._gatherings, lost)
        if self._only_hears_us(neighbour.name):  # or we would run away from it, and it has no room for what we send
            return neighbour.gone_after is None and neighbour.round < self._needed
        if neighbour.name not in self._here.hears or not self._tells_us(neighbour):
            return False
        if neighbour.heard >= self._needed:
            unconfirmed = self.round in neighbour.updates and not self._is_confirmed(neighbour)
            return unconfirmed and neighbour.gone_after is None and self._now < self._passed_us_by(neighbour)
        if self._now >= self._passed_us_by(neighbour):
            return False
        if neighbour.gone_after is not None:  # its last update may be under way, or come again within the grace
            return neighbour.gone_after > self._needed
        # Or else what it sends next is too new for us; the horizon is never nearer than this.
        return neighbour.round <= self.round + self._ahead or neighbour.round <= self._horizon()

    def _is_awaited_for_a_sum(self, neighbour: Neighbour, gatherings: Gatherings, lost: Sequence[str]) -> bool:
        """Whether its part of our sum may still come, or it will ask for ours: it has not begun our round."""
        if not lost and neighbour.name in gatherings.asked.names:
            return neighbour.heard < self.round
        here = neighbour.name in self._here.hears and self._tells_us(neighbour)
        return here and neighbour.gone_after is None and neighbour.round < self.round

    def _lost(self, gatherings: Gatherings) -> tuple[str, ...]:
        """Those whose part of our sum will not come: without it, what comes of the others is worth nothing."""
        lost = []
        for key in gatherings.asked.keys:
            neighbour = self.neighbours[key.name]
            if neighbour.heard >= self.round:
                here = self.round in neighbour.updates  # or it came, and was refused
            else:
                left = neighbour.gone_after is not None and neighbour.gone_after <= self.round
                here = neighbour.alive and not left and self._now < self._passed_us_by(neighbour)
            if not here or neighbour.epoch != key.epoch:
                lost.append(key.name)
        return tuple(lost)

    def _passed_us_by(self, neighbour: Neighbour) -> float:
        """When it is clear that what we wait for will not come: it went on long ago, and did not even begin to send."""
        under_way = neighbour.heard < self.round <= neighbour.offered
        if neighbour.ahead_since is None or under_way or self.settings.staleness > 0:
            return math.inf
        return max(neighbour.ahead_since, self._waiting_since) + self.settings.grace

    def _tells_us(self, neighbour: Neighbour) -> bool:
        """Whether its graph of this round has the edge as well: it sees the same members, or still those of before."""
        if neighbour.view == self._view:
            return True
        before = self._old_wiring.part(self.round).hears if self._old_wiring is not None else {}
        return neighbour.view == self._old_view and neighbour.name in before

    def _is_confirmed(self, neighbour: Neighbour) -> bool:
        """Whether it has said what becomes of our update of this round, where that matters."""
        return not self.settings.two_way or neighbour.confirmed == self.round

    def _may_fold(self, neighbour: Neighbour) -> bool:
        """The two-way-live rule: an edge counts if both ends have the other's update, know it, and see one graph."""
        return not self.settings.two_way or (
            neighbour.confirmed == self.round and neighbour.confirmed_view == self._view
        )

    def _patience(self, neighbours: Sequence[Neighbour]) -> float:
        floor = self.settings.patience * self.settings.drift  # so many rounds it may still have before it
        if self.round == self.settings.first_round:  # everybody still warms up, and nothing was observed yet
            floor = max(floor, self.settings.join_timeout)
        return patience([n.lateness for n in neighbours], floor)

    def _waits_until(self, awaited: Sequence[Neighbour] | None = None) -> float:
        """When one goes on without those who are awaited."""
        if self.phase is Phase.JOINING:
            until = self._waiting_since + self.settings.join_timeout
            if any(n.updates for n in self.neighbours.values()):  # a state: the others' are not waited for much longer
                until = min(until, self._first_state_at + self.settings.patience)
            return until
        return self._waiting_since + self._patience(self._awaited() if awaited is None else awaited)

    # -- What follows ------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self.phase is Phase.JOINING and self._lacks_state:
            self._seek_state()
        elif self.phase is Phase.JOINING:
            expected = len(self.settings.neighbours) + self.settings.unnamed
            linked = sum(self._is_met(n) for n in self.neighbours.values())
            named = all(self._is_met(self.neighbours[name]) for name in self.settings.neighbours)
            ahead = max(1, self.settings.drift)  # so far a neighbour comes that waits for nothing of ours
            under_way = any(n.linked and n.round >= self.round + ahead for n in self.neighbours.values())
            if (named and linked >= expected) or under_way or self._now >= self._waits_until():
                self._start()
        elif self.phase is Phase.COLLECTING:
            target = self._catch_up_target()
            if self._gives_still():
                return  # the vector of this round is still needed
            if target > self.round:
                self._catch_up(target)
            elif not (awaited := self._awaited()) or self._now >= self._waits_until(awaited):
                self._fold()

    def _seek_state(self) -> None:
        """Go on from the state of most live neighbours, or in the end from what there is; without any, give up."""
        target = self._catch_up_target()
        if target < 0 and self._now >= self._waits_until():
            target = catch_up_round(-1, [max(n.updates) for n in self.neighbours.values() if n.updates], 0)
            if target < 0:
                self._note("no_state")
                self._finish(False)
        if target >= 0:
            self._say_who_is_absent()
            self._catch_up(target)

    def _say_who_is_absent(self) -> None:
        missing = tuple(n.name for n in self.neighbours.values() if not n.linked)
        if missing:
            self._note("absent", peers=missing)
            for name in missing:
                self._doubt(name, "it never came")

    def _start(self) -> None:
        self._say_who_is_absent()
        self._compute(self.round, (), jump=True)  # no round went before that its rule could learn from

    def _catch_up_target(self) -> int:
        """The round to jump to; the own one if most others are not far ahead. Whoever lacks a state is at round -1."""
        own, ahead = (-1, 0) if self._lacks_state else (self.round, self._ahead)
        if self._gatherings is not None:  # nobody's vector comes alone: what most of enough say must do
            said = [n.round for n in self.neighbours.values() if n.linked and n.gone_after is None]
            target = catch_up_round(own, said, ahead) if len(said) >= LEAST_SENDERS else own
            return min(target, max(own, self.settings.rounds - 1))
        # Without a state, it matters who is heard first: so those who have no link yet count as well.
        alive = [n for n in self.neighbours.values() if n.alive or (self._lacks_state and n.epoch == 0)]
        if self.settings.drift <= 1:
            hears = self._part(self.round).hears
            models = [max(n.updates, default=-1) for n in alive if n.name in hears]
            return catch_up_round(own, models, ahead)
        models = [max(n.updates, default=-1) for n in alive]
        # Where the graph changes, few neighbours send in one round: most must claim to be ahead, and one have sent.
        target = catch_up_round(own, [n.round for n in alive if n.linked], ahead)
        return max(own, min(target, max(models, default=-1)))

    def _fold_sums(self, sums: RunningSums) -> None:
        came = [(n.name, n.updates[round]) for n in self.neighbours.values() for round in sorted(n.updates)]
        for neighbour in self.neighbours.values():
            neighbour.updates.clear()
        contributions, kept = sums.take(came)
        self._end_round(tuple(dict(came)), ())
        self._compute(self.round + 1, contributions, kept=kept)

    def _end_round(self, merged: tuple[str, ...], missing: tuple[str, ...]) -> None:
        self._merged, self._missing = merged, missing
        self._waited = self._now - self._waiting_since
        self._took_part = self._took_part or bool(merged)

    def _fold(self) -> None:
        if self._exchanges is not None:
            contributions = self._exchanges.fold(self.round)
            self._end_round(tuple(c.peer for c in contributions), ())
            self._compute(self.round + 1, contributions, kept=1.0)
            return
        if self._sums is not None:
            self._fold_sums(self._sums)
            return
        if self._gatherings is not None:
            self._fold_gathered(self._gatherings)
            return
        part, updates = self._part(self.round), dict[str, Update]()
        for neighbour in self.neighbours.values():
            if self._is_awaited(neighbour):
                if self._only_hears_us(neighbour.name):
                    neighbour.lateness.append(self._patience([neighbour]))  # how long it really needs is not known yet
                elif neighbour.heard < self._needed:
                    self._miss(neighbour)
                else:
                    self._miss_receipt(neighbour)
            update = self._take_update(neighbour)
            if update is not None and self._counts(neighbour, update) and self._may_fold(neighbour):
                updates[neighbour.name] = update
        if len(updates) + 1 < self.settings.least:
            self._note("too_few", round=self.round, came=len(updates), needed=self.settings.least - 1)
            updates = {}
        own, heard = Stake(self._mass, self._reach), {name: Stake(u.mass, u.reach) for name, u in updates.items()}
        fixed = {name: weight for name, weight in part.hears.items() if weight is not None}
        if self._ages:
            weights, self._mass = merge_by_age(self._mass, {name: u.mass for name, u in updates.items()})
        else:
            weights = weights_of(self.settings.weights, own, heard, fixed)
        for name, update in updates.items():
            weights[name] *= staleness_weight(max(0.0, self._needed - update.round))
        if self._push_sum:
            self._mass = min(mass_after(own, heard), MAX_MASS)  # or others would take the liar's offence for ours
        missing = tuple(name for name in self.neighbours if name in part.hears and name not in updates)
        self._end_round(tuple(updates), () if self._ages else missing)  # gossip expects nobody's
        contributions = tuple(Contribution(name, u.round, weights[name], u.vector) for name, u in updates.items())
        self._mass += 1.0 if self._ages else 0.0  # it learns for another round
        self._compute(self.round + 1, contributions)

    def _fold_gathered(self, gatherings: Gatherings) -> None:
        """End the round with the sum that was asked for, if it is whole, or with nothing."""
        asked, expected = gatherings.asked, self._part(self.round).hears
        awaited = self._awaited()
        for neighbour in self.neighbours.values():
            withheld = neighbour.name in asked.names and neighbour.heard < self.round and neighbour.linked
            if neighbour in awaited or (withheld and neighbour.gone_after is None):
                self._miss(neighbour)
        updates = {name: self.neighbours[name].updates.pop(self.round, None) for name in asked.names}
        came = {name: update for name, update in updates.items() if update is not None}
        for neighbour in self.neighbours.values():
            neighbour.updates.clear()
        if not asked.names:
            self._note("too_few", round=self.round, came=0, needed=LEAST_SENDERS)
        elif len(came) < len(asked.names) or not all(self._counts(self.neighbours[n], u) for n, u in came.items()):
            self._note("no_sum", round=self.round, missing=tuple(name for name in asked.names if name not in came))
            came = {}
        own, heard = Stake(asked.mass, asked.reach), {name: Stake(u.mass, u.reach) for name, u in came.items()}
        gains = weights_of(self.settings.weights, own, heard, {})
        back = bool(came) and not gatherings.gives  # then their mean takes the place of what is older
        scale = (1 - gatherings.stale_share) / math.fsum(gains.values()) if back else 1.0
        if back:
            gatherings.is_back()
        self._end_round(tuple(came), tuple(name for name in self.neighbours if name in expected and name not in came))
        contributions = tuple(
            Contribution(name, u.round, scale * gains[name], u.vector, gain=gains[name]) for name, u in came.items()
        )
        self._compute(self.round + 1, contributions, jump=back)

    def _counts(self, neighbour: Neighbour, update: Update) -> bool:
        """Whether both ends of the edge give it the same weight."""
        if self._push_sum or self._ages:
            return True
        if self._whole_graph and update.reach != self._reach:
            return False  # its weights are those of a graph over other members
        # A mass that is not in the reach (it joined, or changed it, during this round) would make more than a mean.
        return self._counted.get(neighbour.name) == update.mass

    def _take_update(self, neighbour: Neighbour) -> Update | None:
        """The update to fold now: of this very round, or a late one; with staleness, the one that was kept."""
        rounds = [round for round in neighbour.updates if round <= self.round or self.settings.staleness > 0]
        taken = [neighbour.updates.pop(round) for round in sorted(rounds)]
        return taken[-1] if taken else None

    def _catch_up(self, target: int) -> None:
        """One is behind most of the neighbours: go on with the mean of their newest models and the own one.

        That counts less the older it is; and not at all before it was ever averaged with one of theirs.
        """
        self._note("caught_up", behind=self.round, round=target)
        if self._gatherings is not None:
            self._gatherings.is_behind(staleness_weight(target - self.round) if self._took_part else 0.0)
            self._waited_from, self._lacks_state, self._trained = target, False, None
            for neighbour in self.neighbours.values():
                neighbour.updates.clear()
            self._compute(target, (), jump=True)
            return
        newest = [(n.name, n.updates[max(n.updates)]) for n in self.neighbours.values() if n.updates]
        newest = [(name, update) for name, update in newest if update.round >= target]
        own = staleness_weight(target - self.round) if self._took_part else 0.0
        share, summed = 1 / (len(newest) + own), self._sums is not None  # or they are models
        contributions = tuple(
            Contribution(name, u.round, share / u.mass if summed else share, u.vector) for name, u in newest
        )
        for neighbour in self.neighbours.values():
            neighbour.updates.clear()
        self._waited_from, self._lacks_state = target, False
        self._trained = None  # the round that is skipped has no record
        self._compute(target, contributions, jump=True, kept=own * share if summed else None)

    def _compute(
        self, round: int, contributions: tuple[Contribution, ...], jump: bool = False, kept: float | None = None
    ) -> None:
        # Degrees and masses change only here, between two rounds, and travel in the signed manifest: so both ends of
        # an edge derive its weight from the same numbers.
        before = self._view
        self._rewire()
        part = self._part(round)
        masses = {n.name: n.mass for n in self.neighbours.values() if n.name in part.hears}
        self._counted = {name: mass for name, mass in masses.items() if mass is not None}
        self._told = part.tells if self._wiring is not None else None
        self._reach = reach([self._mass, *self._counted.values()])
        if self._whole_graph:
            self._reach = graph_reach(self._view)
        train, restart, portion = round < self.settings.rounds, self._view != before, 0.0
        held = self._mass if self._sums is None else self._sums.mass
        step = 1.0 if self._ages else min(self.settings.mass / held, MAX_STEP)
        if self._gatherings is not None:
            self._told = ()  # nobody gets the vector itself
        elif self.settings.partners is not None:
            self._choose_partner(self.settings.partners, round, part)
        elif self._sums is not None:
            here = [n for n in self.neighbours.values() if n.name in part.tells and n.alive and n.gone_after is None]
            self._told = tuple(n.name for n in here)
            restart = self._sums.tell(tuple((n.name, n.epoch) for n in here))
            portion = self._sums.hand_out() if train else 0.0
            self._mass, self._reach = self._sums.handed_out, self._sums.reach
            if not self._mass:
                self._told = ()  # nothing is no sum, and would be refused
        elif self._push_sum:  # mass that is sent to somebody who is not there would be lost
            self._told = tuple(name for name in self._listeners() if name in part.tells)
            self._reach = 1.0 + len(self._told)
        self.round, self._here = round, part
        for neighbour in self.neighbours.values():
            neighbour.ahead_since = self._now if neighbour.round > round else None
        self.phase = Phase.COMPUTING
        self._computing_since = self._now
        if self._gatherings is not None and train:
            self._ask(self._gatherings)
        self._send(
            tuple(n for n in self._listeners() if n in part.hears and n not in part.tells), Heartbeat(round, self._view)
        )
        if train and round > self.settings.first_round and round % self.settings.checkpoint_every == 0:
            self._effects.append(Save(round))
        if self.settings.two_way:
            came = tuple(n.name for n in self.neighbours.values() if round in n.updates)
            self._send(came, Receipt(round, self._view))
        told = len(self._told or ()) if portion else 0
        job = Compute(round, contributions, self._mass, self._reach, train, step, jump, restart, kept, portion, told)
        self._effects.append(job if self._sums is None else replace(job, held=held))

    def _choose_partner(self, partners: Partners, round: int, part: Neighbourhood) -> None:
        """Who gets the update of this round. An exchange is asked for only where its answer can still be folded."""
        exchanges, linked = self._exchanges, tuple(n for n in self._listeners() if n in part.tells)
        if exchanges is None:
            self._told = partners(round, linked)
            return
        self._told, self._reach = (), ASKS_NOBODY
        if round < self.settings.rounds - 1:
            self._told = partners(round, tuple(name for name in linked if not exchanges.awaits(name)))
        for name in self._told:
            self._reach = exchanges.ask(round, name, self.neighbours[name].heard)

    # -- Sums of neighbours ------------------------------------------------------------------------------------------

    def _about_sums(self, peer: str, message: MaskKey | Gathering) -> None:
        neighbour, gatherings = self.neighbours.get(peer), self._gatherings
        if neighbour is None or not neighbour.linked or gatherings is None:
            return
        try:
            if isinstance(message, MaskKey):
                gatherings.introduced(peer, message, neighbour.epoch)
                return
            gatherings.came(peer, message)
            self._check_gathering(neighbour, message, gatherings)
        except BadMessage as error:
            gatherings.drop(peer)
            self._rejected(Rejected(peer, error.code, error.why))
            return
        self._claim(peer, message.round)
        neighbour.gives = message.gives
        if message.gives and neighbour.degraded:  # nothing comes of it that would show that it is in step again
            self._count_if_in_step(neighbour, message.round)
        if self.phase is Phase.COLLECTING:
            self._give(gatherings)

    def _check_gathering(self, receiver: Neighbour, asks: Gathering, gatherings: Gatherings) -> None:
        """BadMessage for a sum that its receiver could not honestly ask for: from weights as they are, of those around.

        With a reach that does not even hold its senders it would make their weights what it likes; and with members
        from anywhere, it could take two that tell it theirs. Who only sees other members living gets nothing, either.
        """
        if not asks.keys:
            return
        least = reach([asks.mass, self._mass])
        if asks.mass != receiver.mass or asks.reach < least:
            why = (
                f"a mass of {asks.mass} within a reach of {asks.reach}: its hello said {receiver.mass}, and ours counts"
            )
            raise BadMessage("bad_gathering", why)
        around = self.settings.senders
        strangers = set(asks.names) - set(around(self._members, receiver.name)) if around is not None else ()
        if strangers and receiver.view == self._view:
            raise BadMessage("bad_gathering", f"a sum with {', '.join(sorted(strangers))}, no neighbour of it")
        if strangers:
            gatherings.drop(receiver.name)

    def _gives_still(self) -> bool:
        """Whether its part of somebody's sum is still being made of the vector of this round."""
        return self._gatherings is not None and self._gatherings.under_way > 0

    def _ask(self, gatherings: Gatherings) -> None:
        """Begin the round with asking all neighbours for their sum that are in step and can give their part."""
        names = [
            n.name
            for n in self.neighbours.values()
            if n.name in self._here.hears
            and n.name in self._counted
            and (n.linked and n.alive and n.gives and not n.degraded and n.gone_after is None)
            and self.round - 1 <= n.round <= self.round
            and self._tells_us(n)
            and self._is_met(n)
        ]
        self._send(self._listeners(), gatherings.ask(self.round, self._mass, self._reach, names))

    def _ask_again(self, gatherings: Gatherings, event: LinkUp) -> None:
        """What the peer needs to know, and what a broken link may have lost."""
        peer = (event.peer,)
        self._send(peer, gatherings.own)
        if self.phase in (Phase.COMPUTING, Phase.COLLECTING):
            self._send(peer, gatherings.asked)
        self._give_again(gatherings, event)

    def _give_again(self, gatherings: Gatherings, event: LinkUp) -> None:
        given = gatherings.newest(event.peer)
        if given is not None and event.seen < given.round:
            self._send((event.peer,), given)

    def _give(self, gatherings: Gatherings) -> None:
        """Make this round's part of their sums for all who have asked for it."""
        if not gatherings.gives:
            return
        own = Stake(self._mass, self._reach)
        linked = set(self._listeners()).intersection(self._here.tells)
        for peer, asked in gatherings.due(self.round, linked):
            weight = weights_of(self.settings.weights, Stake(asked.mass, asked.reach), {peer: own}, {})[peer]
            self._effects.append(Conceal(peer, self.round, weight, asked, self._mass, self._reach))

    def _concealed(self, job: Conceal, sealed: object | None, why: str) -> None:
        if self._gatherings is None:
            return
        update = None if sealed is None else Update(job.round, job.mass, job.reach, sealed)
        self._gatherings.made(job.peer, update)
        if update is None:
            self._rejected(Rejected(job.peer, "bad_gathering", why))
        else:
            self._send((job.peer,), update)

    # -- Who lives ---------------------------------------------------------------------------------------------------

    def _doubt(self, name: str, why: str) -> None:
        if self.membership is not None:
            self._changed(self.membership.suspect(name, why, self._now))

    def _gossip(self, peer: str, records: Sequence[MemberRecord], hints: Sequence[Hint]) -> None:
        if self.membership is None:
            return
        fresh = [n.name for n in self.neighbours.values() if n.linked and n.alive]
        heard = self.membership.heard(records, hints, fresh, self._now)
        self._changed(heard.changes)
        changed = {change.name for change in heard.changes}
        urgent = tuple(r for r in heard.news if r.name in changed or r.name == self.settings.name)
        self._news.update({record.name: record for record in heard.news if record not in urgent})
        if urgent or heard.believed:  # each node passes a piece of news on once, so that it dies out
            others = tuple(name for name in self._listeners() if name != peer or self.membership.own in urgent)
            self._send(others, Gossip(urgent, heard.believed))
        for hint in heard.doubted:
            self._send((hint.name,), Gossip((), (hint,)))

    def _changed(self, changes: Sequence[Change]) -> None:
        """Say what is now known of members, and spread a doubt of one's own."""
        assert self.membership is not None
        for change in changes:
            if change.after is Standing.SUSPECT and change.why != OTHERS:
                doubts = tuple(hint for hint in self.membership.hints() if hint.name == change.name)
                self._send(self._listeners(), Gossip((), doubts))
            if change.after in (Standing.DEAD, Standing.LEFT):
                self._note("lost", peer=change.name, why=change.why or change.after.value)
            elif change.before in (Standing.DEAD, Standing.LEFT):
                self._note("back", peer=change.name)

    def _tell_all(self, peers: tuple[str, ...]) -> None:
        """Everything that is known of members, for those who may have missed some of it."""
        assert self.membership is not None
        records, hints = self.membership.records(), self.membership.hints()
        for start in range(0, max(len(records), len(hints)), MAX_TOLD):
            self._send(peers, Gossip(records[start : start + MAX_TOLD], hints[start : start + MAX_TOLD]))

    def _rewire(self) -> None:
        """Between two rounds: go on with the graph over those who live now."""
        if self.membership is None or self.settings.wiring is None:
            return
        # Nearly always it is the very same tuple: comparing thousands of names each round would be felt.
        if self.membership.live is self._members or self.membership.live == self._members:
            return
        before, self._members = self._members, self.membership.live
        self._old_view, self._old_wiring = self._view, self._wiring
        self._wiring = self.settings.wiring(self._members)
        self._view = view_of(self._members, self.settings.members)
        for name in self._wiring.neighbours:
            if name not in self.neighbours:
                self.neighbours[name] = Neighbour(name)
            if not self.neighbours[name].linked:
                self.neighbours[name].sought_since = self._now
                self._effects.append(Connect(name, self.membership.address(name)))
        self.neighbours = dict(sorted(self.neighbours.items()))
        for name in self.membership.sought():
            if name not in self.neighbours or not self.neighbours[name].linked:
                self._effects.append(Connect(name, self.membership.address(name)))
        gone, back = set(before) - set(self._members), set(self._members) - set(before)
        self._note(
            "rewired",
            round=self.round,
            members=len(self._members),
            gone=tuple(sorted(gone)),
            back=tuple(sorted(back)),
            neighbours=self._wiring.neighbours,
        )
        self._send(self._listeners(), Heartbeat(self.round, self._view))

    # -- Saying it ---------------------------------------------------------------------------------------------------

    def _listeners(self) -> tuple[str, ...]:
        return tuple(n.name for n in self.neighbours.values() if n.linked and n.gone_after is None)

    def _send(self, peers: tuple[str, ...], message: Message) -> None:
        if peers:
            self._effects.append(Send(peers, message))

    def _note(self, event: str, **fields: Value) -> None:
        self._effects.append(Record(Happened(event, fields)))
