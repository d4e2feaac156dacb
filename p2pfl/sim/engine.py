"""All nodes of a scenario in virtual time: the real `Node`, and one loop over its effects, as `runtime` has one.

A heap of (time, serial, action) decides what is next; nothing here reads a clock, draws from a random stream that the
seed does not name, or goes through a set. So one scenario has one trace. After each event the invariants are checked.
An epoch is counted up on the disk before a start, and a start goes on from the newest checkpoint that is whole.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from p2pfl.asynchronous import OUTSTANDING
from p2pfl.membership import MAX_STRETCH, suspicion_timeout
from p2pfl.messages import (
    BadInput,
    Compute,
    Computed,
    Conceal,
    Concealed,
    Connect,
    Disconnect,
    Done,
    Effect,
    Event,
    Gathering,
    Goodbye,
    Gossip,
    Happened,
    Leave,
    LinkDown,
    LinkUp,
    MaskKey,
    Receipt,
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
from p2pfl.node import ANTI_ENTROPY, Node, Settings
from p2pfl.records import budget_event
from p2pfl.rng import stream
from p2pfl.sim import world
from p2pfl.sim.faults import (
    Break,
    ClockJump,
    Corrupt,
    Crash,
    CrashAtDeed,
    Delay,
    DiskFull,
    Fault,
    Lie,
    Lied,
    Lose,
    Partition,
    Pause,
    Replay,
    Slow,
    Stop,
    describe,
)
from p2pfl.sim.invariants import (
    AFTER_EVENT,
    AT_COMPUTE,
    Broken,
    Ledger,
    all_have_finished,
    cargo_of,
    catches_up,
    members_agree_on_who_lives,
    neighbours_agree_on_who_lives,
    nothing_is_sent_twice,
    parcel_of,
    survivors_are_in_one_piece,
    the_dead_were_silent,
    the_living_are_not_buried,
    what_was_saved_is_found,
)
from p2pfl.sim.links import Links
from p2pfl.sim.scenario import Scenario, random_scenario
from p2pfl.sim.world import Action, Cargo, Clock, Life, Machine, Number, Parcel, Saved, Worker, short
from p2pfl.topology import Topology, among, neighbourhoods, partners
from p2pfl.topology.matrix import check_weights
from p2pfl.weights import Stake, Wiring

DRAIN = 10.0  # seconds that a finished node stays to hand over its last update, as in `runtime`
LOOK = 0.1  # seconds between two looks at whether it may go
NO_KEY = bytes(32)  # nothing is masked here: see `world.Cargo`
RETRY_START = 10.0  # seconds until a node that could not write its epoch is started again
COMPUTE_SPREAD = 0.05  # by which a round's computing may take longer, relative
STEP_SHARE = 0.04  # of the compute time that passes before each step of a checkpoint
SETTLED = 30.0  # seconds without a fault after which neighbours agree: keepalive, dialling, handshake, a heartbeat
PACE = 2.0  # times as long as its computing a round may take once nothing goes wrong any more …
ROUNDS_OF_RUMOURS = 6  # full accounts that each node has passed on when the last one has heard of everything
CATCHING_UP = 300.0  # … and seconds more until everybody is in step again
TAIL = 200  # lines of the trace that a report shows
FLUSH = 2048  # lines that are hashed at once
RARELY = (100_000, 20, 100)  # objects, and collections of younger ones, between two collections: an eighth of the time


Observe = Callable[[Life, RoundEnded | Happened, float], None]  # of a process, at a time


class Trace:
    """What happened, line by line: a running hash, and the lines themselves if they are kept."""

    def __init__(self, keep: bool) -> None:
        self.lines: list[str] = []
        self.count = 0
        self._keep = keep
        self._hash = hashlib.blake2b(digest_size=16)
        self._fresh: list[str] = []
        self._before: list[str] = []

    def add(self, line: str) -> None:
        self._fresh.append(line)
        if len(self._fresh) >= FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._hash.update("".join(f"{line}\n" for line in self._fresh).encode())
        self.count += len(self._fresh)
        if self._keep:
            self.lines += self._fresh
        self._before, self._fresh = self._fresh, []

    def tail(self) -> list[str]:
        """The newest lines."""
        return [*self._before, *self._fresh][-TAIL:]

    def digest(self) -> str:
        """Of all lines so far, hexadecimal; after this, `lines` and `count` are up to date."""
        if self._fresh:
            self._flush()
        return self._hash.hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a simulation ended. All invariants held, or there would be none."""

    digest: str  # of the trace
    lines: int  # of it
    events: int  # that nodes handled
    finished: tuple[str, ...]  # who came to the end
    values: dict[str, float]  # readings of the vectors, at the end
    rounds: dict[str, int]
    seconds: float  # until the last process ended
    node_hours: float  # of life, over all nodes
    drift: float  # of the mean, by folds that had no counterpart
    said: dict[str, int]  # how often each thing was recorded, over all nodes


