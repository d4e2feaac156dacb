"""`p2pfl audit`: its statistics are what theory says, it finds what is there to find, and nothing where nothing is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import up
from safetensors.torch import load_file, save_file
from scipy.stats import norm

from p2pfl import cli, findings, plots
from p2pfl.audit import (
    CONFIDENCE,
    ROC_POINTS,
    Trial,
    advantage,
    auc,
    audit,
    best_threshold,
    correlation,
    first_linear,
    halves,
    implied_bound,
    inversion,
    matched,
    membership,
    proportion,
    read_rows,
    roc,
    settled,
    sights_of,
    sureness,
    surprise,
    train_alone,
)
from p2pfl.config import Experiment, find_experiment, load, validate
from p2pfl.data import Dataset, Part, load_parts
from p2pfl.learner import make_learner
from p2pfl.messages import BadInput
from p2pfl.models import build
from p2pfl.records import Run, create_run, open_run, write_json
from p2pfl.report import write_report
from p2pfl.sim.experiment import simulate

SEED = 6


def rng(*more: int) -> np.random.Generator:
    return np.random.default_rng((SEED, *more))


def trial(members: object, others: object, rows: object = None) -> Trial:
    others = np.asarray(others, float)
    return Trial(np.asarray(members, float), others, np.arange(len(others)) if rows is None else np.asarray(rows))


def gaussians(apart: float, count: int, random: np.random.Generator) -> Trial:
    return trial(random.normal(apart, 1, count), random.normal(0, 1, count))


# -- The statistics --------------------------------------------------------------------------------------------------


def test_auc_counts_pairs_and_halves_ties() -> None:
    assert auc([trial([3, 2], [1, 2])], rng()).value == 3.5 / 4
    assert auc([trial([3, 2], [1, 2]), trial([0], [5, 6])], rng()).value == 3.5 / 6  # pairs of one sender only


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0, 2.0])
def test_two_gaussians_at_a_distance_have_an_auc_of_phi_of_it_over_root_two(apart: float) -> None:
    places = norm.ppf((np.arange(1000) + 0.5) / 1000)
    found = auc([trial(places + apart, places)], rng())
    assert found.value == pytest.approx(norm.cdf(apart / math.sqrt(2)), abs=1e-3)
    assert found.low < found.value < found.high


def test_the_intervals_hold_what_they_should_as_often_as_they_say() -> None:
    """40 rows of each kind: too few for any approximation to be good by itself."""
    apart, draws = 0.7, 200
    area, areas, gains = norm.cdf(apart / math.sqrt(2)), 0, 0
    for draw in range(draws):
        found = auc([gaussians(apart, 40, rng(draw))], rng(draw, 1))
        areas += found.low <= area <= found.high
        none = advantage([gaussians(0.0, 40, rng(draw, 2))], rng(draw, 3))
        gains += none.low <= 0.0 <= none.high
    slack = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / draws)
    assert areas / draws == pytest.approx(CONFIDENCE, abs=slack)
    assert gains / draws >= CONFIDENCE - slack


def test_an_advantage_is_not_found_in_noise_and_is_found_where_there_is_one() -> None:
    """The best threshold for the very rows that it is judged by would always seem to gain something."""
    honest, flattering = [], []
    for draw in range(200):
        none = gaussians(0.0, 40, rng(draw, 4))
        honest.append(advantage([none], rng(draw, 5)).value)
        best = best_threshold(none.members, none.others)
        flattering.append(np.mean(none.members >= best) - np.mean(none.others >= best))
    assert abs(np.mean(honest)) < 3 * np.std(honest) / math.sqrt(len(honest)) < 0.05
    assert np.mean(flattering) > 0.1
    apart = 1.0  # the best threshold is half way, and gains Φ(d/2) − Φ(−d/2)
    found = advantage([gaussians(apart, 4000, rng(7))], rng(8))
    assert found.value == pytest.approx(2 * norm.cdf(apart / 2) - 1, abs=0.04)


def test_rows_that_are_held_against_every_sender_count_once() -> None:
    """The same 25 rows, with the same scores, beside the members of 30 senders: they tell no more than 25 rows."""
    draws, areas, gains = 40, 0, 0
    for draw in range(draws):
        random = rng(draw, 9)
        others = random.normal(size=25)
        trials = [trial(random.normal(size=25), others) for _ in range(30)]
        area, gain = auc(trials, rng(draw, 10)), advantage(trials, rng(draw, 11))
        areas += area.low <= 0.5 <= area.high
        gains += gain.low <= 0.0 <= gain.high
    slack = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / draws)
    assert areas / draws >= 0.85  # the bootstrap of 25 rows is a little short; of 750 it would hold half of the time
    assert gains / draws >= CONFIDENCE - slack


def test_a_proportion_has_the_interval_of_clopper_and_pearson() -> None:
    """0 of n: the upper end p is where (1 − p)^n is the risk, here a quarter of all."""
    none = proportion(0.0, 20)
    assert none.low == 0.0 and (1 - none.high) ** 20 == pytest.approx((1 - CONFIDENCE) / 4)
    all_of_them = proportion(1.0, 20)
    assert all_of_them.high == 1.0 and all_of_them.low == pytest.approx(1 - none.high)


def test_the_bound_is_where_randomised_response_lies_and_where_the_allowed_region_has_its_corner() -> None:
    assert implied_bound(0.0, 0.0) == 0.0 and implied_bound(0.0, 0.1) == pytest.approx(0.1)
    assert implied_bound(1000.0, 0.0) == pytest.approx(1.0)
    epsilon, delta = 1.3, 0.01
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))  # told with this probability is (ε, 0)-private
    assert implied_bound(epsilon, 0.0) == pytest.approx(truth - (1 - truth))
    assert implied_bound(epsilon, delta) == pytest.approx((math.exp(epsilon) - 1 + 2 * delta) / (math.exp(epsilon) + 1))
    most = findings.allowed(epsilon, delta, 20_001)
    gains = np.array(most) - np.linspace(0, 1, len(most))
    assert gains.max() == pytest.approx(implied_bound(epsilon, delta), abs=1e-4)


def test_the_curve_rises_to_one_and_the_area_below_it_is_the_auc() -> None:
    found = gaussians(1.0, 1000, rng(12))
    curve = roc([found])
    assert len(curve) == ROC_POINTS and curve[-1] == 1.0 and curve == sorted(curve)
    assert np.trapezoid(curve, dx=1 / (ROC_POINTS - 1)) == pytest.approx(auc([found], rng()).value, abs=5e-3)


# -- What an attack looks at -----------------------------------------------------------------------------------------


def test_as_many_of_each_class_are_taken_of_both_kinds() -> None:
    members, others = np.repeat([0, 1, 2], [50, 5, 20]), np.repeat([0, 1, 3], [10, 30, 40])
    ours, theirs = matched(members, others, rng())
    assert np.bincount(members[ours]).tolist() == np.bincount(others[theirs]).tolist() == [10, 5]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)


def test_every_row_is_left_out_by_every_second_shadow() -> None:
    learnt = np.stack(list(halves(31, 6, rng())))
    assert (learnt.sum(axis=0) == 3).all() and set(learnt.sum(axis=1)) == {15, 16}


def test_surprise_is_measured_against_models_that_did_not_learn_the_row() -> None:
    """What models say of rows that they did learn must not count, however far off."""
    shadows = np.array([[1.0, 999.0], [999.0, 4.0], [3.0, 999.0], [999.0, 6.0]])
    learnt = shadows > 900
    assert surprise(np.array([5.0, 5.0]), shadows, learnt).tolist() == [3.0, 0.0]


def test_the_comparison_sees_through_rows_that_are_easy_or_hard_for_everybody() -> None:
    """Sureness D + N(0, 1), and 1 more if learnt, where D is the row's own: its spread is taken out by the shadows."""
    random, count, shadows, spread = rng(13), 2000, 8, 4.0
    own, member = random.normal(0, spread, 2 * count), np.arange(2 * count) < count
    seen = own + random.normal(size=2 * count) + member
    learnt = np.stack(list(halves(2 * count, shadows, random)))
    surprised = surprise(seen, own + random.normal(size=learnt.shape) + learnt, learnt)
    alone, beside = (auc([trial(s[member], s[~member])], rng()).value for s in (seen, surprised))
    assert alone == pytest.approx(norm.cdf(1 / math.sqrt(2 * (1 + spread**2))), abs=0.03)
    assert beside == pytest.approx(norm.cdf(1 / math.sqrt(2 * (1 + 2 / shadows))), abs=0.03)


