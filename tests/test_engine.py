"""The engine: stories of a network under faults, node-hours of random ones, and planted bugs that it must find."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from p2pfl import checkpoint, membership
from p2pfl.config import TopologySection
from p2pfl.membership import Membership
from p2pfl.messages import BadMessage, Compute, Contribution, Effect, Event, Heartbeat, LinkUp, Update
from p2pfl.node import Neighbour, Node, Phase, Settings
from p2pfl.rng import stream
from p2pfl.sim import world
from p2pfl.sim.engine import Engine, Outcome, replay, run
from p2pfl.sim.faults import (
    LASTING,
    LIES,
    Break,
    ClockJump,
    Corrupt,
    Crash,
    CrashAtDeed,
    Delay,
    DiskFull,
    Fault,
    Lie,
    Lied,
    Lose,
    Partition,
    Pause,
    Replay,
    Slow,
    Stop,
    describe,
    random_schedule,
)
from p2pfl.sim.invariants import Broken
from p2pfl.sim.scenario import Scenario, random_scenario, scenario, static
from p2pfl.sim.world import CHECKPOINT_STEPS, DRAFT, NEWEST, PREVIOUS, Disk, Saved
from p2pfl.topology import build
from p2pfl.topology.matrix import mixing_matrix

SUITE_HOURS = 50.0  # simulated node-hours of random faults in this file
SUITE_MINUTES = 8.0  # of each of its scenarios


# -- Builders --------------------------------------------------------------------------------------------------------


def names(n: int) -> list[str]:
    return [f"n{i:02}" for i in range(n)]


def plain(graph: nx.Graph, *faults: Fault, seed: int = 0, rounds: int = 30, **changes: object) -> Scenario:
    """Averaging over this graph, whose survivors get no other one; a second of computing a round."""
    named = nx.relabel_nodes(graph, dict(enumerate(names(len(graph)))))
    fields = {"rounds": rounds, "checkpoint_every": 5} | {k: v for k, v in changes.items() if hasattr(Settings, k)}
    rest = {k: v for k, v in changes.items() if not hasattr(Settings, k)}
    return scenario(static(named), seed, settings=Settings("", **fields), faults=faults, **rest)


def healing(graph: str, n: int, *faults: Fault, seed: int = 0, rounds: int = 30, **changes: object) -> Scenario:
    """The same over a graph that survivors draw anew."""
    weights = changes.pop("weights", None)
    section = TopologySection.model_validate({"graph": graph, "nodes": names(n), "weights": weights})
    settings = Settings("", rounds=rounds, checkpoint_every=5, weights=section.weighting, suspicion=5.0)
    return scenario(build(section, seed), seed, section, settings=settings, faults=faults, **changes)


class Played:
    """A simulation that has ended, and its trace."""

    def __init__(self, played: Scenario) -> None:
        self.engine = Engine(played, keep=True)
        self.outcome: Outcome = self.engine.run()
        self.lines = self.engine.trace.lines

    def times(self, node: str, word: str) -> list[float]:
        """When the trace says this of the node."""
        return [float(line.split()[0]) for line in self.lines if f" {node} {word}" in line]

    def rounds(self, node: str) -> list[float]:
        """How long each round took."""
        return list(np.diff(self.times(node, "computes ")))


# -- Nothing goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_without_faults_the_engine_is_the_mixing_matrix(seed: int) -> None:
    graph = nx.connected_watts_strogatz_graph(9, 4, 0.5, seed=seed)
    masses = {name: float(i % 4 + 1) for i, name in enumerate(names(9))}
    starts = {name: 0.9 * i for i, name in enumerate(names(9))}
    settings = {"weights": "samples", "equal_masses": False}
    played = plain(graph, seed=seed, rounds=12, masses=masses, starts=starts, transfer=0.2, **settings)
    matrix = mixing_matrix(played.topology.at(0), "samples", masses).toarray()
    expected = np.linalg.matrix_power(matrix, 12) @ np.arange(9.0)
    outcome = run(played)
    np.testing.assert_allclose([outcome.values[name] for name in names(9)], expected, rtol=0, atol=1e-13)
    assert outcome.finished == tuple(names(9)) and outcome.drift == 0.0
    assert not {"late", "died", "rejected", "suspected", "absent"} & outcome.said.keys()


def test_messages_keep_their_order_and_nothing_comes_without_a_link() -> None:
    breaks = [Break(3.0 + 1.7 * i, "n00", f"n{1 + i % 4:02}") for i in range(12)]
    played = Played(plain(nx.complete_graph(5), *breaks, latency=0.02, jitter=0.5, transfer=0.1))
    up: set[tuple[str, str]] = set()
    heard: dict[tuple[str, str], int] = {}
    for line in played.lines:
        match line.split():
            case [_, node, "up", peer, *_]:
                up.add((node, peer))
            case [_, node, "down", peer, *_]:
                up.discard((node, peer.rstrip(":")))
            case [_, node, "<", peer, "heartbeat", round, _]:
                assert (node, peer) in up
                assert heard.get((node, peer), 0) <= int(round)
                heard[node, peer] = int(round)
            case [_, node, "<", peer, *_]:
                assert (node, peer) in up
    assert played.outcome.said["suspected"] >= 20


# -- One seed, one trace ---------------------------------------------------------------------------------------------

PRINT_DIGESTS = """
from p2pfl.sim.engine import run
from p2pfl.sim.scenario import random_scenario
for seed in (1, 5, 9): print(run(random_scenario(seed, minutes=3)).digest)
"""


def test_one_seed_gives_one_trace_byte_for_byte_in_any_process() -> None:
    digests = []
    for hash_seed in ("1", "2"):  # a set that somebody iterates would come in another order
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PRINT_DIGESTS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.append(done.stdout.split())
    assert digests[0] == digests[1] and len(set(digests[0])) == 3


def test_a_failing_seed_is_named_and_replays() -> None:
    seed, broken = next(found(lambda seed: run(random_scenario(seed), make_node=FoldsAnyRound), range(20)))
    assert f"seed {seed}" in str(broken) and broken.invariant in str(broken)
    lines, again = replay(seed, make_node=FoldsAnyRound)
    assert isinstance(again, Broken) and str(again) == str(broken)
    assert lines[-len(broken.tail) :] == list(broken.tail)


def test_a_schedule_is_a_pure_function_of_its_seed_and_over_in_time() -> None:
    links = [("a", "b"), ("b", "c"), ("c", "a")]

    def drawn(seed: int) -> tuple[Fault, ...]:
        return random_schedule(stream(seed, "faults"), "abc", links, 7200.0, rate=200.0, liar="b")

    assert drawn(1) == drawn(1) != drawn(2)
    faults = drawn(1)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert {type(fault) for fault in faults} >= {
        Crash, CrashAtDeed, Stop, Pause, Partition, Delay, Break, Lose, Corrupt, Replay, Slow, DiskFull, ClockJump, Lie
    }  # fmt: skip
    assert all(fault.at + fault.seconds <= 7200.0 + 1e-3 for fault in faults if isinstance(fault, LASTING))
    assert len({describe(fault) for fault in faults}) > 0.5 * len(faults)
    assert all("\n" not in describe(fault) for fault in faults)
    with pytest.raises(ValueError, match="'flood' is no kind of fault"):
        random_schedule(stream(1), "ab", links[:1], 3600.0, rate=5.0, frequencies={"flood": 1.0})


# -- Deaths ----------------------------------------------------------------------------------------------------------


def test_half_of_sixteen_nodes_killed_at_once_cost_the_others_one_grace() -> None:
    victims = names(16)[::2]
    graph = nx.random_regular_graph(4, 16, seed=3)
    played = Played(plain(graph, *(Crash(10.5, name) for name in victims)))
    assert set(played.outcome.finished) == set(names(16)) - set(victims)
    calm = max(played.rounds("n01")[:5])
    for name in played.outcome.finished:
        assert max(played.rounds(name)) <= calm + 1.0 + 0.2  # the grace, and other delays drawn
        assert sum(seconds > calm + 0.5 for seconds in played.rounds(name)) <= 1
    assert played.outcome.said["died"] == sum(
        (a in victims) != (b in victims) for a, b in played.engine.scenario.topology.at(0).edges
    )


def test_half_of_sixteen_nodes_killed_at_once_leave_a_graph_in_one_piece() -> None:
    victims = names(16)[:8]
    played = Played(healing("ring", 16, *(Crash(10.5, name) for name in victims), rounds=80))
    assert played.outcome.finished == tuple(names(16)[8:])
    assert "survivors" not in played.outcome.said  # as an invariant says
    last = [line for line in played.lines if " ! rewired " in line]
    assert {line.split()[1] for line in last} == set(names(16)[8:])
    values = [played.outcome.values[name] for name in played.outcome.finished]
    assert max(values) - min(values) < 0.1  # of eight that were one apart, in two halves that the dead kept asunder


DEEDS = range(1, 10_000)


@pytest.mark.parametrize(("power", "back_after"), [(False, None), (False, 3.0), (True, 3.0)])
def test_killed_before_each_of_its_deeds_in_turn_it_never_stops_the_others(
    power: bool, back_after: float | None
) -> None:
    settings = {"rounds": 5, "checkpoint_every": 2}
    for deed in DEEDS:
        crash = CrashAtDeed(0.0, "n01", deed, power, back_after)
        played = Engine(plain(nx.cycle_graph(4), crash, **settings))
        outcome = played.run()
        assert {"n00", "n02", "n03"} <= set(outcome.finished)
        assert "n01" in outcome.finished or back_after is None or not played.machines["n01"].checkpoints
        if played.machines["n01"].doom:
            break  # it has done everything
    assert 40 < deed < 200


def test_all_killed_at_once_and_started_again_end_as_if_nothing_had_been() -> None:
    """Bit for bit: every node goes on from the same round, with what it had folded by then."""
    graph = nx.cycle_graph(6)
    calm = run(plain(graph, rounds=20, rate=0.1))
    kills = [Crash(15.2, name, power=True, back_after=3.0 + i) for i, name in enumerate(names(6))]
    played = Played(plain(graph, *kills, rounds=20, rate=0.1))
    assert played.outcome.values == calm.values
    assert [line.split()[-2] for line in played.lines if " epoch 2, " in line] == ["10,"] * 6


def test_who_comes_late_takes_up_where_the_others_are() -> None:
    late = plain(nx.complete_graph(6), rounds=100, starts={"n05": 70.0}, join_timeout=3.0)
    played = Played(late)
    assert played.outcome.finished == tuple(names(6))
    (caught_up,) = played.times("n05", "! caught_up")
    assert caught_up < 75.0
    ends = [played.times(name, "! finished")[0] for name in names(6)]
    assert max(ends) - min(ends) < 2.0


def test_who_starts_again_when_its_first_neighbours_are_dead_finds_the_others() -> None:
    """It remembers no address but those of its neighbours at the start, and nobody else's graph has an edge to it."""
    ring = names(8)
    faults = [Crash(20.0, ring[2], back_after=150.0), Crash(70.0, ring[1]), Crash(71.0, ring[3])]
    played = Played(healing("ring", 8, *faults, rounds=400))
    assert set(played.outcome.finished) == set(ring) - {ring[1], ring[3]}
    assert played.times(ring[2], "! caught_up")


