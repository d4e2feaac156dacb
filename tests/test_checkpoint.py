"""A resume point survives whatever interrupts its writing; and a damaged one is never taken for none."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2pfl import checkpoint
from p2pfl.checkpoint import NEWEST, PREVIOUS, Checkpoint
from p2pfl.messages import BadInput

EXPERIMENT = bytes(range(32))


def state(round: int) -> Checkpoint:
    tensors = {"vector": torch.full((100,), float(round)), "rounds": torch.tensor(round)}
    return Checkpoint(round, 1.0 / 3.0 + round, tensors)


def found_in(folder: Path) -> Checkpoint | None:
    return checkpoint.read(folder, EXPERIMENT, state(0).tensors).newest


def same(found: Checkpoint | None, round: int) -> bool:
    wanted = state(round)
    assert found is not None and found.tensors.keys() == wanted.tensors.keys()
    equal = all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    return equal and (found.round, found.mass) == (wanted.round, wanted.mass)


def test_the_newest_is_read_back_to_the_bit(tmp_path: Path) -> None:
    assert found_in(tmp_path / "none") is None
    for round in (25, 50, 75):
        checkpoint.write(tmp_path, state(round), EXPERIMENT)
        assert same(found_in(tmp_path), round)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NEWEST]


class Counted:
    """An open file whose writes are counted too."""

    def __init__(self, file: io.RawIOBase, write: Callable[..., object]) -> None:
        self.write, self.flush, self.fileno, self._file = write, file.flush, file.fileno, file

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_killed_at_any_step_of_writing_the_old_or_the_new_one_is_whole(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own writes, and is killed before and after the k-th call of the disk, for every k."""

    def attempt(folder: Path, kill_at: float) -> bool:
        """Whether writing came to its end."""
        child = os.fork()
        if child == 0:
            try:
                write(folder, kill_at)
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        return ended == 0

    def write(folder: Path, kill_at: float) -> None:
        calls = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*words: object, **keys: object) -> object:
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                done = call(*words, **keys)
                if calls + 0.5 == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            return wrapper

        really_open = Path.open

        def opened(path: Path, mode: str) -> object:
            file = really_open(path, mode, buffering=0)
            return Counted(file, counted(file.write))

        monkeypatch.setattr(os, "fsync", counted(os.fsync))
        monkeypatch.setattr(Path, "open", counted(opened))
        monkeypatch.setattr(Path, "replace", counted(Path.replace))
        checkpoint.write(folder, state(50), EXPERIMENT)

    kills, done = 0, False
    while not done:
        kills += 1
        folder = tmp_path / str(kills)
        if not first:
            checkpoint.write(folder, state(25), EXPERIMENT)
        done = attempt(folder, 0.5 + kills / 2)
        found = found_in(folder)
        if first and not done:
            assert found is None or same(found, 50)
        else:
            assert same(found, 50) if done else (same(found, 25) or same(found, 50))
        checkpoint.write(folder, state(75), EXPERIMENT)  # what was left behind is in nobody's way
        assert same(found_in(folder), 75)
    assert kills == (17 if first else 19)  # open, 4 writes, fsync, 1 or 2 renames, the folder's fsync: each twice


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
        case "huge header":
            path.write_bytes(b"\xff" * 8 + content[8:])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "huge header"])
def test_a_damaged_generation_gives_way_to_the_other_and_two_are_told(how: str, tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(25), EXPERIMENT)
    checkpoint.write(tmp_path, state(50), EXPERIMENT)
    damaged(tmp_path / NEWEST, how)
    assert same(found_in(tmp_path), 25)
    damaged(tmp_path / PREVIOUS, how)
    assert found_in(tmp_path) is None
    assert checkpoint.read(tmp_path, EXPERIMENT, state(0).tensors).lost


def test_one_of_another_experiment_is_refused(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(25), EXPERIMENT)
    with pytest.raises(BadInput, match="another experiment"):
        checkpoint.read(tmp_path, bytes(32), state(0).tensors)
