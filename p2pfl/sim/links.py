"""Links between simulated processes, as `link.py` and the systems below it make them.

A link is two pipes each way, control and bulk, that keep their order. An update is offered, judged by `check_offer`,
and transferred: one at a time to each peer, with the newest one waiting behind it. An end that hears nothing for
KEEPALIVE breaks, each in its own time. What a cut holds back arrives when it heals, if the link still stands. Who
stands still finds what came when it goes on. One side of a pair dials, and tries again until both are there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from p2pfl.messages import (
    MAX_ROUND,
    BadMessage,
    Event,
    Goodbye,
    Gossip,
    Heartbeat,
    Hint,
    LinkDown,
    LinkUp,
    Message,
    Received,
    Rejected,
    Update,
)
from p2pfl.rng import stream
from p2pfl.sim.faults import Corrupt, Delay, Lied, Lose
from p2pfl.sim.scenario import Scenario
from p2pfl.sim.world import Cargo, Clock, End, Hello, Life, Machine, Offer, Parcel, Parcelled, Seen, Way

KEEPALIVE = (6.0, 8.0)  # seconds without a sound after which an end breaks: link.py's timeout, and one ping more
AGAIN = (0.05, 0.1)  # seconds until the dialling side tries again where a steady link broke …
RETRY = (0.5, 0.6)  # … or one that was not: as link.py does it
STEADY = 5.0  # seconds after which a link is one
DIAL = (0.05, 2.0)  # seconds between two tries where nobody answers
ROUND_TRIPS = 1.5  # that TCP and CURVE take before a hello
HANDSHAKE = 5.0  # seconds after which a handshake that was not answered is given up
MOMENT = 10.0  # seconds that a broken link is counted as one that may come back
REMEMBERED = 8  # updates of a peer by which a second one for the same round is known
RESET = 1.0  # seconds until a system without memory of a link is sent something, and denies it
RANDOM_BLOCK = 4096  # numbers drawn at once: one at a time costs more than all else that a message needs
LIE = 3.0  # by which a mass is multiplied, a reach divided, and a round moved

Pair = tuple[str, str]


class Links:
    """All links of a simulation. `handle` hands an event to a process, `struck` hears of a fault that took effect."""

    def __init__(
        self,
        clock: Clock,
        scenario: Scenario,
        machines: Mapping[str, Machine],
        handle: Callable[[Life, Event], None],
        struck: Callable[[str], None],
    ) -> None:
        self._clock, self._scenario, self._machines = clock, scenario, machines
        self._handle, self._struck = handle, struck
        self._chance = _uniforms(stream(scenario.seed, "network"))
        self._latency: dict[Pair, float] = {}  # of a sorted pair, seconds
        self._ways: dict[Pair, list[Way]] = {}  # (sender, receiver) → those that may still bring something
        self._dialling: dict[Pair, None] = {}  # sorted pairs that are tried soon
        self._last_update: dict[Pair, Update] = {}  # (sender, receiver) → what came last
        self._cuts: dict[Pair, int] = {}  # (sender, receiver) → reasons why nothing gets there
        self._delays: dict[Pair, list[Delay]] = {}
        self._befalling: dict[Pair, deque[Lose | Corrupt]] = {}  # what befalls the next update

    def _between(self, bounds: tuple[float, float]) -> float:
        low, high = bounds
        return low + (high - low) * next(self._chance)

    # -- Made --------------------------------------------------------------------------------------------------------

    def dial(self, a: str, b: str, within: tuple[float, float] = DIAL) -> None:
        """The one of the two that dials tries again within so many seconds."""
        pair = (a, b) if a < b else (b, a)
        if pair not in self._dialling:
            self._dialling[pair] = None
            self._clock.after(self._between(within), partial(self._knock, pair))

    def _knock(self, pair: Pair) -> None:
        """Begin a handshake, if it has any prospect; if not, `dial` is called when that changes."""
        del self._dialling[pair]
        dialler, listener = self._machines[pair[0]].life, self._machines[pair[1]].life
        if dialler is None or listener is None or not (dialler.runs and listener.runs):
            return
        if listener.name not in dialler.dials and dialler.name not in listener.dials:
            return
        if self._cuts.get(pair) or self._cuts.get(pair[::-1]) or any(w.receiver is listener for w in dialler.ends):
            return
        if self._bars(dialler, listener.name) or self._bars(listener, dialler.name):
            return
        there, back = self._way(dialler, listener), self._way(listener, dialler)
        there.back, back.back = back, there
        self._send_hello(there, 2 * ROUND_TRIPS * there.delay, answer=False)
        self._clock.after(HANDSHAKE, partial(self._give_up, there))

    def _bars(self, life: Life, peer: str) -> bool:
        return life.barred.get(peer, -math.inf) > self._clock.now

    def _way(self, sender: Life, receiver: Life) -> Way:
        way, pair = Way(sender, receiver, self._clock.now), (sender.name, receiver.name)
        sender.ends[way] = None
        self._ways[pair] = [other for other in self._ways.get(pair, ()) if other.open] + [way]
        self._set_delay(way)
        return way

    def _set_delay(self, way: Way) -> None:
        sender, receiver = pair = way.sender.name, way.receiver.name
        ends = (sender, receiver) if sender < receiver else (receiver, sender)
        if ends not in self._latency:
            share = float(stream(self._scenario.seed, "latency", *ends).uniform(0.5, 1.5))
            self._latency[ends] = self._scenario.latency * share
        more = self._delays.get(pair, ())
        way.delay = self._latency[ends] + math.fsum(fault.delay for fault in more)
        way.jitter = self._scenario.jitter + math.fsum(fault.jitter for fault in more)

    def _send_hello(self, way: Way, seconds: float, answer: bool) -> None:
        """Nothing that is sent later arrives before it, through either pipe."""
        life, other = way.sender, way.receiver
        seen = self._seen(life, other.name, other.epoch).round
        hello = Hello(life.epoch, life.said_round, life.machine.mass, seen, answer)
        way.control_at = way.bulk_at = self._arrival(way) + seconds
        self._clock.at(way.control_at, partial(self._arrive, way, hello))

    def _seen(self, life: Life, peer: str, epoch: int) -> Seen:
        """What this process has got of that epoch of a peer."""
        seen = life.seen.get(peer)
        if seen is None or seen.epoch < epoch:
            seen = life.seen[peer] = Seen(epoch)
        return seen

    def _give_up(self, way: Way) -> None:
        life = way.sender
        if life.pauses:
            self._clock.after(HANDSHAKE, partial(self._give_up, way))
        elif way in life.ends and life.ways.get(way.receiver.name) is not way:
            self._hang_up(way, "no answer")

    def _greet(self, way: Way, hello: Hello) -> None:
        """A hello has come: for this end the link is up."""
        life, back, peer = way.receiver, way.back, way.sender.name
        if self._bars(life, peer) or hello.epoch < self._seen(life, peer, hello.epoch).epoch:
            self._hang_up(back, "not let in")
            return
        old = life.ways.get(peer)
        if old is not None:
            self._hang_up(old, "displaced by a newer connection")
        if not life.alive or back not in life.ends:
            return
        life.ways[peer] = back
        life.broken.pop(peer, None)
        if not hello.answer:
            self._send_hello(back, 0.0, answer=True)
        self._handle(life, LinkUp(peer, hello.epoch, hello.round, hello.mass, hello.seen))

    # -- Broken ------------------------------------------------------------------------------------------------------

    def cut_off(self, sender: str, receiver: str) -> None:
        """The link breaks, first at this end."""
        life = self._machines[sender].life
        if life is not None and life.runs and receiver in life.ways:
            self._hang_up(life.ways[receiver], "it broke")

    def disconnect(self, life: Life, peer: str, seconds: float) -> None:
        """Close the link to this peer and keep it out for so long."""
        life.barred[peer] = self._clock.now + seconds
        way = life.ways.get(peer)
        if way is not None:  # after the effects in hand
            self._clock.at(self._clock.now, partial(self._hang_up, way, "quarantined"))
        self._clock.after(seconds, partial(self.dial, life.name, peer))

    def leave(self, life: Life, power: bool) -> None:
        """This process is no more. Its system tells all who are linked to it, unless it has no power."""
        for way in life.ends:
            self._close(way)
            if power:
                life.machine.deserted.append(way)
                self._fall_silent(way)
            else:
                self._send_end(way, "reset")
        life.ends, life.ways = {}, {}
        life.inbox.clear()

    def deny(self, machine: Machine) -> None:
        """The system has power again, and knows nothing of the links that others take for sound."""
        for way in machine.deserted:
            self._clock.after(self._between((0.0, RESET)), partial(self._arrive, way, End("reset")))
        machine.deserted = []

    def _close(self, way: Way) -> None:
        """The sender's end of this way is gone: nothing arrives there any more."""
        way.closed_at = self._clock.now
        way.back.open = False
        way.back.held.clear()

    def _hang_up(self, way: Way, why: str) -> None:
        """Close the sender's end of this way, and tell the other one."""
        life, peer = way.sender, way.receiver.name
        if way not in life.ends:
            return
        del life.ends[way]
        self._close(way)
        self._send_end(way, why)
        self.dial(life.name, peer, AGAIN if self._clock.now > way.since + STEADY else RETRY)
        if life.ways.get(peer) is way:
            del life.ways[peer]
            if way.sending is not None or way.waiting is not None or peer not in life.gone:
                life.broken[peer] = self._clock.now
            self._handle(life, LinkDown(peer, why))

    def _send_end(self, way: Way, why: str) -> None:
        """What was handed over arrives before, except for a transfer in its middle."""
        soon = self._clock.now + way.delay + way.jitter
        self._clock.at(max(soon, way.control_at), partial(self._arrive, way, End(why)))

    def is_busy(self, life: Life) -> bool:
        """Whether an update has not arrived yet at a peer that is there."""
        return any(way.sending is not None or way.waiting is not None for way in life.ways.values())

    def is_interrupted(self, life: Life) -> bool:
        """Whether a link broke a moment ago whose peer may come back for what it lacks."""
        return any(self._clock.now - when < MOMENT for when in life.broken.values())

    # -- Silent ------------------------------------------------------------------------------------------------------

    def pause(self, life: Life) -> None:
        """Nobody hears of this process, and what comes waits."""
        for way in life.ends:
            self._fall_silent(way)

    def go_on(self, life: Life) -> None:
        """The process is heard again, and takes in what came."""
        for way in life.ends:
            self._be_heard(way)
        while life.inbox and life.runs:
            way, message = life.inbox.popleft()
            if way.open:
                self._take(way, message)

    def cut(self, sender: str, receiver: str) -> None:
        """From now on nothing gets from here to there, for one reason more."""
        pair = (sender, receiver)
        self._cuts[pair] = self._cuts.get(pair, 0) + 1
        for way in self._ways.get(pair, ()):
            way.cuts += 1
            self._fall_silent(way)

    def heal(self, sender: str, receiver: str) -> None:
        """One reason less. What was held back arrives, if its link still stands."""
        pair = (sender, receiver)
        self._cuts[pair] -= 1
        for way in self._ways.get(pair, ()):
            way.cuts -= 1
            self._be_heard(way)
            while way.held and not way.cuts:
                self._clock.at(self._clock.now, partial(self._arrive, way, way.held.popleft()))

    def _fall_silent(self, way: Way) -> None:
        way.mute += 1
        if way.mute == 1:
            way.silence += 1
            self._clock.after(self._between(KEEPALIVE), partial(self._hear_nothing, way, way.silence))

    def _be_heard(self, way: Way) -> None:
        way.mute -= 1
        if way.mute == 0:
            way.silence += 1

    def _hear_nothing(self, way: Way, silence: int) -> None:
        if way.silence != silence or not way.open:
            return
        if way.receiver.pauses:
            way.receiver.inbox.append((way, End("no sign of life")))
        else:
            self._hang_up(way.back, "no sign of life")

    def slow_down(self, fault: Delay) -> None:
        self._delays.setdefault((fault.sender, fault.receiver), []).append(fault)
        self._set_delays(fault.sender, fault.receiver)

    def speed_up(self, fault: Delay) -> None:
        self._delays[fault.sender, fault.receiver].remove(fault)
        self._set_delays(fault.sender, fault.receiver)

    def _set_delays(self, sender: str, receiver: str) -> None:
        for way in self._ways.get((sender, receiver), ()):
            self._set_delay(way)

    # -- What travels ------------------------------------------------------------------------------------------------

    def _arrival(self, way: Way) -> float:
        return self._clock.now + way.delay + way.jitter * next(self._chance)

    def send(self, life: Life, peer: str, message: Message) -> None:
        """Now or never: what has no link is dropped."""
        way = life.ways.get(peer)
        if way is None:
            return
        if life.machine.lies:
            message = _lie(life, message, life.machine.lies)
        if isinstance(message, Update):
            if way.sending is None or way.sending.vector is not message.vector:
                way.waiting = message
            self._pump(way)
            return
        way.control_at = max(way.control_at, self._arrival(way))
        self._clock.at(way.control_at, partial(self._arrive, way, message))

    def _pump(self, way: Way) -> None:
        """Offer the update that waits, once the receiver has all of the one before."""
        if way.waiting is None or way.sending is not None or way not in way.sender.ends:
            return
        if self._clock.now < way.free_at:
            self._clock.at(way.free_at, partial(self._pump, way))
            return
        update, way.waiting = way.waiting, None
        way.sending = update
        way.sender.machine.sent += 1
        way.bulk_at = max(way.bulk_at, self._arrival(way))
        self._clock.at(way.bulk_at, partial(self._arrive, way, Offer(update) if self._scenario.transfer else update))

    def _arrive(self, way: Way, message: Parcelled) -> None:
        if not way.open:
            return
        if way.cuts:
            way.held.append(message)
        elif way.receiver.pauses:
            way.receiver.inbox.append((way, message))
        else:
            self._take(way, message)

    def _take(self, way: Way, message: Parcelled) -> None:
        match message:
            case Offer(update):
                self._offered(way, update)
            case Update():
                self._transferred(way, message)
            case Hello():
                self._greet(way, message)
            case End(why):
                self._hang_up(way.back, why)
            case _:
                way.last = message
                self._handle(way.receiver, Received(way.sender.name, message))

    def _offered(self, way: Way, update: Update) -> None:
        refused = self._refusal(way, update)
        if refused is None:
            way.bulk_at = max(way.bulk_at, self._clock.now + self._scenario.transfer)
            self._clock.at(way.bulk_at, partial(self._arrive, way, update))
        else:
            self._free(way)
            self._handle(way.receiver, refused)

    def _free(self, way: Way) -> None:
        """The receiver says that it has, or wants, no more of the update that is being sent."""
        way.sending = None
        way.free_at = self._clock.now + way.back.delay
        if way.waiting is not None:
            self._pump(way)

    def _refusal(self, way: Way, update: Update) -> Rejected | None:
        """What `link` does with an offer: two updates for one round, what came before, what the node does not want."""
        life, peer = way.receiver, way.sender.name
        seen = self._seen(life, peer, way.sender.epoch)
        before = seen.parcels.get(update.round)
        if before is not None and before is not _parcel(update):
            why = f"two different updates were signed for round {update.round}"
            return Rejected(peer, "equivocation", why, (_mark(before), _mark(_parcel(update))))
        if update.round <= seen.round:
            return Rejected(peer, "stale" if before is None else "duplicate", f"the update of round {update.round}")
        try:
            life.node.check_offer(peer, update.round)
        except BadMessage as error:
            return Rejected(peer, error.code, error.why)
        return None

    def _transferred(self, way: Way, update: Update) -> None:
        """An update has come whole, unless a fault befell it, or its sender went in the middle of it."""
        if self._scenario.transfer and way.closed_at < self._clock.now - way.delay:
            return
        life, peer = way.receiver, way.sender.name
        self._free(way)
        fault = self._what_befalls(peer, life.name)
        if isinstance(fault, Lose):
            return
        event: Event | None = None if self._scenario.transfer else self._refusal(way, update)
        if event is None and isinstance(fault, Corrupt) and fault.code != "bad_value":
            event = Rejected(peer, fault.code, "it was altered")
        if event is None:
            seen = self._seen(life, peer, way.sender.epoch)
            seen.round = update.round
            seen.parcels[update.round] = _parcel(update)
            if len(seen.parcels) > REMEMBERED:
                seen.parcels.popitem(last=False)
            if fault is None:
                self._last_update[peer, life.name] = update
                life.machine.received += 1
                event = _checked(life, peer, update)
            else:
                event = Rejected(peer, "bad_value", "it is not finite", round=update.round)
        self._handle(life, event)

    # -- Spoilt ------------------------------------------------------------------------------------------------------

    def befall(self, fault: Lose | Corrupt) -> None:
        """This happens to the next update."""
        self._befalling.setdefault((fault.sender, fault.receiver), deque()).append(fault)

    def _what_befalls(self, sender: str, receiver: str) -> Lose | Corrupt | None:
        waiting = self._befalling.get((sender, receiver))
        if not waiting:
            return None
        fault = waiting.popleft()
        self._struck(f"{sender} to {receiver}: {'lost' if isinstance(fault, Lose) else fault.code}")
        return fault

    def replay(self, sender: str, receiver: str, update: bool) -> None:
        """Straight to the node, as if the link did not watch: only an epoch that is over is found out before."""
        life = self._machines[receiver].life
        back = life.ways.get(sender) if life is not None and life.runs else None
        if life is None or back is None:
            return
        last = self._last_update.get((sender, receiver)) if update else back.back.last
        if isinstance(last, Update):
            epoch, now = _parcel(last).epoch, back.receiver.epoch
            if epoch != now:
                self._handle(life, Rejected(sender, "stale", f"an update of epoch {epoch}; this is epoch {now}"))
                return
        if last is not None:
            self._handle(life, Received(sender, last))


