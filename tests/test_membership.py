"""Who lives: tables of cases, and what rumours among many come to."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.membership import MAX_STRETCH, Membership, Standing, followers, newer, suspicion_timeout
from p2pfl.messages import Hint, MemberRecord

NAMES = ("a", "b", "c", "me")


def fresh(suspicion: float = 10.0) -> Membership:
    return Membership("me", NAMES, epoch=3, address="tcp://me:1", suspicion=suspicion)


def record(name: str, epoch: int = 1, incarnation: int = 0, leaving: bool = False) -> MemberRecord:
    return MemberRecord(name, epoch, incarnation, address=f"tcp://{name}:1", leaving=leaving)


def hint(name: str, epoch: int = 1, incarnation: int = 0) -> Hint:
    return Hint(name, epoch, incarnation)


# -- Policy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "is_newer"),
    [
        ((1, 0), (1, 0), False),
        ((1, 1), (1, 0), True),
        ((1, 9), (2, 0), False),  # a later start of its process outweighs every refutation of an earlier one
        ((2, 0), (1, 9), True),
    ],
)
def test_the_later_start_holds_and_within_it_the_later_refutation(
    one: tuple[int, int], other: tuple[int, int], is_newer: bool
) -> None:
    assert newer(record("a", *one), record("a", *other)) is is_newer


@pytest.mark.parametrize(
    ("members", "stretch", "seconds"),
    [(1, 1, 10), (8, 1, 10), (9, 1, 40 / 3), (64, 1, 20), (64, 4, 80), (1000, 1, 100 / 3)],
)
def test_a_suspicion_lasts_as_long_as_a_rumour_needs(members: int, stretch: float, seconds: float) -> None:
    assert suspicion_timeout(10.0, members, stretch) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("name", "living", "seekers"),
    [
        ("c", "abde", "de"),
        ("d", "abce", "ea"),
        ("e", "abcd", "ab"),
        ("a", "e", "e"),
        ("c", "ab", "ab"),
    ],
)
def test_the_dead_are_sought_by_the_next_two_in_the_circle_of_names(name: str, living: str, seekers: str) -> None:
    assert followers(name, tuple(living)) == tuple(seekers)


@given(st.sets(st.sampled_from("abcdefghij"), min_size=1), st.sets(st.sampled_from("abcdefghij"), min_size=1))
def test_each_side_of_a_cut_seeks_everybody_on_the_other(one: set[str], other: set[str]) -> None:
    sought = {dead for dead in other - one for name in one if name in followers(dead, sorted(one))}
    assert sought == other - one


# -- Stories ---------------------------------------------------------------------------------------------------------


def test_at_the_start_everybody_is_taken_to_live() -> None:
    table = fresh()
    assert table.live == NAMES
    assert table.records() == (MemberRecord("me", 3, 0, "tcp://me:1"),)
    assert table.hints() == () and table.deadline == float("inf")


def test_suspicion_becomes_death_at_its_time_exactly_and_death_ends_with_a_newer_record() -> None:
    table = fresh()
    table.heard([record("a")], [], (), 0.0)
    (change,) = table.suspect("a", "its link broke", 5.0)
    assert (change.before, change.after) == (Standing.ALIVE, Standing.SUSPECT)
    assert table.live == NAMES and table.hints() == (hint("a"),)  # until it is dead it has its place in the graph
    assert table.deadline == 15.0 and table.pass_time(14.999) == []
    (change,) = table.pass_time(15.0)
    assert (change.name, change.after) == ("a", Standing.DEAD)
    assert table.live == ("b", "c", "me")
    assert not table.heard([record("a")], [], (), 20.0).changes  # what was known already raises nobody from the dead
    heard = table.heard([record("a", incarnation=1)], [], (), 21.0)
    assert [c.after for c in heard.changes] == [Standing.ALIVE] and heard.news == (record("a", incarnation=1),)
    assert table.live == NAMES


def test_what_others_say_is_believed_unless_oneself_has_heard_of_it() -> None:
    table = fresh()
    table.heard([record("a"), record("b")], [], (), 0.0)
    heard = table.heard([], [hint("a"), hint("b")], ("b",), 1.0)
    assert heard.believed == (hint("a"),)
    assert heard.doubted == (hint("b"),)  # b shall refute it for those who have no link to it
    assert (table.standing("a"), table.standing("b")) == (Standing.SUSPECT, Standing.ALIVE)
    assert not table.heard([], [hint("a")], (), 2.0).believed  # said once: it is not passed on again
    assert table.deadline == 11.0


def test_a_hint_of_an_earlier_life_says_nothing() -> None:
    table = fresh()
    table.heard([record("a", 2, 1)], [], (), 0.0)
    for old in (hint("a", 1, 9), hint("a", 2, 0)):
        assert not table.heard([], [old], (), 1.0).changes
    assert table.heard([], [hint("a", 2, 1)], (), 1.0).changes


def test_who_is_suspected_refutes_it() -> None:
    table = fresh()
    heard = table.heard([], [hint("me", 3, 0)], (), 1.0)
    assert heard.news == (MemberRecord("me", 3, 1, "tcp://me:1"),) and table.own == heard.news[0]
    assert not table.heard([], [hint("me", 3, 0)], (), 2.0).news  # refuted already
    assert table.stretch == 1.0  # or a liar could make everybody doubt itself


def test_the_present_life_outlives_what_is_said_of_a_former_one() -> None:
    table = fresh()
    assert not table.heard([record("me", 2, 7)], [], (), 0.0).news
    table.heard([record("me", 3, 4)], [], (), 0.0)  # a damaged disk gave us an epoch that had been used
    assert table.own.epoch == 3 and table.own.incarnation == 5


def test_leaving_and_returning() -> None:
    table = fresh()
    table.heard([record("a")], [], (), 0.0)
    assert [c.after for c in table.heard([record("a", 1, 1, leaving=True)], [], (), 1.0).changes] == [Standing.LEFT]
    assert table.live == ("b", "c", "me")
    assert not table.heard([], [hint("a", 1, 1)], (), 2.0).changes
    assert [c.after for c in table.heard([record("a", 2)], [], (), 3.0).changes] == [Standing.ALIVE]
    assert table.leave() == MemberRecord("me", 3, 1, "tcp://me:1", leaving=True)


def test_who_stood_still_waits_longer_before_it_condemns_and_calms_down_again() -> None:
    table = fresh()
    table.suspect("a", "silent", 0.0)
    for _ in range(9):
        table.stalled(60.0, pause=6.0)
    assert table.stretch == MAX_STRETCH
    assert table.deadline == 10.0 + 9 * 6.0  # the pause is not held against the other
    table.suspect("b", "silent", 70.0)
    assert table.pass_time(70.0)[0].name == "a"
    assert table.deadline == 70.0 + 80.0
    for now in (90.0, 120.0, 150.0):
        table.pass_time(now)
    assert table.stretch == 1.0


def test_members_that_nobody_knows_are_no_members() -> None:
    table = fresh()
    invented = [record(f"x{i}") for i in range(1000)]
    heard = table.heard(invented, [hint("x1"), hint("x2")], (), 0.0)
    assert (heard.changes, heard.news, heard.believed) == ((), (), ())
    assert table.live == NAMES


# -- Among many ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 3), st.integers(0, 3), st.booleans()), max_size=30))
def test_whatever_the_order_in_which_records_come_all_end_with_the_same_table(
    told: list[tuple[str, int, int, bool]],
) -> None:
    latest = {(name, epoch, incarnation): leaving for name, epoch, incarnation, leaving in told}  # one record of each
    records = [record(*key, leaving=leaving) for key, leaving in latest.items() if key[0] != "me"]
    tables = []
    for order in (records, records[::-1], sorted(records, key=lambda r: (r.incarnation, r.name))):
        table = fresh()
        for one in order:
            table.heard([one], [], (), 0.0)
        tables.append((table.records(), table.live))
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("seed", range(5))
def test_one_liar_cannot_bury_who_lives_and_everybody_learns_of_a_death(seed: int) -> None:
    """32 members on a ring of rumours; one of them says all the time that everybody is gone. One really is."""
    draw = random.Random(seed)
    names = tuple(f"m{i:02}" for i in range(32))
    tables = {name: Membership(name, names, 1, "", 10.0) for name in names}
    liar, dead = draw.sample(names, 2)
    for name in names:
        for other in names:
            tables[name].heard([tables[other].own], [], (), 0.0)

    def around(name: str) -> list[str]:
        i = names.index(name)
        return [other for other in (names[i - 1], names[(i + 1) % 32]) if other != dead]

    for tick in range(400):  # a tenth of a second each
        now = tick / 10
        posts: list[tuple[str, str, list[MemberRecord], list[Hint]]] = []
        if tick == 10:
            for name in around(dead):
                tables[name].suspect(dead, "its link broke", now)
        for name in names:
            if name == dead:
                continue
            hints = list(tables[name].hints())
            if name == liar:
                hints += [Hint(r.name, r.epoch, r.incarnation) for r in tables[name].records()]
            for other in around(name):
                posts.append((other, name, list(tables[name].records()), hints))
        for receiver, _, records, hints in posts:
            for doubt in tables[receiver].heard(records, hints, around(receiver), now).doubted:
                tables[doubt.name].heard([], [doubt], (), now)
        for name in names:
            tables[name].pass_time(now)
    living = tuple(name for name in names if name != dead)
    assert all(tables[name].live == living for name in living), f"seed {seed}"
