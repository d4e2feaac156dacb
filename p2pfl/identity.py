"""Who a member is: its keys, the card that it shows, the roster of those who may take part.

An identity is an Ed25519 key that signs and an X25519 key for the encrypted link. Whatever comes in from others (cards,
rosters, addresses) is checked here once, strictly; a value of these classes that exists is a value that can be trusted
to be well formed. Private keys leave this module only by `Identity.link_secret` and through `save`.

The files, all small and readable as text:

    NAME.key     mode 0600: the card line, then the secret keys, in the clear or under a passphrase
    NAME.card    the card line, for the others
    NAME.epoch   how often this identity has started
    roster.txt   one member a line: its card, then optionally its addresses
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import os
import re
import shlex
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from p2pfl.messages import MAX_EPOCH, BadInput, check_name, printable

if sys.platform != "win32":
    import fcntl

KEY_BYTES = 32  # of each of the four keys, public or secret
SIGNATURE_BYTES = 64
CARD_VERSION = "p2pfl1"  # first word of every card line; a new form gets a new word
CARD_CONTEXT = b"card"
SIGNING_PREFIX = b"p2pfl"


# -- Keys and cards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """The public half of an identity: what the others need to know it by.

    Printed (`str`) and read (`Card.parse`) as one line of 180 to 243 ASCII characters without a line end:

        p2pfl1 NAME BASE64URL(signing key 32 bytes, link key 32 bytes, self-signature 64 bytes)

    The self-signature covers the name and both keys, so that nobody can put his link key, or another name, beside
    someone's signing key. It does not show that the link key is the owner's: only the link's handshake does.
    BadInput if anything about it is wrong; there is no unchecked card.
    """

    name: str
    signing_key: bytes  # Ed25519, 32 bytes
    link_key: bytes  # X25519, 32 bytes: as CURVE takes it, and as ZAP reports it
    signature: bytes  # 64 bytes

    def __post_init__(self) -> None:
        check_name(self.name)
        if is_unsafe_signing_key(self.signing_key) or is_unsafe_link_key(self.link_key):
            raise BadInput(f"the card of {self.name} holds a forged key that anyone could use: do not accept it")
        if not self.verify(CARD_CONTEXT, _card_content(self.name, self.signing_key, self.link_key), self.signature):
            raise BadInput(f"the card of {self.name} is damaged or altered: ask its owner for the card line again")

    @classmethod
    def parse(cls, line: str) -> Card:
        """The card that this line is. BadInput unless the line is exactly, to the character, what `str` gives."""
        words = line.split(" ")
        if len(words) != 3 or words[0] != CARD_VERSION:
            raise BadInput(f"not a card: a card is '{CARD_VERSION} NAME KEYS' in one line, from `p2pfl keygen NAME`")
        name = check_name(words[1])
        blob = _decode(words[2])
        if blob is None or len(blob) != 2 * KEY_BYTES + SIGNATURE_BYTES:
            raise BadInput(f"the card of {name} is damaged or cut off: ask its owner for the card line again")
        return cls(name, blob[:KEY_BYTES], blob[KEY_BYTES : 2 * KEY_BYTES], blob[2 * KEY_BYTES :])

    def __str__(self) -> str:
        return f"{CARD_VERSION} {self.name} {_encode(self.signing_key + self.link_key + self.signature)}"

    @property
    def fingerprint(self) -> str:
        """What two people compare by telephone; it covers both keys."""
        return fingerprint_of(self.signing_key, self.link_key)

    def verify(self, context: bytes, message: bytes, signature: bytes) -> bool:
        """Whether the owner of this card signed exactly this message for exactly this purpose."""
        try:
            Ed25519PublicKey.from_public_bytes(self.signing_key).verify(signature, _framed(context, message))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, eq=False)
class Identity:
    """A member's secret keys, and its name. Its `repr` shows the name only."""

    name: str
    signing: Ed25519PrivateKey = field(repr=False)
    link: X25519PrivateKey = field(repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)

    @classmethod
    def generate(cls, name: str) -> Identity:
        """A new identity, from the operating system's randomness. BadInput if `name` is not one."""
        return cls(name, Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @cached_property
    def card(self) -> Card:
        signing_key = self.signing.public_key().public_bytes_raw()
        link_key = self.link.public_key().public_bytes_raw()
        signature = self.sign(CARD_CONTEXT, _card_content(self.name, signing_key, link_key))
        return Card(self.name, signing_key, link_key, signature)

    def sign(self, context: bytes, message: bytes) -> bytes:
        """64 bytes of Ed25519 signature. `context` (up to 255 bytes) is what the message is for: "hello", "manifest" …

        A signature made for one purpose verifies for no other, whatever the bytes of the message.
        """
        return self.signing.sign(_framed(context, message))

    @property
    def link_secret(self) -> bytes:
        """The 32 secret bytes that CURVE takes as `curve_secretkey`. Keep them in no variable that is ever shown."""
        return self.link.private_bytes_raw()


def fingerprint_of(*keys: bytes) -> str:
    """Four groups of four base32 characters over these public keys: "K4QD-7M2X-AZ3B-QW5T".

    80 bits of SHA-256. To make keys that show someone else's fingerprint takes 2^80 attempts; that two keys of the
    same attacker can be made alike in 2^40 helps him against nobody.
    """
    text = base64.b32encode(hashlib.sha256(b"p2pfl fingerprint" + b"".join(keys)).digest()[:10]).decode()
    return "-".join(text[i : i + 4] for i in range(0, 16, 4))


def _framed(context: bytes, message: bytes) -> bytes:
    """What is really signed. The length byte keeps (context, message) pairs apart: no two give the same bytes."""
    return SIGNING_PREFIX + bytes([len(context)]) + context + message


def _card_content(name: str, signing_key: bytes, link_key: bytes) -> bytes:
    return signing_key + link_key + name.encode()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes | None:
    """The bytes of unpadded base64url, or None. Python's decoder skips odd characters: hence the way back."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return None
    return data if _encode(data) == text else None


# -- Public keys that must not be accepted ---------------------------------------------------------------------------
# The library loads these keys without a word (tests/test_identity.py forges a signature under one).

FIELD_PRIME = 2**255 - 19  # coordinates of both curves are numbers below it
ORDER_8_Y = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7  # root of d·y⁴ + 2·y² = 1
SMALL_ORDER_Y = (0, 1, ORDER_8_Y, FIELD_PRIME - ORDER_8_Y, FIELD_PRIME - 1)  # of all eight points of order 1, 2, 4, 8


def is_unsafe_signing_key(key: bytes) -> bool:
    """Whether this is no canonical encoding, or a small-order point, under which anyone can make signatures.

    A key that is no point of the curve at all needs no test here: no signature verifies under it.
    """
    y = int.from_bytes(key, "little") & (2**255 - 1)  # the highest bit is the sign of x
    return len(key) != KEY_BYTES or y >= FIELD_PRIME or y in SMALL_ORDER_Y


def is_unsafe_link_key(key: bytes) -> bool:
    """Whether this is no canonical encoding, or a small-order point, with which the shared secret is known to all.

    Canonical, because ZAP looks members up by these bytes: one key must have one spelling.
    """
    if len(key) != KEY_BYTES or int.from_bytes(key, "little") >= FIELD_PRIME:
        return True
    try:
        # A small-order point gives the all-zero secret with every private key, and the library refuses that secret.
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return True
    return False


# -- The key file ----------------------------------------------------------------------------------------------------
# Two lines: the card, and the two secret keys, either in the clear or sealed under a passphrase:
#
#     p2pfl1 NAME BASE64URL
#     secret-key BASE64URL(signing 32 bytes, link 32 bytes)
#     secret-key-scrypt BASE64URL(salt 16 bytes, AES-256-GCM of the same 64 bytes: 80 bytes)      (instead)
#
# Not encrypted PKCS #8: the library writes it with 2048 rounds of PBKDF2 (under 1 ms a guess) and unauthenticated CBC,
# where damage can pass as another key. Here damage shows: sealed keys are authenticated together with the card line,
# and open ones must be the keys of the card.

PLAIN, SEALED = "secret-key", "secret-key-scrypt"
SALT_BYTES, TAG_BYTES = 16, 16
SECRET_BYTES = 2 * KEY_BYTES
SECRET_LINE_BYTES = {PLAIN: SECRET_BYTES, SEALED: SALT_BYTES + SECRET_BYTES + TAG_BYTES}
KEY_FILE = re.compile(rf"(?P<card>[^\n]+)\n(?P<kind>{PLAIN}|{SEALED}) (?P<secret>[^\n]+)\n")
KEY_FILE_MAX_BYTES = 1024  # the longest good one has 391
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**17, 8, 1  # 128 MiB and about 0.5 s a guess: what OWASP recommends for passwords
NONCE = bytes(12)  # fixed, and right to be: the salt is random, so a key that scrypt gives seals one message, once
SECRET_MODE, PUBLIC_MODE, OTHERS_MODE = 0o600, 0o644, 0o077


def save(identity: Identity, folder: Path, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """Write NAME.key (0600) and NAME.card into `folder`, which is made if need be; returns the two paths.

    Both are written whole or not at all, and nothing is ever overwritten. BadInput if one of them is there already,
    if the folder cannot be written, or if the passphrase is empty.
    """
    if passphrase == b"":
        raise BadInput("the passphrase is empty: type one, or leave --passphrase away")
    key_path, card_path = folder / f"{identity.name}.key", folder / f"{identity.name}.card"
    secret = identity.signing.private_bytes_raw() + identity.link_secret
    card_line = str(identity.card)
    if passphrase is None:
        secret_line = f"{PLAIN} {_encode(secret)}"
    else:
        salt = os.urandom(SALT_BYTES)
        sealed = _cipher(passphrase, salt).encrypt(NONCE, secret, card_line.encode())
        secret_line = f"{SEALED} {_encode(salt + sealed)}"
    with _os_errors_as_bad_input("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(key_path, f"{card_line}\n{secret_line}\n", SECRET_MODE)
        try:
            _write_new(card_path, f"{card_line}\n", PUBLIC_MODE)
        except (BadInput, OSError):
            key_path.unlink()  # ours, written a moment ago: both files or none
            raise
        _sync_folder(folder)
    return key_path, card_path


def load(path: Path, ask: Callable[[], bytes] | None = None) -> Identity:
    """Read a key file. `ask` is called for the passphrase, once, if the file needs one.

    BadInput, naming the command that mends it, if the file is missing, a symbolic link, someone else's, readable by
    others, damaged, or does not open with the passphrase. No message contains anything of the file's second line.
    """
    shown = printable(str(path))
    damaged = BadInput(
        f"{shown} is damaged or cut off: put your backup in its place, or make a new identity with `p2pfl keygen NAME`"
        " and give the others its card"
    )
    parsed = _parse_key_file(_read_secret_file(path))
    if parsed is None:
        raise damaged
    card, kind, secret = parsed
    if kind == SEALED:
        if ask is None:
            raise BadInput(f"{shown} is under a passphrase: start in a terminal, where it can be asked for")
        try:
            secret = _cipher(ask(), secret[:SALT_BYTES]).decrypt(NONCE, secret[SALT_BYTES:], str(card).encode())
        except InvalidTag:
            raise BadInput(
                f"{shown} does not open: the passphrase is wrong (try again), or the file is damaged (put your backup"
                " in its place)"
            ) from None
    identity = Identity(
        card.name,
        Ed25519PrivateKey.from_private_bytes(secret[:KEY_BYTES]),
        X25519PrivateKey.from_private_bytes(secret[KEY_BYTES:]),
    )
    if identity.card != card:
        raise damaged
    return identity


def _cipher(passphrase: bytes, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=KEY_BYTES, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P).derive(passphrase))


def _parse_key_file(content: bytes) -> tuple[Card, str, bytes] | None:
    """The card, PLAIN or SEALED, and the bytes of the second line; None unless every byte is as `save` writes it."""
    # Asked beforehand, since the exception of a failed decode would carry the whole file.
    match = KEY_FILE.fullmatch(content.decode("ascii")) if content.isascii() else None
    if match is None:
        return None
    try:
        card = Card.parse(match["card"])
    except BadInput:
        return None
    secret = _decode(match["secret"])
    if secret is None or len(secret) != SECRET_LINE_BYTES[match["kind"]]:
        return None
    return card, match["kind"], secret


def _read_secret_file(path: Path) -> bytes:
    """The bytes of a file that only its owner can read. What is checked is the open file, so it cannot be swapped."""
    shown, quoted = printable(str(path)), printable(shlex.quote(str(path)))
    if path.is_symlink():  # for the message; O_NOFOLLOW below is what holds
        raise BadInput(f"{shown} is a symbolic link: give the key file itself, `readlink -f {quoted}` names it")
    no_follow: int = getattr(os, "O_NOFOLLOW", 0)  # Windows has neither of these two
    no_waiting: int = getattr(os, "O_NONBLOCK", 0)  # for a writer, if the path is a named pipe
    with _os_errors_as_bad_input("read the key file", path):
        try:
            descriptor = os.open(path, os.O_RDONLY | no_follow | no_waiting)
        except FileNotFoundError:
            folder = printable(shlex.quote(str(path.parent)))
            raise BadInput(f"there is no key file {shown}: make one with `p2pfl keygen NAME --out {folder}`") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadInput(f"{shown} is not a file: give the NAME.key that `p2pfl keygen NAME` wrote")
            if sys.platform != "win32":  # where modes say nothing, and the user's profile folder protects its files
                if status.st_uid != os.geteuid():
                    raise BadInput(f"{shown} belongs to another user: `sudo chown {os.geteuid()} {quoted}`")
                if status.st_mode & OTHERS_MODE:
                    raise BadInput(f"{shown} can be read or changed by other users: `chmod 600 {quoted}`")
            return os.read(descriptor, KEY_FILE_MAX_BYTES)
        finally:
            os.close(descriptor)


# -- The roster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One line of a roster. `str` gives the line back."""

    card: Card
    addresses: tuple[str, ...] = ()  # as `parse_address` returns them

    @property
    def name(self) -> str:
        return self.card.name

    def __str__(self) -> str:
        return " ".join((str(self.card), *self.addresses))


@dataclass(frozen=True)
class Roster:
    """Who may take part, in the order of the file. Names and keys differ from each other; ValueError if not.

    The text form: a member a line, `CARD [ADDRESS]…`, words apart by blanks; `#` begins a comment, at the start of a
    line or after a blank; empty lines are skipped.
    """

    members: tuple[Member, ...]
    _by_name: dict[str, Member] = field(init=False, repr=False, compare=False)
    _by_link_key: dict[bytes, Member] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {member.name: member for member in self.members})
        object.__setattr__(self, "_by_link_key", {member.card.link_key: member for member in self.members})
        signing_keys = {member.card.signing_key for member in self.members}
        if not len(self.members) == len(self._by_name) == len(self._by_link_key) == len(signing_keys) > 0:
            raise ValueError("the members of a roster have different names and keys, and there is one at least")

    @classmethod
    def parse(cls, text: str, source: str) -> Roster:
        """The roster that this text is. One bad line and the whole is refused: BadInput, `source` and the line number.

        Bad are: what is not a sound card, a name or a key that an earlier line has, a malformed address, no member.
        """
        members: list[Member] = []
        line_of: dict[str | bytes, int] = {}  # of each name and key met so far
        for number, line in enumerate(text.split("\n"), start=1):
            words = _without_comment(line.split())
            if not words:
                continue
            try:
                card = Card.parse(" ".join(words[:3]))
                addresses = tuple(parse_address(word) for word in words[3:])
            except BadInput as error:
                raise BadInput(f"{printable(source)} line {number}: {error}") from None
            taken: tuple[tuple[str, str | bytes], ...] = (
                ("the name", card.name),
                ("the signing key", card.signing_key),
                ("the link key", card.link_key),
            )
            for what, value in taken:
                if value in line_of:
                    raise BadInput(
                        f"{printable(source)} line {number}: {what} of {card.name} stands on line {line_of[value]}"
                        " already: remove one of the two lines"
                    )
                line_of[value] = number
            members.append(Member(card, addresses))
        if not members:
            raise BadInput(f"{printable(source)} holds no card: `cat *.card > {printable(shlex.quote(source))}`")
        return cls(tuple(members))

    def __str__(self) -> str:
        return "".join(f"{member}\n" for member in self.members)

    def by_name(self, name: str) -> Member | None:
        return self._by_name.get(name)

    def by_link_key(self, key: bytes) -> Member | None:
        """Whose link this is: `key` is the 32 bytes that ZAP reports."""
        return self._by_link_key.get(key)


