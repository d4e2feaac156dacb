"""Keys, cards, rosters, addresses and epochs: what is refused matters more than what is accepted."""

from __future__ import annotations

import base64
import os
import stat
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.identity import (
    FIELD_PRIME,
    ORDER_8_Y,
    SMALL_ORDER_Y,
    Card,
    Identity,
    Member,
    Roster,
    fingerprint_of,
    is_unsafe_link_key,
    is_unsafe_signing_key,
    load,
    next_epoch,
    parse_address,
    parse_peer,
    read_roster,
    save,
)
from p2pfl.messages import MAX_EPOCH, BadInput

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes, owners and named pipes are POSIX")
PASSPHRASE = b"correct horse"


def identity_of(name: str, signing: bytes, link: bytes) -> Identity:
    return Identity(name, Ed25519PrivateKey.from_private_bytes(signing), X25519PrivateKey.from_private_bytes(link))


def numbered(name: str, number: int) -> Identity:
    """An identity that is the same in every run."""
    return identity_of(name, number.to_bytes(32, "big"), (number + 2**64).to_bytes(32, "big"))


ALICE, BOB, CAROL = numbered("alice", 1), numbered("bob", 2), numbered("carol", 3)

names = st.text("ABCXYZabcxyz0189._-", min_size=1, max_size=64).filter(lambda name: name[0] not in ".-")
secrets = st.binary(min_size=32, max_size=32)
identities = st.builds(identity_of, names, secrets, secrets)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that a refusal must leave as it was: names, modes, times of change, contents."""
    found = {}
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[path.name] = (status.st_mode, status.st_mtime_ns, content)
    return found


def refusal(call: Callable[[], object]) -> str:
    """The message of the BadInput that `call` raises: one line that a terminal can show."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    return message


def never_asked() -> bytes:
    pytest.fail("this file needs no passphrase")


# -- Signatures and keys ---------------------------------------------------------------------------------------------

# RFC 8032 section 7.1, tests 1 and 3: secret key, public key, message, signature. The RFC's signatures have no context,
# so the vectors pin our keys, and the signature below our framing.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]
# RFC 7748 section 6.1: Alice's secret and public key.
RFC_7748_SECRET = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
RFC_7748_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_published_vectors(secret: str, public: str, message: str, signature: str) -> None:
    identity = identity_of("rfc", bytes.fromhex(secret), bytes.fromhex(RFC_7748_SECRET))
    assert identity.card.signing_key.hex() == public
    assert identity.card.link_key.hex() == RFC_7748_PUBLIC
    assert identity.link_secret.hex() == RFC_7748_SECRET
    assert identity.signing.sign(bytes.fromhex(message)).hex() == signature
    framed = b"p2pfl" + b"\x05hello" + bytes.fromhex(message)
    assert identity.sign(b"hello", bytes.fromhex(message)) == identity.signing.sign(framed)


def test_a_signature_serves_one_key_one_purpose_one_message() -> None:
    signature = ALICE.sign(b"hello", b"message")
    assert ALICE.card.verify(b"hello", b"message", signature)
    assert not BOB.card.verify(b"hello", b"message", signature)
    assert not ALICE.card.verify(b"manifest", b"message", signature)
    assert not ALICE.card.verify(b"hell", b"omessage", signature)
    assert not ALICE.card.verify(b"hello", b"message ", signature)
    for wrong_size in (b"", signature[:-1], signature + b"\0"):
        assert not ALICE.card.verify(b"hello", b"message", wrong_size)


def test_a_signature_has_one_spelling() -> None:
    group_order = 2**252 + 27742317777372353535851937790883648493
    signature = ALICE.card.signature
    other_s = int.from_bytes(signature[32:], "little") + group_order
    malleated = signature[:32] + other_s.to_bytes(32, "little")
    refusal(lambda: Card("alice", ALICE.card.signing_key, ALICE.card.link_key, malleated))


def test_no_repr_shows_a_secret() -> None:
    assert repr(ALICE) == str(ALICE) == "Identity(name='alice')"


