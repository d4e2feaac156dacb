"""Links over real sockets: what is carried, what is not, and what happens when a connection breaks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from links import (
    LOOPBACK,
    SLICE,
    WITHIN,
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
from relay import Direction, Piece, Relay, Tamperer, flip, truncate

from p2pfl import link as link_module
from p2pfl.identity import Identity
from p2pfl.link import WINDOW
from p2pfl.messages import (
    BadInput,
    BadMessage,
    Chunk,
    Goodbye,
    Grant,
    Heartbeat,
    LinkDown,
    LinkUp,
    Offer,
    Received,
    Refused,
    Rejected,
)
from p2pfl.wire import CHUNK

IDS = identities("alice", "bob", "carol")
TWO = {name: IDS[name] for name in ("alice", "bob")}
MEGABYTES = 12 * CHUNK + 400  # more than a window, and an odd end


def heard(party: Party) -> list[object]:
    return [event.message for event in party.all(Received)]


# -- What is carried -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", [LOOPBACK, "tcp://[::1]:0", "ipc"])
def test_updates_go_both_ways(listen: str, tmp_path: Path) -> None:
    where = {name: f"ipc://{tmp_path}/{name}" if listen == "ipc" else listen for name in TWO}
    with parties(TWO, size=MEGABYTES, listen=where, epochs={"alice": 3, "bob": 8}) as p:
        alice, bob = p["alice"], p["bob"]
        connect(alice, bob)
        assert alice.events == [LinkUp("bob", 8, 0, 1.0, -1)]
        assert bob.events == [LinkUp("alice", 3, 0, 1.0, -1)]
        vectors = {name: secrets.token_bytes(MEGABYTES) for name in p}
        alice.link.send(["bob"], alice.seal(vectors["alice"], 0))
        bob.link.send(["alice"], bob.seal(vectors["bob"], 0))
        assert not alice.link.idle
        until(lambda: alice.updates() and bob.updates(), alice, bob, what="an update each way")
        assert alice.updates() == [(0, vectors["bob"])]
        assert bob.updates() == [(0, vectors["alice"])]
        until(lambda: alice.link.idle and bob.link.idle, alice, bob, what="the news that all has come")
        assert alice.codes() == bob.codes() == []


def test_who_listens_nowhere_takes_part_over_the_connection_that_it_dialled() -> None:
    with parties(TWO, size=MEGABYTES, listen={"alice": None, "bob": LOOPBACK}) as p:
        alice, bob = p["alice"], p["bob"]
        assert alice.link.address == ""
        connect(alice, bob)
        vector = secrets.token_bytes(MEGABYTES)
        alice.link.send(["bob"], alice.seal(vector, 0))
        bob.link.send(["alice"], bob.seal(vector, 0))
        bob.link.send(["alice"], Heartbeat(5))
        until(lambda: alice.updates() and bob.updates(), alice, bob)
        assert alice.updates() == bob.updates() == [(0, vector)]
        assert Heartbeat(5) in heard(alice)


def test_both_may_dial_each_other_and_are_linked_once() -> None:
    with parties(TWO, size=MEGABYTES) as p:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(bob.link.address, ("bob",))
        bob.link.dial(alice.link.address, ("alice",))
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        for round in range(3):
            for me, other in ((alice, "bob"), (bob, "alice")):
                me.link.send([other], me.seal(secrets.token_bytes(MEGABYTES), round))
            until(lambda r=round: len(alice.updates()) == len(bob.updates()) == r + 1, alice, bob)
        settle(alice, bob)
        assert len(alice.all(LinkUp)) == len(bob.all(LinkUp)) == 1
        assert alice.codes() == bob.codes() == []


def test_a_message_goes_to_those_who_are_named_and_up() -> None:
    with parties(IDS) as p:
        alice, bob, carol = p["alice"], p["bob"], p["carol"]
        connect(alice, bob)
        connect(carol, alice)
        alice.link.send(["bob", "carol", "nobody"], Heartbeat(1))
        alice.link.send(["carol"], Goodbye(2, "finished"))
        until(lambda: heard(bob) and len(heard(carol)) == 2, alice, bob, carol)
        assert (heard(bob), heard(carol)) == ([Heartbeat(1)], [Heartbeat(1), Goodbye(2, "finished")])
        bob.link.send(["carol"], Heartbeat(3))  # who are not linked
        settle(alice, bob, carol)
        assert len(heard(carol)) == 2


def test_bulk_does_not_delay_control() -> None:
    size = 64 * CHUNK
    with parties(TWO, size=size) as p:
        alice, bob = p["alice"], p["bob"]
        connect(alice, bob)
        alice.link.send(["bob"], alice.seal(bytes(size), 0))
        until(lambda: alice.link.bytes_sent > 16 * CHUNK, alice, bob)
        for round in range(1, 6):
            alice.link.send(["bob"], Heartbeat(round))
            until(lambda r=round: Heartbeat(r) in heard(bob), alice, bob)
        assert not bob.updates(), "the heartbeats have not overtaken 64 MiB"
        until(bob.updates, alice, bob)


def test_no_more_than_a_window_is_under_way_to_who_does_not_open_it() -> None:
    with parties(TWO, size=4 * WINDOW * CHUNK, only=("alice",)) as p, slow(p["alice"]) as bob:
        alice = p["alice"]
        alice.link.send(["bob"], alice.seal(bytes(4 * WINDOW * CHUNK), 0))
        got = collect(bob, alice, lambda m: isinstance(m, Chunk) and m.index == WINDOW - 1)
        settle(alice)
        got += bob.hear("bulk")
        assert [m.index for m in got if isinstance(m, Chunk)] == list(range(WINDOW))
        bob.say("control", Grant(0, 2**31))  # more than can be: it has opened none
        got = collect(bob, alice, lambda m: isinstance(m, Chunk) and m.index == 2 * WINDOW - 1)
        settle(alice)
        assert [m.index for m in got + bob.hear("bulk")] == list(range(WINDOW, 2 * WINDOW))


def test_the_two_newest_updates_wait_while_an_older_one_is_under_way() -> None:
    """A peer that keeps in step needs both: the word that an update came can be late, when the next but one is due."""
    with parties(TWO, size=64, only=("alice",)) as p, slow(p["alice"]) as bob:
        alice = p["alice"]
        for round in range(5):
            alice.link.send(["bob"], alice.seal(bytes(64), round))
        first = collect(bob, alice, lambda m: isinstance(m, Chunk))
        settle(alice)
        assert [type(m) for m in first] == [Offer, Chunk] and not bob.hear("bulk")
        assert not alice.link.idle
        bob.say("control", Grant(0, 2))
        assert collect(bob, alice, lambda m: isinstance(m, Chunk))[-1].round == 3
        bob.say("control", Grant(3, 2))
        assert collect(bob, alice, lambda m: isinstance(m, Chunk))[-1].round == 4
        bob.say("control", Grant(3, 2), Refused(2, "stale"))  # of updates that are not under way: nothing
        settle(alice)
        assert not alice.link.idle
        bob.say("control", Refused(4, "future"))
        until(lambda: alice.link.idle, alice)


def test_after_a_refusal_the_next_update_is_offered() -> None:
    def only_even(_peer: str, round: int) -> None:
        if round % 2:
            raise BadMessage("busy", "odd rounds are not wanted")

    with parties(TWO, size=MEGABYTES, check=only_even) as p:
        alice, bob = p["alice"], p["bob"]
        connect(alice, bob)
        alice.link.send(["bob"], alice.seal(bytes(MEGABYTES), 1))
        alice.link.send(["bob"], alice.seal(bytes(MEGABYTES), 2))
        until(bob.updates, alice, bob)
        assert [round for round, _ in bob.updates()] == [2]
        assert bob.codes() == ["busy"]


class slow(Attacker):  # noqa: N801  (used as a verb)
    """Bob over raw sockets: he answers nothing by himself."""

    def __init__(self, victim: Party) -> None:
        super().__init__(IDS["bob"], IDS[victim.name], victim.link.address)
        self._victim = victim

    def __enter__(self) -> slow:
        self.join()
        until(lambda: self._victim.is_up("bob"), self._victim)
        return self


def collect(attacker: Attacker, victim: Party, last: object) -> list[object]:
    """What comes on the bulk connection, up to the message for which `last` holds."""
    got: list[object] = []

    def listened() -> bool:
        got.extend(m for m in attacker.hear("bulk") if isinstance(m, (Offer, Chunk)))
        return any(last(message) for message in got)

    until(listened, victim)
    return got


# -- Finding each other ----------------------------------------------------------------------------------------------


def test_at_a_bare_address_each_key_of_the_roster_is_tried() -> None:
    with parties(IDS) as p:
        alice, carol = p["alice"], p["carol"]
        alice.link.dial(carol.link.address)  # bob's key is tried first, in vain
        until(lambda: carol.is_up("alice") and alice.is_up("carol"), alice, carol)
        assert set(carol.codes()) == {"gate_refused"} and alice.codes() == []


def test_the_order_of_start_does_not_matter(tmp_path: Path) -> None:
    where = f"ipc://{tmp_path}/bob"
    with parties(TWO, only=("alice",)) as p:
        alice = p["alice"]
        alice.link.dial(where, ("bob",))
        settle(alice)
        bob = open_party(IDS["bob"], roster_of(TWO.values()), listen=where)
        try:
            until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        finally:
            bob.link.close(0)


def test_two_addresses_of_one_member_do_not_displace_each_other() -> None:
    with parties(TWO) as p, Relay(p["bob"].link.address) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(bob.link.address, ("bob",))
        alice.link.dial(relay.address)
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        settle(alice, bob)
        ups = len(alice.all(LinkUp)), len(bob.all(LinkUp))
        until_passed(3 * link_module.RETRY, alice, bob)
        assert ups == (len(alice.all(LinkUp)), len(bob.all(LinkUp)))
        assert alice.is_up("bob") and bob.is_up("alice")


def until_passed(seconds: float, *links: Party) -> None:
    """Listen for that long: for what must not happen."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end, *links)