def read_roster(path: Path) -> Roster:
    """The roster in this UTF-8 file; BadInput with file and line if anything in it is wrong."""
    with _os_errors_as_bad_input("read the roster", path):
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            quoted = printable(shlex.quote(str(path)))
            raise BadInput(f"there is no roster {printable(str(path))}: `cat *.card > {quoted}`") from None
        except UnicodeDecodeError:
            raise BadInput(f"{printable(str(path))} is not UTF-8 text: write it anew from the card lines") from None
    return Roster.parse(text, str(path))


def _without_comment(words: list[str]) -> list[str]:
    begin = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:begin]


# -- Addresses -------------------------------------------------------------------------------------------------------

PORT = re.compile(r"[1-9][0-9]{0,4}")
MAX_PORT = 65535
HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")  # with _, which container networks use
MAX_HOST_CHARACTERS = 253  # of DNS
IPV6_IN_BRACKETS = re.compile(r"\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?)\]")  # %eth0: the zone of a link-local address
MAX_IPC_BYTES = 107  # of a Unix socket's path: 108 in the kernel's structure, less the closing NUL
SHOWN_CHARACTERS = 80  # of a malformed address, in the message about it


def parse_address(text: str) -> str:
    """The ZeroMQ endpoint that is meant: `tcp://HOST:PORT` (`HOST:PORT` is enough) or `ipc://PATH`.

    HOST is a DNS name, an IPv4 address, or an IPv6 address in brackets; PORT is 1 to 65535. Names become lower case
    and IPv6 addresses their short form, so that equal addresses are equal strings. BadInput says how to write it.
    """
    if not text.isprintable() or " " in text:
        raise _bad_address(text, "holds a blank or a character that cannot be printed; write it as tcp://HOST:PORT")
    if text.startswith("ipc://"):
        path = text.removeprefix("ipc://")
        if path in ("", "*") or len(path.encode()) > MAX_IPC_BYTES:
            raise _bad_address(text, f"needs a path of 1 to {MAX_IPC_BYTES} bytes; write it as ipc:///tmp/NAME.sock")
        return text
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not PORT.fullmatch(port) or int(port) > MAX_PORT:
        raise _bad_address(text, f"does not end in a port, 1 to {MAX_PORT}; write it as tcp://HOST:PORT")
    return f"tcp://{_canonical_host(host, text)}:{port}"


