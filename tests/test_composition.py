"""What does not compose is refused, with the reason and something that works: one experiment for each fact."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from p2pfl.composition import FACTS
from p2pfl.config import Experiment, load
from p2pfl.messages import BadInput
from p2pfl.records import create_run
from p2pfl.swarm import prepare
from p2pfl.topology import build
from p2pfl.topology.fit import check_graph, least_heard

RING = ("topology.graph=ring", "topology.nodes=8")
BYZANTINE = "mix.rule=trimmed-mean mix.tolerate=1"
NOISED = "privacy.dp=update privacy.noise=1"
SPREAD = f"{NOISED} privacy.mixings=5"

# Settings that break a fact → the settings that the message names, which mend it. The order is that of FACTS.
BROKEN: dict[str, str] = {
    "mix.correction=led topology.graph=one-peer-exponential": "mix.correction=k-gt topology.graph=one-peer-hypercube",
    "mix.correction=k-gt topology.graph=exponential-directed": "topology.graph=exponential",
    "mix.correction=k-gt topology.weights=samples": "topology.weights=lazy",
    "mix.correction=led topology.weights=metropolis": "topology.weights=lazy",
    f"mix.correction=k-gt {BYZANTINE}": "mix.correction=none mix.momentum=quasi-global",
    "mix.correction=led network.staleness=1": "mix.schedule=sync network.staleness=0",
    "mix.correction=led mix.compress=int8": "mix.compress=bf16",
    "mix.correction=led train.momentum=0.9": "train.optimizer=sgd train.momentum=0",
    "mix.correction=led mix.momentum=quasi-global": "mix.correction=none",
    "mix.correction=led mix.two_way=false": "mix.two_way=true",
    "mix.correction=gradient-tracking train.local_steps=5": "train.local_steps=1",
    "mix.correction=led topology.heal=false": "mix.leak=0.01",
    "mix.leak=0.01": "mix.correction=led",
    "mix.momentum=quasi-global train.optimizer=adam": "train.optimizer=sgd train.momentum=0",
    "mix.momentum=quasi-global topology.weights=push-sum": "mix.momentum=none",
    "mix.outer=nesterov mix.correction=led": "mix.correction=none",
    f"mix.outer=nesterov {BYZANTINE} mix.momentum=none": "mix.rule=mean mix.schedule=sync mix.tolerate=0",
    "mix.outer=nesterov mix.compress=top-k": "mix.compress=int8",
    f"{BYZANTINE} topology.weights=push-sum": "topology.weights=metropolis",
    f"{BYZANTINE} mix.schedule=gossip": "mix.schedule=sync network.staleness=inf",
    "mix.rule=krum": "mix.tolerate=1",
    "mix.rule=clip": "mix.tolerate=1",
    "mix.rule=median mix.nnm=true": "mix.tolerate=1",
    "mix.tolerate=1": "mix.rule=trimmed-mean mix.nnm=true",
    "mix.radius=1.5": "mix.rule=clip",
    f"{BYZANTINE} topology.weights=samples": "topology.weights=metropolis",
    "mix.compress=top-k topology.graph=random-matching": "mix.compress=int8",
    "mix.compress=int8 topology.weights=push-sum": "mix.compress=none",
    "mix.compress=sign mix.schedule=gossip": "mix.compress=int8",
    "mix.schedule=gossip topology.graph=base-k": "topology.graph=ring",
    "mix.schedule=pairwise topology.weights=lazy": "topology.weights=metropolis",
    "mix.schedule=pairwise topology.graph=exponential-directed": "mix.schedule=push-sum",
    "mix.schedule=push-sum topology.weights=metropolis": "topology.weights=push-sum",
    "privacy.dp=example": "privacy.epsilon=3",
    "privacy.noise=1": "privacy.dp=example",
    f"{NOISED} mix.correction=gradient-tracking train.local_steps=1": "mix.correction=k-gt",
    "privacy.mixings=5": "privacy.mixings=1",
    f"{SPREAD} mix.momentum=quasi-global": "mix.correction=none mix.momentum=none mix.outer=none",
    f"{SPREAD} topology.weights=samples": "topology.weights=metropolis mix.rule=mean mix.schedule=sync",
    "privacy.sums=masked mix.rule=median": "mix.rule=mean",
    "privacy.sums=masked mix.compress=int8": "mix.compress=none",
    "privacy.sums=masked network.staleness=1": "mix.schedule=sync network.staleness=0",
    "privacy.sums=masked topology.graph=random-matching": "topology.graph=random-regular",
    "privacy.sums=masked topology.weights=fastest": "topology.weights=metropolis",
    "privacy.sums=masked mix.two_way=true": "mix.correction=none mix.momentum=quasi-global mix.two_way=false",
}
# What a message says in other words than those of a setting: to remove a key is to set it to what holds without it.
IN_WORDS: dict[str, tuple[str, ...]] = {
    "mix.compress=int8": ("use 'int8'",),
    "mix.two_way=true": ("remove mix.two_way = false",),
    "mix.correction=led": ("set mix.correction",),
    "mix.tolerate=0": ("needs the weighted mean",),
    "mix.tolerate=1": ("mix.tolerate",),
    "mix.momentum=none": ("set mix.correction, mix.momentum and mix.outer to 'none'",),
    "mix.outer=none": ("set mix.correction, mix.momentum and mix.outer to 'none'",),
    "mix.two_way=false": ("remove mix.two_way",),
    "privacy.dp=example": ("set it to 'example' or 'update'",),
    "privacy.epsilon=3": ("set one of privacy.noise and privacy.epsilon",),
    "topology.graph=ring": ("use a graph that stays as it is",),
    "topology.graph=one-peer-hypercube": ("mix.correction = 'k-gt'",),
    "topology.weights=metropolis": ("remove topology.weights",),
    "mix.momentum=quasi-global": ("momentum = 'quasi-global'",),
    "mix.correction=none": ("use one of them", "set both to 'none'", "and mix.outer to 'none'"),
}


def experiment(*settings: str) -> Experiment:
    return load(settings=[*RING, *settings])


def refusal(*settings: str) -> str:
    with pytest.raises(BadInput) as caught:
        experiment(*settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def broken_fact(message: str) -> list[int]:
    """Which of FACTS says this."""
    patterns = [re.sub(r"\\\{\w+(!r)?\\\}", ".*", re.escape(text)) for _, text in FACTS]
    return [number for number, pattern in enumerate(patterns) if re.search(pattern + "$", message)]


def names(message: str, setting: str) -> bool:
    """Whether the message names this setting, as TOML or in words."""
    key, value = setting.split("=")
    last = key.rpartition(".")[2]
    written = rf"{last} = (['\"]?){re.escape(value)}\1(?![\w.])"
    return re.search(written, message) is not None or any(words in message for words in IN_WORDS.get(setting, ()))


def test_each_fact_is_broken_by_one_experiment() -> None:
    """None is hidden behind another that is looked at before it."""
    found = [broken_fact(refusal(*settings.split())) for settings in BROKEN]
    assert found == [[number] for number in range(len(FACTS))]


@pytest.mark.parametrize("settings", BROKEN)
def test_what_a_refusal_names_works(settings: str) -> None:
    remedy = BROKEN[settings].split()
    message = refusal(*settings.split())
    for setting in remedy:
        assert names(message, setting), f"{message!r} does not name {setting}"
    mended = experiment(*settings.split(), *remedy)
    build(mended.topology, mended.seed)


# -- Once the graph is drawn -----------------------------------------------------------------------------------------


def drawn(*settings: str) -> Experiment:
    found = experiment(*settings)
    check_graph(found, build(found.topology, found.seed))
    return found


@pytest.mark.parametrize(
    ("rule", "tolerate", "enough"),
    [("trimmed-mean", 1, 4), ("krum", 1, 4), ("median", 2, 6), ("clip", 1, 2), ("clip", 3, 4)],
)
def test_a_robust_rule_needs_so_many_neighbours_at_every_node(rule: str, tolerate: int, enough: int) -> None:
    """2b + 2 (algorithms §1.5: more than 2b + 1 vectors, the own one among them), of clipping b + 1."""
    settings = ("topology.nodes=9", "topology.graph=random-regular", f"mix.rule={rule}", f"mix.tolerate={tolerate}")
    drawn(*settings, f"topology.degree={enough}")
    with pytest.raises(BadInput, match=f"needs {enough} neighbours, and node-0 has {enough - 2}") as caught:
        drawn(*settings, f"topology.degree={enough - 2 or 1}", *(["topology.graph=empty"] if enough == 2 else []))
    degree = re.search(r"topology.graph = 'random-regular' with topology.degree = (\d+)", str(caught.value))
    assert degree is not None
    drawn(*settings, f"topology.degree={degree[1]}")
    with pytest.raises(BadInput, match="and node-1 has 1: "):  # a leaf of the star: one node is enough to refuse it
        drawn(*settings, "topology.graph=star", "mix.tolerate=2", "mix.rule=median")


@pytest.mark.parametrize(("s", "good"), [(4, True), (3, False)])
def test_of_a_graph_that_is_drawn_anew_it_is_asked_how_many_one_hears_on_average(s: int, good: bool) -> None:
    settings = (*BYZANTINE.split(), "topology.graph=epidemic", f"topology.s={s}", "topology.nodes=12")
    if good:
        drawn(*settings)
    else:
        with pytest.raises(BadInput, match="needs 4 neighbours, and a node on average has 3"):
            drawn(*settings)


def test_of_a_graph_that_repeats_every_round_counts() -> None:
    """In base-k of 12 nodes with k = 3 some round has a node with two neighbours, and another gives three to all."""
    topology = build(experiment("topology.graph=base-k", "topology.k=3", "topology.nodes=12").topology, 0)
    degrees = [min(dict(topology.at(round).degree).values()) for round in range(topology.period or 0)]
    assert degrees == [2, 3] and least_heard(topology)[0] == 2


def test_a_correction_on_a_graph_whose_file_says_one_way_is_refused_and_what_is_named_works(tmp_path: Path) -> None:
    path = tmp_path / "one-way.csv"
    path.write_text(",a,b,c\na,0,1,0\nb,0,0,1\nc,1,0,0\n")
    three = (f"topology.file={path}", 'topology.nodes=["a", "b", "c"]')
    for correction in ("led", "k-gt"):
        wrong = load(settings=[*three, f"mix.correction={correction}", "train.local_steps=2"])
        with pytest.raises(
            BadInput, match=r"needs edges that both ends confirm, and those of one-way.* go one way"
        ) as e:
            prepare(wrong, create_run(tmp_path / correction))
        assert str(e.value).endswith("use mix.correction = 'none' with topology.weights = 'push-sum'")
    settings = [*three, "mix.correction=none", "topology.weights=push-sum", "train.local_steps=2"]
    prepare(load(settings=settings), create_run(tmp_path / "run"))


def test_an_outer_momentum_is_refused_where_the_graph_mixes_slowly(tmp_path: Path) -> None:
    """Below a gap of 0.1 (algorithms §1.3: it amplifies disagreement on ring-32; fine on expanders)."""
    drawn("mix.outer=nesterov", "topology.nodes=8")  # a gap of 0.195
    with pytest.raises(BadInput, match=r"its spectral gap is 0\.0507, and 0\.1 is needed") as caught:
        prepare(experiment("mix.outer=nesterov", "topology.nodes=16"), create_run(tmp_path))
    assert str(caught.value).endswith("use topology.graph = 'exponential', or mix.outer = 'none'")
    drawn("mix.outer=nesterov", "topology.nodes=16", "topology.graph=exponential")
    drawn("mix.outer=none", "topology.nodes=16")
    drawn("mix.outer=nesterov", "topology.nodes=16", "topology.graph=base-k")  # exact after four rounds
