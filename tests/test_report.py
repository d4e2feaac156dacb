"""The page and its pictures, from run folders written by hand."""

import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.transforms import Bbox

from p2pfl import plots
from p2pfl.messages import BadInput
from p2pfl.plots import Mark, Trace
from p2pfl.records import Json, Run, create_run, summarise, write_json, write_text
from p2pfl.report import comparison, headline, labels, pictures, read_history, write_report

START = 2_000_000_000.0  # unix seconds
FORBIDDEN = "<script>alert(1)</script>"


def write_run(
    path: Path,
    names: Sequence[str],
    rounds: int = 6,
    *,
    edges: Sequence[tuple[str, str]] | None = None,
    killed: Mapping[str, int] | None = None,  # node → the rounds that it completed
    scores: Sequence[str] = ("accuracy", "loss"),
    finished: bool = True,
    contraction: float | None = None,  # of one mixing; None: no probes are recorded, as before there were any
) -> Run:
    """A run whose curves are formulas: node i is i/1000 better than node 0."""
    run, killed = create_run(path), killed or {}
    edges = [(a, b) for a, b in zip(names, [*names[1:], names[0]], strict=True) if a != b] if edges is None else edges
    last: dict[str, Mapping[str, Json]] = {}
    for i, name in enumerate(names):
        records = run.node(name)
        done = killed.get(name, rounds)
        for r in range(done):
            value = {"accuracy": 0.9 - 0.8 * 0.7**r + i / 1000, "loss": 2.0 * 0.7**r + 0.1}
            mixed: dict[str, Json] = {score: value.get(score, 5.0 * 0.8**r) for score in scores}
            parts = {"train": 0.3, "wait": 0.1 + 0.01 * i, "mix": 0.02, "evaluate": 0.03, "total": 0.5}
            last[name] = {
                "t": START + 0.5 * (r + 1) + 0.003 * i,
                "node": name,
                "epoch": 1,
                "round": r,
                "train_loss": 1.0,
                "local": dict.fromkeys(scores, 0.25),
                "mixed": mixed,
                "consensus": 3 * 0.75**r + 0.1,
                "merged": list(names),
                "missing": [],
                "seconds": parts,
                "bytes": {"sent": 4_000_000 + 1000 * i, "received": 4_000_000},
            }
            if contraction is not None:
                middle = (len(names) - 1) / 2
                probe = {"before": [float(i)], "after": [middle + contraction * (i - middle)]}
                last[name] = {**last[name], "probe": probe}
            records.append_metrics(last[name])
        if name in killed:
            for peer in names[:2]:
                event = {"t": START + 0.5 * done + 1, "node": peer, "event": "died", "peer": name, "why": "silence"}
                run.node(peer).append_event(event)
        elif finished:
            records.append_event({"t": START + 0.5 * rounds + 1, "node": name, "event": "finished", "round": rounds})
        records.close()
    graph = nx.Graph(edges, name="ring")
    graph.add_nodes_from(names)
    write_json(run.topology, nx.node_link_data(graph, edges="edges"))
    write_text(run.experiment, 'seed = 0\n[model]\nname = "a < b & c"\n')
    if finished:
        done_by = [name for name in names if name not in killed]
        summary = summarise(
            nodes=names,
            finished=done_by,
            rounds=rounds,
            seconds=0.5 * rounds,
            last_metrics=last,
            mean_model={"loss": 0.11},
            consensus_distance=0.0123,
            rejected={},
            sent=10,
            received=10,
            contraction={},
            topology={"name": "ring", "lambda2": 0.75, "degree": {"min": 2, "mean": 2.0, "max": 2}},
        )
        write_json(run.summary, summary)
    return run


def node_names(count: int) -> list[str]:
    return [f"node-{i:0{len(str(count - 1))}}" for i in range(count)]


