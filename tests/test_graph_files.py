"""Graphs in files: what each form says, what is written is read back the same, and a bad file is told why in a line."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.config import TopologySection
from p2pfl.identity import parse_address
from p2pfl.messages import NAME_PATTERN, BadInput
from p2pfl.topology import build, files
from p2pfl.topology.files import names_in, read, write
from p2pfl.topology.matrix import hears, tells

SUFFIXES = (".graphml", ".json", ".edgelist", ".csv")
TOWNS = ("ulm", "bonn", "graz", "linz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples of a hypothesis test."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], Path]:
    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return put


Put = Callable[[str, str], Path]


def same(a: nx.Graph, b: nx.Graph) -> bool:
    """Names, edges, direction and all attributes. 1 and 1.0 are the same, and so are -0.0 and 0.0."""
    return (
        a.is_directed() == b.is_directed()
        and dict(a.nodes(data=True)) == dict(b.nodes(data=True))
        and nx.to_dict_of_dicts(a) == nx.to_dict_of_dicts(b)
    )


def graphml(inside: str, keys: str = "", direction: str = "undirected") -> str:
    return (
        f'<graphml xmlns="http://graphml.graphdrawing.org/xmlns" xmlns:y="http://www.yworks.com/xml/graphml">'
        f'{keys}<graph edgedefault="{direction}">{inside}</graph></graphml>'
    )


def nodes_of(*names: str) -> str:
    return "".join(f'<node id="{name}"/>' for name in names)


# -- What each form says ---------------------------------------------------------------------------------------------


def test_an_edge_list(put: Put) -> None:
    path = put("towns.edgelist", "# who talks to whom\nulm bonn\n\nbonn\tgraz  # by night only\n  graz ulm\nbonn ulm\n")
    assert same(read(path), nx.complete_graph(TOWNS[:3]))
    assert names_in(path) == ("bonn", "graz", "ulm")


KEYS = (
    '<key id="d0" for="node" attr.name="address" attr.type="string"/>'
    '<key id="d1" for="node" attr.name="part" attr.type="string"/>'
    '<key id="d2" for="edge" attr.name="weight" attr.type="double"/>'
    '<key id="d3" for="node" attr.name="colour" attr.type="string"/>'
)
FOUR_WAYS = {
    "towns.graphml": graphml(
        '<node id="ulm"><data key="d0">ULM.de:5000</data><data key="d1">south</data><data key="d3">red</data></node>'
        '<node id="bonn"><data key="d1">7</data></node><node id="graz"/>'
        '<edge source="ulm" target="bonn"><data key="d2">0.25</data></edge><edge source="bonn" target="graz"/>'
        '<edge source="graz" target="ulm"/>',
        KEYS,
        "directed",
    ),
    "towns.json": json.dumps(
        {
            "directed": True,
            "nodes": [
                {"id": "ulm", "address": "tcp://ulm.de:5000", "part": "south", "colour": "red"},
                {"id": "bonn", "part": 7},
                {"id": "graz"},
            ],
            "links": [
                {"source": "ulm", "target": "bonn", "weight": 0.25},
                {"source": "bonn", "target": "graz"},
                {"source": "graz", "target": "ulm"},
            ],
        }
    ),
    "towns.edgelist": "ulm ulm.de:5000\nulm -> bonn 0.25\nbonn -> graz\ngraz -> ulm\nulm -> bonn 0.250 # again\n",
    "towns.csv": "\ufeff, ulm, bonn, graz, address, part\r\n"
    "ulm,0,0.25,0,ulm.de:5000,south\r\nbonn,,,1,,7\r\n\r\ngraz,1,0.0,,,\r\n,,,,,\r\n",
}


@pytest.mark.parametrize("name", FOUR_WAYS)
def test_one_graph_told_in_four_ways(put: Put, name: str) -> None:
    expected = nx.DiGraph()
    expected.add_node("ulm", address="tcp://ulm.de:5000", part="south")
    expected.add_node("bonn", part=7)
    expected.add_edge("ulm", "bonn", weight=0.25)
    expected.add_edge("bonn", "graz")
    expected.add_edge("graz", "ulm")
    if name.endswith(".edgelist"):
        for town in expected:
            expected.nodes[town].pop("part", None)
    found = read(put(name, FOUR_WAYS[name]))
    assert same(found, expected)
    assert found.name == name
    assert (hears(found, "bonn"), tells(found, "ulm")) == (["ulm"], ["bonn"])


def test_a_symmetric_matrix_is_an_undirected_graph(put: Put) -> None:
    found = read(put("towns.csv", ",ulm,bonn,graz\nulm,0,1,.5\nbonn,1.0,0,0\ngraz,0.50,,0\n"))
    expected = nx.Graph([("ulm", "bonn"), ("ulm", "graz", {"weight": 0.5})])
    assert same(found, expected)


def test_a_matrix_whose_two_halves_differ_is_a_directed_graph(put: Put) -> None:
    found = read(put("towns.csv", ",ulm,bonn\nulm,0,0.5\nbonn,0.25,0\n"))
    assert same(found, nx.DiGraph([("ulm", "bonn", {"weight": 0.5}), ("bonn", "ulm", {"weight": 0.25})]))


def test_an_experiment_gets_the_graph_of_its_file_with_all_that_it_says(put: Put) -> None:
    section = TopologySection(file=put("towns.json", FOUR_WAYS["towns.json"]), nodes=("graz", "bonn", "ulm"))
    graph = build(section, seed=0).at(0)
    assert tuple(graph) == section.names
    assert graph.name == "towns.json"
    assert graph.nodes["ulm"] == {"address": "tcp://ulm.de:5000", "part": "south"}
    assert dict(graph.edges) == {("ulm", "bonn"): {"weight": 0.25}, ("bonn", "graz"): {}, ("graz", "ulm"): {}}


def test_a_name_that_the_experiment_lacks_is_refused_with_the_nearest(put: Put) -> None:
    section = TopologySection(file=put("towns.edgelist", "ulm bonn\nulm gras\n"), nodes=TOWNS)
    with pytest.raises(BadInput, match=r"'gras' is not one of topology.nodes; did you mean 'graz'\?"):
        build(section, seed=0)


def test_defaults_of_graphml_hold_where_nothing_else_is_said(put: Put) -> None:
    keys = '<key id="w" for="edge" attr.name="weight" attr.type="double"><default>0.5</default></key>'
    keys += '<key id="p" for="node" attr.name="part" attr.type="int"><default>3</default></key>'
    edges = '<edge source="ulm" target="bonn"/><edge source="bonn" target="graz"><data key="w">0.25</data></edge>'
    found = read(put("towns.graphml", graphml(nodes_of(*TOWNS[:3]) + edges, keys)))
    assert nx.get_edge_attributes(found, "weight") == {("ulm", "bonn"): 0.5, ("bonn", "graz"): 0.25}
    assert nx.get_node_attributes(found, "part") == {"ulm": 3, "bonn": 3, "graz": 3}


def test_what_networkx_writes_is_read(tmp_path: Path) -> None:
    """Numbers become names; attributes of other programs are passed over."""
    karate = nx.karate_club_graph()
    expected = nx.relabel_nodes(karate, str)
    nx.write_graphml(karate, tmp_path / "karate.graphml")
    for edges in ("edges", "links"):
        data = nx.node_link_data(karate, edges=edges)
        (tmp_path / f"{edges}.json").write_text(json.dumps(data), "utf-8")
        data = nx.node_link_data(nx.MultiGraph(karate), edges=edges)  # that it could hold two edges is no harm
        (tmp_path / f"multi-{edges}.json").write_text(json.dumps(data), "utf-8")
    table = nx.to_numpy_array(expected)
    rows = [["", *expected], *([name, *map(str, row)] for name, row in zip(expected, table, strict=True))]
    (tmp_path / "karate.csv").write_text("\n".join(",".join(row) for row in rows), "utf-8")
    files_found = sorted(tmp_path.iterdir())
    assert len(files_found) == 6
    for path in files_found:
        found = read(path)
        assert set(found) == set(expected)
        assert {frozenset(edge) for edge in found.edges} == {frozenset(edge) for edge in expected.edges}
        for a, b, weight in expected.edges(data="weight"):
            without = path.suffix == ".csv" and weight == 1
            assert found.edges[a, b] == ({} if without else {"weight": weight})


def test_the_graph_of_a_run_keeps_only_weights_that_both_ends_share(put: Put) -> None:
    """`topology.json` of a run says what each end gives to the other; one weight means the same for both."""
    edges = [
        {"source": "ulm", "target": "bonn", "weight": 0.5, "weight_back": 0.5},
        {"source": "ulm", "target": "graz", "weight": 0.25, "weight_back": 0.125},
    ]
    nodes = [{"id": name, "mass": 1.0, "self_weight": 0.25} for name in TOWNS[:3]]
    found = read(put("topology.json", json.dumps({"nodes": nodes, "edges": edges})))
    assert dict(found.edges) == {("ulm", "bonn"): {"weight": 0.5}, ("ulm", "graz"): {}}


# -- Names -----------------------------------------------------------------------------------------------------------

EDGE = '<edge source="n0" target="n1"/>'
YED_KEY = '<key id="d6" for="node" yfiles.type="nodegraphics"/>'


def yed(*labels: str) -> str:
    shape = '<data key="d6"><y:ShapeNode><y:NodeLabel>{}<y:LabelModel/></y:NodeLabel></y:ShapeNode></data>'
    nodes = "".join(f'<node id="n{i}">{shape.format(label)}</node>' for i, label in enumerate(labels))
    return graphml(nodes + EDGE, YED_KEY)


def igraph(*names: str) -> str:
    nodes = "".join(f'<node id="n{i}"><data key="v_name">{name}</data></node>' for i, name in enumerate(names))
    return graphml(nodes + EDGE, '<key id="v_name" for="node" attr.name="name" attr.type="string"/>')


def objects(*nodes: dict[str, object], ends: tuple[object, object] = (0, 1)) -> str:
    return json.dumps({"nodes": nodes, "links": [{"source": ends[0], "target": ends[1]}]})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("yed.graphml", yed("ulm", " bonn\n"), ["ulm", "bonn"]),
        ("yed-without-labels.graphml", yed("", "bonn"), ["n0", "n1"]),
        ("igraph.graphml", igraph("ulm", "bonn"), ["ulm", "bonn"]),
        ("d3.json", objects({"name": "ulm"}, {"name": "bonn"}), ["ulm", "bonn"]),
        ("numbers.json", objects({"id": 0}, {"id": 1}), ["0", "1"]),
        ("numbers-and-labels.json", objects({"id": 0, "label": "ulm"}, {"id": 1, "label": "bonn"}), ["ulm", "bonn"]),
        (
            "titles.json",
            objects({"id": "a", "label": "Ulm"}, {"id": "b", "label": "St. Gallen"}, ends=("b", "a")),
            "ab",
        ),
        ("no-names.json", objects({"id": "a!", "name": "x"}, {"id": "b!", "name": "y"}, ends=("a!", "b!")), "xy"),
    ],
)
def test_nodes_are_named_by_ids_that_are_names_or_else_by_labels(
    put: Put, name: str, text: str, expected: list[str]
) -> None:
    found = read(put(name, text))
    assert list(found) == list(expected)
    assert found.has_edge(*expected)


@given(
    st.sampled_from(["ulm.example.org", "ULM", "10.0.0.7", "a_b-c", "[::1]", "[2001:DB8::0:1]", "[fe80::1%Eth0]"]),
    st.integers(1, 65535),
    st.sampled_from(["", "tcp://"]),
)
def test_an_address_is_kept_as_the_network_will_understand_it(folder: Path, host: str, port: int, scheme: str) -> None:
    written = f"{scheme}{host}:{port}"
    path = folder / "address.edgelist"
    path.write_text(f"ulm {written}\nulm bonn\n", "utf-8")
    kept = read(path).nodes["ulm"]["address"]
    assert kept.startswith("tcp://")
    assert parse_address(kept) == parse_address(written)
    if not host.startswith("["):
        assert kept == parse_address(written)


# -- What is written is read back the same ---------------------------------------------------------------------------

ADDRESSES = st.builds(
    "tcp://{}:{}".format, st.sampled_from(["ulm.example.org", "10.0.0.7", "[::1]"]), st.integers(1, 65535)
)
NAMES = st.from_regex(NAME_PATTERN, fullmatch=True) | st.sampled_from(["address", "part", "n0", "n1", "0", "1", "None"])
WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=64)
PARTS = st.integers(-(10**17), 10**17) | WORDS.filter(lambda word: not re.fullmatch(r"-?[0-9]+", word))
WEIGHTS = st.sampled_from([0.0, 1.0, 0.5, 0.1, 1 / 3]) | st.floats(0.0, 1e300)


def attributes(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


@st.composite
def graphs(draw: st.DrawFn) -> nx.Graph:
    """Each of weights, addresses and parts stands nowhere, everywhere or here and there."""
    names = draw(st.lists(NAMES, min_size=2, max_size=6, unique=True))
    graph = draw(st.sampled_from([nx.Graph, nx.DiGraph]))()
    address, part, weight = (
        draw(st.sampled_from([st.none(), values, st.none() | values])) for values in (ADDRESSES, PARTS, WEIGHTS)
    )
    for name in names:
        graph.add_node(name, **attributes(address=draw(address), part=draw(part)))
    pairs = (itertools.permutations if graph.is_directed() else itertools.combinations)(names, 2)
    for a, b in pairs:
        if draw(st.booleans()):
            graph.add_edge(a, b, **attributes(weight=draw(weight)))
    return graph


def can_hold(suffix: str, graph: nx.Graph) -> bool:
    """As the module's docstring says it."""
    if suffix == ".csv":
        told = {edge: graph.edges[edge].get("weight", 1.0) for edge in graph.edges}
        symmetric = all(told.get((b, a)) == weight for (a, b), weight in told.items())
        return not {0.0, 1.0} & set(nx.get_edge_attributes(graph, "weight").values()) and (
            not graph.is_directed() or not symmetric
        )
    if suffix == ".edgelist":
        lonely = [name for name in nx.isolates(graph) if "address" not in graph.nodes[name]]
        parts = nx.get_node_attributes(graph, "part")
        return not lonely and not parts and (bool(graph.edges) or not graph.is_directed())
    return True


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None)
@given(graph=graphs())
def test_what_is_written_is_read_back_the_same_or_refused(folder: Path, suffix: str, graph: nx.Graph) -> None:
    before, path = graph.copy(), folder / f"graph{suffix}"
    path.unlink(missing_ok=True)
    if can_hold(suffix, graph):
        write(graph, path)
        assert same(read(path), graph)
        assert names_in(path) == tuple(sorted(graph))
    else:
        with pytest.raises(BadInput, match=r"cannot write .* has no way to say .*; choose .graphml or .json$"):
            write(graph, path)
        assert not path.exists()
    assert same(graph, before)
    assert graph.graph == {}


