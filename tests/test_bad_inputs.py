"""What a node survives: each row of the list of bad inputs and attacks is a test, named by its number and words.

Most rows meet a whole node: `p2pfl.runtime.assemble`, real sockets, real keys, a real model. It has sent its first
update and waits for that of mallory, a member with a good key and bad intentions. The same holds after each row: one
more count under the right code, one log line, and the same model, round, epoch, roster and membership as before.
"""

from __future__ import annotations

import ast
import base64
import itertools
import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from links import (
    EXPERIMENT,
    LOOPBACK,
    WITHIN,
    Attacker,
    Party,
    chunks_of,
    connect,
    identities,
    open_party,
    parties,
    roster_of,
    settle,
    until,
)
from zmq.utils import z85

import p2pfl
from p2pfl import topology
from p2pfl.config import Experiment, validate
from p2pfl.data import load_part
from p2pfl.envelope import SIGNING_CONTEXT, Sealed, sign_statement
from p2pfl.identity import Card, Identity, Roster, load, parse_address, save
from p2pfl.link import MAX_UNDELIVERED
from p2pfl.messages import (
    MAX_ROUND,
    BadInput,
    Chunk,
    Describe,
    Gossip,
    Grant,
    Heartbeat,
    Hint,
    LinkUp,
    MemberRecord,
    Offer,
    Received,
    Rejected,
    TrainingFailed,
    check_name,
    printable,
)
from p2pfl.records import Line, NodeRecords
from p2pfl.runtime import Runtime, assemble
from p2pfl.wire import CHUNK, MAX_FRAME, MAX_HEADER, TAG, encode, pack

IDS = identities("honest", "mallory", "victim")
STRANGER = Identity.generate("mallory")  # the name helps him nothing
LONG = 60.0  # seconds: nothing here waits for it


# -- A whole node ----------------------------------------------------------------------------------------------------


class Victim:
    """A node alive in a thread."""

    def __init__(self, folder: Path, **changes: object) -> None:
        network = dict.fromkeys(("join_timeout", "silence", "patience", "grace"), LONG) | changes
        self.experiment: Experiment = validate(
            {
                "topology": {"nodes": sorted(IDS), "edges": [["honest", "mallory"], ["mallory", "victim"]]},
                "data": {"name": "digits"},
                "model": {"name": "logistic"},
                "train": {"rounds": 50, "local_steps": 1, "device": "cpu"},
                "network": network,
            },
            "the test",
        )
        self.lines: list[Line] = []
        self._told = threading.Condition()
        self.runtime: Runtime = assemble(
            self.experiment,
            IDS["victim"],
            roster_of(IDS.values()),
            7,
            load_part(self.experiment, 2),
            ["mallory"],
            [],
            LOOPBACK,
            NodeRecords(folder),
            topology=topology.build(self.experiment.topology, 0),
            resume=False,
            observe=self._observe,
        )
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        try:
            self.runtime.run()
        except BaseException as error:  # noqa: BLE001  (whatever it is, it is what these tests look for)
            self.failure = error
            with self._told:
                self._told.notify_all()

    def _observe(self, line: Line) -> None:
        with self._told:
            self.lines.append(line)
            self._told.notify_all()

    def __enter__(self) -> Victim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.leave()
        self._thread.join(WITHIN)
        assert not self._thread.is_alive() and self.failure is None, self.failure

    def end(self) -> None:
        """Wait until it has ended by itself; raise what it raised."""
        self._thread.join(WITHIN)
        failure, self.failure = self.failure, None
        assert not self._thread.is_alive() and failure is not None
        raise failure

    @property
    def address(self) -> str:
        return self.runtime.link.address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def wait(self, happened: Callable[[], object]) -> None:
        with self._told:
            done = self._told.wait_for(lambda: self.failure is not None or happened(), WITHIN)
        assert done and self.failure is None, (self.failure, self.lines[-5:])

    def events(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line.get("event") == kind]

    def rejected(self, code: str) -> list[Line]:
        return [line for line in self.events("rejected") if line["code"] == code]

    def rounds(self) -> list[Line]:
        return [line for line in self.lines if "merged" in line]

    def count(self, code: str) -> int:
        return self.runtime.node.conduct.counts.get(code, 0)

    @property
    def vector(self) -> np.ndarray:
        return self.runtime._worker._trainer.learner.vector.numpy()

    def state(self) -> tuple[object, ...]:
        """What no bad input may change."""
        node, link = self.runtime.node, self.runtime.link
        members = [
            (n.name, n.linked, n.alive, n.epoch, n.mass, n.round, n.heard, sorted(n.updates), n.gone_after)
            for n in node.neighbours.values()
        ]
        return self.vector.tobytes(), node.round, node.phase, link.epoch, str(link._roster), members


class Mallory(Attacker):
    """A member of the roster, and neighbour of the victim, whose program is not ours."""

    def __init__(self, victim: Victim, identity: Identity = IDS["mallory"], epoch: int = 5) -> None:
        super().__init__(identity, IDS["victim"], victim.address, epoch)
        self.victim = victim
        self.greeting = victim.runtime.link._greeting

    def good(self, channel: str, **changes: object) -> object:
        about = {"experiment": self.greeting.experiment, "schema": self.greeting.schema}
        return self.hello(channel, **(about | changes))

    def enter(self) -> None:
        """Link up as an honest member does, and wait until the victim has sent its update."""
        for channel in ("control", "bulk"):
            self.open(channel)
            self.say(channel, self.good(channel))
        self.await_update(0)

    def await_update(self, round: int) -> None:
        came: list[object] = []

        def sealed_came() -> bool:
            came.extend(self.hear("bulk"))
            return any(isinstance(message, Chunk) and message.round == round for message in came)

        self.poll(sealed_came)
        self.say("control", Grant(round, 2))  # all of it came

    def poll(self, happened: Callable[[], object]) -> None:
        """Look again whenever something comes on the bulk connection."""
        poller = zmq.Poller()
        poller.register(self.sockets["bulk"], zmq.POLLIN)
        for _ in range(int(WITHIN * 100)):
            if happened():
                return
            poller.poll(10)
        raise AssertionError(f"it did not happen; {self.victim.failure} {self.victim.lines[-5:]}")

    def seal(self, round: int = 0, vector: bytes | None = None, **changes: object) -> Sealed:
        """A well-made update, but for the changes."""
        size = int(changes.pop("size", self.greeting.size))
        identity = changes.pop("identity", self.identity)
        about = {"federation": self.greeting.experiment, "schema": self.greeting.schema, "epoch": self.epoch} | changes
        sealer = Attacker(identity, IDS["victim"], "").sealer(size, **about)
        plain = (-self.victim.vector).tobytes() if vector is None else vector
        return sealer.seal(memoryview(plain.ljust(size, b"\0")[:size]), round, 1.0, 2.0)

    def send(self, sealed: Sealed) -> None:
        chunks = [Chunk(sealed.round, i, chunk) for i, chunk in enumerate(chunks_of(sealed))]
        self.say("bulk", sealed.offer, *chunks)


