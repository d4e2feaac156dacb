"""Real time: one loop over the node's effects, one thread that computes.

The loop waits for the link, for the two threads and for signals; hands each event to the node; performs what the node
returns. It decides nothing. The compute thread owns the learner and the sealer: jobs go in, outcomes and copies of its
state come out. Another thread writes those copies to the disk, while the next round is computed. No object is used by
two threads at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from p2pfl import checkpoint
from p2pfl.checkpoint import Checkpoint
from p2pfl.config import BY_ROWS, Experiment
from p2pfl.control import Control, forget
from p2pfl.data import Part
from p2pfl.disclosure import Disclosure, as_json
from p2pfl.envelope import MASKED, NO_BASE, WHOLE, Lease, Sealed, Sealer
from p2pfl.identity import Identity, Roster
from p2pfl.inventory import disclose, planned_noise
from p2pfl.learner import Learner, make_learner
from p2pfl.ledger import append_durably, open_ledger
from p2pfl.link import Greeting, Link
from p2pfl.masks import MaskMaker, Words, gathering_number, read_sum
from p2pfl.messages import (
    BadInput,
    BadMessage,
    Compute,
    Computed,
    Conceal,
    Concealed,
    Connect,
    Contribution,
    Disconnect,
    Done,
    Effect,
    Event,
    Gathering,
    Happened,
    Leave,
    LinkUp,
    MaskKey,
    Received,
    Record,
    Rejected,
    RoundEnded,
    Save,
    Send,
    Tick,
    TrainingFailed,
    Update,
    Value,
)
from p2pfl.mixing import check_vector
from p2pfl.node import Node, Settings
from p2pfl.policy import EVERYTHING, Allowance, Policy
from p2pfl.records import Line, NodeRecords, budget_event, event_line, number, round_line, write_json
from p2pfl.replicas import Replicas, whole
from p2pfl.topology import Topology, describe, neighbourhoods, neighbours_among, partners, wiring
from p2pfl.topology.fit import check_graph
from p2pfl.trainer import Term, Trainer, codec_number, least_vectors
from p2pfl.weights import mass

DRAIN = 10.0  # seconds that a finished node stays to hand over its last update
WAKE_BYTES = 4096  # of the pipe of reasons to wake up, at a time
LINGER = 2.0  # seconds that the sockets are given to send what they hold
FLOAT_BYTES = 4
NO_KEY = bytes(32)  # of a node that has none yet
SUM = "sum"  # in place of a peer's name, where several have come as one
NORMS = 64  # accepted vectors whose median norm is the usual one


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one job of the compute thread gave."""

    computed: Computed
    norm: float  # L2 norm of the own vector


@dataclass(frozen=True, slots=True)
class Packed:
    """One update in the experiment's codec, and as the whole vector that it comes to, for those who need that."""

    change: Sealed | None  # None: nobody could understand it
    whole: Sealed | None
    base: int = NO_BASE  # the round that `change` continues


@dataclass(frozen=True, slots=True)
class Withheld:
    """In place of an update: where nodes learn only sums, nobody gets the vector itself."""


class Sums:
    """What a node needs to give its part to others' sums: its masks, and a record of the rounds in which it has.

    No round is given from twice, not even by the next process: two sums of one vector, over different senders, differ
    by somebody's vector. So a round is on the disk before the first part of it leaves, and whoever starts again goes on
    after the last one, whatever its checkpoint says.
    """

    def __init__(self, masks: MaskMaker, path: Path) -> None:
        """BadInput if what stands in `path` cannot be read."""
        self.masks = masks
        self._path = path
        try:
            lines = path.read_bytes().split() if path.exists() else []  # one that is cut short is a smaller number
            self.last = max((int(line) for line in lines), default=-1)  # -1: it has given nothing yet
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{path} says up to which round this node has given its part to sums, and cannot be read ({error}): "
                "start afresh with another --run-dir"
            ) from None

    def gives(self, round: int) -> None:
        """Something of this round is about to leave. TrainingFailed if the disk does not take that."""
        if round <= self.last:
            return
        try:
            append_durably(self._path, b"\n%d\n" % round)
        except OSError as error:
            raise TrainingFailed(
                f"round {round} was not sent, for {self._path} cannot be written ({error.strerror}), and without that "
                "it could be given from twice: make room there, and go on with --resume"
            ) from None
        self.last = round