# -- Cuts and pauses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [1.0, 1.6])
def test_a_ring_cut_in_two_for_twenty_rounds_goes_on_and_merges(slow: float) -> None:
    halves = (tuple(names(16)[:8]), tuple(names(16)[8:]))
    seconds = {name: slow if name in halves[1] else 1.0 for name in names(16)}
    cut = Partition(10.2, 22.0, halves)
    played = Played(plain(nx.cycle_graph(16), cut, rounds=90, compute_seconds=seconds))
    assert played.outcome.finished == tuple(names(16))
    assert played.outcome.said["died"] == played.outcome.said["returned"] == 4
    during = [t for t in played.times("n04", "computes ") if 10.2 < t < 32.2]
    assert len(during) >= 12  # it goes on
    last = [line for line in played.lines if " n08 ends 89 " in line]
    assert "with n07,n09 not" in last[0]  # they average across the cut again
    assert max(played.rounds("n04")[-20:]) < 2 * slow


@pytest.mark.parametrize("sender", range(6))
@pytest.mark.parametrize("onwards", [True, False])
def test_each_one_way_cut_of_a_ring_is_survived(sender: int, onwards: bool) -> None:
    receiver = (sender + (1 if onwards else -1)) % 6
    cut = Partition(5.2, 30.0, ((names(6)[sender],), (names(6)[receiver],)), one_way=True)
    outcome = run(plain(nx.cycle_graph(6), cut, rounds=60))
    assert outcome.finished == tuple(names(6))
    assert outcome.said["died"] == outcome.said["returned"] == 2  # a link needs both ways
    assert outcome.seconds < 90.0