@dataclass(frozen=True, slots=True)
class Graph:
    """Of the survivors, the same for all of them."""

    topology: Topology
    around: dict[str, tuple[str, ...]]  # who ever hears or tells whom, sorted


def run(
    scenario: Scenario,
    *,
    make_node: Callable[[Settings, float], Node] = Node,
    make_worker: Callable[[Scenario, str], Worker] | None = None,
) -> Outcome:
    """Simulate until everybody is done or dead. Broken if an invariant does not hold."""
    return Engine(scenario, make_node, make_worker or number).run()


def replay(seed: int, *, make_node: Callable[[Settings, float], Node] = Node) -> tuple[list[str], Outcome | Broken]:
    """The whole trace of the scenario of this seed, line by line, and how it ended."""
    engine = Engine(random_scenario(seed), make_node, number, keep=True)
    try:
        outcome: Outcome | Broken = engine.run()
    except Broken as broken:
        outcome = broken
    engine.trace.digest()
    return engine.trace.lines, outcome


def number(scenario: Scenario, name: str) -> Worker:
    """A model of one number for this node."""
    return Number(scenario.values[name], scenario.targets[name], scenario.rate, scenario.settings.schedule)


class Engine:
    """One simulation. `run` it once; its trace and machines can be looked at afterwards."""

    def __init__(
        self,
        scenario: Scenario,
        make_node: Callable[[Settings, float], Node] = Node,
        make_worker: Callable[[Scenario, str], Worker] = number,
        keep: bool = False,
        observe: Observe = lambda life, entry, now: None,
    ) -> None:
        """`keep` all lines of the trace; `observe` is told what nodes record, as `runtime` writes it down."""
        self.scenario = scenario
        self.clock = Clock()
        self.trace = Trace(keep)
        self.failures: dict[str, str] = {}  # whose training came to nothing, and why
        self._observe = observe
        self._fresh: dict[str, Worker] = {}  # of those who have not started yet
        self._waiting = {name: deque(planned) for name, planned in scenario.in_round.items()}
        self.machines: dict[str, Machine] = {}
        for name in scenario.topology.names:
            machine = Machine(name, scenario.masses[name], scenario.compute_seconds[name])
            self._fresh[name] = make_worker(scenario, name)
            machine.reading = self._fresh[name].reading
            self.machines[name] = machine
        self.links = Links(self.clock, scenario, self.machines, self._handle, self._struck)
        self._ledger = Ledger(scenario, self.machines.values())
        self._graphs: dict[tuple[str, ...], Graph] = {}  # over these members
        around = self._graph(tuple(sorted(scenario.topology.names))).around
        self._acquainted = {name: dict.fromkeys(peers) for name, peers in around.items()}  # who may ever dial whom
        self._make_node, self._make_worker = make_node, make_worker
        self._spread = stream(scenario.seed, "computing")
        self._power = stream(scenario.seed, "power")
        self._lasting = 0  # faults that are not over, and nodes that are going to be started
        self._lies = 0  # of those that last
        self._disturbances = 0
        self._disturbed_at = 0.0  # by something else than a lie
        self._events = 0
        self._said: dict[str, int] = {}
        self._node_seconds = self._ended = 0.0

    def run(self) -> Outcome:
        """Let everything happen. Broken at the first event after which an invariant does not hold."""
        scenario = self.scenario
        for name, machine in self.machines.items():
            self._lasting += 1
            self.clock.at(scenario.starts.get(name, 0.0), partial(self._begin, machine, True))
        for fault in scenario.faults:
            self.clock.at(fault.at, partial(self._strike, fault))
        with _rare_collections():
            self.clock.run(scenario.limit)
        self._require(all_have_finished(self.machines.values()), "all_have_finished")
        self._require(self._ledger.the_mean_is_explained(), "the_mean_is_explained")
        last_start = max(scenario.starts.values(), default=0.0)
        if not (scenario.faults or scenario.in_round) and last_start < scenario.settings.join_timeout:
            self._require(self._ledger.without_faults_the_mean_is_kept(), "without_faults_the_mean_is_kept")
        return Outcome(
            digest=self.trace.digest(),
            lines=self.trace.count,
            events=self._events,
            finished=tuple(name for name, machine in self.machines.items() if machine.finished),
            values={name: machine.reading for name, machine in self.machines.items()},
            rounds={name: machine.round for name, machine in self.machines.items()},
            seconds=self._ended,
            node_hours=self._node_seconds / 3600.0,
            drift=self._ledger.drift,
            said=dict(sorted(self._said.items())),
        )

    def _note(self, text: str) -> None:
        self.trace.add(f"{self.clock.now:.6f} {text}")

    def _require(self, why: str | None, invariant: str, node: str = "all") -> None:
        if why is not None:
            raise Broken(invariant, why, node, self.clock.now, self.scenario.seed, self.trace.tail())

    # -- A node: events in, effects out ------------------------------------------------------------------------------

    def _handle(self, life: Life, event: Event) -> None:
        if not life.alive:
            return
        self._events += 1
        now, node = self.clock.now, life.node
        self.trace.add(f"{now:.6f} {life.name} {_in_words(event)}")
        effects = self._take_in(life, event)
        for effect in effects:
            if not self._perform(life, effect, effects):
                return
        life.deadline = deadline = node.deadline
        for check in AFTER_EVENT:
            why = check(life, event, now)
            if why is not None:
                self._require(why, check.__name__, life.name)
        if deadline is not None and deadline < life.alarm:
            life.alarm = deadline
            self.clock.at(deadline, partial(self._wake, life, deadline))

    def _take_in(self, life: Life, event: Event) -> list[Effect]:
        """Hand the event to the node, and enter in the books what the invariants will ask for."""
        now, node = self.clock.now, life.node
        match event:
            case Received(peer, message):
                life.heard[peer] = now
                match message:
                    case Update(round, mass, reach):
                        mistakes = sum(node.conduct.counts.values())
                        effects = node.handle(event, now)
                        if mistakes == sum(node.conduct.counts.values()):
                            life.came[parcel_of(message), round] = Stake(mass, reach)
                        return effects
                    case Receipt(round) if round <= life.machine.round:  # of what it has sent; a liar is told more
                        life.receipts.setdefault(peer, set()).add(round)
                    case Goodbye():
                        life.gone.add(peer)
            case LinkUp(peer, epoch, _, mass):
                if epoch > life.epochs.get(peer, 0):  # what the old process said no longer counts
                    self._forget(life, peer)
                    life.gone.discard(peer)
                life.epochs[peer], life.greeted[peer], life.heard[peer] = epoch, mass, now
            case LinkDown(peer):
                life.down[peer] = life.alone_since = now
        return node.handle(event, now)

    def _forget(self, life: Life, peer: str) -> None:
        life.came = {item: stake for item, stake in life.came.items() if item[0].sender != peer}
        life.receipts.pop(peer, None)

    def _perform(self, life: Life, effect: Effect, effects: list[Effect]) -> bool:
        """False if the process has ended before it was done."""
        match effect:
            case Send(peers, message):
                self._note(f"{life.name} > {','.join(peers)} {short(message)}")
                if isinstance(message, Gathering):
                    life.asked[message.round] = message
                    life.asked.pop(message.round - OUTSTANDING, None)
                for peer in peers:
                    if self._is_doomed(life):
                        return False
                    if isinstance(message, Update) and peer in life.ways:
                        why = nothing_is_sent_twice(life.ways[peer], message)
                        self._require(why, "nothing_is_sent_twice", life.name)
                    self.links.send(life, peer, message)
                return True
            case _ if self._is_doomed(life):
                return False
            case Compute():
                self._befall(life, effect.round)
                if not life.alive:
                    return False
                self._compute(life, effect, effects)
            case Conceal():
                assert life.cargo is not None and life.cargo.parcel.round == effect.round
                made = Concealed(effect, replace(life.cargo, gathering=effect.gathering))
                life.parts_due = max(life.parts_due, self.clock.now) + STEP_SHARE * life.machine.compute_seconds
                self.clock.at(life.parts_due, partial(self._concealed, life, made))
            case Save():
                life.save = True
            case Connect(peer, address):
                known = address or (peer if self.scenario.address_book else "")
                self._note(f"{life.name} wants {peer} at {known or '?'}")
                if known:
                    life.dials.setdefault(peer, self.clock.now)
                    self._acquainted[life.name][peer] = self._acquainted[peer][life.name] = None
                    self.links.dial(life.name, peer)
            case Disconnect(peer, seconds):
                self._forget(life, peer)
                self.links.disconnect(life, peer, seconds)
            case Record(RoundEnded() as ended):
                self._observe(life, ended, self.clock.now)
                self._note(
                    f"{life.name} ends {ended.round} with {','.join(ended.merged)} not {','.join(ended.missing)}"
                )
            case Record(Happened(event, fields)):
                self._say(life, event, **fields)
                if event == "died":
                    why = the_dead_were_silent(life, str(fields["peer"]), self.clock.now)
                    self._require(why, "the_dead_were_silent", life.name)
                elif event == "lost":
                    if self.scenario.address_book and self._is_calm() and not life.machine.lied:
                        why = the_living_are_not_buried(self.machines[str(fields["peer"])])
                        self._require(why, "the_living_are_not_buried", life.name)
                elif event == "rewired":
                    self._rewired(life, fields["gone"], fields["back"])
            case Done(finished):
                life.machine.left, life.machine.finished, life.done_at = True, finished, self.clock.now
                self.clock.after(LOOK, partial(self._go, life))
        return True

    def _rewired(self, life: Life, gone: Value, back: Value) -> None:
        assert isinstance(gone, tuple) and isinstance(back, tuple)
        life.members = tuple(sorted({*life.members, *back} - {*gone}))
        life.part = self._wiring(life.name)(life.members).part

    def _say(self, life: Life, event: str, **fields: Value) -> None:
        self._said[event] = self._said.get(event, 0) + 1
        self._observe(life, Happened(event, fields), self.clock.now)
        self._note(f"{life.name} ! {event} {' '.join(f'{key}={value}' for key, value in fields.items())}")

    def _is_doomed(self, life: Life) -> bool:
        """Count one more deed; True if the process ends before it is done."""
        machine = life.machine
        machine.deeds += 1
        fault = machine.doom.pop(machine.deeds, None) if machine.doom else None
        if fault is None:
            return False
        self._crash(machine, fault.power, fault.back_after, fault.resume)
        return True

    def _wake(self, life: Life, when: float) -> None:
        if when != life.alarm or not life.runs:
            return
        life.alarm = math.inf
        deadline = life.deadline
        if deadline is not None and deadline <= self.clock.now:
            self._handle(life, Tick())
        elif deadline is not None:
            life.alarm = deadline
            self.clock.at(deadline, partial(self._wake, life, deadline))

    # -- Computing, and keeping --------------------------------------------------------------------------------------

    def _compute(self, life: Life, job: Compute, effects: list[Effect]) -> None:
        for check in AT_COMPUTE:
            self._require(check(life, job, effects), check.__name__, life.name)
        why = self._ledger.running_sums_make_no_mass(life, job)
        self._require(why, "running_sums_make_no_mass", life.name)
        machine, worker, caught_up = life.machine, life.worker, catches_up(effects)
        seconds = machine.compute_seconds * machine.slowness * self._spread.uniform(1.0, 1.0 + COMPUTE_SPREAD)
        folded, saved, parcel = None, None, None
        outcome: Computed | Leave
        if job.round > 0 or job.contributions:
            vectors = tuple(replace(c, vector=cargo_of(c).vector) for c in job.contributions)
            folded = worker.fold(replace(job, contributions=vectors))
            for why, invariant in self._ledger.enter(life, job, caught_up or job.jump, worker.reading):
                self._require(why, invariant, life.name)
        if life.save:
            held = job.mass if job.held is None else job.held
            saved = Saved(machine.checkpoints + 1, job.round, held, worker.state())
        if job.train:
            try:
                trained, vector = worker.train(job)
            except TrainingFailed as error:  # the others need not wait for what will not come
                self.failures[life.name], outcome = str(error), Leave(at_once=True)
            else:
                self._ledger.moved(machine, worker.reading)
                parcel = Parcel(life.name, life.epoch, job.round, life.members, worker.reading)
                trained = replace(trained, train_seconds=seconds)
                life.cargo = Cargo(parcel, vector)
                outcome = Computed(job.round, folded, trained, life.cargo)
        else:
            outcome = Computed(job.round, folded, None, None)
        shown = " ".join(f"{c.peer}:{c.round}:{c.weight!r}" for c in job.contributions)
        self._note(f"{life.name} computes {job.round} {job.mass!r} {job.reach!r} {worker.reading!r} of {shown}")
        life.came = {} if caught_up else _may_still_count(life.came, job.round - life.node.settings.staleness)
        life.own, life.stake = parcel, Stake(job.mass, job.reach)
        if parcel is not None:
            life.made[job.round] = parcel
            life.made.pop(job.round - OUTSTANDING, None)
        life.counted = {peer: life.greeted[peer] for peer in life.part(job.round).hears if peer in life.greeted}
        machine.round = life.said_round = job.round
        life.worked_since = min(life.worked_since, self.clock.now)
        life.job, life.outcome = job, outcome
        life.job_due = self.clock.now + seconds
        self.clock.at(life.job_due, partial(self._computed, life, life.job_due))
        if saved is not None:
            machine.checkpoints, life.save = saved.number, False
            pause = STEP_SHARE * seconds
            self.clock.after(pause, partial(self._keep, life, saved, 0, pause))

    def _concealed(self, life: Life, made: Concealed) -> None:
        """Its part of a sum is ready, once the process goes on."""
        if life.pauses:
            self.clock.after(LOOK, partial(self._concealed, life, made))
        else:
            self._handle(life, made)

    def _computed(self, life: Life, due: float) -> None:
        if life.runs and due == life.job_due and life.outcome is not None:
            outcome, life.job, life.outcome = life.outcome, None, None
            if isinstance(outcome, Computed) and (told := budget_event(outcome)) is not None:
                self._say(life, told.event, **told.fields)
            self._handle(life, outcome)

    def _keep(self, life: Life, saved: Saved, number: int, pause: float) -> None:
        """One step of writing a checkpoint, as `checkpoint.write` does it."""
        if life.alive and life.pauses:
            self.clock.after(LOOK, partial(self._keep, life, saved, number, pause))
        if not life.runs or self._is_doomed(life):
            return
        disk, steps = life.machine.disk, world.CHECKPOINT_STEPS
        self._note(f"{life.name} checkpoint {saved.number}: {' '.join(steps[number])}")
        try:
            match steps[number]:
                case ("write", name):
                    disk.write(name, saved)
                case ("sync", name):
                    disk.sync(name)
                case ("rename", name, to):
                    disk.rename(name, to)
                case ("sync folder",):
                    disk.sync_folder()
        except OSError as error:
            self._say(life, "checkpoint_failed", round=saved.round, why=str(error))
            return
        if number + 1 < len(steps):
            self.clock.after(pause, partial(self._keep, life, saved, number + 1, pause))
        else:
            life.machine.saved = saved.number
            self._say(life, "checkpoint", round=saved.round)

    # -- From start to end -------------------------------------------------------------------------------------------

    def _begin(self, machine: Machine, resume: bool) -> None:
        """Start a process, from its newest checkpoint if it shall `resume`."""
        self._lasting -= 1
        self._disturb()
        disk = machine.disk
        if machine.left or machine.life is not None:
            return
        if disk.full:
            self._note(f"{machine.name} cannot write its epoch")
            self._begin_later(machine, resume, RETRY_START)
            return
        disk.epoch += 1
        saved = disk.read() if resume else None
        if resume:
            self._require(what_was_saved_is_found(machine, saved), "what_was_saved_is_found", machine.name)
        worker = self._fresh.pop(machine.name, None) or self._make_worker(self.scenario, machine.name)
        if saved is not None:
            worker.restore(saved.state)
        self._ledger.moved(machine, worker.reading)
        self._ledger.brings(machine, machine.mass if saved is None else saved.mass)
        settings = self._settings(machine, saved)
        node = self._make_node(settings, self.clock.now)
        life = Life(machine, machine.name, disk.epoch, node, worker, self.clock.now, round=node.round)
        life.dials = dict.fromkeys(settings.neighbours, life.began)
        life.members = tuple(sorted(self.scenario.topology.names))
        life.part = self._wiring(life.name)(life.members).part
        machine.life, machine.round = life, node.round
        self._note(f"{life.name} starts, epoch {life.epoch}, round {node.round}, {worker.reading!r}")
        self._observe(life, Happened("started", {"round": node.round}), self.clock.now)
        self.links.deny(machine)
        self._dial_all(life)
        self._handle(life, Tick())

    def _begin_later(self, machine: Machine, resume: bool, seconds: float) -> None:
        self._lasting += 1
        self.clock.after(seconds, partial(self._begin, machine, resume))

    def _dial_all(self, life: Life) -> None:
        for peer in self._acquainted[life.name]:
            self.links.dial(life.name, peer)

    def _settings(self, machine: Machine, saved: Saved | None) -> Settings:
        """As `runtime.assemble` makes them."""
        topology, common, name = self.scenario.topology, self.scenario.settings, machine.name
        names = tuple(sorted(topology.names))
        heals = self.scenario.section is not None
        return replace(
            common,
            name=name,
            neighbours=self._graph(names).around[name],
            neighbourhood=None if heals else self._wiring(name)(names).part,
            members=names if heals else (),
            wiring=self._wiring(name) if heals else None,
            address=name,
            epoch=machine.disk.epoch,
            drift=topology.period or len(names),
            mass=machine.mass,
            senders=lambda living, receiver: self._graph(living or names).around.get(receiver, ()),
            mask_key=None if common.mask_key is None else MaskKey(name, machine.disk.epoch, NO_KEY),
            held_mass=None if saved is None else saved.mass,
            first_round=0 if saved is None else saved.round,
            partners=partners(common.schedule, self.scenario.seed, name),
        )

    def _wiring(self, name: str) -> Callable[[tuple[str, ...]], Wiring]:
        """As `topology.wiring`, but with one graph for all nodes that see the same members."""

        def of(living: tuple[str, ...]) -> Wiring:
            graph = self._graph(living)
            return Wiring(graph.around[name], neighbourhoods(graph.topology, name, self.scenario.settings.weights))

        return of

    def _graph(self, living: tuple[str, ...]) -> Graph:
        if living not in self._graphs:
            whole, section = self.scenario.topology, self.scenario.section
            topology = whole if section is None else among(section, self.scenario.seed, whole, living)
            try:
                check_weights(topology.at(0), self.scenario.settings.weights)
            except BadInput:
                topology = whole
            union = topology.union()
            around = {name: tuple(sorted(union[name])) for name in topology.names}
            self._graphs[living] = Graph(topology, around)
        return self._graphs[living]

    def _crash(self, machine: Machine, power: bool, back_after: float | None, resume: bool) -> None:
        if machine.life is None:
            return
        self._note(f"{machine.name} {'loses power' if power else 'is killed'} at deed {machine.deeds}")
        self._end(machine.life, power)
        if power:
            machine.disk.lose_power(self._power)
        if back_after is not None:
            self._begin_later(machine, resume, back_after)

    def _go(self, life: Life) -> None:
        """End once the neighbours have the last update; one whose link broke over it has its grace to come back."""
        if not life.alive:
            return
        waited, grace = self.clock.now - life.done_at, min(DRAIN, life.node.settings.grace)
        busy = self.links.is_busy(life) and waited < DRAIN
        interrupted = self.links.is_interrupted(life) and waited < grace
        if life.pauses or (life.machine.finished and (busy or interrupted)):
            self.clock.after(LOOK, partial(self._go, life))
        else:
            self._end(life, power=False)

    def _end(self, life: Life, power: bool) -> None:
        self._disturb()
        self._note(f"{life.name} ends")
        life.alive, life.machine.life = False, None
        self._ledger.takes_along(life.machine)
        self._ended = self.clock.now
        self._node_seconds += self._ended - life.began
        self.links.leave(life, power)

    # -- Faults ------------------------------------------------------------------------------------------------------

    def _befall(self, life: Life, round: int) -> None:
        """What waits for this node to begin this round happens now."""
        waiting = self._waiting.get(life.name)
        while waiting and waiting[0][0] <= round and life.alive:
            self._strike(waiting.popleft()[1])

    def _strike(self, fault: Fault) -> None:
        self._note(f"# {describe(fault)}")
        self._disturb(lie=isinstance(fault, Lie))
        links = self.links
        match fault:
            case Crash(_, node, power, back_after, resume):
                self._crash(self.machines[node], power, back_after, resume)
            case CrashAtDeed(_, node, deed):
                machine = self.machines[node]
                machine.doom[machine.deeds + deed] = fault
            case Stop(_, node):
                life = self.machines[node].life
                if life is not None and life.runs:
                    self._handle(life, Leave())
            case Pause(_, seconds, node):
                life = self.machines[node].life
                if life is not None:
                    self._pause(life)
                    self._until(seconds, partial(self._go_on, life))
            case Partition(_, seconds):
                for sender, receiver in _ways_cut(fault):
                    links.cut(sender, receiver)
                self._until(seconds, partial(self._heal, fault))
            case Delay(_, seconds):
                links.slow_down(fault)
                self._until(seconds, partial(links.speed_up, fault))
            case Break(_, sender, receiver):
                links.cut_off(sender, receiver)
            case Lose() | Corrupt():
                links.befall(fault)
            case Replay(_, sender, receiver, update):
                links.replay(sender, receiver, update)
            case Slow(_, seconds, node, factor):
                self.machines[node].slowness *= factor
                self._until(seconds, partial(self._hurry, self.machines[node], factor))
            case DiskFull(_, seconds, node):
                self.machines[node].disk.full += 1
                self._until(seconds, partial(self._make_room, self.machines[node]))
            case ClockJump(_, node, by):
                self.machines[node].wall_clock += by
            case Lie(_, seconds, node, about):
                machine = self.machines[node]
                machine.lied = True
                machine.lies.append(about)
                self._lies += 1
                self._until(seconds, partial(self._be_honest, machine, about), lie=True)

    def _struck(self, what: str) -> None:
        self._note(f"# {what}")
        self._disturb()

    def _until(self, seconds: float, end: Action, lie: bool = False) -> None:
        """A fault lasts so long."""

        def over() -> None:
            self._lasting -= 1
            end()
            self._disturb(lie)

        self._lasting += 1
        self.clock.after(seconds, over)

    def _pause(self, life: Life) -> None:
        life.pauses += 1
        if life.pauses == 1:
            life.paused_at = self.clock.now
            self.links.pause(life)

    def _go_on(self, life: Life) -> None:
        life.pauses -= 1
        if life.pauses or not life.alive:
            return
        paused = self.clock.now - life.paused_at
        if life.job is not None:
            life.job_due += paused
            self.clock.at(life.job_due, partial(self._computed, life, life.job_due))
        settings = life.node.settings
        life.alone_since += paused + settings.heartbeat  # the node takes what passed since the event before for a pause
        if paused > settings.silence / 2 + settings.heartbeat:  # and a short one for none
            for times in (life.heard, life.down):
                times.update({peer: when + paused for peer, when in times.items()})
        self.links.go_on(life)
        if life.runs:
            self._dial_all(life)
            life.alarm = self.clock.now
            self._wake(life, self.clock.now)

    def _heal(self, fault: Partition) -> None:
        for sender, receiver in _ways_cut(fault):
            self.links.heal(sender, receiver)
            self.links.dial(sender, receiver)

    def _hurry(self, machine: Machine, factor: float) -> None:
        machine.slowness /= factor

    def _be_honest(self, machine: Machine, about: Lied) -> None:
        machine.lies.remove(about)
        self._lies -= 1

    def _make_room(self, machine: Machine) -> None:
        machine.disk.full -= 1

    # -- After the faults --------------------------------------------------------------------------------------------

    def _disturb(self, lie: bool = False) -> None:
        """Something happened that neighbours need a while to see."""
        self._disturbances += 1
        if not lie:
            self._disturbed_at = self.clock.now
        self.clock.after(SETTLED, partial(self._settled, self._disturbances))

    def _settled(self, disturbances: int) -> None:
        """If nothing has happened since: neighbours agree, and all go on at their usual pace from now on."""
        if disturbances != self._disturbances or self._lasting:
            return
        working = [machine for machine in self.machines.values() if machine.life is not None and not machine.left]
        honest = [machine.life for machine in working if machine.life is not None and not machine.lied]
        why = neighbours_agree_on_who_lives(honest, self._within_reach)
        self._require(why, "neighbours_agree_on_who_lives")
        settings = self.scenario.settings
        rumours = self._suspicion() + ROUNDS_OF_RUMOURS * ANTI_ENTROPY * settings.heartbeat
        self.clock.after(rumours, partial(self._agreed, disturbances))
        left = max((self.scenario.settings.rounds - machine.round for machine in working), default=0)
        slowest = max((machine.compute_seconds for machine in working), default=0.0) + self.scenario.transfer
        self.clock.after(CATCHING_UP + PACE * left * slowest, partial(self._due, disturbances))

    def _suspicion(self) -> float:
        """Seconds until the last suspicion has become a death."""
        return suspicion_timeout(self.scenario.settings.suspicion, len(self.machines), MAX_STRETCH)

    def _is_calm(self) -> bool:
        """Whether for long nothing has happened but that somebody lied."""
        since = self._disturbed_at + SETTLED + self._suspicion()
        return self._lasting == self._lies and self.clock.now > since

    def _within_reach(self, life: Life) -> Iterator[Life]:
        """Those to whom a link should stand: dialled a while ago, and neither end has kept the other out since."""
        now = self.clock.now
        for name in self._acquainted[life.name]:
            machine = self.machines[name]
            other = machine.life
            if other is None or machine.left or machine.lied:
                continue
            dialled = min(life.dials.get(name, math.inf), other.dials.get(life.name, math.inf))
            barred = max(life.barred.get(name, -math.inf), other.barred.get(life.name, -math.inf))
            if now > max(dialled, barred) + SETTLED:
                yield other

    def _agreed(self, disturbances: int) -> None:
        if disturbances == self._disturbances:
            honest = [m.life for m in self.machines.values() if m.life is not None and not m.left and not m.lied]
            dead = [n for n, m in self.machines.items() if m.life is None and not m.left and not m.lied]
            self._require(members_agree_on_who_lives(honest, dead), "members_agree_on_who_lives")
            apart = any(until > self.clock.now for life in honest for until in life.barred.values())
            done = any(machine.finished for machine in self.machines.values())
            sought = self.scenario.section is not None and self.scenario.address_book
            if sought and not apart and not done:
                self._require(survivors_are_in_one_piece(honest), "survivors_are_in_one_piece")

    def _due(self, disturbances: int) -> None:
        if disturbances == self._disturbances:
            self._require(all_have_finished(self.machines.values()), "all_have_finished")