@contextmanager
def attacked(folder: Path, **network: object) -> Iterator[tuple[Victim, Mallory]]:
    with Victim(folder, **network) as victim, Mallory(victim) as mallory:
        mallory.enter()
        victim.wait(lambda: victim.runtime.node.phase.value == "collecting")
        yield victim, mallory


@dataclass(frozen=True)
class Row:
    """One bad input: what is done, and under which code it must be counted."""

    number: int
    words: str
    attack: Callable[[Victim, Mallory], None]
    code: str
    quarantined: bool = False  # its maker is shut out
    closed: bool = False  # mallory's connection breaks

    def __str__(self) -> str:
        return f"{self.number:02}-{self.words.replace(' ', '-')}"


# -- The attacks -----------------------------------------------------------------------------------------------------


def raw(data: bytes) -> Callable[[Victim, Mallory], None]:
    """These bytes on a TCP connection, read until the other side hangs up."""

    def attack(victim: Victim, _: Mallory) -> None:
        with socket.create_connection(("127.0.0.1", victim.port), timeout=WITHIN) as connection, suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    return attack


def zmtp(mechanism: str) -> Callable[[Victim, Mallory], None]:
    """A ZeroMQ socket that speaks another mechanism, or shows another key; it sends as fast as it can."""

    def attack(victim: Victim, mallory: Mallory) -> None:
        stranger = mallory.context.socket(zmq.DEALER)
        stranger.linger = 0
        if mechanism == "PLAIN":
            stranger.plain_username, stranger.plain_password = b"mallory", b"secret"
        elif mechanism == "CURVE":
            stranger.curve_secretkey, stranger.curve_publickey = STRANGER.link_secret, STRANGER.card.link_key
            stranger.curve_serverkey = IDS["victim"].card.link_key
        stranger.connect(victim.address)
        for _ in range(100):
            with suppress(zmq.Again):  # turned away, it has nowhere left to send to
                stranger.send_multipart(encode(Heartbeat(9)), zmq.DONTWAIT)

    return attack


def frames(*parts: bytes) -> Callable[[Victim, Mallory], None]:
    return lambda _, mallory: mallory.frames("control", *parts)


def header(**fields: object) -> Callable[[Victim, Mallory], None]:
    return frames(pack(fields), b"")


def packed(data: bytes) -> Callable[[Victim, Mallory], None]:
    return frames(data, b"")


def new_hello(**changes: object) -> Callable[[Victim, Mallory], None]:
    """A third connection, with a hello that is wrong in this."""

    def attack(_: Victim, mallory: Mallory) -> None:
        mallory.open("third")
        mallory.say("third", mallory.good("control", **changes))
        mallory.poll(lambda: mallory.is_closed("third"))

    return attack


def forged_hello(_: Victim, mallory: Mallory) -> None:
    signed_by_stranger = Attacker(STRANGER, IDS["victim"], "", mallory.epoch).hello(
        "control", experiment=mallory.greeting.experiment, schema=mallory.greeting.schema
    )
    mallory.open("third")
    mallory.say("third", signed_by_stranger)
    mallory.poll(lambda: mallory.is_closed("third"))


def silent_words(_: Victim, mallory: Mallory) -> None:
    mallory.open("third")
    mallory.say("third", Heartbeat(1))
    mallory.poll(lambda: mallory.is_closed("third"))


def other_experiment(_: Victim, mallory: Mallory) -> None:
    mallory.open("third")
    mallory.say("third", mallory.good("control", experiment=b"x" * 32), Heartbeat(40))
    mallory.poll(lambda: mallory.is_closed("third"))


def updates(**changes: object) -> Callable[[Victim, Mallory], None]:
    return lambda _, mallory: mallory.send(mallory.seal(**changes))


def offer(field: str, index: int) -> Callable[[Victim, Mallory], None]:
    """A good update, but for one bit of its offer."""

    def attack(_: Victim, mallory: Mallory) -> None:
        sealed = mallory.seal()
        spoiled = flipped(getattr(sealed.offer, field), index)
        mallory.send(replace(sealed, offer=replace(sealed.offer, **{field: spoiled})))

    return attack


def flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def chunk(change: Callable[[Chunk], Chunk]) -> Callable[[Victim, Mallory], None]:
    def attack(_: Victim, mallory: Mallory) -> None:
        sealed = mallory.seal()
        mallory.say("bulk", sealed.offer, change(Chunk(0, 0, chunks_of(sealed)[0])))

    return attack


def thousand_offers(_: Victim, mallory: Mallory) -> None:
    for round in range(2, 1002):
        mallory.say("bulk", mallory.seal(round).offer)


def signed_manifest(**fields: object) -> Callable[[Victim, Mallory], None]:
    """An offer whose manifest says this, properly signed."""

    def attack(_: Victim, mallory: Mallory) -> None:
        sealed = mallory.seal()
        manifest = pack(unpacked(sealed.offer.manifest) | fields)
        offer = Offer(manifest, mallory.identity.sign(SIGNING_CONTEXT, manifest), sealed.offer.key)
        mallory.send(replace(sealed, offer=offer))

    return attack


def unpacked(manifest: bytes) -> dict[str, object]:
    from p2pfl.wire import unpack

    return unpack(manifest)


def two_contents(_: Victim, mallory: Mallory) -> None:
    mallory.say("bulk", mallory.seal(0).offer, mallory.seal(0, vector=b"other").offer)


def foreign_member(_: Victim, mallory: Mallory) -> None:
    """Mallory passes off honest's model as his own."""
    mallory.send(mallory.seal(identity=IDS["honest"]))


HELLO_BYTES = b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03" + random.Random(0).randbytes(200)
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
EVIL = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."  # os.system("true")
DEEP = b"\x81\xa1a" * 21_000

