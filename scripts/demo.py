"""The main job for everyone to see: three hospitals, one is killed in mid-run, the others finish."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

VICTIM, AT_ROUND = "ashford", 10  # the largest of them, and the first to be started
P2PFL = (sys.executable, "-m", "p2pfl")
RUNS = Path("runs")


def up(run: Path, setting: str, quiet: bool) -> None:
    """Run the hospitals into this folder."""
    command = [*P2PFL, "up", "hospitals", "--run-dir", str(run), "--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if quiet else None)


def last_accuracy(run: Path, node: str, key: str) -> tuple[int, float]:
    """The newest round that this node recorded, and its accuracy there."""
    line = json.loads((run / "nodes" / node / "metrics.jsonl").read_text().splitlines()[-1])
    return line["round"] + 1, line[key]["accuracy"]


def main() -> None:
    console = Console()
    started = f"{datetime.now():%Y%m%d-%H%M%S}"
    alone, together = RUNS / f"demo-alone-{started}", RUNS / f"demo-{started}"

    console.rule("Each hospital alone, on its own patients")
    up(alone, "topology.graph=empty", quiet=True)
    console.rule(f"Together, with no server; {VICTIM} is killed (SIGKILL) in round {AT_ROUND + 1}")
    up(together, f'faults=[{{kind="kill", node="{VICTIM}", round={AT_ROUND}}}]', quiet=False)
    subprocess.run([*P2PFL, "report", str(together)], check=True, stdout=subprocess.DEVNULL)
    model = together / "model.safetensors"
    subprocess.run([*P2PFL, "export", str(together), "--out", str(model)], check=True, stdout=subprocess.DEVNULL)

    table = Table(title="Accuracy on held-out patients", title_justify="left")
    for column in ("hospital", "alone", "together", ""):
        table.add_column(column, justify="left" if column in ("hospital", "") else "right")
    for node in sorted(entry.name for entry in (together / "nodes").iterdir()):
        _, before = last_accuracy(alone, node, "mixed")
        rounds, after = last_accuracy(together, node, "mixed")
        note = f"killed after {rounds} rounds; its last model" if node == VICTIM else "finished"
        table.add_row(node, f"{100 * before:.1f} %", f"{100 * after:.1f} %", note)
    console.print()
    console.print(table)
    console.print(f"\nreport   {together / 'report.html'}  (open it in a browser)", highlight=False, soft_wrap=True)
    console.print(f"model    {model}", highlight=False, soft_wrap=True)
    console.print(
        "\nWhat to type next:\n"
        "  .venv/bin/p2pfl up ring-8                     eight nodes in a ring\n"
        "  .venv/bin/p2pfl topology ring --nodes 16      what a graph implies\n"
        "  .venv/bin/p2pfl node --help                   take part with your own data on your own machine",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
