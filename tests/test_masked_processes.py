"""Masked sums among real processes: what a neighbour's memory holds, what deaths do, and what the wire refuses."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from links import EXPERIMENT, SCHEMA, Party, connect, greeting_of, identities, parties, until
from processes import events, metrics, started, up

from p2pfl.config import Experiment, load
from p2pfl.envelope import MASKED, Sealer, sign_statement
from p2pfl.learner import make_learner
from p2pfl.masks import MaskMaker, fixed
from p2pfl.messages import Accusation, BadInput, Gathering, MaskKey, Received, Rejected, Update
from p2pfl.records import create_run
from p2pfl.runtime import Sums
from p2pfl.swarm import prepare

NODES = 5
WINDOW = 32  # bytes: eight parameters; that they stand somewhere by chance is out of the question
WINDOWS = 3  # of each vector
LEAST_REGION = 64 * 1024  # bytes of memory that are worth a look

ONLY_AVERAGE = """
[topology]
graph = "complete"
nodes = 5
[data]
name = "digits"
[model]
hidden = [64]
start = "own"
[train]
rounds = 3
local_steps = 0
[network]
patience = 60
silence = 60
[[faults]]
kind = "pause"
node = 0
round = 1
seconds = 8
"""


# -- What a neighbour's memory holds ---------------------------------------------------------------------------------


def first_vectors(experiment: Experiment, folder: Path) -> list[np.ndarray]:
    """What each node sends in round 0, since it does not train: its first parameters."""
    ground = prepare(experiment, create_run(folder, experiment))
    return [make_learner(experiment, ground.parts[name], name).vector.numpy().copy() for name in ground.graph.names]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stopped_child(pid: int, within: float = 60.0) -> int:
    """The child of this process that stands still. Only its parent is told when it stops, so one has to look."""
    deadline = time.monotonic() + within
    turn = threading.Event()
    while time.monotonic() < deadline:
        for child in children(pid):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return child
        turn.wait(0.02)
    raise AssertionError("no child stood still")


def memory_of(pid: int) -> Iterator[bytes]:
    """All that this process can write, piece by piece."""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(edge, 16) for edge in span.split("-"))
            if rights.startswith("rw") and end - start >= LEAST_REGION:
                memory.seek(start)
                try:
                    yield memory.read(end - start)
                except OSError:
                    continue  # a page that only the kernel may read


def windows(words: np.ndarray) -> list[bytes]:
    starts = np.linspace(0, len(words) - WINDOW // 4, WINDOWS).astype(int)
    return [words[start : start + WINDOW // 4].tobytes() for start in starts]


def found_in_memory(folder: Path, sums: str) -> list[float]:
    """For each node, the part of its first vector that node-0 holds in some form, when all the others' have come."""
    (folder / "average.toml").write_text(ONLY_AVERAGE)
    experiment = load(folder / "average.toml", settings=[f"privacy.sums={sums}"])
    vectors = first_vectors(experiment, folder / "same")
    words = ["up", folder / "average.toml", "--run-dir", folder / "run", "--set", f"privacy.sums={sums}"]
    with started(*words) as process:
        receiver = stopped_child(process.pid)
        try:
            memory = list(memory_of(receiver))
        finally:
            os.kill(receiver, signal.SIGKILL)  # who stands still does not see that whoever started it is gone
            process.kill()
    found = []
    for vector in vectors:
        forms = [windows(vector), windows(fixed(vector, 1 / NODES))]
        hits = [any(window in region for region in memory) for form in forms for window in form]
        found.append(max(sum(hits[i : i + WINDOWS]) for i in range(0, len(hits), WINDOWS)) / WINDOWS)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/PID/mem")
