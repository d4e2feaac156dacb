"""One node's part in a round, the same in every driver: train, say what is sent, and fold in what came.

A `Trainer` joins a learner with the rule that the experiment has chosen, and owns what the rule remembers. It knows
vectors only: no network, no clock, no file. What travels is one flat float32 vector of S elements: the shared part of
the parameters, and after it that of a second vector where the rule needs one.

    train      begin, local steps (each steered by the rule), and `public`: what the others will take this node's
               vector to be, which differs from the vector itself where it is compressed, or where the node lies
    fold       mix what came with one's own, and let the rule absorb it
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl import mixing, rules
from p2pfl.asynchronous import OUTSTANDING
from p2pfl.attacks import ATTACKS, flip_labels
from p2pfl.compression import DIFFERENCES, GAMMA, Codec, step
from p2pfl.config import LABEL_FLIP, VECTOR_LIES, Experiment, PrivacySection, TrainSection, did_you_mean
from p2pfl.data import import_function
from p2pfl.learner import TorchLearner
from p2pfl.ledger import Ledger, simulated_ledger
from p2pfl.messages import LAST, BadInput, Compute, Folded, Schema, Scores, Trained
from p2pfl.mixing import RULES, Probe, Rule, clip, distance_to_mean, fold, nearest_neighbour_mixing
from p2pfl.private import ExampleRound, Privacy, Randomness, blur, digest
from p2pfl.rng import stream, torch_seed
from p2pfl.rules import Recipe

NO_SCORES = Scores({})


class Run(NamedTuple):
    """Elements of a vector, from the first to before the end."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Term:
    """One neighbour's vector in a fold."""

    peer: str
    weight: float
    vector: Tensor  # float32 (S,)
    reference: int | None = None  # see `Contribution`
    gain: float = 1.0


# -- What an experiment says -----------------------------------------------------------------------------------------


def recipe_of(experiment: Experiment) -> Recipe:
    """The parts of `rules` that this experiment has chosen."""
    mix = experiment.mix
    return Recipe(
        proximal=experiment.train.proximal,
        momentum=experiment.momentum,
        beta=mix.beta,
        correction=mix.correction,
        leak=mix.leak,
        outer=mix.outer,
        outer_lr=mix.outer_lr,
        outer_beta=mix.outer_beta,
    )


def aggregator_of(experiment: Experiment) -> Rule | None:
    """How several vectors become one; None for the plain weighted mean. BadInput for a function that is not there."""
    mix = experiment.mix
    if mix.rule == "mean" and not mix.nnm:
        return None
    if ":" in mix.rule:
        rule = _from_function(mix.rule)
    elif mix.rule == "clip" and mix.radius is not None:
        rule = _clip_within(mix.radius)
    else:
        rule = RULES[mix.rule]
    return _after_nearest_neighbours(rule) if mix.nnm else rule


def least_vectors(experiment: Experiment) -> int:
    """How many vectors, the own one included, a node needs before it mixes anything."""
    mix = experiment.mix
    if mix.rule not in RULES:  # the user's own: what it bears is its own affair
        return 1
    least = mixing.least_vectors(mix.rule, mix.tolerate if mix.radius is None else 0)
    return max(least, mixing.least_vectors("trimmed-mean", mix.tolerate)) if mix.nnm else least


def _clip_within(radius: float) -> Rule:
    return lambda vectors, weights, tolerate: clip(vectors, weights, tolerate, radius=radius)


def _after_nearest_neighbours(rule: Rule) -> Rule:
    return lambda vectors, weights, tolerate: rule(nearest_neighbour_mixing(vectors, tolerate), weights, tolerate)


def _from_function(name: str) -> Rule:
    """The user's own rule: (k, P) vectors, the own one first, their (k,) weights and b → (P,)."""
    function = import_function(name, "mix.rule")

    def rule(vectors: Tensor, weights: Tensor, tolerate: int) -> Tensor:
        mixed = function(vectors=vectors, weights=weights, tolerate=tolerate)
        if not isinstance(mixed, Tensor) or mixed.shape != vectors.shape[1:]:
            got = tuple(mixed.shape) if isinstance(mixed, Tensor) else type(mixed).__name__
            raise BadInput(f"mix.rule = {name!r} returned {got}: it must return one vector {tuple(vectors.shape[1:])}")
        if not mixed.isfinite().all():
            raise BadInput(f"mix.rule = {name!r} made NaN or infinity of finite vectors: it must return numbers")
        return mixed

    return rule


