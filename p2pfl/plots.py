"""Pictures of runs and graphs: plain data in, a matplotlib Figure out; `svg` and `png` make something to look at of it.

Nothing here reads a file or knows the run folder. Figures are laid out in inches and points with measured text, so that
no label is cut and none lies on another. Every text may come from a peer: it goes through `_plain`.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from p2pfl.messages import printable

Floats = NDArray[np.float64]
Colour = str | tuple[float, float, float, float]
Dash = str | tuple[float, tuple[float, float]]

# Each colour by its role: on white paper, on a dark screen. A figure is drawn with the first; `svg` replaces it by a
# CSS variable, so that one picture suits both. The series keep apart under the common colour blindnesses, and red is
# left out of them: it means that a node is gone.
THEME: Mapping[str, tuple[str, str]] = {
    "surface": ("#fefefe", "#14181d"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5f6872", "#9aa4af"),
    "quiet": ("#b3bbc5", "#56616d"),
    "grid": ("#e6e9ed", "#262c33"),
    "alarm": ("#c8102e", "#ff6b78"),
    "series-0": ("#0072b2", "#4ba3e3"),
    "series-1": ("#d98200", "#f2a93b"),
    "series-2": ("#009e73", "#2ec79a"),
    "series-3": ("#aa4499", "#dd8ace"),
    "series-4": ("#45a9de", "#a3d8f7"),
    "series-5": ("#7a4a20", "#c79a6b"),
    "series-6": ("#97961f", "#d3d163"),
    "series-7": ("#4b3fa8", "#9a91ee"),
}
DASHES: Sequence[Dash] = ("-", (0, (4, 2)), (0, (1, 1.2)))  # of the first curves, then the colours begin again
SURFACE, INK, MUTED, QUIET, GRID, ALARM, *SERIES = (light for light, _ in THEME.values())
SCALE = ("#f3e6a2", "#57a3a0", "#1f3b73")  # of values: light is least

WIDTH = 10.0  # inches, of every figure
PANEL_HEIGHT = 3.1  # inches, of a panel with curves
SQUARE = 3.9  # inches, of one whose two axes are alike
LEFT, GAP, BOTTOM, TOP, RIGHT = 0.9, 0.35, 0.6, 0.45, 0.3  # inches around and between the panels
TEXT, TITLE = 8.5, 12.0  # points
ROW = 13.0  # points from one line of small text to the next
POINTS = 72.0  # in an inch
AGREED = 1e-6  # an error that counts as none
VALUE_BYTES = 4  # of a float32
HANG, SLANT = 22.0, math.sin(math.pi / 4)  # points from a panel down to the names that hang there; what slant leaves
SMALL_MAP, LARGE_MAP = 4.2, 5.6  # inches, the height of a graph of few nodes and of many
SCORE_ROW = 0.42  # inches, of a row with a point for each place
KEY_WIDTH = 1.6  # inches at the right of a graph, for what its colours mean
STUB = 0.42  # of the step between two nodes: what is seen of an edge that comes back at the other side
LEAST_RADIUS = 0.8  # points, of a node
HEAD = 5.5  # points, the length of an arrow's head

COLOURED = 8  # curves that get a colour and a name; of more, only the mean and the extremes are named
NAMED_BARS = 40  # nodes that are named beside bars and in a graph
NAMED_IN_FULL = 20  # nodes of a graph whose names are written out; of more, only their numbers, if they have any
MAPS_SHOWN = 8  # graphs side by side
HEADED = 64  # nodes of a graph whose edges get arrow heads; among more they would only blacken it
MARKS_SHOWN = 6  # labelled events above a panel
CURVE_POINTS = 8000  # of all curves of a panel together: keeps a page of 200 nodes below 3 MB
DISTANCE_NODES, SPRING_NODES = 200, 1000  # up to which a layout takes less than 4 and 6 seconds
EDGES_AT_ONCE = 1000  # of one path: a path of 20,000 takes twice the time
SAMPLES = 4000  # points along the edges of a graph that its names keep away from
NAME_LENGTH, MARK_LENGTH = 22, 44  # characters that are shown of a name, and of a mark's label


@dataclass(frozen=True)
class Trace:
    """One curve: the value that one node, or one run, had at each point along one or several axes.

    All have one length, in order of time; a value may be NaN. `goes_on`: it did not end before the others.
    """

    name: str
    along: Mapping[str, Sequence[float]]  # label of the axis, with its unit → places on it
    values: Sequence[float]
    goes_on: bool = True


@dataclass(frozen=True)
class Mark:
    """Something that happened, shown on a node's curve at the `index`-th of its points."""

    name: str
    label: str  # "node-3 killed"
    index: int
    grave: bool = True  # the node is gone: red


@dataclass(frozen=True)
class Attack:
    """How well a guess of yes or no does, as shares of the yes that are found at evenly spaced shares of false alarms.

    All curves begin at no false alarm, and end where everything is taken for a yes.
    """

    name: str
    hits: Sequence[float]
    each: Sequence[Sequence[float]] = ()  # of its parts, drawn thinly
    most: Sequence[float] = ()  # what no attack can exceed …
    most_name: str = ""  # … and how that is called


# -- Curves ----------------------------------------------------------------------------------------------------------


def curves(traces: Sequence[Trace], marks: Sequence[Mark], score: str) -> Figure:
    """A score of every node, one panel for each axis of the traces, with their mean and the band from least to most."""
    last = _last_values(traces)
    title = f"{_capital(_plain(score))} after mixing"
    if len(last) > 1:
        low, high = show(score, min(last)), show(score, max(last))
        title += f": {show(score, float(np.mean(last)))} on average, "
        title += f"{low} to {high} over the nodes" if low != high else "the same on all nodes"
    elif last:
        title += f": {show(score, last[0])} at the end"
    return _curve_figure(traces, marks, title, _score_axis(score), score, mean=True)


def spent(traces: Sequence[Trace], unit: str) -> Figure:
    """What privacy has cost every node, up to and with each round; `unit`: example or update."""
    last = _last_values(traces)
    title = f"ε spent, {unit}-level" + (f": at most {max(last):.3g}" if last else "")
    return _curve_figure(traces, (), title, f"ε, {unit}-level", "epsilon", mean=False)


def compare(traces: Sequence[Trace], score: str) -> Figure:
    """The mean score of several runs, one panel for each axis of the traces."""
    known = [trace for trace in traces if _last_values([trace])]
    title = f"{_capital(_plain(score))} of {len(traces)} runs, mean over the nodes"
    if known:
        better = max if score == "accuracy" else min
        best = better(known, key=lambda trace: _last_values([trace])[0])
        word = "highest" if better is max else "lowest"
        title += f": {_plain(best.name)} ends {word} at {show(score, _last_values([best])[0])}"
    return _curve_figure(traces, (), title, _score_axis(score), score, mean=False)


def consensus(traces: Sequence[Trace], marks: Sequence[Mark], lambda2: float | None) -> Figure:
    """The nodes' distances to their neighbours on a log scale, and what pure mixing on this graph would do (dashed).

    `lambda2` is the second largest absolute eigenvalue of the mixing matrix: mixing alone shrinks the distance by
    that factor a round.
    """
    traces = [Trace(t.name, t.along, [v if v > 0 else math.nan for v in t.values], t.goes_on) for t in traces]
    title = "Distance between neighbours' models"
    predicted = None
    if traces:
        grid, mean, _, _ = _mean_and_band(traces, next(iter(traces[0].along)))
        known = np.flatnonzero(np.isfinite(mean))
        if len(known) > 1:
            first, last = known[0], known[-1]
            factor = float(mean[first] / mean[last])
            title += f": {show('', max(factor, 1 / factor))} times {'smaller' if factor >= 1 else 'larger'}"
            title += " at the end than at the start"
            if lambda2 is not None and 0 < lambda2 < 1:
                name = f"mixing alone: × {lambda2:.3g} a round"
                fall = mean[first] * lambda2 ** (grid[first:] - grid[first])
                predicted = Trace(name, {"round": grid[first:].tolist()}, fall.tolist())
    label = "L2 distance (log scale)"
    return _curve_figure(traces, marks, title, label, "consensus", mean=True, log=True, predicted=predicted)


