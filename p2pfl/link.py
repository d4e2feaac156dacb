"""ZeroMQ: the only place that knows sockets. One ROUTER in, two DEALERs out for each peer that is dialled.

Every connection is CURVE (libzmq: forward secrecy, all work before authentication in C) and every client key is asked
of the roster by ZAP, so no frame of a stranger is ever read here, and each frame tells which member it came from.
Control and bulk are two connections a peer, so 100 MB cannot delay a heartbeat. Sending never blocks: what cannot be
sent now is dropped, and the node finds out by what does not come back.

An update travels as an offer (its signed manifest and key) and chunks, both on the bulk connection. An offer carries
credit for the first WINDOW chunks; more is granted as chunks are opened. Nothing is allocated for an offer before its
signature, sizes, epoch and round are found right, and nothing of it leaves this file before all of it is.

The driver calls `poll`, performs what follows, and calls `send`. This file decides nothing about rounds.
"""

from __future__ import annotations

import math
import os
import socket as sockets
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import zmq
from zmq.utils.monitor import parse_monitor_message

from p2pfl.envelope import Buffers, Opening, Sealed, verify
from p2pfl.identity import Identity, Member, Roster, fingerprint_of
from p2pfl.messages import (
    PROTOCOL_VERSION,
    BadInput,
    BadMessage,
    Channel,
    Chunk,
    Describe,
    Event,
    Goodbye,
    Grant,
    Heartbeat,
    Hello,
    LinkDown,
    LinkUp,
    Message,
    Offer,
    Received,
    Refused,
    Rejected,
    Update,
    WireMessage,
    difference,
    printable,
)
from p2pfl.wire import MAX_FRAME, decode, encode, pack

WINDOW = 8  # chunks (8 MiB) that may be under way to one peer beyond what it has opened
HELLO_CONTEXT = b"hello"
ZAP_DOMAIN = b"p2pfl"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by RFC 27
HANDSHAKE_MS = 5_000  # a connection that has not authenticated by then is closed by libzmq
KEEPALIVE_MS = 2_000  # between two pings of libzmq on an idle connection
KEEPALIVE_TIMEOUT_MS = 6_000  # without an answer libzmq closes the connection and dials again
RECONNECT_MS = 50  # first attempt after a broken connection …
RECONNECT_MAX_MS = 2_000  # … doubling up to this
QUEUE = 64  # messages in a socket's queue, each way and peer; bulk is bounded far lower, by credit
BATCH = 256  # messages read from one socket before the others get their turn
REMEMBERED_MANIFESTS = 8  # of each peer, to prove that it signed two updates for one round
GUARD_INTERVAL = 1.0  # seconds between two looks at what connections hold back
MAX_UNDELIVERED = 24 << 20  # bytes received on one connection that no whole message has come of: 3 windows
FRAME_OVERHEAD = 64  # bytes; more than ZMTP and CURVE add to a frame
RETRY = 1.0  # seconds before the keys of the roster are tried again at an address where none of them lives
TCP_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in Linux' struct tcp_info


class _Event(IntEnum):
    """The monitor events of libzmq that matter here (pyzmq's own names for them differ between versions)."""

    CONNECTED = 0x0001
    ACCEPTED = 0x0020
    DISCONNECTED = 0x0200
    HANDSHAKE_FAILED = 0x0800
    HANDSHAKE_SUCCEEDED = 0x1000
    HANDSHAKE_PROTOCOL = 0x2000
    HANDSHAKE_AUTH = 0x4000


