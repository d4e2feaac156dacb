"""Stories about one peer, with exact times: feed events, compare lists of effects. No mocks, no sleeps, no torch.

The last part lets several nodes play against each other in virtual time, over links that keep their order as TCP does.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from p2pfl.config import TopologySection
from p2pfl.messages import (
    MAX_ROUND,
    Accusation,
    BadMessage,
    Compute,
    Computed,
    Connect,
    Contribution,
    Disconnect,
    Done,
    Effect,
    Event,
    Folded,
    Goodbye,
    Gossip,
    Happened,
    Heartbeat,
    Leave,
    LinkDown,
    LinkUp,
    MemberRecord,
    Message,
    Receipt,
    Received,
    Record,
    Rejected,
    RoundEnded,
    Save,
    Scores,
    Send,
    Tick,
    Trained,
    Update,
    Value,
)
from p2pfl.node import MAX_MASS, MAX_PATIENCE, MAX_STEP, Node, Phase, Settings, catch_up_round, patience, view_of
from p2pfl.topology import Topology, build, neighbourhoods, wiring
from p2pfl.topology.matrix import mixing_matrix
from p2pfl.weights import LEAST_MASS, Neighbourhood, Wiring, graph_reach

SCORES = Scores({"loss": 0.5})
TRAINED = Trained(0.5, SCORES, 1.0, 0.25)
FOLDED = Folded(SCORES, 2.0, 0.125, 0.25)
NEVER = 1e9  # seconds: for what a story is not about


# -- Builders --------------------------------------------------------------------------------------------------------


def update(round: int, vector: object = "theirs", mass: float = 1.0, reach: float = 3.0) -> Update:
    return Update(round, mass, reach, vector)


def got(peer: str, round: int, **fields: float) -> Received:
    return Received(peer, update(round, f"{peer}{round}", **fields))


def up(peer: str, epoch: int = 1, round: int = 0, mass: float = 1.0, seen: int = -1) -> LinkUp:
    return LinkUp(peer, epoch, round, mass, seen)


def computed(round: int) -> Computed:
    return Computed(round, FOLDED if round else None, TRAINED, f"mine{round}")


def mine(round: int, reach: float = 3.0) -> Update:
    return Update(round, 1.0, reach, f"mine{round}")


def said(event: str, **fields: Value) -> Record:
    return Record(Happened(event, fields))


def folded(*peers: str, round: int, weight: float = 1 / 3) -> tuple[Contribution, ...]:
    return tuple(Contribution(peer, round, weight, f"{peer}{round}") for peer in peers)


def compute(
    round: int,
    contributions: tuple[Contribution, ...] = (),
    reach: float = 3.0,
    train: bool = True,
    jump: bool | None = None,  # None: only into the first round, before which there was none
    restart: bool = False,
) -> Compute:
    jump = round == 0 if jump is None else jump
    return Compute(round, contributions, 1.0, reach, train, jump=jump, restart=restart)


def fresh(**changes: object) -> Node:
    """A node "me" at time 0 with neighbours a and b. Silent, unless the story is about heartbeats."""
    quiet = Settings(name="me", rounds=100, neighbours=("a", "b"), heartbeat=NEVER, silence=NEVER)
    return Node(replace(quiet, **changes), 0.0)  # type: ignore[arg-type]


def collecting(round: int = 1, **changes: object) -> Node:
    """A node that came to this round at time 0, everybody always in time, and now awaits everybody."""
    node = fresh(**changes)
    names = list(node.neighbours)
    for name in names:
        node.handle(up(name), 0.0)
    if not names:
        node.handle(Tick(), 0.0)
    for r in range(round):
        node.handle(computed(r), 0.0)
        for name in names:
            if node.settings.two_way:
                node.handle(Received(name, Receipt(r)), 0.0)
            node.handle(got(name, r, reach=1.0 + len(names)), 0.0)
    node.handle(computed(round), 0.0)
    assert (node.phase, node.round) == (Phase.COLLECTING, round)
    return node


def ticks(node: Node, until: float) -> list[tuple[float, Effect]]:
    """What time alone brings: a Tick at each deadline. A deadline that is not after its own Tick is a busy loop."""
    story = []
    while node.deadline is not None and node.deadline <= until:
        now = node.deadline
        story += [(now, effect) for effect in node.handle(Tick(), now)]
        assert node.deadline is None or node.deadline > now
    return story


def words(effects: list[Effect]) -> list[str]:
    return [e.entry.event for e in effects if isinstance(e, Record) and isinstance(e.entry, Happened)]


# -- Everybody is well -----------------------------------------------------------------------------------------------


def test_two_rounds_with_everybody_in_time() -> None:
    node = fresh(rounds=2, heartbeat=1.0, silence=6.0)
    third = 1 / 3
    both = ("a", "b")
    assert node.handle(up("a"), 0.0) == [said("joined", peer="a", epoch=1)]
    assert node.handle(up("b"), 0.5) == [said("joined", peer="b", epoch=1), compute(0)]
    assert node.handle(Tick(), 1.0) == [Send(both, Heartbeat(0))]
    assert node.handle(computed(0), 1.5) == [Send(both, mine(0))]
    assert node.handle(got("b", 0), 1.75) == []
    assert node.handle(got("a", 0), 1.875) == [compute(1, folded("a", "b", round=0, weight=third))]
    assert node.handle(Tick(), 2.0) == [Send(both, Heartbeat(1))]
    first = RoundEnded(0, TRAINED, FOLDED, merged=both, missing=(), wait_seconds=0.375)
    assert node.handle(computed(1), 2.5) == [Record(first), Send(both, mine(1))]
    assert node.handle(got("a", 1), 2.5) == []
    assert node.handle(got("b", 1), 2.75) == [compute(2, folded("a", "b", round=1, weight=third), train=False)]
    second = RoundEnded(1, TRAINED, FOLDED, merged=both, missing=(), wait_seconds=0.25)
    assert node.handle(Computed(2, FOLDED, None, None), 2.875) == [
        Record(second),
        Send(both, Goodbye(2, "finished")),
        said("finished", round=2),
        Done(True),
    ]
    assert node.phase is Phase.DONE
    assert node.deadline is None
    assert node.handle(got("a", 1), 99.0) == node.handle(Tick(), 99.0) == node.handle(Leave(), 99.0) == []


def test_the_state_is_saved_every_so_many_rounds_but_not_at_the_start_and_not_after_the_last() -> None:
    node = fresh(rounds=4, neighbours=(), checkpoint_every=2)
    effects = node.handle(Tick(), 0.0)
    for r in range(4):
        effects += node.handle(computed(r), 0.0)
    assert [e for e in effects if isinstance(e, Save)] == [Save(2)]
    assert effects.index(Save(2)) == effects.index(compute(2, reach=1.0)) - 1


def test_a_resumed_node_begins_where_it_stopped() -> None:
    node = fresh(neighbours=("a",), first_round=25)
    assert node.handle(up("a", round=25), 0.0) == [said("joined", peer="a", epoch=1), compute(25, reach=2.0, jump=True)]
    assert node.handle(computed(25), 1.0) == [Send(("a",), mine(25, 2.0))]  # no record: round 24 ended in another life
    done = fresh(neighbours=(), rounds=25, first_round=25)
    assert done.handle(Tick(), 0.0)[-1] == compute(25, reach=1.0, train=False, jump=True)
    assert done.handle(Computed(25, FOLDED, None, None), 1.0) == [said("finished", round=0), Done(True)]


def test_heartbeats_keep_their_cadence_in_every_phase() -> None:
    node = fresh(heartbeat=1.0, silence=NEVER, join_timeout=3.5)
    node.handle(up("a"), 0.25)
    beats = [(float(t), Send(("a",), Heartbeat(0))) for t in range(1, 8)]
    joining = ticks(node, 3.9)
    assert joining == [*beats[:3], (3.5, said("absent", peers=("b",))), (3.5, compute(0, reach=2.0))]
    assert ticks(node, 4.9) == beats[3:4]  # computing
    node.handle(computed(0), 4.9)
    assert ticks(node, 7.0) == beats[4:7]  # collecting


# -- Joining ---------------------------------------------------------------------------------------------------------


def test_it_starts_without_the_absent_at_the_join_timeout_exactly() -> None:
    node = fresh(join_timeout=60.0)
    node.handle(up("b"), 59.0)
    assert node.handle(Tick(), math.nextafter(60.0, 0)) == []
    assert node.handle(Tick(), 60.0) == [said("absent", peers=("a",)), compute(0, reach=2.0)]


def test_strangers_do_not_stand_in_for_those_who_are_named() -> None:
    node = fresh(open=True)
    node.handle(up("a"), 0.0)
    node.handle(up("z"), 0.0)
    assert (node.phase, node.awaited()) == (Phase.JOINING, ("b",))


def test_it_says_every_five_seconds_whom_it_awaits_while_joining() -> None:
    node = fresh(join_timeout=12.0, unnamed=1)
    node.handle(up("b"), 1.0)
    assert ticks(node, 11.0) == [
        (5.0, said("waiting", peers=("a",), round=0, since=5.0, left=7.0)),
        (10.0, said("waiting", peers=("a",), round=0, since=10.0, left=2.0)),
    ]
    node.handle(up("a"), 11.0)
    assert node.phase is Phase.JOINING  # somebody has not yet said who it is
    assert ticks(node, 12.0) == [(12.0, compute(0))]
    nameless = fresh(neighbours=(), unnamed=1, open=True)
    assert ticks(nameless, 5.0) == [
        (5.0, said("waiting", peers=("peers that have not said who they are",), round=0, since=5.0, left=55.0))
    ]
    assert nameless.handle(up("z"), 6.0) == [said("joined", peer="z", epoch=1), compute(0, reach=2.0)]


def test_who_started_later_finds_the_update_that_came_first() -> None:
    node = fresh()
    node.handle(up("a"), 0.0)
    assert node.handle(got("a", 0), 1.0) == []  # a did not wait for b
    node.handle(up("b"), 2.0)
    node.handle(computed(0), 3.0)
    assert node.handle(got("b", 0), 4.0) == [compute(1, folded("a", "b", round=0))]


def test_it_does_not_wait_for_the_absent_where_the_others_are_already_under_way() -> None:
    node = fresh()
    assert node.handle(up("a", round=7), 0.0) == [
        said("joined", peer="a", epoch=1),
        said("absent", peers=("b",)),
        compute(0, reach=2.0),
    ]


def test_alone_it_trains_and_says_so() -> None:
    node = fresh(neighbours=(), rounds=2)
    assert node.handle(Tick(), 0.0) == [compute(0, reach=1.0), said("alone", round=0)]
    assert node.handle(computed(0), 1.0) == [compute(1, reach=1.0)]
    ended = Record(RoundEnded(0, TRAINED, FOLDED, (), (), 0.0))
    assert node.handle(computed(1), 2.0) == [ended, compute(2, reach=1.0, train=False)]
    forsaken = fresh(join_timeout=0.0)
    absent = said("absent", peers=("a", "b"))
    assert forsaken.handle(Tick(), 0.0) == [absent, compute(0, reach=1.0), said("alone", round=0)]


def test_who_loses_everybody_says_so_once_and_trains_on() -> None:
    node = collecting(round=1, grace=1.0)
    node.handle(LinkDown("a"), 0.0)
    assert words(node.handle(LinkDown("b"), 0.5)) == ["suspected"]
    assert words(node.handle(Tick(), 1.0)) == ["died"]
    left = node.handle(Tick(), 1.5)
    assert words(left) == ["died", "alone"] and left[1] == compute(2)
    assert words(node.handle(computed(2), 2.0)) == []
    assert words(node.handle(up("a", round=2), 3.0)) == ["returned"]
    assert words(node.handle(LinkDown("a"), 4.0)) == ["suspected"]
    assert words(node.handle(Tick(), 5.0)) == ["died", "alone"]


def test_who_finished_leaves_nobody_alone() -> None:
    node = collecting(round=1)
    for name in ("a", "b"):
        node.handle(got(name, 1), 0.0)
        node.handle(Received(name, Goodbye(2, "finished")), 0.0)
        assert words(node.handle(LinkDown(name), 0.0)) == []
    assert words(node.handle(Tick(), 2.0)) == []


def test_only_an_open_node_takes_whoever_links_and_a_member_that_is_no_neighbour_is_told() -> None:
    node = collecting()
    assert node.handle(up("z"), 0.0) == []
    assert words(node.handle(got("z", 1), 0.0)) == ["rejected"]
    assert node.conduct.counts == {"not_a_neighbour": 1}
    assert list(node.neighbours) == ["a", "b"]
    open_node = collecting(open=True)
    open_node.handle(up("Z"), 0.0)
    assert list(open_node.neighbours) == ["Z", "a", "b"]  # sorted: sums do not depend on who came first


def test_who_joins_in_mid_round_counts_from_the_next_round_on() -> None:
    node = collecting(open=True)
    assert node.handle(up("c", round=1), 0.0) == [said("joined", peer="c", epoch=1), Send(("c",), mine(1))]
    node.handle(got("a", 1), 0.0)
    node.handle(got("c", 1, reach=4.0), 0.0)
    assert node.handle(got("b", 1), 0.0) == [compute(2, folded("a", "b", round=1), reach=4.0)]


# -- The dead, the broken, the slow ----------------------------------------------------------------------------------


def test_a_neighbour_that_dies_in_mid_collect_costs_one_grace_once() -> None:
    node = collecting(round=1, grace=1.0)
    node.handle(got("a", 1), 1.0)
    assert node.handle(LinkDown("b", "reset"), 2.0) == [said("suspected", peer="b", why="reset")]
    assert (node.deadline, node.awaited()) == (3.0, ("b",))
    assert node.handle(Tick(), math.nextafter(3.0, 0)) == []
    died = said("died", peer="b", why="its link did not come back within 1 s")
    assert node.handle(Tick(), 3.0) == [died, compute(2, folded("a", round=1))]  # b's weight stays with oneself
    ended = Record(RoundEnded(1, TRAINED, FOLDED, ("a",), ("b",), 3.0))
    assert node.handle(computed(2), 4.0) == [ended, Send(("a",), mine(2))]
    assert node.handle(got("a", 2), 4.5) == [compute(3, folded("a", round=2))]  # nobody waits for the dead again


def test_a_neighbour_that_dies_while_one_trains_costs_what_is_left_of_the_grace() -> None:
    node = collecting(round=1, grace=1.0)
    node.handle(got("a", 1), 0.0)
    node.handle(got("b", 1), 0.0)
    node.handle(LinkDown("b"), 10.0)
    node.handle(computed(2), 10.75)
    node.handle(got("a", 2), 10.75)
    assert node.deadline == 11.0
    assert node.handle(Tick(), 11.0)[-1] == compute(3, folded("a", round=2))


def test_a_silent_neighbour_dies_though_its_link_stands_and_returns_with_its_first_word() -> None:
    node = collecting(round=1, heartbeat=1.0, silence=6.0, patience=50.0)
    node.handle(got("a", 1), 0.5)
    story = ticks(node, 5.9)
    assert words([e for _, e in story]) == ["waiting"]
    node.handle(Received("a", Heartbeat(1)), 5.9)
    died = said("died", peer="b", why="no sign of life for 6 s")
    beat = Send(("a", "b"), Heartbeat(1))
    assert node.handle(Tick(), 6.0) == [beat, died, compute(2, folded("a", round=1))]
    assert node.handle(LinkDown("b", "timeout"), 6.5) == []  # no second death
    assert words(node.handle(up("b", seen=1), 6.75)) == ["returned"]
    silent = collecting(round=1, heartbeat=1.0, silence=6.0, patience=50.0)
    ticks(silent, 6.0)
    returned = said("returned", peer="b", epoch=1)
    assert silent.handle(Received("b", Heartbeat(1)), 6.5) == [returned]


def test_who_went_on_without_beginning_to_send_is_given_one_grace_and_who_began_its_patience() -> None:
    for began in (False, True):
        node = collecting(round=1, grace=1.0, patience=50.0)
        node.handle(got("a", 1), 0.25)
        if began:
            node.check_offer("b", 1)  # its chunks are on their way, and its heartbeat has overtaken them
        assert node.handle(Received("b", Heartbeat(2)), 0.5) == []
        assert node.deadline == (5.0 if began else 1.5)
        assert node.handle(Tick(), math.nextafter(1.5, 0)) == []
        assert node.handle(Tick(), 1.5) == ([] if began else [compute(2, folded("a", round=1))])


@pytest.mark.parametrize(("seen", "lost"), [(-1, (0, 1)), (0, (1,)), (1, ()), (2, ())])
def test_after_a_broken_link_an_update_is_sent_again_if_and_only_if_it_is_lost(seen: int, lost: tuple[int]) -> None:
    node = collecting(round=1, grace=1.0)
    node.handle(LinkDown("b"), 2.0)
    again = [Send(("b",), mine(round)) for round in lost]
    assert node.handle(up("b", round=1, seen=seen), 2.875) == [said("returned", peer="b", epoch=1), *again]
    assert node.deadline == 5.0  # the patience; it is awaited as if nothing had been


def test_what_came_before_a_link_broke_is_folded_once() -> None:
    node = collecting(round=1)
    node.handle(got("b", 1), 0.5)
    node.handle(LinkDown("b"), 1.0)
    node.handle(up("b", round=1, seen=1), 1.5)
    assert words(node.handle(got("b", 1), 1.75)) == ["rejected"]  # "stale": the same one again
    assert node.handle(got("a", 1), 2.0) == [compute(2, folded("a", "b", round=1))]
    node.handle(computed(2), 2.0)
    assert node.handle(got("a", 2), 2.0) == []
    assert node.awaited() == ("b",)


def test_a_flapping_link_costs_no_more_than_the_patience() -> None:
    node = collecting(round=1, patience=5.0, grace=1.0)
    node.handle(got("a", 1), 0.0)
    for t in np.arange(0.5, 4.75, 0.5):
        node.handle(LinkDown("b"), t)
        node.handle(up("b", seen=1), t + 0.25)
    assert node.deadline == 5.0
    assert node.handle(Tick(), 5.0)[-1] == compute(2, folded("a", round=1))


def test_a_slow_neighbour_is_left_behind_once_and_then_given_the_time_that_it_needs() -> None:
    node = collecting(round=1, patience=5.0)
    missed = []
    now = 0.0
    for r in range(1, 8):
        began = now
        node.handle(got("a", r), now)
        now = began + 20.0  # when the update of b comes
        while node.phase is Phase.COLLECTING and node.deadline is not None and node.deadline < now:
            ended = node.deadline
            node.handle(Tick(), ended)
        if node.phase is Phase.COMPUTING:
            missed.append((r, ended - began))
            assert node.handle(got("b", r), now) == [said("late", peer="b", round=r)]
        else:
            assert words(node.handle(got("b", r), now)) == []
        node.handle(computed(r + 1), now)
    assert missed == [(1, 5.0)]  # three times the median of (0, 20) is enough from then on


def test_a_late_update_is_folded_a_round_later_and_counts_less() -> None:
    """Nor may it pass for punctual, which would hide that its sender is slow."""
    node = collecting(round=1, patience=5.0)
    node.handle(got("a", 1), 0.0)
    assert node.handle(Tick(), 5.0) == [compute(2, folded("a", round=1))]
    assert node.handle(got("b", 1), 6.0) == [said("late", peer="b", round=1)]
    node.handle(computed(2), 10.0)
    node.handle(got("a", 2), 10.0)
    assert node.deadline == 15.0
    assert node.handle(Tick(), 15.0) == [said("waiting", peers=("b",), round=2, since=5.0, left=4.0)]
    late = folded("a", round=2) + folded("b", round=1, weight=1 / 3 / 2)
    assert node.handle(Tick(), 19.0) == [compute(3, late)]  # 9 s: three times the median of (0, 6)
    node.handle(computed(3), 20.0)
    node.handle(got("a", 3), 20.0)
    assert node.handle(Tick(), 29.0)[-1] == compute(4, folded("a", round=3))  # b1 went in once, and not again


def test_what_is_rounds_late_gives_way_to_what_is_newer() -> None:
    node = collecting(round=3, patience=5.0)
    node.handle(got("a", 3), 0.0)
    node.handle(Tick(), 5.0)
    node.handle(got("b", 3), 6.0)
    node.handle(computed(4), 10.0)
    node.handle(got("a", 4), 10.0)
    assert node.handle(got("b", 4), 11.0) == [compute(5, folded("a", "b", round=4))]


def test_where_rounds_must_not_mix_a_late_update_is_lost() -> None:
    node = collecting(round=1, patience=5.0, two_way=True)
    node.handle(Received("a", Receipt(1)), 0.0)
    node.handle(got("a", 1), 0.0)
    node.handle(Tick(), 5.0)
    assert node.handle(got("b", 1), 6.0) == [said("late", peer="b", round=1)]
    assert node.neighbours["b"].updates == {}


def missing(node: Node, rounds: Sequence[int], now: float) -> float:
    """Rounds in which a is in time, and b is not heard of; when the last of them ended."""
    for r in rounds:
        node.handle(got("a", r), now)
        while node.phase is Phase.COLLECTING and node.deadline is not None:
            now = node.deadline
            node.handle(Tick(), now)
        node.handle(computed(r + 1), now)
    return now


def test_who_misses_three_rounds_is_not_waited_for_until_it_was_in_step_for_three() -> None:
    node = collecting(round=1, patience=5.0)
    assert missing(node, [1, 2], 0.0) == 10.0 and node.awaited() == ("a", "b")
    node.handle(got("a", 3), 10.0)
    node.handle(Tick(), 15.0)
    assert node.neighbours["b"].degraded and node.handle(computed(4), 15.0)[-1] == Send(("a", "b"), mine(4))
    assert node.awaited() == ("a",)
    assert node.handle(got("b", 2), 15.5) == [said("late", peer="b", round=2)]
    late = folded("a", round=4) + folded("b", round=2, weight=1 / 3 / 3)
    assert node.handle(got("a", 4), 16.0) == [compute(5, late)]  # without waiting for b: two rounds late, a third
    for r in (5, 6):
        node.handle(computed(r), 20.0)
        node.handle(got("b", r), 20.0)
        assert node.handle(got("a", r), 20.0) == [compute(r + 1, folded("a", "b", round=r))]
    node.handle(computed(7), 20.0)
    assert node.awaited() == ("a",)
    assert node.handle(got("b", 7), 20.0) == [said("restored", peer="b", round=7)]
    node.handle(got("a", 7), 20.0)
    node.handle(computed(8), 20.0)
    assert node.awaited() == ("a", "b")


def test_who_comes_nearer_is_waited_for() -> None:
    node = fresh(first_round=9, patience=5.0, join_timeout=5.0)
    node.handle(up("a", round=9), 0.0)
    node.handle(up("b", round=0), 0.0)  # it is from a part of the network that was cut off, and is slower
    node.handle(computed(9), 0.0)
    now = 0.0
    for r, claim in ((9, 2), (10, 4), (11, 6), (12, 8)):  # now it does two rounds in the time of one of ours
        node.handle(Received("b", Heartbeat(claim)), now)
        now = missing(node, [r], now)
    assert node.awaited() == ("a", "b") and now == 20.0


@pytest.mark.parametrize("hung_up", [True, False])
def test_the_only_one_is_waited_for_however_slow(hung_up: bool) -> None:
    """Or a fast node would run on alone to the end of its rounds. Who said goodbye is no company."""
    node = collecting(round=1, patience=5.0)
    node.handle(Received("a", Goodbye(1, "leaving")), 0.0)
    if hung_up:
        node.handle(LinkDown("a"), 0.0)
    node.handle(Tick(), 5.0)
    for r in range(2, 6):
        node.handle(computed(r), 5.0 * r)
        assert node.awaited() == ("b",)
        node.handle(Tick(), 5.0 * r + 5.0)
    assert node.neighbours["b"].degraded


def test_who_is_ready_before_us_is_not_late() -> None:
    node = collecting(round=1, neighbours=("a",), patience=5.0)
    node.handle(got("a", 1), 0.0)
    for r in range(2, 9):
        node.handle(got("a", r), 100.0 * r - 10.0)  # we train for 100 s, it does for 90 s
        node.handle(computed(r), 100.0 * r)
    node.handle(computed(9), 900.0)
    assert (node.awaited(), node._waits_until()) == (("a",), 905.0)


def test_a_neighbour_that_is_stuck_is_not_given_the_time_of_a_slower_one() -> None:
    node = collecting(round=1, patience=5.0)
    now = 0.0
    for r in range(1, 5):
        node.handle(got("a", r), now)
        node.handle(got("b", r), now + 4.0)
        node.handle(computed(r + 1), now + 4.0)
        now += 4.0
    assert (node.round, node.awaited()) == (5, ("a", "b"))
    assert node._waits_until() == now + 12.0  # three times 4 s, for b
    assert node.handle(got("b", 5), now + 6.0) == [compute(6, folded("b", round=5))]  # a's 5 s are over


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ([], 5.0),
        ([[]], 5.0),
        ([[0.0] * 16], 5.0),
        ([[1.0, 2.0, 100.0]], 6.0),  # the median, three times
        ([[1.0], [4.0], []], 12.0),  # the slowest counts
        ([[1e6]], MAX_PATIENCE),  # one that is late on purpose
    ],
)
def test_patience(observed: list[list[float]], expected: float) -> None:
    assert patience(observed, 5.0) == expected
    assert patience(observed, 7200.0) == 7200.0  # what the user asks for is never cut


def test_the_first_round_deserves_the_join_timeout() -> None:
    node = collecting(round=0, join_timeout=60.0, patience=5.0)
    assert [(t, e.peers) for t, e in ticks(node, 60.0) if isinstance(e, Send)] == []
    assert (node.round, node.phase) == (1, Phase.COMPUTING)
    node.handle(computed(1), 70.0)
    node.handle(got("a", 1), 70.0)
    assert node._waits_until() == 75.0


def test_it_says_every_five_seconds_whom_it_awaits_while_collecting() -> None:
    node = collecting(round=1, patience=12.0)
    assert ticks(node, 9.0) == [(5.0, said("waiting", peers=("a", "b"), round=1, since=5.0, left=7.0))]
    node.handle(got("a", 1), 9.0)
    assert ticks(node, 12.0) == [
        (10.0, said("waiting", peers=("b",), round=1, since=10.0, left=2.0)),
        (12.0, compute(2, folded("a", round=1))),
    ]


# -- Staleness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [1, 2])
def test_with_staleness_s_a_neighbour_may_be_s_rounds_behind(staleness: int) -> None:
    node = fresh(neighbours=("a",), staleness=staleness)
    node.handle(up("a"), 0.0)
    for r in range(staleness):
        assert node.handle(computed(r), float(r))[-1] == compute(r + 1, reach=2.0)  # waits for nobody
    node.handle(computed(staleness), 10.0)
    assert node.awaited() == ("a",)
    half = 1 / 2
    assert node.handle(got("a", 0, reach=2.0), 11.0) == [
        compute(staleness + 1, folded("a", round=0, weight=half), reach=2.0)
    ]
    node.handle(computed(staleness + 1), 12.0)
    assert node.awaited() == ("a",)
    node.handle(got("a", 1, reach=2.0), 13.0)
    assert node._waits_until() == 17.0  # being behind as allowed is not being late: the patience has not grown


def test_with_staleness_the_newest_of_a_faster_neighbour_counts_and_is_folded_once() -> None:
    node = fresh(staleness=2)
    node.handle(up("a"), 0.0)
    node.handle(up("b"), 0.0)
    for r in range(4):  # b may have folded rounds 0 to 2 with our update of round 0, and made that of round 3
        assert node.handle(got("b", r), 0.0) == []
    node.handle(got("b", 4), 0.0)
    assert node.conduct.counts == {"future": 1}
    assert node.handle(computed(0), 1.0)[-1] == compute(1, folded("b", round=3))
    assert node.handle(computed(1), 2.0)[-1] == compute(2)  # folded once


def test_with_infinite_staleness_nobody_is_waited_for_and_the_newest_counts() -> None:
    node = fresh(neighbours=("a", "b"), staleness=math.inf)
    node.handle(up("a"), 0.0)
    node.handle(up("b"), 0.0)
    assert node.handle(computed(0), 1.0) == [Send(("a", "b"), mine(0)), compute(1)]
    for r in (0, 7, 50):
        assert node.handle(got("a", r), 1.5) == []
    effects = node.handle(computed(1), 2.0)
    assert effects[-1] == compute(2, folded("a", round=50))
    assert node.deadline is not None
    node.handle(computed(2), 3.0)
    assert node.handle(got("a", 49), 3.5)[0] == said(
        "rejected", peer="a", code="stale", why="round 49, when round 50 has already come"
    )


# -- Ahead, behind, and lies about it --------------------------------------------------------------------------------


def test_the_next_round_of_a_faster_neighbour_is_kept_and_not_folded_early() -> None:
    node = collecting(round=1)
    node.handle(got("a", 1), 0.0)
    assert node.handle(got("a", 2), 0.0) == []  # a had all it needed for round 1
    assert node.handle(got("b", 1), 0.0) == [compute(2, folded("a", "b", round=1))]
    node.handle(computed(2), 0.0)
    assert node.awaited() == ("b",)
    assert node.handle(got("b", 2), 0.0) == [compute(3, folded("a", "b", round=2))]


def test_where_this_round_was_lost_the_next_is_not_folded_in_its_place() -> None:
    node = collecting(round=1)
    node.handle(got("a", 2), 0.0)
    assert node.handle(got("b", 1), 0.0) == [compute(2, folded("b", round=1))]
    node.handle(computed(2), 0.0)
    assert node.handle(got("b", 2), 0.0) == [compute(3, folded("a", "b", round=2))]


@pytest.mark.parametrize("round", [3, 99, 100, MAX_ROUND])
def test_a_round_far_ahead_is_refused_and_moves_nothing(round: int) -> None:
    node = collecting(round=1, neighbours=("a", "b", "c"))
    before = [(n.name, n.round, n.heard, dict(n.updates)) for n in node.neighbours.values()]
    with pytest.raises(BadMessage) as refused:
        node.check_offer("a", round)
    assert refused.value.code == "future"
    assert words(node.handle(got("a", round), 0.0)) == ["rejected"]
    assert node.conduct.counts == {"future": 1}
    assert (node.round, node.awaited()) == (1, ("a", "b", "c"))
    assert [(n.name, n.round, n.heard, dict(n.updates)) for n in node.neighbours.values()] == before


def test_a_round_that_the_experiment_does_not_have_is_refused_whatever_the_claims() -> None:
    for staleness in (0, math.inf):
        node = fresh(staleness=staleness)
        node.handle(up("a", round=100), 0.0)
        node.check_offer("a", 99)
        with pytest.raises(BadMessage, match="future: round 100 of an experiment with 100"):
            node.check_offer("a", 100)


def test_no_claim_moves_the_own_round() -> None:
    node = collecting(round=1, neighbours=("a", "b", "c"))
    for claim in (50, 99, MAX_ROUND):
        assert node.handle(Received("a", Heartbeat(claim)), 0.0) == []
    node.handle(up("b", round=MAX_ROUND), 0.0)
    assert [n.round for n in node.neighbours.values()] == [99, 0, 0]
    assert node.round == 1
    with pytest.raises(BadMessage, match="future"):
        node.check_offer("a", 50)  # one claim of three does not open the door either
    assert node.awaited() == ("b", "c")  # but who says it is far ahead is not waited for


def test_two_updates_may_wait_and_no_more() -> None:
    node = collecting(round=1, neighbours=("a", "b", "c"))
    node.handle(got("a", 1), 0.0)
    node.handle(got("a", 2), 0.0)
    for peer in "abc":
        node.handle(Received(peer, Heartbeat(9)), 0.0)
    with pytest.raises(BadMessage) as refused:
        node.check_offer("a", 9)
    assert refused.value.code == "busy"


@pytest.mark.parametrize(
    ("own", "claims", "expected"),
    [
        (0, [], 0),
        (5, [3, 4, 5], 5),
        (5, [6, 6, 6], 5),  # one ahead is lawful
        (5, [9], 9),
        (5, [5, 9], 5),  # the lower median
        (5, [5, 9, 9], 9),
        (5, [9, 9, MAX_ROUND], 9),  # one liar
        (5, [5, 6, MAX_ROUND], 5),
        (5, [-1, -1, 9, 9], 5),
    ],
)
def test_catch_up_round(own: int, claims: list[int], expected: int) -> None:
    assert catch_up_round(own, claims) == expected
    assert catch_up_round(own, claims, ahead=math.inf) == own  # without steps there is no catching up


def test_a_late_joiner_goes_on_from_the_mean_of_most_neighbours() -> None:
    node = fresh(neighbours=("a", "b", "c", "d"))
    node.handle(up("d"), 0.0)  # as new as we are
    effects = [e for peer in "abc" for e in node.handle(up(peer, round=57), 0.0)]
    assert [e for e in effects if isinstance(e, Compute)] == [compute(0, reach=3.0)]  # trains at once, with a and d
    node.handle(computed(0), 1.0)
    assert node.handle(got("d", 0), 1.0) == []
    assert node.handle(got("a", 57), 1.0) == []
    assert node.handle(got("b", 57), 1.0) == []  # two of four are no majority
    assert node.handle(got("c", 58), 1.25) == [
        said("caught_up", behind=0, round=57),
        compute(57, (*folded("a", "b", round=57), *folded("c", round=58)), reach=5.0, jump=True),
    ]
    assert node.handle(computed(57), 2.0) == [Send(("a", "b", "c", "d"), mine(57, 5.0))]  # no record of what is skipped
    assert node.round == 57
    assert [e for _, e in ticks(node, 9.0) if isinstance(e, Compute)] == [
        compute(58, reach=5.0)
    ]  # none is folded twice


def test_who_fell_behind_keeps_of_its_own_model_what_its_age_is_worth() -> None:
    node = collecting(round=2)
    for name in "ab":
        node.handle(Received(name, Heartbeat(7)), 0.0)
    node.handle(got("a", 7), 0.0)
    effects = node.handle(got("b", 7), 0.0)
    weight = 1 / (2 + 1 / 6)  # the own one is five rounds old: of three models it counts a sixth as much
    assert effects == [
        said("caught_up", behind=2, round=7),
        compute(7, folded("a", "b", round=7, weight=weight), jump=True),
    ]


def test_models_that_were_refused_are_no_reason_to_catch_up() -> None:
    node = collecting(round=1, neighbours=("a",))
    node.handle(Received("a", Heartbeat(50)), 0.0)
    node.check_offer("a", 50)
    effects = node.handle(Rejected("a", "bad_value", "NaN", round=50), 0.0)
    assert effects[-1] == compute(2, reach=2.0)


def test_a_late_joiner_does_not_follow_one_liar() -> None:
    node = fresh(neighbours=("a", "b", "c"))
    for peer, claim in (("a", 99), ("b", 50), ("c", 50)):
        node.handle(up(peer, round=claim), 0.0)
    node.handle(computed(0), 1.0)
    assert words(node.handle(got("a", 99), 1.0)) == ["rejected"]
    node.handle(got("b", 50), 1.0)
    assert node.round == 0
    assert words(node.handle(got("c", 50), 1.0)) == ["caught_up"]
    assert node.round == 50


def test_it_does_not_wait_for_one_that_is_out_of_reach() -> None:
    """a is at round 50, b as new as we are: no majority to follow, so a's updates are refused; why wait for them?"""
    node = fresh()
    node.handle(up("a", round=50), 0.0)
    node.handle(up("b"), 0.0)
    node.handle(computed(0), 0.0)
    assert node.awaited() == ("b",)


