"""All nodes of an experiment as the rows of one tensor (n, P), round by round: train, put out, mix, absorb.

Every line that decides what a model becomes is one that a real node runs: the batches and steps of `learner`, the
`rules`, `mixing`, `compression`, `attacks`, and the `weights`. Nothing waits, so a fault is a mask: who is away trains
nothing and is heard by nobody, and the weight of what does not arrive stays with the receiver. Without faults the
vectors are those of `p2pfl up`, but for the order in which a product of matrices sums.

Mixing goes through the columns in blocks that stay in the cache. A block of all nodes is mixed and absorbed where it
lies, so no second (n, P) is needed; the terms of a sum come in the order of names, as in `mixing.fold`.

A round takes one second of virtual time. Bytes are those of the vectors as their codec writes them: nothing is sealed,
signed or framed here. A cut changes no graph, however long it lasts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import networkx as nx
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from p2pfl import rules, topology
from p2pfl.compression import step
from p2pfl.conduct import Conduct
from p2pfl.config import LABEL_FLIP, PUSH_SUM, VECTOR_LIES, Experiment
from p2pfl.learner import diverged, learning_rate, make_learner
from p2pfl.messages import BadInput, BadMessage, Folded, Happened, RoundEnded, Scores, Trained, TrainingFailed, Value
from p2pfl.mixing import MAX_VALUE, Probe, check_vector
from p2pfl.node import MAX_STEP
from p2pfl.records import Line, Run, event_line, round_line
from p2pfl.rng import stream
from p2pfl.runtime import Norms, unusable, write_model
from p2pfl.sim import masks
from p2pfl.sim.cohort import AtOnce, Cohort, OneByOne, Rows, split
from p2pfl.sim.masks import ROUND_SECONDS, Masks
from p2pfl.swarm import Ended, Ground, Outcome, conclude, prepare
from p2pfl.topology.matrix import hears, tells
from p2pfl.trainer import (
    NO_SCORES,
    aggregator_of,
    as_told,
    codec_number,
    codec_of,
    gamma_of,
    is_evaluated,
    least_vectors,
    lies_in,
    recipe_of,
    sends_differences,
    shared_runs,
)
from p2pfl.weights import Stake, mass_after, reach, weights_of

WIDTH = 1024  # columns that are mixed at once: of 13 .. 2048 good for 1,000 nodes as well as for 10,000
ABSORBED = 512  # rows of these that a rule works on at once (2 MiB): several such blocks stay in the cache
WORTH_THREADS = 2**20  # elements of all vectors; below, threads cost more than they save

CORES = os.cpu_count() or 1

Entry = tuple[str, RoundEnded | Happened]  # what a node records
Item = TypeVar("Item")
Result = TypeVar("Result")


def check(experiment: Experiment) -> None:
    """BadInput for what has no meaning where all nodes are in step."""
    if experiment.mix.schedule != "sync":
        what = f"mix.schedule = {experiment.mix.schedule!r} has no common rounds"
        raise BadInput(f"{what}, and lockstep has no others: use --engine event")
    if experiment.network.staleness != 0:
        what = f"network.staleness = {experiment.network.staleness!r} lets nodes come out of step"
        raise BadInput(f"{what}, which lockstep does not: use --engine event")
    if experiment.privacy.dp != "none":
        what = f"privacy.dp = {experiment.privacy.dp!r} draws its batches and its noise node by node"
        raise BadInput(f"{what}, which lockstep does not: use --engine event")
    masks.check(experiment)


def simulate(experiment: Experiment, run: Run, observe: Callable[[Line], None]) -> Outcome:
    """Run the experiment to its end. `observe` is told every line that a node records, as it comes.

    BadInput for what is wrong with the experiment, or means nothing here. TrainingFailed if the run folder cannot be
    written.
    """
    check(experiment)
    ground = prepare(experiment, run)
    nodes = Lockstep(experiment, ground)
    last: dict[str, Line] = {}

    def write(entries: Iterable[Entry], now: float) -> None:
        for name, entry in entries:
            records = run.node(name)
            if isinstance(entry, RoundEnded):
                sent, received = nodes.traffic[name]
                times = {"t": now, "total_seconds": ROUND_SECONDS}
                line = round_line(entry, node=name, epoch=nodes.epochs[name], sent=sent, received=received, **times)
                records.append_metrics(line)
                last[name] = line
            else:
                line = event_line(entry, t=now, node=name)
                records.append_event(line)
            records.close()  # there may be more nodes than a process may have files
            observe(line)

    end = experiment.train.rounds * ROUND_SECONDS
    try:
        write(nodes.start(), 0.0)
        for round in range(experiment.train.rounds):
            write(nodes.advance(round), (round + 1) * ROUND_SECONDS)
        for name in nodes.names:
            if nodes.finishes(name):
                nodes.write_model(name, run)
                write([(name, Happened("finished", {"round": experiment.train.rounds}))], end)
    except OSError as error:
        raise TrainingFailed(f"cannot write into {run.path}: {error.strerror}") from None
    ended = [
        Ended(
            name,
            nodes.finishes(name),
            last.get(name, {}),
            nodes.conduct[name].counts,
            *nodes.total_traffic[name],
            nodes.failed.get(name, ""),
        )
        for name in ground.graph.names
    ]
    return conclude(experiment, run, ground, ended, end)


# -- Who hears whom --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """What each row is the weighted sum of: sparse, in compressed rows. Sources are rows of what is sent."""

    sources: Tensor  # int64 (terms,)
    starts: Tensor  # int64 (n,): of each row's terms
    weights: Tensor  # float32 (terms,)

    def __call__(self, sent: Tensor) -> Tensor:
        """(n, w) from (sources, w), added in the order of the terms; 0 for a row without any."""
        return embedding_bag(self.sources, sent, self.starts, mode="sum", per_sample_weights=self.weights)


def _terms(rows: Sequence[Sequence[tuple[int, float]]], device: torch.device) -> Terms:
    """From the (source, weight) of each row."""
    flat = [term for row in rows for term in row]
    starts = torch.tensor([0, *(len(row) for row in rows[:-1])], device=device).cumsum(0)
    sources = torch.tensor([source for source, _ in flat], dtype=torch.int64, device=device)
    return Terms(sources, starts, torch.tensor([weight for _, weight in flat], dtype=torch.float32, device=device))


@dataclass(frozen=True, slots=True)
class Mixing:
    """Who mixes whose vector in a round, and with which weight; rows in the order of the nodes' rows."""

    heard: tuple[dict[str, float], ...]  # of each row: weights of the others by name, sorted
    missing: tuple[tuple[str, ...], ...]  # whose vector should have come
    terms: Terms
    others: Terms  # the plain mean of those that were heard
    copies: tuple[int, ...]  # of each row, to how many it was sent