def test_an_unknown_name_or_address_is_said_at_once() -> None:
    with parties(TWO, only=("alice",)) as p:
        with pytest.raises(BadInput, match="mallory is not in the roster"):
            p["alice"].link.dial(LOOPBACK, ("mallory",))
        with pytest.raises(BadInput, match="cannot dial nonsense"):
            p["alice"].link.dial("nonsense", ("bob",))


def test_a_port_in_use_is_said_at_once() -> None:
    with parties(TWO, only=("alice",)) as p, pytest.raises(BadInput, match=r"cannot listen at .*in use"):
        open_party(IDS["bob"], roster_of(TWO.values()), listen=p["alice"].link.address)


# -- Connections that break ------------------------------------------------------------------------------------------


@pytest.fixture
def relayed() -> Iterator[tuple[Party, Party, Relay]]:
    """Alice has dialled bob through a relay."""
    with parties(TWO, size=MEGABYTES) as p, Relay(p["bob"].link.address) as relay:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(relay.address, ("bob",))
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        yield alice, bob, relay


def ups_and_downs(party: Party) -> list[type]:
    return [type(e) for e in party.events if isinstance(e, (LinkUp, LinkDown))]


def test_a_cut_connection_is_made_again(relayed: tuple[Party, Party, Relay]) -> None:
    alice, bob, relay = relayed
    for _ in range(3):
        ups = len(alice.all(LinkUp)), len(bob.all(LinkUp))
        relay.cut()
        until(
            lambda u=ups: len(alice.all(LinkUp)) > u[0] and len(bob.all(LinkUp)) > u[1] and alice.is_up("bob"),
            alice,
            bob,
        )
        settle(alice, bob)
        assert alice.is_up("bob") and bob.is_up("alice")
    alice.link.send(["bob"], alice.seal(bytes(MEGABYTES), 0))
    until(bob.updates, alice, bob)
    assert alice.codes() == bob.codes() == []


