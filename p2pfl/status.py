"""What `p2pfl status` says: who is alive, at which round, who waits for whom, since when and until when.

Running nodes are asked on their control sockets; of the others the records tell where they stopped. Decides how that is
found and worded; the nodes are not touched. As JSON it is one object:

    {"run": path or null, "running": how many answered, "nodes": {NAME: node, …}}

A node that runs: {"state": "running", "name", "epoch", "phase": joining | computing | collecting | done, "round": in
progress, "rounds": of the experiment, "seconds": in this phase, "awaited": [{"peer": name, or "" if not known yet,
"what", "since", "left", "left_if_silent"}], "neighbours": [{"name", "linked", "alive", "standing": alive | suspect |
dead | left | finished | absent, "round", "last_sign", "lateness": median}], "living", "members", "alone", "address",
"rejected": {code: count}}. All times in seconds: ago, or from now.

Any other: {"state": finished | left | stopped (no process, and no last word: killed) | silent (it stands still) |
forbidden (another user's) | foreign (another version of this program), "name", "last_round": recorded, or null}.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from p2pfl.control import Silence, ask, read, sockets
from p2pfl.identity import parse_address
from p2pfl.messages import Awaited, BadInput, NeighbourStatus, Status, printable
from p2pfl.records import Line, NodeRecords, Run, is_run, newest_run, number, open_run

NODES_SHOWN = 8  # in an error message
WORDS = {
    Silence.STOPPED.value: "not running: it ended without a last word",
    Silence.SILENT.value: "does not answer: it stands still, or the machine is very busy",
    Silence.FORBIDDEN.value: "another user's: only that user can ask it",
    Silence.FOREIGN.value: "answers what is not understood here: another version of p2pfl?",
}


@dataclass(frozen=True, slots=True)
class Stopped:
    """A node that did not answer, and what its records tell of it."""

    name: str
    state: str  # finished, left, or why there is no answer
    last_round: int | None  # that it recorded


@dataclass(frozen=True, slots=True)
class Found:
    """What was found out."""

    run: Run | None  # None: a single node was asked
    nodes: tuple[Status | Stopped, ...]

    @property
    def running(self) -> list[Status]:
        return [node for node in self.nodes if isinstance(node, Status)]


# -- Finding ---------------------------------------------------------------------------------------------------------


def find(target: str | None) -> Found:
    """The nodes of the run in this folder, or the one node that listens at this address (`HOST:PORT`), that has this
    socket, or this folder in a run. None: the newest run in ./runs. BadInput if there is no such thing."""
    if target is None:
        return _of_run(newest_run(Path()))
    path = Path(target)
    if path.is_socket():
        return Found(None, (_answered(path, target),))
    if path.parent.name == "nodes" and path.is_dir() and is_run(path.parent.parent):
        return Found(None, (_of_node(Run(path.parent.parent).node(path.name)),))
    if not path.exists() and (target.startswith(("tcp://", "ipc://")) or (":" in target and "/" not in target)):
        return Found(None, (_at(parse_address(target)),))
    return _of_run(open_run(path))


def _of_run(run: Run) -> Found:
    records = [run.node(name) for name in run.nodes()]
    paths = {node.folder: path for node in records if (path := read(node.control)) is not None}
    said = ask(paths.values())
    return Found(
        run, tuple(_or_its_records(said.get(paths.get(r.folder, Path()), Silence.STOPPED), r) for r in records)
    )


def _of_node(records: NodeRecords) -> Status | Stopped:
    path = read(records.control)
    return _or_its_records(Silence.STOPPED if path is None else ask([path])[path], records)


def _or_its_records(said: Status | Silence, records: NodeRecords) -> Status | Stopped:
    if isinstance(said, Status):
        return said
    lines = records.read_metrics()
    last = number(lines[-1], "round") if lines else None
    state = said.value
    if said is Silence.STOPPED:
        for event in records.read_events():
            match event.get("event"):
                case "started":
                    state = said.value
                case "finished" | "left" as word if "peer" not in event:
                    state = word
    return Stopped(records.folder.name, state, None if last is None else int(last))


def _answered(path: Path, shown: str) -> Status:
    said = ask([path])[path]
    if isinstance(said, Status):
        return said
    raise BadInput(f"{shown}: {WORDS[said.value]}")


def _at(address: str) -> Status:
    """The node of this user that listens there."""
    known = [said for said in ask(sockets()).values() if isinstance(said, Status)]
    for status in known:
        if status.address and _same(address, status.address):
            return status
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if address.startswith("tcp://") and not any(map(_is_here, _numbers(host))):
        raise BadInput(
            f"{host} is another machine, and a node tells its status only where it runs: log in there, "
            f"and type p2pfl status {host}:{port}"
        )
    there = [f"{status.address} ({status.name})" for status in known if status.address]
    more = " …" if len(there) > NODES_SHOWN else ""
    others = f"there listen {', '.join(there[:NODES_SHOWN])}{more}" if there else "none of yours runs here"
    raise BadInput(f"no node of yours listens at {address}: {others}")


def _same(asked: str, listening: str) -> bool:
    """Whether who dials the one reaches the other, both on this machine."""
    if asked == listening:
        return True
    host, _, port = asked.rpartition(":")
    where, _, number = listening.rpartition(":")
    if port != number or "ipc://" in (asked[:6], listening[:6]):
        return False
    wanted, there = (_numbers(name.removeprefix("tcp://")) for name in (host, where))
    return bool(wanted & there) or (any(map(_is_any, wanted | there)) and all(map(_is_here, wanted)))


def _numbers(host: str) -> set[str]:
    """The IP addresses of a host."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_DGRAM)}
    except OSError:
        raise BadInput(f"nobody knows the host {host}: write its IP address") from None


