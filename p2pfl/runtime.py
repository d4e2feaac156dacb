"""Real time: one loop over the node's effects, one thread that computes.

The loop waits for the link, for the compute thread and for signals; hands each event to the node; performs what the
node returns. It decides nothing. The compute thread owns the learner and the sealer: jobs go in, outcomes come out,
and no object is used on both sides at once.
"""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import save_file
from torch import Tensor

from p2pfl import checkpoint
from p2pfl.config import BY_ROWS, Experiment
from p2pfl.data import Part
from p2pfl.envelope import Lease, Sealed, Sealer
from p2pfl.identity import Identity, Roster
from p2pfl.learner import Learner, make_learner
from p2pfl.link import Greeting, Link
from p2pfl.messages import (
    BadInput,
    BadMessage,
    Compute,
    Computed,
    Connect,
    Disconnect,
    Done,
    Effect,
    Event,
    Folded,
    Happened,
    Leave,
    Received,
    Record,
    Rejected,
    RoundEnded,
    Save,
    Send,
    Tick,
    Trained,
    TrainingFailed,
    Update,
    Value,
)
from p2pfl.mixing import Probe, check_vector, distance_to_mean, fold
from p2pfl.node import Node, Settings
from p2pfl.records import Line, NodeRecords, event_line, round_line
from p2pfl.rng import stream
from p2pfl.topology import Topology, describe, neighbourhoods, wiring
from p2pfl.weights import mass

DRAIN = 10.0  # seconds that a finished node stays to hand over its last update
LINGER = 2.0  # seconds that the sockets are given to send what they hold
NORMS = 64  # accepted vectors whose median norm is the usual one


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one job of the compute thread gave."""

    computed: Computed
    norm: float  # L2 norm of the own vector
    happened: Happened | None  # about a checkpoint


class Worker:
    """Folds, evaluates, trains, seals: everything heavy, in the order of a round. Used by one thread at a time."""

    def __init__(self, learner: Learner, sealer: Sealer, name: str, folder: Path, experiment: bytes) -> None:
        self._learner = learner
        self._sealer = sealer
        self._name = name
        self._folder = folder  # of the checkpoints
        self._experiment = experiment
        self._probe = Probe(learner.schema.size, stream(0, "probe"))

    def compute(self, job: Compute, save: bool) -> Outcome:
        """Perform one `Compute`: mix what was collected, evaluate, then train for the round, evaluate and seal."""
        learner = self._learner
        folded, trained, update = None, None, None
        if job.round > 0:
            folded = self._fold(job)
        happened = self._save(job) if save else None
        if job.train:
            begin = time.perf_counter()
            loss = self._train(job)
            trained_at = time.perf_counter()
            scores = learner.evaluate()
            trained = Trained(loss, scores, trained_at - begin, time.perf_counter() - trained_at)
        norm = self._own_norm()
        if job.train:
            update = self._seal(job)
        return Outcome(Computed(job.round, folded, trained, update), norm, happened)

    def _train(self, job: Compute) -> float:
        """Train for the round; the mean loss. Where push-sum says so, the vector goes another part of the way."""
        if job.step == 1.0:
            return self._learner.train(job.round)
        start = self._learner.vector.clone()
        loss = self._learner.train(job.round)
        self._learner.vector.sub_(start).mul_(job.step).add_(start)
        return loss

    def _fold(self, job: Compute) -> Folded:
        learner, vector = self._learner, self._learner.vector
        begin = time.perf_counter()
        terms = [(c.peer, c.weight, as_tensor(c.vector).to(vector.device)) for c in job.contributions]
        consensus = distance_to_mean(vector, [term for _, _, term in terms])
        before = self._probe(vector)
        fold(vector, terms, self._name, out=vector)
        after = self._probe(vector)
        mixed_at = time.perf_counter()
        scores = learner.evaluate()
        return Folded(scores, consensus, mixed_at - begin, time.perf_counter() - mixed_at, before, after)

    def _own_norm(self) -> float:
        try:
            return check_vector(self._learner.vector, None)
        except BadMessage as error:  # what we would refuse from others, we do not send
            raise TrainingFailed(f"the own model is no longer usable: {error.why}; lower train.lr") from None

    def _seal(self, job: Compute) -> Sealed:
        host = self._learner.vector.detach().cpu().numpy()
        return self._sealer.seal(host.data, job.round, job.mass, job.reach)

    def _save(self, job: Compute) -> Happened:
        try:
            state = checkpoint.Checkpoint(job.round, job.mass, self._learner.state())
            checkpoint.write(self._folder, state, self._experiment)
        except OSError as error:  # a full disk is no reason to stop training
            return Happened("checkpoint_failed", {"round": job.round, "why": str(error.strerror)})
        return Happened("checkpoint", {"round": job.round})

    def write_model(self, path: Path) -> None:
        """The model as it is now, with the names of the module's state_dict."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.tmp")
        save_file(self._learner.named_tensors(self._learner.vector), draft)
        draft.replace(path)


