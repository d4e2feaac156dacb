"""Members, links and attackers for the tests: real sockets, real cryptography, waits with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from p2pfl.envelope import Sealed, Sealer
from p2pfl.identity import Identity, Member, Roster
from p2pfl.link import HELLO_CONTEXT, Greeting, Link
from p2pfl.messages import (
    PROTOCOL_VERSION,
    BadMessage,
    Channel,
    Event,
    Hello,
    LinkDown,
    LinkUp,
    Received,
    Rejected,
    Update,
    WireMessage,
)
from p2pfl.wire import decode, encode, pack

LOOPBACK = "tcp://127.0.0.1:0"
EXPERIMENT, SCHEMA = b"e" * 32, b"s" * 32
WITHIN = 20.0  # seconds: far beyond what anything here takes, so that a hang is a failure and not a stuck suite
SLICE = 0.002  # seconds that one of several links is listened to before the next

Kind = TypeVar("Kind")


def identities(*names: str) -> dict[str, Identity]:
    return {name: Identity.generate(name) for name in names}


def roster_of(members: Iterable[Identity]) -> Roster:
    return Roster(tuple(Member(identity.card) for identity in members))


def greeting_of(size: int = 64, **changes: object) -> Greeting:
    return replace(Greeting(EXPERIMENT, SCHEMA, size, 1.0, {"train.lr": "0.1"}), **changes)


def allow_all(_peer: str, _round: int) -> None:
    """A node that wants every update."""


@dataclass
class Party:
    """One member's link, and all that happened on it."""

    name: str
    link: Link
    sealer: Sealer
    events: list[Event] = field(default_factory=list)

    def all(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    def codes(self) -> list[str]:
        return [event.code for event in self.all(Rejected)]

    def updates(self) -> list[tuple[int, bytes]]:
        """(round, vector) of each update that came."""
        came = [e.message for e in self.all(Received) if isinstance(e.message, Update)]
        return [(update.round, bytes(update.vector.view)) for update in came]

    def is_up(self, peer: str) -> bool:
        news = [e for e in self.events if isinstance(e, (LinkUp, LinkDown)) and e.peer == peer]
        return bool(news) and isinstance(news[-1], LinkUp)

    def seal(self, vector: bytes, round: int) -> Update:
        return Update(round, 1.0, 1.0, self.sealer.seal(memoryview(vector), round, 1.0, 1.0))

    def listen(self, seconds: float) -> None:
        self.events += self.link.poll(seconds)[0]


def assert_paired(events: Iterable[Event]) -> None:
    """LinkUp and LinkDown of each peer take turns, and LinkUp begins."""
    up: set[str] = set()
    for event in events:
        if isinstance(event, LinkUp):
            assert event.peer not in up
            up.add(event.peer)
        elif isinstance(event, LinkDown):
            assert event.peer in up
            up.remove(event.peer)


@contextmanager
def parties(
    ids: Mapping[str, Identity],
    *,
    size: int = 64,
    listen: Mapping[str, str | None] | str | None = LOOPBACK,
    epochs: Mapping[str, int] | None = None,
    greetings: Mapping[str, Greeting] | None = None,
    rosters: Mapping[str, Roster] | None = None,
    check: Callable[[str, int], None] = allow_all,
    only: Iterable[str] = (),
) -> Iterator[dict[str, Party]]:
    """A link for each of `ids` (or `only` some of them), which are each other's roster."""
    made: dict[str, Party] = {}
    try:
        for name in tuple(only) or ids:
            greeting = (greetings or {}).get(name, greeting_of(size))
            made[name] = open_party(
                ids[name],
                (rosters or {}).get(name, roster_of(ids.values())),
                greeting,
                epoch=(epochs or {}).get(name, 1),
                listen=listen[name] if isinstance(listen, Mapping) else listen,
                check=check,
            )
        yield made
        for party in made.values():
            assert_paired(party.events)
    finally:
        for party in made.values():
            party.link.close(0)


def open_party(
    identity: Identity,
    roster: Roster,
    greeting: Greeting | None = None,
    *,
    epoch: int = 1,
    listen: str | None = LOOPBACK,
    check: Callable[[str, int], None] = allow_all,
) -> Party:
    greeting = greeting or greeting_of()
    link = Link(identity, roster, epoch, greeting, check, listen)
    return Party(
        identity.name, link, Sealer(identity, greeting.experiment, greeting.schema, max(greeting.size, 4), epoch)
    )


def until(happened: Callable[[], object], *links: Party, within: float = WITHIN, what: str = "") -> None:
    """Listen to these links in turn until it has happened."""
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, f"{what or 'it'} did not happen; {[(p.name, p.events[-6:]) for p in links]}"
        for party in links:
            party.listen(SLICE)


def settle(*links: Party) -> None:
    """Listen until each link has looked around a few times and nothing more comes."""
    quiet = 0
    while quiet < 10:
        before = [len(party.events) for party in links]
        for party in links:
            party.listen(SLICE * 2)
        quiet = quiet + 1 if before == [len(party.events) for party in links] else 0


def connect(a: Party, b: Party) -> None:
    """`a` dials `b`, and both are up."""
    a.link.dial(b.link.address, (b.name,))
    until(lambda: a.is_up(b.name) and b.is_up(a.name), a, b, what=f"the link of {a.name} and {b.name}")


# -- An attacker -----------------------------------------------------------------------------------------------------


class Attacker:
    """Somebody with a key, who says over his own sockets whatever he likes. Use it as a context."""

    def __init__(self, identity: Identity, target: Member | Identity, address: str, epoch: int = 1) -> None:
        self.identity = identity
        self.target = target.card
        self.address = address
        self.epoch = epoch
        self.context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, zmq.Socket[bytes]] = {}
        self._news: dict[str, set[int]] = {}
        self._opened = 0

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(0)

    def open(self, channel: str, routing_id: bytes = b"") -> zmq.Socket[bytes]:
        """A new connection; `channel` is what we call it."""
        socket = self.context.socket(zmq.DEALER)
        socket.curve_secretkey = self.identity.link_secret
        socket.curve_publickey = self.identity.card.link_key
        socket.curve_serverkey = self.target.link_key
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        if routing_id:
            socket.routing_id = routing_id
        socket.reconnect_ivl = -1  # once closed, it stays closed
        self._opened += 1
        socket.monitor(f"inproc://{self._opened}", zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._monitors[channel] = self.context.socket(zmq.PAIR)
        self._monitors[channel].connect(f"inproc://{self._opened}")
        self._news[channel] = set()
        socket.connect(self.address)
        self.sockets[channel] = socket
        return socket

    def hello(self, channel: Channel, **changes: object) -> Hello:
        """A good one, but for the changes; signed after them."""
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            name=self.identity.name,
            recipient=self.target.name,
            channel=channel,
            answer=False,
            epoch=self.epoch,
            round=0,
            mass=1.0,
            seen=-1,
            seen_epoch=0,
            experiment=EXPERIMENT,
            schema=SCHEMA,
        )
        hello = replace(hello, **changes)
        return replace(hello, signature=sign_hello(self.identity, hello))

    def say(self, channel: str, *messages: WireMessage) -> None:
        for message in messages:
            self.frames(channel, *encode(message))

    def frames(self, channel: str, *frames: bytes) -> None:
        """One message; it is lost if the other side has hung up."""
        until_able = self.sockets[channel].poll(1000 * int(WITHIN), zmq.POLLOUT) if not self.is_closed(channel) else 0
        if until_able:
            self.sockets[channel].send_multipart(frames, zmq.DONTWAIT)

    def join(self, **changes: object) -> None:
        """Both connections and their hellos."""
        for channel in ("control", "bulk"):
            self.open(channel)
            self.say(channel, self.hello(channel, **changes))

    def hear(self, channel: str) -> list[WireMessage]:
        """What has come so far."""
        heard = []
        while True:
            try:
                frames = self.sockets[channel].recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return heard
            try:
                heard.append(decode(*frames))
            except BadMessage:
                continue

    def close(self, channel: str) -> None:
        self._monitors.pop(channel).close(0)
        self.sockets.pop(channel).close(0)

    def is_let_in(self, channel: str) -> bool:
        return zmq.EVENT_HANDSHAKE_SUCCEEDED in self._told(channel)

    def is_closed(self, channel: str) -> bool:
        """Whether the other side has hung up on this connection."""
        return zmq.EVENT_DISCONNECTED in self._told(channel)

    def _told(self, channel: str) -> set[int]:
        while self._monitors[channel].poll(0):
            message = parse_monitor_message(self._monitors[channel].recv_multipart())
            self._news[channel].add(int(message["event"]))
        return self._news[channel]

    def sealer(self, size: int, **changes: object) -> Sealer:
        about = {"federation": EXPERIMENT, "schema": SCHEMA, "size": size, "epoch": self.epoch} | changes
        return Sealer(self.identity, **about)


def sign_hello(identity: Identity, hello: Hello) -> bytes:
    signed = {name: getattr(hello, name) for name in hello.__slots__ if name != "signature"}
    return identity.sign(HELLO_CONTEXT, pack(signed))


def chunks_of(sealed: Sealed) -> list[bytes]:
    return [bytes(sealed.chunk(index)) for index in range(sealed.chunks)]
