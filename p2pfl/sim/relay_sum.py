"""What a relay sum costs: `p2pfl bench he`. Real processes, authenticated links and keys; the vectors are made up.

One process each for the receiver, the relay and every sender; the senders and the receiver have a link to the relay,
as neighbours have, and ciphertexts travel over it as updates do. Beside it, the same sum by pairwise masks, computed in
one process. Seconds of a step are of one processor, since here several share one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from p2pfl.envelope import Lease, Sealer
from p2pfl.homomorphic import SLICE, add, decrypt, encrypt, make_keys, read_public, slices
from p2pfl.identity import Identity, Member, Roster
from p2pfl.link import Greeting, Link
from p2pfl.masks import MaskMaker, read_sum
from p2pfl.messages import BadInput, BadMessage, Gathering, LinkUp, Received, Rejected, TrainingFailed, Update
from p2pfl.records import Line, number
from p2pfl.rng import stream

if TYPE_CHECKING:
    from tenseal import Context

Floats = NDArray[np.float32]
Wire: TypeAlias = "Connection[bytes, bytes]"  # between parent and child

FLOAT32 = 4  # bytes
RELAY, RECEIVER = "relay", "receiver"
ADDRESS = "tcp://127.0.0.1:0"
FEDERATION = SCHEMA = bytes(32)


def bench(size: int, senders: int) -> Line:
    """Add up `senders` vectors of `size` float32 values, of a standard normal distribution, with equal weights.

    BadInput where TenSEAL is not installed, or the system cannot fork; TrainingFailed if one of the processes fails.
    """
    if not hasattr(os, "fork"):
        raise BadInput("`p2pfl bench he` needs a system that can fork (Linux, macOS)")
    keys = make_keys()
    length = len(next(encrypt(read_public(keys.public), np.ones(1, np.float32), 1.0)))
    names = [f"sender-{number}" for number in range(senders)]
    identities = {name: Identity.generate(name) for name in (RELAY, RECEIVER, *names)}
    roster = Roster(tuple(Member(identity.card) for identity in identities.values()))
    carried = slices(size) * length
    greeting = Greeting(FEDERATION, SCHEMA, carried, 1.0, {})
    began = time.monotonic()
    roles: dict[str, Callable[[_Member], Line]] = {
        RELAY: partial(_add, length=length, senders=names),
        RECEIVER: partial(_receive, length=length, size=size, senders=names),
        **{name: partial(_send, size=size, weight=1 / (senders + 1)) for name in names},
    }
    pipes: dict[str, Wire] = {}
    pids: list[int] = []
    try:
        for name, role in roles.items():
            pipes[name], pid = _fork(role, identities[name], roster, greeting, tuple(pipes.values()))
            pids.append(pid)
        address = _hear(pipes[RELAY])["address"]
        for name in (RECEIVER, *names):
            _say(pipes[name], {"address": address})
        public = _hear(pipes[RECEIVER])["public"]
        for name in (RELAY, *names):
            _say(pipes[name], {"public": public})
        told = {name: _hear(pipes[name]) for name in (*names, RELAY, RECEIVER)}
    finally:
        for pipe in pipes.values():
            pipe.close()  # of which those that have not ended learn that they shall
        for pid in pids:
            os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    received = told[RECEIVER]
    return {
        "size": size,
        "senders": senders,
        "float32_bytes": FLOAT32 * size,
        "ciphertext_bytes": carried,
        "times_float32": carried / (FLOAT32 * size),
        "key_bytes": len(keys.public),
        "sent_by_a_sender": _mean([told[name] for name in names], "sent"),
        "sent_by_the_relay": told[RELAY]["sent"],
        "seconds": {
            "keys": received["making"],
            "encrypt": _mean([told[name] for name in names], "seconds"),
            "add": told[RELAY]["seconds"],
            "decrypt": received["seconds"],
            "whole": seconds,
        },
        "largest_error": received["largest_error"],
        "masks": _by_masks(size, [identities[name] for name in names]),
    }


def _mean(lines: Sequence[Line], key: str) -> float:
    return sum(number(line, key) or 0.0 for line in lines) / len(lines)


def _by_masks(size: int, identities: Sequence[Identity]) -> Line:
    """The same sum by pairwise masks."""
    makers = [MaskMaker(identity, 1, FEDERATION) for identity in identities]
    share = 1 / (len(makers) + 1)
    gathering = Gathering(0, 1.0, len(makers) + 1.0, True, tuple(maker.key for maker in makers))
    vectors = [_vector(identity.name, size) for identity in identities]
    began = time.process_time()
    parts = [maker.part(v, share, RECEIVER, gathering) for maker, v in zip(makers, vectors, strict=True)]
    masked = time.process_time()
    total = read_sum(parts, 1.0)
    seconds: Line = {"mask": (masked - began) / len(makers), "read": time.process_time() - masked}
    return {"times_float32": 1.0, "seconds": seconds, "largest_error": _largest_error(total, vectors)}


def _vector(name: str, size: int) -> Floats:
    return stream(0, "relay sum", name).standard_normal(size, dtype=np.float32)


def _largest_error(total: Floats, vectors: Sequence[Floats]) -> float:
    true = sum((vector.astype(np.float64) for vector in vectors), np.zeros(len(total))) / (len(vectors) + 1)
    return float(np.abs(total - true).max())


# -- The roles, each in a process of its own -------------------------------------------------------------------------


class _Member:
    """One role's link, and its pipe to the parent."""

    def __init__(self, identity: Identity, roster: Roster, greeting: Greeting, pipe: Wire) -> None:
        self.pipe, self.name = pipe, identity.name
        self.link = Link(identity, roster, 1, greeting, lambda _peer, _round: None, ADDRESS)
        self.link.watch(pipe.fileno())
        self._sealer = Sealer(identity, FEDERATION, SCHEMA, greeting.size, 1)
        self.came: dict[str, Lease] = {}  # what this peer has sent
        self._linked: set[str] = set()

    def dial_relay(self, address: str) -> None:
        self.link.dial(address, (RELAY,))
        self.until(lambda: RELAY in self._linked)

    def send(self, peer: str, ciphertexts: bytearray) -> None:
        """Until all of it is there."""
        self.link.send((peer,), Update(0, 1.0, 1.0, self._sealer.seal(memoryview(ciphertexts), 0, 1.0, 1.0)))
        self.until(lambda: self.link.idle)

    def until(self, happened: Callable[[], bool]) -> None:
        """Let the link work until it has. TrainingFailed if the parent is gone."""
        while not happened():
            events, readable = self.link.poll(max(0.0, self.link.deadline - time.monotonic()))
            if self.pipe.fileno() in readable:  # nothing is to be said at such times
                raise TrainingFailed(f"{self.name} was left alone")
            for event in events:
                match event:
                    case LinkUp(peer):
                        self._linked.add(peer)
                    case Received(peer, Update(vector=Lease() as lease)):
                        self.came[peer] = lease
                    case Rejected(peer, code, why):
                        raise TrainingFailed(f"{self.name} refused what came from {peer}: {code}, {why}")


