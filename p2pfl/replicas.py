"""What each neighbour's vector is, as far as its updates have told: where only differences travel, one adds them up.

An update names the round of the one that it continues. One that continues another than was added last is refused
before it is sent, and a whole vector comes in its place: so a replica is either what its owner has, or not used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from p2pfl.compression import Codec
from p2pfl.envelope import NO_BASE


class Replicas:
    """The neighbours' vectors, float32 (S,), on the CPU."""

    def __init__(self, codec: Codec, start: Tensor | None, numbers: Callable[[str, int], int]) -> None:
        """`start`: what everybody's vector was at first, if updates are differences; None if they are vectors.

        `numbers` gives the random number of a neighbour's codec in a round.
        """
        self._codec = codec
        self._start = None if start is None else start.detach().cpu().clone()
        self._numbers = numbers
        self._known: dict[str, tuple[int, Tensor]] = {}  # peer → (round, vector)
        self._epochs: dict[str, int] = {}  # peer → of the process that told it

    @property
    def continued(self) -> bool:
        """Whether updates are differences."""
        return self._start is not None

    def met(self, peer: str, epoch: int) -> None:
        """A process of `peer` is linked: of a new one nothing is known yet, and its rounds are not the last one's."""
        if epoch != self._epochs.get(peer):
            self._epochs[peer] = epoch
            self._known.pop(peer, None)

    def has(self, peer: str, base: int) -> bool:
        """Whether an update that continues that of round `base` can be understood."""
        return self._start is None or base == self._known.get(peer, (NO_BASE, self._start))[0]

    def read(self, peer: str, round: int, data: memoryview) -> Tensor:
        """The vector that this update of `peer`, in the codec, comes to. Nothing is kept. BadMessage if it is none."""
        decoded = self._codec.decode(data, self._numbers(peer, round))
        if self._start is not None:
            decoded.add_(self._known.get(peer, (NO_BASE, self._start))[1])
        return decoded

    def keep(self, peer: str, round: int, vector: Tensor) -> None:
        """From now on this is what `peer` has; what it sends next may continue it."""
        if self._start is not None:
            self._known[peer] = (round, vector)


def whole(data: memoryview) -> Tensor:
    """The vector of an update that came as float32, in memory of its own."""
    return torch.frombuffer(data, dtype=torch.float32).clone()
