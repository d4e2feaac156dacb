"""What is said arrives as it was said; whatever else arrives is refused by its code, and costs next to nothing."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from typing import get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.messages import (
    MAX_EPOCH,
    MAX_ROUND,
    NAME_PATTERN,
    OFFENCES,
    PROTOCOL_VERSION,
    Accusation,
    BadMessage,
    Channel,
    Chunk,
    Describe,
    Gathering,
    Goodbye,
    Gossip,
    Grant,
    Heartbeat,
    Hello,
    Hint,
    MaskKey,
    MemberRecord,
    Offer,
    Receipt,
    Refused,
    Resume,
    WireMessage,
)
from p2pfl.wire import (
    CHUNK,
    MAX_ENTRY,
    MAX_FACT,
    MAX_GOSSIPED,
    MAX_HEADER,
    MAX_MANIFEST,
    MAX_SENDERS,
    TAG,
    decode,
    encode,
    pack,
    statement,
    unpack,
)

EXAMPLES: dict[type[WireMessage], WireMessage] = {
    Hello: Hello(
        PROTOCOL_VERSION, "alice", "bob", "bulk", True, 7, 3, 1.5, -1, 0, b"e" * 32, b"s" * 32, signature=b"g" * 64
    ),
    Describe: Describe({"train.lr": "0.1"}),
    Heartbeat: Heartbeat(3, 2**32 - 1),
    Gossip: Gossip(
        (
            MemberRecord("al", 3, 1, "tcp://10.0.0.1:7000", False, b"g" * 64),
            MemberRecord("bo", 1, 0, "", True, b"h" * 64),
        ),
        (Hint("carol", 0, 7),),
    ),
    Receipt: Receipt(3),
    Accusation: Accusation("bob", "bad_value", (b"manifest", b"g" * 64)),
    MaskKey: MaskKey("bob", 2, b"k" * 32, b"g" * 64),
    Gathering: Gathering(
        3, 1.0, 4.0, True, (MaskKey("al", 1, b"k" * 32, b"g" * 64), MaskKey("bo", 2, b"l" * 32, b"h" * 64)), b"i" * 64
    ),
    Grant: Grant(3, 8),
    Resume: Resume(3, 8),
    Refused: Refused(3, "bad_schema"),
    Goodbye: Goodbye(3, "finished"),
    Offer: Offer(b"manifest", b"g" * 64, b"k" * 32),
    Chunk: Chunk(3, 0, b"sealed"),
}
EVERY_MESSAGE = pytest.mark.parametrize("message", EXAMPLES.values(), ids=[kind.__name__ for kind in EXAMPLES])

NOT_INTEGERS = [True, False, 1.0, math.nan, "1", b"1", -(2**63), 2**63 - 1, 2**64 - 1]
NOT_NAMES = ["", "a" * 65, "a\n", "\x1b[2J", "-a", "..", "a b", "é", b"bob", 1, True]
WRONG: dict[str, list[object]] = {  # for each field of a header, what it must not be
    "protocol": [True, float(PROTOCOL_VERSION)],  # equal to the right one in Python, yet not it
    "name": NOT_NAMES,
    "recipient": NOT_NAMES,
    "code": NOT_NAMES,
    "channel": ["", "Bulk", "bulk ", b"bulk", 0],
    "reason": ["", "Finished", b"finished", 0],
    "answer": [0, 1, 1.0, "true"],
    "epoch": [*NOT_INTEGERS, 0, -1, MAX_EPOCH + 1],
    "seen_epoch": [*NOT_INTEGERS, -1, MAX_EPOCH + 1],
    "round": [*NOT_INTEGERS, -1, MAX_ROUND + 1],
    "seen": [*NOT_INTEGERS, -2, MAX_ROUND + 1],
    "chunks": [*NOT_INTEGERS, 0, -1, 2**31 + 1],
    "start": [*NOT_INTEGERS, 0, -1, 2**31 + 1],
    "view": [*NOT_INTEGERS, -1, 2**32],
    "records": [*NOT_INTEGERS, -1, MAX_GOSSIPED + 1],
    "hints": [*NOT_INTEGERS, -1, MAX_GOSSIPED + 1],
    "index": [*NOT_INTEGERS, -1, 2**31 + 1],
    "mass": [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1, True, "1"],
    "reach": [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1, True, "1"],
    "gives": [0, 1, 1.0, "true"],
    "keys": [*NOT_INTEGERS, -1, MAX_SENDERS + 1],
    "experiment": [b"", b"e" * 31, b"e" * 33, "e" * 32],
    "schema": [b"", b"e" * 31, b"e" * 33, "e" * 32],
    "key": [b"", b"e" * 31, b"e" * 33, "e" * 32],
    "signature": [b"", b"e" * 63, b"e" * 65, "e" * 64],
    "facts": [
        "a",
        {"a": 1},
        {"a": b"b"},
        {"a": {}},
        {"a": []},
        {"a": "b" * (MAX_FACT + 1)},
        {"a" * (MAX_FACT + 1): ""},
    ],
}

names = st.from_regex(NAME_PATTERN, fullmatch=True)
rounds = st.integers(0, MAX_ROUND)
digests = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
signed = st.tuples(st.binary(min_size=1, max_size=MAX_MANIFEST), signatures)
addresses = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=262)
records = st.builds(
    MemberRecord, names, st.integers(1, MAX_EPOCH), rounds, addresses, st.booleans(), signature=signatures
)
hints = st.builds(Hint, names, st.integers(0, MAX_EPOCH), rounds)
keys = st.builds(MaskKey, names, st.integers(1, MAX_EPOCH), digests, signatures)
messages = st.one_of(
    st.builds(
        Hello,
        protocol=st.just(PROTOCOL_VERSION),
        name=names,
        recipient=names,
        channel=st.sampled_from(get_args(Channel)),
        answer=st.booleans(),
        epoch=st.integers(1, MAX_EPOCH),
        round=rounds,
        mass=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        seen=st.integers(-1, MAX_ROUND),
        seen_epoch=st.integers(0, MAX_EPOCH),
        experiment=digests,
        schema=digests,
        signature=signatures,
    ),
    st.builds(Describe, st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=8)),
    st.builds(Heartbeat, rounds, st.integers(0, 2**32 - 1)),
    st.builds(
        lambda told, doubted: Gossip(tuple(told), tuple(doubted)),
        st.lists(records, min_size=1, max_size=4),
        st.lists(hints, max_size=4),
    ),
    st.builds(Receipt, rounds),
    st.builds(lambda name, code, one: Accusation(name, code, one), names, st.sampled_from(OFFENCES[1:]), signed),
    st.builds(lambda name, one, two: Accusation(name, "equivocation", one + two), names, signed, signed),
    keys,
    st.builds(
        lambda round, mass, gives, senders: Gathering(round, mass, 2 * mass, gives, tuple(senders), b"s" * 64),
        rounds,
        st.floats(min_value=1e-9, max_value=1e9),
        st.booleans(),
        st.lists(keys, max_size=4, unique_by=lambda key: key.name).map(
            lambda some: sorted(some, key=lambda key: key.name)
        ),
    ),
    st.builds(Grant, rounds, st.integers(1, 2**31)),
    st.builds(Resume, rounds, st.integers(1, 2**31)),
    st.builds(Refused, rounds, names),
    st.builds(Goodbye, rounds, st.sampled_from(["finished", "leaving"])),
    st.builds(Offer, st.binary(min_size=1, max_size=200), signatures, digests),
    st.builds(Chunk, rounds, st.integers(0, 2**31), st.binary(min_size=1, max_size=200)),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3),
    max_leaves=8,
)


def header_of(message: WireMessage) -> dict[str, object]:
    """The header of a message as a map, for a test to spoil."""
    return unpack(encode(message)[0], table="facts")


def written(*pairs: tuple[object, object]) -> bytes:
    """A msgpack map of these keys and values, in a spelling that no dict has."""
    return msgpack.Packer().pack_map_header(len(pairs)) + b"".join(
        msgpack.packb(k) + msgpack.packb(v) for k, v in pairs
    )


def refused(header: bytes, body: bytes = b"") -> str:
    """The code under which these frames are refused, having cost no more memory than befits their size."""
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage) as caught:
            decode(header, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * (len(header) + len(body)) + 1_000_000
    assert caught.value.why.isprintable() and len(caught.value.why) < 600  # it goes into a log
    return caught.value.code


def nothing_else_comes_of(header: bytes, body: bytes) -> None:
    """These frames are a message that could have been sent, or a BadMessage."""
    try:
        message = decode(header, body)
    except BadMessage:
        return
    assert decode(*encode(message)) == message


# -- What is said arrives --------------------------------------------------------------------------------------------


def test_the_examples_are_the_whole_vocabulary() -> None:
    assert set(EXAMPLES) == set(get_args(WireMessage))


@given(messages)
@settings(deadline=None)
def test_a_message_arrives_as_it_was_sent(message: WireMessage) -> None:
    header, body = encode(message)
    assert len(header) <= MAX_HEADER
    assert decode(header, body) == message
    assert decode(memoryview(header), memoryview(body)) == message


def test_the_type_numbers_never_change() -> None:
    numbers = {kind.__name__: header_of(message)["type"] for kind, message in EXAMPLES.items()}
    assert numbers == {
        "Hello": 1,
        "Describe": 2,
        "Heartbeat": 3,
        "Grant": 4,
        "Refused": 5,
        "Goodbye": 6,
        "Receipt": 7,
        "Gossip": 8,
        "Resume": 9,
        "Accusation": 10,
        "MaskKey": 11,
        "Gathering": 12,
        "Offer": 16,
        "Chunk": 17,
    }


def test_the_bytes_of_a_chunk_are_not_copied() -> None:
    frame = memoryview(bytes(CHUNK + TAG))
    header, body = encode(Chunk(0, 0, frame))
    assert body is frame
    assert decode(header, frame).sealed is frame


# -- A description is cut to fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
@pytest.mark.parametrize(("key_length", "value_length"), [(4, 4), (4, 10_000), (MAX_FACT, 10), (MAX_FACT, 10_000)])
def test_a_description_of_any_length_fits_into_a_header(letter: str, key_length: int, value_length: int) -> None:
    facts = {f"{number:04}{letter * (key_length - 4)}": letter * value_length for number in range(9_999)}
    header, body = encode(Describe(facts))
    assert len(header) <= MAX_HEADER
    heard = decode(header, body).facts
    assert len(heard) > 10
    assert list(heard) == list(facts)[: len(heard)]  # the first ones, in order
    assert set(heard.values()) == {letter * value_length if value_length < MAX_FACT else letter * 399 + "…"}


def test_a_fact_whose_name_is_too_long_is_left_out() -> None:
    facts = {"first": "1", "x" * (MAX_FACT + 1): "2", "third": "3"}
    assert decode(*encode(Describe(facts))).facts == {"first": "1", "third": "3"}


# -- Bytes that are no message ---------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.binary(max_size=20))
@settings(deadline=None)
def test_random_bytes_are_refused_or_a_message(header: bytes, body: bytes) -> None:
    nothing_else_comes_of(header, body)


@given(
    st.dictionaries(st.text() | st.sampled_from(["type", "round", "facts"]), anything, max_size=4), st.integers(0, 20)
)
@settings(deadline=None)
def test_any_map_is_refused_or_a_message(fields: dict[str, object], number: int) -> None:
    nothing_else_comes_of(msgpack.packb(fields | {"type": number}), b"")


@given(messages, st.data())
@settings(deadline=None)
def test_a_message_with_one_byte_altered_is_refused_or_another_message(
    message: WireMessage, data: st.DataObject
) -> None:
    header, body = encode(message)
    at = data.draw(st.integers(0, len(header) - 1))
    nothing_else_comes_of(header[:at] + data.draw(st.binary(min_size=1, max_size=1)) + header[at + 1 :], bytes(body))


@EVERY_MESSAGE
def test_a_header_that_is_cut_or_has_more_after_it_is_refused(message: WireMessage) -> None:
    header, body = encode(message)
    for length in range(len(header)):
        assert refused(header[:length], body) == "bad_header"
    for more in (b"\x00", b"\xc0", b"\xc1", b"\x80", header):
        assert refused(header + more, body) == "bad_header"


ARRAY, MAP, BIN, STR, EXT = b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"


@pytest.mark.parametrize("kind", [ARRAY, MAP, BIN, STR, EXT], ids=["array32", "map32", "bin32", "str32", "ext32"])
@pytest.mark.parametrize("before", [b"", b"\x81", b"\x81\xa1x", b"\x81\xa5facts", b"\x81\xa5facts\x81\xa1x"])
@pytest.mark.parametrize("after", [b"", b"\x00" * 60_000, b"\x80" * 60_000])
def test_a_claim_to_hold_four_billion_things_is_not_believed(kind: bytes, before: bytes, after: bytes) -> None:
    assert refused(before + kind + b"\xff\xff\xff\xff" + after) == "bad_header"


@pytest.mark.parametrize("before", [b"", b"\x81\xa1x", b"\x81\xa5facts", b"\x81\xa5facts\x81\xa1x"])
@pytest.mark.parametrize("layer", [b"\x91", b"\x81\xa1x", b"\x81\xa5facts", b"\xdc\xff\xff", b"\xdd\x00\x00\xff\xff"])
def test_containers_inside_containers_are_refused_at_any_depth(before: bytes, layer: bytes) -> None:
    small = before + layer * (60_000 // len(layer))
    assert refused(small) == "bad_header"
    assert refused(before + layer * 100_000) == "too_large"
    with pytest.raises(BadMessage):  # nor does the parser need the limit on the size
        unpack(before + layer * 100_000, table="facts")


@pytest.mark.parametrize("value", [[1], [[]], {"a": 1}, {"facts": {"a": "b"}}], ids=repr)
def test_no_check_of_a_field_ever_sees_what_a_container_holds(value: object) -> None:
    with pytest.raises(BadMessage):
        unpack(msgpack.packb({"x": value}), table="facts")
    with pytest.raises(BadMessage):
        unpack(msgpack.packb({"facts": {"a": value}}), table="facts")
    with pytest.raises(BadMessage):
        unpack(msgpack.packb({"facts": value}))


@pytest.mark.parametrize(
    "empties",
    [b"\x80", b"\x90", b"\xa1x\x80", b"\xa5facts\x80"],
    ids=["empty maps", "empty arrays", "the same key", "facts"],
)
def test_megabytes_of_nothing_are_refused(empties: bytes) -> None:
    many = b"\xdf\xff\xff\xff\xff" + empties * 1_000_000
    assert refused(many) == "too_large"
    assert refused(many[:MAX_HEADER]) == "bad_header"


def test_a_header_full_of_the_shortest_keys_costs_little() -> None:
    keys = [a + b for a in map(chr, range(127)) for b in map(chr, range(127))]
    assert refused(written(*((key, None) for key in keys))) == "unknown_type"
    assert refused(written(("type", 3), ("round", 0), *((key, None) for key in keys))) == "bad_header"


def test_a_header_may_have_64_kib_and_not_a_byte_more() -> None:
    def described(last: int) -> bytes:
        facts = {f"{number:04}": "x" * 380 for number in range(168)}
        return pack({"type": 2, "facts": facts | {"last": "x" * last}})

    fits = 256 + MAX_HEADER - len(described(256))
    assert len(described(fits)) == MAX_HEADER
    assert isinstance(decode(described(fits), b""), Describe)
    assert refused(described(fits + 1)) == "too_large"


# -- msgpack that is not spoken here ---------------------------------------------------------------------------------


@EVERY_MESSAGE
def test_no_key_stands_twice_even_with_the_same_value(message: WireMessage) -> None:
    header, body = header_of(message), encode(message)[1]
    for pair in header.items():
        assert refused(written(*header.items(), pair), body) == "bad_header"


def test_no_fact_stands_twice() -> None:
    twice = b"\x82\xa1a\xa1b\xa1a\xa1b"
    assert refused(b"\x82\xa4type\x02\xa5facts" + twice) == "bad_header"


@pytest.mark.parametrize(
    "key", [3, -1, True, None, 1.0, b"round", "", "Round", "round\0", msgpack.Timestamp(0)], ids=repr
)
def test_keys_are_strings_that_are_known(key: object) -> None:
    assert refused(written(("type", 3), (key, 0))) == "bad_header"
    assert refused(written(("type", 3), ("round", 0), (key, 0))) == "bad_header"


@pytest.mark.parametrize("key", [3, b"a", None, msgpack.Timestamp(0)], ids=repr)
def test_the_names_of_facts_are_strings(key: object) -> None:
    assert refused(b"\x82\xa4type\x02\xa5facts" + written((key, "value"))) == "bad_header"


EXTENSIONS = [
    msgpack.packb(msgpack.ExtType(code, b"\x00" * size)) for code in (0, 5, 127) for size in (0, 1, 4, 8, 200)
]
TIMESTAMPS = [msgpack.packb(msgpack.Timestamp(seconds)) for seconds in (0, 2**32, 2**40)]
NO_TIMESTAMPS = [b"\xc7\x00\xff", b"\xc7\x05\xff12345", b"\xd4\xff1"]


@pytest.mark.parametrize("extension", [*EXTENSIONS, *TIMESTAMPS, *NO_TIMESTAMPS], ids=repr)
def test_extension_types_are_refused_wherever_they_stand(extension: bytes) -> None:
    assert refused(extension) == "bad_header"
    assert refused(b"\x82\xa4type\x03\xa5round" + extension) == "bad_header"
    assert refused(b"\x81" + extension + b"\x00") == "bad_header"
    assert refused(b"\x82\xa4type\x02\xa5facts\x81\xa1a" + extension) == "bad_header"
    with pytest.raises(BadMessage):  # nor does any check of a field ever see one
        unpack(b"\x81\xa1x" + extension)


@pytest.mark.parametrize("text", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82"], ids=repr)
def test_text_that_is_not_utf_8_is_refused(text: bytes) -> None:
    string = bytes([0xA0 + len(text)]) + text
    assert refused(b"\x83\xa4type\x05\xa5round\x00\xa4code" + string) == "bad_header"
    assert refused(b"\x82\xa4type\x03" + string + b"\x00") == "bad_header"
    assert refused(b"\x82\xa4type\x02\xa5facts\x81\xa1a" + string) == "bad_header"
    assert refused(b"\x82\xa4type\x02\xa5facts\x81" + string + b"\xa0") == "bad_header"


@pytest.mark.parametrize("value", [None, 0, True, 1.0, "text", b"bytes", [], [1]], ids=repr)
def test_a_header_is_a_map(value: object) -> None:
    assert refused(msgpack.packb(value)) == "bad_header"


# -- Fields ----------------------------------------------------------------------------------------------------------


@EVERY_MESSAGE
def test_no_field_takes_a_wrong_value(message: WireMessage) -> None:
    header, body = header_of(message), encode(message)[1]
    for key in header.keys() - {"type"}:
        for value in [*WRONG[key], *([] if key == "protocol" else [None, [], {1: 2}])]:
            assert refused(msgpack.packb(header | {key: value}), body) == "bad_header", (key, value)


@EVERY_MESSAGE
def test_a_header_has_exactly_its_keys(message: WireMessage) -> None:
    header, body = header_of(message), encode(message)[1]
    for key in header.keys() - {"type", "protocol"}:
        less = {k: v for k, v in header.items() if k != key}
        assert refused(pack(less), body) == "bad_header"
    for key in ("unknown", "\x1b[2J", "x" * 10_000, "facts ", "manifest", "sealed"):
        assert refused(pack(header | {key: 0}), body) == "bad_header"


@pytest.mark.parametrize("number", [0, 13, 15, 18, -1, 2**63, True, 3.0, "3", b"3", None, [], {}], ids=repr)
def test_a_type_that_is_not_known_is_refused(number: object) -> None:
    assert refused(msgpack.packb({"type": number, "round": 0})) == "unknown_type"
    assert refused(msgpack.packb({"round": 0})) == "unknown_type"


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, -1, 2**64 - 1, "1", None, "\x1b[2J" * 1000], ids=ascii)
def test_another_version_is_called_so_whatever_else_its_hello_holds(version: object) -> None:
    hello = header_of(EXAMPLES[Hello]) | {"protocol": version}
    assert refused(msgpack.packb(hello)) == "version_mismatch"
    assert refused(msgpack.packb(hello | {"new": "field"})) == "version_mismatch"
    assert refused(msgpack.packb({"type": 1, "protocol": version})) == "version_mismatch"


def test_a_version_mismatch_names_both() -> None:
    header, _ = encode(replace(EXAMPLES[Hello], protocol=PROTOCOL_VERSION + 1))
    with pytest.raises(BadMessage, match=f"^version_mismatch: ours={PROTOCOL_VERSION} theirs={PROTOCOL_VERSION + 1}$"):
        decode(header, b"")


# -- Bodies ----------------------------------------------------------------------------------------------------------


@EVERY_MESSAGE
def test_a_body_stands_where_it_belongs_and_is_no_larger_than_it_may_be(message: WireMessage) -> None:
    header, _ = encode(message)
    gossip, evidence = MAX_GOSSIPED * (MAX_ENTRY + 2 + 64), 2 * (MAX_MANIFEST + 2 + 64)
    limits = {Offer: MAX_MANIFEST, Chunk: CHUNK + TAG, Gossip: gossip, Accusation: evidence}
    limits[Gathering] = MAX_SENDERS * (MAX_ENTRY + 2 + 64)
    limit = limits.get(type(message), 0)
    assert refused(header, bytes(limit + 1)) == "bad_body"
    assert isinstance(message, (Gossip, Accusation, Gathering)) or isinstance(
        decode(header, bytes(limit)), type(message)
    )
    if limit:
        assert refused(header, b"") == "bad_body"


def test_who_asks_for_nothing_brings_no_body() -> None:
    nothing = replace(EXAMPLES[Gathering], keys=())
    header, body = encode(nothing)
    assert not body and decode(header, body) == nothing
    assert refused(header, b"x") == "bad_body"


def test_the_keys_fill_the_body_exactly() -> None:
    header, body = encode(EXAMPLES[Gathering])
    for spoilt in (body[:-1], body + b"x", body[1:], body[: len(body) // 2]):
        assert refused(header, bytes(spoilt)) == "bad_body"


def test_senders_that_are_not_sorted_or_named_twice_are_refused_before_anybody_checks_a_signature() -> None:
    asked = EXAMPLES[Gathering]
    for keys_shown in (asked.keys[::-1], (asked.keys[0],) * 2, (asked.keys[0],) * MAX_SENDERS):
        header, body = encode(replace(asked, keys=keys_shown))
        assert refused(header, body) == "bad_body"


def test_a_gathering_states_every_key_and_signature_of_it() -> None:
    """What is signed, and what the masks hold for, changes with whatever the senders are told."""
    asked = EXAMPLES[Gathering]
    first, second = asked.keys
    others = [
        replace(asked, round=4),
        replace(asked, mass=2.0),
        replace(asked, reach=5.0),
        replace(asked, gives=False),
        replace(asked, keys=(first,)),
        replace(asked, keys=(first, replace(second, key=b"m" * 32))),
        replace(asked, keys=(first, replace(second, epoch=3))),
        replace(asked, keys=(first, replace(second, signature=b"j" * 64))),
    ]
    assert len({statement(asked), *map(statement, others)}) == 1 + len(others)
    assert statement(replace(asked, signature=b"z" * 64)) == statement(asked)


# -- What one is accused of ------------------------------------------------------------------------------------------


def manifest_of(size: int) -> bytes:
    """So many bytes that stand for a manifest, and what stands for its signature."""
    return size.to_bytes(2, "big") + bytes(size) + b"g" * 64


def test_the_evidence_fills_the_body_exactly() -> None:
    one, two = (pack({"type": 10, "name": "bob", "code": code}) for code in ("bad_mass", "equivocation"))
    largest = manifest_of(MAX_MANIFEST)
    assert decode(one, largest).evidence == (bytes(MAX_MANIFEST), b"g" * 64)
    assert decode(two, largest + manifest_of(1)).evidence == (bytes(MAX_MANIFEST), b"g" * 64, b"\0", b"g" * 64)
    cut = largest[:-1], largest[: MAX_MANIFEST // 2], b"\0", manifest_of(0), manifest_of(MAX_MANIFEST + 1)
    for header, bodies in ((one, (*cut, largest + b"x", 2 * largest)), (two, (*cut, largest, largest + b"x"))):
        assert {refused(header, body) for body in bodies} == {"bad_body"}


@pytest.mark.parametrize("code", ["stale", "bad_signature", "flood", "Bad_value", ""])
def test_nobody_is_accused_of_what_leaves_nothing_signed_behind(code: str) -> None:
    assert refused(pack({"type": 10, "name": "bob", "code": code}), manifest_of(1)) == "bad_header"


# -- What members say of themselves ----------------------------------------------------------------------------------


def entry(fields: dict[str, object], signature: bytes = b"g" * 64) -> bytes:
    text = msgpack.packb(fields)
    return len(text).to_bytes(2, "big") + text + signature


GOOD = {"name": "alice", "epoch": 3, "incarnation": 0, "address": "tcp://10.0.0.1:7000", "leaving": False}


@pytest.mark.parametrize(
    "spoilt",
    [
        {"name": "a b"},
        {"epoch": 0},
        {"epoch": MAX_EPOCH + 1},
        {"incarnation": 2**64 - 1},  # bad-inputs, row 27
        {"incarnation": -1},
        {"incarnation": True},
        {"address": "tcp://\x1b[2J"},
        {"address": "x" * 263},
        {"address": 7},
        {"leaving": 0},
        {"another": 1},
    ],
    ids=repr,
)
def test_a_record_has_exactly_its_keys_and_right_values(spoilt: dict[str, object]) -> None:
    header = pack({"type": 8, "records": 1, "hints": 0})
    assert decode(header, entry(GOOD)) == Gossip((MemberRecord(**GOOD, signature=b"g" * 64),), ())
    assert refused(header, entry(GOOD | spoilt)) == "bad_header"
    for key in GOOD:
        assert refused(header, entry({k: v for k, v in GOOD.items() if k != key})) == "bad_header"


def test_records_fill_the_body_exactly() -> None:
    one, hint = entry(GOOD), entry({"name": "bob", "epoch": 0, "incarnation": 0}, b"")
    header = pack({"type": 8, "records": 1, "hints": 1})
    assert len(decode(header, one + hint).hints) == 1
    for body in (one, hint, one + hint[:-1], one + hint + b"x", one + one, one[:-1] + hint, b"\xff\xff" + one + hint):
        assert refused(header, body) in ("bad_body", "bad_header")
    assert refused(pack({"type": 8, "records": 0, "hints": 0}), b"") == "bad_body"
    long = entry(GOOD | {"address": "x" * 262, "name": "n" * 64}, b"g" * 64)
    assert len(long) - 66 <= MAX_ENTRY
    most = Gossip((MemberRecord("n" * 64, MAX_EPOCH, MAX_ROUND, "x" * 262, False, b"g" * 64),) * MAX_GOSSIPED, ())
    assert decode(*encode(most)) == most


def test_what_is_signed_of_a_record_is_all_of_it_but_the_signature() -> None:
    record = MemberRecord(**GOOD, signature=b"g" * 64)
    changed = [{"name": "bob"}, {"epoch": 4}, {"incarnation": 1}, {"address": ""}, {"leaving": True}]
    assert len({statement(record), *(statement(replace(record, **change)) for change in changed)}) == 6
    assert statement(record) == statement(replace(record, signature=b"h" * 64))