# -- Whose checkpoints are damaged -----------------------------------------------------------------------------------


def stateless(**changes: object) -> Node:
    return fresh(needs_state=True, join_timeout=60.0, patience=5.0, **changes)


def test_who_lacks_a_state_goes_on_from_that_of_its_neighbours_and_nothing_of_its_own_is_in_it() -> None:
    node = stateless()
    for peer, round in (("a", 57), ("b", 51)):  # without it in between, they have come apart
        assert not [e for e in node.handle(up(peer, round=round), 0.0) if isinstance(e, (Compute, Send))]
    assert node.handle(got("a", 57), 0.5) == []  # one of two: it may be a lie
    assert node.awaited() == ("b",)
    effects = node.handle(got("b", 51), 0.75)
    assert effects == [
        said("caught_up", behind=0, round=51),
        compute(51, (*folded("a", round=57, weight=1 / 2), *folded("b", round=51, weight=1 / 2)), jump=True),
    ]
    assert node.handle(computed(51), 1.0)[0] == Send(("a", "b"), mine(51))  # its first update of all


def test_the_state_before_the_first_round_ended_is_a_state_too() -> None:
    node = stateless()
    for peer in "ab":
        node.handle(up(peer), 0.0)
    node.handle(got("a", 0), 0.5)
    assert node.handle(got("b", 0), 0.5)[-1] == compute(0, folded("a", "b", round=0, weight=1 / 2))