def codec_of(experiment: Experiment, size: int) -> Codec:
    """How vectors of this many elements are written in this experiment."""
    mix = experiment.mix
    return Codec(mix.compress, size, mix.fraction, torch_seed(experiment.seed, "compress"))


def sends_differences(experiment: Experiment, varies: bool) -> bool:
    """Whether a node sends what has changed since its last update, which its neighbours add to what they have of it.

    Where neighbours change from round to round, whole vectors are sent, as coarse as the codec makes them.
    """
    mix = experiment.mix
    return mix.compress in DIFFERENCES and mix.schedule == "sync" and not varies


def gamma_of(experiment: Experiment, varies: bool) -> float:
    """How far a node goes towards the mean of what is known of its neighbours, where vectors are compressed."""
    mix = experiment.mix
    return mix.gamma or (GAMMA[mix.compress] if sends_differences(experiment, varies) else 1.0)


def trains_in(experiment: Experiment, round: int) -> bool:
    """Whether nodes train in this round, and not only mix: the first of each `privacy.mixings`."""
    return round % experiment.privacy.mixings == 0


def privacy_of(
    experiment: Experiment, section: PrivacySection, learner: TorchLearner, ledger: Ledger
) -> Privacy | None:
    """What hides this learner's rows, as `section` asks for it; None if it asks for nothing, or if nothing is learnt.

    BadInput as `Privacy`.
    """
    if section.dp == "none" or learner.steps == 0:
        return None
    return Privacy(
        section,
        rows=learner.samples,
        batch_size=experiment.train.batch_size,
        steps=learner.steps,
        rounds=sum(trains_in(experiment, round) for round in range(experiment.train.rounds)),
        ledger=ledger,
    )


def is_evaluated(train: TrainSection, round: int) -> bool:
    """Whether nodes look at their test rows in this round."""
    return (round + 1) % train.evaluate_every == 0 or round == train.rounds - 1


def lies_in(experiment: Experiment, name: str, round: int) -> dict[str, float | None]:
    """What this node lies about in this round, of what it learnt, and how strongly if that is given."""
    rounds = experiment.train.rounds
    return {
        fault.about: fault.strength
        for fault in experiment.faults_for(name)
        if fault.about in VECTOR_LIES and fault.round <= round < fault.round + (fault.rounds or rounds)
    }


def as_told(experiment: Experiment, name: str, round: int, own: Tensor, heard: Tensor) -> Tensor:
    """What this node says that its vector is: `own` (S,) itself, or what a lie makes of it and of `heard` (k, S)."""
    told = own
    for about, strength in lies_in(experiment, name, round).items():
        if about in ATTACKS:
            attack, usual = ATTACKS[about]
            random = torch.Generator().manual_seed(torch_seed(experiment.seed, "lie", name, round))
            told = attack(own, heard, usual if strength is None else strength, random)
    return told


def runs_of(experiment: Experiment, learner: TorchLearner) -> tuple[Run, ...]:
    """Where in the learner's vector that lies which this experiment shares; see `shared_runs`."""
    kept = learner.norms if experiment.mix.norms == "own" else frozenset[str]()
    return shared_runs(learner.schema, experiment.mix.shared, kept)


def is_personal(experiment: Experiment, learner: TorchLearner) -> bool:
    """Whether a part of the model stays each node's own, so that no two have the same one in the end."""
    return runs_of(experiment, learner) != (Run(0, learner.schema.size),)


