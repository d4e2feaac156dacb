"""Seal and sign an update once; verify and open it. Two verbs, no options.

An update is sealed once a round, whatever the number of neighbours, with AES-256-GCM under a fresh random key that is
used for nothing else, so the nonce can simply be the chunk's number (and a flag on the last one, so that a cut update
is no update: the STREAM construction). A signed manifest binds the sealed bytes to their maker, federation, epoch and
round. Whoever holds the sealed bytes can store or forward them; only who was given the key can open them.

    sender    seal(vector) -> Sealed(manifest, signature, key, chunks)
    receiver  verify(offer) -> Manifest;  Opening(manifest, key, out).add(chunk) … .finish()

Nothing that is opened may be used before `finish` has returned: until then it is only somebody's claim.
"""

from __future__ import annotations

import math
import secrets
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeVar

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2pfl.identity import Card, Identity
from p2pfl.messages import MAX_EPOCH, MAX_ROUND, BadMessage, Gathering, MaskKey, MemberRecord, Offer
from p2pfl.wire import CHUNK, TAG, check_fields, pack, statement, unpack

SIGNING_CONTEXT: Final = b"p2pfl manifest 1"
RECORD_CONTEXT: Final = b"p2pfl member 1"
MASK_KEY_CONTEXT: Final = b"p2pfl mask key 1"
GATHERING_CONTEXT: Final = b"p2pfl gathering 1"
KEY_CONTEXT: Final = "p2pfl 2026 envelope key commitment"  # BLAKE3 key derivation wants a unique sentence
KEY_BYTES: Final = 32
NOTHING: Final[Mapping[str, int]] = MappingProxyType({})
WHOLE: Final = "float32"  # the codec of a vector that stands for itself; the others are named in the experiment
MASKED: Final = "masked"  # the codec of a part of a sum: whole numbers that mean something only in that sum
NO_BASE: Final = -1  # it continues nothing, or the first parameters, which all members know


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the signer says of one update. All of it is signed, none of it is secret."""

    federation: bytes  # digest of the experiment that all members agreed on
    signer: bytes  # the Ed25519 public key
    epoch: int  # of the signer's process
    round: int
    schema: bytes  # digest of names, dtypes and shapes
    codec: str
    # The round of the update that this one continues: it says by how much that one has changed. Of a part of a sum: the
    # number of the gathering for which it was made.
    base: int
    size: int  # bytes of the opened vector, as the codec writes it
    mass: float  # the signer's weight in the mean
    reach: float  # sum of the masses in the signer's closed neighbourhood in this round
    sealed: bytes  # BLAKE3 of the sealed chunks, one after the other
    commitment: bytes  # of the key: AES-GCM alone would let one ciphertext open under two keys
    previous: bytes  # BLAKE3 of the signer's previous manifest, zeros at first: a chain that can be audited

    def encode(self) -> bytes:
        return pack({name: getattr(self, name) for name in self.__slots__})


def _is_bytes(value: object) -> bool:
    return type(value) is bytes and len(value) == 32


def _is_weight(value: object) -> bool:
    return type(value) is float and 0 < value < math.inf


_CHECKS = {
    "federation": _is_bytes,
    "signer": _is_bytes,
    "epoch": lambda v: type(v) is int and 1 <= v <= MAX_EPOCH,
    "round": lambda v: type(v) is int and 0 <= v <= MAX_ROUND,
    "schema": _is_bytes,
    "codec": lambda v: type(v) is str,
    "base": lambda v: type(v) is int and NO_BASE <= v <= MAX_ROUND,
    "size": lambda v: type(v) is int and v > 0,
    "mass": _is_weight,
    "reach": _is_weight,
    "sealed": _is_bytes,
    "commitment": _is_bytes,
    "previous": _is_bytes,
}


# -- Buffers ---------------------------------------------------------------------------------------------------------


class Lease:
    """A buffer that somebody holds: `view` is writable. It goes back to its pool when the last holder drops it.

    Of an opened update `manifest` says what the first `manifest.size` bytes of it are.
    """

    __slots__ = ("__weakref__", "manifest", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.manifest: Manifest | None = None


class Buffers:
    """Byte buffers of one size, used again and again: fresh pages for 100 MB cost more than the cryptography."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: deque[memoryview] = deque()  # append and pop are atomic: a lease may end on another thread

    def take(self) -> Lease:
        try:
            view = self._free.pop()
        except IndexError:
            view = memoryview(bytearray(self.size))
        lease = Lease(view)
        weakref.finalize(lease, self._free.append, view).atexit = False
        return lease


