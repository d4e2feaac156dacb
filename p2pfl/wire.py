"""Messages as bytes, and back.

One message is one pair of frames: a header (a msgpack map of at most 64 KiB with string keys and scalar values) and a
body (raw bytes: a manifest, a sealed chunk, or nothing). Tensors never pass through msgpack.

What comes in is not trusted: its size is checked before it is parsed, and every key, type and range before a message
is built from it. Whatever is wrong raises BadMessage; nothing else is ever raised, and nothing is ever half accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, get_args

import msgpack

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

MAX_HEADER = 64 * 1024  # bytes
MAX_MANIFEST = 4 * 1024  # bytes
CHUNK = 1 << 20  # bytes of parameters in one chunk
TAG = 16  # bytes that sealing adds to a chunk
MAX_FRAME = CHUNK + TAG + 64  # bytes; the socket refuses larger frames, and counts 33 of CURVE's own to each
MAX_GOSSIPED = 128  # records, and hints, in one message
MAX_SENDERS = 1024  # of one sum
MAX_ENTRY = 512  # bytes of one record or hint: two names and two numbers
SIGNATURE = 64  # bytes
MAX_FACTS = 48 * 1024  # bytes of a description, well below MAX_HEADER
MAX_ADDRESS = 262  # characters: tcp://, a host name of at most 253, a port
MAX_FACT = 400  # characters of a name or a value in a description: what differs goes into a log line

Field = str | int | float | bool | bytes | Mapping[str, str]
Check = Callable[[object], bool]


# -- What each field must be -----------------------------------------------------------------------------------------


def _integer(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _bytes(size: int) -> Check:
    return lambda value: type(value) is bytes and len(value) == size


def _word(*words: str) -> Check:
    return lambda value: value in words


def _name(value: object) -> bool:
    return isinstance(value, str) and NAME_PATTERN.fullmatch(value) is not None


def _positive(value: object) -> bool:
    return type(value) is float and 0 < value < math.inf


def _flag(value: object) -> bool:
    return type(value) is bool


def _address(value: object) -> bool:
    return type(value) is str and len(value) <= MAX_ADDRESS and value.isprintable()


def _facts(value: object) -> bool:
    return isinstance(value, dict) and all(type(v) is str and max(len(k), len(v)) <= MAX_FACT for k, v in value.items())


_ROUND = _integer(0, MAX_ROUND)
FACTS = "facts"  # the only key of all whose value is a map

# Type numbers are append only: a number that was once used never gets another meaning.
_TYPES: dict[int, tuple[type[WireMessage], dict[str, Check]]] = {
    1: (
        Hello,
        {
            "protocol": _integer(0, 2**16),
            "name": _name,
            "recipient": _name,
            "channel": _word(*get_args(Channel)),
            "answer": _flag,
            "epoch": _integer(1, MAX_EPOCH),
            "round": _ROUND,
            "mass": _positive,
            "seen": _integer(-1, MAX_ROUND),
            "seen_epoch": _integer(0, MAX_EPOCH),
            "experiment": _bytes(32),
            "schema": _bytes(32),
            "signature": _bytes(64),
        },
    ),
    2: (Describe, {FACTS: _facts}),
    3: (Heartbeat, {"round": _ROUND, "view": _integer(0, 2**32 - 1)}),
    4: (Grant, {"round": _ROUND, "chunks": _integer(1, 2**31)}),
    5: (Refused, {"round": _ROUND, "code": _name}),
    6: (Goodbye, {"round": _ROUND, "reason": _word("finished", "leaving")}),
    7: (Receipt, {"round": _ROUND, "view": _integer(0, 2**32 - 1)}),
    8: (Gossip, {"records": _integer(0, MAX_GOSSIPED), "hints": _integer(0, MAX_GOSSIPED)}),
    9: (Resume, {"round": _ROUND, "start": _integer(1, 2**31)}),
    10: (Accusation, {"name": _name, "code": _word(*OFFENCES)}),
    11: (MaskKey, {"name": _name, "epoch": _integer(1, MAX_EPOCH), "key": _bytes(32), "signature": _bytes(64)}),
    12: (
        Gathering,
        {
            "round": _ROUND,
            "mass": _positive,
            "reach": _positive,
            "gives": _flag,
            "keys": _integer(0, MAX_SENDERS),
            "signature": _bytes(64),
        },
    ),
    16: (Offer, {"signature": _bytes(64), "key": _bytes(32)}),
    17: (Chunk, {"round": _ROUND, "index": _integer(0, 2**31)}),
}
_NUMBERS = {kind: number for number, (kind, _) in _TYPES.items()}
_HINT: dict[str, Check] = {"name": _name, "epoch": _integer(0, MAX_EPOCH), "incarnation": _integer(0, MAX_ROUND)}
_RECORD = _HINT | {"epoch": _integer(1, MAX_EPOCH), "address": _address, "leaving": _flag}
_KEY = {key: check for key, check in _TYPES[11][1].items() if key != "signature"}
_BODIES = {Offer: "manifest", Chunk: "sealed"}  # the field that travels as the body
_BODY_LIMITS = {
    Offer: MAX_MANIFEST,
    Chunk: CHUNK + TAG,
    Gossip: MAX_GOSSIPED * (MAX_ENTRY + 2 + SIGNATURE),
    Accusation: 2 * (MAX_MANIFEST + 2 + SIGNATURE),
    Gathering: MAX_SENDERS * (MAX_ENTRY + 2 + SIGNATURE),
}


# -- Encode ----------------------------------------------------------------------------------------------------------


def encode(message: WireMessage) -> tuple[bytes, memoryview | bytes]:
    """The two frames of a message."""
    kind = type(message)
    _, checks = _TYPES[_NUMBERS[kind]]
    header: dict[str, Field] = {"type": _NUMBERS[kind]}
    if isinstance(message, Gossip):
        return pack(header | {"records": len(message.records), "hints": len(message.hints)}), _gossip_body(message)
    for key in checks:
        header[key] = getattr(message, key)
    if isinstance(message, Gathering):
        return pack(header | {"keys": len(message.keys)}), _entries((statement(k), k.signature) for k in message.keys)
    if isinstance(message, Accusation):
        return pack(header), _evidence_body(message.evidence)
    if isinstance(message, Describe):
        header[FACTS] = _shortened(message.facts)
    body = getattr(message, _BODIES[kind]) if kind in _BODIES else b""
    return pack(header), body


def _shortened(facts: Mapping[str, str]) -> dict[str, str]:
    """As many facts as fit into a header, in order; long values are cut, so a difference beyond may go unsaid."""
    short: dict[str, str] = {}
    room = MAX_FACTS
    for key, value in facts.items():
        if len(key) > MAX_FACT:
            continue
        room -= len(key.encode()) + 4 * min(len(value), MAX_FACT) + 16
        if room < 0:
            break
        short[key] = value if len(value) <= MAX_FACT else value[: MAX_FACT - 1] + "…"
    return short


def statement(said: MemberRecord | MaskKey | Gathering) -> bytes:
    """The bytes that whoever says this of itself signs."""
    if isinstance(said, Gathering):
        about = {key: getattr(said, key) for key in ("round", "mass", "reach", "gives")}
        return pack(about | {"keys": _entries((statement(key), key.signature) for key in said.keys)})
    return pack({key: getattr(said, key) for key in (_RECORD if isinstance(said, MemberRecord) else _KEY)})


def _gossip_body(gossip: Gossip) -> bytes:
    """One entry after the other: its length as two bytes, a map, and after a record's map its signature."""
    entries = [(statement(record), record.signature) for record in gossip.records]
    entries += [(pack({key: getattr(hint, key) for key in _HINT}), b"") for hint in gossip.hints]
    return _entries(entries)


