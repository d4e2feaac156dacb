"""Node-hours of random faults in virtual time: one scenario a seed, on all cores, until seeds and hours are both done.

Whatever breaks is shown with its seed; `--replay SEED` plays that one again and shows how it came to it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from p2pfl.sim.engine import Engine, run
from p2pfl.sim.faults import describe
from p2pfl.sim.invariants import Broken
from p2pfl.sim.scenario import SOAK_MINUTES, random_scenario

BATCH = 4  # seeds that a process is handed at once
SHOWN = 60  # lines of a trace


@dataclass(frozen=True)
class Verdict:
    """What became of one seed."""

    seed: int
    hours: float  # of simulated life, over all nodes
    events: int
    broken: str = ""


def simulate(seed: int, minutes: float) -> Verdict:
    try:
        outcome = run(random_scenario(seed, minutes))
    except Broken as broken:
        return Verdict(seed, 0.0, 0, str(broken))
    return Verdict(seed, outcome.node_hours, outcome.events)


def verdicts(first: int, seeds: int, hours: float, minutes: float, jobs: int) -> Iterator[Verdict]:
    """As they come, until there are so many seeds and so many hours."""
    done = 0.0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        coming = pool.imap_unordered(partial(simulate, minutes=minutes), range(first, first + seeds), chunksize=BATCH)
        for verdict in coming:
            done += verdict.hours
            yield verdict
        for start in itertools.count(first + seeds, BATCH * jobs):
            if done >= hours:
                return
            for verdict in pool.imap_unordered(partial(simulate, minutes=minutes), range(start, start + BATCH * jobs)):
                done += verdict.hours
                yield verdict


def soak(first: int, seeds: int, hours: float, minutes: float, jobs: int) -> int:
    """Run them all and say what came of it; 1 if an invariant was broken."""
    began, count, done, events, broken = time.monotonic(), 0, 0.0, 0, list[Verdict]()
    for verdict in verdicts(first, seeds, hours, minutes, jobs):
        count, done, events = count + 1, done + verdict.hours, events + verdict.events
        if verdict.broken:
            broken.append(verdict)
            print(f"\r{verdict.broken}", flush=True)
        passed = time.monotonic() - began
        line = (
            f"{count} seeds, {done:.1f} node-hours, {events / 1e6:.1f} M events, {passed:.0f} s, {len(broken)} broken"
        )
        print(f"\r{line}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    passed = time.monotonic() - began
    if broken:
        print(f"{count} seeds, {done:.1f} node-hours: {len(broken)} seeds broke an invariant, in {passed:.0f} s")
        print(f"seeds {' '.join(str(verdict.seed) for verdict in sorted(broken, key=lambda v: v.seed))}")
        print(f"to see one again: ./scripts/soak --minutes {minutes:g} --replay {min(v.seed for v in broken)}")
        return 1
    rate = f"{done / passed / jobs:.2f} a second and process"
    print(f"{count} seeds, {done:.1f} node-hours: no invariant was broken, in {passed:.0f} s ({rate})")
    return 0


def replayed(seed: int, minutes: float, trace: str | None) -> int:
    """Play one seed again: its faults, the end of its trace, and what broke."""
    scenario = random_scenario(seed, minutes)
    engine = Engine(scenario, keep=True)
    topology, settings = scenario.topology, scenario.settings
    print(
        f"{topology.name} of {len(topology.names)}, {settings.schedule}, {settings.weights}, {settings.rounds} rounds"
    )
    for fault in scenario.faults:
        print(f"{fault.at:10.3f} {describe(fault)}")
    broken = ""
    try:
        engine.run()
    except Broken as found:
        broken = str(found)
    digest = engine.trace.digest()
    print("", *engine.trace.lines[-SHOWN:], sep="\n")
    if trace is not None:
        with open(trace, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in engine.trace.lines)
    print(f"\n{engine.trace.count} lines, digest {digest}\n{broken or 'no invariant was broken'}")
    return 1 if broken else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="soak", formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000, help="at least so many (1000)")
    parser.add_argument("--hours", type=float, default=5000.0, help="and so many simulated node-hours (5000)")
    parser.add_argument("--minutes", type=float, default=SOAK_MINUTES, help=f"of one scenario ({SOAK_MINUTES:g})")
    parser.add_argument("--first", type=int, default=0, help="seed to begin with (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="only this seed, with its trace")
    parser.add_argument("--trace", metavar="FILE", help="where --replay writes all lines")
    chosen = parser.parse_args()
    if chosen.replay is not None:
        sys.exit(replayed(chosen.replay, chosen.minutes, chosen.trace))
    sys.exit(soak(chosen.first, chosen.seeds, chosen.hours, chosen.minutes, chosen.jobs))


if __name__ == "__main__":
    main()
