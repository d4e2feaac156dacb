"""An experiment calm, and again under random faults; and whether what was promised was kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.console import Console

from p2pfl import config
from p2pfl.records import number, open_run, read_json
from p2pfl.rng import stream
from p2pfl.topology.files import names_in

P2PFL = (sys.executable, "-m", "p2pfl")
BETWEEN = 5.0  # seconds from one fault to the next, on average
LOST_FOR_GOOD = 0.25  # of the nodes, at most
ACCURACY_LOST = 0.02  # that the faults may cost
CHECKPOINTS = 2.0  # seconds between two of a node, about


def up(experiment: str, run: Path, settings: list[str], expect: tuple[int, ...] = (0,)) -> dict:
    """Run it into this folder; its summary."""
    command = [*P2PFL, "up", experiment, "--run-dir", str(run), "--json"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode not in expect:
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def schedule(names: list[str], rounds: int, a_second: float, random: np.random.Generator) -> list[dict]:
    """Faults every BETWEEN seconds or so, at `a_second` rounds a second; the last ones leave time to come back."""
    faults: list[dict] = []
    doomed: set[str] = set()
    round = 5.0
    while (round := round + random.exponential(BETWEEN * a_second)) < 0.9 * rounds:
        kind = str(random.choice(["restart", "restart", "pause", "kill"]))
        living = [name for name in names if name not in doomed]
        if kind == "kill" and len(doomed) + 1 > LOST_FOR_GOOD * len(names):
            kind = "restart"
        node = str(random.choice(living))
        if kind == "kill":
            doomed.add(node)
        faults.append({"kind": kind, "node": node, "round": int(round), "seconds": float(random.uniform(0.5, 4.0))})
    return faults


def as_toml(faults: list[dict]) -> str:
    tables = (", ".join(f"{key} = {json.dumps(value)}" for key, value in fault.items()) for fault in faults)
    return "faults=[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


def broken_promises(calm: dict, rough: dict, run: Path, faults: list[dict]) -> list[str]:
    """What was promised and not kept, a line each."""
    broken = []
    doomed = {fault["node"] for fault in faults if fault["kind"] == "kill"}
    lost = sorted(set(rough["failed"]) - doomed)
    if lost:
        broken.append(f"did not finish although nobody killed them for good: {', '.join(lost)}")
    before, after = (number(summary, "metrics", "accuracy", "mean") for summary in (calm, rough))
    if before is not None and after is not None and after < before - ACCURACY_LOST:
        broken.append(f"accuracy fell from {100 * before:.1f} to {100 * after:.1f} %")
    for name in open_run(run).nodes():
        for event in open_run(run).node(name).read_events():
            if event["event"] == "checkpoint_failed" or "damaged" in str(event.get("why", "")):
                broken.append(f"{name}: {event}")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="chaos")
    parser.add_argument("experiment", help="an experiment file, or the name of a built-in one")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long the rough run takes, about")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `p2pfl up`")
    parser.add_argument("--out", type=Path, help="folder of the runs; a new one in runs/ if not given")
    chosen = parser.parse_args()
    folder = chosen.out or Path("runs") / f"chaos-{datetime.now():%Y%m%d-%H%M%S}"
    console = Console()
    experiment = config.load(config.find_experiment(chosen.experiment), chosen.set, names_in=names_in)
    names, rounds = list(experiment.topology.names), experiment.train.rounds

    calm = up(chosen.experiment, folder / "short", chosen.set)
    lines = open_run(folder / "short").node(names[0]).read_metrics()[1:]
    a_round = float(np.median([number(line, "seconds", "total") for line in lines]))
    rounds = max(rounds, int(60 * chosen.minutes / a_round))
    settings = [*chosen.set, f"train.rounds={rounds}", f"train.checkpoint_every={max(1, int(CHECKPOINTS / a_round))}"]
    console.print(f"calm: {rounds} rounds of {1000 * a_round:.0f} ms …")
    calm = up(chosen.experiment, folder / "calm", settings)
    faults = schedule(names, rounds, 1 / a_round, stream(chosen.seed, "chaos"))
    counts = {kind: sum(fault["kind"] == kind for fault in faults) for kind in ("restart", "pause", "kill")}
    said = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
    console.print(f"rough: the same with {said} (seed {chosen.seed}) …")
    rough = up(chosen.experiment, folder / "rough", [*settings, as_toml(faults)], expect=(0, 1))

    console.print(f"finished   {rough['finished']} of {rough['nodes']}; for good lost {counts['kill']}")
    console.print(f"seconds    {calm['seconds']:.0f} calm, {rough['seconds']:.0f} rough")
    for key in read_json(folder / "calm" / "summary.json")["metrics"]:
        before, after = (number(summary, "metrics", key, "mean") for summary in (calm, rough))
        console.print(f"{key:10} {before} calm, {after} rough", highlight=False)
    if rough["rejected"]:
        console.print(f"refused    {rough['rejected']}", highlight=False)
    broken = broken_promises(calm, rough, folder / "rough", faults)
    for line in broken:
        console.print(f"BROKEN     {line}", highlight=False, soft_wrap=True)
    console.print("verdict    every promise was kept" if not broken else f"verdict    {len(broken)} broken; {folder}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
