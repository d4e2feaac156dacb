"""Graphs in files: read by `topology.file = …` and `p2pfl topology FILE`, written by `p2pfl topology … --out FILE`.

The suffix says which form it is; the text is UTF-8, of at most 64 MiB:

    .graphml    as networkx, yEd, Gephi and igraph write it; with a DOCTYPE it is refused
    .json       node-link form of networkx, its edges under "edges" or, as before networkx 3.4, under "links"
    .edgelist   a line `NAME NAME` or `NAME NAME WEIGHT` is an edge, `NAME -> NAME` one with a direction;
                `NAME HOST:PORT` says where a node is reached; # starts a comment
    .csv        the adjacency matrix: a row of names after an empty corner, then for each of them, in the same order, a
                row that its name leads. Empty or 0 is no edge, 1 an edge, another positive number an edge with that
                weight. A symmetric matrix is an undirected graph; in another one, row a and column b is the edge
                (a, b). The diagonal is 0, for a node keeps what is left of 1. Columns `address` and `part` may follow.

In a directed graph the edge (a, b) is the way that a's vector travels. An edge may have a `weight`, finite and at least
0: what its two ends give to each other's vector, or in a directed graph b to a's (so that a matrix in a .csv is the
transpose of W). It counts with weights = "given". A node may have an `address`, kept as tcp://HOST:PORT, and a `part`,
a word or a whole number: the group that a picture shows it in. Other attributes are passed over.

Nodes are named by their ids. Where ids are no names, or mere numbers as Gephi (0 …), yEd and igraph (n0 …) give them,
and every node has a `name` or a `label`, they are named by that.

What is written is read back the same. .graphml and .json hold everything; a .csv cannot hold the weights 0 and 1, nor a
directed graph whose matrix is symmetric; an .edgelist cannot hold parts, nor nodes without an edge and an address.
`write` refuses such a graph, for a graph that is half there would train something else.

A file is refused if it is no graph: with fewer than two nodes, two of one name, two edges between the same nodes (an
.edgelist may say the same twice), an edge from a node to itself or to a node that is not listed. Whether the nodes hang
together is not looked at here.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import networkx as nx

from p2pfl.messages import NAME_PATTERN, BadInput, check_name, printable

MAX_BYTES = 64 * 2**20  # of a file: a complete graph of 1000 nodes with weights takes 53 MB as GraphML
SHOWN_CHARACTERS = 80  # of what stands in a file, in the message about it
PART_CHARACTERS = 64  # as of a name
MAX_PORT = 65535
ADDRESS = re.compile(r"(?:tcp://)?(?P<host>[A-Za-z0-9._-]+|\[[\w:.%-]+\]):(?P<port>[1-9][0-9]{0,4})", re.ASCII)
NUMBER_AS_ID = re.compile(r"n?[0-9]+")  # what programs count nodes by: it tells a reader nothing
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # within 64 bits, as every reader of such files can hold it

Attributes = Mapping[str, object]


class Node(NamedTuple):
    where: str  # in the file, as a message says it
    id: str
    attributes: Attributes


class Edge(NamedTuple):
    where: str
    a: str  # the id of its source
    b: str
    attributes: Attributes


class Listing(NamedTuple):
    """What a file says, with nothing checked but its form."""

    directed: bool
    nodes: list[Node]
    edges: list[Edge]


def names_in(path: Path) -> tuple[str, ...]:
    """The names in a graph file, sorted: for a file whose nodes the experiment does not list."""
    return tuple(sorted(read(path)))


def read(path: Path) -> nx.Graph:
    """The graph in this file over its own names: nx.Graph, or nx.DiGraph where edges have a direction.

    Edges carry `weight` (float), nodes `address` (str) and `part` (int or str), where the file says so. BadInput, one
    line with the place, for whatever is wrong with the file.
    """
    read_form = READERS[_suffix(path, "read from")]
    text = _text(path)
    try:
        graph = _graph(read_form(text))
    except BadInput as error:
        raise BadInput(f"{printable(str(path))} {error}") from None
    graph.name = path.name
    return graph


def write(graph: nx.Graph, path: Path) -> None:
    """Put the graph into this file, whole or not at all, in the form that its suffix says.

    BadInput if the suffix is unknown, if this form cannot hold the graph, if `read` would refuse it, or if the file
    cannot be written.
    """
    suffix, shown = _suffix(path, "written to"), printable(str(path))
    nodes = [  # without labels, which could rename them
        Node(f"node {name}", name, {key: held[key] for key in ("address", "part") if key in held})
        for name, held in graph.nodes(data=True)
    ]
    edges = [Edge(f"edge {a} {b}", a, b, held) for a, b, held in graph.edges(data=True)]
    try:
        plain = _graph(Listing(graph.is_directed(), nodes, edges))
    except BadInput as error:
        raise BadInput(f"cannot write {shown}: the graph {error}") from None
    text = WRITERS[suffix](plain)
    content = text.encode()
    if len(content) > MAX_BYTES:
        raise BadInput(f"cannot write {shown}: it would be larger than {MAX_BYTES // 2**20} MiB; .edgelist is smallest")
    lost = _lost(plain, READERS[suffix](text))
    if lost:
        raise BadInput(f"cannot write {shown}: {suffix} has no way to say {lost}; choose .graphml or .json")
    _replace(path, content)


def _lost(graph: nx.Graph, listing: Listing) -> str | None:
    """What of the graph is missing in the listing that was read back, in words."""
    if {node.id for node in listing.nodes} != set(graph):
        return "that there is a node without an edge and an address"
    if listing.directed != graph.is_directed():
        return "that edges have a direction where each has its like the other way"
    back = _graph(listing)
    if nx.to_dict_of_dicts(back) != nx.to_dict_of_dicts(graph):
        return "that an edge has the weight 0 or 1"
    if dict(back.nodes(data=True)) != dict(graph.nodes(data=True)):
        return "which part a node is in"
    return None


# -- What any file may say -------------------------------------------------------------------------------------------


def _graph(listing: Listing) -> nx.Graph:
    """The graph that is listed, if it is one. BadInput goes on after the file's name."""
    graph = nx.DiGraph() if listing.directed else nx.Graph()
    names = _names(listing.nodes)
    for node in listing.nodes:
        graph.add_node(names[node.id], **_address(node), **_part(node))
    for edge in listing.edges:
        for end in (edge.a, edge.b):
            if end not in names:
                raise BadInput(f"{edge.where}: {_shown(end)} is none of its nodes: add that node, or correct the edge")
        a, b = names[edge.a], names[edge.b]
        if a == b:
            raise BadInput(f"{edge.where}: {a!r} is joined to itself: remove that edge")
        if graph.has_edge(a, b):
            raise BadInput(f"{edge.where}: {a!r} and {b!r} are joined already: keep one of the two edges")
        graph.add_edge(a, b, **_weight(edge))
    if len(names) < 2:
        raise BadInput(f"has {'one node' if names else 'no nodes'}: a graph of two or more is needed")
    return graph