def test_what_a_short_cut_holds_back_arrives_when_it_heals() -> None:
    cut = Partition(5.2, 3.0, (("n00",), ("n01",)))
    outcome = run(plain(nx.cycle_graph(4), cut, rounds=20))
    assert outcome.drift == 0.0 and "suspected" not in outcome.said and "died" not in outcome.said


def test_stopped_for_a_minute_it_is_taken_for_dead_and_comes_back_and_condemns_nobody() -> None:
    played = Played(plain(nx.complete_graph(5), Pause(10.2, 60.0, "n02"), rounds=120))
    assert played.outcome.finished == tuple(names(5))
    assert sorted(line.split()[1] for line in played.lines if "died peer=n02" in line) == ["n00", "n01", "n03", "n04"]
    assert not [line for line in played.lines if " n02 ! died" in line]
    assert played.outcome.said["returned"] == 8
    assert played.times("n02", "! caught_up")
    assert max(played.rounds("n00")) < 8.0  # the silence, once


def test_both_sides_of_a_cut_draw_graphs_of_their_own_and_one_when_it_heals() -> None:
    halves = (tuple(names(10)[:5]), tuple(names(10)[5:]))
    played = Played(healing("ring", 10, Partition(10.2, 90.0, halves), rounds=200))
    assert played.outcome.finished == tuple(names(10))
    for name in names(10):
        members = [
            int(n) for line in played.lines if f" {name} ! rewired" in line for n in re.findall(r"members=(\d+)", line)
        ]
        assert 5 in members and members[-1] == 10


