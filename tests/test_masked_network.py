"""A network whose nodes learn only sums, in virtual time: the mean is the same, and no death makes garbage of it.

The simulation leaves the masks out and remembers for which sum each part was made: folding parts of different sums, or
not all of one, breaks an invariant (`a_sum_is_whole`), for with masks it would be noise.
"""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest

from p2pfl.config import TopologySection
from p2pfl.gathering import Gatherings
from p2pfl.messages import Conceal, Gathering, MaskKey
from p2pfl.node import Node, Settings
from p2pfl.sim.engine import Engine, run
from p2pfl.sim.faults import Break, Crash, CrashAtDeed, Fault, Lose, Pause
from p2pfl.sim.invariants import Broken
from p2pfl.sim.scenario import Scenario, random_scenario, scenario, static
from p2pfl.topology import build

NO_KEY = MaskKey("", 1, bytes(32))
SUITE_SEEDS = range(60)  # of random scenarios; those with masked sums are run


def masked(graph: nx.Graph, *faults: Fault, seed: int = 0, rounds: int = 12, **changes: object) -> Scenario:
    settings = Settings("", rounds=rounds, checkpoint_every=3, mask_key=NO_KEY)
    named = nx.relabel_nodes(graph, {i: f"n{i:02}" for i in graph})
    return scenario(static(named), seed, settings=settings, faults=faults, **changes)


def healing(n: int, *faults: Fault, rounds: int = 60) -> Scenario:
    section = TopologySection.model_validate({"graph": "random-regular", "degree": 4, "nodes": n})
    settings = Settings("", rounds=rounds, suspicion=5.0, mask_key=NO_KEY)
    return scenario(build(section, 0), 0, section, settings=settings, faults=faults)


@pytest.mark.parametrize("weights", ["metropolis", "lazy", "samples", "inverse"])
def test_without_faults_sums_give_what_single_vectors_give(weights: str) -> None:
    graph = nx.random_regular_graph(4, 9, seed=2)
    masses = {f"n{i:02}": float(1 + i) if weights in ("samples", "inverse") else 1.0 for i in range(9)}
    one = masked(graph, masses=masses, rate=0.1)
    settings = replace(one.settings, weights=weights, equal_masses=weights in ("metropolis", "lazy"))
    sums = run(replace(one, settings=settings))
    alone = run(replace(one, settings=replace(settings, mask_key=None)))
    assert sums.values == alone.values and "no_sum" not in sums.said and "too_few" not in sums.said


@pytest.mark.parametrize("back_after", [None, 2.5], ids=["for good", "and comes back"])
def test_a_sender_that_dies_at_any_moment_leaves_a_right_sum_or_none(back_after: float | None) -> None:
    """At each thing that it does in five rounds, phase one and two and between them: the invariants look at each fold.

    And after it, the others average on, among themselves or with it.
    """
    for deed in range(1, 400):
        crash = CrashAtDeed(0.0, "n01", deed, False, back_after)
        played = Engine(masked(nx.complete_graph(5), crash, rounds=6))
        outcome = played.run()
        survivors = [f"n{i:02}" for i in (0, 2, 3, 4)]
        assert set(survivors) <= set(outcome.finished)
        values = [outcome.values[name] for name in survivors]
        assert max(values) - min(values) < 2.0, f"deed {deed}: {values}"  # they began 4 apart: at least one sum counted
        if played.machines["n01"].doom:
            break  # it has done everything
    assert deed > 60


def test_the_dead_cost_one_sum_and_no_more() -> None:
    outcome = run(masked(nx.complete_graph(6), Crash(5.5, "n02"), rounds=20))
    assert outcome.said["no_sum"] == 5 and set(outcome.finished) == {f"n{i:02}" for i in (0, 1, 3, 4, 5)}
    values = [outcome.values[name] for name in outcome.finished]
    assert np.ptp(values) < 1e-6


def test_survivors_find_new_senders_when_the_graph_heals() -> None:
    outcome = run(healing(10, Crash(5.5, "node-2"), Crash(8.5, "node-7")))
    assert len(outcome.finished) == 8
    assert np.ptp([outcome.values[name] for name in outcome.finished]) < 1e-3
    assert "too_few" not in outcome.said or outcome.said["too_few"] < 40  # while the graph had gaps


def test_a_lost_part_and_a_broken_link_cost_at_most_their_sum() -> None:
    outcome = run(masked(nx.complete_graph(5), Lose(3.0, "n00", "n01"), Break(7.0, "n02", "n03"), rounds=20))
    assert len(outcome.finished) == 5 and outcome.said.get("no_sum", 0) <= 2
    assert np.ptp(list(outcome.values.values())) < 1e-5


def test_who_stood_still_comes_back_with_a_mean_and_moves_nobody_before() -> None:
    """It slept through rounds: it does not drag its old vector into the others' sums, but takes one of theirs first."""
    outcome = run(masked(nx.complete_graph(6), Pause(4.0, 30.0, "n03"), rounds=40, rate=0.0))
    assert len(outcome.finished) == 6 and outcome.said["caught_up"] >= 1
    values = list(outcome.values.values())
    assert np.ptp(values) < 1e-6 and 0.0 <= min(values) <= max(values) <= 5.0


