"""Attack a run with what its neighbours saw: was this row trained on, and what is in the row?

    membership    for each sender, from the newest of its vectors that a neighbour kept (`privacy.keep_seen`), in two
                  ways: `loss`, a model is surer of the rows that it learnt (Yeom et al. 2018); `shadow`, surer than
                  models that did not learn the row (Shokri et al. 2017; the offline attack of Carlini et al. 2022)
    inversion     the smallest case: one row, one step, a known start. Where the first layer is linear, what such a
                  step does to the model is the row itself (Phong et al. 2017)

The attacker is a strong one, so that the figures are a warning in time: it has the rows with their answers, in the
units of the sender, and knows of one half of them whether they were learnt; it is judged by what it says of the other
half. Everything is drawn from the experiment's seed, and the run folder is only read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from scipy.special import betaincinv  # type: ignore[import-untyped]
from torch import Tensor, nn

from p2pfl.config import Experiment, MixSection, PrivacySection, load
from p2pfl.data import Dataset, Part, load_parts
from p2pfl.disclosure import advantage as implied_bound
from p2pfl.learner import EVALUATION_ROWS, TorchLearner, count_steps, make_learner, split_vector
from p2pfl.ledger import Charge, Ledger, simulated_ledger
from p2pfl.masks import fixed, read_sum
from p2pfl.messages import BadInput, Compute
from p2pfl.private import Privacy
from p2pfl.records import Line, Run, inside, number, words
from p2pfl.rng import stream
from p2pfl.runtime import SUM
from p2pfl.swarm import flat_vector
from p2pfl.trainer import Trainer, is_personal, runs_of, trains_in

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

CONFIDENCE = 0.975  # of every interval, so that those of the two attacks hold together with 0.95
RESAMPLES = 1000  # of a bootstrap: leaves the ends of an interval uncertain by a tenth of its width
SHADOWS = 16  # models for each sender: eight that did not learn a row give the mean over them to a third of its spread
LEAST_ROWS = 8  # of each kind, below which an attack on one sender says nothing
MOST_ROWS = 1000  # of each kind, which bounds time and memory, and an advantage to 0.05
ROC_POINTS = 101  # one for each percent of false alarms
ROWS_INVERTED = 16
LEAST_MOVED = 0.01  # of what the bias of a unit has changed, relative to the largest: below, it is rounding
NEARLY_NOTHING = 1e-12  # a length that is divided by is at least that
RECOVERED = 0.2  # relative error below which a row counts as read: a digit is plain to see


# -- How good an attack is -------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A number, and an interval that holds the true one with CONFIDENCE."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Trial:
    """What an attack says of the rows of one sender: the higher the score, the likelier the row was learnt."""

    members: Floats  # (m,), of rows that were
    others: Floats  # (n,), of rows that were not
    rows: Indices  # (n,): which ones; equal numbers in two trials are one row, held against two senders

    @cached_property
    def wins(self) -> Floats:
        """(m, n): 1 where the member scores higher, ½ where both score alike."""
        differences = self.members[:, None] - self.others
        return np.heaviside(differences, 0.5)


def auc(trials: Sequence[Trial], random: np.random.Generator) -> Estimate:
    """How often a row that was learnt scores higher than one that was not: ½ is guessing, 1 is knowing.

    Over all pairs of one sender (Mann and Whitney 1947), pooled over the trials. The interval is the percentile
    bootstrap over rows; a row that is held against several senders is drawn for all of them at once.
    """
    held_out = 1 + max(int(trial.rows.max()) for trial in trials)
    drawn = random.multinomial(held_out, np.full(held_out, 1 / held_out), RESAMPLES).astype(float)
    won, pairs = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for trial in trials:
        m = len(trial.members)
        times = random.multinomial(m, np.full(m, 1 / m), RESAMPLES).astype(float)
        against = drawn[:, trial.rows]
        won += ((times @ trial.wins) * against).sum(axis=1)
        pairs += m * against.sum(axis=1)
    value = sum(trial.wins.sum() for trial in trials) / sum(trial.wins.size for trial in trials)
    low, high = np.quantile(won[pairs > 0] / pairs[pairs > 0], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(value), float(low), float(high))


def advantage(trials: Sequence[Trial], random: np.random.Generator) -> Estimate:
    """The share of members that are recognised less that of others who are taken for members: 0 is guessing.

    The rows of a trial are cut into halves, and each half is judged by the threshold that is best for the other one;
    the best threshold for the same rows would find an advantage in noise. The interval is exact for two binomials
    (Clopper and Pearson 1934, each with half of the risk); a row that is held against several senders counts once.
    """
    recognised, mistaken, rows = [], [], []
    for trial in trials:
        for half in (0, 1):
            ours, theirs = (_alternating(len(scores), random) == half for scores in (trial.members, trial.others))
            threshold = best_threshold(trial.members[~ours], trial.others[~theirs])
            recognised.append(trial.members[ours] >= threshold)
            mistaken.append(trial.others[theirs] >= threshold)
            rows.append(trial.rows[theirs])
    hits, alarms = np.concatenate(recognised), np.concatenate(mistaken)
    often = np.bincount(np.concatenate(rows))
    found = proportion(float(hits.mean()), len(hits))
    wrong = proportion(float(alarms.mean()), float(often.sum() ** 2 / (often**2).sum()))
    return Estimate(found.value - wrong.value, found.low - wrong.high, found.high - wrong.low)


def _alternating(count: int, random: np.random.Generator) -> Indices:
    """0 for one half of so many, 1 for the other, at random."""
    return random.permutation(count) % 2


def best_threshold(members: Floats, others: Floats) -> float:
    """The t for which `score >= t` holds for more of the members and fewer of the others than any other t.

    Half way between two scores. Infinite, so that nobody is taken for a member, where no t gains anything.
    """
    places = np.unique(np.concatenate([members, others]))
    gains = _share_from(members, places) - _share_from(others, places)
    best = int(np.argmax(gains))
    if best == 0 or gains[best] <= 0:  # everybody, or worse than nobody
        return math.inf
    return float(places[best - 1] + places[best]) / 2


def _share_from(scores: Floats, places: Floats) -> Floats:
    """The share of the scores that reach each of these places."""
    return 1 - np.searchsorted(np.sort(scores), places, side="left") / len(scores)


def proportion(share: float, trials: float) -> Estimate:
    """A share of so many trials, with the exact interval of half the risk, so that two of them hold together.

    Clopper and Pearson (1934), by quantiles of the beta distribution; also for a number of trials that is not whole.
    """
    hits, risk = share * trials, (1 - CONFIDENCE) / 4
    low = float(betaincinv(hits, trials - hits + 1, risk)) if share > 0 else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - risk)) if share < 1 else 1.0
    return Estimate(share, low, high)


def roc(trials: Sequence[Trial]) -> list[float]:
    """The share of members recognised where 0, 1 … 100 % of the others are taken for members.

    The mean over the trials, each by its own thresholds, weighted by its members.
    """
    shares = np.zeros(ROC_POINTS)
    for trial in trials:
        falling = np.append(-np.sort(-trial.others), -np.inf)
        allowed = np.floor(np.linspace(0, 1, ROC_POINTS) * len(trial.others) + 1e-9).astype(int)  # 0.29·100 is 28.99…
        shares += (trial.members[:, None] > falling[allowed]).sum(axis=0)
    return [float(share) for share in shares / sum(len(trial.members) for trial in trials)]


# -- What an attack looks at -----------------------------------------------------------------------------------------


@torch.no_grad()
def sureness(learner: TorchLearner, rows: Dataset) -> Floats:
    """How sure the model is of each row's answer, (rows,): log p / (1 − p), where p is what it gives the true class.

    It falls as the loss −log p rises, so that one threshold on either is one on the other, and is nearly Gaussian
    where p is not (Carlini et al. 2022). In a regression: minus the squared error.
    """
    learner.module.eval()
    pieces = torch.split(rows.inputs, EVALUATION_ROWS)
    outputs = torch.cat([learner.module(piece) for piece in pieces]).double()
    if not rows.classes:
        return np.asarray(-((outputs.reshape(rows.targets.shape) - rows.targets) ** 2))
    answers = rows.targets[:, None]
    true = outputs.gather(1, answers)[:, 0]
    false = outputs.scatter(1, answers, -math.inf).logsumexp(dim=1)
    return np.asarray(true - false)


def surprise(seen: Floats, shadows: Floats, learnt: Flags) -> Floats:
    """By how much the model that was seen is surer of each row than models that did not learn it, (rows,).

    seen: (rows,), of the model under attack; shadows: (models, rows), of the others; learnt: (models, rows), which
    rows each of these learnt. Every row was left out at least once. (φ − µ) / σ with µ the mean for the row and one σ
    for all rows, as for few models in Carlini et al. (2022).
    """
    without = np.where(learnt, np.nan, shadows)
    usual = np.nanmean(without, axis=0)
    spread = math.sqrt(np.nanmean((without - usual) ** 2))
    return np.asarray((seen - usual) / (spread or 1.0))


def halves(rows: int, count: int, random: np.random.Generator) -> Iterator[Flags]:
    """So many random halves of the rows, (rows,) each: every second one is the rest of the one before it."""
    half = np.zeros(rows, bool)
    for index in range(count):
        half = ~half if index % 2 else random.permutation(rows) < rows // 2
        yield half


def matched(members: Indices, others: Indices, random: np.random.Generator) -> tuple[Indices, Indices]:
    """Positions of as many members as others of each class, at random, sorted, at most about MOST_ROWS of each.

    `members` and `others` are class numbers. Where a node has other classes than the held-out rows, what tells them
    apart would be their class, and not that they were learnt.
    """
    counts = {label: min(np.sum(members == label), np.sum(others == label)) for label in np.unique(members)}
    part = min(1.0, MOST_ROWS / max(1, sum(counts.values())))
    chosen: tuple[list[Indices], list[Indices]] = ([], [])
    for label, count in counts.items():
        for kept, labels in zip(chosen, (members, others), strict=True):
            kept.append(random.permutation(np.flatnonzero(labels == label))[: math.ceil(part * count)])
    first, second = (np.sort(np.concatenate(kept)) for kept in chosen)
    return first, second


def train_alone(experiment: Experiment, train: Dataset, name: str, rounds: int) -> TorchLearner:
    """A node of this experiment that has had these rows, and nobody to average with, for so many rounds.

    The experiment says how much noise there is, if any; see `settled`.
    """
    one = _rows(train, np.zeros(1, np.int64))  # it is evaluated, and nobody looks at that
    alone = MixSection(momentum=experiment.momentum, beta=experiment.mix.beta)
    trainer = _trainer(experiment.model_copy(update={"mix": alone}), Part(train, one), name)
    for round in range(rounds):
        job = Compute(round, (), mass=1.0, reach=1.0, train=True)
        if round > 0:
            trainer.fold(job, (), _no_time)
        trainer.train(job, _no_time)
    return trainer.learner


class Unpaid(Ledger):
    """Of models that are made for an audit and given to nobody: nothing of what they learn leaves, or is charged."""

    def holds(self, charge: Charge) -> bool:
        """Whether it was charged before, and so need not be again."""
        return True


def settled(experiment: Experiment, rows: int) -> Experiment:
    """The experiment with the noise that a node of so many rows adds, in place of the ε that it follows from."""
    section, train = experiment.privacy, experiment.train
    if section.dp == "none":
        return experiment
    rounds = sum(trains_in(experiment, round) for round in range(train.rounds))
    steps, ledger = count_steps(rows, train), Unpaid(bytes(32))  # of which nothing is drawn
    noise = Privacy(section, rows=rows, batch_size=train.batch_size, steps=steps, rounds=rounds, ledger=ledger)
    fixed = {"noise": noise.mechanism.sigma, "epsilon": None, "max_epsilon": None}
    return experiment.model_copy(update={"privacy": section.model_copy(update=fixed)})


def _trainer(experiment: Experiment, part: Part, name: str) -> Trainer:
    ledger = Unpaid(simulated_ledger(experiment.seed, name).secret)
    return Trainer(make_learner(experiment, part, name), experiment, name, varies=False, ledger=ledger)


def _no_time() -> float:
    return 0.0


def _rows(data: Dataset, rows: Indices) -> Dataset:
    chosen = torch.from_numpy(rows)
    return Dataset(data.inputs[chosen], data.targets[chosen], data.classes)


def _joined(first: Dataset, second: Dataset) -> Dataset:
    inputs, targets = torch.cat([first.inputs, second.inputs]), torch.cat([first.targets, second.targets])
    return Dataset(inputs, targets, first.classes)


# -- Membership ------------------------------------------------------------------------------------------------------


def membership(
    experiment: Experiment, learner: TorchLearner, part: Part, name: str, rounds: int, shadows: int, first: int = 0
) -> tuple[Trial, Trial] | None:
    """The attacks by loss and by shadow models on the model that `learner` holds; None if there are too few rows.

    part: rows that `name` trained on for so many rounds, and rows that nobody did, the numbers of which begin with
    `first`. shadows: how many models are trained for comparison, 2 or more.
    """
    random = stream(experiment.seed, "audit", name)
    ours, theirs = matched(_classes(part.train), _classes(part.test), random)
    if len(ours) < LEAST_ROWS:
        return None
    rows = _joined(_rows(part.train, ours), _rows(part.test, theirs))
    seen = sureness(learner, rows)
    learnt = np.stack(list(halves(len(rows), shadows, random)))
    scores = []
    for index, half in enumerate(learnt):
        shadow = train_alone(experiment, _rows(rows, np.flatnonzero(half)), f"{name} shadow {index}", rounds)
        scores.append(sureness(shadow, rows))
    surprised = surprise(seen, np.stack(scores), learnt)
    by_loss, by_shadow = (Trial(s[: len(ours)], s[len(ours) :], first + theirs) for s in (seen, surprised))
    return by_loss, by_shadow


def _classes(rows: Dataset) -> Indices:
    """The class numbers; 0 for all in a regression."""
    return np.asarray(rows.targets) if rows.classes else np.zeros(len(rows), np.int64)


# -- Inversion -------------------------------------------------------------------------------------------------------


def first_linear(module: nn.Module, width: int) -> str | None:
    """The name of the layer that sees the row of so many numbers first, if it is linear with a bias; or None."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            return name if layer.bias is not None and layer.in_features == width else None
        if next(layer.parameters(recurse=False), None) is not None:
            return None
    return None


