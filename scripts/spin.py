"""Several topologies on the same task: each as real processes, then one table and one page with their curves."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from p2pfl.config import GRAPHS
from p2pfl.plots import png
from p2pfl.report import comparison, read_history

P2PFL = (sys.executable, "-m", "p2pfl")
FAMILIES = [graph for graph in GRAPHS if graph != "empty"]  # each has a file of its name in topologies/


def up(experiment: str, run: Path, options: list[str]) -> dict:
    """Run it into this folder; its summary. What goes wrong is said by p2pfl itself, and ends everything."""
    command = [*P2PFL, "up", experiment, "--run-dir", str(run), "--json", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def row(name: str, summary: dict) -> list[str]:
    """What the table says of one topology."""
    accuracy, graph, contraction = summary["metrics"].get("accuracy"), summary["topology"], summary["contraction"]
    shown = [f"{100 * accuracy['mean']:.1f} %", f"{100 * accuracy['min']:.1f} %"] if accuracy else ["–", "–"]
    rounds = graph["exact_after"] or graph["rounds_to_1e-6"]
    factors = [f"{value:.3f}" if value is not None else "–" for value in (graph["lambda2"], contraction["measured"])]
    megabytes = summary["bytes"]["sent"] / 1e6 / summary["nodes"]
    return [name, *shown, *factors, str(rounds or "–"), f"{megabytes:.2f}", f"{summary['seconds']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="spin")
    parser.add_argument("topology", nargs="*", help="experiment files, or names of built-in ones")
    parser.add_argument("--families", action="store_true", help="every family of graphs")
    parser.add_argument("--nodes", type=int, help="this many nodes in each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `p2pfl up`")
    parser.add_argument("--out", type=Path, help="folder of the runs and the page; a new one in runs/ if not given")
    chosen = parser.parse_args()
    names = [*chosen.topology, *(FAMILIES if chosen.families else [])]
    if not names:
        parser.error("name at least one topology: ./scripts/spin ring torus")
    title = "convergence" if chosen.families else "spin"
    folder = chosen.out or Path("runs") / f"{title}-{datetime.now():%Y%m%d-%H%M%S}"
    options = [] if chosen.nodes is None else ["--nodes", str(chosen.nodes)]
    options += [word for setting in chosen.set for word in ("--set", setting)]

    console = Console()
    table = Table(box=None, pad_edge=False)
    heads = ("topology", "mean", "worst", "predicted", "measured", "rounds", "MB", "s")
    for head in heads:
        table.add_column(head, justify="left" if head == "topology" else "right", no_wrap=True)
    runs = []
    for name in names:
        run = folder / Path(name).stem
        with console.status(f"{name} ({len(runs) + 1} of {len(names)})"):
            table.add_row(*row(Path(name).stem, up(name, run, options)))
        runs.append(run)
    page, picture = folder / "convergence.html", folder / "convergence.png"
    subprocess.run([*P2PFL, "report", *map(str, runs), "--out", str(page)], check=True, stdout=subprocess.DEVNULL)
    compared = comparison([read_history(run, run.name) for run in runs]) if len(runs) > 1 else None
    if compared is not None:
        png(compared.figure, picture)
    console.print(table)
    console.print(
        "mean, worst: accuracy on held-out rows, over the nodes; predicted, measured: what one averaging leaves of a "
        "disagreement, at worst and in this run; rounds: to a millionth; MB: sent by a node; s: command to summary",
        style="dim",
    )
    console.print(f"\npage     {page}", highlight=False, soft_wrap=True)
    if compared is not None:
        console.print(f"picture  {picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
