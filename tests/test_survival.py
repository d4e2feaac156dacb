"""Real nodes that are killed, started again and stopped, and what the others make of it."""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path

import pytest
from processes import events, metrics, started, up, wait_for_line

NODES = [f"node-{i}" for i in range(8)]
LONG_ENOUGH = "train.rounds=160"
HERE = Path(__file__).parent  # where slow_model.py is found
SLOW = ("model.name=slow_model:model", "train.local_steps=1")  # 50 ms a round, on any machine
GRACE = 1.0  # seconds, the default: what a dead neighbour costs those who wait for it


def said(run: Path, node: str, word: str) -> list[dict]:
    return [event for event in events(run, node) if event["event"] == word]


def around(run: Path, node: str) -> set[str]:
    """Whom the node averaged with in its last round."""
    return set(metrics(run, node)[-1]["merged"])


def test_survivors_of_a_kill_close_the_ring(tmp_path: Path) -> None:
    summary = up(
        "ring-8",
        tmp_path / "run",
        "train.rounds=160",  # eight seconds: a busy machine stretches the suspicion
        *SLOW,
        "network.suspicion=1",
        'faults=[{kind="kill", node=3, round=10}]',
        cwd=HERE,
    )
    assert summary["failed"] == ["node-3"] and summary["finished"] == 7
    assert set(summary["rejected"]) <= {"future"}  # new neighbours may be a round apart when they meet
    for node in set(NODES) - {"node-3"}:
        (rewired,) = said(tmp_path / "run", node, "rewired")
        assert rewired["gone"] == ["node-3"] and rewired["members"] == 7
    assert around(tmp_path / "run", "node-2") == {"node-1", "node-4"}
    assert around(tmp_path / "run", "node-4") == {"node-2", "node-5"}
    for node in ("node-2", "node-4"):
        (died,) = (event["t"] for event in said(tmp_path / "run", node, "died") if event["peer"] == "node-3")
        waits = [line["seconds"]["wait"] for line in metrics(tmp_path / "run", node) if "node-3" in line["missing"]]
        assert max(waits) < 3.0  # the promise: a death costs its neighbours no more than that …
        # … once: it is declared dead once and awaited no more. Most rounds without it cost far less than its deadline.
        assert len(waits) > 5 and statistics.median(waits[1:]) < GRACE / 2
        waited = [event for event in said(tmp_path / "run", node, "waiting") if event["t"] > died]
        assert not [event for event in waited if "node-3" in event["peers"]]


def test_who_starts_again_goes_on_from_its_checkpoint_and_gets_its_place_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = 'faults=[{kind="restart", node=5, round=33, seconds=1.0}]'
    summary = up("ring-8", run, LONG_ENOUGH, "train.checkpoint_every=10", "network.suspicion=0.5", fault)
    assert summary["finished"] == 8 and summary["failed"] == []
    (first, again) = said(run, "node-5", "started")
    assert first["round"] == 0 and again["round"] in (20, 30)  # the last one may not have been on the disk yet
    lines = metrics(run, "node-5")
    assert {line["epoch"] for line in lines} == {1, 2}
    second = [line for line in lines if line["epoch"] == 2]
    accepted = next(line for line in second if line["merged"])
    assert accepted["t"] - again["t"] < 5.0  # from its start to the first neighbour's model in its own
    assert around(run, "node-5") == {"node-4", "node-6"} and around(run, "node-6") == {"node-5", "node-7"}


@pytest.mark.slow
def test_who_was_stopped_for_a_while_condemns_nobody_and_is_taken_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (LONG_ENOUGH, "network.silence=1", "network.heartbeat=0.2", "network.suspicion=60")
    summary = up("ring-8", run, *settings, 'faults=[{kind="pause", node=2, round=20, seconds=3.0}]')
    assert summary["finished"] == 8 and set(summary["rejected"]) <= {"future", "busy"}  # it was behind, for a moment
    assert said(run, "node-2", "died") == [] and said(run, "node-2", "lost") == []
    assert [event["peer"] for event in said(run, "node-1", "died")] == ["node-2"]
    assert [event["peer"] for event in said(run, "node-1", "returned")] == ["node-2"]
    assert around(run, "node-1") == {"node-0", "node-2"}


