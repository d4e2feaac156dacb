"""What an experiment asks of its graph, and can only be judged once that is drawn.

What follows from the experiment file alone stands in `p2pfl.composition`. Here is what depends on edges: how many
neighbours the rule has to choose from, or a sum to hide each of them in, whether edges go both ways, and how fast the
graph mixes.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pfl.composition import LEAST_OUTER_GAP, LEAST_SENDERS, too_few_neighbours
from p2pfl.config import Experiment
from p2pfl.messages import BadInput
from p2pfl.topology import Topology
from p2pfl.topology.implied import implied
from p2pfl.topology.matrix import hears

NAMES_SHOWN = 4  # in one line
FEW_NODES = 5  # of which each has four neighbours only if all are joined


def check_graph(experiment: Experiment, topology: Topology) -> None:
    """BadInput, with what works instead, where parts of the experiment cannot do on this graph what they are for.

    - A robust rule that bears b bad neighbours needs `composition.least_degree` of them, at every node in every round.
      Of a graph that is drawn anew for each round that is asked on average: who hears fewer keeps its own vector then.
    - A correction needs edges that go both ways, which of a graph in a file only the file says.
    - An outer momentum needs a spectral gap of LEAST_OUTER_GAP, if the graph stays as it is. Nodes count alike here,
      since nobody knows the others' rows.
    - A masked sum needs LEAST_SENDERS neighbours at every node.
    """
    mix = experiment.mix
    if mix.correction != "none" and topology.directed:
        raise BadInput(
            f"mix.correction = {mix.correction!r} needs edges that both ends confirm, and those of {topology.name} "
            "go one way: use mix.correction = 'none' with topology.weights = 'push-sum'"
        )
    if mix.tolerate > 0:
        degree, node = least_heard(topology)
        if (wrong := too_few_neighbours(mix.rule, mix.tolerate, degree, node)) is not None:
            raise BadInput(wrong)
    if mix.outer != "none" and not topology.varies:
        weights = experiment.topology.weighting
        gap = implied(topology, weights, dict.fromkeys(topology.names, 1.0))["spectral_gap"]
        if gap < LEAST_OUTER_GAP:
            raise BadInput(
                f"mix.outer = {mix.outer!r} grows disagreement faster than {topology.name} with weights {weights!r} "
                f"removes it: its spectral gap is {gap:.4f}, and {LEAST_OUTER_GAP} is needed: "
                "use topology.graph = 'exponential', or mix.outer = 'none'"
            )
    if experiment.privacy.sums == "masked" and (exposed := without_masks(topology)):
        many = len(topology.names) > FEW_NODES
        raise BadInput(
            f"privacy.sums = 'masked' needs {LEAST_SENDERS} neighbours at every node, for a sum of fewer hides too "
            f"little, and of {topology.name} {some(exposed)} {'has' if len(exposed) == 1 else 'have'} fewer: use "
            + ("topology.graph = 'random-regular' with topology.degree = 4, or " if many else "")
            + ("topology.graph = 'complete', or " if LEAST_SENDERS < len(topology.names) <= FEW_NODES else "")
            + "privacy.sums = 'none'"
        )


def without_masks(topology: Topology) -> tuple[str, ...]:
    """The nodes that can be given no masked sum, for they hear fewer than LEAST_SENDERS, in the graph's order.

    All of them, where the graph changes from round to round or its edges go one way.
    """
    if topology.varies or topology.directed:
        return topology.names
    graph = topology.at(0)
    return tuple(name for name in topology.names if len(graph[name]) < LEAST_SENDERS)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def least_heard(topology: Topology) -> tuple[int, str]:
    """The fewest neighbours that a node hears in any round, and which node it is.

    Of a graph that is drawn anew for each round: how many one hears on average, rounded down.
    """
    if topology.period is None:
        graph = topology.at(0)
        return sum(len(hears(graph, name)) for name in graph) // len(graph), "a node on average"
    graphs = [topology.at(round) for round in range(topology.period)]
    return min((len(hears(graph, name)), name) for graph in graphs for name in graph)
