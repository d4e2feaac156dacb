"""A large update over links that break: it goes on where it stopped, whole or not at all, and costs no more room."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from links import (
    Attacker,
    Party,
    chunks_of,
    connect,
    greeting_of,
    identities,
    open_party,
    parties,
    roster_of,
    settle,
    until,
)
from relay import Cut, Direction, Piece, Relay

from p2pfl import link as link_module
from p2pfl.envelope import Sealed
from p2pfl.link import WINDOW
from p2pfl.messages import (
    Chunk,
    Compute,
    Grant,
    LinkDown,
    LinkUp,
    Offer,
    Refused,
    Resume,
    Tick,
    Update,
    WireMessage,
)
from p2pfl.node import Node, Settings
from p2pfl.wire import CHUNK

IDS = identities("alice", "bob", "carol")
TWO = {name: IDS[name] for name in ("alice", "bob")}
CHUNKS = 40
SIZE = (CHUNKS - 1) * CHUNK + 400  # with an odd end
VECTOR = secrets.token_bytes(SIZE)


class Breaks:
    """A tamperer: a connection ends after the first of `offsets` bytes in one direction, a later one after the next."""

    def __init__(self, direction: Direction, *offsets: int) -> None:
        self.direction, self.offsets = direction, list(offsets)

    def __call__(self, piece: Piece) -> bytes:
        if self.offsets and piece.direction == self.direction and piece.end > self.offsets[0]:
            del self.offsets[0]
            raise Cut
        return piece.data


def carried(relay: Relay, direction: Direction) -> int:
    return sum(len(pair.recorded[direction]) for pair in relay.pairs)


def send_until(sender: Party, receiver: Party, update: Update, happened: Callable[[], object]) -> None:
    """As a node does it: whenever the link is up, what the other one lacks is sent."""
    ups = 0

    def done() -> bool:
        nonlocal ups
        if sender.is_up(receiver.name) and len(sender.all(LinkUp)) > ups:
            ups = len(sender.all(LinkUp))
            if sender.all(LinkUp)[-1].seen < update.round:
                sender.link.send([receiver.name], update)
        return bool(happened())

    until(done, sender, receiver)


# -- It goes on where it stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialler", ["sender", "receiver"])
@pytest.mark.parametrize("times", [1, 3])
def test_what_broke_off_at_99_percent_goes_on_there(times: int, dialler: str) -> None:
    with parties(TWO, size=SIZE) as p:
        alice, bob = p["alice"], p["bob"]
        first, second = (alice, bob) if dialler == "sender" else (bob, alice)
        way: Direction = "there" if dialler == "sender" else "back"
        # First where 99 % have come, then each time in the middle of the first chunk with which it goes on.
        offsets = [(CHUNKS - 1) * CHUNK, *[WINDOW * CHUNK + CHUNK // 2] * (times - 1)]
        with Relay(second.link.address, Breaks(way, *offsets)) as relay:
            first.link.dial(relay.address, (second.name,))
            send_until(alice, bob, alice.seal(VECTOR, 0), bob.updates)
            assert bob.updates() == [(0, VECTOR)]
            until(lambda: alice.link.idle, alice, bob)
            again = carried(relay, way) - SIZE
        assert len(bob.all(LinkDown)) >= times
        # Each break costs what was under way, and the few chunks that an offer brings along.
        assert 0 < again < len(bob.all(LinkDown)) * (2 * WINDOW + 1) * CHUNK
        assert alice.codes() == bob.codes() == []


def test_what_had_hardly_begun_begins_again() -> None:
    with parties(TWO, size=SIZE) as p, Relay(p["bob"].link.address, Breaks("there", 3 * CHUNK)) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(relay.address, ("bob",))
        send_until(alice, bob, alice.seal(VECTOR, 0), bob.updates)
        assert bob.updates() == [(0, VECTOR)] and alice.codes() == bob.codes() == []


def test_a_newer_update_takes_the_place_of_a_part_of_an_older_one() -> None:
    with parties(TWO, size=SIZE) as p, Relay(p["bob"].link.address, Breaks("there", 30 * CHUNK)) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(relay.address, ("bob",))
        send_until(alice, bob, alice.seal(VECTOR, 0), lambda: bob.all(LinkDown))
        newer = bytes(reversed(VECTOR))
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        alice.link.send(["bob"], alice.seal(newer, 1))
        until(bob.updates, alice, bob)
        assert bob.updates() == [(1, newer)] and set(bob.codes()) <= {"gate_refused"}  # a link that broke half made
        assert rooms(bob) <= 2


def test_a_part_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PARTIAL", 0.3)
    with parties(TWO, size=SIZE) as p, Relay(p["bob"].link.address, Breaks("there", 30 * CHUNK)) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(relay.address, ("bob",))
        update = alice.seal(VECTOR, 0)
        relay_until_broken(relay, alice, bob, update)
        until(lambda: bob.link._buffers._free, bob, what="the room is free again")
        relay.accept()
        before = carried(relay, "there")
        send_until(alice, bob, update, bob.updates)
        assert carried(relay, "there") - before > SIZE, "it began again"
        assert bob.updates() == [(0, VECTOR)]
        bob.events.clear()  # the node has folded it
        assert rooms(bob) == 1


def relay_until_broken(relay: Relay, sender: Party, receiver: Party, update: Update) -> None:
    """Let the transfer break off, and nobody come back for the time being."""
    tamper = relay.tamper

    def once(piece: Piece) -> bytes:
        try:
            return tamper(piece)
        except Cut:
            relay.refuse()
            raise

    relay.tamper = once
    send_until(sender, receiver, update, lambda: receiver.all(LinkDown))


def rooms(party: Party) -> int:
    """How many buffers for updates there were ever needed at once, that are free now or held by the link."""
    held = [peer.incoming or peer.partial for peer in party.link._peers.values()]
    return len(party.link._buffers._free) + sum(opening is not None for opening in held)


def test_a_part_from_before_its_sender_started_again_is_dropped() -> None:
    with parties(TWO, size=SIZE) as p, Relay(p["bob"].link.address, Breaks("there", 30 * CHUNK)) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(relay.address, ("bob",))
        relay_until_broken(relay, alice, bob, alice.seal(VECTOR, 0))
        later = open_party(IDS["alice"], roster_of(TWO.values()), greeting_of(SIZE), epoch=2)
        try:
            connect(later, bob)
            assert bob.link._buffers._free, "its room is free"
            later.link.send(["bob"], later.seal(VECTOR, 0))
            until(bob.updates, later, bob)
            assert bob.updates() == [(0, VECTOR)] and bob.codes() == []
        finally:
            later.link.close(0)


def test_nothing_is_kept_of_whom_is_shut_out() -> None:
    with parties(TWO, size=SIZE) as p, Relay(p["bob"].link.address, Breaks("there", 30 * CHUNK)) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(relay.address, ("bob",))
        relay_until_broken(relay, alice, bob, alice.seal(VECTOR, 0))
        assert not bob.link._buffers._free
        bob.link.disconnect("alice", 60)
        assert len(bob.link._buffers._free) == rooms(bob) == 1


# -- Who abuses it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_off() -> Iterator[tuple[Party, Attacker, Sealed]]:
    """Bob has sent the first ten chunks of an update, hung up, and offers it again."""
    with parties(TWO, size=SIZE, only=("alice",)) as p:
        alice = p["alice"]
        with Attacker(IDS["bob"], IDS["alice"], alice.link.address) as bob:
            bob.join()
            until(lambda: alice.is_up("bob"), alice)
            sealed = bob.sealer(SIZE).seal(memoryview(VECTOR), 0, 1.0, 1.0)
            bob.say("bulk", sealed.offer)
            speak(bob, alice, chunks_of(sealed), range(10))
            for channel in ("control", "bulk"):
                bob.close(channel)
            until(lambda: not alice.is_up("bob"), alice)
            bob.join()
            until(lambda: alice.is_up("bob"), alice)
            bob.say("bulk", sealed.offer)
            yield alice, bob, sealed


def speak(bob: Attacker, alice: Party, chunks: list[bytes], which: range) -> None:
    """Each of these chunks once the one before was opened."""
    for index in which:
        bob.say("bulk", Chunk(0, index, chunks[index]))
        until(lambda i=index: (opening := alice.link._peers["bob"].incoming) and opening.next == i + 1, alice)


def answers(bob: Attacker, alice: Party) -> list[WireMessage]:
    """What alice says to it about the transfer."""
    heard: list[WireMessage] = []

    def answered() -> bool:
        heard.extend(m for m in bob.hear("control") if isinstance(m, (Grant, Resume, Refused)))
        return bool(heard)

    until(answered, alice)
    return heard


def test_it_is_told_where_to_go_on_once_nothing_is_under_way(broken_off: tuple[Party, Attacker, Sealed]) -> None:
    alice, bob, sealed = broken_off
    chunks = chunks_of(sealed)
    for index in range(WINDOW):
        settle(alice)
        assert not [m for m in bob.hear("control") if isinstance(m, (Grant, Resume))]
        bob.say("bulk", Chunk(0, index, chunks[index]))
    assert answers(bob, alice) == [Resume(0, 10)]
    bob.say("bulk", Chunk(0, 10, chunks[10]), Chunk(0, 11, chunks[11]))
    assert answers(bob, alice) == [Grant(0, 16)]
    bob.say("bulk", *(Chunk(0, index, chunks[index]) for index in range(12, CHUNKS - 24)))
    settle(alice)
    assert alice.codes() == []


@pytest.mark.parametrize("bad", ["twice", "ahead", "flipped", "cut short", "beyond"])
def test_a_transfer_that_goes_on_wrongly_is_dropped_as_a_whole(
    bad: str, broken_off: tuple[Party, Attacker, Sealed]
) -> None:
    alice, bob, sealed = broken_off
    chunks = chunks_of(sealed)
    free = [Chunk(0, index, chunks[index]) for index in range(WINDOW)]
    match bad:
        case "twice":
            bob.say("bulk", free[0], free[0])
        case "ahead":
            bob.say("bulk", free[1])
        case "flipped":
            bob.say("bulk", *free, Chunk(0, 10, bytes([chunks[10][0] ^ 1]) + chunks[10][1:]))
        case "cut short":
            bob.say("bulk", *free, Chunk(0, 10, chunks[10][:-1]))
        case "beyond":
            bob.say("bulk", *free, Chunk(0, 11, chunks[11]))
    until(lambda: alice.codes(), alice)
    assert alice.codes() == ["bad_chunk"]
    heard: list[WireMessage] = []
    until(lambda: heard.extend(bob.hear("control")) or Refused(0, "bad_chunk") in heard, alice)
    peer = alice.link._peers["bob"]
    assert peer.incoming is None and peer.partial is None and not alice.updates()
    bob.say("bulk", sealed.offer)  # it may begin again, and then from the start
    speak(bob, alice, chunks, range(11))
    assert rooms(alice) == 1


def test_what_came_before_the_break_is_under_the_digest_too() -> None:
    """A member seals other chunks than it has signed: each opens, and the whole is refused, in two pieces or in one."""
    with parties(TWO, size=SIZE, only=("alice",)) as p:
        alice = p["alice"]
        with Attacker(IDS["bob"], IDS["alice"], alice.link.address) as bob:
            bob.join()
            until(lambda: alice.is_up("bob"), alice)
            sealed = bob.sealer(SIZE).seal(memoryview(VECTOR), 0, 1.0, 1.0)
            other = AESGCM(sealed.offer.key).encrypt(bytes(12), bytes(CHUNK), None)
            chunks = [other, *chunks_of(sealed)[1:]]
            bob.say("bulk", sealed.offer)
            speak(bob, alice, chunks, range(10))
            for channel in ("control", "bulk"):
                bob.close(channel)
            until(lambda: not alice.is_up("bob"), alice)
            bob.join()
            until(lambda: alice.is_up("bob"), alice)
            bob.say("bulk", sealed.offer, *(Chunk(0, index, chunks[index]) for index in range(WINDOW)))
            assert answers(bob, alice) == [Resume(0, 10)]
            speak(bob, alice, chunks, range(10, CHUNKS - 1))
            bob.say("bulk", Chunk(0, CHUNKS - 1, chunks[-1]))
            until(lambda: alice.codes(), alice)
            assert alice.codes() == ["bad_digest"] and not alice.updates()


def test_who_claims_to_have_what_it_has_not_harms_only_itself() -> None:
    with parties(TWO, size=SIZE, only=("alice",)) as p:
        alice = p["alice"]
        with Attacker(IDS["bob"], IDS["alice"], alice.link.address) as bob:
            bob.join()
            until(lambda: alice.is_up("bob"), alice)
            alice.link.send(["bob"], alice.seal(VECTOR, 0))
            heard: list[WireMessage] = []

            def came(index: int) -> bool:
                heard.extend(m for m in bob.hear("bulk") if isinstance(m, (Offer, Chunk)))
                return any(isinstance(m, Chunk) and m.index == index for m in heard)

            until(lambda: came(WINDOW - 1), alice)
            bob.say("control", Resume(7, 20), Resume(0, 30), Resume(0, 20))  # another round, on, and back again
            until(lambda: came(30 + WINDOW - 1), alice)
            bob.say("control", Resume(0, 2**31))
            settle(alice)
            heard.extend(bob.hear("bulk"))
            assert [m.index for m in heard if isinstance(m, Chunk)] == [*range(WINDOW), *range(30, 30 + WINDOW)]
            assert not alice.link.idle and alice.codes() == []
            bob.say("control", Grant(0, CHUNKS + 1))
            until(lambda: alice.link.idle, alice)


# -- Donors of state -------------------------------------------------------------------------------------------------


def test_36_a_donor_that_dies_at_99_percent_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bob has no state. Alice's breaks off and she does not come back; carol's is taken, and alice's part dropped."""
    monkeypatch.setattr(link_module, "PARTIAL", 2.0)
    settings = Settings("bob", 100, ("alice", "carol"), needs_state=True, grace=0.5)
    node = Node(settings, 0.0)
    with parties(IDS, size=SIZE, check=node.check_offer) as p:
        alice, bob, carol = p.values()
        with Relay(bob.link.address, Breaks("there", (CHUNKS - 1) * CHUNK)) as relay:
            alice.link.dial(relay.address, ("bob",))
            carol.link.dial(bob.link.address, ("bob",))
            until(lambda: bob.is_up("alice") and bob.is_up("carol"), alice, bob, carol)
            seen = follow(node, bob)
            assert seen() == []
            relay_until_broken(relay, alice, bob, alice.seal(VECTOR, 57))
            assert seen() == []
            carol.link.send(["bob"], carol.seal(VECTOR, 57))
            until(lambda: seen(), bob, carol)
            (job,) = seen()
            assert (job.round, [(c.peer, c.weight) for c in job.contributions]) == (57, [("carol", 1.0)])
            assert bytes(job.contributions[0].vector.view) == VECTOR
            until(lambda: bob.link._peers["alice"].partial is None, bob, carol)


def follow(node: Node, party: Party) -> Callable[[], list[Compute]]:
    """Let the node take in what its link tells; all that it wants to compute."""
    jobs: list[Compute] = []
    taken = 0

    def look() -> list[Compute]:
        nonlocal taken
        now = time.monotonic() - began
        for event in party.events[taken:]:
            jobs.extend(e for e in node.handle(event, now) if isinstance(e, Compute))
        taken = len(party.events)
        jobs.extend(e for e in node.handle(Tick(), now) if isinstance(e, Compute))
        return jobs

    began = time.monotonic()
    return look