@pytest.mark.parametrize("name", ["", ".", "..", "-n", "a b", "a\nb", "a/b", "ä", "\x1b[31m", "x" * 65])
def test_names_are_checked(name: str) -> None:
    refusal(lambda: Identity.generate(name))
    refusal(lambda: Card(name, ALICE.card.signing_key, ALICE.card.link_key, ALICE.card.signature))


def test_raw_x25519_keys_are_curve_keys_and_zap_reports_them_raw() -> None:
    context = zmq.Context()
    try:
        sockets = zap, server, client = [context.socket(kind) for kind in (zmq.REP, zmq.ROUTER, zmq.DEALER)]
        for socket in sockets:
            socket.linger, socket.rcvtimeo = 0, 5000  # milliseconds
        zap.bind("inproc://zeromq.zap.01")
        server.curve_server, server.zap_domain, server.curve_secretkey = True, b"p2pfl", ALICE.link_secret
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.curve_serverkey = ALICE.card.link_key
        client.curve_publickey, client.curve_secretkey = BOB.card.link_key, BOB.link_secret
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"sealed")

        version, request, domain, _address, _routing_id, mechanism, key = zap.recv_multipart()
        assert (domain, mechanism, key) == (b"p2pfl", b"CURVE", BOB.card.link_key)
        member = Roster((Member(ALICE.card), Member(BOB.card))).by_link_key(key)
        assert member is not None and member.name == "bob"
        zap.send_multipart([version, request, b"200", b"OK", b"bob", b""])

        _, frame = server.recv_multipart(copy=False)
        assert (frame.bytes, frame.get("User-Id")) == (b"sealed", "bob")
    finally:
        context.destroy(linger=0)


# -- Keys that anyone could use --------------------------------------------------------------------------------------

# y and both signs of x, in the canonical spelling, then every second spelling (y + p) that fits 255 bits.
SMALL_ORDER_SIGNING_KEYS = [
    (y | sign << 255).to_bytes(32, "little") for y in (*SMALL_ORDER_Y, FIELD_PRIME, FIELD_PRIME + 1) for sign in (0, 1)
]


def forge(key: bytes, message: bytes) -> bytes | None:
    """A signature for `message`, made without any secret, that the library accepts under this key; None if none is.

    With S = 0 the library compares R with -hash·A, and for a small-order A that is one of A's eight multiples at most.
    """
    for r in SMALL_ORDER_SIGNING_KEYS:
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(r + bytes(32), message)
        except InvalidSignature:
            continue
        return r + bytes(32)
    return None


def test_the_small_order_points_are_what_they_are_said_to_be() -> None:
    p = FIELD_PRIME
    d = -121665 * pow(121666, -1, p) % p  # of the curve -x² + y² = 1 + d·x²·y²
    # (0, ±1) have order 1 and 2, and y = 0 doubles to (0, -1): order 4. A point doubles to y = 0 exactly if y² = -x²;
    # put into the curve's equation that is d·y⁴ + 2·y² = 1, with the two roots ±ORDER_8_Y.
    assert (d * pow(ORDER_8_Y, 4, p) + 2 * ORDER_8_Y**2) % p == 1
    assert set(SMALL_ORDER_Y) == {0, 1, p - 1, ORDER_8_Y, p - ORDER_8_Y}


@pytest.mark.parametrize("key", SMALL_ORDER_SIGNING_KEYS, ids=bytes.hex)
def test_the_library_accepts_forged_cards_under_small_order_keys_and_we_refuse_them(key: bytes) -> None:
    # Who forges picks what is signed until a forgery comes out: here the link key, and with it the card's content.
    for number in range(64):
        link_key = numbered("mallory", number).card.link_key
        signature = forge(key, b"p2pfl\x04card" + key + link_key + b"mallory")
        if signature is not None:
            break
    assert signature is not None, "the library accepts no forgery, so this test shows nothing"
    assert "forged key" in refusal(lambda: Card("mallory", key, link_key, signature))
    blob = base64.urlsafe_b64encode(key + link_key + signature).decode().rstrip("=")
    text = f"{ALICE.card}\np2pfl1 mallory {blob}\n{BOB.card}\n"
    assert refusal(lambda: Roster.parse(text, "roster.txt")).startswith("roster.txt line 2: the card of mallory holds")


