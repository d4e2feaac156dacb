"""A TCP relay that stands between two nodes as the network does: it passes on, records, cuts, delays and falsifies.

It knows nothing of what it carries. Each of its connections has two directions, "there" (from who dialled) and "back".
A tamperer is asked about every piece of bytes that comes in, with its place in its stream, and says what goes out.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Queue
from typing import Literal

Direction = Literal["there", "back"]
BOTH: tuple[Direction, Direction] = ("there", "back")
PIECE = 65_536  # bytes read at once
HELD = 64  # pieces of one direction that may be on their way; then its sender has to wait
RETRANSMISSION = 0.2  # seconds until TCP (Linux) sends again what was lost; then twice as long, each time
LOSSES = 3  # of one and the same piece, at most: 1.4 s


@dataclass(frozen=True)
class Piece:
    """Some bytes of one direction of one connection."""

    connection: int  # 0, 1, 2 … in the order in which they were made
    direction: Direction
    offset: int  # of the first byte in its stream
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


class Cut(Exception):
    """Raised by a tamperer: close this connection, both directions."""


Tamperer = Callable[[Piece], bytes]
Lateness = Callable[[], float]  # seconds that the next piece takes; pieces keep their order all the same


def prompt() -> float:
    return 0.0


def lossy(share: float, chance: random.Random) -> Lateness:
    """TCP loses nothing: if the network loses this share of what it carries, that comes later, and all behind it."""

    def lateness() -> float:
        seconds, timeout = 0.0, RETRANSMISSION
        for _ in range(LOSSES):
            if chance.random() >= share:
                break
            seconds, timeout = seconds + timeout, 2 * timeout
        return seconds

    return lateness


def honest(piece: Piece) -> bytes:
    return piece.data


@dataclass
class Pair:
    """One connection of the relay, with what it has carried."""

    number: int
    dialler: socket.socket
    target: socket.socket
    recorded: dict[Direction, bytearray] = field(default_factory=lambda: {"there": bytearray(), "back": bytearray()})

    def close(self) -> None:
        for end in (self.dialler, self.target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already


class Relay:
    """Listens at `address` and carries to `target` (tcp://HOST:PORT). Use it as a context."""

    def __init__(self, target: str, tamper: Tamperer = honest) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self.tamper = tamper
        self.pairs: list[Pair] = []
        self.lateness: Lateness = prompt
        self._open = threading.Event()  # whether new connections are carried
        self._open.set()
        self._flowing = {way: threading.Event() for way in BOTH}  # if not, it is as if the cable were pulled
        self.flow()
        self._over = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self.lateness = prompt
        self.flow()
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()
        for pair in self.pairs:
            pair.dialler.close()
            pair.target.close()

    def cut(self) -> int:
        """Close all connections, and say how many there were so far."""
        with self._lock:
            for pair in self.pairs:
                pair.close()
            return len(self.pairs)

    def refuse(self) -> None:
        """Hang up on whoever dials from now on."""
        self._open.clear()

    def accept(self) -> None:
        self._open.set()

    def hang(self, *ways: Direction) -> None:
        """Hold everything back from now on, in both directions if none is named; nobody is told."""
        for way in ways or BOTH:
            self._flowing[way].clear()

    def flow(self) -> None:
        for way in BOTH:
            self._flowing[way].set()

    def recorded(self) -> bytes:
        """All that came in, in both directions, connection after connection."""
        with self._lock:
            return b"".join(bytes(pair.recorded[way]) for pair in self.pairs for way in ("there", "back"))

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over:
            try:
                dialler, _ = self._listener.accept()
            except OSError:
                return
            if not self._open.is_set() or self._over:
                dialler.close()
                continue
            try:
                target = socket.create_connection(self._target, timeout=10)
            except OSError:
                dialler.close()
                continue
            target.settimeout(None)
            for end in (dialler, target):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                pair = Pair(len(self.pairs), dialler, target)
                self.pairs.append(pair)
            self._start(self._carry, pair, "there", dialler, target)
            self._start(self._carry, pair, "back", target, dialler)

    def _carry(self, pair: Pair, way: Direction, source: socket.socket, sink: socket.socket) -> None:
        """Read one direction of a connection to its end."""
        under_way: Queue[tuple[float, bytes]] = Queue(HELD)  # when it is due, and what; no bytes: the end
        self._start(self._deliver, pair, way, under_way, sink)
        due = 0.0
        try:
            while data := source.recv(PIECE):
                due = max(due, time.monotonic() + self.lateness())
                under_way.put((due, data))
        except OSError:
            pass  # one of the ends hung up, or we do
        finally:
            under_way.put((due, b""))

    def _deliver(self, pair: Pair, way: Direction, under_way: Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        due, data = under_way.get()
        try:
            while data:
                time.sleep(max(0.0, due - time.monotonic()))
                self._flowing[way].wait()
                piece = Piece(pair.number, way, len(pair.recorded[way]), data)
                with self._lock:
                    pair.recorded[way] += data
                    out = self.tamper(piece)
                sink.sendall(out)
                due, data = under_way.get()
        except (OSError, Cut):
            pass  # one of the ends hung up, or we do
        finally:
            pair.close()
            while data:  # so that whoever reads does not wait for room
                _, data = under_way.get()


# -- Tamperers -------------------------------------------------------------------------------------------------------


def flip(connection: int, direction: Direction, offset: int) -> Tamperer:
    """One bit of this byte of this stream."""

    def tamper(piece: Piece) -> bytes:
        if (piece.connection, piece.direction) != (connection, direction) or not piece.offset <= offset < piece.end:
            return piece.data
        data = bytearray(piece.data)
        data[offset - piece.offset] ^= 1
        return bytes(data)

    return tamper


def truncate(connection: int, direction: Direction, offset: int) -> Tamperer:
    """The stream ends before this byte."""

    def tamper(piece: Piece) -> bytes:
        if (piece.connection, piece.direction) == (connection, direction) and piece.end > offset:
            raise Cut
        return piece.data

    return tamper


def replay(connection: int, direction: Direction, offset: int) -> Tamperer:
    """At this byte, all that the stream has carried so far comes once more."""
    before = bytearray()
    done = False

    def tamper(piece: Piece) -> bytes:
        nonlocal done
        if done or (piece.connection, piece.direction) != (connection, direction):
            return piece.data
        before.extend(piece.data)
        if len(before) <= offset:
            return piece.data
        done = True
        return piece.data + bytes(before)

    return tamper


def swap(connection: int, direction: Direction, offset: int, size: int) -> Tamperer:
    """From this byte on, two runs of `size` bytes change places; what has not come whole is held back till then."""
    held = bytearray()

    def tamper(piece: Piece) -> bytes:
        if (piece.connection, piece.direction) != (connection, direction) or piece.end <= offset or held is None:
            return piece.data
        begin = max(0, offset - piece.offset)
        before, rest = piece.data[:begin], piece.data[begin:]
        if len(held) >= 2 * size:
            return piece.data
        held.extend(rest)
        if len(held) < 2 * size:
            return before
        first, second, after = held[:size], held[size : 2 * size], held[2 * size :]
        return before + bytes(second + first + after)

    return tamper