def test_a_neighbour_s_whole_memory_holds_none_of_the_vectors_in_its_sum(tmp_path: Path) -> None:
    """Taken when all parts of the sum have come and nothing was freed. Its own vector is found: so the search works."""
    own, *others = found_in_memory(tmp_path, "masked")
    assert own == 1.0 and others == [0.0] * (NODES - 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/PID/mem")
def test_without_masks_it_holds_each_of_them(tmp_path: Path) -> None:
    assert found_in_memory(tmp_path, "none") == [1.0] * NODES


# -- What deaths do --------------------------------------------------------------------------------------------------

TRAINING = """
[topology]
graph = "random-regular"
degree = 4
nodes = 6
[data]
name = "digits"
[model]
hidden = [32]
[train]
rounds = 8
[privacy]
sums = "masked"
"""


def test_a_killed_sender_costs_a_sum_and_the_others_go_on_with_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "sums.toml").write_text(
        TRAINING.replace("rounds = 8", "rounds = 30") + '\n[[faults]]\nkind = "kill"\nnode = 2\nround = 5\n'
    )
    summary = up(tmp_path / "sums.toml", tmp_path / "run", "network.suspicion=2")
    assert summary["finished"] == 5 and summary["failed"] == ["node-2"]
    survivors = [f"node-{i}" for i in (0, 1, 3, 4, 5)]
    for name in survivors:
        lines, lost = (
            metrics(tmp_path / "run", name),
            [e for e in events(tmp_path / "run", name) if e["event"] == "no_sum"],
        )
        assert all(math.isfinite(line["mixed"]["loss"]) for line in lines) and lines[-1]["round"] == 29
        assert all(not line["merged"] or len(line["merged"]) >= 3 for line in lines)  # never a part of a sum
        assert {tuple(e["missing"]) for e in lost} <= {("node-2",)} and len(lines[-1]["merged"]) >= 3
    assert any(e["event"] == "no_sum" for name in survivors for e in events(tmp_path / "run", name))
    assert summary["metrics"]["accuracy"]["min"] > 0.85


# -- What the wire refuses -------------------------------------------------------------------------------------------

IDS = identities("alice", "bob", "carol", "dave")


def makers() -> dict[str, MaskMaker]:
    return {name: MaskMaker(identity, 1, EXPERIMENT) for name, identity in IDS.items()}


def of_kind(party: Party, kind: type[MaskKey] | type[Gathering]) -> list[MaskKey | Gathering]:
    return [event.message for event in party.all(Received) if isinstance(event.message, kind)]


def test_a_receiver_can_put_nobody_in_between_two_senders() -> None:
    """Mask keys are signed by their members: one that the receiver made up is refused, and so is a stranger's."""
    made = makers()
    keys = [made[name].key for name in ("alice", "carol", "dave")]
    forged = replace(MaskMaker(IDS["bob"], 1, EXPERIMENT).key, name="carol")
    elsewhere = sign_statement(replace(forged, signature=b""), IDS["carol"], b"another federation".ljust(32))
    stranger = replace(keys[2], name="zed")
    bad = [(keys[0], forged, keys[2]), (keys[0], elsewhere, keys[2]), (*keys[:2], stranger)]
    genuine = Gathering(4, 1.0, 4.0, True, tuple(keys))
    with parties(IDS, only=("alice", "bob")) as p:
        alice, bob = p["alice"], p["bob"]
        connect(bob, alice)
        for keys_shown in bad:
            bob.link.send(("alice",), replace(genuine, keys=keys_shown))
        bob.link.send(("alice",), replace(made["carol"].key, name="bob"))
        bob.link.send(("alice",), made["bob"].key)
        bob.link.send(("alice",), genuine)
        until(lambda: of_kind(alice, Gathering), alice, bob)
        (came,) = of_kind(alice, Gathering)
        assert isinstance(came, Gathering) and replace(came, signature=b"") == genuine
        assert of_kind(alice, MaskKey) == [made["bob"].key]
        codes = [(r.peer, r.code) for r in alice.all(Rejected)]
        assert codes == [("bob", "bad_record"), ("bob", "bad_record"), ("bob", "unknown_member"), ("bob", "bad_record")]


@pytest.mark.parametrize(("number", "code"), [(8, []), (7, ["equivocation"])], ids=["two sums", "one sum"])
def test_parts_of_two_sums_are_no_contradiction_but_two_parts_of_one_are(number: int, code: list[str]) -> None:
    greeting = greeting_of(64, packed={MASKED: 64})
    with parties(IDS, only=("alice", "bob"), greetings={"alice": greeting, "bob": greeting}) as p:
        alice, bob = p["alice"], p["bob"]
        connect(bob, alice)
        for round, which, fill in ((0, 7, b"x"), (0, number, b"y")):
            sealed = bob.sealer.seal(memoryview(fill * 64), round, 1.0, 1.0, MASKED, which)
            bob.link.send(("alice",), Update(round, 1.0, 1.0, sealed))
        until(lambda: len(alice.updates()) + len(alice.codes()) == 2, alice, bob)
        assert alice.codes() == (
            code or ["stale"]
        )  # a second one of a round is not wanted, but nothing to be shut out for
        assert alice.updates() == [(0, b"x" * 64)]