def test_sureness_is_the_log_odds_of_the_true_class() -> None:
    learner = make_learner(small("mlp"), noise_part(20), "node")
    rows = noise_part(20).train
    with torch.no_grad():
        p = torch.softmax(learner.module(rows.inputs).double(), dim=1).gather(1, rows.targets[:, None])[:, 0]
    np.testing.assert_allclose(sureness(learner, rows), torch.log(p / (1 - p)).numpy(), rtol=1e-6)


# -- Membership ------------------------------------------------------------------------------------------------------


def small(model: str, **privacy: object) -> Experiment:
    """A node that learns its rows by heart."""
    return validate(
        {
            "model": {"name": model, "hidden": [32]},
            "train": {"rounds": 40, "local_epochs": 2, "batch_size": 10, "lr": 0.3, "device": "cpu"},
            "mix": {"momentum": "none"},
            "privacy": privacy,
        },
        "the test",
    )


def noise_part(count: int, seed: int = 0) -> Part:
    """Rows whose answers follow from nothing: whoever knows them has learnt them by heart."""
    random = torch.Generator().manual_seed(seed)
    train, test = (
        Dataset(torch.randn(count, 100, generator=random), torch.arange(count) % 2, ("no", "yes")) for _ in range(2)
    )
    return Part(train, test)


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_a_model_that_has_learnt_by_heart_gives_its_rows_away_and_a_new_one_does_not(model: str) -> None:
    experiment, part = small(model), noise_part(30)
    rounds = experiment.train.rounds
    learnt = train_alone(experiment, part.train, "node", rounds)
    for attack in membership(experiment, learnt, part, "node", rounds, shadows=4) or ():
        assert auc([attack], rng()).low > 0.75 and advantage([attack], rng()).value > 0.5
    other = train_alone(experiment, noise_part(30, seed=1).train, "node", rounds)
    attacks = membership(experiment, other, part, "node", rounds, shadows=4)
    assert attacks is not None
    for attack in attacks:
        found, gain = auc([attack], rng()), advantage([attack], rng())
        assert found.low < 0.5 < found.high and gain.low < 0.0 < gain.high


