"""Masks that vanish in a sum: how a node's part of it is made, and how the sum is read. Nothing else can be read.

For a gathering of the receiver r, each two senders j < k agree on a secret that nobody else has, the receiver least of
all: X25519 of the keys of their present processes, which each has signed with its identity key, through HKDF-SHA256
salted with a digest of the gathering. From it they draw one stream of 32-bit words (AES-256 in counter mode: under a
key that is used for this one stream), which j adds and k takes off:

    part_j = rint(2^16 w_j x_j) + sum_{k > j} stream_jk - sum_{k < j} stream_kj        mod 2^32
    sum_j part_j = sum_j rint(2^16 w_j x_j)                                            mod 2^32

So the sum over all senders is that of the weighted vectors, exact to k 2^-17 an element, and any fewer parts are noise
that is uniform and independent of the vectors (Bonawitz et al., Practical Secure Aggregation, 2017, of which this is
the part without recovery: to recover a sum is to unmask whoever was only late). The digest is of the whole gathering:
two receivers, rounds, weights or sets never share a stream, and senders that were shown different gatherings do not
fit together. The keys live as long as the process: whoever takes the identity keys later cannot read old sums.

What it does not hide:
- The sum itself. Where one sender's weight exceeds all others', that is nearly its vector.
- A vector from those who put together what they have: the receiver and all the other senders, or receivers whose sums
  differ by one sender.
- From one receiver: how its sums differ from round to round. If a member is in the one and not in the next, that is
  about that member's vector, the closer the less the others have moved; and a dishonest receiver can leave members out
  as it likes. Noise (`privacy.dp`) bounds what all this tells.
- Whether an experiment that is run a second time gives the same sums: with the same seed and rows it does.
It protects from curious receivers, not from bad senders: whoever sends noise spoils the sum, and nobody can tell who
it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from p2pfl.envelope import sign_statement
from p2pfl.identity import Identity
from p2pfl.messages import BadMessage, Gathering, MaskKey
from p2pfl.wire import statement

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]  # little-endian, as they travel

UNITS: Final = 2.0**16  # in 1: the unit of the fixed-point numbers is 2^-16
LARGEST: Final = 2.0**15  # what no parameter may reach: beyond, a weighted mean would not fit into 32 bits
SLICE: Final = 1 << 15  # words that are masked at a time: all that one step touches stays in the processor's cache
WORD: Final = 4  # bytes
STREAM_CONTEXT: Final = b"p2pfl mask stream 1"
NUMBERS: Final = 2**31  # of gatherings, as a manifest names them


class MaskMaker:
    """One process's secret key, and what it gives to others' sums. Used by one thread at a time."""

    def __init__(self, identity: Identity, epoch: int, federation: bytes) -> None:
        self._secret = X25519PrivateKey.generate()
        self._federation = federation
        unsigned = MaskKey(identity.name, epoch, self._secret.public_key().public_bytes_raw())
        self.key = sign_statement(unsigned, identity, federation)

    def number(self, receiver: str, gathering: Gathering) -> int:
        """See `gathering_number`."""
        return gathering_number(self._federation, receiver, gathering)

    def part(
        self, vector: Floats, weight: float, receiver: str, gathering: Gathering, out: Words | None = None
    ) -> Words:
        """This node's part of the sum, (P,) words, from its vector (P,); in `out`, if that is given.

        BadMessage if it is not among the senders, ValueError for a vector that does not fit.
        """
        if self.key not in gathering.keys:
            raise BadMessage("bad_gathering", f"{self.key.name} is not among the senders")
        part = fixed(vector, weight, out)
        digest = _digest(self._federation, receiver, gathering)
        for other in gathering.keys:
            if other.name != self.key.name:
                stream = self._stream(other, digest)
                _combine(part, stream, np.add if self.key.name < other.name else np.subtract)
        return part

    def _stream(self, other: MaskKey, digest: bytes) -> Cipher[CTR]:
        try:
            shared = self._secret.exchange(X25519PublicKey.from_public_bytes(other.key))
        except ValueError:
            raise BadMessage("bad_gathering", f"{other.name} has a mask key that gives no secret") from None
        names = "\0".join(sorted((self.key.name, other.name))).encode()
        key = HKDF(SHA256(), 32, salt=digest, info=STREAM_CONTEXT + names).derive(shared)
        return Cipher(AES256(key), CTR(bytes(16)))  # the key is used once, so the counter can begin at 0


def check_key(key: MaskKey) -> None:
    """BadMessage for a public key with which nobody can agree on a secret: of small order."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key.key))
    except ValueError:
        raise BadMessage("bad_record", f"the mask key of {key.name} gives no secret") from None


def gathering_number(federation: bytes, receiver: str, gathering: Gathering) -> int:
    """The number by which the parts are known that belong to this gathering."""
    return int.from_bytes(_digest(federation, receiver, gathering)[:4], "big") % NUMBERS


def _digest(federation: bytes, receiver: str, gathering: Gathering) -> bytes:
    return blake3(b"\0".join((federation, receiver.encode(), statement(gathering)))).digest()


def _combine(part: Words, stream: Cipher[CTR], operation: np.ufunc) -> None:
    """part ← part ± stream, mod 2^32, slice by slice."""
    encryptor = stream.encryptor()
    zeros = bytes(SLICE * WORD)
    words = bytearray(len(zeros))
    mask = np.frombuffer(words, dtype="<u4")
    for start in range(0, len(part), SLICE):
        piece = part[start : start + SLICE]
        encryptor.update_into(zeros, words)
        operation(piece, mask[: len(piece)], out=piece)


def fixed(vector: Floats, weight: float, out: Words | None = None) -> Words:
    """rint(2^16 w x) of a vector (P,), as words mod 2^32, in `out` if given; ValueError for one that does not fit."""
    part = np.empty(len(vector), dtype="<u4") if out is None else out
    for start in range(0, len(vector), SLICE):
        scaled = np.multiply(vector[start : start + SLICE], weight * UNITS, dtype=np.float64)
        np.rint(scaled, out=scaled)
        if not np.abs(scaled).max() < weight * UNITS * LARGEST + 1:  # NaN is not, either
            raise ValueError(f"a parameter of {LARGEST:.0f} or more, which no masked sum holds")
        part[start : start + SLICE] = scaled.astype(np.int64).astype(np.uint32)
    return part


def read_sum(parts: Sequence[Words], weight: float) -> Floats:
    """sum_j w_j x_j / `weight`, (P,), from the parts of all senders; `weight` is the sum of the w_j.

    BadMessage for what no vectors can have given: parts of which one is missing, or is no honest one, are noise.
    """
    scale = 1.0 / (UNITS * weight)
    mean = np.empty(len(parts[0]), dtype=np.float32)
    for start in range(0, len(mean), SLICE):
        total = parts[0][start : start + SLICE].copy()
        for part in parts[1:]:
            total += part[start : start + SLICE]
        mean[start : start + SLICE] = total.view(np.int32) * scale
    largest = max(abs(float(mean.min())), abs(float(mean.max())))
    if largest > LARGEST * (1 + len(parts) / (UNITS * weight)):
        raise BadMessage("bad_value", f"a parameter of {largest:.3g} in a sum: one part is noise")
    return mean