def as_tensor(vector: object) -> Tensor:
    """The float32 view of an opened update; valid as long as the lease is held."""
    assert isinstance(vector, Lease)
    return torch.frombuffer(vector.view, dtype=torch.float32)


class Runtime:
    """One participant, alive. `run` returns when its rounds are done, or it was asked to leave."""

    def __init__(
        self,
        node: Node,
        link: Link,
        worker: Worker,
        records: NodeRecords,
        epoch: int,
        norm: float,
        observe: Callable[[Line], None],
        before_round: Callable[[int], None],
    ) -> None:
        """`observe` is told each line that is recorded; `norm` is the L2 norm of the initial vector."""
        self.node = node
        self.link = link
        self._worker = worker
        self._records = records
        self._epoch = epoch
        self._observe = observe
        self._before_round = before_round
        self._norms: deque[float] = deque([norm] if norm else [], maxlen=NORMS)
        self._own_norm = norm
        self._last_norms: dict[str, float] = {}
        self._save_next = False
        self._finished: bool | None = None
        self._failure: TrainingFailed | None = None
        self._pending: Future[Outcome] | None = None
        self._round_began: float | None = None  # None: still joining
        self._bytes = (0, 0)
        self._read_end, self._write_end = os.pipe()  # one byte for each thing that the loop must look at
        os.set_blocking(self._write_end, False)
        os.set_blocking(self._read_end, False)
        self._asked_to_leave = False
        self._leave_told = False
        self._new_roster: Callable[[], Roster] | None = None
        self._roster_changed = False

    # -- From outside ------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Ask the node to say goodbye and end. Safe in a signal handler."""
        self._asked_to_leave = True
        self._wake()

    def reload_roster_with(self, read: Callable[[], Roster]) -> None:
        """How to read the roster again, when `roster_changed` is called."""
        self._new_roster = read

    def roster_changed(self) -> None:
        """Ask to read the roster again. Safe in a signal handler."""
        self._roster_changed = True
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._write_end, b"!")
        except BlockingIOError:
            return  # the pipe is full of reasons to wake up already

    # -- The loop ----------------------------------------------------------------------------------------------------

    def run(self, lifeline: int | None = None) -> bool:
        """Take part until done; True if all rounds were finished. When `lifeline` closes, the process ends at once.

        TrainingFailed if the own training did, after the others were told.
        """
        with ExitStack() as stack:
            stack.callback(self._records.close)
            stack.callback(os.close, self._read_end)
            stack.callback(os.close, self._write_end)
            stack.callback(self.link.close, LINGER)
            threads = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute"))
            self.link.watch(self._read_end)
            if lifeline is not None:
                self.link.watch(lifeline)
            self._handle(Tick(), threads)
            while self._finished is None:
                self._turn(threads, lifeline)
            if self._finished:
                self._worker.write_model(self._records.model)
                self._drain(threads)
            if self._failure is not None:
                raise self._failure
            return self._finished

    def _turn(self, threads: ThreadPoolExecutor, lifeline: int | None) -> None:
        deadline = min(self.link.deadline, self.node.deadline or self.link.deadline)
        events, ready = self.link.poll(deadline - time.monotonic())
        if lifeline in ready:
            os._exit(1)  # whoever started us is gone; nothing is left to be told or tidied
        for event in events:
            self._handle(self._checked(event), threads)
        if self._read_end in ready:
            os.read(self._read_end, 4096)
            self._look_around(threads)
        if self.node.deadline is not None and time.monotonic() >= self.node.deadline:
            self._handle(Tick(), threads)

    def _look_around(self, threads: ThreadPoolExecutor) -> None:
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            try:
                outcome = pending.result()
            except TrainingFailed as error:
                self._failure = error
                self._handle(Leave(at_once=True), threads)  # the others need not wait for what will not come
                return
            self._own_norm = outcome.norm
            if outcome.happened is not None:
                self.record(outcome.happened)
            self._handle(outcome.computed, threads)
        if self._asked_to_leave and not self._leave_told:
            self._leave_told = True
            self._handle(Leave(), threads)
        if self._roster_changed and self._new_roster is not None:
            self._roster_changed = False
            try:
                self.link.replace_roster(self._new_roster())
            except BadInput as error:  # a slip in an editor must not end the training: the old roster holds
                self.record(Happened("roster_refused", {"why": str(error)}))

    def _handle(self, event: Event, threads: ThreadPoolExecutor) -> None:
        for effect in self.node.handle(event, time.monotonic()):
            self._perform(effect, threads)

    def _perform(self, effect: Effect, threads: ThreadPoolExecutor) -> None:
        match effect:
            case Send(peers, message):
                self.link.send(peers, message)
            case Save():
                self._save_next = True
            case Compute():
                if self._round_began is None:
                    self._round_began = time.monotonic()
                self._before_round(effect.round)
                self.link.round = effect.round
                self._pending = threads.submit(self._worker.compute, effect, self._save_next)
                self._save_next = False
                self._pending.add_done_callback(lambda _: self._wake())
            case Connect(peer, address):
                if address and not self.link.is_dialling(peer):  # both may: one of them may know no address
                    self.link.dial(address, (peer,))
            case Disconnect(peer, seconds):
                self.link.disconnect(peer, seconds)
            case Record(RoundEnded() as ended):
                self._round_ended(ended)
            case Record(Happened() as happened):
                self.record(happened)
            case Done(finished):
                self._finished = finished

    def _drain(self, threads: ThreadPoolExecutor) -> None:
        """Stay until the neighbours have the last update; one whose link broke over it has its grace to come back."""
        now = time.monotonic()
        until, graced = now + DRAIN, now + min(DRAIN, self.node.settings.grace)
        while (not self.link.idle and now < until) or (self.link.interrupted and now < graced):
            events, _ = self.link.poll(min(self.link.deadline, until if not self.link.idle else graced) - now)
            for event in events:
                self._handle(event, threads)
            now = time.monotonic()

    # -- What may be averaged ----------------------------------------------------------------------------------------

    def _checked(self, event: Event) -> Event:
        """The event itself, or what becomes of an update whose numbers cannot be averaged."""
        match event:
            case Received(peer, Update(round, _, _, vector)):
                try:
                    usual = statistics.median(self._norms) if self._norms else None
                    norm = check_vector(as_tensor(vector), usual)
                except BadMessage as error:
                    return Rejected(peer, error.code, error.why, round=round)
                self._norms.append(norm)
                self._look_twice(peer, round, norm)
        return event

    def _look_twice(self, peer: str, round: int, norm: float) -> None:
        """Lawful, but telling: a model of zeros, our own, or the same one again (two norms do not agree by chance)."""
        again = self._last_norms.get(peer) == norm
        self._last_norms[peer] = norm
        why = ""
        if norm == 0.0:
            why = "a model of zeros"
        elif norm == self._own_norm:
            why = "our own model"
        elif again:
            why = "the same model as before"
        if why:
            fields: dict[str, Value] = {"peer": peer, "round": round, "why": why}
            self.record(Happened("suspicious", fields))

    # -- Records -----------------------------------------------------------------------------------------------------

    def _round_ended(self, ended: RoundEnded) -> None:
        now = time.monotonic()
        sent, received = self.link.bytes_sent, self.link.bytes_received
        line = round_line(
            ended,
            t=time.time(),
            node=self.node.settings.name,
            epoch=self._epoch,
            total_seconds=now - (self._round_began or now),
            sent=sent - self._bytes[0],
            received=received - self._bytes[1],
        )
        self._round_began, self._bytes = now, (sent, received)
        self._records.append_metrics(line)
        self._observe(line)

    def record(self, happened: Happened) -> None:
        """Write one event down, and tell whoever observes."""
        line = event_line(happened, t=time.time(), node=self.node.settings.name)
        self._records.append_event(line)
        self._observe(line)