def _may_still_count(came: dict[tuple[Parcel, int], Stake], oldest: float) -> dict[tuple[Parcel, int], Stake]:
    """Of the updates that came, those from the `oldest` round on, and of each sender the newest before it."""
    if all(round >= oldest for _, round in came):
        return came
    late: dict[str, tuple[Parcel, int]] = {}
    for item in sorted((item for item in came if item[1] < oldest), key=lambda item: item[1]):
        late[item[0].sender] = item
    newest = set(late.values())
    return {item: stake for item, stake in came.items() if item[1] >= oldest or item in newest}


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the interpreter look for unreachable cycles less often: here are many objects, and hardly a cycle dies."""
    usual = gc.get_threshold()
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _ways_cut(fault: Partition) -> Iterator[tuple[str, str]]:
    """(sender, receiver) of each way that nothing gets through."""
    for first, second in itertools.combinations(fault.groups, 2):
        for a, b in itertools.product(first, second):
            yield a, b
            if not fault.one_way:
                yield b, a


def _in_words(event: Event) -> str:
    match event:
        case Received(peer, Gossip(records, hints)):  # when it was sent, all of it was said
            return f"< {peer} gossip of {len(records)} and {len(hints)}"
        case Received(peer, message):
            return f"< {peer} {short(message)}"
        case Tick():
            return "tick"
        case Computed(round):
            return f"computed {round}"
        case Concealed(job):
            return f"concealed {job.round} for {job.peer}"
        case LinkUp(peer, epoch, round, mass, seen):
            return f"up {peer} {epoch} {round} {mass!r} {seen}"
        case LinkDown(peer, why):
            return f"down {peer}: {why}"
        case Rejected(peer, code):
            return f"rejected {peer} {code}"
        case Leave():
            return "leave"