class Worker:
    """Folds, evaluates, trains, seals: everything heavy, in the order of a round. Used by one thread at a time."""

    def __init__(
        self, trainer: Trainer, sealer: Sealer, resumed: bool, seen: Path | None = None, sums: Sums | None = None
    ) -> None:
        """`seen`: where to keep what came last, for `p2pfl audit`; None: nowhere. `sums`: where only these are read."""
        self._trainer = trainer
        self._sealer = sealer
        self._sums = sums
        self._usual = Norms(usable_norm(trainer.learner))  # of the means that were mixed
        self._part: Words | None = None  # of somebody's sum, until it is sealed
        self._seen = seen
        unknown = trainer.differences and (resumed or not trainer.starts_alike)
        self._base: int | None = None if unknown else NO_BASE  # round of the last update; None: send a whole one

    def compute(self, job: Compute, save: Callable[[Checkpoint], None] | None, lacking: bool) -> Outcome:
        """Perform one `Compute`: mix what was collected, evaluate, then train for the round, evaluate and seal.

        `save` is given a copy of the state between the two. `lacking`: somebody cannot go on from differences.
        """
        trainer = self._trainer
        folded, trained, update, no_sum = None, None, None, ""
        if job.round > 0 or job.contributions:  # before the first round: the state of others, in place of the own one
            if self._sums is None:
                terms = [Term(c.peer, c.weight, as_tensor(c.vector), c.reference, c.gain) for c in job.contributions]
            else:
                terms, no_sum = self._read_sum(job.contributions)
            if self._seen is not None:
                write_seen(self._seen, job.round - 1, trainer, terms)
            folded = trainer.fold(job, terms, time.perf_counter)
        if save is not None:
            save(Checkpoint(job.round, job.mass if job.held is None else job.held, trainer.state()))
        if job.train:
            trained = trainer.train(job, time.perf_counter)
        norm = usable_norm(trainer.learner)
        if job.train:
            update = self._seal(job, lacking)
        return Outcome(Computed(job.round, folded, trained, update, no_sum), norm)

    def _read_sum(self, contributions: Sequence[Contribution]) -> tuple[list[Term], str]:
        """The mean of the neighbours as one term; none, and why, if it must not be mixed."""
        if not contributions:
            return [], ""
        try:
            mean = sum_term([as_words(c.vector) for c in contributions], contributions)
            self._usual.check(mean.vector)
        except BadMessage as error:
            return [], error.why
        return [mean], ""

    def conceal(self, job: Conceal) -> Concealed:
        """The own part of a neighbour's sum, sealed; or what is wrong with what the neighbour asks.

        TrainingFailed if the own vector does not fit, or it cannot be written down that something leaves.
        """
        assert self._sums is not None
        self._sums.gives(job.round)
        vector = self._trainer.public.detach().cpu().numpy()
        if self._part is None:  # made once: fresh memory for 100 MB costs as much as masking it
            self._part = np.empty(len(vector), dtype="<u4")
        try:
            part = self._sums.masks.part(vector, job.weight, job.peer, job.gathering, self._part)
        except BadMessage as error:
            return Concealed(job, None, error.why)
        except ValueError as error:
            raise TrainingFailed(unusable(str(error))) from None
        number = self._sums.masks.number(job.peer, job.gathering)
        return Concealed(job, self._sealer.seal(part.data, job.round, job.mass, job.reach, MASKED, number))

    def _seal(self, job: Compute, lacking: bool) -> Sealed | Packed | Withheld:
        trainer, about = self._trainer, (job.round, job.mass, job.reach)
        if self._sums is not None:
            return Withheld()
        if trainer.codec.name == "none":
            return self._sealer.seal(_host(trainer.public), *about)
        assert trainer.change is not None
        change = trainer.codec.encode(trainer.change, trainer.number(job.round))
        base, self._base = self._base, job.round if trainer.differences else NO_BASE
        if base is None:  # after a resume nobody knows what one's differences would be added to
            return Packed(None, self._sealer.seal(_host(trainer.public), *about))
        packed = self._sealer.seal(change, *about, trainer.codec.name, base)
        return Packed(packed, self._sealer.seal(_host(trainer.public), *about) if lacking else None, base)

    def write_model(self, path: Path) -> None:
        """See `write_model`."""
        write_model(self._trainer.learner, path)


