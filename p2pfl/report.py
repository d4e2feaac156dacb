"""Records in, one self-contained page out: how training went, in words, tables and pictures.

Reads run folders and writes the page and the PNGs; nothing else. The page needs no script, no font and no address, and
its policy line forbids them. Whatever comes from a file is escaped where it enters the HTML: in `_text`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from p2pfl import config, findings, plots
from p2pfl.analysis import Comparison, compare_contraction
from p2pfl.disclosure import Disclosure, from_json, page
from p2pfl.messages import BadInput, printable
from p2pfl.plots import Mark, Trace, show, show_bytes, show_seconds
from p2pfl.records import (
    Json,
    Line,
    Run,
    count_rejected,
    inside,
    is_number,
    number,
    open_run,
    read_json,
    words,
    write_text,
)
from p2pfl.topology import build
from p2pfl.topology.exposure import Exposure, exposure, in_words, noise_of, not_computed
from p2pfl.topology.implied import implied

SCORES_SHOWN = 5  # scores that get a picture of their own
ROWS_OPEN = 40  # rows of a table that is not folded away
EVENTS_SHOWN = 300  # rows of the timeline
NONE = "–"
AUDIT = "audit"  # the name of its picture
NAMES = ("graph", "consensus", "time", "bytes", "compare", "epsilon", AUDIT)  # of pictures that are of no score
# Whose presence ε hides.
HIDDEN = {
    "example": "Example-level ε hides one row: whether any single row was among those that the node trained on.",
    "update": "Update-level ε hides the whole node: whether it learnt anything at all, and so all of its rows.",
}
PROMISE = (
    "Whoever reads all that the node has sent can tell it with odds that are at most exp(ε) times what they were, but "
    "for a probability of δ. Both bounds of the accountants hold (RDP and PRV); the curve is the smaller one."
)

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

    @cached_property
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
    shared: str  # which part of the models is averaged, in words
    disclosures: tuple[Disclosure, ...]  # what leaves each node that started here; none, where it was simulated
    audit: Line  # what `p2pfl audit` found; empty: nobody has asked
    exposure: Exposure | None  # who gets to know how much of whom; None where no noise is put on updates

    @cached_property
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

    @cached_property
    def contraction(self) -> Comparison | None:
        """What one mixing did, beside what the graph promises; None where no round tells."""
        lines = {node.name: node.lines for node in self.nodes}
        found = compare_contraction(lines, _masses(self.topology), self.graph)
        return found if found["measured"] is not None else None

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
    summary, topology, experiment = read_json(run.summary), read_json(run.topology), _experiment(run.experiment)
    toml = run.experiment.read_text("utf-8", errors="replace") if run.experiment.is_file() else ""
    begins = [_time(node.lines[0]) - (number(node.lines[0], "seconds", "total") or 0.0) for node in nodes if node.lines]
    return History(
        label=label,
        nodes=tuple(nodes),
        summary=summary,
        topology=topology,
        graph=dict(_mapping(summary, "topology")) or _implied(experiment, topology),
        toml=toml,
        ended=_ended(nodes, summary, _condemned(experiment)),
        damaged=damaged,
        start=min(begins, default=0.0),
        shared=_shared(experiment),
        disclosures=tuple(_disclosures(run, nodes)),
        audit=read_json(run.audit),
        exposure=_exposure(experiment, nodes),
    )


def _disclosures(run: Run, nodes: Sequence[NodeHistory]) -> Iterator[Disclosure]:
    """What left each node, as it was foreseen, with the bytes and the ε that were counted."""
    for node in nodes:
        foreseen = from_json(read_json(run.node(node.name).disclosure))
        if foreseen is None:
            continue
        sent = round(node.total("bytes", "sent")) if node.lines else None
        spent = number(node.rounds[-1], "epsilon", "spent") if node.lines else None
        noise = foreseen.noise if spent is None or foreseen.noise is None else replace(foreseen.noise, epsilon=spent)
        yield replace(foreseen, sent=sent, noise=noise)


def _exposure(experiment: config.Experiment | None, nodes: Sequence[NodeHistory]) -> Exposure | None:
    """What one curious node got to know of the others' updates, were all nodes there to the end.

    By the least noise that any node added, as it follows from what that has spent.
    """
    lines = [node.rounds[-1] for node in nodes if node.lines]
    spent = max((number(line, "epsilon", "rdp") or 0.0 for line in lines), default=0.0)
    if experiment is None or experiment.privacy.dp != "update" or not experiment.topology.is_drawn or not spent:
        return None
    section, privacy = experiment.topology, experiment.privacy
    built = build(section, experiment.seed)
    if not_computed(built, section.weighting) is not None:
        return None
    trainings = -(-(1 + max(map(_round, lines))) // privacy.mixings)
    noise = noise_of(spent, privacy.delta, trainings)
    ones = dict.fromkeys(built.names, 1.0)  # weights that keep the mean ask for no mass
    return exposure(built, section.weighting, ones, noise, privacy.mixings, privacy.delta, trainings)


def _ended(nodes: Sequence[NodeHistory], summary: Line, condemned: set[str]) -> dict[str, str]:
    """Who did not finish, with the word for why."""
    ends: dict[str, tuple[float, str]] = {}  # by node: what was said last about its end
    for node in nodes:
        for event in node.events:
            kind, peer, t = str(event["event"]), event.get("peer"), number(event, "t") or 0.0
            if isinstance(peer, str):
                said = PEER_END.get(kind) if event.get("reason") != "finished" else None
            else:
                peer, said = node.name, OWN_END.get(kind)
            if said is not None:
                ends[peer] = max(ends.get(peer, (t, "")), (t, said))
    names = words(summary, "failed")
    if not summary:  # nobody has counted yet: gone is who was said to be, and wrote no line and no "finished" since
        finished = {node.name for node in nodes if any(event["event"] == "finished" for event in node.events)}
        wrote = {node.name: _time(node.lines[-1]) for node in nodes if node.lines}
        known = {node.name for node in nodes} - finished
        names = [name for name, (t, _) in ends.items() if name in known and wrote.get(name, 0.0) <= t]
    reasons = {name: ends[name][1] if name in ends else "failed" for name in sorted(set(names))}
    return {name: "killed" if name in condemned else why for name, why in reasons.items()}


def _experiment(path: Path) -> config.Experiment | None:
    """The experiment of the run; None where it cannot be read (another version wrote it)."""
    try:
        return config.load(path)
    except BadInput:
        return None


def _shared(experiment: config.Experiment | None) -> str:
    """Which part of the models is averaged, in words."""
    if experiment is None:
        return "a part of it"
    patterns, norms = experiment.mix.shared, experiment.mix.norms
    what = "everything" if patterns == ("*",) else f"what is called {' or '.join(patterns)}"
    return what + (" but the normalisation layers" if norms == "own" else "")


def _condemned(experiment: config.Experiment | None) -> set[str]:
    """The nodes that the experiment itself meant to kill."""
    if experiment is None:
        return set()
    return {name for name in experiment.topology.names if experiment.is_doomed(name)}


def _implied(experiment: config.Experiment | None, topology: Line) -> Line:
    """What the graph implies, for a run without a summary; empty where its files do not say enough."""
    try:
        if experiment is not None and experiment.topology.is_drawn:
            built, weights = build(experiment.topology, experiment.seed), experiment.topology.weighting
        elif _is_directed(topology) or _period(topology) != 1:
            return {}
        else:
            names, edges = _graph(topology)
            drawn: config.Toml = [[a, b] for a, b in edges]
            section: dict[str, config.Toml] = {
                "nodes": list(names),
                **({"edges": drawn} if edges else {"graph": "empty"}),
            }
            built, weights = build(config.validate({"topology": section}, "topology.json").topology, seed=0), "samples"
        masses = dict.fromkeys(built.names, 1.0) | _masses(topology)
        facts = implied(built, weights, masses) | {"name": str(inside(topology, "graph", "name") or built.name)}
    except BadInput:
        return {}
    return dict(facts)  # type: ignore[arg-type]  # a TypedDict; its values are all JSON


def _graph(topology: Line) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes and edges of a node-link form; networkx before 3.4 calls the edges "links"."""
    names = [str(node["id"]) for node in _mappings(topology, "nodes") if "id" in node]
    links = _mappings(topology, "edges") or _mappings(topology, "links")
    edges = [(str(link.get("source")), str(link.get("target"))) for link in links]
    known = set(names)
    return names, [(a, b) for a, b in edges if a in known and b in known and a != b]


