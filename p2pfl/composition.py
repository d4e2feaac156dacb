"""What composes with what: which parts of an experiment contradict each other, why, and the nearest that works.

Each line of RULES is one fact about two or three parts. An experiment that breaks one is refused when it is read: a
rule whose assumptions do not hold would train, and end somewhere else without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CORRECTIONS = ("led", "gradient-tracking", "k-gt")
ROBUST = ("clip", "trimmed-mean", "median", "geometric-median", "krum", "multi-krum")
PLAIN_CODECS = ("none", "fp16", "bf16", "int8")  # of a vector as it is; the others need a replica to be added to
BY_PAIRS = ("metropolis", "lazy", "samples", "inverse", "sqrt", "uniform-neighbours")  # of which a sender knows its own
SUM_KEEPING = ("metropolis", "lazy", "max-degree", "best-constant", "fastest")  # rows and columns of W sum to 1
LEAST_SENDERS = 3  # of a masked sum: of two, the receiver and one of them would have the other's vector
LEAST_OUTER_GAP = 0.1  # spectral gap: below, the outer momentum grows the disagreement faster than mixing removes it


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an experiment that may not fit each other, by the names of the experiment file."""

    graph: str
    varies: bool  # the graph changes from round to round …
    periodic: bool  # … in a fixed sequence
    directed: bool
    heals: bool  # survivors go on with a graph of their own, so that everybody learns who is gone
    weights: str
    by_rows: bool  # they depend on how many rows a node has
    push_sum: bool
    local_steps: int | None  # None: epochs
    optimizer: str
    local_momentum: float
    rule: str
    nnm: bool
    tolerate: int
    radius: float | None
    momentum: str
    correction: str
    leak: float
    two_way: bool
    outer: str
    compress: str
    schedule: str
    staleness: float
    dp: str
    noise: float | None
    epsilon: float | None
    max_epsilon: float | None
    mixings: int
    sums: str

    @property
    def robust(self) -> bool:
        return self.rule != "mean" or self.nnm

    @property
    def corrected(self) -> bool:
        return self.correction != "none"


Fact = tuple[Callable[[Parts], bool], str]  # what must not be, and what is said of it, filled in with the parts

