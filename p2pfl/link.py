"""ZeroMQ: the only place that knows sockets. One ROUTER in, two DEALERs out for each peer that is dialled.

Every connection is CURVE (libzmq: forward secrecy, all work before authentication in C) and every client key is asked
of the roster by ZAP, so no frame of a stranger is ever read here, and each frame tells which member it came from.
Control and bulk are two connections a peer, so 100 MB cannot delay a heartbeat. Sending never blocks: what cannot be
sent now is dropped, and the node finds out by what does not come back.

An update travels as an offer (its signed manifest and key) and chunks, both on the bulk connection. An offer carries
credit for the first WINDOW chunks; more is granted as chunks are opened, and credit beyond the last chunk says that all
came and the next update may be offered. So an honest peer never has more than WINDOW chunks under way. Nothing is
allocated for an offer before its signature, sizes, epoch and round are found right, and nothing of it leaves this file
before all of it is. When a link breaks on the way, what has come is kept for a while: if the same update is offered
again, its first WINDOW chunks come once more, for nothing, and then the transfer goes on where it stopped.

The driver calls `poll`, performs what follows, and calls `send`. This file decides nothing about rounds.
"""

from __future__ import annotations

import itertools
import math
import os
import socket as sockets
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TypeAlias, get_args

import zmq
from zmq.utils.monitor import parse_monitor_message

from p2pfl.envelope import (
    MASKED,
    WHOLE,
    Buffers,
    Manifest,
    Opening,
    Sealed,
    sign_statement,
    signed_manifest,
    statement_holds,
    verify,
)
from p2pfl.identity import Identity, Member, Roster, fingerprint_of
from p2pfl.masks import check_key
from p2pfl.messages import (
    PROTOCOL_VERSION,
    Accusation,
    BadInput,
    BadMessage,
    Channel,
    Chunk,
    Describe,
    Event,
    Gathering,
    Goodbye,
    Gossip,
    Grant,
    Heartbeat,
    Hello,
    LinkDown,
    LinkUp,
    MaskKey,
    MemberRecord,
    Message,
    Offer,
    Receipt,
    Received,
    Refused,
    Rejected,
    Resume,
    Update,
    WireMessage,
    difference,
    printable,
)
from p2pfl.wire import MAX_FRAME, decode, encode, pack

EARLY = 8  # of what a peer says while only one of its two connections is there: the last few, for when both are
WINDOW = 4  # chunks (4 MiB) that may be under way to one peer: enough for 1 Gbit/s at a round trip of 30 ms
PARTIAL = 60.0  # seconds that a part of an update is kept for a link to come back; it holds the room of one update
HELLO_CONTEXT = b"hello"
ZAP_DOMAIN = b"p2pfl"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by RFC 27
HANDSHAKE_MS = 8_000  # a connection that has not authenticated by then is closed: three round trips of 2 s, and room
KEEPALIVE_MS = 2_000  # between two pings of libzmq on an idle connection
KEEPALIVE_TIMEOUT_MS = 6_000  # without an answer libzmq closes the connection and dials again
RECONNECT_MS = 50  # first attempt after a broken connection …
RECONNECT_MAX_MS = 2_000  # … doubling up to this
MAX_WAITING = 2  # updates for one peer, beside the one that is being sent
QUEUE = 64  # messages in a socket's queue, each way and peer; bulk is bounded far lower, by credit
SOCKETS = 16_384  # of ZeroMQ in this process; a peer that is dialled takes six, monitors and their inner ends included
BATCH = 256  # messages read from one socket before the others get their turn
LATE_NOTICES = 1_024  # events of connections that may wait until what came on them is read
REMEMBERED_MANIFESTS = 8  # of each peer, to prove that it signed two updates for one round
MAX_FRAMES = 3  # of a message on the ROUTER: routing id, header, body
GUARD_INTERVAL = 0.02  # seconds between two looks at what connections hold back: an attacker's head start
MAX_UNDELIVERED = 5 << 20  # bytes from one peer that no whole message has come of: a window and a quarter
OWN_PAUSE = 1.0  # seconds between two looks after which one does not blame others for what has piled up
PING_BYTES = 64  # a second: what the pings and pongs of libzmq take on a connection, and more
MAX_SILENCE = 15.0  # seconds that an accepted connection may take to say who it is: two round trips more
FRAME_OVERHEAD = 64  # bytes; more than ZMTP and CURVE add to a frame
RETRY = 0.5  # seconds before an address is dialled again where nobody, or nobody whom we know, let us in
STEADY = 5.0  # seconds after which a connection that breaks is made again at once, and not after RETRY
SPARE_RETRY = 30.0  # seconds before a second address of a member to whom we are connected is dialled again
MOMENT = 10.0  # seconds that a broken link is counted as one that may come back
MAX_BARRED = 1_024  # addresses that are kept out
TERM_SECONDS = 1.0  # that libzmq is given to end beyond the lingering
TCP_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in Linux' struct tcp_info


_Socket: TypeAlias = "zmq.Socket[bytes]"
INTERRUPTED = "interrupted"  # code of an update that broke off: it may be offered again
GAP = "gap"  # code of an update that continues one which is not there: a whole one is needed
LAST_WORDS = ("bad_hello", "no_hello", "quarantined")  # mistakes after which a connection is closed


class _Event(IntEnum):
    """The monitor events of libzmq that matter here (pyzmq's own names for them differ between versions)."""

    CONNECTED = 0x0001
    ACCEPTED = 0x0020
    DISCONNECTED = 0x0200
    HANDSHAKE_FAILED = 0x0800
    HANDSHAKE_SUCCEEDED = 0x1000
    HANDSHAKE_AUTH = 0x4000


