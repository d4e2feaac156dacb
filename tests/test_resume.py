"""Whose checkpoints are damaged goes on from its neighbours' state, or says that it cannot: it never starts afresh.

And writing a checkpoint does not stop training.
"""

from __future__ import annotations

import json
import os
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from processes import events, free_ports, metrics, run, started, up, wait_for_line
from safetensors.torch import load

from p2pfl import checkpoint
from p2pfl.checkpoint import DIGEST_BYTES, MAX_HEADER, NEWEST, PREVIOUS, Checkpoint, Writer, Written
from p2pfl.config import find_experiment
from p2pfl.config import load as load_experiment
from p2pfl.data import load_part
from p2pfl.envelope import Buffers, Sealer
from p2pfl.identity import Identity
from p2pfl.learner import make_learner
from p2pfl.messages import BadInput, Compute, Contribution
from p2pfl.runtime import Worker, as_tensor
from p2pfl.trainer import Trainer

EXPERIMENT = bytes(range(32))
LIKE = {
    "vector": torch.arange(1000, dtype=torch.float32),
    "rounds": torch.tensor(7),
    "buffer.seen": torch.tensor([True, False, True]),
    "buffer.empty": torch.empty(0, 3, dtype=torch.int32),
}


def write(folder: Path, *rounds: int) -> None:
    for round in rounds:
        checkpoint.write(folder, Checkpoint(round, 0.5, LIKE), EXPERIMENT)


def sealed(body: bytes) -> bytes:
    """As somebody writes it who wants it to be believed."""
    return body + blake3(body).digest()


def header_of(content: bytes) -> dict:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content: bytes, header: object) -> bytes:
    data = content[8 + int.from_bytes(content[:8], "little") : -DIGEST_BYTES]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sealed(len(text).to_bytes(8, "little") + text + data)


# -- The file --------------------------------------------------------------------------------------------------------


def test_a_generation_is_a_safetensors_file_and_its_checksum(tmp_path: Path) -> None:
    write(tmp_path, 25)
    content = (tmp_path / NEWEST).read_bytes()
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    assert blake3(body).digest() == digest
    tensors = load(body)  # the library's own reader
    assert tensors.keys() == LIKE.keys()
    assert all(torch.equal(tensors[name], LIKE[name]) and tensors[name].dtype == LIKE[name].dtype for name in LIKE)
    assert header_of(content)["__metadata__"] == {"round": "25", "mass": "0.5", "experiment": EXPERIMENT.hex()}


def change(key: str, value: object) -> Callable[[bytes], bytes]:
    """A header that says something else of the vector."""

    def damage(content: bytes) -> bytes:
        header = header_of(content)
        header["vector"][key] = value
        return with_header(content, header)

    return damage


def about(**changes: object) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        header = header_of(content)
        header["__metadata__"] |= changes
        return with_header(content, header)

    return damage


def without(name: str) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        return with_header(content, {key: value for key, value in header_of(content).items() if key != name})

    return damage


DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "truncated": lambda c: c[: len(c) // 2],
    "shorter than a checksum": lambda c: c[: DIGEST_BYTES - 1],
    "nothing but a checksum": lambda c: sealed(b""),
    "one byte too long": lambda c: c + b"\0",
    "a bit flipped in the header": lambda c: c[:20] + bytes([c[20] ^ 1]) + c[21:],
    "a bit flipped in the tensors": lambda c: c[:-100] + bytes([c[-100] ^ 1]) + c[-99:],
    "a bit flipped in the checksum": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
    "a header of 2^64-1 bytes": lambda c: sealed(b"\xff" * 8 + c[8:-DIGEST_BYTES]),
    "a header of 2^40 bytes": lambda c: sealed((1 << 40).to_bytes(8, "little") + c[8:-DIGEST_BYTES]),
    "a header longer than the file": lambda c: sealed((len(c) + 1).to_bytes(8, "little") + c[8:-DIGEST_BYTES]),
    "a header that is too long": lambda c: with_header(c, b" " * (MAX_HEADER + 1)),
    "a header that is no JSON": lambda c: with_header(c, b"{"),
    "a header that is no text": lambda c: with_header(c, b"\xff\xfe\xfd"),
    "a header that is a list": lambda c: with_header(c, []),
    "a hundred thousand brackets": lambda c: with_header(c, b"[" * 100_000),
    "a number of a million digits": lambda c: with_header(c, b'{"__metadata__": ' + b"9" * 1_000_000 + b"}"),
    "no metadata": without("__metadata__"),
    "metadata of another kind": lambda c: with_header(c, header_of(c) | {"__metadata__": [1]}),
    "a round that is none": about(round="soon"),
    "a round below 0": about(round="-1"),
    "a round of 2^63": about(round=str(2**63)),
    "a mass that is none": about(mass="nan"),
    "a mass of 0": about(mass="0.0"),
    "a table for a round": about(round={"round": 1}),
    "one tensor less": without("buffer.seen"),
    "one tensor more": lambda c: with_header(c, header_of(c) | {"more": header_of(c)["rounds"]}),
    "a vector of another length": change("shape", [999]),
    "a vector of 2^60 elements": change("shape", [2**60]),
    "a vector of another type": change("dtype", "F64"),
    "a vector that lies elsewhere": change("data_offsets", [8, 4008]),
    "a vector that ends before it begins": change("data_offsets", [4000, 0]),
    "tensors that are not all there": lambda c: sealed(c[: -DIGEST_BYTES - 4]),
    "a tail that belongs to nothing": lambda c: sealed(c[:-DIGEST_BYTES] + bytes(1000)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_34_a_damaged_generation_gives_way_to_the_one_before_and_is_kept(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    write(tmp_path, 25, 50)
    content = damage((tmp_path / NEWEST).read_bytes())
    (tmp_path / NEWEST).write_bytes(content)
    tracemalloc.start()
    try:
        found = checkpoint.read(tmp_path, EXPERIMENT, LIKE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MAX_HEADER, "room is made by what there is, not by what is claimed"
    assert found.newest is not None and found.newest.round == 25 and not found.lost
    ((aside, why),) = found.damaged.items()
    assert why and "\n" not in why
    assert aside.read_bytes() == content and not (tmp_path / NEWEST).exists()
    write(tmp_path, 75)  # what is whole stays whole beside it
    again = checkpoint.read(tmp_path, EXPERIMENT, LIKE)
    assert again.newest is not None and again.newest.round == 75 and not again.damaged
    (tmp_path / NEWEST).unlink()
    assert (tmp_path / PREVIOUS).exists(), "the damaged one did not take its place"


def test_34_where_all_is_damaged_it_is_remembered_that_something_was_saved(tmp_path: Path) -> None:
    write(tmp_path, 25, 50)
    for _ in range(2):
        for name in (NEWEST, PREVIOUS):
            (tmp_path / name).write_bytes(b"rust")
        found = checkpoint.read(tmp_path, EXPERIMENT, LIKE)
        assert found.newest is None and found.lost
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4 and {path.read_bytes() for path in kept} == {b"rust"}
    later = checkpoint.read(tmp_path, EXPERIMENT, LIKE)
    assert later.lost and sorted(later.damaged) == kept, "nor does another start forget it"
    write(tmp_path, 75)
    whole = checkpoint.read(tmp_path, EXPERIMENT, LIKE)
    assert whole.newest is not None and not whole.lost and not whole.damaged


def test_who_gives_other_settings_loses_nothing(tmp_path: Path) -> None:
    """A whole checkpoint of a larger model is of another experiment, and not a damaged one of this."""
    write(tmp_path, 25)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(BadInput, match="another experiment"):
        checkpoint.read(tmp_path, bytes(32), {"vector": torch.zeros(3)})
    assert before == sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())


# -- Off the loop ----------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer(tmp_path / "checkpoint", EXPERIMENT, lambda: None)
    yield made
    made.close()


def test_of_those_that_wait_only_the_newest_is_written(writer: Writer, tmp_path: Path) -> None:
    assert writer.written(wait=True) == []
    for round in range(1, 6):
        writer.put(Checkpoint(round, 1.0, LIKE))
    assert writer.written(wait=True) == [Written(1), Written(5)]
    found = [checkpoint.read(tmp_path / "checkpoint", EXPERIMENT, LIKE).newest]
    (tmp_path / "checkpoint" / NEWEST).unlink()
    found.append(checkpoint.read(tmp_path / "checkpoint", EXPERIMENT, LIKE).newest)
    assert [generation.round for generation in found if generation is not None] == [5, 1]


def test_a_disk_that_stands_still_keeps_nobody_waiting(writer: Writer, tmp_path: Path) -> None:
    """Where the draft shall be there is a pipe, and opening it takes until somebody reads from it."""
    draft = tmp_path / "checkpoint" / f".{NEWEST}.tmp"
    draft.parent.mkdir()
    os.mkfifo(draft)
    for round in range(1, 4):
        writer.put(Checkpoint(round, 1.0, LIKE))
        assert writer.written() == []
    with open(os.open(draft, os.O_RDONLY | os.O_NONBLOCK), "rb"):
        (first, last) = writer.written(wait=True)
    assert (first.round, last.round) == (1, 3) and first.failure and last.failure, "a pipe keeps nothing"


def test_one_that_cannot_be_written_is_told_and_the_next_is_tried(writer: Writer, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("in the way")
    writer.put(Checkpoint(1, 1.0, LIKE))
    assert writer.written(wait=True) == [Written(1, "File exists")]
    (tmp_path / "checkpoint").unlink()
    writer.put(Checkpoint(2, 1.0, LIKE))
    assert writer.written(wait=True) == [Written(2)]


# -- Whole nodes -----------------------------------------------------------------------------------------------------


def said(run: Path, node: str, word: str) -> list[dict]:
    return [event for event in events(run, node) if event["event"] == word]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_who_is_killed_and_resumes_ends_with_the_model_of_who_was_not(optimizer: str, tmp_path: Path) -> None:
    """Optimiser, schedule and random numbers go on to the bit: with dropout, momentum, and a rate that falls."""
    settings = ("train.rounds=30", f"train.optimizer={optimizer}", "train.lr=0.01", "train.schedule=cosine")
    settings += ("model.dropout=0.3", "train.checkpoint_every=4", "topology.graph=empty")
    settings += (f"train.momentum={0.9 if optimizer == 'sgd' else 0}",)
    up("ring-8", tmp_path / "whole", *settings, nodes=1)
    up("ring-8", tmp_path / "cut", *settings, 'faults=[{kind="restart", node=0, round=18, seconds=0}]', nodes=1)
    started = [event["round"] for event in said(tmp_path / "cut", "node-0", "started")]
    assert started in ([0, 16], [0, 12]), "the last one may not have been on the disk yet"
    models = [(tmp_path / run / "nodes" / "node-0" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert models[0] == models[1]
    saved = [event["round"] for event in said(tmp_path / "whole", "node-0", "checkpoint")]
    assert saved and saved == sorted(set(saved)) and set(saved) <= set(range(4, 30, 4))
    assert saved[-1] == 28, "the last one is waited for"


def test_before_the_first_round_ended_the_state_of_others_takes_the_place_of_the_own_start() -> None:
    experiment = load_experiment(find_experiment("hospitals"), [])
    name = experiment.topology.names[0]
    learner = make_learner(experiment, load_part(experiment, 0), name)
    size = learner.schema.nbytes
    leases = {peer: Buffers(size).take() for peer in "ab"}
    for value, lease in zip((1.0, 3.0), leases.values(), strict=True):
        as_tensor(lease).fill_(value)
    sealer = Sealer(Identity.generate(name), EXPERIMENT, learner.schema.digest, size, 1)
    given = tuple(Contribution(peer, 0, 1 / 2, lease) for peer, lease in leases.items())
    worker = Worker(Trainer(learner, experiment, name, varies=False), sealer, resumed=False)
    outcome = worker.compute(Compute(0, given, 1.0, 3.0, train=False, jump=True), None, lacking=False)
    assert outcome.computed.folded is not None and torch.equal(learner.vector, torch.full_like(learner.vector, 2.0))


PAIR = ("aurora", "bethel")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of two participants: its key, the roster of both, and rows of its own."""
    folder = tmp_path_factory.mktemp("folders")
    cards = "".join(run("keygen", name, "--out", folder / name).stdout for name in PAIR)
    random = torch.Generator().manual_seed(0)
    for name in PAIR:
        inputs = torch.randn(300, 4, generator=random)
        labels = (inputs.sum(dim=1) > 0).tolist()
        rows = [
            f"{','.join(map(str, row))},{'yes' if label else 'no'}"
            for row, label in zip(inputs.tolist(), labels, strict=True)
        ]
        (folder / name / "rows.csv").write_text("\n".join(["a,b,c,d,outcome", *rows]))
        (folder / name / "roster.txt").write_text(cards)
    return folder


def command(name: str, ports: dict[str, int], run_dir: Path, *more: str) -> list[str | Path]:
    (other,) = set(PAIR) - {name}
    return [
        "node", "--listen", f"tcp://127.0.0.1:{ports[name]}", "--peers", f"{other}@127.0.0.1:{ports[other]}",
        "--data", "rows.csv", "--target", "outcome", "--rounds", "80", "--run-dir", run_dir,
        "--set", "train.local_epochs=20", "--set", "train.checkpoint_every=2", *more,
    ]  # fmt: skip


def rust(folder: Path) -> dict[str, bytes]:
    """Damage every generation; their contents, by name."""
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def kept_in(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.iterdir()}


def test_34_whose_checkpoints_are_all_damaged_goes_on_from_its_neighbours_state(folders: Path, tmp_path: Path) -> None:
    ports = dict(zip(PAIR, free_ports(2), strict=True))
    with ExitStack() as stack:

        def start(name: str, *more: str) -> subprocess.Popen[str]:
            return stack.enter_context(started(*command(name, ports, tmp_path / name, *more), cwd=folders / name))

        aurora, bethel = start("aurora"), start("bethel")
        wait_for_line(bethel, r"^round +8/")
        bethel.kill()
        bethel.wait()
        checkpoints = tmp_path / "bethel" / "nodes" / "bethel" / "checkpoint"
        rusty = rust(checkpoints)
        again = start("bethel", "--resume")
        for process in (aurora, again):
            process.communicate(timeout=120)
            assert process.returncode == 0
    (damaged,) = said(tmp_path / "bethel", "bethel", "checkpoint_damaged")
    assert damaged["lost"] and len(damaged["files"]) == len(rusty) == 2
    assert set(rusty.values()) <= kept_in(checkpoints)
    second = said(tmp_path / "bethel", "bethel", "started")[1]
    (caught_up,) = said(tmp_path / "bethel", "bethel", "caught_up")
    lines = metrics(tmp_path / "bethel", "bethel")
    lines = [line for line in lines if line["epoch"] > lines[0]["epoch"]]
    assert lines[0]["round"] == caught_up["round"] >= 8 and lines[-1]["round"] == 79
    accepted = next(line for line in lines if line["merged"])
    assert accepted["t"] - second["t"] < 5.0  # from its start to the first neighbour's model in its own
    assert lines[-1]["merged"] == ["aurora"] and metrics(tmp_path / "aurora", "aurora")[-1]["merged"] == ["bethel"]
    assert lines[-1]["mixed"]["accuracy"] >= 0.9


def test_the_last_checkpoint_is_waited_for(folders: Path, tmp_path: Path) -> None:
    """The disk stands still: where the draft shall be there is a pipe, and opening it takes until somebody reads."""
    draft = tmp_path / "run" / "nodes" / "aurora" / "checkpoint" / f".{NEWEST}.tmp"
    draft.parent.mkdir(parents=True)
    os.mkfifo(draft)
    ports = dict(zip(PAIR, free_ports(2), strict=True))
    words = command("aurora", ports, tmp_path / "run", "--set", "network.join_timeout=0", "--resume")
    with started(*words, cwd=folders / "aurora") as process:
        wait_for_line(process, r"^round +80/")  # no round has waited
        assert not said(tmp_path / "run", "aurora", "checkpoint_failed")
        with open(os.open(draft, os.O_RDONLY | os.O_NONBLOCK), "rb"):
            process.communicate(timeout=120)
        assert process.returncode == 0
    told = [event["round"] for event in said(tmp_path / "run", "aurora", "checkpoint_failed")]
    assert told == [2, 78], "of those that waited, the newest alone"  # and a pipe keeps nothing


def test_34_without_a_neighbour_it_ends_and_says_how_to_start_afresh(folders: Path, tmp_path: Path) -> None:
    ports = dict(zip(PAIR, free_ports(2), strict=True))
    words = command("aurora", ports, tmp_path / "run", "--set", "network.join_timeout=0.5")
    with started(*words, cwd=folders / "aurora") as process:
        wait_for_line(process, r"^round +5/")
        process.kill()
    checkpoints = tmp_path / "run" / "nodes" / "aurora" / "checkpoint"
    rusty = rust(checkpoints)
    rounds = len(metrics(tmp_path / "run", "aurora"))
    for _ in range(2):  # nor is it forgotten when it is tried again
        failed = run(*words, "--resume", cwd=folders / "aurora", expect=1)
        (line,) = failed.stderr.strip().splitlines()
        assert "damaged" in line and str(checkpoints) in line and "moving that folder away" in line
        assert set(rusty.values()) <= kept_in(checkpoints)
        assert len(metrics(tmp_path / "run", "aurora")) == rounds, "it trained nothing"
    checkpoints.rename(tmp_path / "away")
    run(*words, "--resume", cwd=folders / "aurora")
    assert metrics(tmp_path / "run", "aurora")[-1]["round"] == 79


@pytest.mark.slow
def test_a_late_joiner_of_another_experiment_is_refused_in_words_and_disturbs_nobody(
    folders: Path, tmp_path: Path
) -> None:
    ports = dict(zip(PAIR, free_ports(2), strict=True))
    with ExitStack() as stack:
        words = command("aurora", ports, tmp_path / "aurora", "--set", "network.join_timeout=0.5")
        aurora = stack.enter_context(started(*words, cwd=folders / "aurora"))
        wait_for_line(aurora, r"^round +5/")
        other = command(
            "bethel", ports, tmp_path / "bethel", "--set", "train.lr=0.2", "--set", "network.join_timeout=2"
        )
        bethel = stack.enter_context(started(*other, cwd=folders / "bethel"))
        assert "train.lr is 0.2 here, 0.1 there" in wait_for_line(bethel, "experiment_mismatch")
        for process in (aurora, bethel):
            process.communicate(timeout=120)
            assert process.returncode == 0
    assert "train.lr is 0.1 here, 0.2 there" in said(tmp_path / "aurora", "aurora", "rejected")[0]["why"]
    assert [line["round"] for line in metrics(tmp_path / "aurora", "aurora")] == list(range(80))
    assert not said(tmp_path / "bethel", "bethel", "caught_up"), "no state goes to who trains something else"
