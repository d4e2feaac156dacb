"""The run folder: where a run writes down what happened, the same from every driver.

    RUN/experiment.toml · topology.json · summary.json · audit.json · report.html
    RUN/nodes/NAME/metrics.jsonl · events.jsonl · checkpoint/ · model.safetensors · seen.safetensors
    RUN/nodes/NAME/disclosure.json · privacy.jsonl and privacy.key (see `ledger`)

Decides the form of a line and of the summary. Promises never to interpret a tensor, a clock or a socket, and never to
fail on a line that a killed process left half written.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import TypeGuard

from p2pfl.messages import NAME_PATTERN, BadInput, Computed, Happened, RoundEnded, Spent, Value, check_name

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
Line = dict[str, Json]  # one line of a .jsonl file

RUNS_FOLDER = "runs"
RUNS_SHOWN = 3  # in an error message that says which runs there are


# -- Writing a file whole --------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace the file in one step: after a crash it holds the old text or the new one, never half of either.

    BadInput if the disk does not take it.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}; make room there, or choose another place") from None
    finally:
        with suppress(OSError):  # on a disk that is read-only there is none, and not even the question is allowed
            draft.unlink(missing_ok=True)


def write_json(path: Path, value: Json) -> None:
    """`write_text` of strict JSON: what is not a finite number becomes null."""
    write_text(path, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _strict(value: Json) -> Json:
    """JSON knows no NaN and no Infinity: null stands for them."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _strict(item) for key, item in value.items()}
        case str() | None | bool() | int():
            return value
        case _:
            return [_strict(item) for item in value]


# -- Reading what someone wrote --------------------------------------------------------------------------------------


def read_json(path: Path) -> Line:
    """The JSON object in this file; an empty one where there is none, or where it cannot be read."""
    try:
        return _parse(path.read_bytes()) or {}
    except OSError:
        return {}


def _parse(text: bytes) -> Line | None:
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a number of a million digits, a thousand brackets
        return None
    return value if isinstance(value, dict) else None


def inside(line: Mapping[str, Json], *keys: str) -> Json:
    """What stands under these nested keys; None where the line has no such place."""
    value: Json = line
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def number(line: Mapping[str, Json], *keys: str) -> float | None:
    """The finite number under these nested keys, if there is one."""
    value = inside(line, *keys)
    return float(value) if is_number(value) else None


def is_number(value: Json) -> TypeGuard[int | float]:
    """Is this a finite number that fits a float? (True and False are not numbers.)"""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e300 < value < 1e300  # false for NaN too; comparing cannot overflow as converting would


def words(line: Mapping[str, Json], key: str) -> list[str]:
    """The strings in the list under this key."""
    value = line.get(key)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []


# -- The folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """The paths of one run."""

    path: Path

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.toml"

    @property
    def topology(self) -> Path:
        return self.path / "topology.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def node(self, name: str) -> NodeRecords:
        """The records of this node, whether or not it has any yet. BadInput if the name is none (`../x`)."""
        return NodeRecords(self.path / "nodes" / check_name(name))

    def nodes(self) -> list[str]:
        """The names of the nodes that have a folder, sorted."""
        folder = self.path / "nodes"
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
        return sorted(name for name in names if NAME_PATTERN.fullmatch(name))


def is_run(path: Path) -> bool:
    """Does this folder hold a run?"""
    return (path / "nodes").is_dir() or (path / "experiment.toml").is_file()


def create_run(path: Path, resume: bool = False) -> Run:
    """Make the run folder. One that already holds a run is refused, unless the run is to be resumed."""
    if is_run(path) and not resume:
        raise BadInput(f"{path} already holds a run: add --resume to go on with it, or choose another --run-dir")
    try:
        (path / "nodes").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the run folder {path}: {error.strerror}; choose another --run-dir") from None
    return Run(path)


def open_run(path: Path) -> Run:
    """The run in this folder; BadInput, naming the runs nearby, if it holds none."""
    if is_run(path):
        return Run(path)
    what = "is not a run folder" if path.exists() else "does not exist"
    nearby = _runs_near(path)
    mend = f"there are {', '.join(map(str, nearby))}" if nearby else "give the --run-dir of a run"
    raise BadInput(f"{path} {what}: {mend}")


def _runs_near(path: Path) -> list[Path]:
    """The newest runs in the folder itself, beside it, and in ./runs."""
    found: dict[Path, float] = {}
    for folder in (path, path.parent, Path(RUNS_FOLDER)):
        if folder.is_dir():
            found |= {entry: entry.stat().st_mtime for entry in folder.iterdir() if is_run(entry)}
    return sorted(found, key=lambda entry: found[entry], reverse=True)[:RUNS_SHOWN]