def test_it_never_starts_from_its_own_vector_and_ends_when_nobody_gives_a_state() -> None:
    node = stateless()
    for peer in "ab":
        node.handle(up(peer, round=3), 0.0)
    story = ticks(node, 100.0)
    assert not [effect for _, effect in story if isinstance(effect, Compute)]
    assert [(t, effect) for t, effect in story if effect in (said("no_state"), Done(False))] == [
        (60.0, said("no_state")),
        (60.0, Done(False)),
    ]
    assert node.phase is Phase.DONE


def test_a_donor_that_dies_on_the_way_gives_way_to_the_next() -> None:
    node = stateless(neighbours=("a", "b"), grace=1.0)
    for peer in "ab":
        node.handle(up(peer, round=57), 0.0)
    node.check_offer("a", 57)  # it began …
    node.handle(got("b", 57), 0.5)
    node.handle(LinkDown("a", "the bulk connection broke"), 0.75)  # … and broke off at 99 %
    story = ticks(node, 2.0)
    assert [(t, e) for t, e in story if isinstance(e, Compute)] == [
        (1.75, compute(57, folded("b", round=57, weight=1.0), jump=True))
    ]


@pytest.mark.parametrize("b_is_there", [True, False])
def test_a_donor_whose_model_is_of_no_use_gives_way_to_the_next(b_is_there: bool) -> None:
    """Nor does one that is not there, or gives nothing, keep it for longer than its patience once another gave."""
    node = stateless(neighbours=("a", "b"))
    node.handle(up("a", round=57), 0.0)
    if b_is_there:
        node.handle(up("b", round=57), 0.0)
        node.handle(Rejected("b", "bad_value", "NaN", round=57), 0.25)
    node.handle(got("a", 57), 0.5)
    assert [(t, e) for t, e in ticks(node, 9.0) if isinstance(e, Compute)] == [
        (5.5, compute(57, folded("a", round=57, weight=1.0), reach=3.0 if b_is_there else 2.0, jump=True))
    ]