_MONITORED = sum(_Event)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What this node says of itself to everybody, and what theirs is compared with."""

    experiment: bytes  # digest
    schema: bytes  # digest
    size: int  # bytes of the parameters
    mass: float
    facts: Mapping[str, str]  # what stands behind the two digests, in words


@dataclass(frozen=True, slots=True)
class _Route:
    """How to reach the other end of one connection."""

    socket: zmq.Socket[bytes]
    prefix: tuple[bytes, ...]  # the routing id, on the ROUTER

    def send(self, header: bytes, body: memoryview | bytes) -> bool:
        """Hand over one message, or drop it: False."""
        try:
            self.socket.send_multipart([*self.prefix, header, body], zmq.DONTWAIT)
        except zmq.Again:
            return False  # full, or not connected
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False  # the ROUTER's peer is gone
            raise
        return True


@dataclass(slots=True)
class _Path:
    """A pair of connections to a peer: dialled by us, or accepted from it."""

    control: _Route | None = None
    bulk: _Route | None = None

    @property
    def ready(self) -> bool:
        return self.control is not None and self.bulk is not None


@dataclass(slots=True)
class _Outgoing:
    sealed: Sealed
    next: int = 0
    granted: int = WINDOW


@dataclass(slots=True)
class _Peer:
    """Everything about one member with whom we speak."""

    member: Member
    epoch: int = 0
    hello: Hello | None = None
    dialled: _Path = field(default_factory=_Path)
    accepted: _Path = field(default_factory=_Path)
    path: _Path | None = None  # the one in use: it stays while it lives, so that messages keep their order
    sending: _Outgoing | None = None
    waiting: Sealed | None = None  # the newest update that waits for the one being sent
    incoming: Opening | None = None
    granted: int = 0
    dropped: int = -1  # round of the update that was refused last: chunks of it may still be under way
    seen: int = -1  # newest round whose update came whole
    manifests: OrderedDict[int, Offer] = field(default_factory=OrderedDict)
    barred_until: float = 0.0

    @property
    def name(self) -> str:
        return self.member.name


@dataclass(slots=True)
class _Dial:
    """One address that we keep dialling, with each of the keys that may live there until one answers."""

    address: str
    candidates: tuple[Member, ...]
    which: int = 0
    control: zmq.Socket[bytes] | None = None
    bulk: zmq.Socket[bytes] | None = None
    retry_at: float | None = None
    settled: bool = False  # a candidate has answered
    refused: bool = False  # said once that it does not know us

    @property
    def member(self) -> Member:
        return self.candidates[self.which]


@dataclass(slots=True)
class _Connection:
    """One TCP or IPC connection, by file descriptor, as libzmq tells of it."""

    address: str
    peer: str | None = None
    delivered: int = 0  # bytes that came out of it as whole messages, overhead included


class Link:
    """This member's connections. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        epoch: int,
        greeting: Greeting,
        check_offer: Callable[[str, int], None],
        listen: str | None = None,
    ) -> None:
        """Listen at `listen` (an endpoint; port 0: a free one; None: only dial out). BadInput if that cannot be."""
        self.identity = identity
        self.epoch = epoch
        self.round = 0  # what a hello says that we work on; the driver keeps it up to date
        self.bytes_sent = 0
        self.bytes_received = 0
        self._greeting = greeting
        self._roster = roster
        self._check_offer = check_offer
        self._buffers = Buffers(greeting.size)
        self._peers: dict[str, _Peer] = {}
        self._dials: list[_Dial] = []
        self._channels: dict[bytes, tuple[str, Channel]] = {}  # routing id on the ROUTER → whose, and which
        self._routing_ids: dict[int, bytes] = {}  # file descriptor → routing id
        self._connections: dict[int, _Connection] = {}
        self._events: list[Event] = []
        self._unread: list[tuple[_Dial | None, Channel, int, int]] = []  # monitor events that wait for the data
        self._failure = ""
        self._next_guard = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._monitors: dict[zmq.Socket[bytes], tuple[_Dial | None, Channel]] = {}
        self._dealers: dict[zmq.Socket[bytes], tuple[_Dial, Channel]] = {}
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(ZAP_ENDPOINT)
        self._poller.register(self._zap, zmq.POLLIN)
        self._router = self._open_router(listen)
        self.address = self._router.get_string(zmq.LAST_ENDPOINT).rstrip("\0") if listen else ""

    # -- For the driver ----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When `poll` should be called if nothing happens before."""
        return min([self._next_guard, *(d.retry_at for d in self._dials if d.retry_at is not None)])

    def watch(self, descriptor: int) -> None:
        """Let `poll` also wake for this file descriptor."""
        self._poller.register(descriptor, zmq.POLLIN)

    def dial(self, address: str, names: Iterable[str] = ()) -> None:
        """Connect to `address`, where one of `names` lives (any member, if none is given), and stay connected."""
        members = [self._member(name) for name in names]
        if not members:  # oneself comes last: it may be our own address
            members = sorted(self._roster.members, key=lambda member: member.name == self.identity.name)
        dial = _Dial(address, tuple(members))
        self._dials.append(dial)
        self._connect(dial)

    def poll(self, timeout: float) -> tuple[list[Event], set[int]]:
        """Wait up to `timeout` seconds; return what happened and which watched descriptors are readable."""
        if self._unread:
            timeout = 0.0
        ready = dict(self._poller.poll(max(0, math.ceil(timeout * 1000))))
        now = time.monotonic()
        # Monitor events are read before the data but handled after it: what a peer sent before it hung up counts.
        for monitor in [s for s in ready if s in self._monitors]:
            self._read_monitor(monitor)
        if self._zap in ready:
            self._answer_zap(now)
        cut_short = False
        for inbox in [s for s in ready if s is self._router or s in self._dealers]:
            cut_short |= self._read_inbox(inbox)
        if not cut_short:
            unread, self._unread = self._unread, []
            for event in unread:
                self._monitor_event(*event, now)
        for peer in self._peers.values():
            self._pump(peer)
        if now >= self._next_guard:
            self._next_guard = now + GUARD_INTERVAL
            self._guard()
        for dial in self._dials:
            if dial.retry_at is not None and now >= dial.retry_at:
                self._connect(dial)
        events, self._events = self._events, []
        return events, {item for item in ready if isinstance(item, int)}

    def send(self, names: Iterable[str], message: Message) -> None:
        """Send to each of these peers what can be sent now; an update goes out as its credit allows."""
        frames = None if isinstance(message, Update) else encode(message)
        for name in names:
            peer = self._peers.get(name)
            if peer is None or peer.path is None:
                continue
            if frames is not None:
                self._transmit(peer.path.control, *frames)
            elif isinstance(message, Update) and isinstance(message.vector, Sealed):
                if peer.sending is None:
                    self._begin(peer, message.vector)
                elif peer.sending.sealed is not message.vector:
                    peer.waiting = message.vector

    def disconnect(self, name: str, seconds: float) -> None:
        """Close the links to this member and keep it out for so long."""
        member = self._roster.by_name(name)
        if member is None:
            return
        peer = self._peers.setdefault(name, _Peer(member))
        peer.barred_until = time.monotonic() + seconds
        self._hang_up(name)
        for dial in self._dials:
            if dial.member.name == name:
                self._close_dial(dial)
                dial.retry_at = peer.barred_until
        self._forget(peer, "quarantined")

    def replace_roster(self, roster: Roster) -> None:
        """From now on only these members: whoever is no longer among them is hung up on."""
        self._roster = roster
        for name, peer in list(self._peers.items()):
            if roster.by_name(name) != peer.member:
                self._hang_up(name)
                for dial in [d for d in self._dials if d.member.name == name]:
                    self._close_dial(dial)
                    self._dials.remove(dial)
                self._events.append(Rejected(name, "revoked", "its card is no longer in the roster"))
                self._forget(peer, "revoked")
                del self._peers[name]

    @property
    def idle(self) -> bool:
        """Whether every update has been handed over."""
        return all(peer.sending is None or peer.path is None for peer in self._peers.values())

    def close(self, linger: float) -> None:
        """Close everything; what was handed over is given `linger` seconds to leave the machine."""
        for dial in self._dials:
            self._close_dial(dial, linger)
        self._router.disable_monitor()
        for monitor in self._monitors:
            monitor.close(0)
        self._router.close(round(linger * 1000))
        self._zap.close(0)
        self._context.term()

    # -- Sockets -----------------------------------------------------------------------------------------------------

    def _member(self, name: str) -> Member:
        member = self._roster.by_name(name)
        if member is None:
            raise BadInput(f"{name} is not in the roster: add its card, which `p2pfl keygen {name}` made there")
        return member

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_secretkey = self.identity.link_secret
        socket.curve_publickey = self.identity.card.link_key
        socket.maxmsgsize = MAX_FRAME
        socket.rcvhwm = QUEUE
        socket.sndhwm = QUEUE
        socket.ipv6 = True
        socket.handshake_ivl = HANDSHAKE_MS
        socket.heartbeat_ivl = KEEPALIVE_MS
        socket.heartbeat_timeout = KEEPALIVE_TIMEOUT_MS
        socket.reconnect_ivl = RECONNECT_MS
        socket.reconnect_ivl_max = RECONNECT_MAX_MS

    def _open_router(self, listen: str | None) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        self._configure(router)
        router.ipv6 = listen is not None and "[" in listen  # else IPv4 addresses are shown as ::ffff:127.0.0.1
        router.curve_server = True
        router.zap_domain = ZAP_DOMAIN
        router.router_mandatory = True  # to an unknown routing id: an error, not silence
        self._monitor(router, None, "control")
        if listen is not None:
            try:
                router.bind(listen.removesuffix(":0") + ":*" if listen.endswith(":0") else listen)
            except zmq.ZMQError as error:
                raise BadInput(
                    f"cannot listen at {listen}: {error.strerror}; choose another port, or an address of this machine"
                ) from None
        self._poller.register(router, zmq.POLLIN)
        return router

    def _monitor(self, socket: zmq.Socket[bytes], dial: _Dial | None, channel: Channel) -> None:
        monitor: zmq.Socket[bytes] = socket.get_monitor_socket(_MONITORED)
        self._monitors[monitor] = (dial, channel)
        self._poller.register(monitor, zmq.POLLIN)

    def _connect(self, dial: _Dial) -> None:
        dial.retry_at = None
        opened = []
        for channel in ("control", "bulk"):
            dealer = self._context.socket(zmq.DEALER)
            self._configure(dealer)
            dealer.curve_serverkey = dial.member.card.link_key
            dealer.immediate = True  # queue for connections that exist, not for ones that may come
            self._monitor(dealer, dial, channel)
            self._poller.register(dealer, zmq.POLLIN)
            self._dealers[dealer] = (dial, channel)
            try:
                dealer.connect(dial.address)
            except zmq.ZMQError as error:
                raise BadInput(f"cannot dial {dial.address}: {error.strerror}; write it as HOST:PORT") from None
            opened.append(dealer)
        dial.control, dial.bulk = opened

    def _close_dial(self, dial: _Dial, linger: float = 0.0) -> None:
        for dealer in (dial.control, dial.bulk):
            if dealer is not None:
                dealer.disable_monitor()
                self._poller.unregister(dealer)
                del self._dealers[dealer]
                dealer.close(round(linger * 1000))
        for monitor in [m for m, (owner, _) in self._monitors.items() if owner is dial]:
            self._poller.unregister(monitor)
            del self._monitors[monitor]
            monitor.close(0)
        self._unread = [event for event in self._unread if event[0] is not dial]
        dial.control = dial.bulk = None

    # -- The gate ----------------------------------------------------------------------------------------------------

    def _answer_zap(self, now: float) -> None:
        """Say of each key that knocks whether it is in the roster (ZAP, RFC 27)."""
        while True:
            try:
                request = self._zap.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            version, request_id, _domain, address, _identity, mechanism, *credentials = request
            key = credentials[0] if mechanism == b"CURVE" and len(credentials) == 1 else b""
            member = self._roster.by_link_key(key)
            peer = self._peers.get(member.name) if member else None
            where = printable(address.decode("ascii", "replace"))
            if member is not None and member.name == self.identity.name:
                self._events.append(Rejected(where, "oneself", "this node was dialled by itself: remove that peer"))
                member = None
            elif member is None:
                shown = fingerprint_of(key) if key else "none"
                why = f"its link key ({shown}) is of no card in the roster; to let it in, add its card"
                self._events.append(Rejected(where, "gate_refused", why))
            elif peer is not None and now < peer.barred_until:
                self._events.append(Rejected(member.name, "quarantined", "it knocked while it was kept out"))
                member = None
            if member is not None:
                answer = [b"200", b"OK", member.name.encode(), b""]
            else:
                answer = [b"400", b"not in the roster", b"", b""]
            self._zap.send_multipart([version, request_id, *answer])

    # -- What libzmq tells of connections ----------------------------------------------------------------------------

    def _read_monitor(self, monitor: zmq.Socket[bytes]) -> None:
        dial, channel = self._monitors[monitor]
        while True:
            try:
                frames = monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            message = parse_monitor_message(frames)
            event, value = int(message["event"]), int(message["value"])
            if event in (_Event.CONNECTED, _Event.ACCEPTED):
                self._connections[value] = _Connection(_remote_address(value) or (dial.address if dial else "unknown"))
            self._unread.append((dial, channel, event, value))

    def _monitor_event(self, dial: _Dial | None, channel: Channel, event: int, value: int, now: float) -> None:
        match event:
            case _Event.HANDSHAKE_SUCCEEDED if dial is not None:
                self._greet(dial, channel)
            case _Event.HANDSHAKE_FAILED | _Event.HANDSHAKE_PROTOCOL:
                self._failure = "its handshake failed: it speaks no CURVE, or looks for another key here"
                if dial is not None and channel == "control" and not dial.settled:
                    self._next_candidate(dial, now)
            case _Event.HANDSHAKE_AUTH:
                self._failure = "auth"
                if dial is not None and channel == "control" and not dial.refused:
                    dial.refused = True
                    why = f"{dial.member.name} does not let us in: its roster lacks our card, or it keeps us out"
                    self._events.append(Rejected(dial.address, "refused_by_peer", why))
            case _Event.DISCONNECTED:
                self._disconnected(dial, channel, value)

    def _disconnected(self, dial: _Dial | None, channel: Channel, descriptor: int) -> None:
        connection = self._connections.pop(descriptor, None)
        failure, self._failure = self._failure, ""
        if dial is not None:
            peer = self._peers.get(dial.member.name)
            if peer is not None:
                self._forget_channel(peer, peer.dialled, channel)
            return
        routing_id = self._routing_ids.pop(descriptor, b"")
        name, channel = self._channels.pop(routing_id, ("", channel))
        peer = self._peers.get(name)
        if peer is not None:
            route = getattr(peer.accepted, channel)
            if route is not None and route.prefix == (routing_id,):
                self._forget_channel(peer, peer.accepted, channel)
        elif connection is not None and connection.peer is None and failure != "auth":
            why = failure or "it hung up before it had said who it is"
            self._events.append(Rejected(connection.address, "gate_refused", why))

    def _next_candidate(self, dial: _Dial, now: float) -> None:
        if len(dial.candidates) == 1:
            return  # libzmq dials again by itself
        self._close_dial(dial)
        dial.which = (dial.which + 1) % len(dial.candidates)
        dial.retry_at = now if dial.which else now + RETRY

    def _guard(self) -> None:
        """Hang up on connections on which a message without end piles up: no queue limit of libzmq counts those."""
        for descriptor, connection in list(self._connections.items()):
            received = _bytes_received(descriptor, connection.address)
            if received is None:
                continue
            held_back = received - connection.delivered
            if held_back < 0:
                connection.delivered = received  # the overhead was estimated too high; do not let that add up
            elif held_back > MAX_UNDELIVERED:
                _shut_down(descriptor, connection.address)
                why = f"{held_back >> 20} MiB came on one connection without a whole message"
                self._events.append(Rejected(connection.peer or connection.address, "flood", why))

    def _hang_up(self, name: str) -> None:
        for descriptor, connection in self._connections.items():
            if connection.peer == name:
                _shut_down(descriptor, connection.address)

    # -- Handshake ---------------------------------------------------------------------------------------------------

    def _greet(self, dial: _Dial, channel: Channel) -> None:
        dealer = dial.control if channel == "control" else dial.bulk
        if dealer is not None:
            self._transmit(_Route(dealer, ()), *encode(self._hello(dial.member, channel, answer=False)))

    def _hello(self, member: Member, channel: Channel, answer: bool) -> Hello:
        peer = self._peers.get(member.name)
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            name=self.identity.name,
            recipient=member.name,
            channel=channel,
            answer=answer,
            epoch=self.epoch,
            round=self.round,
            mass=self._greeting.mass,
            seen=peer.seen if peer else -1,
            seen_epoch=peer.epoch if peer else 0,
            experiment=self._greeting.experiment,
            schema=self._greeting.schema,
        )
        return replace(hello, signature=self.identity.sign(HELLO_CONTEXT, _signed_part(hello)))

    def _handle_hello(self, member: Member, hello: Hello, route: _Route, channel: Channel | None) -> None:
        """`channel` is None on an accepted connection that has not said yet which one it is."""
        name = member.name
        if name == self.identity.name or hello.name != name or hello.recipient != self.identity.name:
            raise BadMessage("bad_hello", f"the hello is of {hello.name} for {hello.recipient}")
        if hello.answer == bool(route.prefix) or (channel is not None and hello.channel != channel):
            raise BadMessage("bad_hello", "the hello is of the other side, or for the other channel")
        if not member.card.verify(HELLO_CONTEXT, _signed_part(hello), hello.signature):
            raise BadMessage("bad_hello", "the hello is not signed by the identity key of the member")
        peer = self._peers.setdefault(name, _Peer(member))
        if hello.epoch < peer.epoch:
            raise BadMessage("stale_epoch", f"epoch {hello.epoch} of a member whose epoch {peer.epoch} was seen")
        if (hello.experiment, hello.schema) != (self._greeting.experiment, self._greeting.schema):
            if hello.channel == "control":
                self._transmit(route, *encode(Describe(self._greeting.facts)))
                if not hello.answer:
                    self._transmit(route, *encode(self._hello(member, "control", answer=True)))
            return
        if hello.epoch > peer.epoch:
            self._forget(peer, "it was started again")
            self._peers[name] = peer = _Peer(member, hello.epoch, barred_until=peer.barred_until)
        peer.hello = hello
        path = peer.accepted if route.prefix else peer.dialled
        setattr(path, hello.channel, route)
        if not hello.answer:
            self._transmit(route, *encode(self._hello(member, hello.channel, answer=True)))
        if path.ready and peer.path is None:
            self._link_up(peer, path)

    def _link_up(self, peer: _Peer, path: _Path) -> None:
        hello = peer.hello
        assert hello is not None
        peer.path = path
        seen = hello.seen if hello.seen_epoch == self.epoch else -1
        self._events.append(LinkUp(peer.name, hello.epoch, hello.round, hello.mass, seen))

    def _forget_channel(self, peer: _Peer, path: _Path, channel: Channel) -> None:
        """One of the two connections of this path is gone; the other side of it says hello again when it is back."""
        setattr(path, channel, None)
        if peer.path is path:
            self._link_down(peer, f"the {channel} connection broke")
            other = peer.accepted if path is peer.dialled else peer.dialled
            if other.ready:
                self._link_up(peer, other)

    def _forget(self, peer: _Peer, why: str) -> None:
        peer.dialled, peer.accepted = _Path(), _Path()
        if peer.path is not None:
            self._link_down(peer, why)

    def _link_down(self, peer: _Peer, why: str) -> None:
        if peer.incoming is not None:
            peer.dropped = peer.incoming.manifest.round
        peer.path = peer.sending = peer.waiting = peer.incoming = None
        self._events.append(LinkDown(peer.name, why))

    # -- What comes in -----------------------------------------------------------------------------------------------

    def _read_inbox(self, inbox: zmq.Socket[bytes]) -> bool:
        """Handle what has come on this socket; True if there may be more."""
        for _ in range(BATCH):
            if inbox.closed:
                return False  # its dial was closed by what it said
            try:
                frames = inbox.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return False
            self._handle_frames(inbox, frames)
        return True

    def _handle_frames(self, inbox: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        size = sum(len(frame) for frame in frames)
        self.bytes_received += size
        name = str(frames[-1].get("User-Id")) if inbox is self._router else self._dealers[inbox][0].member.name
        member = self._roster.by_name(name)
        if member is None:
            self._events.append(Rejected(name, "revoked", "its card is no longer in the roster"))
            return
        descriptor = int(frames[-1].get(zmq.SRCFD))
        connection = self._connections.setdefault(descriptor, _Connection(_remote_address(descriptor) or "unknown"))
        connection.peer = name
        connection.delivered += size + FRAME_OVERHEAD * len(frames)
        try:
            if inbox is self._router:
                self._handle_accepted(member, descriptor, frames)
            else:
                self._handle_dialled(member, inbox, frames)
        except BadMessage as error:
            self._reject(name, error)

    def _handle_accepted(self, member: Member, descriptor: int, frames: list[zmq.Frame]) -> None:
        routing_id = frames[0].bytes
        if len(frames) != 3:
            raise BadMessage("bad_frames", f"{len(frames) - 1} frames where a message has 2")
        message = decode(frames[1].buffer, frames[2].buffer)
        _, channel = self._channels.get(routing_id, ("", None))
        if isinstance(message, Hello):
            self._handle_hello(member, message, _Route(self._router, (routing_id,)), channel)
            self._channels[routing_id] = (member.name, message.channel)
            self._routing_ids[descriptor] = routing_id
        else:
            self._handle_message(member, message, channel)

    def _handle_dialled(self, member: Member, dealer: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        dial, channel = self._dealers[dealer]
        if len(frames) != 2:
            raise BadMessage("bad_frames", f"{len(frames)} frames where a message has 2")
        message = decode(frames[0].buffer, frames[1].buffer)
        if isinstance(message, Hello):
            dial.settled = True
            self._handle_hello(member, message, _Route(dealer, ()), channel)
        else:
            self._handle_message(member, message, channel)

    def _handle_message(self, member: Member, message: WireMessage, channel: Channel | None) -> None:
        peer = self._peers.get(member.name)
        if isinstance(message, Describe) and channel == "control":
            why = difference(self._greeting.facts, message.facts)
            raise BadMessage("experiment_mismatch", why)
        if channel is None or peer is None or peer.path is None:
            raise BadMessage("no_hello", f"{type(message).__name__} before the handshake")
        if (channel == "bulk") != isinstance(message, (Offer, Chunk)):
            raise BadMessage("wrong_channel", f"{type(message).__name__} on the {channel} connection")
        match message:
            case Heartbeat() | Goodbye():
                self._events.append(Received(peer.name, message))
            case Grant(round, chunks):
                if peer.sending is not None and peer.sending.sealed.round == round:
                    peer.sending.granted = max(peer.sending.granted, chunks)
            case Refused(round, _code):
                if peer.sending is not None and peer.sending.sealed.round == round:
                    peer.sending = None
            case Offer():
                self._offer(peer, message)
            case Chunk():
                self._chunk(peer, message)
            case Describe() | Hello():
                pass

    def _reject(self, name: str, error: BadMessage, evidence: tuple[bytes, ...] = ()) -> None:
        self._events.append(Rejected(name, error.code, error.why, evidence))

    def _offer(self, peer: _Peer, offer: Offer) -> None:
        greeting = self._greeting
        manifest = verify(offer, peer.member.card, greeting.experiment, greeting.schema, greeting.size)
        before = peer.manifests.get(manifest.round)
        try:
            if manifest.epoch != peer.epoch:
                raise BadMessage("stale", f"an update of epoch {manifest.epoch}; this is epoch {peer.epoch}")
            if before is not None and before.manifest != offer.manifest:
                evidence = (before.manifest, before.signature, offer.manifest, offer.signature)
                error = BadMessage("equivocation", f"two different updates were signed for round {manifest.round}")
                self._drop_incoming(peer, manifest.round)
                self._reject(peer.name, error, evidence)
                return
            if before is not None and manifest.round <= peer.seen:
                raise BadMessage("duplicate", f"the update of round {manifest.round} again")
            self._check_offer(peer.name, manifest.round)
        except BadMessage as error:
            peer.dropped = manifest.round
            if peer.path is not None:
                self._transmit(peer.path.control, *encode(Refused(manifest.round, error.code)))
            raise
        peer.manifests[manifest.round] = offer
        while len(peer.manifests) > REMEMBERED_MANIFESTS:
            peer.manifests.popitem(last=False)
        peer.incoming = Opening(manifest, offer.key, self._buffers.take())  # a half-received older one is dropped
        peer.granted = WINDOW

    def _chunk(self, peer: _Peer, chunk: Chunk) -> None:
        opening = peer.incoming
        if opening is None or opening.manifest.round != chunk.round:
            if chunk.round == peer.dropped:
                return  # it was under way when its update was refused
            raise BadMessage("unexpected_chunk", f"chunk {chunk.index} of round {chunk.round}, which was not offered")
        try:
            if chunk.index >= peer.granted:
                raise BadMessage("no_credit", f"chunk {chunk.index} where {peer.granted} were granted")
            opening.add(chunk.index, chunk.sealed)
            if not opening.complete:
                self._grant(peer, opening)
                return
            lease = opening.finish()
        except BadMessage:
            self._drop_incoming(peer, chunk.round)
            raise
        manifest = opening.manifest
        peer.incoming = None
        peer.seen = manifest.round
        self._events.append(Received(peer.name, Update(manifest.round, manifest.mass, manifest.reach, lease)))

    def _grant(self, peer: _Peer, opening: Opening) -> None:
        # In steps of half a window: one small message for four big ones.
        if peer.granted < opening.chunks and peer.granted - opening.next <= WINDOW // 2 and peer.path is not None:
            peer.granted = min(opening.next + WINDOW, opening.chunks)
            self._transmit(peer.path.control, *encode(Grant(opening.manifest.round, peer.granted)))

    def _drop_incoming(self, peer: _Peer, round: int) -> None:
        peer.incoming = None
        peer.dropped = round

    # -- What goes out -----------------------------------------------------------------------------------------------

    def _transmit(self, route: _Route | None, header: bytes, body: memoryview | bytes) -> bool:
        if route is None or route.socket.closed or not route.send(header, body):
            return False
        self.bytes_sent += len(header) + len(body)
        return True

    def _begin(self, peer: _Peer, sealed: Sealed) -> None:
        assert peer.path is not None
        peer.sending = _Outgoing(sealed) if self._transmit(peer.path.bulk, *encode(sealed.offer)) else None
        self._pump(peer)

    def _pump(self, peer: _Peer) -> None:
        """Send as many chunks as the peer has granted."""
        while peer.sending is not None and peer.path is not None:
            outgoing = peer.sending
            sealed = outgoing.sealed
            while outgoing.next < min(outgoing.granted, sealed.chunks):
                chunk = Chunk(sealed.round, outgoing.next, sealed.chunk(outgoing.next))
                if not self._transmit(peer.path.bulk, *encode(chunk)):
                    peer.sending = peer.waiting = None  # dropped; the node goes by what does not come back
                    return
                outgoing.next += 1
            if outgoing.next < sealed.chunks:
                return
            peer.sending = None
            if peer.waiting is not None:
                waiting, peer.waiting = peer.waiting, None
                self._begin(peer, waiting)


def _signed_part(hello: Hello) -> bytes:
    return pack({name: getattr(hello, name) for name in hello.__slots__ if name != "signature"})


# -- File descriptors of libzmq --------------------------------------------------------------------------------------
# libzmq names its descriptors in monitor events. Each is looked at through a short-lived duplicate (a lasting one would
# keep the connection open), and only while it still has the remote address that it had: numbers are used again.


def _duplicate(descriptor: int) -> sockets.socket | None:
    try:
        return sockets.socket(fileno=os.dup(descriptor))
    except OSError:
        return None  # closed in the meantime


def _address_of(duplicate: sockets.socket) -> str | None:
    try:
        peer = duplicate.getpeername()
    except OSError:
        return None
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "ipc"


def _remote_address(descriptor: int) -> str | None:
    duplicate = _duplicate(descriptor)
    if duplicate is None:
        return None
    with duplicate:
        return _address_of(duplicate)


def _bytes_received(descriptor: int, address: str) -> int | None:
    """Bytes that have come on this TCP connection; None where the system does not tell (not Linux, not TCP)."""
    duplicate = _duplicate(descriptor)
    if duplicate is None:
        return None
    with duplicate:
        if not hasattr(sockets, "TCP_INFO") or _address_of(duplicate) != address:
            return None
        try:
            info = duplicate.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, TCP_BYTES_RECEIVED + 8)
        except OSError:
            return None
        return struct.unpack_from("=Q", info, TCP_BYTES_RECEIVED)[0] if len(info) >= TCP_BYTES_RECEIVED + 8 else None


def _shut_down(descriptor: int, address: str) -> None:
    duplicate = _duplicate(descriptor)
    if duplicate is None:
        return
    with duplicate:
        if _address_of(duplicate) == address:
            try:
                duplicate.shutdown(sockets.SHUT_RDWR)
            except OSError:
                return  # it is closed already