def test_what_was_under_way_comes_again_and_what_had_come_does_not(relayed: tuple[Party, Party, Relay]) -> None:
    alice, bob, relay = relayed
    vector = secrets.token_bytes(MEGABYTES)
    update = alice.seal(vector, 0)
    sent = len(relay.recorded())
    alice.link.send(["bob"], update)
    until(lambda: len(relay.recorded()) > sent + 2 * CHUNK, alice)
    relay.cut()
    until(lambda: len(alice.all(LinkUp)) == 2 and alice.is_up("bob"), alice, bob)
    assert not bob.updates() and alice.all(LinkUp)[1].seen == -1
    alice.link.send(["bob"], update)  # as the node does when it sees that
    until(bob.updates, alice, bob)
    until(lambda: alice.link.idle, alice, bob)
    relay.cut()
    until(lambda: len(alice.all(LinkUp)) >= 3 and alice.all(LinkUp)[-1].seen == 0, alice, bob)
    assert bob.updates() == [(0, vector)]


def test_the_listening_side_notices_a_new_connection_before_the_end_of_the_old_one() -> None:
    """It is told of no end: the cable was pulled. What was under way on the old connection must not be forgotten."""
    with parties(TWO, size=MEGABYTES) as p, Relay(p["bob"].link.address) as old, Relay(p["bob"].link.address) as new:
        bob = p["bob"]
        alice = p["alice"]
        alice.link.dial(old.address, ("bob",))
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        old.hang()
        bob.link.send(["alice"], bob.seal(bytes(MEGABYTES), 0))
        settle(bob)
        again = open_party(IDS["alice"], roster_of(TWO.values()), greeting_of(MEGABYTES))
        try:
            again.link.dial(new.address, ("bob",))
            until(lambda: again.is_up("bob") and bob.is_up("alice") and len(bob.all(LinkUp)) >= 2, again, bob)
            settle(again, bob)
            assert again.is_up("bob") and bob.is_up("alice")
            assert ups_and_downs(bob)[:3] == [LinkUp, LinkDown, LinkUp]
            bob.link.send(["alice"], bob.seal(bytes(MEGABYTES), 1))
            until(again.updates, again, bob)
        finally:
            again.link.close(0)


