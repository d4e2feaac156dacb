"""What the papers prove of each rule, on quadratics f_i(x) = a_i/2 ‖x - b_i‖², where every answer has a closed form.

X (n, 1) holds all nodes; the rules are the very functions that one node calls on its (P,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from p2pfl import rules
from p2pfl.config import TopologySection, TrainSection
from p2pfl.learner import Stretch, optimizer_memory, sgd_step
from p2pfl.rules import Memory, Recipe
from p2pfl.topology import build
from p2pfl.topology.matrix import mixing_matrix

SEED = 5
WIDE = torch.float64


def matrix(graph: str, nodes: int, weights: str = "metropolis", round: int = 0, **keys: object) -> Tensor:
    topology = build(TopologySection.model_validate({"graph": graph, "nodes": nodes, **keys}), 0)
    drawn = topology.at(round)
    return torch.from_numpy(mixing_matrix(drawn, weights, dict.fromkeys(drawn, 1.0)).toarray())


def problem(nodes: int) -> tuple[Tensor, Tensor]:
    """Curvatures in [0.5, 1.5) and optima of the nodes, (n, 1) each."""
    random = np.random.default_rng(SEED)
    a, b = random.uniform(0.5, 1.5, (nodes, 1)), random.normal(0, 3, (nodes, 1))
    return torch.from_numpy(a), torch.from_numpy(b)


def optimum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / a.sum()


Observer = Callable[[Memory, Tensor, Tensor], None]  # (memory, vectors at the start of the round, their gradients)


def train(
    recipe: Recipe,
    mix: Tensor | Callable[[int], Tensor],
    a: Tensor,
    b: Tensor,
    *,
    rate: float,
    steps: int = 1,
    rounds: int,
    start: Tensor | None = None,
    memory: Memory | None = None,
    observe: Observer | None = None,
    history: list[Tensor] | None = None,
) -> Tensor:
    """So many rounds, as `trainer` goes through one; X (n, 1) after the last."""
    x = torch.zeros_like(b) if start is None else start.clone()
    memory = {name: torch.zeros_like(x) for name in rules.memory_names(recipe)} if memory is None else memory
    for round in range(rounds):
        w = mix(round) if callable(mix) else mix
        rules.begin(recipe, memory, x)
        for _ in range(steps):
            grads = a * (x - b)
            rules.steer(recipe, memory, grads, x, rate, steps)
            x -= rate * grads
        second = rules.extra(recipe, memory, x, rate, steps)
        assert (second is not None) == (rules.vectors_sent(recipe) == 2)
        mixed_second = None if second is None else w @ second
        rules.absorb(recipe, memory, x, w @ x, second, mixed_second, rate, steps)
        if observe is not None:
            observe(memory, x, a * (x - b))
        if history is not None:
            history.append(x.clone())
    return x


def distance(x: Tensor, y: Tensor | float) -> float:
    return float((x - y).abs().max())


def averaging(w: Tensor, a: Tensor, b: Tensor, rate: float) -> Tensor:
    """Where D-PSGD ends that trains first and mixes then: (I - W + η W D)⁻¹ η W D b."""
    eye, d = torch.eye(len(w), dtype=WIDE), torch.diag(a[:, 0])
    return torch.linalg.solve(eye - w + rate * w @ d, rate * w @ d @ b)


# -- Averaging alone -------------------------------------------------------------------------------------------------


def test_averaging_ends_where_training_before_mixing_must() -> None:
    w, (a, b) = matrix("ring", 16), problem(16)
    x = train(Recipe(), w, a, b, rate=0.1, rounds=4000)
    assert distance(x, averaging(w, a, b, 0.1)) < 1e-9
    mixing_first = torch.linalg.solve(torch.eye(16, dtype=WIDE) - w + 0.1 * torch.diag(a[:, 0]), 0.1 * a * b)
    assert distance(x, mixing_first) > 0.1  # the other order ends elsewhere, and further from the optimum
    assert distance(x, optimum(a, b)) < distance(mixing_first, optimum(a, b))


def test_the_bias_of_two_nodes_in_closed_form() -> None:
    a, b = torch.tensor([[1.0], [3.0]], dtype=WIDE), torch.tensor([[0.0], [1.0]], dtype=WIDE)
    w = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=WIDE)
    x = train(Recipe(), w, a, b, rate=0.1, rounds=2000)
    assert float(x[0] - x[1]) == pytest.approx(-0.130435, abs=5e-7)
    assert float(x.mean()) - 0.75 == pytest.approx(-0.032609, abs=5e-7)


@pytest.mark.parametrize("rows", [None, (10.0, 1.0, 1.0, 4.0)])
def test_federated_averaging_drifts_to_its_own_point(rows: tuple[float, ...] | None) -> None:
    """sum c_i b_i / sum c_i with c_i = 1 - (1 - η a_i)^H, each weighed by its rows: not the optimum."""
    a, b = problem(4)
    shares = torch.tensor(rows or (1.0,) * 4, dtype=WIDE) / sum(rows or (1.0,) * 4)
    x = train(Recipe(), shares.repeat(4, 1), a, b, rate=0.3, steps=5, rounds=200)
    c = shares[:, None] * (1 - (1 - 0.3 * a) ** 5)
    assert distance(x, (c * b).sum() / c.sum()) < 1e-12
    assert distance(x, optimum(a, b)) > 1e-2


def test_the_proximal_term_trades_drift_for_bias() -> None:
    """Once each node has come to the end of its own problem: sum k_i b_i / sum k_i with k = a / (a + µ)."""
    a, b = problem(8)
    j = torch.full((8, 8), 1 / 8, dtype=WIDE)
    x = train(Recipe(proximal=2.0), j, a, b, rate=0.2, steps=100, rounds=100)
    k = a / (a + 2.0)
    assert distance(x, (k * b).sum() / k.sum()) < 1e-12


# -- Momentum --------------------------------------------------------------------------------------------------------


def test_quasi_global_momentum_has_the_bias_of_a_rate_of_one_plus_beta() -> None:
    w, (a, b) = matrix("ring", 16), problem(16)
    for beta in (0.5, 0.9):
        x = train(Recipe(momentum="quasi-global", beta=beta), w, a, b, rate=0.05, rounds=6000)
        assert distance(x, averaging(w, a, b, 0.05 * (1 + beta))) < 1e-9


def test_local_momentum_has_the_bias_of_a_rate_ten_times_as_large() -> None:
    """η / (1 - β): the network's own momentum exists because of this."""
    w, (a, b) = matrix("ring", 16), problem(16)
    section = TrainSection(momentum=0.9)
    x = torch.zeros_like(b)
    stretch = Stretch(x, torch.zeros_like(x), optimizer_memory(section, x))
    for _ in range(4000):
        stretch.grads.copy_(a * (x - b))
        sgd_step(stretch, section, 0.01)
        x.copy_(w @ x)
    assert distance(x, averaging(w, a, b, 0.01 / (1 - 0.9))) < 1e-9