def test_only_what_belongs_to_the_graph_is_written(tmp_path: Path) -> None:
    """The name of a graph, marks of a generator, numbers of numpy: nothing of it hinders."""
    graph = nx.Graph(name="caves", seed=object())
    graph.add_node("ulm", mark=object(), address="ULM:7", part="007")
    graph.add_edge("ulm", "bonn", weight=np.float32(0.25), mark=object())
    numbers = nx.relabel_nodes(graph, {"ulm": "0", "bonn": "1"})
    nx.set_node_attributes(numbers, {"0": "ulm", "1": "bonn"}, "name")
    for suffix in (".graphml", ".JSON", ".csv"):
        path = tmp_path / f"graph{suffix}"
        write(graph, path)
        assert dict(read(path).nodes(data=True)) == {"ulm": {"address": "tcp://ulm:7", "part": "007"}, "bonn": {}}
        assert dict(read(path).edges) == {("ulm", "bonn"): {"weight": 0.25}}
        write(numbers, path)
        assert names_in(path) == ("0", "1")


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([], "the graph has no nodes"),
        ([("ulm", "bonn", {"weight": -1.0})], "the graph edge ulm bonn: -1.0 is no weight"),
        ([("ulm", "ulm", {})], "'ulm' is joined to itself"),
        ([("ulm", "b c", {})], "'b c' is not a name"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_written_that_would_not_be_read(
    tmp_path: Path, suffix: str, edges: list[tuple[str, str, dict[str, float]]], message: str
) -> None:
    path = tmp_path / f"graph{suffix}"
    with pytest.raises(BadInput, match=rf"cannot write .*graph\{suffix}: .*{message}"):
        write(nx.Graph(edges), path)
    assert not path.exists()


def test_what_would_be_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, path = nx.path_graph(TOWNS), tmp_path / "towns.csv"
    write(graph, path)
    size = path.stat().st_size
    monkeypatch.setattr(files, "MAX_BYTES", size)
    write(graph, path)
    assert same(read(path), graph)
    monkeypatch.setattr(files, "MAX_BYTES", size - 1)
    with pytest.raises(BadInput, match="it would be larger"):
        write(graph, path)
    with pytest.raises(BadInput, match="it is larger"):
        read(path)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    graph = nx.path_graph(TOWNS)
    (tmp_path / "folder.json").mkdir()
    for name in ("absent/graph.json", "folder.json", f"{'x' * 300}.json"):
        with pytest.raises(BadInput, match=rf"^cannot write .*{name}: [A-Z][a-z ]+$"):
            write(graph, tmp_path / name)
    for name in ("graph.gexf", "graph"):
        with pytest.raises(BadInput, match=r"a graph is written to \.graphml, \.json, \.edgelist or \.csv, not"):
            write(graph, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_a_full_disk_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.json"
    write(nx.path_graph(TOWNS), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match=r"cannot write .*graph\.json: No space left on device"):
        write(nx.complete_graph(TOWNS), path)
    assert same(read(path), nx.path_graph(TOWNS))
    assert list(tmp_path.iterdir()) == [path]


# -- A bad file is told why, in a line -------------------------------------------------------------------------------

LONG = "lo" + "n" * 10_000 + "g"
JSON_EDGE = '{"source": "ulm", "target": "bonn"}'
JSON_NODES = '"nodes": [{"id": "ulm"}, {"id": "bonn"}]'
LAUGHS = (
    '<?xml version="1.0"?>\n<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>\n'
    '<graphml><graph><node id="&b;"/></graph></graphml>'
)
OTHERS_FILE = (
    '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>\n<graphml><graph><node id="&a;"/></graph></graphml>'
)


def matrix(*rows: str) -> str:
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # Edge lists
        ("e.edgelist", "# x\n\nulm ulm\n", "line 3: 'ulm' is joined to itself: remove that edge"),
        ("e.edgelist", "ulm\n", "line 1: an edge is two names with a space between"),
        ("e.edgelist", "ulm bonn 0.5 2\n", "line 1: an edge is two names with a space between, and then its weight"),
        ("e.edgelist", "ulm -> bonn 0.5 2\n", "line 1: an edge is two names with a space between"),
        ("e.edgelist", f"ulm {LONG}\n", "line 1: 'lon+' is not a name"),
        ("e.edgelist", f"ulm bonn {LONG}\n", "line 1: 'lon+' is no weight"),
        ("e.edgelist", "ulm bonn\nulm b;nn\n", "line 2: 'b;nn' is not a name"),
        ("e.edgelist", "ulm bonn far\n", "line 1: 'far' is no weight: use a number from 0 up"),
        ("e.edgelist", "ulm bonn -0.5\n", "line 1: '-0.5' is no weight"),
        ("e.edgelist", "ulm bonn nan\n", "line 1: 'nan' is no weight"),
        ("e.edgelist", "ulm bonn 1e999\n", "line 1: '1e999' is no weight"),
        (
            "e.edgelist",
            "ulm bonn 0.5\ngraz ulm\nbonn ulm 0.4\n",
            "line 3: 'bonn' and 'ulm' have another weight on line 1",
        ),
        ("e.edgelist", "ulm bonn\nbonn -> graz\n", "line 2: write all edges with -> between the names, or none"),
        ("e.edgelist", "ulm ->\n", "line 1: '->' is not a name"),
        ("e.edgelist", "ulm -> ulm\n", "line 1: 'ulm' is joined to itself"),
        ("e.edgelist", "ulm bonn\nulm ulm.de:x\n", "line 2: 'ulm.de:x' is no address: write it as HOST:PORT"),
        ("e.edgelist", "ulm bonn\nulm ulm.de:65536\n", "line 2: 'ulm.de:65536' is no address"),
        ("e.edgelist", "ulm u:1\nulm bonn\nulm u:2\n", "line 3: 'ulm' has an address already"),
        ("e.edgelist", "ulm ulm.de:5000\n", "has one node: a graph of two or more is needed"),
        ("e.edgelist", "# nothing\n", "has no nodes: a graph of two or more is needed"),
        # Matrices
        ("m.csv", "", "has no nodes"),
        ("m.csv", " \n,,\n", "has no nodes"),
        (
            "m.csv",
            matrix("town,ulm,bonn", "ulm,0,1", "bonn,1,0"),
            "line 1: it is to be an empty cell and then the names",
        ),
        ("m.csv", matrix(";ulm;bonn", "ulm;0;1", "bonn;1;0"), "with commas between"),
        ("m.csv", matrix(",ulm", "ulm,0"), "has one node"),
        ("m.csv", matrix(",ulm,bonn", "ulm,0,1", "", "bonn,1"), "line 4: 1 cells follow the name, but 2 belong there"),
        ("m.csv", matrix(",ulm,bonn", "ulm,0,1,0", "bonn,1,0"), "line 2: 3 cells follow the name"),
        ("m.csv", matrix(",ulm,bonn", "ulm,0,1"), "has 1 rows under 2 columns: each node has one of both"),
        ("m.csv", matrix(",ulm", "ulm,0", "bonn,0"), "has 2 rows under 1 columns"),
        ("m.csv", matrix(",ulm,bonn,part,part", "ulm,0,1,,", "bonn,1,0,,"), "has 2 rows under 4 columns"),
        (
            "m.csv",
            matrix(",ulm,bonn", "bonn,0,1", "ulm,1,0"),
            "line 2: the row of 'bonn' stands where that of 'ulm' bel",
        ),
        ("m.csv", matrix(",ulm,ulm", "ulm,0,1", "ulm,1,0"), "line 3: there are two nodes 'ulm'"),
        ("m.csv", matrix(",ulm,b nn", "ulm,0,1", "b nn,1,0"), "line 3: 'b nn' is not a name"),
        ("m.csv", matrix(",ulm,bonn", "ulm,0,1", "bonn,x,0"), "line 3: 'x' is no weight"),
        ("m.csv", matrix(",ulm,bonn", "ulm,0,-1", "bonn,0,0"), "line 2: '-1' is no weight"),
        ("m.csv", matrix(",ulm,bonn", "ulm,0,NaN", "bonn,0,0"), "line 2: 'NaN' is no weight"),
        ("m.csv", matrix(",ulm,bonn", "ulm,.5,1", "bonn,1,0"), "line 2: 'ulm' is joined to itself"),
        ("m.csv", matrix(",ulm,bonn,address", "ulm,0,1,ulm", "bonn,1,0,"), "line 2: 'ulm' is no address"),
        ("m.csv", matrix(",ulm,bonn,part", "ulm,0,1,a\tb", "bonn,1,0,"), "line 2: 'a\\\\tb' is no part"),
        ("m.csv", matrix(",ulm,bonn,part", f"ulm,0,1,{65 * 'x'}", "bonn,1,0,"), "line 2: 'x+' is no part"),
        ("m.csv", ',ulm,"bonn\nulm,0,1', "line 2: is not CSV"),
        # JSON
        ("j.json", "", "is not JSON: Expecting value: line 1 column 1"),
        ("j.json", "[" * 100_000, "is no graph in JSON: brackets in brackets"),
        ("j.json", "1" * 5000, "is not JSON"),
        ("j.json", "[]", "is no graph in node-link form"),
        ("j.json", "{}", 'it has no list "nodes"'),
        ("j.json", f"{{{JSON_NODES}}}", 'it has no list "edges"'),
        ("j.json", f'{{{JSON_NODES}, "adjacency": []}}', 'it has no list "edges"'),
        ("j.json", '{"nodes": [3], "edges": []}', 'node 1: an entry of "nodes" is to be {…}, not 3'),
        ("j.json", '{"nodes": [{"id": "ulm"}], "edges": []}', "has one node"),
        ("j.json", '{"nodes": [{"id": "ulm"}, {"id": "ulm"}], "edges": []}', "node 2: there are two nodes 'ulm'"),
        (
            "j.json",
            '{"nodes": [{"id": "ulm"}, {"id": ["a"]}], "edges": []}',
            'node 2: its "id" is to be the name of a n',
        ),
        ("j.json", '{"nodes": [{"id": 1}, {"id": "1"}], "edges": []}', "node 2: there are two nodes '1'"),
        ("j.json", objects({"id": 0, "name": "x"}, {"id": 0, "name": "y"}), "node 2: there are two nodes 'y'"),
        ("j.json", objects({"id": 0, "name": "x"}, {"id": 1, "name": "x"}), "node 2: there are two nodes 'x'"),
        (
            "j.json",
            objects({"id": 0, "name": "x"}, {"id": 1, "name": "St. Gallen"}),
            "node 2: 'St. Gallen' is not a na",
        ),
        ("j.json", f'{{"directed": "no", {JSON_NODES}, "edges": []}}', "has \"directed\": 'no': use true or false"),
        (
            "j.json",
            f'{{{JSON_NODES}, "edges": [{{"source": "ulm"}}]}}',
            'edge 1: its "target" is to be the name of a nod',
        ),
        (
            "j.json",
            f'{{{JSON_NODES}, "edges": [{{"source": "ulm", "target": "bon"}}]}}',
            "edge 1: 'bon' is none of its",
        ),
        (
            "j.json",
            f'{{{JSON_NODES}, "edges": [{JSON_EDGE}, {{"source": "bonn", "target": "ulm"}}]}}',
            "edge 2: 'bonn' and 'ulm' are joined already: keep one",
        ),
        *(
            (
                "j.json",
                f'{{{JSON_NODES}, "edges": [{{"source": "ulm", "target": "bonn", "weight": {weight}}}]}}',
                message,
            )
            for weight, message in [
                ("NaN", "edge 1: nan is no weight"),
                ("-1", "edge 1: -1 is no weight"),
                ("1e999", "edge 1: inf is no weight"),
                ("1" + "0" * 400, "edge 1: 10+ is no weight"),
                ("true", "edge 1: True is no weight"),
                ('"much"', "edge 1: 'much' is no weight"),
                ("[0.5]", "edge 1: list is no weight"),
            ]
        ),
        ("j.json", '{"nodes": [{"id": "ulm", "part": 0.5}, {"id": "b"}], "edges": []}', "node 1: 0.5 is no part"),
        ("j.json", '{"nodes": [{"id": "ulm", "part": true}, {"id": "b"}], "edges": []}', "node 1: True is no part"),
        (
            "j.json",
            '{"nodes": [{"id": "ulm", "part": "a\\nb"}, {"id": "b"}], "edges": []}',
            "node 1: 'a\\\\nb' is no part",
        ),
        ("j.json", '{"nodes": [{"id": "ulm", "address": 7}, {"id": "b"}], "edges": []}', "node 1: 7 is no address"),
        (
            "j.json",
            '{"nodes": [{"id": "u\\n\\ud800"}, {"id": "b"}], "edges": []}',
            r"node 1: 'u\\n\\ud800' is not a name",
        ),
        # GraphML
        ("g.graphml", "", "is not XML: no element found: line 1"),
        ("g.graphml", "<graphml>", "is not XML: no element found"),
        ("g.graphml", "<svg/>", "is no GraphML: it is to begin with <graphml>, not with 'svg'"),
        ("g.graphml", LAUGHS, "line 2: a graph needs no DOCTYPE, which can hide an attack: remove it"),
        ("g.graphml", OTHERS_FILE, "line 1: a graph needs no DOCTYPE"),
        ("g.graphml", graphml("&laughs;"), "is not XML: undefined entity"),
        ("g.graphml", "<graphml/>", "holds 0 graphs"),
        ("g.graphml", "<graphml><graph/><graph/></graphml>", "holds 2 graphs"),
        ("g.graphml", graphml('<node id="a"><graph/></node>'), "holds 2 graphs, those of groups of nodes counted too"),
        ("g.graphml", graphml(""), "has no nodes"),
        ("g.graphml", graphml(nodes_of("ulm")), "has one node"),
        ("g.graphml", graphml(nodes_of("ulm", "ulm")), "node 2: there are two nodes 'ulm'"),
        ("g.graphml", graphml(nodes_of("ulm") + "<node/>"), "node 2: '' is not a name"),
        ("g.graphml", graphml(nodes_of("ulm", "b nn")), "node 2: 'b nn' is not a name"),
        ("g.graphml", igraph("ulm", "b nn"), "node 2: 'b nn' is not a name"),
        ("g.graphml", graphml(nodes_of("n0", "n1") + EDGE + EDGE), "edge 2: 'n0' and 'n1' are joined already"),
        ("g.graphml", graphml(nodes_of("n0", "n2") + EDGE), "edge 1: 'n1' is none of its nodes"),
        ("g.graphml", graphml(nodes_of("n0", "None") + '<edge source="n0"/>'), "edge 1: '' is none of its nodes"),
        (
            "g.graphml",
            graphml(nodes_of("n0", "n1") + '<edge source="n0" target="n0"/>'),
            "edge 1: 'n0' is joined to its",
        ),
        ("g.graphml", graphml(nodes_of("n0", "n1") + "<hyperedge/>"), "that networkx can read .*hyperedge"),
        (
            "g.graphml",
            graphml(nodes_of("n0", "n1") + '<edge source="n0" target="n1" directed="true"/>'),
            "that networkx can read .*directed=true",
        ),
        ("g.graphml", graphml('<node id="a"><data key="x">1</data></node>'), "that networkx can read .*no key x"),
        ("g.graphml", graphml("", '<key id="d" attr.name="x" attr.type="y"/>'), r"can read \(KeyError: 'y'\)"),
        ("g.graphml", graphml("", '<key id="d" attr.name="x" attr.type="int"><default/></key>'), r"can read \(TypeErr"),
        ("g.graphml", graphml("", '<key id="d" attr.name="x" attr.type="boolean"><default/></key>'), r"\(Attribute"),
        (
            "g.graphml",
            graphml('<node id="a"><data key="d">x</data></node>', '<key id="d" attr.name="part" attr.type="int"/>'),
            r"can read \(ValueError",
        ),
        *(
            (
                "g.graphml",
                graphml(
                    nodes_of("n0", "n1") + f'<edge source="n0" target="n1"><data key="d2">{weight}</data></edge>', KEYS
                ),
                f"edge 1: {weight} is no weight",
            )
            for weight in ("nan", "-0.5", "inf")
        ),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(put: Put, name: str, text: str, message: str) -> None:
    path = put(name, text)
    with pytest.raises(BadInput, match=message) as caught:
        read(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path} ")
    assert len(line) < len(str(path)) + 250


@pytest.mark.parametrize("name", ["towns.gexf", "towns"])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"a graph is read from \.graphml, \.json, \.edgelist or \.csv, not"):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, suffix: str) -> None:
    def refused(path: Path, why: str) -> None:
        with pytest.raises(BadInput, match=f"cannot read .*{why}") as caught:
            names_in(path)
        assert len(str(caught.value).splitlines()) == 1

    refused(tmp_path / f"absent{suffix}", "there is no such file")
    refused(tmp_path / f"two\nlines{suffix}", "there is no such file")
    refused(tmp_path / f"nul\0{suffix}", "there is no such file")
    refused(tmp_path / f"{'x' * 300}{suffix}", "File name too long")
    (tmp_path / f"folder{suffix}").mkdir()
    refused(tmp_path / f"folder{suffix}", "it is no file")
    (tmp_path / f"binary{suffix}").write_bytes(b"ulm\xff\xfe\x00")
    refused(tmp_path / f"binary{suffix}", "byte 3 is not UTF-8: save it as UTF-8")
    with (tmp_path / f"huge{suffix}").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    refused(tmp_path / f"huge{suffix}", "it is larger than 64 MiB")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_nobody_waits_at_a_pipe_that_nobody_fills(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BadInput, match="it is no file"):
        read(tmp_path / "pipe.json")


