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
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in figure.texts]
    boxes += [t.get_window_extent() for axes in figure.axes for t in axes.texts]
    width, height = figure.bbox.width, figure.bbox.height
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])


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


@pytest.mark.parametrize("count", [1, 2, 3, 12, 100])
def test_a_graph_of_any_size_is_drawn_with_names_up_to_forty(count: int) -> None:
    names = node_names(count)
    edges = list(pairwise([*names, names[0]] if count > 2 else names))
    figure = plots.graph(names, edges, name="ring", ended={names[0]: "killed"}, scores={}, score="accuracy")
    written = texts(figure)
    assert (f"{names[0]} (killed)" in written) == (count <= 40)
    assert len(written) == (count if count <= 40 else 0)
    plots.svg(figure, "x")


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
    assert len(plots.svg(figure, "x")) < 700_000
    edges = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    figure = plots.graph(names, edges, name="complete", ended={}, scores={}, score="loss")
    assert len(plots.svg(figure, "x")) < 700_000