def _entries(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(len(text).to_bytes(2, "big") + text + signature for text, signature in entries)


def _read_gossip(body: memoryview | bytes, records: int, hints: int) -> Gossip:
    entries = _read_entries(body, [(SIGNATURE, _RECORD)] * records + [(0, _HINT)] * hints)
    found = tuple(MemberRecord(**fields, signature=proof) for fields, proof in entries[:records])  # type: ignore[arg-type]
    return Gossip(found, tuple(Hint(**fields) for fields, _ in entries[records:]))  # type: ignore[arg-type]


def _read_keys(body: memoryview | bytes, keys: int) -> tuple[MaskKey, ...]:
    entries = _read_entries(body, [(SIGNATURE, _KEY)] * keys)
    names = [str(fields["name"]) for fields, _ in entries]
    if names != sorted(set(names)):  # before anybody verifies a thousand signatures of one and the same
        raise BadMessage("bad_body", "senders that are not sorted, or named twice")
    return tuple(MaskKey(**fields, signature=proof) for fields, proof in entries)  # type: ignore[arg-type]


def _read_entries(
    body: memoryview | bytes, expected: Sequence[tuple[int, Mapping[str, Check]]]
) -> list[tuple[dict[str, object], bytes]]:
    """The maps of a body, and the signature of so many bytes after each; BadMessage if they are others."""
    entries: list[tuple[dict[str, object], bytes]] = []
    rest = memoryview(body)
    for signature, checks in expected:
        size = int.from_bytes(rest[:2], "big")
        entry, rest = rest[2 : 2 + size], rest[2 + size :]
        if not 0 < size <= MAX_ENTRY or len(entry) != size or len(rest) < signature:
            raise BadMessage("bad_body", "what a member says of itself ends too early, or is too long")
        fields = unpack(entry)
        check_fields("record", fields, checks)
        entries.append((fields, bytes(rest[:signature])))
        rest = rest[signature:]
    if len(rest):
        raise BadMessage("bad_body", f"{len(rest)} bytes after the last record")
    return entries


def _evidence_body(evidence: tuple[bytes, ...]) -> bytes:
    """One manifest after the other: its length as two bytes, itself, its signature."""
    signed = zip(evidence[::2], evidence[1::2], strict=True)
    return b"".join(len(manifest).to_bytes(2, "big") + manifest + signature for manifest, signature in signed)


def _read_evidence(body: memoryview | bytes, manifests: int) -> tuple[bytes, ...]:
    evidence: tuple[bytes, ...] = ()
    rest = bytes(body)
    for _ in range(manifests):
        end = 2 + int.from_bytes(rest[:2], "big")
        manifest, signature, rest = rest[2:end], rest[end : end + SIGNATURE], rest[end + SIGNATURE :]
        if not 0 < len(manifest) <= MAX_MANIFEST or len(signature) != SIGNATURE:
            raise BadMessage("bad_body", "a manifest that ends too early, or is too long")
        evidence += (manifest, signature)
    if rest:
        raise BadMessage("bad_body", f"{len(rest)} bytes after the last manifest")
    return evidence


def pack(fields: Mapping[str, Field]) -> bytes:
    """A map as msgpack, without extension types."""
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


# -- Decode ----------------------------------------------------------------------------------------------------------


def decode(header: memoryview | bytes, body: memoryview | bytes) -> WireMessage:
    """The message that these two frames are; BadMessage if they are none.

    The body is not copied: a chunk's `sealed` is the frame itself.
    """
    if len(header) > MAX_HEADER:
        raise BadMessage("too_large", f"a header of {len(header)} bytes; at most {MAX_HEADER} are read")
    fields = unpack(header, table=FACTS)
    number = fields.pop("type", None)
    if type(number) is not int or number not in _TYPES:
        raise BadMessage("unknown_type", f"message type {str(number)[:20]!r} is not known")
    kind, checks = _TYPES[number]
    if kind is Hello and fields.get("protocol") != PROTOCOL_VERSION:
        raise BadMessage("version_mismatch", f"ours={PROTOCOL_VERSION} theirs={fields.get('protocol')!r:.20}")
    check_fields(kind.__name__, fields, checks)
    limit = _BODY_LIMITS.get(kind, 0)
    if len(body) > limit or (limit and not len(body) and fields.get("keys") != 0):
        raise BadMessage("bad_body", f"{kind.__name__} with a body of {len(body)} bytes; 1 to {limit} are allowed")
    if kind is Gossip:
        return _read_gossip(body, int(str(fields["records"])), int(str(fields["hints"])))
    if kind is Gathering:
        fields["keys"] = _read_keys(body, int(str(fields["keys"])))
    elif kind is Accusation:  # of equivocation, two manifests are the evidence
        fields["evidence"] = _read_evidence(body, 2 if fields["code"] == "equivocation" else 1)
    elif kind is Offer:
        fields["manifest"] = bytes(body)
    elif kind is Chunk:
        fields["sealed"] = body
    message: WireMessage = kind(**fields)  # type: ignore[arg-type]  # each field was checked above
    return message


def check_fields(what: str, fields: Mapping[str, object], checks: Mapping[str, Check]) -> None:
    """BadMessage unless `fields` has exactly the keys of `checks`, each with a value that passes."""
    for key in fields:
        if key not in checks:
            raise BadMessage("bad_header", f"{what} has the unknown key {key[:40]!r}")
    for key, passes in checks.items():
        if key not in fields:
            raise BadMessage("bad_header", f"{what} lacks {key}")
        if not passes(fields[key]):
            raise BadMessage("bad_header", f"{what}.{key} is {str(fields[key])[:40]!r}")


def unpack(data: memoryview | bytes, table: str | None = None) -> dict[str, object]:
    """A msgpack map of distinct string keys and scalar values; BadMessage for anything else, whatever its size claims.

    The value of the key `table` may itself be such a map. An empty container passes as a scalar, for a check to refuse.
    """
    # Maps are walked through here, and msgpack sees scalars only: it would make room for what each of a thousand nested
    # containers claims to hold (measured: 80 MB for 64 KiB), and nothing could limit their depth.
    size = len(data)
    unpacker = msgpack.Unpacker(
        raw=False,
        ext_hook=_no_extension,
        max_buffer_size=max(size, 1),
        max_str_len=size,
        max_bin_len=size,
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
    )
    unpacker.feed(data)
    try:
        fields = _read_map(unpacker, table)
        if unpacker.tell() != size:
            raise ValueError(f"{size - unpacker.tell()} bytes after its end")
    except (ValueError, msgpack.UnpackException) as error:
        why = str(error)[:80] or "it ends too early"
        raise BadMessage("bad_header", f"not msgpack as it is spoken here: {why}") from None
    return fields


def _read_map(unpacker: msgpack.Unpacker, table: str | None) -> dict[str, object]:
    fields: dict[str, object] = {}
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if type(key) is not str:
            raise ValueError(f"a key that is no string: {str(key)[:40]!r}")
        if key in fields:
            raise ValueError(f"the key {key[:40]!r} twice")
        fields[key] = _read_map(unpacker, None) if key == table else unpacker.unpack()
    return fields


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")