def test_a_silent_cable_is_noticed_by_both(relayed: tuple[Party, Party, Relay]) -> None:
    alice, bob, relay = relayed
    relay.hang()
    until(lambda: not alice.is_up("bob") and not bob.is_up("alice"), alice, bob)
    relay.flow()
    until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)


@pytest.mark.parametrize("direction", ["there", "back"])
@pytest.mark.parametrize("offset", [70, 300, 900, 2 * CHUNK], ids=["greeting", "handshake", "hello", "chunk"])
@pytest.mark.parametrize("fault", [flip, truncate])
def test_a_flipped_or_missing_byte_costs_a_connection_and_nothing_else(
    offset: int, direction: Direction, fault: Callable[[int, Direction, int], Tamperer]
) -> None:
    with parties(TWO, size=MEGABYTES) as p, Relay(p["bob"].link.address) as relay:
        alice, bob = p["alice"], p["bob"]
        faults = [fault(number, direction, offset) for number in (0, 1)]  # the control and the bulk connection
        relay.tamper = lambda piece: faults[piece.connection](piece) if piece.connection < 2 else piece.data
        alice.link.dial(relay.address, ("bob",))
        vectors = {name: secrets.token_bytes(MEGABYTES) for name in p}
        sealed = {name: party.seal(vectors[name], 0) for name, party in p.items()}

        def arrived() -> bool:
            for me, other in ((alice, bob), (bob, alice)):
                if me.is_up(other.name) and me.link.idle and not other.updates():
                    me.link.send([other.name], sealed[me.name])
            return bool(alice.updates() and bob.updates())

        begin = time.monotonic()
        until(arrived, alice, bob)
        assert time.monotonic() - begin < link_module.KEEPALIVE_TIMEOUT_MS / 1000, "it stood still until the keepalive"
        assert bob.updates() == [(0, vectors["alice"])] and alice.updates() == [(0, vectors["bob"])]
        assert len(relay.pairs) > 2, "a connection was made again"


