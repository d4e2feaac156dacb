"""Real nodes that are killed, started again and stopped, and what the others make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import events, metrics, up

NODES = [f"node-{i}" for i in range(8)]
LONG_ENOUGH = "train.rounds=160"


def said(run: Path, node: str, word: str) -> list[dict]:
    return [event for event in events(run, node) if event["event"] == word]


def around(run: Path, node: str) -> set[str]:
    """Whom the node averaged with in its last round."""
    return set(metrics(run, node)[-1]["merged"])


def test_survivors_of_a_kill_close_the_ring(tmp_path: Path) -> None:
    summary = up(
        "ring-8",
        tmp_path / "run",
        LONG_ENOUGH,
        "network.suspicion=1",
        'faults=[{kind="kill", node=3, round=20}]',
    )
    assert summary["failed"] == ["node-3"] and summary["finished"] == 7
    assert set(summary["rejected"]) <= {"future"}  # new neighbours may be a round apart when they meet
    for node in set(NODES) - {"node-3"}:
        (rewired,) = said(tmp_path / "run", node, "rewired")
        assert rewired["gone"] == ["node-3"] and rewired["members"] == 7
    assert around(tmp_path / "run", "node-2") == {"node-1", "node-4"}
    assert around(tmp_path / "run", "node-4") == {"node-2", "node-5"}
    stalls = [line["seconds"]["total"] for node in ("node-2", "node-4") for line in metrics(tmp_path / "run", node)[1:]]
    assert max(stalls) < 3.0  # the promise: a death costs its neighbours no more than that, once
    assert sum(stall > 0.9 for stall in stalls) <= 2


def test_who_starts_again_goes_on_from_its_checkpoint_and_gets_its_place_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = 'faults=[{kind="restart", node=5, round=33, seconds=1.0}]'
    summary = up("ring-8", run, LONG_ENOUGH, "train.checkpoint_every=10", "network.suspicion=0.5", fault)
    assert summary["finished"] == 8 and summary["failed"] == []
    (first, again) = said(run, "node-5", "started")
    assert (first["round"], again["round"]) == (0, 30)
    lines = metrics(run, "node-5")
    assert {line["epoch"] for line in lines} == {1, 2}
    second = [line for line in lines if line["epoch"] == 2]
    accepted = next(line for line in second if line["merged"])
    assert accepted["t"] - again["t"] < 5.0  # from its start to the first neighbour's model in its own
    assert around(run, "node-5") == {"node-4", "node-6"} and around(run, "node-6") == {"node-5", "node-7"}


def test_who_was_stopped_for_a_while_condemns_nobody_and_is_taken_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (LONG_ENOUGH, "network.silence=1", "network.heartbeat=0.2", "network.suspicion=60")
    summary = up("ring-8", run, *settings, 'faults=[{kind="pause", node=2, round=20, seconds=3.0}]')
    assert summary["finished"] == 8 and set(summary["rejected"]) <= {"future"}  # it was behind, for a moment
    assert said(run, "node-2", "died") == [] and said(run, "node-2", "lost") == []
    assert [event["peer"] for event in said(run, "node-1", "died")] == ["node-2"]
    assert [event["peer"] for event in said(run, "node-1", "returned")] == ["node-2"]
    assert around(run, "node-1") == {"node-0", "node-2"}


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
