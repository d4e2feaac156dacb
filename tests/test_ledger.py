"""A charge is on the disk before anything leaves: no crash, no torn line and no full disk makes one be forgotten."""

from __future__ import annotations

import json
import re
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import events, make_members, metrics, run, started, up, wait_for_line
from test_full_disk import largest_file

from p2pfl.accountant import Accountant
from p2pfl.config import Experiment, load
from p2pfl.data import load_parts
from p2pfl.learner import make_learner
from p2pfl.ledger import KEY, KEY_BYTES, LEDGER, Charge, Ledger, open_ledger
from p2pfl.messages import BadInput, Compute, Spent, TrainingFailed
from p2pfl.trainer import Trainer

CHARGE = Charge(0, "ab" * 32, "example", 1.5, 0.2, 7, 1e-3)
PRIVATE = ("privacy.dp=example", "privacy.noise=1.5", "privacy.delta=1e-3", "model.name=logistic")


def experiment_of(*settings: str) -> Experiment:
    return load(settings=(*PRIVATE, "topology.graph=ring", "topology.nodes=4", *settings))


def trainer_of(folder: Path, *settings: str) -> Trainer:
    experiment = experiment_of(*settings)
    learner = make_learner(experiment, load_parts(experiment)[0], "node-0")
    return Trainer(learner, experiment, "node-0", varies=False, ledger=open_ledger(folder))


def train(trainer: Trainer, round: int) -> Spent:
    spent = trainer.train(Compute(round, (), 1.0, 1.0, True), lambda: 0.0).spent
    assert spent is not None
    return spent


# -- The file --------------------------------------------------------------------------------------------------------


