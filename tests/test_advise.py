"""Advice: what follows from which facts, and that whatever is proposed can run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from processes import run

from p2pfl.advise import ABOUT, Advice, Facts, Settings, advise, advise_on, as_settings, skew
from p2pfl.config import Experiment, builtin_experiments, find_experiment, load
from p2pfl.data import Dataset, load_parts
from p2pfl.topology import build
from p2pfl.topology.files import names_in
from p2pfl.topology.fit import check_graph

PLAIN = Facts(  # 32 nodes with skewed labels on a torus, for long enough
    nodes=32,
    parameters=9610,
    rounds=300,
    local_steps=5,
    rows_min=40,
    rows_median=45,
    rows_max=50,
    skew=0.7,
    graph="torus",
    drawn_by_hand=False,
    static=True,
    two_way=True,
    gap=0.117,
    lambda_min=-0.6,
    rounds_to_agree=111,
    degree=4,
    better_gap=0.179,
    bytes_sent=153_760,
    weights="metropolis",
    by_rows=False,
    push_sum=False,
    in_step=True,
    tolerate=0,
    sgd=True,
    local_momentum=0.0,
)
NOTHING: Settings = {}


def about(what: str, *, accepts: object = None, **facts: object) -> Advice:
    """The piece of advice about this, where these facts are other than PLAIN."""
    advice = advise(replace(PLAIN, **facts), **({"accepts": accepts} if accepts else {}))
    assert len(advice) == len(ABOUT) == 5 and all("\n" not in one.why for one in advice)
    return dict(zip(ABOUT, advice, strict=True))[what]


@pytest.mark.parametrize(
    ("facts", "settings", "says"),
    [
        ({}, NOTHING, "keep torus: the 32 nodes agree to a millionth in 111 rounds (spectral gap 0.117)"),
        (
            {"graph": "ring", "gap": 0.0128, "rounds_to_agree": 1072},
            {"topology.graph": "random-regular", "topology.degree": 4},
            "in 1072 rounds (spectral gap 0.013); a random graph of 4 neighbours has 0.179",
        ),
        ({"graph": "empty", "gap": 0.0, "rounds_to_agree": None}, {"topology.graph": "random-regular"}, "never agree"),
        ({"gap": 0.05, "drawn_by_hand": True}, NOTHING, "whose links are given"),
        ({"gap": 0.05, "nodes": 5, "better_gap": 0.0}, NOTHING, "keep"),
        ({"gap": 0.05, "better_gap": 0.04}, NOTHING, "keep"),
    ],
)
def test_the_graph(facts: dict[str, object], settings: Settings, says: str) -> None:
    advice = about("graph", **facts)
    assert settings.items() <= advice.settings.items() and bool(settings) == bool(advice.settings)
    assert says in advice.why


@pytest.mark.parametrize(
    ("facts", "weights", "says"),
    [
        ({"skew": 0.7}, "lazy", "the least with metropolis is -0.60"),  # for led
        ({"skew": 0.4}, None, "keep metropolis"),
        ({"push_sum": True, "two_way": False, "weights": "push-sum"}, None, "links go one way"),
        ({"by_rows": True, "weights": "samples"}, None, "each row counts alike"),
        ({"skew": 0.4, "drawn_by_hand": True, "gap": 0.05}, "fastest", "links that are given"),
        ({"skew": 0.4, "weights": "uniform-neighbours"}, "metropolis", "counts each node alike"),
        ({"skew": 0.4, "rows_min": 10, "rows_max": 21}, None, "10 to 21 rows, and each node counts alike"),
        ({"skew": 0.4, "rows_min": 10, "rows_max": 20}, None, "nodes and rows count alike"),
    ],
)
def test_the_weights(facts: dict[str, object], weights: str | None, says: str) -> None:
    advice = about("weights", **facts)
    assert advice.settings.get("topology.weights") == weights
    assert says in advice.why


@pytest.mark.parametrize(
    ("facts", "correction", "momentum", "says"),
    [
        ({}, "led", "none", "differ from all labels by 0.70"),
        ({"static": False, "lambda_min": None}, "k-gt", "none", "a second vector in each message"),
        ({"skew": 0.49}, "none", "quasi-global", "costs no byte"),
        ({"skew": 0.19}, "none", None, "nothing to correct"),
        ({"tolerate": 1}, "none", "quasi-global", "costs no byte"),  # the correction needs the exact mean
        ({"by_rows": True}, "none", "quasi-global", "costs no byte"),
        ({"in_step": False}, "none", "quasi-global", "costs no byte"),
        ({"two_way": False}, "none", "quasi-global", "costs no byte"),
        ({"push_sum": True, "two_way": False}, None, None, "divides by a mass"),
        ({"sgd": False}, None, None, "the optimizer's own momentum"),
        ({"rounds": 99}, "none", "quasi-global", "costs no byte"),
        ({"rounds": 99, "local_momentum": 0.9}, None, None, "keep the momentum of 0.9"),
        ({"rounds": 100, "local_momentum": 0.9}, "led", "none", "train.lr may be"),
    ],
)
def test_momentum_or_correction(
    facts: dict[str, object], correction: str | None, momentum: str | None, says: str
) -> None:
    advice = about("steps", **facts)
    assert (advice.settings.get("mix.correction"), advice.settings.get("mix.momentum")) == (correction, momentum)
    assert says in advice.why


def test_what_the_experiment_does_not_take_gives_way_to_the_next_best() -> None:
    def without_led(settings: Settings) -> bool:
        return settings.get("mix.correction") != "led"

    assert about("steps", accepts=without_led).settings["mix.momentum"] == "quasi-global"
    assert "topology.weights" not in about("weights", accepts=without_led).settings  # lazy was for led alone
    assert all(not one.settings for one in advise(PLAIN, lambda settings: False))
    # Together they are more than one by one: bytes are compressed as led bears it.
    large = {"parameters": 10**7, "bytes_sent": 1.6e8}

    def as_config_does(settings: Settings) -> bool:
        return settings.get("mix.correction") != "led" or settings.get("mix.compress") != "int8"

    assert about("cost", **large, accepts=as_config_does).settings == {"mix.compress": "bf16"}


@pytest.mark.parametrize(
    ("facts", "settings", "says"),
    [
        ({"degree": 4}, NOTHING, '4 neighbours, of which mix.rule = "trimmed-mean", after mix.nnm = true, bears 1 bad'),
        ({"degree": 7}, NOTHING, "bears 2 bad"),
        ({"degree": 8, "tolerate": 2}, {"mix.rule": "trimmed-mean", "mix.nnm": True, "mix.tolerate": 2}, "bears 3 bad"),
        ({"degree": 8, "tolerate": 5}, {"mix.rule": "trimmed-mean", "mix.nnm": True, "mix.tolerate": 3}, "bears 3 bad"),
        ({"degree": 4, "gap": 0.05, "tolerate": 1}, {"mix.rule": "clip", "mix.nnm": False, "mix.tolerate": 1}, "cross"),
        ({"degree": 2}, NOTHING, 'mix.rule = "clip" bears 1 bad'),
        ({"degree": 1}, NOTHING, "a node hears at least 1 neighbour, and one bad one takes 2"),
        ({"push_sum": True, "two_way": False}, NOTHING, "push-sum bears no bad one"),
        ({"by_rows": True}, NOTHING, "a mean over rows bears no bad one"),
        ({"in_step": False}, NOTHING, "a schedule without rounds bears no bad one"),
    ],
)
def test_how_many_bad_neighbours_are_borne(facts: dict[str, object], settings: Settings, says: str) -> None:
    advice = about("trust", **facts)
    assert advice.settings == settings and says in advice.why


@pytest.mark.parametrize(
    ("facts", "settings"),
    [
        ({}, NOTHING),
        ({"bytes_sent": 1e6}, {"mix.compress": "int8"}),
        ({"bytes_sent": 0.9e6}, NOTHING),
        ({"local_steps": 6, "by_rows": True}, {"train.local_steps": 5}),
        ({"local_steps": 5, "by_rows": True}, NOTHING),
        ({"local_steps": 6}, NOTHING),  # led takes the drift away
        ({"local_steps": 6, "skew": 0.4}, NOTHING),
        ({"local_steps": 6, "by_rows": True, "bytes_sent": 1e6}, {"train.local_steps": 5, "mix.compress": "int8"}),
    ],
)
def test_bytes_and_local_steps(facts: dict[str, object], settings: Settings) -> None:
    assert about("cost", **facts).settings == settings


def test_skew_is_the_mean_total_variation_distance() -> None:
    def share(*labels: int) -> Dataset:
        return Dataset(torch.zeros(len(labels), 1), torch.tensor(labels), ("a", "b", "c"))

    assert skew([share(0, 1, 2), share(2, 1, 0)]) == 0.0
    # All labels: 3/6, 2/6, 1/6. Distances: (1/2 + 1/3 + 1/6) / 2 = 1/2 and (1/4 + 1/6 + 1/12) / 2 = 1/4.
    assert math.isclose(skew([share(0, 0), share(0, 1, 1, 2)]), (1 / 2 + 1 / 4) / 2)
    assert skew([Dataset(torch.zeros(2, 1), torch.zeros(2), ())]) == 0.0
    means = {}
    for split in ("iid", "dirichlet\ndata.alpha=1", "dirichlet\ndata.alpha=0.1"):
        settings = ["topology.nodes=32", "topology.graph=ring", "data.name=digits", *f"data.split={split}".split("\n")]
        means[split] = skew([part.train for part in load_parts(load(settings=settings))])
    assert list(means.values()) == pytest.approx([0.185, 0.35, 0.72], abs=0.03)  # what the thresholds stand on


# -- On experiments --------------------------------------------------------------------------------------------------


def advised(name: str, *settings: str) -> tuple[Facts, list[Advice]]:
    """The advice on an experiment; each of its proposals, and all together, are read and drawn once more."""

    def read(further: list[str]) -> Experiment:
        return load(find_experiment(name), [*settings, *further], names_in=names_in)

    facts, advice = advise_on(read([]), read)
    everything: dict[str, object] = {}
    for one in advice:
        everything |= one.settings
        for proposed in (one.settings, everything):
            changed = read(as_settings(proposed))
            check_graph(changed, build(changed.topology, changed.seed))
    again, more = advise_on(read(as_settings(everything)), lambda further: read([*as_settings(everything), *further]))
    assert [one.settings for one in more[1:]] == [NOTHING] * 4 or again.graph != facts.graph  # it holds all of it now
    return facts, advice


LONG = ("train.rounds=300", "data.split=dirichlet", "data.alpha=0.1", "data.name=digits", "model.hidden=[4]")


@pytest.mark.parametrize("name", ["ring-8", "hospitals", "roads", "factory-line", "base-k", "epidemic", "two-campuses"])
def test_whatever_is_proposed_can_run(name: str) -> None:
    assert f"{name}.toml" in builtin_experiments()
    advised(name)
    if name != "hospitals":
        advised(name, *LONG)


@pytest.mark.parametrize(
    "settings",
    [
        ("mix.compress=top-k",),
        ("mix.correction=k-gt", "mix.leak=0.01", "train.momentum=0"),
        ("mix.outer=nesterov", "topology.nodes=8"),
        ("mix.rule=clip", "mix.tolerate=1"),
        ("mix.schedule=gossip",),
        ("topology.heal=false",),
        ("train.optimizer=adam", "train.momentum=0"),
        ("network.staleness=2",),
        ("mix.two_way=false",),
    ],
    ids=lambda settings: settings[0],
)
def test_whatever_is_there_already_what_is_proposed_goes_with_it(settings: tuple[str, ...]) -> None:
    advised("ring", *LONG, *settings)


def test_high_skew_on_a_ring_that_trains_long_is_advised_led_and_a_better_graph() -> None:
    facts, (graph, weights, steps, _, _) = advised("ring", *LONG, "topology.nodes=32")
    assert math.isclose(facts.gap, 2 / 3 * (1 - math.cos(2 * math.pi / 32)), abs_tol=1e-9)
    assert graph.settings == {"topology.graph": "random-regular"}  # with the degree that it has anyway
    assert weights.settings == {"topology.weights": "lazy"} and steps.settings["mix.correction"] == "led"


def test_the_command_prints_five_lines_or_one_object() -> None:
    lines = run("advise", "ring-8").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ABOUT)
    printed = json.loads(run("advise", "hospitals", "--set", "train.rounds=7", "--json").stdout)
    assert printed["facts"]["rounds"] == 7 and printed["facts"]["nodes"] == 3
    assert len(printed["advice"]) == 5 and all(one.keys() == {"set", "why"} for one in printed["advice"])