@pytest.mark.parametrize("connection", [0, 1])
def test_what_the_listening_side_sends_at_once_is_not_lost(connection: int) -> None:
    """One of the two connections is slower than the other: an update must not come before its peer is known."""
    with parties(TWO, size=64) as p, Relay(p["bob"].link.address) as relay:
        alice, bob = p["alice"], p["bob"]
        held = bytearray()
        relay.tamper = lambda piece: hold(piece, held) if piece.connection == connection else piece.data
        alice.link.dial(relay.address, ("bob",))
        update = bob.seal(b"x" * 64, 0)
        until(lambda: bob.is_up("alice"), alice, bob)
        before = len(relay.recorded())
        bob.link.send(["alice"], Goodbye(1, "finished"))
        until(lambda: len(relay.recorded()) > before, bob)
        for _ in range(10):
            alice.listen(SLICE)
        bob.link.send(["alice"], update)
        until(lambda: alice.updates() and Goodbye(1, "finished") in heard(alice), alice, bob)
        assert alice.codes() == []


def hold(piece: Piece, held: bytearray) -> bytes:
    """Of what comes back after the handshake, each piece is held until the next one comes."""
    if piece.direction == "there" or piece.offset < 300:
        return piece.data
    held.extend(piece.data)
    out = bytes(held[: -len(piece.data)])
    del held[: -len(piece.data)]
    return out


# -- Who is who ------------------------------------------------------------------------------------------------------


def test_a_newer_start_displaces_the_older_one_and_never_the_other_way_round() -> None:
    with parties(TWO, only=("bob",)) as p:
        bob, roster = p["bob"], roster_of(TWO.values())
        first = open_party(IDS["alice"], roster, epoch=1)
        second = open_party(IDS["alice"], roster, epoch=2)
        try:
            connect(first, bob)
            second.link.dial(bob.link.address, ("bob",))
            until(lambda: second.is_up("bob") and bob.all(LinkUp)[-1].epoch == 2, first, second, bob)
            first.link.send(["bob"], Goodbye(7, "leaving"))
            until(lambda: "stale_epoch" in bob.codes(), first, second, bob)  # it dials again, in vain
            until_passed(0.3, first, second, bob)
            assert bob.is_up("alice") and bob.all(LinkUp)[-1].epoch == 2
            assert not heard(bob), "what the older process says is not taken for the newer one's"
            assert not first.is_up("bob")
        finally:
            first.link.close(0)
            second.link.close(0)


def test_a_mismatch_is_said_in_words_on_both_sides_and_nobody_is_linked() -> None:
    greetings = {
        "alice": greeting_of(facts={"train.lr": "0.1", "fc.weight": "10×64 float32"}),
        "bob": greeting_of(experiment=b"E" * 32, facts={"train.lr": "0.1", "fc.weight": "12×64 float32"}),
    }
    with parties(TWO, greetings=greetings) as p:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(bob.link.address, ("bob",))
        until(lambda: alice.codes() and bob.codes(), alice, bob)
        settle(alice, bob)
        assert [(e.code, e.peer, e.why) for e in alice.all(Rejected)] == [
            ("experiment_mismatch", "bob", "fc.weight is 10×64 float32 here, 12×64 float32 there")
        ]
        assert [(e.code, e.peer, e.why) for e in bob.all(Rejected)] == [
            ("experiment_mismatch", "alice", "fc.weight is 12×64 float32 here, 10×64 float32 there")
        ]
        assert not alice.all(LinkUp) and not bob.all(LinkUp)


