"""Noise that hides: what is added is what is accounted for, no row and no update weighs more than the clipping norm,
and nobody who knows the experiment can compute any of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from p2pfl.accountant import Mechanism
from p2pfl.config import Experiment, PrivacySection, TrainSection, load
from p2pfl.data import Dataset, Part, load_parts
from p2pfl.learner import TorchLearner, loss_of, make_learner
from p2pfl.ledger import Ledger
from p2pfl.messages import BadInput, Compute, Trained
from p2pfl.private import ExampleRound, Randomness, blur
from p2pfl.records import create_run, number, read_json
from p2pfl.report import _facts, pictures, read_history
from p2pfl.sim import lockstep
from p2pfl.sim.experiment import simulate
from p2pfl.trainer import Term, Trainer, trains_in

ROWS, COLUMNS = 60, 12
UNLIKELY = 1e-6  # how rarely a test of noise may fail by chance; half the noise is off by hundreds of deviations
NONE = 1e-12  # as a noise multiplier: so little that a float32 does not show it


def part(rows: int = ROWS, shape: tuple[int, ...] = (COLUMNS,), classes: int = 3, seed: int = 0) -> Part:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, *shape, generator=random)
    targets = torch.randint(classes, (rows,), generator=random)
    data = Dataset(inputs, targets, tuple(map(str, range(classes))))
    return Part(data, data)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(COLUMNS, 40), nn.ReLU(), nn.Linear(40, 3))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


class Tied(nn.Module):
    """Two layers with one weight, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, COLUMNS)
        self.second.weight = self.first.weight
        self.frozen, self.last = nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, 3)
        self.frozen.requires_grad_(False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.frozen(torch.tanh(self.second(torch.tanh(self.first(rows))))))


class Recentred(nn.Module):
    """What opacus has no rule for, and vmap can do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.last = nn.Parameter(torch.ones(COLUMNS)), nn.Linear(COLUMNS, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(rows * torch.sin(self.shift))


MODELS = {"mlp": (mlp, (COLUMNS,)), "cnn": (cnn, (1, 4, 4)), "tied": (Tied, (COLUMNS,)), "own": (Recentred, (COLUMNS,))}


def learner_of(module: nn.Module, rows: Part, **train: object) -> TorchLearner:
    return TorchLearner(module, rows, TrainSection.model_validate(train), seed=0, name="a")


def gradients_of(learner: TorchLearner, private: ExampleRound) -> list[Tensor]:
    """What the rules and the optimizer get to see in each step."""
    seen: list[Tensor] = []
    learner.train(0, lambda grads, values: seen.append(grads.clone()), None, private)
    return seen


def clipped_by_hand(module: nn.Module, rows: Part, chosen: Tensor, clip: float) -> Tensor:
    """Σ g_i min(1, C / ‖g_i‖), one row after the other, over the module's parameters in the order of a learner."""
    names = sorted(dict(module.named_parameters()))
    total = torch.zeros(sum(dict(module.named_parameters())[name].numel() for name in names))
    for row in chosen.tolist():
        module.zero_grad()
        loss_of(module(rows.train.inputs[row : row + 1]), rows.train.targets[row : row + 1], "sum").backward()
        grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in module.named_parameters()}
        gradient = torch.cat([grads[name].flatten() for name in names])
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total


# -- Example by example ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_is_the_sum_of_clipped_rows_over_the_rows_expected(model: str) -> None:
    """For layers that Opacus knows, for ones that it does not, for tied weights and beside frozen ones."""
    make, shape = MODELS[model]
    rows = part(shape=shape)
    learner = learner_of(make(), rows, batch_size=20, local_steps=1, lr=0.1)
    gradients = learner.hide_rows(0.7, Mechanism(NONE, 20 / ROWS), 20)
    random = bytes(32)
    (chosen,) = ExampleRound(gradients, Randomness(random)).batches(ROWS, 1)
    (found,) = gradients_of(learner, ExampleRound(gradients, Randomness(random)))
    fresh = make()
    assert torch.allclose(found, clipped_by_hand(fresh, rows, chosen, 0.7) / 20, atol=1e-6)
    assert not torch.allclose(found, clipped_by_hand(fresh, rows, chosen, 7.0) / 20, atol=1e-4), "nothing was clipped"


