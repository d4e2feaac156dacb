"""What a rule does beside averaging: to a gradient before each local step, and with the outcome of each mixing.

Pure arithmetic on float tensors of shape (…, P): one node's flat vectors (P,), or those of n nodes at once (n, P), so
that a real node and the lockstep simulation share every line. A round of a node, with its neighbours' vectors x_j:

    begin      note where the round starts
    steer      turn the gradient of each of H local steps into the direction that the optimizer follows
    extra      beside the parameters, a second vector to be mixed in the same way, where the rule needs one
    absorb     the mixed vector, and what the rule learns from the difference that mixing made

What a rule remembers from round to round is a `Memory`: named vectors, all zero at first, which is also what a
restart of the rule makes of them. η is the learning rate of the round, H the number of its local steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from p2pfl.config import Correction, Momentum, Outer

Memory = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The parts that an experiment has chosen; the plain one is local SGD and averaging."""

    proximal: float = 0.0  # µ of FedProx
    momentum: Momentum = "none"
    beta: float = 0.9  # β of the quasi-global momentum
    correction: Correction = "none"
    leak: float = 0.0  # the part of a correction that is forgotten in a round
    outer: Outer = "none"
    outer_lr: float = 0.7
    outer_beta: float = 0.9


def vectors_sent(recipe: Recipe) -> int:
    """How many vectors of P a node sends in a round: 2 where a rule needs `extra`, or else 1."""
    return 2 if recipe.correction in ("gradient-tracking", "k-gt") or recipe.outer != "none" else 1


def memory_names(recipe: Recipe) -> tuple[str, ...]:
    """The vectors that this rule remembers."""
    names = {
        "none": (),
        "led": ("dual",),
        "gradient-tracking": ("tracker", "gradient"),
        "k-gt": ("correction",),
    }[recipe.correction]
    if recipe.momentum == "quasi-global":
        names += ("momentum",)
    if recipe.outer == "nesterov":
        names += ("outer",)
    if recipe.proximal or recipe.momentum != "none" or recipe.correction == "k-gt" or recipe.outer != "none":
        names += ("start",)
    return names


def begin(recipe: Recipe, memory: Memory, values: Tensor) -> None:
    """A round starts at `values`."""
    if "start" in memory:
        memory["start"].copy_(values)


def restart(recipe: Recipe, memory: Memory) -> None:
    """Forget the corrections. Their sum over the network is what they stand on; when members come or go, only zeros
    have the right one. Momentum needs no such sum, and stays."""
    for name in ("dual", "tracker", "gradient", "correction"):
        if name in memory:
            memory[name].zero_()


# -- Before a local step ---------------------------------------------------------------------------------------------


def steer(recipe: Recipe, memory: Memory, grads: Tensor, values: Tensor, rate: float, steps: Tensor | int) -> None:
    """Turn the gradient at `values` into the direction of this local step, in place.

    `steps`: H, a number, or (n, 1) where nodes differ in it.
    """
    if recipe.proximal:
        proximal(grads, values, memory["start"], recipe.proximal)
    match recipe.correction:
        case "led":
            led_direction(grads, memory["dual"], steps)
        case "gradient-tracking":
            tracked_direction(grads, memory["tracker"], memory["gradient"])
        case "k-gt":
            grads.add_(memory["correction"])
        case "none":
            pass
    if recipe.momentum == "quasi-global":
        quasi_global_direction(grads, memory["momentum"], recipe.beta)


def proximal(grads: Tensor, values: Tensor, start: Tensor, weight: float) -> None:
    """g ← g + µ (y − x): the gradient of f(y) + µ/2 ‖y − x‖², with x the start of the round.

    FedProx: Li et al., Federated Optimization in Heterogeneous Networks, 2020.
    """
    grads.add_(values, alpha=weight).sub_(start, alpha=weight)


def quasi_global_direction(grads: Tensor, momentum: Tensor, beta: float) -> None:
    """m = β m̂ + g, and the direction is Nesterov's g + β m = (1 + β) g + β² m̂; m̂ stays as it is within a round.

    Lin et al., Quasi-Global Momentum, 2021.
    """
    grads.mul_(1 + beta).add_(momentum, alpha=beta * beta)


def led_direction(grads: Tensor, dual: Tensor, steps: Tensor | int) -> None:
    """g ← g + z / H, so that each step is p ← p − η g − y / H with the dual y = η z.

    Local exact diffusion: Alghunaim, Local Exact-Diffusion for Decentralized Optimization and Learning, 2023. The dual
    is kept in units of the gradient, so that it shrinks with a learning rate that decays; else nothing differs.
    """
    grads.add_(dual / steps)