def test_quasi_global_momentum_step_by_step() -> None:
    """By hand, β = ¼, η = 0.1, H = 2, a gradient of 1 throughout, and nobody to mix with."""
    recipe = Recipe(momentum="quasi-global", beta=0.25)
    memory = {name: torch.zeros(1, dtype=WIDE) for name in rules.memory_names(recipe)}
    x, seen = torch.zeros(1, dtype=WIDE), []
    for _ in range(2):
        rules.begin(recipe, memory, x)
        for _ in range(2):
            grads = torch.ones(1, dtype=WIDE)
            rules.steer(recipe, memory, grads, x, 0.1, 2)
            x -= 0.1 * grads
            seen.append(float(grads))
        rules.absorb(recipe, memory, x, x.clone(), None, None, 0.1, 2)
        seen.append(float(memory["momentum"]))
    # 1 + ¼ twice; ¾ of the mean direction; then 1.25 and 1/16 of that in both steps; ¼ of the old and ¾ of the new.
    assert seen == pytest.approx([1.25, 1.25, 0.9375, 1.30859375, 1.30859375, 1.2158203125], abs=1e-15)


# -- Corrections -----------------------------------------------------------------------------------------------------

EXACT = [
    # recipe, graph, weights, steps a round
    (Recipe(correction="led"), "torus", "lazy", 5),
    (Recipe(correction="led"), "torus", "lazy", 1),
    (Recipe(correction="k-gt"), "ring", "metropolis", 5),
    (Recipe(correction="gradient-tracking"), "ring", "metropolis", 1),
    (Recipe(correction="gradient-tracking"), "one-peer-exponential", "metropolis", 1),
    (Recipe(correction="k-gt"), "one-peer-hypercube", "metropolis", 3),
]


