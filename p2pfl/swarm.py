"""A whole topology as processes on this machine: real nodes, real sockets, throw-away identities.

The parent imports everything once and forks a process for each node, which is quick and shares the memory of what was
imported. A socket pair joins each child with the parent: the child reports lines through it, and when the parent is
gone, however it ended, the pair breaks and the child ends at once. No node takes orders from the parent about rounds.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from p2pfl import topology
from p2pfl.analysis import compare_contraction, consensus_distance
from p2pfl.config import LABEL_FLIP, PROCESS_FAULTS, VECTOR_LIES, Experiment, to_toml
from p2pfl.control import forget
from p2pfl.data import Part, load_part, load_parts
from p2pfl.identity import Identity, Member, Roster
from p2pfl.learner import make_learner
from p2pfl.ledger import simulated_ledger
from p2pfl.messages import BadInput, Schema, TrainingFailed
from p2pfl.private import check_layers
from p2pfl.records import Json, Line, Run, inside, summarise, write_json, write_text
from p2pfl.runtime import assemble, leave_on_signals
from p2pfl.topology import Topology
from p2pfl.topology.fit import check_graph
from p2pfl.topology.implied import implied
from p2pfl.trainer import aggregator_of, is_personal, privacy_of, runs_of
from p2pfl.weights import mass

HOST = "127.0.0.1"
LEAVE_SECONDS = 5.0  # that nodes are given to end after they were asked to, before they are killed
READ_BYTES = 65536


@dataclass(slots=True)
class Child:
    """One node process, as its parent sees it."""

    name: str
    pid: int
    pipe: socket.socket
    buffer: bytes = b""
    address: str | None = None
    last_metrics: Line = field(default_factory=dict)
    outcome: Line | None = None  # its last words: finished, rejected, bytes
    error: str = ""
    ended: bool = False
    epoch: int = 1
    suffered: int = 0  # faults of the experiment
    introduced: bool = False  # it knows where the others listen
    paused: bool = False
    away: float | None = None  # seconds until it goes on, or starts again once it has ended

    @property
    def over(self) -> bool:
        return self.ended and self.away is None


@dataclass(frozen=True, slots=True)
class Ground:
    """What a run starts from, in every driver."""

    graph: Topology
    parts: Mapping[str, Part]  # of each node
    masses: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a node ended, in every driver."""

    name: str
    finished: bool
    last_metrics: Line
    rejected: Mapping[str, int]
    sent: int  # bytes
    received: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    summary: Line
    failed_by_itself: tuple[str, ...]  # nodes that did not finish although nobody killed them
    errors: Mapping[str, str]


def check_faults(experiment: Experiment) -> None:
    """BadInput for a fault that cannot be done to processes on one machine."""
    for index, fault in enumerate(experiment.faults):
        if fault.kind not in PROCESS_FAULTS and fault.about not in VECTOR_LIES:
            what = fault.kind if fault.about is None else f"{fault.kind} about {fault.about}"
            raise BadInput(
                f"faults.{index}: `p2pfl up` can do {', '.join(PROCESS_FAULTS)}, and lie about what was learnt, "
                f"not {what}: use `p2pfl simulate` for that"
            )


def check_lies(experiment: Experiment, parts: Mapping[str, Part]) -> None:
    """BadInput for a lie that these rows do not allow."""
    for index, fault in enumerate(experiment.faults):
        if fault.about == LABEL_FLIP and not parts[experiment.name_of(fault.node)].train.classes:
            raise BadInput(
                f"faults.{index}: a lie about {LABEL_FLIP} turns classes round, and these data have quantities: "
                'use about = "negate"'
            )


def check_privacy(experiment: Experiment, part: Part, name: str) -> None:
    """BadInput, once, for what each node would refuse by itself; and what it imports is shared by all that are forked.

    A gradient is not tried: a process that has computed one on an accelerator must not fork.
    """
    learner = make_learner(experiment, part, name)
    privacy_of(experiment, experiment.privacy, learner, simulated_ledger(experiment.seed, name))
    if experiment.privacy.dp == "example":
        check_layers(learner.module)


