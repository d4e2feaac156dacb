"""An experiment calm, and again under random faults; and whether what was promised was kept.

The promises, each judged in its own unit from what the nodes wrote down: every node that nobody killed for good
finishes; the accuracy is within two points of the calm run; no checkpoint is unreadable; nobody waits longer than 3 s
for one who died; who starts again takes part again within 5 s; and nobody who lives is held to be dead at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
from blake3 import blake3
from rich.console import Console

from p2pfl import config
from p2pfl.checkpoint import ASIDE, DIGEST_BYTES, NEWEST, PREVIOUS
from p2pfl.messages import BadInput
from p2pfl.records import Line, NodeRecords, Run, number, open_run, words
from p2pfl.rng import stream
from p2pfl.topology.files import names_in

P2PFL = (sys.executable, "-m", "p2pfl")
BETWEEN = 5.0  # seconds from one fault to the next, on average
HELD_UP = 2.0  # of these, in which nobody makes rounds, about: the grace, and the way back of who was away
AWAY = (0.5, 4.0)  # seconds that a node is away
QUIET_END = 0.9  # of the rounds: faults come before, so that the last one has time to come back
LOST_FOR_GOOD = 0.25  # of the nodes, at most
CHECKPOINTS = 2.0  # seconds between two of a node, about
ACCURACY_LOST = 0.02  # that the faults may cost
LONGEST_WAIT = 3.0  # seconds for one who is dead, once
LONGEST_RETURN = 5.0  # seconds from a start to the first neighbour's model in one's own


# -- The runs --------------------------------------------------------------------------------------------------------


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


@contextmanager
def other_work(busy: bool) -> Iterator[None]:
    """If `busy`: something else keeps every core of the machine at work meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1) if busy]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def pace(run: Path) -> float:
    """Seconds that a round takes, all in all."""
    records = open_run(run)
    lines = [line for name in records.nodes() for line in records.node(name).read_metrics()[1:]]
    return float(np.mean([number(line, "seconds", "total") for line in lines]))


def schedule(names: list[str], kinds: list[str], rounds: int, apart: float, random: np.random.Generator) -> list[dict]:
    """Faults every `apart` rounds or so; the last ones leave time to come back."""
    faults: list[dict] = []
    doomed: set[str] = set()
    round = 0.0
    while (round := round + apart * random.uniform(0.5, 1.5)) < QUIET_END * rounds:
        kind = str(random.choice(kinds))
        living = [name for name in names if name not in doomed]
        if kind == "kill" and len(doomed) + 1 > LOST_FOR_GOOD * len(names):
            kind = "restart"
        node = str(random.choice(living))
        if kind == "kill":
            doomed.add(node)
        faults.append({"kind": kind, "node": node, "round": int(round), "seconds": float(random.uniform(*AWAY))})
    return faults


def as_toml(faults: list[dict]) -> str:
    tables = (", ".join(f"{key} = {json.dumps(value)}" for key, value in fault.items()) for fault in faults)
    return "faults=[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


# -- The verdict -----------------------------------------------------------------------------------------------------


def longest_wait(run: Run) -> tuple[float, str]:
    """The longest that a node waited for one whom it then went on without: seconds, and where that was."""
    waits = [
        (number(line, "seconds", "wait") or 0.0, f"{name} in round {line['round']}")
        for name in run.nodes()
        for line in run.node(name).read_metrics()
        if words(line, "missing")
    ]
    return max(waits, default=(0.0, "nobody"))


def longest_return(run: Run) -> tuple[float, str]:
    """The longest from a second start to the first round with a neighbour's model: seconds, and whose that was."""
    returns = [(seconds, name) for name in run.nodes() for seconds in returns_of(run.node(name))]
    return max(returns, default=(0.0, "nobody"))


def returns_of(records: NodeRecords) -> Iterator[float]:
    starts = [number(event, "t") or 0.0 for event in records.read_events() if event["event"] == "started"]
    merged = [number(line, "t") or 0.0 for line in records.read_metrics() if words(line, "merged")]
    for start, following in zip(starts[1:], [*starts[2:], float("inf")], strict=False):
        times = [t for t in merged if start <= t < following]
        if times:  # else it was killed again before, or ran out of rounds: whether it finished is judged elsewhere
            yield times[0] - start


def held_dead(run: Run, living: set[str]) -> list[str]:
    """Who, at its end, held somebody to be dead who lived."""
    wrong = []
    for name in sorted(living):
        dead: set[str] = set()
        for event in run.node(name).read_events():
            match event["event"]:
                case "lost":
                    dead.add(str(event["peer"]))
                case "back":
                    dead.discard(str(event["peer"]))
                case "started":
                    dead.clear()
        wrong += [f"{name} held {peer} to be dead" for peer in sorted(dead & living)]
    return wrong


def condemned(run: Run) -> list[str]:
    """Who was declared dead, by whom, ever."""
    return [
        f"{name} declared {event['peer']} dead: {event.get('why')}"
        for name in run.nodes()
        for event in run.node(name).read_events()
        if event["event"] in ("died", "lost")
    ]