# -- What a fault costs ----------------------------------------------------------------------------------------------

# Seconds that a run takes longer, at most: what is over after so many rounds was not waited for again and again.
COSTS: dict[str, tuple[Fault, float]] = {
    "a lost update": (Lose(5.2, "n00", "n01"), 5.0),  # the patience
    "a broken link": (Break(5.2, "n00", "n01"), 2.0),
    "a restart": (Crash(5.2, "n00", back_after=3.0), 13.0),  # and two patiences until it is in step again
    "a pause": (Pause(5.2, 20.0, "n00"), 20.0),
    "slowness": (Slow(5.2, 20.0, "n00", 6.0), 20.0),
}


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("fault", COSTS)
def test_a_fault_costs_what_it_lasts_and_no_more(fault: str, two_way: bool) -> None:
    """Nobody goes on waiting for what cannot come any more."""
    graphs = (nx.cycle_graph(6), nx.complete_graph(6), nx.random_regular_graph(3, 8, seed=1))
    for seed, graph in enumerate(graphs * 2):
        usual = {"rounds": 80, "two_way": two_way, "latency": 0.05, "jitter": 0.05, "seed": seed}
        calm, cost = run(plain(graph, **usual)), COSTS[fault][1]
        struck = run(plain(graph, COSTS[fault][0], **usual))
        assert struck.finished == calm.finished
        assert struck.seconds - calm.seconds < cost + 6.0  # within a patience and some delays


