"""Records in, one self-contained page out: how training went, in words, tables and pictures.

Reads run folders and writes the page and the PNGs; nothing else. The page needs no script, no font and no address, and
its policy line forbids them. Whatever comes from a file is escaped where it enters the HTML: in `_text`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import networkx as nx
from matplotlib.figure import Figure

from p2pfl import config, plots
from p2pfl.messages import BadInput, printable
from p2pfl.plots import Mark, Trace, show, show_bytes, show_seconds
from p2pfl.records import Json, Line, count_rejected, inside, is_number, number, open_run, read_json, words, write_text
from p2pfl.topology import implied

SCORES_SHOWN = 5  # scores that get a picture of their own
ROWS_OPEN = 40  # rows of a table that is not folded away
EVENTS_SHOWN = 300  # rows of the timeline
NONE = "–"

# What an event of one node says about the end of a node, and the word for it. A fault of the experiment goes first.
OWN_END = {"killed": "killed", "left": "left"}
PEER_END = {"died": "died", "left": "left"}
ROUTINE = {"joined", "waiting", "checkpoint", "finished", "started", "late", "suspected", "returned"}


# -- What the records say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeHistory:
    """One node's records."""

    name: str
    lines: tuple[Line, ...]  # of metrics, in the order of writing; each has a number "t" and a number "round"
    events: tuple[Line, ...]

    @property
    def rounds(self) -> list[Line]:
        """One line a round, in order: the last one where a round was done again after a restart."""
        return [line for _, line in sorted({_round(line): line for line in self.lines}.items())]

    def total(self, *keys: str) -> float:
        """The sum of a number over all lines."""
        return math.fsum(number(line, *keys) or 0.0 for line in self.lines)


@dataclass(frozen=True)
class History:
    """One run, as far as it was recorded."""

    label: str
    nodes: tuple[NodeHistory, ...]
    summary: Line  # empty: the run goes on, or was cut off
    topology: Line  # node-link form
    graph: Line  # what `p2pfl topology --json` prints, as far as it is known
    toml: str
    ended: Mapping[str, str]  # node that did not finish → "killed", "died", "left" or "failed"
    damaged: int  # lines that could not be read
    start: float  # unix seconds at which the first round began

    @property
    def scores(self) -> list[str]:
        """The names of the scores: accuracy first, loss last."""
        found = {name for node in self.nodes for line in node.lines for name in _mapping(line, "mixed")}
        return sorted(found, key=lambda name: (name == "loss", name != "accuracy", name))

    @property
    def seconds(self) -> float:
        """From the start of the first round to the last line of metrics, unless the summary knows better."""
        last = max((_time(node.lines[-1]) for node in self.nodes if node.lines), default=self.start)
        return number(self.summary, "seconds") or max(0.0, last - self.start)

    @property
    def rounds(self) -> int:
        """How many rounds the longest-running node completed."""
        return max((_round(node.rounds[-1]) + 1 for node in self.nodes if node.lines), default=0)

    def last(self, node: NodeHistory, *keys: str) -> float | None:
        """A number of the node's last round."""
        return number(node.rounds[-1], *keys) if node.lines else None

    def finals(self, score: str) -> list[float]:
        """The last values of a score after mixing, over the nodes that did not end early."""
        values = [self.last(node, "mixed", score) for node in self.nodes if node.name not in self.ended]
        return [value for value in values if value is not None]


def read_history(path: Path, label: str) -> History:
    """Everything that the run folder says; BadInput if it is none. Whatever is missing or damaged is left out."""
    run = open_run(path)
    nodes, damaged = [], 0
    for name in run.nodes():
        records = run.node(name)
        lines = [line for line in records.read_metrics() if is_number(line.get("t")) and is_number(line.get("round"))]
        events = [event for event in records.read_events() if isinstance(event.get("event"), str)]
        nodes.append(NodeHistory(name, tuple(lines), tuple(events)))
        damaged += records.damaged
    summary, topology = read_json(run.summary), read_json(run.topology)
    toml = run.experiment.read_text("utf-8", errors="replace") if run.experiment.is_file() else ""
    begins = [_time(node.lines[0]) - (number(node.lines[0], "seconds", "total") or 0.0) for node in nodes if node.lines]
    return History(
        label=label,
        nodes=tuple(nodes),
        summary=summary,
        topology=topology,
        graph=dict(_mapping(summary, "topology")) or _implied(topology),
        toml=toml,
        ended=_ended(nodes, summary, _faults(run.experiment)),
        damaged=damaged,
        start=min(begins, default=0.0),
    )


def _ended(nodes: Sequence[NodeHistory], summary: Line, killed: Callable[[str], bool]) -> dict[str, str]:
    """Who did not finish, with the word for why."""
    ends: dict[str, tuple[float, str]] = {}  # by node: what was said last about its end
    for node in nodes:
        for event in node.events:
            kind, peer, t = str(event["event"]), event.get("peer"), number(event, "t") or 0.0
            if kind in OWN_END:
                ends[node.name] = max(ends.get(node.name, (t, "")), (t, OWN_END[kind]))
            elif kind in PEER_END and isinstance(peer, str) and event.get("reason") != "finished":
                ends[peer] = max(ends.get(peer, (t, "")), (t, PEER_END[kind]))
    names = words(summary, "failed")
    if not summary:  # nobody has counted yet: gone is who was said to be, and wrote no line and no "finished" since
        finished = {node.name for node in nodes if any(event["event"] == "finished" for event in node.events)}
        wrote = {node.name: _time(node.lines[-1]) for node in nodes if node.lines}
        known = {node.name for node in nodes} - finished
        names = [name for name, (t, _) in ends.items() if name in known and wrote.get(name, 0.0) <= t]
    return {
        name: "killed" if killed(name) else ends[name][1] if name in ends else "failed" for name in sorted(set(names))
    }


def _faults(experiment: Path) -> Callable[[str], bool]:
    """Was this node to be killed by the experiment itself?"""
    try:
        return lambda name, read=config.load(experiment): read.fault_for(name) is not None  # type: ignore[misc]
    except BadInput:  # missing, or of another version: then the events alone say what happened
        return lambda name: False


def _implied(topology: Line) -> Line:
    """What the graph implies, for a run without a summary; empty where the file does not say enough."""
    names, edges = _graph(topology)
    masses = {str(node["id"]): number(node, "mass") or 1.0 for node in _mappings(topology, "nodes") if "id" in node}
    if not names or not all(masses.get(name, 0.0) > 0 for name in names):
        return {}
    graph = nx.Graph(name=str(inside(topology, "graph", "name") or "graph"))
    graph.add_nodes_from(names)
    graph.add_edges_from(edges)
    return dict(implied(graph, NONE, masses))  # type: ignore[arg-type]


def _graph(topology: Line) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes and edges of a node-link form; networkx before 3.4 calls the edges "links"."""
    names = [str(node["id"]) for node in _mappings(topology, "nodes") if "id" in node]
    links = _mappings(topology, "edges") or _mappings(topology, "links")
    edges = [(str(link.get("source")), str(link.get("target"))) for link in links]
    return names, [(a, b) for a, b in edges if a in names and b in names and a != b]
