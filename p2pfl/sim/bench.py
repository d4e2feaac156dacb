"""How fast the event engine is on this machine, beside a limit that is measured in the same breath.

The limit is what its queue and its trace cost alone: the same number of events, each taken from the heap, written down
as a line of usual length, hashed, and put back. No engine with such a trace is faster; the rest is what nodes and
invariants cost.
"""

from __future__ import annotations

import time
from functools import partial

from p2pfl.config import TopologySection
from p2pfl.node import Settings
from p2pfl.records import Line
from p2pfl.sim.engine import Engine, Trace
from p2pfl.sim.scenario import scenario
from p2pfl.sim.world import Clock
from p2pfl.topology import build

GRAPH = "random-regular"  # of degree 4, as we recommend it
A_LINE = "node-0123 < node-0456 update 12 1.0 5.0"


def bench(nodes: int, rounds: int, heal: bool) -> Line:
    """Average one number over so many nodes, with all invariants; to `heal`, everybody keeps a table of everybody."""
    section = TopologySection.model_validate({"graph": GRAPH, "nodes": nodes, "heal": heal})
    drawn_from = section if heal else None
    engine = Engine(scenario(build(section, 0), 0, drawn_from, settings=Settings("", rounds=rounds)))
    began = time.perf_counter()
    outcome = engine.run()
    seconds = time.perf_counter() - began
    alone = queue_and_trace(nodes, outcome.events)
    return {
        "graph": GRAPH,
        "nodes": nodes,
        "rounds": rounds,
        "heal": heal,
        "events": outcome.events,
        "seconds": seconds,
        "virtual_seconds": outcome.seconds,
        "events_per_second": outcome.events / seconds,
        "limit_events_per_second": outcome.events / alone,
        "share_of_limit": alone / seconds,
    }


def queue_and_trace(nodes: int, events: int) -> float:
    """Seconds that these two alone take for so many events, as many of them waiting as there are nodes."""
    clock, trace = Clock(), Trace(keep=False)

    def happen(index: int) -> None:
        trace.add(f"{clock.now:.6f} {A_LINE}")
        clock.after(1.0 + index / nodes, partial(happen, index))

    for index in range(nodes):
        clock.at(index / nodes, partial(happen, index))
    began = time.perf_counter()
    until = 1.0
    while trace.count < events:
        clock.run(until)
        trace.digest()
        until += 1.0
    return (time.perf_counter() - began) * events / trace.count
