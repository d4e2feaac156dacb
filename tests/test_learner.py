"""Local training: the flat vector, the arithmetic of a step, and rounds that repeat and resume to the bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from p2pfl import config
from p2pfl.config import TrainSection
from p2pfl.data import Dataset, Part, load_part
from p2pfl.learner import Learner, TorchLearner, batches, learning_rate, make_learner, pick_device, split_vector
from p2pfl.messages import BadInput, TrainingFailed

CLASSES = ("a", "b", "c")


def part(rows: int = 50, shape: tuple[int, ...] = (4,), classes: tuple[str, ...] = CLASSES) -> Part:
    random = torch.Generator().manual_seed(0)

    def dataset(rows: int) -> Dataset:
        inputs = torch.randn(rows, *shape, generator=random)
        score = inputs.flatten(1).sum(1)
        targets = (score > 0).long() + (score > 1) if classes else score
        return Dataset(inputs, targets, classes)

    return Part(dataset(rows), dataset(30))


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def learner(module: nn.Module | None = None, data: Part | None = None, name: str = "node-0", **train) -> TorchLearner:
    section = TrainSection(batch_size=train.pop("batch_size", 16), **train)
    return TorchLearner(module or net(), data or part(), section, seed=0, name=name)


class Odd(nn.Module):
    """Everything that a module may hold besides trained parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(4, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.z = nn.Linear(5, 3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("constant", torch.full((2,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.norm(self.frozen(self.a(x))))


# -- One flat vector -------------------------------------------------------------------------------------------------


def test_a_torch_learner_is_a_learner() -> None:
    it: Learner = learner()
    assert it.samples == 50
    assert it.schema.size == it.vector.numel() == 4 * 8 + 8 + 8 * 3 + 3
    assert [tensor.name for tensor in it.schema.tensors] == ["0.bias", "0.weight", "3.bias", "3.weight"]


def test_the_modules_parameters_are_views_of_the_vector_both_ways() -> None:
    original = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    it = learner()
    assert all(torch.equal(tensor, original[name]) for name, tensor in it.module.state_dict().items())
    x = torch.ones(2, 4)
    it.vector.zero_()
    assert it.module(x).abs().max() == 0
    with torch.no_grad():
        it.module[3].bias.fill_(7)
    assert sorted(set(it.vector.tolist())) == [0, 7]
    assert it.module(x).tolist() == [[7, 7, 7]] * 2


def test_floating_buffers_lie_in_the_vector_and_integer_buffers_do_not() -> None:
    it = learner(Odd())
    names = [tensor.name for tensor in it.schema.tensors]
    assert names == sorted(names)
    assert {"norm.running_mean", "norm.running_var", "constant", "frozen.weight"} <= set(names)
    assert not {"mask", "norm.num_batches_tracked"} & set(names)
    it.train(0)
    views = split_vector(it.vector, it.schema)
    assert views["norm.running_mean"].abs().sum() > 0  # batch norm wrote into the vector
    assert "batch norm" in it.notes[0] and "GroupNorm" in it.notes[0]


def test_frozen_parameters_and_buffers_do_not_move_not_even_by_weight_decay() -> None:
    for optimizer in ("sgd", "adam", "adamw"):
        it = learner(Odd(), optimizer=optimizer, lr=0.01, weight_decay=0.5)
        before = {name: tensor.clone() for name, tensor in split_vector(it.vector, it.schema).items()}
        it.train(0)
        moved = {name for name, tensor in split_vector(it.vector, it.schema).items() if not tensor.equal(before[name])}
        running = {"norm.running_mean", "norm.running_var"}
        assert moved == {"a.bias", "a.weight", "z.bias", "z.weight", "norm.bias", "norm.weight"} | running


def test_named_tensors_are_a_state_dict_of_copies() -> None:
    it = learner(Odd())
    it.train(0)
    tensors = it.named_tensors(it.vector * 2)
    fresh = Odd()
    fresh.load_state_dict(tensors)
    assert torch.equal(fresh.a.weight, it.module.a.weight * 2)
    assert fresh.norm.num_batches_tracked == it.module.norm.num_batches_tracked > 0
    named = it.named_tensors(it.vector)
    it.vector.zero_()
    assert named["a.weight"].abs().sum() > 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in named.values()}) == len(named)  # for safetensors


def test_tied_parameters_lie_in_the_vector_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    module[1].weight = module[0].weight
    it = learner(module)
    assert [tensor.name for tensor in it.schema.tensors] == ["0.bias", "0.weight", "1.bias", "2.bias", "2.weight"]
    it.train(0)
    assert module[1].weight is module[0].weight
    named = it.named_tensors(it.vector)
    assert torch.equal(named["1.weight"], named["0.weight"])


def test_parameters_that_share_memory_otherwise_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    module[1].weight = nn.Parameter(module[0].weight.data[1:])
    with pytest.raises(BadInput, match=r"'0.weight' and '1.weight' share memory"):
        learner(module)


def test_other_precisions_are_converted_with_a_note() -> None:
    module = net().double()
    module[3].half()
    it = learner(module)
    assert it.notes == ("0.weight and 3 more converted to float32, the only precision that nodes exchange",)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    it.train(0)


class Replaces(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(x)


def test_a_tensor_that_left_the_vector_is_told() -> None:
    with pytest.raises(BadInput, match="replaced its tensor 'seen' while training"):
        learner(Replaces()).train(0)
    module = net()
    first = learner(module)
    learner(module, name="node-1")
    with pytest.raises(BadInput, match="a new model for every learner"):
        first.train(0)


def complex_buffer() -> nn.Module:
    module = nn.Linear(4, 3)
    module.register_buffer("turn", torch.tensor(1j))
    return module


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Linear(4, 3).requires_grad_(False), "nothing to train"),
        (complex_buffer(), "'turn' is torch.complex64: only real numbers"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(module: nn.Module, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        learner(module)


def test_batch_norm_never_meets_a_batch_of_one_row() -> None:
    assert math.isfinite(learner(Odd(), part(33)).train(0))  # 16 + 17, not 16 + 16 + 1
    with pytest.raises(BadInput, match="cannot train on batches of one row: use GroupNorm"):
        learner(Odd(), batch_size=1)
    with pytest.raises(BadInput, match="cannot train on batches of one row"):
        learner(Odd(), part(1))


# -- The arithmetic of a step ----------------------------------------------------------------------------------------


def test_one_sgd_step_on_a_linear_model_is_the_closed_form() -> None:
    data = part(20, classes=())
    it = learner(nn.Linear(4, 1), data, batch_size=100, lr=0.05, weight_decay=0.1)  # more than there is: one batch
    x, y = data.train.inputs.double(), data.train.targets.double()
    w, b = it.module.weight.detach().double()[0], it.module.bias.detach().double()
    residual = x @ w + b - y
    w_after = w - 0.05 * (2 * x.T @ residual / 20 + 0.1 * w)
    b_after = b - 0.05 * (2 * residual.mean() + 0.1 * b)
    loss = it.train(0)
    assert loss == pytest.approx(float((residual**2).mean()), rel=1e-6)
    assert torch.allclose(it.module.weight.double()[0], w_after, atol=1e-6)
    assert torch.allclose(it.module.bias.double(), b_after, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "reference"),
    [
        ({"lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ({"lr": 0.1, "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        ),
        ({"optimizer": "adam", "lr": 0.01}, lambda p: torch.optim.Adam(p, lr=0.01)),
        (
            {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1},
            lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        ),
        (
            {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
    ],
)
def test_the_flat_optimizers_are_those_of_torch(keys, reference) -> None:
    data = part()
    it = learner(data=data, local_epochs=5, **keys)
    twin = copy.deepcopy(net())
    optimizer = reference(twin.parameters())
    order = batches_of(it, 0)
    for rows in order:
        optimizer.zero_grad()
        F.cross_entropy(twin(data.train.inputs[rows]), data.train.targets[rows]).backward()
        optimizer.step()
    it.train(0)
    assert len(order) == 20
    for name, tensor in twin.state_dict().items():
        assert torch.allclose(it.module.state_dict()[name], tensor, atol=1e-7, rtol=1e-6), name


def batches_of(it: TorchLearner, round: int, name: str = "node-0") -> list[Tensor]:
    from p2pfl.rng import torch_seed

    return list(batches(it.samples, it.section, torch_seed(0, "batches", name, round)))


@given(st.integers(1, 70), st.integers(1, 80), st.integers(1, 3))
def test_an_epoch_visits_each_row_once(rows: int, batch_size: int, epochs: int) -> None:
    pieces = list(batches(rows, TrainSection(batch_size=batch_size, local_epochs=epochs), 3))
    visits = torch.bincount(torch.cat(pieces), minlength=rows)
    assert visits.tolist() == [epochs] * rows
    assert all(len(piece) <= batch_size + 1 for piece in pieces)
    if batch_size > 1 and rows > 1:
        assert all(len(piece) > 1 for piece in pieces)


@given(st.integers(1, 70), st.integers(1, 80), st.integers(1, 9))
def test_local_steps_run_across_epochs(rows: int, batch_size: int, steps: int) -> None:
    pieces = list(batches(rows, TrainSection(batch_size=batch_size, local_steps=steps), 3))
    assert len(pieces) == steps
    visits = torch.bincount(torch.cat(pieces), minlength=rows)
    assert visits.max() - visits.min() <= 1


def test_learning_rates() -> None:
    def rates(**keys) -> list[float]:
        return [learning_rate(TrainSection(rounds=4, lr=0.8, **keys), round) for round in range(5)]

    assert rates() == [0.8] * 5
    assert rates(schedule="step", step_every=2, step_factor=0.5) == [0.8, 0.8, 0.4, 0.4, 0.2]
    half = 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5))
    assert rates(schedule="cosine") == pytest.approx([0.8, *half, 0.0])


def test_the_schedule_reaches_the_step() -> None:
    moves = []
    for round in (0, 3):
        it = learner(schedule="step", step_every=1, step_factor=0.5, local_steps=1, batch_size=50)
        before = it.vector.clone()
        it.train(round)
        moves.append(float((it.vector - before).norm()))
    assert moves[1] == pytest.approx(moves[0] / 8, rel=1e-4)  # all rows in one batch: the gradient is the same


def test_no_local_step_changes_nothing_and_says_the_loss_that_there_is() -> None:
    it = learner(local_steps=0)
    before, data = it.vector.clone(), part()
    loss = it.train(0)
    torch.testing.assert_close(it.vector, before, rtol=0, atol=0)
    with torch.no_grad():
        expected = F.cross_entropy(it.module(data.train.inputs), data.train.targets)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert it.rounds_done == 1


@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        ([], True),
        (["train.local_steps=0"], False),  # equal vectors would have nothing to agree on
        (["model.start=own"], False),
        (["train.local_steps=0", "model.start=same"], True),
    ],
)
def test_nodes_start_from_the_same_parameters_unless_they_only_average(settings: list[str], alike: bool) -> None:
    experiment = config.load(config.find_experiment("hospitals"), settings)
    a, b, again = (make_learner(experiment, load_part(experiment, 0), name).vector for name in ("a", "b", "a"))
    assert torch.equal(a, again)
    assert torch.equal(a, b) is alike


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(TrainingFailed, match=r"loss became (nan|inf) in round 2: lower train.lr"):
        learner(nn.Linear(4, 1), part(classes=()), lr=1e30, local_epochs=9).train(2)


# -- Scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_a_classifier_in_chunks_and_at_once() -> None:
    data = Part(part().train, part(2500).train)  # three chunks, the last one shorter
    it = learner(net(dropout=0.5), data)
    scores = it.evaluate().values
    with torch.no_grad():
        outputs = it.module.eval()(data.test.inputs)
    assert scores["loss"] == pytest.approx(F.cross_entropy(outputs, data.test.targets).item(), rel=1e-5)
    assert scores["accuracy"] == (outputs.argmax(1) == data.test.targets).double().mean().item()
    assert it.evaluate() == it.evaluate()  # no dropout when it counts


def test_scores_of_a_regression() -> None:
    data = part(classes=())
    it = learner(nn.Linear(4, 1), data)
    it.vector.zero_()
    scores = it.evaluate().values
    assert scores["loss"] == pytest.approx(data.test.targets.square().mean().item(), rel=1e-6)
    assert scores["rmse"] == pytest.approx(math.sqrt(scores["loss"]))
    assert set(scores) == {"loss", "rmse"}


def test_evaluating_changes_nothing() -> None:
    it = learner(Odd())
    it.train(0)
    before = it.state()
    it.evaluate()
    after = it.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    watched, alone = learner(net(0.5)), learner(net(0.5))
    for round in range(2):
        watched.train(round)
        watched.evaluate()
        alone.train(round)
    assert torch.equal(watched.vector, alone.vector)


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [32]}, {"name": "cnn", "channels": [8]}])
def test_an_experiments_learner_learns(model) -> None:
    tree = {"data": {"name": "digits"}, "model": model, "train": {"lr": 0.1, "momentum": 0.9, "device": "cpu"}}
    experiment = config.validate(tree, "test")
    it = make_learner(experiment, load_part(experiment, 0), "node-0")
    before = it.evaluate().values["accuracy"]
    losses = [it.train(round) for round in range(6)]
    assert before < 0.3
    assert it.evaluate().values["accuracy"] > 0.85
    assert losses[-1] < losses[0] / 3