def read_rows(weight: Tensor, bias: Tensor) -> Tensor:
    """What may be a row in the change of a linear layer, float64 (candidates, inputs).

    weight: (units, inputs) and bias: (units,), by how much they changed. Of one row x alone it is ∂L/∂w_k = ∂L/∂b_k · x
    in each unit k (Phong et al. 2017). First comes what fits all units best, Σ_k b_k w_k / Σ_k b_k², and then w_k / b_k
    of each unit: of several rows, a unit behind a ReLU that only one of them has passed holds that one alone, and all
    such units agree on it. Zeros where nothing changed.
    """
    weight, bias = weight.double(), bias.double()
    if not bias.any():
        return torch.zeros_like(weight[:1])
    moved = bias.abs() > LEAST_MOVED * bias.abs().max()
    fit = (bias @ weight) / (bias @ bias)
    return torch.cat([fit[None], weight[moved] / bias[moved][:, None]])


class Reading(NamedTuple):
    """How near rows are to those that were read out of an update: of each, the median over the rows."""

    error: float  # ‖read − row‖ / ‖row‖
    correlation: float
    recovered: float  # the share of rows with an error below RECOVERED


@dataclass(frozen=True, eq=False)
class Step:
    """What one node has sent after one step on one row."""

    row: Tensor  # (inputs,)
    start: Tensor  # (P,): its model before
    sent: Tensor  # (P,)