def _send(sender: _Member, size: int, weight: float) -> Line:
    address = str(_hear(sender.pipe)["address"])
    public, vector = _public(sender.pipe), _vector(sender.name, size)
    sender.dial_relay(address)
    ciphertexts = bytearray()
    began = time.process_time()
    for ciphertext in encrypt(public, vector, weight):
        ciphertexts += ciphertext
    seconds = time.process_time() - began
    sender.send(RELAY, ciphertexts)
    return {"seconds": seconds, "sent": sender.link.bytes_sent}


def _add(relay: _Member, length: int, senders: Sequence[str]) -> Line:
    _say(relay.pipe, {"address": relay.link.address})
    public = _public(relay.pipe)
    relay.until(lambda: relay.came.keys() >= {*senders})
    received, total = relay.link.bytes_sent, bytearray()
    began = time.process_time()
    for ciphertexts in zip(*(_pieces(relay.came[name], length) for name in senders), strict=True):
        total += add(public, ciphertexts)
    seconds = time.process_time() - began
    relay.send(RECEIVER, total)
    return {"seconds": seconds, "sent": relay.link.bytes_sent - received}


def _receive(receiver: _Member, length: int, size: int, senders: Sequence[str]) -> Line:
    address = str(_hear(receiver.pipe)["address"])
    began = time.process_time()
    keys = make_keys()
    making = time.process_time() - began
    _say(receiver.pipe, {"public": keys.public.hex()})
    receiver.dial_relay(address)  # which answers once it has the key
    receiver.until(lambda: RELAY in receiver.came)
    began = time.process_time()
    total = np.concatenate([decrypt(keys, piece, SLICE) for piece in _pieces(receiver.came[RELAY], length)])[:size]
    seconds = time.process_time() - began
    error = _largest_error(total, [_vector(name, size) for name in senders])
    return {"seconds": seconds, "making": making, "largest_error": error}


def _pieces(lease: Lease, length: int) -> Iterator[bytes]:
    """Each ciphertext of what came."""
    return (bytes(lease.view[start : start + length]) for start in range(0, len(lease.view), length))


# -- Parent and child ------------------------------------------------------------------------------------------------


def _fork(
    role: Callable[[_Member], Line],
    identity: Identity,
    roster: Roster,
    greeting: Greeting,
    others: Iterable[Wire],
) -> tuple[Wire, int]:
    """Start a process that plays this role and then says what came of it; the pipe to it, and its number."""
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        for pipe in (ours, *others):
            pipe.close()  # or the children would keep each other's pairs alive
        _be(role, identity, roster, greeting, theirs)
    theirs.close()
    return ours, pid


def _be(
    role: Callable[[_Member], Line], identity: Identity, roster: Roster, greeting: Greeting, pipe: Wire
) -> NoReturn:
    """Never returns into the parent's code, whatever happens."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent closes the pipes
        member = _Member(identity, roster, greeting, pipe)
        _say(pipe, role(member))
        member.link.close(0)
    except (BadInput, BadMessage, TrainingFailed, OSError) as error:
        with suppress(OSError):
            _say(pipe, {"failed": f"{identity.name}: {error}"})
    finally:
        kind, defect, trace = sys.exc_info()
        if kind is not None and defect is not None:  # of ours, so it is shown whole
            sys.excepthook(kind, defect, trace)
            sys.stderr.flush()
        os._exit(0)


def _public(pipe: Wire) -> Context:
    """The receiver's key, as the parent passes it on: in a federation the receiver signs it."""
    return read_public(bytes.fromhex(str(_hear(pipe)["public"])))


def _say(pipe: Wire, line: Line) -> None:
    pipe.send_bytes(json.dumps(line).encode())


def _hear(pipe: Wire) -> Line:
    """What the other end says; TrainingFailed if it has failed, or is gone."""
    try:
        line: Line = json.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        raise TrainingFailed("one of the processes has ended") from None
    if "failed" in line:
        raise TrainingFailed(str(line["failed"]))
    return line