def test_who_gets_slow_is_waited_for_three_times_then_counts_late_and_is_restored_when_it_is_fast_again() -> None:
    slow = Slow(20.2, 150.0, "n02", 40.0)
    played = Played(plain(nx.complete_graph(6), slow, rounds=260, latency=0.05))
    assert played.outcome.finished == tuple(names(6))
    said = played.outcome.said
    assert said["degraded"] == said["restored"] == 5  # once by each of the others: no oscillation
    begins, ends = max(played.times("n00", "! degraded")), min(played.times("n00", "! restored"))
    assert begins < 20.2 + 3 * 5.0 + 3 * 2.0 and ends > 170.0  # three patiences, three rounds
    during = np.diff([t for t in played.times("n00", "computes ") if begins < t < 170.0])
    assert max(during) < 1.5  # as fast as without it
    late = [line for line in played.lines if " n00 computes " in line and re.search(r"of.* n02:", line)]
    late = [line for line in late if begins < float(line.split()[0]) < 170.0]
    assert late  # and yet what it sends is folded
    for line in late:
        found = re.search(r"computes (\d+) .* n02:(\d+):([\d.e-]+)", line)
        assert found is not None
        behind = int(found[1]) - 1 - int(found[2])
        assert behind > 0 and float(found[3]) == pytest.approx(1 / 6 / (1 + behind))


def test_a_lost_update_moves_the_mean_by_what_the_ledger_says_and_two_way_edges_keep_it() -> None:
    """algorithms §3.3: an update that comes one way only moves the mean by w (x_a - x_b) / n."""
    lose = Lose(0.0, "n01", "n00")
    for two_way in (False, True):
        # The first update of all is lost; nobody ever has another chance at that round.
        outcome = run(plain(nx.cycle_graph(4), lose, rounds=1, join_timeout=2.0, patience=1.0, two_way=two_way))
        mean = math.fsum(outcome.values.values()) / 4
        assert mean == pytest.approx(1.5 if two_way else 1.5 - 1 / 12, abs=1e-15)
        assert outcome.drift == pytest.approx(0.0 if two_way else -1 / 12, abs=1e-15)


@pytest.mark.parametrize("weights", ["max-degree", "metropolis"])
def test_weights_of_the_whole_graph_keep_the_mean_while_members_are_of_two_minds(weights: str) -> None:
    """Who has not yet heard of a death weighs an edge as before; the other end must not weigh it otherwise."""
    away = Crash(9.3, "n03", back_after=20.0)
    for seed in range(6):
        outcome = run(healing("star", 8, away, seed=seed, rounds=60, weights=weights, latency=0.3))
        assert len(outcome.finished) == 8


def test_with_push_sum_no_vector_runs_away_from_who_is_no_longer_told_anything() -> None:
    """Its mass is halved in every round; what training does to its vector must not be doubled."""
    cycle = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    played = plain(cycle, Crash(5.2, "n00"), rounds=150, weights="push-sum", rate=0.2)
    outcome = run(played)
    assert outcome.finished == ("n01", "n02")
    assert all(abs(value) < 5.0 for value in outcome.values.values())


# -- Disks, clocks ---------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_no_training_and_delays_a_start() -> None:
    full = DiskFull(8.0, 12.0, "n01")
    played = Played(plain(nx.cycle_graph(4), full, Crash(13.0, "n01", back_after=1.0), rounds=40))
    assert played.outcome.finished == tuple(names(4))
    assert played.times("n01", "! checkpoint_failed") and played.times("n01", "cannot write its epoch")
    (start,) = [line for line in played.lines if " n01 starts, epoch 2" in line]
    assert " round 5," in start and float(start.split()[0]) > 20.0


