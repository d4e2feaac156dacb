"""Masks vanish in the whole sum and hide everything else: exact sums, uniform parts, and an attacker who tries."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from scipy import stats

from p2pfl.identity import Identity
from p2pfl.masks import LARGEST, UNITS, MaskMaker, Words, fixed, gathering_number, read_sum
from p2pfl.messages import BadMessage, Gathering, MaskKey

FEDERATION = b"f" * 32
SIZE = 70_000  # parameters: more than two slices, and no whole number of them


@dataclass(frozen=True)
class Sum:
    """Everything about one sum: what the receiver has, and what it must not get."""

    makers: tuple[MaskMaker, ...]
    gathering: Gathering
    weights: tuple[float, ...]
    vectors: tuple[NDArray[np.float32], ...]  # secret
    parts: tuple[Words, ...]

    @property
    def mean(self) -> NDArray[np.float64]:
        total = sum(w * x.astype(np.float64) for w, x in zip(self.weights, self.vectors, strict=True))
        return np.asarray(total) / sum(self.weights)


def makers(senders: int) -> tuple[MaskMaker, ...]:
    return tuple(MaskMaker(Identity.generate(f"node-{i:02}"), 1, FEDERATION) for i in range(senders))


def gathering_of(members: tuple[MaskMaker, ...], round: int = 3) -> Gathering:
    return Gathering(round, 1.0, 1.0 + len(members), True, tuple(maker.key for maker in members))


def a_sum(senders: int, seed: int = 0, size: int = SIZE, scale: float = 1.0, alike: bool = False) -> Sum:
    random, members = np.random.default_rng(seed), makers(senders)
    gathering = gathering_of(members)
    drawn = tuple(float(w) for w in random.dirichlet(np.ones(senders + 1))[:-1])
    weights = (1 / (senders + 1),) * senders if alike else drawn
    vectors = tuple((scale * random.normal(size=size)).astype(np.float32) for _ in members)
    parts = tuple(m.part(x, w, "me", gathering) for m, x, w in zip(members, vectors, weights, strict=True))
    return Sum(members, gathering, weights, vectors, parts)


# -- The sum is exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("senders", [3, 4, 7])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_sum_is_exact_to_half_a_unit_for_each_sender(senders: int, scale: float) -> None:
    """algorithms §5: exact to k 2^-17, and of the mean that over the sum of the weights; float32 adds its own."""
    case = a_sum(senders, scale=scale)
    weight = sum(case.weights)
    errors = np.abs(read_sum(case.parts, weight) - case.mean)
    assert np.all(errors <= (senders * 2.0**-17) / weight + np.abs(case.mean) * 2.0**-23)


def test_the_sum_is_that_of_the_parts_without_masks_to_the_bit() -> None:
    case = a_sum(5)
    bare = [fixed(x, w) for x, w in zip(case.vectors, case.weights, strict=True)]
    assert np.array_equal(read_sum(case.parts, 0.7), read_sum(bare, 0.7))


def test_the_order_in_which_parts_come_does_not_matter() -> None:
    case = a_sum(4)
    sums = [read_sum([case.parts[i] for i in order], 0.7) for order in itertools.permutations(range(4))]
    assert all(np.array_equal(one, sums[0]) for one in sums)


def test_the_largest_parameters_fit_and_what_is_larger_is_refused() -> None:
    """With weights that come to 1, the sum of all must not leave the 32 bits."""
    just = np.nextafter(np.float32(LARGEST), np.float32(0))
    for sign in (-1, 1):
        parts = [fixed(np.array([sign * just], dtype=np.float32), weight) for weight in (0.5, 0.25, 0.25)]
        assert read_sum(parts, 1.0)[0] == pytest.approx(sign * just, abs=4 / UNITS)
    for bad in (LARGEST + 1, -LARGEST - 1, 1e30, np.inf, np.nan):
        with pytest.raises(ValueError, match="32768 or more"):
            fixed(np.array([0.0, bad], dtype=np.float32), 0.5)


# -- A part is noise -------------------------------------------------------------------------------------------------


def looks_uniform(words: Words) -> float:
    """p-value of the chi-square test that all bytes of these words are equally likely."""
    return float(stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue)


def test_any_fewer_parts_than_all_are_uniform() -> None:
    """Not only a part, but every sum of fewer than all, with any signs: seeds are of the test, the keys are fresh."""
    case = a_sum(4)
    p_values = []
    for signs in itertools.product((-1, 0, 1), repeat=4):
        if any(signs) and len(set(signs)) > 1:
            words = np.zeros(SIZE, dtype=np.uint32)
            for sign, part in zip(signs, case.parts, strict=True):
                words += part * np.uint32(sign % 2**32)
            p_values.append(looks_uniform(words))
    assert len(p_values) == 3**4 - 3 and min(p_values) > 1e-3 / len(p_values) / 1e3
    assert looks_uniform(sum(case.parts[1:], case.parts[0])) < 1e-9  # so the test can tell


def test_a_part_tells_nothing_of_the_vector() -> None:
    """Correlation of the part with the vector, both as numbers: below five standard deviations of chance."""
    case = a_sum(3)
    for part, vector in zip(case.parts, case.vectors, strict=True):
        correlation = np.corrcoef(part.view(np.int32).astype(np.float64), vector)[0, 1]
        assert abs(correlation) < 5 / np.sqrt(SIZE)


def test_streams_are_never_used_twice() -> None:
    """Another receiver, round, weight, set or federation: another stream, or the difference would be the vector's."""
    members = makers(4)
    vector, asked = np.zeros(64, dtype=np.float32), gathering_of(members)
    other_federation = MaskMaker(Identity.generate("node-00"), 1, b"g" * 32)
    key = replace(members[3].key, epoch=2)
    variants = [
        members[0].part(vector, 0.2, "me", asked),
        members[0].part(vector, 0.2, "you", asked),
        members[0].part(vector, 0.2, "me", gathering_of(members, round=4)),
        members[0].part(vector, 0.2, "me", gathering_of(members[:3])),
        members[0].part(vector, 0.2, "me", replace(asked, reach=6.0)),
        members[0].part(vector, 0.2, "me", replace(asked, keys=(*asked.keys[:3], key))),
        other_federation.part(vector, 0.2, "me", replace(asked, keys=(other_federation.key, *asked.keys[1:]))),
    ]
    differences = [a - b for a, b in itertools.combinations(variants, 2)]
    assert min(np.count_nonzero(difference) for difference in differences) > 60
    numbers = {gathering_number(FEDERATION, who, gathering_of(members, r)) for who in ("me", "you") for r in range(50)}
    assert len(numbers) == 100