def test_every_non_canonical_signing_key_is_refused() -> None:
    for y in range(FIELD_PRIME, 2**255):
        for sign in (0, 1):
            assert is_unsafe_signing_key((y | sign << 255).to_bytes(32, "little"))


# The points of small order on Curve25519 and its twist (0, 1, -1 and the two of order 8), then their second spellings.
ORDER_8_U = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
SMALL_ORDER_LINK_KEYS = [u.to_bytes(32, "little") for u in (0, 1, FIELD_PRIME - 1, *ORDER_8_U)]
SECOND_SPELLINGS = [u.to_bytes(32, "little") for u in (FIELD_PRIME, FIELD_PRIME + 1, 2**255 - 1, 2**255 + 9)]


@pytest.mark.parametrize("key", SMALL_ORDER_LINK_KEYS + SECOND_SPELLINGS, ids=bytes.hex)
def test_small_order_and_second_spellings_of_link_keys_are_refused(key: bytes) -> None:
    X25519PublicKey.from_public_bytes(key)  # the library loads it
    assert is_unsafe_link_key(key)
    signature = ALICE.sign(b"card", ALICE.card.signing_key + key + b"alice")  # a member may well sign it
    assert "forged key" in refusal(lambda: Card("alice", ALICE.card.signing_key, key, signature))


@given(identities)
@settings(max_examples=30, deadline=None)
def test_real_keys_are_not_refused(identity: Identity) -> None:
    assert not is_unsafe_signing_key(identity.card.signing_key)
    assert not is_unsafe_link_key(identity.card.link_key)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_another_size_are_refused(size: int) -> None:
    refusal(lambda: Card("alice", bytes([9] * size), ALICE.card.link_key, ALICE.card.signature))
    refusal(lambda: Card("alice", ALICE.card.signing_key, bytes([9] * size), ALICE.card.signature))


# -- Cards -----------------------------------------------------------------------------------------------------------


def test_the_card_line_never_changes() -> None:
    identity = identity_of("alice", bytes.fromhex(RFC_8032[0][0]), bytes.fromhex(RFC_7748_SECRET))
    assert str(identity.card) == (
        "p2pfl1 alice 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURqFIPAJiTCnVHSLfdy0PvdaDb86DSY4GvTrpKmOqptOag"
        "qHVJPAVbgZvUFf6VghiYq7UgVcpiNWStWv6Re_EuM-R8ynJdm6-tyOmqlDXo614LFJK7GVpPztbX22dv7HQgg"
    )
    assert identity.card.fingerprint == "N2MI-RRWE-OAPP-E3DL"


@given(identities)
@settings(max_examples=30, deadline=None)
def test_a_card_comes_back_from_its_line(identity: Identity) -> None:
    line = str(identity.card)
    assert line.isascii() and line.isprintable() and 180 <= len(line) <= 243
    assert Card.parse(line) == identity.card


def test_a_flipped_bit_anywhere_in_a_card_is_refused() -> None:
    line = str(ALICE.card)
    for position, character in enumerate(line):
        for bit in range(8):
            flipped = line[:position] + chr(ord(character) ^ 1 << bit) + line[position + 1 :]
            refusal(lambda flipped=flipped: Card.parse(flipped))