def test_only_its_owner_reads_it_and_the_secret_is_not_in_it(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.enter(CHARGE)
    for name in (LEDGER, KEY):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    secret = (tmp_path / KEY).read_bytes()
    assert len(secret) == KEY_BYTES and secret == ledger.secret == open_ledger(tmp_path).secret
    assert open_ledger(tmp_path / "other").secret != secret
    assert secret.hex() not in (tmp_path / LEDGER).read_text()
    assert ledger.name(b"this").encode() != ledger.seed(b"this").hex().encode()
    (tmp_path / KEY).write_bytes(secret[:-1])  # not whole: nothing was drawn from it
    assert open_ledger(tmp_path).secret != secret


def test_however_a_last_line_is_cut_those_before_it_count_and_the_next_follows_them(tmp_path: Path) -> None:
    """A line that is cut was not on the disk when its round would have been released, so it never was."""
    whole = open_ledger(tmp_path)
    for round in range(3):
        whole.enter(replace(CHARGE, round=round))
    content = (tmp_path / LEDGER).read_bytes()
    *_, last = content.splitlines(keepends=True)
    for cut in range(1, len(last) + 1):
        (tmp_path / LEDGER).write_bytes(content[:-cut])
        ledger = open_ledger(tmp_path)
        assert ledger.charges == whole.charges[:2]
        ledger.enter(replace(CHARGE, round=7))
        assert [charge.round for charge in open_ledger(tmp_path).charges] == [0, 1, 7]
    (tmp_path / LEDGER).write_bytes(content)
    assert open_ledger(tmp_path).charges == whole.charges


@pytest.mark.parametrize("line", [b"", b"{}", b"rust", b"[1]", b"\xff", json.dumps({"round": 0}).encode()])
def test_any_other_damage_is_refused_for_what_it_cost_is_not_known(line: bytes, tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.enter(CHARGE)
    ledger.enter(replace(CHARGE, round=1))
    _, second = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(line + b"\n" + second)
    with pytest.raises(BadInput, match=r"privacy.jsonl, line 1 is damaged.*another --run-dir") as error:
        open_ledger(tmp_path)
    assert "\n" not in str(error.value)


def test_the_same_release_is_charged_once_and_another_one_of_that_round_again(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    for _ in range(3):
        ledger.enter(CHARGE)
        ledger = open_ledger(tmp_path)
    assert ledger.charges == [CHARGE]
    ledger.enter(replace(CHARGE, release="cd" * 32))
    ledger.enter(replace(CHARGE, round=1))
    assert len(open_ledger(tmp_path).charges) == 3


# -- A trainer with it -----------------------------------------------------------------------------------------------


def test_a_round_repeated_from_the_same_state_is_the_same_and_free_and_from_another_it_is_neither(
    tmp_path: Path,
) -> None:
    first = trainer_of(tmp_path)
    costs, sent = [], []
    for round in range(3):
        costs.append(train(first, round).epsilon)
        sent.append(first.public.clone())
    assert costs == sorted(set(costs))

    again = trainer_of(tmp_path)  # killed, and no checkpoint was written
    for round in range(3):
        assert train(again, round).epsilon == pytest.approx(costs[-1], abs=1e-12)
        assert torch.equal(again.public, sent[round])
    assert len(open_ledger(tmp_path).charges) == 3

    other = trainer_of(tmp_path)
    other.learner.vector.add_(0.01)  # a neighbour gave it something else
    assert train(other, 0).epsilon > costs[-1]
    assert not torch.allclose(other.public - 0.01, sent[0], atol=1e-3), "with noise of its own"
    assert len(open_ledger(tmp_path).charges) == 4

    (tmp_path / KEY).unlink()
    stranger = trainer_of(tmp_path)  # cannot repeat what it does not know
    train(stranger, 0)
    assert len(open_ledger(tmp_path).charges) == 5


def test_what_a_crash_made_be_trained_twice_counts_against_the_budget(tmp_path: Path) -> None:
    first = trainer_of(tmp_path)
    two = [train(first, round).epsilon for round in range(2)][-1]
    other = trainer_of(tmp_path, f"privacy.max_epsilon={two}")
    other.learner.vector.add_(0.01)
    before = other.learner.vector.clone()
    trained = other.train(Compute(0, (), 1.0, 1.0, True), lambda: 0.0)
    assert trained.budget_spent and torch.equal(other.learner.vector, before)
    repeated = trainer_of(tmp_path)
    assert not repeated.train(Compute(0, (), 1.0, 1.0, True), lambda: 0.0).budget_spent


def test_a_disk_that_takes_no_charge_lets_nothing_be_learnt(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    train(trainer, 0)
    size = (tmp_path / LEDGER).stat().st_size
    before = trainer.learner.vector.clone()
    for full in (size, size + 10):
        with largest_file(full), pytest.raises(TrainingFailed, match="nothing may leave uncharged: make room") as error:
            train(trainer, 1)
        assert "\n" not in str(error.value)
        assert torch.equal(trainer.learner.vector, before) and (tmp_path / LEDGER).stat().st_size == size
    assert train(trainer, 1).epsilon > 0


def test_one_kind_of_privacy_does_not_count_what_another_has_spent(tmp_path: Path) -> None:
    train(trainer_of(tmp_path), 0)
    with pytest.raises(BadInput, match=r"trained with privacy.dp = 'example' before.*another --run-dir"):
        trainer_of(tmp_path, "privacy.dp=update")


# -- Real processes --------------------------------------------------------------------------------------------------


def uninterrupted(charges: list[Charge]) -> Spent:
    """What these rounds cost one after the other."""
    steps = {charges[0].mechanism: sum(charge.steps for charge in charges)}
    return Accountant("example", charges[0].delta, steps).after(charges[0].mechanism, sum(steps.values()))


def test_epsilon_after_kill_9_and_resume_is_that_of_who_was_not_killed(tmp_path: Path) -> None:
    """`up` kills the node as it begins round 10; it goes on from round 8 or 4, and repeats what followed."""
    settings = (
        *PRIVATE,
        "data.name=breast_cancer",
        "topology.graph=empty",
        "train.rounds=14",
        "train.checkpoint_every=4",
    )
    kill = 'faults=[{kind="restart", node=0, round=10, seconds=0}]'
    whole = up("ring-8", tmp_path / "whole", *settings, nodes=1)
    cut = up("ring-8", tmp_path / "cut", *settings, kill, nodes=1)
    assert whole["epsilon"] == cut["epsilon"] and whole["epsilon"]["max"] > 0
    assert [e["round"] for e in events(tmp_path / "cut", "node-0") if e["event"] == "started"] in ([0, 8], [0, 4])
    lines: dict[str, list[dict]] = {run: metrics(tmp_path / run, "node-0") for run in ("whole", "cut")}
    assert len(lines["cut"]) > len(lines["whole"]) == 14, "some rounds were trained twice"
    ledgers = [open_ledger(tmp_path / run / "nodes" / "node-0") for run in ("whole", "cut")]
    assert [[charge.round for charge in ledger.charges] for ledger in ledgers] == [list(range(14))] * 2
    assert whole["epsilon"]["max"] == pytest.approx(uninterrupted(ledgers[0].charges).epsilon, abs=1e-9)
    twice = {line["round"]: line["train_loss"] for line in lines["cut"] if line["epoch"] == 1}
    assert all(twice[n["round"]] == n["train_loss"] for n in lines["cut"] if n["epoch"] == 2 and n["round"] in twice)
    assert ledgers[0].secret != ledgers[1].secret


def test_a_participant_that_is_killed_anywhere_in_a_round_forgets_no_charge(tmp_path: Path) -> None:
    make_members(tmp_path, "aurora", "bethel")
    words: list[str | Path] = ["node", "--peers", "bethel", "--rounds", "40", "--run-dir", tmp_path / "run"]
    for setting in (*PRIVATE, "network.join_timeout=0", "train.checkpoint_every=3", "privacy.max_epsilon=2.5"):
        words += ["--set", setting]
    folder = tmp_path / "run" / "nodes" / "aurora"
    with started(*words, cwd=tmp_path / "aurora") as process:
        wait_for_line(process, r"^round +7/")
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = (folder / LEDGER).read_bytes()
    refused = run(*words, cwd=tmp_path / "aurora", expect=2)
    assert "add --resume" in refused.stderr and (folder / LEDGER).read_bytes() == before, "a budget does not begin anew"
    done = run(*words, "--resume", cwd=tmp_path / "aurora")
    assert (folder / LEDGER).read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    ledger: Ledger = open_ledger(folder)
    assert [charge.round for charge in ledger.charges] == list(range(len(ledger.charges)))
    last = metrics(tmp_path / "run", "aurora")[-1]
    assert last["round"] == 39 and 2.4 < last["epsilon"]["spent"] <= 2.5
    assert last["epsilon"]["spent"] == pytest.approx(uninterrupted(ledger.charges).epsilon, abs=1e-4)  # of another mesh
    (told,) = [event for event in events(tmp_path / "run", "aurora") if event["event"] == "budget_spent"]
    assert told["round"] == len(ledger.charges) < 39 and told["unit"] == "example"
    assert re.search(r"ε 2\.4\d\d \(example\)", done.stdout)
    assert "trains no more, and goes on mixing" in done.stdout and "arning" not in done.stdout + done.stderr