def tracked_direction(grads: Tensor, tracker: Tensor, gradient: Tensor) -> None:
    """y ← W y + g − g_before is the direction (the tracker holds W y); the gradient is remembered.

    Gradient tracking: Di Lorenzo and Scutari, NEXT, 2016; in the form of Koloskova et al., 2021.
    """
    tracker.add_(grads).sub_(gradient)
    gradient.copy_(grads)
    grads.copy_(tracker)


# -- Between training and mixing -------------------------------------------------------------------------------------


def extra(recipe: Recipe, memory: Memory, values: Tensor, rate: float, steps: Tensor | int) -> Tensor | None:
    """The second vector to be mixed, at the end of the local steps; None for a rule that needs one only."""
    match recipe.correction:
        case "gradient-tracking":
            return memory["tracker"]
        case "k-gt":
            return mean_direction(memory["start"], values, rate, steps)
        case _:
            return memory["start"] if recipe.outer == "nesterov" else None


def mean_direction(start: Tensor, end: Tensor, rate: float, steps: Tensor | int) -> Tensor:
    """Δ = (x − p_H) / (H η): the mean direction of the local steps from x to p_H."""
    return (start - end) / (steps * rate)


# -- After mixing ----------------------------------------------------------------------------------------------------


def absorb(
    recipe: Recipe,
    memory: Memory,
    values: Tensor,
    mixed: Tensor,
    sent_extra: Tensor | None,
    mixed_extra: Tensor | None,
    rate: float,
    steps: Tensor | int,
) -> None:
    """Go on from the mixed vector: `values`, which were sent, become the start of the next round, in place.

    `sent_extra` is what `extra` gave, and `mixed_extra` what mixing made of it.
    """
    match recipe.correction:
        case "led":
            led_dual(memory["dual"], values, mixed, recipe.leak, rate)
        case "gradient-tracking":
            assert mixed_extra is not None
            memory["tracker"].copy_(mixed_extra)
            if recipe.leak:  # towards the own gradient, which is where a restart begins
                memory["tracker"].lerp_(memory["gradient"], recipe.leak)
        case "k-gt":
            assert sent_extra is not None and mixed_extra is not None
            k_gt_correction(memory["correction"], sent_extra, mixed_extra, recipe.leak)
        case "none":
            pass
    if recipe.outer == "nesterov":
        assert mixed_extra is not None
        outer_step(memory["outer"], mixed_extra, mixed, recipe.outer_lr, recipe.outer_beta)
    if recipe.momentum == "quasi-global":
        quasi_global_momentum(memory["momentum"], memory["start"], mixed, recipe.beta, rate, steps)
    values.copy_(mixed)


def led_dual(dual: Tensor, sent: Tensor, mixed: Tensor, leak: float, rate: float) -> None:
    """z ← (1 − leak) z + (p_H − W p_H) / η. Where W keeps the sum, the z of all nodes sum to zero.

    With H = 1 it is D²: Tang et al., 2018.
    """
    if leak:
        dual.mul_(1 - leak)
    dual.add_(sent - mixed, alpha=1 / rate)


def k_gt_correction(correction: Tensor, sent: Tensor, mixed: Tensor, leak: float) -> None:
    """c ← (1 − leak) c − Δ + W Δ. Where W keeps the sum, the c of all nodes sum to zero.

    K-GT: Liu et al., Decentralized Gradient Tracking with Local Steps, 2023.
    """
    if leak:
        correction.mul_(1 - leak)
    correction.add_(mixed).sub_(sent)


def quasi_global_momentum(
    momentum: Tensor, start: Tensor, mixed: Tensor, beta: float, rate: float, steps: Tensor | int
) -> None:
    """m̂ ← (1 − µ) m̂ + µ (x − x₊) / (η H) with µ = 1 − β: the direction in which the network went, not the node."""
    momentum.lerp_(mean_direction(start, mixed, rate, steps), 1 - beta)


def outer_step(buffer: Tensor, start: Tensor, mixed: Tensor, rate: float, beta: float) -> None:
    """d = W x − W p_H;  b ← β b + d;  x₊ = W x − η_outer (d + β b), written over `mixed`.

    DiLoCo: Douillard et al., 2023, on a graph; with η_outer = 1 and β = 0 it is plain averaging.
    """
    difference = start - mixed
    buffer.mul_(beta).add_(difference)
    mixed.copy_(start).sub_(difference, alpha=rate).sub_(buffer, alpha=rate * beta)
