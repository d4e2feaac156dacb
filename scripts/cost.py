"""Measures what a round and a whole run cost: seconds from the records, memory as the kernel accounts for it.

Each experiment runs three times; the median is shown, with the least and the most behind it. Words choose the rows
whose names hold one of them: `./scripts/cost neighbours masked`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

P2PFL = (sys.executable, "-m", "p2pfl")
REPEATS = 3
SAMPLE = 0.1  # seconds between two readings of the memory
LARGE = (
    "--set=data.split=iid", "--set=data.test_fraction=0.01", "--set=model.hidden=[5000, 5000]",
    "--set=train.local_steps=1", "--set=train.batch_size=1", "--set=train.rounds=10", "--set=train.momentum=0",
    "--set=train.weight_decay=0",
)  # fmt: skip  # 25.2 million parameters, 100.7 MB


AMONG_FIVE = (
    *LARGE, "--nodes=5", "--set=topology.graph=complete", "--set=topology.weights=metropolis",
    "--set=train.local_steps=0", "--set=train.rounds=6", "--set=train.evaluate_every=6",
)  # fmt: skip  # everybody has four neighbours
MASKED = (*AMONG_FIVE, "--set=privacy.sums=masked")
CASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("hospitals", "hospitals", ()),
    ("ring-8", "ring-8", ()),
    ("100 MB, 2 nodes", "hospitals", ("--nodes=2", *LARGE)),
    ("100 MB, 4 neighbours each", "hospitals", AMONG_FIVE),
    ("the same, masked sums", "hospitals", MASKED),
)


def proportional_set_size(pid: int) -> int:
    """Bytes of this process and all below it, shared pages counted once over them (Linux; 0 elsewhere)."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(proportional_set_size(int(child)) for child in children)


def measure(experiment: str, *more: str) -> dict[str, float]:
    """One run: seconds from command to summary, the most memory, seconds a round, and those without learning."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [*P2PFL, "up", experiment, "--run-dir", f"{folder}/run", "--json", *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        peak, ended = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(SAMPLE):
                peak = max(peak, proportional_set_size(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        said, _ = process.communicate()
        ended.set()
        watcher.join()
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(f"p2pfl up {experiment} exited {process.returncode}")
        files = Path(folder, "run", "nodes").glob("*/metrics.jsonl")
        runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    rounds = json.loads(said)["rounds"]
    lines = [line["seconds"] for run in runs for line in run[1:]]
    whole = max(run[-1]["t"] for run in runs) - min(run[0]["t"] for run in runs)
    return {
        "seconds": seconds,
        "memory": peak / 1e6,
        "round": 1000 * whole / (rounds - 1),
        "network": 1000 * statistics.mean(s["total"] - s["train"] - s["evaluate"] for s in lines),
    }


def main() -> None:
    table = Table(title="What it costs here: median of three runs (least to most)", title_justify="left")
    for column in ("experiment", "a round, ms", "of it not learning, ms", "command to summary, s", "memory (PSS), MB"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    exchange: dict[str, float] = {}  # ms of a round that are not learning
    wanted = [case for case in CASES if not sys.argv[1:] or any(word in case[0] for word in sys.argv[1:])]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in wanted}
    for _ in range(REPEATS):  # by turns, so that whatever else the machine does falls on all of them
        for name, experiment, words in wanted:
            runs[name].append(measure(experiment, *words))
    for name, found in runs.items():
        exchange[name] = statistics.median(run["network"] for run in found)
        cells = []
        for key in ("round", "network", "seconds", "memory"):
            values = sorted(run[key] for run in found)
            cells.append(f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})")
        table.add_row(name, *cells)
    Console().print(table)
    bare, masked = (exchange.get(name) for name, *_ in CASES[-2:])
    if bare is not None and masked is not None:
        print(f"Masks make the exchange of 100 MB with 4 neighbours {masked / bare:.2f} times as long.")


if __name__ == "__main__":
    main()
