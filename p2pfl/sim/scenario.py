"""What a simulation starts from, as data: a network, its settings, its times and its faults. A seed draws one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import networkx as nx
import numpy as np

from p2pfl.composition import BY_PAIRS
from p2pfl.config import BY_ROWS, PUSH_SUM, TopologySection
from p2pfl.messages import MaskKey
from p2pfl.node import Settings
from p2pfl.rng import stream
from p2pfl.sim.faults import Fault, random_schedule
from p2pfl.topology import Topology, build
from p2pfl.topology.schedules import SCHEDULES

SOAK_MINUTES = 25.0  # of one drawn scenario, about
ROUND_SECONDS = (10.0, 40.0)  # of computing


@dataclass(frozen=True, slots=True)
class Scenario:
    """One simulation. The same scenario gives the same trace, byte for byte."""

    seed: int  # of delays, of compute times, and of what a loss of power leaves
    topology: Topology
    section: TopologySection | None  # what the topology was built from; None: survivors do not go on with another graph
    settings: Settings  # of every node, apart from what differs between them: name, neighbours, masses, first round
    compute_seconds: Mapping[str, float]  # of one round, on average
    masses: Mapping[str, float]
    values: Mapping[str, float]  # to start from
    targets: Mapping[str, float]  # to which training draws; with `rate` 0 nodes only average
    rate: float = 0.0
    address_book: bool = True  # whether everybody knows from the start where the others listen, as with a full roster
    starts: Mapping[str, float] = field(default_factory=dict)  # when each is started; 0 for who is not named
    latency: float = 0.03  # seconds one way, on average over the links
    jitter: float = 0.02  # seconds on top, at most
    transfer: float = 0.0  # seconds that an update takes beyond the latency
    faults: tuple[Fault, ...] = ()
    in_round: Mapping[str, tuple[tuple[int, Fault], ...]] = field(default_factory=dict)  # what strikes when a node
    # begins a round, or a later one; by round. The faults' own times do not count.
    limit: float = 86_400.0  # seconds by which all must be done


def static(graph: nx.Graph) -> Topology:
    """The topology of a graph that stays as it is."""
    return Topology(graph.name or "graph", tuple(graph), 1, lambda _round: graph)


def scenario(topology: Topology, seed: int = 0, section: TopologySection | None = None, **changes: object) -> Scenario:
    """A scenario in which nothing goes wrong: start values 0, 1, 2 …, averaged for 10 rounds of a second each."""
    names = topology.names
    plain = Scenario(
        seed=seed,
        topology=topology,
        section=section,
        settings=Settings("", rounds=10, checkpoint_every=5),
        compute_seconds=dict.fromkeys(names, 1.0),
        masses=dict.fromkeys(names, 1.0),
        values={name: float(i) for i, name in enumerate(names)},
        targets=dict.fromkeys(names, 0.0),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# -- Drawn at random -------------------------------------------------------------------------------------------------

# Graphs, with how often each comes.
FAMILIES: Mapping[str, float] = {
    "ring": 3,
    "random-regular": 4,
    "complete": 1,
    "star": 1,
    "torus": 1,
    "watts-strogatz": 1,
    "barabasi-albert": 1,
    "random-matching": 1,
    "one-peer-exponential": 1,
    "epidemic": 1,
}
SIZES: Mapping[str, tuple[int, int]] = {  # fewer nodes where everybody is linked to everybody
    "torus": (9, 9),
    "complete": (2, 8),
    "random-matching": (4, 8),
    "epidemic": (4, 8),
}


def random_scenario(seed: int, minutes: float = SOAK_MINUTES) -> Scenario:
    """Some network under some faults for about so many minutes, a pure function of the seed.

    Half of them average over a graph that stays as it is, in step, as an experiment without any settings does; the rest
    turn the knobs, and some have no rounds in common. One in four has a member that lies.
    """
    random = stream(seed, "scenario")
    family = str(random.choice(list(FAMILIES), p=np.array(list(FAMILIES.values())) / sum(FAMILIES.values())))
    low, high = SIZES.get(family, (5, 16))
    nodes = int(random.integers(low, high + 1))
    weights, heal = _weights(random, family), bool(random.random() < 0.8)
    section = TopologySection.model_validate({"graph": family, "nodes": nodes, "weights": weights, "heal": heal})
    topology = build(section, seed)
    names = topology.names
    compute = float(random.uniform(*ROUND_SECONDS))
    horizon = 60.0 * minutes
    rounds = max(5, round(horizon / (1.1 * compute)))
    settings = Settings(
        "",
        rounds=rounds,
        weights=weights,
        two_way=bool(weights not in PUSH_SUM and random.random() < 0.2),
        equal_masses=weights not in BY_ROWS,
        checkpoint_every=int(random.integers(2, 9)),
    )
    plain = not topology.varies and weights not in PUSH_SUM and not settings.two_way
    if plain and random.random() < 0.3:
        settings = replace(settings, staleness=float(random.choice([1.0, 2.0, np.inf])))
    masses = {name: float(random.integers(10, 500)) if weights in BY_ROWS else 1.0 for name in names}
    schedule = _schedule(seed, family)
    if schedule != "sync":
        weights = "push-sum" if schedule == "push-sum" else "metropolis"
        section, masses = section.model_copy(update={"weights": weights}), dict.fromkeys(names, 1.0)
        settings = replace(
            settings, schedule=schedule, weights=weights, staleness=math.inf, two_way=False, equal_masses=True
        )
    if _only_sums(seed, topology, settings):
        settings = replace(settings, mask_key=MaskKey("", 1, bytes(32)))  # each node has a key of its own instead
    late = {name for name in names if random.random() < 0.1}
    starts = {name: float(random.uniform(0, 0.5 * horizon if name in late else 5.0)) for name in names}
    links = [(a, b) for a, b in topology.union().edges]
    liar = str(random.choice(list(names))) if random.random() < 0.25 else None
    rate = float(np.exp(random.uniform(np.log(2.0), np.log(60.0))))
    return Scenario(
        seed=seed,
        topology=topology,
        section=section if heal else None,
        settings=settings,
        compute_seconds={name: compute * float(random.uniform(0.9, 1.1)) for name in names},
        masses=masses,
        values={name: float(random.normal()) for name in names},
        targets={name: float(random.normal()) for name in names},
        rate=0.1,
        address_book=bool(random.random() < 0.7),
        starts=starts,
        latency=float(random.uniform(0.005, 0.15)),
        jitter=float(random.uniform(0.0, 0.1)),
        transfer=float(random.choice([0.0, 0.5, 3.0])),
        faults=random_schedule(random, names, links, horizon, rate=rate, liar=liar),
        limit=20 * horizon,
    )


def _schedule(seed: int, family: str) -> str:
    """One in three of the graphs that stay as they are has no common rounds. A stream of its own: no other changes."""
    schedule = str(stream(seed, "schedule").choice(["pairwise", "gossip", "push-sum", *["sync"] * 6]))
    return "sync" if family in SCHEDULES else schedule


def _only_sums(seed: int, topology: Topology, settings: Settings) -> bool:
    """One in five of those that can do it learns only sums of its neighbours. A stream of its own, again."""
    plain = settings.schedule == "sync" and settings.staleness == 0 and not settings.two_way
    fits = plain and not topology.varies and not topology.directed and settings.weights in BY_PAIRS
    return fits and bool(stream(seed, "sums").random() < 0.2)


def _weights(random: np.random.Generator, family: str) -> str:
    match family:
        case "epidemic":
            return str(random.choice(PUSH_SUM))
        case "one-peer-exponential":  # whose edges go one way
            return str(random.choice(["metropolis", "lazy", *PUSH_SUM]))
        case _:
            return str(random.choice(["metropolis", "metropolis", "samples", "lazy", "max-degree"]))