@pytest.mark.slow
@pytest.mark.parametrize("heal", [True, False])
def test_in_a_graph_drawn_by_hand_the_dead_ones_neighbours_are_joined_unless_that_is_forbidden(
    heal: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ("train.rounds=300", "network.suspicion=0.5", f"topology.heal={str(heal).lower()}")
    summary = up("two-campuses", run, *settings, 'faults=[{kind="kill", node="north-4", round=10}]')
    assert summary["finished"] == 7
    joined = {"north-1", "north-2", "north-3"} & around(run, "south-1")
    assert bool(joined) is heal


@pytest.mark.slow
def test_a_pause_longer_than_any_link_lasts_is_survived_on_both_sides(tmp_path: Path) -> None:
    """SIGSTOP: held to be dead and left out of the graph; then SIGCONT: back, and its own gap condemns nobody."""
    run, stopped = tmp_path / "run", "node-2"
    settings = ("network.silence=1", "network.heartbeat=0.2", "network.suspicion=0.5", "network.grace=0.5")
    summary = up(
        "ring-8",
        run,
        "train.rounds=220",
        *SLOW,
        *settings,
        f'faults=[{{kind="pause", node="{stopped}", round=5, seconds=8.0}}]',  # KEEPALIVE_TIMEOUT_MS of link.py is 6 s
        nodes=4,
        cwd=HERE,
    )
    assert summary["finished"] == 4 and summary["failed"] == []
    assert said(run, stopped, "died") == said(run, stopped, "lost") == []
    assert said(run, stopped, "suspected"), "its links broke, and were made again"
    for node in ("node-0", "node-1", "node-3"):
        assert [event["peer"] for event in said(run, node, "lost")] == [stopped]
        assert [event["peer"] for event in said(run, node, "back")] == [stopped]
        assert said(run, node, "rewired")[-1]["members"] == 4
    assert around(run, "node-1") == {"node-0", stopped}


@pytest.mark.slow
def test_all_suspended_at_once_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """As a laptop's lid does it: every clock but the monotonic one has gone on, and so has the network's patience."""
    run = tmp_path / "run"
    settings = ("train.rounds=60", "network.silence=1", "network.suspicion=0.5", *SLOW)
    words = ["up", "ring-8", "--nodes", "4", "--run-dir", run, *(w for s in settings for w in ("--set", s))]
    with started(*words, cwd=HERE, group=True) as process:
        wait_for_line(process, r"^round +5/")
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(7)  # longer than an idle link lasts: KEEPALIVE_TIMEOUT_MS
        os.killpg(process.pid, signal.SIGCONT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    for node in NODES[:4]:
        assert said(run, node, "lost") == said(run, node, "died") == []
        assert len(around(run, node)) == 2


def test_half_of_sixteen_are_killed_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed = [f"node-{i:02}" for i in range(1, 16, 2)]  # each second one: of every neighbourhood both
    faults = ", ".join(f'{{kind="kill", node="{name}", round=5}}' for name in killed)
    settings = ("train.rounds=120", "network.suspicion=0.5", f"faults=[{faults}]")
    summary = up("ring-8", run, *settings, nodes=16)
    assert summary["finished"] == 8 and sorted(summary["failed"]) == sorted(killed)
    for index in range(0, 16, 2):
        node, before, after = (f"node-{(index + step) % 16:02}" for step in (0, -2, 2))
        assert {event["peer"] for event in said(run, node, "lost")} == set(killed)
        assert said(run, node, "rewired")[-1]["members"] == 8
        assert around(run, node) == {before, after}