def prepare(experiment: Experiment, run: Run) -> Ground:
    """Build the graph, share out the rows, and write both down. BadInput for what is wrong with the experiment."""
    graph, weights = topology.build(experiment.topology, experiment.seed), experiment.topology.weighting
    check_graph(experiment, graph)
    topology.neighbourhoods(graph, graph.names[0], weights)(0)  # solved, or refused, before anything starts
    torch.set_num_threads(1)  # sums in one order; and a parent whose torch has started threads must not fork
    parts = dict(zip(graph.names, load_parts(experiment), strict=True))
    check_lies(experiment, parts)
    aggregator_of(experiment)  # each node would say by itself that the user's function is not there
    if experiment.mix.shared != ("*",) or experiment.mix.norms == "own":
        runs_of(experiment, make_learner(experiment, parts[graph.names[0]], graph.names[0]))
    if experiment.privacy.dp != "none":
        check_privacy(experiment, parts[graph.names[0]], graph.names[0])
    masses = {name: mass(weights, len(part.train)) for name, part in parts.items()}
    write_text(run.experiment, to_toml(experiment))
    write_json(run.topology, _json(topology.node_link(graph, weights, masses)))
    return Ground(graph, parts, masses)


def up(
    experiment: Experiment,
    run: Run,
    observe: Callable[[Line], None],
) -> Outcome:
    """Run the experiment to its end. `observe` is told every line that a node records, as it comes.

    Ctrl-C (or SIGTERM): the nodes leave gracefully; a second time: they are killed. BadInput for what is wrong with
    the experiment, before any process is started.
    """
    if not hasattr(os, "fork"):
        raise BadInput("`p2pfl up` needs a system that can fork (Linux, macOS); start `p2pfl node` once for each node")
    began = time.monotonic()
    ground = prepare(experiment, run)
    graph, names = ground.graph, ground.graph.names
    identities = [Identity.generate(name) for name in names]
    roster = Roster(tuple(Member(identity.card) for identity in identities))

    children: list[Child] = []

    def start(index: int, epoch: int, suffered: int) -> Child:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            ours, theirs = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            raise BadInput(f"cannot start node {index + 1} of {len(names)}: {error.strerror}; use fewer") from None
        if pid == 0:
            for pipe in (ours, *(child.pipe for child in children)):
                pipe.close()  # or the children would keep each other's pairs alive
            _run_child(experiment, run, graph, identities[index], roster, index, theirs, epoch, suffered)
        theirs.close()
        return Child(names[index], pid, ours, epoch=epoch, suffered=suffered)

    gc.freeze()  # or the first full collection of each child would touch, and so copy, all that they share
    try:
        for index in range(len(names)):
            children.append(start(index, 1, 0))
        with _Interrupts() as interrupts:
            _supervise(children, observe, interrupts, start)
    finally:
        gc.unfreeze()
        _end_all(children)
        for child in children:
            forget(run.node(child.name).control)  # of those who were killed
    seconds = time.monotonic() - began
    return conclude(experiment, run, ground, [_ended(child) for child in children], seconds)


# -- The child -------------------------------------------------------------------------------------------------------


