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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from p2pfl.conduct import Conduct
from p2pfl.messages import (
    BadMessage,
    Compute,
    Computed,
    Contribution,
    Disconnect,
    Done,
    Effect,
    Event,
    Goodbye,
    Happened,
    Heartbeat,
    Leave,
    LinkDown,
    LinkUp,
    Received,
    Record,
    Rejected,
    RoundEnded,
    Save,
    Send,
    Tick,
    Trained,
    Update,
    Value,
)
from p2pfl.weights import neighbour_weight

WAITING_LINE = 5.0  # seconds of waiting before one says for whom, and between two such lines
OBSERVED_ROUNDS = 16  # how many lateness observations of a neighbour its patience is derived from
PATIENCE_FACTOR = 3.0  # times the median lateness: three times slower than usual is no longer "slow as usual"
AHEAD = 1  # rounds that a neighbour may lawfully be ahead: it has our update of the round that we still collect


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
    mass: float = 1.0  # own weight in the mean
    equal_masses: bool = True  # whether everybody's mass must be 1
    checkpoint_every: int = 25  # rounds
    staleness: float = 0  # rounds that a neighbour may be behind without being waited for; inf: nobody is waited for
    join_timeout: float = 60.0
    heartbeat: float = 1.0
    silence: float = 6.0
    grace: float = 1.0
    patience: float = 5.0
    first_round: int = 0  # after a resume


@dataclass(slots=True)
class Neighbour:
    """What is known of one neighbour."""

    name: str
    linked: bool = False
    epoch: int = 0
    mass: float | None = None  # None until its first hello
    round: int = 0  # the newest that it claims to work on
    heard: int = -1  # the newest round of which its verified update came
    updates: dict[int, Update] = field(default_factory=dict)  # verified, not yet folded
    last_sign: float = -math.inf  # when anything valid came
    down_since: float = -math.inf
    gone_after: int | None = None  # it said goodbye: its updates of rounds below this one were sent
    dead: bool = False
    lateness: deque[float] = field(default_factory=lambda: deque(maxlen=OBSERVED_ROUNDS))


def patience(observed: Sequence[Sequence[float]], floor: float) -> float:
    """How long to wait for living neighbours, from the lateness (s) seen of each: never below `floor` seconds."""
    usual = [statistics.median(lateness) for lateness in observed if lateness]
    return max(floor, PATIENCE_FACTOR * max(usual, default=0.0))