def compare_topologies(curves: Mapping[str, tuple[Sequence[float], float]], parameters: int | None = None) -> Figure:
    """How fast mixing alone agrees on several topologies, against rounds and against what a node sends.

    `curves`: name → (the error that is left after 0, 1, 2 … rounds, relative to the start; the vectors that a node
    sends in a round, on average). With the number of `parameters`, float32 each, bytes are shown instead of vectors.
    A curve ends where it falls to AGREED, and its name hangs there, with the place on the axis. One that does not fall
    so far is named at the right, with the error that is left. All axes are logarithmic.
    """
    most = max([vectors * (len(left) - 1) for left, vectors in curves.values()], default=0.0)
    unit, scale = "vectors", 1.0
    if parameters is not None:
        unit, scale = _byte_unit(most * VALUE_BYTES * parameters)
        scale /= VALUE_BYTES * parameters
    labels = ["rounds", f"{unit} that a node has sent"]
    found = []
    for name, (left, vectors) in curves.items():
        rounds = range(len(left))
        along = {labels[0]: [float(t) for t in rounds], labels[1]: [t * vectors / scale for t in rounds]}
        found.append(_until_agreed(Trace(name, along, left)))
    late = [
        _Label(f"{_plain(trace.name)}  {trace.values[-1]:.2g}", trace.values[-1], *_style(i))
        for i, trace in enumerate(found)
        if trace.values[-1] > AGREED
    ]
    feet = {
        label: [
            _Label(f"{_plain(trace.name)}  {trace.along[label][-1]:.4g}", trace.along[label][-1], *_style(i))
            for i, trace in enumerate(found)
            if trace.values[-1] <= AGREED
        ]
        for label in labels
    }
    title = f"By mixing alone {len(feet[labels[0]])} of {len(curves)} topologies agree to {AGREED:.0e}"
    longest = max([_text_width(foot.text) for panel in feet.values() for foot in panel], default=0.0)
    hang = (HANG + SLANT * (longest + ROW)) / POINTS  # inches
    right = max(hang, _labels_width(late) / POINTS + 0.1)
    height = max(PANEL_HEIGHT, (len(late) + 1) * ROW / POINTS)
    figure = _figure(TOP + len(labels) * (BOTTOM + height + hang), title)
    for number, label in enumerate(labels):
        bottom = hang + (len(labels) - 1 - number) * (BOTTOM + height + hang)
        axes = _panel(figure, LEFT, bottom, WIDTH - LEFT - right, height)
        axes.set_xlabel(label)
        axes.set_ylabel("error, relative to the start")
        _draw_falling(axes, found, label)
        _draw_end_labels(axes, late)
        _draw_foot_labels(axes, feet[label])
    return figure