def _run_child(
    experiment: Experiment,
    run: Run,
    graph: Topology,
    identity: Identity,
    roster: Roster,
    index: int,
    pipe: socket.socket,
    epoch: int,
    suffered: int,
) -> NoReturn:
    """Be one node. Never returns into the parent's code, whatever happens."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what it means
        code = _be_node(experiment, run, graph, identity, roster, index, pipe, epoch, suffered)
    except (BadInput, TrainingFailed) as error:
        _say(pipe, {"kind": "error", "why": str(error)})
    finally:
        kind, defect, trace = sys.exc_info()
        if kind is not None and defect is not None:  # of ours, so it is shown whole
            sys.excepthook(kind, defect, trace)
            _say(pipe, {"kind": "error", "why": f"{kind.__name__}: {defect}"})
        sys.stderr.flush()
        os._exit(code)


def _be_node(
    experiment: Experiment,
    run: Run,
    graph: Topology,
    identity: Identity,
    roster: Roster,
    index: int,
    pipe: socket.socket,
    epoch: int,
    suffered: int,
) -> int:
    name = identity.name
    # Lies are its trainer's affair.
    faults = deque([fault for fault in experiment.faults_for(name) if fault.kind in PROCESS_FAULTS][suffered:])

    def say(message: Line) -> None:
        if not _say(pipe, message):
            forget(run.node(name).control)
            os._exit(1)

    def before_round(round: int) -> None:
        if not faults or round < faults[0].round:
            return
        fault = faults.popleft()
        say({"kind": fault.kind, "seconds": fault.lasting})
        # From within, so that it is that round and no later one.
        os.kill(os.getpid(), signal.SIGSTOP if fault.kind == "pause" else signal.SIGKILL)

    def observe(line: Line) -> None:
        say({"kind": "line", "line": line})

    port = experiment.network.base_port
    runtime = assemble(
        experiment,
        identity,
        roster,
        epoch,
        load_part(experiment, index),
        sorted(graph.union()[name]),
        [],
        f"tcp://{HOST}:{port + index if port else 0}",
        run.node(name),
        topology=graph,
        resume=epoch > 1,
        observe=observe,
        before_round=before_round,
    )
    say({"kind": "address", "address": runtime.link.address})
    addresses = json.loads(_hear(pipe))
    runtime.address_book.update({other: address for other, address in addresses.items() if address})
    for neighbour in sorted(graph.union()[name]):
        # Of two neighbours one dials, so that there is one pair of connections; who starts again is sought by nobody.
        if addresses[neighbour] and (neighbour > name or epoch > 1):
            runtime.link.dial(addresses[neighbour], (neighbour,))
    leave_on_signals(runtime)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    finished = runtime.run(lifeline=pipe.fileno())
    rejected: Line = dict(runtime.node.conduct.counts)
    traffic: Line = {"sent": runtime.link.bytes_sent, "received": runtime.link.bytes_received}
    say({"kind": "outcome", "finished": finished, "rejected": rejected, "bytes": traffic})
    return 0 if finished else 1


def _say(pipe: socket.socket, message: Line) -> bool:
    """Report to the parent; False if it is gone."""
    try:
        pipe.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True


def _hear(pipe: socket.socket) -> bytes:
    heard = b""
    while not heard.endswith(b"\n"):
        piece = pipe.recv(READ_BYTES)
        if not piece:
            os._exit(1)
        heard += piece
    return heard


# -- The parent ------------------------------------------------------------------------------------------------------


class _Interrupts:
    """Counts Ctrl-C and SIGTERM, and makes `pipe` readable when one comes. As a context, it puts things back after."""

    def __init__(self) -> None:
        self.count = 0
        self.pipe, self._wake = socket.socketpair()
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupted)
        return self

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._wake.send(b"!")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.pipe.close()
        self._wake.close()


def _supervise(
    children: list[Child],
    observe: Callable[[Line], None],
    interrupts: _Interrupts,
    start: Callable[[int, int, int], Child],
) -> None:
    """Introduce the nodes to each other, pass on what they report, wake and start those that are due, to the end."""
    with selectors.DefaultSelector() as selector:
        selector.register(interrupts.pipe, selectors.EVENT_READ)
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        introduced, leave_until = False, float("inf")
        due: list[tuple[float, int]] = []  # when something is due to a child, and to which
        while not all(child.over for child in children):
            if not introduced and all(child.address for child in children if not child.ended):
                introduced = True
                for child in children:
                    _introduce(child, children)
            if interrupts.count and leave_until == float("inf"):
                leave_until = time.monotonic() + LEAVE_SECONDS
                for index, child in enumerate(children):
                    child.away = None
                    if not child.ended:
                        _wake(children, index)
                        os.kill(child.pid, signal.SIGTERM)
            until = min(leave_until, *(when for when, _ in due), float("inf"))
            left = until - time.monotonic()
            if interrupts.count > 1 or time.monotonic() >= leave_until:
                return
            for key, _ in selector.select(None if left == float("inf") else max(0.0, left)):
                if key.fileobj is interrupts.pipe:
                    interrupts.pipe.recv(READ_BYTES)
                    continue
                child = key.data
                _read(child, observe)
                if child.ended:
                    selector.unregister(key.fileobj)
                if child.away is not None and (child.ended or child.paused):
                    due.append((time.monotonic() + child.away, children.index(child)))
                    child.paused = False
                if introduced and child.address and not child.introduced:
                    _introduce(child, children)
            for when, index in [entry for entry in due if entry[0] <= time.monotonic()]:
                due.remove((when, index))
                child = children[index]
                if child.away is None:
                    continue
                if not child.ended:
                    _wake(children, index)
                    continue
                os.waitpid(child.pid, 0)
                child.pipe.close()
                children[index] = start(index, child.epoch + 1, child.suffered)
                children[index].last_metrics = child.last_metrics
                selector.register(children[index].pipe, selectors.EVENT_READ, children[index])


def _wake(children: Sequence[Child], index: int) -> None:
    children[index].away = None
    os.kill(children[index].pid, signal.SIGCONT)


def _introduce(child: Child, children: Sequence[Child]) -> None:
    """Tell a child where the others listen."""
    child.introduced = True
    _tell(child, {other.name: other.address for other in children})


def _tell(child: Child, message: Line) -> None:
    try:
        child.pipe.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # it has ended; its pipe says so to the selector


def _read(child: Child, observe: Callable[[Line], None]) -> None:
    try:
        piece = child.pipe.recv(READ_BYTES)
    except ConnectionResetError:
        piece = b""
    if not piece:
        child.ended = True
        return
    *lines, child.buffer = (child.buffer + piece).split(b"\n")
    for text in lines:
        message = json.loads(text)
        match message["kind"]:
            case "address":
                child.address = message["address"]
            case "line":
                if "round" in message["line"] and "mixed" in message["line"]:
                    child.last_metrics = message["line"]
                observe(message["line"])
            case "outcome":
                child.outcome = message
            case "restart" | "pause" | "kill":
                child.suffered += 1
                child.away = message["seconds"] if message["kind"] != "kill" else None
                child.paused = message["kind"] == "pause"
            case "error":
                child.error = message["why"]


def _end_all(children: Sequence[Child]) -> None:
    """No process outlives us: whoever still runs is killed, and every one is waited for."""
    for child in children:
        if not child.ended:
            os.kill(child.pid, signal.SIGKILL)
    for child in children:
        os.waitpid(child.pid, 0)
        child.pipe.close()


# -- The end ---------------------------------------------------------------------------------------------------------


def _ended(child: Child) -> Ended:
    words = child.outcome or {}
    traffic = _numbers(inside(words, "bytes"))
    return Ended(
        child.name,
        finished=words.get("finished") is True,
        last_metrics=child.last_metrics,
        rejected=_numbers(inside(words, "rejected")),
        sent=traffic.get("sent", 0),
        received=traffic.get("received", 0),
        error=child.error,
    )


def conclude(experiment: Experiment, run: Run, ground: Ground, nodes: Sequence[Ended], seconds: float) -> Outcome:
    """Look at the models that the finished nodes have left, sum everything up, and write the summary."""
    finished = [node.name for node in nodes if node.finished]
    scores, distance, parameters = mean_model_scores(experiment, run, ground, finished)
    facts = _json(implied(ground.graph, experiment.topology.weighting, ground.masses, parameters))
    lines = {name: run.node(name).read_metrics() for name in ground.graph.names}
    rejected: Counter[str] = Counter()
    for node in nodes:
        rejected.update(node.rejected)
    summary = summarise(
        nodes=list(ground.graph.names),
        finished=finished,
        rounds=experiment.train.rounds,
        seconds=seconds,
        last_metrics={node.name: node.last_metrics for node in nodes if node.last_metrics},
        mean_model=scores,
        consensus_distance=distance,
        rejected=rejected,
        sent=sum(node.sent for node in nodes),
        received=sum(node.received for node in nodes),
        contraction=_json(compare_contraction(lines, ground.masses, facts)),
        topology=facts,
        personal=any(
            is_personal(experiment, make_learner(experiment, ground.parts[name], name)) for name in finished[:1]
        ),
    )
    write_json(run.summary, summary)
    failed = tuple(node.name for node in nodes if not node.finished and not experiment.is_doomed(node.name))
    return Outcome(summary, failed, {node.name: node.error for node in nodes if node.error})


def flat_vector(tensors: Mapping[str, Tensor], schema: Schema) -> Tensor:
    """The flat float32 (P,) vector of a model file's tensors."""
    return torch.cat([tensors[spec.name].to(torch.float32).flatten() for spec in schema.tensors])