def _masses(topology: Line) -> dict[str, float]:
    """How much each node counts, as far as the node-link form says."""
    masses = {str(node["id"]): number(node, "mass") for node in _mappings(topology, "nodes") if "id" in node}
    return {name: mass for name, mass in masses.items() if mass is not None and mass > 0}


def _parts(topology: Line) -> dict[str, str]:
    """The group that each node belongs to, of those that have one."""
    nodes = _mappings(topology, "nodes")
    return {str(node["id"]): str(node["part"]) for node in nodes if "id" in node and node.get("part") is not None}


def _is_directed(topology: Line) -> bool:
    return topology.get("directed") is True


def _period(topology: Line) -> int | None:
    """The rounds after which the graph repeats: 1 where it stays as it is, None where it is drawn anew."""
    period = inside(topology, "graph", "period") if "period" in _mapping(topology, "graph") else 1
    return int(period) if is_number(period) else None


def _mapping(line: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    value = line.get(key)
    return value if isinstance(value, Mapping) else {}


def _mappings(line: Mapping[str, Json], key: str) -> list[Mapping[str, Json]]:
    value = line.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _time(line: Mapping[str, Json]) -> float:
    return number(line, "t") or 0.0


def _round(line: Mapping[str, Json]) -> int:
    return int(number(line, "round") or 0)


# -- What is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and the line below it."""

    name: str
    figure: Figure
    caption: str


def pictures(history: History) -> list[Picture]:
    """All pictures of one run, in the order of the page."""
    marks, found = _marks(history), []
    for score in history.scores[:SCORES_SHOWN]:
        traces = [_trace(history, node, "mixed", score) for node in history.nodes if node.lines]
        caption = "A node's curve is its score on its own held-out rows, after averaging with its neighbours."
        if len(traces) > 1:
            caption += " Thick: the mean; shaded: from the lowest to the highest."
        found.append(Picture(_file_name(score), plots.curves(traces, marks, score), caption))
    names, edges = _graph(history.topology)
    if names:
        best = history.scores[0] if history.scores else ""
        finals = {node.name: history.last(node, "mixed", best) for node in history.nodes}
        figure = plots.graph(
            names,
            edges,
            name=str(history.graph.get("name") or "graph"),
            ended={name: why for name, why in history.ended.items() if name in names},
            scores={name: value for name, value in finals.items() if value is not None},
            score=best,
            parts=_parts(history.topology),
            directed=_is_directed(history.topology),
        )
        period = _period(history.topology)
        caption = "A line joins two nodes that average with each other"
        if period is None:
            caption += " in some round: the graph is drawn anew for each"
        elif period > 1:
            caption += f" in one of the {period} rounds after which the graph repeats"
        elif _is_directed(history.topology):
            caption = "An arrow is the way that a model travels"
        caption += ". Red and dashed: gone before the end."
        found.append(Picture("graph", figure, caption))
    traces = [_trace(history, node, "consensus") for node in history.nodes if node.lines]
    traces = [Trace(t.name, {"round": t.along["round"]}, t.values, t.goes_on) for t in traces]
    lambda2 = number(history.graph, "lambda2")
    caption = "Distance of a node's parameters to the mean of its neighbours', before mixing."
    if lambda2 is not None and 0 < lambda2 < 1:
        caption += " Dashed: what averaging alone would do on this graph. The curves level off where training pulls"
        caption += " apart as fast as averaging pulls together."
    elif lambda2 == 0:
        rounds = number(history.graph, "period") or 1
        often = "one averaging makes" if rounds == 1 else f"{rounds:.0f} averagings, one after the other, make"
        caption += f" On this graph {often} all models equal: what is left is training."
    if history.contraction is not None:
        caption += f" {history.contraction['says']}"
    if any(value > 0 for trace in traces for value in trace.values):  # a node alone has nobody to be apart from
        found.append(Picture("consensus", plots.consensus(traces, marks, lambda2), caption))
    active = [node for node in history.nodes if node.lines]
    caption = "Mean over a node's rounds. Waiting ends when the last neighbour's update is there; other is the rest."
    found.append(Picture("time", plots.time_split({node.name: _time_parts(node) for node in active}), caption))
    sent = {node.name: node.total("bytes", "sent") for node in active}
    received = {node.name: node.total("bytes", "received") for node in active}
    caption = "Counted at the sockets over the whole run, with everything that encryption and framing add."
    found.append(Picture("bytes", plots.bytes_figure(sent, received, history.rounds), caption))
    traces = [_trace(history, node, "epsilon", "spent") for node in active]
    traces = [Trace(t.name, {"round": t.along["round"]}, t.values, t.goes_on) for t in traces]
    if unit := _unit(history):
        found.append(Picture("epsilon", plots.spent(traces, unit), f"{HIDDEN[unit]} {PROMISE}"))
    if (attacks := findings.picture({history.label: history.audit})) is not None:
        found.append(Picture(AUDIT, attacks, findings.CAPTION))
    return found


def _file_name(score: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", score)[:40]
    return f"score-{plain}" if plain in (*NAMES, "") else plain


def _trace(history: History, node: NodeHistory, *keys: str) -> Trace:
    """The curve of a number of the node's lines over rounds and over time."""
    values = [math.nan if (value := number(line, *keys)) is None else value for line in node.rounds]
    unit, scale = _time_unit(history.seconds)
    seconds = _rising([(_time(line) - history.start) / scale for line in node.rounds])
    rounds = [float(_round(line)) for line in node.rounds]
    along = {"round": rounds, f"{unit} since the start": seconds}
    return Trace(node.name, along, values, goes_on=node.name not in history.ended)


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _rising(values: Sequence[float]) -> list[float]:
    """The values, none below the one before it: a wall clock may be set back."""
    risen: list[float] = []
    for value in values:
        risen.append(max(value, risen[-1]) if risen else value)
    return risen


def _time_parts(node: NodeHistory) -> dict[str, float]:
    """Seconds a round by part, mean over the rounds."""
    count = len(node.lines)
    parts = {part: node.total("seconds", part) / count for part in ("train", "wait", "mix", "evaluate")}
    return parts | {"other": max(0.0, node.total("seconds", "total") / count - math.fsum(parts.values()))}


def _marks(history: History) -> list[Mark]:
    """What is shown on the curves: the ends first, then refusals and returns from the dead, in order of time."""
    nodes = {node.name: node for node in history.nodes if node.lines}
    ends = [Mark(name, f"{name} {why}", len(nodes[name].rounds) - 1) for name, why in _by_end(history) if name in nodes]
    first: dict[tuple[str, str], float] = {}  # (node, label) → when it happened first
    for node in history.nodes:
        for event in node.events:
            peer, kind, t = str(event.get("peer")), event["event"], _time(event)
            if kind == "rejected" and peer in nodes:
                key = (peer, f"{peer} refused: {event.get('code')}")
            elif kind == "rejected" and node.name in nodes:
                key = (node.name, f"{node.name} refused a stranger: {event.get('code')}")
            elif kind == "died" and peer in nodes and peer not in history.ended and t < _time(nodes[peer].lines[-1]):
                key = (peer, f"{peer} lost, came back")
            else:
                continue
            first[key] = min(t, first.get(key, t))
    others = []
    for (name, label), t in sorted(first.items(), key=lambda item: (item[1], item[0])):
        index = sum(_time(line) <= t for line in nodes[name].rounds) - 1
        others.append(Mark(name, label, max(0, index), grave=False))
    return ends + others


def _by_end(history: History) -> list[tuple[str, str]]:
    """(node, why) of those that ended early, in the order in which they did."""
    last = {node.name: _time(node.lines[-1]) for node in history.nodes if node.lines}
    return sorted(history.ended.items(), key=lambda item: (last.get(item[0], 0.0), item[0]))


def comparison(histories: Sequence[History]) -> Picture | None:
    """The mean score of several runs over rounds, time and bytes; None where they share no score."""
    shared = [s for s in histories[0].scores if all(s in history.scores for history in histories)]
    if not shared:
        return None
    unit, scale = _time_unit(max(history.seconds for history in histories))
    traces = [_mean_trace(history, shared[0], unit, scale) for history in histories]
    caption = "Each curve is one run: the mean over its nodes, after mixing."
    return Picture("compare", plots.compare(traces, shared[0]), caption)


def _mean_trace(history: History, score: str, unit: str, scale: float) -> Trace:
    """Round by round the mean over the nodes of score, time and bytes sent so far (in MB)."""
    rows: dict[int, list[tuple[float, float, float]]] = {}
    for node in history.nodes:
        sent = 0.0
        for line in node.rounds:
            sent += (number(line, "bytes", "sent") or 0.0) / 1e6
            value = number(line, "mixed", score)
            if value is not None:
                rows.setdefault(_round(line), []).append((value, (_time(line) - history.start) / scale, sent))
    rounds = sorted(rows)
    values, times, megabytes = ([math.fsum(r[i] for r in rows[k]) / len(rows[k]) for k in rounds] for i in range(3))
    along = {
        "round": [float(k) for k in rounds],
        f"{unit} since the start": _rising(times),
        "MB that a node has sent": _rising(megabytes),
    }
    return Trace(history.label, along, values)


# -- What is said ----------------------------------------------------------------------------------------------------


def headline(history: History) -> str:
    """How training went, in plain words."""
    count = int(number(history.summary, "nodes") or len(history.nodes))
    who = history.nodes[0].name if count == 1 and history.nodes else f"{count} nodes"
    if not history.rounds:
        return f"{who}: no round is recorded yet."
    rounds = "1 round" if history.rounds == 1 else f"{history.rounds} rounds"
    text = f"{who} trained {rounds} in {show_seconds(history.seconds)} without a server"
    if history.scores:
        score = history.scores[0]
        finals = history.finals(score)
        if finals:
            mean = show(score, math.fsum(finals) / len(finals))
            text += f"; {'the mean ' if len(finals) > 1 else ''}{score} on held-out rows is {mean}"
            if len(finals) > 1:
                text += f" (from {show(score, min(finals))} to {show(score, max(finals))})"
    text += "."
    gone = [_how_it_ended(history, name, why) for name, why in _by_end(history)]
    if gone:
        rest = f"; the other {count - len(gone)} " + ("finished." if history.summary else "went on.")
        text += f" {_some(gone)}" + (rest if count > len(gone) else ".")
    elif history.summary and count > 1:
        text += " All of them finished."
    if not history.summary:
        text += " There is no summary yet: the run goes on, or was cut off."
    return text


def _how_it_ended(history: History, name: str, why: str) -> str:
    verb = {"killed": "was killed", "died": "died", "left": "left"}.get(why, "did not finish")
    for node in history.nodes:
        if node.name == name and node.lines:
            done = _round(node.rounds[-1]) + 1
            when = show_seconds(max(0.0, _time(node.lines[-1]) - history.start))
            return f"{name} {verb} after {done} round{'' if done == 1 else 's'} ({when})"
    return f"{name} {verb} before its first round"


def personal(history: History) -> str:
    """What the nodes' personal models reach, and their mean beside them, in words; empty where all share everything."""
    score = history.scores[0] if history.scores else ""
    own, low, high = (number(history.summary, "personal", score, end) for end in ("mean", "min", "max"))
    mean = number(history.summary, "mean_model", score)
    if own is None or low is None or high is None or mean is None:
        return ""
    return (
        f"Of each node's model {history.shared} is averaged with its neighbours', and the rest stays its own. On their "
        f"own held-out rows the nodes' own models reach the {score} {show(score, own)} on average (from "
        f"{show(score, low)} to {show(score, high)}); the mean of all models, into which their own parts go as well, "
        f"reaches {show(score, mean)} on the same rows."
    )


def _facts(history: History) -> list[tuple[str, str]]:
    """The summary as (what, value)."""
    summary = history.summary
    facts = [("nodes", f"{int(number(summary, 'nodes') or len(history.nodes))}")]
    if summary:
        facts.append(("finished", _whole(number(summary, "finished"))))
    facts.append(("did not finish", _some([f"{name} ({why})" for name, why in _by_end(history)])))
    facts += [("rounds", str(history.rounds)), ("time", show_seconds(history.seconds))]
    for score in history.scores[:SCORES_SHOWN]:
        facts.append((f"{score}, mean over the nodes", _spread(score, history.finals(score))))
        whole = number(summary, "mean_model", score)
        if whole is not None:
            facts.append((f"{score} of the mean model", show(score, whole)))
    distance = number(summary, "consensus_distance")
    if distance is not None:
        facts.append(("distance to the mean model (root mean square)", f"{distance:.3g}"))
    if history.contraction is not None:
        found = history.contraction
        shares = (found["measured"], found["typical"], found["predicted"])
        measured, typical, worst = (NONE if share is None else f"{share:.3g}" for share in shares)
        facts.append(("one mixing leaves of the disagreement", f"{measured} (typical {typical}, lambda2 {worst})"))
    sent, received = (math.fsum(node.total("bytes", way) for node in history.nodes) for way in ("sent", "received"))
    facts += [("sent", show_bytes(sent)), ("received", show_bytes(received))]
    rejected = _rejected(history)
    facts.append(("refused", ", ".join(f"{code} × {times}" for code, times in rejected.items()) or "nothing"))
    epsilon, delta = number(summary, "epsilon", "max"), number(summary, "epsilon", "delta")
    if epsilon is not None:
        what = {"example": ", hides one row", "update": ", hides the whole node"}.get(_unit(history), "")
        facts.append((f"privacy ε{what}", f"{epsilon:.3g}" + ("" if delta is None else f" at δ = {delta:.1g}")))
    if history.damaged:
        facts.append(("unreadable lines", f"{history.damaged}, left out"))
    return facts


def _unit(history: History) -> str:
    """Whose presence the ε of this run hides: example or update; empty where nothing is accounted for."""
    units = {str(inside(line, "epsilon", "unit")) for node in history.nodes for line in node.rounds[-1:]}
    return next((unit for unit in HIDDEN if unit in units), "")


def _rejected(history: History) -> dict[str, int]:
    counted = {code: int(times) for code, times in _mapping(history.summary, "rejected").items() if is_number(times)}
    return counted or count_rejected([event for node in history.nodes for event in node.events])


def _spread(score: str, values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = show(score, math.fsum(values) / len(values))
    low, high = show(score, min(values)), show(score, max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{int(value)}"


def _node_table(history: History) -> tuple[list[str], list[list[str]]]:
    """One row a node, and one for each that failed before it wrote anything."""
    scores = history.scores[:SCORES_SHOWN]
    rows_known = any(_rows_trained_on(node) is not None for node in history.nodes)
    head = ["node", "state", "rounds", *(["rows"] if rows_known else [])]
    head += [f"{score}, {when}" for score in scores for when in ("local", "mixed")]
    head += ["sent", "received", "time", "updates missed", "it refused"]
    rows = []
    for node in history.nodes:
        row = [node.name, history.ended.get(node.name, "finished" if history.summary else "running")]
        row += [str(_round(node.rounds[-1]) + 1) if node.lines else "0"]
        row += [_whole(_rows_trained_on(node))] if rows_known else []
        for score in scores:
            for when in ("local", "mixed"):
                value = history.last(node, when, score)
                row.append(NONE if value is None else show(score, value))
        row += [show_bytes(node.total("bytes", "sent")), show_bytes(node.total("bytes", "received"))]
        row += [show_seconds(node.total("seconds", "total"))]
        row += [str(sum(len(words(line, "missing")) for line in node.lines))]
        row += [str(sum(count_rejected(node.events).values()))]
        rows.append(row)
    known = {node.name for node in history.nodes}
    rows += [[name, why, *[NONE] * (len(head) - 2)] for name, why in history.ended.items() if name not in known]
    return head, rows


def _rows_trained_on(node: NodeHistory) -> float | None:
    """How many rows the node said it has, in any of its events."""
    said = [number(event, "rows") for event in node.events]
    return next((rows for rows in reversed(said) if rows is not None), None)


def _graph_facts(history: History) -> list[tuple[str, str]]:
    """The fields of `p2pfl topology --json`, in words."""
    facts = []
    for key, value in history.graph.items():
        if isinstance(value, Mapping):
            shown = ", ".join(f"{name} {_value(item)}" for name, item in value.items())
        else:
            shown = _value(value)
        facts.append((key.replace("_", " "), shown))
    return facts


def _value(value: Json) -> str:
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(_value, value))
        case _:
            return str(value)


def _timeline(history: History, routine: bool) -> list[list[str]]:
    """Rows of (when, what, about whom, seen by, how often, details): what several nodes saw alike is one row."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for node in history.nodes:
        for event in node.events:
            kind = str(event["event"])
            if (kind in ROUTINE or event.get("reason") == "finished") == routine:
                about = str(event.get("peer") or node.name)
                groups.setdefault((kind, about, str(event.get("code", ""))), []).append({**event, "node": node.name})
    rows = []
    for (kind, about, _), events in sorted(groups.items(), key=lambda group: (min(map(_time, group[1])), group[0])):
        first = min(events, key=_time)
        after = _time(first) - history.start
        seen = sorted({str(event["node"]) for event in events})
        by = "itself" if seen == [about] else _some(seen)
        silent = ("t", "node", "event", "peer", "evidence")
        details = "; ".join(f"{key}: {_value(value)}"[:120] for key, value in first.items() if key not in silent)
        when = show_seconds(after) if after >= 0 else "before"
        rows.append([when, kind.replace("_", " "), about, by, str(len(events)), details[:300]])
    return rows


# -- The page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
@media print { :root { color-scheme: light; LIGHT } figure, tr { break-inside: avoid }
  .wide { overflow: visible } svg { min-width: 0 } table { font-size: .65rem } .numbers td { white-space: normal } }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--surface); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem } ul { margin: 0; max-width: 60rem }
.lead { font-size: 1.15rem; max-width: 46rem; margin: .5rem 0 1.5rem } .note, figcaption { color: var(--muted) }
figcaption, .note { font-size: .9rem; max-width: 60rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 40%), 1fr)); gap: .75rem 1.5rem;
  margin: 0 }
dt { color: var(--muted); font-size: .85rem }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
figure { margin: 2rem 0 } figure .wide { margin-left: -1rem } .wide { overflow-x: auto }
svg { display: block; width: 100%; min-width: 38rem; height: auto }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif !important }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100% }
th { color: var(--muted); font-weight: normal; text-align: left; vertical-align: bottom }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid) } .words td { overflow-wrap: anywhere }
.numbers :is(th, td):nth-child(n + 3) { text-align: right } .numbers td { white-space: nowrap }
tr.gone td { color: var(--alarm) } summary { cursor: pointer; color: var(--muted); margin: .75rem 0 }
pre { font-size: .8rem; overflow-x: auto; border: 1px solid var(--grid); padding: 1rem; border-radius: 4px }
"""


def write_report(runs: Sequence[Path], out: Path | None = None, png: Path | None = None) -> list[Path]:
    """Write one page about these runs, and their pictures as PNG files into the folder `png`; return what was written.

    The page is RUN/report.html for one run and ./report.html for several, unless `out` says otherwise. BadInput if a
    folder holds no run, or if a file cannot be written.
    """
    if not runs:
        raise BadInput("no run folder is given: name one or more")
    histories = [read_history(path, label) for path, label in zip(runs, labels(runs), strict=True)]
    compared = comparison(histories) if len(histories) > 1 else None
    drawn = [pictures(history) for history in histories]
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    page = _page(histories, drawn, compared)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, page)
        return [target, *(_write_pngs(png, histories, drawn, compared) if png is not None else [])]
    except OSError as error:
        raise BadInput(f"cannot write the report: {error}; choose another --out or --png") from None


def labels(runs: Sequence[Path]) -> list[str]:
    """A short name for each run, no two alike."""
    found: list[str] = []
    for path in map(Path.resolve, runs):
        label = path.name
        if len({other.resolve() for other in runs if other.resolve().name == label}) > 1:
            label = f"{path.parent.name}/{label}"
        count = 1 + sum(known.split(" #")[0] == label for known in found)
        found.append(label if count == 1 else f"{label} #{count}")
    return found


def _write_pngs(
    folder: Path, histories: Sequence[History], drawn: Sequence[Sequence[Picture]], compared: Picture | None
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    named = [(compared.name, compared.figure)] if compared else []
    for history, found in zip(histories, drawn, strict=True):
        prefix = re.sub(r"[^A-Za-z0-9._-]+", "-", history.label) + "-" if len(histories) > 1 else ""
        named += [(prefix + picture.name, picture.figure) for picture in found]
    for name, figure in named:
        plots.png(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name, _ in named]


def _page(histories: Sequence[History], drawn: Sequence[Sequence[Picture]], compared: Picture | None) -> str:
    if len(histories) == 1:
        title = f"p2pfl: {histories[0].label}"
        body = f"<h1>{_text(histories[0].label)}</h1>" + _run_html(histories[0], drawn[0], "run")
    else:
        title = f"p2pfl: {len(histories)} runs"
        body = f"<h1>{len(histories)} runs side by side</h1>"
        if compared:
            body += _picture_html(compared, "compare")
        else:
            body += '<p class="note">The runs share no score, so there is no picture that compares them.</p>'
        body += _compare_table(histories) + _compare_audits(histories)
        for number_, (history, found) in enumerate(zip(histories, drawn, strict=True)):
            body += f"<h2>{_text(history.label)}</h2>"
            body += f'<p class="note">{_text(headline(history))}</p>'
            body += _folded("everything about this run", _run_html(history, found, f"run{number_}"), opened=False)
    variables = [" ".join(f"--{role}: {pair[i]};" for role, pair in plots.THEME.items()) for i in (0, 1)]
    style = STYLE.replace("LIGHT", variables[0]).replace("DARK", variables[1])
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


def _run_html(history: History, found: Sequence[Picture], prefix: str) -> str:
    head, rows = _node_table(history)
    gone = [row[0] in history.ended for row in rows]
    notable, routine = _timeline(history, routine=False), _timeline(history, routine=True)
    columns = ["after", "event", "about", "seen by", "times", "details"]
    parts = [
        f'<p class="lead">{_text(headline(history))}</p>',
        _list(_facts(history)),
        *([f"<h2>Personal models</h2><p>{_text(personal(history))}</p>"] if personal(history) else []),
        *(_picture_html(picture, f"{prefix}-{index}") for index, picture in enumerate(found) if picture.name != AUDIT),
        *_audit_html(history, [picture for picture in found if picture.name == AUDIT], prefix),
        "<h2>Nodes</h2>",
        '<p class="note">local: the node\'s model before mixing; mixed: after it; both on its own held-out rows.</p>',
        _folded(f"{len(rows)} nodes", _table(head, rows, gone, "numbers"), opened=len(rows) <= ROWS_OPEN),
        *_exposure_html(history),
        *_disclosures_html(history),
        "<h2>Events</h2>",
        _table(columns, notable[:EVENTS_SHOWN]) if notable else '<p class="note">Nothing out of the ordinary.</p>',
        _folded(f"{len(routine)} routine events", _table(columns, routine[:EVENTS_SHOWN]), opened=False),
    ]
    if max(len(notable), len(routine)) > EVENTS_SHOWN:
        parts.append(f'<p class="note">The first {EVENTS_SHOWN} are shown; all stand in events.jsonl.</p>')
    if history.graph:
        parts += ["<h2>Graph</h2>", _list(_graph_facts(history))]
    if history.toml:
        parts += ["<h2>Experiment</h2>", _folded("experiment.toml", f"<pre>{_text(history.toml)}</pre>", opened=True)]
    ends = [_time(node.lines[-1]) for node in history.nodes if node.lines]
    if ends and 0 <= max(ends) < 32503680000:  # the year 3000
        last = datetime.fromtimestamp(max(ends), timezone.utc)
        parts.append(f'<p class="note">Last record: {last:%Y-%m-%d %H:%M:%S} UTC.</p>')
    return "\n".join(parts)


def _exposure_html(history: History) -> list[str]:
    """Who gets to know how much of whom, by their distance in the graph."""
    if history.exposure is None:
        return []
    lead, head, rows = in_words(history.exposure)
    return ["<h2>Who gets to know how much of whom</h2>", f"<p>{_text(lead)}</p>", _table(head, rows, kind="numbers")]


def _disclosures_html(history: History) -> list[str]:
    """What left each node, one page a node, folded away where there are several."""
    if not history.disclosures:
        return []
    parts = ["<h2>What left each node</h2>"]
    for disclosure in history.disclosures:
        said = "".join(
            f"<h3>{_text(heading)}</h3><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"
            for heading, lines in page(disclosure)
        )
        parts.append(_folded(disclosure.node, said, opened=len(history.disclosures) == 1))
    return parts


def _audit_html(history: History, found: Sequence[Picture], prefix: str) -> list[str]:
    """What attacks on this run have found; empty where there were none."""
    if not history.audit:
        return []
    return [
        f"<h2>{findings.TITLE}</h2>",
        *(f"<p>{_text(sentence)}</p>" for sentence in findings.sentences(history.audit)),
        *(_picture_html(picture, f"{prefix}-{AUDIT}") for picture in found),
        _table(findings.HEAD, findings.table({history.label: history.audit})),
        f'<p class="note">{_text(findings.METHOD)}</p>',
    ]


def _compare_audits(histories: Sequence[History]) -> str:
    """What attacks have found in several runs, side by side; empty with fewer than two."""
    founds = {history.label: history.audit for history in histories if history.audit}
    if len(founds) < 2:
        return ""
    figure = findings.picture(founds)
    drawn = "" if figure is None else _picture_html(Picture(AUDIT, figure, findings.CAPTION), f"compare-{AUDIT}")
    return f"<h2>{findings.TITLE}</h2>{drawn}{_table(findings.HEAD, findings.table(founds))}"


def _compare_table(histories: Sequence[History]) -> str:
    scores = list(dict.fromkeys(score for history in histories for score in history.scores))[:SCORES_SHOWN]
    head = ["run", "did not finish", "nodes", "rounds", "time", *scores, "sent by a node", "distance to the mean"]
    rows = []
    for history in histories:
        count = max(1, len(history.nodes))
        distance = number(history.summary, "consensus_distance")
        row = [history.label, _some(list(history.ended)), str(len(history.nodes)), str(history.rounds)]
        row += [show_seconds(history.seconds), *(_spread(score, history.finals(score)) for score in scores)]
        row += [show_bytes(math.fsum(node.total("bytes", "sent") for node in history.nodes) / count)]
        row += [NONE if distance is None else f"{distance:.3g}"]
        rows.append(row)
    return _table(head, rows, kind="numbers")


# -- HTML ------------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """The only door for text into the page."""
    return escape("\n".join(map(printable, text.split("\n"))))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], gone: Sequence[bool] = (), kind: str = "words") -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    lines = []
    for index, row in enumerate(rows):
        start = '<tr class="gone">' if index < len(gone) and gone[index] else "<tr>"
        lines.append(start + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wide"><table class="{kind}"><tr>{cells}</tr>{"".join(lines)}</table></div>'


def _list(facts: Sequence[tuple[str, str]]) -> str:
    return (
        "<dl>" + "".join(f"<div><dt>{_text(what)}</dt><dd>{_text(value)}</dd></div>" for what, value in facts) + "</dl>"
    )


def _folded(title: str, inner: str, *, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{_text(title)}</summary>{inner}</details>"


def _picture_html(picture: Picture, prefix: str) -> str:
    drawing = plots.svg(picture.figure, prefix)
    return f'<figure><div class="wide">{drawing}</div><figcaption>{_text(picture.caption)}</figcaption></figure>'