@pytest.mark.parametrize(("recipe", "graph", "weights", "steps"), EXACT)
def test_corrections_remove_the_bias_at_a_constant_rate(recipe: Recipe, graph: str, weights: str, steps: int) -> None:
    a, b = problem(16)
    mixes = [matrix(graph, 16, weights, round) for round in range(4)]

    def invariant(memory: Memory, x: Tensor, grads: Tensor) -> None:
        for name in ("dual", "correction"):
            if name in memory:
                assert abs(float(memory[name].sum())) < 1e-9
        if "tracker" in memory:
            assert float(memory["tracker"].sum()) == pytest.approx(float(memory["gradient"].sum()), abs=1e-9)

    x = train(recipe, lambda t: mixes[t % 4], a, b, rate=0.05, steps=steps, rounds=4000, observe=invariant)
    assert distance(x, optimum(a, b)) < 1e-9
    assert distance(train(Recipe(), mixes[0], a, b, rate=0.05, steps=steps, rounds=2000), optimum(a, b)) > 1e-2


def test_as_the_rate_decays_local_exact_diffusion_goes_to_the_optimum_and_not_away_from_it() -> None:
    """The dual stands for gradients: if it did not shrink with the rate, it would push ever harder than they do."""
    w, (a, b) = matrix("ring", 16, "lazy"), problem(16)
    recipe = Recipe(correction="led")
    memory = {name: torch.zeros_like(b) for name in rules.memory_names(recipe)}
    x, errors = torch.zeros_like(b), []
    for rate in (0.1, 0.05, 0.02, 0.01):
        x = train(recipe, w, a, b, rate=rate, steps=3, rounds=400, start=x, memory=memory)
        errors.append(distance(x, optimum(a, b)))
        assert errors == sorted(errors, reverse=True) and abs(float(memory["dual"].sum())) < 1e-9


def d_squared(w: Tensor, a: Tensor, b: Tensor, rate: float, rounds: int) -> list[Tensor]:
    """x_{t+1} = W (2 x_t - x_{t-1} - η (g_t - g_{t-1})), from x_1 = W (x_0 - η g_0). Tang et al. 2018."""
    before = torch.zeros_like(b)
    x = w @ (before - rate * a * (before - b))
    iterates = [x]
    for _ in range(rounds - 1):
        x, before = w @ (2 * x - before - rate * (a * (x - b) - a * (before - b))), x
        iterates.append(x)
    return iterates


def test_with_one_step_local_exact_diffusion_is_d_squared() -> None:
    w, (a, b) = matrix("torus", 16, "lazy"), problem(16)
    history: list[Tensor] = []
    train(Recipe(correction="led"), w, a, b, rate=0.1, rounds=50, history=history)
    for x, y in zip(history, d_squared(w, a, b, 0.1, 50), strict=True):
        assert distance(x, y) < 1e-12