def test_a_state_that_was_given_counts_for_nothing_once_its_donor_is_shut_out() -> None:
    node = stateless()
    node.handle(up("a", round=57), 0.0)
    node.handle(got("a", 57), 0.5)
    shut_out = node.handle(Rejected("a", "equivocation", "two different updates"), 1.0)
    assert Disconnect in map(type, shut_out)
    assert [t for t, effect in ticks(node, 100.0) if effect == said("no_state")] == [60.0]


def test_one_liar_among_the_donors_leads_it_nowhere() -> None:
    node = stateless(neighbours=("a", "b", "c"))
    node.handle(up("a", round=99), 0.0)
    node.handle(got("a", 99), 0.0)  # it is the first, and far ahead
    node.handle(up("b", round=50), 0.25)
    assert node.round == 0  # though it would be alone with its state but for those who are still on their way
    node.handle(got("b", 50), 0.5)
    assert node.round == 50


def test_while_states_come_the_newest_of_each_neighbour_counts() -> None:
    node = stateless()
    node.handle(up("a", round=5), 0.0)
    for round in (5, 6, 7):
        assert "rejected" not in words(node.handle(got("a", round), 0.5))
    node.handle(up("b", round=7), 1.0)
    assert node.handle(got("b", 7), 1.0)[-1] == compute(7, folded("a", "b", round=7, weight=1 / 2), jump=True)


# -- Goodbyes --------------------------------------------------------------------------------------------------------


def test_the_last_update_of_a_leaver_is_still_awaited_while_its_link_holds() -> None:
    node = collecting(round=1)
    node.handle(got("a", 1), 0.0)
    assert node.handle(Received("b", Goodbye(2, "finished")), 0.5) == [
        said("left", peer="b", reason="finished", round=2)
    ]
    assert node.awaited() == ("b",)
    assert node.handle(got("b", 1), 1.0) == [compute(2, folded("a", "b", round=1))]
    assert node.handle(LinkDown("b"), 1.25) == []  # neither suspected nor dead
    assert node.handle(computed(2), 2.0)[-1] == Send(("a",), mine(2))
    assert node.awaited() == ("a",)
    assert "died" not in words([e for _, e in ticks(node, 100.0)])


def test_a_leaver_whose_link_breaks_before_its_last_update_came_costs_one_grace() -> None:
    node = collecting(round=1)
    node.handle(got("a", 1), 0.0)
    node.handle(Received("b", Goodbye(2, "leaving")), 0.5)
    assert node.handle(LinkDown("b"), 1.0) == []
    assert node.deadline == 2.0
    assert node.handle(Tick(), 2.0) == [compute(2, folded("a", round=1))]


@pytest.mark.parametrize("after", [0, 1])
def test_a_leaver_that_never_made_this_round_is_not_awaited(after: int) -> None:
    node = collecting(round=1)
    node.handle(got("a", 1), 0.0)
    effects = node.handle(Received("b", Goodbye(after, "leaving")), 0.5)
    assert effects == [said("left", peer="b", reason="leaving", round=after), compute(2, folded("a", round=1))]


def test_an_update_under_way_is_not_awaited_where_it_would_come_too_late_anyway() -> None:
    node = collecting(round=1)
    node.handle(got("a", 1), 0.0)
    node.handle(Tick(), 5.0)  # goes on without round 1 of b …
    node.handle(computed(2), 6.0)
    node.handle(got("a", 2), 6.0)
    assert node.handle(Received("b", Goodbye(2, "leaving")), 6.5)[-1] == compute(3, folded("a", round=2))  # … for ever


def test_a_goodbye_is_said_to_the_rest_and_nothing_more_is_sent_to_who_left() -> None:
    node = collecting(round=1)
    node.handle(got("b", 1), 0.0)
    node.handle(Received("b", Goodbye(2, "finished")), 0.0)
    assert node.handle(Leave(), 0.5) == [Send(("a",), Goodbye(2, "leaving")), said("left", round=2), Done(False)]


def test_leaving_while_joining_collecting_and_computing() -> None:
    joining = fresh()
    joining.handle(up("a"), 0.0)
    assert joining.handle(Leave(), 1.0) == [Send(("a",), Goodbye(0, "leaving")), said("left", round=0), Done(False)]

    both = ("a", "b")
    node = collecting(round=1)
    assert node.handle(Leave(), 1.0) == [Send(both, Goodbye(2, "leaving")), said("left", round=2), Done(False)]

    node = collecting(round=1)
    node.handle(got("a", 1), 0.0)
    node.handle(got("b", 1), 0.0)
    assert node.handle(Leave(), 1.0) == []  # what is being computed is still worth sending
    ended = Record(RoundEnded(1, TRAINED, FOLDED, both, (), 0.0))
    assert node.handle(computed(2), 2.0) == [
        ended,
        Send(both, mine(2)),
        Send(both, Goodbye(3, "leaving")),
        said("left", round=3),
        Done(False),
    ]


def test_a_neighbour_that_started_again_begins_anew() -> None:
    for in_time in (True, False):
        node = collecting(round=1)
        node.handle(got("b", 1), 0.0)
        node.handle(Received("b", Goodbye(1, "leaving")), 0.0)
        node.handle(LinkDown("b"), 0.5)
        assert node.handle(up("b", epoch=2), 1.0) == [said("returned", peer="b", epoch=2), Send(("b",), mine(1))]
        assert node.awaited() == ("a", "b")  # the update of the old process went with it
        node.handle(got("a", 1), 1.0)
        assert node.handle(got("b", 0), 1.25) == [said("late", peer="b", round=0)]
        if in_time:
            assert node.handle(got("b", 1), 1.5) == [compute(2, folded("a", "b", round=1))]
        else:
            assert node.handle(LinkDown("b"), 1.5) == [said("suspected", peer="b", why="")]
            late = folded("b", round=0, weight=1 / 6)
            assert node.handle(Tick(), 2.5)[-1] == compute(2, folded("a", round=1) + late)


# -- Misconduct ------------------------------------------------------------------------------------------------------


def test_equivocation_shuts_out_at_once() -> None:
    node = collecting(round=1, patience=NEVER)
    node.handle(got("b", 1), 0.0)
    signed = (b"\x01", b"\x02", b"\x03", b"\x02")
    event = Rejected("b", "equivocation", "two different updates were signed for round 1", signed)
    why, shown = event.why, ("01", "02", "03", "02")
    assert node.handle(event, 1.0) == [
        said("rejected", peer="b", code="equivocation", why=why, evidence=shown),
        Disconnect("b", 600.0),
        said("quarantined", peer="b", code="equivocation", seconds=600.0, evidence=shown),
        Send(("a",), Accusation("b", "equivocation", signed)),
    ]
    assert words(node.handle(got("b", 2), 1.0)) == ["rejected"]  # it was under way
    assert node.handle(LinkDown("b", "quarantined"), 1.0) == []
    assert node.awaited() == ("a",)
    assert node.handle(got("a", 1), 1.5) == [compute(2, folded("a", round=1))]  # nothing of b
    node.handle(computed(2), 2.0)
    assert words(node.handle(up("b", round=2, seen=0), 601.0))[0] == "returned"
    assert node.awaited() == ("a", "b")


def test_another_mass_than_announced_shuts_out() -> None:
    node = collecting(round=1)
    why = "round 1 weighs 2.0, its hello said 1.0"
    quarantine = [Disconnect("b", 600.0), said("quarantined", peer="b", code="bad_mass", seconds=600.0)]
    assert node.handle(got("b", 1, mass=2.0), 0.0) == [
        said("rejected", peer="b", code="bad_mass", why=why),
        *quarantine,
    ]


@pytest.mark.parametrize(
    ("equal", "mass"), [(True, 2.0), (True, math.nan), (False, 1e308), (False, 0.0), (False, -1.0), (False, math.nan)]
)
def test_a_mass_that_the_experiment_does_not_allow_shuts_out(equal: bool, mass: float) -> None:
    node = fresh(equal_masses=equal)
    assert [type(e) for e in node.handle(up("a", mass=mass), 0.0)] == [Record, Disconnect, Record]
    assert not node.neighbours["a"].linked
    assert fresh(equal_masses=False).handle(up("a", mass=MAX_MASS), 0.0) == [said("joined", peer="a", epoch=1)]


def test_who_grows_heavier_within_a_round_is_not_folded_before_the_weights_know_of_it() -> None:
    node = collecting(round=1, equal_masses=False)
    node.handle(LinkDown("b"), 0.0)
    node.handle(up("b", epoch=2, round=1, mass=1000.0), 0.0)
    node.handle(got("b", 1, mass=1000.0, reach=0.5), 0.0)  # and lies about its reach
    assert node.handle(got("a", 1), 0.0) == [compute(2, folded("a", round=1), reach=1002.0)]


def test_three_bad_values_shut_out_and_none_is_waited_for() -> None:
    node = collecting(round=1)
    for r in range(1, 4):
        bad = node.handle(Rejected("b", "bad_value", "NaN", round=r), 1.0 * r)
        assert bad[0] == said("rejected", peer="b", code="bad_value", why="NaN")
        assert [e for e in bad if isinstance(e, Disconnect)] == ([Disconnect("b", 600.0)] if r == 3 else [])
        assert node.awaited() == ("a",)
        assert node.handle(got("a", r), 1.0 * r) == [compute(r + 1, folded("a", round=r))]
        node.handle(computed(r + 1), 1.0 * r)
    assert node.conduct.counts == {"bad_value": 3}


def test_one_log_line_a_second_says_how_many_were_left_out() -> None:
    node = collecting(round=1)
    line = {"peer": "b", "code": "no_credit", "why": "chunk 9"}
    rejected = Rejected("b", "no_credit", "chunk 9")
    assert node.handle(rejected, 1.0) == [said("rejected", **line)]
    assert [node.handle(rejected, t) for t in (1.25, 1.5, 1.75)] == [[], [], []]
    assert node.handle(rejected, 2.0) == [said("rejected", **line, suppressed=3)]
    assert node.handle(replace(rejected, peer="a"), 2.0) == [said("rejected", **line | {"peer": "a"})]
    assert node.conduct.counts == {"no_credit": 6}
    assert (node.round, node.awaited()) == (1, ("a", "b"))


