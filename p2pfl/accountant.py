"""What noise has cost so far: the ε of differential privacy, by two accountants of Opacus.

A step adds N(0, σ²C²) to a sum of vectors none of which is longer than C, each of which is in the sum with probability
q, on its own. What many steps tell of one of these vectors is bounded in two ways, and both bounds hold:

    RDP   Rényi's divergences of all steps, added up: Mironov, Talwar and Zhang, 2019; from there to (ε, δ) by Balle
          et al., Hypothesis Testing Interpretations and Rényi Differential Privacy, 2020, theorem 21
    PRV   the distribution of the privacy loss, composed by Fourier transforms: Gopi, Lee and Wutschitz, Numerical
          Composition of Differential Privacy, 2021, the upper end of its interval. Tighter, but for the first steps

Neighbouring are data with and without that one vector. A round may take 10 ms, so nothing is computed twice: RDP is
one vector a step, to be multiplied, and of the privacy loss the transform is taken once, on a mesh that is fine enough
for all the steps that are planned. A round costs one product of spectra and one transform back. At the last planned
step the values are those of Opacus's own accountants; before it, the mesh is finer than Opacus would choose.

Opacus is imported where it is used: that takes two seconds, and it may be absent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from p2pfl.messages import BadInput, Spent

Unit = Literal["example", "update"]
Numbers = npt.NDArray[np.float64]
Spectrum = npt.NDArray[np.complex128]

EPSILON_ERROR = 0.01  # of PRV, which its value includes; Opacus's
DELTA_SHARE = 1000  # the part of δ that PRV spends on its own errors is 1 / 1000; Opacus's
MARGIN = 3.0  # of the loss, on both sides of a mesh; Opacus's
LEAST_DELTA = 1e-9  # below, the rounding of the transforms is not small beside that part: RDP alone is left
LARGEST_MESH = 2**21  # points, 16 MB: what needs more has an ε beyond 50, which no tighter bound makes any better
NOISE_ERROR = 1e-3  # relative: by which `noise_for` may find more than is needed
LEAST_PROGRESS = 0.05  # part of the interval, in logarithms, by which each guess makes it smaller
FAR_OFF = 10.0  # times as much by RDP as is asked for: then PRV is more, too
MOST_NOISE = 1e6  # more drowns every gradient, and an ε that needs more is below what the accountants resolve


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What one step does."""

    sigma: float  # standard deviation of the noise, over the clipping norm
    q: float  # probability with which each vector is in the sum


def check_opacus() -> None:
    """BadInput where Opacus is not installed."""
    try:
        import opacus  # noqa: F401
    except ImportError:
        raise BadInput("privacy.dp needs Opacus, which is not here: pip install 'p2pfl-mesh[private]'") from None


@contextmanager
def quietly() -> Iterator[None]:
    """Opacus divides by zero and takes logarithms of it on purpose: nobody needs to read that."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


# -- Rényi's differential privacy ------------------------------------------------------------------------------------


@cache
def _orders(whole: bool) -> Numbers:
    """Opacus's α; `whole`: those of them that are whole numbers, for which it needs a tenth of the time."""
    from opacus.accountants import RDPAccountant

    orders = np.array(RDPAccountant.DEFAULT_ALPHAS)
    return orders[orders % 1 == 0] if whole else orders