def parse_peer(text: str) -> tuple[str | None, str]:
    """`NAME@ADDRESS` or `ADDRESS` as (name or None, endpoint); BadInput if either is malformed."""
    name, at, address = text.partition("@")
    if not at or "/" in name:  # the path of ipc:///run/a@b may hold an @; a name holds no slash
        return None, parse_address(text)
    return check_name(name), parse_address(address)


def _canonical_host(host: str, text: str) -> str:
    bracketed = IPV6_IN_BRACKETS.fullmatch(host)
    labels = host.split(".")
    try:
        if bracketed:
            return f"[{ipaddress.IPv6Address(bracketed[1])}]"
        if labels[-1].isdecimal():  # no top-level domain is a number: without this, 300.1.1.1 would be asked of DNS
            return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise _bad_address(text, "is no IP address; write it like tcp://10.0.0.7:5000 or tcp://[::1]:5000") from None
    if ":" in host:
        raise _bad_address(text, "is malformed; write it as tcp://HOST:PORT, an IPv6 address as tcp://[::1]:5000")
    if len(host) > MAX_HOST_CHARACTERS or not all(HOST_LABEL.fullmatch(label) for label in labels):
        raise _bad_address(text, "names no host; write it as tcp://HOST:PORT (0.0.0.0 or [::] for all interfaces)")
    return host.lower()