def test_an_xml_declaration_opens_no_way_around_the_checks(put: Put) -> None:
    """The text is UTF-8 whatever the declaration says, so that nothing can hide in another encoding."""
    hidden = LAUGHS.partition("\n")[2].replace("<", "+ADw-").replace("!", "+ACE-")
    with pytest.raises(BadInput, match="is not XML"):
        read(put("g.graphml", f'<?xml version="1.0" encoding="utf-7"?>\n{hidden}'))
    good = f'<?xml version="1.0" encoding="utf-16"?>\n{graphml(nodes_of("ulm", "bonn"))}'
    assert list(read(put("g.graphml", good))) == ["ulm", "bonn"]


# -- Nothing that a file can hold does more than be refused ----------------------------------------------------------

TOKENS = (
    *(b"<", b">", b"&", b'"', b",", b"\n", b"\r", b"#", b"->", b":", b"[", b"]", b"{", b"}", b" ", b"\\ud800", b"\0"),
    *(b"NaN", b"-1", b"1e999", b"0", b"1", b"null", b"true", b"{}", b"[]", b"ulm", b"id", b"\xff", b"\xc2\x85", b"'"),
    *(b"<graph>", b"</graph>", b"<node/>", b"<edge/>", b"<!DOCTYPE x>", b"<hyperedge/>", b"<port/>", b"float", b"int"),
)


