"""Measures what a round and a whole run cost: seconds from the records, memory as the kernel accounts for it.

Each experiment runs three times; the median is shown, with the least and the most behind it.
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
    "--nodes=2", "--set=data.split=iid", "--set=data.test_fraction=0.01", "--set=model.hidden=[5000, 5000]",
    "--set=train.local_steps=1", "--set=train.batch_size=1", "--set=train.rounds=10", "--set=train.momentum=0",
    "--set=train.weight_decay=0",
)  # fmt: skip  # 25.2 million parameters, 100.7 MB


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
    for name, words in (("hospitals", ()), ("ring-8", ()), ("100 MB, 2 nodes", LARGE)):
        found = [measure("hospitals" if words else name, *words) for _ in range(REPEATS)]
        cells = []
        for key in ("round", "network", "seconds", "memory"):
            values = sorted(run[key] for run in found)
            cells.append(f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
