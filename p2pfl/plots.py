"""Pictures of a run: plain data in, a matplotlib Figure out; `svg` and `png` turn it into something to look at.

Nothing here reads a file or knows the run folder. Figures are laid out in inches and points with measured text, so that
no label is cut and none lies on another. Every text may come from a peer: it goes through `_plain`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from p2pfl.messages import printable

Floats = NDArray[np.float64]

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
SURFACE, INK, MUTED, QUIET, GRID, ALARM, *SERIES = (light for light, _ in THEME.values())

WIDTH = 10.0  # inches, of every figure
PANEL_HEIGHT = 3.1  # inches, of a panel with curves
LEFT, GAP, BOTTOM, TOP, RIGHT = 0.9, 0.35, 0.6, 0.45, 0.3  # inches around and between the panels
TEXT, TITLE = 8.5, 12.0  # points
ROW = 13.0  # points from one line of small text to the next
POINTS = 72.0  # in an inch

COLOURED = 8  # curves that get a colour and a name; of more, only the mean and the extremes are named
NAMED_BARS = 40  # nodes that are named beside bars and in a graph
MARKS_SHOWN = 6  # labelled events above a panel
CURVE_POINTS = 8000  # of all curves of a panel together: keeps a page of 200 nodes below 3 MB
DISTANCE_NODES, SPRING_NODES = 300, 1000  # up to which a layout takes less than 3 and 6 seconds
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
    values = [v for trace in traces for v in trace.values if math.isfinite(v)]
    y_limits = _limits(values, 0.05, log)
    if score == "accuracy":
        y_limits = (max(y_limits[0], -0.02), min(y_limits[1], 1.02))
    if predicted is not None:
        foot = 1.5 * ROW / (PANEL_HEIGHT * POINTS)  # room below all curves, for the name of the falling line
        y_limits = (y_limits[0] / (y_limits[1] / y_limits[0]) ** foot, y_limits[1])
        if predicted.values[-1] > y_limits[0]:
            ends.append((predicted.name, predicted.values[-1], INK, False))
    right = max([_text_width(text, bold) for text, _, _, bold in ends], default=0.0) / POINTS + RIGHT
    panel_width = (WIDTH - LEFT - right - GAP * (len(labels) - 1)) / len(labels)

    limits = [_limits([x for trace in traces for x in trace.along[label]]) for label in labels]
    placed = [
        _place_marks(traces, marks, label, limit, panel_width * POINTS)
        for label, limit in zip(labels, limits, strict=True)
    ]
    rows = max((spot.row + 1 for panel in placed for spot in panel), default=0)
    more = len(marks) - MARKS_SHOWN
    top = TOP + (rows + (more > 0)) * ROW / POINTS
    figure = _figure(top + PANEL_HEIGHT + BOTTOM, title)
    if more > 0:
        _small(figure, LEFT, TOP + 0.1, f"… and {more} more events, listed under Events")

    every = max(1, math.ceil(sum(len(trace.values) for trace in traces) / CURVE_POINTS))
    for number, (label, limit) in enumerate(zip(labels, limits, strict=True)):
        left = LEFT + number * (panel_width + GAP)
        axes = _panel(figure, left, BOTTOM, panel_width, PANEL_HEIGHT)
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
            _curve(axes, trace, label, index, every, coloured, 1.2 if mean else 2.0)
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
    colour = SERIES[index % len(SERIES)] if coloured else QUIET
    kept = sorted({*range(0, len(trace.values), every), *([len(trace.values) - 1] if trace.values else [])})
    x = [trace.along[label][i] for i in kept]
    y = [trace.values[i] for i in kept]
    axes.plot(
        x,
        y,
        color=colour if trace.goes_on or coloured else ALARM,
        linewidth=width if coloured else 0.7,
        linestyle="-" if index < len(SERIES) or not coloured else (0, (4, 2)),
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


def _end_labels(traces: Sequence[Trace], score: str, coloured: bool, mean: bool) -> list[tuple[str, float, str, bool]]:
    """(text, value, colour, bold) of what is written at the right end of the curves that go on to the end."""
    last = [(_last_values([trace])[0], i, trace.name) for i, trace in enumerate(traces) if _last_values([trace])]
    labels = []
    if coloured:
        labels = [(f"{_plain(name)}  {show(score, v)}", v, SERIES[i % len(SERIES)], False) for v, i, name in last]
    elif last:
        for word, (v, _, name) in (("highest", max(last)), ("lowest", min(last))):
            labels.append((f"{word}: {_plain(name)}  {show(score, v)}", v, MUTED, False))
    if mean and len(last) > 1:
        middle = float(np.mean([v for v, _, _ in last]))
        labels.append((f"mean  {show(score, middle)}", middle, INK, True))
    return labels


def _draw_end_labels(axes: Axes, labels: Sequence[tuple[str, float, str, bool]]) -> None:
    """Write the labels beside the right edge, each as near to its curve's end as the others allow."""
    if not labels:
        return
    height = PANEL_HEIGHT * POINTS
    at_end = axes.transData.transform([(axes.get_xlim()[1], value) for _, value, _, _ in labels])
    wanted = np.clip(axes.transAxes.inverted().transform(at_end)[:, 1], 0, 1) * height
    beside = 14 / (axes.get_position().width * WIDTH * POINTS)  # 14 points
    for (text, _, colour, bold), start, y in zip(labels, wanted, apart(wanted, ROW, height), strict=True):
        axes.plot(
            [1, 1 + 0.75 * beside],
            [start / height, y / height],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.8,
            clip_on=False,
        )
        axes.text(
            1 + beside,
            y / height,
            text,
            transform=axes.transAxes,
            va="center",
            color=colour,
            fontsize=TEXT,
            fontweight="bold" if bold else "normal",
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
    height, width = PANEL_HEIGHT * POINTS, axes.get_position().width * WIDTH * POINTS
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
    foot = low * (high / low) ** (1.3 * ROW / (PANEL_HEIGHT * POINTS))
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
    lift = 1 + 5 / (axes.get_position().height * figure.get_figheight() * POINTS)
    for x, side, text, colour in ((-0.02, "right", "← received", SERIES[1]), (0.02, "left", "sent →", SERIES[0])):
        axes.text(x * reach, lift, text, transform=above, ha=side, va="bottom", color=colour, fontsize=TEXT)
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
        _key(figure, axes, key, colour, part)
        key += _text_width(part) + 26
    axes.set_xlim(0, 1.03 * max(totals.values(), default=0.0) / scale or 1.0)
    axes.set_xlabel(f"{unit} a round, mean over the rounds")
    return figure


def _key(figure: Figure, axes: Axes, offset: float, colour: str, text: str) -> None:
    """One entry of the row of keys above the panel, `offset` points from its left edge."""
    box = axes.get_position()
    width, height = box.width * WIDTH * POINTS, box.height * figure.get_figheight() * POINTS
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
) -> Figure:
    """Who averages with whom. Colour: the final score where one is known, the number of neighbours otherwise.

    `ended` holds the nodes that did not finish, with the word for why ("killed"): they are hollow, dashed and red.
    """
    network = nx.Graph()
    network.add_nodes_from(nodes)
    network.add_edges_from(edges)
    names = list(network)
    many = len(names) > NAMED_BARS
    title = f"{_capital(_plain(name))}: {_count(len(names), 'node')}, {_count(network.number_of_edges(), 'link')}"
    if ended:
        shown = ", ".join(f"{_plain(n)} {_plain(why)}" for n, why in sorted(ended.items())[:3])
        title += f"; {shown}" + (f" and {len(ended) - 3} more" if len(ended) > 3 else "")

    height = 5.6 if len(names) > COLOURED else 4.2  # inches
    figure = _figure(TOP + height, title)
    bar = 1.5  # inches at the right, for the colour bar
    axes = figure.add_axes((0, 0, (WIDTH - bar) / WIDTH, height / (TOP + height)))
    axes.axis("off")
    box = np.array([WIDTH - bar, height]) * POINTS  # data units are points from here on
    axes.set_xlim(0, box[0])
    axes.set_ylim(0, box[1])

    radius = float(np.clip(60 / math.sqrt(max(len(names), 1)), 4, 11))
    margin = radius + (8 if many else 6 + ROW + 0.6 * max((_text_width(_plain(n)) for n in names), default=0.0))
    places = _fit(_layout(network), box, margin, stretch=1.5 if len(names) > COLOURED else 1.0)
    place = dict(zip(names, places, strict=True))
    gone = np.array([n in ended for n in names], bool)
    whole = [(place[a], place[b]) for a, b in network.edges if a not in ended and b not in ended]
    broken = [(place[a], place[b]) for a, b in network.edges if a in ended or b in ended]
    weight = 1.3 if len(network.edges) <= 100 else 0.6 if len(network.edges) <= 1000 else 0.25
    # One path with gaps rather than a line an edge: 20,000 edges stay below 1 MB of SVG.
    for segments, colour, style in ((whole, QUIET, "-"), (broken, ALARM, (0, (3, 3)))):
        if segments:
            path = np.array([(a, b, (math.nan, math.nan)) for a, b in segments]).reshape(-1, 2)
            axes.plot(path[:, 0], path[:, 1], color=colour, linewidth=weight, linestyle=style, zorder=1)

    degrees = dict(network.degree)
    known = all(n in scores for n in names if n not in ended) and len(ended) < len(names)
    values = [scores.get(n, math.nan) if known else float(degrees[n]) for n in names]
    if names:
        _draw_nodes(figure, axes, places, np.array(values), gone, radius, score if known else "number of neighbours")
    if not many:
        texts = [_plain(n) + (f" ({_plain(ended[n])})" if n in ended else "") for n in names]
        sizes = np.array([(_text_width(text) + 4, ROW) for text in texts]).reshape(-1, 2)
        centres = _place_labels(places, sizes, [*whole, *broken], radius, box)
        for text, (x, y), red in zip(texts, centres, gone, strict=True):
            backing = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
            axes.text(
                x, y, text, ha="center", va="center", fontsize=TEXT, color=ALARM if red else INK, bbox=backing, zorder=4
            )
    return figure