def as_tensor(vector: object) -> Tensor:
    """The float32 vector of an update; if it is a view of what was opened, valid as long as the lease is held."""
    if isinstance(vector, Tensor):
        return vector
    assert isinstance(vector, Lease)
    return torch.frombuffer(vector.view, dtype=torch.float32)


def as_words(vector: object) -> Words:
    """The part of a sum that an update brings; a view of what was opened, valid as long as the lease is held."""
    assert isinstance(vector, Lease)
    return np.frombuffer(vector.view, dtype="<u4")


def sum_term(parts: Sequence[Words], contributions: Sequence[Contribution]) -> Term:
    """What the parts of all the contributions' senders come to: the mean of their vectors, as one neighbour's."""
    mean = read_sum(parts, math.fsum(c.gain for c in contributions))
    return Term(SUM, math.fsum(c.weight for c in contributions), torch.from_numpy(mean))


def _host(vector: Tensor) -> memoryview:
    """The bytes of a vector, on the CPU."""
    return vector.detach().cpu().numpy().data


# -- What a job does to a model, in every driver ---------------------------------------------------------------------


def usable_norm(learner: Learner) -> float:
    """The L2 norm of the own vector; TrainingFailed if others would refuse it, for then it is not sent."""
    try:
        return check_vector(learner.vector, None)
    except BadMessage as error:
        raise TrainingFailed(unusable(error.why)) from None


def unusable(why: str) -> str:
    """What is said of a model that others would refuse."""
    return f"the own model is no longer usable: {why}; lower train.lr"


class Norms:
    """What is usual among the vectors that a node has accepted, so that one which is not can be refused."""

    def __init__(self, own: float, *, sums: bool = False) -> None:
        """`own`: L2 norm of the node's first vector, to begin with; 0.0 tells nothing. `sums`: it gets running sums."""
        self._accepted: deque[float] = deque([own] if own else [], maxlen=NORMS)
        self._sums = sums

    def check(self, vector: Tensor, mass: float = 1.0) -> float:
        """The L2 norm of a model that came, from now on a usual one; BadMessage as `check_vector` says.

        A running sum is `mass` times such a model.
        """
        usual = statistics.median(self._accepted) if self._accepted else None
        norm = check_vector(vector, usual, mass if self._sums else 1.0)
        self._accepted.append(norm)
        return norm