# -- Again, and on -----------------------------------------------------------------------------------------------------

RUNS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "schedule": "cosine"},
    {"optimizer": "adam", "lr": 0.01},
    {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "local_steps": 5},
]


@pytest.mark.parametrize("keys", RUNS)
def test_two_runs_are_bit_equal_whatever_else_draws_from_torch(keys) -> None:
    one, two = learner(net(0.5), **keys), learner(net(0.5), **keys)
    for round in range(4):
        loss = one.train(round)
        torch.rand(7)
        before = torch.get_rng_state()
        assert two.train(round) == loss
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.vector, two.vector)


def test_another_name_or_round_is_another_order_and_another_dropout() -> None:
    it = learner()
    orders = [torch.cat(batches_of(it, *which)).tolist() for which in ((0,), (1,), (0, "node-1"))]
    assert len({tuple(order) for order in orders}) == 3
    rows = part()
    same = Part(Dataset(torch.ones(50, 4), torch.zeros(50, dtype=torch.int64), CLASSES), rows.test)
    vectors = []
    for name, round in (("node-0", 0), ("node-0", 1), ("node-1", 0)):
        it = learner(net(0.5), same, name=name)  # all rows are the same: nothing but the dropout differs
        it.train(round)
        vectors.append(it.vector)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-4)
    assert not torch.allclose(vectors[0], vectors[2], atol=1e-4)