def mean_model_scores(
    experiment: Experiment, run: Run, ground: Ground, finished: Sequence[str]
) -> tuple[dict[str, float], float, int | None]:
    """What the mean of the finished nodes' models reaches, on average over their test rows, and how far they are apart.

    The second number is the root mean square L2 distance of the nodes' vectors to their mean, the third the number of
    parameters; None if nobody finished.
    """
    if not finished:
        return {}, 0.0, None
    schema = make_learner(experiment, ground.parts[finished[0]], finished[0]).schema
    vectors = [flat_vector(load_file(run.node(name).model), schema) for name in finished]
    mean = torch.stack(vectors).mean(dim=0)
    totals: dict[str, float] = {}
    for name in finished:
        learner = make_learner(experiment, ground.parts[name], name)
        learner.vector.copy_(mean)
        for key, value in learner.evaluate().values.items():
            totals[key] = totals.get(key, 0.0) + value / len(finished)
    return totals, consensus_distance(np.stack([vector.numpy() for vector in vectors])), mean.numel()


def _numbers(value: Json) -> dict[str, int]:
    return {k: v for k, v in value.items() if isinstance(v, int)} if isinstance(value, Mapping) else {}


def _json(value: object) -> Line:
    """What is made of plain values, as JSON."""
    line: Line = json.loads(json.dumps(value))
    return line