def page_of(run: Run) -> str:
    (written,) = write_report([run.path], None, None)
    assert written == run.report
    return written.read_text("utf-8")


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four nodes of which one died, with its report."""
    run = write_run(tmp_path_factory.mktemp("ring") / "run", node_names(4), killed={"node-2": 3})
    page_of(run)
    return run


# -- The page --------------------------------------------------------------------------------------------------------


def test_one_run_is_one_page_that_says_how_it_went(ring: Run) -> None:
    words = headline(read_history(ring.path, "run"))
    assert words == (
        "4 nodes trained 6 rounds in 3 s without a server; the mean accuracy on held-out rows is 76.7 % "
        "(from 76.6 % to 76.9 %). node-2 died after 3 rounds (1.51 s); the other 3 finished."
    )
    page = ring.report.read_text("utf-8")
    assert words in page
    assert page.count("<svg") == 6
    assert "a &lt; b &amp; c" in page  # the experiment
    assert '<tr class="gone"><td>node-2</td><td>died</td><td>3</td>' in page
    assert "node-2 died</text>" in page  # on the curves
    assert "node-2 (died)</text>" in page  # in the graph
    assert "node-0, node-1" in page  # who noticed: one row for both


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(ring: Run) -> None:
    page = ring.report.read_text("utf-8")
    parsed = _Tags(page)
    assert parsed.open == []  # every element is closed, in order
    ids = [attributes["id"] for _, attributes in parsed.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "img")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,"))
                assert not value.startswith("#") or value[1:] in ids
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "url(#" in page
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page


def test_the_same_records_give_the_same_page_and_its_colours_follow_the_theme(ring: Run) -> None:
    page = ring.report.read_text("utf-8")
    assert page_of(ring) == page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    for role, (light, _) in plots.THEME.items():
        assert light not in drawings, role


def test_what_a_peer_or_a_file_says_is_text_and_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b"], scores=["loss", FORBIDDEN, "$x^{$"])
    records = run.node("a")
    for kind in ("rejected", "died", FORBIDDEN):
        event = {"t": START, "event": kind, "peer": f"b{FORBIDDEN}", "code": FORBIDDEN, "why": "\x1b[31m" + FORBIDDEN}
        records.append_event({**event, FORBIDDEN: [FORBIDDEN, "$\\frac{"]})
    records.append_event({"t": START, "event": "rejected", "peer": "b", "code": FORBIDDEN})
    records.close()
    graph = {"name": FORBIDDEN, FORBIDDEN: {FORBIDDEN: FORBIDDEN}, "degree": [FORBIDDEN]}
    write_json(run.summary, {"failed": ["b", FORBIDDEN], "topology": graph, "rejected": {FORBIDDEN: 1}})
    hostile = {"id": FORBIDDEN, "mass": -1}
    write_json(run.topology, {"nodes": [hostile, {"id": "b"}], "edges": [{"source": FORBIDDEN, "target": "b"}]})
    write_text(run.experiment, FORBIDDEN + "</pre>")
    page = page_of(run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page.lower()
    assert "\x1b" not in page
    assert _Tags(page).open == []


def test_a_run_without_accuracy_shows_its_own_score(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", node_names(3), scores=["loss", "rmse"])
    written = write_report([run.path], tmp_path / "page.html", tmp_path / "png")
    assert [path.name for path in written] == [
        "page.html",
        "rmse.png",
        "loss.png",
        "graph.png",
        "consensus.png",
        "time.png",
        "bytes.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    page = written[0].read_text("utf-8")
    assert "the mean rmse on held-out rows is 1.64" in page
    assert "accuracy" not in re.sub(r"<style>.*?</style>", "", page)


def test_a_run_that_goes_on_or_was_cut_off_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", node_names(4), killed={"node-1": 2}, finished=False)
    history = read_history(run.path, "run")
    assert history.ended == {"node-1": "died"}
    assert history.graph["lambda2"] == pytest.approx(1 / 3)  # computed from the graph: there is no summary to ask
    assert "the other 3 went on. There is no summary yet" in headline(history)
    assert "<td>running</td>" in page_of(run)


RING = '[topology]\ngraph = "ring"\nnodes = 4\nweights = "lazy"\n'  # lambda2 = 2/3, and half of it is typical


def test_what_mixing_did_stands_beside_what_the_graph_promises(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", node_names(4), finished=False, contraction=0.6)
    write_text(run.experiment, RING)
    history = read_history(run.path, "run")
    assert history.graph["lambda2"] == pytest.approx(2 / 3)
    assert history.contraction is not None
    says = "As predicted: one mixing multiplied the disagreement by 0.6; "
    assert history.contraction["says"].startswith(says)
    consensus = next(picture for picture in pictures(history) if picture.name == "consensus")
    assert says in consensus.caption
    page = page_of(run)
    assert says in page
    assert "<dt>one mixing leaves of the disagreement</dt><dd>0.6 (typical 0.577, lambda2 0.667)</dd>" in page
    slow = write_run(tmp_path / "slow", node_names(4), finished=False, contraction=0.9)
    write_text(slow.experiment, RING)
    contraction = read_history(slow.path, "run").contraction
    assert contraction is not None
    assert "some node sends another vector than its own model" in contraction["says"]


def test_a_run_of_an_older_version_says_nothing_about_mixing(ring: Run) -> None:
    assert read_history(ring.path, "run").contraction is None
    assert "one mixing" not in ring.report.read_text("utf-8")


def test_only_masses_that_can_be_weigh_the_disagreement(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b", "c"], rounds=1)
    for name, before, after in (("a", 0.0, 1.0), ("b", 4.0, 3.0), ("c", 8.0, 8.0)):
        run.node(name).metrics.unlink()
        run.node(name).append_metrics({"t": START, "round": 0, "probe": {"before": [before], "after": [after]}})
    for masses, expected in (([1, 1, 2], 38 / 44), ([1, 1, 1], 26 / 32), ([0, -3, "many"], 26 / 32)):
        nodes: Json = [{"id": name, "mass": mass} for name, mass in zip("abc", masses, strict=True)]
        write_json(run.topology, {"nodes": nodes, "edges": []})
        contraction = read_history(run.path, "run").contraction
        assert contraction is not None
        assert contraction["measured"] == pytest.approx(math.sqrt(expected))


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"graph": {"period": 1}}, "A line joins two nodes that average with each other. Red"),
        ({"graph": {"period": 3}}, "in one of the 3 rounds after which the graph repeats. Red"),
        ({"graph": {"period": None}}, "in some round: the graph is drawn anew for each. Red"),
        ({"directed": True}, "An arrow is the way that a model travels. Red"),
    ],
)
def test_the_picture_of_the_graph_says_what_its_lines_are(tmp_path: Path, form: Mapping[str, Json], says: str) -> None:
    run = write_run(tmp_path / "run", ["a", "b", "c"], finished=False)
    edges: Json = [{"source": "a", "target": "b"}, {"source": "c", "target": "b"}]
    write_json(run.topology, {"nodes": [{"id": name} for name in "abc"], "edges": edges, **form})
    history = read_history(run.path, "run")
    picture = next(picture for picture in pictures(history) if picture.name == "graph")
    assert says in picture.caption
    assert ("one-way links" in picture.figure.texts[0].get_text()) == ("directed" in form)
    assert bool(history.graph) == (form == {"graph": {"period": 1}})  # of the others the file does not say enough


def test_parts_are_shown_as_long_as_there_are_no_scores(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run")
    nodes: Json = [{"id": "a", "part": "north"}, {"id": "b", "part": "south"}, {"id": "c", "part": "south"}]
    write_json(run.topology, {"nodes": nodes, "edges": [{"source": "a", "target": "b"}]})
    (graph, *_) = pictures(read_history(run.path, "run"))
    assert {"part", "north", "south"} <= set(texts(graph.figure))


def test_a_node_that_came_back_has_not_ended_and_a_finished_one_has_not_left(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b", "c"], finished=False)
    records = run.node("a")
    records.append_event({"t": START + 1.2, "node": "a", "event": "died", "peer": "b"})
    records.append_event({"t": START + 9, "node": "a", "event": "left", "peer": "c", "reason": "finished"})
    records.close()
    history = read_history(run.path, "run")
    assert history.ended == {}
    assert "b lost, came back</text>" in page_of(run)


def test_a_kill_of_the_experiment_is_called_that(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", node_names(4), killed={"node-2": 3})
    write_text(
        run.experiment, '[topology]\ngraph = "ring"\nnodes = 4\n[[faults]]\nkind = "kill"\nnode = 2\nround = 3\n'
    )
    assert read_history(run.path, "run").ended == {"node-2": "killed"}


def test_a_run_of_almost_nothing_still_makes_a_page(tmp_path: Path) -> None:
    bare = create_run(tmp_path / "bare")
    assert "no round is recorded yet" in page_of(bare)
    bare.node("a").folder.mkdir()
    (bare.path / "nodes" / "b").mkdir()
    assert _Tags(page_of(bare)).open == []
    single = write_run(tmp_path / "single", ["lonely"], rounds=1)
    assert headline(read_history(single.path, "x")) == (
        "lonely trained 1 round in 500 ms without a server; accuracy on held-out rows is 10.0 %."
    )
    page_of(single)
    with pytest.raises(BadInput, match="is not a run folder"):
        write_report([tmp_path], None, None)


def test_lines_of_another_shape_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["a", "b"], rounds=3)
    records = run.node("a")
    odd: list[Mapping[str, Json]] = [
        {"round": 3},
        {"t": "now", "round": 3},
        {"t": START + 9, "round": 3, "mixed": "good", "seconds": [], "bytes": None, "missing": "b", "consensus": "x"},
        {"t": START - 5, "round": 4, "mixed": {"accuracy": None, "loss": 1e299}},  # diverged, and the clock set back
    ]
    for line in odd:
        records.append_metrics(line)
    records.append_event({"event": 3})
    records.close()
    with records.metrics.open("ab") as file:
        file.write(b"\xff\xff\n")
    page = page_of(run)
    assert "1, left out" in page


def test_several_runs_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fast = write_run(tmp_path / "x" / "run", node_names(3), rounds=9)
    slow = write_run(tmp_path / "y" / "run", node_names(4), killed={"node-3": 1})
    written = write_report([fast.path, slow.path], None, tmp_path / "png")
    assert written[0] == Path("report.html")
    names = [path.name for path in written[1:]]
    assert names[0] == "compare.png"
    assert {"x-run-accuracy.png", "y-run-graph.png"} <= set(names)
    page = written[0].read_text("utf-8")
    assert _Tags(page).open == []
    assert "Accuracy of 2 runs, mean over the nodes: x/run ends highest" in page
    assert page.count("<svg") == 1 + 2 * 6


def test_no_two_runs_have_one_label(tmp_path: Path) -> None:
    a, b = tmp_path / "x" / "run", tmp_path / "y" / "run"
    assert labels([a]) == ["run"]
    assert labels([a, b, tmp_path / "z"]) == ["x/run", "y/run", "z"]
    assert labels([a, a, a]) == ["run", "run #2", "run #3"]


def test_runs_that_share_no_score_are_not_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / score, ["a", "b"], scores=[score]) for score in ("rmse", "accuracy")]
    assert comparison([read_history(run.path, "x") for run in runs]) is None
    (written,) = write_report([run.path for run in runs], tmp_path / "page.html", None)
    assert "share no score" in written.read_text("utf-8")


# -- The pictures ----------------------------------------------------------------------------------------------------


def trace(name: str, values: Sequence[float], goes_on: bool = True) -> Trace:
    places = [float(i) for i in range(len(values))]
    return Trace(name, {"round": places, "seconds since the start": places}, values, goes_on)


def texts(figure: plots.Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40])
def test_no_label_of_the_curves_is_cut_or_lies_on_another(count: int) -> None:
    names = [f"hospital-number-{i:02}" for i in range(count)]
    traces = [trace(name, [0.1, 0.5, 0.9 + i / 5000], goes_on=i != 2) for i, name in enumerate(names)]
    marks = [Mark(name, f"{name} refused: bad_signature", i % 3, grave=i == 2) for i, name in enumerate(names[:5])]
    figure = plots.curves(traces, marks, "accuracy")
    assert_apart(figure)


def test_the_mean_is_named_and_a_node_that_ended_has_no_part_in_the_end() -> None:
    figure = plots.curves([trace("a", [0.5, 0.7]), trace("b", [0.5, 0.9]), trace("c", [0.1], False)], [], "accuracy")
    assert sorted(texts(figure)) == ["a  70.0 %", "b  90.0 %", "mean  80.0 %"]


def test_of_many_nodes_only_the_mean_and_the_extremes_are_named() -> None:
    figure = plots.curves([trace(f"n{i}", [0.0, float(i)]) for i in range(30)], [], "loss")
    assert sorted(texts(figure)) == ["highest: n29  29.0", "lowest: n0  0.00", "mean  14.5"]


def test_the_predicted_rate_starts_at_the_measured_mean_and_falls_by_lambda2() -> None:
    traces = [trace("a", [8.0, 7.0, 6.5]), trace("b", [4.0, 3.0, 3.5]), trace("c", [0.0, 0.0, 0.0])]
    figure = plots.consensus(traces, [], 0.5)
    dashed = next(line for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_ydata()) == 3)
    assert list(np.asarray(dashed.get_ydata())) == [6.0, 3.0, 1.5]
    assert any("× 0.5 a round" in text for text in texts(figure))
    for unknown in (None, 0.0, 1.0):
        assert not any("a round" in text for text in texts(plots.consensus(traces, [], unknown)))


def test_apart_keeps_order_gap_and_edges_and_moves_no_more_than_needed() -> None:
    assert list(plots.apart([10.0, 90.0, 50.0], 10, 100)) == [10.0, 90.0, 50.0]
    assert list(plots.apart([50.0, 50.0, 50.0], 10, 100)) == [40.0, 50.0, 60.0]
    assert list(plots.apart([98.0, 99.0], 10, 100)) == [90.0, 100.0]
    assert list(plots.apart([0.0, 1.0], 10, 100)) == [0.0, 10.0]
    assert len(plots.apart([], 10, 100)) == 0


def test_nan_and_infinite_scores_leave_a_gap_and_no_error() -> None:
    figure = plots.curves([trace("a", [math.nan, math.nan]), trace("b", [1.0, math.nan, 2.0])], [], "loss")
    plots.svg(figure, "x")
    plots.svg(plots.curves([trace("a", [])], [], "loss"), "x")
    plots.svg(plots.consensus([], [], 0.5), "x")


@pytest.mark.parametrize("count", [1, 2, 3, 12, 40, 100])
def test_a_graph_of_any_size_is_drawn_with_names_up_to_forty(count: int) -> None:
    names = node_names(count)
    edges = list(pairwise([*names, names[0]] if count > 2 else names))
    figure = plots.graph(names, edges, name="ring", ended={names[0]: "killed"}, scores={}, score="accuracy")
    written = texts(figure)
    assert (f"{names[0]} (killed)" in written) == (count <= 20)
    assert len(written) == (count if count <= 40 else 0)
    plots.svg(figure, "x")


def numbered(graph: nx.Graph) -> nx.Graph:
    """The graph over node-0, node-1 … in the order of its nodes."""
    return nx.relabel_nodes(graph, dict(zip(graph, node_names(len(graph)), strict=True)))


def grid(rows: int, columns: int, *, periodic: bool) -> nx.Graph:
    return nx.grid_2d_graph(rows, columns, periodic=periodic)


FAMILIES = {
    "ring": nx.cycle_graph(12),
    "complete": nx.complete_graph(40),
    "star": nx.star_graph(19),
    "path": nx.path_graph(9),
    "grid": grid(4, 5, periodic=False),
    "torus": grid(4, 4, periodic=True),
    "hypercube": nx.Graph((i, i ^ 1 << bit) for i in range(32) for bit in range(5)),
    "exponential-directed": nx.DiGraph((i, (i + step) % 12) for i in range(12) for step in (1, 2, 4, 8)),
    "random-regular": nx.random_regular_graph(4, 16, seed=0),
    "barabasi-albert": nx.barabasi_albert_graph(40, 2, seed=0),
    "tree": nx.balanced_tree(2, 4),
    "caveman": nx.connected_caveman_graph(4, 10),
    "two": nx.disjoint_union(nx.complete_graph(5), nx.complete_graph(5)),
    "empty": nx.empty_graph(5),
}


def boxes_of(figure: plots.Figure) -> list[Bbox]:
    """Where the texts stand that are no numbers beside an axis."""
    figure.canvas.draw()
    found = list(figure.texts) + [t for axes in figure.axes for t in [*axes.texts, axes.title]]
    return [text.get_window_extent() for text in found if text.get_text()]


def assert_apart(figure: plots.Figure) -> None:
    boxes = boxes_of(figure)
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_in_a_graph_is_cut_or_lies_on_a_node_or_on_another(family: str) -> None:
    graph = numbered(FAMILIES[family])
    figure = plots.topology([graph], family)
    assert_apart(figure)
    axes = figure.axes[0]
    assert len(axes.texts) == len(graph)
    circles = next(c for c in axes.collections if len(c.get_offsets()) == len(graph))
    radius = math.sqrt(circles.get_sizes()[0]) / 2 * figure.dpi / 72  # pixels
    for x, y in axes.transData.transform(circles.get_offsets()):
        for text in axes.texts:
            box = text.get_window_extent()
            assert math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)) > radius


HOSPITALS = [f"hospital {'abcdefghij'[i % 10]} of town {'abcdefghij'[i // 10]}" for i in range(40)]


@pytest.mark.parametrize(
    ("family", "crowded"),
    [(grid(5, 8, periodic=False), False), (nx.disjoint_union_all([nx.complete_graph(20)] * 2), True)],
)
def test_names_that_find_no_place_are_left_out_but_not_of_who_is_gone(family: nx.Graph, crowded: bool) -> None:
    index = {node: i for i, node in enumerate(family)}
    edges = [(HOSPITALS[index[a]], HOSPITALS[index[b]]) for a, b in family.edges]
    figure = plots.graph(HOSPITALS, edges, name="crowd", ended={HOSPITALS[-1]: "died"}, scores={}, score="")
    assert_apart(figure)
    assert (len(figure.axes[0].texts) < 40) == crowded
    assert f"{HOSPITALS[-1]} (died)" in texts(figure)
    room = figure.axes[0].bbox
    assert all(box.x0 >= room.x0 and box.x1 <= room.x1 + 1 for box in boxes_of(figure)[1:])


def places(figure: plots.Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].collections[-1].get_offsets())


def is_circle(dots: np.ndarray) -> bool:
    return bool(np.ptp(np.hypot(*(dots - dots.mean(axis=0)).T)) < 1e-6)


def test_a_graph_is_drawn_in_its_own_form() -> None:
    for steps in ([1], [1, 2, 4]):
        assert is_circle(places(plots.topology([numbered(nx.circulant_graph(12, steps))], "ring")))
    for periodic in (False, True):
        figure = plots.topology([numbered(grid(3, 7, periodic=periodic))], "lattice")
        lattice = places(figure)
        assert [len(np.unique(np.round(side, 6))) for side in lattice.T] == [7, 3]
        path = figure.axes[0].lines[0].get_xydata()
        steps = np.diff(np.asarray(path), axis=0)
        steps = steps[np.isfinite(steps).all(axis=1)]
        assert np.all(np.min(np.abs(steps), axis=1) < 1e-6)  # along rows and columns, none across the picture
        assert len(steps) == (2 * (3 + 7) + (3 * 6 + 2 * 7) if periodic else 3 * 6 + 2 * 7)
        assert ("go on at the other side" in figure.texts[0].get_text()) == periodic
    all_rounds_of_base_2 = nx.Graph([(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 4), (3, 5)])
    assert "other side" not in plots.topology([numbered(all_rounds_of_base_2)], "base-k").texts[0].get_text()
    crossed = grid(3, 7, periodic=False)
    crossed.add_edge((0, 0), (1, 1))
    assert len(np.unique(np.round(places(plots.topology([numbered(crossed)], "no lattice"))[:, 0], 6))) > 7
    tree = places(plots.topology([numbered(nx.balanced_tree(3, 2))], "tree"))
    distance = np.hypot(*((tree - tree[0]) / [1.3, 1]).T)
    assert np.ptp(distance[1:4]) < 0.05 * distance[1]
    assert np.ptp(distance[4:]) < 0.05 * distance[4]


def test_arrows_point_to_who_hears_and_many_have_no_heads() -> None:
    both_ways = plots.topology([numbered(nx.cycle_graph(3))], "both ways")
    assert not any(isinstance(c, PolyCollection) for c in both_ways.axes[0].collections)
    for count in (3, 64, 65):
        figure = plots.topology([numbered(nx.cycle_graph(count, create_using=nx.DiGraph))], "one way")
        assert "one-way link" in figure.texts[0].get_text()
        heads = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
        assert len(heads) == (count <= 64)
        if heads:
            dots = places(figure)
            tips = np.array([path.vertices[0] for path in heads[0].get_paths()])
            nearest = [int(np.argmin(np.hypot(*(dots - tip).T))) for tip in tips]
            assert sorted(nearest) == list(range(count))
            origin = np.array([path.vertices[1:3].mean(axis=0) for path in heads[0].get_paths()])
            sources = dots[[(target - 1) % count for target in nearest]]
            assert np.all(np.hypot(*(sources - origin).T) < np.hypot(*(sources - tips).T))


def colours_of(figure: plots.Figure) -> list[tuple[float, ...]]:
    return [tuple(colour) for colour in figure.axes[0].collections[-1].get_facecolors()]


def test_parts_have_colours_then_degrees_and_equal_nodes_one() -> None:
    cliques = numbered(nx.connected_caveman_graph(3, 4))
    nx.set_node_attributes(cliques, {name: f"clinic {i // 4}" for i, name in enumerate(cliques)}, "part")
    figure = plots.topology([cliques], "caveman")
    colours = colours_of(figure)
    assert [colours.index(colour) for colour in colours] == [0] * 4 + [4] * 4 + [8] * 4
    assert {"part", "clinic 0", "clinic 1", "clinic 2"} <= set(texts(figure))
    star = plots.topology([numbered(nx.star_graph(4))], "star")
    assert len(set(colours_of(star))) == 2
    assert "number of neighbours" in [axes.get_title(loc="left") for axes in star.axes]
    assert len(set(colours_of(plots.topology([numbered(nx.cycle_graph(5))], "ring")))) == 1
    scored = plots.graph(
        list(cliques),
        list(cliques.edges),
        name="caveman",
        ended={},
        scores={name: i / 12 for i, name in enumerate(cliques)},
        score="accuracy",
        parts=dict.fromkeys(cliques, "one"),
    )
    assert len(set(colours_of(scored))) == 12


@pytest.mark.parametrize(
    ("count", "period", "panels", "says"),
    [(3, 3, 3, "repeats after 3 rounds"), (12, 12, 8, "the first 8 shown"), (4, None, 4, "drawn anew for every round")],
)
def test_a_graph_that_changes_is_drawn_round_by_round_with_the_nodes_in_one_place(
    count: int, period: int | None, panels: int, says: str
) -> None:
    rounds = [
        numbered(nx.DiGraph((i, (i + step) % 10) for i in range(10))) for step in range(1, count + 1) if step % 10
    ]
    figure = plots.topology(rounds, "shift", period)
    assert says in figure.texts[0].get_text()
    assert [axes.get_title() for axes in figure.axes[:panels]] == [f"round {i + 1}" for i in range(panels)]
    dots = [np.asarray(axes.collections[-1].get_offsets()) for axes in figure.axes[:panels]]
    assert all(np.allclose(some, dots[0]) for some in dots)
    assert is_circle(dots[0])  # so that no line passes through a third node
    assert texts(figure)[:10] == list("0123456789")
    assert_apart(figure)
    plots.svg(figure, "x")


# -- Several at once -------------------------------------------------------------------------------------------------


def test_21_runs_can_be_told_apart() -> None:
    names = [f"exponential-directed-{i:02}" for i in range(21)]
    figure = plots.compare([trace(name, [0.1, 0.5, 0.9 + i / 5000]) for i, name in enumerate(names)], "accuracy")
    assert_apart(figure)
    assert len(texts(figure)) == 21
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert len({(line.get_color(), line._unscaled_dash_pattern) for line in curves}) == 21  # type: ignore[attr-defined]


def test_topologies_are_compared_until_they_agree() -> None:
    curves = {
        "at once": ([1.0, 0.0], 15.0),
        "halves": ([0.5**t for t in range(40)], 2.0),
        "slow": ([0.9**t for t in range(41)], 1.0),
        "alone": ([1.0] * 41, 0.0),
    }
    figure = plots.compare_topologies(curves)
    by_rounds, by_vectors = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["rounds", "vectors that a node has sent"]
    assert {t.get_text() for t in by_rounds.texts} == {"at once  1", "halves  20", "slow  0.015", "alone  1"}
    assert {t.get_text() for t in by_vectors.texts} == {"at once  15", "halves  40", "slow  0.015", "alone  1"}
    assert "2 of 4 topologies agree to 1e-06" in figure.texts[0].get_text()
    assert by_rounds.get_ylim()[0] == 1e-6
    with_bytes = plots.compare_topologies(curves, parameters=1000)
    assert with_bytes.axes[1].get_xlabel() == "kB that a node has sent"
    assert "halves  160" in [t.get_text() for t in with_bytes.axes[1].texts]
    for figure in (plots.compare_topologies({}), plots.compare_topologies({"lonely": ([0.0], 0.0)})):
        plots.svg(figure, "x")


@pytest.mark.parametrize("slowest", [1.0, 0.2])
def test_the_names_of_21_topologies_hang_clear_of_each_other(slowest: float) -> None:
    """After 13 rounds in which a millionth or less is left, or in the second case not on all of them."""
    rates = np.linspace(slowest, 1.2, 21)
    curves = {
        f"exponential-directed-{i}": ((0.1 ** (r * np.arange(14))).tolist(), 1.0 + i) for i, r in enumerate(rates)
    }
    figure = plots.compare_topologies(curves)
    figure.canvas.draw()
    for axes in figure.axes:
        hung = [text for text in axes.texts if text.get_rotation() == 315]
        assert len(hung) == np.sum(13 * rates >= 6)
        anchors = sorted(axes.transAxes.transform(text.get_position())[0] for text in hung)
        lines = max(text.get_fontsize() for text in hung) * figure.dpi / 72
        assert min(np.diff(anchors)) * math.sin(math.pi / 4) > 1.2 * lines
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.width
        others = [text.get_window_extent() for text in axes.texts if text.get_rotation() == 0]
        assert not any(a.overlaps(b) for i, a in enumerate(others) for b in others[:i])


def test_pictures_have_the_names_of_the_contract(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", node_names(3)).path, "run")
    names = [picture.name for picture in pictures(history)]
    assert names == ["accuracy", "loss", "graph", "consensus", "time", "bytes"]


def test_pictures_of_200_nodes_stay_small() -> None:
    """A page has five such pictures or less, and is to stay below 3 MB."""
    names = node_names(200)
    figure = plots.curves(
        [trace(name, [math.sin(i * (7 + k)) for i in range(500)]) for k, name in enumerate(names)], [], "loss"
    )
    assert len(plots.svg(figure, "x")) < 750_000
    edges = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    figure = plots.graph(names, edges, name="complete", ended={}, scores={}, score="loss")
    assert len(plots.svg(figure, "x")) < 750_000
