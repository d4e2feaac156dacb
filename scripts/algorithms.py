"""The rules against each other on unequal data: digits over 32 nodes, in the lockstep engine.

Each rule trains at the same effective step: momentum makes a step 1 / (1 - β) times as long, so its rate is that much
smaller. What each would reach at a rate of its own is another question; one such row is in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from p2pfl.config import Toml, validate
from p2pfl.plots import png, rows_of_scores
from p2pfl.records import create_run, open_run, write_text
from p2pfl.sim.lockstep import simulate

NODES, BATCH, RATE, BETA = 32, 32, 0.6, 0.9
SKEWS = (0.1, 1.0)  # of the Dirichlet split
GRAPHS: dict[str, dict[str, Toml]] = {
    "ring": {"graph": "ring"},
    "torus": {"graph": "torus"},
    "exponential": {"graph": "exponential"},
    "random 4-regular": {"graph": "random-regular", "degree": 4},
}
RULES: dict[str, tuple[str, ...]] = {
    "averaging (D-PSGD)": ("mix.momentum=none",),
    "FedProx, µ = 0.1": ("mix.momentum=none", "train.proximal=0.1"),
    "local momentum": ("mix.momentum=none", f"train.momentum={BETA}", f"train.lr={RATE * (1 - BETA):.3g}"),
    "quasi-global momentum": (f"train.lr={RATE * (1 - BETA):.3g}",),
    "quasi-global, lr 0.6": (),
    "gradient tracking": ("mix.correction=gradient-tracking",),
    "K-GT": ("mix.correction=k-gt",),
    "LED": ("mix.correction=led",),
    "quasi-global, int8": (f"train.lr={RATE * (1 - BETA):.3g}", "mix.compress=int8"),
    "quasi-global, top 10 %": (f"train.lr={RATE * (1 - BETA):.3g}", "mix.compress=top-k"),
}


BAD = (3, 13, 23)  # of the 32 nodes, in the comparison of rules that bear bad members
BEARING: dict[str, tuple[str, ...]] = {
    "mean": (),
    "median": ("mix.rule=median",),
    "trimmed mean": ("mix.rule=trimmed-mean",),
    "geometric median": ("mix.rule=geometric-median",),
    "multi-Krum": ("mix.rule=multi-krum",),
    "clipping": ("mix.rule=clip",),
    "NNM, trimmed mean": ("mix.rule=trimmed-mean", "mix.nnm=true"),
    "NNM, geometric median": ("mix.rule=geometric-median", "mix.nnm=true"),
}
ATTACKED = ("nobody lies", "negate", "noise", "alie", "ipm", "label-flip")


def rules_for(steps: int) -> dict[str, tuple[str, ...]]:
    """Those that make a difference: with one step a round K-GT is gradient tracking, and FedProx is averaging."""
    left_out = ("gradient tracking",) if steps > 1 else ("K-GT", "FedProx, µ = 0.1")
    return {rule: settings for rule, settings in RULES.items() if rule not in left_out}


def trained(
    folder: Path,
    settings: tuple[str, ...],
    graph: dict[str, Toml],
    alpha: float,
    seed: int,
    rounds: int,
    steps: int,
    lie: str = "",
) -> dict:
    """One run, in a folder of its own; its summary. With a lie, that of those in BAD, from the first round on."""
    tree: dict[str, Toml] = {
        "seed": seed,
        "topology": {**graph, "nodes": NODES},
        "data": {"name": "digits", "split": "dirichlet", "alpha": alpha},
        "model": {"name": "mlp", "hidden": [128]},
        "train": {"rounds": rounds, "local_steps": steps, "batch_size": BATCH, "lr": RATE, "evaluate_every": 20},
    }
    if lie:
        tree["faults"] = [{"kind": "lie", "node": node, "about": lie, "round": 0} for node in BAD]
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        table = tree.setdefault(section, {})
        assert isinstance(table, dict)
        table[name] = {"true": True}.get(value, float(value) if value.replace(".", "").isdigit() else value)
    outcome = simulate(validate(tree, "the comparison"), create_run(folder), lambda line: None)
    return dict(outcome.summary)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def honest_accuracy(folder: Path) -> float:
    """The mean over those who are not in BAD, after the last round."""
    run = open_run(folder)
    names = [name for index, name in enumerate(run.nodes()) if index not in BAD]
    return statistics.fmean(run.node(name).read_metrics()[-1]["mixed"]["accuracy"] for name in names)


def bear(folder: Path, rounds: int, seeds: int) -> None:
    """Which rule bears which lie: three of 32 on an 8-regular graph, Dirichlet 0.1, quasi-global momentum, lr 0.2."""
    graph: dict[str, Toml] = {"graph": "random-regular", "degree": 8}
    table = Table(box=None, pad_edge=False)
    table.add_column("honest nodes, %", no_wrap=True)
    for lie in ATTACKED:
        table.add_column(lie, justify="right", no_wrap=True)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=len(BEARING) * len(ATTACKED) * seeds)
        for rule, settings in BEARING.items():
            cells = []
            for lie in ATTACKED:
                found = []
                for seed in range(seeds):
                    run = folder / f"{rule}-{lie}-{seed}".replace(" ", "_").replace(",", "")
                    more = () if rule == "mean" else (f"mix.tolerate={len(BAD)}",)
                    about = (*settings, *more, "train.lr=0.2")
                    trained(run, about, graph, SKEWS[0], seed, rounds, 1, "" if lie == ATTACKED[0] else lie)
                    found.append(honest_accuracy(run))
                    progress.advance(task)
                mean, deviation = spread(found)
                cells.append(f"{100 * mean:.1f} ± {100 * deviation:.1f}")
            table.add_row(rule, *cells)
    Console(width=140).print(table)
    with (folder / "liars.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)
    print(f"\ntable    {folder / 'liars.txt'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="algorithms")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--graphs", nargs="+", choices=list(GRAPHS), default=list(GRAPHS))
    parser.add_argument("--steps", type=int, default=1, help="local steps a round")
    parser.add_argument("--liars", action="store_true", help="instead: three bad members, and the rules that bear them")
    parser.add_argument("--out", type=Path, help="folder of the runs; a new one in runs/ if not given")
    chosen = parser.parse_args()
    folder: Path = chosen.out or Path("runs") / f"algorithms-{datetime.now():%Y%m%d-%H%M%S}"

    if chosen.liars:
        bear(folder, chosen.rounds, chosen.seeds)
        return
    chosen_rules = rules_for(chosen.steps)
    table = Table(box=None, pad_edge=False)
    for head in ("skew", "graph", "rule", "accuracy, %", "of the mean model, %", "apart", "kB a round"):
        table.add_column(head, justify="left" if head in ("skew", "graph", "rule") else "right", no_wrap=True)
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    found = []
    with Progress(console=Console(stderr=True)) as progress:
        total = len(SKEWS) * len(chosen.graphs) * len(chosen_rules) * chosen.seeds
        task = progress.add_task("training", total=total)
        for alpha in SKEWS:
            panel = panels.setdefault(f"Dirichlet {alpha:g}", {})
            for graph in chosen.graphs:
                for rule, settings in chosen_rules.items():
                    runs = []
                    for seed in range(chosen.seeds):
                        name = f"{alpha:g}-{graph}-{rule}-{seed}".replace(" ", "_").replace("%", "").replace(",", "")
                        run = folder / name.replace("(", "").replace(")", "")
                        runs.append(trained(run, settings, GRAPHS[graph], alpha, seed, chosen.rounds, chosen.steps))
                        progress.advance(task)
                    accuracy = spread([run["metrics"]["accuracy"]["mean"] for run in runs])
                    whole = spread([run["mean_model"]["accuracy"] for run in runs])
                    apart = spread([run["consensus_distance"] for run in runs])
                    sent = runs[0]["bytes"]["sent"] / NODES / chosen.rounds
                    panel.setdefault(rule, {})[graph] = accuracy
                    shown = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in (accuracy, whole)]
                    table.add_row(f"{alpha:g}", graph, rule, *shown, f"{apart[0]:.3g}", f"{sent / 1000:.1f}")
                    found.append(
                        {
                            "alpha": alpha,
                            "graph": graph,
                            "rule": rule,
                            "accuracy": accuracy,
                            "mean_model": whole,
                            "consensus_distance": apart,
                            "bytes_per_round": sent,
                        }
                    )
                table.add_section()
    Console(width=140).print(table)
    with (folder / "algorithms.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)
    write_text(folder / "algorithms.json", json.dumps(found, indent=1))
    title = f"{NODES} nodes with unequal digits, {chosen.rounds} rounds: mean of {chosen.seeds} seeds, ± one deviation"
    png(rows_of_scores(panels, "accuracy", title), folder / "algorithms.png")
    print(f"\ntable    {folder / 'algorithms.txt'}\nfigure   {folder / 'algorithms.png'}")


if __name__ == "__main__":
    main()