ROWS = [
    Row(1, "random bytes", raw(random.Random(1).randbytes(5000)), "gate_refused"),
    Row(1, "an HTTP GET", raw(b"GET / HTTP/1.1\r\nHost: victim\r\n\r\n"), "gate_refused"),
    Row(1, "a TLS hello", raw(HELLO_BYTES), "gate_refused"),
    Row(1, "a port scan", raw(b""), "gate_refused"),
    Row(2, "NULL", zmtp("NULL"), "gate_refused"),
    Row(2, "PLAIN", zmtp("PLAIN"), "gate_refused"),
    Row(2, "a CURVE key not in the roster", zmtp("CURVE"), "gate_refused"),
    Row(6, "a length of 2^63", raw(GREETING + b"\x06" + struct.pack(">Q", 2**63)), "gate_refused"),
    Row(7, "one frame", frames(b""), "bad_frames"),
    Row(7, "three frames", frames(b"a", b"b", b"c"), "bad_frames"),
    Row(7, "a hundred thousand frames", frames(*[b"x"] * 100_000), "bad_frames"),
    Row(7, "empty frames", frames(b"", b""), "bad_header"),
    Row(7, "an unknown type", header(type=99), "unknown_type"),
    Row(7, "no type", header(round=1), "unknown_type"),
    Row(7, "a body where none belongs", frames(encode(Heartbeat(1))[0], b"body"), "bad_body"),
    Row(9, "a link key of no card", zmtp("CURVE"), "gate_refused"),
    Row(10, "a hello signed by another key", forged_hello, "bad_hello"),
    Row(10, "a hello in another's name", new_hello(name="honest"), "bad_hello"),
    Row(10, "a hello for another", new_hello(recipient="honest"), "bad_hello"),
    Row(10, "a hello of the other role", new_hello(answer=True), "bad_hello"),
    Row(10, "words without a hello", silent_words, "no_hello"),
    Row(10, "a hello twice", lambda _, m: m.say("control", m.good("control")), "bad_hello", closed=True),
    Row(10, "a hello for the other channel", lambda _, m: m.say("bulk", m.good("control")), "bad_hello", closed=True),
    Row(13, "words after a hello of another experiment", other_experiment, "no_hello"),
    Row(14, "deep nesting", packed(DEEP[:MAX_HEADER]), "bad_header"),
    Row(14, "a header of a megabyte", packed(b"\x80" * 1_000_000), "too_large"),
    Row(14, "a map that claims 2^32 entries", packed(b"\xdf\xff\xff\xff\xff" + b"\xa0\xc0" * 99), "bad_header"),
    Row(14, "an array that claims 2^32 entries", packed(b"\x81\xa4type\xdd\xff\xff\xff\xff"), "bad_header"),
    Row(14, "bytes that claim 2^32", packed(b"\x81\xa4type\xc6\xff\xff\xff\xff"), "bad_header"),
    Row(15, "a key twice", packed(b"\x82\xa4type\x03\xa4type\x03"), "bad_header"),
    Row(15, "an integer key", packed(b"\x81\x01\x03"), "bad_header"),
    Row(15, "an extension type", packed(b"\x81\xa4type\xd4\x01\x00"), "bad_header"),
    Row(15, "trailing bytes", packed(encode(Heartbeat(1))[0] + b"\0"), "bad_header"),
    Row(15, "bad UTF-8", packed(b"\x81\xa4typ\xff\x03"), "bad_header"),
    Row(15, "a negative round", header(type=3, round=-1), "bad_header"),
    Row(15, "a boolean round", header(type=3, round=True), "bad_header"),
    Row(15, "an unknown key", header(type=3, round=1, more=1), "bad_header"),
    Row(15, "a missing key", header(type=3), "bad_header"),
    Row(15, "a NaN weight", signed_manifest(mass=math.nan), "bad_header"),
    Row(15, "a negative weight", signed_manifest(reach=-1.0), "bad_header"),
    Row(16, "a total that is not the schema's", updates(size=4 * 1000), "bad_schema"),
    Row(16, "a schema that is not ours", updates(schema=b"x" * 32), "bad_schema"),
    Row(16, "a thousand offers", thousand_offers, "future"),
    Row(16, "an offer without a manifest", frames(encode(Offer(b"", bytes(64), bytes(32)))[0], b""), "bad_body"),
    Row(17, "a chunk without an offer", lambda _, m: m.say("bulk", Chunk(0, 0, bytes(100))), "unexpected_chunk"),
    Row(17, "a chunk of another round", chunk(lambda c: replace(c, round=1)), "unexpected_chunk"),
    Row(17, "a wrong index", chunk(lambda c: replace(c, index=1)), "bad_chunk"),
    Row(17, "a chunk that was not granted", chunk(lambda c: replace(c, index=8)), "no_credit"),
    Row(17, "a short chunk", chunk(lambda c: replace(c, sealed=c.sealed[:-1])), "bad_chunk"),
    Row(17, "a long chunk", chunk(lambda c: replace(c, sealed=c.sealed + b"x")), "bad_chunk"),
    Row(17, "an offer on the control connection", lambda _, m: m.say("control", m.seal().offer), "wrong_channel"),
    Row(19, "a bit of the manifest", offer("manifest", 40), "bad_signature", quarantined=True),
    Row(19, "a bit of the signature", offer("signature", 9), "bad_signature", quarantined=True),
    Row(19, "a bit of the key", offer("key", 9), "bad_key"),
    Row(19, "a bit of the payload", chunk(lambda c: replace(c, sealed=flipped(c.sealed, 99))), "bad_chunk"),
    Row(19, "a bit of the tag", chunk(lambda c: replace(c, sealed=flipped(c.sealed, len(c.sealed) - 1))), "bad_chunk"),
    Row(19, "a bit of the digest", signed_manifest(sealed=bytes(32)), "bad_digest"),
    Row(20, "a model passed off as one's own", foreign_member, "bad_signature", quarantined=True),
    Row(20, "another named as the signer", signed_manifest(signer=bytes(32)), "bad_signature", quarantined=True),
    Row(20, "an update of another federation", updates(federation=b"x" * 32), "bad_federation"),
    Row(21, "an update of an older epoch", updates(epoch=4), "stale"),
    Row(22, "two contents for one round", two_contents, "equivocation", quarantined=True),
    Row(23, "a round far ahead", updates(round=49), "future"),
    Row(23, "a round beyond the experiment", updates(round=MAX_ROUND), "future"),
    Row(23, "a round of 2^63-1", signed_manifest(round=2**63 - 1), "bad_header"),
    Row(23, "a negative round in the manifest", signed_manifest(round=-1), "bad_header"),
    Row(43, "pickle where the header belongs", frames(EVIL, b""), "bad_header"),
    Row(43, "pickle everywhere", frames(EVIL, EVIL), "bad_header"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before = victim.state()
        row.attack(victim, mallory)
        victim.wait(lambda: victim.rejected(row.code))
        line = victim.rejected(row.code)[0]
        assert line["peer"] and line["why"] and str(line["why"]).isprintable()
        if row.quarantined:
            victim.wait(lambda: victim.events("quarantined") and victim.rounds())
            mallory.poll(lambda: mallory.is_closed("control") and mallory.is_closed("bulk"))
            assert not victim.runtime.node.neighbours["mallory"].linked
            assert victim.rounds()[0]["merged"] == [], "it goes on without mallory, and with nothing of him"
        elif row.closed:
            mallory.poll(lambda: mallory.is_closed("control") or mallory.is_closed("bulk"))
            victim.wait(lambda: victim.events("suspected"))
            assert victim.state()[:2] == before[:2]
        else:
            assert victim.state() == before
            victim.runtime.node.check_offer("mallory", 0)  # who may still send his update, if it is a good one
        assert victim.state()[3:5] == before[3:5]


# -- Rows that take more than one message ----------------------------------------------------------------------------


def test_05_a_message_without_end_from_a_stranger(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before, memory = victim.state(), resident()
        zmtp("NULL")(victim, mallory)
        with flood(victim, STRANGER, frames=100, size=CHUNK):
            mallory.poll(lambda: victim.count("gate_refused") >= 2)
        assert resident() - memory < 10 << 20
        assert victim.state() == before


@pytest.mark.skipif(sys.platform != "linux", reason="the guard reads Linux' struct tcp_info")
@pytest.mark.parametrize("size", [2, 1000, CHUNK])
@pytest.mark.parametrize("known", [False, True], ids=["silent", "after-its-hello"])
def test_05_a_message_without_end_from_a_member(size: int, known: bool, tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        peer = "honest" if known else "127.0.0.1"
        before, memory = victim.state()[:2], resident()
        peak = 0

        def flooded() -> bool:
            nonlocal peak
            peak = max(peak, resident() - memory)
            return bool(victim.rejected("flood"))

        hello = None
        if known:
            about = {"experiment": mallory.greeting.experiment, "schema": mallory.greeting.schema}
            hello = Attacker(IDS["honest"], IDS["victim"], "").hello("bulk", **about)
        with flood(victim, IDS["honest"], 10 * MAX_UNDELIVERED // (size + 40), size, hello) as attacker:
            mallory.poll(flooded)
            attacker.wait(WITHIN)  # it ends when it is hung up on
        assert peak < 50 << 20
        assert victim.rejected("flood")[0]["peer"] == peer
        victim.wait(lambda: victim.events("quarantined"))
        assert victim.events("quarantined")[0]["peer"] == peer
        assert victim.state()[:2] == before
        assert victim.runtime.node.neighbours["mallory"].linked, "live links go on"


FLOOD = """
import json, sys, zmq
from zmq.utils.monitor import parse_monitor_message
about = json.loads(sys.stdin.readline())
socket = zmq.Context().socket(zmq.DEALER)
for key in ("curve_secretkey", "curve_publickey", "curve_serverkey"):
    setattr(socket, key, bytes.fromhex(about[key]))
socket.sndhwm, socket.linger, socket.reconnect_ivl = 0, 0, -1
monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
socket.connect(about["address"])
if about["hello"]:
    socket.send_multipart([bytes.fromhex(frame) for frame in about["hello"]])
piece = b"x" * about["size"]
for _ in range(about["frames"]):
    socket.send(piece, zmq.SNDMORE)
socket.send(piece)
monitor.poll()
"""


@contextmanager
def flood(
    victim: Victim, identity: Identity, frames: int, size: int, hello: object = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sends one message of so many frames, until it is hung up on."""
    about = {
        "curve_secretkey": identity.link_secret.hex(),
        "curve_publickey": identity.card.link_key.hex(),
        "curve_serverkey": IDS["victim"].card.link_key.hex(),
        "address": victim.address,
        "hello": [bytes(frame).hex() for frame in encode(hello)] if hello is not None else None,
        "frames": frames,
        "size": size,
    }
    process = subprocess.Popen([sys.executable, "-c", FLOOD], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(about).encode() + b"\n")
    process.stdin.close()
    try:
        yield process
    finally:
        process.kill()
        process.wait(WITHIN)


def resident() -> int:
    """Bytes of memory that this process holds."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_06_a_frame_beyond_the_cap_from_a_member(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before, memory = victim.state(), resident()
        mallory.frames("bulk", encode(Heartbeat(1))[0], bytes(MAX_FRAME + 1))
        victim.wait(lambda: victim.events("suspected"))
        mallory.poll(lambda: mallory.is_closed("bulk"))
        assert resident() - memory < 10 << 20
        assert victim.state()[:2] == before[:2] and victim.state()[3:5] == before[3:5]


def test_07_another_version_is_named(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before = victim.state()
        mallory.say("control", mallory.good("control", protocol=2))
        victim.wait(lambda: victim.rejected("version_mismatch"))
        assert victim.rejected("version_mismatch")[0]["why"] == "ours=1 theirs=2"
        assert victim.state() == before


def test_08_the_routing_id_of_another_member() -> None:
    with parties(IDS, only=("victim",)) as p:
        victim = p["victim"]
        address = victim.link.address
        with (
            Attacker(IDS["honest"], IDS["victim"], address) as honest,
            Attacker(IDS["mallory"], IDS["victim"], address) as m,
        ):
            for channel in ("control", "bulk"):
                honest.open(channel, routing_id=f"honest-{channel}".encode())
                honest.say(channel, honest.hello(channel))
            until(lambda: victim.is_up("honest"), victim)
            m.open("same", routing_id=b"honest-control")  # libzmq ignores it while honest is there
            m.say("same", m.hello("control"), Heartbeat(7))
            m.open("mine", routing_id=b"honest-3")
            m.say("mine", m.hello("control", name="honest"), Heartbeat(8))
            until(lambda: "bad_hello" in victim.codes(), victim)
            honest.say("control", Heartbeat(1))
            until(lambda: any(e for e in victim.events if getattr(e, "message", None) == Heartbeat(1)), victim)
            settle(victim)
            assert victim.is_up("honest") and not victim.is_up("mallory")
            assert [e.peer for e in victim.all(Rejected)] == ["mallory"] * len(victim.all(Rejected))
            assert len([e for e in victim.events if hasattr(e, "message")]) == 1
            honest.close("control")
            until(lambda: not victim.is_up("honest"), victim)
            m.open("now free", routing_id=b"honest-control")
            m.say("now free", Heartbeat(9))
            until(lambda: "no_hello" in victim.codes(), victim)


def test_09_a_revoked_key_in_mid_session(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before = victim.state()
        remaining = roster_of([IDS["honest"], IDS["victim"]])
        victim.runtime.reload_roster_with(lambda: remaining)
        victim.runtime.roster_changed()
        victim.wait(lambda: victim.rejected("revoked"))
        mallory.poll(lambda: mallory.is_closed("control") and mallory.is_closed("bulk"))
        mallory.open("again")
        victim.wait(lambda: victim.rejected("gate_refused"))
        assert IDS["mallory"].card.link_key and "add its card" in str(victim.rejected("gate_refused")[0]["why"])
        assert victim.state()[:2] == before[:2] and not victim.runtime.node.neighbours["mallory"].linked


def test_11_a_small_order_key_in_the_roster() -> None:
    weak = replace_key(IDS["mallory"].card, bytes(32))
    text = f"# members\n{IDS['victim'].card}\n{weak}\n{IDS['honest'].card}\n"
    with pytest.raises(BadInput, match=r"roster.txt line 3: .*forged key"):
        Roster.parse(text, "roster.txt")


def replace_key(card: Card, signing_key: bytes) -> str:
    blob = signing_key + card.link_key + card.signature
    return f"p2pfl1 {card.name} {base64.urlsafe_b64encode(blob).decode().rstrip('=')}"


def test_12_oneself_and_ones_own_reflection() -> None:
    with parties(IDS, only=("victim",)) as p, socket.create_server(("127.0.0.1", 0)) as server:
        victim = p["victim"]
        mirror = threading.Thread(target=reflect, args=(server,), daemon=True)
        mirror.start()
        victim.link.dial(victim.link.address)
        victim.link.dial(f"tcp://127.0.0.1:{server.getsockname()[1]}", ("honest",))
        until(lambda: "oneself" in victim.codes(), victim)
        until(lambda: not mirror.is_alive(), victim)
        assert not victim.all(LinkUp)


def reflect(server: socket.socket) -> None:
    """Send the bytes of four connections back to who sent them."""
    for _ in range(4):
        connection, _ = server.accept()
        with connection, suppress(OSError):
            while data := connection.recv(4096):
                connection.sendall(data)


def test_13_another_experiment_is_named_on_both_sides(tmp_path: Path) -> None:
    with Victim(tmp_path) as victim, Mallory(victim) as mallory:
        before = victim.state()
        weight = next(name for name in victim.runtime.link._greeting.facts if name.endswith("weight"))
        theirs = dict(victim.runtime.link._greeting.facts) | {"train.lr": "0.5", weight: "12×64 float32"}
        for channel in ("control", "bulk"):
            mallory.open(channel)
            mallory.say(channel, mallory.good(channel, experiment=b"x" * 32))
        mallory.say("control", Describe(theirs))
        victim.wait(lambda: victim.rejected("experiment_mismatch"))
        assert victim.rejected("experiment_mismatch")[0]["why"] == (
            f"{weight} is 10×64 float32 here, 12×64 float32 there; train.lr is 0.1 here, 0.5 there"
        )
        told: list[object] = []

        def told_all() -> bool:
            told.extend(mallory.hear("control"))
            return any(isinstance(message, Describe) for message in told)

        mallory.poll(told_all)
        assert Describe(victim.runtime.link._greeting.facts) in told, "mallory can say it too"
        assert victim.state() == before, "it is not linked"


def test_17_chunks_after_the_last() -> None:
    with parties(IDS, size=2 * CHUNK, only=("victim",)) as p:
        victim = p["victim"]
        with Attacker(IDS["mallory"], IDS["victim"], victim.link.address) as mallory:
            mallory.join()
            until(lambda: victim.is_up("mallory"), victim)
            sealed = mallory.sealer(2 * CHUNK).seal(memoryview(bytes(2 * CHUNK)), 0, 1.0, 1.0)
            pieces = [Chunk(0, i, piece) for i, piece in enumerate(chunks_of(sealed))]
            mallory.say("bulk", sealed.offer, *pieces, *pieces, Chunk(0, 2, bytes(CHUNK + TAG)))
            until(lambda: victim.codes().count("unexpected_chunk") == 3, victim)
            assert victim.updates() == [(0, bytes(2 * CHUNK))]


def test_18_who_stalls_in_mid_transfer_costs_one_deadline(tmp_path: Path) -> None:
    with attacked(tmp_path, patience=1.0, join_timeout=3.0) as (victim, mallory):
        mallory.say("bulk", mallory.seal().offer)  # and nothing more
        victim.wait(lambda: victim.rounds())
        assert victim.rounds()[0]["merged"] == [] and victim.rounds()[0]["missing"] == ["mallory"]
        mallory.await_update(1)
        mallory.send(mallory.seal(1))
        victim.wait(lambda: len(victim.rounds()) > 1)
        assert victim.rounds()[1]["merged"] == ["mallory"]


def test_21_a_whole_update_again(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        sealed = mallory.seal()
        mallory.send(sealed)
        victim.wait(lambda: victim.rounds())
        mallory.await_update(1)
        victim.wait(lambda: victim.runtime.node.phase.value == "collecting")
        before = victim.state()
        mallory.send(sealed)
        victim.wait(lambda: victim.rejected("duplicate"))
        assert victim.state() == before
        mallory.send(mallory.seal(0))  # another one for the past: that is worse than a replay
        victim.wait(lambda: victim.rejected("equivocation") and len(victim.rounds()) > 1)
        assert victim.rounds()[1]["merged"] == []


def test_22_the_evidence_of_two_contents_convinces_anybody(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        two_contents(victim, mallory)
        victim.wait(lambda: victim.rejected("equivocation"))
        evidence = [bytes.fromhex(text) for text in victim.rejected("equivocation")[0]["evidence"]]
        one, one_signature, other, other_signature = evidence
        card = IDS["mallory"].card
        assert card.verify(SIGNING_CONTEXT, one, one_signature)
        assert card.verify(SIGNING_CONTEXT, other, other_signature)
        assert one != other and unpacked(one)["round"] == unpacked(other)["round"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, 1e6], ids=str)
def test_24_a_vector_that_would_spoil_the_mean(value: float, tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        for round in range(3):
            mallory.await_update(round) if round else None
            vector = np.full(mallory.greeting.size // 4, 0.01, dtype=np.float32)
            vector[round:] = value
            mallory.send(mallory.seal(round, vector=vector.tobytes()))
            victim.wait(lambda r=round: len(victim.rounds()) > r)
            assert victim.rounds()[round]["merged"] == [], "the round goes on at once, without it"
        assert victim.count("bad_value") == 3
        victim.wait(lambda: victim.events("quarantined"))
        assert np.isfinite(victim.vector).all() and np.abs(victim.vector).max() < 10


def test_24_denormals_are_numbers(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        vector = np.full(mallory.greeting.size // 4, 1e-40, dtype=np.float32)
        mallory.send(mallory.seal(0, vector=vector.tobytes()))
        victim.wait(lambda: victim.rounds())
        assert victim.rounds()[0]["merged"] == ["mallory"] and victim.count("bad_value") == 0


def test_25_lawful_but_telling(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        size = mallory.greeting.size
        same = np.full(size // 4, 0.01, dtype=np.float32).tobytes()
        told = []
        for round, vector in enumerate((bytes(size), victim.vector.tobytes(), same, same)):
            mallory.await_update(round) if round else None
            own = victim.vector.tobytes() if round == 1 else vector
            mallory.send(mallory.seal(round, vector=own))
            victim.wait(lambda r=round: len(victim.rounds()) > r)
            assert victim.rounds()[round]["merged"] == ["mallory"]
        told = [(line["round"], line["why"]) for line in victim.events("suspicious")]
        assert told == [(0, "a model of zeros"), (1, "our own model"), (3, "the same model as before")]
        assert not victim.events("rejected")


@contextmanager
def two_processes_with_one_key() -> Iterator[tuple[Party, Party, Party]]:
    """The links of an honest member, and of the older and the newer process of another."""
    ids = {name: IDS[name] for name in ("honest", "victim")}
    with parties(ids, only=("honest",)) as p:
        older, newer = (open_party(IDS["victim"], roster_of(ids.values()), epoch=epoch) for epoch in (1, 2))
        try:
            yield p["honest"], older, newer
        finally:
            for party in (older, newer):
                if not party.link._router.closed:  # a story may have closed one itself
                    party.link.close(0)


def test_29_the_older_of_two_processes_with_one_key_is_shown_the_newer_ones_own_words() -> None:
    with two_processes_with_one_key() as (honest, older, newer):
        connect(older, honest)
        connect(newer, honest)
        until(lambda: older.link.successor, older, newer, honest)
        assert older.link.successor == 2 and newer.link.successor == 0
        assert newer.is_up("honest") and not older.is_up("honest")


def test_29_who_is_found_at_an_address_of_the_past_is_told_as_well() -> None:
    """The older one listens, so that it is the other who makes the connection."""
    with two_processes_with_one_key() as (honest, older, newer):
        connect(newer, honest)
        honest.link.dial(older.link.address, ("victim",))
        newer.link.close(0)  # or its address alone would be dialled
        until(lambda: older.link.successor == 2, older, honest)


def test_29_a_record_that_ones_own_key_has_signed_tells_it_too_and_a_forged_one_does_not(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before, experiment = victim.state(), mallory.greeting.experiment
        forged = sign_statement(MemberRecord("victim", 9, 0), IDS["mallory"], experiment)
        mallory.say("control", Gossip((forged,), ()))
        victim.wait(lambda: victim.rejected("bad_record"))
        elsewhere = sign_statement(MemberRecord("victim", 9, 1), IDS["victim"], b"x" * 32)
        mallory.say("control", Gossip((elsewhere,), ()))
        victim.wait(lambda: victim.count("bad_record") == 2)
        assert victim.state() == before and not victim.runtime.link.successor
        genuine = sign_statement(MemberRecord("victim", 9, 0), IDS["victim"], experiment)
        mallory.say("control", Gossip((genuine,), ()))
        with pytest.raises(TrainingFailed, match="start 9, this is 7"):
            victim.end()
        assert [line["epoch"] for line in victim.events("displaced")] == [9] and not victim.events("left")


def own_hello(**changes: object) -> Callable[[Victim, Mallory], None]:
    """Mallory shows the victim a hello in the victim's name, signed by the victim's key where nothing else is said."""

    def attack(victim: Victim, mallory: Mallory) -> None:
        signer = changes.get("signer", IDS["victim"])
        about = {"experiment": mallory.greeting.experiment, "schema": mallory.greeting.schema, "epoch": 9}
        about |= {key: value for key, value in changes.items() if key != "signer"}
        said = Attacker(signer, IDS["mallory"], "").hello("control", name="victim", **about)
        mallory.open("third")
        mallory.say("third", said)
        mallory.poll(lambda: mallory.is_closed("third"))

    return attack


@pytest.mark.parametrize(
    "attack",
    [own_hello(epoch=7), own_hello(epoch=6), own_hello(experiment=b"x" * 32), own_hello(signer=IDS["mallory"])],
    ids=["our own, reflected", "of an earlier start", "of another experiment", "signed by another"],
)
def test_29_no_peer_can_end_a_node_by_what_its_key_has_not_signed(
    attack: Callable[[Victim, Mallory], None], tmp_path: Path
) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before = victim.state()
        attack(victim, mallory)
        victim.wait(lambda: victim.rejected("bad_hello"))
        assert victim.state() == before and not victim.runtime.link.successor


# -- Row 30: clocks --------------------------------------------------------------------------------------------------

PACKAGE = Path(p2pfl.__file__).parent
STAMPED = {"round_line", "event_line"}  # whose lines carry the time of day, and nothing follows from it
ASKED = {"forbids"}  # the hours in which the owner of a node lets it send, and they are those of the owner's clock
SHOWN = {"default_run_dir", "strftime", "localtime", "fromtimestamp"}  # the name of a folder; a time in words
WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "CLOCK_REALTIME"}


def wall_clock_readings(source: str) -> Iterator[tuple[int, str]]:
    """Each place where the time of day is asked for: its line, and the call whose argument the answer is."""
    tree = ast.parse(source)
    calls = [(call, argument) for call in ast.walk(tree) if isinstance(call, ast.Call) for argument in arguments(call)]
    users = {id(node): ast.unparse(call.func).split(".")[-1] for call, node in calls}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="time" | "datetime" | "date"), attr=attr)):
                if attr in WALL_CLOCKS:
                    yield node.lineno, users.get(id(node), "nothing")
            case ast.ImportFrom(module="time"):
                yield node.lineno, "an import that hides which clock it is"


def arguments(call: ast.Call) -> Iterator[ast.expr]:
    yield from call.args
    yield from (keyword.value for keyword in call.keywords)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_30_nothing_follows_from_the_time_of_day(path: Path) -> None:
    found = wall_clock_readings(path.read_text("utf-8"))
    assert not [(line, user) for line, user in found if user not in STAMPED | SHOWN | ASKED]


def test_30_the_test_before_sees_a_wall_clock_that_decides() -> None:
    assert list(wall_clock_readings("deadline = time.time() + 5")) == [(1, "nothing")]
    assert list(wall_clock_readings("from time import time")) == [(1, "an import that hides which clock it is")]


def test_30_a_wall_clock_that_jumps_by_ten_years_changes_nothing_but_the_stamps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    years = itertools.cycle((10, -10, 0))
    really = time.time
    with attacked(tmp_path) as (victim, mallory):
        monkeypatch.setattr(time, "time", lambda: really() + next(years) * 365 * 86_400)
        for round in range(6):
            mallory.await_update(round) if round else None
            mallory.send(mallory.seal(round))
            victim.wait(lambda r=round: len(victim.rounds()) > r)
            assert victim.rounds()[round]["merged"] == ["mallory"]
        assert not victim.events("died") and not victim.events("suspected") and not victim.events("rejected")
        stamps = [float(line["t"]) for line in victim.rounds()]
        assert max(stamps) - min(stamps) > 10 * 365 * 86_400


# -- Rows about files, names and settings: one look through the front door; the rest stands in their own tests --------


def test_37_a_key_file_that_others_can_read(tmp_path: Path) -> None:
    path, _ = save(Identity.generate("aurora"), tmp_path)
    path.chmod(0o644)
    with pytest.raises(BadInput, match="chmod 600"):
        load(path)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="damaged or cut off"):
        load(path)
    link = tmp_path / "link.key"
    link.symlink_to(path)
    with pytest.raises(BadInput, match="symbolic link"):
        load(link)


@pytest.mark.parametrize("address", ["", "host", "host:0", "host:99999", "300.1.1.1:5", "::1:5", "a b:5", "tcp://:5"])
def test_38_a_malformed_address(address: str) -> None:
    with pytest.raises(BadInput, match="tcp://"):
        parse_address(address)
    assert parse_address("[0::1]:5000") == "tcp://[::1]:5000"


def test_38_a_port_in_use_and_all_interfaces() -> None:
    with parties(IDS, only=("victim",)) as p:
        with pytest.raises(BadInput, match="cannot listen"):
            open_party(IDS["honest"], roster_of(IDS.values()), listen=p["victim"].link.address)
        everywhere = open_party(IDS["honest"], roster_of(IDS.values()), listen="tcp://0.0.0.0:0")
        with_six = open_party(IDS["mallory"], roster_of(IDS.values()), listen="tcp://[::]:0")
        try:
            for party in (everywhere, with_six):
                port = party.link.address.rpartition(":")[2]
                p["victim"].link.dial(f"tcp://localhost:{port}", (party.name,))  # a DNS name
                until(lambda other=party: p["victim"].is_up(other.name), p["victim"], everywhere, with_six)
        finally:
            everywhere.link.close(0)
            with_six.link.close(0)


@pytest.mark.parametrize("name", ["", "a" * 65, "a\nb", "\x1b[2J", "../up", "-rf", "ä", "a b"])
def test_39_a_name_that_writes_on_the_terminal(name: str) -> None:
    with pytest.raises(BadInput):
        check_name(name)
    assert printable(name + "\x1b\n\x07\u202e").isprintable()


def test_39_what_a_peer_says_is_escaped(tmp_path: Path) -> None:
    with Victim(tmp_path) as victim, Mallory(victim) as mallory:
        mallory.open("control")
        mallory.say(
            "control", mallory.good("control", experiment=b"x" * 32), Describe({"\x1b[2J": "a\nb", "a": "\x07"})
        )
        victim.wait(lambda: victim.rejected("experiment_mismatch"))
        assert str(victim.rejected("experiment_mismatch")[0]["why"]).isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "target"),
        ("a,target\n,x\n1,y\n", "row 2"),
        ("a,target\nnan,x\n1,y\n", "row 2"),
        ("a,target\nfive,x\n1,y\n", "row 2"),
    ],
)
def test_41_own_data_that_cannot_be_learned_from(text: str, words: str, tmp_path: Path) -> None:
    from p2pfl.data import load_own

    path = tmp_path / "rows.csv"
    path.write_text(text)
    experiment = validate({"data": {"name": "csv", "path": str(path), "target": "target"}}, "the test")
    with pytest.raises(BadInput, match=words):
        load_own(experiment)
    with pytest.raises(BadInput, match=r"cannot read|no file|there is no"):
        load_own(validate({"data": {"name": "csv", "path": str(tmp_path / "gone.csv"), "target": "t"}}, "the test"))


def test_42_few_nodes_and_many() -> None:
    for nodes, edges in ((1, 0), (2, 1)):
        section = validate({"topology": {"graph": "ring", "nodes": nodes}}, "the test").topology
        assert topology.build(section, 0).at(0).number_of_edges() == edges
    with pytest.raises(BadInput, match="fewer nodes or more rows"):
        load_part(validate({"topology": {"graph": "ring", "nodes": 5000}}, "the test"), 0)


def gossip_of(victim: Party) -> list[Gossip]:
    return [event.message for event in victim.all(Received) if isinstance(event.message, Gossip)]


def test_27_a_record_that_its_member_never_made() -> None:
    """Signed by another, for another federation, or changed after; what is genuine beside it is lost with it."""
    with parties(IDS, only=("victim",)) as p, Attacker(IDS["mallory"], IDS["victim"], p["victim"].link.address) as m:
        victim = p["victim"]
        m.join()
        until(lambda: victim.is_up("mallory"), victim)
        claim = MemberRecord("honest", 2, 0, "tcp://10.0.0.1:7000")
        genuine = sign_statement(claim, IDS["honest"], EXPERIMENT)
        forged = [
            sign_statement(claim, IDS["mallory"], EXPERIMENT),
            sign_statement(claim, IDS["honest"], bytes(32)),
            replace(genuine, leaving=True),
            replace(genuine, incarnation=1),
            replace(genuine, address="tcp://10.6.6.6:7000"),
        ]
        for bad in forged:
            m.say(
                "control", Gossip((sign_statement(MemberRecord("mallory", 1, 1), IDS["mallory"], EXPERIMENT), bad), ())
            )
        until(lambda: victim.codes().count("bad_record") == len(forged), victim)
        assert gossip_of(victim) == []
        for _ in range(2):  # the second time its signature is known to hold
            m.say("control", Gossip((genuine,), ()))
        until(lambda: len(gossip_of(victim)) == 2, victim)
        assert gossip_of(victim) == [Gossip((genuine,), ())] * 2
        m.say("control", Gossip((replace(genuine, leaving=True),), ()))
        until(lambda: victim.codes().count("bad_record") == len(forged) + 1, victim)


def test_28_invented_members() -> None:
    with parties(IDS, only=("victim",)) as p, Attacker(IDS["mallory"], IDS["victim"], p["victim"].link.address) as m:
        victim = p["victim"]
        m.join()
        until(lambda: victim.is_up("mallory"), victim)
        stranger = identities("stranger")["stranger"]
        for start in range(0, 1000, 100):
            names = [f"sybil-{number}" for number in range(start, start + 100)]
            records = tuple(sign_statement(MemberRecord(name, 1, 0), stranger, EXPERIMENT) for name in names)
            m.say("control", Gossip(records, tuple(Hint(name, 1, 0) for name in names)))
        until(lambda: victim.codes().count("unknown_member") == 1000, victim)
        assert set(gossip_of(victim)) == {Gossip((), ())}


# -- Rows about what must never be seen ------------------------------------------------------------------------------


RUN = """
import json, os, sys
from pathlib import Path
if "--audit" in sys.argv:
    # Installed before anything is imported, and inherited by every node: `up` forks them.
    seen = Path(sys.argv[2])
    def hook(event, arguments):
        if event == "pickle.find_class":
            with seen.open("a") as file:
                file.write(f"{event} {arguments}\\n")
    sys.addaudithook(hook)
from p2pfl import swarm
from p2pfl.config import validate
from p2pfl.identity import Identity
from p2pfl.records import create_run
import p2pfl.runtime

made = []
generate = Identity.generate.__func__
def remembered(cls, name):
    identity = generate(cls, name)
    made.append(identity.signing.private_bytes_raw().hex())
    made.append(identity.link_secret.hex())
    return identity
Identity.generate = classmethod(remembered)

experiment = validate({
    "topology": {"graph": "ring", "nodes": 3}, "data": {"name": "digits"}, "model": {"name": "logistic"},
    "train": {"rounds": 4, "local_steps": 1, "device": "cpu", "checkpoint_every": 2},
}, "the test")
lines = []
outcome = swarm.up(experiment, create_run(Path(sys.argv[1])), lambda line: lines.append(line))
told = {"secrets": made, "finished": outcome.summary["finished"], "rejected": outcome.summary["rejected"]}
told["lines"] = json.dumps(lines)
told["arguments"] = [Path("/proc/self/cmdline").read_text() if sys.platform == "linux" else "", repr(dict(os.environ))]
sys.stderr.write("the end\\n")
Path(sys.argv[2] + ".json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def swarm_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, object], str]:
    """A short `swarm.up` under an audit hook: its run folder, what the hook saw, what it told, what it printed."""
    folder = tmp_path_factory.mktemp("swarm")
    run, seen = folder / "run", folder / "seen"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(run), str(seen), "--audit"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(Path(f"{seen}.json").read_text())
    assert told["finished"] == 3 and told["rejected"] == {}
    return run, seen, told, done.stdout + done.stderr


def test_40_no_secret_is_written_anywhere(swarm_run: tuple[Path, Path, dict[str, object], str]) -> None:
    run, _, told, printed = swarm_run
    kept = [printed.encode(), str(told["lines"]).encode(), *(text.encode() for text in told["arguments"])]
    files = [path for path in run.rglob("*") if path.is_file()]
    kept += [path.read_bytes() for path in files]
    assert len(files) > 10 and len(told["secrets"]) == 6
    for secret in told["secrets"]:
        key = bytes.fromhex(secret)
        for form in forms_of(key):
            assert not any(form in content for content in kept)


def forms_of(key: bytes) -> list[bytes]:
    """A secret as it might turn up: raw, hex, base64 at each of three offsets, base32, Z85, a list of numbers."""
    based = [base64.b64encode(b"\0" * shift + key)[4:-4] for shift in (0, 1, 2)]
    safe = [base64.urlsafe_b64encode(b"\0" * shift + key)[4:-4] for shift in (0, 1, 2)]
    numbers = ", ".join(map(str, key)).encode()
    return [key, key.hex().encode(), key.hex().upper().encode(), *based, *safe, base64.b32encode(key)[:48],
            z85.encode(key), repr(key)[2:-1].encode(), numbers]  # fmt: skip


def test_40_no_secret_in_what_a_node_shows_of_itself(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        two_contents(victim, mallory)
        victim.wait(lambda: victim.rejected("equivocation"))
        identity = IDS["victim"]
        shown = [repr(identity), str(identity), repr(victim.runtime.link), str(victim.lines)]
        shown += [path.read_text() for path in tmp_path.rglob("*.jsonl")]
        for key in (identity.link_secret, identity.signing.private_bytes_raw()):
            assert not any(form.decode("latin-1") in text for form in forms_of(key) for text in shown)


def test_43_no_unpickler_ever_runs(swarm_run: tuple[Path, Path, dict[str, object], str]) -> None:
    _, seen, told, _ = swarm_run
    assert told["finished"] == 3
    assert not seen.exists(), seen.read_text()


def test_43_the_hook_of_that_test_sees_an_unpickler(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    hook = RUN[: RUN.index("from p2pfl import")]
    code = hook + "import pickle, collections; pickle.loads(pickle.dumps(collections.OrderedDict))"
    subprocess.run([sys.executable, "-c", code, "-", str(seen), "--audit"], check=True, timeout=60)
    assert "OrderedDict" in seen.read_text()


def test_43_pickle_bytes_where_tensors_belong(tmp_path: Path) -> None:
    with attacked(tmp_path) as (victim, mallory):
        before = victim.state()
        mallory.say("bulk", mallory.seal().offer, Chunk(0, 0, EVIL * 20))
        victim.wait(lambda: victim.rejected("bad_chunk"))
        assert victim.state() == before


# -- Rows that a link meets ------------------------------------------------------------------------------------------


def test_messages_made_by_chance_never_raise() -> None:
    """A member sends a thousand of them; the link counts each that is none, and lives."""
    chance = random.Random(3)
    with parties(IDS, only=("victim",)) as p:
        victim: Party = p["victim"]
        with Attacker(IDS["mallory"], IDS["victim"], victim.link.address) as mallory:
            mallory.join()
            until(lambda: victim.is_up("mallory"), victim)
            good = [
                encode(m)
                for m in (Heartbeat(3), Grant(1, 4), Chunk(0, 0, bytes(80)), Offer(b"x" * 200, bytes(64), bytes(32)))
            ]
            for _ in range(1000):
                header, body = chance.choice(good)
                spoiled = bytearray(header)
                for _ in range(chance.randint(1, 3)):
                    spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
                mallory.frames(chance.choice(("control", "bulk")), bytes(spoiled), body)
            mallory.say("control", Heartbeat(31337))
            until(lambda: any(getattr(e, "message", None) == Heartbeat(31337) for e in victim.events), victim)
            assert victim.is_up("mallory") and len(victim.all(Rejected)) > 500