def test_the_noise_that_is_added_is_the_noise_that_is_accounted_for() -> None:
    """χ² and Kolmogorov-Smirnov of what is left of each gradient without the clipped sum, against N(0, (σC/B)²)."""
    rows, sigma, clip, batch = part(), 1.3, 0.6, 20
    learner = learner_of(mlp(), rows, batch_size=batch, local_steps=6, lr=1e-30)  # it stays where it is
    gradients = learner.hide_rows(clip, Mechanism(sigma, batch / ROWS), batch)
    seed = bytes(range(32))
    drawn = list(ExampleRound(gradients, Randomness(seed)).batches(ROWS, 6))
    steps = gradients_of(learner, ExampleRound(gradients, Randomness(seed)))
    module = mlp()
    noise = torch.cat(
        [step - clipped_by_hand(module, rows, chosen, clip) / batch for step, chosen in zip(steps, drawn, strict=True)]
    ).double()
    expected = sigma * clip / batch
    tail = stats.chi2(len(noise)).cdf(float((noise**2).sum()) / expected**2)
    assert UNLIKELY < tail < 1 - UNLIKELY
    assert stats.kstest(noise.numpy() / expected, "norm").pvalue > UNLIKELY
    first, second = (step.numpy() for step in noise.split(len(noise) // 2))
    assert stats.pearsonr(first, second).pvalue > UNLIKELY, "each step has noise of its own"


def test_a_row_of_whatever_size_moves_the_sum_by_no_more_than_the_clipping_norm() -> None:
    found = []
    for scale in (0.0, 1e6):
        rows = part()
        rows.train.inputs[7] *= scale
        learner = learner_of(mlp(), rows, batch_size=100, local_steps=1)
        found += gradients_of(
            learner, ExampleRound(learner.hide_rows(0.5, Mechanism(NONE, 1.0), ROWS), Randomness(bytes(32)))
        )
    apart = float((found[0] - found[1]).norm())
    assert 0.1 * 0.5 / ROWS < apart <= 2 * 0.5 / ROWS * (1 + 1e-4), "once with it as it is, once as nothing"


def test_each_row_is_drawn_on_its_own_with_its_probability() -> None:
    """Batches of one size would not be: their sizes vary as those of a binomial do."""
    gradients = learner_of(mlp(), part(), batch_size=20).hide_rows(1.0, Mechanism(1.0, 1 / 3), 20)
    batches = list(ExampleRound(gradients, Randomness(b"\1" * 32)).batches(ROWS, 2000))
    sizes = np.array([len(batch) for batch in batches])
    assert abs(sizes.mean() - 20) < 5 * math.sqrt(ROWS * 2 / 9 / 2000)
    spread = sizes.var(ddof=1) / (ROWS * 2 / 9)
    assert abs(spread - 1) < 5 * math.sqrt(2 / 2000)
    each = np.bincount(torch.cat(batches).numpy(), minlength=ROWS)
    assert stats.chisquare(each).pvalue > UNLIKELY
    together = sum(bool((batch == 3).any() and (batch == 4).any()) for batch in batches)
    assert stats.binomtest(together, 2000, 1 / 9).pvalue > UNLIKELY


def test_a_batch_without_rows_is_noise_alone() -> None:
    learner = learner_of(mlp(), part(), batch_size=1, local_steps=1, lr=0.1)
    gradients = learner.hide_rows(2.0, Mechanism(3.0, 1e-12), 1)
    private = ExampleRound(gradients, Randomness(bytes(32)))
    (found,) = gradients_of(learner, private)
    assert UNLIKELY < stats.chi2(len(found)).cdf(float((found.double() / 6.0).square().sum())) < 1 - UNLIKELY


# -- Update by update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "left"), [(10.0, 0.25), (0.1, 0.1), (0.0, 0.0)])
def test_an_update_is_clipped_as_a_whole_and_noised(length: float, left: float) -> None:
    direction = torch.nn.functional.normalize(torch.randn(5000, generator=torch.Generator().manual_seed(1)), dim=0)
    clipped = blur(direction * length, 0.25, NONE, Randomness(bytes(32)))
    assert float(clipped.norm()) == pytest.approx(left, rel=1e-5, abs=1e-9)
    assert torch.allclose(clipped, direction * left, atol=1e-6)
    noise = (blur(direction * length, 0.25, 1.7, Randomness(bytes(32))) - clipped).double() / (1.7 * 0.25)
    assert UNLIKELY < stats.chi2(5000).cdf(float(noise.square().sum())) < 1 - UNLIKELY
    assert stats.kstest(noise.numpy(), "norm").pvalue > UNLIKELY


def test_the_random_numbers_are_what_they_are_said_to_be() -> None:
    random = Randomness(b"\7" * 32)
    uniform, normal = random.uniform("rows", 20_001), random.normal("noise", 20_001)
    assert stats.kstest(uniform, "uniform").pvalue > UNLIKELY and stats.kstest(normal, "norm").pvalue > UNLIKELY
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.pearsonr(normal[:10_000], normal[10_001:]).pvalue > UNLIKELY, "sine and cosine of one length"
    again = Randomness(b"\7" * 32)
    pieces = np.concatenate([again.uniform("rows", 1), again.uniform("rows", 20_000)])
    assert (pieces == uniform).all() and random.uniform("rows", 1)[0] not in uniform


# -- A trainer -------------------------------------------------------------------------------------------------------

EXAMPLE = ("privacy.dp=example", "privacy.noise=1.5", "privacy.delta=1e-3")
UPDATE = ("privacy.dp=update", "privacy.noise=0.5", "privacy.delta=1e-3", "privacy.clip=0.3")
SMALL = ("data.split=iid", "topology.graph=ring", "topology.nodes=4", "model.name=logistic", "train.rounds=6")


def experiment_of(*settings: str) -> Experiment:
    return load(settings=(*SMALL, *settings))


def trainer_of(experiment: Experiment, ledger: Ledger | None = None, **more: PrivacySection) -> Trainer:
    learner = make_learner(experiment, load_parts(experiment)[0], "node-0")
    return Trainer(learner, experiment, "node-0", varies=False, ledger=ledger, **more)


def job(round: int) -> Compute:
    return Compute(round, (), 1.0, 1.0, True)


def train(trainer: Trainer, round: int) -> Trained:
    return trainer.train(job(round), lambda: 0.0)


@pytest.mark.parametrize("settings", [EXAMPLE, UPDATE])
def test_only_the_secret_of_a_run_tells_its_randomness(settings: tuple[str, ...]) -> None:
    """Two runs of one experiment and one seed differ; with another seed of the experiment, only by what it says."""
    vectors = []
    for secret in (b"\1" * 32, b"\1" * 32, b"\2" * 32):
        trainer = trainer_of(experiment_of(*settings), Ledger(secret))
        train(trainer, 0)
        vectors.append(trainer.learner.vector.clone())
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])
    apart = float((vectors[0] - vectors[2]).norm())
    assert apart > 0.01