def test_a_clock_that_jumps_ten_years_changes_no_event() -> None:
    usual = [Crash(7.3, "n01", back_after=4.0), Pause(9.0, 8.0, "n02"), Break(12.0, "n00", "n03")]
    jumps = [ClockJump(t, f"n{i:02}", by) for i, (t, by) in enumerate([(3.0, 3e8), (8.0, -3e8), (11.0, 86_400.0)])]
    traces = []
    for faults in (usual, sorted([*usual, *jumps], key=lambda fault: fault.at)):
        played = Played(plain(nx.cycle_graph(4), *faults))
        traces.append([line for line in played.lines if "# the clock of" not in line])
    assert traces[0] == traces[1]


def test_the_simulated_checkpoint_is_written_in_the_steps_of_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {f".{checkpoint.NEWEST}.tmp": DRAFT, checkpoint.NEWEST: NEWEST, checkpoint.PREVIOUS: PREVIOUS}
    steps: list[tuple[str, ...]] = []
    open_, replace_, sync = Path.open, Path.replace, os.fsync

    def opened(path: Path, *mode: str) -> object:
        steps.append(("write", known[path.name]))
        return open_(path, *mode)

    def replaced(path: Path, target: Path) -> Path:
        steps.append(("rename", known[path.name], known[target.name]))
        return replace_(path, target)

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append(("sync folder",) if path.is_dir() else ("sync", known[path.name]))
        sync(descriptor)

    checkpoint.write(tmp_path / "c", checkpoint.Checkpoint(1, 1.0, {}), b"x")
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synced)
    checkpoint.write(tmp_path / "c", checkpoint.Checkpoint(2, 1.0, {}), b"x")
    assert tuple(steps) == CHECKPOINT_STEPS


def performed(disk: Disk, saved: Saved, steps: tuple[tuple[str, ...], ...]) -> None:
    for step in steps:
        match step:
            case ("write", name):
                disk.write(name, saved)
            case ("sync", name):
                disk.sync(name)
            case ("rename", name, to):
                disk.rename(name, to)
            case ("sync folder",):
                disk.sync_folder()


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("done", range(len(CHECKPOINT_STEPS) + 1))
def test_whatever_step_a_checkpoint_ends_at_the_old_or_the_new_one_is_found_whole(done: int, power: bool) -> None:
    for chance in range(20):
        disk, generations = Disk(), [Saved(i, i, 1.0, float(i)) for i in (1, 2, 3)]
        for saved in generations[:2]:
            performed(disk, saved, CHECKPOINT_STEPS)
        performed(disk, generations[2], CHECKPOINT_STEPS[:done])
        if power:
            disk.lose_power(np.random.default_rng(chance))
        found = disk.read()
        assert found in generations[1:]
        if done == len(CHECKPOINT_STEPS):
            assert found is generations[2]
        performed(disk, generations[2], CHECKPOINT_STEPS)  # and the next one goes as ever
        assert disk.read() is generations[2]


# -- Lies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("about", LIES)
def test_a_member_that_lies_stops_nobody(about: Lied) -> None:
    played = Played(healing("random-regular", 10, Lie(8.0, 40.0, "n04", about), rounds=100))
    assert set(played.outcome.finished) >= set(names(10)) - {"n04"}
    honest = [name for name in names(10) if name != "n04"]
    assert all(0.0 <= played.outcome.values[name] <= 9.0 for name in honest)
    slowest = max(max(played.rounds(name)) for name in honest)
    assert slowest < 8.0  # a silence or a patience, never more
    if about == "mass":
        assert played.outcome.said["quarantined"] >= 4
    if about == "deaths":  # a hint from one member; the accused refute it
        assert "lost" not in played.outcome.said


# -- Whatever happens ------------------------------------------------------------------------------------------------


def test_fifty_node_hours_of_random_faults_break_no_invariant() -> None:
    hours, seed, said = 0.0, 0, set[str]()
    while hours < SUITE_HOURS:
        outcome = run(random_scenario(seed, SUITE_MINUTES))
        hours, seed, said = hours + outcome.node_hours, seed + 1, said | outcome.said.keys()
    assert said >= {  # there was something to survive
        "alone", "caught_up", "checkpoint", "checkpoint_failed", "died", "late", "left", "lost", "quarantined",
        "rejected", "returned", "rewired",
    }  # fmt: skip