@pytest.mark.parametrize("keys", RUNS)
@pytest.mark.parametrize("make", [lambda: net(0.5), Odd])
def test_a_restored_learner_goes_on_to_the_bit(keys, make) -> None:
    whole = learner(make(), **keys)
    for round in range(3):
        whole.train(round)
    saved = whole.state()
    for round in range(3, 6):
        whole.train(round)
    resumed = learner(make(), **keys)
    resumed.restore(saved)
    assert resumed.rounds_done == 3
    for round in range(3, 6):
        resumed.train(round)
    expected, got = whole.state(), resumed.state()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert resumed.evaluate() == whole.evaluate()


def test_a_state_is_a_copy_that_safetensors_can_keep() -> None:
    from safetensors.torch import load, save

    it = learner(Odd(), optimizer="adam", lr=0.01)
    it.train(0)
    saved = it.state()
    data = save(saved)
    it.train(1)
    again = load(data)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    assert not torch.equal(saved["vector"], it.vector)
    assert {"vector", "rounds", "buffer.mask", "buffer.norm.num_batches_tracked", "optimizer.0.square"} <= saved.keys()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda s: s.pop("vector"), "lacks 'vector'"),
        (lambda s: s.pop("optimizer.0.momentum"), "lacks 'optimizer.0.momentum'"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds 'extra'"),
        (lambda s: s.update(vector=torch.zeros(3)), r"'vector' of the saved state is torch.float32 \(3,\)"),
        (lambda s: s.update(vector=s["vector"].double()), "torch.float64"),
        (lambda s: s.update(rounds=torch.tensor([1])), "'rounds' of the saved state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, why: str) -> None:
    it = learner(momentum=0.9)
    it.train(0)
    saved = it.state()
    other = {name: tensor + 1 for name, tensor in saved.items()}
    spoil(other)
    with pytest.raises(BadInput, match=why):
        it.restore(other)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in it.state().items())


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for text in ("gpu", "cuda:99", ""):
        with pytest.raises(BadInput, match="is not there: this machine has auto, cpu"):
            pick_device(text)