def _names(nodes: list[Node]) -> dict[str, str]:
    """id → name, in the order of the nodes."""
    ids, labels = [node.id for node in nodes], [_label(node) for node in nodes]
    by_id = all(map(NAME_PATTERN.fullmatch, ids)) and not all(map(NUMBER_AS_ID.fullmatch, ids))
    names: dict[str, str] = {}
    taken = set()
    for node, name in zip(nodes, ids if by_id or not all(labels) else labels, strict=True):
        try:
            check_name(name[:SHOWN_CHARACTERS])  # a name is shorter: what is cut off here is refused
        except BadInput as error:
            raise BadInput(f"{node.where}: {error}") from None
        if name in taken or node.id in names:
            raise BadInput(f"{node.where}: there are two nodes {name!r}: give one of them another name")
        names[node.id] = name
        taken.add(name)
    return names


def _label(node: Node) -> str:
    given = node.attributes.get("name") or node.attributes.get("label")
    return str(given).strip() if isinstance(given, (str, int)) else ""


def _address(node: Node) -> dict[str, str]:
    """Only its form is looked at; `identity.parse_address` looks at the rest."""
    given = node.attributes.get("address")
    if given in (None, ""):
        return {}
    found = ADDRESS.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is None or int(found["port"]) > MAX_PORT:
        raise BadInput(f"{node.where}: {_shown(given)} is no address: write it as HOST:PORT, like 10.0.0.7:5000")
    host = found["host"] if found["host"].startswith("[") else found["host"].lower()
    return {"address": f"tcp://{host}:{found['port']}"}