def test_the_soak_ends_with_a_verdict() -> None:
    script = Path(__file__).parent.parent / "scripts" / "soak.py"
    command = [sys.executable, str(script), "--seeds", "3", "--hours", "0.5", "--minutes", "2", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"3 seeds, \d+\.\d node-hours: no invariant was broken", done.stdout)


# -- Planted bugs ----------------------------------------------------------------------------------------------------


class NeverWoken(Node):
    """A timer is dropped."""

    @property
    def deadline(self) -> float | None:
        return None if self.phase is Phase.COLLECTING else super().deadline


class Spins(Node):
    """A timer that is never set forward."""

    def _heartbeat(self) -> None:
        self._send(self._listeners(), Heartbeat(self.round))


class FoldsTwice(Node):
    """What was folded stays there, to be folded again."""

    def _take_update(self, neighbour: Neighbour) -> Update | None:
        kept = dict(neighbour.updates)
        update = super()._take_update(neighbour)
        neighbour.updates.update(kept)
        return update


class FoldsAnyRound(Node):
    def _take_update(self, neighbour: Neighbour) -> Update | None:
        return neighbour.updates.popitem()[1] if neighbour.updates else None


class TakesStale(Node):
    """What has already come is taken again."""

    def check_offer(self, peer: str, round: int) -> None:
        neighbour = self.neighbours.get(peer, Neighbour(peer))
        neighbour.heard, heard = -1, neighbour.heard
        try:
            super().check_offer(peer, round)
        finally:
            neighbour.heard = heard


class KeepsAll(Node):
    """Neither too many nor too new are refused."""

    def check_offer(self, peer: str, round: int) -> None:
        try:
            super().check_offer(peer, round)
        except BadMessage as error:
            if error.code not in ("busy", "future"):
                raise


class Renormalises(Node):
    """The weight of who is missing goes to the others, not to oneself."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        return [self._shared(e) if isinstance(e, Compute) else e for e in super().handle(event, now)]

    def _shared(self, job: Compute) -> Compute:
        got, full = sum(c.weight for c in job.contributions), (job.reach - job.mass) / job.reach
        shares = tuple(replace(c, weight=c.weight * full / got) for c in job.contributions)
        return replace(job, contributions=shares)


class NeverForgetsTheDead(Node):
    def _listen_for_silence(self) -> None:
        pass


class SendsAgainToAll(Node):
    """When one link is back, everybody gets the updates again."""

    def _send_again(self, event: LinkUp, newest: int) -> None:
        for own in self._own_updates:
            self._send(self._listeners(), own.update)


class TakesSilenceForConsent(Node):
    """Two-way edges count without the other's word."""

    def _may_fold(self, neighbour: Neighbour) -> bool:
        return True


class HoldsItsPauseAgainstOthers(Node):
    def _forgive_own_pause(self, now: float) -> None:
        pass


class BelievesTheDeadProcess(Node):
    """What came of a process before it was started again still counts."""

    def _link_up(self, event: LinkUp) -> None:
        kept = dict(self.neighbours[event.peer].updates) if event.peer in self.neighbours else {}
        super()._link_up(event)
        if event.peer in self.neighbours:
            self.neighbours[event.peer].updates.update(kept)


class ForgetsOne(Node):
    """Of the updates that came in time, one is dropped."""

    def _fold(self) -> None:
        held = [neighbour for neighbour in self.neighbours.values() if neighbour.updates]
        for neighbour in held[:1]:
            neighbour.updates.clear()
        super()._fold()


class GivesPortionsToNewcomers(Node):
    """With push-sum: whoever comes after the portions were cut gets one as well."""

    def _compute(self, round: int, contributions: tuple[Contribution, ...], jump: bool = False) -> None:
        super()._compute(round, contributions, jump)
        self._told = None


def found(simulate: Callable[[int], object], seeds: range) -> Iterator[tuple[int, Broken]]:
    """The seeds at which an invariant breaks."""
    for seed in seeds:
        try:
            simulate(seed)
        except Broken as broken:
            yield seed, broken