def test_only_the_exact_line_is_a_card() -> None:
    line = str(ALICE.card)
    version, name, blob = line.split()
    variants = [
        *(line[:length] for length in range(len(line))),
        line + "\n",
        " " + line,
        line + " ",
        line + "=",
        line.replace(" ", "  "),
        line.replace(" ", "\t"),
        f"{version} {name} {blob[:50]} {blob[50:]}",
        f"{version} {name} {blob[:50]}\n{blob[50:]}",
        f"{version} {name} {blob[:50]}!{blob[50:]}",  # which Python's decoder would skip
        f"{version} {name} {blob}AAAA",
        f"{version} {name} {'é' * len(blob)}",
        f"p2pfl2 {name} {blob}",
        f"{version} bob {blob}",
        f"{version} {name} {str(BOB.card).split()[2]}",
    ]
    for variant in variants:
        refusal(lambda variant=variant: Card.parse(variant))


def test_the_self_signature_binds_name_and_both_keys() -> None:
    card = ALICE.card
    refusal(lambda: Card("bob", card.signing_key, card.link_key, card.signature))
    refusal(lambda: Card("alice", card.signing_key, BOB.card.link_key, card.signature))
    refusal(lambda: Card("alice", BOB.card.signing_key, card.link_key, card.signature))
    content = card.signing_key + card.link_key + b"alice"
    refusal(lambda: Card("alice", card.signing_key, card.link_key, ALICE.sign(b"hello", content)))


def test_a_fingerprint_covers_both_keys_and_reads_in_groups() -> None:
    groups = ALICE.card.fingerprint.split("-")
    assert [len(group) for group in groups] == [4, 4, 4, 4]
    signing_key, link_key = ALICE.card.signing_key, ALICE.card.link_key
    assert ALICE.card.fingerprint == fingerprint_of(signing_key, link_key)
    others = {fingerprint_of(signing_key, BOB.card.link_key), fingerprint_of(BOB.card.signing_key, link_key)}
    assert len(others | {ALICE.card.fingerprint, fingerprint_of(link_key)}) == 4


# -- Key files -------------------------------------------------------------------------------------------------------


def test_a_key_file_comes_back(tmp_path: Path) -> None:
    identity = Identity.generate("hospital-1.west")
    key_path, card_path = save(identity, tmp_path / "made" / "on demand")
    assert (key_path.name, card_path.name) == ("hospital-1.west.key", "hospital-1.west.card")
    assert sorted(path.name for path in key_path.parent.iterdir()) == [card_path.name, key_path.name]
    assert card_path.read_text() == f"{identity.card}\n"
    loaded = load(key_path, never_asked)
    assert (loaded.card, loaded.link_secret) == (identity.card, identity.link_secret)
    assert identity.card.verify(b"hello", b"x", loaded.sign(b"hello", b"x"))


@posix
def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try:
            key_path, card_path = save(ALICE, tmp_path / f"{umask:o}")
        finally:
            os.umask(before)
        assert stat.S_IMODE(key_path.stat().st_mode) == 0o600
        assert stat.S_IMODE(card_path.stat().st_mode) == 0o644


@pytest.mark.parametrize("there", ["alice.key", "alice.card"])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_is_ever_overwritten(tmp_path: Path, there: str, kind: str) -> None:
    path = tmp_path / there
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    assert f"{there} exists and is never overwritten" in refusal(lambda: save(ALICE, tmp_path))
    assert snapshot(tmp_path) == before


def test_of_many_at_once_one_writes_and_its_two_files_belong_together(tmp_path: Path) -> None:
    def attempt(_: int) -> bool:
        try:
            save(Identity.generate("alice"), tmp_path)
        except BadInput:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice.card", "alice.key"]
    assert f"{load(tmp_path / 'alice.key').card}\n" == (tmp_path / "alice.card").read_text()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = snapshot(tmp_path)
    assert "cannot write" in refusal(lambda: save(ALICE, tmp_path / "file"))
    assert "cannot write" in refusal(lambda: save(ALICE, tmp_path / "nul\0\x1b[31m"))
    assert "passphrase is empty" in refusal(lambda: save(ALICE, tmp_path, b""))
    assert snapshot(tmp_path) == before