def newest_run(base: Path) -> Run:
    """Of the runs in BASE/runs the one that began or ended last, and rather one whose nodes run. BadInput if none."""
    folder = base / RUNS_FOLDER
    runs = [entry for entry in folder.iterdir() if is_run(entry)] if folder.is_dir() else []
    if not runs:
        raise BadInput(f"there is no run in {folder}: give the folder of a run, or the address of a node")
    return Run(max(runs, key=lambda path: (any(path.glob("nodes/*/control")), path.stat().st_mtime)))


def default_run_dir(base: Path, name: str, now: datetime) -> Path:
    """BASE/runs/NAME-YYYYmmdd-HHMMSS, with -2, -3 … behind it where that is taken."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    first = base / RUNS_FOLDER / f"{plain}-{now:%Y%m%d-%H%M%S}"
    path, count = first, 1
    while path.exists():
        count += 1
        path = first.with_name(f"{first.name}-{count}")
    return path


# -- One node's records ----------------------------------------------------------------------------------------------


class NodeRecords:
    """What one node wrote: `metrics.jsonl`, one line a round, and `events.jsonl`.

    A file is opened at its first line and stays open until `close`. A line is one unbuffered write, so a killed
    process leaves whole lines. There is no fsync: only a power cut could take the last lines, and waiting for the disk
    at every event would hold up the heartbeats of the loop that writes them. What the disk does not take whole raises
    OSError and is left out; the lines before and after it are none the worse.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.events = folder / "events.jsonl"
        self.checkpoint = folder / "checkpoint"
        self.model = folder / "model.safetensors"
        self.seen = folder / "seen.safetensors"  # what came of the neighbours last, where privacy.keep_seen asks for it
        self.disclosure = folder / "disclosure.json"  # what leaves this node, as it was when it started
        self.given = folder / "given"  # the rounds in which it has given its part to others' sums
        self.control = folder / "control"  # names the socket of the running node
        self.damaged = 0  # lines that the reads so far have skipped
        self._open: dict[Path, FileIO] = {}

    def append_metrics(self, line: Mapping[str, Json]) -> None:
        """Write one line of metrics, as `round_line` makes it. OSError if the disk does not take it."""
        self._append(self.metrics, line)

    def append_event(self, line: Mapping[str, Json]) -> None:
        """Write one event, as `event_line` makes it. OSError if the disk does not take it."""
        self._append(self.events, line)

    def close(self) -> None:
        """Close the files; a later append opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def read_metrics(self) -> list[Line]:
        """The metrics so far, oldest first; none if there is no file."""
        return self._read(self.metrics)

    def read_events(self) -> list[Line]:
        """The events so far, oldest first; none if there is no file."""
        return self._read(self.events)

    def _append(self, path: Path, line: Mapping[str, Json]) -> None:
        text = json.dumps(_strict(line), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if path not in self._open:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[path] = FileIO(path, "a")
            if _ends_inside_a_line(path):
                text = b"\n" + text  # or the line that a killed process left cut would spoil this one too
        file = self._open[path]
        end = os.fstat(file.fileno()).st_size
        written = file.write(text)
        if written != len(text):  # the disk is full, or about to be
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _read(self, path: Path) -> list[Line]:
        try:
            *whole, last = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        parsed = [_parse(line) for line in whole if line.strip()]
        self.damaged += parsed.count(None)
        parsed.append(_parse(last))  # no newline behind it: being written, or cut by a kill; either is no damage
        return [line for line in parsed if line is not None]


def _ends_inside_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


# -- The lines and the summary ---------------------------------------------------------------------------------------


def round_line(
    ended: RoundEnded, *, t: float, node: str, epoch: int, total_seconds: float, sent: int, received: int
) -> Line:
    """The line of metrics.jsonl for a finished round.

    `t` is in unix seconds, `total_seconds` the whole round on the wall clock, `sent` and `received` the bytes on the
    socket in this round.
    """
    line: Line = {
        "t": t,
        "node": node,
        "epoch": epoch,
        "round": ended.round,
        "train_loss": ended.trained.train_loss,
        "local": dict(ended.trained.scores.values),
        "mixed": dict(ended.folded.scores.values),
        "consensus": ended.folded.consensus,
        "probe": {"before": _shortened(ended.folded.before), "after": _shortened(ended.folded.after)},
        "merged": list(ended.merged),
        "missing": list(ended.missing),
        "seconds": {
            "train": ended.trained.train_seconds,
            "wait": ended.wait_seconds,
            "mix": ended.folded.mix_seconds,
            "evaluate": ended.trained.evaluate_seconds + ended.folded.evaluate_seconds,
            "total": total_seconds,
        },
        "bytes": {"sent": sent, "received": received},
    }
    spent = ended.trained.spent
    return line if spent is None else line | {"epsilon": _spent(spent)}


def _spent(spent: Spent) -> Line:
    """What privacy has cost a node, up to and with a round."""
    return {"unit": spent.unit, "spent": spent.epsilon, "rdp": spent.rdp, "prv": spent.prv, "delta": spent.delta}


def most_spent(last_metrics: Mapping[str, Mapping[str, Json]]) -> Line | None:
    """What privacy has cost the node that it has cost most; None where nothing is accounted for.

    "delta" is the largest of all: the two hold for every node.
    """
    lines = [line for line in last_metrics.values() if number(line, "epsilon", "spent") is not None]
    if not lines:
        return None
    most = max(lines, key=lambda line: number(line, "epsilon", "spent") or 0.0)
    return {
        "unit": inside(most, "epsilon", "unit"),
        "max": number(most, "epsilon", "spent"),
        "delta": max(number(line, "epsilon", "delta") or 0.0 for line in lines),
        "rdp": number(most, "epsilon", "rdp"),
        "prv": number(most, "epsilon", "prv"),
    }


def budget_event(computed: Computed) -> Happened | None:
    """What is recorded when the privacy budget of a node is spent, at the first round in which it does not train."""
    trained = computed.trained
    if trained is None or trained.spent is None or not trained.budget_spent:
        return None
    spent = trained.spent
    fields: dict[str, Value] = {"round": computed.round, "unit": spent.unit, "spent": spent.epsilon}
    return Happened("budget_spent", fields | {"delta": spent.delta})


def _shortened(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.9g}") for value in values]  # float32 has seven digits


def event_line(happened: Happened, *, t: float, node: str) -> Line:
    """The line of events.jsonl for something that happened; `t` in unix seconds."""
    head: Line = {"t": t, "node": node, "event": happened.event}
    return head | dict(happened.fields) | head  # a field cannot say that it is another node's line


def count_rejected(events: Sequence[Mapping[str, Json]]) -> dict[str, int]:
    """How often each code was rejected: a "rejected" event counts once, and `suppressed` times more if it says so."""
    counts: dict[str, int] = {}
    for event in events:
        code = event.get("code")
        if event.get("event") == "rejected" and isinstance(code, str):
            counts[code] = counts.get(code, 0) + 1 + int(number(event, "suppressed") or 0)
    return dict(sorted(counts.items()))


def summarise(
    *,
    nodes: Sequence[str],
    finished: Sequence[str],
    rounds: int,
    seconds: float,
    last_metrics: Mapping[str, Mapping[str, Json]],
    mean_model: Mapping[str, float],
    consensus_distance: float,
    rejected: Mapping[str, int],
    sent: int,
    received: int,
    contraction: Mapping[str, Json],
    topology: Mapping[str, Json],
    personal: bool = False,
) -> Line:
    """summary.json: how the run went, from the last line of metrics of each node.

    `seconds` of wall clock; `sent` and `received` bytes over all nodes and rounds; `mean_model` the scores of the mean
    of the finished nodes' models; `consensus_distance` the root mean square L2 distance of their vectors to their mean;
    `contraction` what averaging did beside what the graph implies; `topology` the facts that `p2pfl topology --json`
    prints. "metrics" has every score after mixing, over the finished nodes; one that diverged makes it null, for a mean
    of the others would hide it. `personal`: each node keeps a part of its model, so that "metrics" is what each node's
    own model reaches on its own test rows, and stands under "personal" as well; otherwise that is null.
    """
    scores = [inside(last_metrics[name], "mixed") for name in finished if name in last_metrics]
    columns: dict[str, list[Json]] = {}
    for score in scores:
        if isinstance(score, Mapping):
            for key, value in score.items():
                columns.setdefault(key, []).append(value)
    metrics = {key: _spread(columns[key]) for key in sorted(columns)}
    return {
        "nodes": len(nodes),
        "finished": len(finished),
        "failed": sorted(set(nodes) - set(finished)),
        "rounds": rounds,
        "seconds": seconds,
        "metrics": metrics,
        "personal": metrics if personal else None,
        "mean_model": dict(mean_model),
        "consensus_distance": consensus_distance,
        "bytes": {"sent": sent, "received": received},
        "rejected": dict(sorted(rejected.items())),
        "epsilon": most_spent(last_metrics),
        "contraction": dict(contraction),
        "topology": dict(topology),
    }


def _spread(values: Sequence[Json]) -> Line:
    numbers = [float(value) for value in values if is_number(value)]
    if len(numbers) < len(values):
        return {"mean": None, "min": None, "max": None}
    return {"mean": math.fsum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}