def test_noise_keeps_the_attack_below_its_bound_and_the_attack_notices_where_there_is_none() -> None:
    """The same rows, learnt by heart, with noise for ε = 0.3 and without."""
    epsilon, delta, rounds, part = 0.3, 1e-3, 5, noise_part(100)
    private, plain = (
        experiment.model_copy(update={"train": experiment.train.model_copy(update={"rounds": rounds})})
        for experiment in (small("mlp", dp="example", epsilon=epsilon, delta=delta), small("mlp"))
    )
    noised = settled(private, len(part.train))
    assert noised.privacy.noise is not None and noised.privacy.noise > 5  # 100 steps on a tenth of the rows each
    for experiment, is_above in ((noised, False), (plain, True)):
        learnt = train_alone(experiment, part.train, "node", rounds)
        for attack in membership(experiment, learnt, part, "node", rounds, shadows=2) or ():
            found, bound = advantage([attack], rng()), implied_bound(epsilon, delta)
            assert found.low > bound if is_above else found.value < bound


def test_too_few_rows_are_not_attacked() -> None:
    part = noise_part(6)
    assert membership(small("mlp"), train_alone(small("mlp"), part.train, "node", 1), part, "node", 1, 2) is None


# -- Inversion -------------------------------------------------------------------------------------------------------


