"""Averaging without common rounds: what keeps the mean, what finds it whatever is lost, and how a node plays its part.

Theorems on numbers first, then stories of one node with exact times, then networks in virtual time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from test_learner import learner
from test_node import NEVER, computed, fresh, got, said, ticks, words
from test_node import up as link_up

from p2pfl import asynchronous
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
    Send,
    Tick,
    Update,
)
from p2pfl.node import MAX_MASS, Node, Settings
from p2pfl.rng import stream
from p2pfl.sim.engine import Outcome, run
from p2pfl.sim.faults import Crash, Fault, Lie, Lose
from p2pfl.sim.invariants import Broken
from p2pfl.sim.scenario import random_scenario, scenario, static
from p2pfl.topology import partners
from p2pfl.trainer import Term, Trainer
from p2pfl.weights import Stake, mass_after


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
    assert bob.came("dave", update(5, "dave", reach=ASKS), newest=None) is Answer.DECLINED  # it has none


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
    alice.came("bob", update(4, "b4"), newest=4)
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
    merged = (1 - sum(weights.values())) * values[0] + sum(w * v for w, v in zip(weights.values(), values[1:], strict=True))
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


def test_ten_thousand_rounds_of_float32_lose_nothing_that_was_handed_out() -> None:
    """A sum of 5,000 portions has lost half its digits: what they do not hold stays with whoever hands it out."""
    settings = ["topology.nodes=2", "train.local_steps=0", "train.evaluate_every=1000000", "train.rounds=1000000"]
    settings += ["topology.graph=complete", "mix.schedule=push-sum", "network.heal=false"][:2]
    experiment = load(settings=settings)
    trainers = [
        Trainer(learner(name=name, local_steps=0, evaluate_every=1_000_000, rounds=1_000_000), experiment, name, varies=False)
        for name in ("node-0", "node-1")
    ]
    torch.manual_seed(0)
    for trainer in trainers:
        trainer.learner.vector.normal_()
    start = sum(trainer.learner.vector.double() for trainer in trainers)
    sums, last = [RunningSums(1.0), RunningSums(1.0)], [torch.zeros_like(start, dtype=torch.float32)] * 2
    for ledger in sums:
        ledger.tell((("other", 1),))
    clock = itertools.count().__next__
    for round in range(10_000):
        for me, other in ((0, 1), (1, 0)):
            contributions, kept = (), 1.0
            if sums[other].handed_out and (round + me) % 3:  # every third one is lost
                told = update(round, None, mass=sums[other].handed_out, reach=sums[other].reach)
                contributions, kept = sums[me].take([("other", told)])
            job = Compute(round, contributions, 1.0, 1.0, True, kept=kept)
            terms = [Term("other", c.weight, last[other], c.reference) for c in contributions]
            trainers[me].fold(job, terms, clock)
            portion = sums[me].hand_out()
            trainers[me].train(replace(job, portion=portion, told=1), clock)
            last[me] = trainers[me].public.clone()
    total = sum(s.mass * t.learner.vector.double() for s, t in zip(sums, trainers, strict=True))
    for me, other in ((0, 1), (1, 0)):
        _, taken = sums[other]._taken["other"]
        untaken = sums[me].handed_out - taken
        total += last[me].double() - trainers[other]._absorbed["other"].double() if untaken else 0.0
    assert sums[0].handed_out > 3000
    assert torch.allclose(total, start, rtol=0, atol=2e-4)


