"""Independent, named streams of random numbers from one seed.

`stream(seed, "split")` and `stream(seed, "batches", "node-3")` never overlap, whatever is drawn from either: what one
part of the program draws cannot shift what another part gets. Nothing here keeps state.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def _words(names: tuple[str | int, ...]) -> list[int]:
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return list(struct.unpack(">4I", digest[:16]))


def _sequence(seed: int, names: tuple[str | int, ...]) -> np.random.SeedSequence:
    words = [seed, *_words(names)]
    # NumPy takes an array of 32-bit words as it is. Cutting each number of a list into such words, which gives the
    # same, takes longer than all the rest, and a simulation draws a stream for each node in each round.
    return np.random.SeedSequence(np.array(words, np.uint32) if seed < 2**32 else words)


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The random stream of this name, a pure function of (seed, names)."""
    return np.random.default_rng(_sequence(seed, names))


def torch_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed of this name, for generators that want one number."""
    return int(np.random.PCG64(_sequence(seed, names)).random_raw()) >> 1
