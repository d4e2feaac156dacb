"""Whom a node asks for a sum, whom it gives to, and how a round ends if somebody is lost: stories with exact times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pfl.gathering import Gatherings
from p2pfl.messages import (
    BadMessage,
    Compute,
    Computed,
    Conceal,
    Concealed,
    Contribution,
    Done,
    Effect,
    Folded,
    Gathering,
    Goodbye,
    Happened,
    Heartbeat,
    Leave,
    LinkDown,
    LinkUp,
    MaskKey,
    Received,
    Record,
    RoundEnded,
    Scores,
    Send,
    Tick,
    Trained,
    Update,
)
from p2pfl.node import Node, Phase, Settings

SCORES = Scores({"loss": 0.5})
TRAINED = Trained(0.5, SCORES, 1.0, 0.25)
FOLDED = Folded(SCORES, 2.0, 0.125, 0.25)
NEVER = 1e9  # seconds
PEERS = ("a", "b", "c", "d")


def key(name: str, epoch: int = 1) -> MaskKey:
    return MaskKey(name, epoch, name.encode().ljust(32), b"s" * 64)


def asks(round: int, *names: str, reach: float = 5.0, gives: bool = True) -> Gathering:
    return Gathering(round, 1.0, reach, gives, tuple(key(name) for name in sorted(names)))


MINE = asks(0, *PEERS)


def computed(round: int) -> Computed:
    return Computed(round, FOLDED if round else None, TRAINED, "withheld")


def part(peer: str, round: int, reach: float = 5.0) -> Received:
    return Received(peer, Update(round, 1.0, reach, f"{peer}{round}"))


def started(**changes: object) -> Node:
    """A node "me" at time 0 that has met a, b, c and d, and computes round 0."""
    quiet = Settings("me", 100, PEERS, heartbeat=NEVER, silence=NEVER, mask_key=key("me"), join_timeout=NEVER)
    node = Node(replace(quiet, **changes), 0.0)  # type: ignore[arg-type]
    for name in PEERS:
        node.handle(LinkUp(name, 1, 0, 1.0, -1), 0.0)
        assert node.phase is Phase.JOINING
        node.handle(Received(name, key(name)), 0.0)
    assert (node.phase, node.round) == (Phase.COMPUTING, 0)
    return node


def collecting(round: int = 0, **changes: object) -> Node:
    """The same, everybody always in time, when it has trained for this round and nobody's part of it has come."""
    node = started(**changes)
    for r in range(round + 1):
        for name in PEERS:
            node.handle(Received(name, asks(r, *(set(PEERS) - {name}), "me")), 0.0)
        for effect in node.handle(computed(r), 0.0):
            if isinstance(effect, Conceal):
                node.handle(Concealed(effect, f"part for {effect.peer}"), 0.0)
        if r < round:
            for name in PEERS:
                node.handle(part(name, r), 0.0)
    assert (node.phase, node.round) == (Phase.COLLECTING, round)
    return node