def write_model(learner: Learner, path: Path) -> None:
    """The model as it is now, with the names of the module's state_dict. TrainingFailed if the disk is full."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(save(learner.named_tensors(learner.vector)))
        draft.replace(path)
    except OSError as error:
        why = f"the rounds are done, but {path} cannot be written: {error.strerror}"
        raise TrainingFailed(f"{why}; make room, and run once more with --resume") from None


def write_seen(path: Path, round: int, trainer: Trainer, terms: Sequence[Term]) -> None:
    """Keep what came of the neighbours in this round, by their names, in place of what came before.

    The metadata says of which round, and the schema that the vectors are of. A disk that does not take it is no reason
    to stop training: `p2pfl audit` will say what is not there.
    """
    models = trainer.models_of(terms)
    if not models:
        return
    draft = path.with_name(f".{path.name}.tmp")
    about = {"round": str(round), "schema": trainer.learner.schema.digest.hex()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(save({peer: model.cpu().contiguous() for peer, model in models.items()}, about))
        draft.replace(path)


class Runtime:
    """One participant, alive. `run` returns when its rounds are done, or it was asked to leave."""

    def __init__(
        self,
        node: Node,
        link: Link,
        worker: Worker,
        records: NodeRecords,
        replicas: Replicas,
        experiment: bytes,
        epoch: int,
        norm: float,
        observe: Callable[[Line], None],
        before_round: Callable[[int], None],
    ) -> None:
        """`observe` is told each line that is recorded; `experiment` is its digest, `norm` the first vector's, L2."""
        self._replicas = replicas
        self._experiment = experiment
        self._newest_base = NO_BASE  # which round our newest update continues
        self.node = node
        self.link = link
        self.address_book: dict[str, str] = {}  # where members listen who never said it here themselves
        self._worker = worker
        self._records = records
        self._epoch = epoch
        self._observe = observe
        self._before_round = before_round
        self._norms = Norms(norm, sums=node.settings.schedule == "push-sum")
        self._own_norm = norm
        self._last_norms: dict[str, float] = {}
        self._may_stand_still = False  # those whose privacy budget is spent train no more: they lawfully agree
        self._save_next = False
        self._states: SimpleQueue[Checkpoint] = SimpleQueue()  # from the compute thread, for the disk
        self._writer = checkpoint.Writer(records.checkpoint, experiment, self._wake)
        self._finished: bool | None = None
        self._failure: TrainingFailed | None = None
        self._pending: deque[Future[Outcome | Concealed]] = deque()  # in the order of the compute thread
        self._round_began: float | None = None  # None: still joining
        self._bytes = (0, 0)
        self._read_end, self._write_end = os.pipe()  # one byte for each thing that the loop must look at
        os.set_blocking(self._write_end, False)
        os.set_blocking(self._read_end, False)
        self._lost_lines = 0  # of the records, which the disk did not take
        self._asked_to_leave = False
        self._leave_told = False
        self.allowance = Allowance(EVERYTHING, 0, 0)  # what the owner of this node lets it send
        self.stopped = ""  # why it left before its rounds were done, if the owner does not let it go on
        self._new_roster: Callable[[], Roster] | None = None
        self._control: Control | None = None
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
        if self._finished is not None:
            return  # nobody looks any more, and the pipe may be closed
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
            stack.callback(self._writer.close)
            stack.callback(self._write_states, wait=True)
            stack.callback(self.link.close, LINGER)
            threads = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute"))
            self.link.watch(self._read_end)
            if lifeline is not None:
                self.link.watch(lifeline)
            self._control = self._open_control(stack)
            self._handle(Tick(), threads)
            while self._finished is None:
                self._turn(threads, lifeline)
            if self._finished:
                try:
                    self._worker.write_model(self._records.model)
                except TrainingFailed as error:
                    self._failure = error  # to be told once the neighbours have what they need from us
                self._drain(threads)
            if self._lost_lines:
                self.record(Happened("records_incomplete", {"lines": self._lost_lines}))
            if self._failure is not None:
                raise self._failure
            return self._finished

    def _open_control(self, stack: ExitStack) -> Control | None:
        """Let `p2pfl status` ask this node; where that cannot be, training goes on without."""
        try:
            control = stack.enter_context(Control(self._records.control))
        except BadInput as error:
            self.record(Happened("note", {"why": str(error)}))
            return None
        self.link.watch(control.fileno())
        return control

    def _answer(self, ready: set[int]) -> None:
        """Say how things stand, if somebody asks."""
        if self._control is not None and self._control.fileno() in ready:
            self._control.answer(self.node.status(time.monotonic()))

    def _turn(self, threads: ThreadPoolExecutor, lifeline: int | None) -> None:
        deadline = min(self.link.deadline, self.node.deadline or self.link.deadline)
        events, ready = self.link.poll(deadline - time.monotonic())
        if lifeline in ready:
            forget(self._records.control)
            os._exit(1)  # whoever started us is gone; nothing else is left to be told or tidied
        for event in events:
            self._handle(self._checked(event), threads)
        if self.link.successor:
            self._give_way(self.link.successor)
            return
        if self._read_end in ready:
            os.read(self._read_end, WAKE_BYTES)
            self._look_around(threads)
        if self.node.deadline is not None and time.monotonic() >= self.node.deadline:
            self._handle(Tick(), threads)
        self._answer(ready)

    def _look_around(self, threads: ThreadPoolExecutor) -> None:
        self._write_states()
        while self._pending and self._pending[0].done():
            try:
                outcome = self._pending.popleft().result()
            except TrainingFailed as error:
                self._failure = error
                self._handle(Leave(at_once=True), threads)  # the others need not wait for what will not come
                return
            if isinstance(outcome, Concealed):
                self._handle(outcome, threads)
                continue
            self._own_norm = outcome.norm
            trained = outcome.computed.trained
            self._may_stand_still = trained is not None and trained.spent is not None
            if isinstance(outcome.computed.update, Packed):
                self._newest_base = outcome.computed.update.base
            if (told := budget_event(outcome.computed)) is not None:
                self.record(told)
            self._handle(self._within_hours(outcome.computed), threads)
        if self._asked_to_leave and not self._leave_told:
            self._leave_told = True
            self._handle(Leave(), threads)
        if self._roster_changed and self._new_roster is not None:
            self._roster_changed = False
            try:
                self.link.replace_roster(self._new_roster())
            except BadInput as error:  # a slip in an editor must not end the training: the old roster holds
                self.record(Happened("roster_refused", {"why": str(error)}))

    def _save(self, state: Checkpoint) -> None:
        """Have a copy of the state written. Called by the compute thread, which does not wait for the disk."""
        self._states.put(state)
        self._wake()

    def _write_states(self, wait: bool = False) -> None:
        """Hand the newest state to the writer and say what became of those before; or, with `wait`, of all."""
        while not self._states.empty():
            self._writer.put(self._states.get())
        for written in self._writer.written(wait):
            if written.failure:
                self.record(Happened("checkpoint_failed", {"round": written.round, "why": written.failure}))
            else:
                self.record(Happened("checkpoint", {"round": written.round}))

    # -- What its owner allows ---------------------------------------------------------------------------------------

    def _within_policy(self, job: Compute) -> Compute:
        """The job; only its first half, mixing, with the state kept, where the round after it must not be sent."""
        why = self.allowance.forbids(datetime.now(), self.link.bytes_sent) if job.train else ""
        if not why:
            return job
        self._stop(job.round, why)
        self._save_next = True
        return replace(job, train=False)

    def _within_hours(self, computed: Computed) -> Computed:
        """What was computed; without the update, where the hours in which it may be sent have ended meanwhile."""
        why = self.allowance.policy.forbids(datetime.now(), 0, 0) if computed.update is not None else ""
        if not why:
            return computed
        self._stop(computed.round, why)
        return replace(computed, trained=None, update=None)

    def _stop(self, round: int, why: str) -> None:
        self.stopped = why
        self.record(Happened("policy", {"round": round, "why": why}))

    def _give_way(self, epoch: int) -> None:
        """A later process of this identity takes part: end, without a goodbye, which would be taken for one of both."""
        self.record(Happened("displaced", {"epoch": epoch}))
        self._finished = False
        self._failure = TrainingFailed(
            f"another process with the identity of {self.node.settings.name} has started after this one "
            f"(start {epoch}, this is {self._epoch}), and the others go on with it: run one, or make a key for each; "
            "if there is no other, the .epoch file beside the key is an old copy: "
            "write the output of `date +%s` into it"
        )

    def _handle(self, event: Event, threads: ThreadPoolExecutor) -> None:
        for effect in self.node.handle(event, time.monotonic()):
            self._perform(effect, threads)

    def _perform(self, effect: Effect, threads: ThreadPoolExecutor) -> None:
        match effect:
            case Send(peers, Update(vector=Packed()) as update):
                self._send_packed(peers, update)
            case Send(peers, message):
                self.link.send(peers, message)
            case Save():
                self._save_next = True
            case Compute():
                if self._round_began is None:
                    self._round_began = time.monotonic()
                self._before_round(effect.round)
                effect = self._within_policy(effect)
                self.link.round = effect.round
                save = self._save if self._save_next else None
                self._submit(threads, partial(self._worker.compute, effect, save, bool(self.link.lacking)))
                self._save_next = False
            case Conceal():
                self._submit(threads, partial(self._worker.conceal, effect))
            case Connect(peer, address):
                address = address or self.address_book.get(peer, "")
                if address and not self.link.is_dialling(peer):  # both may: one of them may know no address
                    self.link.dial(address, (peer,))
            case Disconnect(peer, seconds):
                self.link.disconnect(peer, seconds)
            case Record(RoundEnded() as ended):
                self._round_ended(ended)
            case Record(Happened() as happened):
                self.record(happened)
                if happened.event == "no_state":
                    self._failure = TrainingFailed(
                        f"the checkpoints in {self._records.checkpoint} are damaged, and no neighbour gave its state: "
                        "try again when one is there, or start afresh by moving that folder away"
                    )
            case Done(finished):
                self._finished = finished

    def _submit(self, threads: ThreadPoolExecutor, job: Callable[[], Outcome | Concealed]) -> None:
        """Have the compute thread do it, after all that it was given before."""
        self._pending.append(threads.submit(job))
        self._pending[-1].add_done_callback(lambda _: self._wake())

    def _drain(self, threads: ThreadPoolExecutor) -> None:
        """Stay until the neighbours have the last update; one whose link broke over it has its grace to come back.

        Unless the user wants to be gone.
        """
        now = time.monotonic()
        until, graced = now + DRAIN, now + min(DRAIN, self.node.settings.grace)
        while not self._asked_to_leave and (
            (not self.link.idle and now < until) or (self.link.interrupted and now < graced)
        ):
            events, ready = self.link.poll(min(self.link.deadline, until if not self.link.idle else graced) - now)
            for event in events:
                self._handle(event, threads)
            self._answer(ready)
            if self._read_end in ready:
                os.read(self._read_end, WAKE_BYTES)
            now = time.monotonic()

    def _send_packed(self, peers: tuple[str, ...], update: Update) -> None:
        """To each of these the difference, or the whole vector to whoever has said that it needs one.

        Where there is no whole one yet, the difference goes to all: who refuses it at least does not wait for it.
        """
        packed, whole = update.vector, set[str]()
        assert isinstance(packed, Packed)
        if packed.whole is not None:
            whole = set(peers) if packed.change is None else set(peers) & self.link.lacking
            self.link.send(sorted(whole), replace(update, vector=packed.whole))
            self.link.lacking -= whole
        if packed.change is not None:
            self.link.send([peer for peer in peers if peer not in whole], replace(update, vector=packed.change))

    def _note_what_it_has(self, event: LinkUp) -> None:
        """Whoever has not even the update that our newest one continues needs a whole one; we, of each new process."""
        self._replicas.met(event.peer, event.epoch)
        if event.seen < self._newest_base:
            self.link.lacking.add(event.peer)

    # -- What may be averaged ----------------------------------------------------------------------------------------

    def _checked(self, event: Event) -> Event:
        """The event itself, an update as a vector, or what becomes of one whose numbers cannot be averaged."""
        match event:
            case LinkUp():
                self._note_what_it_has(event)
            case Received(peer, Update(round, _, _, Lease() as lease) as update):
                if self.node.gathering is not None:
                    return self._part_of_a_sum(event, self.node.gathering, lease)
                try:
                    vector = self._read(peer, round, lease)
                    norm = self._norms.check(as_tensor(vector), update.mass)
                except BadMessage as error:
                    return Rejected(peer, error.code, error.why, update.evidence, round)
                self._look_twice(peer, round, norm)
                if isinstance(vector, Tensor):
                    self._replicas.keep(peer, round, vector)
                return Received(peer, replace(update, vector=vector))
        return event

    def _part_of_a_sum(self, event: Received, asked: Gathering, lease: Lease) -> Event:
        """The event itself, if it brings a part of the very sum that was asked for: in another it would be noise."""
        assert isinstance(event.message, Update) and lease.manifest is not None
        number = gathering_number(self._experiment, self.node.settings.name, asked)
        if lease.manifest.codec == MASKED and lease.manifest.base == number:
            return event
        why = f"round {event.message.round} brings {lease.manifest.codec}, for another sum than was asked for"
        return Rejected(event.peer, "other_sum", why, round=event.message.round)

    def _read(self, peer: str, round: int, lease: Lease) -> Lease | Tensor:
        """What was opened, as a vector: itself, if it is one and no other will be added to it."""
        manifest = lease.manifest
        assert manifest is not None
        if manifest.codec != WHOLE:
            return self._replicas.read(peer, round, lease.view[: manifest.size])
        return whole(lease.view[: manifest.size]) if self._replicas.continued else lease

    def _look_twice(self, peer: str, round: int, norm: float) -> None:
        """Lawful, but telling: a model of zeros, our own, or the same one again (two norms do not agree by chance)."""
        again = self._last_norms.get(peer) == norm
        self._last_norms[peer] = norm
        why = ""
        if norm == 0.0:
            why = "a model of zeros"
        elif self._may_stand_still:
            return
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
        self._keep(self._records.append_metrics, line)

    def record(self, happened: Happened) -> None:
        """Write one event down, and tell whoever observes."""
        self._keep(self._records.append_event, event_line(happened, t=time.time(), node=self.node.settings.name))

    def _keep(self, append: Callable[[Line], None], line: Line) -> None:
        """Write a line down and show it. A disk that is full is no reason to stop training: it is said, once."""
        try:
            append(line)
        except OSError as error:
            self._lost_lines += 1
            if self._lost_lines == 1:
                failed = Happened("records_failed", {"why": str(error.strerror)})
                self._observe(event_line(failed, t=time.time(), node=self.node.settings.name))
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
    policy: Policy = EVERYTHING,
) -> Runtime:
    """Build and connect everything of one participant: this function is the architecture.

    `neighbours` are those known by name: the ones that `topology` ever joins to this node, or, without a topology, the
    first ones, since then whoever of the roster connects is one too. The node listens at once and dials when it runs.
    BadInput for whatever cannot be built, or is not allowed by `policy`, before a socket is opened.
    """
    if topology is not None:
        check_graph(experiment, topology)
    learner = make_learner(experiment, part, identity.name)
    varies = topology is not None and topology.varies
    privacy = policy.stricter(experiment.privacy)
    ledger = open_ledger(records.folder) if privacy.dp != "none" else None
    trainer = Trainer(learner, experiment, identity.name, varies=varies, privacy=privacy, ledger=ledger)
    roster = policy.admitted(roster, identity.name)
    noise = planned_noise(privacy, learner, experiment.train.rounds)
    leaving = disclose(experiment, trainer, learner, identity.name, topology, roster, part.train.classes, noise)
    allowance = _allowance(policy, experiment, leaving, roster, records)
    records.folder.mkdir(parents=True, exist_ok=True)
    write_json(records.disclosure, as_json(leaving))
    start = trainer.start if trainer.differences else None  # before the own one goes on from a checkpoint
    facts = _facts(experiment, topology, learner, part)
    agreed = hashlib.sha256("\n".join(f"{key} = {value}" for key, value in sorted(facts.items())).encode()).digest()
    found = checkpoint.Found(None, {})
    if resume:
        found = checkpoint.read(records.checkpoint, agreed, trainer.state())
    if found.newest is not None:
        trainer.restore(found.newest.tensors)
    weights, heals = experiment.topology.weighting, experiment.topology.heal
    own_mass = mass(weights, learner.samples)
    greeting = Greeting(
        experiment=agreed,
        schema=learner.schema.digest,
        size=FLOAT_BYTES * trainer.size,
        mass=own_mass,
        facts=facts,
        packed={} if trainer.codec.name == "none" else {trainer.codec.name: trainer.codec.nbytes},
    )
    sums = Sums(MaskMaker(identity, epoch, agreed), records.given) if experiment.privacy.sums == "masked" else None
    first_round = found.newest.round if found.newest is not None else 0
    if sums is not None:
        first_round = max(first_round, sums.last + 1)
        greeting = replace(greeting, packed={MASKED: greeting.size})
    replicas = Replicas(
        trainer.codec,
        start,
        lambda peer, round: codec_number(experiment.seed, peer, round),
    )
    link = Link(
        identity,
        roster,
        epoch,
        greeting,
        lambda peer, round: node.check_offer(peer, round),
        listen,
        replicas.has,
    )
    settings = replace(
        common_settings(experiment),
        name=identity.name,
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
        drift=1 if topology is None else topology.period or len(topology.names),
        mass=own_mass,
        mask_key=None if sums is None else sums.masks.key,
        senders=None if topology is None else neighbours_among(experiment.topology, experiment.seed, topology),
        stale=found.newest is None and first_round > 0,
        held_mass=found.newest.mass if found.newest is not None else None,
        first_round=first_round,
        needs_state=found.lost,
        partners=partners(experiment.mix.schedule, experiment.seed, identity.name),
    )
    node = Node(settings, time.monotonic())
    packed = sum(greeting.packed.values())
    sealer = Sealer(identity, agreed, learner.schema.digest, FLOAT_BYTES * trainer.size, epoch, packed)
    seen = records.seen if experiment.privacy.keep_seen else None
    worker = Worker(trainer, sealer, found.newest is not None, seen, sums)
    norm = check_vector(learner.vector, None)
    for dial in dials:
        link.dial(dial.address, () if dial.name is None else (dial.name,))
    runtime = Runtime(node, link, worker, records, replicas, agreed, epoch, norm, observe, before_round)
    runtime.allowance = allowance
    runtime.address_book.update({m.card.name: m.addresses[0] for m in roster.members if m.addresses})
    runtime.record(Happened("started", {"rows": learner.samples, "round": settings.first_round}))
    if found.damaged:
        files = tuple(f"{path.name}: {why}" for path, why in found.damaged.items())
        runtime.record(Happened("checkpoint_damaged", {"files": files, "lost": found.lost}))
    for note in trainer.notes:
        runtime.record(Happened("note", {"why": note}))
    return runtime