def inversion(experiment: Experiment, parts: Mapping[str, Part], senders: int) -> Reading | None:
    """Read rows out of what nodes send after one step on one row each; None where the first layer is not linear.

    `senders`: whose vectors come as a masked sum only, in which the row of any of them is looked for. Everything else
    is as in the experiment: what noise it adds, and how vectors are compressed. The step is one of plain gradient
    descent, the easiest for the attacker, and of all that it may take for a row the nearest counts.
    """
    step = {"local_epochs": None, "local_steps": 1, "batch_size": 1, "optimizer": "sgd", "momentum": 0.0, "rounds": 1}
    tiny = experiment.model_copy(update={"train": experiment.train.model_copy(update={**step, "weight_decay": 0.0})})
    names, random = list(parts), stream(experiment.seed, "audit", "inversion")
    privacy = {name: settled(experiment, len(part.train)).privacy for name, part in parts.items()}
    learner = make_learner(tiny, parts[names[0]], names[0])
    layer = first_linear(learner.module, parts[names[0]].train.inputs[0].numel())
    if layer is None:
        return None
    found: list[tuple[float, float]] = []  # (error, correlation)
    for index in range(ROWS_INVERTED):
        steps = []
        for name in (names[(index + place) % len(names)] for place in range(senders)):
            noised = tiny.model_copy(update={"privacy": privacy[name]})
            steps.append(_one_step(noised, parts[name].train, f"{name} row {index}", random))
        sent = steps[0].sent if senders == 1 else _masked_mean([step.sent for step in steps])
        change = sent.double() - torch.stack([step.start.double() for step in steps]).mean(dim=0)
        changed = split_vector(change, learner.schema)
        weight, bias = (changed[f"{layer}.{part}" if layer else part] for part in ("weight", "bias"))
        found.append(min(_nearness(guess, step.row) for guess in read_rows(weight, bias) for step in steps))
    errors, correlations = zip(*found, strict=True)
    recovered = sum(error < RECOVERED for error in errors) / len(found)
    return Reading(float(np.median(errors)), float(np.median(correlations)), recovered)


