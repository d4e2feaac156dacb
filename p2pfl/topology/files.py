"""Graphs in files: read by `topology.file = …` and `p2pfl topology FILE`, written by `p2pfl topology … --out FILE`.

An edge may carry a `weight` (what its ends give to each other's vectors, for weights = "given"), a node an `address`
(tcp://HOST:PORT, where others reach it) and a `part` (the group that a picture shows it in).
"""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from p2pfl.messages import BadInput, check_name


def names_in(path: Path) -> tuple[str, ...]:
    """The names in a graph file, sorted: for a file whose nodes the experiment does not list."""
    return tuple(sorted(read(path)))


def read(path: Path) -> nx.Graph:
    """The graph in this file over its own names: nx.Graph, or nx.DiGraph where edges have a direction. BadInput."""
    graph = nx.Graph(name=path.name)
    for where, a, b in _read_edgelist(path):
        for name in (a, b):
            check_name(name)
        if a == b:
            raise BadInput(f"{path} line {where}: {a!r} is joined to itself: remove that edge")
        graph.add_edge(a, b)
    return graph


def _read_edgelist(path: Path) -> list[tuple[int, str, str]]:
    """(line number, name, name) of each edge: two names a line, `#` starts a comment."""
    if path.suffix != ".edgelist":
        raise BadInput(f"{path}: a graph is read from an .edgelist (two names a line), not from {path.suffix or path}")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    edges = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if len(words) == 2:
            edges.append((number, words[0], words[1]))
        elif words:
            raise BadInput(f"{path} line {number}: an edge is two names with a space between, not {line.strip()!r}")
    return edges