def test_with_the_same_secret_every_round_state_and_setting_has_noise_of_its_own() -> None:
    """Or the difference of two releases would be free of noise."""

    def noise(*settings: str, round: int = 0, start: float = 0.0) -> Tensor:
        trainer = trainer_of(experiment_of(*UPDATE, "train.lr=1e-30", *settings), Ledger(bytes(32)))
        trainer.learner.vector.add_(start)
        before = trainer.learner.vector.clone()
        train(trainer, round)
        return trainer.learner.vector - before

    first = noise()
    assert float(first.norm()) > 0.1
    assert torch.allclose(first, noise())
    others = [noise(round=1), noise(start=1e-3), noise("train.batch_size=31"), noise("privacy.delta=1e-4")]
    for other in others:
        assert abs(float(torch.nn.functional.cosine_similarity(first, other, dim=0))) < 0.7
        assert float((first - other).norm()) > 0.1


def test_an_update_leaves_only_clipped_and_noised_and_training_goes_on_from_that() -> None:
    """Were the vector itself not changed, the next round's difference would give the noise away."""
    experiment, plain = experiment_of(*UPDATE), experiment_of()
    trainer, without = trainer_of(experiment), trainer_of(plain)
    start = trainer.learner.vector.clone()
    train(trainer, 0), train(without, 0)
    learnt = without.learner.vector - start
    assert float(learnt.norm()) > 0.3
    noise = (trainer.learner.vector - start - learnt * (0.3 / learnt.norm())).double() / (0.5 * 0.3)
    assert UNLIKELY < stats.chi2(len(noise)).cdf(float(noise.square().sum())) < 1 - UNLIKELY
    assert torch.equal(trainer.public, trainer.learner.vector)