def test_a_step_on_one_row_is_the_row() -> None:
    row = torch.randn(7, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    bias = torch.tensor([0.3, 0.0, -2.0], dtype=torch.float64)
    for guess in read_rows(torch.outer(bias, row), bias):  # the unit that has not moved says nothing
        assert torch.allclose(guess, row)
    assert read_rows(torch.zeros(3, 7), torch.zeros(3)).tolist() == [[0.0] * 7]  # nothing changed, nothing is known
    assert correlation(row, -2 * row) == pytest.approx(-1) and correlation(row, torch.ones(7)) == 0.0


def test_a_unit_that_only_one_of_three_rows_has_reached_holds_it_alone() -> None:
    random = torch.Generator().manual_seed(SEED)
    rows, reached = torch.randn(3, 9, generator=random).double(), torch.randn(8, 3, generator=random).double()
    reached[5] = torch.tensor([0.0, -0.4, 0.0])
    guesses = read_rows(reached @ rows, reached.sum(dim=1))
    assert len(guesses) == 9 and [torch.allclose(guess, rows[1]) for guess in guesses].count(True) == 1


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_rows_are_read_out_of_a_plain_step(model: str) -> None:
    plain = inversion(small(model), {"a": noise_part(20)}, 1)
    assert plain is not None and plain.error < 1e-4 and plain.correlation > 1 - 1e-6 and plain.recovered == 1.0


def test_a_sum_of_three_hides_rows_in_one_layer_and_not_behind_many_units() -> None:
    """What masks hide is whose a row is. That the rows cannot be told apart is up to the model and to the batch."""
    parts = {name: noise_part(20, seed) for seed, name in enumerate(("a", "b", "c", "d"))}
    one_layer = inversion(small("logistic"), parts, 3)
    assert one_layer is not None and one_layer.error > 0.5 and one_layer.recovered == 0.0
    wide = small("mlp").model_copy(update={"model": load(None, ["model.hidden=[128]"]).model})
    many_units = inversion(wide, parts, 3)
    assert many_units is not None and many_units.recovered == 1.0


@pytest.mark.parametrize("dp", ["example", "update"])
def test_rows_are_not_read_out_of_a_step_with_noise(dp: str) -> None:
    parts = {name: noise_part(20, seed) for seed, name in enumerate(("a", "b"))}
    noised = inversion(small("mlp", dp=dp, noise=1.0, delta=1e-2), parts, 1)
    assert noised is not None and noised.error > 0.5 and noised.recovered == 0.0 and abs(noised.correlation) < 0.5


def test_where_the_first_layer_is_not_linear_there_is_no_such_way() -> None:
    section = load(None, ["model.name=cnn"]).model
    assert first_linear(build(section, (1, 8, 8), 10, seed=0), 64) is None
    assert first_linear(torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False)), 5) is None
    assert first_linear(torch.nn.Linear(5, 3), 5) == ""


# -- Runs ------------------------------------------------------------------------------------------------------------


def trained(folder: Path, *settings: str, experiment: str = "hospitals") -> Run:
    """A run by the event simulator that has kept what neighbours saw."""
    made = create_run(folder)
    kept = ("privacy.keep_seen=true", *settings)
    simulate(load(find_experiment(experiment), kept), made, lambda line: None)
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three hospitals, without any protection."""
    made = trained(tmp_path_factory.mktemp("audit") / "plain", "train.rounds=4")
    write_json(made.audit, audit(made, shadows=4))
    return made


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four hospitals, each of which learns only the sum of the three others."""
    four = ("topology.nodes=4", "data.split=iid", "data.sizes=[]")
    return trained(tmp_path_factory.mktemp("audit") / "masked", *four, "privacy.sums=masked", "train.rounds=2")


def test_what_is_kept_is_what_came_last(plain: Run) -> None:
    """Everybody has the same of a sender, and on the complete graph their mean is what everybody ends with."""
    seen = {name: load_file(plain.node(name).seen) for name in plain.nodes()}
    assert {name: set(vectors) for name, vectors in seen.items()} == {name: set(seen) - {name} for name in seen}
    assert seen["ashford"]["cedarhill"].equal(seen["birchwood"]["cedarhill"])
    experiment = load(plain.experiment)
    parts = dict(zip(experiment.topology.names, load_parts(experiment), strict=True))
    vectors = seen["ashford"] | {"ashford": seen["birchwood"]["ashford"]}
    rows = {name: len(part.train) for name, part in parts.items()}
    mean = sum(rows[name] * vectors[name].double() for name in sorted(vectors)) / sum(rows.values())
    learner = make_learner(experiment, parts["ashford"], "ashford")
    final = load_file(plain.node("ashford").model)
    for name, tensor in learner.named_tensors(mean.float()).items():
        assert torch.allclose(tensor, final[name], atol=1e-6)


