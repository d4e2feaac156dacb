"""What an experiment asks of its graph, and can only be judged once that is drawn.

What follows from the experiment file alone stands in `p2pfl.composition`. Here is what depends on edges: how many
neighbours the rule has to choose from, whether edges go both ways, and how fast the graph mixes.
"""

from __future__ import annotations

from p2pfl.composition import LEAST_OUTER_GAP, too_few_neighbours
from p2pfl.config import Experiment
from p2pfl.messages import BadInput
from p2pfl.topology import Topology
from p2pfl.topology.implied import implied
from p2pfl.topology.matrix import hears


def check_graph(experiment: Experiment, topology: Topology) -> None:
    """BadInput, with what works instead, where the parts of `[mix]` cannot do on this graph what they are for.

    - A robust rule that bears b bad neighbours needs `composition.least_degree` of them, at every node in every round.
      Of a graph that is drawn anew for each round that is asked on average: who hears fewer keeps its own vector then.
    - A correction needs edges that go both ways, which of a graph in a file only the file says.
    - An outer momentum needs a spectral gap of LEAST_OUTER_GAP, if the graph stays as it is. Nodes count alike here,
      since nobody knows the others' rows.
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


def least_heard(topology: Topology) -> tuple[int, str]:
    """The fewest neighbours that a node hears in any round, and which node it is.

    Of a graph that is drawn anew for each round: how many one hears on average, rounded down.
    """
    if topology.period is None:
        graph = topology.at(0)
        return sum(len(hears(graph, name)) for name in graph) // len(graph), "a node on average"
    graphs = [topology.at(round) for round in range(topology.period)]
    return min((len(hears(graph, name)), name) for graph in graphs for name in graph)
