"""Averaging without common rounds: what keeps the mean, what finds it whatever is lost, and how a node plays its part.

Theorems on numbers first, then stories of one node with exact times, then networks in virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from test_learner import learner, part
from test_node import NEVER, computed, fresh, words
from test_node import up as link_up

from p2pfl.asynchronous import (
    ASKS,
    ASKS_NOBODY,
    LEAST_SHARE,
    OUTSTANDING,
    Answer,
    Exchanges,
    RunningSums,
    merge_by_age,
)
from p2pfl.config import load
from p2pfl.messages import (
    LAST,
    Compute,
    Contribution,
    Goodbye,
    LinkDown,
    Receipt,
    Received,
    Record,
    Send,
    Tick,
    Update,
)
from p2pfl.node import MAX_MASS, Node, Settings
from p2pfl.rng import stream
from p2pfl.sim.engine import Outcome, run
from p2pfl.sim.faults import Crash, Fault, Lie, Lose
from p2pfl.sim.invariants import Broken
from p2pfl.sim.scenario import scenario, static
from p2pfl.topology import partners
from p2pfl.trainer import Term, Trainer
from p2pfl.weights import Neighbourhood, Stake, mass_after


def update(round: int, vector: object, mass: float = 1.0, reach: float = ASKS_NOBODY) -> Update:
    return Update(round, mass, reach, vector)


def one_way(*edges: tuple[int, int]) -> nx.DiGraph:
    return nx.DiGraph(edges)


CHORD = one_way(*((i, (i + 1) % 5) for i in range(5)), (0, 2))  # the directed 5-cycle, and 0 → 2


# -- Pairwise: who exchanges what with whom ---------------------------------------------------------------------------


def exchanged(exchanges: Exchanges, round: int) -> list[tuple[str, object, int | None]]:
    """(peer, its vector, own round) of what is to be folded."""
    contributions = exchanges.fold(round)
    assert all(contribution.weight == 1 / 2 for contribution in contributions)
    return [(c.peer, c.vector, c.reference) for c in contributions]


def test_a_question_is_answered_with_the_newest_own_update_and_both_ends_know_of_one_exchange() -> None:
    alice, bob = Exchanges(), Exchanges()
    reach = alice.ask(5, "bob", heard=-1)
    assert alice.awaits("bob") and not bob.awaits("alice")
    assert bob.came("alice", update(5, "a5", reach=reach), newest=7) is Answer.NEWEST
    assert alice.came("bob", update(7, "b7"), newest=5) is Answer.NONE
    assert exchanged(alice, 5) == [("bob", "b7", 5)] and exchanged(bob, 7) == [("alice", "a5", 7)]
    assert not alice.awaits("bob") and exchanged(alice, 6) == exchanged(bob, 8) == []


def test_each_own_update_is_exchanged_at_most_once() -> None:
    bob = Exchanges()
    answers = [bob.came(peer, update(3, peer, reach=ASKS), newest=7) for peer in ("alice", "carol", "dave")]
    assert answers == [Answer.NEWEST, Answer.DECLINED, Answer.DECLINED]
    bob.ask(8, "carol", heard=3)
    assert bob.came("dave", update(4, "dave", reach=ASKS), newest=8) is Answer.DECLINED  # it is carol's
    assert exchanged(bob, 8) == [("alice", "alice", 7)]
    assert bob.came("dave", update(5, "dave", reach=ASKS), newest=-1) is Answer.DECLINED  # it has none


def test_questions_that_cross_are_one_exchange() -> None:
    alice, bob = Exchanges(), Exchanges()
    of_alice = update(5, "a5", reach=alice.ask(5, "bob", heard=6))
    of_bob = update(7, "b7", reach=bob.ask(7, "alice", heard=4))
    assert bob.came("alice", of_alice, newest=7) is alice.came("bob", of_bob, newest=5) is Answer.NONE
    assert exchanged(alice, 5) == [("bob", "b7", 5)] and exchanged(bob, 7) == [("alice", "a5", 7)]


def test_a_question_after_one_that_was_declined_is_a_question_and_no_answer() -> None:
    """The word that bob declined is under way, or lost: his next update says that he knew of the question."""
    alice, bob = Exchanges(), Exchanges()
    bob.ask(7, "carol", heard=-1)
    assert bob.came("alice", update(5, "a5", reach=alice.ask(5, "bob", heard=-1)), newest=7) is Answer.DECLINED
    of_bob = update(8, "b8", reach=bob.ask(8, "alice", heard=5))
    assert alice.came("bob", of_bob, newest=6) is Answer.NEWEST
    assert bob.came("alice", update(6, "a6"), newest=8) is Answer.NONE
    assert exchanged(alice, 6) == [("bob", "b8", 6)] and exchanged(bob, 8) == [("alice", "a6", 8)]


def test_of_one_peer_two_exchanges_are_folded_one_after_the_other() -> None:
    alice = Exchanges()
    assert alice.came("bob", update(3, "b3", reach=ASKS), newest=4) is Answer.NEWEST
    alice.ask(5, "bob", heard=3)
    alice.came("bob", update(4, "b4"), newest=5)
    assert exchanged(alice, 5) == [("bob", "b3", 4)]
    assert exchanged(alice, 6) == [("bob", "b4", 5)]


def test_what_is_declined_or_too_old_is_no_longer_asked() -> None:
    alice = Exchanges()
    alice.ask(5, "bob", heard=-1)
    alice.declined("carol", 5)  # who was not asked
    assert alice.awaits("bob")
    alice.declined("bob", 5)
    assert not alice.awaits("bob")
    alice.ask(6, "bob", heard=-1)
    alice.fold(6 + OUTSTANDING - 1)
    assert alice.awaits("bob")
    alice.fold(6 + OUTSTANDING)
    assert not alice.awaits("bob")
    assert alice.came("bob", update(9, "late"), newest=20) is Answer.NONE  # the answer, for which the vector is gone
    assert exchanged(alice, 20) == []


def test_an_exchange_with_a_process_that_is_no_more_does_not_count() -> None:
    alice = Exchanges()
    alice.came("bob", update(3, "b3", reach=ASKS), newest=4)
    alice.came("carol", update(3, "c3", reach=ASKS), newest=5)
    alice.forget("bob")
    assert exchanged(alice, 5) == [("carol", "c3", 5)]
    assert alice.came("dave", update(3, "d3", reach=ASKS), newest=4) is Answer.DECLINED  # bob may have folded it


def operator(graph: nx.Graph) -> np.ndarray:
    """The mean, over all edges, of what an exchange over an edge does to all vectors."""
    n, total = len(graph), np.zeros((len(graph), len(graph)))
    for i, j in graph.edges:
        vectors, ends = np.eye(n), {i: Exchanges(), j: Exchanges()}
        reach = ends[i].ask(0, str(j), heard=-1)
        assert ends[j].came(str(i), update(0, vectors[i].copy(), reach=reach), newest=0) is Answer.NEWEST
        ends[i].came(str(j), update(0, vectors[j].copy()), newest=0)
        sent = vectors.copy()
        for node, exchanges in ends.items():
            for c in exchanges.fold(0):
                vectors[node] += c.weight * (c.vector - sent[node])
        total += vectors
    return total / graph.number_of_edges()


@pytest.mark.parametrize(
    ("graph", "factor"),
    [
        (nx.complete_graph(4), 1 - 1 / 3),
        (nx.complete_graph(9), 1 - 1 / 8),
        (nx.cycle_graph(5), 1 - (1 - math.cos(2 * math.pi / 5)) / 5),
        (nx.cycle_graph(16), 1 - (1 - math.cos(2 * math.pi / 16)) / 16),
    ],
)
def test_each_exchange_contracts_as_it_should(graph: nx.Graph, factor: float) -> None:
    """W of one exchange is a projection: E‖x - mean‖² shrinks by the second largest eigenvalue of E W."""
    mixing = operator(graph)
    np.testing.assert_allclose(mixing.sum(axis=0), 1.0, atol=1e-15)
    np.testing.assert_allclose(mixing, mixing.T, atol=1e-15)
    assert np.sort(np.linalg.eigvalsh(mixing))[-2] == pytest.approx(factor, abs=1e-12)


def test_who_asks_is_drawn_anew_for_every_round_and_half_of_the_time_nobody_is() -> None:
    names = ("a", "b", "c")
    drawn = {schedule: partners(schedule, 0, "me") for schedule in ("pairwise", "gossip", "sync", "push-sum")}
    assert drawn["sync"] is drawn["push-sum"] is None
    for schedule, asked in (("pairwise", 1 / 2), ("gossip", 1.0)):
        of = drawn[schedule]
        assert of is not None and of(0, ()) == ()
        told = [of(round, names) for round in range(600)]
        assert told == [of(round, names) for round in range(600)]
        counts = [told.count((name,)) for name in names]
        assert sum(counts) + told.count(()) == 600
        assert counts == pytest.approx([600 * asked / 3] * 3, abs=4 * math.sqrt(600 * asked / 3))
    other = partners("gossip", 0, "another")
    assert other is not None and [other(r, names) for r in range(20)] != [drawn["gossip"](r, names) for r in range(20)]


# -- Gossip: ages ----------------------------------------------------------------------------------------------------


def test_a_model_goes_the_further_towards_another_the_longer_that_one_has_learnt() -> None:
    assert merge_by_age(1.0, {"a": 3.0}) == ({"a": 3 / 4}, 3.0)
    assert merge_by_age(3.0, {"a": 1.0}) == ({"a": 1 / 4}, 3.0)
    assert merge_by_age(7.0, {}) == ({}, 7.0)
    weights, age = merge_by_age(1.0, {"a": 3.0, "b": 2.0})  # then towards b, at the age of a: 3 : 2
    assert age == 3.0 and weights == pytest.approx({"a": 3 / 4 * 3 / 5, "b": 2 / 5})


def test_ages_merge_one_after_the_other_and_the_mean_is_not_kept() -> None:
    random = stream(0, "ages")
    values, ages = random.normal(size=6), random.integers(1, 50, size=6).astype(float)
    x, t = values[0], ages[0]
    for other, its_age in zip(values[1:], ages[1:], strict=True):
        x, t = (t * x + its_age * other) / (t + its_age), max(t, its_age)
    weights, age = merge_by_age(ages[0], dict(zip("abcde", ages[1:], strict=True)))
    assert age == t and 0 < sum(weights.values()) < 1
    merged = (1 - sum(weights.values())) * values[0] + sum(
        w * v for w, v in zip(weights.values(), values[1:], strict=True)
    )
    assert merged == pytest.approx(x, abs=1e-14)
    both = [values[0] + merge_by_age(ages[0], {"b": ages[1]})[0]["b"] * (values[1] - values[0]), values[1]]
    assert abs(np.mean(both) - np.mean(values[:2])) > 0.01  # a push, and no answer


# -- Push-sum: running sums ------------------------------------------------------------------------------------------


class Lossy:
    """Nodes that hand out running sums of their numbers over a directed graph, one after the other, each word of which
    may be lost."""

    def __init__(self, graph: nx.DiGraph, values: Sequence[float], masses: Sequence[float], loss: float) -> None:
        self.graph, self.loss, self.random = graph, loss, stream(1, "losses")
        self.values, self.sums = list(values), [RunningSums(mass) for mass in masses]
        self.running = [0.0] * len(values)
        self.taken: dict[tuple[int, str], float] = {}  # (receiver, sender) → vector of the sum that it took last
        self.inbox: list[dict[str, Update]] = [{} for _ in values]

    def step(self, node: int, round: int) -> None:
        """It takes what came, and hands out."""
        sums = self.sums[node]
        contributions, kept = sums.take(list(self.inbox[node].items()))
        self.inbox[node] = {}
        value = kept * self.values[node]
        for c in contributions:
            reference = 0.0 if c.reference is None else self.taken[node, c.peer]
            value += c.weight * (c.vector - reference)
            self.taken[node, c.peer] = c.vector
        self.values[node] = value
        if sums.tell(tuple((str(other), 1) for other in self.graph[node])):
            self.running[node] = 0.0
        self.running[node] += sums.hand_out() * value
        for other in self.graph[node]:
            if self.random.random() >= self.loss:
                told = Update(round, sums.handed_out, sums.reach, self.running[node])
                self.inbox[other][str(node)] = told

    def run(self, rounds: int) -> None:
        for round in range(rounds):
            for node in self.random.permutation(len(self.values)):
                self.step(int(node), round)

    @property
    def total(self) -> tuple[float, float]:
        """Of mass, and of what it weighs: what nodes hold, and what is still in sums that were not taken."""
        mass = [sums.mass for sums in self.sums]
        weighed = [sums.mass * value for sums, value in zip(self.sums, self.values, strict=True)]
        for sender, receiver in self.graph.edges:
            reach, seen = self.sums[receiver]._taken.get(str(sender), (0.0, 0.0))
            goes_on = reach == self.sums[sender].reach
            mass.append(self.sums[sender].handed_out - (seen if goes_on else 0.0))
            weighed.append(self.running[sender] - (self.taken[receiver, str(sender)] if goes_on else 0.0))
        return math.fsum(mass), math.fsum(weighed)


@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_running_sums_end_at_the_mean_at_every_node_whatever_is_lost(loss: float, weighted: bool) -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    masses = values if weighted else [1.0] * 5
    network = Lossy(CHORD, values, masses, loss)
    start = network.total
    for _ in range(30):
        network.run(10)
        assert network.total == pytest.approx(start, rel=1e-12)  # nothing is made, nothing is lost for good
    assert network.values == pytest.approx([55 / 15 if weighted else 3.0] * 5, abs=1e-9)


def test_without_running_sums_the_mass_that_is_left_decays() -> None:
    """30 % of two of three portions: 0.8 of the mass is left after each round."""
    nodes, rounds, random = 2000, 8, stream(0, "losses")
    mass = np.ones(nodes)
    for _ in range(rounds):
        came = random.random((nodes, 2)) >= 0.3
        mass = np.array(
            [
                mass_after(Stake(mass[i], 3.0), {str(d): Stake(mass[i - d], 3.0) for d in (1, 2) if came[i, d - 1]})
                for i in range(nodes)
            ]
        )
    assert mass.mean() == pytest.approx(0.8**rounds, rel=0.05)


def test_what_a_sum_has_grown_by_is_taken_once() -> None:
    sums = RunningSums(1.0)
    (first,), kept = sums.take([("a", update(3, "σ", mass=0.5, reach=1.0))])
    assert (first.weight, first.reference, kept, sums.mass) == (1 / 1.5, None, 1 / 1.5, 1.5)
    (same,), kept = sums.take([("a", update(4, "σ", mass=0.5, reach=1.0))])
    assert (same.weight, same.reference, kept) == (0.0, LAST, 1.0)
    (more,), _ = sums.take([("a", update(5, "σ", mass=0.75, reach=1.0))])
    assert (more.weight, more.reference, sums.mass) == (1 / 1.75, LAST, 1.75)
    last, anew = update(6, "σ", mass=1.0, reach=1.0), update(7, "σ", mass=0.25, reach=2.0)
    assert not sums.grows("a", update(6, "σ", mass=0.5, reach=1.0)) and sums.grows("a", last) and sums.grows("a", anew)
    (end, begin), _ = sums.take([("a", last), ("a", anew)])
    assert (end.reference, begin.reference, sums.mass) == (LAST, None, 1.75 + 0.25 + 0.25)
    assert not sums.grows("a", last)  # an earlier sum than this
    sums.forget("a")
    assert sums.grows("a", update(0, "σ", mass=0.1, reach=1.0))


def test_a_sum_begins_anew_when_others_are_told_and_what_was_not_taken_is_lost_but_never_taken_twice() -> None:
    sums = RunningSums(1.0)
    assert not sums.tell((("a", 1), ("b", 1))) and sums.reach == 1.0
    assert sums.hand_out() == sums.mass == sums.handed_out == 1 / 3
    assert not sums.tell((("a", 1), ("b", 1)))
    assert sums.hand_out() == 1 / 9 and sums.handed_out == 1 / 3 + 1 / 9
    assert sums.tell((("a", 2), ("b", 1)))  # a has started again: it must not take what it took before
    assert (sums.reach, sums.handed_out, sums.mass) == (2.0, 0.0, 1 / 9)
    assert not sums.tell(())  # nothing was handed out since
    assert sums.hand_out() == 0.0 and sums.mass == 1 / 9


def test_who_gets_nothing_back_keeps_a_little_for_ever() -> None:
    sums = RunningSums(1.0, LEAST_SHARE)
    sums.tell((("a", 1),))
    portions = [sums.hand_out() for _ in range(2000)]
    assert portions.count(0.0) > 1980 and LEAST_SHARE / 2 <= sums.mass < LEAST_SHARE
    assert math.fsum([sums.mass, *portions]) == pytest.approx(1.0, abs=1e-15)


def test_who_believes_a_liar_says_nothing_that_would_be_taken_for_a_lie() -> None:
    most = 1000.0
    sums, listener = RunningSums(1.0, LEAST_SHARE, most), RunningSums(1.0)
    for round in range(50):
        begins_anew = sums.tell((("a", 1), ("b", 1)))
        assert begins_anew == (sums.handed_out == 0.0 < sums.beginnings)
        sums.hand_out()
        said = update(round, "σ", sums.handed_out, sums.reach)
        assert 0 < said.mass <= most and sums.mass <= most and listener.grows("me", said)
        listener.take([("me", said)])
        taken, kept = sums.take([("liar", update(round, "σ", most, round + 1.0))])
        assert kept + math.fsum(c.weight * c.gain for c in taken) == pytest.approx(1.0)
    assert sums.beginnings > 10, "it never came to what anybody may hold"


def push_sum_trainer(name: str, seed: int) -> Trainer:
    """One that only averages, with random parameters."""
    settings = ["topology.nodes=2", "topology.graph=complete", "mix.schedule=push-sum", "train.rounds=1000000"]
    settings += ["train.local_steps=0", "train.evaluate_every=1000000"]
    averager = learner(torch.nn.Linear(4, 3), part(rows=1), name, local_steps=0, evaluate_every=1_000_000)
    trainer = Trainer(averager, load(settings=settings), name, varies=False)
    trainer.learner.vector.normal_(generator=torch.Generator().manual_seed(seed))
    return trainer


def test_trainers_take_from_each_others_sums_what_is_new_and_only_move_the_mass() -> None:
    trainers, sums = (
        [push_sum_trainer(name, seed) for seed, name in enumerate(("a", "b"))],
        [RunningSums(1.0), RunningSums(3.0)],
    )
    start = trainers[0].learner.vector.double() + 3 * trainers[1].learner.vector.double()
    told: dict[int, tuple[Update, torch.Tensor]] = {}
    for ledger in sums:
        ledger.tell((("other", 1),))
    for round in range(60):
        for me, other in ((0, 1), (1, 0)):
            came = told.pop(me, None)
            contributions, kept = sums[me].take([("other", came[0])] if came is not None else [])
            terms = [Term("other", c.weight, came[1], c.reference) for c in contributions if came is not None]
            job = Compute(round, contributions, 1.0, 1.0, True, kept=kept)
            trainers[me].fold(job, terms, float)
            if round < 50:  # in the end, all is taken
                trainers[me].train(replace(job, portion=sums[me].hand_out(), told=1), float)
            if round >= 50 or (round + me) % 3:  # every third word is lost
                ours = update(round, None, mass=sums[me].handed_out, reach=sums[me].reach)
                told[other] = (ours, trainers[me].public.clone())
    assert sums[0].mass + sums[1].mass == pytest.approx(4.0, abs=1e-12)
    for trainer in trainers:
        assert torch.allclose(trainer.learner.vector.double(), start / 4, rtol=0, atol=1e-5)


def test_ten_thousand_rounds_of_float32_lose_nothing_that_is_handed_out() -> None:
    """A sum of so many portions has no digits for the last ones of the next: they stay with whoever hands it out."""
    trainer = push_sum_trainer("a", 0)
    vector, job = trainer.learner.vector, Compute(0, (), 1.0, 1.0, True, portion=1.0, told=1)
    owed = torch.zeros_like(vector, dtype=torch.float64)
    for round in range(10_000):
        owed += 2 * vector.double()  # what it holds, at twice the mass that it will keep
        trainer.train(replace(job, round=round), float)
        owed -= vector.double()
    assert trainer.public.double().abs().mean() > 1000
    assert (trainer.public.double() - owed).abs().max() < 1e-4


# -- One node --------------------------------------------------------------------------------------------------------


def without_rounds(schedule: str, asks: Mapping[int, str] | None = None, **changes: object) -> Node:
    """A node "me" with neighbours a and b, in step with nobody; `asks` whom in which round."""
    chosen = asks or {}

    def partner(round: int, linked: tuple[str, ...]) -> tuple[str, ...]:
        return (chosen[round],) if chosen.get(round) in linked else ()

    weights = "push-sum" if schedule == "push-sum" else "metropolis"
    drawn = None if schedule == "push-sum" else partner
    return fresh(schedule=schedule, weights=weights, staleness=math.inf, partners=drawn, **changes)


def got(peer: str, round: int, mass: float = 1.0, reach: float = ASKS_NOBODY) -> Received:
    return Received(peer, update(round, f"{peer}{round}", mass, reach))


def decided(effects: Sequence[object]) -> list[object]:
    """What is to be done, without what is only told."""
    return [effect for effect in effects if not isinstance(effect, Record)]


def job(round: int, *contributions: Contribution, **changes: object) -> Compute:
    plain = Compute(round, contributions, 1.0, ASKS_NOBODY, True, jump=round == 0, kept=None if round == 0 else 1.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def jobs(effects: Sequence[object]) -> list[Compute]:
    return [effect for effect in effects if isinstance(effect, Compute)]


def test_pairwise_nobody_is_waited_for_and_an_exchange_is_folded_at_the_end_of_a_round() -> None:
    node = without_rounds("pairwise", {1: "a", 2: "a", 3: "b"})
    node.handle(link_up("a"), 0.0)
    assert node.handle(link_up("b"), 0.0)[-1] == job(0)
    assert node.handle(computed(0), 1.0) == [job(1, reach=ASKS - 1)]  # it asks a, of which it never heard
    answer = Send(("a",), Update(0, 1.0, ASKS_NOBODY, "mine0"))
    assert node.handle(got("a", 0, reach=ASKS - 1), 1.5) == [answer]  # a asks as well, and is answered first
    sent, going_on = decided(node.handle(computed(1), 2.0))
    assert sent == Send(("a",), Update(1, 1.0, ASKS - 1, "mine1"))
    assert going_on == job(2, Contribution("a", 0, 1 / 2, "a0", 0))
    assert node.handle(got("a", 1, reach=ASKS + 0), 2.1) == []  # another question of a, which crosses ours
    assert node.handle(got("b", 5, reach=ASKS - 1), 2.2) == [Send(("b",), Receipt(5, 0))]  # declined
    assert decided(node.handle(computed(2), 3.0)) == [
        job(3, Contribution("a", 1, 1 / 2, "a1", 1), reach=ASKS + 5)  # now it asks b
    ]
    (sent, _) = decided(node.handle(computed(3), 4.0))
    assert sent == Send(("b",), Update(3, 1.0, ASKS + 5, "mine3"))
    node.handle(got("b", 6), 4.5)  # the answer
    assert jobs(node.handle(computed(4), 5.0)) == [job(5, Contribution("b", 6, 1 / 2, "b6", 3))]


def test_pairwise_who_declines_does_not_ask_the_same_peer_with_what_it_is_making() -> None:
    """It would look as if the two questions crossed; and the word that one is declined may come after the other."""
    node = without_rounds("pairwise", {1: "b", 2: "a", 3: "a"})
    for name in ("a", "b"):
        node.handle(link_up(name), 0.0)
    node.handle(computed(0), 1.0)
    assert jobs(node.handle(computed(1), 2.0)) == [job(2, reach=ASKS - 1)]  # it will ask a; the one before went to b
    assert node.handle(got("a", 4, reach=ASKS - 1), 2.5) == [Send(("a",), Receipt(4, 0))]
    assert decided(node.handle(computed(2), 3.0)) == [job(3, reach=ASKS + 4)]  # sent to nobody; but the next one is
    sent, _ = decided(node.handle(computed(3), 4.0))
    assert sent == Send(("a",), Update(3, 1.0, ASKS + 4, "mine3"))
    node.handle(Received("a", Receipt(3)), 4.5)
    assert node.handle(got("a", 5, reach=ASKS + 3), 5.0) == [Send(("a",), Receipt(5, 0))]


def test_pairwise_who_has_still_to_answer_is_not_asked_again_for_a_while() -> None:
    node = without_rounds("pairwise", dict.fromkeys(range(30), "a"), rounds=30)
    node.handle(link_up("a"), 0.0)
    node.handle(link_up("b"), 0.0)
    asked = []
    for round in range(29):
        asked += [e.message.round for e in node.handle(computed(round), float(round)) if isinstance(e, Send)]
    assert asked == [0, 1 + OUTSTANDING, 2 * (1 + OUTSTANDING), 3 * (1 + OUTSTANDING)][: len(asked)] and len(asked) == 4


def test_pairwise_nothing_is_asked_or_answered_that_could_not_be_folded() -> None:
    node = without_rounds("pairwise", dict.fromkeys(range(3), "a"), rounds=2)
    node.handle(link_up("a"), 0.0)
    node.handle(link_up("b"), 0.0)
    node.handle(computed(0), 1.0)
    node.handle(got("a", 0), 1.5)
    effects = node.handle(computed(1), 2.0)  # the last one: no answer would come in time
    assert not [e for e in effects if isinstance(e, Send)]
    assert jobs(effects) == [job(2, Contribution("a", 0, 1 / 2, "a0", 0), train=False)]
    assert node.handle(got("b", 0, reach=ASKS), 2.5) == [Send(("b",), Receipt(0, 0))]


def test_pairwise_a_question_or_an_answer_that_a_broken_link_lost_is_sent_again() -> None:
    node = without_rounds("pairwise", {1: "a"}, grace=NEVER)
    for name in ("a", "b"):
        node.handle(link_up(name), 0.0)
    node.handle(computed(0), 1.0)
    answer = Send(("b",), Update(0, 1.0, ASKS_NOBODY, "mine0"))
    assert node.handle(got("b", 0, reach=ASKS - 1), 1.1) == [answer]
    question = Send(("a",), Update(1, 1.0, ASKS - 1, "mine1"))
    assert question in node.handle(computed(1), 2.0)
    for name, lost in (("a", question), ("b", answer)):
        node.handle(LinkDown(name), 2.1)
        assert node.handle(link_up(name, seen=-1), 2.2)[-1] == lost
        node.handle(LinkDown(name), 2.3)
        assert decided(node.handle(link_up(name, seen=1), 2.4)) == []


def test_pairwise_who_has_lost_its_state_gives_nothing_and_goes_on_from_theirs() -> None:
    node = without_rounds("pairwise", needs_state=True, rounds=50)
    for name in ("a", "b"):
        node.handle(link_up(name, round=20), 0.0)
    assert node.handle(got("a", 20, reach=ASKS), 1.0) == [Send(("a",), Receipt(20, 0))]
    last = node.handle(got("b", 21, reach=ASKS), 2.0)
    models = Contribution("a", 20, 1 / 2, "a20"), Contribution("b", 21, 1 / 2, "b21")
    assert jobs(last) == [job(20, *models, jump=True, kept=None)]


def test_gossip_goes_on_with_what_it_heard_by_the_ages_and_is_a_round_older() -> None:
    node = without_rounds("gossip", {0: "b", 1: "a"})
    node.handle(link_up("a"), 0.0)
    assert jobs(node.handle(link_up("b"), 0.0)) == [job(0, reach=3.0)]
    node.handle(got("a", 3, mass=4.0), 0.5)
    node.handle(got("a", 4, mass=5.0), 0.6)  # only the newest counts
    node.handle(got("b", 0, mass=1.0), 0.7)
    sent, going_on = node.handle(computed(0), 1.0)
    assert sent == Send(("b",), Update(0, 1.0, 3.0, "mine0"))
    a, b = going_on.contributions
    assert (a, b) == (Contribution("a", 4, a.weight, "a4"), Contribution("b", 0, b.weight, "b0"))
    assert (a.weight, b.weight, going_on.mass) == (pytest.approx(5 / 6 * 5 / 6), pytest.approx(1 / 6), 6.0)
    (later,) = jobs(node.handle(computed(1), 2.0))
    assert (later.contributions, later.mass, later.step) == ((), 7.0, 1.0)


@pytest.mark.parametrize("age", [0.5, 2 * MAX_MASS])
def test_gossip_an_age_that_no_model_has_shuts_out(age: float) -> None:
    node = without_rounds("gossip")
    node.handle(link_up("a"), 0.0)
    assert "quarantined" in words(node.handle(got("a", 0, mass=age), 1.0))


def handing_out() -> Node:
    """A node with running sums that has told a and b in round 0, and computes round 1."""
    node = without_rounds("push-sum", grace=1.0)
    node.handle(link_up("a"), 0.0)
    first = Compute(0, (), 1 / 3, 1.0, True, 1.0, jump=True, portion=1 / 3, told=2, held=1.0)
    assert jobs(node.handle(link_up("b"), 0.0)) == [first]
    sent, going_on = node.handle(computed(0), 1.0)
    assert sent == Send(("a", "b"), Update(0, 1 / 3, 1.0, "mine0"))
    assert going_on == Compute(1, (), 1 / 3 + 1 / 9, 1.0, True, 3.0, kept=1.0, portion=1 / 9, told=2, held=1 / 3)
    return node


def test_push_sum_who_has_nothing_to_hand_out_says_nothing() -> None:
    """A sum of nothing is none, and who gets it would refuse it."""
    node = without_rounds("push-sum", held_mass=LEAST_SHARE / 2)
    node.handle(link_up("a"), 0.0)
    (first,) = jobs(node.handle(link_up("b"), 0.0))
    assert (first.portion, first.mass) == (0.0, 0.0)
    assert not any(isinstance(effect, Send) for effect in node.handle(computed(0), 1.0))


def test_push_sum_hands_out_its_sum_and_takes_what_others_have_grown_by() -> None:
    node = handing_out()
    for round, mass in ((0, 0.25), (1, 0.5)):
        node.handle(got("a", round, mass=mass, reach=1.0), 1.0)
    (first,) = jobs(node.handle(computed(1), 2.0))
    held = 1 / 9 + 0.5
    assert first.contributions == (Contribution("a", 1, 1 / held, "a1", gain=0.5),) and first.kept == pytest.approx(
        1 / 9 / held
    )
    assert first.held == held and first.portion == held / 3 and first.mass == pytest.approx(1 / 3 + 1 / 9 + held / 3)
    node.handle(got("a", 2, mass=0.75, reach=1.0), 2.5)
    (second,) = jobs(node.handle(computed(2), 3.0))
    held = held / 3 + 0.25
    assert second.contributions == (Contribution("a", 2, pytest.approx(1 / held), "a2", LAST, 0.25),)
    assert second.held == pytest.approx(held)


def test_push_sum_a_link_that_breaks_for_a_moment_changes_nothing_and_a_death_begins_a_new_sum() -> None:
    node = handing_out()
    node.handle(LinkDown("b"), 1.2)
    (within,) = jobs(node.handle(computed(1), 2.0))
    assert (within.told, within.reach, within.restart) == (2, 1.0, False)
    assert node.handle(link_up("b", seen=0), 2.1)[-1] == Send(("b",), Update(1, 1 / 3 + 1 / 9, 1.0, "mine1"))
    node.handle(LinkDown("b"), 2.2)
    assert words(node.handle(Tick(), 3.2)) == ["died"]
    (alone,) = jobs(node.handle(computed(2), 4.0))
    assert (alone.told, alone.reach, alone.restart, alone.mass) == (1, 2.0, True, alone.portion)
    assert decided(node.handle(link_up("b", seen=2), 4.5)) == []
    (both,) = jobs(node.handle(computed(3), 5.0))
    assert (both.told, both.reach, both.restart) == (2, 3.0, True)
    node.handle(Received("a", Goodbye(9, "finished")), 5.5)
    (left,) = jobs(node.handle(computed(4), 6.0))
    assert (left.told, left.reach, left.restart) == (1, 4.0, True)


def test_push_sum_who_started_again_is_told_a_new_sum_and_its_own_one_counts_from_zero() -> None:
    node = handing_out()
    node.handle(got("a", 1, mass=0.5, reach=1.0), 1.5)
    node.handle(computed(1), 2.0)
    assert decided(node.handle(link_up("a", epoch=2), 2.5)) == []  # of the old sum its predecessor took a part
    node.handle(got("a", 0, mass=0.125, reach=1.0), 2.6)
    effects = node.handle(computed(2), 3.0)
    told = [e.peers for e in effects if isinstance(e, Send) and isinstance(e.message, Update)]
    assert told == [("b",)]  # nor of what was being made for that one: or it would take all of it once more
    (again,) = jobs(effects)
    assert [c.reference for c in again.contributions] == [None]
    assert (again.reach, again.restart) == (2.0, True)


def test_push_sum_who_comes_late_is_told_from_then_on() -> None:
    node = without_rounds("push-sum", join_timeout=3.0)
    node.handle(link_up("a"), 0.0)
    (alone,) = jobs(node.handle(Tick(), 3.0))
    assert (alone.told, alone.portion) == (1, 1 / 2)
    assert decided(node.handle(link_up("b"), 3.5)) == []
    sent, both = node.handle(computed(0), 4.0)
    assert sent == Send(("a",), Update(0, 1 / 2, 1.0, "mine0"))
    assert (both.told, both.reach, both.restart, both.mass) == (2, 2.0, True, 1 / 6)


def test_push_sum_the_end_of_a_sum_counts_beside_the_one_that_follows() -> None:
    node = handing_out()
    for round, mass, reach in ((0, 0.25, 1.0), (1, 0.5, 1.0), (2, 0.125, 2.0), (3, 0.25, 2.0)):
        assert words(node.handle(got("a", round, mass=mass, reach=reach), 1.0)) == []
    (taken,) = jobs(node.handle(computed(1), 2.0))
    assert [(c.round, c.reference) for c in taken.contributions] == [(1, None), (3, None)]
    assert taken.held == 1 / 9 + 0.5 + 0.25


def test_push_sum_a_sum_that_shrinks_shuts_out_and_nothing_more_is_handed_to_its_maker() -> None:
    node = handing_out()
    node.handle(got("a", 0, mass=0.5, reach=1.0), 1.5)
    node.handle(computed(1), 2.0)
    assert "quarantined" in words(node.handle(got("a", 1, mass=0.4, reach=1.0), 2.5))
    (going_on,) = jobs(node.handle(computed(2), 3.0))
    assert (going_on.told, going_on.restart) == (1, True)


def test_push_sum_who_has_lost_its_state_goes_on_from_the_models_behind_the_sums() -> None:
    node = without_rounds("push-sum", needs_state=True)
    for name in ("a", "b"):
        node.handle(link_up(name, round=20), 0.0)
    node.handle(got("a", 20, mass=4.0, reach=1.0), 1.0)
    (found,) = jobs(node.handle(got("b", 20, mass=0.5, reach=1.0), 2.0))
    assert found.jump and found.kept == 0.0 and found.round == 20
    assert [(c.weight, c.reference) for c in found.contributions] == [(1 / 8, None), (1.0, None)]


def test_who_only_hears_us_is_not_waited_for_where_nobody_is() -> None:
    node = without_rounds("push-sum", neighbourhood=lambda _round: Neighbourhood({"a": None}, ("b",)))
    for name in ("a", "b"):
        node.handle(link_up(name), 0.0)
    for round in range(5):
        (going_on,) = jobs(node.handle(computed(round), float(round)))
        assert going_on.round == round + 1 and going_on.told == 1


# -- Networks in virtual time ----------------------------------------------------------------------------------------


def network(schedule: str, graph: nx.Graph, *faults: Fault, seed: int = 0, rounds: int = 40) -> Outcome:
    """Averaging of 1, 2, 3 …, by nodes of which some take half as long again for a round."""
    names = [f"n{i:02}" for i in range(len(graph))]
    weights = "push-sum" if schedule == "push-sum" else "metropolis"
    settings = Settings("", rounds=rounds, checkpoint_every=5, schedule=schedule, weights=weights, staleness=math.inf)
    named = nx.relabel_nodes(graph, dict(enumerate(names)))
    values = {name: 1.0 + i for i, name in enumerate(names)}
    seconds = {name: 1.0 + 0.25 * (i % 3) for i, name in enumerate(names)}
    return run(scenario(static(named), seed, settings=settings, values=values, compute_seconds=seconds, faults=faults))


GRAPHS = {
    "two": nx.complete_graph(2),
    "ring": nx.cycle_graph(7),
    "star": nx.star_graph(6),
    "complete": nx.complete_graph(5),
}
WRONG = {"rejected", "quarantined", "died", "suspected", "late", "waiting"}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_pairwise_exchange_keeps_the_mean_exactly_whoever_is_slower(graph: str, seed: int) -> None:
    outcome = network("pairwise", GRAPHS[graph], seed=seed)
    values = list(outcome.values.values())
    assert math.fsum(values) / len(values) == pytest.approx((1 + len(values)) / 2, abs=1e-12)
    assert outcome.drift == 0.0 and not WRONG & outcome.said.keys()
    assert max(values) - min(values) < 0.3 * (len(values) - 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_gossip_agrees_somewhere_between(seed: int) -> None:
    values = list(network("gossip", GRAPHS["complete"], seed=seed).values.values())
    assert max(values) - min(values) < 1e-3 and min(values) > 1 and max(values) < 5
    assert abs(math.fsum(values) / 5 - 3) > 1e-3  # and not at the mean


def test_push_sum_finds_the_mean_though_a_third_of_all_words_is_lost_one_way() -> None:
    random = stream(0, "losses")
    lost = [
        Lose(float(second), f"n{a:02}", f"n{b:02}")
        for second in range(120)
        for a, b in CHORD.edges
        if random.random() < 0.3
    ]
    outcome = network("push-sum", CHORD, *lost, rounds=100)
    assert list(outcome.values.values()) == pytest.approx([3.0] * 5, abs=1e-3)
    assert not {"rejected", "quarantined"} & outcome.said.keys()


@pytest.mark.parametrize("schedule", ["pairwise", "gossip", "push-sum"])
def test_a_death_a_restart_and_who_comes_back_without_its_checkpoint_stop_nobody(schedule: str) -> None:
    faults = Crash(8.0, "n01"), Crash(12.0, "n03", back_after=3.0), Crash(16.0, "n05", back_after=2.0, resume=False)
    outcome = network(schedule, GRAPHS["ring"], *faults)
    assert outcome.finished == ("n00", "n02", "n03", "n04", "n05", "n06")
    assert {"died", "returned"} <= outcome.said.keys() and "rejected" not in outcome.said
    assert all(1 <= value <= 7 for value in outcome.values.values())


@pytest.mark.parametrize("schedule", ["pairwise", "push-sum"])
def test_who_lies_about_its_mass_is_shut_out_and_the_others_finish(schedule: str) -> None:
    outcome = network(schedule, GRAPHS["ring"], Lie(5.0, 6.0, "n02", "mass"))
    assert len(outcome.finished) == 7 and "quarantined" in outcome.said


# -- Planted bugs ----------------------------------------------------------------------------------------------------


class TakesAllAgain(RunningSums):
    """Each time the whole sum, as if nothing of it had been taken."""

    def take(self, sums: Sequence[tuple[str, Update]]) -> tuple[tuple[Contribution, ...], float]:
        self._taken.clear()
        return super().take(sums)


class AnswersTwice(Exchanges):
    """The newest update goes to everybody who asks."""

    def came(self, peer: str, update: Update, newest: int) -> Answer:
        if update.reach != ASKS_NOBODY:
            self._partners.pop(newest, None)
        return super().came(peer, update, newest)


class TakesAnyQuestionForTheAnswer(Exchanges):
    """Whatever comes of whom it asked, the two go to the middle."""

    def came(self, peer: str, update: Update, newest: int) -> Answer:
        return super().came(
            peer, replace(update, reach=ASKS - 1 if update.reach != ASKS_NOBODY else ASKS_NOBODY), newest
        )

    def declined(self, peer: str, own_round: int) -> None:
        pass


Planted = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("schedule", "name", "bug"),
    [
        ("push-sum", "RunningSums", TakesAllAgain),
        ("pairwise", "Exchanges", AnswersTwice),
        ("pairwise", "Exchanges", TakesAnyQuestionForTheAnswer),
    ],
)
def test_a_planted_bug_is_found(schedule: str, name: str, bug: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"p2pfl.node.{name}", bug)
    with pytest.raises(Broken):
        for seed in range(4):
            network(schedule, GRAPHS["complete"], seed=seed)