# -- Seal ------------------------------------------------------------------------------------------------------------


def chunk_count(size: int) -> int:
    """How many chunks carry `size` bytes."""
    return -(-size // CHUNK)


def sealed_size(size: int) -> int:
    """Bytes of a vector of `size` bytes once sealed: a tag for each chunk."""
    return size + TAG * chunk_count(size)


def _nonce(index: int, last: bool) -> bytes:
    # Never repeats under one key: each key seals one update, each chunk of it has its own number.
    return index.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _commitment(key: bytes) -> bytes:
    return blake3(key, derive_key_context=KEY_CONTEXT).digest()


@dataclass(frozen=True, slots=True)
class Sealed:
    """One update, ready for every neighbour."""

    round: int
    offer: Offer
    lease: Lease  # of the sealed bytes …
    size: int  # … of which there are so many

    @property
    def chunks(self) -> int:
        return -(-self.size // (CHUNK + TAG))

    def chunk(self, index: int) -> memoryview:
        """The sealed bytes of chunk `index`, at most CHUNK + TAG; valid as long as the lease is held."""
        return self.lease.view[index * (CHUNK + TAG) : min((index + 1) * (CHUNK + TAG), self.size)]


class Sealer:
    """Seals this member's updates, one after the other; keeps the chain of manifests and the buffers."""

    def __init__(
        self, identity: Identity, federation: bytes, schema: bytes, size: int, epoch: int, packed: int = 0
    ) -> None:
        """`size`: bytes of a whole vector; `packed`: of one as the experiment's codec writes it, if it has one."""
        self._identity = identity
        self._federation = federation
        self._schema = schema
        self._size = size
        self._packed = packed
        self._epoch = epoch
        self._buffers = Buffers(sealed_size(max(size, packed)))
        self._previous = bytes(32)

    def seal(
        self, vector: memoryview, round: int, mass: float, reach: float, codec: str = WHOLE, base: int = NO_BASE
    ) -> Sealed:
        """Seal and sign `vector` (float32 as `size` bytes, or as the codec writes it) as the update of this round."""
        vector = vector.cast("B")
        size = self._size if codec in (WHOLE, MASKED) else self._packed
        if len(vector) != size:
            raise ValueError(f"a vector of {len(vector)} bytes where {size} are expected of {codec}")
        key = secrets.token_bytes(KEY_BYTES)
        cipher, digest = AESGCM(key), blake3()
        lease = self._buffers.take()
        last = chunk_count(size) - 1
        for index in range(last + 1):
            plain = vector[index * CHUNK : (index + 1) * CHUNK]
            start = index * (CHUNK + TAG)
            sealed = lease.view[start : start + len(plain) + TAG]
            cipher.encrypt_into(_nonce(index, index == last), plain, None, sealed)
            digest.update(sealed)
        manifest = Manifest(
            federation=self._federation,
            signer=self._identity.card.signing_key,
            epoch=self._epoch,
            round=round,
            schema=self._schema,
            codec=codec,
            base=base,
            size=size,
            mass=float(mass),
            reach=float(reach),
            sealed=digest.digest(),
            commitment=_commitment(key),
            previous=self._previous,
        ).encode()
        self._previous = blake3(manifest).digest()
        signature = self._identity.sign(SIGNING_CONTEXT, manifest)
        return Sealed(round, Offer(manifest, signature, key), lease, sealed_size(size))


# -- What a member says of itself ------------------------------------------------------------------------------------


Said = TypeVar("Said", MemberRecord, MaskKey, Gathering)
_CONTEXTS: Final = {MemberRecord: RECORD_CONTEXT, MaskKey: MASK_KEY_CONTEXT, Gathering: GATHERING_CONTEXT}


def sign_statement(said: Said, identity: Identity, federation: bytes) -> Said:
    """What this member says of itself, signed for this federation."""
    return replace(said, signature=identity.sign(_CONTEXTS[type(said)], federation + statement(said)))


def statement_holds(said: Said, card: Card, federation: bytes) -> bool:
    """Whether the owner of `card` said this, in this federation."""
    return card.verify(_CONTEXTS[type(said)], federation + statement(said), said.signature)


# -- Open ------------------------------------------------------------------------------------------------------------


def signed_manifest(manifest: bytes, signature: bytes, card: Card, federation: bytes) -> Manifest:
    """What the owner of `card` signed of an update in this federation; BadMessage if it is nothing of the kind.

    The signature is checked over the bytes as they came; they are parsed after, and nothing is allocated for them.
    """
    if not card.verify(SIGNING_CONTEXT, manifest, signature):
        raise BadMessage("bad_signature", f"the manifest was not signed by {card.name}")
    fields = unpack(manifest)
    check_fields("manifest", fields, _CHECKS)
    read = Manifest(**fields)  # type: ignore[arg-type]  # each field was checked above
    if read.signer != card.signing_key:
        raise BadMessage("bad_signature", f"the manifest names another signer than {card.name}, who signed it")
    if read.federation != federation:
        raise BadMessage("bad_federation", "the update is of another federation")
    return read


def verify(
    offer: Offer, card: Card, federation: bytes, schema: bytes, size: int, packed: Mapping[str, int] = NOTHING
) -> Manifest:
    """The manifest of an offer made by the owner of `card`, with the sizes of our own schema; BadMessage if not.

    `size`: bytes of a whole vector; `packed`: the other codecs that may come, and the bytes that each takes.
    """
    manifest = signed_manifest(offer.manifest, offer.signature, card, federation)
    expected = size if manifest.codec == WHOLE else packed.get(manifest.codec)
    if expected is None:
        raise BadMessage("bad_schema", f"an update in a codec that this experiment has not: {manifest.codec[:20]!r}")
    if manifest.schema != schema or manifest.size != expected:
        raise BadMessage("bad_schema", f"an update of {manifest.size} bytes where the schema says {expected}")
    if manifest.commitment != _commitment(offer.key):
        raise BadMessage("bad_key", "the key is not the one that the manifest commits to")
    return manifest


class Opening:
    """One update on its way in: chunks in order go into staging, and count for nothing until `finish` returns."""

    def __init__(self, manifest: Manifest, key: bytes, lease: Lease) -> None:
        self.manifest = manifest
        self.lease = lease
        self.chunks = chunk_count(manifest.size)
        self.next = 0  # index of the chunk that must come next
        self._cipher = AESGCM(key)
        self._digest = blake3()

    @property
    def complete(self) -> bool:
        return self.next == self.chunks

    def add(self, index: int, sealed: memoryview | bytes) -> None:
        """Open the next chunk into staging; BadMessage if it is another one, or not as it was sealed."""
        if index != self.next or index >= self.chunks:
            raise BadMessage("bad_chunk", f"chunk {index} of {self.chunks} where {self.next} must come")
        start = index * CHUNK
        plain = self.lease.view[start : min(start + CHUNK, self.manifest.size)]
        if len(sealed) != len(plain) + TAG:
            raise BadMessage("bad_chunk", f"chunk {index} has {len(sealed)} bytes, not {len(plain) + TAG}")
        try:
            self._cipher.decrypt_into(_nonce(index, index == self.chunks - 1), sealed, None, plain)
        except InvalidTag:
            raise BadMessage("bad_chunk", f"chunk {index} is not as it was sealed") from None
        self._digest.update(sealed)
        self.next += 1

    def finish(self) -> Lease:
        """The opened vector, once every chunk has come and the signed digest holds; BadMessage if not."""
        if not self.complete:
            raise BadMessage("bad_chunk", f"{self.next} of {self.chunks} chunks came")
        if self._digest.digest() != self.manifest.sealed:
            raise BadMessage("bad_digest", "the sealed bytes are not those that were signed")
        self.lease.manifest = self.manifest
        return self.lease
