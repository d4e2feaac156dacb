"""How the neighbours' vectors and the own one become one, and whether a received vector may take part at all.

A model is one flat float32 tensor of P elements. The functions walk over it in blocks: while a block is summed up it
stays in the processor's cache, and nothing of size P is allocated. All tensors of a call are on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from p2pfl.messages import BadMessage

BLOCK = 2**20  # elements (4 MiB): measured fastest of 2^14 .. 2^20 for 100 MB vectors, twice as fast as whole passes
MAX_VALUE = 1e30  # no trained parameter comes near; up to here a weighted sum and a step stay below 3.4e38, the largest
PROBED, PROJECTIONS = 2**16, 32  # elements looked at, numbers that come of them
NORM_FACTOR = 100.0  # a vector this many times longer than usual would drag the mean away: a fault, or an attack


def fold(own: Tensor, contributions: Sequence[tuple[str, float, Tensor]], name: str, out: Tensor) -> None:
    """out = w_own * own + sum_j w_j * vector_j, with w_own = 1 - sum_j w_j: what is missing stays with oneself.

    `contributions` are (peer, w_j, vector_j); `name` is the own node's. All vectors are flat float32 of one size. The
    terms are added in the order of all names, the own included, so that the result is the same bit for bit whatever the
    order of arrival. `out` may be `own` or any of the vectors themselves (not one that overlaps them elsewhere): a
    block is written after all of it was read. ValueError for two terms of one name and for vectors that differ in
    form.
    """
    own_weight = 1.0 - math.fsum(weight for _, weight, _ in contributions)
    terms = sorted([(name, own_weight, own), *contributions], key=lambda term: term[0])
    if len({term[0] for term in terms}) != len(terms):
        raise ValueError(f"two contributions of one name: {[term[0] for term in terms]}")
    for vector in (out, *(vector for _, _, vector in terms)):
        if vector.dtype != torch.float32 or vector.ndim != 1 or vector.shape != own.shape:
            raise ValueError(f"flat float32 of {own.numel()} elements expected, not {vector.dtype} {vector.shape}")

    _, first_weight, first = terms[0]
    scratch = own.new_empty(min(BLOCK, own.numel()))
    for start in range(0, own.numel(), BLOCK):
        target = out[start : start + BLOCK]
        total = scratch[: target.numel()]
        torch.mul(first[start : start + BLOCK], first_weight, out=total)
        for _, weight, vector in terms[1:]:
            total.add_(vector[start : start + BLOCK], alpha=weight)
        target.copy_(total)


class Probe:
    """A few random projections of a vector, the same ones at every node: enough to see how far nodes are apart.

    Each is a sum of some of the elements with random signs. Mixing is linear, so it does to the projections of all
    nodes what it does to their vectors. At most PROBED elements are looked at, however long the vector; no element can
    be read off.
    """

    def __init__(self, size: int, random: np.random.Generator) -> None:
        """`size` of the vectors that will be probed; `random` from a seed that all nodes share."""
        kept = min(size, PROBED)
        self._elements = torch.from_numpy(np.sort(random.choice(size, kept, replace=False)))
        self._signs = torch.from_numpy(random.choice(np.array([-1.0, 1.0]), kept))
        self._group = torch.from_numpy(random.integers(PROJECTIONS, size=kept))

    def __call__(self, vector: Tensor) -> tuple[float, ...]:
        """PROJECTIONS numbers, summed in float64, of a flat float32 vector."""
        picked = vector.detach()[self._elements.to(vector.device)].cpu().double()
        sums = torch.zeros(PROJECTIONS, dtype=torch.float64).index_add_(0, self._group, picked * self._signs)
        return tuple(sums.tolist())


def distance_to_mean(own: Tensor, vectors: Sequence[Tensor]) -> float:
    """||own - mean(vectors)||_2, in float64 since near consensus it is far below the vectors' length; 0.0 for none."""
    if not vectors:
        return 0.0
    scratch = _wide_block(own)
    squares = []
    for start in range(0, own.numel(), BLOCK):
        block = own[start : start + BLOCK]
        gap = scratch[: block.numel()].copy_(block)
        for vector in vectors:
            gap.sub_(vector[start : start + BLOCK], alpha=1 / len(vectors))
        squares.append(torch.dot(gap, gap).item())
    return math.sqrt(math.fsum(squares))


def check_vector(vector: Tensor, typical_norm: float | None) -> float:
    """The L2 norm of a received vector (flat float32, at least one element), if it may be averaged.

    BadMessage "bad_value" for NaN, infinity, |value| > MAX_VALUE, and a norm above NORM_FACTOR * `typical_norm`.
    Without a typical norm (None, or 0.0) there is nothing to compare with. Zeros and denormals are numbers like others.
    """
    low, high = torch.aminmax(vector)  # NaN if there is any; 30 times cheaper than isfinite().all()
    largest = max(-low.item(), high.item())
    if not math.isfinite(low.item() + high.item()):
        raise BadMessage("bad_value", "the vector holds NaN or infinity")
    if largest > MAX_VALUE:
        raise BadMessage("bad_value", f"a value of size {largest:.1e}, above {MAX_VALUE:.0e}")
    norm = _norm(vector)
    if typical_norm and norm > NORM_FACTOR * typical_norm:
        raise BadMessage("bad_value", f"norm {norm:.3g}, more than {NORM_FACTOR:g} times the usual {typical_norm:.3g}")
    return norm


def _norm(vector: Tensor) -> float:
    """In float64: squares of float32 overflow from 1.8e19 on, and summing millions of them loses three digits."""
    scratch = _wide_block(vector)
    squares = []
    for start in range(0, vector.numel(), BLOCK):
        block = vector[start : start + BLOCK]
        part = scratch[: block.numel()].copy_(block)
        squares.append(torch.dot(part, part).item())
    return math.sqrt(math.fsum(squares))


def _wide_block(vector: Tensor) -> Tensor:
    """Room for one block in float64; in float32 on Apple's GPUs, which have no float64 (not tested on one)."""
    dtype = torch.float32 if vector.device.type == "mps" else torch.float64
    return vector.new_empty(min(BLOCK, vector.numel()), dtype=dtype)
