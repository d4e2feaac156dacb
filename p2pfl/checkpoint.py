"""A resume point on the disk: two generations, each whole or absent, each with a checksum of its own.

Writing never touches the newest good generation: the new one is written beside it and renamed into place. Reading
takes the newest that is whole, and never pretends that there was none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from safetensors.torch import load, save
from torch import Tensor

from p2pfl.messages import BadInput

NEWEST = "state.safetensors"
PREVIOUS = "previous.safetensors"
DIGEST_BYTES = 32  # BLAKE3 of the rest of the file, at its end


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a node goes on from: `tensors` are its learner's state before it trained for `round`."""

    round: int
    mass: float  # that it held, which push-sum changes
    tensors: Mapping[str, Tensor]


def write(folder: Path, checkpoint: Checkpoint, experiment: bytes) -> None:
    """Keep this as the newest generation, the newest as the previous. OSError if the disk does not take it."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"round": str(checkpoint.round), "mass": repr(checkpoint.mass), "experiment": experiment.hex()}
    content = save(dict(checkpoint.tensors), metadata=about)
    draft = folder / f".{NEWEST}.tmp"
    with draft.open("wb") as file:
        file.write(content)
        file.write(blake3(content).digest())
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


def read(folder: Path, experiment: bytes) -> Checkpoint | None:
    """The newest whole generation; None if nothing was ever written here.

    BadInput if there are only damaged ones, or if they are of another experiment: to start afresh is the user's call.
    """
    damaged = []
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        found = _read_one(path)
        if found is None:
            damaged.append(path)
            continue
        about, tensors = found
        if about["experiment"] != experiment.hex():
            raise BadInput(f"{path} is of another experiment: use its settings, or another --run-dir")
        return Checkpoint(int(about["round"]), float(about["mass"]), tensors)
    if damaged:
        raise BadInput(f"{' and '.join(map(str, damaged))} are damaged: to start afresh, move {folder} away")
    return None


def _read_one(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    content = path.read_bytes()
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if blake3(body).digest() != digest:
        return None
    header_size = int.from_bytes(body[:8], "little")  # safetensors: 8 bytes of length, then a JSON header
    about: dict[str, str] = json.loads(body[8 : 8 + header_size])["__metadata__"]
    return about, load(body)
