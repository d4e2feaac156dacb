"""A relay sum: a receiver gets the sum of its neighbours' vectors, added up by one of them who cannot read any.

    receiver   makes a pair of keys, and gives the public one to the senders and the relay      make_keys
    sender     encrypts its weighted vector, slice by slice, and gives that to the relay        encrypt
    relay      adds the ciphertexts of a slice, and gives the receiver one for all of them      add
    receiver   decrypts the sum                                                                 decrypt

Encrypting to the receiver alone would hide nothing from the receiver. It is the relay that makes it mean something: it
has each sender's ciphertexts and no key, and the receiver has the key and only the sum. So the two must not put
together what they have, senders must reach the relay by a way that the receiver cannot read, and they must know the
public key for the receiver's own, or the relay would give them one of its. Pairwise masks (`masks`) hide as much at an
eighth of the bytes and trust nobody; this is for receivers whose neighbours share no keys with each other.

The scheme is CKKS (Cheon, Kim, Kim and Song, Homomorphic Encryption for Arithmetic of Approximate Numbers, 2017), by
TenSEAL on SEAL. The ring has degree N = 8192 and the modulus 120 bits, half of which are SEAL's for switching keys, as
nothing here does: where 218 bits still give 128-bit security (Albrecht et al., Homomorphic Encryption Standard, 2018).
A ciphertext is two polynomials of N 64-bit words for N / 2 values: eight times the bytes of float32. Only sums are
taken, so one prime is enough, and nothing is rescaled. What the relay gives on needs no new randomness: it follows
from the sums of the senders' messages and of their own fresh randomness, and from nothing else about them.

CKKS is approximate: a sum is off by 1e-8 or so, and what it is off by follows from the secret key. Who sees decrypted
values in full and the ciphertext as well can compute the key (Li and Micciancio, On the Security of Homomorphic
Encryption on Approximate Numbers, 2021). The relay has the ciphertexts, and what a receiver decrypts goes on into the
models that it sends to it. So `decrypt` gives multiples of 2^-16 only, hundreds of times as coarse as the error, and a
pair of keys is for one sum. That is no proof, which asks for noise on what is decrypted (Li, Micciancio,
Schultz and Sorrell, Securing Approximate Homomorphic Encryption Using Differential Privacy, 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from p2pfl.masks import LARGEST, UNITS
from p2pfl.messages import BadInput, BadMessage

if TYPE_CHECKING:
    from tenseal import CKKSVector, Context

Floats = NDArray[np.float32]

DEGREE: Final = 8192
SLICE: Final = DEGREE // 2  # values in a ciphertext
PRIMES: Final = (60, 60)  # bits: one that ciphertexts are taken modulo, and the one that SEAL insists on
SCALE: Final = 2.0**40  # of 1; a sum of 2^15 then takes 55 of the 60 bits
WORD: Final = 8  # bytes
HEADERS: Final = 4096  # bytes, beyond what polynomials take: more than SEAL and TenSEAL add
LONGEST_CIPHERTEXT: Final = 2 * DEGREE * WORD + HEADERS  # bytes; two polynomials, modulo one prime
LONGEST_KEY: Final = 2 * DEGREE * WORD * len(PRIMES) + HEADERS  # bytes; two, modulo both


@dataclass(frozen=True, slots=True)
class Keys:
    """A receiver's, for one sum."""

    secret: Context  # decrypts; never serialised
    public: bytes  # encrypts and adds


def make_keys() -> Keys:
    """A new pair. BadInput where TenSEAL is not installed."""
    context = _new_context()
    public: bytes = context.serialize(
        save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
    )
    return Keys(context, public)