def _bad_address(text: str, why: str) -> BadInput:
    return BadInput(f"the address '{printable(text[:SHOWN_CHARACTERS])}' {why}")


# -- The epoch: which start of one identity is the newer -------------------------------------------------------------

EPOCH = re.compile(rb"(0|[1-9][0-9]{0,15})\n")  # 16 digits hold MAX_EPOCH
EPOCH_FILE_MAX_BYTES = 64  # a good one has 17 at most


def next_epoch(path: Path) -> int:
    """Count one start: add one to the number in `path` (a missing file counts as 0), store it, and return it.

    The file holds decimal digits and a newline. The new number is on the disk before this returns, and two processes
    that start at the same moment get two numbers: an empty file beside it, `path`.lock, sees to that. BadInput if the
    file is damaged or cannot be written: to guess would risk a number of the past, and the others would take this
    process for a replay of an older one.
    """
    with _os_errors_as_bad_input("count this start in", path), _lock(path.with_name(path.name + ".lock")):
        try:
            with path.open("rb") as file:
                content = file.read(EPOCH_FILE_MAX_BYTES)
        except FileNotFoundError:
            content = b"0\n"
        if not EPOCH.fullmatch(content) or int(content) >= MAX_EPOCH:
            # Seconds since 1970 are more than any honest count of starts, so they mend it.
            raise BadInput(
                f"{printable(str(path))} does not hold the number of starts: `date +%s > "
                f"{printable(shlex.quote(str(path)))}` puts one there that is above all earlier ones"
            )
        epoch = int(content) + 1
        with _written_beside(path, f"{epoch}\n", SECRET_MODE) as temporary:
            os.replace(temporary, path)
        _sync_folder(path.parent)
    return epoch


# -- Files -----------------------------------------------------------------------------------------------------------


def _write_new(path: Path, text: str, mode: int) -> None:
    """Make the file `path`, whole or not at all; BadInput if there is one, a dangling symbolic link included."""
    with _written_beside(path, text, mode) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename it never overwrites, even if two do this at once
        except FileExistsError:
            raise BadInput(
                f"{printable(str(path))} exists and is never overwritten: choose another name or another --out"
            ) from None


@contextmanager
def _written_beside(path: Path, text: str, mode: int) -> Iterator[Path]:
    """A temporary file in the folder of `path` with this text, on the disk; gone at the end."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # O_EXCL | O_NOFOLLOW, mode 0600
    temporary = Path(name)
    try:
        temporary.chmod(mode)
        with open(descriptor, "w", encoding="ascii", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Only one process at a time is in here. On Windows there is no such lock: two at once may get one number."""
    with path.open("a") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    """Make the names in the folder last through a power cut, not only the files' content."""
    if sys.platform != "win32":  # which opens no folders, and journals its names
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _os_errors_as_bad_input(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadInput(
            f"cannot {verb} {printable(str(path))}: {_reason(error)}: mend that, or choose another path"
        ) from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
