"""What to use in an experiment, and why: five lines, from its rows, its labels and its graph.

`facts_of` looks, `advise` concludes. Each line gives settings as `--set` takes them, none where all is well already.
Alone and together they give an experiment that can run: what does not compose is never proposed, since every proposal
is tried on the experiment itself. The thresholds are those of the papers, and of what was measured on digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median

import torch

from p2pfl.composition import LEAST_OUTER_GAP, least_degree
from p2pfl.config import BY_ROWS, PUSH_SUM, Experiment, Toml, flatten
from p2pfl.data import Dataset, load_parts
from p2pfl.learner import count_steps, make_learner
from p2pfl.messages import BadInput
from p2pfl.records import Line
from p2pfl.topology import Topology, build
from p2pfl.topology.fit import check_graph, least_heard
from p2pfl.topology.implied import BYTES_OF_A_PARAMETER, implied
from p2pfl.topology.matrix import check_weights
from p2pfl.weights import mass

ENOUGH_GAP = LEAST_OUTER_GAP  # random graphs of four neighbours have 0.107 at any size, a ring of 32 has 0.013
USUAL_DEGREE = 4  # of the graph that is proposed: at half the bytes of six it is seldom twice as slow
FEW_NODES = USUAL_DEGREE + 1  # up to so many, everybody has four neighbours or fewer anyway
LITTLE_SKEW = 0.2  # 45 rows of ten classes, drawn alike, differ by 0.18; Dirichlet(1.0) gives 0.35 …
HIGH_SKEW = 0.5  # … Dirichlet(0.5) 0.45, Dirichlet(0.1) 0.70: there quasi-global momentum no longer gets it all back
DIVERGENCE = -1 / 3  # smallest eigenvalue of W at and below which D², and so led, diverges
MOST_STEPS = 5  # local steps a round without a correction: on skewed rows a ring of 32 loses 16 points with five
UNEQUAL_ROWS = 2.0  # times as many rows as another: there it matters whether nodes count alike, or rows
MANY_BYTES = 1_000_000  # that a node sends in a round: a second on a line of 8 Mbit/s
# Rounds until quasi-global momentum has gathered speed: m̂ ← β m̂ + (1 − β)(β² m̂ + …) forgets (1 − β)(1 − β²) a round,
# which is 1 / 53 with β = 0.9. Shorter runs learn faster with momentum of their own, and a correction is slower yet.
MANY_ROUNDS = 100

ABOUT = ("graph", "weights", "steps", "trust", "cost")  # the five pieces of advice, in their order

Setting = str | int | float | bool
Settings = Mapping[str, Setting]  # dotted key → value


@dataclass(frozen=True, slots=True)
class Facts:
    """What an experiment is, as far as advice depends on it."""

    nodes: int
    parameters: int
    rounds: int
    local_steps: int  # H, that the node in the middle takes in a round
    rows_min: int  # to train on
    rows_median: float
    rows_max: int
    skew: float  # mean total variation distance of a node's labels to all labels, 0 to 1; 0 in a regression
    graph: str
    drawn_by_hand: bool  # edges are given one by one, so that they are likely to be what there is
    static: bool
    two_way: bool
    gap: float  # 1 − |λ₂| of W
    lambda_min: float | None  # None: W is not similar to a symmetric matrix, or there is more than one W
    rounds_to_agree: int | None  # to a millionth; None: never
    degree: int  # the fewest neighbours that a node hears in a round
    better_gap: float  # of the random graph of USUAL_DEGREE over as many nodes; 0 where there is none
    bytes_sent: float  # by a node in a round, on average, as float32
    weights: str
    by_rows: bool  # the mean is that over rows, not over nodes
    push_sum: bool
    in_step: bool  # everybody waits for the vectors of the same round
    tolerate: int  # bad neighbours of each node
    sgd: bool
    local_momentum: float


@dataclass(frozen=True, slots=True)
class Advice:
    """What to set, nothing if it is so already, and why."""

    settings: Settings
    why: str


def advise(facts: Facts, accepts: Callable[[Settings], bool] = lambda settings: True) -> list[Advice]:
    """Five pieces of advice: graph, weights, momentum or correction, robustness, and what a round costs.

    Of each the first proposal that the experiment takes, `accepts` being asked, alone and with those before it.
    """
    together: dict[str, Setting] = {}

    def choose(proposals: list[Advice]) -> Advice:
        for one in proposals[:-1]:
            if accepts(one.settings) and accepts({**together, **one.settings}):
                together.update(one.settings)
                return one
        return proposals[-1]

    graph, steps = choose(_graph(facts)), choose(_steps(facts))
    led = steps.settings.get("mix.correction") == "led"
    return [graph, choose(_weights(facts, led)), steps, choose(_trust(facts)), choose(_cost(facts, led))]


# -- The five lines: proposals, best first, the last of which changes nothing -----------------------------------------


def _graph(facts: Facts) -> list[Advice]:
    agree = (
        "never agree"
        if facts.rounds_to_agree is None
        else f"agree to a millionth in {_count(facts.rounds_to_agree, 'round')}"
    )
    state = f"the {facts.nodes} nodes {agree} (spectral gap {facts.gap:.3f})"
    if facts.gap >= ENOUGH_GAP or facts.nodes <= FEW_NODES:
        return [Advice({}, f"keep {facts.graph}: {state}")]
    gain = f"a random graph of {USUAL_DEGREE} neighbours has {facts.better_gap:.3f}"
    if facts.drawn_by_hand or facts.better_gap <= facts.gap:
        given = ", whose links are given" if facts.drawn_by_hand else ""
        return [Advice({}, f"keep {facts.graph}{given}: {state}; {gain}")]
    return [
        Advice(
            {"topology.graph": "random-regular", "topology.degree": USUAL_DEGREE}, f"on {facts.graph} {state}; {gain}"
        ),
        Advice({}, f"keep {facts.graph}, which the rest of the experiment needs: {state}; {gain}"),
    ]


def _weights(facts: Facts, led: bool) -> list[Advice]:
    rows = f"nodes have {facts.rows_min} to {facts.rows_max} rows"
    keep = f"keep {facts.weights}: "
    if facts.push_sum:
        return [Advice({}, f"{keep}links go one way, and push-sum ends at the mean all the same")]
    if led:
        least = "" if facts.lambda_min is None else f" (the least with {facts.weights} is {facts.lambda_min:.2f})"
        why = f"led diverges at eigenvalues of {DIVERGENCE:.2f} and below{least}: (I + W) / 2 has none below 0"
        return [Advice({"topology.weights": "lazy"}, why), Advice({}, f"{keep}{rows}")]
    if facts.by_rows:
        return [Advice({}, f"{keep}{rows}, and each row counts alike, not each node")]
    if facts.drawn_by_hand and facts.static and facts.gap < ENOUGH_GAP and facts.weights != "fastest":
        why = f"the best symmetric weights for links that are given; {facts.weights} has a gap of {facts.gap:.3f}"
        return [Advice({"topology.weights": "fastest"}, why), Advice({}, f"{keep}{rows}")]
    if facts.weights == "uniform-neighbours" and facts.two_way:
        why = "uniform-neighbours counts who has many neighbours more often; metropolis counts each node alike"
        return [Advice({"topology.weights": "metropolis"}, why), Advice({}, f"{keep}{rows}")]
    if facts.rows_max > UNEQUAL_ROWS * facts.rows_min:
        why = f'{rows}, and each node counts alike; "samples" counts rows alike, which is another aim and seldom a gain'
        return [Advice({}, keep + why)]
    return [Advice({}, f"{keep}{rows}, so that nodes and rows count alike")]


def _steps(facts: Facts) -> list[Advice]:
    skew = f"a node's labels differ from all labels by {facts.skew:.2f} (0: alike, 1: nothing in common)"
    if facts.push_sum:
        return [Advice({}, f"no momentum of the network, and no correction: push-sum divides by a mass; {skew}")]
    if not facts.sgd:
        return [Advice({}, f"keep the optimizer's own momentum: corrections are of the steps of plain sgd; {skew}")]
    own = f"the momentum of {facts.local_momentum:g}" if facts.local_momentum else "what there is"
    momentum: dict[str, Setting] = {
        "mix.momentum": "quasi-global",
        "mix.correction": "none",
        "mix.leak": 0.0,
        "mix.outer": "none",
        "train.momentum": 0.0,
    }
    if facts.skew < LITTLE_SKEW:
        keep = f"keep {own}: there is no skew of labels to correct; {skew}"
        plain: Settings = {"mix.correction": "none", "mix.leak": 0.0}
        return [Advice(plain, f"nothing to correct; {skew}"), Advice({}, keep)]
    if facts.rounds < MANY_ROUNDS and facts.local_momentum:
        late = (
            f"keep {own}: quasi-global momentum and corrections pay from about {MANY_ROUNDS} rounds on, and here are "
        )
        return [Advice({}, f"{late}{facts.rounds}; {skew}")]
    proposals = [
        Advice(momentum, f"{skew}: quasi-global momentum costs no byte, and follows the network instead of the node"),
        Advice({}, f"keep {own}: it is what the rest of the experiment goes with; {skew}"),
    ]
    if not _is_correctable(facts):
        return proposals
    corrected = momentum | {"mix.momentum": "none", "mix.correction": "led" if facts.static else "k-gt"}
    why = "steps have no momentum then: train.lr may be 2 to 5 times as large"
    if facts.static:
        corrected |= {"topology.weights": "lazy"}
        led = f"{skew}: led removes that bias without a byte, on edges that stay and go both ways; {why}"
        return [Advice(corrected, led), *proposals]
    k_gt = f"{skew}: k-gt removes that bias where neighbours change, for a second vector in each message; {why}"
    return [Advice(corrected, k_gt), *proposals]


def _is_correctable(facts: Facts) -> bool:
    """Whether a correction is worth it, and stands on firm ground: algorithms of exact means, over edges both ways."""
    skewed = facts.skew >= HIGH_SKEW and facts.rounds >= MANY_ROUNDS
    firm = facts.two_way and not facts.push_sum and not facts.by_rows and facts.in_step and facts.tolerate == 0
    return skewed and firm and facts.sgd


def _trust(facts: Facts) -> list[Advice]:
    heard = f"a node hears at least {_count(facts.degree, 'neighbour')}"
    if facts.push_sum or facts.by_rows or not facts.in_step:
        why = "push-sum" if facts.push_sum else "a mean over rows" if facts.by_rows else "a schedule without rounds"
        return [Advice({}, f"members must be trusted: {heard}, but {why} bears no bad one")]
    rule, bears = "trimmed-mean", (facts.degree - 2) // 2
    if facts.gap < ENOUGH_GAP or bears < 1:  # what trimming cuts off at a bottleneck is the other side
        rule, bears = "clip", facts.degree - 1
    if bears < 1:
        return [Advice({}, f"members must be trusted: {heard}, and one bad one takes {least_degree(rule, 1)}")]
    nnm = rule == "trimmed-mean"
    shown = f'mix.rule = "{rule}"{", after mix.nnm = true," if nnm else ""}'
    why = f"{heard}, of which {shown} bears {bears} bad"
    if rule == "clip":
        why += ", and news still crosses a bottleneck"
    if facts.tolerate == 0:
        return [Advice({}, f"members are trusted, so the plain mean; {why}, for a mean that is no longer exact")]
    settings: Settings = {"mix.rule": rule, "mix.nnm": nnm, "mix.tolerate": min(bears, facts.tolerate)}
    return [Advice(settings, why), Advice({}, f"keep the rule; {why}")]


def _cost(facts: Facts, led: bool) -> list[Advice]:
    sends = f"a node sends {facts.bytes_sent / 1e6:.3g} MB a round ({facts.parameters} parameters)"
    steps = f"{facts.local_steps} local steps"
    settings: Settings = {}
    long, skewed = facts.rounds >= MANY_ROUNDS, facts.skew >= HIGH_SKEW
    if long and skewed and facts.local_steps > MOST_STEPS and not led:
        settings = {"train.local_steps": MOST_STEPS}
        steps = f"{steps} between two mixings pull nodes with skewed rows apart, {MOST_STEPS} less so"
    if facts.bytes_sent < MANY_BYTES:
        few = f"{sends}, too little to compress; {steps}"
        return [*([Advice(settings, few)] if settings else []), Advice({}, few)]
    return [
        Advice(
            {**settings, "mix.compress": codec}, f"{sends}: {codec} sends {share} of it at no measurable loss; {steps}"
        )
        for codec, share in (("int8", "a quarter"), ("bf16", "half"))
    ] + [Advice({}, f"{sends}; {steps}")]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -- Looking at an experiment ----------------------------------------------------------------------------------------


def facts_of(experiment: Experiment) -> Facts:
    """What there is to know of it. BadInput if data, model or graph cannot be, or if there is one node only."""
    section, names = experiment.topology, experiment.topology.names
    if len(names) == 1:
        raise BadInput("one node has nobody to average with: use topology.nodes = 2 or more")
    parts = load_parts(experiment)
    rows = [len(part.train) for part in parts]
    topology = build(section, experiment.seed)
    parameters = make_learner(experiment, parts[0], names[0]).schema.size
    masses = {name: mass(section.weighting, count) for name, count in zip(names, rows, strict=True)}
    found = implied(topology, section.weighting, masses, parameters)
    return Facts(
        nodes=len(names),
        parameters=parameters,
        rounds=experiment.train.rounds,
        local_steps=round(median(count_steps(count, experiment.train) for count in rows)),
        rows_min=min(rows),
        rows_median=median(rows),
        rows_max=max(rows),
        skew=skew([part.train for part in parts]),
        graph=found["name"],
        drawn_by_hand=section.file is not None or bool(section.edges),
        static=not topology.varies,
        two_way=not topology.directed,
        gap=found["spectral_gap"],
        lambda_min=found["lambda_min"],
        rounds_to_agree=found["rounds_to_1e-6"],
        degree=least_heard(topology)[0],
        better_gap=_better_gap(experiment),
        bytes_sent=found["messages"] / len(names) * BYTES_OF_A_PARAMETER * parameters,
        weights=section.weighting,
        by_rows=section.weighting in BY_ROWS,
        push_sum=section.weighting in PUSH_SUM,
        in_step=experiment.mix.schedule == "sync" and experiment.network.staleness == 0,
        tolerate=experiment.mix.tolerate,
        sgd=experiment.train.optimizer == "sgd",
        local_momentum=experiment.train.momentum,
    )


def skew(shares: list[Dataset]) -> float:
    """How much nodes' labels differ, 0 to 1: the mean over nodes of ½ Σ_c |p_i(c) − p(c)|, p over all rows together.

    0 in a regression, which has no labels.
    """
    classes = len(shares[0].classes)
    if not classes:
        return 0.0
    counts = torch.stack([torch.bincount(share.targets, minlength=classes) for share in shares]).double()
    own, all_of_them = counts / counts.sum(dim=1, keepdim=True), counts.sum(dim=0) / counts.sum()
    return fmean((0.5 * (own - all_of_them).abs().sum(dim=1)).tolist())


def _better_gap(experiment: Experiment) -> float:
    """The spectral gap of the graph that we would take."""
    usual = {"graph": "random-regular", "degree": USUAL_DEGREE, "file": None, "edges": (), "weights": "metropolis"}
    section = experiment.topology.model_copy(update=usual)
    if len(section.names) <= FEW_NODES:
        return 0.0
    topology = build(section, experiment.seed)
    return implied(topology, "metropolis", dict.fromkeys(topology.names, 1.0))["spectral_gap"]


def advise_on(experiment: Experiment, load: Callable[[list[str]], Experiment]) -> tuple[Facts, list[Advice]]:
    """The facts of an experiment, and what to change in it: settings that hold already are left out.

    `load` reads the experiment again with further settings on top of its own; BadInput if it does not take them.
    """
    topology = build(experiment.topology, experiment.seed)
    facts = facts_of(experiment)

    def accepts(settings: Settings) -> bool:
        try:
            changed = load(as_settings(changes(experiment, settings)))
            same = changed.topology == experiment.topology
            _check(changed, topology if same else build(changed.topology, changed.seed))
        except BadInput:
            return False
        return True

    return facts, [Advice(changes(experiment, one.settings), one.why) for one in advise(facts, accepts)]


def _check(experiment: Experiment, topology: Topology) -> None:
    check_graph(experiment, topology)
    for round in range(topology.period or 1):
        check_weights(topology.at(round), experiment.topology.weighting)


def changes(experiment: Experiment, settings: Settings) -> Settings:
    """Of these settings those that do not hold already."""
    tree: dict[str, Toml] = experiment.model_dump(mode="json")
    holds = flatten(tree) | {"topology.weights": experiment.topology.weighting, "mix.momentum": experiment.momentum}
    return {key: value for key, value in settings.items() if holds.get(key) != value}


def as_settings(settings: Settings) -> list[str]:
    """As they are written in TOML, and as `--set` takes them."""
    return [f"{key} = {json.dumps(value)}" for key, value in settings.items()]


def in_words(advice: list[Advice]) -> str:
    """What `p2pfl advise` prints: a line for each piece of advice."""
    lines = []
    for about, one in zip(ABOUT, advice, strict=True):
        settings = ", ".join(as_settings(one.settings))
        lines.append(f"{about:8} {settings}{': ' if settings else ''}{one.why}\n")
    return "".join(lines)


def as_json(facts: Facts, advice: list[Advice]) -> Line:
    """What `p2pfl advise --json` prints."""
    return {"facts": asdict(facts), "advice": [{"set": dict(one.settings), "why": one.why} for one in advice]}