def test_what_stays_at_the_node_gets_no_noise_from_update_level_privacy() -> None:
    experiment = experiment_of(*UPDATE, "mix.share=output.bias", "train.lr=1e-30")
    trainer = trainer_of(experiment)
    before = trainer.learner.named_tensors(trainer.learner.vector)
    train(trainer, 0)
    after = trainer.learner.named_tensors(trainer.learner.vector)
    assert torch.equal(before["output.weight"], after["output.weight"])
    assert not torch.equal(before["output.bias"], after["output.bias"])
    assert trainer.public.numel() == 2


@pytest.mark.parametrize("settings", [EXAMPLE, UPDATE])
@pytest.mark.parametrize("rule", ["quasi-global", "led"])
def test_rules_learn_from_noised_numbers_only(rule: str, settings: tuple[str, ...]) -> None:
    """A node alone with a rule, replayed by whoever knows its vectors: nothing else of its rows goes into them."""
    chosen = {
        "quasi-global": ("mix.momentum=quasi-global",),
        "led": ("mix.correction=led", "topology.weights=lazy", "train.local_steps=3"),
    }[rule]
    trainer = trainer_of(experiment_of(*settings, *chosen))
    for round in range(3):
        train(trainer, round)
        sent, memory = trainer.public.clone(), {k: v.clone() for k, v in trainer.state().items() if "rule." in k}
        other = torch.randn(len(sent), generator=torch.Generator().manual_seed(round))
        start = trainer._memory["start"].clone() if "start" in trainer._memory else None
        trainer.fold(job(round + 1), [Term("b", 0.5, other)], lambda: 0.0)
        mixed = 0.5 * sent + 0.5 * other
        rate, steps = trainer.learner.rate(round), trainer.learner.steps
        if rule == "led":
            dual = memory["rule.dual"] + (sent - mixed) / rate
            assert torch.allclose(trainer.state()["rule.dual"], dual, atol=1e-4)
        else:
            assert start is not None
            momentum = 0.9 * memory["rule.momentum"] + 0.1 * (start - mixed) / (rate * steps)
            assert torch.allclose(trainer.state()["rule.momentum"], momentum, atol=1e-4)


def test_a_round_that_only_mixes_costs_nothing_and_gets_no_noise() -> None:
    experiment = experiment_of(*UPDATE, "privacy.mixings=3", "mix.momentum=none")
    assert [round for round in range(7) if trains_in(experiment, round)] == [0, 3, 6]
    trainer = trainer_of(experiment)
    costs, moved = [], []
    for round in range(6):
        before = trainer.learner.vector.clone()
        spent = train(trainer, round).spent
        assert spent is not None
        costs.append(spent.epsilon)
        moved.append(not torch.equal(before, trainer.learner.vector))
    assert moved == [True, False, False, True, False, False]
    assert costs[0] == costs[1] == costs[2] < costs[3] == costs[4] == costs[5]