# Not 0x2000, a protocol error: libzmq 4.3.5 tells of it whenever a byte was altered, and in the telling forgets that it
# meant to hang up. Such a connection would stand still for eight seconds, until the keepalive ends it.
_MONITORED = sum(_Event)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What this node says of itself to everybody, and what theirs is compared with."""

    experiment: bytes  # digest
    schema: bytes  # digest
    size: int  # bytes of a whole update
    mass: float
    facts: Mapping[str, str]  # what stands behind the two digests, in words
    # The other codecs that updates may come in, and the bytes that each takes.
    packed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Route:
    """How to reach the other end of one connection."""

    socket: _Socket
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
    granted: int  # chunks; more than there are: all have come
    next: int = 0

    def skip_to(self, start: int) -> None:
        """The chunks below `start` came over an earlier link."""
        self.next = max(self.next, start)
        self.granted = max(self.granted, min(self.next + WINDOW, self.sealed.chunks))


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
    # The newest updates that wait for the one being sent. Two: one can be a round ahead of the word that its last
    # update has arrived, and a neighbour that keeps in step needs each of them.
    waiting: deque[Sealed] = field(default_factory=lambda: deque(maxlen=MAX_WAITING))
    left: bool = False  # it said goodbye
    interrupted_at: float = -math.inf  # when its link broke, while it may still have wanted something from us
    incoming: Opening | None = None
    granted: int = 0  # to it, of the update that comes in
    repeats: int = 0  # how many of the update's first chunks, which are here, are still to come once more
    partial: Opening | None = None  # what had come in of an update when the link broke
    partial_until: float = 0.0
    owed: Grant | Resume | Refused | None = None  # what it waits for, until it could be handed over
    answered: Grant | Resume | Refused | None = None  # what it was told last of an update of its
    early: deque[Heartbeat | Goodbye | Gossip | MaskKey | Gathering] = field(
        default_factory=lambda: deque(maxlen=EARLY)
    )  # see EARLY
    dropped: int = -1  # round of the update that was refused last: chunks of it may still be under way
    seen: int = -1  # newest round whose update came whole
    manifests: OrderedDict[tuple[int, str], Offer] = field(default_factory=OrderedDict)  # by `_which`

    @property
    def name(self) -> str:
        return self.member.name


@dataclass(slots=True)
class _Dial:
    """One address that we keep dialling, with each of the keys that may live there until one answers."""

    address: str
    names: tuple[str, ...]  # who may live there; empty: any member
    candidates: tuple[Member, ...]
    which: int = 0
    control: _Socket | None = None
    bulk: _Socket | None = None
    retry_at: float | None = None
    connected: set[Channel] = field(default_factory=set)  # those on which the candidate has proven its key
    answered: bool = False  # on the control connection, since it was made
    settled: bool = False  # a candidate has answered
    refused: bool = False  # said once that it does not know us

    @property
    def member(self) -> Member:
        return self.candidates[self.which]


@dataclass(slots=True)
class _Connection:
    """One TCP or IPC connection."""

    inbox: _Socket  # of ours, on which it comes in
    descriptor: int
    address: str  # of the other end
    since: float
    peer: str | None = None  # who has spoken on it
    channel: Channel | None = None  # what its hello said; None before
    routing_id: bytes = b""  # on the ROUTER, from its first message on
    delivered: int = 0  # bytes that came out of it as whole messages, overhead included
    shut: bool = False  # we hung up: what was under way counts for nothing


@dataclass(frozen=True, slots=True)
class _Notice:
    """Something that libzmq told of a connection."""

    inbox: _Socket
    dial: _Dial | None  # None: accepted
    channel: Channel  # of the dial
    event: int
    connection: _Connection | None


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
        has_base: Callable[[str, int], bool] = lambda _peer, _base: True,
    ) -> None:
        """Listen at `listen` (an endpoint; port 0: a free one; None: only dial out). BadInput if that cannot be.

        `check_offer` raises BadMessage for an update that is not wanted from this peer, by its round; `has_base` says
        whether the one is here that it continues.
        """
        self.identity = identity
        self.epoch = epoch
        self.round = 0  # what a hello says that we work on; the driver keeps it up to date
        self.bytes_sent = 0
        self.bytes_received = 0
        self.successor = 0  # epoch of a later process of this very identity, once that is proven; 0: there is none
        self._greeting = greeting
        self._roster = roster
        self._check_offer = check_offer
        self._has_base = has_base
        self.lacking: set[str] = set()  # those who have said that they need a whole update
        self._buffers = Buffers(max(greeting.size, *greeting.packed.values(), 0))
        self._peers: dict[str, _Peer] = {}
        self._dials: list[_Dial] = []
        self._connections: dict[tuple[_Socket, int], _Connection] = {}  # by our socket and its file descriptor
        self._spoken: dict[bytes, _Connection] = {}  # those on the ROUTER that have sent something, by routing id
        self._genuine_records: dict[str, MemberRecord] = {}  # the last one of each member whose signature held
        self._genuine_keys: dict[str, MaskKey] = {}  # the same of their mask keys
        self._barred: dict[str, float] = {}  # members and addresses → until when they are kept out
        self._events: list[Event] = []
        self._notices: list[_Notice] = []
        self._turned_away = 0  # connections that the gate refused, and of whose end is still to be told
        self._looked_at = self._next_guard = time.monotonic()
        self._context: zmq.Context[_Socket] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, SOCKETS)
        self._poller = zmq.Poller()
        self._monitor_numbers = itertools.count()
        self._monitors: dict[_Socket, tuple[_Socket, _Dial | None, Channel]] = {}
        self._dealers: dict[_Socket, tuple[_Dial, Channel]] = {}
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(ZAP_ENDPOINT)
        self._poller.register(self._zap, zmq.POLLIN)
        self._router = self._open_router(listen)
        self._router_monitor = self._monitor(self._router, None, "control")
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
        names = tuple(names)
        for name in names:
            if self._roster.by_name(name) is None:
                raise BadInput(f"{name} is not in the roster: add its card, which `p2pfl keygen {name}` made there")
        dial = _Dial(address, names, self._candidates(names))
        self._dials.append(dial)
        try:
            self._connect(dial)
        except zmq.ZMQError as error:
            raise BadInput(f"cannot dial {address}: {error.strerror}; write it as HOST:PORT") from None

    def poll(self, timeout: float) -> tuple[list[Event], set[int]]:
        """Wait up to `timeout` seconds; return what happened and which watched descriptors are readable."""
        if self._notices:
            timeout = 0.0
        ready = dict(self._poller.poll(max(0, math.ceil(timeout * 1000))))
        now = time.monotonic()
        for monitor in [s for s in ready if s in self._monitors]:
            self._read_monitor(monitor, now)
        if self._zap in ready:
            self._answer_zap(now)
        inboxes = [s for s in ready if s is self._router or s in self._dealers]
        busy = {inbox for inbox in inboxes if self._read_inbox(inbox, now)}
        # Read before the data, handled after it: what a peer sent before it hung up counts. But whoever sends without
        # end must not fill our memory with the comings and goings of others.
        notices, self._notices = self._notices, []
        for notice in notices:
            if notice.inbox in busy and len(notices) < LATE_NOTICES:
                self._notices.append(notice)
            elif not notice.inbox.closed:  # by what an earlier one told of
                self._take_notice(notice, now)
        for peer in self._peers.values():
            self._settle(peer)
            self._pump(peer)
        if now >= self._next_guard:
            self._next_guard = now + GUARD_INTERVAL
            self._guard(now)
            self._drop_partials(now)
        for dial in self._dials:
            if dial.retry_at is not None and now >= dial.retry_at:
                self._redial(dial, now)
        events, self._events = self._events, []
        return events, {item for item in ready if isinstance(item, int)}

    def send(self, names: Iterable[str], message: Message) -> None:
        """Send to each of these peers what can be sent now; an update goes out as its credit allows."""
        if isinstance(message, Gossip):
            message = self._signed(message)
        elif isinstance(message, Gathering):
            message = sign_statement(message, self.identity, self._greeting.experiment)
        frames = None if isinstance(message, Update) else encode(message)
        for name in names:
            peer = self._peers.get(name)
            if peer is None or peer.path is None:
                continue
            if frames is not None:
                self._transmit(peer.path.control, *frames)
            elif isinstance(message, Update) and isinstance(message.vector, Sealed):
                under_way = () if peer.sending is None else (peer.sending.sealed,)
                if not any(sealed is message.vector for sealed in (*under_way, *peer.waiting)):
                    peer.waiting.append(message.vector)
                self._pump(peer)

    def _signed(self, gossip: Gossip) -> Gossip:
        """With the own record signed, as it is when it leaves."""
        records = [
            sign_statement(record, self.identity, self._greeting.experiment)
            if record.name == self.identity.name
            else record
            for record in gossip.records
        ]
        return Gossip(tuple(records), gossip.hints)

    def is_dialling(self, name: str) -> bool:
        """Whether there is an address at which this member is sought, or found."""
        return any(name in dial.names or (dial.settled and dial.member.name == name) for dial in self._dials)

    def disconnect(self, name: str, seconds: float) -> None:
        """Close the links to this member (or address) and keep it out for so long."""
        now = time.monotonic()
        if len(self._barred) >= MAX_BARRED:
            self._barred = {who: until for who, until in self._barred.items() if until > now}
        if len(self._barred) < MAX_BARRED or self._roster.by_name(name) is not None:
            self._barred[name] = now + seconds
        peer = self._peers.get(name)
        if peer is not None:
            self._forget(peer, "quarantined")
            peer.partial = None
            peer.manifests.clear()  # or the proof that shut it out would do so again whenever somebody shows it
        self._hang_up(name)
        for dial in self._dials:
            if dial.member.name == name:
                self._close_dial(dial)
                dial.retry_at = now + seconds

    def replace_roster(self, roster: Roster) -> None:
        """From now on only these members: whoever is no longer among them is hung up on, and not dialled again."""
        self._roster = roster
        for name, peer in list(self._peers.items()):
            member = roster.by_name(name)
            if member is not None and member.card == peer.member.card:
                peer.member = member
                continue
            self._events.append(Rejected(name, "revoked", "its card is no longer in the roster"))
            self._forget(peer, "revoked")
            self._hang_up(name)
            del self._peers[name]
        for dial in list(self._dials):
            current, dial.candidates = dial.member.card, self._candidates(dial.names)
            cards = [member.card for member in dial.candidates]
            if current in cards:
                dial.which = cards.index(current)
                continue
            self._close_dial(dial)
            dial.which, dial.settled, dial.retry_at = 0, False, 0.0
            if not cards:
                self._dials.remove(dial)

    @property
    def idle(self) -> bool:
        """Whether every update has arrived at every peer that is there."""
        return all(peer.path is None or (peer.sending is None and not peer.waiting) for peer in self._peers.values())

    @property
    def interrupted(self) -> bool:
        """Whether a link broke a moment ago whose peer may come back for what it lacks, be it not even made yet."""
        moment = time.monotonic() - MOMENT
        return any(peer.path is None and peer.interrupted_at > moment for peer in self._peers.values())

    def close(self, linger: float) -> None:
        """Close everything; what was handed over is given `linger` seconds to leave the machine."""
        for dial in self._dials:
            self._close_dial(dial, linger)
        self._router.disable_monitor()
        self._router_monitor.close(0)
        self._router.close(round(linger * 1000))
        self._zap.close(0)
        # libzmq 4.3.5 can forget the linger time and wait for ever where a peer hangs up in the moment in which we do
        # (measured: a ROUTER alone, once in some thousand closes). Every socket of ours has had its time by then.
        ending = threading.Thread(target=self._context.term, daemon=True)
        ending.start()
        ending.join(linger + TERM_SECONDS)

    # -- Sockets -----------------------------------------------------------------------------------------------------

    def _candidates(self, names: tuple[str, ...]) -> tuple[Member, ...]:
        """The members of these names, or all; oneself comes last: the address may be our own."""
        members = [member for member in self._roster.members if not names or member.name in names]
        return tuple(sorted(members, key=lambda member: member.name == self.identity.name))

    def _configure(self, socket: _Socket) -> None:
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

    def _open_router(self, listen: str | None) -> _Socket:
        router = self._context.socket(zmq.ROUTER)
        self._configure(router)
        router.ipv6 = listen is not None and "[" in listen  # else IPv4 addresses are shown as ::ffff:127.0.0.1
        router.curve_server = True
        router.zap_domain = ZAP_DOMAIN
        router.router_mandatory = True  # to an unknown routing id: an error, not silence
        if listen is not None:
            try:
                router.bind(listen.removesuffix(":0") + ":*" if listen.endswith(":0") else listen)
            except zmq.ZMQError as error:
                self._context.destroy(0)
                raise BadInput(
                    f"cannot listen at {listen}: {error.strerror}; choose another port, or an address of this machine"
                ) from None
        self._poller.register(router, zmq.POLLIN)
        return router

    def _monitor(self, socket: _Socket, dial: _Dial | None, channel: Channel) -> _Socket:
        # Not pyzmq's get_monitor_socket: it names them by file descriptor, which is used again before the name is free.
        address = f"inproc://monitor-{next(self._monitor_numbers)}"
        socket.monitor(address, _MONITORED)
        monitor = self._context.socket(zmq.PAIR)
        monitor.connect(address)
        self._monitors[monitor] = (socket, dial, channel)
        self._poller.register(monitor, zmq.POLLIN)
        return monitor

    def _connect(self, dial: _Dial) -> None:
        dial.retry_at = None
        for channel in get_args(Channel):
            dealer = self._context.socket(zmq.DEALER)
            setattr(dial, channel, dealer)
            self._dealers[dealer] = (dial, channel)
            self._configure(dealer)
            dealer.curve_serverkey = dial.member.card.link_key
            dealer.immediate = True  # queue for connections that exist, not for ones that may come
            self._monitor(dealer, dial, channel)
            self._poller.register(dealer, zmq.POLLIN)
            dealer.connect(dial.address)

    def _redial(self, dial: _Dial, now: float) -> None:
        try:
            self._connect(dial)
        except zmq.ZMQError as error:  # it worked before: there are no file descriptors left, say
            self._events.append(Rejected(dial.address, "dial_failed", str(error.strerror)))
            self._dial_later(dial, now + RETRY)

    def _dial_later(self, dial: _Dial, when: float) -> None:
        self._close_dial(dial)
        dial.retry_at = when

    def _close_dial(self, dial: _Dial, linger: float = 0.0) -> None:
        for monitor in [m for m, (_, owner, _) in self._monitors.items() if owner is dial]:
            self._poller.unregister(monitor)
            self._monitors.pop(monitor)[0].disable_monitor()
            monitor.close(0)
        for dealer in [d for d, (owner, _) in self._dealers.items() if owner is dial]:
            if dealer in self._poller:
                self._poller.unregister(dealer)
            del self._dealers[dealer]
            for connection in [c for c in self._connections.values() if c.inbox is dealer]:
                self._lost(connection)
            dealer.close(round(linger * 1000))
        dial.control = dial.bulk = None
        dial.connected.clear()
        dial.answered = False

    # -- The gate ----------------------------------------------------------------------------------------------------

    def _is_barred(self, who: str, now: float) -> bool:
        return now < self._barred.get(who, 0.0)

    def _answer_zap(self, now: float) -> None:
        """Say of each key that knocks whether it is in the roster (ZAP, RFC 27)."""
        while True:
            try:
                request = self._zap.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            version, request_id, _domain, address, _identity, mechanism, *credentials = request
            key = credentials[0] if mechanism == b"CURVE" and len(credentials) == 1 else b""
            rejected = self._gate(key, printable(address.decode("ascii", "replace")), now)
            if rejected is None:
                answer = [b"200", b"OK", key.hex().encode(), b""]  # the User-Id of each of its frames
            else:
                self._events.append(rejected)
                answer = [b"400", b"not let in", b"", b""]
            self._zap.send_multipart([version, request_id, *answer])

    def _gate(self, key: bytes, address: str, now: float) -> Rejected | None:
        """Why the owner of this link key is not let in; None if it is."""
        member = self._roster.by_link_key(key)
        if member is None:
            shown = fingerprint_of(key) if key else "none"
            why = f"its link key ({shown}) is of no card in the roster; to let it in, add its card"
            return Rejected(address, "gate_refused", why)
        if member.name == self.identity.name:
            return Rejected(address, "oneself", "this node was dialled by itself: remove that peer")
        if self._is_barred(member.name, now) or self._is_barred(address, now):
            return Rejected(member.name, "quarantined", "it knocked while it, or its address, was kept out")
        return None

    # -- What libzmq tells of connections ----------------------------------------------------------------------------
    # The order of its events is that of what happened on one of our sockets; file descriptors are used again at once.
    # So a connection is known by the object that was made when its beginning was read, never by its descriptor alone.

    def _read_monitor(self, monitor: _Socket, now: float) -> None:
        inbox, dial, channel = self._monitors[monitor]
        while True:
            try:
                frames = monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            message = parse_monitor_message(frames)
            event, value = int(message["event"]), int(message["value"])
            if event in (_Event.CONNECTED, _Event.ACCEPTED):
                self._begin_connection(inbox, value, now)
            connection = self._connections.get((inbox, value)) if event == _Event.DISCONNECTED else None
            self._notices.append(_Notice(inbox, dial, channel, event, connection))

    def _begin_connection(self, inbox: _Socket, descriptor: int, now: float) -> _Connection:
        dial, channel = self._dealers.get(inbox, (None, None))
        address = _remote_address(descriptor) or (dial.address if dial else "unknown")
        connection = _Connection(inbox, descriptor, address, now, channel=channel)
        self._connections[inbox, descriptor] = connection
        return connection

    def _connection_of(self, inbox: _Socket, descriptor: int, routing_id: bytes, now: float) -> _Connection:
        """The connection that a message came on."""
        known = self._spoken.get(routing_id) or self._connections.get((inbox, descriptor))
        if known is not None and known.routing_id == routing_id:
            return known
        # Its first message: libzmq has told of its beginning before, and of the end of whoever had that descriptor.
        self._read_monitor(self._router_monitor, now)
        connection = self._connections.get((inbox, descriptor))
        if connection is None or connection.routing_id:
            connection = self._begin_connection(inbox, descriptor, now)
        if routing_id:
            connection.routing_id = routing_id
            self._spoken[routing_id] = connection
        return connection

    def _take_notice(self, notice: _Notice, now: float) -> None:
        dial = notice.dial
        match notice.event:
            case _Event.HANDSHAKE_SUCCEEDED if dial is not None:
                self._greet(dial, notice.channel, now)
            case _Event.HANDSHAKE_FAILED if dial is not None:
                self._next_candidate(dial, now)
            case _Event.HANDSHAKE_AUTH if dial is not None:
                self._not_let_in(dial, now)
            case _Event.HANDSHAKE_AUTH:
                self._turned_away += 1
            case _Event.DISCONNECTED if notice.connection is not None:
                self._disconnected(notice, notice.connection, now)

    def _disconnected(self, notice: _Notice, connection: _Connection, now: float) -> None:
        dial, channel = notice.dial, notice.channel
        self._lost(connection)
        if dial is None:
            if connection.peer is None and not connection.shut:
                self._nobody(connection)
        elif channel in dial.connected:
            # Not left to libzmq, which gives an address up for good where a byte was altered.
            steady = now > connection.since + STEADY
            self._dial_later(dial, now + (RECONNECT_MS / 1000 if steady else RETRY))
        else:
            self._next_candidate(dial, now)

    def _nobody(self, connection: _Connection) -> None:
        """A stranger came and went; of those whom the gate turned away it has told already."""
        if self._turned_away:
            self._turned_away -= 1
            return
        why = "it went without saying who it is: it speaks no CURVE, looks for another key, or only looked"
        self._events.append(Rejected(_host(connection.address), "gate_refused", why))

    def _lost(self, connection: _Connection) -> None:
        """This connection is no more."""
        if self._connections.get((connection.inbox, connection.descriptor)) is connection:
            del self._connections[connection.inbox, connection.descriptor]
        if self._spoken.get(connection.routing_id) is connection:
            del self._spoken[connection.routing_id]
        peer = self._peers.get(connection.peer or "")
        if peer is not None and connection.channel is not None:
            path, route = self._way(peer, connection)
            if getattr(path, connection.channel) == route:
                self._forget_channel(peer, path, connection.channel)

    def _way(self, peer: _Peer, connection: _Connection) -> tuple[_Path, _Route]:
        """Which of the peer's two paths the connection can be part of, and how one sends on it."""
        if connection.inbox is self._router:
            return peer.accepted, _Route(connection.inbox, (connection.routing_id,))
        return peer.dialled, _Route(connection.inbox, ())

    def _next_candidate(self, dial: _Dial, now: float) -> None:
        if not dial.settled:
            dial.which = (dial.which + 1) % len(dial.candidates)
        again = dial.settled or dial.which == 0
        self._dial_later(dial, now + RETRY if again else now)

    def _not_let_in(self, dial: _Dial, now: float) -> None:
        if not dial.refused:
            dial.refused = True
            why = f"{dial.member.name} does not let us in: its roster lacks our card, or it keeps us out"
            self._events.append(Rejected(dial.address, "refused_by_peer", why))
        self._dial_later(dial, now + RETRY)

    def _guard(self, now: float) -> None:
        """Hang up on whoever sends a message without end (no queue limit of libzmq counts it), or stays silent."""
        passed, self._looked_at = now - self._looked_at, now
        held: dict[str, list[tuple[_Connection, int]]] = {}
        for connection in [c for c in self._connections.values() if not c.shut]:
            who = connection.peer or _host(connection.address)
            if connection.inbox is self._router and connection.peer is None and now > connection.since + MAX_SILENCE:
                self._shut(connection)
                self._events.append(Rejected(who, "gate_refused", "it did not say who it is"))
                continue
            received = _bytes_received(connection.descriptor, connection.address)
            if received is not None:
                # The overhead is rather estimated too high; what was not used of that must not add up.
                delivered = min(connection.delivered + round(passed * PING_BYTES), received)
                connection.delivered = delivered
                held.setdefault(who, []).append((connection, received - delivered))
        if passed > OWN_PAUSE:
            return  # it was us who did not read
        for who, connections in held.items():
            total = sum(size for _, size in connections)
            if total > MAX_UNDELIVERED:
                for connection, _ in connections:
                    self._shut(connection)
                self._events.append(Rejected(who, "flood", f"{total >> 20} MiB came without a whole message"))

    def _hang_up(self, name: str, but: _Connection | None = None) -> None:
        for connection in self._connections.values():
            if connection.peer == name and connection is not but:
                self._shut(connection)

    def _shut(self, connection: _Connection) -> None:
        connection.shut = True
        _shut_down(connection.descriptor, connection.address)

    # -- Handshake ---------------------------------------------------------------------------------------------------

    def _greet(self, dial: _Dial, channel: Channel, now: float) -> None:
        name, dealer = dial.member.name, dial.control if channel == "control" else dial.bulk
        if any(d is not dial and "control" in d.connected and d.member.name == name for d in self._dials):
            self._dial_later(dial, now + SPARE_RETRY)  # its other address serves; two would displace each other
        elif self._is_barred(name, now):
            self._dial_later(dial, self._barred[name])
        elif dealer is not None:
            dial.connected.add(channel)
            if channel == "control" or dial.answered:
                self._say_hello(dial, dealer, channel, now)

    def _say_hello(self, dial: _Dial, dealer: _Socket, channel: Channel, now: float) -> None:
        if not self._transmit(_Route(dealer, ()), *encode(self._hello(dial.member, channel, answer=False))):
            self._dial_later(dial, now + RETRY)  # it broke again at once

    def _answered(self, dial: _Dial, channel: Channel, now: float) -> None:
        """Bulk says hello once control is answered.

        The listening side sends as soon as it has heard both. What it sends on one connection may overtake its answer
        on the other, and would come from somebody whom we do not know yet.
        """
        dial.settled = True
        if channel == "control":
            dial.answered = True
            if dial.bulk is not None and "bulk" in dial.connected:
                self._say_hello(dial, dial.bulk, "bulk", now)

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

    def _handle_hello(self, member: Member, hello: Hello, connection: _Connection) -> None:
        name = member.name
        peer = self._peers.get(name) or _Peer(member)
        path, route = self._way(peer, connection)
        if hello.name != name or hello.recipient != self.identity.name:
            raise BadMessage("bad_hello", f"the hello is of {hello.name} for {hello.recipient}")
        if hello.answer == bool(route.prefix) or connection.channel not in (None, hello.channel):
            raise BadMessage("bad_hello", "the hello is of the other side, or for the other channel")
        if getattr(path, hello.channel) == route:
            raise BadMessage("bad_hello", "a second hello on one connection")
        if not member.card.verify(HELLO_CONTEXT, _signed_part(hello), hello.signature):
            raise BadMessage("bad_hello", "the hello is not signed by the identity key of the member")
        if hello.epoch < peer.epoch:
            if peer.hello is not None:  # signed by the identity of both: the older one can believe what it sees
                self._transmit(route, *encode(peer.hello))
            raise BadMessage("stale_epoch", f"epoch {hello.epoch} of a member whose epoch {peer.epoch} was seen")
        connection.channel = hello.channel
        if (hello.experiment, hello.schema) != (self._greeting.experiment, self._greeting.schema):
            if hello.channel == "control":
                self._transmit(route, *encode(Describe(self._greeting.facts)))
                if not hello.answer:
                    self._transmit(route, *encode(self._hello(member, "control", answer=True)))
            return
        if hello.epoch > peer.epoch:
            self._forget(peer, "it was started again")
            self._hang_up(name, but=connection)
            self._peers[name] = peer = _Peer(member, hello.epoch)
            path, _ = self._way(peer, connection)
        if getattr(path, hello.channel) is not None:
            self._displace(peer, path, hello.channel)
        peer.hello = hello
        setattr(path, hello.channel, route)
        if not hello.answer:
            self._transmit(route, *encode(self._hello(member, hello.channel, answer=True)))
        if path.ready and peer.path is None:
            self._link_up(peer, path)

    def _is_of_successor(self, hello: Hello) -> bool:
        """Whether it is our own hello, shown to us by whom it was for, of a later start than ours in this experiment.

        Only the holder of our key can have signed it, so no peer can make us believe it; and one key may take part in
        two experiments.
        """
        return (
            hello.name == self.identity.name
            and hello.epoch > self.epoch
            and (hello.experiment, hello.schema) == (self._greeting.experiment, self._greeting.schema)
            and self.identity.card.verify(HELLO_CONTEXT, _signed_part(hello), hello.signature)
        )

    def _displace(self, peer: _Peer, path: _Path, channel: Channel) -> None:
        """The peer has made a new connection, so the old one is dead, even if we have not been told yet."""
        route: _Route = getattr(path, channel)
        old = self._spoken.get(route.prefix[0]) if route.prefix else None
        if old is not None:
            self._shut(old)
        self._forget_channel(peer, path, channel)

    def _link_up(self, peer: _Peer, path: _Path) -> None:
        hello = peer.hello
        assert hello is not None
        peer.path = path
        seen = hello.seen if hello.seen_epoch == self.epoch else -1
        self._events.append(LinkUp(peer.name, hello.epoch, hello.round, hello.mass, seen))
        self._events += [Received(peer.name, message) for message in peer.early]
        peer.early.clear()

    def _forget_channel(self, peer: _Peer, path: _Path, channel: Channel) -> None:
        """One of the two connections of this path is gone; the other side of it says hello again when it is back."""
        setattr(path, channel, None)
        if peer.path is path:
            self._link_down(peer, f"the {channel} connection broke")
            other = peer.accepted if path is peer.dialled else peer.dialled
            if other.ready:
                self._link_up(peer, other)
                if peer.answered is not None:  # on the pair that broke, perhaps in vain; the peer may use the other one
                    self._owe(peer, peer.answered)

    def _forget(self, peer: _Peer, why: str) -> None:
        peer.dialled, peer.accepted = _Path(), _Path()
        if peer.path is not None:
            self._link_down(peer, why)

    def _link_down(self, peer: _Peer, why: str) -> None:
        if peer.incoming is not None:
            peer.dropped = peer.incoming.manifest.round
            peer.answered = Refused(peer.dropped, INTERRUPTED)
            if peer.incoming.next > WINDOW:  # else there is nothing to gain
                peer.partial, peer.partial_until = peer.incoming, time.monotonic() + PARTIAL
        if peer.sending is not None or peer.waiting or not peer.left:
            peer.interrupted_at = time.monotonic()
        peer.path = peer.sending = peer.incoming = peer.owed = None
        peer.waiting.clear()
        self.lacking.discard(peer.name)  # when it is back, its hello says what it has
        self._events.append(LinkDown(peer.name, why))

    # -- What comes in -----------------------------------------------------------------------------------------------

    def _read_inbox(self, inbox: _Socket, now: float) -> bool:
        """Handle what has come on this socket; True if there may be more."""
        for _ in range(BATCH):
            if inbox.closed:
                return False  # its dial was closed by what it said
            if any(_is_news(event) for event in self._events):
                return True  # the node must take it in before it can judge the next offer
            message = _receive(inbox)
            if message is None:
                return False
            self._handle_frames(inbox, *message, now)
        return True

    def _handle_frames(self, inbox: _Socket, frames: list[zmq.Frame], count: int, size: int, now: float) -> None:
        self.bytes_received += size
        accepted = inbox is self._router
        descriptor, routing_id = int(frames[-1].get(zmq.SRCFD)), frames[0].bytes if accepted else b""
        connection = self._connection_of(inbox, descriptor, routing_id, now)
        connection.delivered += size + FRAME_OVERHEAD * count
        if connection.shut:
            return
        key = (
            bytes.fromhex(str(frames[-1].get("User-Id"))) if accepted else self._dealers[inbox][0].member.card.link_key
        )
        member = self._roster.by_link_key(key)
        if member is None:
            self._shut(connection)
            self._events.append(Rejected(fingerprint_of(key), "revoked", "its link key is no longer in the roster"))
            return
        connection.peer = member.name
        try:
            if self._is_barred(member.name, now):
                raise BadMessage("quarantined", "it spoke while it was kept out")
            if count != (MAX_FRAMES if accepted else MAX_FRAMES - 1):
                raise BadMessage("bad_frames", f"{count - accepted} frames where a message has 2")
            message = decode(frames[-2].buffer, frames[-1].buffer)
            if isinstance(message, Hello) and self._is_of_successor(message):
                self.successor = message.epoch
            elif isinstance(message, Hello):
                self._handle_hello(member, message, connection)
                if not accepted:
                    self._answered(self._dealers[inbox][0], message.channel, now)
            else:
                self._handle_message(member, message, connection)
        except BadMessage as error:
            self._reject(member.name, error)
            if error.code in LAST_WORDS and accepted:
                self._shut(connection)
            elif error.code in LAST_WORDS:
                self._dial_later(self._dealers[inbox][0], now + RETRY)

    def _handle_message(self, member: Member, message: WireMessage, connection: _Connection) -> None:
        channel = connection.channel
        if isinstance(message, Describe) and channel == "control":
            why = difference(self._greeting.facts, message.facts)
            raise BadMessage("experiment_mismatch", why)
        peer = self._peers.get(member.name) or _Peer(member)
        path, route = self._way(peer, connection)
        if channel is None or getattr(path, channel) != route:
            raise BadMessage("no_hello", f"{type(message).__name__} before the handshake, or after a newer one")
        if (channel == "bulk") != isinstance(message, (Offer, Chunk)):
            raise BadMessage("wrong_channel", f"{type(message).__name__} on the {channel} connection")
        peer.left = peer.left or isinstance(message, Goodbye)
        if isinstance(message, Gossip):
            message = self._genuine(peer.name, message)
        elif isinstance(message, Accusation):
            self._check_evidence(peer.name, message)
        elif isinstance(message, (MaskKey, Gathering)):
            self._check_statement(member, message)
        if peer.path is None:  # the other connection of the pair is not there yet, or no longer
            if isinstance(message, (Heartbeat, Goodbye, Gossip, MaskKey, Gathering)):
                peer.early.append(message)
            return  # what was under way on a pair that broke is lost with it
        match message:
            case Heartbeat() | Goodbye() | Receipt() | Gossip() | Accusation() | MaskKey() | Gathering():
                self._events.append(Received(peer.name, message))
            case Grant(round, chunks):
                if peer.sending is not None and peer.sending.sealed.round == round:
                    peer.sending.granted = max(peer.sending.granted, min(chunks, peer.sending.next + WINDOW))
            case Resume(round, start):
                if peer.sending is not None and peer.sending.sealed.round == round:
                    peer.sending.skip_to(start)
            case Refused(round, code):
                if peer.sending is not None and peer.sending.sealed.round == round:
                    if code == GAP:
                        self.lacking.add(peer.name)
                    if code == INTERRUPTED and len(peer.waiting) < MAX_WAITING:
                        peer.waiting.appendleft(peer.sending.sealed)
                    peer.sending = None
            case Offer():
                self._offer(peer, message)
            case Chunk():
                self._chunk(peer, message)
            case Describe() | Hello():
                pass

    def _genuine(self, sender: str, gossip: Gossip) -> Gossip:
        """What was passed on, as far as it is about members of the roster. BadMessage if somebody forged a record."""
        known = []
        for record in gossip.records:
            member = self._roster.by_name(record.name)
            if member is None:
                self._reject(
                    sender, BadMessage("unknown_member", f"it speaks of {record.name}, who is not in the roster")
                )
                continue
            if self._genuine_records.get(record.name) != record:
                if not statement_holds(record, member.card, self._greeting.experiment):
                    raise BadMessage(
                        "bad_record", f"what it passes on of {record.name} was not signed by {record.name}"
                    )
                self._genuine_records[record.name] = record
            if record.name == self.identity.name and record.epoch > self.epoch:
                self.successor = record.epoch
            known.append(record)
        return Gossip(tuple(known), tuple(hint for hint in gossip.hints if self._roster.by_name(hint.name) is not None))

    def _check_statement(self, member: Member, said: MaskKey | Gathering) -> None:
        """BadMessage unless each mask key is of its member, and the rest of whoever says it."""
        federation = self._greeting.experiment
        if isinstance(said, Gathering) and not statement_holds(said, member.card, federation):
            raise BadMessage("bad_signature", f"{member.name} did not sign what it asks for")
        for key in said.keys if isinstance(said, Gathering) else (said,):
            owner = self._roster.by_name(key.name)
            if owner is None:
                raise BadMessage("unknown_member", f"it speaks of {key.name}, who is not in the roster")
            if self._genuine_keys.get(key.name) != key:
                if not statement_holds(key, owner.card, federation):
                    raise BadMessage("bad_record", f"the mask key of {key.name} was not signed by {key.name}")
                check_key(key)
                self._genuine_keys[key.name] = key

    def _check_evidence(self, by: str, accusation: Accusation) -> None:
        """BadMessage unless the accused is a member and signed what is shown; of equivocation, what contradicts.

        Whoever told us something else for that round than it told the accuser is found out by this.
        """
        member = self._roster.by_name(accusation.name)
        if member is None:
            raise BadMessage("unknown_member", f"it accuses {accusation.name}, who is not in the roster")
        shown = tuple(zip(accusation.evidence[::2], accusation.evidence[1::2], strict=True))
        try:
            signed = [signed_manifest(*pair, member.card, self._greeting.experiment) for pair in shown]
        except BadMessage as error:  # a mistake of whoever shows it
            raise BadMessage("bad_evidence", f"against {accusation.name}: {error.why}") from None
        if any(manifest.codec == MASKED for manifest in signed) and accusation.code == "equivocation":
            # A member makes a part for each receiver, and two receivers can agree on gatherings of one number.
            raise BadMessage("bad_evidence", f"against {accusation.name}: parts of sums contradict nothing")
        one_update = len({(manifest.epoch, _which(manifest)) for manifest in signed}) == 1
        if accusation.code == "equivocation" and not (one_update and shown[0][0] != shown[1][0]):
            raise BadMessage("bad_evidence", f"against {accusation.name}: no two different updates of one round")
        accused = self._peers.get(accusation.name)
        if accused is None:
            return
        for manifest, pair in zip(signed, shown, strict=True):
            if manifest.codec == MASKED:
                continue
            ours = accused.manifests.get(_which(manifest))
            if ours is not None and manifest.epoch == accused.epoch and ours.manifest != pair[0]:
                why = f"for round {manifest.round} it signed one update for us, another for {by}"
                self._reject(accused.name, BadMessage("equivocation", why), (ours.manifest, ours.signature, *pair))

    def _reject(self, name: str, error: BadMessage, evidence: tuple[bytes, ...] = ()) -> None:
        self._events.append(Rejected(name, error.code, error.why, evidence))

    def _offer(self, peer: _Peer, offer: Offer) -> None:
        greeting = self._greeting
        about = greeting.experiment, greeting.schema, greeting.size, greeting.packed
        manifest = verify(offer, peer.member.card, *about)
        before = peer.manifests.get(_which(manifest))
        try:
            if manifest.epoch != peer.epoch:
                raise BadMessage("stale", f"an update of epoch {manifest.epoch}; this is epoch {peer.epoch}")
            if before is not None and before.manifest != offer.manifest:
                evidence: tuple[bytes, ...] = before.manifest, before.signature, offer.manifest, offer.signature
                if manifest.codec == MASKED:
                    evidence = ()  # it convinces nobody else: see `_check_evidence`
                error = BadMessage("equivocation", f"two different updates were signed for round {manifest.round}")
                self._drop_incoming(peer, manifest.round, error.code)
                self._reject(peer.name, error, evidence)
                return
            if manifest.round <= peer.seen:
                code = "stale" if before is None else "duplicate"
                raise BadMessage(code, f"the update of round {manifest.round}, after that of round {peer.seen} came")
            self._check_offer(peer.name, manifest.round)
            if manifest.codec not in (WHOLE, MASKED) and not self._has_base(peer.name, manifest.base):
                self._drop_incoming(peer, manifest.round, GAP)
                why = f"round {manifest.round} continues round {manifest.base}, which is not here"
                self._events.append(Rejected(peer.name, GAP, why, round=manifest.round))
                return
        except BadMessage as error:
            self._drop_incoming(peer, manifest.round, error.code)
            raise
        peer.manifests[_which(manifest)] = offer
        while len(peer.manifests) > REMEMBERED_MANIFESTS:
            peer.manifests.popitem(last=False)
        partial, peer.partial = peer.partial, None
        if partial is not None and partial.manifest == manifest:
            peer.incoming, peer.repeats = partial, WINDOW
        else:
            peer.incoming, peer.repeats = Opening(manifest, offer.key, self._buffers.take()), 0
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
            if peer.repeats:
                self._repeated(peer, chunk, opening)
                return
            opening.add(chunk.index, chunk.sealed)
            if not opening.complete:
                self._grant(peer, opening)
                return
            lease = opening.finish()
        except BadMessage as error:
            self._drop_incoming(peer, chunk.round, error.code)
            raise
        manifest = opening.manifest
        peer.incoming = None
        peer.seen = manifest.round
        self._owe(peer, Grant(manifest.round, opening.chunks + 1))
        offer = peer.manifests[_which(manifest)]
        evidence = (offer.manifest, offer.signature)
        self._events.append(Received(peer.name, Update(manifest.round, manifest.mass, manifest.reach, lease, evidence)))

    def _repeated(self, peer: _Peer, chunk: Chunk, opening: Opening) -> None:
        """One of the chunks that an offer brings along; once no more are under way, one says where to go on."""
        if chunk.index != WINDOW - peer.repeats:
            raise BadMessage("bad_chunk", f"chunk {chunk.index} where {WINDOW - peer.repeats} must come again")
        peer.repeats -= 1
        if not peer.repeats:
            peer.granted = min(opening.next + WINDOW, opening.chunks)
            self._owe(peer, Resume(chunk.round, opening.next))

    def _grant(self, peer: _Peer, opening: Opening) -> None:
        # In steps of half a window: one small message for four big ones.
        if peer.granted < opening.chunks and peer.granted - opening.next <= WINDOW // 2:
            peer.granted = min(opening.next + WINDOW, opening.chunks)
            self._owe(peer, Grant(opening.manifest.round, peer.granted))

    def _drop_partials(self, now: float) -> None:
        for peer in self._peers.values():
            if now >= peer.partial_until:
                peer.partial = None

    def _drop_incoming(self, peer: _Peer, round: int, code: str) -> None:
        peer.incoming = None
        peer.dropped = round
        self._owe(peer, Refused(round, code))

    # -- What goes out -----------------------------------------------------------------------------------------------

    def _transmit(self, route: _Route | None, header: bytes, body: memoryview | bytes) -> bool:
        if route is None or route.socket.closed or not route.send(header, body):
            return False
        self.bytes_sent += len(header) + len(body)
        return True

    def _owe(self, peer: _Peer, answer: Grant | Resume | Refused) -> None:
        peer.answered = peer.owed = answer  # one suffices: a peer has one update under way; what is newer says more
        self._settle(peer)

    def _settle(self, peer: _Peer) -> None:
        """Hand over the answer that a peer waits for; where its queue is full, the next `poll` tries again."""
        if peer.owed is not None and peer.path is not None and self._transmit(peer.path.control, *encode(peer.owed)):
            peer.owed = None

    def _pump(self, peer: _Peer) -> None:
        """Send as many chunks as the peer has granted, and offer the next update once it has all of this one."""
        while peer.path is not None:
            if peer.sending is None:
                sealed = peer.waiting.popleft() if peer.waiting else None
                if sealed is None or not self._transmit(peer.path.bulk, *encode(sealed.offer)):
                    return  # dropped; the node goes by what does not come back
                peer.sending = _Outgoing(sealed, granted=min(WINDOW, sealed.chunks))
            outgoing, sealed = peer.sending, peer.sending.sealed
            while outgoing.next < min(outgoing.granted, sealed.chunks):
                chunk = Chunk(sealed.round, outgoing.next, sealed.chunk(outgoing.next))
                if not self._transmit(peer.path.bulk, *encode(chunk)):
                    peer.sending = None
                    peer.waiting.clear()
                    return
                outgoing.next += 1
            if outgoing.granted <= sealed.chunks:
                return
            peer.sending = None