def _is_any(number: str) -> bool:
    return ipaddress.ip_address(number).is_unspecified


def _is_here(number: str) -> bool:
    """Whether the address is one of this machine: then one can listen there."""
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((number, 0))
        except OSError:
            return False
    return True


# -- Saying ----------------------------------------------------------------------------------------------------------


def as_json(found: Found) -> Line:
    """The object that stands at the top of this file."""
    nodes: Line = {}
    for node in found.nodes:
        nodes[node.name] = ({"state": "running"} if isinstance(node, Status) else {}) | json.loads(
            json.dumps(asdict(node))
        )
    return {"run": None if found.run is None else str(found.run.path), "running": len(found.running), "nodes": nodes}


def show(console: Console, found: Found) -> None:
    """For people: a table, and a sentence for each that waits."""
    if found.run is not None:
        console.out(f"{found.run.path}: {len(found.running)} of {len(found.nodes)} nodes answer\n", highlight=False)
    if found.nodes:
        console.print(_table(found.nodes))
    if len(found.nodes) == 1 and found.running:
        console.print()
        console.print(_around(found.running[0].neighbours))
        if found.running[0].rejected:
            counts = ", ".join(f"{code} {count}" for code, count in sorted(found.running[0].rejected.items()))
            console.out(f"\nrejected: {counts}", highlight=False)
    sentences = [sentence for node in found.running for sentence in waits(node)]
    if (causes := in_the_end(found.running)) and len(sentences) > 1:
        sentences.append(f"in the end, they wait for {', '.join(map(printable, causes))}")
    if sentences:
        console.print()
    for sentence in sentences:
        console.print(escape(sentence), highlight=False, soft_wrap=True)


def waits(status: Status) -> list[str]:
    """Whom it waits for, why, since when and until when, in sentences."""

    def reason(awaited: Awaited) -> tuple[str, str, str, str]:
        since, left, if_silent = (f"{s:.1f} s" for s in (awaited.since, awaited.left, awaited.left_if_silent))
        return awaited.what, since, left, if_silent

    sentences = []
    for (what, since, left, if_silent), group in groupby(status.awaited, reason):
        names = [printable(awaited.peer) or "a peer that has not said who it is" for awaited in group]
        each = "each: " if len(names) > 1 else ""
        silent = f" ({if_silent} if nothing is heard from it)" if if_silent != left else ""
        sentences.append(
            f"{printable(status.name)} waits for {', '.join(names)} ({each}{printable(what)}) "
            f"since {since}, at most {left} more{silent}"
        )
    if status.alone:
        sentences.append(f"{printable(status.name)} is alone: nobody is linked")
    return sentences


def in_the_end(running: Sequence[Status]) -> list[str]:
    """Those who are awaited, and wait for nobody themselves: whoever holds up the others."""
    awaited = {awaited.peer for node in running for awaited in node.awaited if awaited.peer}
    return sorted(awaited - {node.name for node in running if node.awaited})


def _table(nodes: Sequence[Status | Stopped]) -> Table:
    table = _columns("node", "rounds", "links", "living")
    table.add_column("")
    for node in nodes:
        if isinstance(node, Stopped):
            rounds = "–" if node.last_round is None else str(node.last_round + 1)
            table.add_row(escape(printable(node.name)), rounds, "–", "–", WORDS.get(node.state, node.state))
            continue
        linked = sum(neighbour.linked for neighbour in node.neighbours)
        where = f"listens at {node.address}" if node.address else "only dials out"
        table.add_row(
            escape(printable(node.name)),
            f"{node.round}/{node.rounds}",
            f"{linked}/{len(node.neighbours)}",
            f"{node.living}/{node.members}",
            escape(printable(f"{node.phase} for {node.seconds:.1f} s, {where}")),
        )
    return table


def _around(neighbours: Iterable[NeighbourStatus]) -> Table:
    table = _columns("neighbour", "round", "last sign", "usually late")
    table.add_column("")
    for neighbour in neighbours:
        linked = "" if neighbour.linked else ", not linked"
        table.add_row(
            escape(printable(neighbour.name)),
            str(neighbour.round),
            "–" if neighbour.last_sign is None else f"{neighbour.last_sign:.1f} s ago",
            "–" if neighbour.lateness is None else f"{neighbour.lateness:.2f} s",
            escape(printable(neighbour.standing)) + linked,
        )
    return table


def _columns(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for head in numbers:
        table.add_column(head, justify="right", no_wrap=True)
    return table
