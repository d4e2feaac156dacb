"""Independent, named streams of random numbers from one seed.

`stream(seed, "split")` and `stream(seed, "batches", "node-3")` never overlap, whatever is drawn from either: what one
part of the program draws cannot shift what another part gets. Nothing here keeps state.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _words(names: tuple[str | int, ...]) -> list[int]:
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The random stream of this name, a pure function of (seed, names)."""
    return np.random.default_rng([seed, *_words(names)])


def torch_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed of this name, for generators that want one number."""
    return int(stream(seed, *names).integers(2**63))