def masked_part(name: str, round: int, number: int, fill: bytes = b"x") -> tuple[bytes, bytes]:
    offer = (
        Sealer(IDS[name], EXPERIMENT, SCHEMA, 64, 1).seal(memoryview(fill * 64), round, 1.0, 1.0, MASKED, number).offer
    )
    return offer.manifest, offer.signature


def test_nobody_is_framed_with_parts_of_two_sums() -> None:
    """Two receivers can agree on gatherings of one number: what a sender lawfully made for both proves nothing."""
    greeting = greeting_of(64, packed={MASKED: 64})
    with parties(
        IDS, only=("alice", "bob", "carol"), greetings=dict.fromkeys(("alice", "bob", "carol"), greeting)
    ) as p:
        alice, bob, carol = p["alice"], p["bob"], p["carol"]
        connect(bob, alice)
        connect(carol, alice)
        one, other = masked_part("carol", 0, 7), masked_part("carol", 0, 7, b"y")
        sealed = carol.sealer.seal(memoryview(b"z" * 64), 0, 1.0, 1.0, MASKED, 7)
        carol.link.send(("alice",), Update(0, 1.0, 1.0, sealed))
        until(lambda: alice.updates(), alice, carol)
        bob.link.send(("alice",), Accusation("carol", "equivocation", (*one, *other)))
        bob.link.send(("alice",), Accusation("carol", "bad_value", one))
        until(lambda: [e for e in alice.all(Received) if isinstance(e.message, Accusation)], alice, bob)
        assert [(r.peer, r.code) for r in alice.all(Rejected)] == [("bob", "bad_evidence")]


def test_a_mask_key_that_gives_no_secret_is_its_maker_s_mistake() -> None:
    """Or each honest sender would find its sum impossible, and the receiver would be blamed."""
    small_order = sign_statement(MaskKey("bob", 1, bytes(32)), IDS["bob"], EXPERIMENT)
    with parties(IDS, only=("alice", "bob")) as p:
        alice, bob = p["alice"], p["bob"]
        connect(bob, alice)
        bob.link.send(("alice",), small_order)
        until(lambda: alice.codes(), alice, bob)
        assert [(r.peer, r.code) for r in alice.all(Rejected)] == [("bob", "bad_record")]


# -- Started again ---------------------------------------------------------------------------------------------------


def test_a_round_is_on_the_disk_before_its_first_part_leaves_and_is_never_given_from_again(tmp_path: Path) -> None:
    maker, path = MaskMaker(IDS["alice"], 1, EXPERIMENT), tmp_path / "given"
    sums = Sums(maker, path)
    assert sums.last == -1
    for round in (0, 1, 1, 12):
        sums.gives(round)
    path.write_bytes(path.read_bytes() + b"\n1")  # the power went while it wrote 13
    assert Sums(maker, path).last == 12
    Sums(maker, path).gives(13)
    assert Sums(maker, path).last == 13
    path.write_bytes(b"\nx\n")
    with pytest.raises(BadInput, match="cannot be read"):
        Sums(maker, path)


def test_whoever_starts_again_goes_on_after_the_last_round_that_it_gave_from(tmp_path: Path) -> None:
    """Its checkpoint is older; but those rounds it would repeat to the bit, for sums over other senders, perhaps."""
    restart = '\n[[faults]]\nkind = "restart"\nnode = 2\nround = 9\nseconds = 1\n'
    (tmp_path / "sums.toml").write_text(TRAINING.replace("rounds = 8", "rounds = 40\ncheckpoint_every = 4") + restart)
    summary = up(tmp_path / "sums.toml", tmp_path / "run")
    assert summary["finished"] == 6
    given = [int(line) for line in (tmp_path / "run/nodes/node-2/given").read_text().split()]
    assert given == sorted(set(given))
    first, second = (e["round"] for e in events(tmp_path / "run", "node-2") if e["event"] == "started")
    assert (first, second) == (0, 9)  # it had given from rounds 0 to 8; its checkpoint is of round 8
    assert len(metrics(tmp_path / "run", "node-2")[-1]["merged"]) >= 3