def of(effects: list[Effect], kind: type[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def events(effects: list[Effect]) -> list[str]:
    return [e.entry.event for e in effects if isinstance(e, Record) and isinstance(e.entry, Happened)]


# -- A round in which nothing goes wrong -----------------------------------------------------------------------------


def test_it_begins_with_everybody_s_key_and_asks_all_for_their_sum_before_it_trains() -> None:
    node = Node(Settings("me", 5, PEERS, mask_key=key("me"), heartbeat=NEVER, silence=NEVER), 0.0)
    assert node.handle(LinkUp("a", 1, 0, 1.0, -1), 0.0)[-1] == Send(("a",), key("me"))
    for name in PEERS[1:]:
        node.handle(LinkUp(name, 1, 0, 1.0, -1), 0.0)
    for name in PEERS[:3]:
        assert not of(node.handle(Received(name, key(name)), 0.0), Compute)
    effects = node.handle(Received("d", key("d")), 0.0)
    assert of(effects, Send) == [Send(PEERS, MINE)]
    assert of(effects, Compute) and effects.index(of(effects, Send)[0]) < effects.index(of(effects, Compute)[0])


def test_each_who_asked_gets_its_part_with_its_weight_once_it_has_trained_and_nobody_gets_the_vector() -> None:
    node = started()
    for name, reach in zip(PEERS, (5.0, 4.0, 8.0, 5.0), strict=True):
        effects = node.handle(Received(name, asks(0, *(set(PEERS) - {name}), "me", reach=reach)), 0.0)
        assert not of(effects, Conceal) and not of(effects, Send)
    effects = node.handle(computed(0), 1.0)
    assert not of(effects, Send)
    jobs = of(effects, Conceal)
    assert [(j.peer, j.weight, j.round) for j in jobs if isinstance(j, Conceal)] == [
        ("a", 1 / 5, 0), ("b", 1 / 5, 0), ("c", 1 / 8, 0), ("d", 1 / 5, 0),
    ]  # fmt: skip  # Metropolis: 1 / max(S_i, S_j)
    sent = [node.handle(Concealed(job, f"for {job.peer}"), 1.0) for job in jobs if isinstance(job, Conceal)]
    assert [e for effects in sent for e in effects] == [
        Send((name,), Update(0, 1.0, 5.0, f"for {name}")) for name in PEERS
    ]


def test_a_request_that_comes_after_training_is_answered_at_once() -> None:
    node = started()
    node.handle(computed(0), 0.0)
    effects = node.handle(Received("a", asks(0, "b", "c", "me")), 1.0)
    assert [job.peer for job in of(effects, Conceal) if isinstance(job, Conceal)] == ["a"]


def test_the_sum_is_folded_when_the_last_part_has_come() -> None:
    node = collecting()
    for name in PEERS[:3]:
        assert not of(node.handle(part(name, 0), 1.0), Compute)
    (job,) = of(node.handle(part("d", 0), 1.0), Compute)
    assert isinstance(job, Compute)
    assert job.contributions == tuple(Contribution(n, 0, 1 / 5, f"{n}0", gain=1 / 5) for n in PEERS)
    assert (job.round, job.jump) == (1, False)


def test_no_part_of_another_round_is_ever_asked_or_given() -> None:
    node = collecting(3)
    assert node.gathering == replace(MINE, round=3)
    for round in (0, 2):
        assert not of(node.handle(Received("a", asks(round, "b", "c", "me")), 1.0), Conceal)
    assert not of(node.handle(Received("a", asks(4, "b", "c", "me")), 1.0), Conceal)  # when it is its turn


# -- Nobody answers twice --------------------------------------------------------------------------------------------


def test_no_second_sum_of_a_round_is_given_whatever_set_it_names() -> None:
    node = started()
    node.handle(computed(0), 0.0)
    assert of(node.handle(Received("a", asks(0, "b", "c", "me")), 1.0), Conceal)
    assert not of(node.handle(Received("a", asks(0, "c", "d", "me")), 1.0), Conceal)
    assert not of(node.handle(Received("a", asks(0, "b", "c", "me")), 1.0), Conceal)


def test_not_even_if_the_receiver_says_that_it_has_started_again() -> None:
    node = started()
    node.handle(computed(0), 0.0)
    assert of(node.handle(Received("a", asks(0, "b", "c", "me")), 1.0), Conceal)
    node.handle(LinkDown("a"), 1.0)
    node.handle(LinkUp("a", 2, 0, 1.0, -1), 1.1)
    node.handle(Received("a", key("a", 2)), 1.1)
    assert not of(node.handle(Received("a", asks(0, "c", "d", "me")), 1.2), Conceal)


@pytest.mark.parametrize("names", [("me",), ("b", "me"), ("a", "b", "me")], ids=["1", "2", "itself"])
def test_a_sum_in_which_one_could_not_hide_is_refused_and_counted(names: tuple[str, ...]) -> None:
    """algorithms §1.6: three senders or more. Of two, each would learn the other's vector from the receiver's."""
    node = started()
    node.handle(computed(0), 0.0)
    effects = node.handle(Received("a", asks(0, *names)), 1.0)
    assert not of(effects, Conceal) and events(effects) == ["rejected"]
    assert node.conduct.counts == {"bad_gathering": 1}


def test_a_sum_of_others_or_of_an_older_process_of_ours_is_not_answered() -> None:
    node = started()
    node.handle(computed(0), 0.0)
    assert not of(node.handle(Received("a", asks(0, "b", "c", "d")), 1.0), Conceal)
    older = Gathering(0, 1.0, 5.0, True, (key("b"), key("c"), key("me", epoch=7)))
    assert not of(node.handle(Received("a", older), 1.0), Conceal)


def test_another_s_mask_key_is_refused_and_that_of_an_ended_process_is_not_used() -> None:
    gatherings = Gatherings(key("me"))
    with pytest.raises(BadMessage, match=r"^bad_record: the mask key of b, sent by a"):
        gatherings.introduced("a", key("b"), 1)
    gatherings.introduced("a", key("a", epoch=1), 2)
    assert gatherings.keys == {}


# -- Somebody is lost ------------------------------------------------------------------------------------------------


def test_a_sender_that_dies_before_the_round_is_not_asked() -> None:
    node = collecting()
    node.handle(LinkDown("d"), 0.0)
    for name in PEERS[:3]:
        node.handle(part(name, 0), 0.5)
    effects = node.handle(Tick(), 1.0)  # its grace is over: the sum of round 0 had counted on it
    assert events(effects) == ["died", "no_sum"] and node.round == 1
    assert node.gathering == asks(1, "a", "b", "c")


def test_a_sender_that_dies_after_it_was_asked_costs_the_others_that_sum_and_no_more_than_its_grace() -> None:
    """What the others sent is noise without its part: none of it is folded, and the round ends."""
    node = collecting(2)
    for name in PEERS[:3]:
        node.handle(part(name, 2), 0.0)
    node.handle(LinkDown("d"), 0.25)
    assert node.deadline == 1.25
    effects = node.handle(Tick(), 1.25)
    (job,) = of(effects, Compute)
    assert isinstance(job, Compute) and (job.round, job.contributions) == (3, ())
    assert events(effects) == ["died", "no_sum"]


def test_a_sender_that_dies_after_its_part_came_costs_nothing() -> None:
    node = collecting(2)
    node.handle(part("d", 2), 0.0)
    node.handle(LinkDown("d"), 0.25)
    for name in PEERS[:3]:
        effects = node.handle(part(name, 2), 0.5)
    (job,) = of(effects, Compute)
    assert isinstance(job, Compute) and [c.peer for c in job.contributions] == list(PEERS)


def test_a_sender_that_has_started_again_has_another_key_so_its_old_part_is_not_waited_for() -> None:
    node = collecting(2)
    for name in PEERS[:3]:
        node.handle(part(name, 2), 0.0)
    node.handle(LinkDown("d"), 0.25)
    effects = node.handle(LinkUp("d", 2, 2, 1.0, -1), 0.5)
    assert "no_sum" in events(effects) and node.round == 3
    assert node.gathering == asks(3, "a", "b", "c")  # until it has said its new key


def test_a_slow_sender_is_waited_for_as_long_as_its_patience_and_then_the_sum_is_given_up() -> None:
    node = collecting(2, patience=5.0)
    for name in PEERS[:3]:
        node.handle(part(name, 2), 0.0)
    story = []
    while node.phase is Phase.COLLECTING and node.deadline is not None:
        now = node.deadline
        story += [(now, event) for event in events(node.handle(Tick(), now))]
    assert story[-1] == (5.0, "no_sum")


def test_a_part_that_was_refused_breaks_the_sum() -> None:
    """It weighs another mass than its sender's hello said: that is counted, and what the others sent is noise."""
    node = collecting(2)
    node.handle(Received("d", Update(2, 3.0, 5.0, "d2")), 0.0)
    for name in PEERS[:3]:
        effects = node.handle(part(name, 2), 0.0)
    assert node.round == 3 and not any(job.contributions for job in of(effects, Compute) if isinstance(job, Compute))


def test_two_that_are_left_do_not_ask_each_other_but_keep_in_step() -> None:
    node = collecting(2)
    effects = node.handle(Received("c", Goodbye(2, "leaving")), 0.0)
    assert "no_sum" in events(effects) and node.gathering == asks(3, "a", "b", "d")
    node.handle(Received("d", Goodbye(3, "leaving")), 0.0)
    node.handle(computed(3), 0.0)
    assert node.awaited() == ("a", "b")  # neither has begun round 3, so both may still need its part of it
    node.handle(Received("a", asks(3)), 1.0)
    assert node.awaited() == ("b",)
    effects = node.handle(Received("b", asks(3)), 2.0)
    assert "no_sum" in events(effects) and node.gathering == asks(4)
    node.handle(computed(4), 3.0)
    for name in ("a", "b"):
        effects = node.handle(Received(name, asks(4)), 4.0)
    assert events(effects) == ["too_few"] and node.round == 5


def test_whose_link_breaks_and_comes_back_is_told_and_given_again_what_it_may_have_missed() -> None:
    node = collecting(2)
    node.handle(LinkDown("a"), 0.0)
    effects = node.handle(LinkUp("a", 1, 2, 1.0, 1), 0.5)
    assert of(effects, Send) == [
        Send(("a",), key("me")),
        Send(("a",), replace(MINE, round=2)),
        Send(("a",), Update(2, 1.0, 5.0, "part for a")),
    ]


# -- Who comes late --------------------------------------------------------------------------------------------------


def test_who_comes_late_first_takes_a_mean_and_gives_only_then() -> None:
    """What it has is no model yet: it goes to the others' round, takes the mean of a sum in place of its own, and says
    in the meantime that it cannot be asked."""
    node = started()
    for name in PEERS:
        effects = node.handle(Received(name, asks(40, *(set(PEERS) - {name}), reach=5.0)), 1.0)
    node.handle(computed(0), 1.0)
    assert (node.round, node.gathering) == (40, asks(40, *PEERS, gives=False))
    for name in PEERS:
        node.handle(Received(name, asks(40, *(set(PEERS) - {name}), "me")), 1.0)
    assert not of(node.handle(computed(40), 1.0), Conceal)
    for name in PEERS:
        effects = node.handle(part(name, 40), 2.0)
    (job,) = of(effects, Compute)
    assert isinstance(job, Compute) and job.jump and sum(c.weight for c in job.contributions) == pytest.approx(1.0)
    assert node.gathering == asks(41, *PEERS)


def test_who_says_that_it_cannot_give_is_not_asked() -> None:
    node = collecting(1)
    node.handle(Received("d", asks(2, "a", "b", "c", gives=False)), 0.0)
    for name in PEERS:
        node.handle(part(name, 1), 0.0)
    assert node.gathering == asks(2, "a", "b", "c")
    for effect in node.handle(computed(2), 0.0):
        assert not isinstance(effect, Conceal)
    for name in PEERS[:3]:
        for effect in node.handle(Received(name, asks(2, *(set(PEERS) - {name}), "me")), 0.0):
            if isinstance(effect, Conceal):
                node.handle(Concealed(effect, "part"), 0.0)
    node.handle(Received("d", asks(3, "a", "b", "c")), 0.0)
    for name in PEERS[:3]:
        node.handle(part(name, 2), 0.0)
    assert node.gathering == asks(3, *PEERS)


# -- What a receiver may not ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mass", "reach"), [(1.0, 1.5), (1.0, 5e-324), (2.0, 5.0)])
def test_no_sum_is_given_by_weights_that_the_receiver_cannot_honestly_have(mass: float, reach: float) -> None:
    """Its reach holds its own mass and ours, and its mass is that of its hello: or it would weigh us as it likes."""
    node = started()
    node.handle(computed(0), 0.0)
    effects = node.handle(Received("a", replace(asks(0, "b", "c", "me", reach=reach), mass=mass)), 1.0)
    assert not of(effects, Conceal) and node.conduct.counts == {"bad_gathering": 1}


def test_no_sum_is_given_with_members_that_are_no_neighbours_of_the_receiver() -> None:
    """It could take two from anywhere that tell it their vectors, and take those off."""
    around = {"a": ("b", "c", "me"), "b": ("a", "d", "me")}
    node = started(senders=lambda living, receiver: around[receiver])
    node.handle(computed(0), 0.0)
    assert of(node.handle(Received("a", asks(0, "b", "c", "me")), 1.0), Conceal)
    assert not of(node.handle(Received("b", asks(0, "a", "c", "me")), 1.0), Conceal)
    assert node.conduct.counts == {"bad_gathering": 1}


def test_who_sees_other_members_living_gets_nothing_and_is_not_to_blame() -> None:
    node = started(senders=lambda living, receiver: ("b", "me"))
    node.handle(computed(0), 0.0)
    node.neighbours["a"].view = 7
    assert not of(node.handle(Received("a", asks(0, "b", "c", "me")), 1.0), Conceal)
    assert node.conduct.counts == {}


# -- While parts are being made --------------------------------------------------------------------------------------


def test_the_round_does_not_end_before_the_own_parts_are_made_and_nothing_spins_meanwhile() -> None:
    node = started(heartbeat=1.0)
    node.handle(Received("a", asks(0, "b", "c", "me")), 0.0)
    (job,) = of(node.handle(computed(0), 0.0), Conceal)
    for name in PEERS:
        assert not of(node.handle(part(name, 0), 0.5), Compute)
    assert node.deadline == 1.0
    assert isinstance(job, Conceal)
    effects = node.handle(Concealed(job, "part"), 0.75)
    assert of(effects, Send)[0] == Send(("a",), Update(0, 1.0, 5.0, "part")) and of(effects, Compute)


def test_a_part_that_cannot_be_made_is_the_receiver_s_mistake_and_ends_no_round() -> None:
    node = started()
    node.handle(Received("a", asks(0, "b", "c", "me")), 0.0)
    (job,) = of(node.handle(computed(0), 0.0), Conceal)
    assert isinstance(job, Conceal)
    effects = node.handle(Concealed(job, None, "a key that gives no secret"), 0.5)
    assert not of(effects, Send) and node.conduct.counts == {"bad_gathering": 1}


def test_who_leaves_says_that_what_it_was_still_making_does_not_come() -> None:
    node = started()
    node.handle(Received("a", asks(0, "b", "c", "me")), 0.0)
    node.handle(Leave(), 0.0)
    effects = node.handle(computed(0), 1.0)
    assert Send(PEERS, Goodbye(0, "leaving")) in effects


def test_a_sum_that_turned_out_to_be_noise_is_recorded_as_none_and_who_came_back_with_it_is_not_back() -> None:
    node = started(stale=True)
    assert node.gathering == asks(0, *PEERS, gives=False)
    node.handle(computed(0), 0.0)
    for name in PEERS:
        node.handle(part(name, 0), 0.0)
    assert node.gathering == asks(1, *PEERS)
    for name in PEERS:
        node.handle(Received(name, asks(1, *(set(PEERS) - {name}), "me")), 0.0)
    effects = node.handle(replace(computed(1), no_sum="one part is noise"), 1.0)
    assert "no_sum" in events(effects) and not of(effects, Conceal)
    (ended,) = [e.entry for e in effects if isinstance(e, Record) and isinstance(e.entry, RoundEnded)]
    assert (ended.merged, ended.missing) == ((), PEERS)


def test_whose_link_comes_back_when_all_is_done_still_gets_the_last_part() -> None:
    node = collecting(0, rounds=1)
    for name in PEERS:
        node.handle(part(name, 0), 0.0)
    assert Done(True) in node.handle(Computed(1, FOLDED, None, None), 1.0)
    effects = node.handle(LinkUp("a", 1, 0, 1.0, -1), 2.0)
    assert of(effects, Send) == [Send(("a",), Update(0, 1.0, 5.0, "part for a")), Send(("a",), Goodbye(1, "finished"))]


def test_a_straggler_does_not_jump_to_the_end_nor_on_the_word_of_one() -> None:
    node = started(rounds=50)
    for name in PEERS[:2]:
        node.handle(LinkDown(name), 0.5)
    for name in PEERS[2:]:
        node.handle(Received(name, asks(40, "a", "b", "me")), 1.0)
    node.handle(computed(0), 1.0)
    assert node.round == 0  # two are fewer than could give it a sum
    node = started(rounds=50)
    for name in PEERS:
        node.handle(Received(name, Heartbeat(50)), 1.0)
    node.handle(computed(0), 1.0)
    assert node.round == 49
