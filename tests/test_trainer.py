"""What one node does in a round, whatever the rule: it can be stopped and go on, jump, and begin its rule anew."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from p2pfl.config import Experiment, validate
from p2pfl.data import load_part
from p2pfl.learner import make_learner
from p2pfl.messages import BadInput, Compute
from p2pfl.trainer import Term, Trainer

NAMES = ("a", "b", "c")
THIRD = 1 / 3


def no_time() -> float:
    return 0.0


def experiment(**sections: dict[str, object]) -> Experiment:
    tree: dict[str, dict[str, object]] = {
        "topology": {"graph": "complete", "nodes": list(NAMES)},
        "data": {"name": "digits", "split": "dirichlet"},
        "model": {"name": "logistic"},
        "train": {"rounds": 8, "local_steps": 1, "device": "cpu", "lr": 0.1},
    }
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    return validate(tree, "the test")  # type: ignore[arg-type]


def trainers(about: Experiment) -> dict[str, Trainer]:
    return {
        name: Trainer(make_learner(about, load_part(about, index), name), about, name, varies=False)
        for index, name in enumerate(NAMES)
    }


def train(nodes: dict[str, Trainer], rounds: Sequence[int]) -> None:
    """These rounds, each ended by a fold of everybody's vectors."""
    for round in rounds:
        for trainer in nodes.values():
            trainer.train(Compute(round, (), 1.0, 3.0, True), no_time)
        public = {name: trainer.public.clone() for name, trainer in nodes.items()}
        for name, trainer in nodes.items():
            terms = [Term(other, THIRD, vector) for other, vector in public.items() if other != name]
            trainer.fold(Compute(round + 1, (), 1.0, 3.0, True), terms, no_time)


CHOICES: dict[str, dict[str, dict[str, object]]] = {
    "averaging": {"mix": {"momentum": "none"}},
    "quasi-global": {},
    "FedProx": {"train": {"proximal": 0.1, "local_steps": 3}},
    "led": {"mix": {"correction": "led"}},
    "k-gt": {"mix": {"correction": "k-gt"}, "train": {"local_steps": 3}},
    "gradient-tracking": {"mix": {"correction": "gradient-tracking"}},
    "nesterov": {"mix": {"outer": "nesterov"}},
    "int8": {"mix": {"compress": "int8"}},
    "top-k": {"mix": {"compress": "top-k"}},
    "median": {"mix": {"rule": "median"}},
    "a part of one's own": {"mix": {"share": "output.weight"}},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_who_stops_and_goes_on_ends_where_who_did_not_ends_to_the_bit(choice: str) -> None:
    about = experiment(**CHOICES[choice])
    nodes = trainers(about)
    train(nodes, range(4))
    states = {name: trainer.state() for name, trainer in nodes.items()}
    resumed = trainers(about)
    for name, trainer in resumed.items():
        trainer.restore(states[name])
        trainer.fold(Compute(4, (), 1.0, 3.0, True, jump=True), [], no_time)  # as the first job after a start is
    for group in (nodes, resumed):
        train(group, range(4, 8))
    for name in NAMES:
        assert torch.equal(nodes[name].learner.vector, resumed[name].learner.vector)


def test_what_was_saved_under_another_rule_is_refused_and_changes_nothing() -> None:
    plain, led = trainers(experiment())["a"], trainers(experiment(mix={"correction": "led"}))["a"]
    before = led.learner.vector.clone()
    with pytest.raises(BadInput, match=r"lacks 'rule\.dual'"):
        led.restore(plain.state())
    assert torch.equal(led.learner.vector, before)


@pytest.mark.parametrize("choice", ["quasi-global", "led", "k-gt", "gradient-tracking"])
def test_a_jump_takes_the_others_models_and_teaches_the_rule_nothing(choice: str) -> None:
    nodes = trainers(experiment(**CHOICES[choice]))
    train(nodes, range(3))
    late = nodes["a"]
    late.train(Compute(3, (), 1.0, 3.0, True), no_time)
    rule = {name: tensor for name, tensor in late.state().items() if name.startswith("rule.")}
    model, size = nodes["b"].learner.vector.clone(), late.learner.schema.size
    far = torch.cat([model, torch.full((late.size - size,), 7.0)])
    late.fold(Compute(6, (), 1.0, 3.0, True, jump=True), [Term("b", 1.0, far)], no_time)
    assert torch.equal(late.learner.vector, model)
    for name, tensor in rule.items():
        assert torch.equal(late.state()[name], tensor), name


def test_a_restart_forgets_the_corrections_and_keeps_the_model() -> None:
    led = trainers(experiment(mix={"correction": "led"}))
    train(led, range(3))
    trainer = led["a"]
    assert trainer.state()["rule.dual"].abs().max() > 0
    vector = trainer.learner.vector.clone()
    trainer.fold(Compute(3, (), 1.0, 3.0, True, jump=True, restart=True), [], no_time)
    assert trainer.state()["rule.dual"].abs().max() == 0 and torch.equal(trainer.learner.vector, vector)


def test_the_test_rows_are_looked_at_as_often_as_asked_and_at_the_end() -> None:
    trainer = trainers(experiment(train={"rounds": 8, "evaluate_every": 3}))["a"]
    looked = []
    for round in range(8):
        trained = trainer.train(Compute(round, (), 1.0, 3.0, True), no_time)
        folded = trainer.fold(Compute(round + 1, (), 1.0, 3.0, True), [], no_time)
        assert bool(trained.scores.values) == bool(folded.scores.values)
        looked.append(bool(trained.scores.values))
    assert [round for round, seen in enumerate(looked) if seen] == [2, 5, 7]


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        ("vectors[:, :1]", r"returned \(3, 1\): it must return one vector"),
        ("vectors[0] / 0.0", "made NaN or infinity of finite vectors"),
    ],
)
def test_a_rule_of_the_users_that_gives_no_vector_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gives: str, why: str
) -> None:
    (tmp_path / "half_a_rule.py").write_text(f"def half(vectors, weights, tolerate):\n    return {gives}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "half_a_rule", raising=False)
    nodes = trainers(experiment(mix={"rule": "half_a_rule:half"}))
    with pytest.raises(BadInput, match=rf"mix\.rule = 'half_a_rule:half' {why}"):
        train(nodes, range(1))