def _part(node: Node) -> dict[str, int | str]:
    """A number that stands as text is a number, since a .csv knows no difference."""
    given = node.attributes.get("part")
    if given in (None, ""):
        return {}
    word = str(given).strip() if isinstance(given, (int, str)) and not isinstance(given, bool) else ""
    if not word or not word.isprintable() or len(word) > PART_CHARACTERS:
        raise BadInput(f"{node.where}: {_shown(given)} is no part: use a whole number or a word, like 2 or north")
    return {"part": int(word) if WHOLE_NUMBER.fullmatch(word) else word}


def _weight(edge: Edge) -> dict[str, float]:
    given = edge.attributes.get("weight")
    return {} if given in (None, "") else {"weight": _checked_weight(edge.where, given)}


def _checked_weight(where: str, given: object) -> float:
    weight = math.nan
    if not isinstance(given, bool) and isinstance(given, (str, Real)):
        try:
            weight = float(given)
        except (ValueError, OverflowError):  # no number; an integer above 10^308
            weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise BadInput(f"{where}: {_shown(given)} is no weight: use a number from 0 up, like 0.25")
    return weight


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:SHOWN_CHARACTERS])
    return repr(value)[:SHOWN_CHARACTERS] if isinstance(value, (int, float)) else type(value).__name__


# -- GraphML ---------------------------------------------------------------------------------------------------------

GRAPHML = "{http://graphml.graphdrawing.org/xmlns}"  # its namespace; networkx also reads files without one


def _read_graphml(text: str) -> Listing:
    """networkx reads it. What networkx passes over is seen to here: nodes that are listed twice, or only by an edge."""
    doctype = text.find("<!DOCTYPE")  # entities, which can grow without bound or name other files, are declared there
    if doctype >= 0:
        line = text.count("\n", 0, doctype) + 1
        raise BadInput(f"line {line}: a graph needs no DOCTYPE, which can hide an attack: remove it")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise BadInput(f"is not XML: {printable(str(error)[:SHOWN_CHARACTERS])}") from None
    if root.tag not in ("graphml", f"{GRAPHML}graphml"):
        raise BadInput(f"is no GraphML: it is to begin with <graphml>, not with {_shown(root.tag)}")
    namespace = root.tag.removesuffix("graphml")
    graphs = root.findall(f".//{namespace}graph")
    if len(graphs) != 1:
        raise BadInput(f"holds {len(graphs)} graphs, those of groups of nodes counted too: leave one, without groups")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ports and keys without a type, which we need not
            found = nx.parse_graphml(text)
        every_node, every_edge = dict(found.graph["node_default"]), dict(found.graph["edge_default"])
    except (nx.NetworkXError, AttributeError, KeyError, TypeError, ValueError) as error:  # as wrong types and keys do
        reason = printable(f"{type(error).__name__}: {error}"[:SHOWN_CHARACTERS])
        raise BadInput(f"is no GraphML that networkx can read ({reason})") from None
    nodes, edges = [], []
    for number, node in enumerate(graphs[0].findall(f"{namespace}node"), start=1):
        id = node.get("id", "")
        nodes.append(Node(f"node {number}", id, every_node | found.nodes.get(id, {})))
    for number, edge in enumerate(graphs[0].findall(f"{namespace}edge"), start=1):
        a, b = edge.get("source", ""), edge.get("target", "")
        own = {} if found.is_multigraph() else found.get_edge_data(a, b, {})  # two edges a, b are refused in any case
        edges.append(Edge(f"edge {number}", a, b, every_edge | own))
    return Listing(found.is_directed(), nodes, edges)


def _write_graphml(graph: nx.Graph) -> str:
    return "\n".join(nx.generate_graphml(graph)) + "\n"


