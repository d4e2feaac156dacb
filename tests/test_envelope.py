"""An update is opened as it was sealed, by whom it was meant for, as the work of its maker; or not at all."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import msgpack
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.envelope import (
    NO_BASE,
    SIGNING_CONTEXT,
    WHOLE,
    Buffers,
    Manifest,
    Opening,
    Sealed,
    Sealer,
    sealed_size,
    verify,
)
from p2pfl.identity import Card, Identity
from p2pfl.messages import MAX_EPOCH, MAX_ROUND, BadMessage, Offer
from p2pfl.wire import CHUNK, MAX_MANIFEST, TAG, decode, encode, unpack

ALICE, CAROL = Identity.generate("alice"), Identity.generate("carol")
FEDERATION, SCHEMA = b"f" * 32, b"s" * 32
SIZES = [4, CHUNK - 4, CHUNK, CHUNK + 4, 3 * CHUNK + 8]
LONG = os.urandom(3 * CHUNK + 8)  # four chunks, the last of which is short


def sealer_of(size: int, identity: Identity = ALICE) -> Sealer:
    return Sealer(identity, FEDERATION, SCHEMA, size, epoch=7)


def sealed_by(identity: Identity, vector: bytes) -> Sealed:
    return sealer_of(len(vector), identity).seal(memoryview(vector), round=3, mass=1.5, reach=4.0)


def chunks_of(sealed: Sealed) -> list[bytes]:
    return [bytes(sealed.chunk(index)) for index in range(sealed.chunks)]


def verified(offer: Offer, size: int, card: Card = ALICE.card) -> Manifest:
    """The offer as a member of the federation verifies it."""
    return verify(offer, card, FEDERATION, SCHEMA, size)


def opened(offer: Offer, chunks: Iterable[bytes], size: int) -> bytes:
    """The update as a member of the federation opens it, with its chunks numbered in the order that they come in."""
    opening = Opening(verified(offer, size), offer.key, Buffers(size).take())
    for index, chunk in enumerate(chunks):
        opening.add(index, chunk)
    return bytes(opening.finish().view)


def refused_offer(offer: Offer, size: int, card: Card = ALICE.card) -> str:
    with pytest.raises(BadMessage) as caught:
        verified(offer, size, card)
    return caught.value.code


def refused_update(offer: Offer, chunks: Iterable[bytes], size: int) -> str:
    with pytest.raises(BadMessage) as caught:
        opened(offer, chunks, size)
    return caught.value.code


def signed(signer: Identity, offer: Offer, /, **changes: object) -> Offer:
    """The offer with these fields of its manifest changed or added, signed anew: what `signer` could really send."""
    manifest = msgpack.packb(unpack(offer.manifest) | changes)
    return replace(offer, manifest=manifest, signature=signer.sign(SIGNING_CONTEXT, manifest))


def every_bit_flipped(data: bytes) -> Iterable[bytes]:
    for bit in range(8 * len(data)):
        yield flipped(data, bit // 8, 1 << bit % 8)


def flipped(data: bytes, at: int, mask: int = 1) -> bytes:
    altered = bytearray(data)
    altered[at] ^= mask
    return bytes(altered)


SMALL, LARGE = sealed_by(ALICE, b"abcd"), sealed_by(ALICE, LONG)
CHUNKS = chunks_of(LARGE)


# -- What is sealed is opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_update_is_opened_as_it_was_sealed(size: int) -> None:
    vector = os.urandom(size)
    sealed = sealed_by(ALICE, vector)
    chunks = chunks_of(sealed)
    assert len(chunks) == math.ceil(size / CHUNK)
    assert sum(map(len, chunks)) == sealed_size(size)
    assert max(map(len, chunks)) <= CHUNK + TAG
    assert opened(sealed.offer, chunks, size) == vector


def test_the_manifest_says_what_was_sealed() -> None:
    assert len(SMALL.offer.manifest) <= MAX_MANIFEST
    assert verified(SMALL.offer, 4) == Manifest(
        federation=FEDERATION,
        signer=ALICE.card.signing_key,
        epoch=7,
        round=3,
        schema=SCHEMA,
        codec=WHOLE,
        base=NO_BASE,
        size=4,
        mass=1.5,
        reach=4.0,
        sealed=blake3(SMALL.chunk(0)).digest(),
        commitment=blake3(SMALL.offer.key, derive_key_context="p2pfl 2026 envelope key commitment").digest(),
        previous=bytes(32),
    )


def test_an_offer_passes_through_the_wire_unchanged() -> None:
    assert decode(*encode(LARGE.offer)) == LARGE.offer


def test_a_vector_of_another_size_is_not_sealed() -> None:
    for size in (0, 4, 12):
        with pytest.raises(ValueError, match=f"a vector of {size} bytes where 8 are expected"):
            sealer_of(8).seal(memoryview(bytes(size)), 0, 1.0, 1.0)


def test_the_library_computes_the_published_aes_256_gcm() -> None:
    """Test case 14 of McGrew and Viega, "The Galois/Counter Mode of Operation", by the calls that `envelope` makes."""
    published = bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919")
    sealed, plain = bytearray(32), bytearray(b"\xff" * 16)
    AESGCM(bytes(32)).encrypt_into(bytes(12), bytes(16), None, sealed)
    assert sealed == published
    AESGCM(bytes(32)).decrypt_into(bytes(12), published, None, plain)
    assert plain == bytes(16)


def test_a_chunk_is_aes_256_gcm_with_its_number_and_a_last_flag_as_nonce() -> None:
    """So that anyone can open an update with any AES library, today and in ten years."""
    cipher = AESGCM(LARGE.offer.key)
    plain = [cipher.decrypt(bytes(10) + bytes([index, index == 3]), CHUNKS[index], None) for index in range(4)]
    assert b"".join(plain) == LONG
    assert verified(LARGE.offer, len(LONG)).sealed == blake3(b"".join(CHUNKS)).digest()


# -- One flipped bit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "code"), [("manifest", "bad_signature"), ("signature", "bad_signature"), ("key", "bad_key")]
)
def test_an_offer_with_any_bit_flipped_is_refused(part: str, code: str) -> None:
    for altered in every_bit_flipped(getattr(SMALL.offer, part)):
        assert refused_offer(replace(SMALL.offer, **{part: altered}), 4) == code


def test_a_chunk_with_any_bit_flipped_is_refused() -> None:
    for altered in every_bit_flipped(bytes(SMALL.chunk(0))):
        assert refused_update(SMALL.offer, [altered], 4) == "bad_chunk"


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("place", ["first", "middle", "last of the data", "first of the tag", "last"])
def test_a_bit_flipped_in_any_chunk_stops_the_update_there(index: int, place: str) -> None:
    size = len(CHUNKS[index])
    at = {"first": 0, "middle": size // 2, "last of the data": size - TAG - 1, "first of the tag": size - TAG}
    opening = Opening(verified(LARGE.offer, len(LONG)), LARGE.offer.key, Buffers(len(LONG)).take())
    for number in range(index):
        opening.add(number, CHUNKS[number])
    with pytest.raises(BadMessage, match=f"bad_chunk: chunk {index} is not as it was sealed"):
        opening.add(index, flipped(CHUNKS[index], at.get(place, size - 1)))
    assert opening.next == index
    with pytest.raises(BadMessage, match=f"bad_chunk: {index} of 4 chunks came"):
        opening.finish()


# -- Chunks in disorder ----------------------------------------------------------------------------------------------

A, B, C, D = CHUNKS


@pytest.mark.parametrize(
    "chunks",
    {
        "none": [],
        "swapped": [B, A, C, D],
        "reversed": [D, C, B, A],
        "one dropped": [A, C, D],
        "the first missing": [B, C, D],
        "the last missing": [A, B, C],
        "one repeated": [A, A, B, C, D],
        "one in place of another": [A, B, B, D],
        "the last repeated": [A, B, C, D, D],
        "an empty one at the end": [A, B, C, D, b""],
        "one truncated": [A, B[:-1], C, D],
        "one without its tag": [A, B[:-TAG], C, D],
        "one empty": [A, b"", C, D],
        "the last truncated": [A, B, C, D[:-1]],
        "one lengthened": [A, B + b"\0", C, D],
        "the last lengthened": [A, B, C, D + b"\0"],
        "a byte moved to the next": [A, B + C[:1], C[1:], D],
    }.items(),
    ids=lambda case: case[0],
)
def test_only_the_whole_sequence_of_chunks_is_an_update(chunks: tuple[str, list[bytes]]) -> None:
    assert refused_update(LARGE.offer, chunks[1], len(LONG)) == "bad_chunk"


def test_chunks_come_in_order_and_nothing_comes_after_the_last() -> None:
    opening = Opening(verified(LARGE.offer, len(LONG)), LARGE.offer.key, Buffers(len(LONG)).take())
    for index in range(4):
        for wrong in {-1, 0, 1, 2, 3, 4, 2**31} - {index}:
            with pytest.raises(BadMessage, match=f"bad_chunk: chunk {wrong} of 4 where {index} must come"):
                opening.add(wrong, CHUNKS[index])
        assert not opening.complete
        opening.add(index, CHUNKS[index])
    assert opening.complete
    with pytest.raises(BadMessage, match="bad_chunk: chunk 4 of 4"):
        opening.add(4, D)
    assert bytes(opening.finish().view) == LONG


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_cut_update_is_no_update_even_where_the_signed_length_says_so(kept: int) -> None:
    """The flag in the last nonce alone says where an update ends: here its size, digest and signature all agree."""
    cut = signed(ALICE, LARGE.offer, size=kept * CHUNK, sealed=blake3(b"".join(CHUNKS[:kept])).digest())
    with pytest.raises(BadMessage, match=f"bad_chunk: chunk {kept - 1} is not as it was sealed"):
        opened(cut, CHUNKS[:kept], kept * CHUNK)


def test_a_lengthened_update_is_no_update_even_where_the_signed_length_says_so() -> None:
    vector = LONG[: 2 * CHUNK]
    short = sealed_by(ALICE, vector)
    chunks = [*chunks_of(short), CHUNKS[2]]
    longer = signed(ALICE, short.offer, size=3 * CHUNK, sealed=blake3(b"".join(chunks)).digest())
    with pytest.raises(BadMessage, match="bad_chunk: chunk 1 is not as it was sealed"):
        opened(longer, chunks, 3 * CHUNK)


def test_a_chunk_of_another_update_does_not_fit() -> None:
    other = chunks_of(sealed_by(ALICE, LONG))
    for index in range(4):
        mixed = [*CHUNKS[:index], other[index], *CHUNKS[index + 1 :]]
        assert refused_update(LARGE.offer, mixed, len(LONG)) == "bad_chunk"


def test_who_holds_the_key_can_read_the_update_but_not_make_another() -> None:
    """Every neighbour has the key; only the signed digest keeps it from sealing something else under it."""
    forged = AESGCM(SMALL.offer.key).encrypt(bytes(11) + b"\x01", b"evil", None)
    assert refused_update(SMALL.offer, [forged], 4) == "bad_digest"


# -- Offers that do not belong here ----------------------------------------------------------------------------------


def test_what_someone_else_signed_is_not_taken_for_the_peers() -> None:
    mine = sealed_by(CAROL, b"abcd").offer
    verified(mine, 4, CAROL.card)
    assert refused_offer(mine, 4, ALICE.card) == "bad_signature"  # Carol's, shown by Alice as her own
    assert refused_offer(signed(ALICE, mine), 4, ALICE.card) == "bad_signature"  # … and signed by Alice on top
    assert refused_offer(signed(CAROL, SMALL.offer), 4, ALICE.card) == "bad_signature"  # Carol speaks for Alice


def test_a_signature_made_for_another_purpose_is_none() -> None:
    for context in (b"", b"hello", b"card", SIGNING_CONTEXT + b" "):
        signature = ALICE.sign(context, SMALL.offer.manifest)
        assert refused_offer(replace(SMALL.offer, signature=signature), 4) == "bad_signature"
    for size in (0, 63, 65):
        assert refused_offer(replace(SMALL.offer, signature=bytes(size)), 4) == "bad_signature"


def test_an_update_of_another_federation_schema_or_size_is_refused() -> None:
    assert refused_offer(signed(ALICE, SMALL.offer, federation=b"g" * 32), 4) == "bad_federation"
    assert refused_offer(signed(ALICE, SMALL.offer, schema=b"t" * 32), 4) == "bad_schema"
    for size in (1, 8, CHUNK, 2**40, 2**64 - 1):
        assert refused_offer(signed(ALICE, SMALL.offer, size=size), 4) == "bad_schema"


NO_DIGESTS = [b"", b"d" * 31, b"d" * 33, "d" * 32, None, 0, []]
NO_WEIGHTS = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1, True, "1", None]
NO_INTEGERS = [-1, True, 1.0, "1", None, -(2**63), 2**64 - 1, {}]
WRONG: dict[str, list[object]] = {  # for each field of a manifest, what it must not be, whoever signed it
    "federation": NO_DIGESTS,
    "signer": NO_DIGESTS,
    "epoch": [*NO_INTEGERS, 0, MAX_EPOCH + 1],
    "round": [*NO_INTEGERS, MAX_ROUND + 1],
    "schema": NO_DIGESTS,
    "codec": [b"float32", None, 0, True, []],
    "base": [*NO_INTEGERS[1:], -2, MAX_ROUND + 1],
    "size": [-4, 0, True, 4.0, "4", None],
    "mass": NO_WEIGHTS,
    "reach": NO_WEIGHTS,
    "sealed": NO_DIGESTS,
    "commitment": NO_DIGESTS,
    "previous": NO_DIGESTS,
}


@pytest.mark.parametrize("field", Manifest.__slots__)
def test_no_field_of_a_manifest_takes_a_wrong_value_from_its_signer(field: str) -> None:
    for value in WRONG[field]:
        assert refused_offer(signed(ALICE, SMALL.offer, **{field: value}), 4) == "bad_header", value


def test_only_the_codecs_of_the_experiment_are_taken_each_with_its_own_size() -> None:
    for codec in ("", "float16", "Float32", "float32 ", "int8"):
        assert refused_offer(signed(ALICE, SMALL.offer, codec=codec), 4) == "bad_schema"
    sealed = Sealer(ALICE, FEDERATION, SCHEMA, 4, epoch=7, packed=3).seal(memoryview(b"abc"), 5, 1.0, 1.0, "int8", 4)
    manifest = verify(sealed.offer, ALICE.card, FEDERATION, SCHEMA, 4, {"int8": 3})
    assert (manifest.codec, manifest.base, manifest.size) == ("int8", 4, 3)
    for packed in ({"int8": 4}, {"fp16": 3}, {}):
        with pytest.raises(BadMessage, match="bad_schema"):
            verify(sealed.offer, ALICE.card, FEDERATION, SCHEMA, 4, packed)
    opening = Opening(manifest, sealed.offer.key, Buffers(4).take())
    opening.add(0, sealed.chunk(0))
    lease = opening.finish()
    assert lease.manifest == manifest and lease.view[:3] == b"abc"


def test_a_manifest_has_exactly_its_fields() -> None:
    def signed_map(fields: dict[str, object]) -> Offer:
        manifest = msgpack.packb(fields)
        return Offer(manifest, ALICE.sign(SIGNING_CONTEXT, manifest), SMALL.offer.key)

    fields = unpack(SMALL.offer.manifest)
    verified(signed_map(fields), 4)
    assert refused_offer(signed(ALICE, SMALL.offer, more=0), 4) == "bad_header"
    for field in Manifest.__slots__:
        less = {key: value for key, value in fields.items() if key != field}
        assert refused_offer(signed_map(less), 4) == "bad_header"


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_signed_bytes_that_are_no_manifest_are_refused(manifest: bytes) -> None:
    offer = Offer(manifest, ALICE.sign(SIGNING_CONTEXT, manifest), SMALL.offer.key)
    assert refused_offer(offer, 4) == "bad_header"


# -- Keys and nonces -------------------------------------------------------------------------------------------------


def test_an_offer_with_another_key_is_refused_before_anything_is_opened() -> None:
    """AES-GCM alone would let one ciphertext open as two different models, under two keys."""
    for key in (os.urandom(32), sealed_by(ALICE, b"abcd").offer.key, bytes(32), SMALL.offer.key[:16], b""):
        assert refused_offer(replace(SMALL.offer, key=key), 4) == "bad_key"


def test_no_key_is_used_twice_and_the_same_vector_never_gives_the_same_bytes() -> None:
    sealer, vector = sealer_of(64), memoryview(bytes(64))
    updates = [sealer.seal(vector, round, 1.0, 1.0) for round in range(200)]
    assert len({update.offer.key for update in updates}) == 200
    assert len({bytes(update.chunk(0)) for update in updates}) == 200
    assert len({update.offer.manifest for update in updates}) == 200


def test_no_nonce_is_used_twice_under_a_key() -> None:
    """Equal plaintexts under one key and one nonce give equal bytes: so all chunks of zeros must differ."""
    chunks = chunks_of(sealed_by(ALICE, bytes(5 * CHUNK)))
    assert len({chunk[:32] for chunk in chunks}) == 5


# -- The chain of manifests ------------------------------------------------------------------------------------------


def test_each_manifest_names_the_one_before_it() -> None:
    sealer = sealer_of(4)
    manifests = [sealer.seal(memoryview(b"abcd"), round, 1.0, 1.0).offer.manifest for round in range(4)]
    named = [unpack(manifest)["previous"] for manifest in manifests]
    assert named == [bytes(32), *(blake3(manifest).digest() for manifest in manifests[:-1])]


# -- Buffers ---------------------------------------------------------------------------------------------------------


def test_a_sealed_update_keeps_its_buffer_as_long_as_anybody_holds_it() -> None:
    sealer = sealer_of(4)

    def seal(vector: bytes) -> Sealed:
        return sealer.seal(memoryview(vector), 0, 1.0, 1.0)

    first = seal(b"aaaa")
    buffer, neighbour = first.lease.view.obj, first
    del first
    second = seal(b"bbbb")  # the neighbour has not got all of the first one yet
    assert second.lease.view.obj is not buffer
    assert opened(neighbour.offer, chunks_of(neighbour), 4) == b"aaaa"
    del neighbour
    third = seal(b"cccc")
    assert third.lease.view.obj is buffer
    assert opened(second.offer, chunks_of(second), 4) == b"bbbb"
    assert opened(third.offer, chunks_of(third), 4) == b"cccc"


def test_a_hundred_rounds_need_no_more_buffers_than_two() -> None:
    sealer, vector = sealer_of(4), memoryview(b"abcd")
    used, current = [], None
    for round in range(100):
        current = sealer.seal(vector, round, 1.0, 1.0)  # the one before it is let go once this one is there
        used.append(current.lease.view.obj)
    assert len({id(buffer) for buffer in used}) == 2


def test_an_opened_vector_keeps_its_buffer_and_an_abandoned_one_gives_it_back() -> None:
    staging = Buffers(4)
    opening = Opening(verified(SMALL.offer, 4), SMALL.offer.key, staging.take())
    buffer = opening.lease.view.obj
    opening.add(0, SMALL.chunk(0))
    vector = opening.finish()
    del opening
    assert staging.take().view.obj is not buffer
    assert bytes(vector.view) == b"abcd"
    del vector
    abandoned = Opening(verified(SMALL.offer, 4), SMALL.offer.key, staging.take())
    assert abandoned.lease.view.obj is buffer


@given(st.lists(st.none() | st.integers(0, 5), max_size=40))
@settings(deadline=None)
def test_no_two_leases_ever_share_a_buffer_and_there_are_never_more_than_were_held_at_once(turns: list) -> None:
    """None takes a buffer; a number gives back the lease of that number, if so many are held."""
    buffers, held, seen, most = Buffers(8), [], [], 0
    for turn in turns:
        if turn is None:
            held.append(buffers.take())
            seen.append(held[-1].view.obj)
            most = max(most, len(held))
        elif turn < len(held):
            del held[turn]
        assert all(one.view.obj is not other.view.obj for one, other in combinations(held, 2))
    assert len({id(buffer) for buffer in seen}) == most


def test_a_buffer_comes_back_from_another_thread() -> None:
    buffers, held = Buffers(8), []
    held.append(buffers.take())
    buffer = held[0].view.obj
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert buffers.take().view.obj is buffer