# -- Shutting out ----------------------------------------------------------------------------------------------------


def test_disconnect_closes_what_was_accepted_and_keeps_it_out_for_its_time() -> None:
    with parties(TWO) as p:
        alice, bob = p["alice"], p["bob"]
        connect(alice, bob)
        bob.link.disconnect("alice", 1.5)
        until(lambda: not alice.is_up("bob"), alice, bob)
        assert bob.all(LinkDown) == [LinkDown("alice", "quarantined")]
        barred = time.monotonic()
        until(lambda: "refused_by_peer" in alice.codes() and "quarantined" in bob.codes(), alice, bob)
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)
        assert time.monotonic() > barred + 1.0
        assert bob.codes().count("quarantined") < 20, "no storm of attempts"


def test_disconnect_closes_what_was_dialled_and_dials_again_after_its_time() -> None:
    with parties(TWO) as p:
        alice, bob = p["alice"], p["bob"]
        connect(alice, bob)
        alice.link.disconnect("bob", 0.5)
        until(lambda: not bob.is_up("alice"), alice, bob)
        assert alice.all(LinkDown) == [LinkDown("bob", "quarantined")]
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)


def test_a_connection_that_was_kept_in_reserve_does_not_pass_a_quarantine() -> None:
    with parties(TWO, only=("alice",)) as p, Attacker(IDS["bob"], IDS["alice"], p["alice"].link.address) as bob:
        alice = p["alice"]
        bob.join()
        until(lambda: alice.is_up("bob"), alice)
        bob.open("reserve control")
        bob.open("reserve bulk")
        until(lambda: bob.is_let_in("reserve control") and bob.is_let_in("reserve bulk"), alice)
        alice.link.disconnect("bob", 60)
        bob.say("reserve control", bob.hello("control"))
        bob.say("reserve bulk", bob.hello("bulk"))
        until(lambda: bob.is_closed("reserve control") and bob.is_closed("reserve bulk"), alice)
        assert bob.is_closed("control") and bob.is_closed("bulk")
        assert not alice.is_up("bob") and len(alice.all(LinkUp)) == 1
        until(lambda: not alice.link._connections, alice)


def test_who_is_revoked_is_hung_up_on_and_who_is_added_is_let_in() -> None:
    with parties(IDS) as p:
        alice, bob, carol = p["alice"], p["bob"], p["carol"]
        alice.link.replace_roster(roster_of(TWO.values()))
        connect(alice, bob)
        carol.link.dial(alice.link.address, ("alice",))
        until(lambda: "gate_refused" in alice.codes() and "refused_by_peer" in carol.codes(), alice, bob, carol)
        alice.link.replace_roster(roster_of([IDS["alice"], IDS["carol"]]))
        until(lambda: alice.is_up("carol") and not bob.is_up("alice"), alice, bob, carol)
        assert LinkDown("bob", "revoked") in alice.events and not alice.is_up("bob")
        until_passed(0.3, alice, bob, carol)
        assert not alice.is_up("bob") and not bob.is_up("alice"), "it is not dialled again"


def test_a_silent_connection_of_a_key_that_was_revoked_is_closed_when_it_speaks() -> None:
    with parties(TWO, only=("alice",)) as p, Attacker(IDS["bob"], IDS["alice"], p["alice"].link.address) as old:
        alice = p["alice"]
        old.open("control")
        until(lambda: old.is_let_in("control"), alice)
        renewed = Identity("bob", IDS["bob"].signing, Identity.generate("bob").link)  # the link key was stolen
        alice.link.replace_roster(roster_of([IDS["alice"], renewed]))
        old.say("control", old.hello("control"))
        until(lambda: old.is_closed("control"), alice)
        assert alice.codes() == ["revoked"] and not alice.all(LinkUp)