# -- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(text: str) -> Listing:
    try:
        data: object = json.loads(text)
    except RecursionError:
        raise BadInput("is no graph in JSON: brackets in brackets without end") from None
    except ValueError as error:
        raise BadInput(f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadInput('is no graph in node-link form: it is to be {"nodes": […], "edges": […]}')
    directed = data.get("directed", False)
    if not isinstance(directed, bool):
        raise BadInput(f'has "directed": {_shown(directed)}: use true or false')
    nodes = [
        Node(where, _id(where, "id", node.get("id", number)), node)  # networkx counts from 0 where there is no id
        for number, (where, node) in enumerate(_entries(data, "nodes", "node"))
    ]
    edges = []
    for where, edge in _entries(data, "edges" if "edges" in data or "links" not in data else "links", "edge"):
        a, b = (_id(where, end, edge.get(end)) for end in ("source", "target"))
        # The file of a run says what each end gives to the other. Where that differs, there is no weight for both.
        differs = "weight_back" in edge and edge["weight_back"] != edge.get("weight")
        edges.append(Edge(where, a, b, {} if differs else edge))
    return Listing(directed, nodes, edges)


def _entries(data: Mapping[str, object], key: str, noun: str) -> list[tuple[str, dict[str, object]]]:
    """(where, entry) of each entry of a list of objects."""
    found = data.get(key)
    if not isinstance(found, list):
        raise BadInput(f'is no graph in node-link form: it has no list "{key}"')
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict):
            raise BadInput(f'{noun} {number}: an entry of "{key}" is to be {{…}}, not {_shown(entry)}')
    return [(f"{noun} {number}", entry) for number, entry in enumerate(found, start=1)]


def _id(where: str, key: str, given: object) -> str:
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise BadInput(f'{where}: its "{key}" is to be the name of a node, not {_shown(given)}')
    return str(given)


def _write_json(graph: nx.Graph) -> str:
    data = nx.node_link_data(graph, edges="edges")
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# -- Edge list -------------------------------------------------------------------------------------------------------


def _read_edgelist(text: str) -> Listing:
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, ...], Edge] = {}
    directed: bool | None = None  # not known before the first edge
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"line {number}"
        match line.partition("#")[0].split():
            case []:
                continue
            case [name, address] if ":" in address:
                if name in nodes and nodes[name].attributes:
                    raise BadInput(f"{where}: {_shown(name)} has an address already: keep one of the two")
                nodes[name] = Node(where, name, {"address": address})
                continue
            case [a, "->", b, *weight] if len(weight) <= 1:
                arrow = True
            case [a, b, *weight] if len(weight) <= 1:
                arrow = False
            case _:
                raise BadInput(
                    f"{where}: an edge is two names with a space between, and then its weight if it has one, "
                    f"not {_shown(line.strip())}"
                )
        if directed not in (None, arrow):
            raise BadInput(f"{where}: write all edges with -> between the names, or none")
        directed = arrow
        edge = Edge(where, a, b, {"weight": weight[0]} if weight else {})
        for name in (a, b):
            nodes.setdefault(name, Node(where, name, {}))
        same = edges.setdefault((a, b) if arrow else tuple(sorted((a, b))), edge)
        if _weight(same) != _weight(edge):
            raise BadInput(f"{where}: {_shown(a)} and {_shown(b)} have another weight on {same.where}: keep one")
    return Listing(bool(directed), list(nodes.values()), list(edges.values()))


def _write_edgelist(graph: nx.Graph) -> str:
    lines = [f"{name} {address}\n" for name, address in graph.nodes(data="address") if address]
    for a, b, weight in graph.edges(data="weight"):
        words = (a, "->", b) if graph.is_directed() else (a, b)
        lines.append(" ".join(words if weight is None else (*words, repr(weight))) + "\n")
    return "".join(lines)


# -- Adjacency matrix ------------------------------------------------------------------------------------------------

MORE_COLUMNS = ("address", "part")