@pytest.mark.parametrize("settings", [EXAMPLE, UPDATE])
def test_who_has_spent_the_budget_trains_no_more_and_says_so_once(settings: tuple[str, ...]) -> None:
    free = trainer_of(experiment_of(*settings))
    costs = [spent.epsilon for round in range(4) if (spent := train(free, round).spent)]
    budget = (costs[1] + costs[2]) / 2
    trainer = trainer_of(experiment_of(*settings, f"privacy.max_epsilon={budget}"))
    said, moved = [], []
    for round in range(4):
        before = trainer.learner.vector.clone()
        trained = train(trainer, round)
        assert trained.spent is not None and trained.spent.epsilon == pytest.approx(costs[min(round, 1)])
        said.append(trained.budget_spent)
        moved.append(not torch.equal(before, trainer.learner.vector))
        assert math.isfinite(trained.train_loss)
    assert moved == [True, True, False, False] and said == [False, False, True, False]


@pytest.mark.parametrize("settings", [EXAMPLE, UPDATE])
def test_who_only_averages_learns_nothing_and_spends_nothing(settings: tuple[str, ...]) -> None:
    trainer = trainer_of(experiment_of(*settings, "train.local_steps=0"))
    before = trainer.learner.vector.clone()
    assert train(trainer, 0).spent is None and torch.equal(trainer.learner.vector, before)


def test_a_node_may_be_stricter_than_the_experiment() -> None:
    own = PrivacySection(dp="example", noise=4.0, delta=1e-3, clip=0.1)
    for settings in ((), EXAMPLE):
        spent = train(trainer_of(experiment_of(*settings), privacy=own), 0).spent
        assert (
            spent
            == train(trainer_of(experiment_of("privacy.dp=example", "privacy.noise=4", "privacy.delta=1e-3")), 0).spent
        )


def test_a_target_is_what_all_rounds_together_cost() -> None:
    trainer = trainer_of(experiment_of("privacy.dp=example", "privacy.epsilon=2.5", "privacy.delta=1e-3"))
    costs = [
        trained.spent.epsilon for r in range(6) if (trained := train(trainer, r)).spent and not trained.budget_spent
    ]
    assert len(costs) == 6 and 2.45 < costs[-1] <= 2.5
    (note,) = [note for note in trainer.notes if "privacy" in note]
    assert "example-level" in note and "one row" in note and "noise of" in note and "update" not in note


# -- What is refused -------------------------------------------------------------------------------------------------


class Centred(nn.Module):
    """The mean of a batch is in every row's answer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(COLUMNS, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(rows - rows.mean(dim=0))


class Remembering(nn.Module):
    """A running mean, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(COLUMNS, 3)
        self.register_buffer("mean", torch.zeros(COLUMNS))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(rows.mean(dim=0).detach(), 0.1)
        return self.last(rows)


