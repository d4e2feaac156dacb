"""What a lying member sends instead of its vector: the attacks that a robust rule has to withstand.

An attack is a function attack(own, heard, strength, random) -> what is sent, newly made:

    own        (S,) float: what an honest node would send
    heard      (k, S) of the same dtype: what its neighbours sent last; k may be 0, and own then stands for them
    strength   how hard; `ATTACKS` holds the usual one of each
    random     where noise comes from, on the device of `own`: the same seed tells the same lies

Lies are for trying a network's defences (`[[faults]] kind = "lie"`); no honest node calls anything here. All but `nan`
are finite, and of a length that at first no check of norms objects to: keeping them out is up to the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Attack = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]


def negate(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """-strength * own: backwards, whatever the others learnt."""
    return own.mul(-strength)


def scale(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """strength * own: the right direction, far too much of it."""
    return own.mul(strength)


def noise(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """own + strength * ||own||_2 / sqrt(S) * g, g ~ N(0, I): the noise is about `strength` times as long as own."""
    drawn = torch.randn(own.shape, generator=random, dtype=own.dtype, device=own.device)
    return own.add(drawn, alpha=strength * torch.linalg.vector_norm(own).item() / math.sqrt(own.numel()))


def alie(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """A little is enough: mean - strength * standard deviation of `heard`, element by element (Baruch 2019).

    The deviation is that of the population, (1 / k) sum (x - mean)^2: one vector has none. Such a lie is less of an
    outlier than many an honest vector, but it is always on the same side.
    """
    honest = _honest(own, heard)
    return honest.mean(dim=0) - strength * honest.std(dim=0, correction=0)


def ipm(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Inner product manipulation: -strength * mean of `heard` (Xie, Koyejo & Gupta 2019)."""
    return _honest(own, heard).mean(dim=0) * -strength


def dissensus(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """own - strength * sum_j (x_j - own) over `heard`: undoes their pull (He, Karimireddy & Jaggi 2022).

    The paper's x - strength * sum_j w_j (x_j - x) / w_liar, where all edges weigh alike. Told to the node whose vector
    `own` is and whose other neighbours' are `heard`, it freezes plain averaging at strength 1: all that the others
    contribute cancels out. A liar that sends one lie to all takes itself for that node.
    """
    return own - strength * (_honest(own, heard) - own).sum(dim=0)


def nan(own: Tensor, heard: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Not a number anywhere: one of these in a mean, and the model is gone."""
    return torch.full_like(own, math.nan)


ATTACKS: Mapping[str, tuple[Attack, float]] = {
    "negate": (negate, 1.0),
    "noise": (noise, 10.0),
    "scale": (scale, 10.0),
    "alie": (alie, 1.5),  # as Baruch et al. take for the largest of their experiments
    "ipm": (ipm, 1.0),
    "dissensus": (dissensus, 1.0),  # exactly as strong as all others together
    "nan": (nan, 1.0),
}


def flip_labels(targets: Tensor, classes: int) -> Tensor:
    """y -> classes - 1 - y, int64 of any shape: from these a liar learns, and sends what an honest node would send."""
    return classes - 1 - targets


def _honest(own: Tensor, heard: Tensor) -> Tensor:
    return heard if len(heard) else own.unsqueeze(0)
