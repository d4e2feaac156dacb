"""A disk that is full, or can only be read: training goes on, it is said once, and what was written stays readable.

Small disks are made of memory, in a mount namespace of their own; where the machine allows no such thing, the tests
that need one are skipped. Half a write is made by the limit that the system sets on a file's size.
"""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import ENVIRONMENT, LIMIT, P2PFL, events, make_members, metrics

from p2pfl.messages import BadInput
from p2pfl.records import NodeRecords, write_text

ROUNDS = 120
ALONE = ("--peers", "bethel", "--data", "breast_cancer", "--model", "logistic", "--rounds", str(ROUNDS))
QUICK = ("--set", "network.join_timeout=0", "--set", "train.checkpoint_every=10")


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0


needs_a_disk = pytest.mark.skipif(not may_mount(), reason="this machine lets us make no mount namespace (`unshare -m`)")


def node_with_disk(folder: Path, mount: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`p2pfl node` of aurora where `mount` (a shell command) was done before; its run is copied to `folder`/kept."""
    node = shlex.join([*P2PFL, "node", *ALONE, *QUICK, "--run-dir", "disk/run", *map(str, words)])
    script = f"mkdir disk && {mount} && {{ {node}; code=$?; cp -r disk/run kept; exit $code; }}"
    command = ["unshare", "-m", "sh", "-c", script]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=LIMIT, env=ENVIRONMENT, cwd=folder
    )


@pytest.fixture
def aurora(tmp_path: Path) -> Path:
    make_members(tmp_path, "aurora", "bethel")
    return tmp_path / "aurora"


@needs_a_disk
def test_33_a_disk_that_becomes_full_stops_no_training(aurora: Path) -> None:
    done = node_with_disk(aurora, "mount -t tmpfs -o size=64k tmpfs disk")
    assert f"round {ROUNDS}/{ROUNDS}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("cannot write down what happens (No space left on device)") == 1
    assert "lines of its records are missing" in done.stdout and "checkpoint_failed" in done.stdout
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the rounds are done" in done.stderr and "No space left on device" in done.stderr
    rounds = [line["round"] for line in metrics(aurora / "kept", "aurora")]  # each line of the file parses
    assert rounds == list(range(len(rounds))) and 10 < len(rounds) < ROUNDS
    assert events(aurora / "kept", "aurora")[0]["event"] == "started"


@needs_a_disk
def test_33_checkpoints_that_cannot_be_written_are_told_and_stop_no_training(aurora: Path) -> None:
    place = "disk/run/nodes/aurora/checkpoint"
    done = node_with_disk(aurora, f"mkdir -p {place} && mount -t tmpfs -o ro tmpfs {place}", "--resume")
    assert done.returncode == 0, done.stderr
    failed = [event for event in events(aurora / "kept", "aurora") if event["event"] == "checkpoint_failed"]
    assert len(failed) > 5 and {event["why"] for event in failed} == {"Read-only file system"}
    assert len(metrics(aurora / "kept", "aurora")) == ROUNDS


@needs_a_disk
def test_33_a_start_that_cannot_be_counted_is_refused(aurora: Path) -> None:
    mount = "mkdir usb && mount -t tmpfs tmpfs usb && cp -p aurora.key usb && mount -o remount,ro usb"
    done = node_with_disk(aurora, mount, "--identity", "usb/aurora.key")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot count this start in usb/aurora.epoch" in done.stderr and "ead-only" in done.stderr
    assert not (aurora / "kept" / "nodes" / "aurora").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: a write that would do so is cut there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_33_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """For every size at which the disk can be full."""
    line = {"round": 0, "text": "twenty bytes or more"}
    (whole := NodeRecords(tmp_path / "whole")).append_metrics(line)
    size = whole.metrics.stat().st_size
    for full in range(size, 2 * size):
        records = NodeRecords(tmp_path / str(full))
        records.append_metrics(line)
        with largest_file(full), pytest.raises(OSError, match=r"space|too large"):
            records.append_metrics({**line, "round": 1})
        assert records.metrics.stat().st_size == size
        records.append_metrics({**line, "round": 2})
        records.close()
        assert [line["round"] for line in records.read_metrics()] == [0, 2] and records.damaged == 0


def test_33_a_file_that_is_replaced_keeps_what_it_held(tmp_path: Path) -> None:
    write_text(tmp_path / "summary.json", "{}")
    with largest_file(100), pytest.raises(BadInput, match=r"cannot write .*summary.json: .*; make room"):
        write_text(tmp_path / "summary.json", "x" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "{}"
