"""An experiment in virtual time: its learners, its rows and every decision are real, its network and its clock are not.

Without faults every model is bit for bit the one of `p2pfl up`: the same batches, the same weights, the same order of
sums; but for the noise of `privacy.dp`, which nobody else could draw there, and which follows from the seed here.
One experiment gives one run folder, byte for byte, on whatever machine does the same arithmetic.

All seconds in the records are virtual and count from the start of the simulation: a round's computing takes about
COMPUTE_SECONDS, a message 15 to 65 ms (`Scenario.latency` and `jitter`). Mixing and evaluating take none. Bytes are
those of the vectors that were sent and that came, in the experiment's codec: nothing is sealed, signed or framed here.
Checkpoints are kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from p2pfl import config
from p2pfl.config import MESSAGE_LIES, Experiment
from p2pfl.learner import TorchLearner, make_learner
from p2pfl.ledger import Ledger, simulated_ledger
from p2pfl.masks import fixed
from p2pfl.messages import Compute, Folded, Happened, RoundEnded, Trained, TrainingFailed
from p2pfl.mixing import Probe
from p2pfl.node import Node, Settings
from p2pfl.records import Line, Run, event_line, round_line, write_text
from p2pfl.rng import stream
from p2pfl.runtime import Norms, common_settings, sum_term, usable_norm, write_model, write_seen
from p2pfl.sim.engine import Engine
from p2pfl.sim.faults import ClockJump, Corrupt, Crash, Delay, DiskFull, Fault, Lie, Lose, Partition, Pause, Slow
from p2pfl.sim.invariants import Broken
from p2pfl.sim.scenario import Scenario
from p2pfl.sim.world import Life
from p2pfl.swarm import Ended, Ground, Outcome, conclude, prepare
from p2pfl.topology import Topology
from p2pfl.trainer import Term, Trainer

COMPUTE_SECONDS = 1.0  # of a round: as in a small network of real machines, and long beside the latency
PACE = 20.0  # times as long as that a round may take on average, before the simulation is given up …
MARGIN = 86_400.0  # … and seconds more: a day, for joining and for what faults delay


def simulate(
    experiment: Experiment,
    run: Run,
    observe: Callable[[Line], None],
    *,
    make_node: Callable[[Settings, float], Node] = Node,
) -> Outcome:
    """Run the experiment to its end. `observe` is told every line that a node records, as it comes.

    BadInput for what is wrong with the experiment. TrainingFailed, in one line, if an invariant does not hold, or if
    the run folder cannot be written.
    """
    ground = prepare(experiment, run)
    first = ground.graph.names[0]
    learner = make_learner(experiment, ground.parts[first], first)
    nbytes = Trainer(learner, experiment, first, varies=ground.graph.varies).codec.nbytes
    probe = Probe(learner.schema.size, stream(0, "probe"))
    recorder = Recorder(run, nbytes, observe)

    sums = experiment.privacy.sums == "masked"

    ledgers: dict[str, Ledger] = {}

    def make_worker(_: Scenario, name: str) -> ModelWorker:
        learner = make_learner(experiment, ground.parts[name], name)
        seen = run.node(name).seen if experiment.privacy.keep_seen else None
        ledger = ledgers.setdefault(name, simulated_ledger(experiment.seed, name))  # which outlives its processes
        trainer = Trainer(learner, experiment, name, varies=ground.graph.varies, ledger=ledger)
        return ModelWorker(trainer, probe, seen, sums)

    engine = Engine(scenario_of(experiment, ground), make_node, make_worker, observe=recorder.record)
    try:
        outcome = engine.run()
    except Broken as broken:
        trace = run.path / "trace.txt"
        write_text(trace, "".join(f"{line}\n" for line in broken.tail))
        again = f"`p2pfl simulate {run.experiment}` shows it again, {trace} what went before"
        raise TrainingFailed(f"a promise of the network is broken, {broken}; {again}") from None
    except OSError as error:
        raise TrainingFailed(f"cannot write into {run.path}: {error.strerror}") from None
    nodes = [
        Ended(
            name,
            machine.finished,
            recorder.last_metrics.get(name, {}),
            recorder.lives[name].node.conduct.counts if name in recorder.lives else {},
            machine.sent * nbytes,
            machine.received * nbytes,
            engine.failures.get(name, ""),
        )
        for name, machine in engine.machines.items()
    ]
    return conclude(experiment, run, ground, nodes, outcome.seconds)


def scenario_of(experiment: Experiment, ground: Ground) -> Scenario:
    """The network, the settings and the faults of this experiment."""
    names = ground.graph.names
    longest = COMPUTE_SECONDS * PACE * experiment.train.rounds
    return Scenario(
        seed=experiment.seed,
        topology=ground.graph,
        section=experiment.topology if experiment.topology.heal else None,
        settings=common_settings(experiment),
        compute_seconds=dict.fromkeys(names, COMPUTE_SECONDS),
        masses=ground.masses,
        values={},  # those of the learners
        targets={},
        in_round={
            name: tuple(
                (fault.round, event)
                for fault in experiment.faults_for(name)
                for event in events_of(fault, experiment, ground.graph)
            )
            for name in names
        },
        limit=longest + math.fsum(fault.lasting for fault in experiment.faults) + MARGIN,
    )


def events_of(fault: config.Fault, experiment: Experiment, graph: Topology) -> list[Fault]:
    """What this fault of an experiment is to the engine, once its round has come."""
    at, seconds, node = 0.0, fault.lasting, experiment.name_of(fault.node)
    receivers = [experiment.name_of(fault.to)] if fault.to is not None else sorted(graph.union()[node])
    match fault.kind:
        case "kill":
            return [Crash(at, node)]
        case "restart":
            return [Crash(at, node, back_after=seconds)]
        case "pause":
            return [Pause(at, seconds, node)]
        case "slow":
            assert fault.factor is not None
            return [Slow(at, seconds, node, fault.factor)]
        case "disk-full":
            return [DiskFull(at, seconds, node)]
        case "clock-jump":
            assert fault.by is not None
            return [ClockJump(at, node, fault.by)]
        case "lie":
            if fault.about not in MESSAGE_LIES:
                return []  # about what it learnt: its trainer does that
            return [Lie(at, seconds, node, fault.about)]
        case "cut":
            groups = tuple(tuple(experiment.name_of(n) for n in group) for group in fault.groups or ())
            alone = ((node,), tuple(name for name in graph.names if name != node))
            return [Partition(at, seconds, groups or alone, fault.one_way or False)]
        case "delay":
            assert fault.delay is not None
            return [Delay(at, seconds, node, to, fault.delay, fault.jitter or 0.0) for to in receivers]
        case "loss":
            return [Lose(at, node, to) for to in receivers]
        case "corrupt":
            return [Corrupt(at, node, to, "bad_digest") for to in receivers]


# -- What a node works on --------------------------------------------------------------------------------------------


def no_time() -> float:
    """The clock of what takes no virtual time."""
    return 0.0


class ModelWorker:
    """A real trainer, that does what it does in `runtime`."""

    def __init__(self, trainer: Trainer, probe: Probe, seen: Path | None = None, sums: bool = False) -> None:
        """`seen`: as for `runtime.Worker`; `sums`: whether it learns only sums."""
        self.trainer, self._probe, self._seen = trainer, probe, seen
        self._sums = sums
        # Float32 keeps seven digits, also of values that cancel in the reading; a sum is exact to 2^-17 a neighbour.
        self.rounding = 1e-3 if sums else 1e-5
        self._norms = Norms(usable_norm(trainer.learner), sums=trainer.sends_sums)
        self.reading = self._read()

    @property
    def learner(self) -> TorchLearner:
        return self.trainer.learner

    @property
    def averages(self) -> bool:
        """See `Worker.averages`."""
        return self.trainer.averages

    def _read(self) -> float:
        """All projections in one, as large as a parameter is."""
        return math.fsum(self._probe(self.learner.vector)) / math.sqrt(self.learner.schema.size)

    def fold(self, job: Compute) -> Folded:
        """See `Worker.fold`."""
        terms = [Term(c.peer, c.weight, _as_tensor(c.vector), c.reference, c.gain) for c in job.contributions]
        if self._sums and terms:  # without the masks, which vanish: the same numbers to the bit
            parts = [fixed(_as_tensor(c.vector).cpu().numpy(), c.gain) for c in job.contributions]
            terms = [sum_term(parts, job.contributions)]
        if self._seen is not None:
            write_seen(self._seen, job.round - 1, self.trainer, terms)
        folded = self.trainer.fold(job, terms, no_time)
        self.reading = self._read()
        return folded

    def check(self, vector: object, mass: float) -> None:
        """See `Worker.check`."""
        self._norms.check(_as_tensor(vector), mass)

    def train(self, job: Compute) -> tuple[Trained, object]:
        """See `Worker.train`."""
        trained = self.trainer.train(job, no_time)
        usable_norm(self.learner)
        self.reading = self._read()
        return trained, self.trainer.public.detach().clone()

    def state(self) -> object:
        """See `Worker.state`."""
        return self.trainer.state()

    def restore(self, state: object) -> None:
        """See `Worker.restore`."""
        assert isinstance(state, dict)
        self.trainer.restore(state)
        self._norms = Norms(usable_norm(self.learner), sums=self.trainer.sends_sums)
        self.reading = self._read()


def _as_tensor(vector: object) -> Tensor:
    assert isinstance(vector, torch.Tensor)
    return vector


# -- What nodes record -----------------------------------------------------------------------------------------------


class Recorder:
    """Writes down what nodes record, in virtual time, and shows it."""

    def __init__(self, run: Run, nbytes: int, observe: Callable[[Line], None]) -> None:
        """`nbytes` of one vector."""
        self._run, self._nbytes, self._observe = run, nbytes, observe
        self.lives: dict[str, Life] = {}  # the newest process of each node
        self.last_metrics: dict[str, Line] = {}
        self._rounds_ended: dict[str, float] = {}  # when the last one did, of the newest process
        self._updates: dict[str, tuple[int, int]] = {}  # that were sent and had come by then

    def record(self, life: Life, entry: RoundEnded | Happened, now: float) -> None:
        """Write one thing down that happened at `now`, in seconds. OSError if the disk does not take it."""
        match entry:
            case RoundEnded():
                self._round_ended(life, entry, now)
            case Happened("started", fields):
                learner = _learner(life)
                self.lives[life.name] = life
                self._rounds_ended.pop(life.name, None)
                self._happened(life, Happened("started", {"rows": learner.samples, **fields}), now)
                for note in _trainer(life).notes:
                    self._happened(life, Happened("note", {"why": note}), now)
            case Happened(event):
                if event == "finished":
                    write_model(_learner(life), self._run.node(life.name).model)
                self._happened(life, entry, now)

    def _round_ended(self, life: Life, ended: RoundEnded, now: float) -> None:
        machine = life.machine
        began = self._rounds_ended.get(life.name, life.worked_since)
        sent, received = self._updates.get(life.name, (0, 0))
        self._rounds_ended[life.name], self._updates[life.name] = now, (machine.sent, machine.received)
        line = round_line(
            ended,
            t=now,
            node=life.name,
            epoch=life.epoch,
            total_seconds=now - began,
            sent=(machine.sent - sent) * self._nbytes,
            received=(machine.received - received) * self._nbytes,
        )
        self.last_metrics[life.name] = line
        records = self._run.node(life.name)
        records.append_metrics(line)
        records.close()  # there may be more nodes than a process may have files
        self._observe(line)

    def _happened(self, life: Life, happened: Happened, now: float) -> None:
        line = event_line(happened, t=now, node=life.name)
        records = self._run.node(life.name)
        records.append_event(line)
        records.close()
        self._observe(line)


def _trainer(life: Life) -> Trainer:
    assert isinstance(life.worker, ModelWorker)
    return life.worker.trainer


def _learner(life: Life) -> TorchLearner:
    return _trainer(life).learner