@lru_cache(maxsize=64)
def _divergences(mechanism: Mechanism, whole: bool) -> Numbers:
    """Of one step, at each of the orders."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with quietly():
        return np.array(compute_rdp(q=mechanism.q, noise_multiplier=mechanism.sigma, steps=1, orders=_orders(whole)))


def rdp_epsilon(steps: Mapping[Mechanism, int], delta: float, whole: bool = False) -> float:
    """The least ε over the orders α: Σ RDP(α) − (ln δ + ln α)/(α − 1) + ln((α − 1)/α); 0 of nothing.

    With `whole` numbers for orders it is found sooner, and a little larger.
    """
    if not any(steps.values()):
        return 0.0
    orders = _orders(whole)
    total = sum((count * _divergences(mechanism, whole) for mechanism, count in steps.items()), np.zeros_like(orders))
    epsilons = total - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return max(0.0, float(np.nanmin(epsilons)))


# -- The privacy loss, composed --------------------------------------------------------------------------------------


class Loss:
    """The privacy loss of these mechanisms, on one mesh that is fine and wide enough for so many steps of each."""

    def __init__(self, steps: Mapping[Mechanism, int], delta: float, whole: bool = False) -> None:
        """`whole`: as for `rdp_epsilon`, which says how wide a mesh must be. ValueError where none gives a bound."""
        from opacus.accountants.analysis.prv import (
            Domain,
            PoissonSubsampledGaussianPRV,
            TruncatedPrivacyRandomVariable,
            discretize,
        )

        self.steps = dict(steps)
        self._delta = delta - delta / DELTA_SHARE
        if delta < LEAST_DELTA:
            raise ValueError(f"delta is {delta}")
        with quietly():
            losses = [PoissonSubsampledGaussianPRV(mechanism.q, mechanism.sigma) for mechanism in steps]
            error = delta / DELTA_SHARE
            count = sum(steps.values())
            # Remark 5.6 of the paper, as Opacus has it: hardly any loss is larger, of one step or of all.
            widths = [rdp_epsilon({mechanism: 1}, error / (8 * count), whole) for mechanism in steps]
            width = MARGIN + max(EPSILON_ERROR, rdp_epsilon(steps, error / 4, whole), *widths)
            self._mesh = EPSILON_ERROR / math.sqrt(count * math.log(12 / error) / 2)
            if not width / self._mesh < LARGEST_MESH / 2:
                raise ValueError(f"the privacy loss goes up to {width}")
            domain = Domain.create_aligned(-width, width, self._mesh)
            discrete = [
                discretize(TruncatedPrivacyRandomVariable(p, domain.t_min, domain.t_max), domain) for p in losses
            ]
        below = round(-domain.t_min / self._mesh)  # points below zero
        from scipy import fft  # type: ignore[import-untyped]  # here: every node would pay a fifth of a second for it

        self._points, self._irfft = fft.next_fast_len(domain.size, real=True), fft.irfft
        # Zero loss stands first, and what is below it at the end: then powers and products need no further shift.
        self._spectra = {
            m: fft.rfft(np.roll(np.pad(d.pmf, (0, self._points - domain.size)), -below))
            for m, d in zip(steps, discrete, strict=True)
        }
        # By how much the losses lie beside the points: so that the discrete mean is the true one.
        self._shifts = {m: float(d.domain.shifts) for m, d in zip(steps, discrete, strict=True)}
        self._below, self._above = below, domain.size - below

    def power(self, mechanism: Mechanism, count: int) -> Spectrum:
        """The spectrum of so many steps."""
        return np.asarray(self._spectra[mechanism] ** count)

    def covers(self, steps: Mapping[Mechanism, int]) -> bool:
        """Whether the mesh is fine and wide enough for these."""
        return all(count <= self.steps.get(mechanism, 0) for mechanism, count in steps.items())

    def epsilon(self, spectrum: Spectrum, steps: Mapping[Mechanism, int]) -> float:
        """The ε of these steps, whose spectrum it is: the least with Σ p(t) (1 − exp(ε − t)) ≤ δ over t > ε."""
        pmf = self._irfft(spectrum, self._points)
        shift = sum(count * self._shifts[mechanism] for mechanism, count in steps.items())
        # Whatever lies below zero adds nothing to an ε that is not negative; the shift moves zero by some points.
        before = min(self._below, math.ceil(abs(shift) / self._mesh) + 1)
        pmf = np.concatenate([pmf[-before:], pmf[: self._above]])  # the rest is within δ's error
        lost = np.exp(self._mesh * np.arange(-before, len(pmf) - before))  # exp(t), but for the shift
        above = np.cumsum(pmf[::-1])[::-1]  # Σ p over t' ≥ t …
        weighed = np.cumsum((pmf / lost)[::-1])[::-1]  # … and Σ p exp(−t')
        first = int(np.searchsorted(lost * weighed - above, -self._delta))  # the first point above ε
        if first == 0:
            return EPSILON_ERROR
        if first == len(pmf):
            return math.inf
        exact = math.log((above[first] - self._delta) / weighed[first]) + shift
        return max(0.0, exact) + EPSILON_ERROR


@lru_cache(maxsize=16)
def _loss(steps: tuple[tuple[Mechanism, int], ...], delta: float) -> Loss:
    """The same one for nodes that do the same: a mesh takes up to seconds."""
    return Loss(dict(steps), delta)


# -- What a node has spent -------------------------------------------------------------------------------------------


class Accountant:
    """ε of one node, step by step. Its arithmetic is the same whatever the steps, and in which portions they came."""

    def __init__(self, unit: Unit, delta: float, planned: Mapping[Mechanism, int]) -> None:
        """`planned`: the steps that a mesh is made for; another is made for more. BadInput where Opacus is absent."""
        check_opacus()
        self._unit, self._delta = unit, delta
        self._steps: dict[Mechanism, int] = {}
        self._planned = dict(planned)
        self._loss: Loss | None = None
        self._spectrum: Spectrum | None = None  # of the steps so far, once the loss is there
        self._portion: tuple[Mechanism, int, Spectrum] | None = None  # the last that was added: the next is alike
        self._bounded = True  # by PRV; else by RDP alone
        for mechanism in planned:
            self.after(mechanism, 0)  # no round shall wait for a mesh

    def after(self, mechanism: Mechanism, steps: int) -> Spent:
        """What will be spent once so many steps of this have followed those that were added."""
        total = self._steps | {mechanism: self._steps.get(mechanism, 0) + steps}
        return Spent(self._unit, rdp_epsilon(total, self._delta), self._prv(total, mechanism, steps), self._delta)

    def add(self, mechanism: Mechanism, steps: int) -> None:
        """Count these steps."""
        if self._loss is not None and self._spectrum is not None and mechanism in self._loss.steps:
            self._spectrum = self._spectrum * self._power(self._loss, mechanism, steps)
        else:
            self._spectrum = None
        self._steps[mechanism] = self._steps.get(mechanism, 0) + steps

    def spent(self) -> Spent:
        """What the steps that were added have cost."""
        if not self._steps:
            return Spent(self._unit, 0.0, 0.0, self._delta)
        return self.after(next(iter(self._steps)), 0)

    def _prv(self, total: Mapping[Mechanism, int], mechanism: Mechanism, steps: int) -> float:
        """Infinite where there is no such bound."""
        if not self._bounded:
            return math.inf
        try:
            if self._loss is None or not self._loss.covers(total):
                known = self._steps.keys() | self._planned.keys() | total.keys()
                need = {m: max(total.get(m, 0), self._planned.get(m, 0)) for m in known}
                if self._loss is not None:  # more than was planned: make room for as much again
                    need = {m: 2 * count for m, count in need.items()}
                self._loss, self._spectrum, self._portion = _loss(tuple(need.items()), self._delta), None, None
        except (ValueError, RuntimeError):  # Opacus's words for a loss that no mesh holds
            self._bounded = False
            return math.inf
        if self._spectrum is None:
            self._spectrum = np.ones(1, np.complex128)
            for known_mechanism, count in self._steps.items():
                self._spectrum = self._spectrum * self._loss.power(known_mechanism, count)
        return self._loss.epsilon(self._spectrum * self._power(self._loss, mechanism, steps), total)

    def _power(self, loss: Loss, mechanism: Mechanism, steps: int) -> Spectrum:
        if self._portion is None or self._portion[:2] != (mechanism, steps):
            self._portion = mechanism, steps, loss.power(mechanism, steps)
        return self._portion[2]


@lru_cache(maxsize=64)
def noise_for(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The least σ, to NOISE_ERROR, with which so many steps cost no more than ε: by the smaller of the two bounds.

    BadInput for an ε that no noise reaches, as far as the accountants resolve it.
    """
    check_opacus()

    def cost(sigma: float) -> float:
        steps_of = {Mechanism(sigma, q): steps}
        rdp = rdp_epsilon(steps_of, delta, whole=True)
        if rdp > FAR_OFF * epsilon:
            return rdp
        try:
            loss = Loss(steps_of, delta, whole=True)
        except (ValueError, RuntimeError):
            return rdp
        return min(rdp, loss.epsilon(loss.power(Mechanism(sigma, q), steps), steps_of))

    low, high = 0.5, 1.0
    dear, cheap = cost(low), cost(high)
    while cheap > epsilon:
        low, high, dear = high, 2 * high, cheap
        if high > MOST_NOISE:
            raise BadInput(
                f"privacy.epsilon = {epsilon:g} at delta = {delta:g} is below what can be accounted for in {steps} "
                f"steps: ask for more than {2 * EPSILON_ERROR:g}, or train fewer rounds"
            )
        cheap = cost(high)
    while dear <= epsilon:
        low, high, cheap = low / 2, low, dear
        dear = cost(low)
    aside = 1 + NOISE_ERROR / 3  # so that the next guess falls on the other side of what is sought
    while high > low * (1 + NOISE_ERROR):
        least = (high / low) ** LEAST_PROGRESS
        # ε falls about as a power of σ. The guess stays inside, however it does.
        share = math.log(dear / epsilon) / math.log(dear / cheap) if math.isfinite(dear) and dear > cheap > 0 else 0.5
        guess = min(max(low * (high / low) ** share * aside, low * least), high / least)
        found = cost(guess)
        if found <= epsilon:
            high, cheap, aside = guess, found, 1 - NOISE_ERROR / 3
        else:
            low, dear, aside = guess, found, 1 + NOISE_ERROR / 3
    while Accountant("example", delta, {Mechanism(high, q): steps}).after(Mechanism(high, q), steps).epsilon > epsilon:
        high *= 1 + NOISE_ERROR / 3  # what whole orders leave open is less than that
    return high