def _one_step(experiment: Experiment, rows: Dataset, name: str, random: np.random.Generator) -> Step:
    row = _rows(rows, random.integers(len(rows), size=1))
    trainer = _trainer(experiment, Part(row, row), name)
    start = trainer.learner.vector.clone()
    trainer.train(Compute(0, (), mass=1.0, reach=1.0, train=True, portion=1.0), _no_time)
    return Step(row.inputs.flatten(), start, read_into(experiment, trainer.learner, trainer.public, start))


def _masked_mean(vectors: Sequence[Tensor]) -> Tensor:
    """What a receiver reads out of the masked sum of these (P,), all of one weight."""
    return torch.from_numpy(read_sum([fixed(vector.numpy(), 1.0) for vector in vectors], float(len(vectors))))


def _nearness(guess: Tensor, row: Tensor) -> tuple[float, float]:
    """(relative error, correlation) of what was read (inputs,) beside what is there."""
    row = row.double()
    error = (guess - row).norm() / row.norm().clamp(min=NEARLY_NOTHING)
    return error.item(), correlation(guess, row)


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, of two vectors (P,); 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    lengths = (first.norm() * second.norm()).item()
    return (first @ second).item() / lengths if lengths else 0.0


def read_into(experiment: Experiment, learner: TorchLearner, sent: Tensor, rest: Tensor) -> Tensor:
    """A whole model (P,): what was sent of it, and of what is never sent the values of `rest` (P,)."""
    model, start = rest.clone(), 0
    for run in runs_of(experiment, learner):
        end = start + run.end - run.start
        model[run.start : run.end] = sent[start:end]
        start = end
    return model