def read_public(public: bytes) -> Context:
    """What `encrypt` and `add` take. BadMessage for anything but a public key of this very scheme.

    The caller has checked from whom it is.
    """
    if len(public) > LONGEST_KEY:
        raise BadMessage("bad_key", f"{len(public)} bytes for a public key, which takes at most {LONGEST_KEY}")
    try:
        context = _tenseal().context_from(public, n_threads=1)
        ours = _parameters(context) == _our_parameters() and context.global_scale == SCALE
    except (ValueError, RuntimeError) as error:
        raise BadMessage("bad_key", f"a public key that cannot be read: {error}") from None
    if not ours or not context.has_public_key():
        raise BadMessage("bad_key", "parameters that are not ours, or no public key with them")
    return context


def slices(size: int) -> int:
    """How many ciphertexts carry so many values."""
    return -(-size // SLICE)


def encrypt(public: Context, vector: Floats, weight: float) -> Iterator[bytes]:
    """w x of a vector (P,), one ciphertext for each SLICE of it; the last is filled up with zeros.

    ValueError for a vector that does not fit, as NaN does not.
    """
    for start in range(0, len(vector), SLICE):
        values = np.zeros(SLICE)
        piece = vector[start : start + SLICE]
        values[: len(piece)] = np.multiply(piece, weight, dtype=np.float64)
        if not np.abs(values).max() < weight * LARGEST:  # NaN is not, either
            raise ValueError(f"a parameter of {LARGEST:.0f} or more, which no encrypted sum holds")
        ciphertext: bytes = _tenseal().ckks_vector(public, values).serialize()
        yield ciphertext


def add(public: Context, ciphertexts: Sequence[bytes]) -> bytes:
    """The ciphertext of the sum, of those of all senders for one slice. BadMessage for what is none of this scheme."""
    first, *others = (_read(public, ciphertext) for ciphertext in ciphertexts)
    for other in others:
        first += other
    total: bytes = first.serialize()
    return total


def decrypt(keys: Keys, ciphertext: bytes, count: int) -> Floats:
    """The first `count` values of a slice, (count,), as multiples of 2^-16: each sum to 2^-17.

    BadMessage for what is no ciphertext of this scheme, and for values that no weighted mean has.
    """
    values = np.array(_read(keys.secret, ciphertext).decrypt())[:count]
    if not np.abs(values).max(initial=0.0) < LARGEST:
        raise BadMessage("bad_ciphertext", f"a sum of {LARGEST:.0f} or more: of other keys, or not of weighted vectors")
    return (np.rint(values * UNITS) / UNITS).astype(np.float32)


def _read(context: Context, ciphertext: bytes) -> CKKSVector:
    if len(ciphertext) > LONGEST_CIPHERTEXT:
        raise BadMessage(
            "bad_ciphertext", f"{len(ciphertext)} bytes for a ciphertext, which takes at most {LONGEST_CIPHERTEXT}"
        )
    try:
        vector = _tenseal().ckks_vector_from(context, ciphertext)
    except (ValueError, RuntimeError) as error:
        raise BadMessage("bad_ciphertext", f"a ciphertext that cannot be read: {error}") from None
    parts = vector.ciphertext()
    if vector.size() != SLICE or len(parts) != 1 or parts[0].size() != 2 or parts[0].scale != SCALE:
        raise BadMessage("bad_ciphertext", f"a ciphertext that is not one of {SLICE} values at our scale")
    return vector


# -- TenSEAL ---------------------------------------------------------------------------------------------------------


def _tenseal() -> ModuleType:
    """Imported where it is used: it may be absent."""
    try:
        import tenseal
    except ImportError:
        raise BadInput(
            "encrypted sums need TenSEAL, which is not here: pip install 'p2pfl-mesh[homomorphic]'"
        ) from None
    module: ModuleType = tenseal
    return module


def _new_context() -> Context:
    tenseal = _tenseal()
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(PRIMES), n_threads=1)
    context.global_scale = SCALE
    return context


def _parameters(context: Context) -> list[int]:
    """SEAL's hash of scheme, degree and primes."""
    return list(context.seal_context().data.key_parms_id())


@cache
def _our_parameters() -> list[int]:
    return _parameters(_new_context())
