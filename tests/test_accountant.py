"""What privacy costs: the values of Opacus and of the literature, in whatever portions the steps come, and the noise
that keeps within a budget."""

from __future__ import annotations

import math
import warnings

import pytest
from scipy import optimize
from scipy.stats import norm

from p2pfl.accountant import EPSILON_ERROR, NOISE_ERROR, Accountant, Mechanism, noise_for, rdp_epsilon
from p2pfl.messages import BadInput

TABLE = [  # algorithms §5: q, σ, steps, δ → ε by RDP, ε by PRV
    (0.04, 1.5, 2250, 1e-5, 7.32911117, 6.77913208),
    (0.04, 1.5, 2249, 1e-5, None, 6.777395712),
    (0.01, 1.0, 10000, 1e-5, 6.71273830, 6.19804386),
    (0.01, 4.0, 10000, 1e-5, 1.03549007, 0.95693619),
    (256 / 60000, 1.1, 14040, 1e-5, 2.59436335, 2.38970121),
    (16 / 45, 1.0, 300, 1e-3, 49.98279379, 45.73620629),
    (16 / 45, 4.0, 300, 1e-3, 6.19928412, 5.54364493),
    (16 / 1437, 1.0, 300, 1e-4, 1.24041778, 0.95435821),
    (1, 10, 100, 1e-5, 4.72850707, 4.38741329),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "rdp", "prv"), TABLE)
def test_the_values_that_others_have_found(
    q: float, sigma: float, steps: int, delta: float, rdp: float | None, prv: float
) -> None:
    mechanism = Mechanism(sigma, q)
    accountant = Accountant("example", delta, {mechanism: steps})
    accountant.add(mechanism, steps)
    spent = accountant.spent()
    assert spent.prv == pytest.approx(prv, abs=1e-6)
    assert rdp is None or spent.rdp == pytest.approx(rdp, abs=1e-6)
    assert spent.epsilon == min(spent.rdp, spent.prv) and (spent.unit, spent.delta) == ("example", delta)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact ε of one Gaussian mechanism: δ = Φ(1/2σ − εσ) − exp(ε) Φ(−1/2σ − εσ), Balle and Wang, 2018."""

    def excess(epsilon: float) -> float:
        half, far = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(half - far) - math.exp(epsilon) * norm.cdf(-half - far)) - delta

    return float(optimize.brentq(excess, 0, 100))


@pytest.mark.parametrize(("sigma", "steps"), [(3.0, 1), (3.0, 10), (20.0, 100), (2.0, 20)])
def test_without_sampling_it_is_the_gaussian_mechanism_whose_epsilon_is_known_exactly(sigma: float, steps: int) -> None:
    """n steps at σ are one step at σ/√n; the bound lies above that, by no more than the error that it admits."""
    mechanism = Mechanism(sigma, 1.0)
    found = Accountant("update", 1e-5, {mechanism: steps}).after(mechanism, steps)
    exact = gaussian_epsilon(sigma / math.sqrt(steps), 1e-5)
    assert exact < found.prv < exact + 1.5 * EPSILON_ERROR
    assert exact < found.rdp


def test_in_portions_it_costs_what_it_costs_at_once_and_never_less_than_before() -> None:
    mechanism, portion, rounds = Mechanism(2.0, 0.2), 7, 30
    planned = {mechanism: portion * rounds}
    bit_by_bit, at_once = Accountant("example", 1e-3, planned), Accountant("example", 1e-3, planned)
    before = bit_by_bit.spent()
    assert before.rdp == before.prv == before.epsilon == 0
    for _ in range(rounds):
        after = bit_by_bit.after(mechanism, portion)
        bit_by_bit.add(mechanism, portion)
        assert bit_by_bit.spent().prv == pytest.approx(after.prv, abs=1e-9)
        assert after.rdp > before.rdp and after.prv > before.prv
        before = after
    whole = at_once.after(mechanism, portion * rounds)
    assert before.rdp == pytest.approx(whole.rdp, abs=1e-12) and before.prv == pytest.approx(whole.prv, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 13, 100, 299])
def test_before_the_last_planned_step_it_is_no_less_than_what_opacus_takes_for_possible(steps: int) -> None:
    from opacus.accountants import PRVAccountant

    mechanism, delta = Mechanism(4.0, 16 / 45), 1e-3
    found = Accountant("example", delta, {mechanism: 300}).after(mechanism, steps)
    opacus = PRVAccountant()
    opacus.history = [(mechanism.sigma, mechanism.q, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, likely, high = opacus._get_dprv(0.01, delta / 1000).compute_epsilon(delta, delta / 1000, 0.01)
    assert max(low, likely) < found.prv == pytest.approx(high, abs=EPSILON_ERROR)


def test_steps_of_several_kinds_and_more_of_them_than_were_planned() -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    history = [(1.5, 0.1, 60), (3.0, 0.3, 40)]
    first, second = (Mechanism(sigma, q) for sigma, q, _ in history)
    accountant = Accountant("example", 1e-4, {first: 20})
    for _ in range(6):
        accountant.add(first, 10)
    found = accountant.after(second, 40)
    for opacus, value, error in ((RDPAccountant(), found.rdp, 1e-9), (PRVAccountant(), found.prv, 1e-3)):
        opacus.history = list(history)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert value == pytest.approx(opacus.get_epsilon(1e-4), abs=error)


def test_where_the_transforms_hold_no_bound_renyi_alone_does() -> None:
    for mechanism, delta in ((Mechanism(0.05, 1.0), 1e-5), (Mechanism(5.0, 1.0), 1e-12)):
        spent = Accountant("update", delta, {mechanism: 50}).after(mechanism, 50)
        assert spent.prv == math.inf and 0 < spent.rdp < math.inf and spent.epsilon == spent.rdp


@pytest.mark.parametrize(("q", "steps", "reference"), [(0.04, 2000, 1.2915), (0.04, 2250, 1.34765625)])
def test_the_noise_for_a_target_is_enough_and_hardly_more(q: float, steps: int, reference: float) -> None:
    """The references are of PRV, which is the smaller bound here; the search of Opacus stops within 0.01 of ε."""
    sigma = noise_for(8, 1e-5, q, steps)
    assert sigma == pytest.approx(reference, rel=2 * NOISE_ERROR)
    for noise, is_enough in ((sigma, True), (sigma / (1 + 1.1 * NOISE_ERROR), False)):
        mechanism = Mechanism(noise, q)
        epsilon = Accountant("example", 1e-5, {mechanism: steps}).after(mechanism, steps).epsilon
        assert (epsilon <= 8) is is_enough
    assert abs(rdp_epsilon({Mechanism(1.416, 0.04): 2250}, 1e-5) - 8) < 0.01
    assert abs(rdp_epsilon({Mechanism(1.3562, 0.04): 2000}, 1e-5) - 8) < 0.01


def test_an_epsilon_that_no_noise_reaches_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match=r"privacy.epsilon = 0.005 .* ask for more than 0.02") as error:
        noise_for(0.005, 1e-5, 0.5, 10)
    assert "\n" not in str(error.value)


def test_nobody_reads_what_numpy_thinks_of_opacus() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mechanism = Mechanism(0.71, 0.37)
        Accountant("example", 1e-4, {mechanism: 20}).after(mechanism, 20)
        noise_for(1.7, 1e-5, 1.0, 3)
    assert not said