def test_a_damaged_key_file_is_refused(tmp_path: Path) -> None:
    key_path, _ = save(ALICE, tmp_path)
    good = key_path.read_bytes()
    key_path.chmod(0o600)

    def refused(content: bytes) -> None:
        key_path.write_bytes(content)
        before = snapshot(tmp_path)
        assert "is damaged or cut off" in refusal(lambda: load(key_path, never_asked))
        assert snapshot(tmp_path) == before

    for length in range(len(good)):
        refused(good[:length])
    for position in range(len(good)):
        # Bit 7 makes it no ASCII; bit 0 leaves the alphabet rarely. The link key's two outermost bytes hold five bits
        # that X25519 ignores by definition, so there the same identity may load: it is the same key.
        for bit in (0, 7):
            content = good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :]
            key_path.write_bytes(content)
            try:
                assert load(key_path).card == ALICE.card
            except BadInput as error:
                assert "is damaged or cut off" in str(error)
            else:
                assert position > len(good) - 1 - 86 and bit == 0
    card_line, secret_line, _ = good.split(b"\n")
    for content in (
        good + b"\n",
        good.replace(b"\n", b"\r\n"),
        good * 2,
        bytes(2000),
        str(BOB.card).encode() + b"\n" + secret_line + b"\n",
        card_line.replace(b"alice", b"alica") + b"\n" + secret_line + b"\n",
        card_line + b"\n" + secret_line.replace(b"secret-key ", b"secret-key-scrypt ") + b"\n",
        card_line + b"\n" + secret_line + b"=\n",
    ):
        refused(content)


def test_a_passphrase_seals_the_key_file(tmp_path: Path) -> None:
    key_path, _ = save(ALICE, tmp_path, PASSPHRASE)
    before = snapshot(tmp_path)
    sealed = key_path.read_text()
    assert ALICE.link_secret not in base64.urlsafe_b64decode(sealed.split()[-1] + "==")
    assert "is under a passphrase" in refusal(lambda: load(key_path))
    message = refusal(lambda: load(key_path, lambda: b"wrong horse"))
    assert "the passphrase is wrong" in message and "horse" not in message
    assert load(key_path, lambda: PASSPHRASE).link_secret == ALICE.link_secret
    assert snapshot(tmp_path) == before
    # Cut off is seen before anybody types a passphrase.
    key_path.write_text(sealed[:-10] + "\n")
    assert "is damaged or cut off" in refusal(lambda: load(key_path, never_asked))


def test_sealed_keys_belong_to_their_card_line(tmp_path: Path) -> None:
    key_path, _ = save(ALICE, tmp_path, PASSPHRASE)
    key_path.write_text(f"{numbered('alice', 9).card}\n{key_path.read_text().splitlines()[1]}\n")
    assert "does not open" in refusal(lambda: load(key_path, lambda: PASSPHRASE))


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666, 0o777])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    key_path, _ = save(ALICE, tmp_path / "my keys")
    key_path.chmod(mode)
    before = snapshot(key_path.parent)
    assert refusal(lambda: load(key_path)).endswith(f"`chmod 600 '{key_path}'`")
    assert snapshot(key_path.parent) == before
    key_path.chmod(0o400)
    assert load(key_path).card == ALICE.card


@posix
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    key_path, _ = save(ALICE, tmp_path)
    os.chown(key_path, 12345, -1)
    assert refusal(lambda: load(key_path)).endswith(f"belongs to another user: `sudo chown 0 {key_path}`")


@posix
def test_what_is_no_file_of_its_own_is_refused(tmp_path: Path) -> None:
    key_path, _ = save(ALICE, tmp_path)
    link, pipe, folder = tmp_path / "link.key", tmp_path / "pipe.key", tmp_path / "folder.key"
    link.symlink_to(key_path)
    os.mkfifo(pipe, 0o600)
    folder.mkdir(mode=0o700)
    before = snapshot(tmp_path)
    assert f"`readlink -f {link}`" in refusal(lambda: load(link))
    assert "is not a file" in refusal(lambda: load(pipe))
    assert "is not a file" in refusal(lambda: load(folder))
    assert f"`p2pfl keygen NAME --out {tmp_path}`" in refusal(lambda: load(tmp_path / "missing.key"))
    assert "cannot read the key file" in refusal(lambda: load(key_path / "below.key"))
    assert "cannot read the key file" in refusal(lambda: load(tmp_path / "nul\0.key"))
    refusal(lambda: load(tmp_path / "\x1b[31m\n.key"))
    assert snapshot(tmp_path) == before


