"""Which nodes of a graph can be given masked sums, said before anybody joins."""

from __future__ import annotations

import json
import re

import networkx as nx
import pytest
from processes import run

from p2pfl.composition import LEAST_SENDERS
from p2pfl.config import validate
from p2pfl.messages import BadInput
from p2pfl.topology import Topology, build
from p2pfl.topology.fit import check_graph, without_masks

Keys = dict[str, object]


def check(**topology: object) -> None:
    """Refused, where masked sums do not go with this graph."""
    experiment = validate({"topology": topology, "privacy": {"sums": "masked"}}, "here")  # type: ignore[dict-item]
    check_graph(experiment, build(experiment.topology, experiment.seed))


def test_who_has_two_neighbours_or_fewer_can_be_given_no_masked_sum() -> None:
    """A wheel has a hub and a rim, where each has three; without one of its spokes, one has two."""
    wheel = nx.relabel_nodes(nx.wheel_graph(7), str)
    assert without_masks(Topology("wheel", tuple(wheel), 1, lambda _: wheel)) == ()
    broken = wheel.copy()
    broken.remove_edge("0", "4")
    assert dict(broken.degree)["4"] == LEAST_SENDERS - 1
    assert without_masks(Topology("wheel", tuple(broken), 1, lambda _: broken)) == ("4",)


@pytest.mark.parametrize("keys", [{"graph": "base-k", "nodes": 12}, {"graph": "exponential-directed", "nodes": 32}])
def test_nobody_can_where_the_neighbours_change_or_hear_one_way_only(keys: Keys) -> None:
    topology = build(validate({"topology": keys}, "here").topology, seed=0)  # type: ignore[dict-item]
    assert without_masks(topology) == topology.names


@pytest.mark.parametrize(
    ("graph", "nodes", "named"),
    [
        ("ring", 8, "node-0, node-1, node-2, node-3 and 4 more have fewer"),
        ("star", 5, "node-1, node-2, node-3, node-4 have fewer"),
        ("path", 3, "node-0, node-1, node-2 have fewer"),
    ],
)
def test_a_graph_with_such_nodes_is_refused_and_what_is_named_instead_works(graph: str, nodes: int, named: str) -> None:
    with pytest.raises(BadInput, match=named) as caught:
        check(graph=graph, nodes=nodes)
    mends = re.findall(r"topology\.(\w+) = '?([\w-]+)'?", str(caught.value))
    assert bool(mends) == (nodes > LEAST_SENDERS)  # of three nodes no graph will do
    if mends:
        check(nodes=nodes, **{key: int(value) if value.isdigit() else value for key, value in mends})


def test_the_topology_command_says_beforehand_how_many_qualify_and_who_does_not() -> None:
    """Of a 3 x 4 grid the four corners have two neighbours."""
    words = ("topology", "grid", "--nodes", "12")
    told = json.loads(run(*words, "--json").stdout)["masked_sums"]
    assert told == {"qualify": 8, "not": ["node-00", "node-03", "node-08", "node-11"]}
    shown = " ".join(run(*words).stdout.split())
    assert "masked sums 8 of 12 nodes; not node-00, node-03, node-08, node-11" in shown