FACTS: tuple[Fact, ...] = (
    # -- corrections: their sum over the network must stay what it was
    (
        lambda p: p.correction == "led" and p.periodic,
        "mix.correction = 'led' diverges on a graph that goes through a fixed sequence of neighbours ({graph}): "
        "use mix.correction = 'k-gt', or a graph that stays as it is",
    ),
    (
        lambda p: p.corrected and p.directed,
        "mix.correction = {correction!r} needs edges that both ends confirm, and those of {graph} go one way: "
        "use topology.graph = 'exponential', or mix.correction = 'none'",
    ),
    (
        lambda p: p.corrected and p.weights not in (*SUM_KEEPING, "given"),
        "mix.correction = {correction!r} needs weights that keep the mean, and {weights!r} do not: "
        "use topology.weights = 'lazy'",
    ),
    (
        lambda p: p.correction == "led" and not p.varies and p.weights not in ("lazy", "given"),
        "mix.correction = 'led' diverges where the mixing matrix has an eigenvalue below -1/3, as that of "
        "{weights!r} may: use topology.weights = 'lazy'",
    ),
    (
        lambda p: p.corrected and p.robust,
        "mix.correction = {correction!r} needs the exact mean, which mix.rule = {rule!r} is not: "
        "use mix.correction = 'none' with momentum = 'quasi-global'",
    ),
    (
        lambda p: p.corrected and (p.schedule != "sync" or p.staleness > 0),
        "mix.correction = {correction!r} needs the vectors of one round from both ends of an edge: "
        "use mix.schedule = 'sync' and network.staleness = 0",
    ),
    (
        lambda p: p.corrected and p.compress not in ("none", "fp16", "bf16"),
        "mix.correction = {correction!r} with mix.compress = {compress!r} is not known to converge: "
        "use mix.compress = 'bf16', or mix.correction = 'none'",
    ),
    (
        lambda p: p.corrected and (p.optimizer != "sgd" or p.local_momentum > 0),
        "mix.correction = {correction!r} corrects the steps of plain sgd: "
        "set train.optimizer = 'sgd' and train.momentum = 0",
    ),
    (
        lambda p: p.corrected and p.momentum != "none",
        "mix.correction = {correction!r} and mix.momentum = {momentum!r} both account for where the others went: "
        "use one of them",
    ),
    (
        lambda p: p.corrected and not p.two_way,
        "mix.correction = {correction!r} needs edges that both ends confirm: remove mix.two_way = false",
    ),
    (
        lambda p: p.correction == "gradient-tracking" and p.local_steps != 1,
        "mix.correction = 'gradient-tracking' takes one step a round: set train.local_steps = 1, "
        "or mix.correction = 'k-gt' for more",
    ),
    (
        lambda p: p.corrected and not p.heals and p.leak == 0,
        "mix.correction = {correction!r} starts again when a member dies, of which not everybody learns here: "
        "give a topology.graph with heal = true, or let the correction fade with mix.leak = 0.01",
    ),
    (
        lambda p: p.leak > 0 and not p.corrected,
        "mix.leak lets a correction fade, and there is none: set mix.correction, or remove it",
    ),
    # -- momentum of the network
    (
        lambda p: p.momentum != "none" and (p.optimizer != "sgd" or p.local_momentum > 0),
        "mix.momentum = {momentum!r} takes the place of the optimizer's own: set train.optimizer = 'sgd' and "
        "train.momentum = 0, or mix.momentum = 'none'",
    ),
    (
        lambda p: p.momentum != "none" and p.push_sum,
        "mix.momentum = {momentum!r} does not hold where push-sum divides by a mass: set mix.momentum = 'none'",
    ),
    # -- outer optimizer
    (
        lambda p: p.outer != "none" and (p.momentum != "none" or p.corrected),
        "mix.outer = {outer!r} would count the drift a second time beside momentum = {momentum!r} and correction = "
        "{correction!r}: set both to 'none'",
    ),
    (
        lambda p: p.outer != "none" and (p.push_sum or p.schedule != "sync" or p.robust),
        "mix.outer = {outer!r} needs the weighted mean of one round: use mix.rule = 'mean' and mix.schedule = 'sync' "
        "without push-sum",
    ),
    (
        lambda p: p.outer != "none" and p.compress not in PLAIN_CODECS,
        "mix.outer = {outer!r} sends where the round began as well, which mix.compress = {compress!r} would blur: "
        "use 'int8'",
    ),
    # -- rules that bear bad members
    (
        lambda p: p.robust and (p.push_sum or p.schedule == "push-sum"),
        "mix.rule = {rule!r} leaves vectors away, and with them the mass of push-sum: "
        "use a graph with edges both ways and topology.weights = 'metropolis'",
    ),
    (
        lambda p: p.robust and p.schedule in ("pairwise", "gossip"),
        "mix.rule = {rule!r} compares several vectors, and mix.schedule = {schedule!r} brings one at a time: "
        "use mix.schedule = 'sync', with network.staleness = 'inf' if nobody is to be waited for",
    ),
    (
        lambda p: p.rule in ("trimmed-mean", "krum", "multi-krum") and p.tolerate == 0,
        "mix.rule = {rule!r} with mix.tolerate = 0 bears no bad neighbour: set mix.tolerate to how many there may be",
    ),
    (
        lambda p: p.rule == "clip" and p.tolerate == 0 and p.radius is None,
        "mix.rule = 'clip' clips nothing without mix.tolerate or mix.radius: set one of them",
    ),
    (
        lambda p: p.nnm and p.tolerate == 0,
        "mix.nnm leaves the mix.tolerate farthest vectors away, and that is 0: set mix.tolerate",
    ),
    (
        lambda p: p.tolerate > 0 and not p.robust,
        "mix.rule = 'mean' bears no bad neighbour at all: use mix.rule = 'trimmed-mean' with mix.nnm = true, "
        "or mix.tolerate = 0",
    ),
    (
        lambda p: p.radius is not None and p.rule != "clip",
        "mix.radius belongs to mix.rule = 'clip', and the rule is {rule!r}: remove it",
    ),
    (
        lambda p: p.robust and p.by_rows,
        "mix.rule = {rule!r} cannot tell who has many rows from who says so: use topology.weights = 'metropolis'",
    ),
    # -- compression
    (
        lambda p: p.compress not in PLAIN_CODECS and p.varies,
        "mix.compress = {compress!r} sends what has changed for the same neighbours, and {graph} changes them: "
        "use mix.compress = 'int8'",
    ),
    (
        lambda p: p.compress != "none" and p.push_sum,
        "mix.compress = {compress!r} would lose a part of push-sum's mass in every round: use mix.compress = 'none'",
    ),
    (
        lambda p: p.compress not in PLAIN_CODECS and p.schedule != "sync",
        "mix.compress = {compress!r} needs every update in its order, and mix.schedule = {schedule!r} sends some to "
        "one neighbour and some to another: use mix.compress = 'int8'",
    ),
    # -- schedules
    (
        lambda p: p.schedule != "sync" and p.varies,
        "mix.schedule = {schedule!r} chooses whom to send to by itself, and so does {graph}: "
        "use a graph that stays as it is",
    ),
    (
        lambda p: p.schedule in ("pairwise", "gossip") and p.weights != "metropolis",
        "mix.schedule = {schedule!r} has weights of its own: remove topology.weights = {weights!r}",
    ),
    (
        lambda p: p.schedule in ("pairwise", "gossip") and p.directed,
        "mix.schedule = {schedule!r} needs edges both ways, and those of {graph} go one way: "
        "use mix.schedule = 'push-sum'",
    ),
    (
        lambda p: p.schedule == "push-sum" and not p.push_sum,
        "mix.schedule = 'push-sum' goes with topology.weights = 'push-sum' or 'push-sum-samples', not {weights!r}: "
        "set one of these",
    ),
    # -- differential privacy
    (
        lambda p: p.dp != "none" and (p.noise is None) == (p.epsilon is None),
        "privacy.dp = {dp!r} needs to know how much noise: set one of privacy.noise and privacy.epsilon",
    ),
    (
        lambda p: p.dp == "none" and (p.noise, p.epsilon, p.max_epsilon) != (None, None, None),
        "privacy.noise, epsilon and max_epsilon belong to privacy.dp: set it to 'example' or 'update', or remove them",
    ),
    (
        lambda p: p.dp == "update" and p.correction == "gradient-tracking",
        "mix.correction = 'gradient-tracking' sends gradients beside the parameters, which privacy.dp = 'update' does "
        "not cover: use mix.correction = 'k-gt', or privacy.dp = 'example'",
    ),
    (
        lambda p: p.mixings > 1 and p.dp != "update",
        "privacy.mixings spreads the noise of privacy.dp = 'update', and dp is {dp!r}: set dp = 'update', "
        "or privacy.mixings = 1",
    ),
    (
        lambda p: p.mixings > 1 and (p.correction != "none" or p.momentum != "none" or p.outer != "none"),
        "privacy.mixings = {mixings} mixes without training, which no correction, momentum or outer optimizer expects: "
        "set mix.correction, mix.momentum and mix.outer to 'none'",
    ),
    (
        lambda p: (
            p.mixings > 1
            and (p.varies or p.directed or p.robust or p.schedule != "sync" or p.weights not in SUM_KEEPING)
        ),
        "privacy.mixings = {mixings} counts on plain averaging with weights that keep the mean, on a graph that stays "
        "as it is: use topology.weights = 'metropolis', mix.rule = 'mean' and mix.schedule = 'sync'",
    ),
    # -- sums of neighbours
    (
        lambda p: p.sums != "none" and p.robust,
        "privacy.sums = {sums!r} hides each single vector, and mix.rule = {rule!r} must see them: "
        "use mix.rule = 'mean', or privacy.sums = 'none'",
    ),
    (
        lambda p: p.sums != "none" and p.compress != "none",
        "privacy.sums = {sums!r} adds whole vectors, and mix.compress = {compress!r} sends other ones: "
        "use mix.compress = 'none'",
    ),
    (
        lambda p: p.sums != "none" and (p.schedule != "sync" or p.staleness > 0),
        "privacy.sums = {sums!r} needs the vectors of one round: use mix.schedule = 'sync' and network.staleness = 0",
    ),
    (
        lambda p: p.sums != "none" and (p.varies or p.directed),
        "privacy.sums = {sums!r} needs the same neighbours in every round, both ways, and {graph} has not: "
        "use topology.graph = 'random-regular'",
    ),
    (
        lambda p: p.sums != "none" and p.weights not in BY_PAIRS,
        "privacy.sums = {sums!r} leaves the weighing to the sender, which cannot know {weights!r}: "
        "use topology.weights = 'metropolis'",
    ),
    (
        lambda p: p.sums != "none" and (p.corrected or p.two_way),
        "privacy.sums = {sums!r} gives a round up where a sender is lost, which mix.correction and mix.two_way do not "
        "bear: set mix.correction = 'none', with momentum = 'quasi-global', and remove mix.two_way",
    ),
)


def contradiction(parts: Parts) -> str | None:
    """What is wrong with this composition and what to do instead, in one line; None if it can hold."""
    words = {name: getattr(parts, name) for name in Parts.__dataclass_fields__}
    return next((text.format(**words) for broken, text in FACTS if broken(parts)), None)


def too_few_neighbours(rule: str, tolerate: int, degree: int, node: str) -> str | None:
    """What is wrong if a robust rule with this many neighbours cannot tell bad vectors from good ones, or None."""
    least = least_degree(rule, tolerate)
    if degree >= least:
        return None
    return (
        f"mix.rule = {rule!r} with mix.tolerate = {tolerate} needs {least} neighbours, and {node} has {degree}: take "
        f"a graph of higher degree, like topology.graph = 'random-regular' with topology.degree = {least + least % 2}"
        ", or a smaller mix.tolerate"
    )


def least_degree(rule: str, tolerate: int) -> int:
    """Neighbours that each node needs: 2b + 2, so that the good ones outnumber b bad ones with one to spare.

    Clipping bounds what each may do, however few there are: more than b.
    """
    return tolerate + 1 if rule in ("clip", "mean") else 2 * tolerate + 2