def shared_runs(schema: Schema, patterns: Sequence[str], kept: frozenset[str]) -> tuple[Run, ...]:
    """Where in the flat vector the tensors lie that match a pattern, those in `kept` aside; neighbouring ones joined.

    BadInput for a pattern that matches nothing, and if nothing is shared.
    """
    names = [tensor.name for tensor in schema.tensors]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(f"mix.share = {pattern!r} matches no tensor of the model{did_you_mean(pattern, names)}")
    runs: list[Run] = []
    start = 0
    for tensor in schema.tensors:
        end = start + tensor.size
        if any(fnmatchcase(tensor.name, pattern) for pattern in patterns) and tensor.name not in kept:
            if runs and runs[-1].end == start:
                runs[-1] = Run(runs[-1].start, end)
            else:
                runs.append(Run(start, end))
        start = end
    if not runs:
        raise BadInput("mix.share and mix.norms leave nothing to be shared: share more, or train alone")
    return tuple(runs)


# -- The trainer -----------------------------------------------------------------------------------------------------


class Trainer:
    """A learner, the rule, and what the rule remembers. Used by one thread at a time."""

    def __init__(
        self,
        learner: TorchLearner,
        experiment: Experiment,
        name: str,
        *,
        varies: bool,
        privacy: PrivacySection | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """`varies`: whether the graph changes from round to round. `privacy`: this node's own; the experiment's, if not
        given. `ledger`: where what it costs is written down; without one, it is as in a simulation.

        BadInput for a rule, or a privacy, that does not fit the model.
        """
        self.learner = learner
        self._experiment = experiment
        self._name = name
        self._recipe = recipe_of(experiment)
        self._rule = aggregator_of(experiment)
        self._runs = runs_of(experiment, learner)
        vector = learner.vector
        self._memory = {name: torch.zeros_like(vector) for name in rules.memory_names(self._recipe)}
        self._rate, self._steps = learner.rate(0), learner.steps
        self._extra: Tensor | None = None
        self._everything = self._runs == (Run(0, vector.numel()),)
        shared = sum(run.end - run.start for run in self._runs)
        self._probe = Probe(shared, stream(0, "probe"))
        self.size = shared * rules.vectors_sent(self._recipe)  # S
        self.codec = codec_of(experiment, self.size)
        self.differences = sends_differences(experiment, varies)
        self._gamma = gamma_of(experiment, varies)
        # Plain averaging of whole vectors needs no memory but theirs.
        self._in_place = self._everything and self.size == vector.numel()
        self._own = (
            vector if self._in_place else self._gather(vector, self._second(vector))
        )  # (S,): what there is to send
        self._mixed = self._own if self._is_plain() else vector.new_empty(self.size)
        self.public = self._own  # (S,): what the others make of it
        self.replica: Tensor | None = None  # (S,): what they have, if they get differences only
        self.starts_alike = experiment.starts_alike
        if self.differences:
            self.replica = self.start
        self.change: Tensor | None = None  # (S,): the newest difference, before it was written down in fewer bytes
        self._lies = any(fault.about in VECTOR_LIES for fault in experiment.faults_for(name))
        self._heard = vector.new_empty((0, self.size))  # for a lie that depends on it
        self._sent: deque[tuple[int, Tensor]] = deque(maxlen=OUTSTANDING)  # pairwise: (round, what was public)
        self._running: Tensor | None = None  # (S,): the sum of all that was ever sent to one neighbour
        self._absorbed: dict[str, Tensor] = {}  # peer → (S,): that sum as it came last
        if experiment.mix.schedule == "push-sum":
            self._running = vector.new_zeros(self.size)
        section = experiment.privacy if privacy is None else privacy
        ledger = simulated_ledger(experiment.seed, name) if ledger is None else ledger
        self._private = privacy_of(experiment, section, learner, ledger)
        self._gradients = None
        if self._private is not None and section.dp == "example":
            self._gradients = learner.hide_rows(section.clip, self._private.mechanism, self._private.expected)
        # What the outcome of training depends on, beside the state; see `ledger`.
        self._settings: dict[str, str | int] = {} if self._private is None else self._fixed(section)
        self._budget_told = False
        self.notes = learner.notes if self._private is None else (*learner.notes, self._private.note)

    def _fixed(self, section: PrivacySection) -> dict[str, str | int]:
        rows = dict(zip(("inputs", "targets"), self.learner.rows, strict=True))
        return {
            **self._experiment.agreement(),
            "own": section.model_dump_json(),
            "rows": digest({}, rows).hex(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),  # sums come out otherwise with others
        }

    @property
    def averages(self) -> bool:
        """Whether a fold is the weighted mean of what came and of the own vector, all of it as it was sent."""
        mix = self._experiment.mix
        lies = any(fault.about in VECTOR_LIES for fault in self._experiment.faults)
        linear = self._rule is None and mix.outer == "none" and mix.schedule in ("sync", "gossip")
        return linear and self._everything and self.codec.name == "none" and not lies

    @property
    def sends_sums(self) -> bool:
        """Whether what is public is a running sum of models, and not a model."""
        return self._running is not None

    @property
    def start(self) -> Tensor:
        """What everybody's vector is at first, (S,): zeros, if each draws its own."""
        vector = self.learner.vector
        return self._gather(vector, self._second(vector)).mul_(1.0 if self.starts_alike else 0.0)

    def _is_plain(self) -> bool:
        return self._in_place and not self._memory and self._rule is None and self.codec.name == "none"

    # -- Training ----------------------------------------------------------------------------------------------------

    def train(self, job: Compute, clock: Callable[[], float]) -> Trained:
        """One round of local training, and what is then to be sent. Where push-sum says so, the vector goes another
        part of the way. `clock` gives seconds. TrainingFailed if the loss is not finite, or if what the round costs of
        privacy cannot be written down. In a round that only mixes, or that would cost too much, the vector stays."""
        learner, vector = self.learner, self.learner.vector
        begin = clock()
        random, trains = None, trains_in(self._experiment, job.round)
        if self._private is not None and trains:
            random = self._private.begin(job.round, self._context(job.round))
            trains = random is not None
        rules.begin(self._recipe, self._memory, vector)
        self._rate, self._steps = learner.rate(job.round), learner.steps
        blurred = random is not None and self._gradients is None
        start = vector.clone() if blurred or job.step != 1.0 else None
        loss = self._learn(job.round, random) if trains else learner.loss()
        if start is not None and random is not None and self._gradients is None:
            self._blur(start, random)
        if start is not None and job.step != 1.0:
            vector.sub_(start).mul_(job.step).add_(start)
        self._put_out(job)
        trained_at = clock()
        scores = learner.evaluate() if is_evaluated(self._experiment.train, job.round) else NO_SCORES
        spent = None if self._private is None else self._private.spent
        exhausted = self._private is not None and self._private.exhausted and not self._budget_told
        self._budget_told |= exhausted
        return Trained(loss, scores, trained_at - begin, clock() - trained_at, spent, exhausted)

    def _learn(self, round: int, random: Randomness | None) -> float:
        """Take the local steps; their mean loss."""
        steered = bool(self._memory) and self._steps > 0
        relabel = flip_labels if LABEL_FLIP in lies_in(self._experiment, self._name, round) else None
        private = None
        if self._gradients is not None and random is not None:
            private = ExampleRound(self._gradients, random)
        return self.learner.train(round, self._steer if steered else None, relabel, private)

    def _blur(self, start: Tensor, random: Randomness) -> None:
        """Clip and noise what training did to the shared part; the rest of the model leaves nowhere."""
        assert self._private is not None
        vector, section = self.learner.vector, self._private.section
        change = blur(self._gather(vector - start, None), section.clip, self._private.mechanism.sigma, random)
        self._scatter(self._gather(start, None).add_(change), vector)

    def _context(self, round: int) -> bytes:
        """All that the outcome of this round depends on, in 32 bytes: equal only for the very same training."""
        assert self._private is not None
        words: dict[str, str | int] = {"round": round, **self._settings}
        if self.learner.vector.device.type != "cpu":  # whose sums may come out otherwise a second time
            words["attempt"] = self._private.attempts
        return digest(words, self.state())

    def _steer(self, grads: Tensor, values: Tensor) -> None:
        rules.steer(self._recipe, self._memory, grads, values, self._rate, self._steps)

    def _second(self, vector: Tensor) -> Tensor | None:
        return rules.extra(self._recipe, self._memory, vector, self._rate, max(self._steps, 1))

    def _put_out(self, job: Compute) -> None:
        """Note what there is to send, and what the others will make of it."""
        vector = self.learner.vector
        self._extra = self._second(vector)
        if not self._in_place:
            self._gather(vector, self._extra, out=self._own)
        self.public = self._own
        if self._running is not None:
            self._hand_out(self._running, job)
        if self._lies:
            self.public = as_told(self._experiment, self._name, job.round, self.public, self._heard)
        if self.replica is not None:
            self.change = self.public - self.replica
            self.replica.add_(self.codec.approximate(self.change, self.number(job.round)))
            self.public = self.replica
        elif self.codec.name != "none":
            self.change = self.public
            self.public = self.codec.approximate(self.public, self.number(job.round))
        if self._experiment.mix.schedule == "pairwise":
            sent = self._own if self._lies else self.public  # who lies to others does not lie to itself
            self._sent.append((job.round, sent.clone()))

    def number(self, round: int) -> int:
        """The random number of this node's codec in this round, which its neighbours know as well."""
        return codec_number(self._experiment.seed, self._name, round)

    def _hand_out(self, running: Tensor, job: Compute) -> None:
        """Push-sum with running sums: hand as much to each of `job.told` neighbours as one keeps.

        What float32 does not hold of such a portion stays here, so that nothing is lost however long the sums grow.
        """
        before = running.clone()
        running.add_(self.public, alpha=job.portion)
        left = self.public.mul(job.portion).sub_(running - before)  # of each portion
        if job.told:
            self._own.add_(left, alpha=job.told / job.portion)
        self._scatter(self._own, self.learner.vector)
        self.public = running

    # -- Mixing ------------------------------------------------------------------------------------------------------

    def fold(self, job: Compute, terms: Sequence[Term], clock: Callable[[], float]) -> Folded:
        """Mix these vectors into the own one, and look how good it is. `clock` gives seconds."""
        vector = self.learner.vector
        begin = clock()
        terms = [Term(t.peer, t.weight, t.vector.to(vector.device), t.reference, t.gain) for t in terms]
        if self._lies:
            self._heard = torch.stack([term.vector for term in terms]) if terms else self._heard[:0]
        linear = self._rule is None and self.replica is None and self._running is None
        shared = self.size // rules.vectors_sent(self._recipe)
        public = self.public if self._running is None else self._own
        consensus = distance_to_mean(public[:shared], [self._model_of(t)[:shared] for t in terms if t.gain])
        before = self._probed() if linear else ()
        if job.jump:
            self._jump(job, terms)
        else:
            self._absorb(self._mix(job, terms))
        if job.restart:
            rules.restart(self._recipe, self._memory)
            if self._running is not None:
                self._running.zero_()
        after = self._probed() if linear else ()
        mixed_at = clock()
        scores = self.learner.evaluate() if is_evaluated(self._experiment.train, job.round - 1) else NO_SCORES
        return Folded(scores, consensus, mixed_at - begin, clock() - mixed_at, before, after)

    def models_of(self, terms: Sequence[Term]) -> dict[str, Tensor]:
        """Peer → its vector (S,), as this node can read it out of what came. To be asked before it is folded in."""
        return {term.peer: self._model_of(term) for term in terms if term.gain}

    def _model_of(self, term: Term) -> Tensor:
        """The neighbour's model: of a running sum, the mean of those by which it has grown."""
        if self._running is None:
            return term.vector
        reference = self._absorbed.get(term.peer) if term.reference == LAST else None
        return (term.vector if reference is None else term.vector - reference) / term.gain

    def _mix(self, job: Compute, terms: Sequence[Term]) -> Tensor:
        """The mixed (S,), in the memory that is there for it."""
        if job.kept is not None:
            return self._add_differences(job.kept, terms)
        base = self._own if self.codec.name == "none" else self.public
        mixed = self._aggregate(base, terms)
        if self.codec.name != "none":  # what is lost on the way to the others must not be lost here
            mixed = self._mixed.copy_(step(self._own, mixed, base, self._gamma))
        return mixed

    def _aggregate(self, own: Tensor, terms: Sequence[Term]) -> Tensor:
        if self._rule is None:
            fold(own, [(term.peer, term.weight, term.vector) for term in terms], self._name, out=self._mixed)
            return self._mixed
        if not terms:
            return self._mixed.copy_(own)
        weights = torch.tensor([1.0 - sum(term.weight for term in terms), *(term.weight for term in terms)])
        vectors = torch.stack([own, *(term.vector for term in terms)])
        return self._mixed.copy_(self._rule(vectors, weights, self._experiment.mix.tolerate))

    def _add_differences(self, kept: float, terms: Sequence[Term]) -> Tensor:
        """kept * own + sum_j w_j (vector_j - reference_j)."""
        mixed = torch.mul(self._own, kept, out=self._mixed)
        for term in terms:
            reference = None
            if term.reference is not None:
                reference = self._absorbed[term.peer] if term.reference == LAST else dict(self._sent)[term.reference]
            if self._running is not None:
                self._absorbed[term.peer] = term.vector.clone()
            mixed.add_(term.vector if reference is None else term.vector - reference, alpha=term.weight)
        return mixed

    def _absorb(self, mixed: Tensor) -> None:
        vector = self.learner.vector
        if self._is_plain():
            return  # it was mixed where it lies
        mixed_vector = mixed[: vector.numel()] if self._everything else self._scatter(mixed, vector.clone())
        mixed_extra = None
        if self._extra is not None:
            rest = mixed[self.size // 2 :]
            mixed_extra = rest if self._everything else self._scatter(rest, self._extra.clone())
        if self._steps:
            arguments = mixed_vector, self._extra, mixed_extra, self._rate, self._steps
            rules.absorb(self._recipe, self._memory, vector, *arguments)
        else:
            vector.copy_(mixed_vector)

    def _jump(self, job: Compute, terms: Sequence[Term]) -> None:
        """Take others' newest models in place of rounds that were missed: the rule has nothing to learn from that."""
        vector = self.learner.vector
        if job.kept is not None:  # they are running sums
            mixed = self._add_differences(job.kept, terms)
        else:
            mixed = self._aggregate(self._gather(vector, self._second(vector)), terms)
        self._scatter(mixed, vector)

    # -- Where the shared part lies ----------------------------------------------------------------------------------

    def _probed(self) -> tuple[float, ...]:
        """Projections of what is mixed."""
        vector = self.learner.vector
        return self._probe(vector if self._everything else self._gather(vector, None))

    def _gather(self, vector: Tensor, extra: Tensor | None, out: Tensor | None = None) -> Tensor:
        both = (vector,) if extra is None else (vector, extra)
        return torch.cat([whole[run.start : run.end] for whole in both for run in self._runs], out=out)

    def _scatter(self, shared: Tensor, vector: Tensor) -> Tensor:
        start = 0
        for run in self._runs:
            end = start + run.end - run.start
            vector[run.start : run.end].copy_(shared[start:end])
            start = end
        return vector

    # -- State -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that a bit-equal continuation needs, on the CPU, by name."""
        return self.learner.state() | {name: tensor.to("cpu", copy=True) for name, tensor in self._own_state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave; BadInput, and no change at all, if it does not fit."""
        ours = self._own_state()
        for name, tensor in ours.items():
            if name not in state or state[name].shape != tensor.shape:
                raise BadInput(f"the saved state lacks {name!r}, or holds another: it is of another rule or model")
        self.learner.restore({name: tensor for name, tensor in state.items() if name not in ours})
        for name, tensor in ours.items():
            tensor.copy_(state[name])

    def _own_state(self) -> dict[str, Tensor]:
        state = {f"rule.{name}": tensor for name, tensor in self._memory.items() if name != "start"}
        if self.replica is not None:
            state["rule.replica"] = self.replica
        return state


def codec_number(seed: int, name: str, round: int) -> int:
    """The number of which a random codec draws what `name` sends in this round."""
    return torch_seed(seed, "compress", name, round)
