"""How a running node is asked how it is: a Unix domain socket of its user's own, and one JSON object on it.

Whoever connects is sent the node's `Status` at once, and hung up on: no request is read, so none can be wrong, and a
client that says nothing, or reads nothing, costs one write into a buffer. Nothing here waits for a client.

A socket's path is limited to about 100 bytes, and run folders lie deeper: so the sockets lie under short names in a
folder of the temporary directory that only its owner can enter (not in $XDG_RUNTIME_DIR, which goes at logout, when the
node may stay), and `control` in the node's records says where. Only this user can ask, and only on this machine.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import stat
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from p2pfl.messages import BadInput, Status

ANSWER_BYTES = 1 << 20  # of the socket's buffer, which must take the answer whole: a thousand neighbours fit
BACKLOG = 8  # clients that may wait while the node is stopped
PATIENCE = 2.0  # seconds that the nodes are given to answer, all together; they need milliseconds
OTHERS_MAY = 0o077  # the bits of a mode that let anybody but the owner in

_ANSWER = TypeAdapter(Status)


class Silence(Enum):
    """Why there is no answer."""

    STOPPED = "stopped"  # no process is there
    SILENT = "silent"  # it does not answer: it stands still, or the machine is very busy
    FORBIDDEN = "forbidden"  # it is another user's
    FOREIGN = "foreign"  # it says something else: another version of this program


# -- The node's end --------------------------------------------------------------------------------------------------


class Control:
    """The socket of one running node; as a context it is taken away at the end."""

    def __init__(self, pointer: Path) -> None:
        """Listen, and say in the file `pointer` where. BadInput, in one line, where that cannot be."""
        name = hashlib.sha256(os.fsencode(pointer.resolve())).hexdigest()[:16]  # that of a former process, too
        self._pointer = pointer
        try:
            self.path = _made(folder()) / name
            self._listener = _listening(self.path)
            self._inode = self.path.stat().st_ino
            pointer.write_text(f"{self.path}\n", "utf-8")
        except OSError as error:
            raise BadInput(f"cannot listen for `p2pfl status`: {error.strerror or error}") from None

    def fileno(self) -> int:
        """Readable when somebody asks."""
        return self._listener.fileno()

    def answer(self, status: Status) -> None:
        """Answer one who asked, in a single write that does not wait, and hang up."""
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        with client:
            client.setblocking(False)
            try:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ANSWER_BYTES)
                client.send(_ANSWER.dump_json(status))
            except OSError:
                return  # it has gone again, or would have to be waited for

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        with suppress(OSError):  # somebody tidied up before
            if self.path.stat().st_ino == self._inode:  # or a later process of this node has taken its place
                forget(self._pointer)


def _listening(path: Path) -> socket.socket:
    """A socket there, put in place in one step: whatever refuses to answer there has no process any more."""
    draft = path.with_suffix(f".{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX)
    listener.setblocking(False)
    try:
        draft.unlink(missing_ok=True)
        listener.bind(str(draft))
        listener.listen(BACKLOG)
        draft.replace(path)
    except OSError:
        listener.close()
        raise
    return listener


def forget(pointer: Path) -> None:
    """Take away what a process has left that was killed; nothing, where it left nothing."""
    path = read(pointer)
    with suppress(OSError):  # what cannot be taken away does no harm
        pointer.unlink(missing_ok=True)
        if path is not None and path.parent == folder():
            path.unlink(missing_ok=True)


# -- The asking end --------------------------------------------------------------------------------------------------


def read(pointer: Path) -> Path | None:
    """The path of the socket that this file names; None if there is no such file."""
    try:
        text = pointer.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return Path(text) if text.isprintable() and text else None


def sockets() -> list[Path]:
    """The sockets of this user's nodes on this machine, those that killed ones have left included."""
    try:
        return sorted(path for path in _checked(folder()).iterdir() if path.is_socket())
    except OSError:
        return []


def ask(paths: Iterable[Path]) -> dict[Path, Status | Silence]:
    """What the nodes behind these sockets say, all asked at once; it takes PATIENCE at most."""
    found: dict[Path, Status | Silence] = {}
    heard: dict[Path, bytes] = {}
    until = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as selector:
        for path in paths:
            connected = _connect(path)
            if isinstance(connected, Silence):
                found[path] = connected
            else:
                selector.register(connected, selectors.EVENT_READ, path)
                heard[path] = b""
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                client, path = key.fileobj, key.data
                assert isinstance(client, socket.socket)
                piece = _received(client)
                heard[path] += piece
                if not piece or len(heard[path]) > ANSWER_BYTES:
                    selector.unregister(client)
                    client.close()
                    found[path] = _parsed(heard[path])
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
            found[key.data] = Silence.SILENT
    return found


def _connect(path: Path) -> socket.socket | Silence:
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    try:
        client.connect(str(path))
    except OSError as error:
        client.close()
        match error:
            case ConnectionRefusedError() | FileNotFoundError() | NotADirectoryError():
                return Silence.STOPPED
            case PermissionError():
                return Silence.FORBIDDEN
        return Silence.SILENT  # BlockingIOError: others wait already
    return client


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(ANSWER_BYTES)
    except OSError:
        return b""  # it ended while it spoke


def _parsed(answer: bytes) -> Status | Silence:
    try:
        return _ANSWER.validate_json(answer)
    except ValidationError:
        return Silence.FOREIGN if answer else Silence.STOPPED


# -- The folder ------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the sockets of this user lie."""
    return Path(tempfile.gettempdir(), f"p2pfl-{os.getuid()}")


def _made(path: Path) -> Path:
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    return _checked(path)


def _checked(path: Path) -> Path:
    """The folder, if nobody else can have put anything there; BadInput if others may, OSError if there is none."""
    state = path.lstat()  # a link is no folder: it would let its owner choose where the sockets go
    ours = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()
    if not ours or state.st_mode & OTHERS_MAY:
        mend = f"chmod 700 {path}" if ours else "set TMPDIR to a folder of your own"
        raise BadInput(f"{path} is not a folder that only you can enter, so `p2pfl status` does not use it: {mend}")
    return path