def _draw_nodes(
    figure: Figure, axes: Axes, places: Floats, values: Floats, gone: NDArray[np.bool_], radius: float, meaning: str
) -> None:
    area = (2 * radius) ** 2
    live = values[~gone]
    x, y = places[~gone].T
    span = (float(live.min()), float(live.max())) if len(live) else (0.0, 1.0)
    # Equal values need no scale of colours: it would show differences that are not there.
    if span[1] - span[0] > 1e-9:
        colours = LinearSegmentedColormap.from_list("p2pfl", ["#f3e6a2", "#57a3a0", "#1f3b73"])  # light is least
        norm = Normalize(*span)
        axes.scatter(x, y, area, live, cmap=colours, norm=norm, edgecolors=INK, linewidths=0.7, zorder=3)
        height = figure.get_figheight()
        bar = figure.add_axes(((WIDTH - 1.15) / WIDTH, 0.25 * (height - TOP) / height, 0.13 / WIDTH, 0.45))
        scale = figure.colorbar(ScalarMappable(norm, colours), cax=bar)
        scale.outline.set_visible(False)
        bar.tick_params(labelsize=TEXT, colors=MUTED, length=0)
        accuracy = meaning == "accuracy"
        if meaning == "number of neighbours":
            bar.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        elif accuracy:
            bar.yaxis.set_major_locator(MaxNLocator(5))
            bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
        bar.set_title(_plain(meaning) + (", %" if accuracy else ""), fontsize=TEXT, color=MUTED, loc="right", pad=8)
    elif len(live):
        axes.scatter(x, y, area, SERIES[0], edgecolors=INK, linewidths=0.7, zorder=3)
    if gone.any():
        x, y = places[gone].T
        axes.scatter(x, y, area, SURFACE, edgecolors=ALARM, linewidths=1.4, linestyles="dashed", zorder=3)