def _allowance(
    policy: Policy, experiment: Experiment, leaving: Disclosure, roster: Roster, records: NodeRecords
) -> Allowance:
    """What the owner of this node lets it send from here on; BadInput if it is nothing."""
    for objection in policy.objections(experiment, leaving.schema, [member.name for member in roster.members]):
        raise BadInput(f"the policy: {objection}")
    lines = records.read_metrics()
    planned = math.ceil(leaving.round_bytes)
    # A process that ended may have sent a part of a round of which it wrote no line.
    before = sum(int(number(line, "bytes", "sent") or 0) for line in lines)
    before += planned * len({number(line, "epoch") for line in lines})
    if why := policy.forbids(datetime.now(), before, planned):
        raise BadInput(f"the policy: {why}")
    return Allowance(policy, before, planned)


def common_settings(experiment: Experiment) -> Settings:
    """What all nodes of an experiment have alike; what differs between them is theirs to add."""
    network = experiment.network
    weights = experiment.topology.weighting
    return Settings(
        name="",
        rounds=experiment.train.rounds,
        suspicion=network.suspicion,
        weights=weights,
        two_way=experiment.two_way,
        equal_masses=weights not in BY_ROWS,
        checkpoint_every=experiment.train.checkpoint_every,
        staleness=math.inf if experiment.mix.schedule != "sync" else float(network.staleness),
        schedule=experiment.mix.schedule,
        least=least_vectors(experiment),
        mask_key=MaskKey("", 1, NO_KEY) if experiment.privacy.sums == "masked" else None,
        join_timeout=network.join_timeout,
        heartbeat=network.heartbeat,
        silence=network.silence,
        grace=network.grace,
        patience=network.patience,
    )


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