def _is_news(event: Event) -> bool:
    """Whether it changes which offers the node wants."""
    return isinstance(event, LinkUp) or (isinstance(event, Received) and isinstance(event.message, Update))


def _signed_part(hello: Hello) -> bytes:
    return pack({name: getattr(hello, name) for name in hello.__slots__ if name != "signature"})


def _receive(inbox: _Socket) -> tuple[list[zmq.Frame], int, int] | None:
    """The next message: its first frames, how many it has, its bytes. None if there is none.

    No more frames are kept than a good message has: a member can send one of a million tiny ones.
    """
    frames: list[zmq.Frame] = []
    count = size = 0
    while True:
        try:
            frame = inbox.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        count += 1
        size += len(frame)
        if count <= MAX_FRAMES:
            frames.append(frame)
        if not frame.more:
            return frames, count, size


def _host(address: str) -> str:
    """The address without the port, which each of a stranger's connections has anew."""
    return address.rpartition(":")[0] or address


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
    if isinstance(peer, tuple):
        return f"{peer[0]}:{peer[1]}"
    return f"ipc:{os.fstat(duplicate.fileno()).st_ino}"  # which has no address at that end; the number is its own


def _remote_address(descriptor: int) -> str | None:
    duplicate = _duplicate(descriptor)
    if duplicate is None:
        return None
    with duplicate:
        return _address_of(duplicate)


def _which(manifest: Manifest) -> tuple[int, str]:
    """Which update it is: of each there is one. A member makes one in a round, and one for each sum it gives to."""
    return manifest.round, f"{MASKED} {manifest.base}" if manifest.codec == MASKED else manifest.codec


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