# -- Building it all -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    """An address to connect to, and who lives there if that is known."""

    address: str
    name: str | None = None


def assemble(
    experiment: Experiment,
    identity: Identity,
    roster: Roster,
    epoch: int,
    part: Part,
    neighbours: Sequence[str],
    dials: Sequence[Dial],
    listen: str | None,
    records: NodeRecords,
    *,
    topology: Topology | None,
    resume: bool,
    observe: Callable[[Line], None],
    before_round: Callable[[int], None] = lambda round: None,
) -> Runtime:
    """Build and connect everything of one participant: this function is the architecture.

    `neighbours` are those known by name: the ones that `topology` ever joins to this node, or, without a topology, the
    first ones, since then whoever of the roster connects is one too. The node listens at once and dials when it runs.
    BadInput for whatever cannot be built.
    """
    learner = make_learner(experiment, part, identity.name)
    facts = _facts(experiment, topology, learner, part)
    agreed = hashlib.sha256("\n".join(f"{key} = {value}" for key, value in sorted(facts.items())).encode()).digest()
    found = checkpoint.read(records.checkpoint, agreed) if resume else None
    if found is not None:
        learner.restore(found.tensors)
    weights, heals = experiment.topology.weighting, experiment.topology.heal
    own_mass = mass(weights, learner.samples)
    greeting = Greeting(
        experiment=agreed,
        schema=learner.schema.digest,
        size=learner.schema.nbytes,
        mass=own_mass,
        facts=facts,
    )
    link = Link(identity, roster, epoch, greeting, lambda peer, round: node.check_offer(peer, round), listen)
    network = experiment.network
    settings = Settings(
        name=identity.name,
        rounds=experiment.train.rounds,
        neighbours=tuple(sorted(neighbours)),
        unnamed=sum(dial.name is None for dial in dials),
        open=topology is None,
        neighbourhood=None if topology is None or heals else neighbourhoods(topology, identity.name, weights),
        members=tuple(sorted(topology.names)) if topology is not None and heals else (),
        wiring=wiring(experiment.topology, experiment.seed, topology, identity.name)
        if topology is not None and heals
        else None,
        address=link.address,
        epoch=epoch,
        suspicion=network.suspicion,
        drift=1 if topology is None else topology.period or len(topology.names),
        weights=weights,
        two_way=experiment.mix.two_way,
        mass=own_mass,
        held_mass=found.mass if found is not None else None,
        equal_masses=weights not in BY_ROWS,
        checkpoint_every=experiment.train.checkpoint_every,
        staleness=float(network.staleness),
        join_timeout=network.join_timeout,
        heartbeat=network.heartbeat,
        silence=network.silence,
        grace=network.grace,
        patience=network.patience,
        first_round=found.round if found is not None else 0,
    )
    node = Node(settings, time.monotonic())
    sealer = Sealer(identity, agreed, learner.schema.digest, learner.schema.nbytes, epoch)
    worker = Worker(learner, sealer, identity.name, records.checkpoint, agreed)
    norm = check_vector(learner.vector, None)
    for dial in dials:
        link.dial(dial.address, () if dial.name is None else (dial.name,))
    runtime = Runtime(node, link, worker, records, epoch, norm, observe, before_round)
    runtime.record(Happened("started", {"rows": learner.samples, "round": settings.first_round}))
    for note in learner.notes:
        runtime.record(Happened("note", {"why": note}))
    return runtime


def _facts(experiment: Experiment, topology: Topology | None, learner: Learner, part: Part) -> dict[str, str]:
    """What all members must have alike, in words; its digest stands for the federation."""
    drawn = {} if topology is None else {"topology, as drawn": describe(topology)}
    # Two files whose labels differ can give equal schemas, and would number the classes differently.
    classes = {"data.classes": ", ".join(part.train.classes)}
    return experiment.agreement() | drawn | classes | {tensor.name: str(tensor) for tensor in learner.schema.tensors}


def leave_on_signals(runtime: Runtime) -> None:
    """Ctrl-C or SIGTERM: leave gracefully; a second time: stop now (exit code 130). SIGHUP: read the roster again."""
    asked = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(130)
        asked = True
        runtime.leave()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda _number, _frame: runtime.roster_changed())