def catch_up_round(own: int, claims: Sequence[int]) -> int:
    """The round to jump to, given the rounds of the live neighbours' verified updates; `own` if one is not behind.

    The lower median: no minority of neighbours, and no single lie, can move it.
    """
    if not claims:
        return own
    median = sorted(claims)[(len(claims) - 1) // 2]
    return median if median > own + AHEAD else own


class Node:
    """One peer. Feed it events with `handle`, perform what it returns, wake it at `deadline`."""

    def __init__(self, settings: Settings, now: float) -> None:
        self.settings = settings
        self.phase = Phase.JOINING
        self.round = settings.first_round
        self.conduct = Conduct()
        self.neighbours = {name: Neighbour(name) for name in sorted(settings.neighbours)}
        self._join_deadline = now + settings.join_timeout
        self._next_heartbeat = now + settings.heartbeat
        self._next_waiting_line = now + WAITING_LINE
        self._collecting_since = now
        self._reach = settings.mass  # of the round in progress
        self._counted: frozenset[str] = frozenset()  # whose mass is in the reach
        self._own_update: Update | None = None
        self._trained: Trained | None = None
        self._merged: tuple[str, ...] = ()
        self._missing: tuple[str, ...] = ()
        self._waited = 0.0
        self._leaving = False
        self._last_now = now

    # -- What the driver asks ----------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """When to send a Tick if nothing happens before; None when done."""
        match self.phase:
            case Phase.DONE:
                return None
            case Phase.JOINING:
                return min(self._join_deadline, self._next_heartbeat, self._next_waiting_line)
            case Phase.COLLECTING:
                times = [self._next_heartbeat, self._next_waiting_line, self._collect_deadline()]
                times += [n.down_since + self.settings.grace for n in self._awaited(self._last_now) if not n.linked]
                return min(times)
            case Phase.COMPUTING:
                return self._next_heartbeat

    def check_offer(self, peer: str, round: int) -> None:
        """BadMessage if an update of this round is not wanted from this peer; asked before anything is allocated."""
        neighbour = self.neighbours.get(peer)
        if neighbour is None:
            raise BadMessage("not_a_neighbour", f"{peer} is in the roster, but no neighbour of {self.settings.name}")
        if round <= neighbour.heard:
            raise BadMessage("stale", f"round {round}, when round {neighbour.heard} has already come")
        if round >= self.settings.rounds:
            raise BadMessage("future", f"round {round} of an experiment with {self.settings.rounds}")
        claims = [n.round for n in self.neighbours.values() if n.linked]
        if round > catch_up_round(self.round, claims) + AHEAD:
            raise BadMessage("future", f"round {round}, when {self.settings.name} and most others are at {self.round}")
        if len(neighbour.updates) > AHEAD:
            raise BadMessage("busy", f"{len(neighbour.updates)} updates of {peer} wait to be folded")

    def awaited(self) -> tuple[str, ...]:
        """Whom this node waits for at the moment."""
        if self.phase is Phase.JOINING:
            return tuple(n.name for n in self.neighbours.values() if not n.linked)
        return tuple(n.name for n in self._awaited(self._last_now)) if self.phase is Phase.COLLECTING else ()

    # -- What happens ------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at time `now` and return what is to be done, in order."""
        if self.phase is Phase.DONE:
            return []
        effects: list[Effect] = []
        self._forgive_own_pause(now)
        self._last_now = now
        match event:
            case LinkUp():
                self._link_up(event, now, effects)
            case LinkDown(peer, why):
                self._link_down(peer, why, now, effects)
            case Received(peer, message):
                self._sign_of_life(peer, now, effects)
                match message:
                    case Update():
                        self._update(peer, message, now, effects)
                    case Heartbeat(round):
                        self._claim(peer, round)
                    case Goodbye(round, reason):
                        self._goodbye(peer, round, reason, effects)
            case Rejected():
                self._rejected(event, now, effects)
            case Computed():
                self._computed(event, now, effects)
            case Leave():
                self._leave(effects)
            case Tick():
                pass
        if self._is(Phase.DONE):
            return effects
        self._heartbeat(now, effects)
        self._listen_for_silence(now, effects)
        self._advance(now, effects)
        self._say_why_waiting(now, effects)
        return effects

    def _is(self, phase: Phase) -> bool:
        return self.phase is phase

    def _forgive_own_pause(self, now: float) -> None:
        # Whoever was itself suspended (SIGSTOP, a laptop's lid) has no right to call the others silent.
        pause = now - self._last_now
        if pause > self.settings.silence / 2:
            for neighbour in self.neighbours.values():
                neighbour.last_sign += pause
                neighbour.down_since += pause

    def _link_up(self, event: LinkUp, now: float, effects: list[Effect]) -> None:
        if self.settings.equal_masses and event.mass != 1.0:
            self._rejected(Rejected(event.peer, "bad_mass", f"it claims {event.mass} where all weigh 1"), now, effects)
            return
        if event.peer not in self.neighbours:
            if not self.settings.open:
                return
            self.neighbours[event.peer] = Neighbour(event.peer)
            self.neighbours = dict(sorted(self.neighbours.items()))
        neighbour = self.neighbours[event.peer]
        if event.epoch > neighbour.epoch:  # a new start of its process: what the old one said no longer counts
            neighbour.heard = -1
            neighbour.updates.clear()
            neighbour.gone_after = None
            neighbour.round = 0
        back = neighbour.epoch > 0
        neighbour.linked, neighbour.dead = True, False
        neighbour.epoch, neighbour.mass, neighbour.last_sign = event.epoch, event.mass, now
        neighbour.round = max(neighbour.round, event.round)
        effects.append(_happened("returned" if back else "joined", peer=event.peer, epoch=event.epoch))
        own = self._own_update
        if own is not None and event.seen < own.round:  # what was under way when the link broke is lost
            effects.append(Send((event.peer,), own))

    def _link_down(self, peer: str, why: str, now: float, effects: list[Effect]) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is None or not neighbour.linked:
            return
        neighbour.linked = False
        neighbour.down_since = now
        if neighbour.gone_after is None:
            effects.append(_happened("suspected", peer=peer, why=why))

    def _sign_of_life(self, peer: str, now: float, effects: list[Effect]) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is None:
            return
        neighbour.last_sign = now
        if neighbour.dead and neighbour.linked:
            neighbour.dead = False
            effects.append(_happened("returned", peer=peer))

    def _update(self, peer: str, update: Update, now: float, effects: list[Effect]) -> None:
        try:
            self.check_offer(peer, update.round)
        except BadMessage as error:
            self._rejected(Rejected(peer, error.code, error.why), now, effects)
            return
        neighbour = self.neighbours[peer]
        neighbour.heard = update.round
        neighbour.round = max(neighbour.round, update.round)
        neighbour.lateness.append(self._lateness(update.round, now))
        if update.round < self.round - self.settings.staleness:
            effects.append(_happened("late", peer=peer, round=update.round))
            return
        if update.mass != neighbour.mass:
            why = f"round {update.round} weighs {update.mass}, its hello said {neighbour.mass}"
            self._rejected(Rejected(peer, "bad_mass", why), now, effects)
            return
        neighbour.updates[update.round] = update

    def _lateness(self, round: int, now: float) -> float:
        if round < self.round:
            return self._patience()  # it missed a deadline: how long it really needs is not known yet
        return now - self._collecting_since if self.phase is Phase.COLLECTING and round == self.round else 0.0

    def _claim(self, peer: str, round: int) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is not None and round < self.settings.rounds:
            neighbour.round = max(neighbour.round, round)

    def _goodbye(self, peer: str, round: int, reason: str, effects: list[Effect]) -> None:
        neighbour = self.neighbours.get(peer)
        if neighbour is not None and neighbour.gone_after is None:
            neighbour.gone_after = round
            effects.append(_happened("left", peer=peer, reason=reason, round=round))

    def _rejected(self, event: Rejected, now: float, effects: list[Effect]) -> None:
        verdict = self.conduct.rejected(event.peer, event.code, now)
        if event.peer in self.neighbours:
            neighbour = self.neighbours[event.peer]
            neighbour.heard = max(neighbour.heard, event.round)
        if verdict.log:
            fields: dict[str, Value] = {"peer": event.peer, "code": event.code, "why": event.why}
            if verdict.suppressed:
                fields["suppressed"] = verdict.suppressed
            if event.evidence:
                fields["evidence"] = tuple(item.hex() for item in event.evidence)
            effects.append(Record(Happened("rejected", fields)))
        if verdict.quarantine:
            if event.peer in self.neighbours:
                neighbour = self.neighbours[event.peer]
                neighbour.linked = False
                neighbour.down_since = -math.inf  # no grace: it is not waited for
                neighbour.updates.clear()
            effects.append(Disconnect(event.peer, verdict.quarantine))
            effects.append(_happened("quarantined", peer=event.peer, code=event.code, seconds=verdict.quarantine))

    def _computed(self, event: Computed, now: float, effects: list[Effect]) -> None:
        if event.folded is not None and self._trained is not None:
            effects.append(
                Record(
                    RoundEnded(
                        self.round,
                        self._trained,
                        event.folded,
                        self._merged,
                        self._missing,
                        self._waited,
                    )
                )
            )
        if event.trained is None or event.update is None:
            self._finish(True, effects)
            return
        self.round = event.round
        self._trained = event.trained
        self._own_update = Update(event.round, self.settings.mass, self._reach, event.update)
        self.phase = Phase.COLLECTING
        self._collecting_since = now
        self._next_waiting_line = now + WAITING_LINE
        linked = tuple(n.name for n in self.neighbours.values() if n.linked)
        if linked:
            effects.append(Send(linked, self._own_update))
        if self._leaving:
            self._finish(False, effects)

    def _leave(self, effects: list[Effect]) -> None:
        if self.phase is Phase.COMPUTING:
            self._leaving = True  # what is being computed is still worth sending
        else:
            self._finish(False, effects)

    def _finish(self, finished: bool, effects: list[Effect]) -> None:
        self.phase = Phase.DONE
        sent = 0 if self._own_update is None else self._own_update.round + 1
        linked = tuple(n.name for n in self.neighbours.values() if n.linked)
        if linked:
            effects.append(Send(linked, Goodbye(sent, "finished" if finished else "leaving")))
        effects.append(_happened("finished" if finished else "left", round=sent))
        effects.append(Done(finished))

    # -- What time brings --------------------------------------------------------------------------------------------

    def _heartbeat(self, now: float, effects: list[Effect]) -> None:
        if now < self._next_heartbeat:
            return
        self._next_heartbeat = now + self.settings.heartbeat
        linked = tuple(n.name for n in self.neighbours.values() if n.linked)
        if linked:
            effects.append(Send(linked, Heartbeat(self.round)))

    def _listen_for_silence(self, now: float, effects: list[Effect]) -> None:
        for neighbour in self.neighbours.values():
            if neighbour.dead or neighbour.epoch == 0:
                continue
            if neighbour.linked:
                gone = now - neighbour.last_sign >= self.settings.silence
                why = f"no sign of life for {self.settings.silence:g} s"
            else:
                gone = now - neighbour.down_since >= self.settings.grace
                why = f"its link did not come back within {self.settings.grace:g} s"
            if gone:
                neighbour.dead = True
                if neighbour.gone_after is None:
                    effects.append(_happened("died", peer=neighbour.name, why=why))

    def _say_why_waiting(self, now: float, effects: list[Effect]) -> None:
        if self.phase not in (Phase.JOINING, Phase.COLLECTING) or now < self._next_waiting_line:
            return
        self._next_waiting_line = now + WAITING_LINE
        since, until = self._collecting_since, self._collect_deadline()
        if self.phase is Phase.JOINING:
            since, until = self._join_deadline - self.settings.join_timeout, self._join_deadline
        names = self.awaited() or ("peers that have not said who they are",)
        effects.append(
            _happened("waiting", peers=names, round=self.round, since=round(now - since, 1), left=round(until - now, 1))
        )

    # -- Whom to wait for --------------------------------------------------------------------------------------------

    def _alive(self, neighbour: Neighbour, now: float) -> bool:
        return not neighbour.dead and (neighbour.linked or now < neighbour.down_since + self.settings.grace)

    def _awaited(self, now: float) -> list[Neighbour]:
        needed = self.round - self.settings.staleness
        return [
            neighbour
            for neighbour in self.neighbours.values()
            if neighbour.heard < needed
            and self._alive(neighbour, now)
            and (neighbour.gone_after is None or (neighbour.gone_after > neighbour.heard + 1 and neighbour.linked))
        ]

    def _patience(self) -> float:
        floor = self.settings.patience
        if self.round == self.settings.first_round:  # everybody still warms up, and nothing was observed yet
            floor = max(floor, self.settings.join_timeout)
        return patience([n.lateness for n in self.neighbours.values()], floor)

    def _collect_deadline(self) -> float:
        return self._collecting_since + self._patience()

    # -- What follows ------------------------------------------------------------------------------------------------

    def _advance(self, now: float, effects: list[Effect]) -> None:
        if self.phase is Phase.JOINING:
            expected = len(self.settings.neighbours) + self.settings.unnamed
            linked = sum(n.linked for n in self.neighbours.values())
            named = all(self.neighbours[name].linked for name in self.settings.neighbours)
            under_way = any(n.linked and n.round > self.round for n in self.neighbours.values())
            if (named and linked >= expected) or under_way or now >= self._join_deadline:
                self._start(now, effects)
        elif self.phase is Phase.COLLECTING:
            claims = [n.heard for n in self.neighbours.values() if self._alive(n, now)]
            target = catch_up_round(self.round, claims)
            if target > self.round:
                self._catch_up(target, effects)
            elif not self._awaited(now) or now >= self._collect_deadline():
                self._fold(now, effects)

    def _start(self, now: float, effects: list[Effect]) -> None:
        missing = tuple(n.name for n in self.neighbours.values() if not n.linked)
        if missing:
            effects.append(_happened("absent", peers=missing))
        if not any(n.linked for n in self.neighbours.values()):
            effects.append(_happened("alone"))
        self._compute(self.round, (), effects)

    def _fold(self, now: float, effects: list[Effect]) -> None:
        contributions = []
        for neighbour in self.neighbours.values():
            update = self._best_update(neighbour)
            if update is not None and neighbour.name in self._counted:
                weight = neighbour_weight(update.mass, self._reach, update.reach)
                contributions.append(Contribution(neighbour.name, update.round, weight, update.vector))
        self._merged = tuple(c.peer for c in contributions)
        self._missing = tuple(name for name in self.neighbours if name not in self._merged)
        self._waited = now - self._collecting_since
        self._compute(self.round + 1, tuple(contributions), effects)

    def _best_update(self, neighbour: Neighbour) -> Update | None:
        """The update to fold now: of this round, else the newest within the staleness, else of the next round."""
        rounds = [r for r in neighbour.updates if r <= self.round]
        if rounds:
            best = neighbour.updates[max(rounds)]
            for old in rounds:
                del neighbour.updates[old]
            return best
        return neighbour.updates.pop(min(neighbour.updates)) if neighbour.updates else None

    def _catch_up(self, target: int, effects: list[Effect]) -> None:
        """One is behind most of the neighbours: take the plain mean of their newest models and go on with them."""
        newest = [(n.name, n.updates[max(n.updates)]) for n in self.neighbours.values() if n.updates]
        contributions = tuple(Contribution(name, u.round, 1 / len(newest), u.vector) for name, u in newest)
        for neighbour in self.neighbours.values():
            neighbour.updates.clear()
        effects.append(_happened("caught_up", behind=self.round, round=target))
        self._trained = None  # the round that is skipped has no record
        self._compute(target, contributions, effects)

    def _compute(self, round: int, contributions: tuple[Contribution, ...], effects: list[Effect]) -> None:
        # Degrees and masses change only here, between two rounds, and travel in the signed manifest: so both ends of
        # an edge derive its weight from the same numbers.
        known = {n.name: n.mass for n in self.neighbours.values() if n.mass is not None}
        self._counted = frozenset(known)
        self._reach = self.settings.mass + math.fsum(mass for mass in known.values() if mass is not None)
        self.phase = Phase.COMPUTING
        train = round < self.settings.rounds
        if train and round > self.settings.first_round and round % self.settings.checkpoint_every == 0:
            effects.append(Save(round))
        effects.append(Compute(round, contributions, self.settings.mass, self._reach, train))


def _happened(event: str, **fields: Value) -> Record:
    return Record(Happened(event, fields))