# -- A run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sight:
    """What a neighbour has of a sender."""

    sender: str
    attacker: str
    round: int
    senders: int  # of whose vectors it has the mean only; 1: it has the sender's own
    schema: str
    vector: Tensor  # float32 (S,)


def audit(run: Run, shadows: int = SHADOWS) -> Line:
    """Attack every sender of this run; what was found, as RUN/audit.json keeps it.

    BadInput in one line if the run has not kept what its neighbours saw, or if the rows of the senders are not here.
    """
    torch.set_num_threads(1)  # sums in one order; and small models are slower on more
    experiment = _here(load(run.experiment))
    sights = sights_of(run, experiment)
    parts = _parts(run, experiment, sights)
    tries: dict[str, tuple[Trial, Trial]] = {}
    first = 0
    for sight in sights:
        part = parts[sight.sender]
        learner = _seen_model(run, experiment, sight, part)
        alike = settled(experiment, len(part.train))
        found = membership(alike, learner, part, sight.sender, sight.round + 1, shadows, first)
        first += 0 if experiment.data.test == "common" else len(part.test)
        if found is not None:
            tries[sight.sender] = found
    if not tries:
        raise BadInput(f"{run.path}: no sender has {LEAST_ROWS} rows to attack: use more rows, or fewer nodes")
    senders = {sight.sender: _about(run, sight) for sight in sights if sight.sender in tries}
    bounds = [number(about, "bound") for about in senders.values()]
    known = [bound for bound in bounds if bound is not None]
    return {
        "shadows": shadows,
        "confidence": CONFIDENCE,
        "dp": experiment.privacy.dp,
        "sums": experiment.privacy.sums,
        "senders": senders,
        "too_few_rows": [sight.sender for sight in sights if sight.sender not in tries],
        "bound": max(known) if len(known) == len(bounds) else None,
        "membership": {
            attack: _attacked({name: found[index] for name, found in tries.items()}, experiment.seed)
            for index, attack in enumerate(("loss", "shadow"))
        },
        "inversion": _inverted(experiment, parts, min(sight.senders for sight in sights)),
    }


def _parts(run: Run, experiment: Experiment, sights: Sequence[Sight]) -> dict[str, Part]:
    """The rows of every node, as they were shared out; BadInput if a sender has others."""
    names = experiment.topology.names
    if strangers := sorted({sight.sender for sight in sights} - set(names)):
        raise BadInput(
            f"{run.path} does not say which rows {strangers[0]} has, so nobody can check what is guessed of them: "
            "audit a run of `p2pfl simulate` or `p2pfl up`"
        )
    return dict(zip(names, load_parts(experiment), strict=True))