def _parcel(update: Update) -> Parcel:
    assert isinstance(update.vector, Cargo)
    return update.vector.parcel


def _mark(parcel: Parcel) -> bytes:
    """What stands here for a signed manifest."""
    return f"unsigned update of {parcel.sender}, epoch {parcel.epoch}, round {parcel.round}".encode()


def _checked(life: Life, peer: str, update: Update) -> Event:
    """What `runtime` makes of an update that has come: itself, if its vector may be averaged."""
    cargo = update.vector
    assert isinstance(cargo, Cargo)
    evidence = (_mark(cargo.parcel),)
    try:
        life.worker.check(cargo.vector, update.mass)
    except BadMessage as error:
        return Rejected(peer, error.code, error.why, evidence, update.round)
    return Received(peer, replace(update, evidence=evidence))


def _uniforms(random: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1)."""
    while True:
        yield from random.random(RANDOM_BLOCK).tolist()


def _lie(life: Life, message: Message, lies: list[Lied]) -> Message:
    """What a member says instead who lies about these things."""
    for about in lies:
        match about, message:
            case "mass", Update(_, mass):
                message = replace(message, mass=LIE * mass)
            case "reach", Update(_, _, reach):
                message = replace(message, reach=max(1.0, reach / LIE))
            case "round", Update(round):
                message = replace(message, round=round + int(LIE))
            case "heartbeat", Heartbeat():
                message = Heartbeat(MAX_ROUND)
            case "goodbye", Heartbeat(round):
                message = Goodbye(round + int(LIE), "leaving")
            case "deaths", Heartbeat() if life.node.membership is not None:
                others = [record for record in life.node.membership.records() if record.name != life.name]
                message = Gossip((), tuple(Hint(r.name, r.epoch, r.incarnation) for r in others))
    return message