def test_a_run_is_attacked_from_its_folder_alone(plain: Run) -> None:
    found = json.loads(plain.audit.read_text())
    assert set(found["senders"]) == set(plain.nodes()) and found["bound"] is None
    assert all(about["round"] == 3 and about["in_a_sum_of"] == 1 for about in found["senders"].values())
    for attack in found["membership"].values():
        for measured in (attack["pooled"], *attack["senders"].values()):
            low, high = measured["auc_interval"]
            assert low <= measured["auc"] <= high and measured["members"] == measured["others"]
            assert len(measured["roc"]) == ROC_POINTS
    assert found["inversion"]["as_run"] == found["inversion"]["unprotected"]
    assert found["inversion"]["as_run"]["recovered"] == 1.0
    assert json.loads(json.dumps(audit(plain, shadows=4))) == found  # everything is drawn from the seed


def typed(*words: str | Path) -> None:
    """The command, in this process."""
    cli.app([*map(str, words)], standalone_mode=False)


def test_of_masked_sums_nobody_has_more_than_the_sum(masked: Run) -> None:
    for name in masked.nodes():
        assert set(load_file(masked.node(name).seen)) == {"sum"}
    found = audit(masked, shadows=2)
    assert all(about["in_a_sum_of"] == 3 for about in found["senders"].values())
    assert found["inversion"]["unprotected"]["recovered"] == 1.0
    assert found["inversion"]["as_run"]["error"] > found["inversion"]["unprotected"]["error"]
    assert found["inversion"]["senders"] == 3
    assert "sums of 3 or more" in findings.sentences(found)[0] and findings.protection(found) == "masked sums"


def test_real_processes_keep_the_same_as_simulated_ones(masked: Run, tmp_path: Path) -> None:
    up(masked.experiment, tmp_path / "real")
    real = open_run(tmp_path / "real")
    assert [load_file(real.node(name).seen)["sum"].tolist() for name in real.nodes()] == [
        load_file(masked.node(name).seen)["sum"].tolist() for name in masked.nodes()
    ]


def test_a_run_with_noise_is_held_against_its_epsilon(tmp_path: Path) -> None:
    """ε is that of the vector that was attacked, out of the sender's own records."""
    made = trained(tmp_path / "run", "privacy.dp=example", "privacy.noise=20", "privacy.delta=1e-3", "train.rounds=3")
    found = audit(made, shadows=2)
    last = {name: made.node(name).read_metrics()[-1]["epsilon"]["spent"] for name in made.nodes()}
    assert {name: about["epsilon"] for name, about in found["senders"].items()} == last
    assert found["bound"] == max(implied_bound(epsilon, 1e-3) for epsilon in last.values()) < 0.3
    for attack in found["membership"].values():
        assert attack["pooled"]["advantage"] < found["bound"]
    assert any("below the bound" in sentence for sentence in findings.sentences(found))
    found["bound"] = -1.0  # as if the noise were not what it is said to be
    assert any(": above the bound" in sentence for sentence in findings.sentences(found))