def test_a_member_with_a_new_card_is_dialled_with_its_new_key() -> None:
    renewed = Identity.generate("bob")
    rosters = {"alice": roster_of(TWO.values()), "bob": roster_of([IDS["alice"], renewed])}
    with parties({"alice": IDS["alice"], "bob": renewed}, rosters=rosters) as p:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(bob.link.address, ("bob",))
        until(lambda: "gate_refused" in bob.codes(), alice, bob)
        assert not alice.is_up("bob")
        alice.link.replace_roster(rosters["bob"])
        until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob)


# -- Memory ----------------------------------------------------------------------------------------------------------


def test_each_table_is_emptied_again() -> None:
    """Connections come and go a hundred times, and leave nothing behind."""
    with parties(TWO, only=("alice",)) as p, Attacker(IDS["bob"], IDS["alice"], p["alice"].link.address) as bob:
        alice = p["alice"]
        for number in range(50):
            for channel in ("control", "bulk"):
                bob.open(channel)
                bob.say(channel, bob.hello(channel))
            until(lambda n=number: len(alice.all(LinkUp)) > n and alice.is_up("bob"), alice)
            for channel in ("control", "bulk"):
                bob.close(channel)
            until(lambda: not alice.is_up("bob"), alice)
        until(lambda: not alice.link._connections, alice)
        assert not alice.link._spoken and not alice.link._notices and not alice.link._turned_away
        assert len(alice.link._peers) == 1


def test_failed_attempts_to_dial_leave_no_sockets_behind() -> None:
    """Bob lets nobody in; alice tries again and again with two keys."""
    rosters = {"bob": roster_of([IDS["bob"]]), "alice": roster_of(IDS.values())}
    with parties(TWO, rosters=rosters) as p:
        alice, bob = p["alice"], p["bob"]
        alice.link.dial(bob.link.address)
        until(lambda: bob.codes().count("gate_refused") >= 8, alice, bob)
        assert len(alice.link._monitors) <= 3 and len(alice.link._dealers) <= 2
        assert len(alice.link._connections) <= 2
        assert alice.codes() == ["refused_by_peer"]


def test_updates_use_the_same_buffers_again() -> None:
    size = 2 * CHUNK
    with parties(TWO, size=size) as p:
        alice, bob = p["alice"], p["bob"]
        connect(alice, bob)
        for round in range(6):
            alice.link.send(["bob"], alice.seal(bytes(size), round))
            until(bob.updates, alice, bob)
            bob.events.clear()  # the node has folded it
        assert len(bob.link._buffers._free) <= 2
        assert len(alice.sealer._buffers._free) <= 2


def test_who_offers_without_end_gets_one_buffer() -> None:
    """A node far behind would take any of a thousand rounds; what it has not judged yet must not pile up."""
    size = CHUNK // 8
    judged: list[int] = []

    def newest_only(_peer: str, round: int) -> None:
        judged.append(round)
        if len(alice.updates()) >= 2:
            raise BadMessage("busy", "two wait to be folded")

    with parties(TWO, size=size, only=("alice",), check=newest_only) as p:
        alice = p["alice"]
        with Attacker(IDS["bob"], IDS["alice"], alice.link.address) as bob:
            bob.join()
            until(lambda: alice.is_up("bob"), alice)
            sealer = bob.sealer(size)
            for round in range(20):
                sealed = sealer.seal(memoryview(bytes(size)), round, 1.0, 1.0)
                bob.say("bulk", sealed.offer, *(Chunk(round, i, c) for i, c in enumerate(chunks_of(sealed))))
            until(lambda: len(judged) == 20, alice)
            settle(alice)
            assert len(alice.updates()) == 2 and alice.codes() == ["busy"] * 18


def test_nothing_waits_beyond_the_deadline() -> None:
    """`poll` returns when it was asked to, and `deadline` is never far."""
    with parties(TWO, only=("alice",)) as p:
        link = p["alice"].link
        begin = time.monotonic()
        link.poll(link.deadline - begin)
        assert time.monotonic() - begin < WITHIN / 10