def test_no_exception_carries_a_secret(tmp_path: Path) -> None:
    key_path, _ = save(ALICE, tmp_path)
    good = key_path.read_bytes()
    secret = good.split()[-1].decode()
    shown = []
    for content in (good[:-20], good + b"\xff", good.replace(b"alice", b"bob"), good[:-20] + b"\xc3\xa4" + good[-20:]):
        key_path.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            load(key_path)
        error: BaseException | None = caught.value
        while error is not None:
            shown += [*traceback.format_exception_only(error), repr(error.args), repr(vars(error))]
            error = error.__cause__ or error.__context__
    for piece in (secret[:20], secret[-30:-20], ALICE.link_secret.hex()):
        assert not any(piece in text for text in shown)


# -- Rosters ---------------------------------------------------------------------------------------------------------

ROSTER = f"""\
# the hospitals
{ALICE.card} tcp://alice.example:5000 10.0.0.1:5001   # by VPN

\t{BOB.card}\r
  # carol only dials out
{CAROL.card}"""


def test_a_roster_keeps_the_order_and_finds_members_by_name_and_link_key() -> None:
    roster = Roster.parse(ROSTER, "roster.txt")
    alice, bob, carol = roster.members
    assert alice == Member(ALICE.card, ("tcp://alice.example:5000", "tcp://10.0.0.1:5001"))
    assert (bob, carol) == (Member(BOB.card), Member(CAROL.card))
    assert roster.by_name("bob") is bob
    assert roster.by_name("Bob") is None
    assert roster.by_link_key(CAROL.card.link_key) is carol
    assert roster.by_link_key(CAROL.card.signing_key) is None
    assert roster.by_link_key(b"") is None


addresses = st.lists(st.sampled_from(["tcp://a.example:1", "tcp://[::1]:65535", "ipc:///tmp/a#b"]), max_size=2)


@given(
    st.lists(
        st.tuples(identities, addresses),
        min_size=1,
        max_size=4,
        unique_by=(lambda row: row[0].name, lambda row: row[0].card.signing_key, lambda row: row[0].card.link_key),
    )
)
@settings(max_examples=20, deadline=None)
def test_a_roster_comes_back_from_its_text(rows: list[tuple[Identity, list[str]]]) -> None:
    roster = Roster(tuple(Member(identity.card, tuple(where)) for identity, where in rows))
    assert Roster.parse(str(roster), "text") == roster