def test_who_starts_late_takes_a_mean_first() -> None:
    """Five nodes have agreed on 2, the mean of 0 to 4; the sixth comes with its own 5, which then weighs nothing."""
    late = masked(nx.complete_graph(6), rounds=60, starts={"n05": 40.0})
    late = replace(late, settings=replace(late.settings, join_timeout=3.0))
    outcome = run(late)
    assert len(outcome.finished) == 6
    assert outcome.values["n05"] == pytest.approx(2.0, abs=1e-6) and outcome.values["n00"] == pytest.approx(
        2.0, abs=1e-6
    )


def test_random_networks_under_random_faults_hold_their_promises() -> None:
    hours, said = 0.0, dict[str, int]()
    for seed in SUITE_SEEDS:
        drawn = random_scenario(seed, 6.0)
        if drawn.settings.mask_key is not None:
            outcome = run(drawn)
            hours += outcome.node_hours
            said = {key: said.get(key, 0) + outcome.said.get(key, 0) for key in said.keys() | outcome.said.keys()}
    assert hours > 2.0 and said["no_sum"] > 0 and said["caught_up"] > 0


# -- The invariants find what they are for ---------------------------------------------------------------------------


def broken_by(node: type[Node] | None = None) -> str:
    """The invariant that the first death breaks, whenever it happens."""
    for deed in range(10, 120, 3):
        crash = CrashAtDeed(0.0, "n01", deed, False, 2.5)
        try:
            run(masked(nx.complete_graph(5), crash, rounds=6), make_node=node or Node)
        except Broken as broken:
            return broken.invariant
    return ""


class FoldsWhatCame(Node):
    """A node that mixes a sum although somebody is missing from it."""

    def _fold_gathered(self, gatherings: Gatherings) -> None:
        keys = tuple(k for k in gatherings.asked.keys if self.round in self.neighbours[k.name].updates)
        gatherings.asked = replace(gatherings.asked, keys=keys)
        super()._fold_gathered(gatherings)


def test_a_node_that_folds_an_incomplete_sum_is_found_out() -> None:
    assert broken_by(FoldsWhatCame) == "a_sum_is_whole"


def test_a_node_that_throws_whole_sums_away_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "_counts", lambda *_: False)
    assert broken_by() == "a_whole_sum_is_folded"


def test_two_sums_of_one_round_are_never_both_given() -> None:
    """Of what any two nodes sent in a round, no receiver has two: it could take one from the other."""
    given: dict[tuple[str, str, int, int], Gathering] = {}

    class Watched(Node):
        def _concealed(self, job: Conceal, sealed: object | None, why: str) -> None:
            one = (self.settings.name, job.peer, job.round, self.settings.epoch)
            assert given.setdefault(one, job.gathering) == job.gathering
            super()._concealed(job, sealed, why)

    run(masked(nx.complete_graph(6), Crash(5.2, "n01", back_after=1.5), Pause(9.0, 4.0, "n02")), make_node=Watched)
    assert len(given) > 200


# -- And then it goes on ---------------------------------------------------------------------------------------------

CUBE = nx.convert_node_labels_to_integers(nx.hypercube_graph(3))
IN_A_ROW = nx.circulant_graph(10, [1, 2])


@pytest.mark.parametrize(
    ("graph", "faults"),
    [
        (CUBE, (Pause(4.0, 30.0, "n00"), Pause(4.0, 30.0, "n01"))),
        (CUBE, (Crash(4.0, "n00", back_after=30.0), Crash(4.0, "n01", back_after=30.0))),
        (IN_A_ROW, tuple(Pause(4.0, 9.0, f"n{i:02}") for i in range(3))),
        (IN_A_ROW, tuple(Pause(4.0, 30.0, f"n{i:02}") for i in range(3))),
    ],
    ids=["two of a cube stand still", "two of a cube crash", "three in a row, shortly", "three in a row, for long"],
)
def test_neighbours_that_are_behind_together_come_back_together(graph: nx.Graph, faults: tuple[Fault, ...]) -> None:
    """Each of them needs the others' parts to come back, and none of them may give before it is back."""
    outcome = run(masked(graph, *faults, rounds=120))
    assert len(outcome.finished) == len(graph)
    assert np.ptp(list(outcome.values.values())) < 1e-6


class Withholds(Node):
    """A member that asks for sums and gives none."""

    def _give(self, gatherings: Gatherings) -> None:
        if self.settings.name != "n03":
            super()._give(gatherings)


def test_who_asks_but_does_not_give_is_left_out_after_three_rounds() -> None:
    lost = Lose(3.0, "n00", "n01")  # beside it, or else the invariants would ask why the mean is not kept
    outcome = run(masked(nx.complete_graph(6), lost, rounds=40), make_node=Withholds)
    assert len(outcome.finished) == 6 and outcome.said["degraded"] >= 5
    honest = [outcome.values[f"n{i:02}"] for i in (0, 1, 2, 4, 5)]
    assert np.ptp(honest) < 0.05  # they began five apart; most rounds have a sum of four