# -- Own pauses ------------------------------------------------------------------------------------------------------


def test_who_slept_for_an_hour_condemns_nobody() -> None:
    node = collecting(round=1, heartbeat=1.0, silence=6.0, patience=5.0, rounds=9)
    node.handle(got("a", 1), 0.5)
    node.handle(Received("b", Heartbeat(1)), 0.5)
    assert node.handle(Tick(), 3600.5) == [
        Send(("a", "b"), Heartbeat(1)),
        said("waiting", peers=("b",), round=1, since=0.5, left=4.5),
    ]
    assert (node.round, node.phase, node.awaited()) == (1, Phase.COLLECTING, ("b",))
    assert node.handle(got("b", 1), 3600.75) == [compute(2, folded("a", "b", round=1))]
    node.handle(computed(2), 3601.0)
    assert node._waits_until() == 3606.0  # nor does anybody pass for an hour late


def test_a_neighbour_in_its_grace_keeps_what_was_left_of_it() -> None:
    node = collecting(round=1, heartbeat=1.0, silence=6.0, grace=1.0, patience=50.0)
    node.handle(LinkDown("b"), 0.25)
    assert "died" not in words(node.handle(Tick(), 7200.5))
    assert node.neighbours["b"].down_since == 7200.5
    assert "died" in words(node.handle(Tick(), 7201.5))


def test_a_join_timeout_does_not_run_while_one_sleeps() -> None:
    node = fresh(heartbeat=1.0, silence=6.0, join_timeout=60.0)
    node.handle(up("a"), 0.5)
    node.handle(Tick(), 3600.5)
    assert (node.phase, node._waits_until()) == (Phase.JOINING, 3660.0)


def test_slow_heartbeats_are_no_pause() -> None:
    """Each gap between two events is longer than half the silence; still the silent one is found out."""
    node = collecting(round=1, heartbeat=4.0, silence=6.0, patience=5.0)
    node.handle(got("a", 1), 0.0)
    node.handle(Tick(), 4.0)
    node.handle(Tick(), 5.0)
    assert words(node.handle(Tick(), 9.0)) == ["died", "died", "alone"]


# -- A whole network, in virtual time --------------------------------------------------------------------------------


@dataclass
class Peer:
    node: Node
    value: float
    epoch: int = 1


class Network:
    """Several nodes against each other. A link keeps its order; what is under way when it breaks is lost."""

    def __init__(
        self, graph: nx.Graph | Topology | TopologySection, values: Mapping[str, float], seed: int = 0, **common: object
    ) -> None:
        self.section = graph if isinstance(graph, TopologySection) else None
        graph = build(graph, 0) if isinstance(graph, TopologySection) else graph
        self.topology = graph if isinstance(graph, Topology) else None
        self.apart: set[frozenset[str]] = set()  # pairs between which nothing passes
        self.graph, self.peers, self.now = graph.union() if isinstance(graph, Topology) else graph, {}, 0.0
        self.common, self.random = {"rounds": 5, "join_timeout": 60.0, **common}, random.Random(seed)
        self.values, self.compute_seconds = dict(values), dict.fromkeys(values, 1.0)
        self.masses = dict.fromkeys(values, 1.0)
        self.trace: list[tuple[float, str, Effect]] = []
        self.lose: Callable[[str, str, Message], bool] = lambda sender, receiver, message: False
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._sought: set[tuple[str, str]] = set()  # pairs that one of the two dials until it succeeds
        self._links: dict[frozenset[str], int] = {}  # those that stand, each with its own number
        self._arrival: dict[tuple[str, str], float] = {}
        self._seen: dict[tuple[str, str], int] = {}  # (receiver, sender) → newest round that came whole

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._count), action))

    def start(self, name: str, epoch: int = 1) -> None:
        known = Settings(name=name, neighbours=tuple(self.graph[name]), mass=self.masses[name], **self.common)  # type: ignore[arg-type]
        if self.topology is not None:
            drift = self.topology.period or len(self.topology.names)
            known = replace(known, neighbourhood=neighbourhoods(self.topology, name, known.weights), drift=drift)
        if self.section is not None:
            names = tuple(sorted(self.section.names))
            wired = wiring(self.section, 0, build(self.section, 0), name)
            known = replace(known, members=names, wiring=wired, neighbourhood=None, epoch=epoch)
        self.peers[name] = Peer(Node(known, self.now), self.values[name], epoch)
        self._seen = {pair: seen for pair, seen in self._seen.items() if name not in pair}
        for other in self.graph:
            if other in self.graph[name] or (min(name, other), max(name, other)) in self._sought:
                self.join(name, other)
        self._handle(name, Tick())

    def kill(self, name: str) -> None:
        del self.peers[name]
        for other in self.graph:
            self.cut(name, other)

    def part(self, *groups: str) -> None:
        """From now on nothing passes between these groups; without any, everything does again, once it is dialled."""
        self.apart = {frozenset((a, b)) for g, h in itertools.combinations(groups, 2) for a in g for b in h}
        for pair in self.apart:
            self.cut(*pair)
        if not groups:
            for a, b in sorted(self._sought):
                self.join(a, b)

    def join(self, a: str, b: str) -> None:
        self._sought.add((min(a, b), max(a, b)))
        pair = frozenset((a, b))
        if pair in self.apart or pair in self._links or not {a, b} <= self.peers.keys():
            return
        self._links[frozenset((a, b))] = next(self._count)
        for here, there in ((a, b), (b, a)):
            peer, seen = self.peers[there], self._seen.get((there, here), -1)
            hello = LinkUp(there, peer.epoch, peer.node.round, self.masses[there], seen)
            self._deliver(there, here, hello)

    def cut(self, a: str, b: str) -> None:
        if self._links.pop(frozenset((a, b)), None) is not None:
            for here, there in ((a, b), (b, a)):
                self.at(self.now, lambda here=here, there=there: self._handle(here, LinkDown(there, "cut")))  # type: ignore[misc]

    def run(self) -> Network:
        while self._queue or any(p.node.deadline is not None for p in self.peers.values()):
            due, name = min(((p.node.deadline or math.inf, n) for n, p in self.peers.items()), default=(math.inf, ""))
            if self._queue and self._queue[0][0] <= due:
                self.now, _, action = heapq.heappop(self._queue)
                action()
            else:
                assert due < math.inf
                self.now = due
                self._handle(name, Tick())
                deadline = self.peers[name].node.deadline
                assert deadline is None or deadline > due, f"{name} would spin at {due}"
        return self

    def _deliver(self, sender: str, receiver: str, event: Event) -> None:
        pair, link = frozenset((sender, receiver)), self._links.get(frozenset((sender, receiver)))
        if link is None:
            return
        delay = self.random.uniform(0.001, 0.1)
        arrival = max(self.now + delay, self._arrival.get((sender, receiver), 0.0))
        self._arrival[sender, receiver] = arrival

        def arrive() -> None:
            if self._links.get(pair) == link:
                if isinstance(event, Received) and isinstance(event.message, Update):
                    self._seen[receiver, sender] = event.message.round
                self._handle(receiver, event)

        self.at(arrival, arrive)

    def _handle(self, name: str, event: Event) -> None:
        if name not in self.peers:
            return
        for effect in self.peers[name].node.handle(event, self.now):
            self.trace.append((self.now, name, effect))
            match effect:
                case Send(receivers, message):
                    for receiver in receivers:
                        if self.lose(name, receiver, message):
                            continue
                        self._deliver(name, receiver, Received(name, message))
                case Compute():
                    self._compute(name, effect)
                case Connect(peer):
                    self.join(name, peer)

    def _compute(self, name: str, job: Compute) -> None:
        peer = self.peers[name]
        peer.value = fold(peer.value, job)
        outcome = TRAINED if job.train else None
        done = Computed(job.round, FOLDED if job.round else None, outcome, peer.value if job.train else None)
        node = peer.node
        self.at(
            self.now + self.compute_seconds[name],
            lambda: self._handle(name, done) if name in self.peers and self.peers[name].node is node else None,
        )

    def effects(self, name: str, kind: type) -> list[tuple[float, Effect]]:
        return [(t, e) for t, n, e in self.trace if n == name and isinstance(e, kind)]

    def said(self, word: str) -> list[tuple[float, str, Happened]]:
        entries = [(t, n, e.entry) for t, n, e in self.trace if isinstance(e, Record)]
        return [(t, n, e) for t, n, e in entries if isinstance(e, Happened) and e.event == word]


def fold(own: float, job: Compute) -> float:
    terms = [c.weight * float(c.vector) for c in job.contributions]  # type: ignore[arg-type]
    return math.fsum([(1.0 - math.fsum(c.weight for c in job.contributions)) * own, *terms])


def ring(n: int) -> nx.Graph:
    return nx.relabel_nodes(nx.cycle_graph(n), dict(enumerate("abcdefghij"[:n])))


def started(network: Network, order: Sequence[str], gap: float = 0.0) -> Network:
    for i, name in enumerate(order):
        network.at(i * gap, lambda name=name: network.start(name))  # type: ignore[misc]
    return network


VALUES = {"a": 1.0, "b": -2.0, "c": 4.0, "d": 10.0}