class Branching(nn.Module):
    """What vmap cannot do: to look at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(COLUMNS)), nn.Linear(COLUMNS, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(rows * self.scale if float(rows.sum()) > -1e9 else rows)


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(COLUMNS, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_batch_norm, r"batch norm \(the model's 1\).*use GroupNorm"),
        (
            lambda: nn.Sequential(nn.Linear(COLUMNS, 8), nn.InstanceNorm1d(8, affine=True, track_running_stats=True)),
            "use layers that Opacus knows",
        ),
        (Centred, "answers a row otherwise when others are in its batch"),
        (Remembering, "'mean' while it trains.*GroupNorm"),
        (Branching, "gradient of each row alone.*use layers that Opacus knows, or privacy.dp = 'update'"),
    ],
)
def test_a_model_that_cannot_hide_a_row_is_refused_in_one_line(make: type[nn.Module], why: str) -> None:
    learner = learner_of(make(), part(), batch_size=20)
    with pytest.raises(BadInput, match=why) as error:
        learner.hide_rows(1.0, Mechanism(1.0, 1 / 3), 20)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.fixture
def without_opacus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "opacus", None)
    yield


def test_without_opacus_it_says_what_to_install(without_opacus: None) -> None:
    with pytest.raises(BadInput, match=r"pip install 'p2pfl-mesh\[private\]'"):
        trainer_of(experiment_of(*EXAMPLE))
    trainer_of(experiment_of())


def test_a_delta_that_would_show_a_row_is_refused() -> None:
    with pytest.raises(BadInput, match=r"privacy.delta = 0.1 .* below 1 / rows"):
        trainer_of(experiment_of("privacy.dp=example", "privacy.noise=1", "privacy.delta=0.1"))


def test_lockstep_says_which_engine_can(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="use --engine event"):
        lockstep.simulate(experiment_of(*EXAMPLE), create_run(tmp_path / "run"), lambda line: None)


# -- A whole network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [EXAMPLE, UPDATE])
def test_every_line_and_the_summary_say_what_was_spent_and_of_which_kind(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    run = create_run(tmp_path / "run")
    experiment = experiment_of(*settings, "train.rounds=3", 'faults=[{kind="restart", node=1, round=2, seconds=1}]')
    simulate(experiment, run, lambda line: None)
    again = create_run(tmp_path / "again")
    simulate(experiment, again, lambda line: None)
    assert again.node("node-1").metrics.read_bytes() == run.node("node-1").metrics.read_bytes()
    unit = experiment.privacy.dp
    spent: dict[str, list[float]] = {}
    for name in experiment.topology.names:
        for line in run.node(name).read_metrics():
            told = line["epsilon"]
            assert isinstance(told, dict) and told["unit"] == unit and told["delta"] == 1e-3
            assert told["spent"] == min(told["rdp"], told["prv"])
            spent.setdefault(name, []).append(told["spent"])
    assert all(costs == sorted(costs) and len(costs) >= 2 for costs in spent.values())
    summary = read_json(run.summary)
    assert number(summary, "epsilon", "max") == max(max(costs) for costs in spent.values())
    assert summary["epsilon"]["unit"] == unit and number(summary, "epsilon", "delta") == 1e-3
    other = {"example": "update-level", "update": "example-level"}[unit]
    text = "".join(path.read_text() for path in run.path.rglob("*.jsonl"))
    assert f"{unit}-level" in text and other not in text
    history = read_history(run.path, "run")
    (curve,) = [picture for picture in pictures(history) if picture.name == "epsilon"]
    assert {"example": "hides one row", "update": "hides the whole node"}[unit] in curve.caption
    (most,) = [value for what, value in _facts(history) if what.startswith("privacy ε, hides")]
    assert most == f"{max(max(costs) for costs in spent.values()):.3g} at δ = 0.001"


def accuracy(name: str, seed: int, folder: Path) -> tuple[float, float | None]:
    from p2pfl.config import find_experiment

    experiment = load(find_experiment(name), [f"seed={seed}", "train.evaluate_every=100"])
    summary = simulate(experiment, create_run(folder / f"{name}-{seed}"), lambda line: None).summary
    return number(summary, "metrics", "accuracy", "mean") or 0.0, number(summary, "epsilon", "max")


def test_hospitals_hide_each_patient_and_lose_little_by_it(tmp_path: Path) -> None:
    """ε ≤ 3 at δ = 1e-3, within four points of the run without: over five seeds 0.966 and 0.968 were measured."""
    private = [accuracy("hospitals-private", seed, tmp_path) for seed in range(3)]
    plain = [accuracy("hospitals", seed, tmp_path) for seed in range(3)]
    assert all(epsilon is not None and epsilon <= 3 for _, epsilon in private)
    assert all(epsilon is None for _, epsilon in plain)
    mean = sum(reached for reached, _ in private) / 3
    assert mean > sum(reached for reached, _ in plain) / 3 - 0.02, "half of what it may lose"
    assert min(reached for reached, _ in private) > 0.93