# -- Somebody tries --------------------------------------------------------------------------------------------------


def attack(case: Sum, receiver: X25519PrivateKey, parts: tuple[Words, ...]) -> dict[int, float]:
    """What a receiver finds out with all that it has: its own secrets, each key, each part, and the weights.

    It takes off the parts whatever masks it can make with its own secret in place of each sender's, adds and subtracts
    them in every way, and keeps for each sender the best relative error of what it then holds to be its vector.
    """
    keys = case.gathering.keys
    impostors = []
    for key in keys:
        maker = MaskMaker(Identity.generate(key.name), 1, FEDERATION)
        maker._secret, maker.key = receiver, key  # the masks that it could make if it were this sender
        impostors.append(maker)
    zeros = np.zeros(len(parts[0]), dtype=np.float32)
    guessed = [maker.part(zeros, 1.0, "me", case.gathering) for maker in impostors]
    candidates: list[Words] = []
    for signs in itertools.product((-1, 0, 1), repeat=len(parts)):
        words = np.zeros(len(zeros), dtype=np.uint32)
        for sign, part in zip(signs, parts, strict=True):
            words += part * np.uint32(sign % 2**32)
        candidates += [words, *(words - guess for guess in guessed), *(words + guess for guess in guessed)]
    errors = {}
    for sender, (vector, weight) in enumerate(zip(case.vectors, case.weights, strict=True)):
        norm = np.linalg.norm(vector)
        scale = 1 / (UNITS * weight)
        errors[sender] = min(float(np.linalg.norm(c.view(np.int32) * scale - vector) / norm) for c in candidates)
    return errors


def test_a_receiver_cannot_read_one_vector_with_all_that_it_has() -> None:
    case = a_sum(4, size=2000, alike=True)
    found = attack(case, X25519PrivateKey.generate(), case.parts)
    assert min(found.values()) > 0.7, found  # guessing nothing at all errs by 1


def test_the_same_attack_reads_the_vector_of_a_sender_that_leaves_its_masks_out() -> None:
    case = a_sum(4, size=2000, alike=True)
    bare = fixed(case.vectors[2], case.weights[2])
    found = attack(case, X25519PrivateKey.generate(), (*case.parts[:2], bare, case.parts[3]))
    assert found[2] < 1e-3 and min(error for sender, error in found.items() if sender != 2) > 0.7


def test_the_same_attack_reads_a_vector_if_the_receiver_knows_the_sender_s_secret() -> None:
    case = a_sum(4, size=2000, alike=True)
    found = attack(case, case.makers[1]._secret, case.parts)
    assert found[1] < 1e-3 and min(error for sender, error in found.items() if sender != 1) > 0.7


def test_senders_that_were_shown_different_gatherings_give_noise() -> None:
    """A receiver that tells one of them another set, to get at the difference, gets nothing at all."""
    members = makers(4)
    vector, whole, less = np.zeros(SIZE, dtype=np.float32), gathering_of(members), gathering_of(members[:3])
    parts = [maker.part(vector, 0.2, "me", whole) for maker in members[:2]] + [members[2].part(vector, 0.2, "me", less)]
    total = parts[0] + parts[1] + parts[2]
    assert looks_uniform(total) > 1e-6
    assert np.array_equal(sum(m.part(vector, 0.2, "me", less) for m in members[:3]), np.zeros(SIZE))


def test_a_sum_that_no_vectors_can_have_given_is_refused() -> None:
    """A part too few, or one that is noise: of a few thousand words a fifth is beyond what any parameter may be."""
    case = a_sum(4, alike=True)
    noise = np.random.default_rng(1).integers(0, 2**32, SIZE, dtype=np.uint32)
    for parts in (case.parts[:3], (*case.parts[:3], noise), (noise,)):
        with pytest.raises(BadMessage, match=r"^bad_value: a parameter of 4\.\d*e\+04 in a sum"):
            read_sum(parts, sum(case.weights))


def test_who_is_not_among_the_senders_gives_nothing_and_a_key_without_a_secret_is_refused() -> None:
    members = makers(4)
    vector, asked = np.zeros(8, dtype=np.float32), gathering_of(members[:3])
    with pytest.raises(BadMessage, match=r"^bad_gathering: node-03 is not among"):
        members[3].part(vector, 0.2, "me", asked)
    small_order = MaskKey("node-03", 1, bytes(32))
    with pytest.raises(BadMessage, match=r"^bad_gathering: node-03 has a mask key that gives no secret"):
        members[0].part(vector, 0.2, "me", replace(asked, keys=(*asked.keys, small_order)))