def test_averaging_on_a_ring_is_the_mixing_matrix_and_start_order_and_delays_do_not_matter() -> None:
    graph = ring(4)
    matrix = mixing_matrix(graph, "metropolis", dict.fromkeys(graph, 1.0)).toarray()
    outcomes = set()
    for seed, (order, gap) in enumerate(itertools.product(("abcd", "dbca", "cadb"), (0.0, 0.5, 7.0))):
        network = started(Network(graph, VALUES, seed), order, gap).run()
        outcomes.add(tuple(network.peers[name].value for name in graph))
        assert {n: e.finished for _, n, e in network.trace if isinstance(e, Done)} == dict.fromkeys(order, True)
        assert not network.said("suspected")
    (outcome,) = outcomes  # bit for bit
    expected = np.linalg.matrix_power(matrix, 5) @ [VALUES[name] for name in graph]
    np.testing.assert_allclose(outcome, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_the_weights_of_every_round_are_the_rows_of_the_mixing_matrix(seed: int) -> None:
    draw = random.Random(seed)
    graph = nx.relabel_nodes(nx.connected_watts_strogatz_graph(8, 4, 0.5, seed=seed), dict(enumerate("abcdefgh")))
    values = {name: draw.uniform(-1, 1) for name in graph}
    network = Network(graph, values, seed, equal_masses=False, rounds=60)
    network.masses = {name: math.sqrt(draw.randint(1, 500)) for name in graph}
    started(network, "".join(graph)).run()
    matrix = mixing_matrix(graph, "samples", network.masses).toarray()
    index = {name: i for i, name in enumerate(graph)}
    for _, name, effect in network.trace:
        if isinstance(effect, Compute) and effect.round > 0:
            assert {c.peer for c in effect.contributions} == set(graph[name])
            assert all(c.weight == matrix[index[name], index[c.peer]] for c in effect.contributions)
            assert math.fsum(c.weight for c in effect.contributions) < 1
    total = math.fsum(network.masses.values())
    mean = math.fsum(network.masses[name] * values[name] for name in graph) / total
    slack = 2 * sorted(abs(np.linalg.eigvals(matrix)))[-2] ** 60 * math.sqrt(500 * 8)
    assert all(abs(peer.value - mean) <= slack + 1e-12 for peer in network.peers.values())


def test_two_nodes_agree_in_one_round() -> None:
    network = started(Network(nx.Graph([("a", "b")]), VALUES, rounds=1), "ab").run()
    assert [network.peers[name].value for name in "ab"] == [-0.5, -0.5]


@pytest.mark.parametrize("victim", "abcdef")
@pytest.mark.parametrize("when", [2.5, 3.05])  # while all train; while updates are under way
def test_the_rest_finish_whoever_is_killed_and_pay_at_most_one_grace(victim: str, when: float) -> None:
    graph = ring(6)
    values = {name: float(i) for i, name in enumerate(graph)}
    ends = {}
    for killed in (False, True):
        network = started(Network(graph, values, rounds=12), "abcdef")
        if killed:
            network.at(when, lambda network=network: network.kill(victim))  # type: ignore[misc]
        network.run()
        ends[killed] = {n: t for t, n, e in network.trace if isinstance(e, Done) and e.finished}
    assert set(ends[True]) == set("abcdef") - {victim}
    assert {(n, h.fields["peer"]) for _, n, h in network.said("died")} == {(n, victim) for n in graph[victim]}
    assert len(network.said("died")) == 2
    assert max(ends[True].values()) <= max(ends[False].values()) + 1.0 + 0.1  # one grace, and other delays drawn


def test_a_network_in_which_one_node_starts_late_and_one_starts_again_ends_together() -> None:
    graph = nx.relabel_nodes(nx.complete_graph(5), dict(enumerate("abcde")))
    network = Network(graph, VALUES | {"e": 0.0}, rounds=60, join_timeout=3.0)
    started(network, "abcd")
    network.at(20.0, lambda: network.start("e"))
    network.at(30.5, lambda: network.kill("b"))
    network.at(40.5, lambda: network.start("b", epoch=2))
    network.run()
    caught_up = [(n, h.fields["behind"]) for _, n, h in network.said("caught_up")]
    assert caught_up == [("e", 0), ("b", 0)]
    ends = {n: t for t, n, e in network.trace if isinstance(e, Done) and e.finished}
    assert set(ends) == set("abcde")
    assert max(ends.values()) - min(ends.values()) < 1.5


def test_a_cut_that_heals_within_the_grace_loses_no_contribution() -> None:
    network = started(Network(ring(4), VALUES, rounds=20), "abcd")
    for i in range(15):
        network.at(2.0 + 0.93 * i, lambda: network.cut("a", "b"))
        network.at(2.2 + 0.93 * i, lambda: network.join("a", "b"))
    network.run()
    matrix = mixing_matrix(ring(4), "metropolis", dict.fromkeys("abcd", 1.0)).toarray()
    expected = np.linalg.matrix_power(matrix, 20) @ [VALUES[name] for name in ring(4)]
    assert [p.value for p in network.peers.values()] == pytest.approx(list(expected), abs=1e-12)
    assert len(network.said("suspected")) == 30
    assert not network.said("died") and not network.said("rejected")


def test_a_slow_node_is_waited_for_once_it_is_known_to_be_slow() -> None:
    network = Network(ring(4), VALUES, rounds=25, join_timeout=5.0, patience=2.0)
    network.compute_seconds["d"] = 9.0
    started(network, "abcd").run()
    assert {n for _, n, e in network.trace if isinstance(e, Done) and e.finished} == set("abcd")
    ended = [
        e.entry for _, n, e in network.trace if n == "a" and isinstance(e, Record) and isinstance(e.entry, RoundEnded)
    ]
    assert ended[0].missing == ("d",)
    assert all(entry.missing == () for entry in ended[-5:])


# -- Graphs that change, and graphs of one-way edges -----------------------------------------------------------------


def one_way(*hears: str, tells: tuple[str, ...]) -> Callable[[int], Neighbourhood]:
    return lambda _round: Neighbourhood(dict.fromkeys(hears), tells)


def drawn(graph: str, nodes: int, weights: str | None = None, **keys: object) -> Topology:
    section = {"graph": graph, "nodes": list("abcdefghijklmnop"[:nodes]), "weights": weights, **keys}
    return build(TopologySection.model_validate(section), seed=3)


def cycle_with_a_chord() -> Topology:
    """The directed ring of five, and 0 → 2."""
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2)])
    named = nx.relabel_nodes(graph, dict(enumerate("abcde")))
    return Topology("cycle", tuple("abcde"), 1, lambda _round: named)


def test_of_each_round_only_its_neighbours_are_heard_and_told() -> None:
    turns = [Neighbourhood({"a": None}, ("a",)), Neighbourhood({"b": None}, ("b",))]
    node = fresh(neighbourhood=lambda round: turns[round % 2], drift=2)
    node.handle(up("a"), 0.0)
    assert node.handle(up("b"), 0.0)[-1] == compute(0, reach=2.0)
    assert node.handle(computed(0), 1.0) == [Send(("a",), mine(0, reach=2.0))]
    assert node.awaited() == ("a",)
    assert node.handle(got("b", 1, reach=2.0), 1.5) == []  # b is ahead by one round, as this graph lets it be
    assert node.handle(got("a", 0, reach=2.0), 2.0) == [compute(1, folded("a", round=0, weight=0.5), reach=2.0)]
    ended = RoundEnded(0, TRAINED, FOLDED, merged=("a",), missing=(), wait_seconds=1.0)
    story = node.handle(computed(1), 3.0)
    assert story[:2] == [Record(ended), Send(("b",), mine(1, reach=2.0))]
    assert story[2:] == [compute(2, folded("b", round=1, weight=0.5), reach=2.0)]
    node.handle(computed(2), 4.0)
    assert words(node.handle(got("b", 2), 4.0)) == ["rejected"]  # the graph of round 2 has no such edge
    assert node.conduct.counts == {"not_a_neighbour": 1}


def test_after_a_broken_link_only_who_was_meant_gets_an_update_again() -> None:
    turns = [Neighbourhood({"a": None}, ("a",)), Neighbourhood({"b": None}, ("b",))]
    node = fresh(neighbourhood=lambda round: turns[round % 2], drift=2)
    for peer in "ab":
        node.handle(up(peer), 0.0)
    node.handle(computed(0), 1.0)
    for peer, lost in (("a", [Send(("a",), mine(0, reach=2.0))]), ("b", [])):
        node.handle(LinkDown(peer), 2.0)
        assert node.handle(up(peer), 2.5)[1:] == lost


def test_who_starts_late_gets_what_was_meant_for_it_however_far_others_are_by_then() -> None:
    turns = [Neighbourhood({"a": None, "b": None}, ("a", "b")), *[Neighbourhood({"a": None}, ("a",))] * 3]
    node = fresh(neighbourhood=lambda round: turns[round % 4], drift=4, join_timeout=1.0, grace=0.0, patience=0.5)
    node.handle(up("a"), 0.0)
    node.handle(Tick(), 1.0)  # without b
    for round in range(3):
        node.handle(computed(round), 2.0 + round)
        node.handle(got("a", round, reach=2.0), 2.0 + round)
    node.handle(computed(3), 5.0)
    assert node.handle(up("b"), 5.5)[1:] == [Send(("b",), mine(0, reach=1.0 + 1.0))]
    node.handle(LinkDown("b"), 5.75)
    assert node.handle(up("b", seen=0), 5.9)[1:] == []


def test_who_only_hears_us_is_told_nothing_but_waited_for_and_whom_we_only_hear_learns_that_we_begin() -> None:
    node = fresh(neighbourhood=one_way("a", tells=("b",)))
    node.handle(up("a"), 0.0)
    assert node.handle(up("b"), 0.0)[1:] == [Send(("a",), Heartbeat(0)), compute(0, reach=2.0)]
    assert node.handle(computed(0), 1.0) == [Send(("b",), mine(0, reach=2.0))]
    assert node.awaited() == ("a",)  # b is at round 0 as we are: it has room for our vector
    both = [Send(("a",), Heartbeat(1)), compute(1, folded("a", round=0, weight=0.5), reach=2.0)]
    assert node.handle(got("a", 0, reach=2.0), 2.0) == both
    node.handle(computed(1), 3.0)
    assert node.handle(got("a", 1, reach=2.0), 3.5) == []
    assert node.awaited() == ("b",)  # which has not begun round 1
    assert node.handle(Received("b", Heartbeat(1)), 4.0)[-1] == compute(2, folded("a", round=1, weight=0.5), reach=2.0)


def test_who_only_hears_us_holds_us_up_no_longer_than_its_patience_and_not_at_all_when_it_left() -> None:
    node = fresh(neighbourhood=one_way("a", tells=("b",)), patience=5.0, join_timeout=5.0)
    for peer in "ab":
        node.handle(up(peer), 0.0)
    for round in range(2):
        node.handle(computed(round), float(round))
        node.handle(got("a", round, reach=2.0), float(round))
    assert (node.round, node.awaited(), node.deadline) == (1, ("b",), 6.0)
    assert isinstance(node.handle(Tick(), 6.0)[-1], Compute)
    node.handle(computed(2), 7.0)
    node.handle(got("a", 2, reach=2.0), 7.0)
    assert node.deadline == 12.0 and node.awaited() == ("b",)  # next it gets three times what it took in vain
    assert isinstance(node.handle(Received("b", Goodbye(2, "leaving")), 8.0)[-1], Compute)


def test_push_sum_portions_its_mass_and_takes_the_mean_by_the_portions_that_came() -> None:
    """Kempe, Dobra, Gehrke 2003, with the vectors themselves (x / w) on the wire."""
    node = fresh(weights="push-sum", neighbourhood=one_way("a", tells=("a", "b")))
    node.handle(up("a"), 0.0)
    job = node.handle(up("b"), 0.0)[-1]
    assert job == Compute(0, (), 1.0, 3.0, True, 1.0, jump=True)  # three portions: its own, a's and b's
    assert node.handle(computed(0), 1.0) == [Send(("a", "b"), Update(0, 1.0, 3.0, "mine0"))]
    (job,) = (e for e in node.handle(got("a", 0, mass=2.0, reach=4.0), 2.0) if isinstance(e, Compute))
    held = 1 / 3 + 2 / 4
    assert job == Compute(1, (Contribution("a", 0, 2 / 4 / held, "a0"),), held, 3.0, True, 1 / held)


def test_push_sum_gives_no_portion_to_whoever_is_not_there() -> None:
    node = fresh(weights="push-sum", neighbourhood=one_way("a", tells=("a", "b")), join_timeout=3.0)
    node.handle(up("a"), 0.0)
    assert node.handle(Tick(), 3.0)[-1] == Compute(0, (), 1.0, 2.0, True, 1.0, jump=True)
    node.handle(up("b"), 3.5)  # too late for this round: a portion more than was cut would make mass
    assert node.handle(computed(0), 4.0) == [Send(("a",), Update(0, 1.0, 2.0, "mine0"))]


@pytest.mark.parametrize(("mass", "reach"), [(1e300, 1.0), (1e-300, 1.0), (1.0, 0.5), (math.inf, 2.0)])
def test_push_sum_refuses_a_mass_that_nobody_can_have(mass: float, reach: float) -> None:
    node = fresh(weights="push-sum", neighbours=("a",))
    node.handle(up("a"), 0.0)
    node.handle(computed(0), 1.0)
    assert node.conduct.counts == {}
    node.handle(got("a", 0, mass=mass, reach=reach), 1.0)
    assert node.conduct.counts == {"bad_mass": 1}


def test_push_sum_whom_nobody_hands_anything_goes_on_for_ever_with_next_to_nothing() -> None:
    node = fresh(weights="push-sum", neighbours=("a",), held_mass=LEAST_MASS, patience=1.0, join_timeout=1.0)
    node.handle(up("a"), 0.0)
    for round in range(3):
        node.handle(computed(round), 10.0 * round)
        (job,) = (e for e in node.handle(Tick(), 10.0 * round + 9.0) if isinstance(e, Compute))
        assert (job.contributions, job.mass, job.step) == ((), LEAST_MASS, MAX_STEP)


def test_push_sum_who_believes_a_liar_is_not_taken_for_one() -> None:
    """Two neighbours claim to hold all rows that there can be, so this one holds more than there can be."""
    node = fresh(weights="push-sum")
    node.handle(up("a"), 0.0)
    node.handle(up("b"), 0.0)
    for round in range(3):
        node.handle(computed(round), 1.0 * round)
        node.handle(got("a", round, mass=MAX_MASS, reach=1.0), 1.0 * round)
        *_, job = node.handle(got("b", round, mass=MAX_MASS, reach=1.0), 1.0 * round)
        assert isinstance(job, Compute) and job.mass == MAX_MASS
        assert sum(c.weight for c in job.contributions) <= 1.0
    assert node.conduct.counts == {}


