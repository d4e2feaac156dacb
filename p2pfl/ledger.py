"""What a node's privacy has been charged for: RUN/nodes/NAME/privacy.jsonl, and the secret beside it.

A line is a round that is about to be trained: it is on the disk, and the disk has said so, before anything that was
learnt in that round can leave. So however a process ends, whatever has left stands here, and a crash resets no budget;
a checkpoint, which is older than what was last released, could not promise that. A last line that is cut short was
never said to be on the disk, so nothing of its round has left, and it is forgotten. Any other damage is refused: what
it cost is not known.

All randomness of a round follows from `privacy.key`, 32 random bytes that no other member knows, and from all that the
round's outcome depends on. Who repeats a round after a crash from the very same state gives the very same release once
more, which tells nobody anything new and is charged once; anything else draws fresh noise, and is charged. The release
is named by a keyed hash, so that with another key it has another name. Who reads the key after the event can take the
noise off: it is kept as the data are, and is never shown. The ledger itself tells nothing but what was spent.

What another run folder has spent on the same rows is not known here, and adds up: as ε + ε at δ + δ, at the worst.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from p2pfl.accountant import Mechanism, Unit
from p2pfl.messages import BadInput, TrainingFailed

LEDGER = "privacy.jsonl"
KEY = "privacy.key"
KEY_BYTES = 32
OWNER_ONLY = 0o600


@dataclass(frozen=True, slots=True)
class Charge:
    """One round that was trained."""

    round: int
    release: str  # names what leaves by it: equal only if it is the very same numbers
    unit: Unit
    sigma: float  # noise over clipping norm
    q: float  # with which each row is in a step
    steps: int
    delta: float

    def __post_init__(self) -> None:
        counts = isinstance(self.round, int) and isinstance(self.steps, int) and self.steps > 0
        if not (counts and self.sigma > 0 and 0 < self.q <= 1 and 0 < self.delta < 1):
            raise ValueError(f"{self} is no charge")

    @property
    def mechanism(self) -> Mechanism:
        return Mechanism(self.sigma, self.q)


class Ledger:
    """The charges of one node in one run, and the secret that its randomness follows from."""

    def __init__(self, secret: bytes, charges: list[Charge] | None = None, path: Path | None = None) -> None:
        """`path`: where to write them down; None: nowhere, as in a simulation."""
        self.secret = secret
        self.charges = charges or []
        self._path = path
        self._known = {(charge.round, charge.release) for charge in self.charges}

    def name(self, context: bytes) -> str:
        """What to call the release that follows from all this, in hexadecimal."""
        return blake3(b"release" + context, key=self.secret).hexdigest()

    def seed(self, context: bytes) -> bytes:
        """32 bytes that all randomness of this release follows from."""
        return blake3(b"randomness" + context, key=self.secret).digest()

    def holds(self, charge: Charge) -> bool:
        """Whether this very release was charged before."""
        return (charge.round, charge.release) in self._known

    def enter(self, charge: Charge) -> None:
        """Charge it, unless it was before. It is on the disk afterwards, or else TrainingFailed says why it is not."""
        if self.holds(charge):
            return
        if self._path is not None:
            try:
                append_durably(self._path, json.dumps(asdict(charge)).encode() + b"\n")
            except OSError as error:
                raise TrainingFailed(
                    f"round {charge.round} was not trained, for {self._path} cannot be written ({error.strerror}) and "
                    "nothing may leave uncharged: make room there, and go on with --resume"
                ) from None
        self._known.add((charge.round, charge.release))
        self.charges.append(charge)


def open_ledger(folder: Path) -> Ledger:
    """The ledger of the node whose records are in this folder, whether or not it has one yet.

    BadInput if it is damaged, or if its secret cannot be kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Ledger(_secret(folder / KEY), _read(folder / LEDGER), folder / LEDGER)
    except OSError as error:
        raise BadInput(
            f"cannot keep what privacy costs in {folder}: {error.strerror}; make room, or choose another --run-dir"
        ) from None


def simulated_ledger(seed: int, name: str) -> Ledger:
    """One that lasts as long as the process, with a secret that everybody can compute: for what must be reproducible,
    and has no real rows to protect."""
    return Ledger(blake3(f"simulated\x1f{seed}\x1f{name}".encode()).digest())


def _secret(path: Path) -> bytes:
    """The one that is there, or a new one: nothing was drawn from a file that is not whole."""
    if path.exists() and len(secret := path.read_bytes()) == KEY_BYTES:
        return secret
    path.unlink(missing_ok=True)
    append_durably(path, secrets.token_bytes(KEY_BYTES))
    return path.read_bytes()


def append_durably(path: Path, text: bytes) -> None:
    """Behind the last whole line, readable for its owner only; on the disk when this returns. OSError if it is not."""
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, OWNER_ONLY)
    try:
        end = os.fstat(descriptor).st_size
        if os.write(descriptor, text) != len(text):
            os.ftruncate(descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # its name
        finally:
            os.close(folder)


def _read(path: Path) -> list[Charge]:
    """All charges, oldest first. A last line without an end is cut off."""
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    charges = []
    for number, line in enumerate(lines, start=1):
        try:
            charges.append(Charge(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise BadInput(
                f"{path}, line {number} is damaged, and what it cost is not known: put its backup there, or choose "
                "another --run-dir and count what was spent here on top"
            ) from None
    return charges