def good_file(suffix: str) -> bytes:
    return FOUR_WAYS[f"towns{suffix}"].encode()


@st.composite
def mutations(draw: st.DrawFn, good: bytes) -> bytes:
    """The good file with a few pieces cut out, doubled, or replaced by what some parser may stumble over."""
    content = good
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        piece = draw(st.sampled_from(TOKENS) | st.binary(max_size=3) | st.just(content[start:end] * 2))
        content = content[:start] + piece + content[end:]
    return content


def read_or_be_refused(path: Path) -> None:
    """A graph that can be used, or one line that says why not."""
    try:
        graph = read(path)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()  # can be printed: there is no half of a character in it
        return
    assert len(graph) >= 2
    assert all(NAME_PATTERN.fullmatch(name) for name in graph)
    assert not graph.is_multigraph() and nx.number_of_selfloops(graph) == 0
    assert all(0.0 <= weight < math.inf for weight in nx.get_edge_attributes(graph, "weight").values())
    write(graph, path.with_suffix(".json"))
    assert same(read(path.with_suffix(".json")), graph)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=50)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_random_bytes_are_refused(folder: Path, suffix: str, content: bytes) -> None:
    path = folder / f"random{suffix}"
    path.write_bytes(content)
    read_or_be_refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(folder: Path, suffix: str, data: st.DataObject) -> None:
    path = folder / f"damaged{suffix}"
    path.write_bytes(data.draw(mutations(good_file(suffix))))
    read_or_be_refused(path)
