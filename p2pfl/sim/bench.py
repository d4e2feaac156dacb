"""How fast the two simulators are on this machine, each beside something that is measured in the same breath.

The limit of the event engine is what its queue and its trace cost alone: the same number of events, each taken from
the heap, written down as a line of usual length, hashed, and put back. No engine with such a trace is faster; the rest
is what nodes and invariants cost.

Lockstep is measured beside a plain loop over the nodes' learners, that mixes and goes by the same rule.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from p2pfl.config import Experiment, TopologySection
from p2pfl.data import Dataset, Part
from p2pfl.node import Settings
from p2pfl.records import Line
from p2pfl.rng import torch_seed
from p2pfl.sim.engine import Engine, Trace
from p2pfl.sim.lockstep import Lockstep
from p2pfl.sim.scenario import scenario
from p2pfl.sim.world import Clock
from p2pfl.swarm import Ground
from p2pfl.topology import build

GRAPH = "random-regular"  # of degree 4, as we recommend it
FEATURES, HIDDEN, CLASSES = 64, 128, 10  # digits, and a network of 9,610 parameters
ROWS = 48  # of each node: more than a batch of 32
LOOP_ROUNDS = 3  # of the loop, which takes longer
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


def bench_lockstep(nodes: int, rounds: int) -> Line:
    """One step a round with the default rule, on rows made from a seed; nothing is evaluated or written down.

    One round before is not counted: memory is touched for the first time in it.
    """
    experiment = Experiment.model_validate(
        {
            "topology": {"graph": GRAPH, "nodes": nodes},
            "model": {"name": "mlp", "hidden": [HIDDEN]},
            "train": {"rounds": rounds + 1, "local_steps": 1, "device": "cpu"},
        }
    )
    graph = build(experiment.topology, 0)
    parts = {name: _made_up(name) for name in graph.names}
    ground = Ground(graph, parts, dict.fromkeys(graph.names, 1.0))
    torch.set_num_threads(1)  # as everywhere
    at_once = Lockstep(experiment, ground)
    parameters = at_once.schema.size
    fast = _seconds_of_a_round(at_once, rounds)
    del at_once  # or memory would hold all vectors twice
    slow = _seconds_of_a_round(Lockstep(experiment, ground, at_once=False), min(rounds, LOOP_ROUNDS))
    return {
        "graph": GRAPH,
        "nodes": nodes,
        "parameters": parameters,
        "momentum": experiment.momentum,
        "rounds": rounds,
        "rounds_per_second": 1 / fast,
        "loop_rounds": min(rounds, LOOP_ROUNDS),
        "loop_rounds_per_second": 1 / slow,
        "times_the_loop": slow / fast,
    }


def _made_up(name: str) -> Part:
    random = torch.Generator().manual_seed(torch_seed(0, "bench", name))
    inputs = torch.randn(ROWS, FEATURES, generator=random)
    targets = torch.randint(CLASSES, (ROWS,), generator=random)
    rows = Dataset(inputs, targets, tuple(map(str, range(CLASSES))))
    return Part(rows, rows)  # on which it would be tested, if it were


def _seconds_of_a_round(nodes: Lockstep, rounds: int) -> float:
    """Of the fastest: whatever else runs on this machine makes a round slower, never faster."""
    nodes.advance(0, look=False)
    seconds = []
    for round in range(1, rounds + 1):
        began = time.perf_counter()
        nodes.advance(round, look=False)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
