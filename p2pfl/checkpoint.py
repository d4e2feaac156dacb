"""A resume point on the disk: two generations, each whole or absent, each with a checksum of its own.

Writing never touches the newest good generation: the new one is written beside it and renamed into place. Reading
takes the newest that is whole, and never pretends that there was none: one that is damaged is moved aside, for whoever
may mend it, and is remembered by that.

A generation is a safetensors file and the BLAKE3 of it. It is written and read here, piece by piece, since the
library's `save` holds the interpreter for a third of a second for 200 MB (measured), and its `load` believes the file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from p2pfl.messages import MAX_ROUND, BadInput

NEWEST = "state.safetensors"
PREVIOUS = "previous.safetensors"
DIGEST_BYTES = 32  # BLAKE3 of the rest of the file, at its end
LENGTH_BYTES = 8  # safetensors: how long the header is, little-endian; then the header, JSON; then the tensors
ALIGNMENT = 8  # bytes: of the first tensor in the file
MAX_HEADER = 1 << 20  # bytes: ten thousand tensors, where a learner's state has a few
PIECE = 1 << 20  # bytes that are read at once
ABOUT = "__metadata__"  # the key of a safetensors header that names no tensor
ASIDE = "damaged-"  # begins the name of what was moved aside


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a node goes on from: `tensors` are its learner's state before it trained for `round`."""

    round: int
    mass: float  # that it held, which push-sum changes
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder of checkpoints holds."""

    newest: Checkpoint | None  # the newest whole one
    damaged: Mapping[Path, str]  # what is of no use, where it lies now, and why; from earlier on if nothing is whole

    @property
    def lost(self) -> bool:
        """Whether something was saved here, and nothing of it is whole: to start afresh is the user's call."""
        return self.newest is None and bool(self.damaged)


# -- Write -----------------------------------------------------------------------------------------------------------