def _read_csv(text: str) -> Listing:
    rows: list[tuple[int, list[str]]] = []  # (line, its cells)
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in table:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((table.line_num, cells))
    except csv.Error as error:
        raise BadInput(f"line {table.line_num}: is not CSV: {error}") from None
    if not rows:
        raise BadInput("has no nodes: a graph of two or more is needed")
    (line, (corner, *columns)), *rows = rows
    if corner or not columns:
        raise BadInput(f"line {line}: it is to be an empty cell and then the names, with commas between")
    more = columns[len(rows) :]
    if len(columns) < len(rows) or not (set(more) <= set(MORE_COLUMNS) and len(set(more)) == len(more)):
        raise BadInput(
            f"has {len(rows)} rows under {len(columns)} columns: each node has one of both, "
            f"and last may stand {' and '.join(MORE_COLUMNS)}"
        )
    names = columns[: len(rows)]
    nodes: list[Node] = []
    matrix: dict[tuple[str, str], float] = {}  # its entries above 0
    for name, (line, (led_by, *cells)) in zip(names, rows, strict=True):
        where = f"line {line}"
        if led_by != name:
            raise BadInput(f"{where}: the row of {_shown(led_by)} stands where that of {_shown(name)} belongs")
        if len(cells) != len(columns):
            raise BadInput(f"{where}: {len(cells)} cells follow the name, but {len(columns)} belong there")
        nodes.append(Node(where, name, dict(zip(more, cells[len(names) :], strict=True))))
        for other, cell in zip(names, cells[: len(names)], strict=True):
            weight = _checked_weight(where, cell) if cell not in ("", "0") else 0.0
            if weight > 0.0:
                matrix[name, other] = weight
    where_of = {node.id: node.where for node in nodes}
    place = {name: number for number, name in enumerate(names)}
    directed = any(matrix.get((b, a)) != weight for (a, b), weight in matrix.items())
    edges = [
        Edge(where_of[a], a, b, {"weight": weight} if weight != 1.0 else {})
        for (a, b), weight in matrix.items()
        if directed or place[a] <= place[b]
    ]
    return Listing(directed, nodes, edges)


def _write_csv(graph: nx.Graph) -> str:
    more = [key for key in MORE_COLUMNS if nx.get_node_attributes(graph, key)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["", *graph, *more])
    for name, attributes in graph.nodes(data=True):
        weights = {other: repr(edge.get("weight", 1)) for other, edge in graph[name].items()}
        table.writerow([name, *(weights.get(other, 0) for other in graph), *(attributes.get(key, "") for key in more)])
    return text.getvalue()


READERS: dict[str, Callable[[str], Listing]] = {
    ".graphml": _read_graphml,
    ".json": _read_json,
    ".edgelist": _read_edgelist,
    ".csv": _read_csv,
}
WRITERS: dict[str, Callable[[nx.Graph], str]] = {
    ".graphml": _write_graphml,
    ".json": _write_json,
    ".edgelist": _write_edgelist,
    ".csv": _write_csv,
}


# -- Files -----------------------------------------------------------------------------------------------------------


def _suffix(path: Path, verb: str) -> str:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        *first, last = READERS
        raise BadInput(
            f"{printable(str(path))}: a graph is {verb} {', '.join(first)} or {last}, "
            f"not {printable(suffix) or 'a file without a suffix'}"
        )
    return suffix


def _text(path: Path) -> str:
    shown = printable(str(path))
    try:
        if not path.is_file():  # a pipe or a device could keep us waiting, or never end
            raise BadInput(f"cannot read {shown}: {'it is no file' if path.exists() else 'there is no such file'}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(f"cannot read {shown}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise BadInput(f"cannot read {shown}: it is larger than {MAX_BYTES // 2**20} MiB, too large for a graph")
    try:
        return content.decode("utf-8-sig")  # spreadsheets put a byte order mark first
    except UnicodeDecodeError as error:
        raise BadInput(f"cannot read {shown}: byte {error.start} is not UTF-8: save it as UTF-8") from None


def _replace(path: Path, content: bytes) -> None:
    """After a crash the file holds the old graph or the new one, never half of either."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write {printable(str(path))}: {error.strerror}") from None
