"""How a vector becomes fewer bytes, and what is sent when those bytes tell less than the vector.

A codec is a pure function of its four fields and of a number that both ends know. Its bytes are a few arrays of fixed
length, little-endian, one after the other:

    none      size float32
    fp16      size float16, to the nearest; what is beyond ±65,504 becomes ±65,504
    bf16      size bfloat16, to the nearest; what is beyond ±3.39e38 becomes ±3.39e38
    int8      a float32 scale for each block, size int8:  scale * round(x / scale),  scale = max|x| / 127 of the block
    top-k     k int32 indices, increasing; k float32 values: the k elements that are largest by |x|
    random-k  k float32 values: of elements that follow from the random number, which travel without a byte
    sign      a float32 scale for each block, size bits:  scale * sign(x),  scale = mean|x| of the block

with k = ceil(fraction * size). A receiver knows how many bytes must come, and of what it reads nothing becomes NaN,
infinity or an index out of range. What a sender gets from `approximate` and a receiver from `decode` is the same to
the bit on any machine: no sum is taken on the way back.

The last three lose so much that averaging what is left of the vectors stalls: they need CHOCO (below), which sends
differences, so that what is lost fades. int8 gains by it, too, but can do without where neighbours change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from p2pfl.messages import BadMessage

CODECS = ("none", "fp16", "bf16", "int8", "top-k", "random-k", "sign")
BLOCK = 2560  # elements that share a scale: 4 bytes for them are 0.16 % of int8, and layers that differ share none
LEVELS = 127  # of each sign in an int8; -128 stays unused, so that x and -x lose alike
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it a float32 loses digits: such a block, < 1.5e-36, becomes 0
LARGEST_SCALE = 2.679e36  # just below the largest float32 / 127, so that 127 * scale is one, too
MAX_SIZE = 2**31 - 1  # elements: an index is an int32

Parts = tuple[Tensor, ...]  # flat, one for each entry of a layout


@dataclass(frozen=True)
class Codec:
    """One way to write a vector of `size` float32, the same at both ends.

    ValueError for a name that is not in CODECS, and for numbers out of range.
    """

    name: str
    size: int  # elements of the vector, 1 to MAX_SIZE
    fraction: float = 0.1  # of the elements, that top-k and random-k send; in (0, 1]
    seed: int = 0  # of random-k; the experiment's

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise ValueError(f"{self.name!r} is none of {', '.join(CODECS)}")
        if not 1 <= self.size <= MAX_SIZE or not 0 < self.fraction <= 1:
            raise ValueError(f"no codec for {self.size} elements and a fraction of {self.fraction}")

    @cached_property
    def kept(self) -> int:
        """k = ceil(fraction * size), of the fraction as it is written: 0.07 of 100 are 7; as floats, 7.0…01."""
        return math.ceil(Fraction(str(self.fraction)) * self.size)

    @cached_property
    def layout(self) -> tuple[tuple[str, int], ...]:
        """(NumPy's name of the type, length) of each array on the wire."""
        blocks = -(-self.size // BLOCK)
        match self.name:
            case "none":
                return (("<f4", self.size),)
            case "fp16":
                return (("<f2", self.size),)
            case "bf16":
                return (("<i2", self.size),)  # its bits: NumPy has no bfloat16
            case "int8":
                return (("<f4", blocks), ("|i1", self.size))
            case "top-k":
                return (("<i4", self.kept), ("<f4", self.kept))
            case "random-k":
                return (("<f4", self.kept),)
            case _:
                return (("<f4", blocks), ("|u1", -(-self.size // 8)))

    @property
    def nbytes(self) -> int:
        """Bytes that every vector takes, whatever it holds."""
        return sum(np.dtype(form).itemsize * count for form, count in self.layout)

    def encode(self, vector: Tensor, random_number: int) -> memoryview:
        """The `nbytes` bytes of `vector`, float32 (size,), in new memory.

        `random_number` ≥ 0 is one that both ends have for this vector, from its signer and round; random-k needs it.
        ValueError for a vector of another form, and for one that holds NaN or infinity.
        """
        out = np.empty(self.nbytes, np.uint8)
        start = 0
        for (form, count), part in zip(self.layout, self._compressed(vector, self._drawn(random_number)), strict=True):
            end = start + np.dtype(form).itemsize * count
            out[start:end].view(form)[:] = part.cpu().numpy()
            start = end
        return out.data

    def decode(self, data: memoryview | bytes, random_number: int) -> Tensor:
        """The vector, float32 (size,) on the CPU, that `data` stands for; its memory is new, every number finite.

        BadMessage "bad_value" for bytes that no encoder makes, ValueError if they are not `nbytes`.
        """
        if memoryview(data).nbytes != self.nbytes:
            raise ValueError(f"{memoryview(data).nbytes} bytes where {self.name} takes {self.nbytes}")
        parts: Parts = ()
        start = 0
        for form, count in self.layout:
            array = np.frombuffer(data, form, count, start)
            parts += (torch.from_numpy(array.astype(array.dtype.newbyteorder("="))),)
            start += array.nbytes
        self._check(parts)
        vector = self._expanded(parts, self._drawn(random_number))
        if not _is_finite(vector):
            raise BadMessage("bad_value", f"NaN or infinity in a vector sent as {self.name}")
        return vector

    def approximate(self, vector: Tensor, random_number: int) -> Tensor:
        """decode(encode(vector)) to the bit, in new memory on the vector's device, without the way through bytes."""
        drawn = self._drawn(random_number)
        return self._expanded(self._compressed(vector, drawn), drawn)

    def _compressed(self, vector: Tensor, drawn: Tensor) -> Parts:
        if vector.dtype != torch.float32 or vector.shape != (self.size,):
            raise ValueError(f"float32 ({self.size},) expected, not {vector.dtype} {tuple(vector.shape)}")
        if not _is_finite(vector):
            raise ValueError("a vector with NaN or infinity has no codec")
        match self.name:
            case "none":
                return (vector.clone(),)
            case "fp16":
                return (_rounded(vector, torch.float16),)
            case "bf16":
                return (_rounded(vector, torch.bfloat16).view(torch.int16),)
            case "int8":
                blocks = _blocks(vector)
                largest = blocks.abs().amax(dim=1)
                scales = functional.threshold(largest / LEVELS, SMALLEST_SCALE, 0.0).clamp(max=LARGEST_SCALE)
                levels = blocks.div_(scales.where(scales > 0, math.inf).unsqueeze(1)).round_()  # ties to even
                return scales, levels.view(-1)[: self.size].to(torch.int8)
            case "top-k":
                indices = _largest(vector.abs(), self.kept)
                return indices.int(), vector[indices]
            case "random-k":
                return (vector[drawn.to(vector.device)],)
            case _:
                totals = _blocks(vector).abs_().sum(dim=1, dtype=torch.float64)
                lengths = torch.full_like(totals, BLOCK)
                lengths[-1] = self.size - BLOCK * (len(totals) - 1)
                return (totals / lengths).float(), _packed(vector >= 0)

    def _expanded(self, parts: Parts, drawn: Tensor) -> Tensor:
        match self.name:
            case "none":
                return parts[0]
            case "fp16":
                return parts[0].float()
            case "bf16":
                return parts[0].view(torch.bfloat16).float()
            case "int8":
                scales, levels = parts
                return _blocks(levels.float()).mul_(scales.unsqueeze(1)).view(-1)[: self.size]
            case "top-k":
                indices, values = parts
                return values.new_zeros(self.size).index_copy_(0, indices.long(), values)
            case "random-k":
                (values,) = parts
                return values.new_zeros(self.size).index_copy_(0, drawn.to(values.device), values)
            case _:
                scales, signs = parts
                spread = scales.repeat_interleave(BLOCK)[: self.size]
                return spread.where(_unpacked(signs, self.size), -spread)

    def _check(self, parts: Parts) -> None:
        """BadMessage for parts that no encoder makes, as far as the finished vector would not show it."""
        match self.name:
            case "int8":
                scales, levels = parts
                if (scales < 0).any() or (levels < -LEVELS).any():
                    raise BadMessage("bad_value", "a negative scale, or a level of -128, in a vector sent as int8")
            case "sign":
                scales, signs = parts
                if (scales < 0).any() or int(signs[-1]) >> ((self.size - 1) % 8 + 1):
                    raise BadMessage("bad_value", "a negative scale, or a bit too many, in a vector sent as sign")
            case "top-k":
                indices, _ = parts
                if indices[0] < 0 or indices[-1] >= self.size or (indices[1:] <= indices[:-1]).any():
                    raise BadMessage("bad_value", f"the indices do not increase from 0 to {self.size - 1} at most")
            case _:
                pass

    def _drawn(self, random_number: int) -> Tensor:
        """The k elements of random-k, int64, increasing, every choice of k with the same chance; none for other codecs.

        What is still missing is drawn until nothing is, with replacement; of k > size / 2 those that are left out. The
        words that PCG64 gives for a seed are the same in every version of NumPy (its policy, NEP 19); neither NumPy nor
        torch promises that of its own way to draw without replacement.
        """
        if self.name != "random-k":
            return torch.empty(0, dtype=torch.int64)
        words = np.random.PCG64([self.seed, random_number])
        few = min(self.kept, self.size - self.kept)
        marked = np.zeros(self.size, np.bool_)
        while missing := few - np.count_nonzero(marked):
            marked[words.random_raw(missing) % self.size] = True
        return torch.from_numpy(np.flatnonzero(marked if few == self.kept else ~marked))


def _is_finite(vector: Tensor) -> bool:
    low, high = torch.aminmax(vector)  # NaN if there is any; 30 times cheaper than isfinite().all()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _rounded(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of the narrower type, ties to the even one; what is beyond its largest becomes that one."""
    largest = torch.finfo(dtype).max
    return vector.clamp(-largest, largest).to(dtype)


def _blocks(vector: Tensor) -> Tensor:
    """(blocks, BLOCK) in new memory, the last one filled up with zeros."""
    filled = vector.new_zeros(-(-vector.numel() // BLOCK), BLOCK)
    filled.view(-1)[: vector.numel()] = vector
    return filled


def _largest(keys: Tensor, k: int) -> Tensor:
    """Where the k largest keys are, int64, increasing; of equal keys those with the lower index."""
    threshold = keys.kthvalue(keys.numel() - k + 1).values
    chosen = keys > threshold
    ties = (keys == threshold).nonzero().view(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().view(-1)


def _packed(bits: Tensor) -> Tensor:
    """uint8: eight of the bits in each, the first one lowest; zeros fill up the last."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), bitorder="little")).to(bits.device)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits, bool."""
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little").view(np.bool_)
    return torch.from_numpy(bits).to(packed.device)


# -- CHOCO: averaging of what the neighbours know of each other ------------------------------------------------------
# Koloskova, Stich and Jaggi, Decentralized stochastic optimization and gossip algorithms with compressed communication,
# 2019. Each node i has a replica r_i of its vector, and so has each of its neighbours: they are equal. In a round
#
#     x_i = the vector after training          q_i = Q(x_i - r_i)          r_i += q_i, at i and at every neighbour
#     x_i <- x_i + gamma * (sum_j w_ij r_j - r_i), j = i included
#
# As replicas come closer to vectors, less is left to be sent: what Q loses fades. The mean is kept whatever Q does, if
# the columns of W sum to 1. A delta that is lost must be made good by the whole replica: with replicas of one node that
# differ there is never agreement.
# With gradients the fixed point is that of plain averaging (train, then mix) with I + gamma * (W - I).

DIFFERENCES = ("int8", "top-k", "random-k", "sign")  # codecs through which replicas follow; the others send vectors

# How far to go: a gamma that is fast on a torus and on a random 4-regular graph of 16, and safe on dense ones, tuned by
# hand for d = 200 and fractions of 10 %; a smaller fraction needs a smaller gamma. A ring bears twice as much for
# top-k and random-k. sign works best in between: from 1.1 on it diverges on a complete graph; at 0.8 and below single
# elements may fall far behind, for which the scale of all is then too small. The paper's own bound is safe wherever a
# codec contracts, and hundreds of times smaller.
GAMMA: Mapping[str, float] = MappingProxyType(
    {"none": 1.0, "fp16": 1.0, "bf16": 1.0, "int8": 1.0, "top-k": 0.2, "random-k": 0.06, "sign": 0.9}
)


def difference(vector: Tensor, replica: Tensor) -> Tensor:
    """x_i - r_i, (size,): what is encoded."""
    return vector - replica


def advance(replica: Tensor, decoded: Tensor) -> None:
    """r_i += q_i, in place; with the same bits of q_i at i and at each neighbour."""
    replica.add_(decoded)


def step(values: Tensor, mixed_replicas: Tensor, own_replica: Tensor, gamma: float) -> Tensor:
    """x_i + gamma * (sum_j w_ij r_j - r_i), (size,), from x_i, the mean of the replicas by row i of W, and r_i."""
    return values.add(mixed_replicas - own_replica, alpha=gamma)
