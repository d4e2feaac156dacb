"""Real `p2pfl` processes for the tests, each ended before the test ends."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from p2pfl.identity import Identity, save

P2PFL = (sys.executable, "-m", "p2pfl")
LIMIT = 120  # seconds; far beyond what anything here takes, so that a hang is a failure and not a stuck suite
# One torch thread each, as `up` gives its nodes: many processes share two cores here.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(*words: str | Path, cwd: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; fail with what it said if it exits otherwise than expected."""
    command = [*P2PFL, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT, env=ENVIRONMENT)
    assert done.returncode == expect, f"{words} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def up(
    experiment: str | Path,
    run_dir: Path,
    *settings: str,
    nodes: int | None = None,
    cwd: Path | None = None,
    expect: int = 0,
) -> dict:
    """`p2pfl up … --json`: the summary."""
    words: list[str | Path] = ["up", experiment, "--run-dir", run_dir, "--json"]
    for setting in settings:
        words += ["--set", setting]
    if nodes is not None:
        words += ["--nodes", str(nodes)]
    return json.loads(run(*words, cwd=cwd, expect=expect).stdout)


def make_members(folder: Path, *names: str) -> None:
    """In `folder`, a folder for each of them with its key and the roster of all: what `p2pfl keygen` leads to."""
    made = {name: Identity.generate(name) for name in names}
    for name, identity in made.items():
        (folder / name).mkdir(parents=True)
        save(identity, folder / name)
        (folder / name / "roster.txt").write_text("".join(f"{other.card}\n" for other in made.values()))


def metrics(run_dir: Path, node: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "nodes" / node / "metrics.jsonl").read_text().splitlines()]


def events(run_dir: Path, node: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "nodes" / node / "events.jsonl").read_text().splitlines()]


@contextmanager
def started(
    *words: str | Path, cwd: Path | None = None, within: Sequence[str] = (), group: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process whose stdout is read line by line; killed at the end if it still runs.

    `within`: the words of a command that runs another one, as `nsenter` does, and becomes it. `group`: it leads a
    process group of its own, which all that it starts belong to.
    """
    process = subprocess.Popen(
        [*within, *P2PFL, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=group,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> str:
    """Read lines until one matches; fail with all that was said if the process ends before."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no line matched {pattern!r} in\n{''.join(said)}")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports
