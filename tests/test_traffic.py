"""What a stranger on the wire can see, and what he can do: two whole nodes train through a relay that is his."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from links import LOOPBACK, identities, roster_of
from relay import Cut, Piece, Relay, Tamperer, flip, honest, replay, swap, truncate

from p2pfl.config import Experiment, validate
from p2pfl.data import load_part
from p2pfl.records import NodeRecords
from p2pfl.runtime import Dial, Runtime, assemble
from p2pfl.topology import build

NAMES = ("participant-one", "participant-two")
IDS = identities(*NAMES)
ROUNDS = 8
LONG = 60.0  # seconds: a connection that breaks comes back long before anybody gives up on it


def experiment() -> Experiment:
    return validate(
        {
            "topology": {"graph": "complete", "nodes": list(NAMES)},
            "data": {"name": "digits"},
            "model": {"name": "logistic"},
            "train": {"rounds": ROUNDS, "local_steps": 2, "device": "cpu"},
            "network": dict.fromkeys(("join_timeout", "silence", "patience", "grace"), LONG),
        },
        "the test",
    )


def member(index: int, folder: Path, dials: list[Dial], sent: list[bytes]) -> Runtime:
    def before_round(round: int) -> None:
        if round > 0:  # the vector is still what was sent: it is folded next
            sent.append(runtime._worker._trainer.learner.vector.numpy().tobytes())

    runtime = assemble(
        experiment(),
        IDS[NAMES[index]],
        roster_of(IDS.values()),
        1,
        load_part(experiment(), index),
        [NAMES[1 - index]],
        dials,
        LOOPBACK,
        NodeRecords(folder / NAMES[index]),
        topology=build(experiment().topology, 0),
        resume=False,
        observe=lambda line: None,
        before_round=before_round,
    )
    return runtime


def train(folder: Path, tamper: Tamperer) -> tuple[bytes, list[bytes]]:
    """Both nodes to their end; what the wire carried, and every vector that was sent."""
    sent: list[bytes] = []
    first = member(0, folder, [], sent)
    with Relay(first.link.address, tamper) as relay, ThreadPoolExecutor(2) as threads:
        second = member(1, folder, [Dial(relay.address, NAMES[0])], sent)
        ends = [threads.submit(node.run) for node in (first, second)]
        assert all(end.result(timeout=2 * LONG) for end in ends)
        return relay.recorded(), sent


def models(folder: Path) -> list[bytes]:
    return [NodeRecords(folder / name).model.read_bytes() for name in NAMES]


def windows(vector: bytes) -> set[bytes]:
    """Every 16 bytes of it, zeros aside."""
    return {vector[i : i + 16] for i in range(0, len(vector) - 15, 16)} - {bytes(16)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *train(folder, honest)


def test_the_wire_shows_no_parameters_no_names_and_no_words(undisturbed: tuple[Path, bytes, list[bytes]]) -> None:
    _, traffic, sent = undisturbed
    assert len(sent) == 2 * ROUNDS
    assert len(traffic) > sum(map(len, sent))  # the relay did see it all
    for vector in sent:
        assert len(windows(vector)) > 100
        assert not [window for window in windows(vector) if window in traffic]
    for name in NAMES:
        assert name.encode() not in traffic
        assert IDS[name].card.signing_key not in traffic and IDS[name].card.link_key not in traffic
    for word in (b"round", b"manifest", b"signature", b"accuracy", b"train_loss", b"epoch", b"digits"):
        assert word not in traffic


def count(tamper: Tamperer, fired: list[int]) -> Tamperer:
    """The tamperer, noting where it did something."""

    def noted(piece: Piece) -> bytes:
        try:
            out = tamper(piece)
        except Cut:
            fired.append(piece.offset)
            raise
        if out != piece.data:
            fired.append(piece.offset)
        return out

    return noted


FAULTS: dict[str, Callable[[int, str, int], Tamperer]] = {
    "flip": flip,
    "truncate": truncate,
    "replay": replay,
    "swap": lambda connection, direction, offset: swap(connection, direction, offset, 100),
}


# In the greeting, in the handshake, in the first messages.
MORE_CASES = (("flip", 300, "back"), ("truncate", 700, "there"), ("replay", 20, "there"), ("swap", 700, "there"))


@pytest.mark.parametrize(
    ("fault", "offset", "direction"),
    [
        ("flip", 20, "there"), ("truncate", 300, "back"), ("replay", 700, "there"), ("swap", 300, "back"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES),
    ],
)  # fmt: skip
def test_what_the_wire_does_changes_no_model(
    undisturbed: tuple[Path, bytes, list[bytes]], tmp_path: Path, fault: str, offset: int, direction: str
) -> None:
    disturb(undisturbed[0], tmp_path, FAULTS[fault], [(0, offset), (1, offset)], direction)


@pytest.mark.parametrize(  # in an early update, a later one
    ("fault", "offset", "direction"),
    [
        ("flip", 3_000, "there"), ("flip", 9_000, "back"), ("truncate", 9_000, "back"),
        ("replay", 9_000, "back"), ("swap", 3_000, "there"),
    ],
)  # fmt: skip
def test_what_the_wire_does_to_an_update_changes_no_model_and_is_told(
    undisturbed: tuple[Path, bytes, list[bytes]], tmp_path: Path, fault: str, offset: int, direction: str
) -> None:
    disturb(undisturbed[0], tmp_path, FAULTS[fault], [(0, offset), (1, offset)], direction)
    told = [event["event"] for name in NAMES for event in NodeRecords(tmp_path / name).read_events()]
    assert {"suspected", "returned"} <= set(told) and "died" not in told


@pytest.mark.parametrize("fault", ["truncate", "swap"])
def test_what_the_wire_does_to_the_last_update_changes_no_model(
    undisturbed: tuple[Path, bytes, list[bytes]], tmp_path: Path, fault: str
) -> None:
    disturb(undisturbed[0], tmp_path, FAULTS[fault], [(0, 26_000), (1, 26_000)], "there")


def disturb(
    reference: Path,
    folder: Path,
    fault: Callable[[int, str, int], Tamperer],
    places: list[tuple[int, int]],
    direction: str,
) -> None:
    fired: list[int] = []
    tamperers = [fault(connection, direction, offset) for connection, offset in places]

    def tamper(piece: Piece) -> bytes:
        return tamperers[piece.connection](piece) if piece.connection < len(tamperers) else piece.data

    train(folder, count(tamper, fired))
    assert fired, "the wire was left alone"
    assert models(folder) == models(reference)