def test_the_command_says_it_in_words_and_the_report_shows_it(
    plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("audit", plain.path, "--shadows", "2")
    said = capsys.readouterr().out
    assert "Was this row trained on?" in said and "16 of 16" in said
    typed("audit", plain.path, "--shadows", "4", "--json")
    assert set(json.loads(capsys.readouterr().out)["runs"]) == {"plain"}
    page = write_report([plain.path], tmp_path / "one.html")[0].read_text()
    assert page.count(f"<h2>{findings.TITLE}</h2>") == 1 and "Attack by shadow models" in page
    both = write_report([plain.path, plain.path], tmp_path / "two.html")[0].read_text()
    assert both.count(f"<h2>{findings.TITLE}</h2>") == 3  # side by side, and with each of the two


def test_a_run_that_has_kept_nothing_says_how_to_run_it_again(tmp_path: Path) -> None:
    made = trained(tmp_path / "run", "privacy.keep_seen=false", "train.rounds=1")
    assert not list(made.path.glob("nodes/*/seen.safetensors"))
    with pytest.raises(BadInput) as refused:
        typed("audit", made.path)
    assert f"`p2pfl simulate {made.experiment} --set privacy.keep_seen=true`" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_best_sight_of_a_sender_is_the_smallest_sum_and_then_the_newest(tmp_path: Path) -> None:
    made = create_run(tmp_path / "run")
    seen = {"a": (3, ["x", "y", "z"]), "b": (5, ["w", "x", "y", "z"]), "c": (4, ["x", "y", "z"])}
    for attacker, (round, senders) in seen.items():
        made.node(attacker).append_metrics({"round": round, "merged": senders})
        about = {"round": str(round), "schema": ""}
        save_file({"sum": torch.zeros(1), "x": torch.ones(1)}, made.node(attacker).seen, about)
    summed = {sight.sender: sight for sight in sights_of(made, small("mlp", sums="masked"))}
    assert (summed["x"].attacker, summed["x"].senders, summed["x"].vector.item()) == ("c", 3, 0.0)
    assert (summed["w"].attacker, summed["w"].senders) == ("b", 4)
    alone = {sight.sender: sight for sight in sights_of(made, small("mlp"))}
    assert (alone["x"].attacker, alone["x"].round, alone["x"].senders, alone["x"].vector.item()) == ("b", 5, 1, 1.0)


def test_what_cannot_be_read_is_named(plain: Run, tmp_path: Path) -> None:
    copy = create_run(tmp_path / "copy")
    copy.experiment.write_bytes(plain.experiment.read_bytes())
    seen = copy.node("ashford").seen
    seen.parent.mkdir()
    seen.write_bytes(plain.node("ashford").seen.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"seen\.safetensors cannot be read"):
        audit(copy)
    seen.write_bytes(plain.node("ashford").seen.read_bytes())
    copy.experiment.write_text(plain.experiment.read_text().replace("hidden = [64]", "hidden = [63]"))
    with pytest.raises(BadInput, match="another model"):
        audit(copy)
    copy.experiment.write_text('[data]\nname = "breast_cancer"\n')  # as a single participant's own run has it
    with pytest.raises(BadInput, match="which rows birchwood has"):
        audit(copy)


def test_a_disk_that_does_not_take_it_does_not_stop_the_training(tmp_path: Path) -> None:
    made = create_run(tmp_path / "run")
    (made.node("ashford").seen / "in the way").mkdir(parents=True)
    settings = ("privacy.keep_seen=true", "train.rounds=2")
    outcome = simulate(load(find_experiment("hospitals"), settings), made, lambda line: None)
    assert outcome.summary["finished"] == 3
    experiment = load(made.experiment)
    assert {sight.sender for sight in sights_of(made, experiment)} == {"ashford", "cedarhill", "birchwood"}


def test_only_what_is_shared_is_attacked_as_the_senders(tmp_path: Path) -> None:
    """Of what is not shared the attacker has its own, and nothing of the sender's."""
    made = trained(tmp_path / "run", "train.rounds=2", "mix.share=hidden1.*")
    experiment = load(made.experiment)
    sight = next(sight for sight in sights_of(made, experiment) if sight.sender == "ashford")
    assert sight.vector.numel() == 30 * 64 + 64
    assert audit(made, shadows=2)["inversion"] is not None


def test_of_running_sums_the_models_are_kept(tmp_path: Path) -> None:
    """Push-sum sends the sum of all that was ever sent. Kept is by what it grew: a model, as long as the final one."""
    settings = ("topology.graph=exponential-directed", "mix.schedule=push-sum", "train.rounds=6", "topology.nodes=5")
    made = trained(tmp_path / "run", *settings, experiment="ring-8")
    for name in made.nodes():
        final = math.sqrt(sum(t.square().sum().item() for t in load_file(made.node(name).model).values()))
        for vector in load_file(made.node(name).seen).values():
            assert vector.norm().item() == pytest.approx(final, rel=0.2)


def test_a_damaged_audit_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    for found in ({}, {"membership": 3}, {"membership": {"loss": {"pooled": {"auc": 0.5}}}, "senders": [1]}):
        assert findings.sentences(found) is not None and len(findings.table({"x": found})) == 1
        figure = findings.picture({"x": found})
        assert figure is None or plots.svg(figure, "x")


def test_open_run_finds_it(plain: Run) -> None:
    assert open_run(plain.path).audit.is_file()