def test_without_lazy_weights_it_must_diverge_and_on_periodic_single_peers_too() -> None:
    """λ_min of the torus is -0.6, below -1/3; that of one-peer rounds -0 and 0 in turn, whose product is no help."""
    a, b = problem(16)
    torus, periodic = matrix("torus", 16), [matrix("one-peer-exponential", 16, round=t) for t in range(4)]
    assert float(torch.linalg.eigvalsh(torus)[0]) == pytest.approx(-0.6)
    for mix in (torus, lambda t: periodic[t % 4]):
        assert distance(train(Recipe(correction="led"), mix, a, b, rate=0.1, rounds=400), 0.0) > 1e6


def lossy(w: Tensor, share: float, both_ways: bool) -> Callable[[int], Tensor]:
    """W with this share of its edges lost in each round; what is missing stays with oneself."""
    random = torch.Generator().manual_seed(SEED)

    def of(_: int) -> Tensor:
        kept = (torch.rand(w.shape, generator=random, dtype=WIDE) >= share).to(WIDE)
        if both_ways:
            kept = torch.triu(kept, 1) + torch.triu(kept, 1).T
        off = (w - torch.diag(torch.diag(w))) * kept
        return off + torch.diag(1 - off.sum(dim=1))

    return of


@pytest.mark.parametrize("correction", ["led", "k-gt"])
def test_losses_that_both_ends_agree_on_are_harmless_one_sided_ones_add_up(
    correction: rules.Correction,
) -> None:
    a, b = problem(16)
    w, best = matrix("torus", 16, "lazy"), optimum(a, b)

    def error(both_ways: bool, leak: float = 0.0) -> float:
        recipe, mix = Recipe(correction=correction, leak=leak), lossy(w, 0.2, both_ways)
        return distance(train(recipe, mix, a, b, rate=0.05, steps=2, rounds=1200), best)

    assert error(both_ways=True) < 1e-9
    one_sided = error(both_ways=False)
    assert one_sided > 0.05
    if correction == "led":  # what k-gt sums up stops growing once all go the same way: a leak adds a bias of its own
        assert error(both_ways=False, leak=0.01) < one_sided / 2


@pytest.mark.parametrize(
    ("correction", "before", "after"),
    [
        ("led", {"dual": 8.0}, 6.0 + (5.0 - 3.0) / 0.5),  # ¾ z + (p - W p) / η
        ("k-gt", {"correction": 8.0}, 6.0 - 2.0 + 1.0),  # ¾ c - Δ + W Δ
        ("gradient-tracking", {"tracker": 0.0, "gradient": 5.0}, 0.75 * 1.0 + 0.25 * 5.0),  # ¾ W y + ¼ g
    ],
)
def test_a_leak_forgets_a_quarter_of_a_correction(
    correction: rules.Correction, before: dict[str, float], after: float
) -> None:
    memory = {name: torch.tensor([value]) for name, value in before.items()}
    sent, mixed, sent_second, mixed_second = (torch.tensor([value]) for value in (5.0, 3.0, 2.0, 1.0))
    recipe = Recipe(correction=correction, leak=0.25)
    rules.absorb(recipe, memory, sent, mixed, sent_second, mixed_second, 0.5, 1)
    assert next(iter(memory.values())).item() == after and sent.item() == 3.0


@pytest.mark.parametrize(("correction", "steps"), [("led", 3), ("k-gt", 3), ("gradient-tracking", 1)])
def test_who_is_left_ends_at_its_own_optimum_only_if_the_corrections_start_again(
    correction: rules.Correction, steps: int
) -> None:
    """What the dead had in their corrections is missing in the sum of those who live."""
    a, b = problem(16)
    recipe = Recipe(correction=correction)
    memory = {name: torch.zeros_like(b) for name in rules.memory_names(recipe)}
    x = train(recipe, matrix("torus", 16, "lazy"), a, b, rate=0.05, steps=steps, rounds=300, memory=memory)
    left = slice(0, 12)
    ends = []
    for restarts in (True, False):
        kept = {name: tensor[left].clone() for name, tensor in memory.items()}
        if restarts:
            rules.restart(recipe, kept)
        w = matrix("ring", 12, "lazy")
        end = train(recipe, w, a[left], b[left], rate=0.05, steps=steps, rounds=6000, start=x[left], memory=kept)
        ends.append(distance(end, optimum(a[left], b[left])))
    assert ends[0] < 1e-9 and ends[1] > 1e-2