def bad_checkpoints(run: Run) -> list[str]:
    """Each one that is damaged, was found damaged on the way, or could not be written."""
    bad = []
    for name in run.nodes():
        folder = run.node(name).checkpoint
        bad += [f"{path} was found damaged" for path in folder.glob(f"{ASIDE}*")]
        for path in (folder / NEWEST, folder / PREVIOUS):
            content = path.read_bytes() if path.exists() else b""
            if content and blake3(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
                bad.append(f"{path} is damaged")
        failed = [event for event in run.node(name).read_events() if event["event"] == "checkpoint_failed"]
        bad += [f"{name} could not write one: {event.get('why')}" for event in failed]
    return bad


def broken_promises(calm: Line, rough: Line, run: Run, faults: list[dict]) -> list[str]:
    """What was promised and not kept, a line each."""
    doomed = {fault["node"] for fault in faults if fault["kind"] == "kill"}
    lost = set(words(rough, "failed")) - doomed
    broken = [f"{name} did not finish, although nobody killed it for good" for name in sorted(lost)]
    before, after = (number(summary, "metrics", "accuracy", "mean") for summary in (calm, rough))
    if before is not None and after is not None and after < before - ACCURACY_LOST:
        broken.append(f"accuracy fell from {100 * before:.1f} to {100 * after:.1f} %")
    broken += bad_checkpoints(run)
    seconds, where = longest_wait(run)
    if seconds > LONGEST_WAIT:
        broken.append(f"{where} waited {seconds:.1f} s for one who was dead; {LONGEST_WAIT:g} s are allowed")
    seconds, who = longest_return(run)
    if seconds > LONGEST_RETURN:
        broken.append(f"{who} took {seconds:.1f} s to take part again; {LONGEST_RETURN:g} s are allowed")
    return broken + held_dead(run, set(run.nodes()) - doomed - lost)


# -- Saying it -------------------------------------------------------------------------------------------------------


def show(console: Console, what: str, text: str) -> None:
    console.print(f"{what:<15}{text}", highlight=False, soft_wrap=True)


def conclude(console: Console, broken: list[str], folder: Path) -> None:
    for line in broken:
        show(console, "BROKEN", line)
    show(console, "verdict", "every promise was kept" if not broken else f"{len(broken)} broken; see {folder}")
    sys.exit(1 if broken else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="chaos")
    parser.add_argument("experiment", help="an experiment file, or the name of a built-in one")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long the faults go on, about")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument(
        "--kinds", default="restart", help="of faults, with commas: restart (the default), pause, kill (for good)"
    )
    parser.add_argument("--calm", action="store_true", help="no faults: nobody must be declared dead")
    parser.add_argument("--busy", action="store_true", help="other work keeps every core busy meanwhile")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `p2pfl up`")
    parser.add_argument("--out", type=Path, help="folder of the runs; a new one in runs/ if not given")
    chosen = parser.parse_args()
    folder = chosen.out or Path("runs") / f"chaos-{datetime.now():%Y%m%d-%H%M%S}"
    console = Console()
    kinds = chosen.kinds.split(",")
    unknown = sorted(set(kinds) - set(config.PROCESS_FAULTS))
    try:
        if unknown:
            raise BadInput(f"--kinds {unknown[0]}: known are {', '.join(config.PROCESS_FAULTS)}")
        experiment = config.load(config.find_experiment(chosen.experiment), chosen.set, names_in=names_in)
    except BadInput as error:
        print(f"chaos: {error}", file=sys.stderr)
        sys.exit(2)
    with other_work(chosen.busy):
        up(chosen.experiment, folder / "short", chosen.set)
        a_round = pace(folder / "short")
        productive = 1.0 if chosen.calm else 1 - HELD_UP / BETWEEN
        rounds = max(experiment.train.rounds, int(60 * chosen.minutes * productive / a_round))
        every = max(1, int(CHECKPOINTS / a_round))
        settings = [*chosen.set, f"train.rounds={rounds}", f"train.checkpoint_every={every}"]
        console.print(f"calm: {rounds} rounds of {1000 * a_round:.0f} ms …", highlight=False)
        calm = up(chosen.experiment, folder / "calm", settings, expect=(0, 1))
        if chosen.calm:
            show(console, "finished", f"{calm['finished']} of {calm['nodes']} in {calm['seconds']:.0f} s")
            broken = [f"{name} did not finish" for name in calm["failed"]]
            conclude(console, broken + condemned(open_run(folder / "calm")), folder)
        apart = BETWEEN * productive / a_round
        faults = schedule(list(experiment.topology.names), kinds, rounds, apart, stream(chosen.seed, "chaos"))
        counts = {kind: sum(fault["kind"] == kind for fault in faults) for kind in config.PROCESS_FAULTS}
        said = ", ".join(f"{count} × {kind}" for kind, count in counts.items() if count)
        console.print(f"rough: the same with {said or 'no fault'} (seed {chosen.seed}) …", highlight=False)
        rough = up(chosen.experiment, folder / "rough", [*settings, as_toml(faults)], expect=(0, 1))

    run = open_run(folder / "rough")
    show(console, "finished", f"{rough['finished']} of {rough['nodes']}; {counts['kill']} killed for good")
    each = f", a fault every {rough['seconds'] / len(faults):.1f} s" if faults else ""
    show(console, "seconds", f"{calm['seconds']:.0f} calm, {rough['seconds']:.0f} rough{each}")
    for key in sorted(calm["metrics"]):
        before, after = (number(summary, "metrics", key, "mean") for summary in (calm, rough))
        show(console, key, f"{before:.4f} calm, {after:.4f} rough" if before and after else f"{before}, {after}")
    (wait, where), (back, who) = longest_wait(run), longest_return(run)
    show(console, "longest wait", f"{wait:.2f} s, {where}")
    show(console, "longest return", f"{back:.2f} s, {who}")
    if rough["rejected"]:
        show(console, "refused", ", ".join(f"{code} {count}" for code, count in rough["rejected"].items()))
    conclude(console, broken_promises(calm, rough, run, faults), folder)


if __name__ == "__main__":
    main()
