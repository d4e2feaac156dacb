"""What the network does to nodes, and what they make of it: cuts in one direction, flapping, loss, a slow line.

Real processes whose links go through relays of the test (`relay.py`). Nobody is suspected for long enough to be left
out of the graph here, or the new links would pass the relays by; `test_partition.py` shows that, where it is possible.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import slow_model
from links import LinkDown, greeting_of, identities, open_party, roster_of, settle, until
from processes import events, free_ports, make_members, metrics, started, wait_for_line
from relay import BOTH, Direction, Relay, lossy, prompt

from p2pfl.wire import CHUNK

NAMES = ("amber", "birch", "cedar")
QUICK = ("heartbeat=0.2", "grace=0.5", "patience=2", "suspicion=60")


@dataclass
class Line:
    """The connection of two of them: `dialler` has made it."""

    dialler: str
    listener: str
    relay: Relay

    def deaf(self, way: Direction) -> tuple[str, str]:
        """Who hears nothing if this way is cut, and of whom."""
        return (self.listener, self.dialler) if way == "there" else (self.dialler, self.listener)


@contextmanager
def ring(folder: Path, rounds: int, silence: float) -> Iterator[tuple[dict[str, subprocess.Popen[str]], list[Line]]]:
    """Three processes at work, and the lines between them."""
    make_members(folder, *NAMES)
    (folder / "ring.toml").write_text(
        f'[topology]\ngraph = "ring"\nnodes = {list(NAMES)}\n[data]\nname = "breast_cancer"\n'
        f'[model]\nname = "slow_model:model"\n[train]\nrounds = {rounds}\nlocal_steps = 1\n'
    )
    ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
    settings = [word for setting in (*QUICK, f"silence={silence}") for word in ("--set", f"network.{setting}")]
    with ExitStack() as stack:
        lines = [
            Line(one, other, stack.enter_context(Relay(f"tcp://127.0.0.1:{ports[other]}")))
            for one, other in itertools.combinations(NAMES, 2)
        ]
        processes = {}
        for name in NAMES:
            shutil.copy(slow_model.__file__, folder / name)
            peers = [f"{line.listener}@{line.relay.address}" for line in lines if line.dialler == name]
            peers += [line.dialler for line in lines if line.listener == name]
            words = ["node", "--config", folder / "ring.toml", "--run-dir", folder / name / "run", *settings]
            words += ["--listen", f"tcp://127.0.0.1:{ports[name]}", "--peers", ",".join(peers)]
            processes[name] = stack.enter_context(started(*words, cwd=folder / name))
        for process in processes.values():
            wait_for_line(process, r"^round +1/")
        yield processes, lines


def finish(processes: dict[str, subprocess.Popen[str]]) -> None:
    for process in processes.values():
        process.communicate(timeout=60)
        assert process.returncode == 0


def said(folder: Path, name: str, *words: str) -> list[tuple[str, str]]:
    told = events(folder / name / "run", name)
    return [(event["event"], event.get("peer", "")) for event in told if event["event"] in words]


@pytest.mark.slow
def test_32_each_one_way_cut_is_seen_by_who_is_deaf_and_by_nobody_else(tmp_path: Path) -> None:
    story: dict[str, list[tuple[str, str]]] = {name: [] for name in NAMES}
    with ring(tmp_path, 40, silence=1) as (processes, lines):
        for line, way in itertools.product(lines, BOTH):
            deaf, unheard = line.deaf(way)
            line.relay.hang(way)
            wait_for_line(processes[deaf], f"goes on without {unheard}")
            line.relay.flow()
            wait_for_line(processes[deaf], f"{unheard} returned")
            story[deaf] += [("died", unheard), ("returned", unheard)]
        finish(processes)
    for name in NAMES:
        assert said(tmp_path, name, "died", "returned", "lost", "rewired") == story[name]
        last = metrics(tmp_path / name / "run", name)[-1]
        assert last["round"] == 39 and len(last["merged"]) == 2


@pytest.mark.slow
def test_32_a_line_that_flaps_loses_half_or_takes_a_second_is_slow_and_no_death(tmp_path: Path) -> None:
    rounds, flaps = 70, 3
    with ring(tmp_path, rounds, silence=3) as (processes, lines):
        line = lines[0]
        at_the_dialler = processes[line.dialler]
        for _ in range(flaps):
            line.relay.refuse()
            line.relay.cut()
            wait_for_line(at_the_dialler, f"goes on without {line.listener}")
            line.relay.accept()
            wait_for_line(at_the_dialler, f"{line.listener} returned")
        line.relay.lateness = lossy(0.5, random.Random(1))
        some_rounds(tmp_path, line.dialler, at_the_dialler, 6)
        line.relay.lateness = lambda: 1.0  # a round trip of two seconds
        some_rounds(tmp_path, line.dialler, at_the_dialler, 3)
        line.relay.lateness = prompt
        finish(processes)
    assert len(line.relay.pairs) <= 4 * (1 + flaps)  # two at the start and at each return, some in vain: no storm
    third = NAMES[2]
    assert said(tmp_path, third, "died", "suspected") == []
    for name in NAMES:
        assert said(tmp_path, name, "lost", "rewired") == []
        assert len(said(tmp_path, name, "died")) <= flaps  # neither loss nor a slow line is taken for death
        assert metrics(tmp_path / name / "run", name)[-1]["round"] == rounds - 1


def some_rounds(folder: Path, name: str, process: subprocess.Popen[str], count: int) -> None:
    """Wait until it has ended so many more."""
    wait_for_line(process, rf"^round +{metrics(folder / name / 'run', name)[-1]['round'] + 1 + count}/")


# -- Links alone -----------------------------------------------------------------------------------------------------

IDS = identities("alice", "bob")


@pytest.mark.parametrize("size", [64, 8 * CHUNK], ids=["whole", "half-way"])
def test_an_answer_that_is_lost_with_one_of_two_pairs_of_connections_is_given_again(size: int) -> None:
    """Who dial each other at once may each use another pair: what one sends on one of them is answered on the other."""
    about = (roster_of(IDS.values()), greeting_of(size))
    alice, bob = open_party(IDS["alice"], *about), open_party(IDS["bob"], *about)
    try:
        with Relay(bob.link.address) as first, Relay(alice.link.address) as second:
            alice.link.dial(first.address, ("bob",))
            (dial,) = alice.link._dials
            until(lambda: "bulk" in dial.connected and dial.answered, bob, alice)
            first.hang("back")  # so that bob alone hears the last word of the handshake
            until(lambda: bob.is_up("alice"), bob)
            bob.link.dial(second.address, ("alice",))
            until(lambda: alice.is_up("bob"), alice, bob)  # by the second one
            alice.link.send(["bob"], alice.seal(bytes(size), 0))
            settle(alice, bob)
            assert not alice.link.idle  # bob has answered on the first one
            first.cut()
            until(lambda: bob.all(LinkDown) and bob.is_up("alice") and bob.updates(), alice, bob)
            alice.link.send(["bob"], alice.seal(bytes(size), 1))
            until(lambda: len(bob.updates()) == 2, alice, bob)
            settle(alice, bob)
            assert alice.link.idle and not alice.all(LinkDown) and not alice.codes() and not bob.codes()
    finally:
        alice.link.close(0)
        bob.link.close(0)


@pytest.mark.slow
def test_32_a_link_is_made_where_a_round_trip_takes_two_seconds() -> None:
    about = (roster_of(IDS.values()), greeting_of(64))
    alice, bob = open_party(IDS["alice"], *about), open_party(IDS["bob"], *about)
    try:
        with Relay(bob.link.address) as relay:
            relay.lateness = lambda: 1.0
            alice.link.dial(relay.address, ("bob",))
            until(lambda: alice.is_up("bob") and bob.is_up("alice"), alice, bob, within=60.0)
            assert not alice.codes() and not bob.codes()
            relay.lateness = prompt
    finally:
        alice.link.close(0)
        bob.link.close(0)