class Columns(NamedTuple):
    """Neighbouring parameters, all shared or none."""

    start: int
    end: int
    at: int | None  # where they lie in what is sent; None: each node keeps its own


def _columns(size: int, runs: Sequence[tuple[int, int]], width: int) -> Iterator[Columns]:
    """All parameters, in pieces of at most `width`."""
    shared, at = dict(runs), 0
    bounds = sorted({0, size, *shared, *shared.values()})
    for start, end in pairwise(bounds):
        for first in range(start, end, width):
            last = min(first + width, end)
            yield Columns(first, last, at + first - start if start in shared else None)
        at += end - start if start in shared else 0


# -- All nodes -------------------------------------------------------------------------------------------------------


class Lockstep:
    """The state of all nodes. Those with equally many rows of data are neighbours, so that they can train together."""

    def __init__(self, experiment: Experiment, ground: Ground, *, at_once: bool = True) -> None:
        """`at_once`: whether to train many nodes together where their module allows it. BadInput for a rule that does
        not fit the model."""
        self._experiment, self._ground = experiment, ground
        parts = ground.parts
        self.names = tuple(sorted(ground.graph.names, key=lambda name: (len(parts[name].train), name)))
        self._row = {name: row for row, name in enumerate(self.names)}
        n = len(self.names)
        self._learner = make_learner(experiment, parts[self.names[0]], self.names[0])  # anybody's: for its module
        self.schema = self._learner.schema
        self.values = self._learner.vector.repeat(n, 1)  # (n, P)
        # Blocks of rows, or of columns, are shared out to threads; no sum depends on how many there are. Threads inside
        # of torch would wait for each other after each operation, which on a busy machine takes longer than to do it.
        self._threads = ThreadPoolExecutor(CORES) if self.values.numel() >= WORTH_THREADS and CORES > 1 else None
        if not experiment.starts_alike:
            for name, row in self._row.items():
                self.values[row] = make_learner(experiment, parts[name], name).vector
        self.note = ""
        self._cohort = self._train_with(at_once)

        self._graph, self._weights = ground.graph, experiment.topology.weighting
        self._push_sum = self._weights in PUSH_SUM
        self._mass = dict(ground.masses)  # only push-sum changes it
        self._masks = Masks(experiment)
        self._suspicion = math.ceil(experiment.network.suspicion / ROUND_SECONDS)  # rounds
        self._here = self._living = frozenset(self.names)  # who takes part in the round; who is not taken for dead
        self.failed: dict[str, str] = {}  # who does no longer, since its training came to nothing, and why
        self._failed_in: dict[str, int] = {}
        self._rounds_trained = [0] * n
        self._groups = self._grouped(self._here)
        # H of each row for the rule: one number where all take equally many steps, or else (n, 1).
        steps = torch.tensor(self._cohort.steps, device=self.values.device).clamp(min=1).unsqueeze(1)
        self._steps = steps if len(set(self._cohort.steps)) > 1 else int(steps[0])
        self._known: dict[int, Mixing] = {}  # of the rounds of a period in which nothing went wrong
        self.epochs = dict.fromkeys(self.names, 1)
        self.conduct = {name: Conduct() for name in self.names}
        self._shut_out: dict[tuple[str, str], float] = {}  # (who does not listen, to whom) → until when, in seconds
        self.traffic = dict.fromkeys(self.names, (0, 0))  # bytes sent and received in the newest round
        self.total_traffic = dict.fromkeys(self.names, (0, 0))

        mix = experiment.mix
        varies = ground.graph.varies
        self._recipe, self._rule = recipe_of(experiment), aggregator_of(experiment)
        self._least = least_vectors(experiment)
        self._memory = {name: torch.zeros_like(self.values) for name in rules.memory_names(self._recipe)}
        kept = self._learner.norms if mix.norms == "own" else frozenset[str]()
        self._runs = shared_runs(self.schema, mix.shared, kept)
        self._shared = sum(end - start for start, end in self._runs)
        self.codec = codec_of(experiment, self._shared * rules.vectors_sent(self._recipe))
        self._gamma = gamma_of(experiment, varies)
        self._columns = tuple(_columns(self.schema.size, self._runs, WIDTH))
        self._public: Tensor | None = None  # (n, S): what the others make of what is sent, where it is compressed …
        self._replicas: Tensor | None = None  # … and what they have, if they get differences only
        if self.codec.name != "none":
            self._public = self.values.new_zeros(n, self.codec.size)
        if sends_differences(experiment, varies):
            self._replicas = self._public
            if experiment.starts_alike and self._replicas is not None:
                for row in range(n):
                    self._replicas[row] = self._outgoing(row, 0)
        self._liars = {experiment.name_of(f.node) for f in experiment.faults if f.about in VECTOR_LIES}
        self._said: dict[int, Tensor] = {}  # row → (S,): what a liar sends in place of its vector, uncompressed
        norms = self.values.norm(dim=1).tolist() if self._liars else []
        self._norms = {name: Norms(norm) for name, norm in zip(self.names, norms, strict=False)}  # where some lie
        self._heard_by: dict[str, Tensor] = {}  # liar → (k, S): what it heard last
        self._linear = self._rule is None and self._replicas is None
        self._probe = Probe(self._shared, stream(0, "probe"))

    def _train_with(self, at_once: bool) -> Cohort:
        """The learners, whose vectors are the rows of `values`."""
        parts = [self._ground.parts[name] for name in self.names]
        if at_once:
            others = [make_learner(self._experiment, parts[0], self.names[0]) for _ in range(CORES)]
            cohort = AtOnce(others, parts, self.names, self.values, self._experiment.seed)
            obstacle = cohort.obstacle()
            if not obstacle:
                return cohort
            self.note = f"this model cannot be trained for many nodes at once, so they take turns: {obstacle}"
        pairs = zip(self.names, parts, self.values, strict=True)
        return OneByOne([make_learner(self._experiment, part, name, vector) for name, part, vector in pairs])

    # -- A run -------------------------------------------------------------------------------------------------------

    def start(self) -> list[Entry]:
        """What nodes record before the first round."""
        entries: list[Entry] = []
        for name in self.names:
            entries.append((name, Happened("started", {"rows": len(self._ground.parts[name].train), "round": 0})))
            entries += [(name, Happened("note", {"why": note})) for note in self._learner.notes]
        if self.note:
            entries.append((self.names[0], Happened("note", {"why": self.note})))
        return entries

    def advance(self, round: int, look: bool = True) -> list[Entry]:
        """Do this round, and say what is recorded of it; without a `look`, only what it takes to go on."""
        entries = self._come_and_go(round)
        losses, failed = self._train(round)
        entries += failed
        self._put_out(round)
        evaluated = look and is_evaluated(self._experiment.train, round)
        local = self._evaluate() if evaluated else {}
        probed = look and self._linear
        before = self._probed() if probed else []
        mixing, happened = self._mixing(round)
        gaps = self._fold(mixing, round, look)
        after = self._probed() if probed else []
        mixed = self._evaluate() if evaluated else {}
        entries += happened
        self._count(mixing)
        for name in sorted(self._here) if look else ():
            row = self._row[name]
            trained = Trained(losses[row], local.get(row, NO_SCORES), ROUND_SECONDS, 0.0)
            probes = (tuple(before[row]), tuple(after[row])) if probed else ((), ())
            folded = Folded(mixed.get(row, NO_SCORES), gaps[row], 0.0, 0.0, *probes)
            entries.append(
                (name, RoundEnded(round, trained, folded, tuple(mixing.heard[row]), mixing.missing[row], 0.0))
            )
        return entries

    def _probed(self) -> list[list[float]]:
        """Random projections of the shared part of each row."""
        if self._shared == self.schema.size:
            return self._probe.of_rows(self.values).tolist()
        shared = [self.values[:, start:end] for start, end in self._runs]
        return self._probe.of_rows(torch.cat(shared, dim=1)).tolist()

    def finishes(self, name: str) -> bool:
        """Whether this node has done, or will do, all that is left to it at the end."""
        last = self._experiment.train.rounds - 1
        killed = self._experiment.is_doomed(name) and self._masks.is_away(name, last)
        return name not in self.failed and not killed

    def write_model(self, name: str, run: Run) -> None:
        """Write down this node's model."""
        write_model(self._cohort.learner(self._row[name]), run.node(name).model)

    def _count(self, mixing: Mixing) -> None:
        for name, heard, copies in zip(self.names, mixing.heard, mixing.copies, strict=True):
            sent, received = copies * self.codec.nbytes, len(heard) * self.codec.nbytes
            self.traffic[name] = sent, received
            before = self.total_traffic[name]
            self.total_traffic[name] = before[0] + sent, before[1] + received

    # -- Who takes part ----------------------------------------------------------------------------------------------

    def _come_and_go(self, round: int) -> list[Entry]:
        """Note who takes part in this round, and on which graph; what those say of it."""
        away = {name for name in self._masks.ever_away if self._masks.is_away(name, round)}
        here = frozenset(self.names) - away - self.failed.keys()
        entries: list[Entry] = []
        for name in sorted(self._here - here):
            entries += self._tell_of(name, round, here, "died", {"why": "it is gone"})
        for name in sorted(here - self._here):
            self.epochs[name] += 1
            entries.append((name, Happened("started", {"rows": len(self._ground.parts[name].train), "round": round})))
            entries += self._tell_of(name, round, here, "returned", {"epoch": self.epochs[name]})
        if here != self._here:
            self._here, self._groups = here, self._grouped(here)
        return entries + self._rewire(round)

    def _tell_of(
        self, name: str, round: int, here: frozenset[str], event: str, fields: Mapping[str, Value]
    ) -> list[Entry]:
        graph = self._graph.at(round)
        around = {*hears(graph, name), *tells(graph, name)} if name in graph else set[str]()
        return [(other, Happened(event, {"peer": name, **fields})) for other in sorted(around & here)]

    def _rewire(self, round: int) -> list[Entry]:
        """Go on with the graph over those who live: who was away for as long as a suspicion lasts is dead."""
        if not self._experiment.topology.heal:
            return []
        gone = {name for name in (*self._masks.ever_away, *self.failed) if self._is_dead(name, round)}
        living = frozenset(self.names) - gone
        if living == self._living:
            return []
        before, self._living = self._living, living
        section, whole = self._experiment.topology, self._ground.graph
        self._graph = topology.over(section, self._experiment.seed, whole, tuple(sorted(living)))
        self._known.clear()
        rules.restart(self._recipe, self._memory)
        fields: dict[str, Value] = {
            "round": round,
            "members": len(living),
            "gone": tuple(sorted(before - living)),
            "back": tuple(sorted(living - before)),
        }
        around = self._graph.union()
        return [
            (name, Happened("rewired", fields | {"neighbours": tuple(sorted(around[name]))}))
            for name in sorted(self._here)
        ]

    def _is_dead(self, name: str, round: int) -> bool:
        since = round - self._suspicion
        if name in self._failed_in:
            return self._failed_in[name] <= since
        return all(self._masks.is_away(name, earlier) for earlier in range(since, round + 1))

    def _grouped(self, here: frozenset[str]) -> tuple[tuple[Rows, int], ...]:
        """Neighbouring rows of those who take part, which take equally many steps and have trained equally often."""
        groups: list[tuple[Rows, int]] = []
        for row, name in enumerate(self.names):
            if name not in here:
                continue
            alike = self._cohort.steps[row], self._rounds_trained[row]
            if groups and groups[-1][0].stop == row and alike == (groups[-1][1], self._rounds_trained[row - 1]):
                groups[-1] = slice(groups[-1][0].start, row + 1), alike[0]
            else:
                groups.append((slice(row, row + 1), alike[0]))
        return tuple(groups)

    # -- Training ----------------------------------------------------------------------------------------------------

    def _train(self, round: int) -> tuple[list[float], list[Entry]]:
        """One round of local training of all who take part; the mean loss of each row, and what there is to say."""
        rate = learning_rate(self._experiment.train, round)
        liars = [self._row[name] for name in self._liars if LABEL_FLIP in lies_in(self._experiment, name, round)]
        losses = [math.nan] * len(self.names)

        def train(part: Rows) -> bool:
            """Whether all their numbers are such that others take them."""
            steps = self._cohort.steps[part.start]
            values, memory = self.values[part], self._of(part)
            rules.begin(self._recipe, memory, values)
            parts_of_way = [self._part_of_way(name) for name in self.names[part]]
            start = values.clone() if any(part_of_way != 1.0 for part_of_way in parts_of_way) else None
            steer = partial(rules.steer, self._recipe, memory, rate=rate, steps=steps) if memory and steps else None
            losses[part] = self._cohort.train(part, round, steer, liars)
            if start is not None:
                factors = torch.tensor(parts_of_way, dtype=torch.float32, device=values.device).unsqueeze(1)
                values.sub_(start).mul_(factors).add_(start)
            low, high = torch.aminmax(values)  # NaN if there is any
            return math.isfinite(sum(losses[part])) and max(-low.item(), high.item()) <= MAX_VALUE

        parts = [part for rows, _ in self._groups for part in split(rows, self._cohort.together, CORES)]
        usable = self._each(train, parts, self._cohort.threads)
        for rows, _ in self._groups:
            for row in range(rows.start, rows.stop):
                self._rounds_trained[row] += 1
        doubtful = [part for part, fine in zip(parts, usable, strict=True) if not fine]
        suspects = [row for part in doubtful for row in range(part.start, part.stop)]
        return losses, self._drop_failed(round, rate, losses, suspects)

    def _of(self, rows: Rows) -> rules.Memory:
        return {name: tensor[rows] for name, tensor in self._memory.items()}

    def _part_of_way(self, name: str) -> float:
        """How much of what training does counts: push-sum divides it by the mass that a node holds."""
        return min(self._ground.masses[name] / self._mass[name], MAX_STEP) if self._push_sum else 1.0

    def _drop_failed(self, round: int, rate: float, losses: Sequence[float], suspects: Iterable[int]) -> list[Entry]:
        """Whoever has no model left that others could use goes, as a real node does."""
        entries: list[Entry] = []
        for row in suspects:
            name, why = self.names[row], "" if math.isfinite(losses[row]) else diverged(losses[row], round, rate)
            if not why:
                try:
                    check_vector(self.values[row], None)
                except BadMessage as error:
                    why = unusable(error.why)
            if why:
                self.failed[name], self._failed_in[name] = why, round
                entries.append((name, Happened("left", {"round": round})))
        if entries:
            self._here -= self.failed.keys()
            self._groups = self._grouped(self._here)
        return entries

    def _evaluate(self) -> dict[int, Scores]:
        """What each row reaches whose node takes part."""
        parts = [part for rows, _ in self._groups for part in split(rows, self._cohort.together, CORES)]
        found = self._each(self._cohort.evaluate, parts, self._cohort.threads)
        return {
            row: scores
            for part, of_part in zip(parts, found, strict=True)
            for row, scores in zip(range(part.start, part.stop), of_part, strict=True)
        }

    def _each(self, work: Callable[[Item], Result], items: Sequence[Item], threads: bool = True) -> list[Result]:
        """The results of this work, which touches other memory for each item, in their order."""
        return list((self._threads.map if threads and self._threads is not None else map)(work, items))

    # -- What is sent ------------------------------------------------------------------------------------------------

    def _outgoing(self, row: int, round: int) -> Tensor:
        """(S,): what this node has to send, before anything is done to it: the shared part, and that of a second."""
        memory = {name: tensor[row] for name, tensor in self._memory.items()}
        rate, steps = learning_rate(self._experiment.train, round), max(1, self._cohort.steps[row])
        extra = rules.extra(self._recipe, memory, self.values[row], rate, steps)
        whole = (self.values[row],) if extra is None else (self.values[row], extra)
        return torch.cat([vector[start:end] for vector in whole for start, end in self._runs])

    def _put_out(self, round: int) -> None:
        """Note what others will take nodes' vectors to be, where that differs from the vectors."""
        self._said.clear()
        for name in sorted(self._liars & self._here):
            row = self._row[name]
            own = self._outgoing(row, round)
            said = as_told(self._experiment, name, round, own, self._heard_by.get(name, own.new_empty(0, own.numel())))
            if said is not own:
                self._said[row] = said
        if self._public is None:
            return
        for name in self._here:
            row = self._row[name]
            vector = self._said[row] if row in self._said else self._outgoing(row, round)
            number = codec_number(self._experiment.seed, name, round)
            if self._replicas is not None:
                self._replicas[row] += self.codec.approximate(vector - self._replicas[row], number)
            else:
                self._public[row] = self.codec.approximate(vector, number)

    def _sent(self, own: Tensor, at: int) -> Tensor:
        """These columns (sources, w) of what is sent, from those of the own vectors: a row for each node, and one more
        for each that lies, since it mixes its true vector itself."""
        if self._public is not None:
            return self._public[:, at : at + own.shape[1]].contiguous()
        lies = [said[at : at + own.shape[1]] for said in self._said.values()]
        return torch.cat([own, torch.stack(lies)]) if lies else own.contiguous()

    def _row_sent(self, row: int, round: int) -> Tensor:
        """(S,): what the others take this node's vector to be."""
        if self._public is not None:
            return self._public[row]
        return self._said[row] if row in self._said else self._outgoing(row, round)

    # -- Who hears whom ----------------------------------------------------------------------------------------------

    def _mixing(self, round: int) -> tuple[Mixing, list[Entry]]:
        """The weights of this round, and what nodes say of what they did not take."""
        period = self._graph.period
        calm = self._masks.calm(round) and not (self.failed or self._liars or self._push_sum)
        if calm and period is not None and round % period in self._known:
            return self._known[round % period], []
        graph = self._graph.at(round)
        told = {name: self._told(graph, name, round) for name in graph}
        stakes = {name: self._stake(graph, name, told[name]) for name in graph}
        fixed = self._graph.fixed_weights(round, self._weights)
        entries: list[Entry] = []
        accusations: list[tuple[str, str, str]] = []  # by whom, of whom, of what
        heard: list[dict[str, float]] = []
        missing: list[tuple[str, ...]] = []
        for name in self.names:
            expected = hears(graph, name) if name in self._here else []
            came = []
            for other in expected:
                if self._comes(other, name, round, told):
                    refused = self._why_refused(name, other, round)
                    if refused is None:
                        came.append(other)
                        continue
                    said, shut_out = self._reject(name, other, *refused, round)
                    entries += said
                    accusations += [(name, other, refused[0])] if shut_out else []
            if expected and len(came) + 1 < self._least:
                few: dict[str, Value] = {"round": round, "came": len(came), "needed": self._least - 1}
                entries.append((name, Happened("too_few", few)))
                came = []
            weights: dict[str, float] = {}
            if name in self._here:
                own, others = stakes[name], {other: stakes[other] for other in came}
                weights = weights_of(self._weights, own, others, {o: fixed[name, o] for o in came} if fixed else {})
                if self._push_sum:
                    self._mass[name] = mass_after(own, others)
            heard.append(weights)
            missing.append(tuple(other for other in expected if other not in weights))
        for by, peer, code in accusations:  # of which others hear when this round is over
            entries += self._accuse(by, peer, code, told[by])
        mixing = self._as_terms(heard, missing, [len(told.get(name, ())) for name in self.names])
        if calm and period is not None:
            self._known[round % period] = mixing
        return mixing, entries

    def _told(self, graph: nx.Graph, name: str, round: int) -> frozenset[str]:
        """To whom this node sends: it has a link to them."""
        if name not in self._here:
            return frozenset()
        return frozenset(o for o in tells(graph, name) if o in self._here and not self._is_apart(name, o, round))

    def _is_apart(self, sender: str, receiver: str, round: int) -> bool:
        until = max(self._shut_out.get(pair, 0.0) for pair in ((sender, receiver), (receiver, sender)))
        return round * ROUND_SECONDS < until or self._masks.is_cut(sender, receiver, round)

    def _comes(self, sender: str, receiver: str, round: int, told: Mapping[str, frozenset[str]]) -> bool:
        """Whether an update arrives; where edges must be live both ways, whether the receiver's own does as well."""
        there = receiver in told[sender] and not self._masks.is_lost(sender, receiver, round)
        if not there or not self._experiment.two_way:
            return there
        return sender in told[receiver] and not self._masks.is_lost(receiver, sender, round)

    def _stake(self, graph: nx.Graph, name: str, told: frozenset[str]) -> Stake:
        """What a node says of itself; as in `node`, who is away but not dead counts in the reach of its neighbours."""
        mass = self._mass[name]
        if self._push_sum:
            return Stake(mass, 1.0 + len(told))
        return Stake(mass, reach([mass, *(self._mass[other] for other in hears(graph, name))]))

    def _why_refused(self, name: str, other: str, round: int) -> tuple[str, str] | None:
        """Why this node does not take what the other has sent, as code and words; None if it does."""
        if self._liars:
            try:
                self._norms[name].check(self._row_sent(self._row[other], round))
            except BadMessage as error:
                return error.code, error.why
        return self._masks.spoilt(other, name, round)

    def _reject(self, name: str, other: str, code: str, why: str, round: int) -> tuple[list[Entry], bool]:
        """What a node says of what it refused, and whether it listens to its maker no longer."""
        now = round * ROUND_SECONDS
        verdict, entries = self.conduct[name].rejected(other, code, now), list[Entry]()
        if verdict.log:
            entries.append((name, Happened("rejected", {"peer": other, "code": code, "why": why})))
        if verdict.quarantine:
            self._shut_out[name, other] = now + verdict.quarantine
            fields: dict[str, Value] = {"peer": other, "code": code, "seconds": verdict.quarantine}
            entries.append((name, Happened("quarantined", fields)))
        return entries, verdict.quarantine > 0

    def _accuse(self, by: str, peer: str, code: str, neighbours: Iterable[str]) -> list[Entry]:
        """Tell the neighbours; the next mistake of the accused is one too many for them."""
        return [
            (other, Happened("accused", {"peer": peer, "by": by, "code": code}))
            for other in sorted(neighbours)
            if other != peer and self.conduct[other].accused(by, peer, code)
        ]

    def _as_terms(
        self, heard: Sequence[dict[str, float]], missing: Sequence[tuple[str, ...]], copies: Sequence[int]
    ) -> Mixing:
        rows, n = self._row, len(self.names)
        lies = dict(zip(self._said, range(n, n + len(self._said)), strict=True)) if self._public is None else {}
        source = {name: lies.get(row, row) for name, row in rows.items()} if lies else rows
        sums: list[list[tuple[int, float]]] = []
        means: list[list[tuple[int, float]]] = []
        for name, weights in zip(self.names, heard, strict=True):
            own = name, rows[name], 1.0 - math.fsum(weights.values())
            terms = sorted([own, *((other, source[other], weight) for other, weight in weights.items())])
            sums.append([(row, weight) for _, row, weight in terms])
            means.append([(source[other], 1.0 / len(weights)) for other in weights])
        device = self.values.device
        return Mixing(tuple(heard), tuple(missing), _terms(sums, device), _terms(means, device), tuple(copies))

    # -- Mixing ------------------------------------------------------------------------------------------------------

    def _fold(self, mixing: Mixing, round: int, look: bool) -> list[float]:
        """Mix all vectors, and let the rule absorb it; of each row the distance of what it sent to the mean of others.

        Without a `look` these distances are 0.
        """
        rate, recipe = learning_rate(self._experiment.train, round), self._recipe
        self._listen(mixing, round)
        chosen = None if self._rule is None else self._choose(mixing, round)

        pieces = [(piece, steps) for rows, steps in self._groups for piece in split(rows, ABSORBED)]

        def fold(columns: Columns) -> Tensor:
            """Returns the squared distances (n,), as far as these columns go."""
            start, end, at = columns
            values = self.values[:, start:end]
            memory = {name: tensor[:, start:end] for name, tensor in self._memory.items()}
            extra = rules.extra(recipe, memory, values, rate, self._steps)
            squares = torch.zeros(len(self.names), dtype=torch.float64)
            if at is None:
                mixed, mixed_extra = values.clone(), None if extra is None else extra.clone()
            else:
                sent = self._sent(values, at)
                if look:
                    squares = self._squared_gaps(mixing, sent)
                mixed = mixing.terms(sent) if chosen is None else chosen[:, at : at + end - start]
                mixed, mixed_extra = self._mixed(values, sent, mixed), None
                if extra is not None:
                    sent = self._sent(extra, at + self._shared)
                    mixed_extra = self._mixed(extra, sent, mixing.terms(sent))
            for rows, steps in pieces:
                if steps:
                    of_rows = {name: tensor[rows] for name, tensor in memory.items()}
                    gave, got = (None if vectors is None else vectors[rows] for vectors in (extra, mixed_extra))
                    rules.absorb(recipe, of_rows, values[rows], mixed[rows], gave, got, rate, steps)
                else:
                    values[rows] = mixed[rows]
            return squares

        squares = self._each(fold, self._columns)
        return torch.stack(squares).sum(dim=0).sqrt().tolist()

    def _mixed(self, own: Tensor, sent: Tensor, mixed: Tensor) -> Tensor:
        """Where vectors are compressed, what is lost on the way to the others must not be lost here."""
        return mixed if self._public is None else step(own, mixed, sent, self._gamma)

    def _squared_gaps(self, mixing: Mixing, sent: Tensor) -> Tensor:
        """(n,) float64: ||what was sent - the mean of what was heard||^2 of these columns; 0 where nothing was."""
        own = torch.arange(len(self.names), device=sent.device)
        for place, row in enumerate(self._said if self._public is None else ()):
            own[row] = len(self.names) + place
        gaps = (sent[own] - mixing.others(sent)).double().square().sum(dim=1).cpu()
        return torch.where(torch.tensor([bool(heard) for heard in mixing.heard]), gaps, 0.0)

    def _listen(self, mixing: Mixing, round: int) -> None:
        """Liars remember what they heard: their next lie depends on it."""
        for name in self._liars & self._here:
            rows = [self._row[other] for other in mixing.heard[self._row[name]]]
            heard = [self._row_sent(row, round) for row in rows]
            self._heard_by[name] = torch.stack(heard) if heard else self.values.new_empty(0, self.codec.size)

    def _choose(self, mixing: Mixing, round: int) -> Tensor:
        """(n, S): what the robust rule makes of each node's neighbourhood, the own vector first."""
        assert self._rule is not None
        chosen = self.values.new_empty(len(self.names), self.codec.size)
        for row, weights in enumerate(mixing.heard):
            own = self._outgoing(row, round) if self._public is None else self._public[row]
            if weights:
                vectors = torch.stack([own, *(self._row_sent(self._row[other], round) for other in weights)])
                all_weights = torch.tensor([1.0 - sum(weights.values()), *weights.values()])
                own = self._rule(vectors, all_weights, self._experiment.mix.tolerate)
            chosen[row] = own
        return chosen