def test_a_restart_keeps_the_momentum() -> None:
    recipe = Recipe(momentum="quasi-global")
    memory = {name: torch.ones(3) for name in rules.memory_names(recipe)}
    rules.restart(recipe, memory)
    assert memory["momentum"].tolist() == [1.0] * 3


# -- The outer optimizer ---------------------------------------------------------------------------------------------


def test_nesterov_goes_where_it_must_on_a_constant_slope() -> None:
    """lr 0.7, β 0.9, and each round would go one further by itself: 1.33, 3.227, 5.6343."""
    recipe = Recipe(outer="nesterov", outer_lr=0.7, outer_beta=0.9)
    memory = {name: torch.zeros(1, dtype=WIDE) for name in rules.memory_names(recipe)}
    x, seen = torch.zeros(1, dtype=WIDE), []
    for _ in range(3):
        rules.begin(recipe, memory, x)
        x += 1.0
        start = rules.extra(recipe, memory, x, 0.1, 1)
        assert start is not None
        rules.absorb(recipe, memory, x, x.clone(), start, start.clone(), 0.1, 1)
        seen.append(float(x))
    assert seen == pytest.approx([1.33, 3.227, 5.6343], abs=1e-12)


def test_with_a_rate_of_one_and_no_momentum_the_outer_optimizer_is_averaging() -> None:
    w, (a, b) = matrix("complete", 6), problem(6)
    plain = train(Recipe(), w, a, b, rate=0.2, steps=4, rounds=20)
    outer = train(Recipe(outer="nesterov", outer_lr=1.0, outer_beta=0.0), w, a, b, rate=0.2, steps=4, rounds=20)
    assert distance(plain, outer) < 1e-12


# -- One node, and all of them ---------------------------------------------------------------------------------------

RECIPES = [
    Recipe(proximal=0.3),
    Recipe(momentum="quasi-global", beta=0.8),
    Recipe(proximal=0.1, momentum="quasi-global"),
    Recipe(correction="led", leak=0.1),
    Recipe(correction="gradient-tracking", leak=0.1),
    Recipe(correction="k-gt", leak=0.1),
    Recipe(outer="nesterov"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_nodes_at_once_are_each_node_for_itself_with_its_own_number_of_steps(recipe: Recipe) -> None:
    random = torch.Generator().manual_seed(SEED)
    rows = [torch.rand(4, 7, generator=random) for _ in range(5)]  # (n, P): values, gradients, mixed, second, mixed …
    steps = [1, 2, 5, 3]
    together = {name: torch.rand(4, 7, generator=random) for name in rules.memory_names(recipe)}
    alone = [{name: tensor[i].clone() for name, tensor in together.items()} for i in range(4)]

    def round_of(memory: Memory, values: Sequence[Tensor], count: Tensor | int) -> tuple[Tensor, Tensor]:
        x, grads, mixed, _, mixed_second = (value.clone() for value in values)
        rules.steer(recipe, memory, grads, x, 0.1, count)
        second = rules.extra(recipe, memory, x, 0.1, count)
        rules.absorb(recipe, memory, x, mixed, second, mixed_second, 0.1, count)
        return x, grads

    x, grads = round_of(together, rows, torch.tensor(steps)[:, None])
    for i, memory in enumerate(alone):
        own_x, own_grads = round_of(memory, [row[i] for row in rows], steps[i])
        assert torch.equal(x[i], own_x) and torch.equal(grads[i], own_grads)
        for name, tensor in memory.items():
            assert torch.equal(together[name][i], tensor), name
