"""Relay sums: the receiver reads the sum, the relay reads nothing, and what is no ciphertext is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from processes import run

from p2pfl.homomorphic import (
    LONGEST_CIPHERTEXT,
    LONGEST_KEY,
    SCALE,
    SLICE,
    Floats,
    Keys,
    add,
    decrypt,
    encrypt,
    make_keys,
    read_public,
    slices,
)
from p2pfl.messages import BadInput, BadMessage

tenseal = pytest.importorskip("tenseal", reason="TenSEAL is an extra: pip install 'p2pfl-mesh[homomorphic]'")

KEYS, OTHERS = make_keys(), make_keys()
PUBLIC = read_public(KEYS.public)
ROUNDING = 2.0**-17


def vectors(count: int, size: int, scale: float = 1.0) -> list[Floats]:
    return [scale * np.random.default_rng(i).standard_normal(size, dtype=np.float32) for i in range(count)]


def relay_sum(keys: Keys, given: Sequence[Floats], weights: Sequence[float]) -> Floats:
    public = read_public(keys.public)
    encrypted = [encrypt(public, vector, weight) for vector, weight in zip(given, weights, strict=True)]
    added = [add(public, ciphertexts) for ciphertexts in zip(*encrypted, strict=True)]
    assert len(added) == slices(len(given[0]))
    return np.concatenate([decrypt(keys, ciphertext, SLICE) for ciphertext in added])[: len(given[0])]


def one(vector: Floats, weight: float = 1.0) -> bytes:
    (ciphertext,) = encrypt(PUBLIC, vector, weight)
    return ciphertext


@pytest.mark.parametrize(
    ("count", "size", "scale"), [(2, 1, 1.0), (3, SLICE, 1.0), (5, SLICE + 1, 100.0), (8, 9_610, 3_000.0)]
)
def test_the_receiver_reads_the_weighted_sum(count: int, size: int, scale: float) -> None:
    weights = [1 / (2 + i) / 2 for i in range(count)]
    given = vectors(count, size, scale)
    true = sum(weight * vector.astype(np.float64) for weight, vector in zip(weights, given, strict=True))
    found = relay_sum(KEYS, given, weights)
    assert np.abs(found - true).max() <= ROUNDING + 1e-6 + 1e-7 * np.abs(true).max()  # and what float32 rounds


def test_nothing_finer_than_a_multiple_of_a_65536th_is_read() -> None:
    """The error of CKKS follows from the secret key; it must not go on into models."""
    found = relay_sum(KEYS, vectors(3, 100), [0.25] * 3).astype(np.float64) * 2.0**16
    assert (found == np.rint(found)).all()


def test_the_relay_can_neither_decrypt_nor_tell_alike_vectors() -> None:
    vector = np.ones(SLICE, np.float32)
    assert one(vector) != one(vector)
    with pytest.raises(ValueError, match="secret_key"):
        tenseal.ckks_vector_from(PUBLIC, one(vector)).decrypt()
    assert not PUBLIC.is_private()


def test_without_a_relay_the_receiver_reads_each_vector() -> None:
    """So that nobody takes the encryption itself for the protection."""
    (vector,) = vectors(1, 50)
    assert decrypt(KEYS, one(vector), 50) == pytest.approx(vector, abs=2 * ROUNDING)


def test_of_other_keys_nothing_is_read() -> None:
    with pytest.raises(BadMessage, match="of other keys"):
        decrypt(OTHERS, one(np.ones(SLICE, np.float32)), SLICE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**15, -(2.0**16)])
def test_a_vector_that_does_not_fit_is_not_encrypted(bad: float) -> None:
    with pytest.raises(ValueError, match="no encrypted sum holds"):
        one(np.array([0.0, bad], np.float32), 0.2)


def foreign(scheme: str, degree: int, primes: Sequence[int], scale: float, public: bool = True) -> bytes:
    kind = tenseal.SCHEME_TYPE.CKKS if scheme == "ckks" else tenseal.SCHEME_TYPE.BFV
    more = {"coeff_mod_bit_sizes": list(primes)} if scheme == "ckks" else {"plain_modulus": 1032193}
    context = tenseal.context(kind, degree, n_threads=1, **more)
    if scale:
        context.global_scale = scale
    key: bytes = context.serialize(
        save_public_key=public, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
    )
    return key


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"a public key",
        KEYS.public[:-1],
        KEYS.public + bytes(LONGEST_KEY),
        foreign("ckks", 8192, (50, 50), SCALE),
        foreign("ckks", 4096, (54, 54), SCALE),
        foreign("ckks", 8192, (60, 60), SCALE / 2),
        foreign("ckks", 8192, (60, 60), 0.0),
        foreign("ckks", 8192, (60, 60), SCALE, public=False),
        foreign("bfv", 4096, (), 0.0),
    ],
    ids=["nothing", "words", "cut", "long", "primes", "degree", "scale", "no scale", "no key", "scheme"],
)
def test_what_is_no_public_key_of_this_scheme_is_refused(key: bytes) -> None:
    with pytest.raises(BadMessage) as caught:
        read_public(key)
    assert caught.value.code == "bad_key" and "\n" not in str(caught.value)


def scaled(values: int, scale: float) -> bytes:
    ciphertext: bytes = tenseal.ckks_vector(PUBLIC, [1.0] * values, scale).serialize()
    return ciphertext


@pytest.mark.parametrize(
    "ciphertext",
    [
        b"",
        b"a ciphertext",
        one(np.ones(5, np.float32))[:-1],
        one(np.ones(5, np.float32)) + bytes(LONGEST_CIPHERTEXT),
        one(np.ones(5, np.float32))[:50_000] + b"\xff" * 2_000 + one(np.ones(5, np.float32))[52_000:],
        scaled(SLICE - 1, SCALE),
        scaled(SLICE, SCALE / 2),
    ],
    ids=["nothing", "words", "cut", "long", "beyond the prime", "short", "scale"],
)
def test_what_is_no_ciphertext_of_this_scheme_is_refused(ciphertext: bytes) -> None:
    good = one(np.ones(5, np.float32))
    for read in (lambda: add(PUBLIC, [good, ciphertext]), lambda: decrypt(KEYS, ciphertext, SLICE)):
        with pytest.raises(BadMessage) as caught:
            read()
        assert caught.value.code == "bad_ciphertext" and "\n" not in str(caught.value)


def test_without_tenseal_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(BadInput, match=r"pip install 'p2pfl-mesh\[homomorphic\]'"):
        make_keys()


def test_the_benchmark_adds_over_real_links_and_shows_masks_beside() -> None:
    found = json.loads(run("bench", "he", "--size", "5000", "--senders", "2", "--json").stdout)
    assert found["ciphertext_bytes"] / (2 * SLICE * 4) == pytest.approx(8, rel=0.01)  # two slices, the second padded
    assert found["times_float32"] == found["ciphertext_bytes"] / 20_000
    assert found["ciphertext_bytes"] < found["sent_by_a_sender"] < 1.1 * found["ciphertext_bytes"]
    assert 0 < found["largest_error"] <= ROUNDING + 1e-6
    assert 0 < found["masks"]["largest_error"] <= 3 * ROUNDING
    assert all(seconds > 0 for seconds in found["seconds"].values())