def write(folder: Path, checkpoint: Checkpoint, experiment: bytes) -> None:
    """Keep this as the newest generation, the newest as the previous. OSError if the disk does not take it."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"round": str(checkpoint.round), "mass": repr(checkpoint.mass), "experiment": experiment.hex()}
    digest = blake3()
    draft = folder / f".{NEWEST}.tmp"
    with draft.open("wb") as file:
        for piece in _pieces(about, checkpoint.tensors):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    if (folder / NEWEST).exists():
        (folder / NEWEST).replace(folder / PREVIOUS)
    draft.replace(folder / NEWEST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the renames themselves
    finally:
        os.close(descriptor)


def _pieces(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors file, without a copy of any tensor."""
    header = json.dumps({ABOUT: dict(about)} | _layout(tensors)).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    yield len(header).to_bytes(LENGTH_BYTES, "little") + header
    for tensor in tensors.values():
        yield _bytes_of(tensor.contiguous())


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """What a safetensors header says of each tensor, one after the other in the order of `tensors`."""
    layout: dict[str, object] = {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        layout[name] = {
            "dtype": _dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    return layout


def _dtype(dtype: torch.dtype) -> str:
    """As safetensors spells it; a state holds float32, integers and truth values."""
    if dtype is torch.bool:
        return "BOOL"
    kind = "F" if dtype.is_floating_point else "I" if dtype.is_signed else "U"
    return f"{kind}{8 * dtype.itemsize}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one checkpoint."""

    round: int
    failure: str = ""  # why it is not on the disk


class Writer:
    """Writes checkpoints on a thread of its own, one at a time; of those that wait for it, only the newest.

    One loop owns it. `wake` is called on that thread whenever `written` has something to tell.
    """

    def __init__(self, folder: Path, experiment: bytes, wake: Callable[[], None]) -> None:
        self._folder = folder
        self._experiment = experiment
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Written] | None = None
        self._waiting: Checkpoint | None = None

    def put(self, checkpoint: Checkpoint) -> None:
        """Write this one next. Its tensors are the writer's from now on."""
        self._waiting = checkpoint
        if self._writing is None:
            self._begin()

    def written(self, wait: bool = False) -> list[Written]:
        """What was done since this was asked last; or, with `wait`, all that there is to do."""
        written = []
        while self._writing is not None and (wait or self._writing.done()):
            written.append(self._writing.result())
            self._begin()
        return written

    def close(self) -> None:
        """End the thread, once it has written what it writes."""
        self._thread.shutdown()

    def _begin(self) -> None:
        self._writing, waiting, self._waiting = None, self._waiting, None
        if waiting is not None:
            self._writing = self._thread.submit(self._write, waiting)
            self._writing.add_done_callback(lambda _: self._wake())

    def _write(self, checkpoint: Checkpoint) -> Written:
        try:
            write(self._folder, checkpoint, self._experiment)
        except OSError as error:  # a full disk is no reason to stop training
            return Written(checkpoint.round, str(error.strerror))
        return Written(checkpoint.round)


# -- Read ------------------------------------------------------------------------------------------------------------


def read(folder: Path, experiment: bytes, like: Mapping[str, Tensor]) -> Found:
    """The newest whole generation whose tensors have the names, types and shapes of `like`, the state of a learner.

    Whatever is no such thing is moved aside. BadInput if one is of another experiment, or cannot be moved.
    """
    newest, damaged = None, dict[Path, str]()
    for path in (folder / NEWEST, folder / PREVIOUS):
        if newest is not None or not path.exists():
            continue
        try:
            newest = _read_one(path, experiment, like)
        except OSError as error:
            damaged[_set_aside(path)] = str(error.strerror)
        except ValueError as error:
            damaged[_set_aside(path)] = str(error)
    if newest is None:
        damaged = dict.fromkeys(sorted(folder.glob(f"{ASIDE}*")), "it was damaged before") | damaged
    return Found(newest, damaged)


def _set_aside(path: Path) -> Path:
    """Under a name that nothing has: what was saved is never lost."""
    names = (path.with_name(f"{ASIDE}{number}.{path.name}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    try:
        path.replace(aside)
    except OSError as error:
        raise BadInput(f"{path} is damaged, and cannot be renamed: {error.strerror}; move it away") from None
    return aside


def _read_one(path: Path, experiment: bytes, like: Mapping[str, Tensor]) -> Checkpoint:
    """ValueError, with what is wrong, if this is no checkpoint of `like`. Room is made by `like`, not by the file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
        digest = blake3()
        for begin in range(0, size, PIECE):
            digest.update(file.read(min(PIECE, size - begin)))
        if digest.digest() != file.read(DIGEST_BYTES):
            raise ValueError("its checksum does not hold")
        file.seek(0)
        header_size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if header_size > MAX_HEADER:
            raise ValueError(f"its header claims to have {header_size} bytes")
        layout = _read_header(file.read(header_size))
        about = layout.pop(ABOUT, None)
        if not isinstance(about, dict) or about.keys() != {"round", "mass", "experiment"}:
            raise ValueError("its header does not say of which round and experiment it is")
        if about["experiment"] != experiment.hex():
            raise BadInput(f"{path} is of another experiment: use its settings, or another --run-dir")
        if layout != _layout(like) or size != LENGTH_BYTES + header_size + sum(t.nbytes for t in like.values()):
            raise ValueError("its tensors are those of another model or optimizer")
        round, mass = int(str(about["round"])), float(str(about["mass"]))
        if not (0 <= round <= MAX_ROUND and 0 < mass < math.inf):
            raise ValueError(f"it is of round {round}, with a mass of {mass}")
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
        for tensor in tensors.values():
            file.readinto(_bytes_of(tensor))
    return Checkpoint(round, mass, tensors)


def _read_header(text: bytes) -> dict[str, object]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):  # a hundred thousand brackets
        raise ValueError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header