def _layout(network: nx.Graph) -> Floats:
    """Places in any unit, one row a node; a pure function of the graph."""
    count = len(network)
    if count < 3 or count > SPRING_NODES or nx.density(network) > 0.6 or network.number_of_edges() == 0:
        turn = [math.pi / 2 - 2 * math.pi * i / max(count, 1) for i in range(count)]  # clockwise from the top
        return np.array([(math.cos(angle), math.sin(angle)) for angle in turn]).reshape(count, 2)
    if count <= DISTANCE_NODES and nx.is_connected(network):
        placed = nx.kamada_kawai_layout(network)  # distances in the picture follow distances in the graph
    else:
        placed = nx.spring_layout(network, seed=0)
    return np.array([placed[node] for node in network], float).reshape(count, 2)


def _fit(places: Floats, box: Floats, margin: float, stretch: float) -> Floats:
    """Scale and move the places into the box, `margin` points from its edges; x up to `stretch` times more than y."""
    if len(places) == 0:
        return places
    low, high = places.min(axis=0), places.max(axis=0)
    room = np.maximum(box - 2 * margin, 1.0)
    scale = room / np.maximum(high - low, 1e-9)
    if float(scale.min()) > 1e6:  # a single place
        scale = np.zeros(2)
    least = float(scale.min())
    fitted: Floats = box / 2 + (places - (low + high) / 2) * np.minimum(scale, [stretch * least, least])
    return fitted


def _place_labels(
    places: Floats, sizes: Floats, segments: Sequence[tuple[Floats, Floats]], radius: float, box: Floats
) -> list[Floats]:
    """The centre of each node's label: of the places around the node the one that covers least of anything else."""
    steps = np.linspace(0, 1, 40)[:, None]
    along = np.concatenate([a + steps * (b - a) for a, b in segments]) if segments else np.zeros((0, 2))
    middle = places.mean(axis=0) if len(places) else np.zeros(2)
    centres: list[Floats] = []
    for place, size in zip(places, sizes, strict=True):
        best, least = place, math.inf
        for distance in (radius + 3, radius + 14):
            for turn in range(16):
                way = np.array([math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)])
                centre = place + way * distance + np.round(way) * size / 2  # its nearest corner, or middle of a side
                outward = way @ (place - middle) / (1 + np.linalg.norm(place - middle))
                cost = 0.06 * distance - 0.02 * float(outward)
                cost += 100 * float(np.any((centre - size / 2 < 0) | (centre + size / 2 > box)))
                for other, extent in zip(centres, sizes, strict=False):
                    cost += 30 * float(np.all(np.abs(centre - other) < (size + extent) / 2))
                cost += 10 * float(np.sum(np.all(np.abs(places - centre) < size / 2 + radius, axis=1)))
                cost += 0.2 * float(np.sum(np.all(np.abs(along - centre) < size / 2, axis=1)))
                if cost < least:
                    best, least = centre, cost
        centres.append(best)
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
    return float(TextPath((0, 0), text, size=TEXT).get_extents().width) * (1.14 if bold else 1.04)  # a little to spare


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