BAD_LINES = {
    "not a card": "alice 10.0.0.1:5000",
    "half a card": str(CAROL.card)[:-9],
    "bad self-signature": str(CAROL.card).replace("carol", "carla"),
    "two cards": f"{CAROL.card} {numbered('dave', 4).card}",
    "same line again": str(ALICE.card),
    "same name": str(numbered("alice", 5).card),
    "same keys": str(numbered("alice-2", 1).card),
    "same signing key": str(identity_of("dave", ALICE.signing.private_bytes_raw(), CAROL.link_secret).card),
    "same link key": str(identity_of("dave", CAROL.signing.private_bytes_raw(), ALICE.link_secret).card),
    "bad address": f"{CAROL.card} tcp://10.0.0.1",
    "escape": f"{CAROL.card} \x1b[31m:80",
    "card in a comment's place": f"x {CAROL.card}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_one_bad_line_refuses_the_whole_roster_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "roster.txt"
    path.write_text(f"# comment\n{ALICE.card}\n\n{line}\n{BOB.card}\n")
    before = snapshot(tmp_path)
    assert refusal(lambda: read_roster(path)).startswith(f"{path} line 4: ")
    assert snapshot(tmp_path) == before


def test_a_duplicate_names_both_lines() -> None:
    text = f"{ALICE.card}\n{BOB.card}\n{BAD_LINES['same link key']}\n"
    assert "line 3: the link key of dave stands on line 1 already" in refusal(lambda: Roster.parse(text, "r"))


@pytest.mark.parametrize("text", ["", "\n\n", "# nobody\n"])
def test_an_empty_roster_is_refused(text: str) -> None:
    assert "holds no card: `cat *.card > r`" in refusal(lambda: Roster.parse(text, "r"))


def test_a_roster_cannot_be_built_wrong() -> None:
    for members in ((), (Member(ALICE.card), Member(numbered("alice", 5).card)), (Member(ALICE.card),) * 2):
        with pytest.raises(ValueError, match="different names and keys"):
            Roster(members)


def test_a_roster_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "there is no roster" in refusal(lambda: read_roster(tmp_path / "missing"))
    assert "cannot read the roster" in refusal(lambda: read_roster(tmp_path))
    (tmp_path / "utf-16").write_text(ROSTER, "utf-16")
    assert "is not UTF-8 text" in refusal(lambda: read_roster(tmp_path / "utf-16"))


# -- Addresses -------------------------------------------------------------------------------------------------------

LONGEST_IPC = "ipc:///" + "x" * 106


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("localhost:5000", "tcp://localhost:5000"),
        ("tcp://10.0.0.7:1", "tcp://10.0.0.7:1"),
        ("tcp://Node_1.Hospital.Example:65535", "tcp://node_1.hospital.example:65535"),
        ("0.0.0.0:5000", "tcp://0.0.0.0:5000"),
        ("[::1]:5000", "tcp://[::1]:5000"),
        ("tcp://[::]:5000", "tcp://[::]:5000"),
        ("tcp://[2001:DB8:0:0::7]:5000", "tcp://[2001:db8::7]:5000"),
        ("tcp://[fe80::1%eth0]:5000", "tcp://[fe80::1%eth0]:5000"),
        ("ipc:///tmp/a@b.sock", "ipc:///tmp/a@b.sock"),
        (LONGEST_IPC, LONGEST_IPC),
    ],
)
def test_addresses_become_endpoints(text: str, endpoint: str) -> None:
    assert parse_address(text) == endpoint
    assert parse_address(endpoint) == endpoint
    assert parse_peer(text) == (None, endpoint)
    assert parse_peer(f"node-1@{text}") == ("node-1", endpoint)


BAD_ADDRESSES = [
    "",
    ":",
    "5000",
    ":5000",
    "host",
    "host:",
    "host:0",
    "host:65536",
    "host:99999999999",
    "host:-1",
    "host:+80",
    "host:080",
    "host:8_0",
    "host:٨٠",
    "host:80 ",
    " host:80",
    "ho st:80",
    "host:80\n",
    "\x1b[2J:80",
    "ho\0st:80",
    "ho\udc80st:80",
    "höst:80",
    "-host:80",
    "host-:80",
    "a..b:80",
    "host/path:80",
    "*:80",
    f"{'a' * 64}:80",
    f"{'a.' * 127}a:80",
    "300.1.1.1:80",
    "10.0.1:80",
    "10.0.0.07:80",
    "1:80",
    "::1:5000",
    "2001:db8::7:5000",
    "[::1]",
    "[::1]5000",
    "[::1:5000",
    "[]:5000",
    "[host]:5000",
    "[10.0.0.7]:5000",
    "[::1%]:5000",
    "[::1%a;b]:5000",
    "[:::]:5000",
    "udp://host:80",
    "tcp://tcp://host:80",
    "TCP://host:80",
    "tcp://eth0;host:80",
    "tcp://a@host:80",
    "inproc://x",
    "ipc://",
    "ipc://*",
    "ipc:///tmp/a b",
    "ipc:///tmp/a\x07",
    LONGEST_IPC + "x",
    "ipc:///" + "ä" * 54,
    "x" * 100_000,
]