def _seen_model(run: Run, experiment: Experiment, sight: Sight, part: Part) -> TorchLearner:
    """The sender's model as the attacker has it; what is not shared of it is the attacker's own."""
    learner = make_learner(experiment, part, sight.sender)
    if sight.schema != learner.schema.digest.hex():
        raise BadInput(f"{run.node(sight.attacker).seen} is of another model: run the experiment again")
    rest, model = learner.vector, run.node(sight.attacker).model
    if is_personal(experiment, learner) and model.is_file():
        rest = flat_vector(load_file(model), learner.schema)
    learner.vector.copy_(read_into(experiment, learner, sight.vector, rest))
    return learner


def _here(experiment: Experiment) -> Experiment:
    """The experiment as it is re-enacted here: without faults, on the processor."""
    train = experiment.train.model_copy(update={"device": "cpu"})
    return experiment.model_copy(update={"train": train, "faults": ()})


def sights_of(run: Run, experiment: Experiment) -> list[Sight]:
    """The best sight that any neighbour has of each sender, by name: alone or in the smallest sum, then the newest.

    BadInput if nothing was kept, or if it cannot be read.
    """
    best: dict[str, Sight] = {}
    for attacker in run.nodes():
        for sight in _seen_by(run, experiment, attacker):
            other = best.get(sight.sender)
            if other is None or (sight.senders, -sight.round) < (other.senders, -other.round):
                best[sight.sender] = sight
    if not best:
        raise BadInput(
            f"{run.path} has not kept what neighbours saw: run it again with "
            f"`p2pfl simulate {run.experiment} --set privacy.keep_seen=true`, and audit that run"
        )
    return [best[name] for name in sorted(best)]


def _seen_by(run: Run, experiment: Experiment, attacker: str) -> Iterator[Sight]:
    path = run.node(attacker).seen
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        round, schema = int(about["round"]), about["schema"]
    except (SafetensorError, OSError, KeyError, ValueError):
        raise BadInput(f"{path} cannot be read: run the experiment again with privacy.keep_seen = true") from None
    if experiment.privacy.sums == "none":
        for sender, vector in vectors.items():
            yield Sight(sender, attacker, round, 1, schema, vector)
    elif SUM in vectors:
        lines = [line for line in run.node(attacker).read_metrics() if number(line, "round") == round]
        senders = words(lines[-1], "merged") if lines else []
        for sender in senders:
            yield Sight(sender, attacker, round, len(senders), schema, vectors[SUM])


def _about(run: Run, sight: Sight) -> Line:
    """What there is to know of the vector that was attacked. ε and δ are those of one row, or null."""
    epsilon, delta = None, None
    for line in run.node(sight.sender).read_metrics():
        if number(line, "round") == sight.round and inside(line, "epsilon", "unit") == "example":
            epsilon, delta = number(line, "epsilon", "spent"), number(line, "epsilon", "delta")
    return {
        "seen_by": sight.attacker,
        "round": sight.round,
        "in_a_sum_of": sight.senders,
        "epsilon": epsilon,
        "delta": delta,
        "bound": None if epsilon is None or delta is None else implied_bound(epsilon, delta),
    }


def _attacked(trials: Mapping[str, Trial], seed: int) -> Line:
    """How an attack did, over all senders and on each."""
    random = stream(seed, "audit", "intervals")
    each = {name: _measured([trial], random) for name, trial in trials.items()}
    return {"pooled": _measured(list(trials.values()), random), "senders": each}


def _measured(trials: Sequence[Trial], random: np.random.Generator) -> Line:
    area, gain = auc(trials, random), advantage(trials, random)
    return {
        "members": sum(len(trial.members) for trial in trials),
        "others": sum(len(trial.others) for trial in trials),
        "auc": area.value,
        "auc_interval": [area.low, area.high],
        "advantage": gain.value,
        "advantage_interval": [gain.low, gain.high],
        "roc": roc(trials),
    }


def _inverted(experiment: Experiment, parts: Mapping[str, Part], senders: int) -> Line | None:
    """What can be read out of one step: without any protection, and as this experiment sends it, in sums of so many."""
    bare = experiment.model_copy(update={"privacy": PrivacySection()})
    plain, own = inversion(bare, parts, 1), inversion(experiment, parts, senders)
    if plain is None or own is None:
        return None
    found = {"unprotected": dict(plain._asdict()), "as_run": dict(own._asdict())}
    return {"rows": ROWS_INVERTED, "senders": senders, **found}
