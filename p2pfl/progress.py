"""What a person sees while training goes on: a live table on a terminal, plain lines without one.

It is told the lines that nodes record, keeps the newest of each, and draws. Everything that came from a peer is
escaped when it was built into a line; nothing here decides anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from p2pfl.messages import printable
from p2pfl.records import Json, Line, inside, is_number, number

REDRAW = 0.1  # seconds between two drawings of the table
# Events that need no line of their own.
QUIET = {"started", "joined", "left", "finished", "checkpoint", "late", "accused"}
NOTED = {"waiting", "suspected", "absent", "alone"}  # that stand behind the node's name in the table
# Those that are said above the table as well: who comes and goes, and what no file has.
LOUD = {
    "died",
    "lost",
    "returned",
    "back",
    "rewired",
    "caught_up",
    "quarantined",
    "checkpoint_failed",
    "records_failed",
    "records_incomplete",
    "displaced",
    "budget_spent",
}


class Progress:
    """Call `observe` with every recorded line; use it as a context."""

    def __init__(self, console: Console, names: Sequence[str], rounds: int) -> None:
        self._console = console
        self._rounds = rounds
        self._newest: dict[str, Line] = {}
        self._notes: dict[str, str] = dict.fromkeys(names, "starts")
        self._by_round: dict[int, list[Line]] = {}  # those of which not everybody's line has come
        self._said_round = -1  # the last that was said
        self._slowest: tuple[str, int] | None = None  # who was behind when that was looked at, and in which round
        self._gone: dict[str, str] = {}  # who no longer takes part: died or left
        self._told: dict[str, set[str]] = {}  # of whom some node has told that it died or is lost
        self._graph: tuple[Json, Json] = (None, None)  # who went and who came at the last change of the graph
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal and len(names) > 1 else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def observe(self, line: Line) -> None:
        """Take in one line of metrics or events."""
        name = str(line["node"])
        if "mixed" in line:
            self._newest[name] = line
            self._gone.pop(name, None)
            missing = line.get("missing")
            self._notes[name] = f"without {_names(missing)}" if missing else ""
            if self._live is None:
                self._by_round.setdefault(int(number(line, "round") or 0), []).append(line)
        else:
            self._event(name, line)
        self._say_rounds()
        if self._live is not None and time.monotonic() - self._drawn >= REDRAW:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _event(self, name: str, line: Line) -> None:
        event, peer = str(line["event"]), str(line.get("peer", ""))
        if event == "waiting":
            self._notes[name] = _waits_until(line)
        elif event in NOTED:
            self._notes[name] = describe(line)
        elif event == "finished":
            self._notes[name] = "finished"
        elif event == "died" or (event == "left" and not peer):
            self._gone[peer or name] = event
        elif event in ("returned", "back"):
            self._gone.pop(peer, None)
        if self._is_news(event, peer, line) and event not in QUIET and (event in LOUD or self._live is None):
            self._say(f"{name}: {describe(line)}")

    def _is_news(self, event: str, peer: str, line: Line) -> bool:
        """False for what another node has told before: of one death, of one return, of one new graph."""
        match event:
            case "died" | "lost":
                told = self._told.setdefault(peer, set())
                known = event in told
                told.add(event)
                return not known
            case "returned" | "back":  # a link that broke and came back at once is no news
                return bool(self._told.pop(peer, None))
            case "rewired":
                before, self._graph = self._graph, (line.get("gone"), line.get("back"))
                return self._graph != before
        return True

    def _say_rounds(self) -> None:
        """Without a table: one line a round, once every node that still takes part has ended it, or a later one."""
        if not self._by_round:
            return
        # Of thousands of nodes, the last of those that were behind says whether there is anything new to say.
        if self._slowest is not None:
            name, round = self._slowest
            if name not in self._gone and self._round_of(name) == round:
                return
        taking_part = [name for name in reversed(self._notes) if name not in self._gone]
        slowest = min(taking_part, key=self._round_of, default=None)
        ended_by_all = -1 if slowest is None else self._round_of(slowest)
        self._slowest = None if slowest is None else (slowest, ended_by_all)
        for round in sorted(round for round in self._by_round if round <= ended_by_all):
            ended = self._by_round.pop(round)
            if round > self._said_round:  # else somebody who started again repeats it
                self._said_round = round
                self._round_line(round, ended)

    def _round_of(self, name: str) -> int:
        line = self._newest.get(name)
        return -1 if line is None else int(number(line, "round") or 0)

    def _round_line(self, round: int, ended: list[Line]) -> None:
        merged, missing = _count(ended, "merged"), _count(ended, "missing")
        sent = sum(number(entry, "bytes", "sent") or 0.0 for entry in ended)
        seconds = max(number(entry, "seconds", "total") or 0.0 for entry in ended)
        scores = "  ".join(f"{key} {_spread([_mixed(entry, key) for entry in ended])}" for key in _keys(ended))
        if spent := [value for entry in ended if (value := _spent(entry)) is not None]:
            scores += f"  ε {max(spent):.3f} ({inside(ended[0], 'epsilon', 'unit')})"
        self._say(
            f"round {round + 1:>{len(str(self._rounds))}}/{self._rounds}  {scores}  "
            f"merged {merged}/{merged + missing}  sent {sent / 1e6:.2f} MB  {seconds * 1000:.0f} ms"
        )

    def _say(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("node")
        table.add_column("round", justify="right")
        keys = _keys(list(self._newest.values())) or ["accuracy", "loss"]
        for key in keys:
            table.add_column(key, justify="right")
        table.add_column("consensus", justify="right")
        units = {str(inside(line, "epsilon", "unit")) for line in self._newest.values() if _spent(line) is not None}
        if units:
            table.add_column(f"ε ({', '.join(sorted(units))})", justify="right")
        table.add_column("")
        for name, note in self._notes.items():
            line = self._newest.get(name)
            note = f"[red]{self._gone[name]}[/red]" if name in self._gone else escape(note)
            if line is None:
                table.add_row(name, "–", *["–"] * (len(keys) + 1 + bool(units)), note)
                continue
            scores = [_show(_mixed(line, key)) for key in keys]
            consensus = number(line, "consensus")
            round = int(number(line, "round") or 0) + 1
            spent = [_show(_spent(line))] if units else []
            table.add_row(name, f"{round}/{self._rounds}", *scores, _show(consensus), *spent, note)
        return table


def describe(line: Mapping[str, Json]) -> str:
    """An event in words."""
    peer, why = printable(str(line.get("peer", ""))), printable(str(line.get("why", "")))
    match line["event"]:
        case "waiting":
            since, left = line.get("since"), line.get("left")
            return f"waits for {_names(line.get('peers'))} since {since} s, at most {left} s more"
        case "absent":
            return f"starts without {_names(line.get('peers'))}"
        case "alone":
            return "trains alone: nobody is linked"
        case "suspected":
            return f"lost its link to {peer} ({why})"
        case "died":
            return f"goes on without {peer}: {why}"
        case "lost":
            return f"takes {peer} for gone: {why}"
        case "back":
            return f"{peer} is back"
        case "rewired":
            gone = f", without {_names(line['gone'])}" if line.get("gone") else ""
            back = f", with {_names(line['back'])} again" if line.get("back") else ""
            return f"goes on with a new graph of {line.get('members')} members{gone}{back} (round {line.get('round')})"
        case "rejected":
            more = f" ({line['suppressed']} more like it)" if "suppressed" in line else ""
            return f"event=rejected code={line.get('code')} peer={peer} why={why}{more}"
        case "quarantined":
            return f"keeps {peer} out for {line.get('seconds')} s ({line.get('code')})"
        case "caught_up":
            return f"was behind and caught up with round {line.get('round')}"
        case "checkpoint_damaged":
            then = "its neighbours' state, or not at all" if line.get("lost") else "the one before"
            return f"has moved damaged checkpoints aside ({_names(line.get('files'))}) and goes on from {then}"
        case "no_state":
            return "ends, for no neighbour gave it a state"
        case "records_failed":
            return f"cannot write down what happens ({why}); it trains on, and {line['node']}'s records will have gaps"
        case "records_incomplete":
            return f"{line.get('lines')} lines of its records are missing: the disk did not take them"
        case "displaced":
            return f"gives way to start {line.get('epoch')} of the same identity"
        case "joined" | "returned":
            return f"{peer} {line['event']}"
        case "left":
            return f"{peer or 'this node'} left"
        case "budget_spent":
            spent, delta = number(line, "spent") or 0.0, number(line, "delta") or 0.0
            what = f"has spent its {line.get('unit')}-level privacy (ε {spent:.3f} at δ {delta:g})"
            return f"{what}: it trains no more, and goes on mixing"
        case event:
            rest = {k: v for k, v in line.items() if k not in ("t", "node", "event")}
            return " ".join([str(event), *(f"{key}={printable(str(value))}" for key, value in rest.items())])


def _waits_until(line: Mapping[str, Json]) -> str:
    """What a node waits for, with times that stay true while the line stands in the table."""
    told = number(line, "t") or 0.0
    since, until = (
        time.strftime("%H:%M:%S", time.localtime(at))
        for at in (told - (number(line, "since") or 0.0), told + (number(line, "left") or 0.0))
    )
    return f"waits for {_names(line.get('peers'))} since {since}, until {until} at most"


def _keys(lines: Sequence[Mapping[str, Json]]) -> list[str]:
    mixed = lines[0].get("mixed") if lines else None
    return sorted(mixed) if isinstance(mixed, Mapping) else []


def _mixed(line: Mapping[str, Json], key: str) -> float | None:
    return number(line, "mixed", key)


def _spent(line: Mapping[str, Json]) -> float | None:
    """ε up to and with this round."""
    return number(line, "epsilon", "spent")


def _count(lines: Sequence[Mapping[str, Json]], key: str) -> int:
    return sum(len(value) for line in lines if isinstance(value := line.get(key), Sequence))


def _names(value: Json) -> str:
    return ", ".join(printable(str(name)) for name in value) if isinstance(value, list | tuple) else "nobody"


def _show(value: float | None) -> str:
    return f"{value:.4f}" if is_number(value) else "–"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return f"{sum(known) / len(known):.3f} ({min(known):.3f}–{max(known):.3f})"
