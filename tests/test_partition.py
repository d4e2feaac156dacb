"""Real nodes, each with a network of its own, whose cables are pulled and plugged in again.

These need network namespaces; where the machine allows none, they are skipped. `tests/test_network_faults.py` shows
through a relay what needs none.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import slow_model
from lan import Lan, lan, why_no_delay, why_not
from processes import events, make_members, metrics, started, wait_for_line

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

NAMES = ("amber", "birch", "cedar", "delta", "ember")  # a ring in this order
WEST, EAST, ALONE = NAMES[:2], NAMES[2:4], NAMES[4:]
CABLES = ("1", "2")  # of the switches of EAST and of ALONE: without them nobody reaches anybody of another side
QUICK = ("heartbeat=0.2", "silence=1", "grace=0.5", "suspicion=0.7", "patience=2")
APART = 20  # rounds that the sides train apart


@contextmanager
def ring(folder: Path, network: Lan, names: tuple[str, ...], rounds: int) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each member, all at work."""
    make_members(folder, *names)
    quoted = ", ".join(f'"{name}"' for name in names)
    (folder / "ring.toml").write_text(
        f'[topology]\ngraph = "ring"\nnodes = [{quoted}]\n[data]\nname = "breast_cancer"\n'
        f'[model]\nname = "slow_model:model"\n[train]\nrounds = {rounds}\nlocal_steps = 1\n'
    )
    settings = [word for setting in QUICK for word in ("--set", f"network.{setting}")]
    with ExitStack() as stack:
        processes = {}
        for index, name in enumerate(names):
            shutil.copy(slow_model.__file__, folder / name)
            around = {names[index - 1], names[(index + 1) % len(names)]} - {name}
            peers = ",".join(f"{peer}@{network.address(peer)}:7000" for peer in sorted(around))
            words = ["node", "--config", folder / "ring.toml", "--peers", peers, "--run-dir", folder / name / "run"]
            words += ["--listen", f"tcp://{network.address(name)}:7000", *settings]
            processes[name] = stack.enter_context(started(*words, cwd=folder / name, within=network.within(name)))
        for process in processes.values():
            wait_for_line(process, r"^round +5/")
        yield processes


def said(folder: Path, name: str, word: str) -> list[dict]:
    return [event for event in events(folder / name / "run", name) if event["event"] == word]


def await_all(processes: dict[str, subprocess.Popen[str]], names: Iterable[str], pattern: str) -> None:
    for name in names:
        wait_for_line(processes[name], pattern)


def finish(processes: dict[str, subprocess.Popen[str]]) -> None:
    for process in processes.values():
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_ring_in_three_pieces_trains_in_each_and_is_one_again_when_it_is_healed(tmp_path: Path) -> None:
    rounds = 200
    with lan(WEST, EAST, ALONE) as network, ring(tmp_path, network, NAMES, rounds) as processes:
        for cable in CABLES:
            network.pull(cable)
        await_all(processes, (*WEST, *EAST), "new graph of 2 members")
        await_all(processes, ALONE, "new graph of 1 members")
        apart = {name: metrics(tmp_path / name / "run", name)[-1]["round"] for name in NAMES}
        for name in NAMES:
            wait_for_line(processes[name], rf"^round +{apart[name] + APART}/")
        for cable in CABLES:
            network.plug(cable)
        await_all(processes, NAMES, f"new graph of {len(NAMES)} members")
        finish(processes)
    for side in (WEST, EAST, ALONE):
        for name in side:
            others = set(NAMES) - set(side)
            assert {event["peer"] for event in said(tmp_path, name, "lost")} == others
            assert {event["peer"] for event in said(tmp_path, name, "back")} == others
            lines = metrics(tmp_path / name / "run", name)
            during = [line for line in lines if apart[name] < line["round"] < apart[name] + APART]
            assert {peer for line in during for peer in line["merged"]} == set(side) - {name}
            assert lines[-1]["round"] == rounds - 1 and len(lines[-1]["merged"]) == 2
            assert said(tmp_path, name, "rewired")[-1]["members"] == len(NAMES)


@pytest.mark.skipif(bool(why_no_delay()), reason=why_no_delay())
def test_a_ring_whose_cables_take_half_a_second_is_slower_and_whole(tmp_path: Path) -> None:
    with lan(NAMES[:3]) as network:
        for name in NAMES[:3]:
            network.delay(name, 500)
        with ring(tmp_path, network, NAMES[:3], 8) as processes:
            finish(processes)
    for name in NAMES[:3]:
        assert said(tmp_path, name, "lost") == []
        assert all(len(line["merged"]) == 2 for line in metrics(tmp_path / name / "run", name)[1:])