@pytest.mark.parametrize("text", BAD_ADDRESSES, ids=lambda text: ascii(text)[:24])
def test_malformed_addresses_are_refused_with_the_right_form(text: str) -> None:
    message = refusal(lambda: parse_address(text))
    assert "write it " in message and len(message) < 400
    refusal(lambda: parse_peer(text))
    refusal(lambda: parse_peer(f"name@{text}"))


def test_an_ipv6_address_without_brackets_is_told_so() -> None:
    assert "an IPv6 address as tcp://[::1]:5000" in refusal(lambda: parse_address("2001:db8::7:5000"))


@pytest.mark.parametrize("text", ["@host:80", "a b@host:80", "a\n@host:80", "x@y@host:80", "a" * 65 + "@host:80"])
def test_malformed_peers_are_refused(text: str) -> None:
    refusal(lambda: parse_peer(text))


@given(st.text("tcpi/:.[]%@-ab019 \n", max_size=16), st.sampled_from(["", ":80", "tcp://", "[::1]:", "ipc://"]))
@settings(max_examples=200, deadline=None)
def test_whatever_is_accepted_is_canonical(text: str, part: str) -> None:
    try:
        endpoint = parse_address(text + part if part == ":80" else part + text)
    except BadInput as error:
        assert str(error).isprintable()
    else:
        assert parse_address(endpoint) == endpoint


# -- Epochs ----------------------------------------------------------------------------------------------------------


def test_every_start_has_a_higher_epoch(tmp_path: Path) -> None:
    path = tmp_path / "alice.epoch"
    assert [next_epoch(path) for _ in range(3)] == [1, 2, 3]
    assert path.read_bytes() == b"3\n"
    path.write_text("0\n")
    assert next_epoch(path) == 1
    path.write_text(f"{MAX_EPOCH - 1}\n")
    assert next_epoch(path) == MAX_EPOCH
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["alice.epoch", "alice.epoch.lock"]


@posix
def test_an_epoch_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "alice.epoch"
    next_epoch(path)
    synced: list[tuple[str, bytes]] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, path.read_bytes()))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    next_epoch(path)
    # The new file's content first, while the old one still stands; then the name, when the new one has its place.
    assert synced == [("file", b"1\n"), ("folder", b"2\n")]


def test_starts_at_the_same_moment_have_different_epochs(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(lambda _: next_epoch(tmp_path / "alice.epoch"), range(40)))
    assert sorted(epochs) == list(range(1, 41))


DAMAGED_EPOCHS = ["", "\n", "7", "7\n\n", "7\r\n", "07\n", "-1\n", "+7\n", "7.0\n", " 7\n", "x\n", "٧\n", "\0" * 8]


@pytest.mark.parametrize("text", [*DAMAGED_EPOCHS, f"{MAX_EPOCH}\n", "9" * 30 + "\n", "1" * 5000], ids=ascii)
def test_a_damaged_epoch_is_not_guessed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "alice.epoch"
    path.write_text(text, "utf-8", newline="")
    (tmp_path / "alice.epoch.lock").touch()
    before = snapshot(tmp_path)
    assert f"`date +%s > {path}`" in refusal(lambda: next_epoch(path))
    after = snapshot(tmp_path)
    assert after["alice.epoch"] == before["alice.epoch"] and after.keys() == before.keys()


@posix
def test_an_epoch_that_cannot_be_stored_refuses_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.epoch").mkdir()
    assert "cannot count this start in" in refusal(lambda: next_epoch(tmp_path / "missing" / "alice.epoch"))
    assert "cannot count this start in" in refusal(lambda: next_epoch(tmp_path / "file" / "alice.epoch"))
    assert "cannot count this start in" in refusal(lambda: next_epoch(tmp_path / "folder.epoch"))
    assert "cannot count this start in" in refusal(lambda: next_epoch(Path("/dev/full/alice.epoch")))
    assert not (tmp_path / "missing").exists()