def test_push_sum_on_a_directed_cycle_with_a_chord_ends_at_the_mean_at_every_node() -> None:
    values = dict(zip("abcde", (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    network = started(Network(cycle_with_a_chord(), values, weights="push-sum", rounds=120), "ecabd", 0.3).run()
    assert [network.peers[name].value for name in "abcde"] == pytest.approx([3.0] * 5, abs=1e-12)
    assert not network.said("rejected") and not network.said("waiting")

    network = Network(cycle_with_a_chord(), values, weights="push-sum-samples", equal_masses=False, rounds=120)
    network.masses = dict(values)
    started(network, "abcde").run()
    assert [network.peers[name].value for name in "abcde"] == pytest.approx([55 / 15] * 5, abs=1e-12)


def test_push_sum_mass_is_never_made_and_only_a_death_loses_any() -> None:
    values = dict(zip("abcde", (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    network = started(Network(cycle_with_a_chord(), values, weights="push-sum", rounds=40), "abcde")
    network.at(20.0, lambda: network.kill("d"))
    network.run()
    last = {n: e.mass for _, n, e in network.trace if isinstance(e, Compute) and e.round == 40}
    assert set(last) == set("abce")
    assert 0 < math.fsum(last.values()) < 5.0
    before = {n: e.mass for t, n, e in network.trace if isinstance(e, Compute) and e.round == 10}
    assert math.fsum(before.values()) == pytest.approx(5.0, abs=1e-12)


SCHEDULES_THAT_END = [
    ("one-peer-exponential", 8, 3, {}),
    ("one-peer-exponential", 16, 4, {}),
    ("one-peer-hypercube", 16, 4, {}),
    ("base-k", 6, 4, {"k": 1}),
    ("base-k", 7, 4, {"k": 2}),
    ("base-k", 12, 2, {"k": 4}),
]


@pytest.mark.parametrize(("graph", "nodes", "rounds", "keys"), SCHEDULES_THAT_END)
def test_graphs_that_end_in_finite_time_do_so_whatever_the_delays(
    graph: str, nodes: int, rounds: int, keys: dict[str, object]
) -> None:
    topology = drawn(graph, nodes, **keys)
    assert topology.period == rounds
    values = {name: float(i * i) for i, name in enumerate(topology.names)}
    weights = "given" if graph == "base-k" else "metropolis"
    network = Network(topology, values, seed=nodes, rounds=rounds, weights=weights)
    network.compute_seconds |= {"a": 3.0, "c": 0.1}  # who is slow holds up, who is fast runs ahead
    started(network, "".join(reversed(topology.names)), 0.2).run()
    mean = math.fsum(values.values()) / nodes
    assert [p.value for p in network.peers.values()] == pytest.approx([mean] * nodes, abs=1e-12 * mean)
    assert not network.said("rejected") and not network.said("suspected")


@pytest.mark.parametrize("graph", ["random-matching", "epidemic", "one-peer-exponential", "base-k"])
@pytest.mark.parametrize("seed", range(3))
def test_where_the_graph_changes_nobody_is_waited_for_in_vain_and_nothing_refused(graph: str, seed: int) -> None:
    topology, random_ = drawn(graph, 9), random.Random(seed)
    weights = {"epidemic": "push-sum", "base-k": "given"}.get(graph, "metropolis")
    network = Network(topology, {n: random_.uniform(-1, 1) for n in topology.names}, seed, rounds=60, weights=weights)
    network.compute_seconds = {name: random_.choice([0.05, 0.5, 1.5]) for name in topology.names}
    total = math.fsum(p for p in network.values.values())
    started(network, "".join(topology.names), 0.1).run()
    assert {n for _, n, e in network.trace if isinstance(e, Done) and e.finished} == set(topology.names)
    for event in ("rejected", "late", "died", "caught_up"):
        assert not network.said(event), event
    ended = [e.entry for _, _, e in network.trace if isinstance(e, Record) and isinstance(e.entry, RoundEnded)]
    assert all(entry.missing == () for entry in ended)
    assert [p.value for p in network.peers.values()] == pytest.approx([total / 9] * 9, abs=1e-3)


def test_where_the_graph_changes_a_death_costs_one_grace_and_who_starts_again_catches_up() -> None:
    topology = drawn("random-matching", 8)
    network = started(Network(topology, dict.fromkeys(topology.names, 1.0), rounds=80), "abcdefgh")
    network.at(10.0, lambda: network.kill("c"))
    network.at(50.0, lambda: network.start("c", epoch=2))
    network.run()
    assert {n for _, n, e in network.trace if isinstance(e, Done) and e.finished} == set("abcdefgh")
    assert [n for _, n, _ in network.said("caught_up")] == ["c"]
    ends = {n: t for t, n, e in network.trace if isinstance(e, Done)}
    assert max(ends.values()) - min(ends.values()) < 5.0


# -- Survivors rewire ------------------------------------------------------------------------------------------------


def section(graph: str, nodes: int = 8, **keys: object) -> TopologySection:
    return TopologySection.model_validate({"graph": graph, "nodes": list("abcdefghijklmnop"[:nodes]), **keys})


def last_fold(network: Network, name: str) -> Compute:
    return [e for _, n, e in network.trace if n == name and isinstance(e, Compute)][-1]


@pytest.mark.parametrize("victim", "adh")
def test_survivors_of_a_ring_close_it_and_pay_one_grace(victim: str) -> None:
    values = {name: float(i) for i, name in enumerate("abcdefgh")}
    ends = {}
    for killed in (False, True):
        network = started(Network(section("ring"), values, rounds=60), "abcdefgh")
        if killed:
            network.at(8.3, lambda network=network: network.kill(victim))  # type: ignore[misc]
        network.run()
        ends[killed] = {n: t for t, n, e in network.trace if isinstance(e, Done) and e.finished}
    alive = "abcdefgh".replace(victim, "")
    assert set(ends[True]) == set(alive)
    assert max(ends[True].values()) <= max(ends[False].values()) + 1.0 + 0.5  # one grace, and other delays drawn
    for i, name in enumerate(alive):
        around = {alive[i - 1], alive[(i + 1) % 7]}
        assert {c.peer for c in last_fold(network, name).contributions} == around
        assert all(c.weight == pytest.approx(1 / 3) for c in last_fold(network, name).contributions)
    rewired = network.said("rewired")
    assert {n for _, n, _ in rewired} == set(alive) and len(rewired) == 7
    assert all(h.fields["gone"] == (victim,) and 18.0 < t < 22.0 for t, _, h in rewired)  # suspicion: 10 s
    assert not network.said("rejected")


def test_a_member_that_starts_again_gets_its_place_back() -> None:
    network = started(Network(section("ring"), dict.fromkeys("abcdefgh", 1.0), rounds=90), "abcdefgh")
    network.at(8.3, lambda: network.kill("c"))
    network.at(40.0, lambda: network.start("c", epoch=2))
    network.run()
    assert {n for _, n, e in network.trace if isinstance(e, Done) and e.finished} == set("abcdefgh")
    assert [n for _, n, _ in network.said("caught_up")] == ["c"]
    back = [n for _, n, h in network.said("rewired") if h.fields["back"] == ("c",)]
    assert sorted(back) == list("abdefgh")
    for name, around in (("b", "ac"), ("c", "bd"), ("d", "ce")):
        assert {c.peer for c in last_fold(network, name).contributions} == set(around)


def test_both_sides_of_a_cut_go_on_and_merge_when_it_heals() -> None:
    values = {name: float(i) for i, name in enumerate("abcdefgh")}
    network = started(Network(section("ring"), values, rounds=150), "abcdefgh")
    network.at(8.3, lambda: network.part("abcd", "efgh"))
    network.at(60.0, lambda: network.part())
    network.run()
    assert {n for _, n, e in network.trace if isinstance(e, Done) and e.finished} == set("abcdefgh")
    gone = [h.fields["gone"] for t, n, h in network.said("rewired") if n == "a" and t < 60]
    assert sorted(itertools.chain(*gone)) == list("efgh")
    assert {c.peer for c in last_fold(network, "a").contributions} == {"b", "h"}
    assert [p.value for p in network.peers.values()] == pytest.approx([3.5] * 8, abs=0.05)


def test_half_of_sixteen_die_at_once_and_the_others_go_on_in_a_graph_of_their_own() -> None:
    names = "abcdefghijklmnop"
    network = started(Network(section("random-regular", 16), dict.fromkeys(names, 1.0), rounds=80), names)
    for name in names[::2]:
        network.at(9.3, lambda name=name: network.kill(name))  # type: ignore[misc]
    network.run()
    assert {n for _, n, e in network.trace if isinstance(e, Done) and e.finished} == set(names[1::2])
    assert all(len(last_fold(network, name).contributions) == 4 for name in names[1::2])


def test_in_a_graph_drawn_by_hand_the_neighbours_of_the_dead_are_joined() -> None:
    star = [["hub", name] for name in ("a", "b", "c", "d")]
    by_hand = TopologySection.model_validate({"nodes": ["hub", "a", "b", "c", "d"], "edges": star})
    values = {"hub": 9.0, "a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    network = started(Network(by_hand, values, rounds=60), ["hub", "a", "b", "c", "d"])
    network.at(3.5, lambda: network.kill("hub"))
    network.run()
    ends = [network.peers[name].value for name in "abcd"]
    assert max(ends) - min(ends) < 1e-6
    assert {c.peer for c in last_fold(network, "a").contributions} == {"b", "d"}


def drawn_by(members: tuple[str, ...]) -> Wiring:
    """A complete graph over those who live, with the weights of that graph."""
    others = tuple(name for name in members if name != "me")
    return Wiring(others, lambda _round: Neighbourhood(dict.fromkeys(others, 1 / len(members)), others))


def test_the_dead_are_sought_by_those_who_follow_them() -> None:
    members = ("a", "b", "c", "d", "me")
    node = fresh(neighbours=("a", "b", "c", "d"), members=members, wiring=drawn_by, grace=1.0, suspicion=2.0)
    for name in "abcd":
        node.handle(up(name), 0.0)
    news = tuple(MemberRecord(name, 1, 0, address=f"tcp://{name}:1") for name in "abc")
    node.handle(Received("d", Gossip(news, ())), 0.0)
    for name in "abc":
        node.handle(LinkDown(name), 0.0)
    node.handle(Tick(), 1.0)  # they are missed, and suspected
    effects = node.handle(computed(0), 3.0) + node.handle(got("d", 0), 3.0)
    assert "rewired" in words(effects)
    # After a, b and c come d and me, after d me and d again: all of them are sought by both who are left.
    assert [e for e in effects if isinstance(e, Connect)] == [Connect(name, f"tcp://{name}:1") for name in "abc"]


@pytest.mark.parametrize("alike", [True, False])
def test_weights_of_the_whole_graph_need_two_ends_that_mean_the_same_graph(alike: bool) -> None:
    """Or an edge would weigh 1/3 at one end and 1/2 at the other, and the mean would move."""
    node = fresh(members=("a", "b", "me"), wiring=drawn_by, weights="max-degree")
    for name in "ab":
        node.handle(up(name), 0.0)
    node.handle(computed(0), 0.0)
    node.handle(got("a", 0, reach=graph_reach(0)), 0.0)
    effects = node.handle(got("b", 0, reach=graph_reach(0 if alike else view_of(("b", "me"), ("a", "b", "me")))), 0.0)
    (job,) = [e for e in effects if isinstance(e, Compute)]
    assert [c.peer for c in job.contributions] == (["a", "b"] if alike else ["a"])


def test_where_push_sum_has_lost_nearly_all_mass_training_stays_stable() -> None:
    ways = {"neighbours": ("a",), "neighbourhood": one_way("a", tells=("a",)), "weights": "push-sum"}
    node = fresh(**ways, held_mass=1e-6)
    (job,) = [e for e in node.handle(up("a"), 0.0) if isinstance(e, Compute)]
    assert job.step == 10.0
    (job,) = [e for e in fresh(**ways, held_mass=0.5).handle(up("a"), 0.0) if isinstance(e, Compute)]
    assert job.step == 2.0


# -- Two ways, or not at all -----------------------------------------------------------------------------------------


def test_a_receipt_is_sent_for_what_came_in_time_and_a_fold_waits_for_those_of_the_others() -> None:
    node = collecting(two_way=True)
    node.round = 1
    assert node.handle(got("a", 1), 1.0) == [Send(("a",), Receipt(1))]
    assert node.handle(got("b", 1), 1.5) == [Send(("b",), Receipt(1))]
    assert node.awaited() == ("a", "b")
    assert node.handle(Received("a", Receipt(0)), 1.5) == []  # of another round
    assert node.handle(Received("b", Receipt(1)), 1.75) == []
    assert node.handle(Received("a", Receipt(1)), 2.0) == [compute(2, folded("a", "b", round=1))]


def test_without_a_receipt_an_edge_does_not_count_and_its_weight_stays_at_home() -> None:
    node = collecting(two_way=True, patience=5.0)
    for peer in "ab":
        node.handle(got(peer, 1), 1.0)
    node.handle(Received("a", Receipt(1)), 1.0)
    assert [e for e in node.handle(Tick(), 5.0) if isinstance(e, Compute)] == [compute(2, folded("a", round=1))]
    ended = [e for e in node.handle(computed(2), 5.0) if isinstance(e, Record)]
    assert ended[0].entry == RoundEnded(1, TRAINED, FOLDED, merged=("a",), missing=("b",), wait_seconds=5.0)


def test_who_never_confirms_is_waited_for_three_times_and_then_no_more_until_it_does() -> None:
    node, waits, now = collecting(two_way=True, patience=5.0, silence=60.0), [], 0.0
    for round in range(1, 12):
        for peer in "ab":
            node.handle(got(peer, round), now)
        began = now
        effects = node.handle(Received("a", Receipt(round)), now)
        if round >= 8:  # b has learnt to say it
            effects += node.handle(Received("b", Receipt(round)), now)
        while not [e for e in effects if isinstance(e, Compute)]:
            assert node.deadline is not None
            now = node.deadline
            effects = node.handle(Tick(), now)
        waits.append(now - began)
        (job,) = (e for e in effects if isinstance(e, Compute))
        assert [c.peer for c in job.contributions] == (["a"] if round < 8 else ["a", "b"] if round > 8 else ["a"])
        node.handle(computed(round + 1), now)
    assert waits == [5.0] * 3 + [0.0] * 8


def test_an_update_that_comes_early_is_confirmed_once_its_round_has_begun() -> None:
    """Until then one does not know on which graph it will be folded."""
    node = collecting(two_way=True)
    for peer in "ab":
        node.handle(Received(peer, Receipt(1)), 1.0)
    node.handle(got("a", 1), 1.0)
    assert node.handle(got("a", 2), 1.5) == []
    assert node.handle(got("b", 1), 2.0)[-2:] == [Send(("a",), Receipt(2)), compute(2, folded("a", "b", round=1))]


def test_an_edge_counts_only_where_both_ends_fold_on_one_graph_and_nobody_waits_for_that() -> None:
    node = collecting(two_way=True)
    for peer in "ab":
        node.handle(got(peer, 1), 1.0)
    node.handle(Received("a", Receipt(1, view=7)), 1.5)  # it takes somebody for dead of whom this node has not heard
    assert node.handle(Received("b", Receipt(1)), 2.0) == [compute(2, folded("b", round=1))]


def test_who_sees_a_new_graph_when_its_round_begins_says_so_and_that_counts() -> None:
    """It had confirmed the same round before it began, on the graph that it saw then."""
    node = collecting(two_way=True)
    for peer in "ab":
        node.handle(got(peer, 1), 1.0)
        node.handle(Received(peer, Receipt(1, 7)), 1.0) if peer == "a" else None
    node.handle(Received("a", Receipt(1, 0)), 1.5)
    assert node.handle(Received("b", Receipt(1, 0)), 2.0)[-1] == compute(2, folded("a", "b", round=1))


def test_when_members_come_or_go_corrections_begin_anew_and_receipts_tell_of_the_new_graph() -> None:
    def ring_of(living: tuple[str, ...]) -> Wiring:
        others = tuple(name for name in living if name != "me")
        return Wiring(others, lambda _round: Neighbourhood(dict.fromkeys(others), others))

    node = fresh(members=("a", "b", "me"), wiring=ring_of, two_way=True, grace=1.0, suspicion=2.0)
    for peer in "ab":
        node.handle(up(peer), 0.0)
    node.handle(computed(0), 0.0)
    node.handle(got("a", 0), 0.0)
    node.handle(LinkDown("b"), 0.0)
    jobs = []
    for second in range(1, 8):  # b is dead to the grace after one second, and to the graph two seconds later
        now = float(second)
        node.handle(got("a", node.round), now)
        effects = node.handle(Received("a", Receipt(node.round, node._view)), now)
        effects += node.handle(Tick(), now) + node.handle(computed(node.round), now)
        jobs += [effect for effect in effects if isinstance(effect, Compute)]
    assert [job.restart for job in jobs].count(True) == 1
    (rewired,) = (job for job in jobs if job.restart)
    assert rewired.reach == 2.0
    assert node.handle(got("a", node.round), 9.0) == [Send(("a",), Receipt(node.round, node._view))]
    assert node._view != 0


def test_with_fewer_vectors_than_a_rule_needs_nothing_is_mixed_and_that_is_said() -> None:
    node = collecting(least=3, grace=1.0)
    node.handle(got("a", 1), 0.5)
    node.handle(LinkDown("b"), 0.5)
    effects = node.handle(Tick(), 1.5)
    assert effects[-2:] == [said("too_few", round=1, came=1, needed=2), compute(2)]
    ended = [e for e in node.handle(computed(2), 2.0) if isinstance(e, Record)]
    assert ended[0].entry == RoundEnded(1, TRAINED, FOLDED, merged=(), missing=("a", "b"), wait_seconds=1.5)


@pytest.mark.parametrize(("two_way", "kept"), [(True, True), (False, False)])
def test_with_one_way_losses_only_two_way_edges_keep_the_mean(two_way: bool, kept: bool) -> None:
    """algorithms §3.3: an update that comes one way only moves the mean by w (x_a - x_b) / n."""
    values = dict(zip("abcd", (0.0, 1.0, 2.0, 5.0), strict=True))
    network = Network(ring(4), values, seed=1, rounds=1, two_way=two_way, join_timeout=2.0, patience=1.0)
    network.lose = lambda sender, receiver, message: isinstance(message, Update) and (sender, receiver) == ("b", "a")
    started(network, "abcd").run()
    mean = math.fsum(p.value for p in network.peers.values()) / 4
    assert (mean == pytest.approx(2.0, abs=1e-15)) is kept
    if not kept:
        assert mean == pytest.approx(2.0 - 1 / 12, abs=1e-15)


# -- Whatever happens ------------------------------------------------------------------------------------------------

PEERS = st.sampled_from(["a", "b", "c", "stranger"])
ROUNDS = st.integers(0, 12) | st.sampled_from([MAX_ROUND])
MASSES = st.sampled_from([1.0, 1.0, 1.0, 7.0, 1e308])
CODES = st.sampled_from(["bad_value", "duplicate", "equivocation", "stale"])
STEPS = st.one_of(
    st.builds(LinkUp, PEERS, st.integers(1, 3), ROUNDS, MASSES, st.integers(-1, 12)),
    st.builds(LinkDown, PEERS),
    st.builds(Received, PEERS, st.builds(Heartbeat, ROUNDS)),
    st.builds(Received, PEERS, st.builds(Receipt, ROUNDS)),
    st.builds(Received, PEERS, st.builds(Goodbye, ROUNDS, st.sampled_from(["finished", "leaving"]))),
    st.builds(Rejected, PEERS, CODES, st.just("why"), round=st.integers(-1, 12)),
    st.builds(lambda peer, ahead, mass: (peer, ahead, mass), PEERS, st.integers(-2, 4), MASSES),  # an update
    st.builds(lambda peer, ahead, mass: (peer, ahead, mass), PEERS, st.integers(-2, 4), MASSES),
    st.just("computed"),
    st.just("computed"),
    st.just(Tick()),
)
TURNS = (
    Neighbourhood({"a": None, "b": None}, ("a", "b")),
    Neighbourhood({"c": None}, ("c",)),
    Neighbourhood({"a": None}, ("b", "c")),
    Neighbourhood({}, ()),
)
PAUSES = st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0, 2.7, 6.0, 3600.0]) | st.floats(0, 10)


@given(
    steps=st.lists(st.tuples(PAUSES, STEPS), max_size=60),
    staleness=st.sampled_from([0, 0, 1, 2, math.inf]),
    equal=st.booleans(),
    open_to_all=st.booleans(),
    first=st.sampled_from([0, 3]),
    leave=st.booleans(),
    graph=st.sampled_from([None, TURNS[2:3], TURNS]),
    weights=st.sampled_from(["metropolis", "lazy", "uniform-neighbours", "push-sum"]),
    two_way=st.booleans(),
)
@settings(max_examples=1000, deadline=None, print_blob=True)
def test_whatever_happens(
    steps: list[tuple[float, object]],
    staleness: float,
    equal: bool,
    open_to_all: bool,
    first: int,
    leave: bool,
    graph: tuple[Neighbourhood, ...] | None,
    weights: str,
    two_way: bool,
) -> None:
    """Never an error, a step back, a double or invented contribution, more than a mean, a wait without an end."""
    names = ("a", "b", "c")
    in_step = graph is not None or two_way or weights == "push-sum"
    known = Settings(
        "me",
        9,
        names,
        open=open_to_all and graph is None,
        neighbourhood=None if graph is None else lambda round: graph[round % len(graph)],
        drift=len(graph or "1"),
        weights=weights,
        two_way=two_way,
        equal_masses=equal,
        staleness=0 if in_step else staleness,
        first_round=first,
    )
    node = Node(known, 0.0)
    now, serial = 0.0, itertools.count()
    delivered: dict[object, tuple[str, int]] = {}
    folded_before: set[object] = set()
    job: Compute | None = None
    for pause, step in steps:
        now += pause
        event: Event
        if step == "computed":
            if job is None:
                continue
            event = computed(job.round) if job.train else Computed(job.round, FOLDED, None, None)
        elif isinstance(step, tuple):
            peer, ahead, mass = step
            vector = next(serial)
            event = Received(peer, Update(max(0, node.round + ahead), mass, 3.0, vector))
            delivered[vector] = (peer, max(0, node.round + ahead))
        else:
            event = step  # type: ignore[assignment]
        before, counts = node.round, sum(node.conduct.counts.values())
        effects = node.handle(event, now)
        note(f"{now} {event} -> {effects}")
        if step == "computed":
            job = None
        assert node.round >= before
        assert sum(node.conduct.counts.values()) <= counts + 1
        jobs = [e for e in effects if isinstance(e, Compute)]
        for new in jobs:
            assert job is None, "two jobs at once"
            job = new
            used = [c.vector for c in new.contributions]
            assert not folded_before & set(used) and len(set(used)) == len(used)
            folded_before |= set(used)
            assert all(delivered[c.vector] == (c.peer, c.round) for c in new.contributions)
            assert [c.peer for c in new.contributions] == sorted({c.peer for c in new.contributions})
            assert math.fsum(c.weight for c in new.contributions) <= 1 + 1e-12
            assert new.mass > 0 and new.step > 0
            if graph is not None and "caught_up" not in words(effects):
                assert {c.peer for c in new.contributions} <= set(graph[(new.round - 1) % len(graph)].hears)
            assert math.isfinite(new.reach) and first <= new.round <= 9
        assert all(len(n.updates) <= 2 for n in node.neighbours.values())
        if node.phase is Phase.DONE:
            assert node.deadline is None
            return
        assert node.deadline is not None and now < node.deadline < math.inf
        assert (node.phase is Phase.COMPUTING) == (job is not None)
    if leave:
        effects = node.handle(Leave(), now)
        if job is not None:
            effects = node.handle(computed(job.round) if job.train else Computed(job.round, FOLDED, None, None), now)
        assert isinstance(effects[-1], Done) and node.deadline is None
        return
    # From wherever it is, time alone brings it on: nobody can keep it waiting for ever.
    for _ in range(20_000):
        if node.phase is Phase.COMPUTING:
            break
        assert node.deadline is not None
        now = node.deadline
        node.handle(Tick(), now)
        assert node.deadline is not None and node.deadline > now
    else:
        pytest.fail("it waits for ever")


def test_leaving_at_once_does_not_wait_for_what_is_being_computed() -> None:
    node = Node(Settings("a", rounds=3, neighbours=("b",)), now=0.0)
    node.handle(LinkUp("b", epoch=1, round=0, mass=1.0, seen=-1), 0.0)
    assert node.phase is Phase.COMPUTING
    assert node.handle(Leave(at_once=True), 1.0) == [
        Send(("b",), Goodbye(0, "leaving")),
        Record(Happened("left", {"round": 0})),
        Done(False),
    ]