PLANTED = [
    (NeverWoken, {"every_wait_has_a_timer"}),
    (Spins, {"every_wait_has_a_timer"}),
    (FoldsTwice, {"nothing_is_folded_twice"}),
    (FoldsAnyRound, {"nothing_stale_is_folded", "what_came_in_time_counts"}),
    (KeepsAll, {"caps_hold"}),
    (Renormalises, {"both_ends_weigh_alike", "weights_make_a_mean"}),
    (NeverForgetsTheDead, {"every_wait_has_a_timer", "the_isolated_go_on", "all_have_finished"}),
    (SendsAgainToAll, {"nothing_is_sent_twice"}),
    (TakesSilenceForConsent, {"two_ways_or_not_at_all"}),
    (HoldsItsPauseAgainstOthers, {"the_dead_were_silent"}),
    (BelievesTheDeadProcess, {"only_what_came_is_folded"}),
    (ForgetsOne, {"what_came_in_time_counts"}),
    (GivesPortionsToNewcomers, {"no_portion_is_given_twice"}),
]


@pytest.mark.parametrize(("mutant", "invariants"), PLANTED, ids=[mutant.__name__ for mutant, _ in PLANTED])
def test_a_planted_bug_of_the_node_is_found(mutant: type[Node], invariants: set[str]) -> None:
    _, broken = next(found(lambda seed: run(random_scenario(seed, 6.0), make_node=mutant), range(25)))
    assert broken.invariant in invariants, broken


def test_an_update_that_comes_again_and_is_taken_again_is_found_out() -> None:
    again = [Replay(3.0 + 0.7 * i, "n00", "n01", update=True) for i in range(30)]
    simulate = partial(plain, nx.cycle_graph(4), *again, staleness=1.0)
    assert run(simulate(seed=0)).said["rejected"]
    _, broken = next(found(lambda seed: run(simulate(seed=seed), make_node=TakesStale), range(5)))
    assert broken.invariant in ("no_number_goes_back", "nothing_is_folded_twice")


UNSYNCED = tuple(step for step in CHECKPOINT_STEPS if step != ("sync", DRAFT))
IN_PLACE = (("write", NEWEST), ("sync", NEWEST), ("sync folder",))
FOLDER_UNSYNCED = CHECKPOINT_STEPS[:-1]


@pytest.mark.parametrize(
    "steps", [UNSYNCED, IN_PLACE, FOLDER_UNSYNCED], ids=["unsynced", "in place", "folder unsynced"]
)
def test_a_checkpoint_that_is_written_carelessly_is_found_out(
    steps: tuple[tuple[str, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "CHECKPOINT_STEPS", steps)

    def powerless(deed: int) -> Outcome:
        crash = CrashAtDeed(0.0, "n01", deed, power=True, back_after=3.0)
        return run(plain(nx.cycle_graph(4), crash, seed=deed, rounds=12, checkpoint_every=2))

    _, broken = next(found(powerless, range(1, 200)))
    assert broken.invariant == "what_was_saved_is_found"


def test_a_membership_that_takes_old_news_for_new_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "newer", lambda record, than: record != than)
    _, broken = next(found(lambda seed: run(random_scenario(seed, 6.0)), range(25)))
    assert broken.invariant == "members_never_go_back"


@pytest.mark.parametrize("method", ["pass_time", "_refute"])
def test_a_membership_that_buries_nobody_or_refutes_nothing_is_found_out(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Membership, method, lambda *_: [])
    simulate = random_scenario if method == "pass_time" else accused
    _, broken = next(found(lambda seed: run(simulate(seed)), range(25)))
    assert broken.invariant in ("members_agree_on_who_lives", "the_living_are_not_buried"), broken


def accused(seed: int) -> Scenario:
    """One member says of all others that they are dead."""
    return healing("ring", 8, Lie(100.0, 40.0, "n04", "deaths"), seed=seed, rounds=150)