def attacks(panels: Mapping[str, Sequence[Attack]], title: str) -> Figure:
    """Receiver operating characteristics, one panel for each heading, side by side; the diagonal is guessing."""
    width = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    height = min(width, SQUARE)
    figure = _figure(TOP + ROW / POINTS + height + BOTTOM, _plain(title, len(title)))
    for number, (heading, found) in enumerate(panels.items()):
        axes = _panel(figure, LEFT + number * (width + GAP), BOTTOM, width, height)
        axes.set_title(heading, fontsize=TEXT, color=INK, loc="left")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("other rows that are taken for training rows (%)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        if number == 0:
            axes.set_ylabel("training rows that are recognised (%)")
        else:
            axes.tick_params(labelleft=False)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
        key = []
        for index, attack in enumerate(found):
            colour, dash = _style(index)
            for part in attack.each:
                axes.plot(np.linspace(0, 1, len(part)), part, color=QUIET, linewidth=0.8, zorder=3)
            alarms = np.linspace(0, 1, len(attack.hits))
            wide = 2.2 + 1.3 * (len(found) - 1 - index)  # so that of two that lie on each other both are seen
            axes.plot(alarms, attack.hits, color=colour, linestyle=dash, linewidth=wide, zorder=5)
            key.append((_plain(attack.name, MARK_LENGTH), colour))
            if attack.most:
                most = np.linspace(0, 1, len(attack.most))
                axes.plot(most, attack.most, color=colour, linewidth=1.4, linestyle=(0, (1, 1.2)), zorder=4)
                key.append((_plain(attack.most_name, MARK_LENGTH), colour))
        for row, (text, colour) in enumerate(reversed(key)):  # below the diagonal, where no curve of use runs
            place = (0.985, (0.5 + row) * ROW / (height * POINTS))
            axes.text(*place, text, transform=axes.transAxes, ha="right", va="bottom", color=colour, fontsize=TEXT)
    return figure


def _draw_falling(axes: Axes, traces: Sequence[Trace], label: str) -> None:
    """Curves down to AGREED. Their axis is above, for their names hang below; 0 has a place on it."""
    farthest = max([trace.along[label][-1] for trace in traces], default=0.0) or 1.0
    highest = max([value for trace in traces for value in trace.values if math.isfinite(value)], default=1.0)
    nearest = min([place for trace in traces for place in trace.along[label] if place > 0], default=1.0)
    axes.set_xscale("symlog", linthresh=nearest, linscale=0.3)
    axes.set_xlim(0, 1.05 * farthest)
    axes.set_xticks([0, *_log_ticks(nearest, farthest)], minor=False)
    axes.set_yscale("log")
    axes.set_ylim(AGREED, 1.5 * highest)
    axes.set_yticks(_log_ticks(AGREED, highest), minor=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    for index, trace in enumerate(traces):
        colour, dash = _style(index)
        places, last = trace.along[label], trace.values[-1]
        axes.plot(places, trace.values, color=colour, linestyle=dash, linewidth=1.6, zorder=3)
        if last > AGREED:  # on to the edge, where its name stands
            axes.plot([places[-1], 1.05 * farthest], [last, last], color=colour, linestyle=":", linewidth=0.8)


def _until_agreed(trace: Trace) -> Trace:
    """The curve down to AGREED or to its end, with as many points as an axis with a logarithmic scale shows."""
    end = next((i for i, value in enumerate(trace.values) if value <= AGREED), len(trace.values) - 1)
    steps = np.geomspace(1, max(end, 1), CURVE_POINTS // 20).astype(int).clip(max=end)
    kept = sorted({0, end, *steps.tolist()})
    values = [max(trace.values[i], AGREED) for i in kept]
    return Trace(trace.name, {label: [places[i] for i in kept] for label, places in trace.along.items()}, values)


def _curve_figure(
    traces: Sequence[Trace],
    marks: Sequence[Mark],
    title: str,
    y_label: str,
    score: str,
    *,
    mean: bool,
    log: bool = False,
    predicted: Trace | None = None,
) -> Figure:
    labels = list(traces[0].along) if traces else ["round"]
    coloured = len(traces) <= COLOURED or not mean
    ends = _end_labels(traces, score, coloured, mean)
    height = max(PANEL_HEIGHT, (len(ends) + 1) * ROW / POINTS)
    values = [v for trace in traces for v in trace.values if math.isfinite(v)]
    y_limits = _limits(values, 0.05, log)
    if score == "accuracy":
        y_limits = (max(y_limits[0], -0.02), min(y_limits[1], 1.02))
    if predicted is not None:
        foot = 1.5 * ROW / (height * POINTS)  # room below all curves, for the name of the falling line
        y_limits = (y_limits[0] / (y_limits[1] / y_limits[0]) ** foot, y_limits[1])
        if predicted.values[-1] > y_limits[0]:
            ends.append(_Label(predicted.name, predicted.values[-1], INK))
    right = _labels_width(ends) / POINTS + 0.1
    panel_width = (WIDTH - LEFT - right - GAP * (len(labels) - 1)) / len(labels)

    limits = [_limits([x for trace in traces for x in trace.along[label]]) for label in labels]
    placed = [
        _place_marks(traces, marks, label, limit, panel_width * POINTS)
        for label, limit in zip(labels, limits, strict=True)
    ]
    rows = max((spot.row + 1 for panel in placed for spot in panel), default=0)
    more = len(marks) - MARKS_SHOWN
    top = TOP + (rows + (more > 0)) * ROW / POINTS
    figure = _figure(top + height + BOTTOM, title)
    if more > 0:
        _small(figure, LEFT, TOP + 0.1, f"… and {more} more events, listed under Events")

    every = max(1, math.ceil(sum(len(trace.values) for trace in traces) / CURVE_POINTS))
    for number, (label, limit) in enumerate(zip(labels, limits, strict=True)):
        left = LEFT + number * (panel_width + GAP)
        axes = _panel(figure, left, BOTTOM, panel_width, height)
        axes.set_xlim(*limit)
        if log:
            axes.set_yscale("log")
            axes.set_yticks(_log_ticks(*y_limits), minor=False)
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set_ylim(*y_limits)
        axes.set_xlabel(label)
        if label == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if score == "accuracy":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        if number == 0:
            axes.set_ylabel(y_label)
            axes.yaxis.set_label_coords(
                0.25 / WIDTH, 0.5, transform=blended_transform_factory(figure.transFigure, axes.transAxes)
            )
        else:
            axes.tick_params(labelleft=False)
        for index, trace in enumerate(traces):
            _curve(axes, trace, label, index, every, coloured, 1.2 if mean or len(traces) > COLOURED else 2.0)
        if mean and len(traces) > 1:
            grid, middle, low, high = _mean_and_band(traces, label)
            axes.fill_between(grid, low, high, color=MUTED, alpha=0.16, linewidth=0, zorder=1)
            # below coloured curves, which would vanish behind it, and above grey ones
            axes.plot(grid, middle, color=INK, linewidth=3.0 if coloured else 2.4, zorder=2 if coloured else 5)
        if predicted is not None:
            _draw_predicted(axes, predicted)
        for spot in placed[number]:
            _draw_mark(axes, spot)
    if traces:
        _draw_end_labels(axes, ends)
    else:
        axes.text(0.5, 0.5, "no round is recorded", transform=axes.transAxes, ha="center", color=MUTED, fontsize=TEXT)
    return figure


def _curve(axes: Axes, trace: Trace, label: str, index: int, every: int, coloured: bool, width: float) -> None:
    colour, dash = _style(index) if coloured else (QUIET, "-")
    kept = sorted({*range(0, len(trace.values), every), *([len(trace.values) - 1] if trace.values else [])})
    x = [trace.along[label][i] for i in kept]
    y = [trace.values[i] for i in kept]
    axes.plot(
        x,
        y,
        color=colour if trace.goes_on or coloured else ALARM,
        linewidth=width if coloured else 0.7,
        linestyle=dash,
        marker="o" if len(x) == 1 else "",
        markersize=4,
        alpha=0.75 if trace.goes_on and not coloured else 1,
        zorder=2 if trace.goes_on and not coloured else 3,
    )


def _mean_and_band(traces: Sequence[Trace], label: str) -> tuple[Floats, Floats, Floats, Floats]:
    """(places, mean, least, most) of the curves; each counts from its first point to its last, or on if it goes on."""
    grid = np.unique(np.concatenate([np.asarray(trace.along[label], float) for trace in traces]))
    if len(grid) > CURVE_POINTS // 20:
        grid = grid[np.linspace(0, len(grid) - 1, CURVE_POINTS // 20).astype(int)]
    rows = []
    for trace in traces:
        x, y = np.asarray(trace.along[label], float), np.asarray(trace.values, float)
        if len(x):
            rows.append(np.interp(grid, x, y, left=math.nan, right=y[-1] if trace.goes_on else math.nan))
    table = np.ma.masked_invalid(np.array(rows).reshape(len(rows), len(grid)))
    parts = (table.mean(axis=0), table.min(axis=0), table.max(axis=0))
    mean, low, high = (np.asarray(np.ma.filled(part, math.nan), float) for part in parts)
    begun = grid >= np.median([trace.along[label][0] for trace in traces if trace.values] or [0.0])
    return grid[begun], mean[begun], low[begun], high[begun]  # a mean of the few that began first would mislead


@dataclass(frozen=True)
class _Label:
    """What is written at the end of a curve."""

    text: str
    place: float  # of the end, on the axis along which the labels lie
    colour: str
    dash: Dash = "-"
    bold: bool = False


def _style(index: int) -> tuple[str, Dash]:
    """The colour and the dash of one of several curves; 24 can be told apart."""
    return SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]


def _end_labels(traces: Sequence[Trace], score: str, coloured: bool, mean: bool) -> list[_Label]:
    """What is written at the right end of the curves that go on to the end."""
    last = [(_last_values([trace])[0], i, trace.name) for i, trace in enumerate(traces) if _last_values([trace])]
    labels = []
    if coloured:
        labels = [_Label(f"{_plain(name)}  {show(score, v)}", v, *_style(i)) for v, i, name in last]
    elif last:
        for word, (v, _, name) in (("highest", max(last)), ("lowest", min(last))):
            labels.append(_Label(f"{word}: {_plain(name)}  {show(score, v)}", v, MUTED))
    if mean and len(last) > 1:
        middle = float(np.mean([v for v, _, _ in last]))
        labels.append(_Label(f"mean  {show(score, middle)}", middle, INK, bold=True))
    return labels


def _beside(labels: Sequence[_Label]) -> float:
    """Points from a panel's right edge to its labels: many fan out, and show how their curves are dashed."""
    return 14.0 if len(labels) <= COLOURED + 1 else 40.0


def _labels_width(labels: Sequence[_Label]) -> float:
    """Points that labels take at the right of a panel."""
    return _beside(labels) + max([_text_width(label.text, label.bold) for label in labels], default=0.0)


def _draw_end_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Write the labels beside the right edge, each as near to its curve's end as the others allow."""
    if not labels:
        return
    width, height = _size(axes)
    at_end = axes.transData.transform([(axes.get_xlim()[1], label.place) for label in labels])
    wanted = np.clip(axes.transAxes.inverted().transform(at_end)[:, 1], 0, 1) * height
    beside = _beside(labels) / width
    turn = 0.75 if _beside(labels) < 20 else 0.4
    for label, start, y in zip(labels, wanted / height, apart(wanted, ROW, height) / height, strict=True):
        _draw_outside(axes, [1, 1 + turn * beside], [start, y], label.colour, 0.8)
        if turn < 0.5:
            _draw_outside(axes, [1 + turn * beside, 1 + 0.9 * beside], [y, y], label.colour, 1.4, label.dash)
        axes.text(
            1 + beside,
            y,
            label.text,
            transform=axes.transAxes,
            va="center",
            color=label.colour,
            fontsize=TEXT,
            fontweight="bold" if label.bold else "normal",
        )


def _draw_outside(axes: Axes, x: list[float], y: list[float], colour: str, width: float, dash: Dash = "-") -> None:
    """A line in units of the panel's sides, which may leave it."""
    axes.plot(x, y, transform=axes.transAxes, color=colour, linewidth=width, linestyle=dash, clip_on=False)


def _draw_foot_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Hang the labels below the panel at a slant, each as near to its curve's end as the others allow."""
    width, height = _size(axes)
    at_foot = axes.transData.transform([(label.place, axes.get_ylim()[0]) for label in labels]).reshape(-1, 2)
    wanted = np.clip(axes.transAxes.inverted().transform(at_foot)[:, 0], 0, 1) * width
    for label, start, x in zip(labels, wanted, apart(wanted, ROW / SLANT, width), strict=True):
        _draw_outside(axes, [start / width, x / width], [0, (2 - HANG) / height], label.colour, 1.2, label.dash)
        axes.text(
            x / width,
            -HANG / height,
            label.text,
            transform=axes.transAxes,
            rotation=-45,
            rotation_mode="anchor",
            va="center",
            color=label.colour,
            fontsize=TEXT,
        )


def apart(wanted: Sequence[float] | Floats, gap: float, top: float) -> Floats:
    """The places nearest to the wanted ones (least squares) that keep the order, lie `gap` apart and within 0 … top."""
    order = np.argsort(np.asarray(wanted, float), kind="stable")
    steps = gap * np.arange(len(order))
    groups: list[list[float]] = []  # pool adjacent violators: once the gaps are taken out, places may not fall
    for place in np.asarray(wanted, float)[order] - steps:
        groups.append([float(place)])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    pooled = np.concatenate([np.full(len(group), np.mean(group)) for group in groups] or [np.zeros(0)])
    placed = np.empty(len(order))
    placed[order] = np.clip(pooled, 0, max(0.0, top - gap * (len(order) - 1))) + steps
    return placed


@dataclass(frozen=True)
class _Spot:
    """Where a mark goes: its point on the curve, and its text above the panel."""

    text: str
    colour: str
    x: float
    y: float
    start: float  # points from the panel's left edge to the text
    row: int  # of text, counted from the panel upwards


def _place_marks(
    traces: Sequence[Trace], marks: Sequence[Mark], label: str, limits: tuple[float, float], width: float
) -> list[_Spot]:
    """A place for each of the first marks such that no text lies on another, nor on the line of another mark."""
    by_name = {trace.name: trace for trace in traces if trace.values}
    low, high = limits
    rightward: list[tuple[float, Mark]] = []
    leftward: list[tuple[float, Mark]] = []
    for mark in [mark for mark in marks if mark.name in by_name][:MARKS_SHOWN]:
        at = (by_name[mark.name].along[label][mark.index] - low) / (high - low) * width
        # the text stands to the right of its line where it fits there
        fits = at + 3 + _text_width(_plain(mark.label, MARK_LENGTH)) <= width
        (rightward if fits else leftward).append((at, mark))
    spots: list[_Spot] = []
    taken: list[tuple[float, float, float, int]] = []  # (line, text from, text to, row), in points
    # From the right to the left: each text then passes above the lines of those that it would cross.
    for at, mark in [*sorted(rightward, key=_first, reverse=True), *sorted(leftward, key=_first)]:
        text = _plain(mark.label, MARK_LENGTH)
        long = _text_width(text)
        start = at + 3 if (at, mark) in rightward else max(0.0, at - 3 - long)
        below = [row for line, a, b, row in taken if (a < start + long + 6 and start < b + 6) or start < line < b]
        row = max(below, default=-1) + 1
        taken.append((at, start, start + long, row))
        trace = by_name[mark.name]
        x, y = trace.along[label][mark.index], trace.values[mark.index]
        spots.append(_Spot(text, ALARM if mark.grave else MUTED, x, y, start, row))
    return spots


def _first(pair: tuple[float, Mark]) -> float:
    return pair[0]


def _draw_mark(axes: Axes, spot: _Spot) -> None:
    colour = spot.colour
    width, height = _size(axes)
    foot = 1 + (4 + spot.row * ROW) / height
    across = blended_transform_factory(axes.transData, axes.transAxes)
    bottom = 0.0
    if math.isfinite(spot.y):
        shape = "X" if colour == ALARM else "v"
        axes.plot([spot.x], [spot.y], marker=shape, markersize=6.5, color=colour, mec=SURFACE, mew=0.8, zorder=7)
        bottom = axes.transAxes.inverted().transform(axes.transData.transform((spot.x, spot.y)))[1]
    top = foot + TEXT / height
    axes.plot([spot.x] * 2, [bottom, top], transform=across, color=colour, linewidth=0.7, alpha=0.6, clip_on=False)
    axes.text(spot.start / width, foot, spot.text, transform=axes.transAxes, va="bottom", color=colour, fontsize=TEXT)


def _draw_predicted(axes: Axes, line: Trace) -> None:
    """The dashed line of pure mixing. Where it leaves the panel, its name stands at the foot, below all curves."""
    x, y = np.asarray(line.along["round"], float), np.asarray(line.values, float)
    axes.plot(x, y, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=4)
    low, high = axes.get_ylim()
    if y[-1] > low:
        return
    foot = low * (high / low) ** (1.3 * ROW / _size(axes)[1])
    leaves_foot, reaches_foot = (float(np.interp(-math.log(v), -np.log(y), x)) for v in (low, foot))
    across = blended_transform_factory(axes.transData, axes.transAxes)
    right = axes.transData.transform((leaves_foot, low))[0] < axes.transAxes.transform((0.5, 0))[0]
    axes.annotate(
        line.name,
        (leaves_foot if right else reaches_foot, 0),
        (6 if right else -6, 4),
        xycoords=across,
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=TEXT,
        color=INK,
    )


# -- Bars ------------------------------------------------------------------------------------------------------------


def bytes_figure(sent: Mapping[str, float], received: Mapping[str, float], rounds: int) -> Figure:
    """What each node sent (to the right) and received (to the left), in bytes over the whole run."""
    names = _bar_order(list(sent), sent)
    unit, scale = _byte_unit(max([*sent.values(), *received.values()], default=0.0))
    title = "Bytes sent and received"
    if names:
        each = sum(sent.values()) / len(names)
        title = f"A node sent {show_bytes(each)} on average"
        title += f", {show_bytes(each / rounds)} a round" if rounds > 1 else ""
    figure, axes = _bar_figure(names, title, TOP + ROW / POINTS)
    none = np.zeros(len(names))
    _bars(axes, none, np.array([sent[n] / scale for n in names]), SERIES[0])
    _bars(axes, none, np.array([-received.get(n, 0.0) / scale for n in names]), SERIES[1])
    axes.axvline(0, color=INK, linewidth=0.8)
    reach = max([*sent.values(), *received.values()], default=0.0) / scale or 1.0
    axes.set_xlim(-1.05 * reach, 1.05 * reach)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    axes.set_xlabel(unit)
    above = blended_transform_factory(axes.transData, axes.transAxes)
    lift = 1 + 5 / _size(axes)[1]
    for x, side, text, colour in ((-0.02, "right", "← received", SERIES[1]), (0.02, "left", "sent →", SERIES[0])):
        axes.text(x * reach, lift, text, transform=above, ha=side, va="bottom", color=colour, fontsize=TEXT)
    return figure


def rows_of_scores(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], score: str, title: str
) -> Figure:
    """A score of several methods in several places: panel → row → place → (mean, standard deviation).

    One row a method, one coloured point a place, with a line as long as one standard deviation to either side.
    """
    rows = list(dict.fromkeys(row for panel in panels.values() for row in panel))
    places = list(dict.fromkeys(place for panel in panels.values() for row in panel.values() for place in row))
    names = max([_text_width(_plain(row)) for row in rows], default=0.0) / POINTS + 0.3
    height = (len(rows) + 1) * SCORE_ROW
    figure = _figure(TOP + 2 * ROW / POINTS + height + BOTTOM, title)
    width = (WIDTH - names - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    scale = 100.0 if score == "accuracy" else 1.0
    spots = [spot for panel in panels.values() for row in panel.values() for spot in row.values()]
    values = [scale * (mean + side * deviation) for mean, deviation in spots for side in (-1, 1)]
    for number, (name, panel) in enumerate(panels.items()):
        axes = _panel(figure, names + number * (width + GAP), BOTTOM, width, height)
        axes.set_yticks(range(len(rows)), [_plain(row) if number == 0 else "" for row in rows])
        axes.set_ylim(len(rows) - 0.3, -0.7)
        axes.set_xlim(*_limits(values, 0.05))
        axes.set_xlabel(_score_axis(score))
        for index, place in enumerate(places):
            lift = 0.16 * (index - (len(places) - 1) / 2)
            for y, row in enumerate(rows):
                if place in panel.get(row, {}):
                    mean, deviation = (scale * value for value in panel[row][place])
                    axes.plot([mean - deviation, mean + deviation], [y + lift] * 2, color=SERIES[index], linewidth=1.2)
                    axes.plot([mean], [y + lift], color=SERIES[index], marker="o", markersize=4.5)
        lift = 1 + (ROW + 5) / _size(axes)[1]
        axes.text(0, lift, _plain(name), transform=axes.transAxes, fontsize=TEXT, color=INK, fontweight="bold")
        key = 0.0
        for index, place in enumerate(places):
            _key(axes, key, SERIES[index], _plain(place))
            key += _text_width(_plain(place)) + 24
    return figure


TIME_PARTS: Mapping[str, str] = {
    "train": SERIES[0],
    "wait": SERIES[1],
    "mix": SERIES[2],
    "evaluate": SERIES[3],
    "other": QUIET,
}


def time_split(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Where each node's time went: node → part of `TIME_PARTS` → seconds a round, mean over its rounds."""
    totals = {name: sum(parts.get(part, 0.0) for part in TIME_PARTS) for name, parts in seconds.items()}
    names = _bar_order(list(seconds), totals)
    whole = sum(totals.values())
    title = "Where the time of a round goes"
    if whole > 0:
        share = {part: sum(seconds[n].get(part, 0.0) for n in names) / whole for part in TIME_PARTS}
        title = f"A round takes {show_seconds(whole / len(names))} on average: {100 * share['train']:.0f} % training, "
        title += f"{100 * share['wait']:.0f} % waiting for neighbours"
    figure, axes = _bar_figure(names, title, TOP + ROW / POINTS)
    unit, scale = ("milliseconds", 1e-3) if max(totals.values(), default=0.0) < 1 else ("seconds", 1.0)
    left = np.zeros(len(names))
    key = 0.0
    for part, colour in TIME_PARTS.items():
        width = np.array([seconds[name].get(part, 0.0) / scale for name in names])
        _bars(axes, left, width, colour)
        left += width
        _key(axes, key, colour, part)
        key += _text_width(part) + 26
    axes.set_xlim(0, 1.03 * max(totals.values(), default=0.0) / scale or 1.0)
    axes.set_xlabel(f"{unit} a round, mean over the rounds")
    return figure


def _key(axes: Axes, offset: float, colour: str, text: str) -> None:
    """One entry of the row of keys above the panel, `offset` points from its left edge."""
    width, height = _size(axes)
    y = 1 + (5 + TEXT / 2) / height
    x = offset / width
    axes.plot([x + 4 / width], [y], transform=axes.transAxes, marker="s", markersize=7, color=colour, clip_on=False)
    axes.text(x + 12 / width, y, text, transform=axes.transAxes, va="center_baseline", fontsize=TEXT, color=INK)


def _bars(axes: Axes, left: Floats, width: Floats, colour: str) -> None:
    """One bar a node from the bottom upwards; many are one shape with steps, for thin bars side by side would moiré."""
    places = np.arange(len(width))
    if len(width) <= NAMED_BARS:
        axes.barh(places, width, 0.7, left, color=colour, linewidth=0)
    else:
        edges = np.append(places, len(places)) - 0.5
        begin, end = (np.append(side, side[-1]) for side in (left, left + width))
        axes.fill_betweenx(edges, begin, end, step="post", color=colour, linewidth=0)


def _bar_order(names: list[str], values: Mapping[str, float]) -> list[str]:
    """From the bottom of the figure upwards: by name where names are shown, by value where they are not."""
    if len(names) <= NAMED_BARS:
        return sorted(names, reverse=True)
    return sorted(names, key=lambda name: (values[name], name))


def _bar_figure(names: Sequence[str], title: str, top: float) -> tuple[Figure, Axes]:
    named = len(names) <= NAMED_BARS
    height = max((0.24 if len(names) <= 16 else 0.19) * len(names), 0.5) if named else 3.0  # inches
    left = max([_text_width(_plain(name)) for name in names] or [0.0]) / POINTS + 0.35 if named else LEFT
    figure = _figure(top + height + BOTTOM, title)
    axes = _panel(figure, left, BOTTOM, WIDTH - left - RIGHT, height)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, max(len(names), 1) - 0.4)
    if named:
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        axes.tick_params(axis="y", labelcolor=INK)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(names)} nodes, most at the top")
    return figure, axes


# -- The graph -------------------------------------------------------------------------------------------------------


def graph(
    nodes: Sequence[str],
    edges: Sequence[tuple[str, str]],
    *,
    name: str,
    ended: Mapping[str, str],
    scores: Mapping[str, float],
    score: str,
    parts: Mapping[str, str] | None = None,
    directed: bool = False,
) -> Figure:
    """Who averages with whom; the edges of a `directed` graph are the way that vectors travel.

    Colour: the final score where each node has one, else its part where each has one, else how many it hears if that
    differs. `ended` holds the nodes that did not finish, with the word for why ("killed"): they are hollow, dashed and
    red. Up to NAMED_BARS nodes are named, but for names that would lie on something else wherever they stood.
    """
    links = _links(nodes, edges, directed)
    title = f"{_capital(_plain(name))}: {_count(len(nodes), 'node')}, "
    title += _count(len(links), "one-way link" if directed else "link")
    if ended:
        shown = ", ".join(f"{_plain(n)} {_plain(why)}" for n, why in sorted(ended.items())[:3])
        title += f"; {shown}" + (f" and {len(ended) - 3} more" if len(ended) > 3 else "")
    layout = _layout(len(nodes), links)
    if layout.wraps:
        title += "; open ends go on at the other side"
    height = LARGE_MAP if len(nodes) > COLOURED else SMALL_MAP
    figure = _figure(TOP + height, title)
    axes = _map_axes(figure, (0, 0, WIDTH - KEY_WIDTH, height))
    ends = [ended.get(n) for n in nodes]
    named = [_plain(name) for name in nodes] if len(nodes) <= NAMED_IN_FULL else _short_names(nodes)
    texts = [text + (f" ({_plain(why)})" if why else "") for text, why in zip(named, ends, strict=True)]
    gone = np.array([why is not None for why in ends], bool)
    colours = _node_colours(figure, nodes, links, gone, scores, score, parts or {}, directed)
    _draw_map(axes, layout, links, colours, gone, texts if len(nodes) <= NAMED_BARS else [], directed)
    return figure


def topology(rounds: Sequence[nx.Graph], name: str, period: int | None = 1) -> Figure:
    """A topology before it runs: its one graph, or the graphs of its first rounds side by side, nodes in one place.

    `rounds` are those to show, at most MAPS_SHOWN; all have the same nodes. `period`: the rounds after which the
    graphs repeat; None where each is drawn anew. A node attribute "part" gives the colours.
    """
    first = rounds[0]
    nodes = [str(node) for node in first]
    found = {str(node): str(part) for node, part in first.nodes(data="part") if part is not None}
    if period == 1:
        return graph(
            nodes,
            [(str(a), str(b)) for a, b in first.edges],
            name=name,
            ended={},
            scores={},
            score="",
            parts=found,
            directed=first.is_directed(),
        )
    links = [_links(nodes, [(str(a), str(b)) for a, b in shown.edges], shown.is_directed()) for shown in rounds]
    links = links[:MAPS_SHOWN]
    title = f"{_capital(_plain(name))}: {_count(len(nodes), 'node')}, "
    if period is None:
        title += f"drawn anew for every round, {len(links)} of them shown"
    else:
        title += f"repeats after {period} rounds" + (f", the first {len(links)} shown" if period > len(links) else "")
    columns = len(links) if len(links) <= 4 else math.ceil(len(links) / 2)
    rows = math.ceil(len(links) / columns)
    key = KEY_WIDTH if len(found) == len(nodes) else 0.0
    width = (WIDTH - key) / columns
    height = min(width, SMALL_MAP) + ROW / POINTS
    figure = _figure(TOP + rows * height, title)
    gone = np.zeros(len(nodes), bool)
    short = _short_names(nodes)
    fit = len(nodes) <= NAMED_IN_FULL and max(map(_text_width, short)) < 0.15 * width * POINTS
    layout = _circle(len(nodes))  # where no edge passes through a third node
    colours = _node_colours(figure, nodes, [], gone, {}, "", found, first.is_directed())
    for index, shown in enumerate(links):
        row, column = divmod(index, columns)
        place = (column * width, (rows - 1 - row) * height, width, height - ROW / POINTS)
        axes = _map_axes(figure, place)
        axes.set_title(f"round {index + 1}", fontsize=TEXT, color=MUTED, pad=2)
        _draw_map(axes, layout, shown, colours, gone, short if fit else [], first.is_directed())
    return figure


def _links(nodes: Sequence[str], edges: Sequence[tuple[str, str]], directed: bool) -> list[tuple[int, int]]:
    """The edges as pairs of numbers in the order of the nodes, each once; of an undirected graph the lower first."""
    index = {name: i for i, name in enumerate(nodes)}
    pairs = [(index[a], index[b]) for a, b in edges]
    return sorted({(a, b) if directed or a < b else (b, a) for a, b in pairs})


def _short_names(nodes: Sequence[str]) -> list[str]:
    """The names without what they all begin with, if numbers are left: 3 for node-3."""
    split = [re.fullmatch(r"(.*?)(\d+)", name) for name in nodes]
    if None not in split and len({found[1] for found in split if found}) == 1:
        return [found[2] for found in split if found]
    return [_plain(name) for name in nodes]


def _map_axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes without a frame, whose units are points, at this (left, bottom, width, height) in inches."""
    left, bottom, width, height = place
    whole = figure.get_figheight()
    axes = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
    axes.axis("off")
    axes.set_xlim(0, width * POINTS)
    axes.set_ylim(0, height * POINTS)
    return axes


# Where nodes lie ....................................................................................................


@dataclass(frozen=True)
class _Layout:
    """The places of the nodes, in any unit, one row a node: a pure function of the graph."""

    places: Floats
    stretch: float = 1.5  # how much wider than high it may be drawn
    wraps: Mapping[tuple[int, int], int] = field(default_factory=dict)  # edges that leave at one side and come back at
    # the other → the steps from side to side


def _layout(count: int, links: Sequence[tuple[int, int]]) -> _Layout:
    """A form in which the graph is recognised: its own, where the numbering shows it, or one that follows distances."""
    both = {*links, *((b, a) for a, b in links)}
    shifted = {((a + 1) % count, (b + 1) % count) for a, b in both}
    around = all((b - a) % count in (1, count - 1) for a, b in both)  # ring and path
    dense = len(both) > 0.6 * count * (count - 1)
    if count < 3 or count > SPRING_NODES or not both or around or dense or shifted == both:
        return _circle(count)
    network = nx.empty_graph(count)
    network.add_edges_from(links)
    connected = nx.is_connected(network)
    lattice = _lattice(count, both)
    if lattice is not None:
        return lattice
    if connected and len(both) == 2 * (count - 1):
        return _tree(network)
    if connected and count <= DISTANCE_NODES:
        placed = nx.kamada_kawai_layout(network, pos=_cube(count, both))  # distances there follow distances here
    else:
        placed = nx.spring_layout(network, seed=0)
    return _Layout(np.array([placed[node] for node in range(count)], float))


def _circle(count: int) -> _Layout:
    """Clockwise from the top."""
    turn = math.pi / 2 - 2 * math.pi * np.arange(count) / max(count, 1)
    return _Layout(np.stack([np.cos(turn), np.sin(turn)], axis=1), stretch=1.0)


def _lattice(count: int, both: Set[tuple[int, int]]) -> _Layout | None:
    """Rows and columns, for a grid or a torus that is numbered row by row."""
    for columns in (c for c in range(2, count // 2 + 1) if count % c == 0):
        rows = count // columns
        wraps: dict[tuple[int, int], int] = {}
        for a, b in both:
            down, right = abs(a // columns - b // columns), abs(a % columns - b % columns)
            step, side = max(down, right), rows if down else columns
            if (down and right) or step not in (1, side - 1):
                break
            if step > 1:
                wraps[a, b] = step
        else:
            if len(both) - len(wraps) < 2 * (rows * (columns - 1) + columns * (rows - 1)):
                continue  # neighbours are not joined
            row, column = np.divmod(np.arange(count, dtype=float), columns)
            across, down_by = (column, row) if columns >= rows else (row, column)  # the long side lies
            return _Layout(np.stack([across, -down_by], axis=1), wraps=wraps)
    return None


def _cube(count: int, both: Set[tuple[int, int]]) -> dict[int, tuple[float, float]] | None:
    """The shadow of a hypercube, as a place to start from; its numbering in binary is where the corners lie."""
    dimensions = count.bit_length() - 1
    if len(both) != count * dimensions or any((a ^ b).bit_count() != 1 for a, b in both):
        return None
    turn = math.pi * (np.arange(dimensions) + 0.5) / dimensions
    sides = np.stack([np.cos(turn), np.sin(turn)], axis=1) * (1 + 0.02 * np.arange(dimensions))[:, None]
    corners = np.array([[number >> bit & 1 for bit in range(dimensions)] for number in range(count)])
    return {number: (float(x), float(y)) for number, (x, y) in enumerate(corners @ sides)}


def _tree(network: nx.Graph) -> _Layout:
    """Circles around the middle of the tree; every branch has a sector that is as wide as it has leaves."""
    root = min(nx.center(network), key=lambda node: (-network.degree(node), node))
    children: dict[int, list[int]] = {node: [] for node in network}
    for parent, child in nx.bfs_edges(network, root, sort_neighbors=sorted):
        children[parent].append(child)
    leaves: dict[int, int] = {}
    for node in nx.dfs_postorder_nodes(network, root):
        leaves[node] = sum(leaves[child] for child in children[node]) or 1
    places = np.zeros((len(network), 2))
    sectors = [(root, 0, 0.0, float(leaves[root]))]
    while sectors:
        node, depth, begin, end = sectors.pop()
        turn = math.pi / 2 - math.pi * (begin + end) / leaves[root]
        places[node] = depth * math.cos(turn), depth * math.sin(turn)
        for child in children[node]:
            sectors.append((child, depth + 1, begin, begin + leaves[child]))
            begin += leaves[child]
    return _Layout(places, stretch=1.3)


def _fit(layout: _Layout, box: Floats, margin: float) -> Floats:
    """Scale and move the places into the box, `margin` points from its edges."""
    places = layout.places
    if len(places) == 0:
        return places
    stub = STUB if layout.wraps else 0.0
    low, high = places.min(axis=0) - stub, places.max(axis=0) + stub
    room = np.maximum(box - 2 * margin, 1.0)
    scale = room / np.maximum(high - low, 1e-9)
    if float(scale.min()) > 1e6:  # a single place
        scale = np.zeros(2)
    least = float(scale.min())
    fitted: Floats = box / 2 + (places - (low + high) / 2) * np.minimum(scale, [layout.stretch * least, least])
    return fitted


# What is drawn ......................................................................................................


def _draw_map(
    axes: Axes,
    layout: _Layout,
    links: Sequence[tuple[int, int]],
    colours: Sequence[Colour],
    gone: NDArray[np.bool_],
    texts: Sequence[str],
    directed: bool,
) -> None:
    """Edges, nodes and, where there are `texts`, names."""
    box, count = np.array(_size(axes)), len(colours)
    radius = float(np.clip(60 / math.sqrt(max(count, 1)) * box.min() / (LARGE_MAP * POINTS), 4, 11))
    room = 6 + ROW + 0.6 * max(map(_text_width, texts)) if texts else 8.0
    places = _fit(layout, box, radius + room)
    radius = min(radius, _room_for_nodes(places))
    live: list[tuple[Floats, Floats]] = []
    broken: list[tuple[Floats, Floats]] = []
    heads: list[Floats] = []
    for a, b in links:
        start, end = places[a], places[b]
        way = (end - start) / max(float(np.hypot(*(end - start))), 1e-9)
        lines = [(start, end)]
        if (a, b) in layout.wraps:  # two stubs, away from each other
            stub = (end - start) / layout.wraps[a, b] * STUB
            lines, way = [(start, start - stub), (end, end + stub)], -way
        (broken if gone[a] or gone[b] else live).extend(lines)
        side, foot = np.array([-way[1], way[0]]), end - way * (radius + HEAD)
        heads.append(np.array([end - way * radius, foot + 0.4 * HEAD * side, foot - 0.4 * HEAD * side]))
    weight = 1.3 if len(links) <= 100 else 0.6 if len(links) <= 1000 else 0.25
    # Paths with gaps rather than a line an edge: 20,000 edges stay below 1 MB of SVG.
    for segments, colour, style in ((live, QUIET, "-"), (broken, ALARM, (0, (3, 3)))):
        for begin in range(0, len(segments), EDGES_AT_ONCE):
            some = segments[begin : begin + EDGES_AT_ONCE]
            path = np.array([(a, b, (math.nan, math.nan)) for a, b in some]).reshape(-1, 2)
            axes.plot(path[:, 0], path[:, 1], color=colour, linewidth=weight, linestyle=style, zorder=1)
    if directed and count <= HEADED:
        axes.add_collection(PolyCollection(heads, facecolors=MUTED, edgecolors="none", zorder=2))
    area, rim = (2 * radius) ** 2, 0.7 if radius > 3 else 0.3
    if not gone.all():
        x, y = places[~gone].T
        filled = [colour for colour, end in zip(colours, gone, strict=True) if not end]
        axes.scatter(x, y, area, filled, edgecolors=INK, linewidths=rim, zorder=3)
    if gone.any():
        x, y = places[gone].T
        axes.scatter(x, y, area, SURFACE, edgecolors=ALARM, linewidths=1.4, linestyles="dashed", zorder=3)
    sizes = np.array([(_text_width(text) + 4, ROW) for text in texts]).reshape(-1, 2)
    order = np.argsort(~gone, kind="stable") if texts else np.arange(0)  # who is gone chooses first
    centres = _place_labels(places[order], sizes[order], [*live, *broken], radius, box)
    for index, centre in zip(order, centres, strict=True):
        if centre is None:
            continue
        backing = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        colour, (x, y) = ALARM if gone[index] else INK, centre
        axes.text(x, y, texts[index], ha="center", va="center", fontsize=TEXT, color=colour, bbox=backing, zorder=4)


def _room_for_nodes(places: Floats) -> float:
    """A radius that leaves something to see of the edge between two neighbours; the closest few may touch."""
    if len(places) < 2:
        return math.inf
    if len(places) > SPRING_NODES:
        return LEAST_RADIUS
    gaps = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    np.fill_diagonal(gaps, math.inf)
    return max(LEAST_RADIUS, 0.3 * float(np.quantile(gaps.min(axis=1), 0.02)))


def _node_colours(
    figure: Figure,
    nodes: Sequence[str],
    links: Sequence[tuple[int, int]],
    gone: NDArray[np.bool_],
    scores: Mapping[str, float],
    score: str,
    parts: Mapping[str, str],
    directed: bool,
) -> list[Colour]:
    """The colour of each node, after drawing at the right edge what it means."""
    height = figure.get_figheight() - TOP
    live = [i for i, end in enumerate(gone) if not end]
    meaning, values = score, [scores.get(name, math.nan) for name in nodes]
    if not live or any(math.isnan(values[i]) for i in live):
        if parts and all(name in parts for name in nodes):
            return _part_colours(_map_axes(figure, (WIDTH - KEY_WIDTH, 0, KEY_WIDTH, height)), nodes, parts)
        heard = Counter(b for _, b in links) if directed else Counter(i for link in links for i in link)
        meaning = "hears from" if directed else "number of neighbours"
        values = [float(heard[i]) for i in range(len(nodes))]
    span = (min(values[i] for i in live), max(values[i] for i in live)) if live else (0.0, 0.0)
    if span[1] - span[0] <= 1e-9:  # equal values need no scale: it would show differences that are not there
        return [SERIES[0]] * len(nodes)
    scale = ScalarMappable(Normalize(*span), LinearSegmentedColormap.from_list("p2pfl", SCALE))
    left, whole = WIDTH - KEY_WIDTH + 0.1, figure.get_figheight()
    bar = figure.add_axes((left / WIDTH, 0.25 * height / whole, 0.13 / WIDTH, 0.5 * height / whole))
    key = figure.colorbar(scale, cax=bar)
    key.outline.set_visible(False)
    bar.tick_params(labelsize=TEXT, colors=MUTED, length=0)
    accuracy = meaning == "accuracy"
    if meaning != score:
        bar.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    elif accuracy:
        bar.yaxis.set_major_locator(MaxNLocator(5))
        bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
    title = _plain(meaning) + (", %" if accuracy else "")
    bar.set_title(title, fontsize=TEXT, color=MUTED, loc="left", pad=8)
    return [(r, g, b, a) for r, g, b, a in scale.to_rgba(np.array(values)).tolist()]


def _part_colours(axes: Axes, nodes: Sequence[str], parts: Mapping[str, str]) -> list[Colour]:
    """A colour for each part, and a key of them; of more parts than colours the key says only how many there are."""
    names = list(dict.fromkeys(parts[name] for name in nodes))
    colour = {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}
    height = _size(axes)[1]
    shown = names if len(names) <= len(SERIES) else []
    top = height / 2 + (len(shown) + 1) * ROW / 2
    title = "part" if shown else f"{len(names)} parts"
    axes.text(4, top, title, fontsize=TEXT, color=MUTED, va="center")
    for row, name in enumerate(shown, start=1):
        axes.plot([8], [top - 1.1 * row * ROW], marker="o", markersize=7, color=colour[name], mec=INK, mew=0.7)
        axes.text(17, top - 1.1 * row * ROW, _plain(name, 16), fontsize=TEXT, color=INK, va="center")
    return [colour[parts[name]] for name in nodes]


def _place_labels(
    places: Floats, sizes: Floats, segments: Sequence[tuple[Floats, Floats]], radius: float, box: Floats
) -> list[Floats | None]:
    """The centre of each node's label: of the places around the node the one that covers least of anything else.

    None for a label that would cover a node or one of the labels before it, or be cut, wherever it stands.
    """
    steps = np.linspace(0, 1, int(np.clip(SAMPLES / max(len(segments), 1), 3, 40)))[:, None]
    along = np.concatenate([a + steps * (b - a) for a, b in segments]) if segments else np.zeros((0, 2))
    turns = np.arange(16) * math.pi / 8
    ways = np.tile(np.stack([np.cos(turns), np.sin(turns)], axis=1), (3, 1))
    distances = np.repeat(radius + np.array([3, 14, 26]), len(turns))
    outward = places - (places.mean(axis=0) if len(places) else 0.0)
    centres: list[Floats | None] = []
    for place, size, out in zip(places, sizes, outward, strict=True):
        tried = place + ways * distances[:, None] + np.round(ways) * size / 2  # nearest: a corner, or a side's middle
        gaps = np.maximum(np.abs(places - tried[:, None]) - size / 2, 0)
        hidden = np.any(np.hypot(gaps[..., 0], gaps[..., 1]) < radius + 1, axis=1)
        hidden |= np.any((tried - size / 2 < 0) | (tried + size / 2 > box), axis=1)
        for other, extent in zip(centres, sizes, strict=False):
            if other is not None:
                hidden |= np.all(np.abs(tried - other) < (size + extent) / 2, axis=1)
        crossed = np.sum(np.all(np.abs(along - tried[:, None]) < size / 2, axis=2), axis=1)
        cost = 0.06 * distances + 0.2 * crossed - 0.02 * (ways @ out) / (1 + np.hypot(*out))
        best = int(np.argmin(np.where(hidden, math.inf, cost)))
        centres.append(None if hidden[best] else tried[best])
    return centres


# -- Out -------------------------------------------------------------------------------------------------------------


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element for an HTML page, its colours as CSS variables `--ink`, `--series-0` … of `THEME`.

    Text stays text. `prefix` keeps the ids of several figures on one page apart. The same figure gives the same bytes.
    """
    out = io.StringIO()
    # matplotlib takes these two from its settings only; they hold for this call.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        silent = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", facecolor="none", metadata=silent)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r'\1role="img"', text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*" ?', r"\1", text, count=1)
    text = re.sub(r'((?<= )id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for role, (light, _) in THEME.items():
        text = text.replace(f": {light}", f": var(--{role})")
    return text


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG on white, 1600 pixels wide."""
    figure.savefig(path, format="png", dpi=160, facecolor="#ffffff")


# -- Words and numbers -----------------------------------------------------------------------------------------------


def show(score: str, value: float) -> str:
    """A score as people read it: accuracy in percent, anything else with three digits."""
    return f"{100 * value:.1f} %" if score == "accuracy" else f"{value:#.3g}".rstrip(".")


def show_seconds(seconds: float) -> str:
    """A duration with the unit that suits it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def show_bytes(count: float) -> str:
    """A number of bytes with the unit that suits it (1 kB is 1000 bytes)."""
    unit, scale = _byte_unit(count)
    return f"{count / scale:.3g} {unit}"


def _byte_unit(count: float) -> tuple[str, float]:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return unit, scale
    return "bytes", 1.0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _score_axis(score: str) -> str:
    if score == "accuracy":
        return "held-out rows that are right (%)"
    return f"{_plain(score)} on held-out rows"


def _last_values(traces: Sequence[Trace]) -> list[float]:
    """The last value of each trace that has one and goes on."""
    return [trace.values[-1] for trace in traces if trace.values and trace.goes_on and math.isfinite(trace.values[-1])]


def _plain(text: str, length: int = NAME_LENGTH) -> str:
    """A text that matplotlib takes as it is: no formula, no control character, not too long."""
    text = printable(text)
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def _text_width(text: str, bold: bool = False) -> float:
    """Points that this small text takes in the font of the figures."""
    if not text.strip():
        return 0.0
    width = text_to_path.get_text_width_height_descent(text, FontProperties(size=TEXT), ismath=False)[0]
    return float(width) * (1.14 if bold else 1.03)  # a little to spare


def _limits(values: Sequence[float], pad: float = 0.02, log: bool = False) -> tuple[float, float]:
    """The least and the largest value, a little apart from the edges; never an empty range."""
    known = [v for v in values if math.isfinite(v)]
    if log:
        low, high = (math.log(v) for v in (min(known, default=1.0), max(known, default=1.0)))
        space = pad * (high - low) or 1.0
        return math.exp(low - space), math.exp(high + space)
    low, high = min(known, default=0.0), max(known, default=1.0)
    space = pad * (high - low) or 0.5 * abs(high) or 0.5
    return low - space, high + space


def _log_ticks(low: float, high: float) -> list[float]:
    """Places of ticks in 1-2-5 steps, or at powers of ten only where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high][:: max(1, len(ticks) // 10)]


# -- Canvas ----------------------------------------------------------------------------------------------------------


def _figure(height: float, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    size = TITLE * min(1.0, 0.95 * WIDTH * POINTS / max(1.0, TITLE / TEXT * _text_width(title, bold=True)))
    figure.text(0.015, 1 - 0.12 / height, title, fontsize=size, fontweight="bold", color=INK, va="top")
    return figure


def _size(axes: Axes) -> tuple[float, float]:
    """Width and height of a panel, in points."""
    box, figure = axes.get_position(), axes.get_figure(root=True)
    assert figure is not None
    return box.width * WIDTH * POINTS, box.height * figure.get_figheight() * POINTS


def _small(figure: Figure, left: float, down: float, text: str) -> None:
    height = figure.get_figheight()
    figure.text(left / WIDTH, 1 - down / height, text, fontsize=TEXT, color=MUTED, va="bottom")


def _panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at this place in inches, with as little ink as they need."""
    whole = figure.get_figheight()
    axes = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelcolor=MUTED, labelsize=TEXT, length=3)
    axes.xaxis.label.set(color=MUTED, fontsize=TEXT)
    axes.yaxis.label.set(color=MUTED, fontsize=TEXT)
    return axes
